//! What a grape's registry of names costs the grape, and what ten thousand names cost their peer.
//!
//! The peers that load the grape write its protocol by hand over one kept stream each, so that what is
//! measured is the grape.

use std::time::{Duration, Instant};

use futures::future::join_all;
use futures::stream::{self, StreamExt};
use futures::{AsyncReadExt, AsyncWriteExt};
use grapevine::proto::frame::read_frame;
use grapevine::proto::wire::{MAX_FRAME, NAMES, NamesReply, NamesRequest, Reply, RequestRef};
use grapevine::{Multiaddr, Node, Role, Service, ServiceName};
use libp2p::core::muxing::SubstreamBox;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::common::{self, Process, Spread, Table};
use super::{RUNS, name};

#[allow(dead_code, reason = "the tests use more of it")]
#[path = "../../tests/suite/hostile/wire.rs"]
mod by_hand;

use by_hand::{RPC, Stranger};

/// Peers that load the grape, and names of each: as many as one address prefix may hold.
const PEERS: usize = 50;
const NAMES_EACH: usize = 2_000;
/// Lookups of each peer in a run: half of what it may do in a burst.
const LOOKUPS_EACH: usize = 10_000;
/// Messages that a peer has under way.
const UNDER_WAY: usize = 32;

/// After so long a peer may announce as many names at once as ever, and look up as many as in a run.
const REFILL: Duration = Duration::from_secs(11);
const LOOKUPS_REFILL: Duration = Duration::from_secs(1);

/// The names of the one peer, and how long it is watched: two renewals of each of them.
const MANY: usize = 10_000;
const WATCHED: Duration = Duration::from_secs(60);
const IN_FLIGHT: usize = 256;

pub(crate) async fn measure(arguments: &[String]) {
    load(arguments).await;
    renewals(arguments);
}

async fn load(arguments: &[String]) {
    let mut grape = Process::part("grape", &[]);
    let address = grape.addresses().swap_remove(0);
    common::print_heading("The registry of names of one grape", "discovery", arguments);
    println!(
        "* TCP on loopback; {PEERS} peers in one process, each with one stream that it keeps and \
         {NAMES_EACH} names of its own; {RUNS} runs: median (min..max)"
    );
    let table = Table::new(&[
        "operation",
        "names in a message",
        "names per second",
        "grape's CPU per name, µs",
        "per second and core of the grape",
    ]);
    let mut peers = join_all((0..PEERS).map(|number| Peer::new(number, &address))).await;
    for in_message in [1, 100, 1_000] {
        let mut rounds = [const { Vec::new() }; 2];
        for _ in 0..RUNS {
            for (round, operation) in rounds.iter_mut().zip(["announced", "renewed"]) {
                let run = Run::of(&grape, &mut peers, |peer| peer.announcements(in_message));
                round.push((operation, run.await));
            }
            Run::of(&grape, &mut peers, Peer::withdrawals).await;
        }
        for round in rounds {
            row(&table, in_message, &round);
        }
        tokio::time::sleep(REFILL).await;
    }
    Run::of(&grape, &mut peers, |peer| peer.announcements(1_000)).await;
    for in_message in [1, 16] {
        let mut runs = Vec::new();
        for _ in 0..RUNS {
            let run = Run::of(&grape, &mut peers, |peer| peer.lookups(in_message));
            runs.push(("looked up", run.await));
            tokio::time::sleep(LOOKUPS_REFILL).await;
        }
        row(&table, in_message, &runs);
    }
}

fn row(table: &Table, in_message: usize, runs: &[(&str, Run)]) {
    let over = |figure: fn(&Run) -> f64| Spread::of(runs.iter().map(|(_, run)| figure(run)));
    table.row(&[
        runs[0].0.into(),
        in_message.to_string(),
        format!(
            "{:.0}",
            over(|run| run.names as f64 / run.took.as_secs_f64())
        ),
        format!("{:.1}", over(|run| run.cpu * 1e6 / run.names as f64)),
        format!("{:.0}", over(|run| run.names as f64 / run.cpu)),
    ]);
}

struct Run {
    names: usize,
    took: Duration,
    /// What the grape has used, in seconds.
    cpu: f64,
}

impl Run {
    /// All peers send their messages at once.
    async fn of(
        grape: &Process,
        peers: &mut Vec<Peer>,
        messages: impl Fn(&Peer) -> Vec<NamesRequest>,
    ) -> Self {
        let mut sending = JoinSet::new();
        let prepared: Vec<_> = peers
            .drain(..)
            .map(|peer| (messages(&peer), peer))
            .collect();
        let (start, cpu) = (Instant::now(), common::cpu_seconds(grape.id()));
        for (messages, mut peer) in prepared {
            sending.spawn(async move { (peer.exchange(&messages).await, peer) });
        }
        let mut names = 0;
        for (exchanged, peer) in sending.join_all().await {
            names += exchanged;
            peers.push(peer);
        }
        Self {
            names,
            took: start.elapsed(),
            cpu: common::cpu_seconds(grape.id()) - cpu,
        }
    }
}

struct Peer {
    _stranger: Stranger,
    stream: SubstreamBox,
    record: Vec<u8>,
    names: Vec<ServiceName>,
}

