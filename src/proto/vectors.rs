//! The test vectors that drivers of other libraries read too (`tests/vectors.json`): what was encoded
//! and signed by others is read as what it is, and what is written here is the same bytes.

use libp2p::PeerId;
use libp2p::identity::{Keypair, PublicKey, ed25519};
use serde_json::Value as Json;

use super::bep44::Value;
use super::frame::read_frame;
use super::rendezvous::{Form, SignedPeer};
use super::wire::{
    ChatMessage, ChatReply, DecodeError, MAX_ADDRESS, MAX_CHANGES, MAX_CODE, MAX_FIND, MAX_FOUND,
    MAX_FRAME, MAX_FROM, MAX_MESSAGE, MAX_NAMES, MAX_PAYLOAD, MAX_PROVIDERS, MAX_RECORD,
    MAX_SERVICE, MAX_SOUGHT, MAX_TEXT, NamesReply, NamesRequest, Provided, RemoteError, Reply,
    Request,
};
use crate::limits::MAX_ADDRESSES;
use crate::name::ServiceName;

fn vectors(section: &str) -> Json {
    let file = include_str!("../../tests/vectors.json");
    let mut all: Json = serde_json::from_str(file).expect("JSON");
    all[section].take()
}

fn list(json: &Json) -> &[Json] {
    let list = json.as_array().expect("a list");
    assert!(!list.is_empty());
    list
}

fn text(json: &Json) -> &str {
    json.as_str().expect("a text")
}

fn texts(json: &Json) -> Vec<&str> {
    json.as_array().expect("a list").iter().map(text).collect()
}

fn names(json: &Json) -> Vec<ServiceName> {
    let names = texts(json).into_iter().map(str::parse);
    names.collect::<Result<_, _>>().expect("names")
}

fn bytes(json: &Json) -> Vec<u8> {
    let digits = text(json);
    let pair = |at| u8::from_str_radix(&digits[at..at + 2], 16).expect("hexadecimal");
    (0..digits.len()).step_by(2).map(pair).collect()
}

fn number(json: &Json) -> u64 {
    json.as_u64().expect("a number")
}

/// The content of a frame that stands alone.
fn unframed(frame: &Json) -> Vec<u8> {
    let frame = bytes(frame);
    let mut rest = frame.as_slice();
    let content = futures::executor::block_on(read_frame(&mut rest, MAX_FRAME));
    assert!(rest.is_empty());
    content.expect("a frame").expect("a frame")
}

fn request(json: &Json) -> Request {
    Request {
        id: text(&json["id"]).parse().expect("an id"),
        service: text(&json["service"]).into(),
        payload: bytes(&json["payload"]),
    }
}

fn reply(json: &Json) -> Reply {
    let error = &json["error"];
    Reply {
        id: text(&json["id"]).parse().expect("an id"),
        outcome: match error {
            Json::Null => Ok(bytes(&json["ok"])),
            error => Err(RemoteError::new(
                text(&error["code"]).parse().expect("a code"),
                text(&error["message"]),
            )),
        },
    }
}

#[test]
fn limits_are_those_of_the_vectors() {
    let limits = vectors("limits");
    let known = [
        ("payload", MAX_PAYLOAD),
        ("frame", MAX_FRAME),
        ("service", MAX_SERVICE),
        ("code", MAX_CODE),
        ("message", MAX_MESSAGE),
        ("chat_from", MAX_FROM),
        ("chat_text", MAX_TEXT),
        ("names", MAX_NAMES),
        ("sought", MAX_SOUGHT),
        ("record", MAX_RECORD),
        ("providers", MAX_PROVIDERS),
        ("addresses", MAX_ADDRESSES),
        ("address", MAX_ADDRESS),
        ("changes", MAX_CHANGES),
        ("registry_keys", MAX_FIND),
        ("workers", MAX_FOUND),
    ];
    assert_eq!(
        limits.as_object().map(|limits| limits.len()),
        Some(known.len())
    );
    for (name, limit) in known {
        assert_eq!(number(&limits[name]), limit as u64, "{name}");
    }
    assert_eq!(SignedPeer::MAX_LEN, MAX_RECORD);
}

#[test]
fn names_have_these_keys() {
    for vector in list(&vectors("keys")) {
        let name: ServiceName = text(&vector["name"]).parse().expect("a name");
        assert_eq!(name.key().to_vec(), bytes(&vector["key"]), "{name}");
    }
    for no_name in list(&vectors("no_names")) {
        assert!(ServiceName::from_wire(text(no_name)).is_err(), "{no_name}");
    }
}

#[test]
fn frames_have_these_bytes() {
    for vector in list(&vectors("frames")) {
        let (content, what) = (unframed(&vector["frame"]), text(&vector["what"]));
        let encoded = match &vector["request"] {
            Json::Null => {
                let reply = reply(&vector["reply"]);
                assert_eq!(Reply::decode(&content).as_ref(), Ok(&reply), "{what}");
                reply.as_ref().encode()
            }
            asked => {
                let request = request(asked);
                assert_eq!(Request::decode(&content).as_ref(), Ok(&request), "{what}");
                request.as_ref().encode()
            }
        };
        assert_eq!(encoded, Ok(content), "{what}");
    }
    for vector in list(&vectors("longer")) {
        let read = Request::decode(&bytes(&vector["content"]));
        assert_eq!(read, Ok(request(&vector["request"])), "{}", vector["what"]);
    }
    for vector in list(&vectors("refused")) {
        let read = Request::decode(&bytes(&vector["content"]));
        let refused = matches!(
            read,
            Err(DecodeError::Malformed(_) | DecodeError::TrailingBytes)
        );
        assert!(refused, "{}: {read:?}", vector["what"]);
    }
}

