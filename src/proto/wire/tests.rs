//! Golden vectors (made with another CBOR library), round trips, mutations and hostile bytes.

use proptest::{collection::vec, option, prelude::*, sample::Index};

use super::*;
use crate::name::ServiceName;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes of a hexadecimal dump with blanks.
fn bytes(dump: &str) -> Vec<u8> {
    let digits: Vec<u8> = dump.bytes().filter(|byte| *byte != b' ').collect();
    let pairs = digits
        .chunks(2)
        .map(|pair| str::from_utf8(pair).expect("ASCII"));
    pairs
        .map(|pair| u8::from_str_radix(pair, 16).expect("hexadecimal"))
        .collect()
}

fn request(id: u64, service: &str, payload: &[u8]) -> Request {
    Request {
        id,
        service: service.into(),
        payload: payload.into(),
    }
}

fn failure(code: &str, message: &str) -> RemoteError {
    RemoteError::new(code.parse().expect("a code"), message)
}

fn message() -> ChatMessage {
    ChatMessage {
        id: std::array::from_fn(|i| i as u8),
        from: "ann".into(),
        text: "hé".into(),
        sent_at: 1_700_000_000_000,
    }
}

#[test]
fn requests_have_these_bytes() {
    for (request, golden) in [
        (
            request(1, "client1", b"hello"),
            "a3 626964 01 6773657276696365 67636c69656e7431 677061796c6f6164 4568656c6c6f",
        ),
        (
            request(u64::MAX, "grapevine/serves", b""),
            "a3 626964 1bffffffffffffffff 6773657276696365 70677261706576696e652f736572766573 \
             677061796c6f6164 40",
        ),
    ] {
        let encoded = request.as_ref().encode().expect("encodes");
        assert_eq!(hex(&encoded), hex(&bytes(golden)));
        assert_eq!(Request::decode(&encoded), Ok(request));
    }
}

#[test]
fn replies_have_these_bytes() {
    let echo = Reply {
        id: 1,
        outcome: Ok(b"Echo: hello".into()),
    };
    let encoded = echo.as_ref().encode().expect("encodes");
    assert_eq!(hex(&encoded), "a262696401626f6b4b4563686f3a2068656c6c6f");
    assert_eq!(Reply::decode(&encoded), Ok(echo));

    for (code, golden) in [
        ("unknown-service", "6f756e6b6e6f776e2d73657276696365"),
        ("busy", "6462757379"),
        ("too-large", "69746f6f2d6c61726765"),
        ("bad-request", "6b6261642d72657175657374"),
        ("handler-failed", "6e68616e646c65722d6661696c6564"),
        ("shutting-down", "6d7368757474696e672d646f776e"),
        ("teapot", "66746561706f74"),
    ] {
        let reply = Reply {
            id: 300,
            outcome: Err(failure(code, "no")),
        };
        let encoded = reply.as_ref().encode().expect("encodes");
        let golden =
            format!("a2 626964 19012c 656572726f72 a2 64636f6465 {golden} 676d657373616765 626e6f");
        assert_eq!(hex(&encoded), hex(&bytes(&golden)));
        assert_eq!(Reply::decode(&encoded), Ok(reply));
    }
}

#[test]
fn chat_payloads_have_these_bytes() {
    let golden = "a4 626964 50000102030405060708090a0b0c0d0e0f 6466726f6d 63616e6e 6474657874 6368c3a9 \
                  6773656e745f6174 1b0000018bcfe56800";
    let encoded = message().encode().expect("encodes");
    assert_eq!(hex(&encoded), hex(&bytes(golden)));
    assert_eq!(ChatMessage::decode(&encoded), Ok(message()));

    for (reply, golden) in [
        (None, "a1 626964 50000102030405060708090a0b0c0d0e0f"),
        (
            Some("hi".to_owned()),
            "a2 626964 50000102030405060708090a0b0c0d0e0f 657265706c79 626869",
        ),
    ] {
        let reply = ChatReply {
            id: message().id,
            reply,
        };
        let encoded = reply.encode().expect("encodes");
        assert_eq!(hex(&encoded), hex(&bytes(golden)));
        assert_eq!(ChatReply::decode(&encoded), Ok(reply));
    }
}

