//! Our grapes against those of Grenache, in one run: calls over HTTP, memory, start-up, and services
//! on Node that call each other.
//!
//! ```text
//! npm ci --prefix tests/grenache
//! cargo build --profile dist --examples
//! cargo bench --profile dist --bench grenache [-- calls services reach memory start rpc across]
//! ```
//!
//! The grapes are the commands of both, started by the same command line; every figure of both is
//! taken in turn, run by run. The load comes from this process, over connections that are kept, each
//! with one request under way; the first table shows what it manages against a server that does nothing.

#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

mod common;
#[allow(dead_code, reason = "the tests use more of it")]
#[path = "../tests/suite/grenache/grapes.rs"]
mod grapes;
#[allow(dead_code, reason = "the tests use more of it")]
#[path = "../tests/suite/grenache/http.rs"]
mod http;
#[allow(dead_code, reason = "the tests use more of it")]
#[path = "../tests/suite/grenache/node.rs"]
mod node;
#[allow(dead_code, reason = "the tests use more of it")]
#[path = "../tests/suite/process.rs"]
mod process;

use std::fmt::Write;
use std::net::SocketAddr;
use std::process::id;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{Process, Spread, Table, cpu_seconds, resident};
use grapes::{Grape, Maker, network};
use grapevine::{Node, Role};
use http::Connection;
use process::Program;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

const RUNS: usize = 5;
const RUN: Duration = Duration::from_secs(1);
const WARM_UP: Duration = Duration::from_millis(500);
const IN_FLIGHT: [usize; 2] = [1, 64];

/// The names that are announced and looked up in turn.
const NAMES: usize = 1_000;

/// The services that are all to be found.
const SERVICES: usize = 100_000;

/// The services with which the memory of a grape is read, and how long it is left alone before.
const REMEMBERED: usize = 20_000;
const SETTLE: Duration = Duration::from_secs(3);

/// The names that are announced to see when every grape knows them.
const REACHED: usize = 20;

/// The times that everything is started, and how long that should take.
const STARTS: usize = 10;
const START: f64 = 1.5;

const MAKERS: [Maker; 2] = [Maker::Grenache, Maker::Ours];

/// One thread makes the load, so that as much as possible is left for the grapes.
#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments = common::arguments();
    match common::part(&arguments) {
        Some(("nothing", _)) => return serve_nothing().await,
        Some(("service", rest)) => return serve(&rest[0]).await,
        Some(("caller", rest)) => return call_for(&rest[0]).await,
        Some((other, _)) => panic!("there is no part {other}"),
        None => {}
    }
    assert!(node::is_here(), "there is nothing to compare with");
    common::raise_open_files();
    let wants = |section: &str| arguments.is_empty() || arguments.iter().any(|a| a == section);
    if wants("calls") {
        ceiling(&arguments).await;
        calls(&arguments).await;
    }
    if wants("services") {
        services(&arguments).await;
    }
    if wants("reach") {
        reach(&arguments).await;
    }
    if wants("memory") {
        memory(&arguments).await;
    }
    if wants("start") {
        start(&arguments).await;
    }
    if wants("rpc") {
        rpc(&arguments).await;
    }
    if wants("across") {
        across(&arguments).await;
    }
}

fn print_heading(title: &str, arguments: &[String]) {
    common::print_heading(title, "grenache", arguments);
}

fn print_runs() {
    println!(
        "* {RUNS} runs of {RUN:?} each after a warm-up of {WARM_UP:?}, in turn: median (min..max)"
    );
}

/// The figures of both makers run by run, and how many times theirs ours are: cells of a row.
fn compare(theirs: &[f64], ours: &[f64]) -> [String; 3] {
    let times = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs);
    let times = format!("{:.1}", Spread::of(times));
    let [theirs, ours] = [theirs, ours].map(|figures| Spread::of(figures.iter().copied()));
    [format!("{theirs:.0}"), format!("{ours:.0}"), times]
}

