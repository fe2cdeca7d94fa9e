//! What a whole process costs: from its start to the first echo, and the memory of a grape.
//!
//! `cargo bench --profile dist --bench process`. The start-up is that of the program `chat` where
//! `cargo build --profile dist --examples` has built it, and of the same calls in this program otherwise.

#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]

mod common;

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Process, Spread, Table, resident};
use futures::stream::{self, StreamExt};
use grapevine::{Multiaddr, Node, Role, Service, ServiceName};

/// Starts of `chat` for each transport.
const STARTS: usize = 30;
const MEMORY_RUNS: usize = 5;
/// How long a process is left alone before its memory is read.
const SETTLE: Duration = Duration::from_secs(3);
/// How many names are announced, one step after the other.
const STEP: usize = 10_000;
const IN_FLIGHT: usize = 256;

const TCP: &str = "/ip4/127.0.0.1/tcp/0";
const QUIC: &str = "/ip4/127.0.0.1/udp/0/quic-v1";

#[tokio::main]
async fn main() {
    let arguments = common::arguments();
    match common::part(&arguments) {
        Some(("chat", rest)) => chat(rest).await,
        Some(("grape", rest)) => grape(rest).await,
        Some(("echo", rest)) => echo(rest).await,
        Some(("announce", rest)) => announce(rest).await,
        Some((other, _)) => panic!("there is no part {other}"),
        None => {
            start_up(&arguments);
            memory(&arguments);
        }
    }
}

fn start_up(arguments: &[String]) {
    let (program, what) = match chat_program() {
        Some(path) => (Some(path), "`chat --to echo hello`"),
        None => (
            None,
            "node, request and exit in this benchmark's own program",
        ),
    };
    common::print_heading(
        "From the start of a process to the first echo",
        "process",
        arguments,
    );
    println!(
        "* {what}; a grape and the echoing peer run as processes of their own; {STARTS} starts: \
         median (min..max)"
    );
    let table = Table::new(&["transport", "first echo after ms", "exit after ms"]);
    for (transport, listen) in [("TCP", TCP), ("QUIC", QUIC)] {
        let mut grape = Process::part("grape", &[listen]);
        let bootstrap = grape.addresses()[0].to_string();
        let mut peer = Process::part("echo", &[listen, &bootstrap]);
        let _announced = peer.addresses();
        let (mut echoed, mut ended) = (Vec::new(), Vec::new());
        for _ in 0..STARTS {
            let start = Instant::now();
            let mut chat = match &program {
                Some(path) => Process::start(Command::new(path).args([
                    "--bootstrap",
                    &bootstrap,
                    "--to",
                    "echo",
                    "hello",
                ])),
                None => Process::part("chat", &[&bootstrap]),
            };
            let reply = chat.line();
            echoed.push(start.elapsed().as_secs_f64() * 1e3);
            assert!(reply.contains("Echo: hello"), "not an echo: {reply:?}");
            chat.wait();
            ended.push(start.elapsed().as_secs_f64() * 1e3);
        }
        table.row(&[
            transport.into(),
            format!("{:.1}", Spread::of(echoed)),
            format!("{:.1}", Spread::of(ended)),
        ]);
    }
}

/// The built program, beside the directory that this benchmark is in.
fn chat_program() -> Option<PathBuf> {
    let own = common::own_path();
    let path = own.parent()?.parent()?.join("examples/chat");
    path.exists().then_some(path)
}