#[test]
fn known_codes_are_never_other_codes() {
    for code in [
        "unknown-service",
        "busy",
        "too-large",
        "bad-request",
        "handler-failed",
        "shutting-down",
    ] {
        let parsed: ErrorCode = code.parse().expect("a code");
        assert!(!matches!(parsed, ErrorCode::Other(_)));
        assert_eq!(parsed.as_str(), code);
    }
    assert!(matches!("Busy".parse(), Ok(ErrorCode::Other(_))));
    assert!("x".repeat(64).parse::<ErrorCode>().is_ok());
    assert!("x".repeat(65).parse::<ErrorCode>().is_err());
}

#[test]
fn other_encoders_may_write_longer_forms() {
    let hello = Ok(request(1, "client1", b"hello"));
    for longer in [
        // Indefinite map, integer of 8 bytes, text and bytes in pieces.
        "bf 626964 1b0000000000000001 7f 63736572 6476696365 ff 67636c69656e7431 677061796c6f6164 \
         5f 426865 436c6c6f ff ff",
        // Keys in another order.
        "a3 677061796c6f6164 4568656c6c6f 6773657276696365 67636c69656e7431 626964 01",
        // Tagged as CBOR.
        "d9d9f7 a3 626964 01 6773657276696365 67636c69656e7431 677061796c6f6164 4568656c6c6f",
    ] {
        assert_eq!(Request::decode(&bytes(longer)), hello, "{longer}");
    }
}

#[test]
fn hostile_requests_are_refused() {
    for (what, dump) in [
        ("nothing", ""),
        ("not a map", "01"),
        (
            "an array in place of the map",
            "83 01 67636c69656e7431 4568656c6c6f",
        ),
        ("an empty map", "a0"),
        (
            "integers for keys",
            "a3 00 01 01 67636c69656e7431 02 4568656c6c6f",
        ),
        (
            "bytes for a key",
            "a3 426964 01 6773657276696365 6178 677061796c6f6164 40",
        ),
        ("no payload", "a2 626964 01 6773657276696365 6178"),
        (
            "an unknown key",
            "a4 626964 01 6773657276696365 6178 677061796c6f6164 40 6178 01",
        ),
        (
            "id twice",
            "a4 626964 01 626964 01 6773657276696365 6178 677061796c6f6164 40",
        ),
        (
            "a negative id",
            "a3 626964 20 6773657276696365 6178 677061796c6f6164 40",
        ),
        (
            "a floating-point id",
            "a3 626964 f93c00 6773657276696365 6178 677061796c6f6164 40",
        ),
        (
            "a big-number id",
            "a3 626964 c24101 6773657276696365 6178 677061796c6f6164 40",
        ),
        (
            "a text id",
            "a3 626964 6131 6773657276696365 6178 677061796c6f6164 40",
        ),
        (
            "bytes for the service",
            "a3 626964 01 6773657276696365 4178 677061796c6f6164 40",
        ),
        (
            "text for the payload",
            "a3 626964 01 6773657276696365 6178 677061796c6f6164 6178",
        ),
        (
            "an array for the payload",
            "a3 626964 01 6773657276696365 6178 677061796c6f6164 820102",
        ),
        (
            "null for the payload",
            "a3 626964 01 6773657276696365 6178 677061796c6f6164 f6",
        ),
        (
            "broken UTF-8",
            "a3 626964 01 6773657276696365 61ff 677061796c6f6164 40",
        ),
        (
            "a payload that ends early",
            "a3 626964 01 6773657276696365 6178 677061796c6f6164 4568",
        ),
        (
            "a payload said to be huge",
            "a3 626964 01 6773657276696365 6178 677061796c6f6164 5bffffffffffffffff",
        ),
        ("a map said to be huge", "bbffffffffffffffff 626964 01"),
        ("an array said to be huge", "a1 626964 9bffffffffffffffff"),
        (
            "a map that does not end",
            "bf 626964 01 6773657276696365 6178 677061796c6f6164 40",
        ),
        (
            "an odd map",
            "a3 626964 01 6773657276696365 6178 677061796c6f6164",
        ),
        ("reserved codes", "a1 626964 1c"),
        ("a lone break", "ff"),
    ] {
        let refused = Request::decode(&bytes(dump));
        assert!(
            matches!(refused, Err(DecodeError::Malformed(_))),
            "{what}: {refused:?}"
        );
    }
}

