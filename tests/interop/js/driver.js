// Stock js-libp2p at Grapevine's protocols. The verbs and exit codes: ../README.md.

import { createInterface } from 'node:readline'
import { Failure, Peer } from './peer.js'
import { check } from './vectors.js'

const USAGE = 2

async function run (peer, [verb, ...args], print) {
  switch (verb) {
    case 'identify': return print(...await peer.identify())
    case 'find': return print(...await peer.find(...args))
    case 'call': return print(await peer.call(...args))
    case 'chat': return print(await peer.chat(...args))
    case 'pipe': return print(await peer.pipe(args[0], Number(args[1]), args[2]))
    case 'serve': return print(...await peer.serve(...args))
    case 'withdraw': return print(...await peer.withdraw(...args))
    case 'vectors': return print(await check(args[0]))
    default: throw new Failure(USAGE, `no such verb: ${verb}`)
  }
}

/** Runs a verb; the code to exit with, and what it prints. */
async function outcome (peer, args) {
  const lines = []
  try {
    await run(peer, args, (...printed) => lines.push(...printed))
    return { exit: 0, lines }
  } catch (error) {
    return { exit: error instanceof Failure ? error.exit : 1, lines: [`error: ${error.message}`] }
  }
}

function flags (args) {
  const settings = { bootstrap: [], transport: 'tcp' }
  while (args[0]?.startsWith('--')) {
    const [flag, value] = args.splice(0, 2)
    if (flag === '--bootstrap') settings.bootstrap.push(value)
    else if (flag === '--transport') settings.transport = value
    else throw new Failure(USAGE, `no such flag: ${flag}`)
  }
  return settings
}

const args = process.argv.slice(2)
const settings = flags(args)
const peer = args[0] === 'vectors' ? null : await Peer.start(settings)
if (args.length > 0) {
  const { exit, lines } = await outcome(peer, args)
  for (const line of lines) (exit === 0 ? console.log : console.error)(line)
  // Who serves goes on until its input ends.
  if (exit !== 0 || args[0] !== 'serve') process.exit(exit)
  process.stdin.on('end', () => process.exit(0)).resume()
} else {
  console.log(JSON.stringify({ ready: peer.id }))
  for await (const line of createInterface({ input: process.stdin })) {
    // Not awaited: verbs run side by side, and each answer names its own.
    const { id, args } = JSON.parse(line)
    outcome(peer, args).then(outcome => console.log(JSON.stringify({ id, ...outcome })))
  }
  process.exit(0)
}
