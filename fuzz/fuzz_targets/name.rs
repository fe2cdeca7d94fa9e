//! A stranger's or a user's name: `cargo +nightly fuzz run name`.
//!
//! A name that was parsed is in its final form: it is a name on the wire, and parses to itself.
#![no_main]

use grapevine::name::ServiceName;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(name) = text.parse::<ServiceName>() {
        assert!((1..=255).contains(&name.as_ref().len()));
        assert_eq!(ServiceName::from_wire(name.as_ref()), Ok(name.clone()));
        assert_eq!(name.as_ref().parse(), Ok(name));
    }
    if let Ok(name) = ServiceName::from_wire(text) {
        assert_eq!(name.as_ref(), text);
        assert_eq!(text.parse(), Ok(name));
    }
});
