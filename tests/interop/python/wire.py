"""The wire as its page describes it (rustdoc of `proto`), for the drivers in Python: frames, the maps in
them, signed peer records, and the messages of the rendezvous protocol."""

import hashlib

import cbor2

RPC = "/grapevine/rpc/1.0.0"
KADEMLIA = "/grapevine/kad/1.0.0"
RENDEZVOUS = "/rendezvous/1.0.0"
MAX_FRAME = 1_049_600

RECORD_DOMAIN = b"libp2p-peer-record"
RECORD_TYPE = b"\x03\x01"


def key(name: str) -> bytes:
    """The key of a name: the sha2-256 multihash of its bytes."""
    return b"\x12\x20" + hashlib.sha256(name.encode()).digest()


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def frame(content: bytes) -> bytes:
    return varint(len(content)) + content


async def read_frame(stream, limit: int = MAX_FRAME) -> bytes | None:
    """The content of the next frame; `None` at the end of the stream."""
    length = shift = 0
    while True:
        byte = await stream.read(1)
        if not byte:
            return None
        length |= (byte[0] & 0x7F) << shift
        shift += 7
        if byte[0] < 0x80:
            break
    if length > limit:
        raise ValueError(f"a frame of {length} bytes")
    return await read_exactly(stream, length)


async def read_exactly(stream, length: int) -> bytes:
    content = bytearray()
    while len(content) < length:
        more = await stream.read(length - len(content))
        if not more:
            raise EOFError("the stream ended inside a frame")
        content += more
    return bytes(content)


def request(id: int, service: str, payload: bytes) -> bytes:
    return cbor2.dumps({"id": id, "service": service, "payload": payload})


def ok(id: int, payload: bytes) -> bytes:
    return cbor2.dumps({"id": id, "ok": payload})


def error(id: int, code: str, message: str) -> bytes:
    return cbor2.dumps({"id": id, "error": {"code": code, "message": message}})


def map(value: dict) -> bytes:
    return cbor2.dumps(value)


def read(content: bytes):
    return cbor2.loads(content)


def is_map(payload: bytes) -> bool:
    """Whether a payload is a map, and so no text."""
    return bool(payload) and 0xA0 <= payload[0] <= 0xBF


# Protobuf, as little of it as signed records and rendezvous take.


def message(*parts: tuple[int, int | bytes | str]) -> bytes:
    out = b""
    for tag, value in parts:
        if isinstance(value, int):
            out += varint(tag << 3) + varint(value)
        else:
            value = value.encode() if isinstance(value, str) else value
            out += varint(tag << 3 | 2) + frame(value)
    return out


def fields(content: bytes) -> list[tuple[int, int | bytes]]:
    found, at = [], 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = content[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(content):
        tag = number()
        if tag & 7 == 0:
            found.append((tag >> 3, number()))
        else:
            length = number()
            found.append((tag >> 3, content[at : at + length]))
            at += length
    return found


def first(content: bytes, tag: int, default=None):
    return next((value for at, value in fields(content) if at == tag), default)


def peer_record(peer: bytes, sequence: int, addresses: list[bytes]) -> bytes:
    infos = [(3, message((1, address))) for address in addresses]
    return message((1, peer), (2, sequence), *infos)


def read_peer_record(payload: bytes) -> tuple[bytes, int, list[bytes]]:
    addresses = [first(info, 1) for tag, info in fields(payload) if tag == 3]
    return first(payload, 1), first(payload, 2, 0), addresses


def signed_part(payload: bytes, domain: bytes = RECORD_DOMAIN, kind: bytes = RECORD_TYPE) -> bytes:
    return frame(domain) + frame(kind) + frame(payload)


def envelope(public_key: bytes, payload: bytes, signature: bytes, kind: bytes = RECORD_TYPE) -> bytes:
    return message((1, public_key), (2, kind), (3, payload), (5, signature))


def register(namespace: str, record: bytes, ttl: int) -> bytes:
    return message((1, 0), (2, message((1, namespace), (2, record), (3, ttl))))


def unregister(namespace: str) -> bytes:
    return message((1, 2), (4, message((1, namespace))))


def discover(namespace: str, limit: int) -> bytes:
    return message((1, 3), (5, message((1, namespace), (2, limit))))


def rendezvous_response(content: bytes) -> tuple[int, list[bytes]]:
    """The status of a response, and the signed records in it."""
    page = first(content, 6)
    if page is None:
        return first(first(content, 3), 1, 0), []
    records = [first(registration, 2) for tag, registration in fields(page) if tag == 1]
    return first(page, 3, 0), records
