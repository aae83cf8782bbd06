//! Every rule has a packet that tells whether it is there: each is taken out of the kernel by itself, and at least one probe must
//! come to another end or leave another log record.

pub(crate) mod netlink;
pub(crate) mod packet;
mod probes;
pub(crate) mod scene;

use std::os::fd::AsFd;
use std::time::Instant;

use lab::{Netns, needs_root};
use node_agent::enforce::Enforcer;

use crate::stage::{apply, enforcer};
use netlink::Nfnetlink;
use scene::{Scene, Seen};

const SPEED: &str = "the rules below it say the same; this one spares most packets the look-ups";

const TWINS: &str = "needs two bridges with one subnet: tests/enforce/twins.rs";
const EVERYBODYS: &str =
    "needs two roads: `a_connection_between_link_local_addresses_that_began_where_nobody_is_guarded_goes_on_nowhere_else`";

const BEHIND: &str = "a second packet shows it: `who_may_answer_asks_nothing_behind_an_answer`";

const AUTHENTICATED: &str = "a second packet shows it: `who_may_send_authenticated_packets_begins_no_other_connection_behind_one`";

/// Rules that no packet shows, and why they are there all the same.
const SECOND: [(&str, &str, &str); 26] = [
    (
        "arrival",
        "to a published port, as if it were an answer",
        "needs the engine's proxy going on in a connection that was ended: `enforce_ends_the_living_connections_...` in tests/hold",
    ),
    (
        "door",
        "the proxy hears broadcast, multicast and loopback from elsewhere too",
        "needs the engine's proxy, which listens at any address: `a_published_udp_port_hears_nobody_else_...` in tests/hold",
    ),
    ("unknown_sender", "logged (IPv4)", "the guard lets in no IPv4 address that is not bound; IPv6's link-local ones are the case"),
    ("forward", "what follows a connection that was allowed, from who it says: the road of most packets", SPEED),
    ("forward", "IPv4, checked where it came in, passed by the filter, to its receiver: the road of most packets", SPEED),
    ("forward", "IPv6, checked where it came in, passed by the filter, to its receiver: the road of most packets", SPEED),
    (
        "arrived",
        "every side allows it",
        "its answer needs it, where a container may ask the node and not the node the container: `who_has_the_bridges_own_mac_...`",
    ),
    (
        "output",
        "what is translated to a container's is answered from its bridge",
        "needs a connection: `a_port_published_by_translation_...`",
    ),
    ("unknown_receiver", "an address that belongs to no container we know", "the guard knows no port with it either"),
    (
        "prerouting",
        "what a tunnel or a pair of ports on the node brings back was marked on another road",
        "needs a tunnel: `what_comes_out_of_a_tunnel_on_the_node_is_not_who_went_in`",
    ),
    ("ipv6", "TCP and nothing before it: none of the below", SPEED),
    (
        "prerouting",
        "IP to a MAC address of bridge protocols: it came in around the bridge",
        "input drops it too; what it keeps from connection tracking: `nobody_sends_a_piece_of_a_packet_from_outside_around_the_bridge`",
    ),
    (
        "input",
        "IP to a MAC address of bridge protocols: it came in around the bridge",
        "prerouting drops it too, but out of a tunnel, with the mark of who went in",
    ),
    ("fresh", "an answer begins no connection", BEHIND),
    ("fresh", "nor does a reset", BEHIND),
    ("arrived", "an answer begins no connection", BEHIND),
    ("fresh", "nor does what is behind an authentication header", AUTHENTICATED),
    ("arrived", "nor does what is behind an authentication header", AUTHENTICATED),
    (
        "error",
        "from outside, about what never was there: between guarded networks",
        "needs the connection it quotes: `a_router_outside_has_nothing_to_say_of_a_connection_that_never_was_there`",
    ),
    (
        "stranger",
        "from a network where nobody is guarded, with an address that is elsewhere",
        "needs a connection: `who_is_where_nobody_is_guarded_takes_the_part_of_nobody_outside`",
    ),
    ("judge", "another bridge's connection, for all that connection tracking knows", TWINS),
    ("arrival", "another bridge's connection, for all that connection tracking knows", TWINS),
    ("fresh", "whose connection it is", TWINS),
    ("arrived", "whose connection it is", TWINS),
    ("fresh", "between addresses that every bridge has, where nobody is guarded", EVERYBODYS),
    ("arrived", "between addresses that every bridge has, where nobody is guarded", EVERYBODYS),
];

