//! Between being bound and being tied: the tables hold who joined, and the bridges do not follow yet (`Nftables::begin`, `settle`).

use std::net::SocketAddr;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lab::bridge::mac_text;
use lab::frame::{self, Frames};
use lab::{Bridge, Member, Netns, Server, needs_root};
use node_agent::enforce::{Enforcer, Nftables};
use policy::ruleset::Change;
use policy::{Mode, Ruleset};

use crate::stage::{Policy, apply, enforcer, inventory, settled};

const BRIEFLY: Duration = Duration::from_millis(400);
const PATIENTLY: Duration = Duration::from_secs(5);

/// The forwarding tables of all bridges, a line an entry.
fn fdb(host: &Netns) -> Vec<String> {
    let all = host.check(Command::new("bridge").args(["fdb", "show"]));
    all.lines().map(|line| line.trim().to_owned()).collect()
}

fn entry(host: &Netns, member: &Member, at: &Member) -> Option<String> {
    let begins = format!("{} dev {} ", mac_text(member.mac), at.port);
    fdb(host).into_iter().find(|line| line.starts_with(&begins))
}

fn tied(host: &Netns, member: &Member) -> bool {
    entry(host, member, member).is_some_and(|line| line.contains("sticky"))
}

fn learns(host: &Netns, member: &Member) -> bool {
    host.ip(&format!("-d link show {}", member.port)).contains("learning on")
}

/// Binds `alone` whole, so that every set is there, then `both` as the agent does when somebody joins.
fn joins(enforcer: &mut Nftables, alone: &Ruleset, both: &Ruleset) {
    apply(enforcer, both);
    apply(enforcer, alone);
    enforcer.begin(both, &Change::between(alone, both)).unwrap();
    assert!(!enforcer.is_settled());
}

/// The bridge is made to think that `victim` is at the thief's port; by frames that go through it and around it.
fn steals(thief: &Member, victim: &Member, bridge: &Bridge<'_>) {
    let wire = Frames::open(&thief.netns, "eth0");
    let claim = frame::arp_reply(victim.mac, victim.v4, [0xff; 6], bridge.gateway_v4());
    for to in [[0x01, 0x80, 0xc2, 0, 0, 0x0e], [0x01, 0x80, 0xc2, 0, 0, 0], [0xff; 6], [0x02, 0, 0, 0, 0, 0x77]] {
        wire.send(&frame::ethernet(to, victim.mac, frame::ETH_ARP, &claim));
    }
}

#[test]
fn who_takes_the_mac_of_one_that_is_not_tied_yet_reads_nothing_of_what_the_node_sends_it() {
    needs_root!();
    node!(host, bridge: a, b, bound; other: there);
    let unbound = bridge.add("unbound");
    settled(&host);
    let policy =
        Policy::default().mode(Mode::Enforce, &["a", "b", "bound"]).ingress("b", "host:", "udp/53").ingress("b", "there", "udp/53");
    let others: &[(&str, &Member)] = &[("there", &there)];
    let [alone, both] = [vec![("a", &a), ("bound", &bound)], vec![("a", &a), ("bound", &bound), ("b", &b)]]
        .map(|members| policy.bind(&inventory(&[(&bridge, &members), (&other, others)])));
    let mut enforcer = enforcer(&host);
    joins(&mut enforcer, &alone, &both);
    // The node knows b from before; the bridge goes by what it learned last.
    for at in b.addresses() {
        host.ip(&format!("neigh replace {at} lladdr {} dev br0 nud permanent", mac_text(b.mac)));
    }

    for (thief, named) in [(&unbound, "unbound"), (&bound, "bound")] {
        let stolen = Frames::open(&thief.netns, "eth0");
        for (n, at) in b.addresses().into_iter().enumerate() {
            for (from, road) in [(&host, "node"), (&there.netns, "routed")] {
                let marker = format!("lab-stolen-{named}-{road}-{n}");
                steals(thief, &b, &bridge);
                from.udp_send(SocketAddr::new(at, 53), marker.as_bytes());
                assert!(!stolen.sees(BRIEFLY, marker.as_bytes()), "{named}, {road}, {at}: {:?}", entry(&host, &b, thief));
            }
        }
    }
    steals(&unbound, &b, &bridge);
    assert_eq!(enforcer.settle(&both).unwrap(), Default::default());
    let far = Frames::open(&b.netns, "eth0");
    for at in b.addresses() {
        host.udp_send(SocketAddr::new(at, 53), b"lab-tied");
        assert!(far.sees(PATIENTLY, b"lab-tied"), "{at}");
    }
    assert_eq!((entry(&host, &b, &unbound), entry(&host, &b, &bound)), (None, None), "what it was led to believe is gone");
}

