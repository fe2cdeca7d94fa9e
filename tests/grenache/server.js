'use strict'

// A service: announces NAME every second, prints each payload, replies `Echo: <payload>`.
// To "boom" it replies an error, and to "hang" nothing. PORT 0 takes any free port. With --quiet it
// prints no payloads. With --chat a payload is {"message": TEXT} and nothing else, and the reply
// `Echo: <TEXT>`, as in a chat of Grenache's users.

const { parseArgs } = require('util')
const { connect, print, transports, usage } = require('./common')

const { values: { chat, quiet }, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    chat: { type: 'boolean', default: false },
    quiet: { type: 'boolean', default: false }
  }
})
const [name, port, grape, transport = 'ws'] = positionals
if (!grape || !transports[transport]) usage('server.js NAME PORT GRAPE_URL [ws|http] [--chat] [--quiet]')

const link = connect(grape)
const peer = new transports[transport].PeerRPCServer(link, {})
peer.init()
const service = peer.transport('server')
service.listen(Number(port))

service.on('request', (rid, key, payload, handler) => {
  if (!quiet) print({ payload })
  const text = chat ? payload.message : payload
  if (text === 'hang') return
  if (text === 'boom') return handler.reply(new Error('something went wrong'))
  handler.reply(null, `Echo: ${text}`)
})

service.socket.once('listening', () => {
  const own = service.socket.address().port
  let announced = false
  const announce = () => link.announce(name, own, {}, (error, result) => {
    if (error || !Number.isInteger(result)) {
      process.stderr.write(`not announced: ${error ? error.message : result}\n`)
    } else if (!announced) {
      announced = true
      print({ announced: name, port: own })
    }
  })
  announce()
  setInterval(announce, 1000)
})