#[test]
fn hostile_replies_are_refused() {
    for (what, dump) in [
        ("neither ok nor error", "a1 626964 01"),
        (
            "both",
            "a3 626964 01 626f6b 40 656572726f72 a2 64636f6465 6462757379 676d657373616765 60",
        ),
        ("no id", "a1 626f6b 40"),
        ("ok twice", "a3 626964 01 626f6b 40 626f6b 40"),
        ("null for ok", "a2 626964 01 626f6b f6"),
        (
            "an array for the error",
            "a2 626964 01 656572726f72 82 6462757379 60",
        ),
        (
            "an error without a message",
            "a2 626964 01 656572726f72 a1 64636f6465 6462757379",
        ),
        (
            "an error with more",
            "a2 626964 01 656572726f72 a3 64636f6465 6462757379 676d657373616765 60 6178 01",
        ),
        (
            "a code twice",
            "a2 626964 01 656572726f72 a3 64636f6465 6462757379 64636f6465 6462757379 676d657373616765 60",
        ),
        (
            "an integer code",
            "a2 626964 01 656572726f72 a2 64636f6465 01 676d657373616765 60",
        ),
    ] {
        let refused = Reply::decode(&bytes(dump));
        assert!(
            matches!(refused, Err(DecodeError::Malformed(_))),
            "{what}: {refused:?}"
        );
    }
}

#[test]
fn hostile_chat_payloads_are_refused() {
    let tail = "6466726f6d 6161 6474657874 6161 6773656e745f6174 01";
    for (what, head) in [
        (
            "an id of 15 bytes",
            "a4 626964 4f000102030405060708090a0b0c0d0e",
        ),
        (
            "an id of text",
            "a4 626964 7030303030303030303030303030303030",
        ),
        (
            "text twice",
            "a5 6474657874 6161 626964 50000102030405060708090a0b0c0d0e0f",
        ),
        ("no id", "a3"),
        (
            "an unknown key with nothing",
            "a5 6178 ff 626964 50000102030405060708090a0b0c0d0e0f",
        ),
    ] {
        let refused = ChatMessage::decode(&bytes(&format!("{head}{tail}")));
        assert!(
            matches!(refused, Err(DecodeError::Malformed(_))),
            "{what}: {refused:?}"
        );
    }
}

#[test]
fn unknown_keys_of_chat_are_skipped() {
    let dump = "a6 6178 a1 01 82 f6 fb3ff0000000000000 626964 50000102030405060708090a0b0c0d0e0f \
                6466726f6d 63616e6e 6474657874 6368c3a9 6773656e745f6174 1b0000018bcfe56800 6179 c0 6178";
    assert_eq!(ChatMessage::decode(&bytes(dump)), Ok(message()));
}

#[test]
fn an_absent_answer_may_be_null_or_undefined() {
    for absent in ["f6", "f7"] {
        let dump = format!("a2 626964 50000102030405060708090a0b0c0d0e0f 657265706c79 {absent}");
        let reply = ChatReply {
            id: message().id,
            reply: None,
        };
        assert_eq!(ChatReply::decode(&bytes(&dump)), Ok(reply));
    }
}

#[test]
fn bytes_after_the_message_are_refused() {
    let mut frame = request(1, "x", b"").as_ref().encode().expect("encodes");
    frame.push(0xf6);
    assert_eq!(Request::decode(&frame), Err(DecodeError::TrailingBytes));
    let mut payload = message().encode().expect("encodes");
    payload.extend_from_within(..);
    assert_eq!(
        ChatMessage::decode(&payload),
        Err(DecodeError::TrailingBytes)
    );
}

#[test]
fn nesting_ends_with_an_error_and_not_with_the_stack() {
    // Arrays, indefinite arrays, maps, indefinite maps, tags: each holding the next.
    for bomb in [
        &b"\x81"[..],
        b"\x9f",
        b"\xa1\x60",
        b"\xbf\x60",
        b"\xc0",
        b"\xd9\xd9\xf7",
    ] {
        let bomb = bomb.repeat(100_000);
        for head in [
            "",
            "a3 626964",
            "a3 6178",
            "a3 626964 01 626f6b",
            "a2 626964 01 656572726f72",
            "a4 626964",
        ] {
            let frame = [bytes(head), bomb.clone()].concat();
            assert!(matches!(
                Request::decode(&frame),
                Err(DecodeError::Malformed(_))
            ));
            assert!(matches!(
                Reply::decode(&frame),
                Err(DecodeError::Malformed(_))
            ));
            assert!(matches!(
                ChatMessage::decode(&frame),
                Err(DecodeError::Malformed(_))
            ));
            assert!(matches!(
                ChatReply::decode(&frame),
                Err(DecodeError::Malformed(_))
            ));
            let _ = salvage_id(&frame);
        }
    }
}

