//! Stock litep2p at Grapevine's protocols. The verbs and exit codes: ../README.md.

mod peer;
mod streams;
mod vectors;
mod wire;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, BufReader, stdin};
use tokio::time::timeout;

use peer::{Failure, Peer};

const DEADLINE: Duration = Duration::from_secs(10);

const USAGE: u8 = 2;
const TIMED_OUT: u8 = 5;

#[derive(Deserialize)]
struct Asked {
    id: u64,
    args: Vec<String>,
}

/// Runs a verb; the code to exit with, and what it prints.
async fn outcome(peer: &Peer, args: &[String]) -> (u8, Vec<String>) {
    match timeout(DEADLINE, run(peer, args)).await {
        Ok(Ok(lines)) => (0, lines),
        Ok(Err(failure)) => (failure.exit, vec![format!("error: {}", failure.message)]),
        Err(_) => (TIMED_OUT, vec!["error: timed out".into()]),
    }
}

async fn run(peer: &Peer, args: &[String]) -> Result<Vec<String>, Failure> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let road = |at: usize| args.get(at).copied().unwrap_or("kademlia");
    match args[..] {
        ["identify"] => Ok(peer.identify()),
        ["find", name, ..] => peer.find(name, road(2)).await,
        ["call", name, text, ..] => Ok(vec![peer.call(name, text, road(3)).await?]),
        ["chat", name, text, ..] => Ok(vec![peer.chat(name, text, road(3)).await?]),
        ["pipe", name, count, ..] => {
            let count = count
                .parse()
                .map_err(|_| Failure::new(USAGE, "not a number"))?;
            peer.pipe(name, count, road(3)).await?;
            Ok(vec![count.to_string()])
        }
        ["serve", name, ..] => peer.serve(name, road(2)).await,
        ["withdraw", name, road] => peer.withdraw(name, road).await,
        ["vectors", file] => Ok(vec![vectors::check(file)?.to_string()]),
        _ => Err(Failure::new(USAGE, "no such verb")),
    }
}

fn print(lines: &[String]) {
    for line in lines {
        println!("{line}");
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let (mut bootstrap, mut quic) = (Vec::new(), false);
    let mut args = std::env::args().skip(1).peekable();
    while args.peek().is_some_and(|arg| arg.starts_with("--")) {
        match (args.next().as_deref(), args.next()) {
            (Some("--bootstrap"), Some(address)) => bootstrap.push(address),
            (Some("--transport"), Some(transport)) => quic = transport == "quic",
            _ => return USAGE.into(),
        }
    }
    let args: Vec<_> = args.collect();
    if args.first().is_some_and(|verb| verb == "vectors") {
        return match vectors::check(&args[1]) {
            Ok(count) => {
                println!("{count}");
                ExitCode::SUCCESS
            }
            Err(failure) => {
                eprintln!("error: {}", failure.message);
                failure.exit.into()
            }
        };
    }
    let peer = match timeout(DEADLINE, Peer::start(&bootstrap, quic)).await {
        Ok(Ok(peer)) => Arc::new(peer),
        Ok(Err(failure)) => {
            eprintln!("error: {}", failure.message);
            return failure.exit.into();
        }
        Err(_) => return TIMED_OUT.into(),
    };
    let mut lines = BufReader::new(stdin()).lines();
    if !args.is_empty() {
        let (exit, said) = outcome(&peer, &args).await;
        print(&said);
        while exit == 0 && args[0] == "serve" && matches!(lines.next_line().await, Ok(Some(_))) {}
        return exit.into();
    }
    println!("{}", serde_json::json!({ "ready": peer.id() }));
    while let Ok(Some(line)) = lines.next_line().await {
        let Ok(asked) = serde_json::from_str::<Asked>(&line) else {
            return USAGE.into();
        };
        let peer = Arc::clone(&peer);
        tokio::spawn(async move {
            let (exit, lines) = outcome(&peer, &asked.args).await;
            let answer = serde_json::json!({ "id": asked.id, "exit": exit, "lines": lines });
            println!("{answer}");
        });
    }
    ExitCode::SUCCESS
}
