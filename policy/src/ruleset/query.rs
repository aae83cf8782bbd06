//! Which pairs a spot has: found by the order of the pairs, at the cost of a look-up and not of all of them.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};

use super::{Pair, Remote, Ruleset, Spot};
use crate::policy_set::Direction;
use crate::service::Ports;

/// Before every other spot.
const FIRST_SPOT: Spot = Spot { bridge: None, address: IpAddr::V4(Ipv4Addr::UNSPECIFIED) };

/// Before every other network.
fn first_net() -> IpNet {
    IpNet::V4(Ipv4Net::default())
}

impl Ruleset {
    /// The pairs from this one on, in order: of one direction and one local end at first.
    fn from(&self, direction: Direction, local: &Spot, remote: Remote) -> impl Iterator<Item = &Pair> {
        let first = Pair { direction, local: local.clone(), remote, ports: Ports::LEAST };
        self.pairs.range(first..)
    }

    /// The pairs of one side of a spot.
    pub fn pairs_of(&self, direction: Direction, local: &Spot) -> impl Iterator<Item = &Pair> {
        let from = self.from(direction, local, Remote::Spot(FIRST_SPOT));
        from.take_while(move |pair| pair.direction == direction && pair.local == *local)
    }

    /// Whether a spot has a pair with another, on either side and whatever the port.
    pub fn talks(&self, local: &Spot, remote: &Spot) -> bool {
        [Direction::Ingress, Direction::Egress].into_iter().any(|direction| {
            let next = self.from(direction, local, Remote::Spot(remote.clone())).next();
            next.is_some_and(|pair| {
                pair.direction == direction && pair.local == *local && matches!(&pair.remote, Remote::Spot(spot) if spot == remote)
            })
        })
    }

    /// Whether a spot has a pair with addresses outside.
    pub fn talks_outside(&self, local: &Spot) -> bool {
        [Direction::Ingress, Direction::Egress].into_iter().any(|direction| {
            let next = self.from(direction, local, Remote::Outside(first_net())).next();
            next.is_some_and(|pair| pair.direction == direction && pair.local == *local && matches!(pair.remote, Remote::Outside(_)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_looked_up_is_what_a_search_finds() {
        let spot = |bridge: &str, last: u8| Spot { bridge: Some(bridge.into()), address: [10, 0, 0, last].into() };
        let node = Spot { bridge: None, address: [0, 0, 0, 0].into() };
        let spots = [node, spot("a", 1), spot("a", 2), spot("b", 1), Spot { bridge: Some("b".into()), address: "::1".parse().unwrap() }];
        let nets = ["0.0.0.0/0", "10.0.0.0/8", "::/0"].map(|net| Remote::Outside(net.parse().unwrap()));
        let remotes: Vec<Remote> = spots.iter().cloned().map(Remote::Spot).chain(nets).collect();
        let mut ruleset = Ruleset::default();
        let mut kept = 0_usize;
        for local in &spots {
            for remote in &remotes {
                for (direction, ports) in [(Direction::Egress, "tcp/1"), (Direction::Ingress, "ip47"), (Direction::Egress, "icmp/0")] {
                    kept += 1;
                    // One in seven, so that each answer occurs.
                    if kept.is_multiple_of(7) {
                        let ports = ports.parse().unwrap();
                        ruleset.pairs.insert(Pair { direction, local: local.clone(), remote: remote.clone(), ports });
                    }
                }
            }
        }
        let any = |with: &dyn Fn(&Pair) -> bool| ruleset.pairs.iter().any(with);
        let mut said = std::collections::BTreeSet::new();
        for local in &spots {
            for direction in [Direction::Egress, Direction::Ingress] {
                let found: Vec<_> = ruleset.pairs_of(direction, local).collect();
                let sought: Vec<_> = ruleset.pairs.iter().filter(|p| p.direction == direction && p.local == *local).collect();
                assert_eq!(found, sought);
            }
            let outside = any(&|p| p.local == *local && matches!(p.remote, Remote::Outside(_)));
            assert_eq!(ruleset.talks_outside(local), outside, "{local}");
            for remote in &spots {
                let with = any(&|p| p.local == *local && p.remote == Remote::Spot(remote.clone()));
                assert_eq!(ruleset.talks(local, remote), with, "{local} {remote}");
                said.insert(with);
            }
        }
        assert_eq!(said.len(), 2, "both answers were tried");
    }
}
