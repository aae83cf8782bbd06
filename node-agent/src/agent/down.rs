//! `down`: everything out of the kernel, the switches as they were; and that it is the right network namespace that this is done in.
//! How the host was is forgotten only when all that is done.

use std::io;
use std::path::{Path, PathBuf};

use policy::{Mode, NodePlan};
use serde::{Deserialize, Serialize};
use tracing::info;

use super::keep::{self, Keep};
use super::{AgentError, io_at};
use crate::enforce::{Enforcer, Nftables};
use crate::netns::{self, Identity, NetnsError};
use crate::observe::{self, ObserveError};

/// How the host was before, for `down`. Written before the first change is made, completed as more is changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Before {
    /// The file of the namespace that was worked in; `None`: the one that the agent was started in.
    pub(super) netns: Option<PathBuf>,
    /// Which namespace that was; `None`: an older agent did not say.
    pub(super) place: Option<Identity>,
    /// The switches of observation.
    pub(super) originals: observe::Originals,
}

/// Whether `down` works where the agent worked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    There,
    Elsewhere,
    /// Nothing of ours is left in the kernel then.
    Rebooted,
    Unknown,
}

impl Before {
    /// For an agent that begins here. How another namespace was is not how this one was; after a boot they can't be told apart.
    pub(super) fn begun(self, netns: Option<PathBuf>, here: Option<Identity>) -> Self {
        let originals = match self.standing(here.as_ref()) {
            Standing::Elsewhere => observe::Originals::default(),
            Standing::There | Standing::Rebooted | Standing::Unknown => self.originals,
        };
        Self { netns, place: here, originals }
    }

    fn standing(&self, here: Option<&Identity>) -> Standing {
        let Some(here) = here else { return Standing::Unknown };
        match &self.place {
            Some(place) if place == here => Standing::There,
            Some(place) if place.boot == here.boot => Standing::Elsewhere,
            Some(_) => Standing::Rebooted,
            None if !self.originals.on.boot.is_empty() && self.originals.on.boot != here.boot => Standing::Rebooted,
            None => Standing::Unknown,
        }
    }

    /// Enters the namespace to work in. False: it is gone, and everything in it.
    fn enter(&self, given: Option<&Path>) -> Result<bool, NetnsError> {
        let Some(path) = given.or(self.netns.as_deref()) else { return Ok(true) };
        match netns::enter(path) {
            Err(NetnsError::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound && given.is_none() => {
                // Only its name went, as with the process by which it was named.
                let Some(pid) = self.place.as_ref().and_then(Identity::process) else { return Ok(false) };
                netns::enter(Path::new(&format!("/proc/{pid}/ns/net"))).map(|()| true)
            }
            entered => entered.map(|()| true),
        }
    }
}

/// Whether this plan means tables in the kernel.
fn guards(plan: &NodePlan) -> bool {
    let set = &plan.set;
    !set.quarantines.is_empty() || set.segments.values().any(|segment| matches!(segment.mode, Mode::Audit | Mode::Enforce))
}

/// That what is to be taken out is here; whether tables are missing that should be.
fn must_be_there(before: &Before, state_dir: &Path) -> Result<bool, AgentError> {
    let should_be = || keep::load_plan(state_dir).map_or(true, |plan| plan.as_ref().is_some_and(guards));
    let standing = before.standing(Identity::here().as_ref());
    match standing {
        Standing::Elsewhere => Err(AgentError::Elsewhere { process: before.place.as_ref().and_then(Identity::process) }),
        Standing::Rebooted => Ok(false),
        Standing::There | Standing::Unknown if !should_be() || Nftables::open()?.is_there()? => Ok(false),
        Standing::There => Ok(true),
        Standing::Unknown => Err(AgentError::NoTable),
    }
}

/// Takes everything out of the kernel and puts the switches back. `only_look`: only whether this is the place for it.
///
/// # Errors
/// It was started in another network namespace; another agent lives and doesn't end; the kernel refuses.
pub fn down(state_dir: &Path, given: Option<&Path>, only_look: bool) -> Result<(), AgentError> {
    let before: Before = keep::load(state_dir, keep::BEFORE)?.unwrap_or_default();
    // All of this before anybody is ended: the namespace may be named by the agent's own number, which goes with it.
    let is_left = before.enter(given)?;
    let missing = is_left && must_be_there(&before, state_dir)?;
    if only_look {
        return Ok(());
    }
    Keep::end_holder(state_dir)?;
    let keep = Keep::open(state_dir)?;
    if !is_left {
        info!("the namespace is gone: nothing to take down");
        return Ok(keep.forget()?);
    }
    for table in Nftables::open()?.remove()? {
        println!("removed table {table}");
    }
    if missing {
        println!("no table of the stored plan was here: somebody took them away, or they went with the socket that owned them");
    }
    observe::table::remove_left_over().map_err(io_at("remove the observation table"))?;
    // As the agent left it at its end.
    let before: Before = keep.load(keep::BEFORE)?.unwrap_or_default();
    before.originals.restore().map_err(ObserveError::from)?;
    println!("switches are as they were");
    Ok(keep.forget()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(boot: &str, inode: u64) -> Identity {
        Identity { boot: boot.to_owned(), device: 4, inode }
    }

    fn before(place: Option<Identity>, on: &str) -> Before {
        let mut before = Before { place, ..Before::default() };
        before.originals.on.boot = on.to_owned();
        before.originals.sysctls.insert("nf_conntrack_acct".to_owned(), "0".to_owned());
        before
    }

    #[test]
    fn where_down_works_is_told_from_where_the_agent_worked() {
        let cases = [
            ("the same", Some(place("a", 1)), "a", Standing::There),
            ("another", Some(place("a", 2)), "a", Standing::Elsewhere),
            ("the same number in another boot", Some(place("b", 1)), "b", Standing::Rebooted),
            ("another number in another boot", Some(place("b", 2)), "b", Standing::Rebooted),
            ("an older agent in this boot", None, "a", Standing::Unknown),
            ("an older agent in another boot", None, "b", Standing::Rebooted),
            ("an older agent that watched nothing", None, "", Standing::Unknown),
        ];
        for (name, kept, on, expected) in cases {
            assert_eq!(before(kept, on).standing(Some(&place("a", 1))), expected, "{name}");
        }
        assert_eq!(before(Some(place("a", 1)), "a").standing(None), Standing::Unknown, "/proc does not say");
    }

    #[test]
    fn an_agent_that_begins_in_another_namespace_takes_over_nothing_of_the_first() {
        let first = before(Some(place("a", 1)), "a");
        assert_eq!(first.clone().begun(None, Some(place("a", 1))), first);
        let second = first.begun(None, Some(place("a", 2)));
        assert_eq!((second.place, second.originals), (Some(place("a", 2)), observe::Originals::default()));
    }
}
