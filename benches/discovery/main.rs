//! Announcing and looking up: against one grape in a process of its own, and in networks of grapes
//! inside this process.
//!
//! `cargo bench --profile dist --bench discovery`, or only one grape, `-- grape`, only what a grape's registry of names
//! costs, `-- registry`, or only networks, of some sizes: `-- 10 100`. 1,000 must be asked for: they take
//! a quarter of an hour to join on two cores, and 5 GiB.

#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]
#![allow(clippy::print_stderr, reason = "and when a large network stands")]

#[path = "../common/mod.rs"]
mod common;
mod registry;

use std::process::id;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{Process, Spread, Table, latencies, micros, millis_at};
use futures::future::join_all;
use futures::stream::{self, StreamExt};
use grapevine::error::AnnounceError;
use grapevine::{Multiaddr, Node, Role, Service, ServiceName, Status, Testnet};
use hdrhistogram::Histogram;
use rand::RngExt;
use rand::seq::IndexedRandom;
use tokio::task::JoinSet;

const RUNS: usize = 5;
/// Operations of a run with one in flight.
const SAMPLES: usize = 200;
const RUN: Duration = Duration::from_secs(1);
const CLIENTS: usize = 4;
const IN_FLIGHT: usize = 64;
/// Names that are looked up against one grape.
const NAMES: usize = 1_024;

const SIZES: [usize; 3] = [10, 100, 300];
/// Nodes that announce in a network, and names that each of them announces.
const PROVIDERS: usize = 16;
const NAMES_EACH: usize = 8;
/// Nodes that look up in a network, and lookups of each of them in a run.
const LOOKERS: usize = 8;
const LOOKUPS_EACH: usize = 20;
/// Grapes by which each of those nodes has joined, drawn at random.
const BOOTSTRAP: usize = 2;

#[tokio::main]
async fn main() {
    let arguments = common::arguments();
    match common::part(&arguments) {
        Some(("announcer", rest)) => return registry::announcer(rest).await,
        Some(_) => return serve().await,
        None => {}
    }
    common::raise_open_files();
    match arguments.first().map(String::as_str) {
        Some("grape") => return one_grape(&arguments).await,
        Some("registry") => return registry::measure(&arguments).await,
        _ => {}
    }
    if arguments.is_empty() {
        one_grape(&arguments).await;
        registry::measure(&arguments).await;
        return networks(&SIZES, &arguments).await;
    }
    let sizes = arguments.iter().map(|size| size.parse());
    let sizes: Result<Vec<_>, _> = sizes.collect();
    networks(&sizes.expect("numbers of grapes"), &arguments).await;
}

/// The part of the process that is a grape.
async fn serve() {
    let loopback = "/ip4/127.0.0.1/tcp/0".parse().expect("an address");
    let node = Node::builder(Role::Grape).listen([loopback]).spawn().await;
    let node = node.expect("loopback can be listened on");
    common::tell(&node.addresses());
    let released = tokio::task::spawn_blocking(common::until_released);
    released.await.expect("waiting does not fail");
}

