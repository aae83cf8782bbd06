//! What one ruleset takes away from another: whether living connections have to be judged again, and which addresses have passed
//! to other hands.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::{Pin, Remote, Ruleset, Spot, Watch};
use crate::evaluate::Standing;

/// The stricter, the higher.
fn severity(standing: Standing) -> u8 {
    match standing {
        Standing::Open => 0,
        Standing::Audit => 1,
        Standing::Enforce(_) => 2,
        Standing::Quarantined => 3,
    }
}

impl Ruleset {
    /// Whether something that `earlier` let begin is denied now, between ends that are both there still: a bridge is guarded that
    /// wasn't (a container in Enforce joined it, and was on it a moment before it was bound), a side is stricter, an allow is gone
    /// (its time is over, or its container goes by another name now).
    pub fn narrows(&self, earlier: &Self) -> bool {
        let guarded = |ruleset: &Self, bridge: &String| ruleset.watched.get(bridge).is_some_and(|watch| watch.guarded);
        let newly_guarded = self.watched.keys().any(|bridge| guarded(self, bridge) && !guarded(earlier, bridge));
        let stricter = || {
            let both = earlier.sides.iter().filter_map(|(spot, old)| Some((*old, *self.sides.get(spot)?)));
            both.into_iter().any(|(old, new)| severity(new) > severity(old))
        };
        let stays = |spot: &Spot| spot.bridge.is_none() || self.sides.contains_key(spot);
        let gone = || {
            earlier.pairs.difference(&self.pairs).any(|pair| {
                stays(&pair.local)
                    && match &pair.remote {
                        Remote::Spot(spot) => stays(spot),
                        Remote::Outside(_) => true,
                    }
            })
        };
        newly_guarded || stricter() || gone()
    }

    /// Addresses that `earlier` tied to a port which doesn't have them any more, on bridges that are still guarded. The engine
    /// makes a port for each start of a container, so the same port is the same container.
    pub fn given_back(&self, earlier: &Self) -> BTreeSet<IpAddr> {
        let guarded = |pin: &&Pin| self.watched.get(&pin.bridge).is_some_and(|watch: &Watch| watch.guarded);
        let held = |pins: &BTreeMap<String, Pin>| -> BTreeSet<(IpAddr, String)> {
            let pins = pins.iter().filter(|(_, pin)| guarded(pin));
            pins.flat_map(|(port, pin)| pin.addresses.iter().map(move |&address| (address, port.clone()))).collect()
        };
        held(&earlier.pins).difference(&held(&self.pins)).map(|(address, _)| *address).collect()
    }

    /// The same without the ports that one of these addresses is tied to: nothing passes there.
    #[must_use]
    pub fn without(&self, addresses: &BTreeSet<IpAddr>) -> Self {
        let mut held_back = self.clone();
        held_back.pins.retain(|_, pin| pin.addresses.is_disjoint(addresses));
        held_back
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy_set::Direction;
    use crate::ruleset::Pair;
    use crate::segment::Refusal;
    use crate::service::Service;

    fn spot(last: u8) -> Spot {
        Spot { bridge: Some("br".into()), address: [10, 0, 0, last].into() }
    }

    fn pair(local: u8, remote: u8) -> Pair {
        Pair { direction: Direction::Egress, local: spot(local), remote: Remote::Spot(spot(remote)), ports: Service::tcp(80).into() }
    }

    /// 10.0.0.2 in Enforce may reach 10.0.0.3, which is in Learn.
    fn two() -> Ruleset {
        let pin = |last: u8| Pin { bridge: "br".into(), mac: [last; 6], addresses: [spot(last).address].into() };
        Ruleset {
            watched: [("br".to_owned(), Watch { guarded: true })].into(),
            sides: [(spot(2), Standing::Enforce(Refusal::Drop)), (spot(3), Standing::Open)].into(),
            pairs: [pair(2, 3)].into(),
            pins: [("v2".to_owned(), pin(2)), ("v3".to_owned(), pin(3))].into(),
            ..Ruleset::default()
        }
    }

    #[test]
    fn what_only_comes_or_goes_narrows_nothing() {
        let mut more = two();
        more.sides.insert(spot(4), Standing::Enforce(Refusal::Drop));
        more.pairs.insert(pair(4, 3));
        assert!(!two().narrows(&two()));
        assert!(!more.narrows(&two()), "a newcomer");
        assert!(!two().narrows(&more), "somebody who left, with what was allowed to them");
    }

    #[test]
    fn a_guarded_bridge_a_stricter_side_and_a_lost_allow_narrow() {
        let mut open = two();
        open.watched.insert("br".into(), Watch { guarded: false });
        assert!(two().narrows(&open));
        assert!(two().narrows(&Ruleset::default()));
        assert!(!open.narrows(&two()));
        let mut strict = two();
        strict.sides.insert(spot(3), Standing::Quarantined);
        assert!(strict.narrows(&two()) && !two().narrows(&strict));
        let mut lost = two();
        lost.pairs.clear();
        assert!(lost.narrows(&two()) && !two().narrows(&lost));
    }

    #[test]
    fn an_address_at_another_port_was_given_back_and_is_held_back_there() {
        let mut later = two();
        let pin = later.pins.remove("v3").unwrap();
        later.pins.insert("v9".into(), pin);
        let given = later.given_back(&two());
        assert_eq!(given, [spot(3).address].into());
        assert_eq!(later.without(&given).pins.keys().collect::<Vec<_>>(), ["v2"]);
        assert!(two().given_back(&two()).is_empty());
        later.watched.clear();
        assert!(later.given_back(&two()).is_empty(), "no longer guarded: nothing is to be ended");
    }
}
