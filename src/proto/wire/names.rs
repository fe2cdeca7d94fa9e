//! What a node tells and asks a grape of names, many at a time: closed maps, as those of the RPC.

use libp2p::{Multiaddr, PeerId};
use serde::{Serialize, de::MapAccess};
use serde_bytes::ByteBuf;

use super::{
    DecodeError, EncodeError, check_len, check_sendable, decode, encode, malformed,
    map::{Bytes, Draft, List, Nested, Text, require, set, unknown_key},
};
use crate::limits::MAX_ADDRESSES;
use crate::name::ServiceName;
use crate::proto::addresses;

/// The reserved service by which a grape keeps, takes back and finds names.
pub const NAMES: &str = "grapevine/names";

/// The names that one message announces or takes back, at most: 260 KB of the longest ones, and 5 ms
/// of the grape's time.
pub const MAX_NAMES: usize = 1_000;

/// The names that one message looks up, at most: as many full answers as fit into a reply.
pub const MAX_SOUGHT: usize = 16;

/// The providers of one name in an answer, at most: as many as a lookup dials.
pub const MAX_PROVIDERS: usize = 64;

/// The bytes of a signed peer record, at most: eight of the longest addresses, an RSA key, a signature.
pub const MAX_RECORD: usize = 4_096;

/// The bytes of an address, at most: a relayed one takes 140.
pub const MAX_ADDRESS: usize = 256;

/// The bytes that the providers of one name take in an answer, at most. Ordinary ones take 120.
const MAX_ANSWER: usize = 60 * 1_024;

/// The bytes that surround a message's lists, about.
const ENVELOPE: usize = 64;

/// The bytes of a further key and its number, at most.
const NUMBER: usize = 19;

/// What a node tells and asks. Names are taken back first, then announced, then looked up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamesRequest {
    /// Names that the sender serves now; at most [`MAX_NAMES`].
    pub announce: Vec<ServiceName>,
    /// The sender's signed peer record, at most [`MAX_RECORD`] bytes: there if anything is announced.
    pub record: Option<Vec<u8>>,
    /// The same in the form of Rust's libp2p, at most [`MAX_RECORD`] bytes: so that its rendezvous clients find
    /// the sender too. Never there without a record.
    pub legacy: Option<Vec<u8>>,
    /// Names that it serves no longer; at most [`MAX_NAMES`].
    pub withdraw: Vec<ServiceName>,
    /// Names whose providers are asked for; at most [`MAX_SOUGHT`].
    pub find: Vec<ServiceName>,
    /// Which of perhaps several nodes with the sender's key this is: a number drawn at its start. What is
    /// taken back is what was announced under it.
    pub session: Option<u64>,
}

/// The answer to a [`NamesRequest`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamesReply {
    /// How many milliseconds the grape keeps what was announced.
    pub lease: u64,
    /// The places, in the list of those announced, of the names that it does not keep.
    pub refused: Vec<u64>,
    /// The providers of each name asked for, at most [`MAX_PROVIDERS`] of each.
    pub found: Vec<Vec<Provided>>,
    /// How many grapes the grape knows, itself included.
    pub grapes: u64,
    /// How many other nodes with the sender's key the grape has heard of since the sender's session began.
    pub elsewhere: u64,
}

/// A provider of a name, as the grape knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Provided {
    /// Who it is.
    pub peer: PeerId,
    /// Where it says that it can be dialled; at most [`MAX_ADDRESSES`], and perhaps none.
    pub addresses: Vec<Multiaddr>,
    /// How many milliseconds are left of its lease.
    pub lease: u64,
}