async fn one_grape(arguments: &[String]) {
    let mut grape = Process::part("grape", &[]);
    let bootstrap = grape.addresses();
    common::print_heading("Announce and lookup by one grape", "discovery", arguments);
    println!(
        "* TCP on loopback, the grape in a process of its own, all other nodes in one process; \
         {RUNS} runs of {SAMPLES} operations with 1 in flight, of {RUN:?} with {IN_FLIGHT} in \
         flight from {CLIENTS} nodes: median (min..max)"
    );
    let table = Table::new(&[
        "operation",
        "p50 ms",
        "p99 ms",
        "per second, 64 in flight",
        "failed",
    ]);

    let announcers = peers(&bootstrap).await;
    let (mut one, mut many) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        one.push(announce(&announcers[..1], 1, Until::Count(SAMPLES)).await);
        many.push(announce(&announcers, IN_FLIGHT, Until::Time(RUN)).await);
    }
    row(&table, "announce", &one, &many);

    let lookers = peers(&bootstrap).await;
    let names: Arc<[_]> = (0..NAMES).map(|n| name(&format!("found-{n}"))).collect();
    let services = join_all(names.iter().map(|name| announcers[0].announce(name))).await;
    for service in services {
        serve_in_background(service.expect("a grape takes it"));
    }
    let (mut one, mut many) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        one.push(look_up(&lookers[..1], &names, 1, Until::Count(SAMPLES)).await);
        many.push(look_up(&lookers, &names, IN_FLIGHT, Until::Time(RUN)).await);
    }
    row(&table, "lookup, provider connected", &one, &many);

    let mut cold = Vec::new();
    for _ in 0..RUNS {
        cold.push(look_up_cold(&bootstrap, &names).await);
    }
    row(&table, "lookup, provider dialled", &cold, &[]);

    let nobody: Arc<[_]> = (0..NAMES).map(|n| name(&format!("absent-{n}"))).collect();
    let (mut one, mut many) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        one.push(look_up(&lookers[..1], &nobody, 1, Until::Count(SAMPLES)).await);
        many.push(look_up(&lookers, &nobody, IN_FLIGHT, Until::Time(RUN)).await);
    }
    row(&table, "lookup of a name nobody has", &one, &many);
    join_all(announcers.iter().chain(&lookers).map(Node::shutdown)).await;
}

fn row(table: &Table, operation: &str, one: &[Run], many: &[Run]) {
    let at = |quantile| Spread::of(one.iter().map(|run| millis_at(&run.latencies, quantile)));
    let per_second = match many {
        [] => "-".into(),
        many => format!("{:.0}", Spread::of(many.iter().map(Run::per_second))),
    };
    let failed: usize = one.iter().chain(many).map(|run| run.failed).sum();
    table.row(&[
        operation.into(),
        format!("{:.2}", at(0.5)),
        format!("{:.2}", at(0.99)),
        per_second,
        failed.to_string(),
    ]);
}

#[derive(Clone, Copy)]
enum Until {
    Count(usize),
    Time(Duration),
}

struct Run {
    latencies: Histogram<u64>,
    took: Duration,
    failed: usize,
}

impl Run {
    /// What callers that were started then have measured, once the last is done.
    async fn of(mut callers: JoinSet<(Histogram<u64>, usize)>, start: Instant) -> Self {
        let mut run = Run {
            latencies: latencies(),
            took: Duration::ZERO,
            failed: 0,
        };
        while let Some(done) = callers.join_next().await {
            let (latencies, failed) = done.expect("a caller does not panic");
            run.latencies += latencies;
            run.failed += failed;
        }
        run.took = start.elapsed();
        run
    }

    fn per_second(&self) -> f64 {
        self.latencies.len() as f64 / self.took.as_secs_f64()
    }
}

