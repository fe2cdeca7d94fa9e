'use strict'

// A link to a grape, by hand: each line of standard input is a verb (put, get, announce, lookup) and
// its argument as JSON; each answer is printed as a line of JSON, {"result": ...} or {"error": ...}.
//
//     echo 'lookup "client1"' | node link.js http://127.0.0.1:30001
//
// `sign` is a `put` that this program's key signs first, as BEP 44 says.

const crypto = require('crypto')
const readline = require('readline')
const { connect, outcome, print, usage } = require('./common')

const [grape] = process.argv.slice(2)
if (!grape) usage('link.js GRAPE_URL')

const link = connect(grape)
const { privateKey, publicKey } = crypto.generateKeyPairSync('ed25519')
const k = Buffer.from(publicKey.export({ format: 'jwk' }).x, 'base64url').toString('hex')

const text = (value) => `${Buffer.byteLength(value)}:${value}`

function sign (value) {
  const salt = value.salt ? `4:salt${text(value.salt)}` : ''
  const signed = `${salt}3:seqi${value.seq}e1:v${text(value.v)}`
  const sig = crypto.sign(null, Buffer.from(signed), privateKey).toString('hex')
  return { k, sig, ...value }
}

const verbs = {
  announce: ([name, port], done) => link.announce(name, port, {}, done),
  lookup: (name, done) => link.lookup(name, {}, done),
  put: (value, done) => link.put(value, done),
  sign: (value, done) => link.put(sign(value), done),
  get: (hash, done) => link.get(hash, done)
}

async function main () {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const [verb] = line.split(' ', 1)
    const argument = JSON.parse(line.slice(verb.length))
    await new Promise((resolve) => {
      verbs[verb](argument, (error, result) => {
        print(outcome(error, result))
        resolve()
      })
    })
  }
  link.stop()
}

main()
