//! Requests and replies: closed maps, each key once, no others.

use std::{borrow::Cow, fmt, str::FromStr};

use serde::{
    Serialize,
    de::{IgnoredAny, MapAccess},
};

use super::{
    DecodeError, EncodeError, MAX_FRAME, MAX_PAYLOAD, append, check_len, check_sendable, decode,
    decode_into, floor_char_boundary, malformed,
    map::{Bytes, Draft, Nested, Text, require, set, unknown_key},
    plain,
};
use crate::text::sanitise_line;

/// The reserved service that answers whether a node serves the name in the payload: one byte, 1 or 0.
pub const SERVES: &str = "grapevine/serves";

/// The longest name of a service in a request, in bytes: the longest name there is.
pub const MAX_SERVICE: usize = 255;

/// The longest message of an error, in bytes: a paragraph for a person.
pub const MAX_MESSAGE: usize = 1024;

/// The longest error code, in bytes; the longest of the protocol's own has 15.
pub const MAX_CODE: usize = 64;

/// The bytes of an error beyond its texts, at most.
const REFUSAL: usize = 48;

/// A call of a service, as a server holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Chosen by the caller; the reply carries it back.
    pub id: u64,
    /// What is called: a name, or one of the protocol's own services, which are no names.
    pub service: String,
    /// The service's business.
    pub payload: Vec<u8>,
}

/// A call of a service, as a client sends it: [`Request`] with nothing copied.
#[derive(Clone, Copy, Debug)]
pub struct RequestRef<'a> {
    /// Chosen by the caller; the reply carries it back.
    pub id: u64,
    /// What is called; at most [`MAX_SERVICE`] bytes.
    pub service: &'a str,
    /// At most [`MAX_PAYLOAD`](super::MAX_PAYLOAD) bytes.
    pub payload: &'a [u8],
}

/// The answer to the request with the same id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The request's; 0 where the request was too broken to have one.
    pub id: u64,
    /// The service's payload, or why there is none.
    pub outcome: Result<Vec<u8>, RemoteError>,
}

/// An answer, as a server sends it: [`Reply`] with nothing copied.
#[derive(Clone, Copy, Debug)]
pub struct ReplyRef<'a> {
    /// The request's id.
    pub id: u64,
    /// At most [`MAX_PAYLOAD`](super::MAX_PAYLOAD) bytes, or why there are none.
    pub outcome: Result<&'a [u8], &'a RemoteError>,
}

/// What another node says went wrong.
///
/// The message is its own text, kept as data; `Display` shows it safe for a terminal and on one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteError {
    /// The kind, for programs.
    pub code: ErrorCode,
    /// The explanation, for people. Encoding cuts it to [`MAX_MESSAGE`] bytes of whole characters.
    pub message: String,
}

/// The kinds of failure that a reply can carry.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// The node does not serve that name.
    UnknownService,
    /// The node has too much to do now; nothing was executed.
    Busy,
    /// The request or the reply to it is larger than a frame may be.
    TooLarge,
    /// The frame was not a request.
    BadRequest,
    /// The service took the request and gave no answer.
    HandlerFailed,
    /// The node is leaving; nothing was executed.
    ShuttingDown,
    /// A code of a later version or of another implementation.
    Other(OtherCode),
}

/// An error code that this version does not know: never one of the known ones, at most [`MAX_CODE`] bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct OtherCode(String);

impl Request {
    /// Reads a frame's content, which must be one request and nothing else.
    ///
    /// # Errors
    /// If they are not such a map, or a field is missing, wrong or longer than its limit.
    pub fn decode(frame: &[u8]) -> Result<Self, DecodeError> {
        match RequestRef::peek(frame) {
            Some(request) => Ok(request.to_owned()),
            None => Self::decode_any(frame),
        }
    }

    /// As [`decode`](Self::decode), by the library.
    pub(crate) fn decode_any(frame: &[u8]) -> Result<Self, DecodeError> {
        check_len("frame", frame.len(), MAX_FRAME)?;
        let draft: RequestDraft<'_> = decode(frame)?;
        let what = RequestDraft::WHAT;
        let id = require(draft.id, "id", what)?;
        let Text(service) = require(draft.service, "service", what)?;
        let Bytes(payload) = require(draft.payload, "payload", what)?;
        check_len("service", service.len(), MAX_SERVICE)?;
        check_len("payload", payload.len(), MAX_PAYLOAD)?;
        Ok(Self {
            id,
            service: service.into_owned(),
            payload: payload.into_owned(),
        })
    }

    /// The same request, borrowed, to be encoded.
    pub fn as_ref(&self) -> RequestRef<'_> {
        RequestRef {
            id: self.id,
            service: &self.service,
            payload: &self.payload,
        }
    }
}

