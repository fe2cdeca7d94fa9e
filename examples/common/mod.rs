//! What the programs share: flags, the key, output, the wish to stop, news of the grapes.
//!
//! Invariants: stdout carries data and nothing else; what goes wrong is one line on stderr that says
//! what to do; a signal at any moment lets the program withdraw its names and end.

pub(crate) mod flags;
pub(crate) mod grapes;
pub(crate) mod key;
pub(crate) mod output;
pub(crate) mod stop;

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use grapevine::error::SpawnError;
use grapevine::identity::IdentityError;
use grapevine::text::{is_hidden, sanitise_line};
use grapevine::{Node, PeerId};
use terminal_size::{Width, terminal_size};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use stop::Stop;

/// Exit code: the command line or a file it names is wrong.
pub(crate) const USAGE: u8 = 2;

/// Exit code: the system refused something.
pub(crate) const RUNTIME: u8 = 1;

/// Rows of a narrower terminal are not worth to be wrapped.
const NARROW: u16 = 20;

/// Shutting down takes 2 seconds at most; a program that is asked to end is gone within 3.
const SHUTDOWN: Duration = Duration::from_millis(2_500);

/// Why a program cannot go on: its exit code, and one line for a person.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: u8,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(code: u8, message: impl Display) -> Self {
        let message = message.to_string();
        Self { code, message }
    }
}

impl From<IdentityError> for Failure {
    fn from(error: IdentityError) -> Self {
        let code = match error {
            IdentityError::Unwritable { .. } => RUNTIME,
            _ => USAGE,
        };
        Self::new(code, format!("--identity: {error}"))
    }
}

impl From<SpawnError> for Failure {
    fn from(error: SpawnError) -> Self {
        let code = match error {
            SpawnError::TooManyBootstrap { .. } => USAGE,
            _ => RUNTIME,
        };
        Self::new(code, error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::new(RUNTIME, error)
    }
}

/// Runs a program to its end.
pub(crate) fn run<F>(program: impl FnOnce(Stop) -> F) -> ExitCode
where
    F: Future<Output = Result<u8, Failure>>,
{
    log_to_stderr();
    let outcome = tokio::runtime::Runtime::new().and_then(|runtime| {
        let outcome = runtime.block_on(async {
            let stop = Stop::on_signals()?;
            Ok(program(stop).await)
        });
        // Without waiting for a thread that reads the terminal or writes to a full pipe.
        runtime.shutdown_background();
        outcome
    });
    let outcome = outcome.unwrap_or_else(|error| Err(error.into()));
    let code = outcome.unwrap_or_else(|failure| {
        complain(&failure.message);
        failure.code
    });
    ExitCode::from(code)
}

/// One line on stderr: an error.
pub(crate) fn complain(message: &str) {
    note(&format!("error: {message}"));
}

/// One line on stderr.
pub(crate) fn note(line: &str) {
    output::to_stderr(&format!("{}\n", sanitise_line(line)));
}

/// Text as the rows of a terminal. What does not fit is continued indented, as further lines are: a row
/// that begins at the margin is the program's own.
#[allow(dead_code, reason = "a grape shows nobody's words")]
pub(crate) fn wrapped(text: &str) -> String {
    let Some((Width(columns), _)) =
        terminal_size().filter(|(Width(columns), _)| *columns >= NARROW)
    else {
        return text.into();
    };
    let options = textwrap::Options::new(columns.into()).subsequent_indent("  ");
    // What draws nothing is as wide as each terminal likes.
    let is_drawn = |c: &char| matches!(c, '\u{200c}' | '\u{200d}') || !is_hidden(*c);
    let text: String = text
        .replace('\t', "    ")
        .chars()
        .filter(is_drawn)
        .collect();
    let rows = text.split('\n').map(|line| textwrap::fill(line, &options));
    rows.collect::<Vec<_>>().join("\n")
}

/// Withdraws a node's names and closes it.
pub(crate) async fn shut_down(node: &Node) {
    let _ = tokio::time::timeout(SHUTDOWN, node.shutdown()).await;
}

/// An id as a person tells it from another: its last characters. The first are the same for all.
pub(crate) fn short(peer: &PeerId) -> String {
    let id = peer.to_base58();
    format!("12D3..{}", &id[id.len().saturating_sub(8)..])
}

/// Whether the terminal's user wants no colours, <https://no-color.org>.
pub(crate) fn no_color() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

/// Logs what `RUST_LOG` asks for: `debug`, or `grapevine=debug,libp2p_kad=info`. Not by spans and
/// fields, whose regular expressions alone would take 0.6 MiB of an idle program's memory.
fn log_to_stderr() {
    let Some(wanted) = std::env::var_os("RUST_LOG") else {
        return;
    };
    let wanted = wanted.to_string_lossy();
    match wanted.parse::<Targets>() {
        Ok(targets) => tracing_subscriber::registry()
            .with(targets)
            .with(
                tracing_subscriber::fmt::layer()
                    .with_ansi(io::stderr().is_terminal() && !no_color())
                    .with_writer(|| Log),
            )
            .init(),
        Err(error) => note(&format!(
            "nothing is logged: RUST_LOG={wanted}: {error}; write for example RUST_LOG=grapevine=debug"
        )),
    }
}

/// Where log lines go: each is written in one piece.
struct Log;

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // What a stranger said may be in it; colours are.
        let text = String::from_utf8_lossy(line);
        let shown = text.trim_end_matches('\n').replace('\n', "\n  ");
        let is_obeyed = |c: char| c.is_control() && !matches!(c, '\n' | '\t' | '\x1b');
        output::to_stderr(&format!("{}\n", shown.replace(is_obeyed, "\u{fffd}")));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
