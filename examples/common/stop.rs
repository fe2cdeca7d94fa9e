//! The wish to stop: a signal, or nobody reading what the program writes.

use std::io;
use std::sync::{Arc, OnceLock};

use tokio::sync::watch;

use super::RUNTIME;

/// Cheap to clone; all clones are the same wish.
#[derive(Clone)]
pub(crate) struct Stop(Arc<Wish>);

struct Wish {
    cause: watch::Sender<Option<Cause>>,
    /// What is to be done before the process is ended at once.
    last: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

/// Why a program is to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// Somebody asked for it.
    Signal,
    /// Nobody reads what it writes.
    Unread,
    /// What it writes cannot be written.
    Unwritable,
}

impl Cause {
    /// The exit code of a program that runs until it is stopped.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Signal | Self::Unread => 0,
            Self::Unwritable => RUNTIME,
        }
    }
}

impl Stop {
    /// Listens for the first signal from now on. A second one ends the process at once.
    pub(crate) fn on_signals() -> io::Result<Self> {
        let stop = Self(Arc::new(Wish {
            cause: watch::Sender::new(None),
            last: OnceLock::new(),
        }));
        let mut signals = Signals::listen()?;
        let asked = stop.clone();
        tokio::spawn(async move {
            signals.next().await;
            asked.ask(Cause::Signal);
            signals.next().await;
            if let Some(last) = asked.0.last.get() {
                last();
            }
            std::process::exit(130);
        });
        Ok(stop)
    }

    /// Asks the program to stop.
    pub(crate) fn ask(&self, cause: Cause) {
        self.0.cause.send_replace(Some(cause));
    }

    /// Why the program is to stop, if it is.
    #[allow(dead_code, reason = "only chat ends by itself")]
    pub(crate) fn cause(&self) -> Option<Cause> {
        *self.0.cause.borrow()
    }

    /// Does this before a second signal ends the process. Only what is given first is done.
    #[allow(dead_code, reason = "only chat leaves something behind")]
    pub(crate) fn before_exit(&self, last: impl Fn() + Send + Sync + 'static) {
        let _ = self.0.last.set(Box::new(last));
    }

    /// Returns when the program is to stop. Cancel-safe.
    pub(crate) async fn asked(&self) -> Cause {
        let mut causes = self.0.cause.subscribe();
        let cause = causes.wait_for(Option::is_some).await;
        // `self` holds the sender, so the channel cannot close.
        cause.ok().and_then(|cause| *cause).unwrap_or(Cause::Signal)
    }

    /// What `work` leads to, unless the program is to stop before.
    pub(crate) async fn or<T>(&self, work: impl Future<Output = T>) -> Result<T, Cause> {
        tokio::select! {
            biased;
            cause = self.asked() => Err(cause),
            result = work => Ok(result),
        }
    }

    /// What work with files that the user names leads to, unless the program is to stop before: a disk
    /// may be far away, and what looks like a file may never end.
    pub(crate) async fn or_blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Cause> {
        let worked = self.or(tokio::task::spawn_blocking(work)).await?;
        // A panic goes on where the work is wanted.
        Ok(worked.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic())))
    }
}

#[cfg(unix)]
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    /// The terminal was closed. None where that is to be survived.
    hang_up: Option<tokio::signal::unix::Signal>,
}

#[cfg(unix)]
impl Signals {
    fn listen() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};

        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: match ignores(SignalKind::hangup().as_raw_value()) {
                true => None,
                false => Some(signal(SignalKind::hangup())?),
            },
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            Some(_) = async { self.hang_up.as_mut()?.recv().await } => {}
        }
    }
}

/// Whether the program was started so that a signal means nothing to it, as `nohup` does with the one
/// of a terminal that is closed.
#[cfg(unix)]
pub(crate) fn ignores(signal: i32) -> bool {
    // Elsewhere than on Linux there is no safe way to know.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_some_and(|mask| mask & 1 << (signal - 1) != 0)
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending().await
        }
    }
}
