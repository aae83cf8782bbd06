//! What the kernel can do, tried with the enforcer itself in a namespace of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

use futures::TryStreamExt;
use netlink_packet_route::link::{InfoBridge, InfoData, InfoKind, LinkAttribute, LinkInfo};
use nix::sched::{CloneFlags, unshare};
use policy::evaluate::Standing;
use policy::policy_set::Direction;
use policy::ruleset::{Door, Pair, Pin, Remote, Ruleset, Spot, Watch};
use policy::segment::Refusal;
use policy::{Ports, Protocol, Service};
use rtnetlink::{LinkBridge, LinkMessageBuilder};

use super::{Check, chain};
use crate::enforce::{Enforcer, Nftables, Ownership, sums};

/// The bridge and the port of the trial; they live in its namespace only.
const BRIDGE: &str = "trial0";
const PORT: &str = "trial1";

/// Tries everything; on a thread of its own, since a namespace is a thread's.
pub(super) fn check() -> Vec<Check> {
    let trial = std::thread::Builder::new().name("trial".to_owned()).spawn(|| match unshare(CloneFlags::CLONE_NEWNET) {
        Ok(()) => inside(),
        Err(error) => vec![Check::fail(
            "kernel",
            format!("not tried: no network namespace can be made ({error})"),
            "run as root, on the host rather than in a container",
        )],
    });
    let checks = trial.ok().and_then(|trial| trial.join().ok());
    checks.unwrap_or_else(|| vec![Check::fail("kernel", "the trial of the kernel ended early", "report this, with the kernel's version")])
}

fn inside() -> Vec<Check> {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return vec![Check::fail("kernel", format!("not tried: {error}"), "")],
    };
    let mut checks = vec![runtime.block_on(bridge())];
    checks.push(filter());
    checks.push(sums());
    // After the filter, whose first `ct` brings connection tracking to the namespace and its keys to /proc.
    checks.push(br_netfilter());
    checks.push(tracking());
    checks
}

/// A bridge with its own nf_call switches.
async fn bridge() -> Check {
    let name = "bridge";
    let made = async {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(|error| error.to_string())?;
        tokio::spawn(connection);
        let switches = InfoData::Bridge(vec![InfoBridge::NfCallIpTables(true), InfoBridge::NfCallIp6Tables(true)]);
        let bridge = LinkMessageBuilder::<LinkBridge>::new(BRIDGE).up().set_info_data(switches).build();
        handle.link().add(bridge).execute().await.map_err(|error| chain(&error))?;
        let found = handle.link().get().match_name(BRIDGE).execute().try_next().await.map_err(|error| chain(&error))?;
        let infos = found.into_iter().flat_map(|link| link.attributes).find_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => infos.into_iter().find_map(|info| match info {
                LinkInfo::Data(InfoData::Bridge(infos)) => Some(infos),
                _ => None,
            }),
            _ => None,
        });
        Ok::<_, String>(infos.unwrap_or_default())
    };
    match made.await {
        Ok(infos) if infos.contains(&InfoBridge::NfCallIpTables(true)) && infos.contains(&InfoBridge::NfCallIp6Tables(true)) => {
            Check::ok(name, format!("{} with switches for the filter", InfoKind::Bridge))
        }
        Ok(_) => Check::fail(
            name,
            "a bridge has no nf_call_iptables switch: packets between two containers of one network can't be filtered",
            "a kernel with CONFIG_BRIDGE_NETFILTER is needed",
        ),
        Err(why) => Check::fail(name, format!("no bridge can be made: {why}"), "a kernel with CONFIG_BRIDGE is needed"),
    }
}

/// Our own rules, of every kind.
fn filter() -> Check {
    let name = "nftables";
    // As the agent that `up` or systemd starts, which keep a copy of the socket.
    let tried = Nftables::open().and_then(|kernel| kernel.kept().apply(&every_kind_of_rule()));
    match tried {
        Ok(applied) => match applied.ownership {
            Ownership::OwnedPersistent => Check::ok(name, format!("takes our rules; tables {}", applied.ownership)),
            Ownership::Owned => Check::warn(
                name,
                format!("takes our rules; tables {}", applied.ownership),
                "before kernel 6.9 the tables go when agent and supervisor are killed at once: nothing is enforced until one is back",
            ),
            Ownership::Shared => Check::warn(
                name,
                format!("takes our rules; tables {}", applied.ownership),
                "before kernel 5.12 others can flush them; they are written again at once and an alarm is raised",
            ),
        },
        Err(error) => Check::fail(
            name,
            chain(&error),
            "nf_tables with the families inet, bridge and arp, conntrack (nft_ct), nft_fib_inet, nft_log, nft_limit and nft_reject are needed; on a machine with modules: modprobe nf_tables",
        ),
    }
}

fn sums() -> Check {
    let name = "checksums";
    match sums::keep_out() {
        Ok(_) => Check::ok(name, "looked at where they are yet to be written"),
        Err(error) => Check::warn(
            name,
            format!("not looked at where they are yet to be written: {}", chain(&error)),
            "two bytes of what a container with NET_RAW sends can change behind the filter: cap_drop: [NET_RAW], or a kernel from 6.4 on with CONFIG_NETFILTER_BPF_LINK and CONFIG_DEBUG_INFO_BTF",
        ),
    }
}