impl NamesRequest {
    /// Reads the payload of a request.
    ///
    /// # Errors
    /// If it is not one such message within the bounds, with names that are names.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let draft: RequestDraft<'_> = decode(payload)?;
        let what = RequestDraft::WHAT;
        let List(announce) = require(draft.announce, "announce", what)?;
        let List(withdraw) = require(draft.withdraw, "withdraw", what)?;
        let List(find) = require(draft.find, "find", what)?;
        check_len("list of announced names", announce.len(), MAX_NAMES)?;
        check_len("list of withdrawn names", withdraw.len(), MAX_NAMES)?;
        check_len("list of sought names", find.len(), MAX_SOUGHT)?;
        let record = draft.record.map(|Bytes(record)| record.into_owned());
        check_len("record", record.as_ref().map_or(0, Vec::len), MAX_RECORD)?;
        let legacy = draft.legacy.map(|Bytes(record)| record.into_owned());
        let len = legacy.as_ref().map_or(0, Vec::len);
        check_len("legacy record", len, MAX_RECORD)?;
        if legacy.is_some() && record.is_none() {
            return Err(malformed(format!(
                "{what} has a legacy record and no other"
            )));
        }
        if record.is_none() != announce.is_empty() {
            return Err(malformed(format!(
                "{what} has a record if it announces, and only then"
            )));
        }
        Ok(Self {
            announce: names(&announce)?,
            record,
            legacy,
            withdraw: names(&withdraw)?,
            find: names(&find)?,
            session: draft.session,
        })
    }

    /// Writes the payload of a request.
    ///
    /// # Errors
    /// If there is more in it than the bounds allow.
    pub fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        check_sendable("list of announced names", self.announce.len(), MAX_NAMES)?;
        check_sendable("list of withdrawn names", self.withdraw.len(), MAX_NAMES)?;
        check_sendable("list of sought names", self.find.len(), MAX_SOUGHT)?;
        let record = self.record.as_deref();
        let legacy = self.legacy.as_deref();
        check_sendable("record", record.map_or(0, <[u8]>::len), MAX_RECORD)?;
        check_sendable("legacy record", legacy.map_or(0, <[u8]>::len), MAX_RECORD)?;
        let all = [&self.announce, &self.withdraw, &self.find];
        let size = |name: &ServiceName| name.as_ref().len() + 2;
        let names: usize = all.into_iter().flatten().map(size).sum();
        let records: usize = [record, legacy]
            .into_iter()
            .flatten()
            .map(<[u8]>::len)
            .sum();
        let shape = RequestShape {
            announce: texts(&self.announce),
            record: record.map(serde_bytes::Bytes::new),
            legacy: legacy.map(serde_bytes::Bytes::new),
            withdraw: texts(&self.withdraw),
            find: texts(&self.find),
            session: self.session,
        };
        let session = self.session.map_or(0, |_| NUMBER);
        encode(&shape, ENVELOPE + session + names + records)
    }
}

impl NamesReply {
    /// Reads the payload of a reply.
    ///
    /// # Errors
    /// If it is not the answer to such a message, within the bounds.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let draft: ReplyDraft<'_> = decode(payload)?;
        let what = ReplyDraft::WHAT;
        let lease = require(draft.lease, "lease", what)?;
        let List(refused) = require(draft.refused, "refused", what)?;
        let List(found) = require(draft.found, "found", what)?;
        let grapes = require(draft.grapes, "grapes", what)?;
        check_len("list of refused names", refused.len(), MAX_NAMES)?;
        check_len("list of sought names", found.len(), MAX_SOUGHT)?;
        let found = found.into_iter().map(|List(providers)| {
            check_len("list of providers", providers.len(), MAX_PROVIDERS)?;
            let provided = providers.into_iter().map(|Nested(draft)| draft.finish());
            provided.collect()
        });
        Ok(Self {
            lease,
            refused,
            found: found.collect::<Result<_, _>>()?,
            grapes,
            elsewhere: draft.elsewhere.unwrap_or_default(),
        })
    }

    /// Writes the payload of a reply.
    ///
    /// # Errors
    /// If there is more in it than the bounds allow.
    pub fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        check_sendable("list of refused names", self.refused.len(), MAX_NAMES)?;
        check_sendable("list of sought names", self.found.len(), MAX_SOUGHT)?;
        let elsewhere = if self.elsewhere > 0 { NUMBER } else { 0 };
        let mut size = ENVELOPE + elsewhere + 3 * self.refused.len();
        for providers in &self.found {
            check_sendable("list of providers", providers.len(), MAX_PROVIDERS)?;
            size += 2 + providers.iter().map(Provided::size).sum::<usize>();
        }
        let shape = ReplyShape {
            lease: self.lease,
            refused: &self.refused,
            found: self.found.iter().map(|of| shapes(of)).collect(),
            grapes: self.grapes,
            elsewhere: (self.elsewhere > 0).then_some(self.elsewhere),
        };
        encode(&shape, size)
    }
}

impl Provided {
    /// The bytes that it takes in an answer, about.
    fn size(&self) -> usize {
        let addresses = self.addresses.iter().map(|address| address.len() + 3);
        72 + addresses.sum::<usize>()
    }

    /// With each address once, and without those that find no place in an answer.
    pub(crate) fn new(peer: PeerId, addresses: Vec<Multiaddr>, lease: u64) -> Self {
        let addresses = addresses::plain(&peer, &addresses)
            .filter(|address| address.len() <= MAX_ADDRESS)
            .take(MAX_ADDRESSES);
        Self {
            peer,
            addresses: addresses.collect(),
            lease,
        }
    }

    /// As many of those that `providers` yields as fit into one answer.
    pub(crate) fn that_fit(providers: impl Iterator<Item = Self>) -> Vec<Self> {
        let mut left = MAX_ANSWER;
        let fits = |provider: &Self| {
            let rest = left.checked_sub(provider.size());
            left = rest.unwrap_or(left);
            rest.is_some()
        };
        providers.take(MAX_PROVIDERS).take_while(fits).collect()
    }
}

