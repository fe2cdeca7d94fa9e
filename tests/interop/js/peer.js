// A peer made of stock js-libp2p: Kademlia, identify, and streams.

import { noise } from '@chainsafe/libp2p-noise'
import { quic } from '@chainsafe/libp2p-quic'
import { yamux } from '@chainsafe/libp2p-yamux'
import { identify } from '@libp2p/identify'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { peerIdFromMultihash } from '@libp2p/peer-id'
import { PeerRecord, RecordEnvelope } from '@libp2p/peer-record'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { lpStream } from '@libp2p/utils'
import { generateKeyPair } from '@libp2p/crypto/keys'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import * as Digest from 'multiformats/hashes/digest'
import { randomBytes } from 'node:crypto'
import * as wire from './wire.js'

/** Why a verb failed, as an exit code. */
export class Failure extends Error {
  constructor (exit, message) {
    super(message)
    this.exit = exit
  }
}

export const NOT_FOUND = 3
export const UNREACHABLE = 4
export const TIMED_OUT = 5
export const REFUSED = 7

const DEADLINE = 10_000
const text = bytes => new TextDecoder('utf-8', { fatal: true }).decode(bytes)
const bytes = text => new TextEncoder().encode(text)
const flat = list => list.subarray()

/** Fails after a time; a verb must never hang. */
async function within (work, what) {
  let timer
  const late = new Promise((resolve, reject) => {
    timer = setTimeout(() => reject(new Failure(TIMED_OUT, `${what}: timed out`)), DEADLINE)
  })
  try {
    return await Promise.race([work, late])
  } finally {
    clearTimeout(timer)
  }
}

export class Peer {
  static async start ({ bootstrap, transport }) {
    const peer = new Peer()
    const isQuic = transport === 'quic'
    peer.key = await generateKeyPair('Ed25519')
    peer.names = new Set()
    peer.libp2p = await createLibp2p({
      privateKey: peer.key,
      addresses: { listen: [isQuic ? '/ip4/127.0.0.1/udp/0/quic-v1' : '/ip4/127.0.0.1/tcp/0'] },
      transports: [isQuic ? quic() : tcp()],
      connectionEncrypters: [noise()],
      streamMuxers: [yamux()],
      // By default 5 a second from one host: here all are on one.
      connectionManager: { inboundConnectionThreshold: 1_000 },
      services: {
        identify: identify(),
        ping: ping(),
        kad: kadDHT({
          protocol: wire.KADEMLIA,
          clientMode: true,
          peerInfoMapper: passthroughMapper,
          initialQuerySelfInterval: 0
        })
      }
    })
    await peer.libp2p.handle(wire.RPC, async stream => {
      await peer.#answer(lpStream(stream, { maxDataLength: wire.MAX_FRAME }))
      // Until then js-libp2p counts it among the 32 that it takes on a connection.
      await stream.close()
    })
    peer.grapes = []
    for (const address of bootstrap) {
      const grape = multiaddr(address)
      const connection = await within(peer.libp2p.dial(grape), 'dialling a grape')
      peer.grapes.push(connection.remotePeer)
    }
    // Kademlia knows a grape once identify has told what it speaks.
    await within(peer.#identified(), 'identify')
    return peer
  }

  get id () {
    return this.libp2p.peerId.toString()
  }

  async #identified () {
    for (const grape of this.grapes) {
      while (!(await this.libp2p.peerStore.get(grape)).protocols.includes(wire.KADEMLIA)) {
        await new Promise(resolve => this.libp2p.addEventListener('peer:update', resolve, { once: true }))
      }
    }
  }

  /** What the first grape has told: its agent, its protocols, its addresses. */
  async identify () {
    const known = await this.libp2p.peerStore.get(this.grapes[0])
    const agent = text(known.metadata.get('AgentVersion'))
    return [agent, ...[...known.protocols].sort(), ...known.addresses.map(({ multiaddr }) => `${multiaddr}`)]
  }