/// A ruleset that needs everything that any ruleset needs.
fn every_kind_of_rule() -> Ruleset {
    let spot = |address: &str| Spot { bridge: Some(BRIDGE.to_owned()), address: parsed(address) };
    // Addresses of RFC 5737 and RFC 3849, which nobody has.
    let (four, six) = (spot("192.0.2.2"), spot("2001:db8::2"));
    let standings = [Standing::Audit, Standing::Enforce(Refusal::Reject), Standing::Enforce(Refusal::Drop), Standing::Quarantined];
    let mut sides: BTreeMap<Spot, Standing> = BTreeMap::from([(four.clone(), standings[1]), (six.clone(), standings[1])]);
    sides.extend(standings.iter().enumerate().map(|(n, standing)| (spot(&format!("192.0.2.{}", n + 10)), *standing)));
    let mut pairs = BTreeSet::new();
    for (local, other, net) in [(&four, spot("192.0.2.3"), "198.51.100.0/24"), (&six, spot("2001:db8::3"), "2001:db8:1::/48")] {
        for direction in [Direction::Egress, Direction::Ingress] {
            for service in [Service::tcp(443), Service::udp(53), Service { protocol: Protocol::Icmp, port: 8 }] {
                let ports = Ports::from(service);
                let host = Spot { bridge: None, address: other.address };
                let nets = net.parse().ok().map(Remote::Outside);
                for remote in [Remote::Spot(other.clone()), Remote::Spot(host)].into_iter().chain(nets) {
                    pairs.insert(Pair { direction, local: local.clone(), remote, ports });
                }
            }
        }
    }
    let pin = Pin { bridge: BRIDGE.to_owned(), mac: [2, 0, 0, 0, 0, 2], addresses: BTreeSet::from([four.address, six.address]) };
    let door = Door { address: parsed("192.0.2.1"), protocol: Protocol::Tcp, port: 8080 };
    Ruleset {
        bridges: BTreeSet::from([BRIDGE.to_owned()]),
        watched: BTreeMap::from([(BRIDGE.to_owned(), Watch { guarded: true, ..Watch::default() })]),
        pins: BTreeMap::from([(PORT.to_owned(), pin)]),
        sides,
        doors: BTreeMap::from([(door.clone(), standings[1])]),
        pairs,
        ajar: BTreeSet::from([door.clone()]),
        node: BTreeSet::from([parsed("192.0.2.1")]),
        subnets: ["192.0.2.0/24", "2001:db8::/64"].iter().filter_map(|net| net.parse().ok()).collect(),
        known: BTreeSet::from([BRIDGE.to_owned()]),
        bystanders: BTreeSet::new(),
        inward: BTreeMap::from([(door, standings[1])]),
    }
}

fn parsed(text: &str) -> IpAddr {
    text.parse().expect("only literals are given here, and each is in the test")
}

fn br_netfilter() -> Check {
    let name = "br_netfilter";
    if Path::new("/proc/sys/net/bridge/bridge-nf-call-iptables").exists() {
        return Check::ok(name, "loaded");
    }
    let release = nix::sys::utsname::uname().map(|uname| uname.release().to_string_lossy().into_owned()).unwrap_or_default();
    let known = std::fs::read_to_string(format!("/lib/modules/{release}/modules.dep")).unwrap_or_default();
    if known.contains("/br_netfilter.ko") {
        Check::warn(name, "not loaded; it is loaded at the start, with its global switches off", "")
    } else {
        Check::fail(
            name,
            format!("kernel {release} has no br_netfilter: packets between two containers of one network can't be filtered"),
            "a kernel with CONFIG_BRIDGE_NETFILTER is needed",
        )
    }
}

fn tracking() -> Check {
    let name = "conntrack";
    let lacks: Vec<&str> = ["nf_conntrack_events", "nf_conntrack_acct", "nf_conntrack_timestamp"]
        .into_iter()
        .filter(|key| !Path::new("/proc/sys/net/netfilter").join(key).exists())
        .collect();
    match lacks.as_slice() {
        [] => Check::ok(name, "events, byte counts and times"),
        lacks if lacks.contains(&"nf_conntrack_events") => {
            Check::fail(name, "the kernel reports no connections", "a kernel with CONFIG_NF_CONNTRACK_EVENTS is needed")
        }
        lacks => Check::warn(name, format!("the kernel lacks {}", lacks.join(", ")), "flows are seen without byte counts or exact times"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trial_holds_every_kind_of_standing_and_remote() {
        let ruleset = every_kind_of_rule();
        let standings: BTreeSet<Standing> = ruleset.sides.values().copied().collect();
        assert_eq!(standings.len(), 4);
        assert!(ruleset.pairs.iter().any(|pair| matches!(pair.remote, Remote::Outside(net) if net.addr().is_ipv6())));
        assert!(!ruleset.doors.is_empty() && !ruleset.pins.is_empty());
    }
}
