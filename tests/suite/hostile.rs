//! Strangers who mean harm, against nodes in processes of their own.
//!
//! Each scenario attacks a [`Victim`] while honest nodes announce, look up and call through it, and
//! then states three things: it is up, honest traffic went on during the attack and after it, and
//! its memory stayed under a ceiling. The ceilings are those of a debug build: what an idle node
//! takes ([`IDLE`]) and what the attack may make it hold, with room for the allocator.
//!
//! The scenarios take turns, so that the figures of one are not those of another.

// The figures are what one runs this for.
#![allow(clippy::print_stdout)]

mod victim;
mod wire;

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::stream::{FuturesUnordered, StreamExt};
use futures::{AsyncReadExt, AsyncWriteExt};
use grapevine::error::{LookupError, RequestError};
use grapevine::limits::{
    CONNECT_TIMEOUT, FRAME_DEADLINE, LOOKUP_DEADLINE, MAX_CANDIDATES, MAX_STREAMS,
};
use grapevine::proto::frame::read_frame;
use grapevine::proto::wire::{ErrorCode, MAX_FRAME, MAX_PAYLOAD, NamesReply, Reply};
use grapevine::{Multiaddr, Node, PeerId, RequestOptions, Role, ServiceName};
use libp2p::identity::Keypair;
use sha1::{Digest, Sha1};
use tokio::io::AsyncReadExt as _;
use tokio::sync::{Mutex, MutexGuard};
use tokio::task::JoinSet;
use tokio::time::timeout;

use victim::{Figures, Memory, Victim};
use wire::{ELSEWHERE, HOME, KAD, RENDEZVOUS, RPC, Stranger};

/// What an idle node takes, in MiB, with room for a few honest connections.
const IDLE: u64 = 48;

/// The frames of 1 MiB that never end.
const ENDLESS: usize = 240;

/// The records that one peer announces, and how many peers announce a tenth of that each.
const RECORDS: usize = 20_000;
const PEERS: usize = 50;

/// The values put that are what their key says and that are not, the registrations made, and how many
/// of those one peer has under way.
const TRUE_VALUES: usize = 50;
const FALSE_VALUES: usize = 12_000;
const REGISTRATIONS: usize = 6_000;
const UNDER_WAY: usize = 50;

/// The TCP connections that never speak, and those that stop after the encryption stands.
const HALF_OPEN: usize = 3_000;
const HALF_SECURED: usize = 1_000;

/// The requests at once, and how many of them the node serves at a time.
const REQUESTS: usize = 10_000;
const SERVED_AT_ONCE: usize = 100;

/// What requests that arrive may take: their budget of 64 MiB, a quarter of a MiB that yamux holds
/// unread of each stream, and room.
const ARRIVING: u64 = 64 + ENDLESS as u64 / 4 + 64;

/// What replies that nobody reads may take: their budget of 64 MiB, those that the loop has not judged
/// yet, and room.
const HELD: u64 = 64 + 128 + 64;

/// No scenario takes longer than this, however busy the machine.
const DEADLINE: Duration = Duration::from_secs(120);

/// One scenario at a time.
static TURN: Mutex<()> = Mutex::const_new(());

async fn in_turn<T>(scenario: impl Future<Output = T>) -> T {
    let _turn: MutexGuard<'_, ()> = TURN.lock().await;
    raise_open_files();
    timeout(DEADLINE, scenario)
        .await
        .expect("the scenario hangs")
}

/// As many open files as the system allows, for the victim too, which inherits it.
fn raise_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Then there are fewer connections.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// The program of the victim; passes at once when run as a test.
#[test]
fn victim_process() {
    victim::run_if_asked();
}

const ARGUMENTS: [&str; 3] = ["--exact", "hostile::victim_process", "--nocapture"];

fn victim_grape() -> Victim {
    Victim::grape(&ARGUMENTS)
}

/// A victim that is a peer, and an honest client of the same grape.
async fn victim_peer(requests: usize) -> (Victim, Node) {
    let grape = Node::builder(Role::Grape).listen([any_port()]);
    let grape = grape.spawn().await.unwrap();
    let address = grape.addresses()[0].clone();
    // The grape lives as long as the victim, which shows no announcement otherwise.
    tokio::spawn(async move { grape.status().wait_for(|_| false).await.is_ok() });
    let client = joined(&address).await;
    let victim = tokio::task::spawn_blocking(move || Victim::peer(&ARGUMENTS, &address, requests));
    (victim.await.unwrap(), client)
}

fn name(text: &str) -> ServiceName {
    text.parse().unwrap()
}

fn any_port() -> Multiaddr {
    "/ip4/127.0.0.1/tcp/0".parse().unwrap()
}

/// A node of our own that is connected to the grape.
async fn joined(grape: &Multiaddr) -> Node {
    let node = Node::builder(Role::Peer)
        .listen([any_port()])
        .bootstrap([grape.clone()]);
    let node = node.spawn().await.unwrap();
    // Not the first dial need succeed: a machine with thousands of sockets may be out of a port.
    let online = node
        .status()
        .wait_for(grapevine::Status::is_online)
        .await
        .is_ok();
    assert!(online, "the node stops");
    node
}

/// What honest nodes met.
#[derive(Default)]
struct Honest {
    rounds: usize,
    slowest: Duration,
}

impl Honest {
    fn add(&mut self, took: Duration) {
        self.rounds += 1;
        self.slowest = self.slowest.max(took);
    }
}

/// One node joins, announces and echoes; another one joins, looks it up and calls it.
async fn announce_and_call(grape: &Multiaddr) -> Duration {
    let started = Instant::now();
    let (server, client) = (joined(grape).await, joined(grape).await);
    let name = name(&format!("honest-{}", server.peer_id()));
    let service = server.announce(&name).await.unwrap();
    let echo = tokio::spawn(service.serve(|request| async move {
        let answer = format!("Echo: {}", request.text().unwrap());
        request.reply(answer);
    }));
    let live = client.lookup(&name).await.unwrap();
    assert_eq!(live[0].peer, server.peer_id());
    let reply = client.request(&name, "hello").await.unwrap();
    assert_eq!(reply.text().unwrap(), "Echo: hello");
    let took = started.elapsed();
    echo.abort();
    took
}

