//! The wire as its page describes it (rustdoc of `proto`).

use std::io;

use prost::Message;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

pub const RPC: &str = "/grapevine/rpc/1.0.0";
pub const KADEMLIA: &str = "/grapevine/kad/1.0.0";
pub const RENDEZVOUS: &str = "/rendezvous/1.0.0";
pub const MAX_FRAME: usize = 1_049_600;

/// Domain and payload type of each form of signed records.
pub const STANDARD: (&[u8], &[u8]) = (b"libp2p-peer-record", b"\x03\x01");
pub const LEGACY: (&[u8], &[u8]) = (b"libp2p-routing-state", b"/libp2p/routing-state-record");

/// The sha2-256 multihash of a name.
pub fn key(name: &str) -> Vec<u8> {
    [&[0x12, 0x20][..], &Sha256::digest(name)].concat()
}

pub fn varint(mut value: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

pub fn frame(content: &[u8]) -> Vec<u8> {
    [&varint(content.len()), content].concat()
}

/// The content of the next frame; `None` at the end.
pub async fn read_frame(io: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let (mut length, mut shift) = (0, 0);
    loop {
        let byte = match io.read_u8().await {
            Ok(byte) => byte,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        };
        length |= usize::from(byte & 0x7f) << shift;
        shift += 7;
        if byte < 0x80 {
            break;
        }
    }
    if length > MAX_FRAME {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut content = vec![0; length];
    io.read_exact(&mut content).await?;
    Ok(Some(content))
}

pub async fn write_frame(io: &mut (impl AsyncWrite + Unpin), content: &[u8]) -> io::Result<()> {
    io.write_all(&frame(content)).await?;
    io.flush().await
}

#[derive(Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Request {
    pub id: u64,
    pub service: String,
    pub payload: ByteBuf,
}

#[derive(Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Reply {
    pub id: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ok: Option<ByteBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Refusal>,
}

#[derive(Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Refusal {
    pub code: String,
    pub message: String,
}

#[derive(Debug, Serialize, Deserialize, PartialEq)]
pub struct ChatMessage {
    pub id: ByteBuf,
    pub from: String,
    pub text: String,
    pub sent_at: u64,
}

#[derive(Debug, Serialize, Deserialize, PartialEq)]
pub struct ChatReply {
    pub id: ByteBuf,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply: Option<String>,
}

#[derive(Debug, Default, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct NamesRequest {
    pub announce: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record: Option<ByteBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub legacy: Option<ByteBuf>,
    pub withdraw: Vec<String>,
    pub find: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct NamesReply {
    pub lease: u64,
    pub refused: Vec<u64>,
    pub found: Vec<Vec<Provider>>,
    pub grapes: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub elsewhere: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Provider {
    pub peer: ByteBuf,
    pub addresses: Vec<ByteBuf>,
    pub lease: u64,
}

#[derive(Clone, PartialEq, Message)]
pub struct PeerRecord {
    #[prost(bytes = "vec", tag = "1")]
    pub peer: Vec<u8>,
    #[prost(uint64, tag = "2")]
    pub sequence: u64,
    #[prost(message, repeated, tag = "3")]
    pub addresses: Vec<Address>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Address {
    #[prost(bytes = "vec", tag = "1")]
    pub multiaddr: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Envelope {
    #[prost(bytes = "vec", tag = "1")]
    pub public_key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub payload_type: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    pub payload: Vec<u8>,
    #[prost(bytes = "vec", tag = "5")]
    pub signature: Vec<u8>,
}

/// What is signed of a payload.
pub fn signed_part((domain, kind): (&[u8], &[u8]), payload: &[u8]) -> Vec<u8> {
    [frame(domain), frame(kind), frame(payload)].concat()
}

#[derive(Clone, PartialEq, Message)]
pub struct Rendezvous {
    #[prost(int32, optional, tag = "1")]
    pub kind: Option<i32>,
    #[prost(message, optional, tag = "2")]
    pub register: Option<Register>,
    #[prost(message, optional, tag = "3")]
    pub registered: Option<Registered>,
    #[prost(message, optional, tag = "4")]
    pub unregister: Option<Namespace>,
    #[prost(message, optional, tag = "5")]
    pub discover: Option<Namespace>,
    #[prost(message, optional, tag = "6")]
    pub discovered: Option<Discovered>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Register {
    #[prost(string, tag = "1")]
    pub namespace: String,
    #[prost(bytes = "vec", tag = "2")]
    pub record: Vec<u8>,
    #[prost(uint64, optional, tag = "3")]
    pub ttl: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Registered {
    #[prost(int32, tag = "1")]
    pub status: i32,
}

#[derive(Clone, PartialEq, Message)]
pub struct Namespace {
    #[prost(string, tag = "1")]
    pub namespace: String,
    #[prost(uint64, optional, tag = "2")]
    pub limit: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Discovered {
    #[prost(message, repeated, tag = "1")]
    pub registrations: Vec<Register>,
    #[prost(int32, tag = "3")]
    pub status: i32,
}
