//! A million of each message that fills a grape's store, and what that leaves of the grape.
//!
//! `cargo bench --profile dist --bench stress` starts a grape in a process of its own for each attack, sends what it can
//! within [`TIME`], and prints a table: how much was sent, how long that took, how many records the grape holds
//! then and how much memory. Meanwhile honest nodes join, announce, look up and call; the table says how often
//! that worked and how long it took. It ends by itself. `-- records` runs the attacks with that in their names.

#![allow(clippy::print_stdout, reason = "the table is what it is for")]
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[allow(dead_code, reason = "the tests use more of it")]
#[path = "../tests/suite/hostile/victim.rs"]
mod victim;
#[allow(dead_code, reason = "the tests use more of it")]
#[path = "../tests/suite/hostile/wire.rs"]
mod wire;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::{AsyncReadExt, AsyncWriteExt, StreamExt};
use grapevine::{Multiaddr, Node, Role, ServiceName, Status};
use tokio::task::JoinSet;
use tokio::time::timeout;

use victim::Victim;
use wire::{KAD, RENDEZVOUS, Stranger};

/// Messages of each attack.
const MESSAGES: usize = 1_000_000;

/// The longest that one attack lasts: a million registrations, each with a stream and a signature of its own,
/// take most of it.
const TIME: Duration = Duration::from_secs(300);

/// The messages that go out between two looks at the clock.
const BATCH: usize = 500;

/// The registrations that one peer has under way.
const UNDER_WAY: usize = 50;

/// The names that one peer registers in turn: as many as it may hold.
const NAMES: usize = 20_000;

#[derive(Clone, Copy)]
enum Attack {
    /// Provider records for a new key each.
    Records,
    /// Registrations of a few names over and over.
    Registrations,
}

struct Share {
    attack: Attack,
    stranger: Stranger,
    grape: Multiaddr,
    number: usize,
    /// Messages that all peers together have still to send.
    left: Arc<AtomicUsize>,
    until: Instant,
}