#[test]
fn every_part_has_its_limit_on_both_sides() {
    let largest = vec![7; MAX_PAYLOAD];
    let service = "s".repeat(MAX_SERVICE);
    let fits = request(u64::MAX, &service, &largest);
    let frame = fits.as_ref().encode().expect("encodes");
    assert!(frame.len() <= MAX_FRAME);
    assert_eq!(Request::decode(&frame), Ok(fits));

    let too_large = |what, max| EncodeError::TooLarge {
        what,
        len: max + 1,
        max,
    };
    let payload = [&largest[..], b"x"].concat();
    let sent = request(1, "x", &payload).as_ref().encode();
    assert_eq!(sent, Err(too_large("payload", MAX_PAYLOAD)));
    let sent = ReplyRef {
        id: 1,
        outcome: Ok(&payload),
    }
    .encode();
    assert_eq!(sent, Err(too_large("payload", MAX_PAYLOAD)));
    let sent = request(1, &format!("{service}s"), b"").as_ref().encode();
    assert_eq!(sent, Err(too_large("service", MAX_SERVICE)));
    let from = ChatMessage {
        from: "f".repeat(MAX_FROM + 1),
        ..message()
    };
    assert_eq!(from.encode(), Err(too_large("sender's name", MAX_FROM)));
    let text = ChatMessage {
        text: "t".repeat(MAX_TEXT + 1),
        ..message()
    };
    assert_eq!(text.encode(), Err(too_large("text", MAX_TEXT)));
    let reply = ChatReply {
        id: [0; 16],
        reply: Some("t".repeat(MAX_TEXT + 1)),
    };
    assert_eq!(reply.encode(), Err(too_large("text", MAX_TEXT)));
}

#[test]
fn what_is_too_large_is_refused_by_its_receiver() {
    let too_large = |what, max| DecodeError::TooLarge {
        what,
        len: max + 1,
        max,
    };
    assert_eq!(
        Request::decode(&vec![0; MAX_FRAME + 1]),
        Err(too_large("frame", MAX_FRAME))
    );
    assert_eq!(
        Reply::decode(&vec![0; MAX_FRAME + 1]),
        Err(too_large("frame", MAX_FRAME))
    );
    assert_eq!(
        ChatMessage::decode(&vec![0; MAX_PAYLOAD + 1]),
        Err(too_large("payload", MAX_PAYLOAD))
    );

    let long = |head: &str, len: u16, tail: &str| {
        let len = len.to_be_bytes();
        let text = vec![b'x'; usize::from(u16::from_be_bytes(len))];
        [bytes(head), vec![0x79], len.to_vec(), text, bytes(tail)].concat()
    };
    assert_eq!(
        Request::decode(&long(
            "a3 626964 01 6773657276696365",
            256,
            "677061796c6f6164 40"
        )),
        Err(too_large("service", MAX_SERVICE))
    );
    let head = "a2 626964 01 656572726f72 a2";
    assert_eq!(
        Reply::decode(&long(
            &format!("{head} 64636f6465"),
            65,
            "676d657373616765 60"
        )),
        Err(too_large("error code", MAX_CODE))
    );
    assert_eq!(
        Reply::decode(&long(
            &format!("{head} 64636f6465 6462757379 676d657373616765"),
            1025,
            ""
        )),
        Err(too_large("error message", MAX_MESSAGE))
    );
}

#[test]
fn a_long_error_message_is_cut_between_characters() {
    let error = RemoteError::new(ErrorCode::HandlerFailed, format!("x{}", "é".repeat(1000)));
    let frame = ReplyRef {
        id: 1,
        outcome: Err(&error),
    }
    .encode()
    .expect("encodes");
    let Ok(Reply {
        outcome: Err(read), ..
    }) = Reply::decode(&frame)
    else {
        panic!("no error in the reply");
    };
    assert_eq!(read.message, format!("x{}", "é".repeat(511)));
}

