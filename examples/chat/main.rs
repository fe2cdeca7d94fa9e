//! Chat: asks for a name, shows who answers to it, sends messages and shows the replies.
//!
//! On a fresh machine, with nothing else running,
//!
//! ```text
//! cargo run --release --example chat -- --to echo "hello"
//! ```
//!
//! prints `Echo: hello`, on a terminal with the time and who says it: where no grape answers, or nobody
//! at it has the name, chat starts one inside itself, with an echo peer named `echo`. With the examples
//! `grape` and `peer client1` running, without arguments:
//!
//! ```text
//! empty line: another name; exit: leave
//! connected to the grape 12D3..w7PbsguX at /ip4/127.0.0.1/tcp/20001
//! Name: client1
//! client1: 1 provider: 12D3..hTpEYyh4
//! client1> hello
//! 21:04 client1 (12D3..hTpEYyh4): Echo: hello
//! client1> exit
//! ```
//!
//! Two people, in two terminals, who see each other's messages as they arrive:
//!
//! ```text
//! cargo run --release --example chat -- --name ann
//! cargo run --release --example chat -- --name bob
//! ```

#[path = "../common/mod.rs"]
mod common;
mod dialogue;
#[cfg(unix)]
mod editor;
mod history;
mod inbox;
mod lines;
mod mail;
mod network;
mod patience;
mod people;
mod prompt;
mod question;
#[path = "../common/talk.rs"]
mod talk;

use std::fmt::Display;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use grapevine::ServiceName;
use tokio::time::{Instant, timeout_at};

use common::flags::{self, Flags};
use common::key::Key;
use common::output::{self, Output};
use common::stop::{Cause, Stop};
use common::{Failure, RUNTIME, USAGE, grapes, note, run};
use dialogue::Dialogue;
use inbox::receive;
use lines::Lines;
use mail::{Form, Mail, TIMED_OUT};
use network::{Network, Otherwise};
use patience::patiently;
use prompt::{NoLine, Prompt};
use talk::DefaultGrape;

/// Exit code: Ctrl-C or another signal came before the answer, or before the conversation was over.
const INTERRUPTED: u8 = 130;

/// In place of a text: it is what is piped in.
const PIPED: &str = "-";

const AFTER_HELP: &str = "\
Examples:
  chat echo \"hello\"
          one message, as with --to echo; works with nothing else running
  chat --name ann
          a conversation, in which others find you as ann
  chat --bootstrap /dns/example.org/tcp/20001 --to client1 --all --timeout 3 \"hello\"
          one message to everybody who answers to client1
  printf 'client1\\nhello\\n' | chat
          a conversation from a file: a name, then messages; an empty line, then another name.
          What fails keeps back what follows it up to the next empty line; the first failure is
          the exit code
  chat --to client1 < letter.txt
          each line of a file as a message to one name, but for empty ones; \"exit\" is a message
          as any other. The first that fails is the last, and the exit code
  git log -3 | chat --to client1 -
          all of it as one message
  chat --to client1 -- -5 degrees
          a text that begins with \"-\"
  chat --name ann < /dev/null >> letters
          keeps what arrives for ann, until a signal: with --name, and neither --to nor any input,
          it does not leave when the input ends. For a service manager

In a conversation on a terminal the prompt is whom the line is for. An empty line ends it: then who has
written meanwhile can be answered, and after another empty line a name is asked for. Ctrl-C clears a line that is begun, as in a shell; on an empty one, or while an answer is awaited, it leaves.
\"exit\" and Ctrl-D leave too.

What arrives is shown with the time, the name its sender goes by and the id that is proved; further
lines of a text are indented. Nobody owns a name: in a conversation it means who answered first.

Replies and messages go to standard output, all else to standard error.
RUST_LOG=grapevine=debug logs there too.

Exit codes: 0 answered, or the conversation ended; 1 the system refused something; 2 wrong usage;
3 no such name; 4 nobody reachable, or the connection broke; 5 timed out;
6 another one stands where who has answered was: nothing was sent to them; 7 refused;
130 interrupted by Ctrl-C or another signal (but for who only receives: 0)";

