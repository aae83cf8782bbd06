//! Changes of a large ruleset in the kernel.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Instant;

use lab::Netns;
use node_agent::enforce::Enforcer;
use policy::Ruleset;
use policy::policy_set::Direction;
use policy::ruleset::{Pair, Remote, Spot, Watch};

use crate::figures::{Samples, Table, grouped, time};
use crate::stage;

/// Pairs of 100 containers with outside addresses, each with one port: all different.
fn pair(n: u32) -> Pair {
    let local = Spot { bridge: Some("br0".into()), address: IpAddr::from(Ipv4Addr::from(0x0a00_0000 + n / 1000)) };
    let remote = Remote::Outside(IpAddr::from(Ipv4Addr::from(0xc000_0200 + n % 256)).into());
    let port = u16::try_from(1 + n % 1000 / 4 * 4 + n % 1000 / 256).unwrap();
    Pair { direction: Direction::Egress, local, remote, ports: policy::Service::tcp(port).into() }
}

pub(crate) fn run(short: bool) {
    let mut table = Table::new(&["pairs", "full replace", "one more (median)", "p99", "one less (median)", "p99"]);
    let sizes: &[u32] = if short { &[1_000] } else { &[1_000, 10_000, 100_000] };
    for &size in sizes {
        let host = Netns::new("host");
        host.ip("link add br0 type bridge");
        let mut ruleset = Ruleset { pairs: (0..size).map(pair).collect(), ..Ruleset::default() };
        ruleset.watched.insert("br0".into(), Watch { guarded: true });
        let mut enforcer = stage::enforcer(&host);
        let mut replaced = Samples::default();
        for _ in 0..if short { 2 } else { 5 } {
            let begun = Instant::now();
            enforcer.repair(&ruleset).expect("a kernel that takes it");
            replaced.push(begun.elapsed().as_secs_f64());
        }
        let (mut more, mut less) = (Samples::default(), Samples::default());
        for round in 0..if short { 20 } else { 200 } {
            let extra = pair(size + round);
            ruleset.pairs.insert(extra.clone());
            let begun = Instant::now();
            enforcer.apply(&ruleset).expect("a kernel that takes it");
            more.push(begun.elapsed().as_secs_f64());
            ruleset.pairs.remove(&extra);
            let begun = Instant::now();
            enforcer.apply(&ruleset).expect("a kernel that takes it");
            less.push(begun.elapsed().as_secs_f64());
        }
        let cells = [replaced.median().value, more.median().value, more.quantile(0.99), less.median().value, less.quantile(0.99)];
        table.row(std::iter::once(grouped(f64::from(size))).chain(cells.map(time)));
    }
    table.print();
}
