//! What a payload of ours is in Grenache's JSON, and the other way round.
//!
//! | bytes | JSON |
//! | --- | --- |
//! | a chat message | `{"message": text, "from": name, "id": 32 hex digits, "sent_at": milliseconds}` |
//! | the reply to a chat message | its text, a string; `null` without one |
//! | UTF-8 text that is a JSON object or array | that object or array |
//! | other UTF-8 text | a string |
//! | anything else | none: it is refused |
//!
//! | JSON | bytes |
//! | --- | --- |
//! | `{"message": text}` | the text, as a string would be |
//! | the same with some of `from`, `id` and `sent_at`, and nothing else | a chat message; what is left out is made up |
//! | a string | its UTF-8 |
//! | anything else | its JSON text |
//! | the reply to a chat message | a chat reply with that text |
//!
//! `{"message": text}` is what Grenache's chat programs send and read. A number, `true` or `null` that goes
//! through both ways comes back as a string; what both sides understand are texts, objects and arrays.

use std::borrow::Cow;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::chat::{ChatMessage, ChatReply, Incoming};
use crate::proto::wire::{DecodeError, EncodeError};

/// How the answer to a payload is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Plain,
    /// As the receipt of this message.
    Chat(ChatMessage),
}

/// A chat message as Grenache's programs write and read it.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Letter<'a> {
    #[serde(borrow)]
    message: Cow<'a, str>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    from: Option<Cow<'a, str>>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    id: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sent_at: Option<u64>,
}

/// Reads the payload of one of our requests: its JSON, and the form of the answer.
pub(super) fn question(payload: &[u8]) -> Result<(String, Form), DecodeError> {
    Ok(match Incoming::parse(payload)? {
        Incoming::Echo(text) => (to_json(text), Form::Plain),
        Incoming::Chat(message) => (Letter::of(&message).json(), Form::Chat(message)),
    })
}

/// Reads the payload of one of Grenache's requests: our bytes, and the form in which they are answered.
pub(super) fn request(json: &RawValue) -> (Vec<u8>, Form) {
    let plain = || (from_json(json).into_bytes(), Form::Plain);
    let Some(letter) = Letter::read(json) else {
        return plain();
    };
    if letter.is_bare() {
        return (letter.message.into_owned().into_bytes(), Form::Plain);
    }
    let Some(message) = letter.chat_message() else {
        return plain();
    };
    match message.encode() {
        Ok(payload) => (payload, Form::Chat(message)),
        // Longer than a chat message may be.
        Err(_) => plain(),
    }
}

impl Form {
    /// Writes the payload of our reply. To a chat message, `null` is a receipt without an answer.
    pub(super) fn answer(&self, json: &RawValue) -> Result<Vec<u8>, EncodeError> {
        let Self::Chat(message) = self else {
            return Ok(from_json(json).into());
        };
        let text = match Letter::read(json) {
            Some(letter) => Some(letter.message.into_owned()),
            None => (json.get() != "null").then(|| from_json(json)),
        };
        message.receipt(text).encode()
    }

    /// Writes Grenache's answer: the JSON of our reply, if that is one.
    pub(super) fn json(&self, reply: &[u8]) -> Option<String> {
        if let Self::Chat(message) = self
            && let Ok(receipt) = ChatReply::decode(reply)
            && receipt.id == message.id
        {
            return Some(receipt.reply.map_or("null".into(), |text| quoted(&text)));
        }
        str::from_utf8(reply).ok().map(to_json)
    }
}

impl<'a> Letter<'a> {
    /// `None` if it is anything else.
    fn read(json: &'a RawValue) -> Option<Self> {
        // An array with the fields in their order would be taken for one.
        let object = json.get().trim_start().starts_with('{');
        object.then(|| serde_json::from_str(json.get()).ok())?
    }

    fn of(message: &'a ChatMessage) -> Self {
        Self {
            message: Cow::Borrowed(&message.text),
            from: Some(Cow::Borrowed(&message.from)),
            id: Some(Cow::Owned(hex(&message.id))),
            sent_at: Some(message.sent_at),
        }
    }

    fn json(&self) -> String {
        // Written to a text, texts and numbers never fail.
        serde_json::to_string(self).unwrap_or_default()
    }

    fn is_bare(&self) -> bool {
        self.from.is_none() && self.id.is_none() && self.sent_at.is_none()
    }

    /// `None` if its id is none of a chat message's.
    fn chat_message(self) -> Option<ChatMessage> {
        let mut message = ChatMessage::new(self.from.unwrap_or_default(), self.message);
        if let Some(id) = self.id {
            message.id = unhex(&id)?;
        }
        message.sent_at = self.sent_at.unwrap_or(message.sent_at);
        Some(message)
    }
}

fn to_json(text: &str) -> String {
    let is_structured = text.trim_start().starts_with(['{', '['])
        && serde_json::from_str::<IgnoredAny>(text).is_ok();
    match is_structured {
        true => text.into(),
        false => quoted(text),
    }
}

fn from_json(json: &RawValue) -> String {
    serde_json::from_str(json.get()).unwrap_or_else(|_| json.get().into())
}