/// Talk to those who announce a name.
///
/// Without --bootstrap: joins by the grape at /ip4/127.0.0.1/tcp/20001. Where none answers there, a
/// conversation on a terminal starts one inside this program, with an echo peer named "echo". A message
/// to "echo" does so too where nobody answers to that name; a conversation announces it then.
#[derive(Debug, Parser)]
#[command(name = "chat", version, after_help = AFTER_HELP)]
struct Cli {
    /// Talk to this name first; with TEXT, or lines that are piped in: only send that
    #[arg(long, value_name = "NAME")]
    to: Option<ServiceName>,
    /// The name to talk to, where --to does not give it
    #[arg(value_name = "NAME")]
    first: Option<String>,
    /// The message to send; without it, asks for names and messages
    #[arg(value_name = "TEXT")]
    words: Vec<String>,
    /// Your own name: signs what you send; without TEXT also announces you and shows what arrives
    #[arg(long, value_name = "NAME")]
    name: Option<ServiceName>,
    /// Send to everybody who answers to the name, not just to one of them; fails if one of them fails
    #[arg(long)]
    all: bool,
    /// Go on with another one who announces the name when the one who has answered is gone or silent
    #[arg(long, conflicts_with = "all")]
    any: bool,
    /// Wait for an answer so long, and with TEXT for all that comes before it too: 1 to 300
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = timeout)]
    timeout: Duration,
    /// Keep what is typed in this file, for the next time
    #[arg(long, value_name = "FILE")]
    history: Option<PathBuf>,
    #[command(flatten)]
    network: Flags,
    #[command(flatten)]
    default: DefaultGrape,
}

impl Cli {
    /// Reads the command line. The first word is the name where --to gives none, and otherwise part of
    /// the message. Errors end the process here.
    fn read() -> Self {
        let hint = "a text that begins with \"-\" is written behind --";
        let mut cli: Self = flags::parse(Some(hint));
        match (cli.first.take(), &cli.to) {
            (None, _) => {}
            (Some(name), None) => match name.parse() {
                Ok(name) => cli.to = Some(name),
                Err(error) => wrong(ErrorKind::ValueValidation, &error),
            },
            (Some(word), Some(_)) => cli.words.insert(0, word),
        }
        if cli.history.is_some() && !cli.words.is_empty() {
            wrong(
                ErrorKind::ArgumentConflict,
                &"nothing is typed where TEXT is given: leave out --history",
            );
        }
        cli
    }

    /// The message to send, as a shell has split it without quotes.
    fn text(&self) -> Option<String> {
        (!self.words.is_empty()).then(|| self.words.join(" "))
    }

    /// The name that others are to find this program by: one message is soon sent.
    fn announced(&self) -> Option<&ServiceName> {
        self.name.as_ref().filter(|_| self.words.is_empty())
    }
}

fn main() -> ExitCode {
    let cli = Cli::read();
    run(|stop| chat(cli, stop))
}

async fn chat(cli: Cli, stop: Stop) -> Result<u8, Failure> {
    match talk(&cli, &stop).await {
        Ok(result) => result,
        Err(Cause::Signal) => Ok(INTERRUPTED),
        Err(cause) => Ok(cause.code()),
    }
}

async fn talk(cli: &Cli, stop: &Stop) -> Result<Result<u8, Failure>, Cause> {
    if output::is_closed() {
        let line = "standard output is closed, so that replies would be lost: leave it open, or write \
                    > /dev/null";
        return Ok(Err(Failure::new(RUNTIME, line)));
    }
    let key = match cli.network.key(stop).await? {
        Ok(key) => key,
        Err(failure) => return Ok(Err(failure)),
    };
    let text = match cli.text() {
        Some(text) if text == PIPED => match stop.or(piped()).await? {
            Ok(text) => Some(text),
            Err(failure) => return Ok(Err(failure)),
        },
        text => text,
    };
    match text {
        Some(text) if text.trim().is_empty() => {
            let line =
                format!("the message is empty: give a text, or \"{PIPED}\" for what is piped in");
            Ok(Err(Failure::new(USAGE, line)))
        }
        Some(text) => one_message(cli, &key, &text, stop).await,
        None => conversation(cli, &key, stop).await,
    }
}

/// Standard input as one message.
async fn piped() -> Result<String, Failure> {
    if io::stdin().is_terminal() {
        note("type the message; Ctrl-D on an empty line ends it");
    }
    match Lines::of_stdin().all().await {
        Ok(text) => Ok(text),
        Err(NoLine::Wrong(failure) | NoLine::Unreadable(failure)) => Err(failure),
        Err(NoLine::End | NoLine::Interrupted) => Ok(String::new()),
    }
}