impl Peer {
    async fn new(number: usize, grape: &Multiaddr) -> Self {
        let stranger = Stranger::connect(grape).await.expect("the grape answers");
        let address = "/ip4/127.0.0.1/tcp/4001".parse().expect("an address");
        let stream = async {
            let mut stream = stranger.start(RPC, &[]).await?;
            by_hand::accepted(&mut stream, RPC).await?;
            std::io::Result::Ok(stream)
        };
        Self {
            stream: stream.await.expect("the grape speaks the RPC"),
            record: by_hand::envelope(&stranger.keypair, vec![address]),
            _stranger: stranger,
            names: (0..NAMES_EACH)
                .map(|n| name(&format!("service-{number}-{n}")))
                .collect(),
        }
    }

    fn announcements(&self, in_message: usize) -> Vec<NamesRequest> {
        let announce = |names: &[ServiceName]| NamesRequest {
            announce: names.to_vec(),
            record: Some(self.record.clone()),
            ..NamesRequest::default()
        };
        self.names.chunks(in_message).map(announce).collect()
    }

    fn withdrawals(&self) -> Vec<NamesRequest> {
        let withdraw = |names: &[ServiceName]| NamesRequest {
            withdraw: names.to_vec(),
            ..NamesRequest::default()
        };
        self.names.chunks(1_000).map(withdraw).collect()
    }

    fn lookups(&self, in_message: usize) -> Vec<NamesRequest> {
        let find = |names: &[ServiceName]| NamesRequest {
            find: names.to_vec(),
            ..NamesRequest::default()
        };
        let names: Vec<_> = self
            .names
            .iter()
            .cycle()
            .take(LOOKUPS_EACH)
            .cloned()
            .collect();
        names.chunks(in_message).map(find).collect()
    }

    /// Sends all messages and reads all answers; returns how many names they were about.
    async fn exchange(&mut self, messages: &[NamesRequest]) -> usize {
        let (mut answers, mut requests) = (&mut self.stream).split();
        let room = Semaphore::new(UNDER_WAY);
        let write = async {
            for message in messages {
                room.acquire().await.expect("it is never closed").forget();
                let payload = message.encode().expect("it is within the bounds");
                let request = RequestRef {
                    id: 1,
                    service: NAMES,
                    payload: &payload,
                };
                let frame = by_hand::prefixed(&request.encode().expect("it is within the bounds"));
                requests.write_all(&frame).await.expect("the grape reads");
                requests.flush().await.expect("the grape reads");
            }
        };
        let read = async {
            let mut names = 0;
            for message in messages {
                let frame = read_frame(&mut answers, MAX_FRAME).await;
                let frame = frame.expect("the grape answers").expect("all of them");
                room.add_permits(1);
                let reply = Reply::decode(&frame).expect("a reply");
                let payload = reply.outcome.expect("an answer");
                let reply = NamesReply::decode(&payload).expect("an answer on names");
                assert!(reply.refused.is_empty(), "names were refused");
                assert!(reply.found.iter().all(|found| found.len() == 1));
                names += message.announce.len() + message.withdraw.len() + reply.found.len();
            }
            names
        };
        futures::join!(write, read).1
    }
}

/// What it costs to keep ten thousand names of one peer, on both sides.
fn renewals(arguments: &[String]) {
    common::print_heading(
        "One peer that announces 10,000 names",
        "discovery",
        arguments,
    );
    println!(
        "* The peer and its grape in processes of their own, watched for {WATCHED:?} after the last \
         announcement, in which each name is renewed at least twice"
    );
    let mut grape = Process::part("grape", &[]);
    let bootstrap = grape.addresses()[0].to_string();
    let mut peer = Process::part("announcer", &[&bootstrap]);
    let took = peer.line();
    let table = Table::new(&[
        "s to announce",
        "peer's CPU, % of a core",
        "grape's CPU, % of a core",
        "peer's CPU to announce, s",
        "grape's CPU to announce, s",
    ]);
    let processes = [peer.id(), grape.id()];
    let before = processes.map(common::cpu_seconds);
    std::thread::sleep(WATCHED);
    let share = |index: usize| {
        let used = common::cpu_seconds(processes[index]) - before[index];
        format!("{:.2}", 100.0 * used / WATCHED.as_secs_f64())
    };
    table.row(&[
        took,
        share(0),
        share(1),
        format!("{:.2}", before[0]),
        format!("{:.2}", before[1]),
    ]);
}

/// The part of a process that announces; prints how long that took. Its argument is the grape.
pub(crate) async fn announcer(arguments: &[String]) {
    let bootstrap = arguments
        .iter()
        .map(|text| text.parse().expect("an address"));
    let node = Node::builder(Role::Peer)
        .listen(["/ip4/127.0.0.1/tcp/0".parse().expect("an address")])
        .bootstrap(bootstrap)
        .spawn()
        .await
        .expect("loopback can be listened on");
    let start = Instant::now();
    let names = (0..MANY).map(|n| name(&format!("name-{n}")));
    let _services: Vec<Service> = stream::iter(names)
        .map(|name| {
            let node = node.clone();
            async move { node.announce(&name).await }
        })
        .buffer_unordered(IN_FLIGHT)
        .map(|service| service.expect("a grape takes it"))
        .collect()
        .await;
    println!("{:.2}", start.elapsed().as_secs_f64());
    let released = tokio::task::spawn_blocking(common::until_released);
    released.await.expect("waiting does not fail");
}
