'use strict'

// What the programs of this directory share.

const Link = require('grenache-nodejs-link')

const transports = {
  ws: require('grenache-nodejs-ws'),
  http: require('grenache-nodejs-http')
}

// The connection of a service or client to its grape.
function connect (grape) {
  const link = new Link({ grape })
  link.start()
  return link
}

// One result on one line, as a reader in another language expects it.
function print (value) {
  process.stdout.write(JSON.stringify(value) + '\n')
}

// What became of a call, `undefined` made visible.
function outcome (error, result) {
  if (!error) return { result: result === undefined ? null : result }
  return error.code ? { error: error.message, code: error.code } : { error: error.message }
}

function usage (text) {
  process.stderr.write(`usage: node ${text}\n`)
  process.exit(2)
}

module.exports = { connect, outcome, print, transports, usage }
