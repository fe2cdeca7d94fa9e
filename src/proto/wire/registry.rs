//! What grapes tell each other of their workers: closed maps, as those of the RPC.

use std::net::{IpAddr, SocketAddr};

use serde::{Serialize, de::MapAccess};

use super::{
    DecodeError, EncodeError, check_len, check_sendable, decode, encode, malformed,
    map::{Bytes, Draft, List, Nested, require, set, unknown_key},
};
use crate::name::SHA2_256;

/// The reserved service by which grapes tell each other which workers they have.
pub const REGISTRY: &str = "grapevine/registry";

/// The reserved service by which a grape asks another one to take back workers that announced
/// themselves there: a [`Batch`] of changes without a lease. The answer is one byte, of [`Withdrawn`].
pub const WITHDRAW: &str = "grapevine/withdraw";

/// The workers in one such request, at most.
pub const MAX_WITHDRAWN: usize = 64;

/// The changes in one message, at most: 80 KB of them.
pub const MAX_CHANGES: usize = 1_000;

/// The services asked for in one message, at most.
pub const MAX_FIND: usize = 16;

/// The workers of one service in an answer, at most: as many as a lookup of Grenache's returns.
pub const MAX_FOUND: usize = 100;

/// The bytes that a change takes, about.
const CHANGE: usize = 80;

/// The sha2-256 digest of a service's name: a key of Kademlia's without the two bytes before it.
pub type Digest = [u8; 32];

/// A worker of the grape that sends this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which service.
    pub service: Digest,
    /// Where the worker is. A loopback address means the host of the grape.
    pub at: SocketAddr,
    /// How many milliseconds to keep it; none of one that is gone.
    pub lease: Option<u64>,
}

/// What became of workers that were to be taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Withdrawn {
    /// None of them was announced there.
    Unknown,
    /// They are gone, and the grapes that this one knows have confirmed it.
    Gone,
    /// Some are still named.
    Left,
}

impl Withdrawn {
    /// Reads an answer; anything else than one of ours takes nothing back.
    pub fn decode(payload: &[u8]) -> Self {
        match payload {
            [0] => Self::Unknown,
            [1] => Self::Gone,
            _ => Self::Left,
        }
    }

    /// Writes the answer.
    pub fn encode(self) -> Vec<u8> {
        vec![match self {
            Self::Unknown => 0,
            Self::Gone => 1,
            Self::Left => 2,
        }]
    }
}

/// What a grape tells and asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// In the order in which they happened; at most [`MAX_CHANGES`].
    pub changes: Vec<Change>,
    /// Services whose workers at the other grape are asked for; at most [`MAX_FIND`].
    pub find: Vec<Digest>,
}

/// The answer to a [`Batch`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BatchReply {
    /// How many of the changes found no room.
    pub refused: u64,
    /// The workers of each service asked for, at most [`MAX_FOUND`] of each.
    pub found: Vec<Vec<SocketAddr>>,
}

impl Batch {
    /// Reads the payload of a request.
    ///
    /// # Errors
    /// If it is not one batch within the bounds.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let draft: BatchDraft<'_> = decode(payload)?;
        let what = BatchDraft::WHAT;
        let List(changes) = require(draft.changes, "changes", what)?;
        let List(find) = require(draft.find, "find", what)?;
        check_len("list of changes", changes.len(), MAX_CHANGES)?;
        check_len("list of services", find.len(), MAX_FIND)?;
        let changes = changes.into_iter().map(|Nested(change)| change.finish());
        Ok(Self {
            changes: changes.collect::<Result<_, _>>()?,
            find: find.iter().map(digest).collect::<Result<_, _>>()?,
        })
    }

    /// Writes the payload of a request.
    ///
    /// # Errors
    /// If there is more in it than the bounds allow.
    pub fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        check_sendable("list of changes", self.changes.len(), MAX_CHANGES)?;
        check_sendable("list of services", self.find.len(), MAX_FIND)?;
        let shape = BatchShape {
            changes: self.changes.iter().map(ChangeShape::from).collect(),
            find: self.find.iter().map(key).collect(),
        };
        encode(&shape, CHANGE * (1 + self.changes.len() + self.find.len()))
    }
}

impl BatchReply {
    /// Reads the payload of a reply.
    ///
    /// # Errors
    /// If it is not the answer to a batch, within the bounds.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let draft: ReplyDraft<'_> = decode(payload)?;
        let what = ReplyDraft::WHAT;
        let refused = require(draft.refused, "refused", what)?;
        let List(found) = require(draft.found, "found", what)?;
        check_len("list of services", found.len(), MAX_FIND)?;
        let found = found.iter().map(|List(workers)| {
            check_len("list of workers", workers.len(), MAX_FOUND)?;
            workers.iter().map(address).collect()
        });
        Ok(Self {
            refused,
            found: found.collect::<Result<_, _>>()?,
        })
    }

    /// Writes the payload of a reply.
    ///
    /// # Errors
    /// If there is more in it than the bounds allow.
    pub fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        check_sendable("list of services", self.found.len(), MAX_FIND)?;
        let mut size = 32;
        for workers in &self.found {
            check_sendable("list of workers", workers.len(), MAX_FOUND)?;
            size += 20 * workers.len();
        }
        let found = self.found.iter().map(|workers| {
            let workers = workers.iter().map(|at| address_bytes(*at));
            workers.map(serde_bytes::ByteBuf::from).collect()
        });
        let shape = ReplyShape {
            refused: self.refused,
            found: found.collect(),
        };
        encode(&shape, size)
    }
}

