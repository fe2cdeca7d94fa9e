"""What the drivers in Python do, given a library: the verbs and exit codes of ../README.md."""

import json
import os
import sys
import time

import vectors
import wire

ATTEMPTS = 20
NOT_FOUND, UNREACHABLE, TIMED_OUT, REFUSED, USAGE = 3, 4, 5, 7, 2


class Failure(Exception):
    """Why a verb failed, as an exit code."""

    def __init__(self, exit: int, message: str):
        super().__init__(message)
        self.exit = exit


class Verbs:
    """The verbs, by a library of libp2p.

    It has the ids of the grapes it is connected to in `grapes`, and can: `find_providers(key)` and
    `provide(key)` by Kademlia, `dial(id, addresses)`, `open(id, protocol)` a stream with `read`,
    `write` and `close`, `both(one, other)` at once, `within(work)` a deadline, `identify()`, `seal()` its own
    record, `sign(seed, public, sequence, addresses)` one and `certify(envelope)` another's, and read a `peer(bytes)` and
    an `address(bytes)`.
    """

    def __init__(self, library):
        self.library = library
        self.names = set()

    async def outcome(self, args: list[str]) -> tuple[int, list[str]]:
        """Runs a verb; the code to exit with, and what it prints."""
        try:
            verb = getattr(self, f"do_{args[0]}", None)
            if verb is None:
                raise Failure(USAGE, f"no such verb: {args[0]}")
            return 0, await self.library.within(verb(*args[1:]))
        except Failure as failure:
            return failure.exit, [f"error: {failure}"]
        except TimeoutError:
            return TIMED_OUT, ["error: timed out"]
        except Exception as error:  # noqa: BLE001
            return 1, [f"error: {type(error).__name__}: {error}"]

    async def do_identify(self):
        return await self.library.identify()

    async def do_find(self, name, road="kademlia"):
        found = await self.providers(name, road)
        return [" ".join([peer, *addresses]) for peer, addresses in found.items()]

    async def do_call(self, name, text, road="kademlia"):
        return [(await self.call(name, text.encode(), road)).decode()]

    async def do_chat(self, name, text, road="kademlia"):
        id = os.urandom(16)
        message = {"id": id, "from": "python", "text": text, "sent_at": int(time.time() * 1000)}
        receipt = wire.read(await self.call(name, wire.map(message), road))
        if receipt["id"] != id:
            raise Failure(1, "the receipt is for another message")
        return [receipt.get("reply") or ""]

    async def do_pipe(self, name, count, road="kademlia"):
        provider, count, open = await self.live(name, road), int(count), set()
        stream = await self.library.open(provider, wire.RPC)

        async def send():
            for id in range(1, count + 1):
                open.add(id)
                await stream.write(wire.frame(wire.request(id, name, b"request %d" % id)))

        async def receive():
            for _ in range(count):
                reply = wire.read(await wire.read_frame(stream))
                if reply.get("ok") != b"Echo: request %d" % reply["id"] or reply["id"] not in open:
                    raise Failure(REFUSED, f"not the reply: {reply}")
                open.remove(reply["id"])

        await self.library.both(send(), receive())
        await stream.close()
        return [str(count)]

    async def do_serve(self, name, road="kademlia"):
        self.names.add(name)
        if road == "kademlia":
            await self.library.provide(wire.key(name))
        elif road == "rendezvous":
            await self.rendezvous(wire.register(name, self.library.seal(), 7_200))
        elif road == "names":
            message = {"announce": [name], "record": self.library.seal(), "withdraw": [], "find": []}
            if (await self.tell(message))["refused"]:
                raise Failure(REFUSED, "the grape does not keep the name")
        else:
            raise Failure(USAGE, f"no such road: {road}")
        return [f"serving {name}", *self.library.addresses]

    async def do_withdraw(self, name, road):
        self.names.discard(name)
        if road == "names":
            await self.tell({"announce": [], "withdraw": [name], "find": []})
        if road == "rendezvous":
            stream = await self.library.open(self.library.grapes[0], wire.RENDEZVOUS)
            await stream.write(wire.frame(wire.unregister(name)))
            await stream.close()
        return []

    async def do_vectors(self, file):
        return [vectors.check(file, self.library)]

    async def providers(self, name, road):
        if road == "kademlia":
            found = await self.library.find_providers(wire.key(name))
        elif road == "rendezvous":
            records = await self.rendezvous(wire.discover(name, 50))
            found = dict(self.library.certify(record) for record in records)
        elif road == "names":
            reply = await self.tell({"announce": [], "withdraw": [], "find": [name]})
            found = {
                self.library.peer(provider["peer"]): [self.library.address(it) for it in provider["addresses"]]
                for provider in reply["found"][0]
            }
        else:
            raise Failure(USAGE, f"no such road: {road}")
        if not found:
            raise Failure(NOT_FOUND, f"nobody announces {name}")
        return found

    async def live(self, name, road):
        """The first provider that can be dialled and says that it serves the name."""
        for peer, addresses in (await self.providers(name, road)).items():
            try:
                await self.library.dial(peer, addresses)
                reply = await self.exchange(peer, "grapevine/serves", name.encode())
                if reply.get("ok") == b"\x01" or reply.get("error", {}).get("code") == "unknown-service":
                    return peer
            except Exception as error:  # noqa: BLE001
                print(f"{peer}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise Failure(UNREACHABLE, f"no provider of {name} can be reached")

    async def call(self, name, payload, road):
        return await self.request(await self.live(name, road), name, payload)

    async def request(self, peer, service, payload):
        reply = await self.exchange(peer, service, payload)
        if "error" in reply:
            raise Failure(REFUSED, f"{reply['error']['code']}: {reply['error']['message']}")
        return reply["ok"]

    async def exchange(self, peer, service, payload):
        """One request on a stream of its own."""
        stream = await self.library.open(peer, wire.RPC)
        await stream.write(wire.frame(wire.request(1, service, payload)))
        reply = wire.read(await wire.read_frame(stream))
        await stream.close()
        return reply

    async def tell(self, message):
        return wire.read(await self.request(self.library.grapes[0], "grapevine/names", wire.map(message)))

    async def rendezvous(self, message):
        # py-libp2p over QUIC loses a stream now and then, and to register again does no harm.
        for attempt in range(ATTEMPTS):
            try:
                return await self.ask_point(message)
            except Failure:
                raise
            except Exception:  # noqa: BLE001
                if attempt == ATTEMPTS - 1:
                    raise

    async def ask_point(self, message):
        stream = await self.library.open(self.library.grapes[0], wire.RENDEZVOUS)
        await stream.write(wire.frame(message))
        status, records = wire.rendezvous_response(await wire.read_frame(stream))
        await stream.close()
        if status != 0:
            raise Failure(REFUSED, f"rendezvous: status {status}")
        return records

    async def answer(self, stream):
        """Answers the requests of a stream until the other side has ended it."""
        try:
            while (content := await wire.read_frame(stream)) is not None:
                await stream.write(wire.frame(self.reply(wire.read(content))))
        except Exception as error:  # noqa: BLE001
            print(f"a stream ended: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        await stream.close()

    def reply(self, request):
        id, service, payload = request["id"], request["service"], request["payload"]
        if service == "grapevine/serves":
            return wire.ok(id, bytes([payload.decode() in self.names]))
        if service not in self.names:
            return wire.error(id, "unknown-service", "")
        if not wire.is_map(payload):
            return wire.ok(id, b"Echo: " + payload)
        message = wire.read(payload)
        return wire.ok(id, wire.map({"id": message["id"], "reply": f"Echo: {message['text']}"}))


class Line:
    """The command line: flags, and a verb or none."""

    def __init__(self, args: list[str]):
        self.bootstrap, self.transport = [], "tcp"
        while args and args[0].startswith("--"):
            flag, value, *args = args
            if flag == "--bootstrap":
                self.bootstrap.append(value)
            elif flag == "--transport":
                self.transport = value
            else:
                sys.exit(f"no such flag: {flag}")
        self.verb = args


async def drive(verbs: Verbs, line: Line, lines, start) -> int:
    """Runs the verb of the command line, or those that `lines` yields, each beside the others by `start`."""
    if line.verb:
        exit, printed = await verbs.outcome(line.verb)
        print(*printed, sep="\n", file=sys.stdout if exit == 0 else sys.stderr, flush=True)
        if exit == 0 and line.verb[0] == "serve":
            async for _ in lines:
                pass
        return exit
    print(json.dumps({"ready": verbs.library.id}), flush=True)

    async def answer(asked):
        exit, printed = await verbs.outcome(asked["args"])
        print(json.dumps({"id": asked["id"], "exit": exit, "lines": printed}), flush=True)

    async for text in lines:
        start(answer, json.loads(text))
    return 0