#[test]
fn an_explanation_quotes_little_of_a_strangers_bytes() {
    let key = [&b"\xa1\x79\xff\xff"[..], &[b'k'; 65_535], b"\x01"].concat();
    let text = [&bytes("a1 626964 79ffff")[..], &[b't'; 65_535]].concat();
    for frame in [key, text] {
        let Err(error) = Request::decode(&frame) else {
            panic!("not a request");
        };
        assert!(error.to_string().len() < 250, "{error}");
    }
}

#[test]
fn a_remote_error_shows_on_one_line_without_escapes() {
    let error = failure("tea\npot", "a\u{1b}[2J\nb");
    assert_eq!(error.to_string(), "tea pot: a\u{fffd}[2J b");
    assert_eq!(failure("busy", "").to_string(), "busy");
}

#[test]
fn the_id_of_a_broken_request_is_salvaged() {
    for (dump, id) in [
        (
            "a3 626964 182a 6773657276696365 01 677061796c6f6164 40",
            Some(42),
        ),
        (
            "a4 6178 01 626964 07 6773657276696365 6178 677061796c6f6164 40",
            Some(7),
        ),
        ("a2 626964 07 ff", Some(7)),
        ("a3 626964 07 626964 08", Some(7)),
        ("a3 626964 20", None),
        ("a3 6773657276696365 ff 626964 07", None),
        ("83 01 02 03", None),
        ("", None),
    ] {
        assert!(Request::decode(&bytes(dump)).is_err(), "{dump}");
        assert_eq!(salvage_id(&bytes(dump)), id, "{dump}");
    }
}

fn names_request() -> NamesRequest {
    NamesRequest {
        announce: vec!["client1".parse().expect("a name")],
        record: Some(vec![1, 2, 3]),
        legacy: Some(vec![4]),
        withdraw: vec!["a".parse().expect("a name")],
        find: vec!["hé".parse().expect("a name")],
        session: Some(7),
    }
}

fn names_reply() -> NamesReply {
    let peer = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN";
    NamesReply {
        lease: 90_000,
        refused: vec![0, 999],
        found: vec![
            vec![Provided {
                peer: peer.parse().expect("an id"),
                addresses: vec!["/ip4/127.0.0.1/tcp/1".parse().expect("an address")],
                lease: 1,
            }],
            vec![],
        ],
        grapes: 2,
        elsewhere: 1,
    }
}

#[test]
fn messages_on_names_have_these_bytes() {
    for (request, golden) in [
        (
            names_request(),
            "a6 68616e6e6f756e6365 81 67636c69656e7431 667265636f7264 43010203 666c6567616379 4104 \
             687769746864726177 81 6161 6466696e64 81 6368c3a9 6773657373696f6e 07",
        ),
        (
            NamesRequest::default(),
            "a3 68616e6e6f756e6365 80 687769746864726177 80 6466696e64 80",
        ),
    ] {
        let encoded = request.encode().expect("encodes");
        assert_eq!(hex(&encoded), hex(&bytes(golden)));
        assert_eq!(NamesRequest::decode(&encoded), Ok(request));
    }
    let golden = "a5 656c65617365 1a00015f90 6772656675736564 82 00 1903e7 65666f756e64 82 \
         81 a3 6470656572 5826 0024080112203b6a27bcceb6a42d62a3a8d02a6f0d73653215771de243a63ac048a18b59da29 \
         69616464726573736573 81 48047f000001060001 656c65617365 01 80 66677261706573 02 69656c73657768657265 01";
    let encoded = names_reply().encode().expect("encodes");
    assert_eq!(hex(&encoded), hex(&bytes(golden)));
    assert_eq!(NamesReply::decode(&encoded), Ok(names_reply()));
}