/// Announces new names by these nodes in turn, so many at once, and takes them back afterwards.
async fn announce(nodes: &[Node], in_flight: usize, until: Until) -> Run {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let start = Instant::now();
    let mut callers = JoinSet::new();
    for node in nodes.iter().cycle().take(in_flight) {
        let node = node.clone();
        callers.spawn(async move {
            let (mut latencies, mut services) = (latencies(), Vec::new());
            while until.goes_on(start, services.len()) {
                let name = name(&format!("new-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
                let begun = Instant::now();
                match node.announce(&name).await {
                    Ok(service) => services.push(service),
                    // It has all that one node may have, before the time is over.
                    Err(AnnounceError::TooMany { .. }) => break,
                    Err(error) => panic!("a grape takes it: {error}"),
                }
                latencies.saturating_record(micros(begun.elapsed()));
            }
            (latencies, services)
        });
    }
    let (mut all, mut announced) = (latencies(), Vec::new());
    while let Some(done) = callers.join_next().await {
        let (latencies, services) = done.expect("a caller does not panic");
        all += latencies;
        announced.extend(services);
    }
    let run = Run {
        latencies: all,
        took: start.elapsed(),
        failed: 0,
    };
    join_all(announced.into_iter().map(Service::withdraw)).await;
    run
}

/// Looks names up by these nodes in turn, so many at once.
async fn look_up(
    nodes: &[Node],
    names: &Arc<[ServiceName]>,
    in_flight: usize,
    until: Until,
) -> Run {
    let start = Instant::now();
    let mut callers = JoinSet::new();
    for (index, node) in nodes.iter().cycle().take(in_flight).enumerate() {
        let (node, names) = (node.clone(), Arc::clone(names));
        callers.spawn(async move {
            // Each caller has names of its own: lookups of one name at once are one.
            let mut own = names.iter().skip(index).step_by(in_flight).cycle();
            let (mut latencies, mut failed) = (latencies(), 0);
            while let Some(name) = own.next()
                && until.goes_on(start, latencies.len() as usize)
            {
                let begun = Instant::now();
                let found = node.lookup(name).await;
                latencies.saturating_record(micros(begun.elapsed()));
                let expected = name.as_ref().starts_with("found");
                failed += usize::from(found.is_ok() != expected);
            }
            (latencies, failed)
        });
    }
    Run::of(callers, start).await
}

/// Looks names up by nodes that know their grape and nobody else.
async fn look_up_cold(bootstrap: &[Multiaddr], names: &Arc<[ServiceName]>) -> Run {
    let start = Instant::now();
    let (mut latencies, mut failed) = (latencies(), 0);
    for name in names.iter().take(SAMPLES / 4) {
        let node = peer(bootstrap).await;
        let begun = Instant::now();
        failed += usize::from(node.lookup(name).await.is_err());
        latencies.saturating_record(micros(begun.elapsed()));
        node.shutdown().await;
    }
    Run {
        latencies,
        took: start.elapsed(),
        failed,
    }
}

impl Until {
    fn goes_on(self, start: Instant, done: usize) -> bool {
        match self {
            Self::Count(count) => done < count,
            Self::Time(time) => start.elapsed() < time,
        }
    }
}

async fn peers(bootstrap: &[Multiaddr]) -> Vec<Node> {
    join_all((0..CLIENTS).map(|_| peer(bootstrap))).await
}

async fn peer(bootstrap: &[Multiaddr]) -> Node {
    let node = Node::builder(Role::Peer)
        .listen(["/ip4/127.0.0.1/tcp/0".parse().expect("an address")])
        .bootstrap(bootstrap.iter().cloned())
        .spawn()
        .await
        .expect("loopback can be listened on");
    online(&node).await;
    node
}

async fn online(node: &Node) {
    let mut status = node.status();
    let online = status.wait_for(Status::is_online).await;
    online.expect("the node runs");
}

fn serve_in_background(service: Service) {
    tokio::spawn(service.serve(|request| async { request.reply("") }));
}

async fn networks(sizes: &[usize], arguments: &[String]) {
    common::print_heading("Lookup by the size of the network", "discovery", arguments);
    println!(
        "* All grapes in one process over its memory transport; {PROVIDERS} peers announce \
         {NAMES_EACH} names each, {LOOKERS} others look them up at random, one after another each; \
         every grape has explored the network and \
         every peer has joined by {BOOTSTRAP} grapes drawn at random; {RUNS} runs of {} lookups: \
         median (min..max)",
        LOOKERS * LOOKUPS_EACH
    );
    let table = Table::new(&[
        "grapes",
        "built after s",
        "GiB in use",
        "p50 ms",
        "p99 ms",
        "Kademlia requests per lookup",
        "requests to registries per lookup",
        "missed",
    ]);
    for &size in sizes {
        let start = Instant::now();
        let testnet = Testnet::new(size).await.expect("memory can be listened on");
        for grape in testnet.grapes() {
            let mut status = grape.status();
            let explored = status.wait_for(|status| status.explored).await;
            explored.expect("the grape runs");
        }
        let built = start.elapsed().as_secs_f64();
        eprintln!("{size} grapes stand after {built:.0} s");
        let (providers, names) = announce_in(&testnet).await;
        let lookers = join_all((0..LOOKERS).map(|_| joined(&testnet))).await;
        let mut runs = Vec::new();
        for _ in 0..RUNS {
            runs.push(NetworkRun::measure(&lookers, &names).await);
        }
        let over = |figure: fn(&NetworkRun) -> f64| Spread::of(runs.iter().map(figure));
        table.row(&[
            size.to_string(),
            format!("{built:.1}"),
            format!("{:.1}", common::resident(id()) as f64 / f64::from(1 << 30)),
            format!("{:.1}", over(|run| millis_at(&run.run.latencies, 0.5))),
            format!("{:.1}", over(|run| millis_at(&run.run.latencies, 0.99))),
            format!("{:.1}", over(|run| run.kademlia_requests)),
            format!("{:.1}", over(|run| run.names_requests)),
            format!(
                "{} of {}",
                runs.iter().map(|run| run.run.failed).sum::<usize>(),
                runs.iter().map(|run| run.run.latencies.len()).sum::<u64>()
            ),
        ]);
        let peers = lookers.iter().chain(&providers);
        join_all(peers.map(Node::shutdown)).await;
        stream::iter(testnet.grapes())
            .for_each_concurrent(None, Node::shutdown)
            .await;
    }
}

struct NetworkRun {
    run: Run,
    /// For each lookup.
    kademlia_requests: f64,
    names_requests: f64,
}

impl NetworkRun {
    async fn measure(lookers: &[Node], names: &Arc<[ServiceName]>) -> Self {
        let before = requests(lookers);
        let start = Instant::now();
        let mut callers = JoinSet::new();
        for node in lookers {
            let (node, names) = (node.clone(), Arc::clone(names));
            callers.spawn(async move {
                let (mut latencies, mut failed) = (latencies(), 0);
                for _ in 0..LOOKUPS_EACH {
                    let name = &names[rand::rng().random_range(0..names.len())];
                    let begun = Instant::now();
                    if let Err(error) = node.lookup(name).await {
                        eprintln!("missed after {:?}: {error}", begun.elapsed());
                        failed += 1;
                    }
                    latencies.saturating_record(micros(begun.elapsed()));
                }
                (latencies, failed)
            });
        }
        let run = Run::of(callers, start).await;
        let after = requests(lookers);
        let each =
            |index: usize| (after[index] - before[index]) as f64 / run.latencies.len() as f64;
        Self {
            kademlia_requests: each(0),
            names_requests: each(1),
            run,
        }
    }
}

/// What these nodes have sent: requests of Kademlia, and to registries.
fn requests(nodes: &[Node]) -> [u64; 2] {
    let sent = nodes.iter().map(Node::metrics);
    sent.fold([0, 0], |[kademlia, names], metrics| {
        let kademlia = kademlia + metrics.kademlia_requests;
        [kademlia, names + metrics.names_requests]
    })
}

async fn announce_in(testnet: &Testnet) -> (Vec<Node>, Arc<[ServiceName]>) {
    let nodes = join_all((0..PROVIDERS).map(|_| joined(testnet))).await;
    let mut names = Vec::new();
    for (index, node) in nodes.iter().enumerate() {
        let own: Vec<_> = (0..NAMES_EACH)
            .map(|n| name(&format!("name-{index}-{n}")))
            .collect();
        for service in join_all(own.iter().map(|name| node.announce(name))).await {
            serve_in_background(service.expect("a grape takes it"));
        }
        names.extend(own);
    }
    (nodes, names.into())
}

/// A peer that has joined by grapes drawn at random.
async fn joined(testnet: &Testnet) -> Node {
    let drawn: Vec<_> = testnet
        .grapes()
        .sample(&mut rand::rng(), BOOTSTRAP)
        .collect();
    let node = testnet.joining(Role::Peer, drawn).spawn().await;
    let node = node.expect("memory can be listened on");
    online(&node).await;
    node
}

fn name(text: &str) -> ServiceName {
    text.parse().expect("a name")
}
