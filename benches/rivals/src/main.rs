//! Grapevine's requests beside the bound of its transports and beside what others offer, in one run.
//!
//! Each contender is an echo over loopback, its server and its client a process each. A round runs
//! every contender once under one load, so that a machine that drifts does so for all of them; ratios
//! are taken within a round.
//!
//! `cargo run --profile dist -p rivals`, behind `--`:
//! * parts of contenders' ids, to run only those: `tcp`, `grapevine`, `tonic`;
//! * `--threads=2` gives each process two threads. It has one otherwise, so that client and server do not
//!   take each other's cores on a machine with two. On Node.js, Grenache always has one;
//! * `--plot` draws the rates into `assets/rpc.svg`.
//!
//! Grenache needs Node.js and `npm ci --prefix benches/rivals/grenache`.

#[path = "../../common/mod.rs"]
mod common;
mod contender;
mod goals;
mod grapevine;
mod grpc;
mod http;
mod iroh;
mod kept;
mod load;
mod pipe;
mod plot;
mod tcp;
mod tls;

use std::time::Duration;

use common::{Process, Spread, Table, cpu_seconds};
use contender::Contender;
use load::{Load, Run};
use tokio::runtime::Builder;

const RUNS: usize = 7;
const RUN: Duration = Duration::from_secs(1);
const WARM_UP: Duration = Duration::from_millis(200);

/// How many threads the runtime of each process has.
const THREADS: usize = 1;

const ROWS: [Row; 4] = [
    Row::new("64 B", 64, 1),
    Row::new("64 B", 64, 64),
    Row::new("64 B", 64, 256),
    Row::new("16 KiB", 16 << 10, 64),
];

/// What every contender is compared under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Row {
    payload: &'static str,
    bytes: usize,
    in_flight: usize,
}

/// The runs of one contender under one load, one for each round.
struct Rounds {
    contender: Contender,
    row: Row,
    runs: Vec<Measured>,
}

/// A run, with the processor time that both processes used for it.
struct Measured {
    run: Run,
    cpu: f64,
}

/// A contender's two processes.
struct Pair {
    contender: Contender,
    server: Process,
    client: Process,
}

fn main() {
    let arguments = common::arguments();
    match common::part(&arguments) {
        Some((part, [id, threads, argument])) => {
            play(part, id, count(threads), argument.clone());
        }
        Some(_) => panic!("a part needs a contender, its threads and an argument"),
        None => measure(&Options::read(&arguments), &arguments),
    }
}

/// What the command line asks for.
struct Options {
    filters: Vec<String>,
    threads: usize,
    plot: bool,
}

/// Is a contender's server or client, until the parent process lets it go.
fn play(part: &str, id: &str, threads: usize, argument: String) {
    let contender = Contender::ALL.into_iter().find(|some| some.id() == id);
    let contender = contender.expect("a contender");
    // Of the two in the tree, which rustls asks to choose from: libp2p's and iroh's too.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build();
    runtime.expect("threads can be started").block_on(async {
        // In a task, so that it runs where its connections' tasks do.
        let playing = match part {
            "server" => tokio::spawn(contender.serve()),
            _ => tokio::spawn(async move { contender.call(&argument).await }),
        };
        playing.await.expect("it does not panic");
    });
}

