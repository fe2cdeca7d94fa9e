//! The encodings of this driver, and litep2p's keys and addresses, against the test vectors.

use litep2p::PeerId;
use litep2p::crypto::ed25519::{Keypair, SecretKey};
use litep2p::types::multiaddr::Multiaddr;
use prost::Message;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value as Json;

use crate::peer::{Failure, certify, seal};
use crate::wire::{self, ChatMessage, ChatReply, NamesReply, NamesRequest, Reply, Request};

/// Counts what was found to be as it should.
#[derive(Default)]
struct Checked(usize);

impl Checked {
    fn same<T: PartialEq + std::fmt::Debug>(
        &mut self,
        what: &str,
        found: T,
        expected: T,
    ) -> Result<(), Failure> {
        self.0 += 1;
        match found == expected {
            true => Ok(()),
            false => Err(Failure::new(
                1,
                format!("{what}: {found:?} instead of {expected:?}"),
            )),
        }
    }

    /// Reads a map, and writes the same bytes again.
    fn comes_back<T: Serialize + DeserializeOwned>(
        &mut self,
        what: &str,
        content: &[u8],
    ) -> Result<T, Failure> {
        let value = serde_cbor::from_slice(content)?;
        self.same(what, serde_cbor::to_vec(&value)?, content.to_vec())?;
        Ok(value)
    }
}

fn text(json: &Json) -> &str {
    json.as_str().unwrap_or_default()
}

fn list(json: &Json) -> &[Json] {
    json.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn bytes(json: &Json) -> Vec<u8> {
    let digits = text(json);
    let pair = |at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap_or_default();
    (0..digits.len()).step_by(2).map(pair).collect()
}

/// The content of a frame that stands alone.
fn unframed(frame: &Json) -> Vec<u8> {
    let frame = bytes(frame);
    let prefix = frame.iter().take_while(|byte| **byte >= 0x80).count() + 1;
    frame[prefix..].to_vec()
}

pub fn check(file: &str) -> Result<usize, Failure> {
    let vectors: Json = serde_json::from_str(&std::fs::read_to_string(file)?)?;
    let mut checked = Checked::default();
    let limit = vectors["limits"]["frame"].as_u64();
    checked.same("limit", limit, Some(wire::MAX_FRAME as u64))?;
    for vector in list(&vectors["keys"]) {
        checked.same(
            "key",
            wire::key(text(&vector["name"])),
            bytes(&vector["key"]),
        )?;
    }
    for vector in list(&vectors["frames"]) {
        let (what, content) = (text(&vector["what"]), unframed(&vector["frame"]));
        checked.same(what, wire::frame(&content), bytes(&vector["frame"]))?;
        if vector["request"].is_null() {
            let reply: Reply = checked.comes_back(what, &content)?;
            checked.same(
                what,
                reply.id.to_string().as_str(),
                text(&vector["reply"]["id"]),
            )?;
        } else {
            let request: Request = checked.comes_back(what, &content)?;
            checked.same(
                what,
                request.id.to_string().as_str(),
                text(&vector["request"]["id"]),
            )?;
            checked.same(
                what,
                request.payload.to_vec(),
                bytes(&vector["request"]["payload"]),
            )?;
        }
    }
    for vector in list(&vectors["serves"]) {
        let question: Request = checked.comes_back("question", &unframed(&vector["question"]))?;
        checked.same(
            "question",
            question.payload.as_slice(),
            text(&vector["name"]).as_bytes(),
        )?;
        for answer in ["yes", "no"] {
            let _: Reply = checked.comes_back(answer, &unframed(&vector[answer]))?;
        }
    }
    for vector in list(&vectors["chat"]) {
        let payload = bytes(&vector["payload"]);
        if vector["message"].is_null() {
            let _: ChatReply = checked.comes_back("receipt", &payload)?;
        } else {
            let message: ChatMessage = checked.comes_back("message", &payload)?;
            checked.same(
                "message",
                message.text.as_str(),
                text(&vector["message"]["text"]),
            )?;
        }
    }
    for vector in list(&vectors["names"]) {
        let payload = bytes(&vector["payload"]);
        if vector["request"].is_null() {
            let _: NamesReply = checked.comes_back("an answer on names", &payload)?;
        } else {
            let _: NamesRequest = checked.comes_back("a message on names", &payload)?;
        }
    }
    for vector in list(&vectors["records"]) {
        check_record(&mut checked, vector)?;
    }
    for name in ["register", "unregister", "discover"] {
        let message = bytes(&vectors["rendezvous"][name]);
        let read = wire::Rendezvous::decode(message.as_slice())?;
        checked.same(name, read.encode_to_vec(), message)?;
    }
    Ok(checked.0)
}

fn check_record(checked: &mut Checked, vector: &Json) -> Result<(), Failure> {
    let form = match text(&vector["form"]) {
        "standard" => wire::STANDARD,
        _ => wire::LEGACY,
    };
    let keypair = Keypair::from(SecretKey::try_from_bytes(bytes(&vector["seed"]))?);
    let peer: PeerId = keypair.public().to_peer_id();
    checked.same("peer", peer.to_string().as_str(), text(&vector["peer"]))?;
    let addresses: Vec<&str> = list(&vector["addresses"]).iter().map(text).collect();
    let record = wire::PeerRecord {
        peer: peer.to_bytes(),
        sequence: vector["sequence"].as_u64().unwrap_or_default(),
        addresses: addresses
            .iter()
            .map(|address| {
                let address: Multiaddr = address.parse()?;
                Ok(wire::Address {
                    multiaddr: address.to_vec(),
                })
            })
            .collect::<Result<_, Failure>>()?,
    };
    let envelope = seal(&keypair, form, record.encode_to_vec());
    checked.same("envelope", &envelope, &bytes(&vector["envelope"]))?;
    let (signer, told) = certify(&envelope)?;
    checked.same("signer", signer.as_str(), text(&vector["peer"]))?;
    checked.same(
        "addresses",
        told,
        addresses.into_iter().map(Into::into).collect(),
    )
}
