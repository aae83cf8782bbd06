//! Bytes of others, into the reader that `BULKHEAD_FUZZ` names: see `node_agent::fuzzing::READERS`. One program for all of them, since
//! linking each is most of what a build takes.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use node_agent::fuzzing::{READERS, Reader};

static READER: LazyLock<Reader> = LazyLock::new(|| {
    let named = std::env::var("BULKHEAD_FUZZ").unwrap_or_default();
    let found = READERS.iter().find(|(name, _)| *name == named);
    found.unwrap_or_else(|| panic!("BULKHEAD_FUZZ={named}: one of {:?}", READERS.map(|(name, _)| name))).1
});

fuzz_target!(|bytes: &[u8]| READER(bytes));