async fn one_message(
    cli: &Cli,
    key: &Key,
    text: &str,
    stop: &Stop,
) -> Result<Result<u8, Failure>, Cause> {
    let end = Instant::now() + cli.timeout;
    let output = Output::stdout(stop.clone());
    let otherwise = Otherwise::of(cli, false);
    let joined = timeout_at(end, Network::join(cli, key, otherwise, &output));
    let network = match stop.or(joined).await? {
        Ok(Ok(network)) => network,
        Ok(Err(failure)) => return Ok(Err(failure)),
        Err(_) => return Ok(Err(too_late(cli))),
    };
    // What is left of the time.
    let time = end.saturating_duration_since(Instant::now());
    let mail = Mail::new(
        cli,
        network.node.clone(),
        output.clone(),
        Form::of_stdout(),
        time,
    );
    let sent = match &cli.to {
        Some(to) => {
            let sent = patiently(&output, || mail.awaited(to), mail.send(to, text, 1));
            stop.or(sent).await
        }
        // Refused with the command line.
        None => Ok(Ok(())),
    };
    network.leave().await;
    match sent? {
        // The reply is lost, although it came.
        Ok(()) if stop.cause() == Some(Cause::Unwritable) => Err(Cause::Unwritable),
        Ok(()) if stop.cause() == Some(Cause::Unread) => Ok(Err(unread("the reply is lost"))),
        sent => Ok(sent.map(|()| 0).map_err(Failure::from)),
    }
}

/// Only the grape on this machine is waited for before anything is sent.
fn too_late(cli: &Cli) -> Failure {
    let grape = &cli.default.default_grape;
    let line = format!("no answer from the grape at {grape} in time; --timeout waits longer");
    Failure::new(TIMED_OUT, line)
}

async fn conversation(cli: &Cli, key: &Key, stop: &Stop) -> Result<Result<u8, Failure>, Cause> {
    let prompt = match Prompt::open(cli.history.clone(), stop).await? {
        Ok(opened) => opened,
        Err(failure) => return Ok(Err(failure)),
    };
    let output = Output::stdout(stop.clone());
    let otherwise = Otherwise::of(cli, prompt.is_typed());
    let network = match stop.or(Network::join(cli, key, otherwise, &output)).await? {
        Ok(network) => network,
        Err(failure) => return Ok(Err(failure)),
    };
    if network.is_shared() {
        tokio::spawn(grapes::tell(network.node.clone(), output.clone()));
    }
    let form = match prompt.is_typed() {
        true => Form::Conversation,
        false => Form::of_stdout(),
    };
    let mail = Mail::new(cli, network.node.clone(), output.clone(), form, cli.timeout);
    let people = mail.people.clone();
    if prompt.is_typed() {
        people.offer_by(prompt.ask_instead());
    }
    let receiving = cli.announced().map(|name| {
        let receiving = receive(network.node.clone(), name.clone(), people, output.clone());
        tokio::spawn(receiving)
    });
    let mut dialogue = Dialogue::new(&network, prompt, mail, output.clone());
    let mut held = stop.or(dialogue.hold(cli)).await;
    if let (Ok(code), Some(receiving), None) = (&mut held, receiving, &cli.to)
        && dialogue.had_no_input()
    {
        output.note("no input: receiving until a signal").await;
        // Then it is a program as any other that runs until it is stopped.
        *code = match stop.or(receiving).await {
            Ok(received) => received.unwrap_or(RUNTIME),
            Err(cause) => cause.code(),
        };
    }
    drop(dialogue);
    network.leave().await;
    match held {
        Err(Cause::Unread) => Ok(Err(unread("what follows was not sent"))),
        held => Ok(Ok(held?)),
    }
}

/// Who writes to somebody needs to know what becomes of it; who only receives may stop being read.
fn unread(what: &str) -> Failure {
    let line = format!("nobody reads standard output any more: {what}");
    Failure::new(RUNTIME, line)
}

fn wrong(kind: ErrorKind, what: &dyn Display) -> ! {
    Cli::command().error(kind, what).exit()
}

fn timeout(text: &str) -> Result<Duration, String> {
    flags::seconds(text, 1, 300)
}
