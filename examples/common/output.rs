//! Lines of data on stdout, and beside them what a person is told on stderr.
//!
//! Somebody may be typing on the terminal that these lines appear on: everything that is written there
//! goes through what keeps the typed line whole.

use std::io::{self, ErrorKind, Write};
use std::sync::{Arc, OnceLock};

use grapevine::text::sanitise_line;
use tokio::io::AsyncWriteExt;

use super::stop::{Cause, Stop};
use super::{complain, note};

/// Where data goes. Cheap to clone. Nobody reading it any more is a wish to stop.
#[derive(Clone)]
pub(crate) struct Output {
    stdout: Arc<tokio::sync::Mutex<tokio::io::Stdout>>,
    stop: Stop,
}

/// One of the two streams that a program writes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// Where somebody types.
pub(crate) trait Typing: Send + Sync {
    /// Writes whole lines to a stream, beside the line that is being typed if that is on the same
    /// terminal. Blocks until the system has taken them.
    fn write_beside(&self, text: &str, stream: Stream) -> io::Result<()>;
}

static TYPING: OnceLock<Arc<dyn Typing>> = OnceLock::new();

/// Makes everything that is written from now on heed what somebody types. Only the first one counts:
/// a program has one standard input.
#[allow(dead_code, reason = "only chat is typed to")]
pub(crate) fn heed(typing: Arc<dyn Typing>) {
    let _ = TYPING.set(typing);
}

/// Writes whole lines to stderr. If nobody reads it any more there is nobody to tell.
pub(crate) fn to_stderr(text: &str) {
    let _ = match TYPING.get() {
        Some(typing) => typing.write_beside(text, Stream::Stderr),
        None => io::stderr().write_all(text.as_bytes()),
    };
}

impl Output {
    pub(crate) fn stdout(stop: Stop) -> Self {
        let stdout = Arc::new(tokio::sync::Mutex::new(tokio::io::stdout()));
        Self { stdout, stop }
    }

    /// Writes a line. A reader who is slow delays only who prints, never the node.
    pub(crate) async fn print(&self, line: impl Into<String>) {
        // What comes of it is the stop's.
        let _ = self.try_print(line).await;
    }

    /// Writes a line as [`print`](Self::print) does. Returns when the system has taken it, a terminal
    /// shows it, or with an error if not.
    pub(crate) async fn try_print(&self, line: impl Into<String>) -> io::Result<()> {
        let mut line = line.into();
        line.push('\n');
        let written = self.write(line).await;
        if let Err(error) = &written {
            self.stop.ask(match error.kind() {
                ErrorKind::BrokenPipe => Cause::Unread,
                _ => {
                    complain(&format!("cannot write to standard output: {error}"));
                    Cause::Unwritable
                }
            });
        }
        written
    }

    /// Tells a person something, beside the data.
    pub(crate) async fn note(&self, line: &str) {
        if TYPING.get().is_none() {
            return note(line);
        }
        // A terminal that takes nothing at the moment, because somebody has pressed Ctrl-S.
        let line = sanitise_line(line).into_owned();
        let _ = tokio::task::spawn_blocking(move || note(&line)).await;
    }

    async fn write(&self, line: String) -> io::Result<()> {
        // Lines appear in the order in which they are printed.
        let mut stdout = self.stdout.lock().await;
        let Some(typing) = TYPING.get() else {
            stdout.write_all(line.as_bytes()).await?;
            return stdout.flush().await;
        };
        let written =
            tokio::task::spawn_blocking(move || typing.write_beside(&line, Stream::Stdout));
        written.await.map_err(io::Error::other)?
    }
}

/// Whether the program was started without a standard output, as by `>&-` in a shell.
///
/// Before a program runs, the standard library opens `/dev/null` in place of what is closed, for
/// reading and writing. A shell opens it for writing only. Other programs that start one and want none
/// of its output open it as the library does: then the parent is no shell, or has no other output.
#[cfg(target_os = "linux")]
#[allow(dead_code, reason = "a grape prints nothing that is lost")]
pub(crate) fn is_closed() -> bool {
    use std::fs::{read_link, read_to_string};
    use std::path::Path;

    use rustix::fs::{OFlags, fcntl_getfl};

    const SHELLS: &[&str] = &[
        "ash", "bash", "busybox", "dash", "fish", "ksh", "mksh", "sh", "zsh",
    ];
    let null = Path::new("/dev/null");
    let is_null = |path: String| read_link(path).is_ok_and(|file| file == null);
    let is_both = fcntl_getfl(io::stdout()).is_ok_and(|flags| flags.contains(OFlags::RDWR));
    if !is_both || !is_null("/proc/self/fd/1".into()) {
        return false;
    }
    let Some(parent) = rustix::process::getppid() else {
        return false;
    };
    let parent = format!("/proc/{}", parent.as_raw_nonzero());
    let name = read_to_string(format!("{parent}/comm")).unwrap_or_default();
    SHELLS.contains(&name.trim()) && !is_null(format!("{parent}/fd/1"))
}

/// Elsewhere nothing tells one from the other.
#[cfg(not(target_os = "linux"))]
#[allow(dead_code, reason = "a grape prints nothing that is lost")]
pub(crate) fn is_closed() -> bool {
    false
}
