//! What a payload of ours is in Grenache's JSON, and the other way round.
//!
//! | bytes | JSON |
//! | --- | --- |
//! | a chat message | its text, a string; the answer then becomes a chat reply |
//! | UTF-8 text that is a JSON object or array | that object or array |
//! | other UTF-8 text | a string |
//! | anything else | none: it is refused |
//!
//! | JSON | bytes |
//! | --- | --- |
//! | a string | its UTF-8 |
//! | anything else | its JSON text |
//!
//! So a number, `true` or `null` that goes through both ways comes back as a string; what both sides
//! understand are texts, objects and arrays.

use serde::de::IgnoredAny;
use serde_json::value::RawValue;

use crate::chat::{ChatMessage, Incoming};
use crate::proto::wire::{DecodeError, EncodeError};

/// How the answer to a payload is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Plain,
    /// As the receipt of this message.
    Chat(ChatMessage),
}

/// Reads the payload of a request: its JSON, and the form of the answer.
pub(super) fn question(payload: &[u8]) -> Result<(String, Form), DecodeError> {
    Ok(match Incoming::parse(payload)? {
        Incoming::Echo(text) => (to_json(text), Form::Plain),
        Incoming::Chat(message) => (quoted(&message.text), Form::Chat(message)),
    })
}

impl Form {
    /// Writes the payload of a reply. To a chat message, `null` is a receipt without an answer.
    pub(super) fn answer(&self, json: &RawValue) -> Result<Vec<u8>, EncodeError> {
        let Self::Chat(message) = self else {
            return Ok(from_json(json).into());
        };
        let answer = (json.get() != "null").then(|| from_json(json));
        message.receipt(answer).encode()
    }
}

pub(super) fn to_json(text: &str) -> String {
    let is_structured = text.trim_start().starts_with(['{', '['])
        && serde_json::from_str::<IgnoredAny>(text).is_ok();
    match is_structured {
        true => text.into(),
        false => quoted(text),
    }
}

pub(super) fn from_json(json: &RawValue) -> String {
    serde_json::from_str(json.get()).unwrap_or_else(|_| json.get().into())
}

fn quoted(text: &str) -> String {
    // Written to a text, a text never fails.
    serde_json::to_string(text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn raw(json: &str) -> Box<RawValue> {
        RawValue::from_string(json.into()).unwrap()
    }

    #[test]
    fn payloads_become_json() {
        for (payload, json) in [
            ("hello", r#""hello""#),
            ("", r#""""#),
            ("5", r#""5""#),
            ("null", r#""null""#),
            ("say \"hi\"\n", r#""say \"hi\"\n""#),
            (r#"{"a":1}"#, r#"{"a":1}"#),
            (" [1, 2]\n", " [1, 2]\n"),
            ("{not json", r#""{not json""#),
            ("[1] and more", r#""[1] and more""#),
        ] {
            let (written, form) = question(payload.as_bytes()).unwrap();
            assert_eq!((&*written, form), (json, Form::Plain), "{payload}");
        }
        assert!(question(b"\xff\xfe").is_err());
        assert!(question(b"\xa1\x01").is_err());
    }

    #[test]
    fn json_becomes_payloads() {
        for (json, payload) in [
            (r#""hello""#, "hello"),
            (r#""\u00e9\n""#, "é\n"),
            ("5", "5"),
            ("null", "null"),
            ("true", "true"),
            (r#"{"echo": "hi"}"#, r#"{"echo": "hi"}"#),
            ("[1,2]", "[1,2]"),
        ] {
            assert_eq!(Form::Plain.answer(&raw(json)).unwrap(), payload.as_bytes());
        }
    }

    #[test]
    fn a_chat_message_is_its_text_and_is_answered_in_kind() {
        let message = ChatMessage::new("ann", r#"{"text": "is text"}"#);
        let (json, form) = question(&message.encode().unwrap()).unwrap();
        assert_eq!(json, r#""{\"text\": \"is text\"}""#);
        for (json, reply) in [
            (r#""Echo: hello""#, Some("Echo: hello")),
            (r#"{"ok":true}"#, Some(r#"{"ok":true}"#)),
            ("null", None),
        ] {
            let receipt = message.receipt(reply.map(Into::into));
            let answer = form.answer(&raw(json)).unwrap();
            assert_eq!(answer, receipt.encode().unwrap(), "{json}");
        }
    }

    #[test]
    fn an_answer_longer_than_a_chat_reply_is_refused() {
        let message = ChatMessage::new("ann", "hello");
        let long = serde_json::to_string(&"x".repeat(1 << 17)).unwrap();
        assert!(Form::Chat(message).answer(&raw(&long)).is_err());
    }

    proptest! {
        #[test]
        fn any_text_comes_back(text in any::<String>()) {
            let (json, form) = question(text.as_bytes()).unwrap();
            // White space around an object or array is not part of it.
            let expected = if json.starts_with('"') { &*text } else { text.trim() };
            prop_assert_eq!(form.answer(&raw(&json)).unwrap(), expected.as_bytes());
        }
    }
}
