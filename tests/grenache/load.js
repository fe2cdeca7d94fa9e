'use strict'

// A client that calls as often as it can: for each line of standard input, `IN_FLIGHT MILLISECONDS`,
// it keeps so many requests open for so long, and prints {"answered": ..., "seconds": ...}.

const readline = require('readline')
const { connect, print, transports, usage } = require('./common')

const [name, grape, transport] = process.argv.slice(2)
if (!transports[transport]) usage('load.js NAME GRAPE_URL ws|http')

const link = connect(grape)
const peer = new transports[transport].PeerRPCClient(link, {})
peer.init()

function request () {
  return new Promise((resolve, reject) => {
    peer.request(name, 'hello', { timeout: 10000 }, (error, result) => {
      if (error) return reject(error)
      if (result !== 'Echo: hello') return reject(new Error(`not an echo: ${result}`))
      resolve()
    })
  })
}

async function run (inFlight, milliseconds) {
  const start = process.hrtime.bigint()
  const end = Date.now() + milliseconds
  let answered = 0
  await Promise.all(Array.from({ length: inFlight }, async () => {
    while (Date.now() < end) {
      await request()
      answered++
    }
  }))
  print({ answered, seconds: Number(process.hrtime.bigint() - start) / 1e9 })
}

async function main () {
  for await (const line of readline.createInterface({ input: process.stdin })) {
    await run(...line.split(' ').map(Number))
  }
  process.exit(0)
}

main()
