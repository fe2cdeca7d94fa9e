"""Stock go-libp2p at Grapevine's protocols, by its wheel `libp2p-go`. The verbs and exit codes: ../README.md."""

import asyncio
import os
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "python"))

import libp2p  # noqa: E402
from libp2p import dht  # noqa: E402
from libp2p.cid import Cid  # noqa: E402
from libp2p.crypto import KeyType, PrivKey, PubKey, crypto_generate_keypair  # noqa: E402
from libp2p.peer import AddrInfo, Peer, addr_info_from_p2p_addr  # noqa: E402
from multiaddr import Multiaddr  # noqa: E402

import wire  # noqa: E402
from verbs import Failure, Line, Verbs, drive  # noqa: E402

DEADLINE = 10
PATIENCE = 1

# Version 1, raw bytes.
CID = b"\x01\x55"


class Stream:
    def __init__(self, stream):
        self.stream = stream

    async def read(self, length):
        # Not by `read_bytes`, which takes the end of the stream for an error.
        loop, stream = self.stream._loop, self.stream
        result = await loop.run_in_executor(None, stream._READ, stream.handle, length)
        count = next(iter(result.integers), 0)
        if count > 0:
            return result.bytes.first()[:count]
        if "EOF" not in (result.result.get("Error") or "EOF"):
            result.raise_error()
        return b""

    async def write(self, content):
        await self.stream.write(content)

    async def close(self):
        await self.stream.close()


class WholeStream(Stream):
    """A stream that the other side ends after its answer: over QUIC the wheel loses what comes with the end."""

    rest = None

    async def read(self, length):
        if self.rest is None:
            self.rest = await self.stream.read_all()
        content, self.rest = self.rest[:length], self.rest[length:]
        return content


class GoLibp2p:
    def __init__(self, host, key, kad):
        self.host, self.key, self.kad = host, key, kad
        self.id = host.id.string
        self.grapes = []

    @property
    def addresses(self):
        return self.host.network.listen_addresses()

    async def join(self, bootstrap):
        for address in bootstrap:
            info = addr_info_from_p2p_addr(address)
            await self.host.connect(info)
            self.grapes.append(info.id.string)

    async def within(self, work):
        async with asyncio.timeout(DEADLINE):
            return await work

    async def both(self, one, other):
        await asyncio.gather(one, other)

    async def identify(self):
        # The wheel does not tell the protocols of a peer. Kademlia takes a grape when it knows them.
        await self.find_providers(wire.key("nobody"))
        return list(self.host.peer_store.addrs(self.grapes[0]))

    def cid(self, key):
        return Cid.from_bytes(CID + key)

    async def find_providers(self, key):
        # Nobody is found, without an error, before Kademlia knows a grape, and the wheel does not tell
        # whether it does.
        found, patience = [], time.monotonic() + PATIENCE
        while not found and time.monotonic() < patience:
            found = await self.kad.find_providers(self.cid(key))
        return {info.id.string: list(info.addrs) for info in found}

    async def provide(self, key):
        while True:
            try:
                return await self.kad.provide(self.cid(key), True)
            except libp2p.LibP2PError as error:
                if "failed to find any peer in table" not in str(error):
                    raise
                await asyncio.sleep(0.01)

    async def dial(self, peer, addresses):
        await self.host.connect(AddrInfo(Peer.decode(peer), addresses))

    async def open(self, peer, protocol):
        stream = await self.host.new_stream(Peer.decode(peer), protocol)
        return WholeStream(stream) if protocol == wire.RENDEZVOUS else Stream(stream)

    def seal(self):
        return self.signed(self.key, time.time_ns(), self.addresses)

    def sign(self, seed, public, sequence, addresses):
        key = PrivKey.unmarshal(wire.message((1, 1), (2, seed + public)))
        return self.signed(key, sequence, addresses)

    def signed(self, key, sequence, addresses):
        public = key.get_public
        id = Peer.from_public_key(public).bytes
        addresses = [Multiaddr(address).to_bytes() for address in addresses]
        payload = wire.peer_record(id, sequence, addresses)
        return wire.envelope(public.marshal(), payload, key.sign(wire.signed_part(payload)))

    def certify(self, envelope):
        payload, kind = wire.first(envelope, 3), wire.first(envelope, 2)
        public = PubKey.unmarshal(wire.first(envelope, 1))
        signed = wire.signed_part(payload)
        if kind != wire.RECORD_TYPE or not public.verify(signed, wire.first(envelope, 5)):
            raise Failure(1, "the signature is not valid")
        id, _, addresses = wire.read_peer_record(payload)
        if Peer.from_public_key(public).bytes != id:
            raise Failure(1, "signed by somebody else")
        return self.peer(id), [self.address(address) for address in addresses]

    def peer(self, content):
        return Peer.from_bytes(content).string

    def address(self, content):
        return str(Multiaddr(content))


async def lines():
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield line.decode()


async def main():
    line = Line(sys.argv[1:])
    key, _ = crypto_generate_keypair(KeyType.Ed25519, 256)
    quic = line.transport == "quic"
    listen = "/ip4/127.0.0.1/udp/0/quic-v1" if quic else "/ip4/127.0.0.1/tcp/0"
    host = libp2p.Host(libp2p.Identity(key), libp2p.ListenAddrStrings(listen), libp2p.DisableRelay())
    kad = await dht.DHT.new(host, dht.Mode(dht.DhtModeEnum.ModeClient), dht.V1ProtocolOverride(wire.KADEMLIA))
    library = GoLibp2p(host, key, kad)
    verbs = Verbs(library)

    async def answer(stream):
        await verbs.answer(Stream(stream))

    host.set_stream_handler(wire.RPC, answer)
    await library.within(library.join(line.bootstrap))
    tasks = set()

    def start(work, *args):
        task = asyncio.create_task(work(*args))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    exit = await drive(verbs, line, lines(), start)
    sys.stdout.flush()
    # Go's threads do not end with the interpreter.
    os._exit(exit)


asyncio.run(main())