fn quoted(text: &str) -> String {
    // Written to a text, a text never fails.
    serde_json::to_string(text).unwrap_or_default()
}

fn hex(id: &[u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(*id))
}

fn unhex(digits: &str) -> Option<[u8; 16]> {
    let is_hex = digits.len() == 32 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    let number = u128::from_str_radix(digits, 16).ok().filter(|_| is_hex)?;
    Some(number.to_be_bytes())
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
    fn a_chat_message_is_an_object_and_is_answered_in_kind() {
        let message = ChatMessage {
            id: *b"0123456789abcdef",
            from: "ann".into(),
            text: r#"{"text": "is text"}"#.into(),
            sent_at: 1_700_000_000_123,
        };
        let (json, form) = question(&message.encode().unwrap()).unwrap();
        let expected = r#"{"message":"{\"text\": \"is text\"}","from":"ann","id":"30313233343536373839616263646566","sent_at":1700000000123}"#;
        assert_eq!(json, expected);
        for (json, reply) in [
            (r#""Echo: hello""#, Some("Echo: hello")),
            (r#"{"message":"Echo: hello"}"#, Some("Echo: hello")),
            (r#"{"ok":true}"#, Some(r#"{"ok":true}"#)),
            ("null", None),
        ] {
            let receipt = message.receipt(reply.map(Into::into));
            let answer = form.answer(&raw(json)).unwrap();
            assert_eq!(answer, receipt.encode().unwrap(), "{json}");
        }
    }

    #[test]
    fn an_object_with_a_message_is_that_text() {
        let bare = raw(r#" { "message" : "say \"hi\"\n" } "#);
        assert_eq!(request(&bare), (b"say \"hi\"\n".to_vec(), Form::Plain));
        for json in [
            r#"{"message":5}"#,
            r#"{"message":"hi","level":"info"}"#,
            r#"{"message":"hi","id":"short"}"#,
            r#"{"message":"hi","id":"+0313233343536373839616263646566"}"#,
            r#"{"message":"hi","sent_at":-1}"#,
            r#"{"message":null}"#,
            r#"{"text":"hi"}"#,
            r#"["message"]"#,
        ] {
            let expected = (json.as_bytes().to_vec(), Form::Plain);
            assert_eq!(request(&raw(json)), expected, "as it is");
        }
    }

    #[test]
    fn an_object_with_a_sender_is_a_chat_message() {
        let id = "30313233343536373839616263646566";
        let json = format!(r#"{{"sent_at":7,"from":"ann","id":"{id}","message":"hi"}}"#);
        let (payload, form) = request(&raw(&json));
        let message = ChatMessage::decode(&payload).unwrap();
        assert_eq!(form, Form::Chat(message.clone()));
        assert_eq!((&*message.from, &*message.text), ("ann", "hi"));
        assert_eq!((message.id, message.sent_at), (*b"0123456789abcdef", 7));
        let (payload, _) = request(&raw(r#"{"message":"hi","from":"ann"}"#));
        let made_up = ChatMessage::decode(&payload).unwrap();
        assert_eq!((&*made_up.from, &*made_up.text), ("ann", "hi"));
        assert!(made_up.id != message.id && made_up.sent_at > 7);
    }

    #[test]
    fn an_object_longer_than_a_chat_message_goes_as_it_is() {
        let json = format!(r#"{{"from":"ann","message":"{}"}}"#, "x".repeat(1 << 17));
        assert_eq!(request(&raw(&json)), (json.into_bytes(), Form::Plain));
    }

    #[test]
    fn replies_become_json() {
        let message = ChatMessage::new("ann", "hello");
        let chat = Form::Chat(message.clone());
        let receipt = |reply: Option<&str>| message.receipt(reply.map(Into::into)).encode();
        for (form, reply, json) in [
            (&Form::Plain, b"Echo: hi".to_vec(), Some(r#""Echo: hi""#)),
            (&Form::Plain, br#"{"a":1}"#.to_vec(), Some(r#"{"a":1}"#)),
            (&Form::Plain, receipt(None).unwrap(), None),
            (&chat, receipt(Some("[1]")).unwrap(), Some(r#""[1]""#)),
            (&chat, receipt(None).unwrap(), Some("null")),
            (&chat, b"plain".to_vec(), Some(r#""plain""#)),
            (
                &chat,
                ChatMessage::new("", "").receipt(None).encode().unwrap(),
                None,
            ),
        ] {
            assert_eq!(form.json(&reply).as_deref(), json);
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

        #[test]
        fn any_chat_message_comes_back(
            id in any::<[u8; 16]>(),
            from in any::<String>().prop_filter("a long one", |from| from.len() <= 255),
            text in any::<String>(),
            sent_at in any::<u64>(),
        ) {
            let message = ChatMessage { id, from, text, sent_at };
            let payload = message.encode().unwrap();
            let (json, _) = question(&payload).unwrap();
            prop_assert_eq!(request(&raw(&json)), (payload, Form::Chat(message)));
        }
    }
}