/// What the load generator manages against a server that does nothing.
async fn ceiling(arguments: &[String]) {
    print_heading("The load generator's own ceiling", arguments);
    print_runs();
    let mut server = Process::part("nothing", &[]);
    let api = server.line().parse().unwrap();
    let requests = Requests::announce(NAMES);
    let table = Table::new(&["in flight", "requests/s", "its own CPU µs per request"]);
    for in_flight in IN_FLIGHT {
        requests.send(api, in_flight, WARM_UP).await;
        let mut runs = Vec::new();
        for _ in 0..RUNS {
            runs.push(Run::measure(&[id()], api, &requests, in_flight).await);
        }
        let over = |figure: fn(&Run) -> f64| Spread::of(runs.iter().map(figure));
        table.row(&[
            in_flight.to_string(),
            format!("{:.0}", over(|run| run.load.rate)),
            format!("{:.1}", over(|run| run.cpu_micros)),
        ]);
    }
}

async fn calls(arguments: &[String]) {
    print_heading("Announce and lookup over HTTP", arguments);
    print_runs();
    println!(
        "* {NAMES} names in turn, announced at the first grape and looked up at the second; every \
         grape is a process of its own; CPU is user and system time of all grapes"
    );
    let table = Table::new(&[
        "grapes",
        "call",
        "in flight",
        "Grenache, per second",
        "Grapevine, per second",
        "times",
        "CPU µs per call, Grenache",
        "CPU µs per call, Grapevine",
    ]);
    calls_of::<2>(&table).await;
    calls_of::<16>(&table).await;
}

async fn calls_of<const N: usize>(table: &Table) {
    let mut networks: Vec<[Grape; N]> = Vec::new();
    for maker in MAKERS {
        networks.push(network(maker, &[]).await);
    }
    let (announce, lookup) = (Requests::announce(NAMES), Requests::lookup(NAMES));
    for (call, requests, at) in [("announce", &announce, 0), ("lookup", &lookup, 1)] {
        for network in &networks {
            announce.send_each(network[0].api()).await;
        }
        for in_flight in IN_FLIGHT {
            for network in &networks {
                requests.send(network[at].api(), in_flight, WARM_UP).await;
            }
            let mut runs = [const { Vec::new() }; 2];
            for _ in 0..RUNS {
                for (network, runs) in networks.iter().zip(&mut runs) {
                    let processes = network.each_ref().map(|grape| grape.program.id());
                    let api = network[at].api();
                    runs.push(Run::measure(&processes, api, requests, in_flight).await);
                }
            }
            table.row(&call_row(N, call, in_flight, &runs));
        }
    }
}

fn call_row(grapes: usize, call: &str, in_flight: usize, runs: &[Vec<Run>; 2]) -> Vec<String> {
    let [theirs, ours] = runs
        .each_ref()
        .map(|runs| runs.iter().map(|run| run.load.rate).collect::<Vec<_>>());
    let [mut theirs, mut ours, times] = compare(&theirs, &ours);
    for (rate, runs) in [&mut theirs, &mut ours].into_iter().zip(runs) {
        let wrong: usize = runs.iter().map(|run| run.load.wrong).sum();
        if wrong > 0 {
            write!(rate, ", {wrong} wrong").unwrap();
        }
    }
    let cpu = runs
        .each_ref()
        .map(|runs| format!("{:.0}", Spread::of(runs.iter().map(|run| run.cpu_micros))));
    let row = [grapes.to_string(), call.into(), in_flight.to_string()];
    [&row[..], &[theirs, ours, times], &cpu].concat()
}

struct Run {
    load: Load,
    cpu_micros: f64,
}

impl Run {
    /// One run, and the processor time that these processes have spent on it.
    async fn measure(
        processes: &[u32],
        api: SocketAddr,
        requests: &Requests,
        in_flight: usize,
    ) -> Self {
        let cpu = || -> f64 { processes.iter().copied().map(cpu_seconds).sum() };
        let before = cpu();
        let load = requests.send(api, in_flight, RUN).await;
        let cpu_micros = (cpu() - before) * 1e6 / load.answered as f64;
        Self { load, cpu_micros }
    }
}

async fn services(arguments: &[String]) {
    print_heading("Many services", arguments);
    println!(
        "* {SERVICES} services of different names, announced at the first of two grapes with 64 in \
         flight, then looked up once at either"
    );
    let table = Table::new(&[
        "grapes of",
        "s to announce",
        "found at the first",
        "found at the second",
    ]);
    let (announce, lookup) = (Requests::announce(SERVICES), Requests::lookup(SERVICES));
    for maker in MAKERS {
        let grapes: [Grape; 2] = network(maker, &[]).await;
        let started = Instant::now();
        let refused = announce.send_each(grapes[0].api()).await;
        assert_eq!(refused, 0, "announcements refused");
        let took = started.elapsed().as_secs_f64();
        let mut row = vec![maker.to_string(), format!("{took:.1}")];
        for grape in &grapes {
            let missed = lookup.send_each(grape.api()).await;
            row.push((SERVICES - missed).to_string());
        }
        table.row(&row);
    }
}

