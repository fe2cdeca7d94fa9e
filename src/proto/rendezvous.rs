//! The standard `/rendezvous/1.0.0` protocol: its messages, for the client and for the server.
//!
//! Invariants:
//! * A value of a type here is valid: a [`SignedPeer`] is verified, a [`Namespace`] has 1 to 255 bytes, a
//!   [`Ttl`] fits any arithmetic, a [`Response`] that was read answers the request that was written.
//! * Whatever a remote sends, the memory and the signature checks it costs are bounded, and nothing panics.
//! * A request whose kind can be told but whose content is wrong is [`Malformed`] and can be answered with the
//!   right [`Status`]; only what is no message at all ends its stream with an error.
//! * No state outlives a stream: a [`Cookie`] carries all that the next discovery needs.
//!
//! Left to others: who may register for how long, what is stored, and that the record's peer is the one that
//! sent it ([`Status::NotAuthorized`]). A signature covers no namespace: that a provider really serves a name
//! is for the provider to say.
//!
//! Records come in two [`Form`]s, and a response must have one only: a stock client drops all of it for a
//! single record in the other form.

mod codec;
#[cfg(test)]
mod interop;
mod signed_peer;
mod wire;

use std::{borrow::Borrow, fmt, time::Duration};

pub(crate) use self::{
    codec::Codec,
    signed_peer::{Envelopes, Form, RecordError, SignedPeer},
};

/// Longest request in bytes: one record and one namespace take 4.3 KiB, the rest is room for fields that we
/// do not know.
pub(crate) const MAX_REQUEST_LEN: usize = 8 * 1024;

/// Longest response in bytes: a full page of the largest registrations fits.
pub(crate) const MAX_RESPONSE_LEN: usize = 256 * 1024;

/// Most registrations in one response, sent or used. Checking one takes 50 to 80 µs, so a page takes a client up to 4 ms;
/// who wants more continues with the cookie.
pub(crate) const MAX_REGISTRATIONS: usize = 50;

/// A registration's namespace, record, TTL, and the tags and lengths around them.
const MAX_REGISTRATION_LEN: usize = Namespace::MAX_LEN + SignedPeer::MAX_LEN + 32;

const _: () = assert!(MAX_REGISTRATION_LEN <= MAX_REQUEST_LEN);
const _: () = assert!(
    MAX_REGISTRATIONS * MAX_REGISTRATION_LEN + Cookie::MAX_LEN + 32 <= MAX_RESPONSE_LEN,
    "a full page must fit into a response"
);

/// What a client asks of a rendezvous point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Request {
    /// Be found under `namespace`. Answered by [`Response::Registered`].
    Register {
        /// What to be found under.
        namespace: Namespace,
        /// Who is found. A server accepts only the sender's own record.
        record: SignedPeer,
        /// For how long; [`Ttl::DEFAULT`] where absent.
        ttl: Option<Ttl>,
    },
    /// Be found under `namespace` no longer. The protocol has no answer to it: see
    /// [`Response::Unregistered`].
    Unregister {
        /// What one registered under.
        namespace: Namespace,
    },
    /// Who is registered? Answered by [`Response::Discovered`].
    Discover {
        /// Under this namespace, or under any.
        namespace: Option<Namespace>,
        /// Continue where the discovery ended that gave this cookie.
        cookie: Option<Cookie>,
        /// How many at most. A client always sends the [`page_len`] of it, because a server may take none
        /// for "all", and the cookie would then skip what did not fit.
        limit: Option<u64>,
    },
}

/// A request whose content is wrong. Becomes the [`Response`] that says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Malformed {
    /// A wrong [`Request::Register`].
    Register(Status),
    /// A wrong [`Request::Unregister`], for which the protocol has no answer.
    Unregister(Status),
    /// A wrong [`Request::Discover`].
    Discover(Status),
}

/// What a rendezvous point answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Response {
    /// Registered for this long, or why not.
    Registered(Result<Ttl, Status>),
    /// One page of registrations, or why not.
    Discovered(Result<Page, Status>),
    /// Nothing on the wire: the server closes the stream once it has read the request.
    Unregistered,
}

