//! Whatever others send, read as the agent reads it: for `tests/fuzz`, and for the inputs that it once found. In no build that runs.

use policy::wire;
use prost::Message;

use crate::{enforce, inventory, observe, uplink};

/// Reads one input. It may refuse it; it may not panic, and not take long.
pub type Reader = fn(&[u8]);

/// Each reader by the name of its folder in `tests/fuzz/corpus`.
pub const READERS: [(&str, Reader); 6] = [
    ("conntrack", conntrack),
    ("nflog", nflog),
    ("nftables", enforce::read_any),
    ("engine", inventory::read_any),
    ("spool", uplink::read_any),
    ("wire", both_ends),
];

/// Events of connection tracking.
fn conntrack(datagram: &[u8]) {
    let (mut events, mut refused) = (Vec::new(), Vec::new());
    observe::conntrack::take_events(datagram, &mut events, |why| refused.push(why));
    let careful: (Vec<_>, Vec<_>) = observe::conntrack::read_events(datagram).partition(Result::is_ok);
    assert!(events.into_iter().map(Ok).eq(careful.0) && refused.into_iter().map(Err).eq(careful.1), "both readers read the same");
}

/// Records of denied packets: a packet of anybody's is in each.
fn nflog(datagram: &[u8]) {
    observe::nflog::read_records(datagram, jiff::Timestamp::UNIX_EPOCH).for_each(drop);
}

/// What agent and controller say to each other.
fn both_ends(bytes: &[u8]) {
    if let Ok(delta) = wire::EdgeDelta::decode(bytes)
        && let Ok(read) = policy::EdgeDelta::try_from(delta)
    {
        assert_eq!(policy::EdgeDelta::try_from(wire::EdgeDelta::from(&read)).as_ref(), Ok(&read), "what was read can be written");
    }
    drop(wire::Health::decode(bytes).map(policy::Health::try_from));
    drop(wire::Flow::decode(bytes).map(policy::Flow::try_from));
    if let Ok(wire::FromAgent { body: Some(wire::from_agent::Body::Batch(batch)) }) = wire::FromAgent::decode(bytes) {
        batch.edges.into_iter().for_each(|edge| drop(policy::EdgeDelta::try_from(edge)));
    }
    drop(wire::FromController::decode(bytes));
    drop((
        wire::read_plan(bytes),
        wire::read_plan_change(bytes),
        wire::read_inventory(bytes),
        wire::read_status(bytes),
        wire::read_preview(bytes),
    ));
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "unwrap is for tests")]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn real_messages_and_what_fuzzing_once_found_are_read_without_a_panic() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus");
        for (name, reader) in READERS {
            let files: Vec<_> = std::fs::read_dir(corpus.join(name)).unwrap().map(|entry| entry.unwrap().path()).collect();
            assert!(!files.is_empty(), "{name} has no corpus");
            for file in files {
                let bytes = std::fs::read(&file).unwrap();
                println!("{}", file.display());
                reader(&bytes);
                // Cut anywhere, too: a message never promises its end.
                (0..bytes.len().min(2048)).for_each(|end| reader(&bytes[..end]));
            }
        }
    }
}
