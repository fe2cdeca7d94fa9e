//! Grapevine's requests beside the bound of its transports and beside what others offer, in one run.
//!
//! Each contender is an echo over loopback, its server and its client a process each. A round runs
//! every contender once under one load, so that a machine that drifts does so for all of them; ratios
//! are taken within a round. `cargo run --release -p rivals`, with a part of a contender's id to run
//! only those, and `--plot` to draw the rates into `assets/rpc.svg`.

#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]

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

use std::time::Duration;

use common::{Process, Spread, Table, cpu_seconds};
use contender::Contender;
use load::{Load, Run};

const RUNS: usize = 7;
const RUN: Duration = Duration::from_secs(1);
const WARM_UP: Duration = Duration::from_millis(200);

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
        Some((part, [id, argument])) => play(part, id, argument.clone()),
        Some(_) => panic!("a part needs a contender and an argument"),
        None => measure(&arguments),
    }
}

#[tokio::main]
async fn play(part: &str, id: &str, argument: String) {
    let contender = Contender::ALL.into_iter().find(|some| some.id() == id);
    let contender = contender.expect("a contender");
    // In a task, so that it runs where its connections' tasks do.
    let playing = match part {
        "server" => tokio::spawn(contender.serve()),
        _ => tokio::spawn(async move { contender.call(&argument).await }),
    };
    playing.await.expect("it does not panic");
}

fn measure(arguments: &[String]) {
    let (flags, filters): (Vec<_>, Vec<_>) = arguments.iter().partition(|a| a.starts_with("--"));
    let asked = |contender: &Contender| {
        filters.is_empty() || filters.iter().any(|part| contender.id().contains(*part))
    };
    println!("\n## RPC echo over loopback, Grapevine and others\n");
    println!(
        "* Command: `{}`",
        ["cargo run --release -p rivals --"]
            .into_iter()
            .chain(arguments.iter().map(String::as_str))
            .collect::<Vec<_>>()
            .join(" ")
    );
    println!("* Machine: {}", common::machine());
    println!(
        "* {RUNS} rounds, in each every contender runs for {RUN:?} after a warm-up of {WARM_UP:?}: \
         median (min..max); CPU is user and system time of client and server together"
    );
    let mut pairs = Vec::new();
    for contender in Contender::ALL.into_iter().filter(asked) {
        match contender.absence() {
            Some(reason) => println!("* {} takes no part: {reason}", contender.title()),
            None => pairs.push(Pair::start(contender)),
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
    if flags.iter().any(|flag| *flag == "--plot") {
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
    fn start(contender: Contender) -> Self {
        let (server, client) = contender.start();
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