async fn reach(arguments: &[String]) {
    print_heading(
        "From the answer to an announcement to its being found everywhere",
        arguments,
    );
    println!(
        "* {REACHED} names, each announced at a grape of its own; every grape is asked in turn"
    );
    let table = Table::new(&["grapes", "grapes of", "median (min..max), ms"]);
    for maker in MAKERS {
        reach_of::<2>(maker, &table).await;
        reach_of::<5>(maker, &table).await;
        reach_of::<20>(maker, &table).await;
    }
}

async fn reach_of<const N: usize>(maker: Maker, table: &Table) {
    let grapes: [Grape; N] = network(maker, &[]).await;
    let mut apis = Vec::new();
    for grape in &grapes {
        apis.push(grape.http().await);
    }
    let mut took = Vec::new();
    for number in 0..REACHED {
        let name = name(number);
        apis[number % N].announce(&name, 1_337).await;
        let announced = Instant::now();
        for api in &mut apis {
            while api.lookup(&name).await.is_empty() {}
        }
        took.push(announced.elapsed().as_secs_f64() * 1e3);
    }
    let took = format!("{:.1}", Spread::of(took));
    table.row(&[N.to_string(), maker.to_string(), took]);
}

async fn memory(arguments: &[String]) {
    print_heading("Memory of a grape", arguments);
    println!(
        "* Two grapes; {REMEMBERED} services announced at the first; resident memory, read \
         {SETTLE:?} after the last change; {RUNS} runs: median (min..max)"
    );
    let table = Table::new(&[
        "grapes of",
        "idle, MiB",
        "where they are announced, MiB",
        "the other one, MiB",
    ]);
    let announce = Requests::announce(REMEMBERED);
    let mut figures = [const { [const { Vec::new() }; 3] }; 2];
    for _ in 0..RUNS {
        for (maker, figures) in MAKERS.into_iter().zip(&mut figures) {
            let grapes: [Grape; 2] = network(maker, &[]).await;
            tokio::time::sleep(SETTLE).await;
            figures[0].push(mebibytes(&grapes[0].program));
            let refused = announce.send_each(grapes[0].api()).await;
            assert_eq!(refused, 0, "announcements refused");
            tokio::time::sleep(SETTLE).await;
            figures[1].push(mebibytes(&grapes[0].program));
            figures[2].push(mebibytes(&grapes[1].program));
        }
    }
    for (maker, figures) in MAKERS.into_iter().zip(figures) {
        let [idle, here, there] = figures.map(|figures| format!("{:.1}", Spread::of(figures)));
        table.row(&[maker.to_string(), idle, here, there]);
    }
}

fn mebibytes(program: &Program) -> f64 {
    resident(program.id()) as f64 / f64::from(1 << 20)
}

async fn start(arguments: &[String]) {
    print_heading("From cold to the first echo", arguments);
    println!(
        "* Two grapes, a service and a client on Node started together, the client asking until it \
         is answered; {STARTS} starts, in turn: median (min..max). A client that asks before the \
         service is known remembers that for 10 s"
    );
    let mut took = [const { Vec::new() }; 2];
    for _ in 0..STARTS {
        for (maker, took) in MAKERS.into_iter().zip(&mut took) {
            took.push(start_of(maker).await);
        }
    }
    let later = format!("starts that took more than {START} s");
    let table = Table::new(&["grapes of", "s", &later]);
    for (maker, took) in MAKERS.into_iter().zip(took) {
        let later = took.iter().filter(|took| **took > START).count();
        let took = format!("{:.2}", Spread::of(took));
        table.row(&[maker.to_string(), took, later.to_string()]);
    }
}

async fn start_of(maker: Maker) -> f64 {
    let started = Instant::now();
    let [one, two] = grapes::start(maker, &[]);
    let _server = node::start("server.js", &["client1", "0", &one.url()]);
    let client = ["client1", &two.url(), "ws", "hello", "--until-answered"];
    let mut client = node::start("client.js", &client);
    let echo = json!({ "result": "Echo: hello" });
    assert_eq!(client.line().await, echo.to_string());
    started.elapsed().as_secs_f64()
}