/// Some of the registrations, and where to continue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Page {
    /// At most [`MAX_REGISTRATIONS`].
    pub registrations: Vec<Registration>,
    /// For the next [`Request::Discover`] with the same namespace.
    pub cookie: Cookie,
}

/// Who was registered under a namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Registration {
    /// As the server says; the signature does not cover it.
    pub namespace: Namespace,
    /// Who, and where.
    pub record: SignedPeer,
    /// For how long, as the server says.
    pub ttl: Ttl,
}

/// Why a request was refused: the error codes of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub(crate) enum Status {
    /// Code 100.
    #[error("invalid namespace")]
    InvalidNamespace,
    /// Code 101.
    #[error("invalid signed peer record")]
    InvalidSignedPeerRecord,
    /// Code 102.
    #[error("invalid ttl")]
    InvalidTtl,
    /// Code 103.
    #[error("invalid cookie")]
    InvalidCookie,
    /// Code 200.
    #[error("not authorized")]
    NotAuthorized,
    /// Code 300, and every code that the protocol does not define.
    #[error("internal error")]
    InternalError,
    /// Code 400.
    #[error("unavailable")]
    Unavailable,
}

/// How many registrations answer a [`Request::Discover`] with this limit: never more than
/// [`MAX_REGISTRATIONS`], which is also what no limit and 0 (how go-libp2p says "no limit") stand for.
pub(crate) fn page_len(limit: Option<u64>) -> usize {
    match limit.map(usize::try_from) {
        Some(Ok(limit)) if limit > 0 => limit.min(MAX_REGISTRATIONS),
        _ => MAX_REGISTRATIONS,
    }
}

impl From<Malformed> for Response {
    fn from(malformed: Malformed) -> Self {
        match malformed {
            Malformed::Register(status) => Self::Registered(Err(status)),
            Malformed::Unregister(_) => Self::Unregistered,
            Malformed::Discover(status) => Self::Discovered(Err(status)),
        }
    }
}

/// What one registers under: 1 to 255 bytes of UTF-8.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Namespace(String);

impl Namespace {
    /// Longest namespace in bytes, as the protocol's specification has it.
    pub(crate) const MAX_LEN: usize = 255;

    /// Fails with [`Status::InvalidNamespace`] unless `text` has 1 to 255 bytes.
    pub(crate) fn new(text: impl Into<String>) -> Result<Self, Status> {
        let text = text.into();
        match text.len() {
            1..=Self::MAX_LEN => Ok(Self(text)),
            _ => Err(Status::InvalidNamespace),
        }
    }

    /// The text.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Namespace {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How long a registration lasts, in whole seconds, at most [`Ttl::MAX`]: adding it to a clock cannot overflow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ttl(u32);

impl Ttl {
    /// 72 hours, the longest that the protocol's specification recommends. A longer one is taken for this.
    pub const MAX: Self = Self(72 * 60 * 60);

    /// 2 hours: what the protocol's specification has for a registration that names none.
    pub const DEFAULT: Self = Self(2 * 60 * 60);

    /// Cut to [`Ttl::MAX`].
    pub const fn from_secs(seconds: u64) -> Self {
        if seconds < Self::MAX.0 as u64 {
            Self(seconds as u32)
        } else {
            Self::MAX
        }
    }

    /// In seconds.
    pub const fn as_secs(self) -> u64 {
        self.0 as u64
    }
}

impl From<Ttl> for Duration {
    fn from(ttl: Ttl) -> Self {
        Self::from_secs(ttl.as_secs())
    }
}

/// Where a discovery ended. Opaque to the client; for the server, the sequence number of the last registration
/// that it returned, and the namespace.
///
/// The server remembers nothing about it, so its sequence numbers must not start over when it restarts: a
/// client would then miss what is numbered below its old cookie. Start them from the clock. Anybody can make up a
/// cookie, and gains nothing that a discovery without one would not give.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Cookie(Vec<u8>);

impl Cookie {
    /// Longest cookie in bytes. Ours have at most 263, other servers add a nonce or a hash; a client sends back either.
    pub(crate) const MAX_LEN: usize = 512;

