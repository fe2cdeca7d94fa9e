//! The protobuf schema of the protocol, and its messages to and from it.
//!
//! Written after `rpc.proto` of the specification, with three differences that cannot be seen on the wire:
//! requests and responses are two messages, so that the half that is not expected is skipped unread; namespaces
//! are bytes, so that one that is not UTF-8 gets its error code; and registrations are bytes, so that those
//! beyond a page are never decoded (an empty one takes 2 bytes on the wire and 24 here: 3 MiB at worst).

use std::io;

use prost::Message;

use super::{
    Cookie, MAX_REGISTRATIONS, Malformed, Namespace, Page, Registration, Request, Response,
    SignedPeer, Status, Ttl, page_len,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
enum MessageType {
    Register = 0,
    RegisterResponse = 1,
    Unregister = 2,
    Discover = 3,
    DiscoverResponse = 4,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RequestMessage {
    #[prost(enumeration = "MessageType", optional, tag = "1")]
    kind: Option<i32>,
    #[prost(message, optional, tag = "2")]
    register: Option<RegisterMessage>,
    #[prost(message, optional, tag = "4")]
    unregister: Option<UnregisterMessage>,
    #[prost(message, optional, tag = "5")]
    discover: Option<DiscoverMessage>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ResponseMessage {
    #[prost(enumeration = "MessageType", optional, tag = "1")]
    kind: Option<i32>,
    #[prost(message, optional, tag = "3")]
    registered: Option<RegisterResponse>,
    #[prost(message, optional, tag = "6")]
    discovered: Option<DiscoverResponse>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RegisterMessage {
    #[prost(bytes = "vec", optional, tag = "1")]
    namespace: Option<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "2")]
    record: Option<Vec<u8>>,
    #[prost(uint64, optional, tag = "3")]
    ttl: Option<u64>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RegisterResponse {
    #[prost(int32, optional, tag = "1")]
    status: Option<i32>,
    #[prost(uint64, optional, tag = "3")]
    ttl: Option<u64>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct UnregisterMessage {
    #[prost(bytes = "vec", optional, tag = "1")]
    namespace: Option<Vec<u8>>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct DiscoverMessage {
    #[prost(bytes = "vec", optional, tag = "1")]
    namespace: Option<Vec<u8>>,
    #[prost(uint64, optional, tag = "2")]
    limit: Option<u64>,
    #[prost(bytes = "vec", optional, tag = "3")]
    cookie: Option<Vec<u8>>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct DiscoverResponse {
    /// Each an encoded [`RegisterMessage`].
    #[prost(bytes = "vec", repeated, tag = "1")]
    registrations: Vec<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "2")]
    cookie: Option<Vec<u8>>,
    #[prost(int32, optional, tag = "3")]
    status: Option<i32>,
}

/// What is no message of the protocol. Turns into an [`io::Error`].
#[derive(Debug, thiserror::Error)]
pub(super) enum WireError {
    #[error("not a rendezvous message: {0}")]
    Protobuf(#[from] prost::DecodeError),
    #[error("a rendezvous message of another kind than expected")]
    UnexpectedKind,
    #[error("a response without its {0}")]
    Missing(&'static str),
    #[error("a cookie of more than {} bytes", Cookie::MAX_LEN)]
    CookieTooLong,
    #[error("more than {MAX_REGISTRATIONS} registrations in one page")]
    PageTooLong,
}

impl From<WireError> for io::Error {
    fn from(error: WireError) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

pub(super) fn encode_request(request: &Request) -> Vec<u8> {
    let mut message = RequestMessage::default();
    match request {
        Request::Register {
            namespace,
            record,
            ttl,
        } => {
            message.set_kind(MessageType::Register);
            message.register = Some(register_message(namespace, record, *ttl));
        }
        Request::Unregister { namespace } => {
            message.set_kind(MessageType::Unregister);
            let namespace = Some(namespace.as_str().into());
            message.unregister = Some(UnregisterMessage { namespace });
        }
        Request::Discover {
            namespace,
            cookie,
            limit,
        } => {
            message.set_kind(MessageType::Discover);
            message.discover = Some(DiscoverMessage {
                namespace: namespace
                    .as_ref()
                    .map(|namespace| namespace.as_str().into()),
                limit: Some(page_len(*limit) as u64),
                cookie: cookie.as_ref().map(|cookie| cookie.as_bytes().into()),
            });
        }
    }
    message.encode_to_vec()
}

/// A part that is absent is taken for an empty one: its missing content then has its own error code.
pub(super) fn decode_request(bytes: &[u8]) -> Result<Result<Request, Malformed>, WireError> {
    let message = RequestMessage::decode(bytes)?;
    match kind(message.kind)? {
        MessageType::Register => {
            let register = message.register.unwrap_or_default();
            Ok(register_request(register).map_err(Malformed::Register))
        }
        MessageType::Unregister => {
            let unregister = message.unregister.unwrap_or_default();
            let namespace = namespace(unregister.namespace).map_err(Malformed::Unregister);
            Ok(namespace.map(|namespace| Request::Unregister { namespace }))
        }
        MessageType::Discover => {
            let discover = message.discover.unwrap_or_default();
            Ok(discover_request(discover).map_err(Malformed::Discover))
        }
        MessageType::RegisterResponse | MessageType::DiscoverResponse => {
            Err(WireError::UnexpectedKind)
        }
    }
}

/// `None` for the response that is not on the wire.
pub(super) fn encode_response(response: &Response) -> Result<Option<Vec<u8>>, WireError> {
    let mut message = ResponseMessage::default();
    match response {
        Response::Registered(result) => {
            message.set_kind(MessageType::RegisterResponse);
            message.registered = Some(RegisterResponse {
                status: Some(result.map_or_else(code, |_| OK)),
                ttl: result.ok().map(Ttl::as_secs),
            });
        }
        Response::Discovered(result) => {
            message.set_kind(MessageType::DiscoverResponse);
            message.discovered = Some(match result {
                Ok(page) => page_message(page)?,
                Err(status) => DiscoverResponse {
                    status: Some(code(*status)),
                    ..DiscoverResponse::default()
                },
            });
        }
        Response::Unregistered => return Ok(None),
    }
    Ok(Some(message.encode_to_vec()))
}

/// The answer to a [`Request::Register`].
pub(super) fn decode_registered(bytes: &[u8]) -> Result<Response, WireError> {
    let message = ResponseMessage::decode(bytes)?;
    if kind(message.kind)? != MessageType::RegisterResponse {
        return Err(WireError::UnexpectedKind);
    }
    let registered = message.registered.unwrap_or_default();
    if let Err(refused) = status(registered.status) {
        return Ok(Response::Registered(Err(refused)));
    }
    let ttl = registered.ttl.ok_or(WireError::Missing("ttl"))?;
    Ok(Response::Registered(Ok(Ttl::from_secs(ttl))))
}

/// The answer to a [`Request::Discover`]: at most `limit` registrations are looked at, and those that are
/// wrong are left out, so that one of them does not hide the others.
pub(super) fn decode_discovered(bytes: &[u8], limit: usize) -> Result<Response, WireError> {
    let message = ResponseMessage::decode(bytes)?;
    if kind(message.kind)? != MessageType::DiscoverResponse {
        return Err(WireError::UnexpectedKind);
    }
    let discovered = message.discovered.unwrap_or_default();
    if let Err(refused) = status(discovered.status) {
        return Ok(Response::Discovered(Err(refused)));
    }
    let cookie = discovered.cookie.ok_or(WireError::Missing("cookie"))?;
    let registrations = discovered.registrations.iter().take(limit);
    Ok(Response::Discovered(Ok(Page {
        registrations: registrations
            .filter_map(|bytes| registration(bytes))
            .collect(),
        cookie: Cookie::from_bytes(cookie).map_err(|_| WireError::CookieTooLong)?,
    })))
}

fn register_message(
    namespace: &Namespace,
    record: &SignedPeer,
    ttl: Option<Ttl>,
) -> RegisterMessage {
    RegisterMessage {
        namespace: Some(namespace.as_str().into()),
        record: Some(record.envelope().to_vec()),
        ttl: ttl.map(Ttl::as_secs),
    }
}

/// The signature comes last: the cheap checks spare it.
fn register_request(register: RegisterMessage) -> Result<Request, Status> {
    Ok(Request::Register {
        namespace: namespace(register.namespace)?,
        ttl: register.ttl.map(Ttl::from_secs),
        record: record(register.record)?,
    })
}

/// An empty namespace or cookie is how go-libp2p leaves it out.
fn discover_request(discover: DiscoverMessage) -> Result<Request, Status> {
    let given = |bytes: &Vec<u8>| !bytes.is_empty();
    let asked = discover.namespace.filter(given);
    let cookie = discover.cookie.filter(given);
    Ok(Request::Discover {
        namespace: asked.map(|asked| namespace(Some(asked))).transpose()?,
        cookie: cookie.map(Cookie::from_bytes).transpose()?,
        limit: discover.limit,
    })
}

fn page_message(page: &Page) -> Result<DiscoverResponse, WireError> {
    if page.registrations.len() > MAX_REGISTRATIONS {
        return Err(WireError::PageTooLong);
    }
    let registrations = page.registrations.iter().map(|registration| {
        let Registration {
            namespace,
            record,
            ttl,
        } = registration;
        register_message(namespace, record, Some(*ttl)).encode_to_vec()
    });
    Ok(DiscoverResponse {
        registrations: registrations.collect(),
        cookie: Some(page.cookie.as_bytes().into()),
        status: Some(OK),
    })
}

fn registration(bytes: &[u8]) -> Option<Registration> {
    let register = RegisterMessage::decode(bytes).ok()?;
    Some(Registration {
        namespace: namespace(register.namespace).ok()?,
        ttl: Ttl::from_secs(register.ttl?),
        record: record(register.record).ok()?,
    })
}

fn namespace(bytes: Option<Vec<u8>>) -> Result<Namespace, Status> {
    let text = String::from_utf8(bytes.unwrap_or_default());
    Namespace::new(text.map_err(|_| Status::InvalidNamespace)?)
}

fn record(envelope: Option<Vec<u8>>) -> Result<SignedPeer, Status> {
    SignedPeer::from_envelope(envelope.unwrap_or_default()).map_err(|error| {
        tracing::debug!(%error, "refused a signed peer record");
        Status::InvalidSignedPeerRecord
    })
}

/// The default of an absent enumeration is its first value, here [`MessageType::Register`].
fn kind(kind: Option<i32>) -> Result<MessageType, WireError> {
    MessageType::try_from(kind.unwrap_or_default()).map_err(|_| WireError::UnexpectedKind)
}

const OK: i32 = 0;

fn code(status: Status) -> i32 {
    match status {
        Status::InvalidNamespace => 100,
        Status::InvalidSignedPeerRecord => 101,
        Status::InvalidTtl => 102,
        Status::InvalidCookie => 103,
        Status::NotAuthorized => 200,
        Status::InternalError => 300,
        Status::Unavailable => 400,
    }
}

fn status(code: Option<i32>) -> Result<(), Status> {
    Err(match code.unwrap_or(OK) {
        OK => return Ok(()),
        100 => Status::InvalidNamespace,
        101 => Status::InvalidSignedPeerRecord,
        102 => Status::InvalidTtl,
        103 => Status::InvalidCookie,
        200 => Status::NotAuthorized,
        400 => Status::Unavailable,
        _ => Status::InternalError,
    })
}