/// Takes out each rule and returns those that no probe noticed, or one that is said to be noticed by none.
fn unnoticed() -> Vec<String> {
    let host = Netns::new("host");
    // Rounds come faster than the kernel sends ICMP errors to anybody (icmp(7)).
    for (key, value) in [
        ("net.ipv4.icmp_ratelimit", "0"),
        ("net.ipv6.icmp.ratelimit", "0"),
        ("net.ipv4.icmp_msgs_per_sec", "100000"),
        ("net.ipv4.icmp_msgs_burst", "100000"),
    ] {
        if host.sysctl(key).is_some() {
            host.set_sysctl(key, value);
        }
    }
    let scene = Scene::new(&host);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &scene.bound);
    lab::fence::on_one_processor();
    let mut rules = Nfnetlink::over(enforcer.socket().as_fd().try_clone_to_owned().unwrap());
    let mut rounds = 0;
    let mut look = |rules: &mut Nfnetlink| {
        rules.forget_what_was_sent();
        rounds += 1;
        let (sent, seen) = probes::round(&scene, rounds);
        (sent, seen)
    };
    // What two rounds of three show: a frame or a record may be lost in any.
    let (sent, one) = look(&mut rules);
    let (two, three) = (look(&mut rules).1, look(&mut rules).1);
    let whole: Seen = &(&(&one & &two) | &(&one & &three)) | &(&two & &three);
    let wrong = sent.iter().filter(|probe| whole.contains(&(probe.id, probe.at.to_owned())) != probe.passes);
    let wrong: Vec<_> =
        wrong.map(|probe| format!("{} at {} {}", probe.name, probe.at, if probe.passes { "is missing" } else { "is seen" })).collect();
    assert!(wrong.is_empty(), "with every rule in its place:\n{}", wrong.join("\n"));
    println!("{} probes, {} sightings", sent.len(), whole.len());

    let all = rules.rules();
    let begun = Instant::now();
    let mut missed = Vec::new();
    // What is counted is read by tests/enforce/counts.rs: no packet goes elsewhere for it.
    for (n, rule) in all.iter().enumerate().filter(|(_, rule)| !rule.counts()) {
        rules.take_out(rule);
        let excused = SECOND.iter().any(|(chain, comment, _)| (*chain, *comment) == (&*rule.chain, &*rule.comment));
        let differs = |seen: &Seen| seen.symmetric_difference(&whole).cloned().collect::<Seen>();
        // Twice the same difference, or it was another packet's doing. A processor's queue is everybody's: where other tests fill
        // it, the one frame that tells may be lost.
        let mut twice = || !differs(&look(&mut rules).1).is_disjoint(&differs(&look(&mut rules).1));
        let noticed = (0..if excused { 1 } else { 2 }).any(|_| twice());
        rules.put_back(rule, all.get(n + 1));
        if noticed == excused {
            missed.push(rule.to_string());
        }
    }
    println!("{} rules in {:?}", all.len(), begun.elapsed());
    let differs = |seen: Seen| seen.symmetric_difference(&whole).cloned().collect::<Seen>();
    let (once, twice) = (differs(look(&mut rules).1), differs(look(&mut rules).1));
    let both: Vec<_> = once.intersection(&twice).collect();
    assert!(both.is_empty(), "with every rule back in its place these differ: {both:?}");
    assert_eq!(enforcer.verify().unwrap(), vec![]);
    missed
}

#[test]
fn each_rule_that_is_taken_out_is_noticed_by_a_packet() {
    needs_root!();
    assert_eq!(unnoticed(), Vec::<String>::new());
}
