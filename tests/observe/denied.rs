//! Packets that the filter denies, or would: known from NFLOG alone, since a dropped first packet leaves no trace elsewhere. The
//! rules here only log as the enforcer's do.

use std::time::Duration;

use lab::{Bridge, Internet, Netns, Server, frame, needs_root};
use policy::FlowOutcome;
use policy::ruleset::log;

use crate::node::{Node, published};

fn logging(host: &Netns, hook: &str, what: &str, prefix: &str, group: u16, verdict: &str) {
    host.nft(&format!(
        "add table inet f; add chain inet f {hook} {{ type filter hook {hook} priority 0; }}; \
         add rule inet f {hook} {what} log prefix \"{prefix}\" group {group} {verdict}"
    ));
}

#[test]
fn a_denied_connection_has_both_names_its_port_and_its_reason_and_is_one_flow() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (a, b) = (bridge.add("a"), bridge.add("b"));
    logging(&host, "forward", "tcp dport 22", log::DENY_EGRESS, log::DENY_GROUP, "drop");
    let mut watching = Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b).observe(&host);
    for address in b.addresses() {
        // Long enough for one retransmission: the same flow.
        a.netns.tcp_within((address, 22).into(), Duration::from_millis(1500));
    }
    let seen = watching.until("a -> b tcp/22", |seen| seen.denied == 2);
    assert_eq!((seen.used(), seen.attempts()), (0, 0));
    watching.settle();
    assert_eq!(watching.evidence("a -> b tcp/22").unwrap().denied, 2);
    let flow = watching.flows.iter().find(|flow| flow.outcome == FlowOutcome::Denied).unwrap();
    assert_eq!(flow.reason, "no egress rule of the sender allows it");
}

#[test]
fn what_would_be_denied_passes_and_is_both() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (a, b) = (bridge.add("a"), bridge.add("b"));
    logging(&host, "forward", "ct state new udp dport 53", log::AUDIT_INGRESS, log::AUDIT_GROUP, "accept");
    let _server = Server::udp_echo(&b.netns, (b.v4, 53).into());
    let mut watching = Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b).observe(&host);
    a.netns.udp_echo((b.v4, 53).into(), b"x");
    watching.until("a -> b udp/53", |seen| seen.would_deny == 1 && seen.established == 1);
}

#[test]
fn denials_at_the_node_name_the_host_and_the_workload_behind_a_published_port() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (a, b) = (bridge.add("a"), bridge.add("b"));
    let internet = Internet::behind(&host);
    logging(&host, "input", "tcp dport { 22, 8080 }", log::DENY_DOOR, log::DENY_GROUP, "drop");
    logging(&host, "output", "tcp dport 80", log::DENY_INGRESS, log::DENY_GROUP, "drop");
    let node = Node::with(&[&bridge]).host(&[lab::internet::HOST_V4]).runs("a", &bridge, &a);
    let mut watching = node.container("b", &bridge, &b, |c| c.published = published(8080, 80).into()).observe(&host);
    let brief = Duration::from_millis(200);
    a.netns.tcp_within((bridge.gateway_v4(), 22).into(), brief);
    internet.netns.tcp_within(format!("{}:8080", lab::internet::HOST_V4).parse().unwrap(), brief);
    host.tcp_within((b.v4, 80).into(), brief);
    for edge in ["a -> host: tcp/22", "outside:203.0.113.1 -> b tcp/80", "host: -> b tcp/80"] {
        watching.until(edge, |seen| seen.denied == 1);
    }
}

#[test]
fn a_forged_source_is_blamed_on_whoever_sent_it() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (a, b, c) = (bridge.add("a"), bridge.add("b"), bridge.add("c"));
    host.nft(&format!(
        "add table bridge g; add chain bridge g pre {{ type filter hook prerouting priority -300; }}; \
         add rule bridge g pre iifname {} ip saddr {} log prefix \"{}\" group {} drop",
        c.port,
        a.v4,
        log::DENY_SPOOF,
        log::DENY_GROUP
    ));
    let node = Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b).runs("c", &bridge, &c);
    let mut watching = node.observe(&host);
    let datagram = frame::udp((a.v4.into(), 1000), (b.v4.into(), 2000), b"I am a");
    let packet = frame::ip(a.v4.into(), b.v4.into(), frame::PROTO_UDP, &datagram);
    frame::Frames::open(&c.netns, "eth0").send(&frame::ethernet(b.mac, c.mac, frame::ETH_IPV4, &packet));
    watching.until("c -> b udp/2000", |seen| seen.denied == 1);
    assert!(watching.evidence("a -> b udp/2000").is_none());
}

#[test]
fn a_record_that_is_not_ours_is_skipped_and_counted_by_reason() {
    needs_root!();
    let host = Netns::new("host");
    let mut bridge = Bridge::new(&host, "br0", "10.9.1.0/24", "fd09:1::/64");
    let (a, b) = (bridge.add("a"), bridge.add("b"));
    logging(&host, "forward", "udp dport 1", "somebody else", log::DENY_GROUP, "accept");
    logging(&host, "forward", "udp dport 2", log::DENY_EGRESS, log::DENY_GROUP, "drop");
    let mut watching = Node::with(&[&bridge]).runs("a", &bridge, &a).runs("b", &bridge, &b).observe(&host);
    for port in [1, 2] {
        a.netns.udp_send((b.v4, port).into(), b"x");
    }
    watching.until("a -> b udp/2", |seen| seen.denied == 1);
    assert_eq!(watching.account().skipped.get("an NFLOG record with a prefix that is not ours"), Some(&1));
}
