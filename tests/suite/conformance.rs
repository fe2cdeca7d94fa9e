//! Stock libp2p of other makers, each as caller and as server, with the real programs: who calls, who
//! serves, over TCP and QUIC, with one grape and with two, announced in each of the ways there are.
//!
//! The drivers are in `tests/interop`, which says how they are installed. What came out is the tables of
//! `docs/interop.md`: a test fails if its own differs, and with `GRAPEVINE_WRITE_INTEROP=1` writes it.

mod driver;
mod provider;
mod table;

use std::time::Duration;

use futures::future::join_all;
use tokio::time::timeout;

use crate::process::{Program, run};
use driver::{Driver, Library};
use table::{Table, Way};

/// A whole network has been tried out within this, however busy the machine.
const DEADLINE: Duration = Duration::from_secs(300);

/// A name is found this long after it was announced: Kademlia confirms nothing.
const SETTLE: Duration = Duration::from_secs(10);

/// The requests that are sent on one stream.
const PIPELINED: &str = "200";

/// `chat` and the drivers end so when nobody announces the name.
const NOT_FOUND: i32 = 3;

#[tokio::test]
async fn each_library_calls_each_over_tcp() {
    try_out("tcp", 1).await;
}

#[tokio::test]
async fn each_library_calls_each_over_tcp_with_two_grapes() {
    try_out("tcp", 2).await;
}

#[tokio::test]
async fn each_library_calls_each_over_quic() {
    try_out("quic", 1).await;
}

#[tokio::test]
async fn each_library_calls_each_over_quic_with_two_grapes() {
    try_out("quic", 2).await;
}

#[tokio::test]
async fn each_library_encodes_and_signs_as_the_test_vectors_say() {
    if driver::are_here() {
        for library in Library::ALL {
            driver::check_vectors(library).await;
        }
    }
}

#[tokio::test]
async fn each_library_learns_by_identify_what_a_grape_speaks() {
    if !driver::are_here() {
        return;
    }
    let grapes = grapes("tcp", 1).await;
    let address = &grapes[0].address;
    for library in Library::ALL {
        let mut driver = Driver::start(library, "tcp", address).await;
        let told = driver.ask(&["identify"]).await;
        assert_eq!(told.exit, 0, "{library:?}: {:?}", told.lines);
        let (plain, _) = address.split_once("/p2p/").unwrap();
        let tells = |expected: &str| told.lines.iter().any(|line| line.starts_with(expected));
        assert!(tells(plain), "{library:?}: {:?}", told.lines);
        // The wheel of go does not say which protocols a peer speaks.
        let protocols = library == Library::Go || tells("/grapevine/kad/1.0.0");
        assert!(protocols, "{library:?}: {:?}", told.lines);
    }
}

/// Who calls: a library, or our own program.
enum Caller {
    Stock(Box<Driver>),
    Ours {
        bootstrap: String,
        listen: &'static str,
    },
}

/// A name, and how it is served.
struct Served {
    name: String,
    way: Way,
}

async fn try_out(transport: &'static str, grapes: usize) {
    if !driver::are_here() {
        return;
    }
    // One network after the other: together they take the machine for longer than their deadlines.
    static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let _alone = ALONE.lock().await;
    let tried = timeout(DEADLINE, try_network(transport, grapes)).await;
    let table = tried.expect("the network hangs");
    table.compare();
}

async fn try_network(transport: &'static str, count: usize) -> Table {
    let grapes = grapes(transport, count).await;
    let (first, last) = (&grapes[0].address, &grapes[count - 1].address);
    let listen = listen(transport);
    let mut table = Table::new(transport, count);

    let mut ours = Program::start("peer", &["rust", "--listen", listen, "--bootstrap", first]);
    assert_eq!(ours.line().await, "announced rust");
    let mut served = vec![Served {
        name: "rust".into(),
        way: Way::Ours,
    }];
    let mut servers = start_all(transport, first).await;
    for server in &mut servers {
        for road in ["kademlia", "rendezvous", "names"] {
            let name = format!("{}-{road}", server.library.name());
            let way = Way::Stock(server.library, road);
            let answer = server.ask(&["serve", &name, road]).await;
            match answer.exit {
                0 => served.push(Served { name, way }),
                _ => table.cannot(way, &answer.lines.join(" ")),
            }
        }
    }
    let stock = start_all(transport, last).await.into_iter();
    let ours = Caller::Ours {
        bootstrap: last.clone(),
        listen,
    };
    let callers: Vec<_> = stock
        .map(|driver| Caller::Stock(Box::new(driver)))
        .chain([ours])
        .collect();
    let served = &served;
    let called = join_all(callers.into_iter().map(async |mut caller| {
        let mut outcomes = Vec::new();
        for server in served {
            let outcome = match table::known(caller.name(), server.way, transport, count) {
                Some(note) => Err(format!("known, see note {note}")),
                None => caller.call(server, transport, count).await,
            };
            outcomes.push((caller.name(), server.way, outcome));
        }
        outcomes
    }));
    for (caller, way, outcome) in called.await.into_iter().flatten() {
        table.called(caller, way, outcome);
    }
    table
}