/// Looks the victim up and calls it.
async fn call(client: &Node) -> Duration {
    let started = Instant::now();
    let echo = name("echo");
    assert_eq!(client.lookup(&echo).await.map(|live| live.len()), Ok(1));
    let reply = client.request(&echo, "hello").await.unwrap();
    assert_eq!(reply.text().unwrap(), "Echo: hello");
    started.elapsed()
}

/// Runs the attack; meanwhile, and once after, honest nodes announce and call by the grape.
async fn during<T>(grape: &Multiaddr, attack: impl Future<Output = T>) -> (T, Honest) {
    let grape = grape.clone();
    alongside(attack, async move || announce_and_call(&grape).await).await
}

/// Runs the attack; meanwhile, and once after, the client calls the victim.
async fn during_calls<T>(client: &Node, attack: impl Future<Output = T>) -> (T, Honest) {
    let client = client.clone();
    alongside(attack, async move || call(&client).await).await
}

async fn alongside<T>(
    attack: impl Future<Output = T>,
    round: impl AsyncFn() -> Duration,
) -> (T, Honest) {
    let over = AtomicBool::new(false);
    let honest = async {
        let mut honest = Honest::default();
        loop {
            let last = over.load(Ordering::Acquire);
            honest.add(round().await);
            if last {
                return honest;
            }
        }
    };
    let attack = async {
        let result = attack.await;
        over.store(true, Ordering::Release);
        result
    };
    futures::join!(attack, honest)
}

fn report(what: &str, started: Instant, honest: &Honest, memory: Memory, ceiling: u64) {
    println!(
        "{what}: {:.1} s; honest rounds {}, slowest {} ms; memory {} MiB, peak {} MiB (ceiling {ceiling})",
        started.elapsed().as_secs_f64(),
        honest.rounds,
        honest.slowest.as_millis(),
        memory.now,
        memory.peak,
    );
    assert!(memory.peak <= ceiling, "{what}: {memory:?}");
}

