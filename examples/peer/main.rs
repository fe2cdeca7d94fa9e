//! A peer: announces a name, prints the messages that arrive, and answers each with an echo.
//!
//! With the example `grape` running on this machine, in a second terminal:
//!
//! ```text
//! cargo run --release --example peer -- client1
//! ```
//!
//! prints `announced client1`. Then, in a third one,
//!
//! ```text
//! cargo run --release --example chat -- --to client1 --name ann "hello"
//! ```
//!
//! prints `Echo: hello` there and `ann (12D3..HN1WsiJR): hello` here, with the time before it. It runs
//! until Ctrl-C, which takes the name back at once. Started before its grape it says so, waits, and announces when the grape comes.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/talk.rs"]
mod talk;

use std::process::ExitCode;

use clap::Parser;
use grapevine::{Node, Role, ServiceName};

use common::flags::{self, Flags};
use common::output::{self, Output};
use common::stop::Stop;
use common::{Failure, RUNTIME, grapes, run, shut_down};
use talk::{Answer, DefaultGrape, Display, announce, attend};

const AFTER_HELP: &str = "\
Examples:
  peer client1
          join by the grape on this machine
  peer client1 --bootstrap /dns/example.org/tcp/20001
          join by another one
  peer client1 --listen /ip4/0.0.0.0/tcp/1337 --external /ip4/203.0.113.7/tcp/1337
          behind a router that forwards port 1337

Messages go to standard output, each with the time, the name its sender goes by and the id that is
proved; further lines of a text are indented. One that cannot be written is refused. News of the
grapes and errors go to standard error.
RUST_LOG=grapevine=debug logs there too.

Exit codes: 0 stopped by a signal; 1 the system refused something, or no grape that was given
can ever be joined; 2 wrong usage";

/// Announce NAME, print each message that arrives, and answer it with an echo.
///
/// Without --bootstrap: joins by /ip4/127.0.0.1/tcp/20001. Without --listen: TCP and QUIC on any
/// free port of every interface.
#[derive(Debug, Parser)]
#[command(name = "peer", version, after_help = AFTER_HELP)]
struct Cli {
    /// The name to announce
    #[arg(value_name = "NAME")]
    name: ServiceName,
    #[command(flatten)]
    network: Flags,
    #[command(flatten)]
    default: DefaultGrape,
}

fn main() -> ExitCode {
    let mut cli: Cli = flags::parse(Some("a name that begins with \"-\" is written behind --"));
    cli.default.fill(&mut cli.network);
    run(|stop| serve(cli, stop))
}

async fn serve(cli: Cli, stop: Stop) -> Result<u8, Failure> {
    if output::is_closed() {
        let line = "standard output is closed, so that messages would be lost: leave it open, or \
                    write > /dev/null";
        return Err(Failure::new(RUNTIME, line));
    }
    let key = match cli.network.key(&stop).await {
        Ok(key) => key?,
        Err(cause) => return Ok(cause.code()),
    };
    let builder = cli
        .network
        .builder(Role::Peer, &key, flags::all_interfaces(0));
    let node = match stop.or(builder.spawn()).await {
        Ok(node) => node?,
        Err(cause) => return Ok(cause.code()),
    };
    let output = Output::stdout(stop.clone());
    tokio::spawn(grapes::tell(node.clone(), output.clone()));
    let end = stop.or(serve_name(&node, &cli.name, &output)).await;
    let outcome = match end {
        // The handlers run until the node is shut down: what is open is still answered.
        Ok(Ok(())) => Ok(stop.asked().await.code()),
        Ok(Err(failure)) => Err(failure),
        Err(cause) => Ok(cause.code()),
    };
    shut_down(&node).await;
    outcome
}

/// Returns when the name is announced; it is then served in the background.
async fn serve_name(node: &Node, name: &ServiceName, output: &Output) -> Result<(), Failure> {
    let service = announce(node, name, output)
        .await
        .map_err(|error| Failure::new(RUNTIME, error))?;
    output.print(format!("announced {name}")).await;
    let display = Display::new(output.clone());
    let answered = service
        .serve(move |request| attend(request, Answer::Echo, Some(display.clone()), |_, _| None));
    tokio::spawn(answered);
    Ok(())
}
