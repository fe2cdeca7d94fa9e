"""Stock py-libp2p at Grapevine's protocols. The verbs and exit codes: ../README.md."""

import logging
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "python"))

import trio  # noqa: E402
from multiaddr import Multiaddr  # noqa: E402

import wire  # noqa: E402

from libp2p import new_host  # noqa: E402
from libp2p.crypto.ed25519 import create_new_key_pair  # noqa: E402
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT  # noqa: E402
from libp2p.peer.envelope import Envelope, consume_envelope, seal_record  # noqa: E402
from libp2p.peer.id import ID  # noqa: E402
from libp2p.peer.peer_record import PeerRecord, timestamp_seq  # noqa: E402
from libp2p.peer.peerinfo import PeerInfo, info_from_p2p_addr  # noqa: E402
from libp2p.tools.anyio_service import background_trio_service  # noqa: E402

from verbs import Line, Verbs, drive  # noqa: E402

DEADLINE = 10
PATIENCE = 1
# Over QUIC it loses some, see `is_identified`.
ATTEMPTS = 3

# py-libp2p has Kademlia's protocol id as a constant, which each of its modules has taken over.
for module in [module for name, module in sys.modules.items() if name.startswith("libp2p.kad_dht")]:
    if hasattr(module, "PROTOCOL_ID"):
        module.PROTOCOL_ID = wire.KADEMLIA


class Stream:
    def __init__(self, stream):
        self.stream = stream

    async def read(self, length):
        try:
            return await self.stream.read(length)
        except Exception as error:  # noqa: BLE001
            # The end of a stream is an exception of its own in each muxer.
            if "EOF" in type(error).__name__:
                return b""
            raise

    async def write(self, content):
        await self.stream.write(content)

    async def close(self):
        await self.stream.close()


class PyLibp2p:
    def __init__(self, host, keys, kad):
        self.host, self.keys, self.kad = host, keys, kad
        self.id = str(host.get_id())
        self.grapes = []

    @property
    def addresses(self):
        return [str(address) for address in self.host.get_transport_addrs()]

    async def join(self, bootstrap):
        for address in bootstrap:
            info = info_from_p2p_addr(Multiaddr(address))
            while not await self.is_identified(info):
                await self.host.disconnect(info.peer_id)
            self.grapes.append(str(info.peer_id))
            await self.kad.add_peer(info.peer_id)

    async def is_identified(self, info):
        """Connects, and waits until identify has told what the grape speaks: over QUIC py-libp2p sometimes
        loses the first stream that it opens, and identify with it."""
        await self.host.connect(info)
        with trio.move_on_after(PATIENCE):
            while wire.KADEMLIA not in self.protocols(info.peer_id):
                await trio.sleep(0.01)
            return True
        return False

    def protocols(self, peer):
        return [str(protocol) for protocol in self.host.get_peerstore().get_protocols(peer)]

    async def within(self, work):
        with trio.move_on_after(DEADLINE):
            return await work
        raise TimeoutError

    async def both(self, one, other):
        async def run(work):
            await work

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, one)
            nursery.start_soon(run, other)

    async def identify(self):
        grape = ID.from_string(self.grapes[0])
        addresses = [str(address) for address in self.host.get_peerstore().addrs(grape)]
        return [*sorted(self.protocols(grape)), *addresses]

    async def find_providers(self, key):
        # It keeps whom it has found, and would not ask again.
        self.kad.provider_store.providers.pop(key, None)
        found = await self.kad.find_providers(key.hex())
        return {str(info.peer_id): [str(address) for address in info.addrs] for info in found}

    async def provide(self, key):
        if not await self.kad.provide(key.hex()):
            raise RuntimeError("no grape was told")

    async def dial(self, peer, addresses):
        addresses = [Multiaddr(address) for address in addresses]
        await self.host.connect(PeerInfo(ID.from_string(peer), addresses))

    async def open(self, peer, protocol):
        for attempt in range(ATTEMPTS):
            try:
                return Stream(await self.host.new_stream(ID.from_string(peer), [protocol]))
            except Exception:  # noqa: BLE001
                if attempt == ATTEMPTS - 1:
                    raise

    def seal(self):
        addresses = [Multiaddr(address) for address in self.addresses]
        return self.signed(self.keys.private_key, timestamp_seq(), addresses)

    def sign(self, seed, _public, sequence, addresses):
        key = create_new_key_pair(seed).private_key
        return self.signed(key, sequence, [Multiaddr(address) for address in addresses])

    def signed(self, key, sequence, addresses):
        record = PeerRecord(ID.from_pubkey(key.get_public_key()), addresses, sequence)
        return seal_record(record, key).marshal_envelope()

    def certify(self, envelope):
        _, record = consume_envelope(envelope, "libp2p-peer-record")
        return str(record.peer_id), [str(address) for address in record.addrs]

    def peer(self, content):
        return str(ID(content))

    def address(self, content):
        return str(Multiaddr(content))


async def lines():
    buffer = b""
    async with trio.lowlevel.FdStream(os.dup(0)) as stdin:
        async for chunk in stdin:
            *whole, buffer = (buffer + chunk).split(b"\n")
            for line in whole:
                yield line.decode()


async def main():
    line = Line(sys.argv[1:])
    keys = create_new_key_pair()
    quic = line.transport == "quic"
    listen = Multiaddr("/ip4/127.0.0.1/udp/0/quic-v1" if quic else "/ip4/127.0.0.1/tcp/0")
    host = new_host(key_pair=keys, enable_quic=quic, enable_tcp=not quic, listen_addrs=[listen])
    async with host.run(listen_addrs=[listen]), trio.open_nursery() as nursery:
        kad = KadDHT(host, DHTMode.CLIENT)
        library = PyLibp2p(host, keys, kad)
        verbs = Verbs(library)

        async def answer(stream):
            await verbs.answer(Stream(stream))

        host.set_stream_handler(wire.RPC, answer)
        async with background_trio_service(kad):
            await library.within(library.join(line.bootstrap))
            exit = await drive(verbs, line, lines(), nursery.start_soon)
        # What it runs besides takes its time to end.
        sys.stdout.flush()
        os._exit(exit)


logging.disable()
trio.run(main)