#[test]
fn what_a_port_made_the_bridge_believe_before_it_was_tied_is_forgotten() {
    needs_root!();
    node!(host, bridge: a, b);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]);
    let [alone, both] = [vec![("a", &a)], vec![("a", &a), ("b", &b)]].map(|on| policy.bind(&inventory(&[(&bridge, &on)])));
    // One that is to come later.
    let later = bridge.add("later");
    let mut enforcer = enforcer(&host);
    joins(&mut enforcer, &alone, &both);
    // It has not said anything yet, or would not again.
    lab::eventually(PATIENTLY, || {
        steals(&b, &later, &bridge);
        entry(&host, &later, &b).ok_or("the bridge believes nothing".to_owned())
    });
    assert_eq!(enforcer.settle(&both).unwrap(), Default::default());
    assert!(tied(&host, &b));
    assert_eq!(entry(&host, &later, &b), None);
    steals(&b, &later, &bridge);
    assert_eq!(entry(&host, &later, &b), None);
}

#[test]
fn an_agent_that_dies_before_the_bridges_followed_leaves_the_next_one_all_of_it_to_do() {
    needs_root!();
    node!(host, bridge: a, b, c);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b", "c"]).allow("a", "b", "tcp/80");
    let [before, after] = [vec![("a", &a), ("c", &c)], vec![("a", &a), ("b", &b)]].map(|on| policy.bind(&inventory(&[(&bridge, &on)])));
    let mut first = enforcer(&host);
    joins(&mut first, &before, &after);
    assert!(!tied(&host, &b) && tied(&host, &c));
    drop(first);

    let mut second = enforcer(&host);
    assert_eq!(apply(&mut second, &after).adrift, Default::default());
    assert!(tied(&host, &a) && tied(&host, &b) && !learns(&host, &b));
    assert!(!tied(&host, &c) && learns(&host, &c), "who left in that time is let go");
    assert_eq!(second.verify().unwrap(), vec![]);
}

#[test]
fn undone_before_the_bridges_followed_nothing_is_left() {
    needs_root!();
    node!(host, bridge: a, b, c);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b", "c"]);
    let audit = Policy::default().mode(Mode::Audit, &["a", "b", "c"]);
    let all = inventory(&[(&bridge, &[("a", &a), ("b", &b), ("c", &c)])]);
    let [before, after] = [vec![("a", &a), ("c", &c)], vec![("a", &a), ("b", &b)]].map(|on| policy.bind(&inventory(&[(&bridge, &on)])));
    let clean = || {
        let left: Vec<_> = fdb(&host).into_iter().filter(|line| line.contains("sticky")).collect();
        assert_eq!(left, Vec::<String>::new());
        assert!([&a, &b, &c].iter().all(|member| learns(&host, member)));
        let routers = |member: &&Member| host.ip(&format!("-d link show {}", member.port)).contains("mcast_router 1");
        assert!([&a, &b, &c].iter().all(routers));
    };
    clean();

    // By the process that did it, after some came and some went.
    let mut one = enforcer(&host);
    joins(&mut one, &before, &after);
    one.remove().unwrap();
    clean();

    // By another one.
    let mut one = enforcer(&host);
    joins(&mut one, &before, &after);
    drop(one);
    enforcer(&host).remove().unwrap();
    clean();

    // Back to Audit, and killed before the bridges followed.
    let mut one = enforcer(&host);
    let (bound, open) = (policy.bind(&all), audit.bind(&all));
    joins(&mut one, &bound, &open);
    drop(one);
    enforcer(&host).remove().unwrap();
    clean();
}

#[test]
fn what_was_still_to_be_let_go_is_let_go_though_somebody_flushed_the_tables_meanwhile() {
    needs_root!();
    node!(host, bridge: a, b, c);
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b", "c"]);
    let [before, after] = [vec![("a", &a), ("c", &c)], vec![("a", &a), ("b", &b)]].map(|on| policy.bind(&inventory(&[(&bridge, &on)])));
    for repaired in [true, false] {
        let mut enforcer = host.run(|| Nftables::open().unwrap().shared());
        joins(&mut enforcer, &before, &after);
        host.nft("flush ruleset");
        if repaired {
            enforcer.repair(&after).unwrap();
        } else {
            // What comes next finds that its sets are gone.
            enforcer.begin(&before, &Change::between(&after, &before)).unwrap();
            enforcer.settle(&before).unwrap();
            enforcer.begin(&after, &Change::between(&before, &after)).unwrap();
            enforcer.settle(&after).unwrap();
        }
        assert!(tied(&host, &b) && !tied(&host, &c) && learns(&host, &c), "repaired: {repaired}");
        enforcer.remove().unwrap();
    }
}

