//! Requests and replies through the public API, between two processes, over TCP and QUIC.
//!
//! The server is a grape that announces `echo` and answers with what it gets; it runs in a process
//! of its own, which this program starts from itself. `cargo bench --profile dist --bench rpc`, or only what one
//! that floods does to another caller, `-- flood`.

#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]

mod common;

use std::process::{Command, id};
use std::time::{Duration, Instant};

use common::{Process, Spread, Table, cpu_seconds, latencies, micros};
use grapevine::{Multiaddr, Node, Role, ServiceName};
use hdrhistogram::Histogram;
use tokio::task::JoinSet;

const RUNS: usize = 5;
const RUN: Duration = Duration::from_secs(1);
const WARM_UP: Duration = Duration::from_millis(500);
const PAYLOADS: [(&str, usize); 2] = [("64 B", 64), ("16 KiB", 16 << 10)];
const IN_FLIGHT: [usize; 3] = [1, 64, 256];
/// What one caller has in flight that floods.
const FLOOD: usize = 1_024;

#[tokio::main]
async fn main() {
    let arguments = common::arguments();
    match common::part(&arguments) {
        Some(("server", _)) => serve().await,
        Some((_, addresses)) => flood(addresses).await,
        None => {
            if arguments.is_empty() {
                measure(&arguments).await;
            }
            measure_beside_flood(&arguments).await;
        }
    }
}

async fn serve() {
    let node = Node::builder(Role::Grape)
        .listen(["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"].map(address))
        .spawn()
        .await
        .expect("loopback can be listened on");
    let mut service = node.announce(&echo()).await.expect("the name is free");
    common::tell(&node.addresses());
    tokio::spawn(async move {
        while let Some(request) = service.next().await {
            let payload = request.payload().to_vec();
            request.reply(payload);
        }
    });
    let released = tokio::task::spawn_blocking(common::until_released);
    released.await.expect("waiting does not fail");
}

async fn measure(arguments: &[String]) {
    let mut server = Process::part("server", &[]);
    let addresses = server.addresses();
    common::print_heading("RPC echo between two processes", "rpc", arguments);
    println!(
        "* {RUNS} runs of {RUN:?} each after a warm-up of {WARM_UP:?}: median (min..max); \
         CPU is user and system time of all threads"
    );
    let table = Table::new(&[
        "transport",
        "payload",
        "in flight",
        "requests/s",
        "p50 µs",
        "p99 µs",
        "client CPU s / 100k",
        "server CPU s / 100k",
    ]);
    for (transport, part) in [("TCP", "/tcp/"), ("QUIC", "/quic-v1")] {
        let matching = addresses.iter().filter(|a| a.to_string().contains(part));
        let client = client(matching.cloned()).await;
        for (size, bytes) in PAYLOADS {
            for in_flight in IN_FLIGHT {
                run(&client, bytes, in_flight, WARM_UP).await;
                let mut runs = Vec::new();
                for _ in 0..RUNS {
                    runs.push(Run::measure(&client, server.id(), bytes, in_flight).await);
                }
                let over = |figure: fn(&Run) -> f64| Spread::of(runs.iter().map(figure));
                table.row(&[
                    transport.into(),
                    size.into(),
                    in_flight.to_string(),
                    format!("{:.0}", over(Run::per_second)),
                    format!("{:.0}", over(|run| run.quantile(0.5))),
                    format!("{:.0}", over(|run| run.quantile(0.99))),
                    format!("{:.1}", over(|run| run.per_100k(run.client_cpu))),
                    format!("{:.1}", over(|run| run.per_100k(run.server_cpu))),
                ]);
            }
        }
        client.shutdown().await;
    }
}

/// Sends as many small requests as the node lets a caller have under way, until it is released.
async fn flood(addresses: &[String]) {
    let client = client(addresses.iter().map(|one| address(one))).await;
    run(&client, 64, 1, WARM_UP).await;
    println!("ready");
    tokio::spawn(async move {
        loop {
            let start = Instant::now();
            let sent = run(&client, 64, FLOOD, RUN).await.len();
            println!("{:.0}", sent as f64 / start.elapsed().as_secs_f64());
        }
    });
    let released = tokio::task::spawn_blocking(common::until_released);
    released.await.expect("waiting does not fail");
}