fn names(texts: &[Text<'_>]) -> Result<Vec<ServiceName>, DecodeError> {
    let name = |Text(text): &Text<'_>| ServiceName::from_wire(text);
    let names = texts.iter().map(name).collect::<Result<_, _>>();
    names.map_err(|error| malformed(error.to_string()))
}

fn texts(names: &[ServiceName]) -> Vec<&str> {
    names.iter().map(AsRef::as_ref).collect()
}

fn shapes(providers: &[Provided]) -> Vec<ProvidedShape> {
    let shape = |provided: &Provided| ProvidedShape {
        peer: ByteBuf::from(provided.peer.to_bytes()),
        addresses: provided
            .addresses
            .iter()
            .map(|address| ByteBuf::from(address.to_vec()))
            .collect(),
        lease: provided.lease,
    };
    providers.iter().map(shape).collect()
}

#[derive(Serialize)]
struct RequestShape<'a> {
    announce: Vec<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    record: Option<&'a serde_bytes::Bytes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    legacy: Option<&'a serde_bytes::Bytes>,
    withdraw: Vec<&'a str>,
    find: Vec<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<u64>,
}

#[derive(Serialize)]
struct ReplyShape<'a> {
    lease: u64,
    refused: &'a [u64],
    found: Vec<Vec<ProvidedShape>>,
    grapes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    elsewhere: Option<u64>,
}

#[derive(Serialize)]
struct ProvidedShape {
    peer: ByteBuf,
    addresses: Vec<ByteBuf>,
    lease: u64,
}

#[derive(Default)]
struct RequestDraft<'de> {
    announce: Option<List<Text<'de>, MAX_NAMES>>,
    record: Option<Bytes<'de>>,
    legacy: Option<Bytes<'de>>,
    withdraw: Option<List<Text<'de>, MAX_NAMES>>,
    find: Option<List<Text<'de>, MAX_SOUGHT>>,
    session: Option<u64>,
}

#[derive(Default)]
struct ReplyDraft<'de> {
    lease: Option<u64>,
    refused: Option<List<u64, MAX_NAMES>>,
    found: Option<List<List<Nested<ProvidedDraft<'de>>, MAX_PROVIDERS>, MAX_SOUGHT>>,
    grapes: Option<u64>,
    elsewhere: Option<u64>,
}

#[derive(Default)]
struct ProvidedDraft<'de> {
    peer: Option<Bytes<'de>>,
    addresses: Option<List<Bytes<'de>, MAX_ADDRESSES>>,
    lease: Option<u64>,
}

impl ProvidedDraft<'_> {
    fn finish(self) -> Result<Provided, DecodeError> {
        let Bytes(peer) = require(self.peer, "peer", Self::WHAT)?;
        let List(addresses) = require(self.addresses, "addresses", Self::WHAT)?;
        check_len("list of addresses", addresses.len(), MAX_ADDRESSES)?;
        let address = |Bytes(bytes): Bytes<'_>| {
            check_len("address", bytes.len(), MAX_ADDRESS)?;
            let address = Multiaddr::try_from(bytes.into_owned());
            address.map_err(|error| malformed(error.to_string()))
        };
        Ok(Provided {
            peer: PeerId::from_bytes(&peer).map_err(|error| malformed(error.to_string()))?,
            addresses: addresses
                .into_iter()
                .map(address)
                .collect::<Result<_, _>>()?,
            lease: require(self.lease, "lease", Self::WHAT)?,
        })
    }
}

impl<'de> Draft<'de> for RequestDraft<'de> {
    const WHAT: &'static str = "a message on names";

    fn take<A: MapAccess<'de>>(&mut self, key: &str, values: &mut A) -> Result<(), A::Error> {
        match key {
            "announce" => set(&mut self.announce, "announce", values),
            "record" => set(&mut self.record, "record", values),
            "legacy" => set(&mut self.legacy, "legacy", values),
            "withdraw" => set(&mut self.withdraw, "withdraw", values),
            "find" => set(&mut self.find, "find", values),
            "session" => set(&mut self.session, "session", values),
            key => Err(unknown_key(key, Self::WHAT)),
        }
    }
}

impl<'de> Draft<'de> for ReplyDraft<'de> {
    const WHAT: &'static str = "an answer on names";

    fn take<A: MapAccess<'de>>(&mut self, key: &str, values: &mut A) -> Result<(), A::Error> {
        match key {
            "lease" => set(&mut self.lease, "lease", values),
            "refused" => set(&mut self.refused, "refused", values),
            "found" => set(&mut self.found, "found", values),
            "grapes" => set(&mut self.grapes, "grapes", values),
            "elsewhere" => set(&mut self.elsewhere, "elsewhere", values),
            key => Err(unknown_key(key, Self::WHAT)),
        }
    }
}

impl<'de> Draft<'de> for ProvidedDraft<'de> {
    const WHAT: &'static str = "a provider";

    fn take<A: MapAccess<'de>>(&mut self, key: &str, values: &mut A) -> Result<(), A::Error> {
        match key {
            "peer" => set(&mut self.peer, "peer", values),
            "addresses" => set(&mut self.addresses, "addresses", values),
            "lease" => set(&mut self.lease, "lease", values),
            key => Err(unknown_key(key, Self::WHAT)),
        }
    }
}
