// The wire as its page describes it (rustdoc of `proto`): frames, the maps in them, and the messages
// of the rendezvous protocol, for which js-libp2p has no package that fits its version.

import { decode, encode } from 'cborg'
import { CID } from 'multiformats/cid'
import * as Digest from 'multiformats/hashes/digest'
import { createHash } from 'node:crypto'

export const RPC = '/grapevine/rpc/1.0.0'
export const KADEMLIA = '/grapevine/kad/1.0.0'
export const RENDEZVOUS = '/rendezvous/1.0.0'
export const MAX_FRAME = 1_049_600

/** The key of a name: the sha2-256 multihash of its bytes. */
export function key (name) {
  const digest = createHash('sha256').update(name, 'utf8').digest()
  return Uint8Array.from([0x12, 0x20, ...digest])
}

export function cid (name) {
  return CID.createV1(0x55, Digest.decode(key(name)))
}

// Shortest forms, keys in the order in which they are given.
const options = { mapSorter: () => 0 }

export function request (id, service, payload) {
  return encode({ id, service, payload }, options)
}

export function ok (id, payload) {
  return encode({ id, ok: payload }, options)
}

export function error (id, code, message) {
  return encode({ id, error: { code, message } }, options)
}

export function map (value) {
  return encode(value, options)
}

export function read (bytes) {
  return decode(bytes, { strict: false, rejectDuplicateMapKeys: true })
}

/** Whether a payload is a map, and so no text. */
export function isMap (payload) {
  return payload.length > 0 && payload[0] >= 0xa0 && payload[0] <= 0xbf
}

// Protobuf, as little of it as rendezvous takes.

function varint (value) {
  const bytes = []
  for (value = BigInt(value); value >= 0x80n; value >>= 7n) bytes.push(Number(value & 0x7fn) | 0x80)
  return [...bytes, Number(value)]
}

function field (tag, value) {
  if (typeof value === 'number') return [tag << 3, ...varint(value)]
  const bytes = typeof value === 'string' ? new TextEncoder().encode(value) : value
  return [tag << 3 | 2, ...varint(bytes.length), ...bytes]
}

function message (fields) {
  return Uint8Array.from(fields.flatMap(([tag, value]) => field(tag, value)))
}

function fields (bytes) {
  const found = []
  let at = 0
  const next = () => {
    let value = 0n
    for (let shift = 0n; ; shift += 7n) {
      const byte = bytes[at++]
      value |= BigInt(byte & 0x7f) << shift
      if (byte < 0x80) return Number(value)
    }
  }
  while (at < bytes.length) {
    const tag = next()
    if ((tag & 7) === 0) {
      found.push([tag >> 3, next()])
    } else {
      const length = next()
      found.push([tag >> 3, bytes.subarray(at, at += length)])
    }
  }
  return found
}

const first = (found, tag) => found.find(([at]) => at === tag)?.[1]

export function register (namespace, envelope, ttl) {
  const register = message([[1, namespace], [2, envelope], [3, ttl]])
  return message([[1, 0], [2, register]])
}

export function unregister (namespace) {
  return message([[1, 2], [4, message([[1, namespace]])]])
}

export function discover (namespace, limit) {
  return message([[1, 3], [5, message([[1, namespace], [2, limit]])]])
}

/** The status of a response, and the signed records in it. */
export function rendezvousResponse (bytes) {
  const response = fields(bytes)
  const inner = fields(first(response, 3) ?? first(response, 6))
  const isPage = first(response, 6) != null
  const status = first(inner, isPage ? 3 : 1) ?? 0
  const records = isPage ? inner.filter(([tag]) => tag === 1).map(([, bytes]) => first(fields(bytes), 2)) : []
  return { status, records }
}
