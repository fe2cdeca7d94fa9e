//! What nodes say to each other: the protocol, on one page.
//!
//! This page is meant to be enough to write a client in another language. Sizes are in bytes, text is
//! UTF-8, and every limit is one that a receiver enforces.
//!
//! `tests/vectors.json` has test vectors of all of it but the registry of grapes, made by other
//! libraries than this crate's; `tests/interop` has clients in JavaScript, Python and Rust, each made of
//! another implementation of libp2p.
//!
//! # Protocols
//!
//! | for | id | what it is |
//! | --- | --- | --- |
//! | announce, lookup | `/grapevine/kad/1.0.0` | Kademlia as libp2p specifies it: ADD_PROVIDER and GET_PROVIDERS |
//! | calls | `/grapevine/rpc/1.0.0` | this page: what every node serves, at least one request on a stream |
//! | many calls on one stream | `/grapevine/rpc/kept/1.0.0` | the same frames, on streams that stay open |
//! | names at grapes | `/grapevine/names/1.0.0` | told by a grape: it answers requests on [names](#names-at-grapes) |
//! | workers at grapes | `/grapevine/registry/1.0.0` | told by a grape: it answers requests to the [registry](#the-registry-of-grapes) |
//! | values of Grenache's users | `/grapevine/kad/1.0.0` | Kademlia's PUT_VALUE and GET_VALUE, see [below](#values) |
//! | rendezvous | `/rendezvous/1.0.0` | the standard protocol; the namespace is the name, and the records are [signed](#signed-peer-records) |
//! | identify | `/ipfs/id/1.0.0` | with protocol version `/grapevine/1.0.0`, agent `grapevine/<version>` and no signed peer record |
//!
//! What a node can do is told by the ids that identify lists, and by nothing else: the agent is for
//! people, and a node that serves Kademlia need be no grape. An id that is not there means no. What
//! `/grapevine/names/1.0.0` and `/grapevine/registry/1.0.0` tell is asked over streams of calls.
//!
//! # Names
//!
//! A name has 1 to 255 bytes in Unicode's normal form C. It has no control character (general category
//! Cc), no white space (White_Space), no format character (Cf, with the bidi controls) and nothing else
//! that draws nothing (Default_Ignorable_Code_Point, with the zero-width characters). It does not begin
//! with `grapevine/`, which the protocol keeps for itself.
//!
//! Its key in Kademlia is the sha2-256 multihash of its bytes: `12 20` and the 32 bytes of the digest.
//!
//! ```
//! # fn hex(bytes: &[u8]) -> String { bytes.iter().map(|byte| format!("{byte:02x}")).collect() }
//! let name: grapevine::name::ServiceName = "client1".parse()?;
//! assert_eq!(hex(&name.key()), "12201917e33407c28366c8e3b975b17e7374589312676b90229adb4ce6e58552e223");
//! # Ok::<(), grapevine::name::NameError>(())
//! ```
//!
//! What Kademlia or a grape answers is a claim of whoever answered. A provider is believed when it has
//! been dialled, has proved its peer id, and says that it [serves the name](#the-serves-question).
//!
//! # Leases
//!
//! A grape keeps what is announced for a lease: 90 seconds, or fewer where its operator says so. Who
//! announces by requests on [names](#names-at-grapes) renews after a third of it.
//!
//! Who announces by Kademlia or rendezvous may renew as late as those have it. When half of a lease or
//! less is left, the grape asks the provider whether it [serves the name](#the-serves-question), of a
//! name that it does not know with the payload `keep-alive`: over the connection that stands, or by a dial
//! to one of the announced addresses at the host that the announcement came from. A provider that
//! answers, with an error or without, has another lease; one that answers 0 for a name that was asked of
//! is forgotten for that name; one that does not answer is asked again, and gone when its lease ends. So it
//! goes on for 48 hours after an announcement by Kademlia, and for the TTL that a registration has asked
//! for. A grape that is restarted has forgotten all: have more than one, or announce more often.
//!
//! # Frames and calls
//!
//! A stream of `/grapevine/rpc/1.0.0` carries frames: the length of the content as an unsigned varint
//! (LEB128, as in multiformats), then the content, one CBOR map (RFC 8949). The side that opened the
//! stream sends requests, the other side replies. A client sends one request and closes its side, or, to
//! a node that tells `/grapevine/rpc/kept/1.0.0`, opens the stream under that id and sends many; replies
//! carry the id of their request and may come in any order.
//!
//! A node has at most 31 streams with single requests open to another one, and of the rendezvous
//! protocol as many: there are implementations that take 32 of one protocol on a connection and reset
//! the next. So close your side when the other has closed its own and the last reply has left: until then
//! the stream counts. Further requests wait their turn, or go over a stream that is kept. A grape or peer of
//! this project accepts 160 on a connection.
//!
//! | map | keys |
//! | --- | --- |
//! | request | `{"id": uint, "service": text, "payload": bytes}` |
//! | reply | `{"id": uint, "ok": bytes}` or `{"id": uint, "error": {"code": text, "message": text}}` |
//!
//! `id` is any 64-bit unsigned number that is not in use on that stream; leave 0 out, because it also
//! answers a frame whose id could not be read. `service` is a name or a service of the protocol's own.
//! All keys of a map are required, each once, and no others are allowed; their order is free. Nothing may
//! follow the map in its frame. Write the shortest form of everything; semantic tags, indefinite lengths
//! and longer integers are read as what they contain.
//!
//! "hello" to the service `client1`, and the answer of an echo peer, lengths included:
//!
//! ```
//! use grapevine::proto::wire::{Reply, ReplyRef, RequestRef};
//!
//! let request = "
//!     23                            # 35 bytes follow
//!     a3                            # a map of 3
//!        62 6964                    # \"id\"
//!        01                         # 1
//!        67 73657276696365          # \"service\"
//!        67 636c69656e7431          # \"client1\"
//!        67 7061796c6f6164          # \"payload\"
//!        45 68656c6c6f              # 5 bytes: hello
//! ";
//! let reply = "
//!     14                            # 20 bytes follow
//!     a2                            # a map of 2
//!        62 6964                    # \"id\"
//!        01                         # 1
//!        62 6f6b                    # \"ok\"
//!        4b 4563686f3a2068656c6c6f  # 11 bytes: Echo: hello
//! ";
//! # fn bytes(dump: &str) -> Vec<u8> {
//! #     let digits: String = dump.lines().filter_map(|line| line.split('#').next()).collect();
//! #     let digits: Vec<u32> = digits.chars().filter_map(|c| c.to_digit(16)).collect();
//! #     digits.chunks(2).map(|pair| (pair[0] * 16 + pair[1]) as u8).collect()
//! # }
//! # fn frame(content: Vec<u8>) -> Vec<u8> { [vec![content.len() as u8], content].concat() }
//! let sent = RequestRef { id: 1, service: "client1", payload: b"hello" };
//! let answer = ReplyRef { id: 1, outcome: Ok(b"Echo: hello") };
//! assert_eq!(frame(sent.encode()?), bytes(request));
//! assert_eq!(frame(answer.encode()?), bytes(reply));
//! # Ok::<(), grapevine::proto::wire::EncodeError>(())
//! ```
//!
//! # Errors
//!
//! | code | means | was it executed? |
//! | --- | --- | --- |
//! | `unknown-service` | the node does not serve that name | no |
//! | `busy` | too much to do now; try later or elsewhere | no |
//! | `too-large` | the request, or the reply to it, is over a limit | perhaps |
//! | `bad-request` | the frame was not a request; id 0 where it had none to be read | no |
//! | `handler-failed` | the service took the request and gave no answer | perhaps |
//! | `shutting-down` | the node is leaving | no |
//!
//! Other codes may be added: treat an unknown one as final, and as perhaps executed. `message` is for
//! people and may be empty; it was written by a stranger, so make it safe before it reaches a terminal.
//!
//! # The serves question
//!
//! A request to the service `grapevine/serves` with a name as its payload asks whether the node serves
//! that name now. The reply's payload is one byte, 1 for yes or 0 for no. A node that answers
//! `unknown-service` does not know the question, and counts as serving the name.
//!
//! # Names at grapes
//!
//! A grape keeps, takes back and finds names by requests to the service `grapevine/names`, which
//! peers answer with `unknown-service`. What is said this way and what is said by Kademlia and
//! rendezvous goes into one table, so that each finds what came by the others. Where it is
//! answered, a node need not announce or register the same names in another way.
//!
//! | map | keys |
//! | --- | --- |
//! | payload of the request | `{"announce": [name], "record": bytes?, "legacy": bytes?, "withdraw": [name], "find": [name], "session": uint?}` |
//! | payload of the reply | `{"lease": uint, "refused": [uint], "found": [[provider]], "grapes": uint, "elsewhere": uint?}` |
//! | provider | `{"peer": bytes, "addresses": [bytes], "lease": uint}` |
//!
//! Names are taken back first, then announced, then looked up; any of the lists may be empty. They
//! are the sender's own: it announces itself and nobody else. `record` is its [signed peer
//! record](#signed-peer-records), there if and only if something is announced; the same bytes each time
//! save the grape the work of verifying them. `legacy` is the same record in the legacy form, beside a
//! `record` in the standard one: with it, rendezvous clients of Rust's libp2p find the sender too.
//!
//! `lease` says for how many milliseconds the grape keeps what was announced, and of a provider how
//! many are left; renew after a third. `refused` has the places, counted from 0, of the announced
//! names that it does not keep, because the sender or others hold too many or because they come too
//! fast: try them again later. `found` has a list for each name looked up, of providers: those
//! first that are connected to the grape, those last whose connection broke, and equals in turn if there
//! are more. A provider's `peer` is its id and its addresses are multiaddrs, both in
//! binary; one without an address is a grape that Kademlia knows. `grapes` is how many grapes
//! this one knows, itself included.
//!
//! `session` is any number that a node draws at random when it starts: it tells nodes that have copies of
//! one key from each other. What is taken back under a session is what was announced under it, and a name
//! that another session of the sender's has announced as well stays, with the record that came with that.
//! Without a session a name that is taken back is gone. `elsewhere` is how many other sessions of the
//! sender's this grape has heard of since this one began and within 15 seconds; without it, none. A message
//! without any name tells a grape that a session is there; this program sends one to its bootstrap grapes
//! after 10 seconds without another one.
//!
//! Which grapes are responsible for a name, Kademlia says: those closest to its key, 20 at most. So
//! in a network of fewer than 20 each one keeps every name, and who knows well fewer (this program: 16)
//! need not ask Kademlia for a name that is found. How many there are, each node may see differently:
//! before it takes a name for one that nobody announces it asks Kademlia.
//!
//! # Signed peer records
//!
//! What a peer says of its addresses, in a message on names and in a registration by rendezvous, is
//! signed by it: libp2p's `PeerRecord` (RFC 0003) in an `Envelope` (RFC 0002), both protobuf.
//!
//! | message | fields |
//! | --- | --- |
//! | `PeerRecord` | 1: `bytes` the peer's id; 2: `uint64` a number that grows with each new record, such as the time; 3, repeated: a message with field 1: `bytes` an address without the peer's id behind it |
//! | `Envelope` | 1: the public key, a message (1: `enum` its kind, 1 is Ed25519; 2: `bytes` the key); 2: `bytes` the payload type; 3: `bytes` the payload, which is the `PeerRecord`; 5: `bytes` the signature |
//!
//! What is signed is the domain, the payload type and the payload, each with its length before it as an
//! unsigned varint. There are two forms of the envelope, told apart by the payload type:
//!
//! | form | domain | payload type |
//! | --- | --- | --- |
//! | standard: as go, js and py sign | `libp2p-peer-record` | the bytes `03 01` |
//! | legacy: as Rust's libp2p signs | `libp2p-routing-state` | the text `/libp2p/routing-state-record` |
//!
//! Sign the standard one. A grape takes either, from the peer whose key has signed it and whose id is in
//! it. Where a rendezvous point does not take the standard form, a node registers with the legacy one.
//!
//! A grape answers a discovery with records of one form, because a client that cannot read one of
//! them drops the answer: the form in which the asker has registered itself, otherwise that of the
//! signed record in its own identify message, as js, go and py send one, and the legacy form if it
//! sends none. A provider whose record is not held in that form is left out; by Kademlia and by a
//! message on names it is found.
//!
//! # Payloads of peers
//!
//! A payload is the service's own business. The programs `peer` and `chat` use two kinds, told apart by
//! the first byte: that of a CBOR map, `a0` to `bf`, begins no UTF-8 text.
//!
//! | kind | payload of the request | payload of the reply |
//! | --- | --- | --- |
//! | echo | any UTF-8 text | the text `Echo: ` and that text; where a person reads it, an empty text |
//! | chat | `{"id": bytes(16), "from": text, "text": text, "sent_at": uint}` | `{"id": bytes(16), "reply": text?}` |
//!
//! `id` is random, the same whenever the same message is sent again, and comes back in the reply. `from`
//! is the name the sender goes by, which proves nothing; `sent_at` is in milliseconds since 1970. `reply`
//! is an answer given on the spot, and absent (or null) where there is none. Unknown keys are skipped, so
//! that fields can be added; known ones occur once.
//!
//! A reply says that the text was shown, or is kept where it will be read; where that fails the request is
//! answered with `handler-failed`. Who gets a receipt with the id of another message has none.
//!
//! # The registry of grapes
//!
//! *Workers* are programs that speak Grenache's protocols and no libp2p; they announce themselves to a
//! grape by HTTP. Grapes tell each other of theirs by requests to the service `grapevine/registry`,
//! which peers answer with `unknown-service`. To everybody else a grape is a provider of its workers'
//! names: it says so in answers of Kademlia, to the serves question, and carries the requests.
//!
//! | map | keys |
//! | --- | --- |
//! | payload of the request | `{"changes": [change], "find": [key]}` |
//! | change | `{"key": key, "at": address, "lease": uint}`; without `lease` the worker is gone |
//! | payload of the reply | `{"refused": uint, "found": [[address]]}` |
//!
//! A key is the 34 bytes that a name has in Kademlia; here any text may be a name. An address is the 4 or
//! 16 bytes of an IP address and the 2 of a port, in network order; a loopback address means the host
//! that the sender's connection comes from. `lease` is in milliseconds. Changes are applied in order:
//! each replaces what the sender said of that worker before. `refused` counts those that found no room;
//! `found` has the sender's list of workers for each key asked for.
//!
//! A grape that knows fewer than 28 others tells each of them of all its workers. One that knows 20 or more
//! also sends ADD_PROVIDER for its workers' names, as a peer does for its own. Who has not been told of any
//! worker of a name, or knows 16 other grapes or more, looks the name up and asks its providers for their
//! workers. So two grapes need not agree on how many there are.
//!
//! A worker may be taken back at another grape than it announced itself at. That one asks those that name it, by
//! a request to the service `grapevine/withdraw`: a request to the registry with at most 64 changes, all
//! without `lease`, and nothing to find. They mean the receiver's own workers, and a loopback address the
//! sender's host. The reply's payload is one byte: 1 when they are gone and the other grapes have confirmed
//! it, 0 when none was announced there, 2 when some are left. A grape takes its worker back for a sender on the worker's
//! host, or on its own; for any other only if nobody listens at the worker's address.
//!
//! # Values
//!
//! A value is what BEP 44 puts into BitTorrent's DHT: a record of Kademlia's under the 20 bytes of its
//! target (the SHA-1 of the bencoded `v`, or of `k` and `salt`), which is the bencoded dictionary of `v`
//! and, of a mutable one, `k`, `seq`, `sig` and perhaps `salt`. Grapes keep what verifies, and a mutable
//! value instead of one with a lower `seq`, for two hours.
//!
//! # Limits
//!
//! | what | at most |
//! | --- | --- |
//! | payload of a request or a reply | 1,048,576 |
//! | content of a frame | 1,049,600 |
//! | `service` | 255 |
//! | error `code` | 64 |
//! | error `message` | 1,024 |
//! | chat `from` | 255 |
//! | chat `text` and `reply` | 65,536 |
//! | nesting of CBOR | 128 levels |
//! | names announced and names withdrawn in one request to a grape | 1,000 of each |
//! | names looked up in one request | 16 |
//! | sessions of one peer, and names of it that several may hold | 4, 2,000 |
//! | `record`, `legacy`, and the record in a registration | 4,096; of its addresses 16 are read |
//! | providers of one name in an answer | 64, and 61,440 bytes |
//! | addresses of a provider | 8, of 256 bytes |
//! | names that one peer announces | 2,000 a second, and 22,000 at once, and as many that it takes back; a grape keeps 20,000 of it |
//! | names that one peer looks up | 10,000 a second |
//! | changes in one request to the registry | 1,000 |
//! | keys asked for in one request to the registry | 16, all different |
//! | changes that one grape tells | 20,000 a second, and 220,000 at once |
//! | keys that one grape asks for | 10,000 a second |
//! | workers of one service in an answer | 100 |
//! | `lease` of a worker | 3,600,000; more is cut |
//! | a value's `v` and `salt` | 999, 64 |

pub(crate) mod addresses;
pub(crate) mod announce;
pub(crate) mod bencode;
pub(crate) mod bep44;
pub(crate) mod bootstrap;
pub(crate) mod capabilities;
pub(crate) mod exploration;
#[doc(hidden)]
pub mod frame;
pub(crate) mod grapes;
pub(crate) mod lookup;
pub(crate) mod rate;
pub(crate) mod registrations;
pub(crate) mod rendezvous;
pub(crate) mod routes;
#[cfg(test)]
mod vectors;
pub mod wire;
