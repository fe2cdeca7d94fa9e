//! `put` and `get`: what Grenache's JSON means as a value of BEP 44.
//!
//! Content may be any JSON. It is stored as grenache-grape bencodes it: `true` as 1, fractions cut off,
//! `null` left out of arrays and objects. It is given back as JavaScript's `toString` shows it: a string
//! as itself, a number as its digits, an array with commas, an object as `[object Object]`.

use std::fmt::Write;

use axum::http::StatusCode;
use libp2p::PeerId;
use serde::Serialize;
use serde_json::Value as Json;
use serde_json::value::RawValue;
use sha1::{Digest, Sha1};

use super::api::Failure;
use crate::node::{Directory, PutError};
use crate::proto::bencode::Bencode;
use crate::proto::bep44::{MAX_SALT, Mutable, Refusal, Target, Value};

/// A value to store.
pub(super) struct Put {
    value: Value,
    /// The sequence number that the one to be replaced is expected to have.
    cas: Option<i64>,
}

/// What is asked for.
pub(super) struct Get {
    /// `None` is a hash of another length, which nothing has.
    target: Option<Target>,
    salt: Vec<u8>,
}

/// Stores the value, and returns where, in hexadecimal.
pub(super) async fn put(directory: &Directory, put: Put) -> Result<String, Failure> {
    let target = put.value.target();
    if put.value.as_mutable().is_some()
        && let Some(current) = find(directory, target).await
    {
        put.value.supersedes(&current, put.cas)?;
    }
    match directory.put(target, put.value.encode()).await {
        Ok(()) => Ok(hex(&target)),
        Err(PutError::Full | PutError::Closed) => Err(Failure::said("All queries failed")),
    }
}

/// The value in Grenache's form, if there is one. `grape` is who answers.
pub(super) async fn get(directory: &Directory, grape: PeerId, get: Get) -> Option<String> {
    let value = find(directory, get.target?).await?;
    let salt = value.as_mutable().map_or(&[][..], |mutable| &mutable.salt);
    if value.as_mutable().is_some() && salt != get.salt {
        return None;
    }
    let found = Found {
        id: hex(&Sha1::digest(grape.to_bytes())),
        token: None,
        v: to_string(value.content()),
        sig: value.as_mutable().map(|mutable| hex(&mutable.signature)),
        k: value.as_mutable().map(|mutable| hex(&mutable.key)),
        seq: value.as_mutable().map(|mutable| mutable.sequence),
        salt: (!salt.is_empty()).then(|| String::from_utf8_lossy(salt).into_owned()),
    };
    serde_json::to_string(&found).ok()
}

/// The newest value that verifies. Who holds it is not asked to be believed.
async fn find(directory: &Directory, target: Target) -> Option<Value> {
    let held = directory.get(target).await;
    let values = held.iter().filter_map(|bytes| Value::decode(bytes).ok());
    values
        .filter(|value| value.target() == target)
        .max_by_key(|value| value.as_mutable().map(|mutable| mutable.sequence))
}

/// The fields of an answer, in Grenache's order. The token, which BitTorrent's nodes need to write,
/// is always null.
#[derive(Serialize)]
struct Found {
    id: String,
    token: Option<()>,
    v: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    sig: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    k: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seq: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    salt: Option<String>,
}

impl Put {
    pub(super) fn parse(data: Option<&RawValue>) -> Result<Self, Failure> {
        let data = data.ok_or(Failure::INVALID)?;
        let data: Json = serde_json::from_str(data.get()).map_err(|_| Failure::INVALID)?;
        match data {
            Json::Null => Err(Failure::INVALID),
            Json::String(text) => Self::immutable(Bencode::Bytes(text.into())),
            data => Self::from_fields(&data),
        }
    }

    fn immutable(content: Bencode) -> Result<Self, Failure> {
        let value = Value::immutable(content)?;
        Ok(Self { value, cas: None })
    }

    /// The checks and their order are grenache-grape's.
    fn from_fields(data: &Json) -> Result<Self, Failure> {
        let key = buffer(&data["k"], Encoding::Hex)?;
        let signature = match &key {
            Some(_) => buffer(&data["sig"], Encoding::Hex)?,
            None => None,
        };
        let salt = match &key {
            Some(_) => buffer(&data["salt"], Encoding::Utf8)?.unwrap_or_default(),
            None => Vec::new(),
        };
        let content = bencode(&data["v"]).ok_or(Failure::said("opts.v not given"))?;
        let Some(key) = key else {
            return Self::immutable(content);
        };
        let cas = match data.get("cas") {
            None => None,
            Some(cas) => {
                const NOT_A_NUMBER: Failure =
                    Failure::said("opts.cas must be an integer if provided");
                Some(integer(cas).ok_or(NOT_A_NUMBER)?)
            }
        };
        let Ok(key) = <[u8; 32]>::try_from(key) else {
            return Err(Failure::said("opts.k ed25519 public key must be 32 bytes"));
        };
        let signature = signature.ok_or(Failure::said(
            "opts.sign function or options.sig signature is required for mutable put",
        ))?;
        if salt.len() > MAX_SALT {
            return Err(Refusal::SaltTooLong.into());
        }
        let sequence = data
            .get("seq")
            .ok_or(Failure::said("opts.seq not provided for a mutable update"))?;
        let sequence = integer(sequence).ok_or(Failure::said("opts.seq not an integer"))?;
        let mutable = Mutable {
            key,
            signature: <[u8; 64]>::try_from(signature).map_err(|_| Refusal::InvalidSignature)?,
            sequence,
            salt,
        };
        let value = Value::mutable(content, mutable)?;
        Ok(Self { value, cas })
    }
}