async fn measure_beside_flood(arguments: &[String]) {
    let mut server = Process::part("server", &[]);
    let addresses = server.addresses();
    let over_tcp = |address: &&Multiaddr| address.to_string().contains("/tcp/");
    let tcp = addresses.iter().find(over_tcp).expect("it listens on TCP");
    common::print_heading("An honest caller beside one that floods", "rpc", arguments);
    println!(
        "* One caller, 64 B over TCP, 1 in flight; the other is a process that has {FLOOD} in \
         flight, and `nice -n 19`, because one on another machine would not take this one's \
         processors; {RUNS} runs of {RUN:?}, in turn: median (min..max)"
    );
    let honest = client([tcp.clone()]).await;
    run(&honest, 64, 1, WARM_UP).await;
    let settings = [
        ("alone", None),
        ("beside a flood", Some("19")),
        ("beside a flood of equal priority", Some("0")),
    ];
    let mut runs = settings.map(|_| Vec::new());
    let mut rates = settings.map(|_| Vec::new());
    for _ in 0..RUNS {
        for (at, (_, niceness)) in settings.into_iter().enumerate() {
            let flooder = niceness.map(|niceness| start_flooder(tcp, niceness));
            run(&honest, 64, 1, WARM_UP).await;
            runs[at].push(Run::measure(&honest, server.id(), 64, 1).await);
            let rate = flooder.map(|mut flooder| flooder.line());
            rates[at].extend(rate.map(|rate| rate.parse::<f64>().expect("a number")));
        }
    }
    let table = Table::new(&[
        "honest caller",
        "requests/s",
        "p50 µs",
        "p99 µs",
        "the flooder's requests/s",
    ]);
    for (at, (what, _)) in settings.into_iter().enumerate() {
        let over = |figure: fn(&Run) -> f64| Spread::of(runs[at].iter().map(figure));
        let rate = match rates[at].as_slice() {
            [] => "-".into(),
            rates => format!("{:.0}", Spread::of(rates.iter().copied())),
        };
        table.row(&[
            what.into(),
            format!("{:.0}", over(Run::per_second)),
            format!("{:.0}", over(|run| run.quantile(0.5))),
            format!("{:.0}", over(|run| run.quantile(0.99))),
            rate,
        ]);
    }
}

fn start_flooder(address: &Multiaddr, niceness: &str) -> Process {
    let part = Process::command("flood", &[&address.to_string()]);
    let mut command = Command::new("nice");
    command
        .args(["-n", niceness])
        .arg(part.get_program())
        .args(part.get_args());
    let mut flooder = Process::start(&mut command);
    assert_eq!(flooder.line(), "ready", "it does not start");
    flooder
}

async fn client(bootstrap: impl IntoIterator<Item = Multiaddr>) -> Node {
    let node = Node::builder(Role::Peer).bootstrap(bootstrap).spawn().await;
    node.expect("a client needs no address")
}

struct Run {
    latencies: Histogram<u64>,
    took: Duration,
    client_cpu: f64,
    server_cpu: f64,
}

impl Run {
    async fn measure(client: &Node, server: u32, bytes: usize, in_flight: usize) -> Self {
        let (start, mine, its) = (Instant::now(), cpu_seconds(id()), cpu_seconds(server));
        let latencies = run(client, bytes, in_flight, RUN).await;
        Self {
            latencies,
            took: start.elapsed(),
            client_cpu: cpu_seconds(id()) - mine,
            server_cpu: cpu_seconds(server) - its,
        }
    }

    fn per_second(&self) -> f64 {
        self.latencies.len() as f64 / self.took.as_secs_f64()
    }

    fn quantile(&self, quantile: f64) -> f64 {
        self.latencies.value_at_quantile(quantile) as f64
    }

    fn per_100k(&self, seconds: f64) -> f64 {
        seconds * 100_000.0 / self.latencies.len() as f64
    }
}

/// Sends requests for so long, so many at once, and returns how long each took.
async fn run(client: &Node, bytes: usize, in_flight: usize, time: Duration) -> Histogram<u64> {
    let end = Instant::now() + time;
    let mut callers = JoinSet::new();
    for _ in 0..in_flight {
        let client = client.clone();
        callers.spawn(async move {
            // A histogram for each caller would cost it the processor's cache.
            let (name, payload, mut latencies) = (echo(), vec![b'x'; bytes], Vec::new());
            while Instant::now() < end {
                let start = Instant::now();
                let reply = client.request(&name, payload.clone()).await;
                assert_eq!(reply.expect("the server answers").payload.len(), bytes);
                latencies.push(start.elapsed());
            }
            latencies
        });
    }
    let mut all = latencies();
    while let Some(latencies) = callers.join_next().await {
        for latency in latencies.expect("a caller does not panic") {
            all.saturating_record(micros(latency));
        }
    }
    all
}

fn echo() -> ServiceName {
    "echo".parse().expect("a name")
}

fn address(text: &str) -> Multiaddr {
    text.parse().expect("an address")
}