async fn rpc(arguments: &[String]) {
    print_heading("Services on Node that call each other", arguments);
    print_runs();
    println!("* Client and server are processes of their own, each at one of two grapes");
    let table = Table::new(&[
        "transport",
        "in flight",
        "by Grenache, requests/s",
        "by Grapevine, requests/s",
        "times",
    ]);
    for transport in node::TRANSPORTS {
        let mut pairs = Vec::new();
        for maker in MAKERS {
            let [one, two] = network(maker, &[]).await;
            let flags = ["echo", "0", &one.url(), transport, "--quiet"];
            let mut server = node::start("server.js", &flags);
            server.line().await;
            let client = node::start("load.js", &["echo", &two.url(), transport]);
            pairs.push((client, server, one, two));
        }
        for in_flight in IN_FLIGHT {
            for (client, ..) in &mut pairs {
                call(client, in_flight, WARM_UP).await;
            }
            let mut rates = [const { Vec::new() }; 2];
            for _ in 0..RUNS {
                for ((client, ..), rates) in pairs.iter_mut().zip(&mut rates) {
                    rates.push(call(client, in_flight, RUN).await);
                }
            }
            let [theirs, ours] = rates;
            let [theirs, ours, times] = compare(&theirs, &ours);
            table.row(&[transport.into(), in_flight.to_string(), theirs, ours, times]);
        }
    }
}

async fn across(arguments: &[String]) {
    print_heading(
        "Services on Node and nodes of Grapevine that call each other",
        arguments,
    );
    print_runs();
    println!(
        "* Client and server are processes of their own, each at one of two grapes, one of which \
         carries the requests"
    );
    let table = Table::new(&["from", "to", "transport on Node", "in flight", "requests/s"]);
    for transport in node::TRANSPORTS {
        let grapes: [Grape; 2] = network(Maker::Ours, &[]).await;
        let [one, two] = &grapes;
        let mut service = Process::part("service", &[&one.address()]);
        service.line();
        let client = node::start("load.js", &["echo", &two.url(), transport]);
        let names = ["a client on Node", "a node of Grapevine", transport];
        across_row(&table, names, client).await;

        let server = ["worker", "0", &one.url(), transport, "--quiet"];
        let mut server = node::start("server.js", &server);
        server.line().await;
        let caller = Process::command("caller", &[&two.address()]);
        let caller = Program::start_other("caller", caller.into());
        let names = ["a node of Grapevine", "a service on Node", transport];
        across_row(&table, names, caller).await;
    }
}

async fn across_row(table: &Table, names: [&str; 3], mut client: Program) {
    for in_flight in IN_FLIGHT {
        call(&mut client, in_flight, WARM_UP).await;
        let mut rates = Vec::new();
        for _ in 0..RUNS {
            rates.push(call(&mut client, in_flight, RUN).await);
        }
        let rate = format!("{:.0}", Spread::of(rates));
        table.row(&[&names.map(String::from)[..], &[in_flight.to_string(), rate]].concat());
    }
}

/// A node of Grapevine that announces `echo` at a grape.
async fn serve(grape: &str) {
    let node = grapevine_node(grape).await;
    let service = node.announce(&"echo".parse().unwrap()).await.unwrap();
    tokio::spawn(service.serve(|request| async move {
        let echo = format!("Echo: {}", request.text().unwrap());
        request.reply(echo);
    }));
    println!("announced");
    tokio::task::spawn_blocking(common::until_released)
        .await
        .unwrap();
}

/// A node of Grapevine that does what `load.js` does, with the service `worker`.
async fn call_for(grape: &str) {
    let node = grapevine_node(grape).await;
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await.unwrap() {
        let (in_flight, milliseconds) = line.split_once(' ').unwrap();
        let started = Instant::now();
        let end = started + Duration::from_millis(milliseconds.parse().unwrap());
        let mut callers = JoinSet::new();
        for _ in 0..in_flight.parse().unwrap() {
            let node = node.clone();
            callers.spawn(async move {
                let (name, mut answered) = ("worker".parse().unwrap(), 0);
                while Instant::now() < end {
                    let reply = node.request(&name, "hello").await.unwrap();
                    assert_eq!(reply.text().unwrap(), "Echo: hello");
                    answered += 1;
                }
                answered
            });
        }
        let answered: usize = callers.join_all().await.into_iter().sum();
        let seconds = started.elapsed().as_secs_f64();
        println!("{}", json!({ "answered": answered, "seconds": seconds }));
    }
}

