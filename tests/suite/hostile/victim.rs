//! The node under attack, in a process of its own, so that its memory can be told from everybody
//! else's.
//!
//! The process is this very test binary, started again with [`ROLE`] set. It serves a few names that
//! show how a node treats its handlers, tells its address, answers "metrics" on its input with a line
//! of figures, and ends when its input does, so that none outlives its test.

use std::env;
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use grapevine::limits::Limits;
use grapevine::proto::wire::MAX_PAYLOAD;
use grapevine::{Multiaddr, Node, Request, Role, ServiceName};
use tokio::sync::Notify;

const ROLE: &str = "GRAPEVINE_VICTIM_ROLE";
const BOOTSTRAP: &str = "GRAPEVINE_VICTIM_BOOTSTRAP";
const REQUESTS: &str = "GRAPEVINE_VICTIM_REQUESTS";

/// Marks a line of the victim's among those of the test harness.
const MARK: &str = "victim:";

/// What a handler of "works" takes for each request.
const WORK: Duration = Duration::from_millis(5);

/// The names that a victim serves.
pub(crate) const SERVICES: [&str; 7] = [
    "echo", "mebibyte", "gate", "release", "works", "panics", "drops",
];

/// A node in a child process. It is killed when dropped.
pub(crate) struct Victim {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    address: Multiaddr,
}

/// Memory of a process in MiB.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    pub(crate) now: u64,
    pub(crate) peak: u64,
}

/// What a victim says of itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figures {
    /// Provider records that it keeps.
    pub(crate) stored: u64,
    pub(crate) open_requests: u64,
    pub(crate) values: u64,
}

impl Victim {
    /// Starts a grape. `arguments` lead the program to [`run_if_asked`].
    pub(crate) fn grape(arguments: &[&str]) -> Self {
        let mut command = Self::command(arguments);
        command.env(ROLE, "grape");
        Self::start(command)
    }

    /// Starts a peer that serves `requests` requests at once and joins by that grape.
    pub(crate) fn peer(arguments: &[&str], grape: &Multiaddr, requests: usize) -> Self {
        let mut command = Self::command(arguments);
        command
            .env(ROLE, "peer")
            .env(BOOTSTRAP, grape.to_string())
            .env(REQUESTS, requests.to_string());
        Self::start(command)
    }

    fn command(arguments: &[&str]) -> Command {
        let mut command = Command::new(env::current_exe().expect("this program has a path"));
        command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        command
    }

    fn start(mut command: Command) -> Self {
        let mut child = command.spawn().expect("this program starts again");
        let input = child.stdin.take().expect("piped");
        let mut output = BufReader::new(child.stdout.take().expect("piped"));
        let address = next_line(&mut output);
        Self {
            child,
            input,
            output,
            address: address.parse().expect("an address"),
        }
    }

    /// Where it listens, with its id.
    pub(crate) fn address(&self) -> &Multiaddr {
        &self.address
    }

    pub(crate) fn memory(&self) -> Memory {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(path).expect("the victim is up");
        let mib = |key: &str| -> u64 {
            let line = status.lines().find(|line| line.starts_with(key));
            let kib = line.and_then(|line| line.split_whitespace().nth(1));
            kib.and_then(|kib| kib.parse::<u64>().ok())
                .unwrap_or_default()
                / 1_024
        };
        Memory {
            now: mib("VmRSS:"),
            peak: mib("VmHWM:"),
        }
    }

    /// Asks for its figures.
    pub(crate) fn figures(&mut self) -> Figures {
        writeln!(self.input, "metrics").expect("the victim is up");
        let line = next_line(&mut self.output);
        let numbers: Vec<u64> = line
            .split_whitespace()
            .filter_map(|n| n.parse().ok())
            .collect();
        let [stored, open_requests, values] = numbers[..] else {
            panic!("not the figures: {line}");
        };
        Figures {
            stored,
            open_requests,
            values,
        }
    }

    /// Whether the process still runs.
    pub(crate) fn is_up(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn next_line(output: &mut impl BufRead) -> String {
    loop {
        let mut line = String::new();
        let read = output.read_line(&mut line).expect("the victim is up");
        assert_ne!(read, 0, "the victim has ended");
        if let Some((_, rest)) = line.split_once(MARK) {
            return rest.trim().to_owned();
        }
    }
}

/// Is the victim, in the process that was started as one; does nothing anywhere else.
pub(crate) fn run_if_asked() -> bool {
    let Ok(role) = env::var(ROLE) else {
        return false;
    };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(run(match role.as_str() {
        "grape" => Role::Grape,
        _ => Role::Peer,
    }));
    true
}

async fn run(role: Role) {
    let mut limits = Limits::default();
    if let Ok(requests) = env::var(REQUESTS) {
        limits.inbound_requests = requests.parse().expect("a number");
    }
    let bootstrap = env::var(BOOTSTRAP).ok();
    let bootstrap = bootstrap.map(|address| address.parse().expect("an address"));
    let node = Node::builder(role)
        .listen(["/ip4/127.0.0.1/tcp/0".parse().expect("an address")])
        .bootstrap(bootstrap)
        .limits(limits)
        .spawn()
        .await
        .expect("a port is free");
    let gate = Arc::new(Notify::new());
    for service in SERVICES {
        serve(&node, service, &gate).await;
    }
    tell(&node.addresses()[0].to_string());
    let commands = tokio::task::spawn_blocking(move || {
        for command in io::stdin().lines().map_while(Result::ok) {
            if command == "metrics" {
                let now = node.metrics();
                tell(&format!(
                    "{} {} {}",
                    now.stored, now.open_requests, now.values
                ));
            }
        }
    });
    commands.await.expect("reading lines does not panic");
    std::process::exit(0);
}

async fn serve(node: &Node, service: &'static str, gate: &Arc<Notify>) {
    let name: ServiceName = service.parse().expect("a name");
    let announced = node.announce(&name).await.expect("announced");
    let gate = Arc::clone(gate);
    tokio::spawn(announced.serve(move |request| answer(service, request, Arc::clone(&gate))));
}

async fn answer(service: &'static str, request: Request, gate: Arc<Notify>) {
    match service {
        "mebibyte" => request.reply(vec![b'm'; MAX_PAYLOAD]),
        "gate" => {
            gate.notified().await;
            request.reply("released");
        }
        "release" => {
            gate.notify_one();
            request.reply("");
        }
        "works" => {
            tokio::time::sleep(WORK).await;
            request.reply("done");
        }
        // Without the message that the test's output would then show.
        "panics" => std::panic::resume_unwind(Box::new("on purpose")),
        "drops" => drop(request),
        _ => {
            let echo = [b"Echo: ", request.payload()].concat();
            request.reply(echo);
        }
    }
}

fn tell(line: &str) {
    let mut output = io::stdout().lock();
    // The parent may be gone; then the input ends, too.
    let _ = writeln!(output, "\n{MARK} {line}");
    let _ = output.flush();
}