impl Change {
    /// The same as told by a grape on that host, which means itself by a loopback address.
    pub(crate) fn seen_from(mut self, host: Option<IpAddr>) -> Self {
        if let Some(host) = host.filter(|host| !host.is_unspecified())
            && self.at.ip().is_loopback()
        {
            self.at.set_ip(host.to_canonical());
        }
        self
    }
}

fn digest(key: &Bytes<'_>) -> Result<Digest, DecodeError> {
    let Bytes(key) = key;
    let digest = key.strip_prefix(&SHA2_256);
    let digest = digest.and_then(|digest| digest.try_into().ok());
    digest.ok_or_else(|| malformed("a key that is no sha2-256 multihash".into()))
}

fn key(digest: &Digest) -> serde_bytes::ByteBuf {
    serde_bytes::ByteBuf::from([&SHA2_256[..], digest].concat())
}

/// An address is its 4 or 16 bytes and the port's 2, in network order.
fn address(bytes: &Bytes<'_>) -> Result<SocketAddr, DecodeError> {
    let Bytes(bytes) = bytes;
    let ip = match bytes.len() {
        6 => <[u8; 4]>::try_from(&bytes[..4]).map(IpAddr::from),
        18 => <[u8; 16]>::try_from(&bytes[..16]).map(IpAddr::from),
        len => return Err(malformed(format!("an address of {len} bytes"))),
    };
    match (ip, bytes[bytes.len() - 2..].try_into()) {
        (Ok(ip), Ok(port)) => Ok(SocketAddr::new(ip.to_canonical(), u16::from_be_bytes(port))),
        _ => Err(malformed("an address of another length".into())),
    }
}

fn address_bytes(at: SocketAddr) -> Vec<u8> {
    let mut bytes = match at.ip().to_canonical() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    bytes.extend(at.port().to_be_bytes());
    bytes
}

#[derive(Serialize)]
struct BatchShape {
    changes: Vec<ChangeShape>,
    find: Vec<serde_bytes::ByteBuf>,
}

#[derive(Serialize)]
struct ChangeShape {
    key: serde_bytes::ByteBuf,
    at: serde_bytes::ByteBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    lease: Option<u64>,
}

#[derive(Serialize)]
struct ReplyShape {
    refused: u64,
    found: Vec<Vec<serde_bytes::ByteBuf>>,
}

impl From<&Change> for ChangeShape {
    fn from(change: &Change) -> Self {
        Self {
            key: key(&change.service),
            at: serde_bytes::ByteBuf::from(address_bytes(change.at)),
            lease: change.lease,
        }
    }
}

#[derive(Default)]
struct BatchDraft<'de> {
    changes: Option<List<Nested<ChangeDraft<'de>>, MAX_CHANGES>>,
    find: Option<List<Bytes<'de>, MAX_FIND>>,
}

#[derive(Default)]
struct ChangeDraft<'de> {
    key: Option<Bytes<'de>>,
    at: Option<Bytes<'de>>,
    lease: Option<u64>,
}

#[derive(Default)]
struct ReplyDraft<'de> {
    refused: Option<u64>,
    found: Option<List<List<Bytes<'de>, MAX_FOUND>, MAX_FIND>>,
}

impl ChangeDraft<'_> {
    fn finish(self) -> Result<Change, DecodeError> {
        Ok(Change {
            service: digest(&require(self.key, "key", Self::WHAT)?)?,
            at: address(&require(self.at, "at", Self::WHAT)?)?,
            lease: self.lease,
        })
    }
}

impl<'de> Draft<'de> for BatchDraft<'de> {
    const WHAT: &'static str = "a batch";

    fn take<A: MapAccess<'de>>(&mut self, key: &str, values: &mut A) -> Result<(), A::Error> {
        match key {
            "changes" => set(&mut self.changes, "changes", values),
            "find" => set(&mut self.find, "find", values),
            key => Err(unknown_key(key, Self::WHAT)),
        }
    }
}

impl<'de> Draft<'de> for ChangeDraft<'de> {
    const WHAT: &'static str = "a change";

    fn take<A: MapAccess<'de>>(&mut self, key: &str, values: &mut A) -> Result<(), A::Error> {
        match key {
            "key" => set(&mut self.key, "key", values),
            "at" => set(&mut self.at, "at", values),
            "lease" => set(&mut self.lease, "lease", values),
            key => Err(unknown_key(key, Self::WHAT)),
        }
    }
}

impl<'de> Draft<'de> for ReplyDraft<'de> {
    const WHAT: &'static str = "an answer to a batch";

    fn take<A: MapAccess<'de>>(&mut self, key: &str, values: &mut A) -> Result<(), A::Error> {
        match key {
            "refused" => set(&mut self.refused, "refused", values),
            "found" => set(&mut self.found, "found", values),
            key => Err(unknown_key(key, Self::WHAT)),
        }
    }
}