    /// For the page that ends with the registration numbered `sequence`.
    ///
    /// Rust's stock client does not treat cookies as opaque: it takes 8 bytes and then a namespace, and refuses
    /// anything else. Hence this encoding: the number in big-endian order, then the namespace, if any.
    pub(crate) fn after(sequence: u64, namespace: Option<&Namespace>) -> Self {
        let namespace = namespace.map_or("", Namespace::as_str);
        Self([&sequence.to_be_bytes(), namespace.as_bytes()].concat())
    }

    /// The number to continue after, in a discovery of `namespace`. Fails with [`Status::InvalidCookie`] for a
    /// cookie that was given for another namespace, or that is none of ours.
    pub(crate) fn sequence_for(&self, namespace: Option<&Namespace>) -> Result<u64, Status> {
        let (sequence, ours) = self.0.split_first_chunk().ok_or(Status::InvalidCookie)?;
        if ours != namespace.map_or("", Namespace::as_str).as_bytes() {
            return Err(Status::InvalidCookie);
        }
        Ok(u64::from_be_bytes(*sequence))
    }

    /// Any bytes that a server may have sent; fails with [`Status::InvalidCookie`] beyond [`Cookie::MAX_LEN`].
    pub(crate) fn from_bytes(bytes: Vec<u8>) -> Result<Self, Status> {
        if bytes.len() > Self::MAX_LEN {
            return Err(Status::InvalidCookie);
        }
        Ok(Self(bytes))
    }

    /// As on the wire.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace(text: &str) -> Namespace {
        Namespace::new(text).unwrap()
    }

    #[test]
    fn namespace_has_1_to_255_bytes() {
        for (text, valid) in [
            (String::new(), false),
            ("a".into(), true),
            ("a".repeat(255), true),
            ("a".repeat(256), false),
            ("ä".repeat(128), false),
        ] {
            let expected = if valid {
                Ok(text.clone())
            } else {
                Err(Status::InvalidNamespace)
            };
            assert_eq!(
                Namespace::new(text).map(|namespace| namespace.to_string()),
                expected
            );
        }
    }

    #[test]
    fn any_ttl_can_be_added_to_a_clock() {
        for (seconds, expected) in [
            (0, 0),
            (90, 90),
            (259_199, 259_199),
            (259_200, 259_200),
            (259_201, 259_200),
            (1 << 32, 259_200),
            (u64::MAX, 259_200),
        ] {
            let ttl = Ttl::from_secs(seconds);
            assert_eq!(ttl.as_secs(), expected);
            assert!(std::time::Instant::now().checked_add(ttl.into()).is_some());
        }
    }

    #[test]
    fn page_is_never_longer_than_the_limit() {
        for (limit, expected) in [
            (None, MAX_REGISTRATIONS),
            (Some(0), MAX_REGISTRATIONS),
            (Some(1), 1),
            (Some(MAX_REGISTRATIONS as u64), MAX_REGISTRATIONS),
            (Some(u64::MAX), MAX_REGISTRATIONS),
        ] {
            assert_eq!(page_len(limit), expected, "{limit:?}");
        }
    }

    #[test]
    fn cookie_is_good_for_its_own_namespace_only() {
        let (one, other) = (namespace("one"), namespace("other"));
        for given in [None, Some(&one), Some(&other)] {
            for asked in [None, Some(&one), Some(&other)] {
                let expected = if given == asked {
                    Ok(7)
                } else {
                    Err(Status::InvalidCookie)
                };
                assert_eq!(Cookie::after(7, given).sequence_for(asked), expected);
            }
        }
    }

    #[test]
    fn cookie_encoding_is_pinned() {
        let cookie = Cookie::after(0x0102, Some(&namespace("ab")));
        assert_eq!(cookie.as_bytes(), [0, 0, 0, 0, 0, 0, 1, 2, b'a', b'b']);
    }

    #[test]
    fn foreign_cookie_is_kept_but_not_understood() {
        for bytes in [vec![], vec![1; 7], vec![0xFF; 9], vec![1; Cookie::MAX_LEN]] {
            let cookie = Cookie::from_bytes(bytes).unwrap();
            let result = cookie.sequence_for(Some(&namespace("a")));
            assert_eq!(result, Err(Status::InvalidCookie));
        }
        let too_long = Cookie::from_bytes(vec![1; Cookie::MAX_LEN + 1]);
        assert_eq!(too_long, Err(Status::InvalidCookie));
    }
}