async fn grapevine_node(grape: &str) -> Node {
    Node::builder(Role::Peer)
        .listen(["/ip4/127.0.0.1/tcp/0".parse().unwrap()])
        .bootstrap([grape.parse().unwrap()])
        .spawn()
        .await
        .unwrap()
}

/// Lets a client call; returns how many answers a second it had.
async fn call(client: &mut Program, in_flight: usize, time: Duration) -> f64 {
    client
        .types(&format!("{in_flight} {}", time.as_millis()))
        .await;
    let done: Value = serde_json::from_str(&client.line().await).unwrap();
    done["answered"].as_f64().unwrap() / done["seconds"].as_f64().unwrap()
}

/// One request for each of many services.
struct Requests(Arc<[Vec<u8>]>);

/// What came of requests.
struct Load {
    answered: usize,
    /// Answers that are errors, or that know nobody.
    wrong: usize,
    /// Answers per second.
    rate: f64,
}

impl Requests {
    fn announce(services: usize) -> Self {
        let port = |number| 1_024 + number % 60_000;
        let requests = (0..services).map(|n| http::request("announce", &json!([name(n), port(n)])));
        Self(requests.collect())
    }

    fn lookup(services: usize) -> Self {
        let requests = (0..services).map(|number| http::request("lookup", &json!(name(number))));
        Self(requests.collect())
    }

    /// Sends each of them once; returns how many had no proper answer.
    async fn send_each(&self, api: SocketAddr) -> usize {
        let count = self.0.len();
        self.drive(api, 64, move |sent| sent < count).await.wrong
    }

    /// Sends them over and over for so long, so many at once.
    async fn send(&self, api: SocketAddr, in_flight: usize, time: Duration) -> Load {
        let end = Instant::now() + time;
        self.drive(api, in_flight, move |_| Instant::now() < end)
            .await
    }

    /// Sends them in turn, so many at once, while `goes_on` with the number sent so far says so.
    async fn drive<F>(&self, api: SocketAddr, in_flight: usize, goes_on: F) -> Load
    where
        F: Fn(usize) -> bool + Copy + Send + 'static,
    {
        let mut connections = Vec::new();
        for _ in 0..in_flight {
            connections.push(Connection::open(api).await.unwrap());
        }
        let (started, sent) = (Instant::now(), Arc::new(AtomicUsize::new(0)));
        let mut callers = JoinSet::new();
        for mut connection in connections {
            let (requests, sent) = (Arc::clone(&self.0), Arc::clone(&sent));
            callers.spawn(async move {
                let (mut answered, mut wrong) = (0, 0);
                loop {
                    let number = sent.fetch_add(1, Ordering::Relaxed);
                    if !goes_on(number) {
                        return (answered, wrong);
                    }
                    let request = &requests[number % requests.len()];
                    wrong += usize::from(!is_answered(&mut connection, request).await);
                    answered += 1;
                }
            });
        }
        let counts = callers.join_all().await;
        let answered: usize = counts.iter().map(|(answered, _)| answered).sum();
        Load {
            answered,
            wrong: counts.iter().map(|(_, wrong)| wrong).sum(),
            rate: answered as f64 / started.elapsed().as_secs_f64(),
        }
    }
}

fn name(number: usize) -> String {
    format!("service-{number}")
}

/// Whether the answer is neither an error nor an empty list.
async fn is_answered(connection: &mut Connection, request: &[u8]) -> bool {
    let answer = connection.exchange(request).await.unwrap();
    answer.status == 200 && !answer.body.starts_with(b"\"") && answer.body != b"[]"
}

/// Answers every request with the same bytes, until the process that started this one has gone.
async fn serve_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(answer_nothing(stream));
        }
    });
    let released = tokio::task::spawn_blocking(common::until_released);
    released.await.unwrap();
}

/// A request is small and comes alone: one read takes it whole.
async fn answer_nothing(mut stream: TcpStream) {
    let mut request = [0; 4_096];
    stream.set_nodelay(true).unwrap();
    while let Ok(1..) = stream.read(&mut request).await {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1";
        if stream.write_all(answer).await.is_err() {
            return;
        }
    }
}
