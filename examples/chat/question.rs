//! A question on a terminal that cannot be edited on, or that only a part of the output goes to. What
//! is written while it is open is not to stand behind it on one line.

use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::common::output::{Stream, Typing};

/// How long a program that reads our output, as in `chat | tee log`, gets to show it before the
/// question is asked again below it.
const SHOWN_WITHIN: Duration = Duration::from_millis(100);

/// Cheap to share: all clones are one question.
#[derive(Clone, Default)]
pub(crate) struct OpenQuestion(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// While it waits for an answer.
    question: Option<String>,
    /// Counts what happens.
    turn: u64,
}

impl OpenQuestion {
    pub(crate) fn ask(&self, question: &str) {
        let mut state = self.lock();
        state.turn += 1;
        state.question = Some(question.into());
        show(question);
    }

    /// Shows it again whenever the program goes on after it was stopped, as by Ctrl-Z: what the shell has
    /// written stands above it.
    #[cfg(unix)]
    pub(crate) fn attend_to_jobs(&self) -> io::Result<()> {
        use rustix::process::Signal;
        use tokio::signal::unix::{SignalKind, signal};

        let mut goes_on = signal(SignalKind::from_raw(Signal::CONT.as_raw()))?;
        let question = self.clone();
        tokio::spawn(async move {
            while goes_on.recv().await.is_some() {
                if let Some(question) = &question.lock().question {
                    show(question);
                }
            }
        });
        Ok(())
    }

    /// Enter has ended its line.
    pub(crate) fn is_answered(&self) {
        let mut state = self.lock();
        state.turn += 1;
        state.question = None;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks again when another program has shown what was written so far, if nothing else has happened.
    fn ask_again(&self, turn: u64) {
        let state = Arc::clone(&self.0);
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(SHOWN_WITHIN);
                let state = state.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(question) = state.question.as_ref().filter(|_| state.turn == turn) else {
                    return;
                };
                if is_read() {
                    return show(question);
                }
            }
        });
    }
}

impl Typing for OpenQuestion {
    fn write_beside(&self, text: &str, stream: Stream) -> io::Result<()> {
        let mut state = self.lock();
        let target = Target::of(stream);
        state.turn += 1;
        let Some(question) = state.question.clone().filter(|_| target != Target::File) else {
            return write(text, stream);
        };
        show("\n");
        write(text, stream)?;
        match target {
            Target::Terminal => show(&question),
            Target::Program | Target::File => self.ask_again(state.turn),
        }
        Ok(())
    }
}

/// What is at the other end of a stream.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    Terminal,
    /// Which may show it on the terminal.
    Program,
    File,
}

impl Target {
    fn of(stream: Stream) -> Self {
        let is_terminal = match stream {
            Stream::Stdout => io::stdout().is_terminal(),
            Stream::Stderr => io::stderr().is_terminal(),
        };
        if is_terminal {
            Self::Terminal
        } else if is_pipe(stream) {
            Self::Program
        } else {
            Self::File
        }
    }
}

#[cfg(unix)]
fn is_pipe(stream: Stream) -> bool {
    use rustix::fs::{FileType, fstat};

    let stat = match stream {
        Stream::Stdout => fstat(io::stdout()),
        Stream::Stderr => fstat(io::stderr()),
    };
    let kind = stat.map(|stat| FileType::from_raw_mode(stat.st_mode));
    matches!(kind, Ok(FileType::Fifo | FileType::Socket))
}

#[cfg(not(unix))]
fn is_pipe(_: Stream) -> bool {
    true
}

/// Whether the program behind stdout has read all that was written.
#[cfg(unix)]
fn is_read() -> bool {
    rustix::io::ioctl_fionread(io::stdout()).is_ok_and(|count| count == 0)
}

#[cfg(not(unix))]
fn is_read() -> bool {
    true
}

/// Writes to the terminal.
fn show(text: &str) {
    // Nobody to ask if it fails; the line may come all the same.
    let _ = match io::stderr().is_terminal() || !io::stdout().is_terminal() {
        true => write(text, Stream::Stderr),
        false => write(text, Stream::Stdout),
    };
}

fn write(text: &str, stream: Stream) -> io::Result<()> {
    match stream {
        Stream::Stdout => {
            let mut stdout = io::stdout().lock();
            stdout.write_all(text.as_bytes())?;
            stdout.flush()
        }
        Stream::Stderr => io::stderr().write_all(text.as_bytes()),
    }
}