fn listen(transport: &str) -> &'static str {
    match transport {
        "quic" => "/ip4/127.0.0.1/udp/0/quic-v1",
        _ => "/ip4/127.0.0.1/tcp/0",
    }
}

/// Grapes that know each other.
async fn grapes(transport: &str, count: usize) -> Vec<Program> {
    let mut grapes: Vec<Program> = Vec::new();
    for _ in 0..count {
        let bootstrap = grapes.first().map(|first| first.address.clone());
        let bootstrap = bootstrap.iter().flat_map(|first| ["--bootstrap", first]);
        let mut arguments = vec!["--listen", listen(transport)];
        arguments.extend(bootstrap);
        let mut grape = Program::start("grape", &arguments);
        assert!(grape.line().await.starts_with("Grape 12D3KooW"));
        grape.address = grape.line().await;
        if !grapes.is_empty() {
            grape.says("connected to the grape").await;
        }
        grapes.push(grape);
    }
    grapes
}

async fn start_all(transport: &'static str, grape: &str) -> Vec<Driver> {
    let started = Library::ALL.map(|library| Driver::start(library, transport, grape));
    join_all(started).await
}

impl Caller {
    fn name(&self) -> &'static str {
        match self {
            Self::Stock(driver) => driver.library.name(),
            Self::Ours { .. } => "Grapevine",
        }
    }

    /// Calls in all ways that there are; why that is not possible, in words.
    async fn call(
        &mut self,
        server: &Served,
        transport: &str,
        grapes: usize,
    ) -> Result<(), String> {
        let name = &server.name;
        // See note 3.
        let by_py = matches!(server.way, Way::Stock(Library::Py, _)) || self.name() == "py";
        let attempts = if by_py && transport == "quic" { 5 } else { 1 };
        self.expects(&["call", name, "hello"], "Echo: hello", attempts)
            .await?;
        self.expects(&["chat", name, "hi"], "Echo: hi", attempts)
            .await?;
        let Self::Stock(driver) = self else {
            return Ok(());
        };
        // What is announced by Kademlia has no record to register, and grapes know their own alone.
        let has_record = !matches!(server.way, Way::Stock(_, "kademlia"));
        // See note 5.
        let reads = driver.library != Library::Litep2p || server.way == Way::Ours;
        let roads = [("rendezvous", has_record && reads), ("names", true)];
        for (road, _) in roads.into_iter().filter(|(_, there)| *there && grapes == 1) {
            finds(driver, name, road, attempts).await?;
        }
        self.expects(&["pipe", name, PIPELINED], PIPELINED, attempts)
            .await
    }

    async fn expects(
        &mut self,
        verb: &[&str],
        expected: &str,
        mut attempts: usize,
    ) -> Result<(), String> {
        let settled = tokio::time::Instant::now() + SETTLE;
        loop {
            let (exit, said) = match self {
                Self::Stock(driver) => {
                    let answer = driver.ask(verb).await;
                    (answer.exit, answer.lines.join(" "))
                }
                Self::Ours { bootstrap, listen } => ours(verb, bootstrap, listen).await,
            };
            match exit {
                0 if said == expected => return Ok(()),
                NOT_FOUND if tokio::time::Instant::now() < settled => {}
                _ if attempts > 1 => attempts -= 1,
                _ => return Err(format!("{} {exit}: {said}", verb[0])),
            }
        }
    }
}

async fn finds(driver: &mut Driver, name: &str, road: &str, attempts: usize) -> Result<(), String> {
    let mut found = driver.ask(&["find", name, road]).await;
    for _ in 1..attempts {
        if found.exit == 0 {
            break;
        }
        found = driver.ask(&["find", name, road]).await;
    }
    match found.exit {
        0 => Ok(()),
        _ => Err(format!("find by {road}: {}", found.lines.join(" "))),
    }
}

/// Our `chat` sends a text, or a chat message as somebody who can be answered.
async fn ours(verb: &[&str], bootstrap: &str, listen: &str) -> (i32, String) {
    let (name, text) = (verb[1], verb[2]);
    let mut arguments = vec!["--bootstrap", bootstrap, "--listen", listen];
    if verb[0] == "chat" {
        arguments.extend(["--name", "ann"]);
    }
    arguments.extend(["--to", name, text]);
    let run = run("chat", &arguments).await;
    let said = match run.code {
        Some(0) => run.stdout.trim_end().to_owned(),
        _ => run.stderr,
    };
    (run.code.unwrap_or(-1), said)
}