  /** The providers of a name: an id and its addresses each. */
  async find (name, road = 'kademlia') {
    const found = await this.#providers(name, road)
    if (found.size === 0) throw new Failure(NOT_FOUND, `nobody announces ${name}`)
    return [...found].map(([id, addresses]) => [id, ...addresses].join(' '))
  }

  async #providers (name, road) {
    switch (road) {
      case 'kademlia': return within(this.#provided(name), 'Kademlia')
      case 'rendezvous': return within(this.#registered(name), 'rendezvous')
      case 'names': return within(this.#named(name), 'the names of a grape')
      default: throw new Failure(2, `no such road: ${road}`)
    }
  }

  async #provided (name) {
    const found = new Map()
    const key = wire.cid(name)
    for await (const event of this.libp2p.services.kad.findProviders(key)) {
      for (const { id, multiaddrs } of event.providers ?? []) {
        found.set(id.toString(), multiaddrs.map(String))
      }
    }
    return found
  }

  async #registered (name) {
    const { records } = await this.#rendezvous(wire.discover(name, 50))
    const found = new Map()
    for (const record of records) {
      const envelope = await RecordEnvelope.openAndCertify(record, PeerRecord.DOMAIN)
      const { peerId, multiaddrs } = PeerRecord.createFromProtobuf(envelope.payload)
      found.set(peerId.toString(), multiaddrs.map(String))
    }
    return found
  }