fn memory(arguments: &[String]) {
    common::print_heading("Memory of a grape", "process", arguments);
    println!(
        "* A grape on TCP and QUIC in a process of its own, and one that announces names to it \
         over TCP; resident memory, read {SETTLE:?} after the last change; {MEMORY_RUNS} runs: \
         median (min..max)"
    );
    let columns = [
        "names announced",
        "grape MiB",
        "growth by 10,000 names, MiB",
        "announcing peer MiB",
        "s to announce",
    ];
    let table = Table::new(&columns);
    let mut steps: [Vec<Step>; 3] = Default::default();
    for _ in 0..MEMORY_RUNS {
        let mut grape = Process::part("grape", &[TCP, QUIC]);
        let bootstrap = grape.addresses()[0].to_string();
        std::thread::sleep(SETTLE);
        let mut step = Step {
            grape: resident(grape.id()),
            growth: 0,
            peer: 0,
            took: 0.0,
        };
        steps[0].push(step);
        let mut peer = Process::part("announce", &[TCP, &bootstrap, &STEP.to_string()]);
        for later in &mut steps[1..] {
            let took = peer.line().parse().expect("it prints seconds");
            std::thread::sleep(SETTLE);
            let grape = resident(grape.id());
            step = Step {
                grape,
                growth: grape.saturating_sub(step.grape),
                peer: resident(peer.id()),
                took,
            };
            later.push(step);
            peer.send("more");
        }
    }
    for (index, step) in steps.iter().enumerate() {
        let over = |figure: fn(&Step) -> f64| Spread::of(step.iter().map(figure));
        table.row(&[
            (index * STEP).to_string(),
            format!("{:.1}", over(|step| mebibytes(step.grape))),
            format!("{:.1}", over(|step| mebibytes(step.growth))),
            format!("{:.1}", over(|step| mebibytes(step.peer))),
            format!("{:.1}", over(|step| step.took)),
        ]);
    }
}

#[derive(Clone, Copy)]
struct Step {
    grape: u64,
    growth: u64,
    peer: u64,
    took: f64,
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// What `chat --to echo hello` does.
async fn chat(arguments: &[String]) {
    let node = Node::builder(Role::Peer)
        .bootstrap(addresses(arguments))
        .spawn()
        .await
        .expect("a client needs no address");
    let reply = node.request(&name("echo"), "hello").await;
    println!("{}", reply.expect("it is announced").text().expect("text"));
    node.shutdown().await;
}

async fn grape(listen: &[String]) {
    let node = Node::builder(Role::Grape)
        .listen(addresses(listen))
        .spawn()
        .await
        .expect("loopback can be listened on");
    common::tell(&node.addresses());
    released().await;
}

/// Arguments: where to listen, and the grape.
async fn echo(arguments: &[String]) {
    let node = peer(arguments).await;
    let service = node
        .announce(&name("echo"))
        .await
        .expect("a grape takes it");
    common::tell(&node.addresses());
    tokio::spawn(service.serve(|request| async move {
        let answer = format!("Echo: {}", request.text().expect("text"));
        request.reply(answer);
    }));
    released().await;
}

/// Arguments: where to listen, the grape, and how many names to announce in each step.
async fn announce(arguments: &[String]) {
    let node = peer(&arguments[..2]).await;
    let step: usize = arguments[2].parse().expect("a number");
    let mut services = Vec::new();
    for first in [0, step] {
        let start = Instant::now();
        let announced: Vec<Service> = stream::iter(first..first + step)
            .map(|index| {
                let node = node.clone();
                async move { node.announce(&name(&format!("name-{index}"))).await }
            })
            .buffer_unordered(IN_FLIGHT)
            .map(|service| service.expect("a grape takes it"))
            .collect()
            .await;
        services.extend(announced);
        println!("{}", start.elapsed().as_secs_f64());
        let read = || std::io::stdin().read_line(&mut String::new());
        let told = tokio::task::spawn_blocking(read).await;
        told.expect("reading does not panic").expect("a line");
    }
    released().await;
}

/// Listens at the first argument and joins by the second.
async fn peer(arguments: &[String]) -> Node {
    Node::builder(Role::Peer)
        .listen(addresses(&arguments[..1]))
        .bootstrap(addresses(&arguments[1..]))
        .spawn()
        .await
        .expect("loopback can be listened on")
}

async fn released() {
    let released = tokio::task::spawn_blocking(common::until_released);
    released.await.expect("waiting does not fail");
}

fn addresses(texts: &[String]) -> impl Iterator<Item = Multiaddr> {
    texts.iter().map(|text| text.parse().expect("an address"))
}

fn name(text: &str) -> ServiceName {
    text.parse().expect("a name")
}