#[test]
fn messages_on_names_that_break_a_rule_are_refused() {
    let record = "667265636f7264 40";
    for dump in [
        // An announcement without a record, and a record without an announcement.
        "a3 68616e6e6f756e6365 81 6161 687769746864726177 80 6466696e64 80".to_owned(),
        format!("a4 68616e6e6f756e6365 80 {record} 687769746864726177 80 6466696e64 80"),
        // The record in the legacy form alone.
        "a4 68616e6e6f756e6365 81 6161 666c6567616379 40 687769746864726177 80 6466696e64 80"
            .to_owned(),
        "a4 68616e6e6f756e6365 80 666c6567616379 40 687769746864726177 80 6466696e64 80".to_owned(),
        // No names: with a blank, reserved, not normalised, of bytes.
        "a3 68616e6e6f756e6365 80 687769746864726177 81 63612062 6466696e64 80".to_owned(),
        "a3 68616e6e6f756e6365 80 687769746864726177 80 6466696e64 81 6b677261706576696e652f61"
            .to_owned(),
        "a3 68616e6e6f756e6365 80 687769746864726177 80 6466696e64 81 6365cc81".to_owned(),
        "a3 68616e6e6f756e6365 80 687769746864726177 80 6466696e64 81 4161".to_owned(),
        // A list that is missing, and one that is there twice.
        "a2 68616e6e6f756e6365 80 687769746864726177 80".to_owned(),
        "a4 68616e6e6f756e6365 80 687769746864726177 80 6466696e64 80 6466696e64 80".to_owned(),
        "a4 68616e6e6f756e6365 80 687769746864726177 80 6466696e64 80 6161 80".to_owned(),
        "83 80 80 80".to_owned(),
    ] {
        let refused = NamesRequest::decode(&bytes(&dump));
        assert!(
            matches!(refused, Err(DecodeError::Malformed(_))),
            "{dump}: {refused:?}"
        );
    }
    for dump in [
        "a4 656c65617365 00 6772656675736564 80 65666f756e64 80 66677261706573 20",
        "a4 656c65617365 00 6772656675736564 80 65666f756e64 81 81 a3 6470656572 41 00 \
         69616464726573736573 80 656c65617365 01 66677261706573 02",
        "a3 656c65617365 00 6772656675736564 80 65666f756e64 80",
    ] {
        let refused = NamesReply::decode(&bytes(dump));
        assert!(
            matches!(refused, Err(DecodeError::Malformed(_))),
            "{dump}: {refused:?}"
        );
    }
}

#[test]
fn messages_on_names_over_a_limit_are_neither_sent_nor_read() {
    let name: ServiceName = "a".parse().expect("a name");
    let full = NamesRequest {
        announce: vec![name.clone(); MAX_NAMES],
        record: Some(vec![0; MAX_RECORD]),
        legacy: Some(vec![0; MAX_RECORD]),
        withdraw: vec![name.clone(); MAX_NAMES],
        find: vec![name.clone(); MAX_SOUGHT],
        session: Some(u64::MAX),
    };
    let encoded = full.encode().expect("encodes");
    assert_eq!(NamesRequest::decode(&encoded), Ok(full.clone()));
    let one_more: [fn(&mut NamesRequest, ServiceName); 5] = [
        |request, name| request.announce.push(name),
        |request, _| request.record = Some(vec![0; MAX_RECORD + 1]),
        |request, _| request.legacy = Some(vec![0; MAX_RECORD + 1]),
        |request, name| request.withdraw.push(name),
        |request, name| request.find.push(name),
    ];
    for add in one_more {
        let mut over = full.clone();
        add(&mut over, name.clone());
        assert!(matches!(over.encode(), Err(EncodeError::TooLarge { .. })));
    }
    let long = "a".repeat(255).parse().expect("a name");
    let longest = NamesRequest {
        announce: vec![long; MAX_NAMES],
        record: Some(vec![0; MAX_RECORD]),
        legacy: Some(vec![0; MAX_RECORD]),
        ..NamesRequest::default()
    };
    assert!(longest.encode().expect("encodes").len() < MAX_PAYLOAD);
}

