//! Chat and echo: what the payloads of a peer say.
//!
//! A peer answers two kinds of payload, each in its own form: plain text by an echo, a chat message by a
//! receipt. Their shapes are on the page of [`proto`](crate::proto); what a stranger wrote in them is
//! data, to be passed through [`sanitise_block`], [`sanitise_line`] or [`quote`] before it is printed.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::proto::wire::DecodeError;

pub use crate::{
    proto::wire::{ChatMessage, ChatReply},
    text::{quote, sanitise, sanitise_block, sanitise_line},
};

impl ChatMessage {
    /// A message written now, with a random id. `from` is the name its sender goes by.
    pub fn new(from: impl Into<String>, text: impl Into<String>) -> Self {
        let since_1970 = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            id: rand::random(),
            from: from.into(),
            text: text.into(),
            sent_at: u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// The receipt of this message, with an answer or without one.
    pub fn receipt(&self, reply: Option<String>) -> ChatReply {
        ChatReply { id: self.id, reply }
    }
}

/// The payload of a request to a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming<'a> {
    /// Plain text, which wants its echo.
    Echo(&'a str),
    /// A chat message, which wants its receipt.
    Chat(ChatMessage),
}

impl<'a> Incoming<'a> {
    /// Tells the kinds apart by the first byte: that of a CBOR map begins no UTF-8 text.
    ///
    /// # Errors
    /// If it is neither text nor a chat message within its limits.
    pub fn parse(payload: &'a [u8]) -> Result<Self, DecodeError> {
        match payload.first() {
            Some(0xa0..=0xbf) => ChatMessage::decode(payload).map(Self::Chat),
            _ => str::from_utf8(payload).map(Self::Echo).map_err(|_| {
                DecodeError::Malformed("neither UTF-8 text nor a chat message".into())
            }),
        }
    }
}

/// The reply to plain text.
pub fn echo_reply(text: &str) -> String {
    format!("Echo: {text}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_message_is_told_from_plain_text() {
        let message = ChatMessage::new("ann", "hello");
        let payload = message.encode().expect("encodes");
        assert_eq!(Incoming::parse(&payload), Ok(Incoming::Chat(message)));
        assert_eq!(Incoming::parse(b"hello"), Ok(Incoming::Echo("hello")));
        assert_eq!(Incoming::parse(b""), Ok(Incoming::Echo("")));
    }

    #[test]
    fn what_is_neither_is_refused() {
        for payload in [
            &b"\xff"[..],
            b"\x80",
            b"ok\xc3",
            b"\xa0",
            b"\xbf\xff",
            b"\xa1\x01",
        ] {
            let refused = Incoming::parse(payload);
            assert!(
                matches!(refused, Err(DecodeError::Malformed(_))),
                "{payload:x?}: {refused:?}"
            );
        }
    }

    #[test]
    fn messages_have_ids_of_their_own_and_the_time() {
        let (one, other) = (ChatMessage::new("ann", "hi"), ChatMessage::new("ann", "hi"));
        assert_ne!(one.id, other.id);
        // 2020-01-01; a clock that is before it is broken.
        assert!(one.sent_at > 1_577_836_800_000);
        assert_eq!(
            one.receipt(None),
            ChatReply {
                id: one.id,
                reply: None
            }
        );
    }

    #[test]
    fn an_echo_repeats_the_text() {
        assert_eq!(echo_reply("hello"), "Echo: hello");
    }

    proptest! {
        #[test]
        fn any_text_is_plain_text(text in any::<String>()) {
            prop_assert_eq!(Incoming::parse(text.as_bytes()), Ok(Incoming::Echo(&text)));
        }

        #[test]
        fn parsing_never_panics(payload in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Incoming::parse(&payload);
        }
    }
}