/// Waits until the victim's figures, which it brings up to date once a second, are as expected.
async fn figures_when(victim: &mut Victim, is_expected: impl Fn(&Figures) -> bool) -> Figures {
    let started = Instant::now();
    loop {
        let figures = victim.figures();
        if is_expected(&figures) {
            return figures;
        }
        assert!(started.elapsed() < Duration::from_secs(20), "{figures:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Nobody's key: 34 bytes as those of a name.
fn key(of: usize, number: usize) -> [u8; 34] {
    let mut key = [0; 34];
    (key[0], key[1]) = (0x12, 0x20);
    key[2..10].copy_from_slice(&(of as u64).to_be_bytes());
    key[10..18].copy_from_slice(&(number as u64).to_be_bytes());
    key
}

fn anywhere() -> Multiaddr {
    "/ip4/127.0.0.1/tcp/4001".parse().unwrap()
}

mod frames {
    use super::*;
    use wire::{cbor_bytes, cbor_head, cbor_map, cbor_text, cbor_uint, prefixed, request, varint};

    enum Expected {
        Ok(&'static [u8]),
        Error(u64, ErrorCode),
        /// An answer on names without any.
        Empty,
        Closed,
    }

    use Expected::{Closed, Empty, Error, Ok as Answer};

    fn nested(depth: usize, opening: u8) -> Vec<u8> {
        let mut frame = cbor_head(5, 3);
        frame.extend([cbor_text("id"), cbor_uint(7), cbor_text("service")].concat());
        frame.extend(vec![opening; depth]);
        frame
    }

    fn indefinite() -> Vec<u8> {
        let payload = [
            vec![0x5f],
            cbor_bytes(b"he"),
            cbor_bytes(b"llo"),
            vec![0xff],
        ];
        let entries = [
            cbor_text("id"),
            cbor_uint(7),
            cbor_text("service"),
            cbor_text("echo"),
            cbor_text("payload"),
            payload.concat(),
        ];
        [vec![0xbf], entries.concat(), vec![0xff]].concat()
    }

    fn table() -> Vec<(&'static str, Vec<u8>, Expected)> {
        use ErrorCode::{BadRequest, TooLarge, UnknownService};
        let hello = || request(7, "echo", b"hello");
        let id = || ("id", cbor_uint(7));
        let service = || ("service", cbor_text("echo"));
        let payload = || ("payload", cbor_bytes(b"hello"));
        let of = |entries: &[(&str, Vec<u8>)]| prefixed(&cbor_map(entries));
        let another = wire::envelope(&Keypair::generate_ed25519(), vec![anywhere()]);
        let reserved = |payload: &[u8]| prefixed(&request(7, "grapevine/serves", payload));
        vec![
            ("a request", prefixed(&hello()), Answer(b"Echo: hello")),
            (
                "indefinite lengths",
                prefixed(&indefinite()),
                Answer(b"Echo: hello"),
            ),
            ("nothing", vec![], Closed),
            ("an empty frame", vec![0], Error(0, BadRequest)),
            (
                "one over the limit",
                varint(MAX_FRAME as u64 + 1),
                Error(0, TooLarge),
            ),
            (
                "the largest length",
                [vec![0xff; 8], vec![0x7f]].concat(),
                Error(0, TooLarge),
            ),
            ("a length of ten bytes", vec![0xff; 10], Closed),
            ("half a length", vec![0x80], Closed),
            (
                "a length with a zero at its end",
                [vec![0xa1, 0x00], hello()].concat(),
                Closed,
            ),
            (
                "one byte too few",
                prefixed(&hello())[..hello().len()].to_vec(),
                Closed,
            ),
            (
                "a byte after the map",
                prefixed(&[hello(), vec![0]].concat()),
                Error(7, BadRequest),
            ),
            (
                "two maps in a frame",
                prefixed(&[hello(), hello()].concat()),
                Error(7, BadRequest),
            ),
            (
                "arrays 100,000 deep",
                prefixed(&nested(100_000, 0x81)),
                Error(7, BadRequest),
            ),
            (
                "maps 100,000 deep",
                prefixed(&nested(100_000, 0xa1)),
                Error(7, BadRequest),
            ),
            (
                "tags 100,000 deep",
                prefixed(&nested(100_000, 0xc1)),
                Error(7, BadRequest),
            ),
            (
                "strings 100,000 deep",
                prefixed(&nested(100_000, 0x7f)),
                Error(7, BadRequest),
            ),
            (
                "nothing but arrays",
                prefixed(&vec![0x81; 1_000_000]),
                Error(0, BadRequest),
            ),
            (
                "an unknown key",
                of(&[id(), service(), payload(), ("more", cbor_uint(1))]),
                Error(7, BadRequest),
            ),
            (
                "a key twice",
                of(&[id(), id(), service(), payload()]),
                Error(7, BadRequest),
            ),
            ("no payload", of(&[id(), service()]), Error(7, BadRequest)),
            ("no id", of(&[service(), payload()]), Error(0, BadRequest)),
            (
                "an id of text",
                of(&[("id", cbor_text("7")), service(), payload()]),
                Error(0, BadRequest),
            ),
            (
                "an id below zero",
                of(&[("id", vec![0x26]), service(), payload()]),
                Error(0, BadRequest),
            ),
            (
                "a service of bytes",
                of(&[id(), ("service", cbor_bytes(b"echo")), payload()]),
                Error(7, BadRequest),
            ),
            (
                "a payload of text",
                of(&[id(), service(), ("payload", cbor_text("hello"))]),
                Error(7, BadRequest),
            ),
            (
                "a service that is not UTF-8",
                of(&[id(), ("service", vec![0x61, 0xff]), payload()]),
                Error(7, BadRequest),
            ),
            (
                "bytes that claim 4 GiB",
                prefixed(&[cbor_map(&[id()]), vec![0x5a, 0xff, 0xff, 0xff, 0xff]].concat()),
                Error(7, BadRequest),
            ),
            (
                "an array for a map",
                prefixed(&[vec![0x83], cbor_uint(7), cbor_text("echo"), cbor_bytes(b"")].concat()),
                Error(0, BadRequest),
            ),
            (
                "a payload over the limit",
                prefixed(&request(7, "echo", &vec![0; MAX_PAYLOAD + 1])),
                Error(7, TooLarge),
            ),
            (
                "a service over the limit",
                prefixed(&request(7, &"e".repeat(256), b"")),
                Error(7, TooLarge),
            ),
            (
                "a name that nobody serves",
                prefixed(&request(7, "nobody", b"")),
                Error(7, UnknownService),
            ),
            (
                "what cannot be a name",
                prefixed(&request(7, "a b", b"")),
                Error(7, UnknownService),
            ),
            (
                "an unknown reserved name",
                prefixed(&request(7, "grapevine/other", b"")),
                Error(7, UnknownService),
            ),
            ("names and nothing", wire::names(&[], None, &[]), Empty),
            (
                "names without a payload",
                prefixed(&request(7, "grapevine/names", b"")),
                Error(7, BadRequest),
            ),
            (
                "a name that none can have",
                wire::names(&[], None, &["a b".into()]),
                Error(7, BadRequest),
            ),
            (
                "announced without a record",
                wire::names(&["a".into()], None, &[]),
                Error(7, BadRequest),
            ),
            (
                "announced with another's record",
                wire::names(&["a".into()], Some(&another), &[]),
                Error(7, BadRequest),
            ),
            (
                "announced with what is no record",
                wire::names(&["a".into()], Some(&[0; 4_096]), &[]),
                Error(7, BadRequest),
            ),
            (
                "a record over the limit",
                wire::names(&["a".into()], Some(&[0; 4_097]), &[]),
                Error(7, TooLarge),
            ),
            (
                "more names than the limit",
                wire::names(&vec!["a".into(); 1_001], Some(&another), &[]),
                Error(7, TooLarge),
            ),
            (
                "more names looked up than the limit",
                wire::names(&[], None, &vec!["a".into(); 17]),
                Error(7, TooLarge),
            ),
            ("serves it echo?", reserved(b"echo"), Answer(&[1])),
            ("serves it nobody?", reserved(b"nobody"), Answer(&[0])),
            (
                "serves it what is no name?",
                reserved(&[0xff]),
                Error(7, BadRequest),
            ),
        ]
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_frame_that_is_wrong_gets_the_right_answer() {
        in_turn(async {
            let (started, ceiling) = (Instant::now(), IDLE);
            let mut victim = victim_grape();
            let stranger = Stranger::connect(victim.address()).await.unwrap();
            let table = table();
            for (what, bytes, expected) in &table {
                let answer = stranger.exchange(RPC, bytes).await;
                check(what, answer, expected);
            }
            let (_, honest) = during(victim.address(), async {
                for _ in 0..20 {
                    let all = table
                        .iter()
                        .map(|(_, bytes, _)| stranger.exchange(RPC, bytes));
                    all.collect::<FuturesUnordered<_>>().count().await;
                }
            })
            .await;
            assert!(victim.is_up());
            report("wrong frames", started, &honest, victim.memory(), ceiling);
        })
        .await;
    }

    fn check(what: &str, answer: io::Result<Vec<u8>>, expected: &Expected) {
        if matches!(expected, Closed) {
            assert_eq!(answer.unwrap_or_default(), b"", "{what}");
            return;
        }
        let answer = answer.unwrap_or_else(|error| panic!("{what}: {error}"));
        let head = answer.iter().take_while(|byte| **byte >= 0x80).count() + 1;
        assert!(answer.len() >= head, "{what}: no answer");
        let reply = Reply::decode(&answer[head..]).unwrap_or_else(|e| panic!("{what}: {e}"));
        match expected {
            Answer(payload) => assert_eq!((reply.id, reply.outcome), (7, Ok(payload.to_vec()))),
            Error(id, code) => {
                let error = reply.outcome.expect_err(what);
                assert_eq!((reply.id, &error.code), (*id, code), "{what}: {error}");
            }
            Empty => {
                let reply = NamesReply::decode(&reply.outcome.unwrap()).unwrap();
                assert!(reply.found.is_empty() && reply.refused.is_empty(), "{what}");
            }
            Closed => {}
        }
    }
}

mod records {
    use super::*;

    /// Announces that many keys on one stream, and returns when the last has been taken in.
    async fn announce(stranger: &Stranger, of: usize, count: usize) {
        let peer = stranger.peer_id();
        let addresses = [anywhere()];
        let mut stream = stranger.start(KAD, &[]).await.unwrap();
        wire::accepted(&mut stream, KAD).await.unwrap();
        for batch in (0..count).collect::<Vec<_>>().chunks(100) {
            let messages = batch
                .iter()
                .flat_map(|number| wire::add_provider(&key(of, *number), &peer, &addresses));
            stream
                .write_all(&messages.collect::<Vec<_>>())
                .await
                .unwrap();
        }
        // Messages of a stream are handled in their order: the answer to this one comes last.
        stream
            .write_all(&wire::get_providers(&key(of, 0)))
            .await
            .unwrap();
        stream.flush().await.unwrap();
        stream.read_exact(&mut [0]).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn one_peer_cannot_fill_the_store() {
        in_turn(async {
            let (started, ceiling) = (Instant::now(), IDLE + 16);
            let mut victim = victim_grape();
            let stranger = Stranger::connect(victim.address()).await.unwrap();
            let attack = announce(&stranger, 0, RECORDS);
            let ((), honest) = during(victim.address(), attack).await;
            let figures = figures_when(&mut victim, |figures| figures.stored > 4_000).await;
            println!("{RECORDS} records of one peer: {} kept", figures.stored);
            // What a tenth of the store holds, and the honest ones.
            assert!(figures.stored < 20_000 + 100, "{figures:?}");
            report(
                "one peer's records",
                started,
                &honest,
                victim.memory(),
                ceiling,
            );
        })
        .await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn many_peers_that_fill_the_store_leave_room_for_others() {
        in_turn(async {
            let (started, ceiling) = (Instant::now(), IDLE + 64);
            let mut victim = victim_grape();
            let address = victim.address().clone();
            let each = RECORDS / 10;
            let attack = async {
                let mut peers = JoinSet::new();
                for peer in 0..PEERS {
                    let stranger = Stranger::connect(&address).await.unwrap();
                    peers.spawn(async move {
                        announce(&stranger, peer, each).await;
                        stranger
                    });
                }
                peers.join_all().await
            };
            let (strangers, honest) = during(&address, attack).await;
            let all = (PEERS * each) as u64;
            // The honest names take the places of some.
            let most = all - all / 100;
            let figures = figures_when(&mut victim, |figures| figures.stored >= most).await;
            println!("{all} records of {PEERS} peers: {} kept", figures.stored);
            drop(strangers);
            report(
                "many peers' records",
                started,
                &honest,
                victim.memory(),
                ceiling,
            );
        })
        .await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn of_values_only_those_that_verify_are_kept() {
        in_turn(async {
            let (started, ceiling) = (Instant::now(), IDLE);
            let mut victim = victim_grape();
            let stranger = Stranger::connect(victim.address()).await.unwrap();
            let attack = async {
                let mut stream = stranger.start(KAD, &[]).await.unwrap();
                wire::accepted(&mut stream, KAD).await.unwrap();
                let (mut answers, mut stream) = stream.split();
                let write = async {
                    for number in 0..TRUE_VALUES {
                        let content = format!("4:{number:04}");
                        let value = format!("d1:v{content}e");
                        let message = wire::put_value(&Sha1::digest(content), value.as_bytes());
                        stream.write_all(&message).await.unwrap();
                    }
                    for number in 0..FALSE_VALUES {
                        let message = wire::put_value(&key(0, number), &[7; 1_024]);
                        stream.write_all(&message).await.unwrap();
                    }
                    stream.close().await.unwrap();
                };
                let read = async {
                    // It may hang up at any time, and does at the end.
                    let mut heard = vec![0; 65_536];
                    while answers.read(&mut heard).await.is_ok_and(|read| read > 0) {}
                };
                futures::join!(write, read);
            };
            let ((), honest) = during(victim.address(), attack).await;
            let all = TRUE_VALUES as u64;
            let figures = figures_when(&mut victim, |figures| figures.values >= all).await;
            println!(
                "{FALSE_VALUES} false values of 1 KiB: {} kept",
                figures.values - all
            );
            assert_eq!(figures.values, all);
            report("values", started, &honest, victim.memory(), ceiling);
        })
        .await;
    }

    /// Registers that often, [`UNDER_WAY`] at a time.
    async fn register(
        stranger: &Stranger,
        count: usize,
        namespace: impl Fn(usize) -> String,
    ) -> usize {
        let envelope = wire::envelope(&stranger.keypair, vec![anywhere()]);
        let registered = futures::stream::iter(0..count).map(|number| {
            let message = wire::register(&namespace(number), &envelope);
            async move { stranger.exchange(RENDEZVOUS, &message).await }
        });
        let answers = registered.buffer_unordered(UNDER_WAY);
        let answered = answers.filter(|answer| std::future::ready(answer.is_ok()));
        answered.count().await
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn registrations_without_end_take_one_place_for_each_name() {
        in_turn(async {
            let (started, ceiling) = (Instant::now(), IDLE + 16);
            let mut victim = victim_grape();
            let again = Stranger::connect(victim.address()).await.unwrap();
            let many = Stranger::connect(victim.address()).await.unwrap();
            let attack = async {
                futures::join!(
                    register(&again, REGISTRATIONS, |_| "again".into()),
                    register(&many, REGISTRATIONS, |number| format!("name-{number}")),
                )
            };
            let ((same, distinct), honest) = during(victim.address(), attack).await;
            assert_eq!((same, distinct), (REGISTRATIONS, REGISTRATIONS), "answered");
            let figures = figures_when(&mut victim, |figures| figures.stored > 4_000).await;
            println!(
                "{same} registrations of one name, {distinct} of as many: {} kept",
                figures.stored
            );
            assert!(figures.stored <= REGISTRATIONS as u64 + 100, "{figures:?}");
            report("registrations", started, &honest, victim.memory(), ceiling);
        })
        .await;
    }
}

mod names {
    use super::*;

    /// Names in one message: as many as may be.
    const BATCH: usize = 1_000;

    /// Announces that many distinct names on one stream, a batch after the other; returns how many
    /// the victim says that it keeps.
    async fn announce(stranger: &Stranger, of: usize, count: usize) -> usize {
        let record = wire::envelope(&stranger.keypair, vec![anywhere()]);
        let mut stream = stranger.start(RPC, &[]).await.unwrap();
        wire::accepted(&mut stream, RPC).await.unwrap();
        let mut kept = 0;
        for first in (0..count).step_by(BATCH) {
            let names = (first..first + BATCH).map(|number| format!("{of}-{number}"));
            let message = wire::names(&names.collect::<Vec<_>>(), Some(&record), &[]);
            stream.write_all(&message).await.unwrap();
            stream.flush().await.unwrap();
            kept += BATCH - answer(&mut stream).await.refused.len();
        }
        kept
    }

    async fn answer(stream: &mut (impl futures::AsyncRead + Unpin)) -> NamesReply {
        let frame = read_frame(stream, MAX_FRAME).await.unwrap();
        let reply = Reply::decode(&frame.unwrap()).unwrap();
        NamesReply::decode(&reply.outcome.unwrap()).unwrap()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn names_without_end_of_one_peer_stay_within_its_share() {
        in_turn(async {
            let (started, ceiling) = (Instant::now(), IDLE + 24);
            let mut victim = victim_grape();
            let stranger = Stranger::connect(victim.address()).await.unwrap();
            let attack = announce(&stranger, 0, 10 * RECORDS);
            let (kept, honest) = during(victim.address(), attack).await;
            assert_eq!(kept, RECORDS);
            let expected = RECORDS as u64;
            let figures = figures_when(&mut victim, |figures| figures.stored >= expected).await;
            println!("{} names of one peer: {kept} kept", 10 * RECORDS);
            assert!(figures.stored < expected + 100, "{figures:?}");
            report(
                "one peer's names",
                started,
                &honest,
                victim.memory(),
                ceiling,
            );
        })
        .await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn names_without_end_of_many_peers_stay_within_their_networks_share() {
        in_turn(async {
            let (started, ceiling) = (Instant::now(), IDLE + 96);
            let mut victim = victim_grape();
            let address = victim.address().clone();
            let attack = async {
                let mut peers = JoinSet::new();
                for peer in 0..PEERS {
                    let stranger = Stranger::connect(&address).await.unwrap();
                    peers.spawn(async move {
                        announce(&stranger, peer, RECORDS / 2).await;
                        stranger
                    });
                }
                peers.join_all().await
            };
            let (strangers, honest) = during(&address, attack).await;
            // Of one address prefix, half the store; honest names have come and gone.
            let (half, most) = (100_000, 100_000 - 100);
            let figures = figures_when(&mut victim, |figures| figures.stored >= most).await;
            assert!(figures.stored <= half, "{figures:?}");
            drop(strangers);
            report(
                "many peers' names",
                started,
                &honest,
                victim.memory(),
                ceiling,
            );
        })
        .await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn answers_on_names_that_nobody_reads_take_a_bounded_room() {
        in_turn(async {
            // The room for replies, what yamux takes in of each connection, and what has arrived.
            let (started, ceiling) = (Instant::now(), IDLE + 64 + 96);
            let mut victim = victim_grape();
            let address = victim.address().clone();
            let long: Multiaddr = format!("/dns4/{}/tcp/1", "a".repeat(240)).parse().unwrap();
            let attack = async {
                let mut strangers = Vec::new();
                for _ in 0..40 {
                    let stranger = Stranger::connect(&address).await.unwrap();
                    let record = wire::envelope(&stranger.keypair, vec![long.clone(); 8]);
                    let message = wire::names(&["long".into()], Some(&record), &[]);
                    let answer = stranger.exchange(RPC, &message).await.unwrap();
                    assert!(!answer.is_empty());
                    strangers.push(stranger);
                }
                // Each of these gets 16 times 60 KB.
                let message = wire::names(&[], None, &vec!["long".into(); 16]);
                let mut unread = Vec::new();
                for stranger in &strangers {
                    for _ in 0..10 {
                        unread.push(stranger.start(RPC, &message.repeat(3)).await.unwrap());
                    }
                }
                let held = figures_when(&mut victim, |figures| figures.open_requests > 0).await;
                figures_when(&mut victim, |figures| figures.open_requests == 0).await;
                held.open_requests
            };
            let (held, honest) = during(&address, attack).await;
            println!("answers that nobody reads: {held} held, then cut off");
            assert!(victim.is_up());
            report("unread answers", started, &honest, victim.memory(), ceiling);
        })
        .await;
    }
}

mod connections {
    use super::*;

    /// Waits until the victim has hung up on all of them.
    async fn hung_up(connections: JoinSet<()>) {
        let patience = 3 * CONNECT_TIMEOUT;
        timeout(patience, connections.join_all())
            .await
            .expect("the victim hangs up");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn half_open_connections_of_one_network_leave_places_for_others() {
        in_turn(async {
            let (started, ceiling) = (Instant::now(), IDLE + 32);
            let mut victim = victim_grape();
            let address = victim.address().clone();
            let attack = async {
                let mut silent = JoinSet::new();
                for _ in 0..HALF_OPEN {
                    let mut stream = wire::knock(ELSEWHERE, &address).await.unwrap();
                    silent.spawn(async move {
                        // What it says first is its half of the handshake.
                        while stream.read(&mut [0; 64]).await.is_ok_and(|read| read > 0) {}
                    });
                }
                hung_up(silent).await;
            };
            let ((), honest) = during(&address, attack).await;
            assert!(victim.is_up());
            let what = format!("{HALF_OPEN} silent connections");
            report(&what, started, &honest, victim.memory(), ceiling);
        })
        .await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn connections_that_stop_after_the_encryption_are_dropped() {
        in_turn(async {
            let (started, ceiling) = (Instant::now(), IDLE + 32);
            let mut victim = victim_grape();
            let address = victim.address().clone();
            let keypair = Keypair::generate_ed25519();
            let attack = async {
                let mut secured = JoinSet::new();
                let mut refused = 0;
                let handshakes = futures::stream::iter(0..HALF_SECURED)
                    .map(|_| wire::handshake(&keypair, ELSEWHERE, &address));
                let mut handshakes = std::pin::pin!(handshakes.buffer_unordered(UNDER_WAY));
                while let Some(handshake) = handshakes.next().await {
                    let Ok(mut stream) = handshake else {
                        refused += 1;
                        continue;
                    };
                    secured.spawn(async move {
                        while stream.read(&mut [0; 64]).await.is_ok_and(|read| read > 0) {}
                    });
                }
                hung_up(secured).await;
                refused
            };
            let (refused, honest) = during(&address, attack).await;
            assert!(victim.is_up());
            let what = format!("{HALF_SECURED} half-secured connections, {refused} refused");
            report(&what, started, &honest, victim.memory(), ceiling);
        })
        .await;
    }

    /// Connections of as many keys from that host.
    async fn strangers(count: usize, from: Ipv4Addr, address: &Multiaddr) -> Vec<Stranger> {
        let mut strangers = Vec::new();
        for _ in 0..count {
            let keypair = Keypair::generate_ed25519();
            strangers.push(Stranger::connect_as(keypair, from, address).await.unwrap());
        }
        strangers
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn streams_that_never_say_what_they_want_stop_nobody_else() {
        in_turn(async {
            let (started, ceiling) = (Instant::now(), IDLE + 48);
            let mut victim = victim_grape();
            let address = victim.address().clone();
            let attack = async {
                let strangers = strangers(20, HOME, &address).await;
                let mut streams = Vec::new();
                for stranger in &strangers {
                    // One is taken by what the victim itself opens.
                    let opened = (0..MAX_STREAMS - 8).map(|_| async {
                        let mut stream = stranger.open().await?;
                        stream.write_all(&wire::multistream_hello()).await?;
                        stream.flush().await?;
                        io::Result::Ok(stream)
                    });
                    let opened = opened.collect::<FuturesUnordered<_>>();
                    // The victim takes a few hundred and leaves the others waiting.
                    let soon = timeout(Duration::from_millis(250), opened.collect::<Vec<_>>());
                    streams.extend(soon.await.into_iter().flatten().flatten());
                }
                (strangers, streams)
            };
            let ((strangers, streams), honest) = during(&address, attack).await;
            assert!(victim.is_up());
            let what = format!(
                "{} streams of {} connections",
                streams.len(),
                strangers.len()
            );
            report(&what, started, &honest, victim.memory(), ceiling);
        })
        .await;
    }
}

mod requests {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn frames_that_never_end_take_no_more_than_the_budget() {
        in_turn(async {
            let (started, ceiling) = (Instant::now(), IDLE + ARRIVING);
            let (mut victim, client) = victim_peer(1_024).await;
            let payload = vec![0; MAX_PAYLOAD];
            let whole: Arc<[u8]> = wire::prefixed(&wire::request(1, "echo", &payload)).into();
            let attack = async {
                let (mut endless, mut ended) = (JoinSet::new(), JoinSet::new());
                for _ in 0..4 {
                    let stranger = Arc::new(Stranger::connect(victim.address()).await.unwrap());
                    for _ in 0..ENDLESS / 4 {
                        let (stranger, whole) = (Arc::clone(&stranger), Arc::clone(&whole));
                        endless.spawn(async move {
                            let mut stream = stranger.start(RPC, &[]).await.unwrap();
                            // Cut off before or after what it sends, sooner or later.
                            let _ = stream.write_all(&whole[..whole.len() - 1]).await;
                            let _ = stream.flush().await;
                            let _ = stream.read_to_end(&mut Vec::new()).await;
                        });
                    }
                    for _ in 0..ENDLESS / 16 {
                        let (stranger, whole) = (Arc::clone(&stranger), Arc::clone(&whole));
                        ended.spawn(async move { stranger.exchange(RPC, &whole).await });
                    }
                }
                let answers = ended.join_all().await.into_iter();
                let served = answers.filter(|answer| {
                    let answer = answer.as_ref().unwrap();
                    // The echo of the largest payload is larger than a reply may be.
                    code(answer).is_some_and(|code| code != ErrorCode::Busy)
                });
                let served = served.count();
                endless.join_all().await;
                served
            };
            let (served, honest) = during_calls(&client, attack).await;
            println!(
                "{ENDLESS} frames of 1 MiB that lack a byte: cut off; \
                 {served} of {} whole ones among them served, the others busy",
                ENDLESS / 4,
            );
            assert!(victim.is_up());
            report("endless frames", started, &honest, victim.memory(), ceiling);
        })
        .await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn who_reads_or_writes_too_slowly_is_cut_off() {
        in_turn(async {
            let (started, ceiling) = (Instant::now(), IDLE + HELD);
            let (mut victim, client) = victim_peer(1_024).await;
            let address = victim.address().clone();
            let readers = async {
                let message = wire::prefixed(&wire::request(1, "mebibyte", b""));
                let mut strangers = Vec::new();
                let mut unread = Vec::new();
                for _ in 0..4 {
                    let stranger = Stranger::connect(&address).await.unwrap();
                    for _ in 0..200 {
                        unread.push(stranger.start(RPC, &message).await.unwrap());
                    }
                    strangers.push(stranger);
                }
                let held = figures_when(&mut victim, |figures| figures.open_requests > 0).await;
                figures_when(&mut victim, |figures| figures.open_requests == 0).await;
                (held.open_requests, unread.len())
            };
            let writer = async {
                let stranger = Stranger::connect(&address).await.unwrap();
                let mut stream = stranger.start(RPC, &[]).await.unwrap();
                wire::accepted(&mut stream, RPC).await.unwrap();
                let began = Instant::now();
                let (mut answer, mut stream) = stream.split();
                let write = async {
                    for byte in wire::prefixed(&wire::request(1, "echo", &[0; 1_000])) {
                        if stream.write_all(&[byte]).await.is_err() || stream.flush().await.is_err()
                        {
                            return;
                        }
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                };
                let mut byte = [0];
                let cut_off = answer.read(&mut byte);
                futures::future::select(std::pin::pin!(write), cut_off).await;
                began.elapsed()
            };
            let attack = async { futures::join!(readers, writer) };
            let (((held, unread), cut_off), honest) = during_calls(&client, attack).await;
            println!(
                "{unread} replies of 1 MiB that nobody reads: {held} held, then cut off; \
                 a byte each 100 ms: cut off after {:.1} s",
                cut_off.as_secs_f64()
            );
            assert!(
                cut_off < FRAME_DEADLINE + Duration::from_secs(5),
                "{cut_off:?}"
            );
            assert!(victim.is_up());
            report("slow readers", started, &honest, victim.memory(), ceiling);
        })
        .await;
    }

    /// What a reply says went wrong.
    fn code(answer: &[u8]) -> Option<ErrorCode> {
        let head = answer.iter().take_while(|byte| **byte >= 0x80).count() + 1;
        let reply = Reply::decode(&answer[head..]).unwrap();
        reply.outcome.err().map(|error| error.code)
    }

    fn is_ok(answer: &[u8]) -> bool {
        let code = code(answer);
        assert!(matches!(code, None | Some(ErrorCode::Busy)), "{code:?}");
        code.is_none()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn ten_thousand_requests_at_once_are_all_answered() {
        in_turn(async {
            let (started, ceiling) = (Instant::now(), IDLE + 128);
            let (mut victim, client) = victim_peer(SERVED_AT_ONCE).await;
            let address = victim.address().clone();
            let attack = async {
                let message: Arc<[u8]> = wire::prefixed(&wire::request(1, "works", b"")).into();
                let mut strangers = Vec::new();
                // Each opens a stream for each request, well below the limit of a connection.
                for _ in 0..REQUESTS / 100 {
                    let stranger = Stranger::connect(&address).await.unwrap();
                    strangers.push(Arc::new(stranger));
                }
                let mut answers = JoinSet::new();
                for number in 0..REQUESTS {
                    let stranger = Arc::clone(&strangers[number % strangers.len()]);
                    let message = Arc::clone(&message);
                    answers.spawn(async move { stranger.exchange(RPC, &message).await });
                }
                let answers = answers.join_all().await;
                let answers = answers.into_iter().map(|answer| answer.unwrap());
                answers.filter(|answer| is_ok(answer)).count()
            };
            // The honest client's first call may be told busy, as everybody's.
            let (done, honest) = alongside(attack, async || call_until_served(&client).await).await;
            println!(
                "{REQUESTS} requests at once: {done} served, {} busy",
                REQUESTS - done
            );
            assert!(done >= SERVED_AT_ONCE, "{done}");
            assert!(victim.is_up());
            report(
                "requests at once",
                started,
                &honest,
                victim.memory(),
                ceiling,
            );
        })
        .await;
    }

    async fn call_until_served(client: &Node) -> Duration {
        let started = Instant::now();
        loop {
            match client.request(&name("echo"), "hello").await {
                Ok(_) => return started.elapsed(),
                Err(RequestError::Busy(_)) => tokio::task::yield_now().await,
                Err(error) => panic!("{error}"),
            }
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn one_client_has_every_request_answered_and_not_every_place() {
        in_turn(async {
            let (_victim, client) = victim_peer(SERVED_AT_ONCE).await;
            let options = RequestOptions {
                deadline: DEADLINE,
                ..Default::default()
            };
            let works = name("works");
            let calls = (0..REQUESTS / 5).map(|_| client.request_with(&works, "", options.clone()));
            let replies: Vec<_> = calls.collect::<FuturesUnordered<_>>().collect().await;
            let (mut served, mut busy) = (0, 0);
            for reply in replies {
                match reply {
                    Ok(reply) => {
                        assert_eq!(reply.payload, b"done");
                        served += 1;
                    }
                    Err(RequestError::Busy(_)) => busy += 1,
                    Err(error) => panic!("{error}"),
                }
            }
            println!("one client: {served} served, {busy} busy");
            assert!(served >= SERVED_AT_ONCE / 2, "{served} served, {busy} busy");
        })
        .await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_handler_that_is_slow_or_breaks_delays_nobody() {
        in_turn(async {
            let (mut victim, client) = victim_peer(SERVED_AT_ONCE).await;
            let gate = name("gate");
            let mut slow = std::pin::pin!(client.request(&gate, ""));
            let others = async {
                for service in ["panics", "drops"] {
                    match client.request(&name(service), "").await {
                        Err(RequestError::Remote { error, .. }) => {
                            assert_eq!(error.code, ErrorCode::HandlerFailed);
                        }
                        other => panic!("{service}: {other:?}"),
                    }
                }
                for _ in 0..100 {
                    client.request(&name("echo"), "hello").await.unwrap();
                }
            };
            tokio::select! {
                biased;
                reply = &mut slow => panic!("nobody has released it: {reply:?}"),
                () = others => {}
            }
            client.request(&name("release"), "").await.unwrap();
            assert_eq!(slow.await.unwrap().payload, b"released");
            assert!(victim.is_up());
        })
        .await;
    }
}

/// Grapes and providers that lie to a client, which is the victim here.
mod liars {
    use super::*;
    use libp2p::request_response::{self, Message, ProtocolSupport};
    use libp2p::swarm::{NetworkBehaviour, SwarmEvent};
    use libp2p::{StreamProtocol, SwarmBuilder, identify, noise, tcp, yamux};

    /// The providers that fit into an answer of Kademlia's.
    const MADE_UP: usize = 260;

    /// Answers every question of a protocol with the same bytes.
    #[derive(Clone)]
    struct Parrot {
        kad: Arc<[u8]>,
        rendezvous: Arc<[u8]>,
    }

    impl request_response::Codec for Parrot {
        type Protocol = StreamProtocol;
        type Request = Vec<u8>;
        type Response = ();

        async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Vec<u8>>
        where
            T: futures::AsyncRead + Unpin + Send,
        {
            let mut some = vec![0; 4_096];
            let read = io.read(&mut some).await?;
            some.truncate(read);
            Ok(some)
        }

        async fn read_response<T>(&mut self, _: &StreamProtocol, _: &mut T) -> io::Result<()>
        where
            T: futures::AsyncRead + Unpin + Send,
        {
            Ok(())
        }

        async fn write_request<T>(
            &mut self,
            _: &StreamProtocol,
            _: &mut T,
            _: Vec<u8>,
        ) -> io::Result<()>
        where
            T: futures::AsyncWrite + Unpin + Send,
        {
            Ok(())
        }

        async fn write_response<T>(
            &mut self,
            protocol: &StreamProtocol,
            io: &mut T,
            (): (),
        ) -> io::Result<()>
        where
            T: futures::AsyncWrite + Unpin + Send,
        {
            let answer = match protocol.as_ref() {
                KAD => &self.kad,
                _ => &self.rendezvous,
            };
            io.write_all(answer).await
        }
    }

    #[derive(NetworkBehaviour)]
    struct Liar {
        identify: identify::Behaviour,
        parrot: request_response::Behaviour<Parrot>,
    }

    /// A grape that answers everything with these; returns where it listens.
    async fn liar(keypair: Keypair, kad: Vec<u8>, rendezvous: Vec<u8>) -> Multiaddr {
        let parrot = Parrot {
            kad: kad.into(),
            rendezvous: rendezvous.into(),
        };
        let protocols = [KAD, RENDEZVOUS].map(|id| {
            let id = StreamProtocol::new(id);
            (id, ProtocolSupport::Inbound)
        });
        let mut swarm = SwarmBuilder::with_existing_identity(keypair)
            .with_tokio()
            .with_tcp(
                tcp::Config::default(),
                noise::Config::new,
                yamux::Config::default,
            )
            .unwrap()
            .with_behaviour(|keypair| Liar {
                identify: identify::Behaviour::new(identify::Config::new(
                    "/grapevine/1.0.0".into(),
                    keypair.public(),
                )),
                parrot: request_response::Behaviour::with_codec(
                    parrot,
                    protocols,
                    request_response::Config::default(),
                ),
            })
            .unwrap()
            .with_swarm_config(|config| config.with_idle_connection_timeout(DEADLINE))
            .build();
        swarm.listen_on(any_port()).unwrap();
        let address = loop {
            if let SwarmEvent::NewListenAddr { address, .. } = swarm.select_next_some().await {
                break address;
            }
        };
        tokio::spawn(async move {
            loop {
                let event = swarm.select_next_some().await;
                if let SwarmEvent::Behaviour(LiarEvent::Parrot(
                    request_response::Event::Message {
                        message: Message::Request { channel, .. },
                        ..
                    },
                )) = event
                {
                    let _ = swarm.behaviour_mut().parrot.send_response(channel, ());
                }
            }
        });
        address
    }

    /// Somebody who has nothing to do with it; counts who connects, and says nothing.
    async fn bystander() -> (Multiaddr, Arc<AtomicUsize>) {
        let listener = tokio::net::TcpListener::bind((HOME, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let dialled = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&dialled);
        tokio::spawn(async move {
            while listener.accept().await.is_ok() {
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        let address = format!("/ip4/127.0.0.1/tcp/{port}").parse().unwrap();
        (address, dialled)
    }

    fn nobody(count: usize) -> Vec<PeerId> {
        (0..count).map(|_| PeerId::random()).collect()
    }

    /// Answers that name made-up peers at this address: 300 by Kademlia, a full page by rendezvous.
    fn lies(address: &Multiaddr) -> (Vec<u8>, Vec<u8>) {
        let addresses = [address.clone()];
        let peers: Vec<_> = nobody(MADE_UP)
            .iter()
            .map(|peer| wire::kad_peer(peer, &addresses))
            .collect();
        // As many addresses as fit into 4 KiB.
        let envelopes: Vec<_> = (0..60)
            .map(|_| wire::envelope(&Keypair::generate_ed25519(), vec![address.clone(); 250]))
            .collect();
        let kad = wire::providers(&peers);
        let rendezvous = wire::discovered("client1", &envelopes);
        assert!(kad.len() <= 16 * 1_024 && rendezvous.len() <= 256 * 1_024);
        (kad, rendezvous)
    }

    async fn client(bootstrap: impl IntoIterator<Item = Multiaddr>) -> Node {
        let client = Node::builder(Role::Peer).bootstrap(bootstrap);
        client.spawn().await.unwrap()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn made_up_providers_end_the_lookup_in_time_and_flood_no_bystander() {
        in_turn(async {
            let (address, dialled) = bystander().await;
            let (kad, rendezvous) = lies(&address);
            let liar = liar(Keypair::generate_ed25519(), kad, rendezvous).await;
            let client = client([liar]).await;
            let started = Instant::now();
            let error = client.lookup(&name("client1")).await.unwrap_err();
            let (took, dialled) = (started.elapsed(), dialled.load(Ordering::Relaxed));
            println!("310 made-up providers: {error}; {dialled} dials, {took:.1?}");
            assert!(matches!(error, LookupError::Unreachable { .. }), "{error}");
            assert!(took < LOOKUP_DEADLINE + Duration::from_secs(2), "{took:?}");
            // Kademlia itself walks on through all that one answer names; nobody is dialled twice for
            // it, and of the candidates that come on top each may be once.
            assert!(dialled <= MADE_UP + MAX_CANDIDATES, "{dialled}");
        })
        .await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn made_up_providers_do_not_hide_the_live_one() {
        in_turn(async {
            let (address, _) = bystander().await;
            let (kad, rendezvous) = lies(&address);
            let liar = liar(Keypair::generate_ed25519(), kad, rendezvous).await;
            let grape = Node::builder(Role::Grape).listen([any_port()]);
            let grape = grape.spawn().await.unwrap();
            let honest = grape.addresses()[0].clone();
            let server = joined(&honest).await;
            let service = server.announce(&name("client1")).await.unwrap();
            tokio::spawn(service.serve(|request| async move { request.reply("yes") }));
            for _ in 0..5 {
                let client = client([liar.clone(), honest.clone()]).await;
                let mut status = client.status();
                let both = |status: &grapevine::Status| {
                    status
                        .bootstrap
                        .iter()
                        .all(|entry| entry.connected.is_some())
                };
                status.wait_for(both).await.unwrap();
                let started = Instant::now();
                let live = client.lookup(&name("client1")).await;
                println!("one live among 310 made up: {:.1?}", started.elapsed());
                let live: Vec<_> = live.unwrap().iter().map(|live| live.peer).collect();
                assert_eq!(live, [server.peer_id()]);
            }
        })
        .await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_grape_that_names_itself_must_answer_for_it() {
        in_turn(async {
            let keypair = Keypair::generate_ed25519();
            let itself = wire::kad_peer(&keypair.public().to_peer_id(), &[]);
            let envelope = wire::envelope(&keypair, vec![anywhere()]);
            let (kad, rendezvous) = (
                wire::providers(&[itself]),
                wire::discovered("client1", &[envelope]),
            );
            let client = client([liar(keypair, kad, rendezvous).await]).await;
            let error = client.lookup(&name("client1")).await.unwrap_err();
            let unreachable = LookupError::Unreachable {
                name: name("client1"),
                providers: 1,
            };
            assert_eq!(error, unreachable);
        })
        .await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn answers_over_the_limits_are_no_answers() {
        in_turn(async {
            let peers: Vec<_> = nobody(5_000)
                .iter()
                .map(|peer| wire::kad_peer(peer, &[anywhere()]))
                .collect();
            let kad = wire::providers(&peers);
            // More than a page may have: refused by its length.
            let rendezvous = wire::varint(u64::from(u32::MAX));
            let client = client([liar(Keypair::generate_ed25519(), kad, rendezvous).await]).await;
            let error = client.lookup(&name("client1")).await.unwrap_err();
            // Nobody has said that the name is not announced.
            assert!(matches!(error, LookupError::NoGrape(_)), "{error}");
        })
        .await;
    }
}
