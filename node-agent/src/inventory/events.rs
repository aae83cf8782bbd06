//! The engine's events, made changes of what is known. Says what an event means; what follows from it is for the task.

use bollard::models::EventMessage;
use jiff::Timestamp;

/// What an event means to us.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    Connect {
        network: String,
        container: String,
    },
    Disconnect {
        network: String,
        container: String,
    },
    /// A container that was made or renamed: its name and labels are to be read.
    Read(String),
    Start(String),
    Die(String),
    Gone(String),
    NetworkMade(String),
    NetworkGone(String),
    /// The engine read its configuration again.
    Reload,
}

impl Change {
    /// The container whose addresses may have another holder after it, then at its own time and not at that of the batch.
    pub(super) fn moves_addresses_of(&self) -> Option<&str> {
        match self {
            Self::Connect { container, .. } | Self::Disconnect { container, .. } | Self::Gone(container) => Some(container),
            // Its addresses are its own until the engine takes them back, and it has none before the engine gives them.
            Self::Start(_) | Self::Die(_) | Self::Read(_) | Self::NetworkMade(_) | Self::Reload => None,
            // Everybody's who was on it.
            Self::NetworkGone(_) => None,
        }
    }
}

/// What an event means, and when it happened; `None`: nothing to us.
pub(super) fn change(event: EventMessage) -> Option<(Timestamp, Change)> {
    let at = Timestamp::from_nanosecond(i128::from(event.time_nano?)).ok()?;
    let kind = event.typ?.to_string();
    let action = event.action?;
    let actor = event.actor.unwrap_or_default();
    let id = actor.id.filter(|id| !id.is_empty());
    let container = actor.attributes.and_then(|mut attributes| attributes.remove("container"));
    let change = match (kind.as_str(), action.as_str()) {
        ("network", "connect") => Change::Connect { network: id?, container: container? },
        ("network", "disconnect") => Change::Disconnect { network: id?, container: container? },
        ("network", "create" | "update") => Change::NetworkMade(id?),
        ("network", "destroy" | "remove") => Change::NetworkGone(id?),
        ("container", "create" | "rename" | "update") => Change::Read(id?),
        ("container", "start") => Change::Start(id?),
        ("container", "die") => Change::Die(id?),
        ("container", "destroy") => Change::Gone(id?),
        ("daemon", "reload") => Change::Reload,
        (_, _) => return None,
    };
    Some((at, change))
}

#[cfg(test)]
mod tests {
    use bollard::models::{EventActor, EventMessageTypeEnum};

    use super::*;

    fn event(kind: EventMessageTypeEnum, action: &str, attributes: &[(&str, &str)]) -> EventMessage {
        let attributes = attributes.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
        EventMessage {
            typ: Some(kind),
            action: Some(action.to_owned()),
            actor: Some(EventActor { id: Some("id".to_owned()), attributes: Some(attributes) }),
            time_nano: Some(1_700_000_000_123_456_789),
            ..EventMessage::default()
        }
    }

    #[test]
    fn an_event_happened_when_the_engine_says_to_the_nanosecond() {
        let joined = event(EventMessageTypeEnum::NETWORK, "connect", &[("container", "c"), ("name", "front"), ("type", "bridge")]);
        let (at, what) = change(joined).unwrap();
        assert_eq!(at.as_nanosecond(), 1_700_000_000_123_456_789);
        assert_eq!(what, Change::Connect { network: "id".to_owned(), container: "c".to_owned() });
    }

    #[test]
    fn a_label_named_like_an_attribute_changes_nothing_about_who_it_is() {
        let labelled = event(EventMessageTypeEnum::CONTAINER, "rename", &[("container", "another"), ("oldName", "/x"), ("name", "y")]);
        assert_eq!(change(labelled).unwrap().1, Change::Read("id".to_owned()));
    }

    #[test]
    fn events_that_are_nothing_to_us_or_lack_something_are_skipped() {
        for kind in [EventMessageTypeEnum::IMAGE, EventMessageTypeEnum::VOLUME, EventMessageTypeEnum::DAEMON] {
            assert_eq!(change(event(kind, "create", &[])), None);
        }
        assert_eq!(change(event(EventMessageTypeEnum::CONTAINER, "exec_create: true", &[])), None);
        assert_eq!(change(event(EventMessageTypeEnum::NETWORK, "connect", &[])), None, "no container");
        assert_eq!(change(EventMessage::default()), None);
        let late = EventMessage { time_nano: Some(i64::MAX), ..event(EventMessageTypeEnum::CONTAINER, "die", &[]) };
        assert!(change(late).is_some(), "any time is a time");
    }
}
