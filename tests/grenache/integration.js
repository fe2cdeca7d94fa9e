'use strict'

// The test that a user of Grenache runs on two grapes: starts them by the command `grape` of PATH,
// with the stray first word that such tests have, stores a value by one of them and reads it by both.

const assert = require('assert')
const net = require('net')
const { spawn } = require('child_process')
const { connect, print } = require('./common')

// Ports that are free now. Held together, so that they differ.
async function freePorts (count) {
  const servers = await Promise.all(Array.from({ length: count }, () => new Promise((resolve) => {
    const server = net.createServer().listen(0, '127.0.0.1', () => resolve(server))
  })))
  const ports = servers.map((server) => server.address().port)
  await Promise.all(servers.map((server) => new Promise((resolve) => server.close(resolve))))
  return ports
}

function grape (dht, api, other) {
  const flags = ['grape', '--dp', dht, '--aph', api, '--bn', `127.0.0.1:${other}`]
  return spawn('grape', flags, { stdio: ['ignore', 'ignore', 'inherit'] })
}

// Long enough for any machine; ends this process in order, and its grapes with it.
const DEADLINE = 60000

// Tries until the grapes are there.
async function eventually (call, isDone) {
  for (;;) {
    const result = await new Promise((resolve) => call((error, result) => resolve(error ? undefined : result)))
    if (isDone(result)) return result
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
}

async function main () {
  const [dht1, api1, dht2, api2] = await freePorts(4)
  const grapes = [grape(dht1, api1, dht2), grape(dht2, api2, dht1)]
  // One that could not be started has no id, and a signal to it would go to everybody here.
  process.on('exit', () => grapes.forEach((grape) => grape.pid && grape.kill()))
  grapes.forEach((grape) => grape.on('exit', (code) => assert.fail(`a grape has ended: ${code}`)))
  setTimeout(() => assert.fail('the grapes do not answer'), DEADLINE)

  const [one, two] = [api1, api2].map((api) => connect(`http://127.0.0.1:${api}`))
  const hash = await eventually((done) => one.put({ v: 'hello world' }, done), (hash) => /^[0-9a-f]{40}$/.test(hash))
  for (const link of [one, two]) {
    const found = await eventually((done) => link.get(hash, done), Boolean)
    assert.strictEqual(found.v, 'hello world')
  }
  print({ hash })
  process.exit(0)
}

main()