#[test]
fn an_answer_on_names_fits_however_long_the_addresses_are() {
    let long = |port| format!("/dns4/{}/tcp/{port}", "a".repeat(240));
    let long = (1..=20).map(|port| long(port).parse().expect("an address"));
    let long: Vec<libp2p::Multiaddr> = long.collect();
    let named = || (0..).map(|_| Provided::new(libp2p::PeerId::random(), long.clone(), 1));
    let full = NamesReply {
        found: vec![Provided::that_fit(named()); MAX_SOUGHT],
        ..NamesReply::default()
    };
    let encoded = full.encode().expect("encodes");
    assert!(encoded.len() <= MAX_PAYLOAD, "{}", encoded.len());
    assert_eq!(NamesReply::decode(&encoded), Ok(full));
    // Ordinary ones are not cut.
    let short = names_reply().found.swap_remove(0).swap_remove(0);
    let many = Provided::that_fit(std::iter::repeat(short));
    assert_eq!(many.len(), MAX_PROVIDERS);
}

fn any_name() -> impl Strategy<Value = ServiceName> {
    "[a-z0-9é]{1,12}".prop_map(|name| name.parse().expect("a name"))
}

fn any_names_request() -> impl Strategy<Value = NamesRequest> {
    let names = || vec(any_name(), 0..8);
    (names(), vec(any::<u8>(), 0..64), names(), names()).prop_map(
        |(announce, record, withdraw, find)| NamesRequest {
            legacy: (announce.len() > 1).then(|| record.clone()),
            session: (withdraw.len() > 1).then_some(find.len() as u64),
            record: (!announce.is_empty()).then_some(record),
            announce,
            withdraw,
            find,
        },
    )
}

fn any_provided() -> impl Strategy<Value = Provided> {
    (any::<[u8; 4]>(), any::<u16>(), 0..3usize, any::<u64>()).prop_map(
        |(ip, port, count, lease)| {
            let ip = std::net::Ipv4Addr::from(ip);
            let address = format!("/ip4/{ip}/tcp/{port}").parse().expect("an address");
            Provided::new(libp2p::PeerId::random(), vec![address; count], lease)
        },
    )
}

fn any_names_reply() -> impl Strategy<Value = NamesReply> {
    let found = vec(vec(any_provided(), 0..3), 0..3);
    (any::<u64>(), vec(256..999u64, 0..4), found, any::<u64>()).prop_map(
        |(lease, refused, found, grapes)| NamesReply {
            lease,
            elsewhere: refused.len() as u64,
            refused,
            found,
            grapes,
        },
    )
}

fn any_request() -> impl Strategy<Value = Request> {
    (any::<u64>(), "\\PC{0,60}", vec(any::<u8>(), 0..400)).prop_map(|(id, service, payload)| {
        Request {
            id,
            service,
            payload,
        }
    })
}

fn any_reply() -> impl Strategy<Value = Reply> {
    let code = prop_oneof!["busy|too-large|handler-failed", "\\PC{0,16}"];
    let error = (code, any::<String>()).prop_map(|(code, message)| failure(&code, &message));
    let outcome = prop_oneof![vec(any::<u8>(), 0..400).prop_map(Ok), error.prop_map(Err)];
    (any::<u64>(), outcome).prop_map(|(id, outcome)| Reply { id, outcome })
}

fn any_message() -> impl Strategy<Value = ChatMessage> {
    (
        any::<[u8; 16]>(),
        "\\PC{0,60}",
        any::<String>(),
        any::<u64>(),
    )
        .prop_map(|(id, from, text, sent_at)| ChatMessage {
            id,
            from,
            text,
            sent_at,
        })
}

fn any_chat_reply() -> impl Strategy<Value = ChatReply> {
    (any::<[u8; 16]>(), option::of(any::<String>())).prop_map(|(id, reply)| ChatReply { id, reply })
}

/// One of each message, encoded.
fn any_encoded() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        any_request().prop_map(|request| request.as_ref().encode()),
        any_reply().prop_map(|reply| reply.as_ref().encode()),
        any_message().prop_map(|message| message.encode()),
        any_chat_reply().prop_map(|reply| reply.encode()),
        any_names_request().prop_map(|request| request.encode()),
        any_names_reply().prop_map(|reply| reply.encode()),
    ]
    .prop_map(|encoded| encoded.expect("encodes"))
}

#[derive(Clone, Debug)]
enum Mutation {
    Flip(Index, u8),
    Cut(Index),
    Insert(Index, Vec<u8>),
    Append(Vec<u8>),
}