impl<'a> RequestRef<'a> {
    /// Reads a frame's content in place, if it has the form in which [`encode`](Self::encode) writes
    /// it. One that has not may be a request all the same: that [`Request::decode`] tells.
    pub fn peek(frame: &'a [u8]) -> Option<Self> {
        let (id, service, payload) = plain::request(frame)?;
        Some(Self {
            id,
            service,
            payload,
        })
    }

    /// The same request, with everything copied.
    pub fn to_owned(self) -> Request {
        Request {
            id: self.id,
            service: self.service.into(),
            payload: self.payload.into(),
        }
    }

    /// Writes a frame's content.
    ///
    /// # Errors
    /// [`EncodeError`] if a field is longer than its limit; nothing is written then.
    pub fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        let mut frame = Vec::new();
        self.append_to(&mut frame)?;
        Ok(frame)
    }

    /// Writes a frame's content behind what is in `out` already.
    ///
    /// # Errors
    /// [`EncodeError`] if a field is longer than its limit; nothing is written then.
    pub fn append_to(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        check_sendable("service", self.service.len(), MAX_SERVICE)?;
        check_sendable("payload", self.payload.len(), MAX_PAYLOAD)?;
        plain::append_request(self.id, self.service, self.payload, out);
        Ok(())
    }
}

impl Reply {
    /// Reads a frame's content, which must be one reply and nothing else.
    ///
    /// # Errors
    /// If they are not such a map, or a field is missing, wrong or longer than its limit.
    pub fn decode(frame: &[u8]) -> Result<Self, DecodeError> {
        let Some((id, payload)) = plain::reply(frame) else {
            return Self::decode_any(frame);
        };
        let outcome = Ok(payload.into());
        Ok(Self { id, outcome })
    }

    /// As [`decode`](Self::decode), by the library.
    pub(super) fn decode_any(frame: &[u8]) -> Result<Self, DecodeError> {
        check_len("frame", frame.len(), MAX_FRAME)?;
        let draft: ReplyDraft<'_> = decode(frame)?;
        let id = require(draft.id, "id", ReplyDraft::WHAT)?;
        let outcome = match (draft.ok, draft.error) {
            (Some(Bytes(payload)), None) => {
                check_len("payload", payload.len(), MAX_PAYLOAD)?;
                Ok(payload.into_owned())
            }
            (None, Some(Nested(error))) => Err(error.finish()?),
            (Some(_), Some(_)) => {
                return Err(malformed("a reply with both \"ok\" and \"error\"".into()));
            }
            (None, None) => return Err(malformed("a reply without \"ok\" or \"error\"".into())),
        };
        Ok(Self { id, outcome })
    }

    /// The same reply, borrowed, to be encoded.
    pub fn as_ref(&self) -> ReplyRef<'_> {
        ReplyRef {
            id: self.id,
            outcome: self.outcome.as_deref(),
        }
    }
}

impl ReplyRef<'_> {
    /// Writes a frame's content. An error always fits.
    ///
    /// # Errors
    /// [`EncodeError`] if a field is longer than its limit; nothing is written then.
    pub fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        let mut frame = Vec::new();
        self.append_to(&mut frame)?;
        Ok(frame)
    }

    /// Writes a frame's content behind what is in `out` already.
    ///
    /// # Errors
    /// [`EncodeError`] if a field is longer than its limit; nothing is written then.
    pub fn append_to(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        match self.outcome {
            Ok(payload) => {
                check_sendable("payload", payload.len(), MAX_PAYLOAD)?;
                plain::append_reply(self.id, payload, out);
                Ok(())
            }
            Err(error) => {
                let (id, error) = (self.id, ErrorShape::of(error));
                let len = error.code.len() + error.message.len();
                append(&RefusalShape { id, error }, REFUSAL + len, out)
            }
        }
    }
}

impl RemoteError {
    /// An error to send.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

impl fmt::Display for RemoteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.code)?;
        match self.message.as_str() {
            "" => Ok(()),
            message => write!(f, ": {}", sanitise_line(message)),
        }
    }
}

impl std::error::Error for RemoteError {}

impl From<&DecodeError> for RemoteError {
    /// What is answered to what cannot be read.
    fn from(error: &DecodeError) -> Self {
        Self::new(ErrorCode::of(error), error.to_string())
    }
}

impl ErrorCode {
    /// How what cannot be read is answered: by its size, or by its form.
    pub(crate) fn of(error: &DecodeError) -> Self {
        match error {
            DecodeError::TooLarge { .. } => Self::TooLarge,
            DecodeError::Malformed(_) | DecodeError::TrailingBytes => Self::BadRequest,
        }
    }

