// The encodings of js-libp2p and of this driver against the test vectors.

import { privateKeyFromRaw } from '@libp2p/crypto/keys'
import { peerIdFromPrivateKey } from '@libp2p/peer-id'
import { PeerRecord, RecordEnvelope } from '@libp2p/peer-record'
import { multiaddr } from '@multiformats/multiaddr'
import { createHash } from 'node:crypto'
import { readFile } from 'node:fs/promises'
import * as wire from './wire.js'

const hex = bytes => Buffer.from(bytes).toString('hex')
const bytes = hex => Uint8Array.from(Buffer.from(hex, 'hex'))

let checked = 0

function same (what, found, expected) {
  checked += 1
  if (found !== expected) throw new Error(`${what}: ${found} instead of ${expected}`)
}

/** The content of a frame that stands alone. */
function unframed (frame) {
  let length = 0
  let at = 0
  do { length |= (frame[at] & 0x7f) << (7 * at) } while (frame[at++] >= 0x80)
  same('length', frame.length - at, length)
  return frame.subarray(at)
}

/** How an id is read: as a number where it is one that is exact. */
const id = text => Number.isSafeInteger(Number(text)) ? Number(text) : BigInt(text)

function encoded ({ request, reply }) {
  if (request != null) return wire.request(id(request.id), request.service, bytes(request.payload))
  if (reply.error != null) return wire.error(id(reply.id), reply.error.code, reply.error.message)
  return wire.ok(id(reply.id), bytes(reply.ok))
}

async function checkRecord (vector) {
  const key = privateKeyFromRaw(bytes(vector.seed + vector.public_key.slice(-64)))
  const peerId = peerIdFromPrivateKey(key)
  same('peer', peerId.toString(), vector.peer)
  const addresses = vector.addresses.map(address => multiaddr(address))
  same('addresses', addresses.map(address => hex(address.bytes)).join(), vector.address_bytes.join())
  if (vector.form !== 'standard') return
  const record = new PeerRecord({ peerId, multiaddrs: addresses, seqNumber: BigInt(vector.sequence) })
  same('payload', hex(record.marshal()), vector.payload)
  same('envelope', hex((await RecordEnvelope.seal(record, key)).marshal()), vector.envelope)
  const opened = await RecordEnvelope.openAndCertify(bytes(vector.envelope), PeerRecord.DOMAIN)
  same('opened', PeerRecord.createFromProtobuf(opened.payload).equals(record), true)
}

export async function check (file) {
  const vectors = JSON.parse(await readFile(file, 'utf8'))
  same('limit', wire.MAX_FRAME, vectors.limits.frame)
  for (const { name, key } of vectors.keys) {
    same('key', hex(wire.key(name)), key)
    same('cid', hex(wire.cid(name).multihash.bytes), key)
  }
  for (const vector of vectors.frames) {
    const content = unframed(bytes(vector.frame))
    same(vector.what, hex(encoded(vector)), hex(content))
    const read = wire.read(content)
    same(vector.what, String(read.id), (vector.request ?? vector.reply).id)
  }
  // cborg reads no text in pieces and no tags; Grapevine sends neither.
  for (const { what, content, request } of vectors.longer.filter(({ what }) => what === 'another order')) {
    const { id, service, payload } = wire.read(bytes(content))
    same(what, [id, service, hex(payload)].join(), [request.id, request.service, request.payload].join())
  }
  for (const { name, question, yes, no } of vectors.serves) {
    same('question', hex(wire.request(7, 'grapevine/serves', new TextEncoder().encode(name))), hex(unframed(bytes(question))))
    same('yes', hex(wire.ok(7, Uint8Array.of(1))), hex(unframed(bytes(yes))))
    same('no', hex(wire.ok(7, Uint8Array.of(0))), hex(unframed(bytes(no))))
  }
  for (const { message, receipt, payload } of vectors.chat) {
    const { id, ...rest } = message ?? receipt
    if (rest.reply === null) delete rest.reply
    same('chat', hex(wire.map({ id: bytes(id), ...rest })), payload)
  }
  for (const vector of vectors.records) await checkRecord(vector)
  for (const { request, payload } of vectors.names.filter(({ request }) => request != null)) {
    const { record, legacy, session, ...rest } = request
    const read = wire.read(bytes(payload))
    same('record', hex(read.record ?? []), record ?? '')
    same('legacy', hex(read.legacy ?? []), legacy ?? '')
    same('session', read.session, session)
    same('names', JSON.stringify([read.announce, read.withdraw, read.find]), JSON.stringify(Object.values(rest)))
    same('names', hex(wire.map(read)), payload)
  }
  const { register, unregister, discover } = vectors.rendezvous
  const standard = bytes(vectors.records.find(({ form }) => form === 'standard').envelope)
  same('register', hex(wire.register('client1', standard, 7_200)), register)
  same('unregister', hex(wire.unregister('client1')), unregister)
  same('discover', hex(wire.discover('client1', 50)), discover)
  for (const { target, record } of vectors.values.filter(({ what }) => what === 'immutable')) {
    // A dictionary of `v` alone: d1:v, the content, e.
    same('target', createHash('sha1').update(bytes(record).subarray(4, -1)).digest('hex'), target)
  }
  return `${checked}`
}
