// Grenache's RPC over WebSocket, as its README shows it: `echo.js server`, `echo.js client ADDRESSES`.
//
// A few lines stand in for the grape: it is asked where the service is, and not for each request.

'use strict'

const http = require('node:http')
const readline = require('node:readline')
const { PeerRPCClient, PeerRPCServer } = require('grenache-nodejs-ws')
const Link = require('grenache-nodejs-link')

function startLink (grape) {
  const link = new Link({ grape })
  link.start()
  return link
}

function serve () {
  const peer = new PeerRPCServer(startLink('http://127.0.0.1:9'), {})
  peer.init()
  const service = peer.transport('server')
  service.on('request', (rid, key, payload, handler) => handler.reply(null, payload))
  service.listen(0)
  service.socket.on('listening', () => {
    const providers = JSON.stringify([`127.0.0.1:${service.socket.address().port}`])
    const grape = http.createServer((request, response) => {
      request.resume()
      response.setHeader('content-type', 'application/json')
      response.end(providers)
    })
    grape.listen(0, '127.0.0.1', () => console.log(`http://127.0.0.1:${grape.address().port}`))
  })
  process.stdin.resume().on('end', () => process.exit())
}

// So many requests of so many bytes at once, for so long; as `load.rs` writes and reads it.
function send (peer, [bytes, inFlight, millis], done) {
  const payload = 'x'.repeat(bytes)
  const start = performance.now()
  const latencies = []
  let open = inFlight

  function ask () {
    const asked = performance.now()
    peer.request('echo', payload, { timeout: 10000 }, (error, reply) => {
      if (error || reply.length !== bytes) throw error || new Error('an echo is as long')
      const now = performance.now()
      latencies.push(now - asked)
      if (now - start < millis) return ask()
      open -= 1
      if (open === 0) done(toLine(latencies, now - start))
    })
  }
  for (let i = 0; i < inFlight; i++) ask()
}

function toLine (latencies, took) {
  latencies.sort((a, b) => a - b)
  const at = quantile => latencies[Math.floor((latencies.length - 1) * quantile)]
  const nanos = [took, at(0.5), at(0.99)].map(millis => Math.round(millis * 1e6))
  return [latencies.length, ...nanos].join(' ')
}

function call (grape) {
  const peer = new PeerRPCClient(startLink(grape), {})
  peer.init()
  console.log('ready')
  const loads = readline.createInterface({ input: process.stdin })
  loads.on('line', line => send(peer, line.split(' ').map(Number), console.log))
  loads.on('close', () => process.exit())
}

const [part, grape] = process.argv.slice(2)
if (part === 'server') serve()
else call(grape)