fn any_mutation() -> impl Strategy<Value = Mutation> {
    prop_oneof![
        4 => (any::<Index>(), 1..=u8::MAX).prop_map(|(at, mask)| Mutation::Flip(at, mask)),
        1 => any::<Index>().prop_map(Mutation::Cut),
        1 => (any::<Index>(), vec(any::<u8>(), 1..8)).prop_map(|(at, more)| Mutation::Insert(at, more)),
        1 => vec(any::<u8>(), 1..8).prop_map(Mutation::Append),
    ]
}

fn mutate(mut bytes: Vec<u8>, mutations: Vec<Mutation>) -> Vec<u8> {
    for mutation in mutations {
        match mutation {
            Mutation::Append(more) => bytes.extend(more),
            _ if bytes.is_empty() => {}
            Mutation::Flip(at, mask) => *at.get_mut(&mut bytes) ^= mask,
            Mutation::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Mutation::Insert(at, more) => {
                let at = at.index(bytes.len());
                bytes.splice(at..at, more);
            }
        }
    }
    bytes
}

/// Whatever can be decoded encodes to something equal.
fn holds_together(bytes: &[u8]) {
    let _ = salvage_id(bytes);
    assert_eq!(Request::decode(bytes), Request::decode_any(bytes));
    assert_eq!(Reply::decode(bytes), Reply::decode_any(bytes));
    if let Ok(request) = Request::decode(bytes) {
        assert_eq!(salvage_id(bytes), Some(request.id));
        let again = request.as_ref().encode().expect("encodes");
        assert_eq!(Request::decode(&again), Ok(request));
    }
    if let Ok(reply) = Reply::decode(bytes) {
        let again = reply.as_ref().encode().expect("encodes");
        assert_eq!(Reply::decode(&again), Ok(reply));
    }
    if let Ok(message) = ChatMessage::decode(bytes) {
        assert_eq!(
            ChatMessage::decode(&message.encode().expect("encodes")),
            Ok(message)
        );
    }
    if let Ok(request) = NamesRequest::decode(bytes) {
        assert_eq!(
            NamesRequest::decode(&request.encode().expect("encodes")),
            Ok(request)
        );
    }
    if let Ok(reply) = NamesReply::decode(bytes) {
        assert_eq!(
            NamesReply::decode(&reply.encode().expect("encodes")),
            Ok(reply)
        );
    }
    if let Ok(reply) = ChatReply::decode(bytes) {
        assert_eq!(
            ChatReply::decode(&reply.encode().expect("encodes")),
            Ok(reply)
        );
    }
}

proptest! {
    #[test]
    fn requests_come_back(request in any_request()) {
        let encoded = request.as_ref().encode().expect("encodes");
        prop_assert_eq!(Request::decode(&encoded), Ok(request));
    }

    #[test]
    fn replies_come_back(mut reply in any_reply()) {
        let encoded = reply.as_ref().encode().expect("encodes");
        if let Err(error) = &mut reply.outcome {
            error.message.truncate(floor_char_boundary(&error.message, MAX_MESSAGE));
        }
        prop_assert_eq!(Reply::decode(&encoded), Ok(reply));
    }

    #[test]
    fn chat_messages_come_back(message in any_message(), reply in any_chat_reply()) {
        prop_assert_eq!(ChatMessage::decode(&message.encode().expect("encodes")), Ok(message));
        prop_assert_eq!(ChatReply::decode(&reply.encode().expect("encodes")), Ok(reply));
    }

    #[test]
    fn messages_on_names_come_back(request in any_names_request(), reply in any_names_reply()) {
        prop_assert_eq!(NamesRequest::decode(&request.encode().expect("encodes")), Ok(request));
        prop_assert_eq!(NamesReply::decode(&reply.encode().expect("encodes")), Ok(reply));
    }

    #[test]
    fn the_expected_size_holds_every_message(encoded in any_encoded()) {
        // The vector was made with that capacity: growing would at least have doubled it.
        prop_assert!(encoded.capacity() <= encoded.len() + 72, "{} of {}", encoded.len(), encoded.capacity());
    }

    #[test]
    fn mutated_bytes_are_refused_or_make_sense(
        encoded in any_encoded(),
        mutations in vec(any_mutation(), 1..4),
    ) {
        holds_together(&mutate(encoded, mutations));
    }

    #[test]
    fn any_bytes_are_refused_or_make_sense(bytes in vec(any::<u8>(), 0..64)) {
        holds_together(&bytes);
    }
}
