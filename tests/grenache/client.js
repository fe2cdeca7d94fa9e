'use strict'

// A client: looks NAME up, sends each PAYLOAD to one of its providers, prints what came of it as a
// line of JSON, {"result": ...} or {"error": ...}. With --until-answered it tries again after an error.
// With --chat it sends {"message": PAYLOAD} instead, as in a chat of Grenache's users.

const { parseArgs } = require('util')
const { connect, outcome, print, transports, usage } = require('./common')

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    chat: { type: 'boolean', default: false },
    timeout: { type: 'string', default: '10000' },
    'until-answered': { type: 'boolean', default: false }
  }
})
const [name, grape, transport, ...payloads] = positionals
if (!payloads.length || !transports[transport]) {
  usage('client.js NAME GRAPE_URL ws|http PAYLOAD... [--chat] [--timeout MS] [--until-answered]')
}

const link = connect(grape)
const peer = new transports[transport].PeerRPCClient(link, {})
peer.init()

// The WebSocket transport leaves the error of a refused connection to nobody.
process.on('uncaughtException', (error) => {
  print(outcome(error))
  process.exit(1)
})

function request (payload, done) {
  peer.request(name, options.chat ? { message: payload } : payload, { timeout: Number(options.timeout) }, (error, result) => {
    if (error && options['until-answered']) return setTimeout(request, 20, payload, done)
    print(outcome(error, result))
    done()
  })
}

function next (index) {
  if (index < payloads.length) return request(payloads[index], () => next(index + 1))
  peer.stop()
  link.stop()
  process.exit(0)
}

next(0)