#[test]
fn a_port_that_goes_before_the_bridges_follow_keeps_no_other_from_being_tied() {
    needs_root!();
    node!(host, bridge: a, b, c, d, e, f);
    let _elsewhere = Bridge::new(&host, "br9", "10.9.0.0/24", "2001:db8:9::/64");
    let names = ["a", "b", "c", "d", "e", "f"];
    let policy = Policy::default().mode(Mode::Enforce, &names).allow("a", "f", "tcp/80");
    let with = |members: &[(&str, &Member)]| policy.bind(&inventory(&[(&bridge, members)]));
    let (alone, all) = (with(&[("a", &a)]), with(&[("a", &a), ("b", &b), ("c", &c), ("d", &d), ("e", &e), ("f", &f)]));
    let mut enforcer = enforcer(&host);
    joins(&mut enforcer, &alone, &all);

    // One is gone, one left the bridge, one is on another one, one has another's old name.
    b.netns.ip("link del eth0");
    host.ip(&format!("link set {} nomaster", c.port));
    host.ip(&format!("link set {} master br9", d.port));
    host.ip(&format!("link set {} down", e.port));
    host.ip(&format!("link set {} name {}", e.port, b.port));
    let _adrift = enforcer.settle(&all).unwrap();
    assert!(enforcer.is_settled());
    for member in [&a, &f] {
        assert!(tied(&host, member) && !learns(&host, member), "{}", member.port);
    }
    let _server = Server::tcp_echo(&f.netns, SocketAddr::new(f.v4.into(), 80));
    assert!(a.netns.connect(SocketAddr::new(f.v4.into(), 80), PATIENTLY).is_ok());

    // They are unbound, and so are those who are there; who goes in the middle of it harms nobody either.
    let last = with(&[("a", &a), ("f", &f)]);
    enforcer.begin(&last, &Change::between(&all, &last)).unwrap();
    c.netns.ip("link del eth0");
    assert_eq!(enforcer.settle(&last).unwrap(), Default::default());
    assert!(tied(&host, &a) && tied(&host, &f));
    let left: Vec<_> = fdb(&host).into_iter().filter(|line| line.contains("sticky")).collect();
    assert_eq!(left.len(), 2, "{left:?}");
    assert_eq!(enforcer.verify().unwrap(), vec![]);
}

#[test]
fn no_flood_wins_the_race_for_a_mac_address_while_its_port_is_tied() {
    needs_root!();
    node!(host, bridge: a, b);
    let thief = bridge.add("thief");
    let policy = Policy::default().mode(Mode::Enforce, &["a", "b"]);
    let [alone, both] = [vec![("a", &a)], vec![("a", &a), ("b", &b)]].map(|on| policy.bind(&inventory(&[(&bridge, &on)])));
    let [comes, goes] = [Change::between(&alone, &both), Change::between(&both, &alone)];
    let mut enforcer = enforcer(&host);
    joins(&mut enforcer, &alone, &both);
    let wire = Frames::open(&thief.netns, "eth0");
    let claim = frame::ethernet([0x01, 0x80, 0xc2, 0, 0, 0x0e], b.mac, frame::ETH_ARP, &[0; 46]);
    let over = AtomicBool::new(false);
    let (mut rounds, mut lost, begun) = (0, Vec::new(), Instant::now());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                wire.send(&claim);
            }
        });
        // Some three of a hundred were lost before it was read back.
        while begun.elapsed() < Duration::from_secs(5) {
            let adrift = enforcer.settle(&both);
            let drift = enforcer.verify();
            if !matches!((&adrift, &drift), (Ok(adrift), Ok(drift)) if adrift.is_empty() && drift.is_empty()) {
                lost.push((adrift, drift, entry(&host, &b, &thief)));
            }
            rounds += 1;
            let _ = enforcer.begin(&alone, &goes).and_then(|_| enforcer.settle(&alone));
            let _ = enforcer.begin(&both, &comes);
        }
        over.store(true, Ordering::Relaxed);
    });
    println!("tied {rounds} times under a flood");
    assert!(lost.is_empty(), "{} of {rounds}: {:?}", lost.len(), lost.first());
}
