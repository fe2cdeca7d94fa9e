"""Makes tests/vectors.json, with other libraries than the crate's: cbor2, PyNaCl and multiaddr.

    tests/interop/py/venv/bin/python tests/interop/python/make_vectors.py > tests/vectors.json
"""

import hashlib
import json

import cbor2
from multiaddr import Multiaddr
from nacl.signing import SigningKey

import wire

SEED = bytes(range(32))
ADDRESSES = ["/ip4/127.0.0.1/tcp/20001", "/ip4/127.0.0.1/udp/20001/quic-v1"]
SEQUENCE = 1_700_000_000
LEGACY_DOMAIN, LEGACY_TYPE = b"libp2p-routing-state", b"/libp2p/routing-state-record"
BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def base58(content):
    number, text = int.from_bytes(content, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = BASE58[digit] + text
    return "1" * (len(content) - len(content.lstrip(b"\0"))) + text


key = SigningKey(SEED)
raw_public = key.verify_key.encode()
public_key = wire.message((1, 1), (2, raw_public))
peer = b"\x00" + wire.varint(len(public_key)) + public_key


def record(form, domain, kind):
    addresses = [Multiaddr(address).to_bytes() for address in ADDRESSES]
    payload = wire.peer_record(peer, SEQUENCE, addresses)
    signed = wire.signed_part(payload, domain, kind)
    signature = key.sign(signed).signature
    return {
        "form": form,
        "seed": SEED.hex(),
        "public_key": public_key.hex(),
        "peer": base58(peer),
        "peer_bytes": peer.hex(),
        "sequence": SEQUENCE,
        "addresses": ADDRESSES,
        "address_bytes": [address.hex() for address in addresses],
        "domain": domain.decode(),
        "payload_type": kind.hex(),
        "payload": payload.hex(),
        "signed": signed.hex(),
        "signature": signature.hex(),
        "envelope": wire.envelope(public_key, payload, signature, kind).hex(),
    }


RECORDS = [record("standard", wire.RECORD_DOMAIN, wire.RECORD_TYPE), record("legacy", LEGACY_DOMAIN, LEGACY_TYPE)]


def request(what, id, service, payload):
    content = cbor2.dumps({"id": id, "service": service, "payload": payload})
    value = {"id": str(id), "service": service, "payload": payload.hex()}
    return {"what": what, "request": value, "frame": wire.frame(content).hex()}


def reply(what, id, payload):
    value = {"id": str(id), "ok": payload.hex()}
    return {"what": what, "reply": value, "frame": wire.frame(wire.ok(id, payload)).hex()}


def failure(code, message):
    value = {"id": "300", "error": {"code": code, "message": message}}
    return {"what": f"error {code}", "reply": value, "frame": wire.frame(wire.error(300, code, message)).hex()}


def refused(what, dump):
    return {"what": what, "content": dump.replace(" ", "")}


def longer(what, dump):
    return {"what": what, "content": dump.replace(" ", ""), "request": {"id": "1", "service": "client1", "payload": b"hello".hex()}}


SERVICE, PAYLOAD = "6773657276696365", "677061796c6f6164"
FRAMES = [
    request("a text", 1, "client1", b"hello"),
    request("the largest id, the serves question, an empty payload", 2**64 - 1, "grapevine/serves", b""),
    request("a payload of 24 bytes, whose length takes a byte of its own", 24, "hé", bytes(24)),
    request("a payload of 300 bytes, and a frame whose length takes two", 256, "a" * 255, bytes(300)),
    reply("an echo", 1, b"Echo: hello"),
    reply("an empty payload", 0, b""),
    *[
        failure(code, "no")
        for code in ["unknown-service", "busy", "too-large", "bad-request", "handler-failed", "shutting-down", "teapot"]
    ],
    failure("busy", ""),
]
LONGER = [
    longer("indefinite lengths and a long integer", f"bf 626964 1b0000000000000001 7f 63736572 6476696365 ff 67636c69656e7431 {PAYLOAD} 5f 426865 436c6c6f ff ff"),
    longer("another order", f"a3 {PAYLOAD} 4568656c6c6f {SERVICE} 67636c69656e7431 626964 01"),
    longer("a semantic tag", f"d9d9f7 a3 626964 01 {SERVICE} 67636c69656e7431 {PAYLOAD} 4568656c6c6f"),
]
REFUSED = [
    refused("nothing", ""),
    refused("not a map", "01"),
    refused("an array in place of the map", "83 01 67636c69656e7431 4568656c6c6f"),
    refused("no payload", f"a2 626964 01 {SERVICE} 6178"),
    refused("the id twice", f"a4 626964 01 626964 01 {SERVICE} 6178 {PAYLOAD} 40"),
    refused("a negative id", f"a3 626964 20 {SERVICE} 6178 {PAYLOAD} 40"),
    refused("text for the payload", f"a3 626964 01 {SERVICE} 6178 {PAYLOAD} 6178"),
    refused("broken UTF-8", f"a3 626964 01 {SERVICE} 61ff {PAYLOAD} 40"),
    refused("something after the map", f"a3 626964 01 {SERVICE} 6178 {PAYLOAD} 40 f6"),
    refused("a payload that ends early", f"a3 626964 01 {SERVICE} 6178 {PAYLOAD} 4568"),
]
CHAT_ID = bytes(range(16))
CHAT = [
    {
        "message": {"id": CHAT_ID.hex(), "from": "ann", "text": "hé", "sent_at": 1_700_000_000_000},
        "payload": cbor2.dumps({"id": CHAT_ID, "from": "ann", "text": "hé", "sent_at": 1_700_000_000_000}).hex(),
    },
    {"receipt": {"id": CHAT_ID.hex(), "reply": None}, "payload": cbor2.dumps({"id": CHAT_ID}).hex()},
    {"receipt": {"id": CHAT_ID.hex(), "reply": "hi"}, "payload": cbor2.dumps({"id": CHAT_ID, "reply": "hi"}).hex()},
]


def names_request(announce, record, legacy, withdraw, find, session=None):
    content = {"announce": announce}
    content |= {"record": record} if record is not None else {}
    content |= {"legacy": legacy} if legacy is not None else {}
    content |= {"withdraw": withdraw, "find": find}
    content |= {"session": session} if session is not None else {}
    value = {name: value.hex() if isinstance(value, bytes) else value for name, value in content.items()}
    return {"request": value, "payload": cbor2.dumps(content).hex()}


def names_reply(lease, refused, found, grapes, elsewhere=None):
    def provider(addresses, left):
        return {"peer": peer, "addresses": [Multiaddr(address).to_bytes() for address in addresses], "lease": left}

    content = {"lease": lease, "refused": refused, "found": [[provider(*it) for it in of] for of in found], "grapes": grapes}
    content |= {"elsewhere": elsewhere} if elsewhere is not None else {}
    value = {
        "lease": lease,
        "refused": refused,
        "found": [[{"peer": base58(peer), "addresses": list(it[0]), "lease": it[1]} for it in of] for of in found],
        "grapes": grapes,
    }
    value |= {"elsewhere": elsewhere} if elsewhere is not None else {}
    return {"reply": value, "payload": cbor2.dumps(content).hex()}


standard, legacy = (bytes.fromhex(it["envelope"]) for it in RECORDS)
NAMES = [
    names_request([], None, None, [], []),
    names_request([], None, None, [], ["client1"]),
    names_request(["client1"], standard, None, [], []),
    names_request(["client1", "hé"], standard, legacy, ["a"], ["client1"]),
    names_request([], None, None, ["client1"], [], 7),
    names_reply(90_000, [0, 999], [[(ADDRESSES, 1)], []], 2),
    names_reply(90_000, [], [[]], 1, 2),
]


def bencode(value):
    if isinstance(value, int):
        return b"i%de" % value
    if isinstance(value, bytes):
        return b"%d:%s" % (len(value), value)
    if isinstance(value, list):
        return b"l" + b"".join(bencode(it) for it in value) + b"e"
    return b"d" + b"".join(bencode(name) + bencode(value[name]) for name in sorted(value)) + b"e"


def immutable(content):
    encoded = bencode(content)
    return {"what": "immutable", "target": hashlib.sha1(encoded).hexdigest(), "record": bencode({b"v": content}).hex()}


def mutable(content, sequence, salt):
    salted = b"4:salt" + bencode(salt) if salt else b""
    signature = key.sign(salted + b"3:seqi%de1:v" % sequence + bencode(content)).signature
    fields = {b"k": raw_public, b"seq": sequence, b"sig": signature, b"v": content}
    fields |= {b"salt": salt} if salt else {}
    target = hashlib.sha1(raw_public + salt).hexdigest()
    return {"what": "mutable", "target": target, "record": bencode(fields).hex()}


VALUES = [
    immutable(b"Hello World!"),
    immutable([1, b"two", {b"three": 3}]),
    mutable(b"Hello World!", 1, b""),
    mutable(b"Hello World!", 4, b"foobar"),
]


print(
    json.dumps(
        {
            "about": "Test vectors of the wire. Bytes are hexadecimal, ids are decimal text. Made by tests/interop/python/make_vectors.py.",
            "limits": {
                "payload": 1_048_576,
                "frame": 1_049_600,
                "service": 255,
                "code": 64,
                "message": 1_024,
                "chat_from": 255,
                "chat_text": 65_536,
                "names": 1_000,
                "sought": 16,
                "record": 4_096,
                "providers": 64,
                "addresses": 8,
                "address": 256,
                "changes": 1_000,
                "registry_keys": 16,
                "workers": 100,
            },
            "keys": [
                {"name": name, "key": wire.key(name).hex()} for name in ["client1", "hé", "a", "a" * 255, "日本"]
            ],
            "no_names": ["", "a" * 256, "a b", "a\u200bb", "grapevine/names", "e\u0301", "tab\t", "\u202ea"],
            "frames": FRAMES,
            "longer": LONGER,
            "refused": REFUSED,
            "serves": [
                {
                    "name": "client1",
                    "question": wire.frame(wire.request(7, "grapevine/serves", b"client1")).hex(),
                    "yes": wire.frame(wire.ok(7, b"\x01")).hex(),
                    "no": wire.frame(wire.ok(7, b"\x00")).hex(),
                }
            ],
            "chat": CHAT,
            "records": RECORDS,
            "names": NAMES,
            "rendezvous": {
                "register": wire.register("client1", standard, 7_200).hex(),
                "unregister": wire.unregister("client1").hex(),
                "discover": wire.discover("client1", 50).hex(),
            },
            "values": VALUES,
        },
        indent=1,
        ensure_ascii=True,
    )
)
