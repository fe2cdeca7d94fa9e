//! The payloads of chat: open maps, whose unknown keys are skipped so that fields can be added.

use serde::{
    Serialize,
    de::{IgnoredAny, MapAccess},
};

use super::{
    DecodeError, EncodeError, MAX_PAYLOAD, check_len, check_sendable, decode, encode, malformed,
    map::{Bytes, Draft, MaybeText, Text, require, set},
};

/// The longest sender's name in a chat message, in bytes: the longest name there is.
pub const MAX_FROM: usize = 255;

/// The longest text of a chat message or of a reply to one, in bytes: some thirty pages.
pub const MAX_TEXT: usize = 65_536;

/// The bytes of a message or reply beyond its texts, at most.
const OVERHEAD: usize = 72;

/// A message from one person or program to another. What it says of its sender is a claim, not a proof.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatMessage {
    /// Random; the same in every attempt to deliver this message.
    pub id: [u8; 16],
    /// The name its sender goes by; at most [`MAX_FROM`] bytes, otherwise any text.
    pub from: String,
    /// At most [`MAX_TEXT`] bytes.
    pub text: String,
    /// When it was written by its sender's clock: milliseconds since 1970-01-01T00:00Z.
    pub sent_at: u64,
}

/// The receipt of a chat message, and perhaps an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatReply {
    /// The message's.
    pub id: [u8; 16],
    /// An answer given on the spot; at most [`MAX_TEXT`] bytes.
    pub reply: Option<String>,
}

impl ChatMessage {
    /// Reads the payload of a request.
    ///
    /// # Errors
    /// If they are not such a map, or a field is missing, wrong or longer than its limit.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        check_len("payload", payload.len(), MAX_PAYLOAD)?;
        let draft: MessageDraft<'_> = decode(payload)?;
        let what = MessageDraft::WHAT;
        let id = chat_id(draft.id, what)?;
        let Text(from) = require(draft.from, "from", what)?;
        let Text(text) = require(draft.text, "text", what)?;
        let sent_at = require(draft.sent_at, "sent_at", what)?;
        check_len("sender's name", from.len(), MAX_FROM)?;
        check_len("text", text.len(), MAX_TEXT)?;
        Ok(Self {
            id,
            from: from.into_owned(),
            text: text.into_owned(),
            sent_at,
        })
    }

    /// Writes the payload of a request.
    ///
    /// # Errors
    /// [`EncodeError`] if a field is longer than its limit; nothing is written then.
    pub fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        check_sendable("sender's name", self.from.len(), MAX_FROM)?;
        check_sendable("text", self.text.len(), MAX_TEXT)?;
        let shape = MessageShape {
            id: &self.id,
            from: &self.from,
            text: &self.text,
            sent_at: self.sent_at,
        };
        encode(&shape, OVERHEAD + self.from.len() + self.text.len())
    }
}

impl ChatReply {
    /// Reads the payload of a reply.
    ///
    /// # Errors
    /// If they are not such a map, or a field is missing, wrong or longer than its limit.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        check_len("payload", payload.len(), MAX_PAYLOAD)?;
        let draft: ReplyDraft<'_> = decode(payload)?;
        let id = chat_id(draft.id, ReplyDraft::WHAT)?;
        let reply = draft.reply.and_then(|MaybeText(reply)| reply);
        check_len(
            "text",
            reply.as_ref().map_or(0, |reply| reply.len()),
            MAX_TEXT,
        )?;
        Ok(Self {
            id,
            reply: reply.map(|reply| reply.into_owned()),
        })
    }

    /// Writes the payload of a reply; without an answer it has no key for one.
    ///
    /// # Errors
    /// [`EncodeError`] if a field is longer than its limit; nothing is written then.
    pub fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        let reply = self.reply.as_deref();
        let len = reply.map_or(0, str::len);
        check_sendable("text", len, MAX_TEXT)?;
        encode(
            &ReplyShape {
                id: &self.id,
                reply,
            },
            OVERHEAD + len,
        )
    }
}

fn chat_id(id: Option<Bytes<'_>>, what: &str) -> Result<[u8; 16], DecodeError> {
    let Bytes(id) = require(id, "id", what)?;
    let len = id.len();
    let id = <[u8; 16]>::try_from(&*id);
    id.map_err(|_| malformed(format!("{what} with an \"id\" of {len} bytes, not 16")))
}

#[derive(Serialize)]
struct MessageShape<'a> {
    #[serde(with = "serde_bytes")]
    id: &'a [u8],
    from: &'a str,
    text: &'a str,
    sent_at: u64,
}

#[derive(Serialize)]
struct ReplyShape<'a> {
    #[serde(with = "serde_bytes")]
    id: &'a [u8],
    #[serde(skip_serializing_if = "Option::is_none")]
    reply: Option<&'a str>,
}

#[derive(Default)]
struct MessageDraft<'de> {
    id: Option<Bytes<'de>>,
    from: Option<Text<'de>>,
    text: Option<Text<'de>>,
    sent_at: Option<u64>,
}

impl<'de> Draft<'de> for MessageDraft<'de> {
    const WHAT: &'static str = "a chat message";

    fn take<A: MapAccess<'de>>(&mut self, key: &str, values: &mut A) -> Result<(), A::Error> {
        match key {
            "id" => set(&mut self.id, "id", values),
            "from" => set(&mut self.from, "from", values),
            "text" => set(&mut self.text, "text", values),
            "sent_at" => set(&mut self.sent_at, "sent_at", values),
            _ => values.next_value::<IgnoredAny>().map(drop),
        }
    }
}

#[derive(Default)]
struct ReplyDraft<'de> {
    id: Option<Bytes<'de>>,
    reply: Option<MaybeText<'de>>,
}

impl<'de> Draft<'de> for ReplyDraft<'de> {
    const WHAT: &'static str = "a chat reply";

    fn take<A: MapAccess<'de>>(&mut self, key: &str, values: &mut A) -> Result<(), A::Error> {
        match key {
            "id" => set(&mut self.id, "id", values),
            "reply" => set(&mut self.reply, "reply", values),
            _ => values.next_value::<IgnoredAny>().map(drop),
        }
    }
}
