//! Bytes to types and back: the CBOR of requests, replies and chat payloads.
//!
//! Everything decoded here was written by a stranger. Invariants: decoding never panics, never recurses
//! deeper than 128 levels, allocates in proportion to the bytes it was given, and yields only what encodes
//! again; each map has fixed keys, and each key occurs at most once. The maps of the RPC refuse keys they
//! do not know; those of chat skip them. Semantic tags, indefinite lengths and longer than necessary
//! integers are read as what they contain, because the encoders of other languages write them.
//!
//! This is the only module that names the CBOR library. Its maps are read by hand (`map`), because
//! serde's derived code would also take an array for a map and an integer or bytes for a key.
//! Lengths of frames on a stream are another module's matter.

mod chat;
mod map;
mod names;
mod plain;
mod registry;
mod rpc;

use serde::{Serialize, de::DeserializeSeed};

use map::{Draft, Fill};

pub use chat::{ChatMessage, ChatReply, MAX_FROM, MAX_TEXT};
pub use names::{
    MAX_ADDRESS, MAX_NAMES, MAX_PROVIDERS, MAX_RECORD, MAX_SOUGHT, NAMES, NamesReply, NamesRequest,
    Provided,
};
pub use registry::{
    Batch, BatchReply, Change, Digest, MAX_CHANGES, MAX_FIND, MAX_FOUND, MAX_WITHDRAWN, REGISTRY,
    WITHDRAW, Withdrawn,
};
pub use rpc::{
    ErrorCode, MAX_CODE, MAX_MESSAGE, MAX_SERVICE, OtherCode, RemoteError, Reply, ReplyRef,
    Request, RequestRef, SERVES, salvage_id,
};

/// The largest payload of a request or a reply, in bytes: one mebibyte, as much as a node can afford to
/// hold for each of many concurrent requests. Larger things are sent in parts, by the application.
pub const MAX_PAYLOAD: usize = 1_048_576;

/// The largest frame, in bytes: a payload and what surrounds it. That is at most 292 bytes for a request
/// with the longest service name, and the rest is for encoders that write longer lengths than they need.
pub const MAX_FRAME: usize = MAX_PAYLOAD + 1024;

/// An explanation in a [`DecodeError`] may quote a stranger's bytes: no more than this many bytes of it.
const MAX_EXPLANATION: usize = 200;

/// Why bytes are not the message they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Not CBOR, or not of the shape the protocol gives this message.
    #[error("malformed: {0}")]
    Malformed(String),
    /// A whole message, and then more.
    #[error("bytes are left after the message")]
    TrailingBytes,
    /// A part is longer than the protocol allows.
    #[error("the {what} has {len} bytes, and at most {max} are allowed")]
    TooLarge {
        /// Which part.
        what: &'static str,
        /// Bytes it has.
        len: usize,
        /// Bytes it may have.
        max: usize,
    },
}

/// Why a message cannot be sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// A part is longer than the protocol allows, and its receiver would refuse it.
    #[error("the {what} has {len} bytes, and at most {max} can be sent: send less at a time")]
    TooLarge {
        /// Which part.
        what: &'static str,
        /// Bytes it has.
        len: usize,
        /// Bytes it may have.
        max: usize,
    },
    /// The encoder failed. With the types of this module, writing to memory, it has no reason to.
    #[error("the encoder failed: {0}")]
    Encoder(String),
}

/// Writes `value`, which is expected to need about `size` bytes.
fn encode(value: &impl Serialize, size: usize) -> Result<Vec<u8>, EncodeError> {
    let mut bytes = Vec::new();
    append(value, size, &mut bytes)?;
    Ok(bytes)
}

/// As [`encode`], behind what is in `bytes` already.
fn append(value: &impl Serialize, size: usize, bytes: &mut Vec<u8>) -> Result<(), EncodeError> {
    bytes.reserve(size);
    serde_cbor::to_writer(bytes, value).map_err(|error| EncodeError::Encoder(error.to_string()))
}

/// Reads `bytes`, one map and nothing after it.
fn decode<'de, D: Draft<'de>>(bytes: &'de [u8]) -> Result<D, DecodeError> {
    let mut draft = D::default();
    decode_into(&mut draft, bytes)?;
    Ok(draft)
}

/// As [`decode`]; after an error, `draft` holds what was read before it.
fn decode_into<'de, D: Draft<'de>>(draft: &mut D, bytes: &'de [u8]) -> Result<(), DecodeError> {
    let mut deserializer = serde_cbor::Deserializer::from_slice(bytes);
    Fill(draft)
        .deserialize(&mut deserializer)
        .map_err(|error| malformed(error.to_string()))?;
    deserializer.end().map_err(|_| DecodeError::TrailingBytes)
}

fn malformed(mut explanation: String) -> DecodeError {
    explanation.truncate(floor_char_boundary(&explanation, MAX_EXPLANATION));
    DecodeError::Malformed(explanation)
}

fn check_len(what: &'static str, len: usize, max: usize) -> Result<(), DecodeError> {
    if len > max {
        return Err(DecodeError::TooLarge { what, len, max });
    }
    Ok(())
}

fn check_sendable(what: &'static str, len: usize, max: usize) -> Result<(), EncodeError> {
    if len > max {
        return Err(EncodeError::TooLarge { what, len, max });
    }
    Ok(())
}

/// The longest prefix of `text` that is whole characters and has at most `max` bytes.
fn floor_char_boundary(text: &str, max: usize) -> usize {
    if text.len() <= max {
        return text.len();
    }
    (0..=max)
        .rev()
        .find(|&end| text.is_char_boundary(end))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests;
