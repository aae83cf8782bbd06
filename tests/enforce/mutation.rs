//! Every rule has a packet that tells whether it is there: each is taken out of the kernel by itself, and at least one probe must
//! come to another end or leave another log record.

mod netlink;
mod packet;
mod probes;
mod scene;

use std::os::fd::AsFd;
use std::time::Instant;

use lab::{Netns, needs_root};
use node_agent::enforce::Enforcer;

use crate::stage::{apply, enforcer};
use netlink::Nfnetlink;
use scene::{Scene, Seen};

/// Rules that no packet shows, and why they are there all the same.
const SECOND: [(&str, &str, &str); 2] = [
    (
        "error",
        "from the node: the gateway, or our refusal",
        "the next rule lets it pass too: no interface is no bridge; said so that nobody has to know that",
    ),
    (
        "forward",
        "other types, from a port that nobody bound yet",
        "the last rule of `seen` drops them too; this one counts them under their own name",
    ),
];

/// Of so many rules one is tried in every run.
const SAMPLE: usize = 5;

/// Takes out every `step`th rule, beginning with one of the first, and returns those that no probe noticed, or one
/// that is said to be noticed by none.
fn unnoticed(first: usize, step: usize) -> Vec<String> {
    let host = Netns::new("host");
    let scene = Scene::new(&host);
    let mut enforcer = enforcer(&host);
    apply(&mut enforcer, &scene.bound);
    scene::on_one_processor();
    let mut rules = Nfnetlink::over(enforcer.socket().as_fd().try_clone_to_owned().unwrap());
    let mut rounds = 0;
    let mut look = || {
        rounds += 1;
        let (sent, seen) = probes::round(&scene, rounds);
        (sent, seen)
    };
    let (sent, whole) = look();
    let wrong = sent.iter().filter(|probe| whole.contains(&(probe.id, probe.at.to_owned())) != probe.passes);
    let wrong: Vec<_> =
        wrong.map(|probe| format!("{} at {} {}", probe.name, probe.at, if probe.passes { "is missing" } else { "is seen" })).collect();
    assert!(wrong.is_empty(), "with every rule in its place:\n{}", wrong.join("\n"));
    println!("{} probes, {} sightings", sent.len(), whole.len());

    let all = rules.rules();
    let begun = Instant::now();
    let mut missed = Vec::new();
    for n in (first..all.len()).step_by(step) {
        let rule = &all[n];
        rules.take_out(rule);
        // Twice the same difference, or it was another packet's doing.
        let (without, again) = (look().1, look().1);
        rules.put_back(rule, all.get(n + 1));
        let differs = |seen: &Seen| seen.symmetric_difference(&whole).cloned().collect::<Seen>();
        let noticed = !differs(&without).is_disjoint(&differs(&again));
        let excused = SECOND.iter().any(|(chain, comment, _)| (*chain, *comment) == (&*rule.chain, &*rule.comment));
        if noticed == excused {
            missed.push(rule.to_string());
        }
    }
    println!("{} of {} rules in {:?}", (all.len() - first).div_ceil(step), all.len(), begun.elapsed());
    assert_eq!(look().1, whole, "with every rule back in its place");
    assert_eq!(enforcer.verify().unwrap(), vec![]);
    missed
}

#[test]
fn a_rule_that_is_taken_out_is_noticed_by_a_packet() {
    needs_root!();
    assert_eq!(unnoticed(0, SAMPLE), Vec::<String>::new());
}

#[test]
#[ignore = "takes a minute or more: tests/run --all"]
fn each_rule_that_is_taken_out_is_noticed_by_a_packet() {
    needs_root!();
    assert_eq!(unnoticed(0, 1), Vec::<String>::new());
}
