//! A stranger's payload to a peer, and its reply: `cargo +nightly fuzz run chat_payload`.
//!
//! As for frames; and whatever text it holds must come out harmless to a terminal.
#![no_main]

use grapevine::chat::{ChatMessage, ChatReply, Incoming, sanitise, sanitise_line};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|payload: &[u8]| {
    match Incoming::parse(payload) {
        Ok(Incoming::Echo(text)) => {
            assert_eq!(text.as_bytes(), payload);
            check_sanitised(text);
        }
        Ok(Incoming::Chat(message)) => {
            check_sanitised(&message.text);
            let again = message.encode().expect("a message that was decoded fits");
            assert_eq!(ChatMessage::decode(&again), Ok(message));
        }
        Err(_) => {}
    }
    if let Ok(reply) = ChatReply::decode(payload) {
        let again = reply.encode().expect("a reply that was decoded fits");
        assert_eq!(ChatReply::decode(&again), Ok(reply));
    }
});

fn check_sanitised(text: &str) {
    let obeyed = |c: char| c.is_control() && c != '\n' && c != '\t';
    assert!(!sanitise(text).contains(obeyed));
    assert!(!sanitise_line(text).contains(char::is_control));
}
