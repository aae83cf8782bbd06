//! The reader takes any bytes without a panic, in bounded time; and what it takes, it takes again as written.
//! See tests/fuzz/run.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(objects) = crds::yaml::read(text) {
        let written = crds::yaml::write(&objects);
        let again = crds::yaml::read(&written).expect("what was written can be read");
        assert_eq!(again, objects, "{written}");
        // Neither may panic; what they say is theirs to say.
        objects.iter().for_each(|object| drop(object.intent()));
    }
});