fn measure(options: &Options, arguments: &[String]) {
    let rest = match arguments {
        [] => String::new(),
        some => format!(" -- {}", some.join(" ")),
    };
    println!("\n## RPC echo over loopback, Grapevine and others\n");
    println!("* Command: `cargo run --profile dist -p rivals{rest}`");
    println!(
        "* Machine: {}; threads of each process: {}",
        common::machine(),
        options.threads
    );
    println!(
        "* {RUNS} rounds, in each every contender runs for {RUN:?} after a warm-up of {WARM_UP:?}: \
         median (min..max); CPU is user and system time of client and server together"
    );
    let mut pairs = Vec::new();
    for contender in Contender::ALL
        .into_iter()
        .filter(|some| options.asks_for(*some))
    {
        match contender.absence() {
            Some(reason) => println!("* {} takes no part: {reason}", contender.title()),
            None => pairs.push(Pair::start(contender, options.threads)),
        }
    }
    let table = Table::new(&[
        "payload",
        "in flight",
        "contender",
        "requests/s",
        "p50 µs",
        "p99 µs",
        "CPU s / 100k",
    ]);
    let mut results = Vec::new();
    for row in ROWS {
        let rounds = measure_row(&mut pairs, row);
        for rounds in &rounds {
            table.row(&rounds.cells());
        }
        results.extend(rounds);
    }
    goals::print(&results);
    if options.plot {
        plot::draw(&results);
    }
}

fn measure_row(pairs: &mut [Pair], row: Row) -> Vec<Rounds> {
    let begun = |pair: &Pair| Rounds {
        contender: pair.contender,
        row,
        runs: Vec::new(),
    };
    let mut all: Vec<_> = pairs.iter().map(begun).collect();
    for _ in 0..RUNS {
        for (pair, rounds) in pairs.iter_mut().zip(&mut all) {
            pair.measure(row, WARM_UP);
            rounds.runs.push(pair.measure(row, RUN));
        }
    }
    all
}

impl Options {
    fn read(arguments: &[String]) -> Self {
        let mut options = Self {
            filters: Vec::new(),
            threads: THREADS,
            plot: false,
        };
        for argument in arguments {
            match argument.as_str() {
                "--plot" => options.plot = true,
                other => match other.strip_prefix("--threads=") {
                    Some(threads) => options.threads = count(threads),
                    None if other.starts_with('-') => panic!("there is no flag {other}"),
                    None => options.filters.push(other.to_owned()),
                },
            }
        }
        options
    }

    fn asks_for(&self, contender: Contender) -> bool {
        let asked = |part: &String| contender.id().contains(part);
        self.filters.is_empty() || self.filters.iter().any(asked)
    }
}

fn count(threads: &str) -> usize {
    threads.parse().expect("a number of threads")
}

impl Row {
    const fn new(payload: &'static str, bytes: usize, in_flight: usize) -> Self {
        Self {
            payload,
            bytes,
            in_flight,
        }
    }
}

impl Pair {
    fn start(contender: Contender, threads: usize) -> Self {
        let (server, client) = contender.start(threads);
        Self {
            contender,
            server,
            client,
        }
    }

    fn measure(&mut self, row: Row, time: Duration) -> Measured {
        let before = self.cpu();
        let Row {
            bytes, in_flight, ..
        } = row;
        let load = Load {
            bytes,
            in_flight,
            time,
        };
        self.client.send(&load.to_line());
        let run = self.client.line();
        Measured {
            run: run.parse().expect("a client tells what came of a load"),
            cpu: self.cpu() - before,
        }
    }

    fn cpu(&self) -> f64 {
        cpu_seconds(self.server.id()) + cpu_seconds(self.client.id())
    }
}

impl Rounds {
    fn spread(&self, figure: impl Fn(&Measured) -> f64) -> Spread {
        Spread::of(self.runs.iter().map(figure))
    }

    fn cells(&self) -> [String; 7] {
        let micros = |time: Duration| time.as_secs_f64() * 1e6;
        [
            self.row.payload.into(),
            self.row.in_flight.to_string(),
            self.contender.title().into(),
            format!("{:.0}", self.spread(Measured::per_second)),
            format!("{:.0}", self.spread(|measured| micros(measured.run.p50))),
            format!("{:.0}", self.spread(|measured| micros(measured.run.p99))),
            format!("{:.2}", self.spread(Measured::cpu_per_100k)),
        ]
    }
}

impl Measured {
    fn per_second(&self) -> f64 {
        self.run.requests as f64 / self.run.took.as_secs_f64()
    }

    fn cpu_per_100k(&self) -> f64 {
        self.cpu * 100_000.0 / self.run.requests as f64
    }
}
