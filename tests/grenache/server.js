'use strict'

// A service: announces NAME every second, prints each payload, replies `Echo: <payload>`.
// To "boom" it replies an error, and to "hang" nothing. PORT 0 takes any free port.

const { connect, print, transports, usage } = require('./common')

const [name, port, grape, transport = 'ws'] = process.argv.slice(2)
if (!grape || !transports[transport]) usage('server.js NAME PORT GRAPE_URL [ws|http]')

const link = connect(grape)
const peer = new transports[transport].PeerRPCServer(link, {})
peer.init()
const service = peer.transport('server')
service.listen(Number(port))

service.on('request', (rid, key, payload, handler) => {
  print({ payload })
  if (payload === 'hang') return
  if (payload === 'boom') return handler.reply(new Error('something went wrong'))
  handler.reply(null, `Echo: ${payload}`)
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