fn main() {
    if victim::run_if_asked() {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let asked: Vec<_> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    println!(
        "| attack | messages | s | records held | MiB, peak | honest rounds | median, slowest ms |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for (what, attack, peers) in [
        ("provider records, 1 peer", Attack::Records, 1),
        ("provider records, 50 peers", Attack::Records, 50),
        ("registrations, 1 peer", Attack::Registrations, 1),
        ("registrations, 50 peers", Attack::Registrations, 50),
    ] {
        if asked.is_empty() || asked.iter().any(|part| what.contains(part)) {
            runtime.block_on(row(what, attack, peers));
        }
    }
}

async fn row(what: &str, attack: Attack, peers: usize) {
    let mut victim = Victim::grape(&[]);
    let grape = victim.address().clone();
    let over = Arc::new(AtomicBool::new(false));
    let honest = tokio::spawn(announce_and_call_until(Arc::clone(&over), grape.clone()));
    let started = Instant::now();
    let left = Arc::new(AtomicUsize::new(MESSAGES));
    let mut shares = JoinSet::new();
    for number in 0..peers {
        let share = Share {
            attack,
            stranger: Stranger::connect(&grape).await.unwrap(),
            grape: grape.clone(),
            number,
            left: Arc::clone(&left),
            until: started + TIME,
        };
        shares.spawn(send(share));
    }
    let sent: usize = shares.join_all().await.into_iter().sum();
    let took = started.elapsed();
    over.store(true, Ordering::Release);
    let mut honest = honest.await.expect("honest traffic goes on");
    honest.sort_unstable();
    let (figures, memory) = (victim.figures(), victim.memory());
    println!(
        "| {what} | {sent} | {:.1} | {} | {}, {} | {} | {}, {} |",
        took.as_secs_f64(),
        figures.stored,
        memory.now,
        memory.peak,
        honest.len(),
        honest[honest.len() / 2].as_millis(),
        honest[honest.len() - 1].as_millis(),
    );
}

/// Sends batches until there are none left or the time is over; returns how many messages that were. A peer
/// that is hung up on connects again.
async fn send(mut share: Share) -> usize {
    let mut sent = 0;
    while Instant::now() < share.until && take_batch(&share.left) {
        let (first, peer) = (sent, share.number);
        let done = match share.attack {
            Attack::Records => records(&share.stranger, peer, first).await,
            Attack::Registrations => registrations(&share.stranger, first).await,
        };
        match done {
            Ok(()) => sent += BATCH,
            Err(_) => {
                share.left.fetch_add(BATCH, Ordering::Relaxed);
                let keypair = share.stranger.keypair.clone();
                let again = Stranger::connect_as(keypair, wire::HOME, &share.grape).await;
                let Ok(stranger) = again else {
                    return sent;
                };
                share.stranger = stranger;
            }
        }
    }
    sent
}

fn take_batch(left: &AtomicUsize) -> bool {
    let take = |left: usize| left.checked_sub(BATCH);
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
        .is_ok()
}

async fn records(stranger: &Stranger, peer: usize, first: usize) -> std::io::Result<()> {
    let addresses = [anywhere()];
    let mut messages = Vec::new();
    for number in first..first + BATCH {
        let key = key(peer, number);
        messages.extend(wire::add_provider(&key, &stranger.peer_id(), &addresses));
    }
    // Messages of a stream are handled in their order: the answer to this one comes last.
    messages.extend(wire::get_providers(&key(peer, first)));
    let mut stream = stranger.start(KAD, &[]).await?;
    wire::accepted(&mut stream, KAD).await?;
    stream.write_all(&messages).await?;
    stream.close().await?;
    stream.read_exact(&mut [0]).await
}

async fn registrations(stranger: &Stranger, first: usize) -> std::io::Result<()> {
    let envelope = wire::envelope(&stranger.keypair, vec![anywhere()]);
    let answers = futures::stream::iter(first..first + BATCH).map(|number| {
        let message = wire::register(&format!("name-{}", number % NAMES), &envelope);
        async move { stranger.exchange(RENDEZVOUS, &message).await }
    });
    let answers: Vec<_> = answers.buffer_unordered(UNDER_WAY).collect().await;
    answers.into_iter().try_for_each(|answer| answer.map(drop))
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

/// Rounds of honest traffic, one after the other, and how long each took.
async fn announce_and_call_until(over: Arc<AtomicBool>, grape: Multiaddr) -> Vec<Duration> {
    let mut rounds = Vec::new();
    loop {
        let last = over.load(Ordering::Acquire);
        let round = timeout(TIME, announce_and_call(&grape));
        rounds.push(round.await.expect("an honest round hangs"));
        if last {
            return rounds;
        }
    }
}

/// One node joins, announces and echoes; another one joins, looks it up and calls it.
async fn announce_and_call(grape: &Multiaddr) -> Duration {
    let started = Instant::now();
    let (server, client) = (joined(grape).await, joined(grape).await);
    let name: ServiceName = format!("honest-{}", server.peer_id()).parse().unwrap();
    let service = server.announce(&name).await.unwrap();
    let echo = tokio::spawn(service.serve(|request| async move {
        let answer = format!("Echo: {}", request.text().unwrap());
        request.reply(answer);
    }));
    let live = client.lookup(&name).await.unwrap();
    assert_eq!(live[0].peer, server.peer_id());
    let reply = client.request(&name, "hello").await.unwrap();
    assert_eq!(reply.text().unwrap(), "Echo: hello");
    echo.abort();
    started.elapsed()
}

async fn joined(grape: &Multiaddr) -> Node {
    let any_port = "/ip4/127.0.0.1/tcp/0".parse().unwrap();
    let node = Node::builder(Role::Peer)
        .listen([any_port])
        .bootstrap([grape.clone()]);
    let node = node.spawn().await.unwrap();
    node.status().wait_for(Status::is_online).await.unwrap();
    node
}