    /// The code as it is on the wire.
    pub fn as_str(&self) -> &str {
        match self {
            Self::UnknownService => "unknown-service",
            Self::Busy => "busy",
            Self::TooLarge => "too-large",
            Self::BadRequest => "bad-request",
            Self::HandlerFailed => "handler-failed",
            Self::ShuttingDown => "shutting-down",
            Self::Other(OtherCode(code)) => code,
        }
    }
}

impl FromStr for ErrorCode {
    type Err = DecodeError;

    fn from_str(code: &str) -> Result<Self, DecodeError> {
        check_len("error code", code.len(), MAX_CODE)?;
        Ok(match code {
            "unknown-service" => Self::UnknownService,
            "busy" => Self::Busy,
            "too-large" => Self::TooLarge,
            "bad-request" => Self::BadRequest,
            "handler-failed" => Self::HandlerFailed,
            "shutting-down" => Self::ShuttingDown,
            other => Self::Other(OtherCode(other.to_owned())),
        })
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&sanitise_line(self.as_str()))
    }
}

/// The id of a frame that [`Request::decode`] refused, so that the refusal can reach whoever waits for it.
///
/// Known where the frame is a map whose `id` stands before what is wrong with it. Where this is `None`,
/// the answer carries id 0, which no client that expects answers should use.
pub fn salvage_id(frame: &[u8]) -> Option<u64> {
    let mut draft = IdDraft::default();
    // The error is why we are here.
    let _ = decode_into(&mut draft, frame);
    draft.0
}

#[derive(Serialize)]
struct RefusalShape<'a> {
    id: u64,
    error: ErrorShape<'a>,
}

#[derive(Serialize)]
struct ErrorShape<'a> {
    code: &'a str,
    message: &'a str,
}

impl<'a> ErrorShape<'a> {
    fn of(error: &'a RemoteError) -> Self {
        let end = floor_char_boundary(&error.message, MAX_MESSAGE);
        Self {
            code: error.code.as_str(),
            message: error.message.get(..end).unwrap_or_default(),
        }
    }
}

#[derive(Default)]
struct RequestDraft<'de> {
    id: Option<u64>,
    service: Option<Text<'de>>,
    payload: Option<Bytes<'de>>,
}

impl<'de> Draft<'de> for RequestDraft<'de> {
    const WHAT: &'static str = "a request";

    fn take<A: MapAccess<'de>>(&mut self, key: &str, values: &mut A) -> Result<(), A::Error> {
        match key {
            "id" => set(&mut self.id, "id", values),
            "service" => set(&mut self.service, "service", values),
            "payload" => set(&mut self.payload, "payload", values),
            key => Err(unknown_key(key, Self::WHAT)),
        }
    }
}

#[derive(Default)]
struct ReplyDraft<'de> {
    id: Option<u64>,
    ok: Option<Bytes<'de>>,
    error: Option<Nested<ErrorDraft<'de>>>,
}

impl<'de> Draft<'de> for ReplyDraft<'de> {
    const WHAT: &'static str = "a reply";

    fn take<A: MapAccess<'de>>(&mut self, key: &str, values: &mut A) -> Result<(), A::Error> {
        match key {
            "id" => set(&mut self.id, "id", values),
            "ok" => set(&mut self.ok, "ok", values),
            "error" => set(&mut self.error, "error", values),
            key => Err(unknown_key(key, Self::WHAT)),
        }
    }
}

#[derive(Default)]
struct ErrorDraft<'de> {
    code: Option<Text<'de>>,
    message: Option<Text<'de>>,
}

impl<'de> Draft<'de> for ErrorDraft<'de> {
    const WHAT: &'static str = "an error";

    fn take<A: MapAccess<'de>>(&mut self, key: &str, values: &mut A) -> Result<(), A::Error> {
        match key {
            "code" => set(&mut self.code, "code", values),
            "message" => set(&mut self.message, "message", values),
            key => Err(unknown_key(key, Self::WHAT)),
        }
    }
}

impl ErrorDraft<'_> {
    fn finish(self) -> Result<RemoteError, DecodeError> {
        let Text(code) = require(self.code, "code", Self::WHAT)?;
        let Text(message) = require(self.message, "message", Self::WHAT)?;
        check_len("error message", message.len(), MAX_MESSAGE)?;
        Ok(RemoteError {
            code: code.parse()?,
            message: Cow::into_owned(message),
        })
    }
}

/// What is left of a request when only its id matters.
#[derive(Default)]
struct IdDraft(Option<u64>);

impl<'de> Draft<'de> for IdDraft {
    const WHAT: &'static str = "a request";

    fn take<A: MapAccess<'de>>(&mut self, key: &str, values: &mut A) -> Result<(), A::Error> {
        match key {
            "id" => set(&mut self.0, "id", values),
            _ => values.next_value::<IgnoredAny>().map(drop),
        }
    }
}
