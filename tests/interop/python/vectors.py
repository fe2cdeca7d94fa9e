"""The encodings of a library and of its driver against the test vectors."""

import hashlib
import json

import wire


class Checked:
    """Counts what was found to be as it should."""

    count = 0

    def same(self, what, found, expected):
        self.count += 1
        if found != expected:
            raise ValueError(f"{what}: {found!r} instead of {expected!r}")


def unframed(frame):
    """The content of a frame that stands alone."""
    length = shift = at = 0
    while True:
        byte = frame[at]
        length |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            break
    if len(frame) - at != length:
        raise ValueError("not one frame")
    return frame[at:]


def encoded(vector):
    if request := vector.get("request"):
        return wire.request(int(request["id"]), request["service"], bytes.fromhex(request["payload"]))
    reply = vector["reply"]
    if error := reply.get("error"):
        return wire.error(int(reply["id"]), error["code"], error["message"])
    return wire.ok(int(reply["id"]), bytes.fromhex(reply["ok"]))


def check(file, library):
    """Checks them all. `library` signs and reads records: `sign(seed, public, sequence, addresses)` and
    `certify(envelope)`."""
    with open(file, encoding="utf-8") as vectors:
        vectors = json.load(vectors)
    checked = Checked()
    same = checked.same
    same("limit", wire.MAX_FRAME, vectors["limits"]["frame"])
    for vector in vectors["keys"]:
        same("key", wire.key(vector["name"]).hex(), vector["key"])
    for vector in vectors["frames"]:
        content = unframed(bytes.fromhex(vector["frame"]))
        same(vector["what"], encoded(vector).hex(), content.hex())
        same(vector["what"], str(wire.read(content)["id"]), (vector.get("request") or vector["reply"])["id"])
    for vector in vectors["longer"]:
        read, request = wire.read(bytes.fromhex(vector["content"])), vector["request"]
        found = [str(read["id"]), read["service"], read["payload"].hex()]
        same(vector["what"], found, [request["id"], request["service"], request["payload"]])
    for vector in vectors["serves"]:
        question = wire.request(7, "grapevine/serves", vector["name"].encode())
        for name, content in [("question", question), ("yes", wire.ok(7, b"\x01")), ("no", wire.ok(7, b"\x00"))]:
            same(name, wire.frame(content).hex(), vector[name])
    for vector in vectors["chat"]:
        message = dict(vector.get("message") or vector["receipt"])
        message["id"] = bytes.fromhex(message["id"])
        if message.get("reply", "") is None:
            del message["reply"]
        same("chat", wire.map(message).hex(), vector["payload"])
    for vector in vectors["records"]:
        check_record(same, vector, library)
    for vector in vectors["names"]:
        payload = bytes.fromhex(vector["payload"])
        same("names", wire.map(wire.read(payload)).hex(), vector["payload"])
    standard = bytes.fromhex(vectors["records"][0]["envelope"])
    same("register", wire.register("client1", standard, 7_200).hex(), vectors["rendezvous"]["register"])
    same("unregister", wire.unregister("client1").hex(), vectors["rendezvous"]["unregister"])
    same("discover", wire.discover("client1", 50).hex(), vectors["rendezvous"]["discover"])
    for vector in vectors["values"]:
        if vector["what"] == "immutable":
            # A dictionary of `v` alone: d1:v, the content, e.
            content = bytes.fromhex(vector["record"])[4:-1]
            same("target", hashlib.sha1(content).hexdigest(), vector["target"])
    return str(checked.count)


def check_record(same, vector, library):
    addresses = [bytes.fromhex(address) for address in vector["address_bytes"]]
    same("addresses", [library.address(address) for address in addresses], vector["addresses"])
    same("peer", library.peer(bytes.fromhex(vector["peer_bytes"])), vector["peer"])
    domain, kind = vector["domain"].encode(), bytes.fromhex(vector["payload_type"])
    payload = wire.peer_record(bytes.fromhex(vector["peer_bytes"]), vector["sequence"], addresses)
    same("payload", payload.hex(), vector["payload"])
    same("signed", wire.signed_part(payload, domain, kind).hex(), vector["signed"])
    if vector["form"] == "standard":
        seed, public = bytes.fromhex(vector["seed"]), bytes.fromhex(vector["public_key"])[-32:]
        signed = library.sign(seed, public, vector["sequence"], vector["addresses"])
        same("envelope", signed.hex(), vector["envelope"])
        certified = library.certify(bytes.fromhex(vector["envelope"]))
        same("certified", list(certified), [vector["peer"], vector["addresses"]])