impl Get {
    pub(super) fn parse(data: Option<&RawValue>) -> Result<Self, Failure> {
        let data = data.ok_or(Failure::INVALID)?;
        let data: Json = serde_json::from_str(data.get()).map_err(|_| Failure::INVALID)?;
        let (hash, salt) = match &data {
            Json::Null => return Err(Failure::INVALID),
            Json::Object(fields) => (fields.get("hash"), &data["salt"]),
            whole => (Some(whole), &Json::Null),
        };
        let salt = buffer(salt, Encoding::Utf8)?.unwrap_or_default();
        let Some(Json::String(hash)) = hash else {
            return Err(Failure::said("ERR_GRAPE_GENERIC"));
        };
        if hash.is_empty() || !hash.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(Failure::said("ERR_GRAPE_HASH_FORMAT"));
        }
        let target = match hash.len() {
            40 => unhex(hash).try_into().ok(),
            _ => None,
        };
        Ok(Self { target, salt })
    }
}

impl From<Refusal> for Failure {
    /// grenache-grape passes on what the storing grape says of numbers, checks sizes itself, and hears
    /// nothing when a signature is wrong.
    fn from(refusal: Refusal) -> Self {
        let (status, message) = match refusal {
            Refusal::CasMismatch => (StatusCode::MOVED_PERMANENTLY, refusal.to_string().into()),
            Refusal::Stale => (StatusCode::FOUND, refusal.to_string().into()),
            Refusal::TooLarge => (
                StatusCode::OK,
                "v must be less than 1000 bytes in put()".into(),
            ),
            Refusal::SaltTooLong => (StatusCode::OK, "opts.salt is > 64 bytes long".into()),
            Refusal::InvalidSignature => (StatusCode::OK, "All queries failed".into()),
        };
        Self::Said(status, message)
    }
}

/// How a string stands for bytes.
#[derive(Clone, Copy)]
enum Encoding {
    Hex,
    Utf8,
}

/// Bytes as Grenache's clients write them: a string, an array of numbers or a `Buffer` as JSON; the
/// last two also inside a string. `None` is what JavaScript takes for false.
fn buffer(json: &Json, encoding: Encoding) -> Result<Option<Vec<u8>>, Failure> {
    let bytes = match json {
        Json::Null | Json::Bool(false) => return Ok(None),
        Json::Number(number) if number.as_f64() == Some(0.0) => return Ok(None),
        Json::String(text) if text.is_empty() => return Ok(None),
        Json::String(text) => {
            let inner = serde_json::from_str(text).ok();
            inner.as_ref().and_then(octets).or(Some(match encoding {
                Encoding::Hex => unhex(text),
                Encoding::Utf8 => text.as_bytes().to_vec(),
            }))
        }
        other => octets(other),
    };
    bytes.ok_or(Failure::INVALID).map(Some)
}

/// The bytes of an array of numbers, of a `Buffer`, or of a string in a string.
fn octets(json: &Json) -> Option<Vec<u8>> {
    match json {
        Json::Array(items) => {
            let octet = |item: &Json| integer(item).unwrap_or(0) as u8;
            Some(items.iter().map(octet).collect())
        }
        Json::Object(fields) if fields.get("type")? == "Buffer" => fields
            .get("data")
            .filter(|data| data.is_array())
            .and_then(octets),
        Json::String(text) => Some(text.as_bytes().to_vec()),
        _ => None,
    }
}

/// `None` is `null`, which has no encoding.
fn bencode(json: &Json) -> Option<Bencode> {
    Some(match json {
        Json::Null => return None,
        Json::Bool(bool) => Bencode::Integer((*bool).into()),
        Json::Number(_) => Bencode::Integer(integer(json)?),
        Json::String(text) => Bencode::Bytes(text.as_bytes().to_vec()),
        Json::Array(items) => Bencode::List(items.iter().filter_map(bencode).collect()),
        Json::Object(fields) => {
            let entry =
                |(key, value): (&String, _)| Some((key.as_bytes().to_vec(), bencode(value)?));
            Bencode::Dictionary(fields.iter().filter_map(entry).collect())
        }
    })
}

/// A number without its fraction.
fn integer(json: &Json) -> Option<i64> {
    json.as_i64()
        .or_else(|| json.as_f64().map(|number| number as i64))
}

fn to_string(content: &Bencode) -> String {
    match content {
        Bencode::Integer(number) => number.to_string(),
        Bencode::Bytes(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        Bencode::List(items) => items.iter().map(to_string).collect::<Vec<_>>().join(","),
        Bencode::Dictionary(_) => "[object Object]".into(),
    }
}

fn hex(bytes: &[u8]) -> String {
    let mut digits = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing to memory does not fail.
        let _ = write!(digits, "{byte:02x}");
    }
    digits
}

/// The bytes up to the first that is not written in hexadecimal.
fn unhex(digits: &str) -> Vec<u8> {
    let pairs = digits.as_bytes().chunks_exact(2);
    let byte = |pair: &[u8]| {
        let pair = str::from_utf8(pair)
            .ok()
            .filter(|pair| !pair.starts_with('+'))?;
        u8::from_str_radix(pair, 16).ok()
    };
    pairs.map_while(byte).collect()
}