#[test]
fn the_serves_question_has_these_bytes() {
    for vector in list(&vectors("serves")) {
        let question = Request::decode(&unframed(&vector["question"])).expect("a request");
        assert_eq!(question.service, super::wire::SERVES);
        assert_eq!(question.payload, text(&vector["name"]).as_bytes());
        for (answer, payload) in [("yes", 1), ("no", 0)] {
            let reply = Reply::decode(&unframed(&vector[answer])).expect("a reply");
            assert_eq!((reply.id, reply.outcome), (question.id, Ok(vec![payload])));
        }
    }
}

#[test]
fn chat_has_these_bytes() {
    for vector in list(&vectors("chat")) {
        let payload = bytes(&vector["payload"]);
        let id = |json: &Json| bytes(&json["id"]).try_into().expect("16 bytes");
        let encoded = match &vector["message"] {
            Json::Null => {
                let receipt = ChatReply {
                    id: id(&vector["receipt"]),
                    reply: vector["receipt"]["reply"].as_str().map(Into::into),
                };
                assert_eq!(ChatReply::decode(&payload).as_ref(), Ok(&receipt));
                receipt.encode()
            }
            json => {
                let message = ChatMessage {
                    id: id(json),
                    from: text(&json["from"]).into(),
                    text: text(&json["text"]).into(),
                    sent_at: number(&json["sent_at"]),
                };
                assert_eq!(ChatMessage::decode(&payload).as_ref(), Ok(&message));
                message.encode()
            }
        };
        assert_eq!(encoded, Ok(payload));
    }
}

#[test]
fn records_that_others_sign_are_read_and_signed_alike() {
    for vector in list(&vectors("records")) {
        let form = match text(&vector["form"]) {
            "standard" => Form::Standard,
            _ => Form::Legacy,
        };
        let envelope = bytes(&vector["envelope"]);
        let record = SignedPeer::from_envelope(envelope.clone()).expect("a record");
        assert_eq!(record.form(), form);
        assert_eq!(record.peer().to_string(), text(&vector["peer"]));
        assert_eq!(record.peer().to_bytes(), bytes(&vector["peer_bytes"]));
        let addresses = record.addresses().iter();
        let addresses: Vec<_> = addresses.map(ToString::to_string).collect();
        assert_eq!(addresses, texts(&vector["addresses"]));

        let seed = ed25519::SecretKey::try_from_bytes(bytes(&vector["seed"])).expect("a seed");
        let keypair = Keypair::from(ed25519::Keypair::from(seed));
        let public = PublicKey::try_decode_protobuf(&bytes(&vector["public_key"]));
        assert_eq!(public.expect("a key"), keypair.public());
        let signature = keypair.sign(&bytes(&vector["signed"])).expect("signs");
        assert_eq!(signature, bytes(&vector["signature"]));
        // But for the time, which a record of now has as its number.
        let own = SignedPeer::sign(&keypair, record.addresses(), form).expect("signs");
        let same = [own.envelope().len(), own.addresses().len()];
        assert_eq!(same, [envelope.len(), addresses.len()]);
        assert_eq!(own.envelope()[..60], envelope[..60]);
    }
}

#[test]
fn messages_on_names_have_these_bytes() {
    for vector in list(&vectors("names")) {
        let payload = bytes(&vector["payload"]);
        let encoded = match &vector["request"] {
            Json::Null => {
                let reply = names_reply(&vector["reply"]);
                assert_eq!(NamesReply::decode(&payload).as_ref(), Ok(&reply));
                reply.encode()
            }
            json => {
                let record = |name: &str| json.get(name).map(bytes);
                let request = NamesRequest {
                    announce: names(&json["announce"]),
                    record: record("record"),
                    legacy: record("legacy"),
                    withdraw: names(&json["withdraw"]),
                    find: names(&json["find"]),
                    session: json["session"].as_u64(),
                };
                assert_eq!(NamesRequest::decode(&payload).as_ref(), Ok(&request));
                request.encode()
            }
        };
        assert_eq!(encoded, Ok(payload));
    }
}

fn names_reply(json: &Json) -> NamesReply {
    let provided = |json: &Json| Provided {
        peer: text(&json["peer"]).parse::<PeerId>().expect("an id"),
        addresses: texts(&json["addresses"])
            .into_iter()
            .map(|address| address.parse().expect("an address"))
            .collect(),
        lease: number(&json["lease"]),
    };
    let of_name = |json: &Json| {
        let providers = json.as_array().expect("a list").iter();
        providers.map(provided).collect()
    };
    let refused = json["refused"].as_array().expect("a list").iter();
    NamesReply {
        lease: number(&json["lease"]),
        refused: refused.map(number).collect(),
        found: list(&json["found"]).iter().map(of_name).collect(),
        grapes: number(&json["grapes"]),
        elsewhere: json["elsewhere"].as_u64().unwrap_or_default(),
    }
}

#[test]
fn values_have_these_bytes() {
    for vector in list(&vectors("values")) {
        let record = bytes(&vector["record"]);
        let value = Value::decode(&record).expect("a value");
        assert_eq!(value.target().to_vec(), bytes(&vector["target"]));
        assert_eq!(value.as_mutable().is_some(), vector["what"] == "mutable");
        assert_eq!(value.encode(), record);
    }
}