  async #named (name) {
    const reply = await this.#tell({ announce: [], withdraw: [], find: [name] })
    return new Map(reply.found[0].map(({ peer, addresses }) =>
      [peerIdFromMultihash(Digest.decode(peer)).toString(), addresses.map(bytes => `${multiaddr(bytes)}`)]))
  }

  async #tell (map) {
    const payload = await this.#request(this.grapes[0], 'grapevine/names', wire.map(map))
    return wire.read(payload)
  }

  async #rendezvous (message) {
    const stream = await this.libp2p.dialProtocol(this.grapes[0], wire.RENDEZVOUS)
    const frames = lpStream(stream)
    await frames.write(message)
    const response = wire.rendezvousResponse(flat(await frames.read()))
    await stream.close()
    if (response.status !== 0) throw new Failure(REFUSED, `rendezvous: status ${response.status}`)
    return response
  }

  /** Sends a text to a provider; its reply. */
  async call (name, message, road) {
    return text(await this.#callAny(name, bytes(message), road))
  }

  /** Sends a chat message to a provider; the answer in its receipt. */
  async chat (name, message, road) {
    const id = Uint8Array.from(randomBytes(16))
    const payload = wire.map({ id, from: 'js', text: message, sent_at: Date.now() })
    const receipt = wire.read(await this.#callAny(name, payload, road))
    if (Buffer.compare(receipt.id, id) !== 0) throw new Failure(1, 'the receipt is for another message')
    return receipt.reply ?? ''
  }

  async #callAny (name, payload, road) {
    const provider = await this.#live(name, road)
    return within(this.#request(provider, name, payload), 'the reply')
  }

  /** The first provider that can be dialled and says that it serves the name. */
  async #live (name, road = 'kademlia') {
    const providers = await this.#providers(name, road)
    if (providers.size === 0) throw new Failure(NOT_FOUND, `nobody announces ${name}`)
    for (const [id, addresses] of providers) {
      try {
        const to = addresses.map(address => multiaddr(`${address}/p2p/${id}`))
        const { remotePeer } = await within(this.libp2p.dial(to), 'dialling')
        const serves = await within(this.#serves(remotePeer, name), 'the serves question')
        if (serves) return remotePeer
      } catch (error) {
        if (error instanceof Failure && error.exit === REFUSED) throw error
        console.error(`${id}: ${error.message}`)
      }
    }
    throw new Failure(UNREACHABLE, `no provider of ${name} can be reached`)
  }

  async #serves (peer, name) {
    const reply = await this.#exchange(peer, 'grapevine/serves', bytes(name))
    return reply.error?.code === 'unknown-service' || reply.ok?.[0] === 1
  }

  async #request (peer, service, payload) {
    const reply = await this.#exchange(peer, service, payload)
    if (reply.error != null) throw new Failure(REFUSED, `${reply.error.code}: ${reply.error.message}`)
    return reply.ok
  }

  /** One request on a stream of its own. */
  async #exchange (peer, service, payload) {
    const stream = await this.libp2p.dialProtocol(peer, wire.RPC)
    const frames = lpStream(stream, { maxDataLength: wire.MAX_FRAME })
    await frames.write(wire.request(1, service, payload))
    const reply = wire.read(flat(await frames.read()))
    await stream.close()
    return reply
  }

  /** Sends so many requests on one stream, without waiting in between; how many were answered. */
  async pipe (name, count, road) {
    const provider = await this.#live(name, road)
    const stream = await this.libp2p.dialProtocol(provider, wire.RPC)
    const frames = lpStream(stream, { maxDataLength: wire.MAX_FRAME })
    const open = new Set()
    const send = async () => {
      for (let id = 1; id <= count; id++) {
        open.add(id)
        await frames.write(wire.request(id, name, bytes(`request ${id}`)))
      }
    }
    const receive = async () => {
      for (let left = count; left > 0; left--) {
        const reply = wire.read(flat(await frames.read()))
        const isEcho = reply.ok != null && text(reply.ok) === `Echo: request ${reply.id}`
        if (!isEcho || !open.delete(reply.id)) throw new Failure(REFUSED, `not the reply: ${JSON.stringify(reply)}`)
      }
    }
    await within(Promise.all([send(), receive()]), 'the replies')
    await stream.close()
    return `${count}`
  }

  /** Announces a name and answers; the addresses it does so at. */
  async serve (name, road = 'kademlia') {
    this.names.add(name)
    await within(this.#announce(name, road), 'announcing')
    return [`serving ${name}`, ...this.#addresses().map(String)]
  }

  #addresses () {
    return this.libp2p.getMultiaddrs().map(address => address.decapsulate('/p2p'))
  }

  async #announce (name, road) {
    switch (road) {
      case 'kademlia':
        for await (const event of this.libp2p.services.kad.provide(wire.cid(name))) void event
        return
      case 'rendezvous':
        return this.#rendezvous(wire.register(name, await this.#record(), 7_200))
      case 'names': {
        const { refused } = await this.#tell({ announce: [name], record: await this.#record(), withdraw: [], find: [] })
        if (refused.length > 0) throw new Failure(REFUSED, 'the grape does not keep the name')
        return
      }
      default: throw new Failure(2, `no such road: ${road}`)
    }
  }

  async #record () {
    const record = new PeerRecord({ peerId: this.libp2p.peerId, multiaddrs: this.#addresses() })
    return (await RecordEnvelope.seal(record, this.key)).marshal()
  }

  /** Takes a name back, by the road it was announced by. */
  async withdraw (name, road) {
    this.names.delete(name)
    if (road === 'names') await this.#tell({ announce: [], withdraw: [name], find: [] })
    if (road === 'rendezvous') {
      const stream = await this.libp2p.dialProtocol(this.grapes[0], wire.RENDEZVOUS)
      await lpStream(stream).write(wire.unregister(name))
      await stream.close()
    }
    return []
  }

  /** Answers the requests of a stream until the other side has ended it. */
  async #answer (frames) {
    try {
      for (;;) {
        const request = wire.read(flat(await frames.read()))
        await frames.write(this.#reply(request))
      }
    } catch {
      // The caller has closed its side.
    }
  }

  #reply ({ id, service, payload }) {
    if (service === 'grapevine/serves') return wire.ok(id, Uint8Array.of(this.names.has(text(payload)) ? 1 : 0))
    if (!this.names.has(service)) return wire.error(id, 'unknown-service', '')
    if (!wire.isMap(payload)) return wire.ok(id, bytes(`Echo: ${text(payload)}`))
    const message = wire.read(payload)
    return wire.ok(id, wire.map({ id: message.id, reply: `Echo: ${message.text}` }))
  }
}
