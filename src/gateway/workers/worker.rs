//! One worker: which transport it speaks, its connection, and whether it is there.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::http;
use super::socket::{ConnectError, Socket};
use super::tls;
use crate::gateway::rpc::Answer;

/// How long connecting to a worker may take. It is on this machine or near it.
pub(super) const CONNECT_DEADLINE: Duration = Duration::from_secs(1);

/// How long a worker whose transport is not known may take to a WebSocket's handshake. One that
/// speaks it answers within milliseconds, and Grenache's HTTP workers never do.
const PATIENCE: Duration = Duration::from_millis(200);

/// How long a worker is given to the handshake of a WebSocket that speaks nothing else: it computes, and
/// those who call it have deadlines of their own.
const BUSY: Duration = Duration::from_secs(60);

/// Why a worker with Grenache's `secure` cannot be called.
const TLS: &str = "it speaks TLS (\"secure\" in Grenache), which grapes do not; run it without";

/// The calls that one worker has open; one more goes elsewhere. A quarter of those that a node has,
/// so that one worker that hangs does not make all of them wait.
pub(super) const MAX_OPEN: usize = 512;

/// How long a worker that was seen, or missed, counts as there, or gone: a lookup asks this of every
/// provider, and within it a worker that has died is still noticed by who calls it.
const VERDICT: Duration = Duration::from_secs(3);

/// A worker, known by its address alone.
pub(super) struct Worker {
    at: SocketAddr,
    http: http::Client,
    /// What it spoke last.
    transport: Mutex<Option<Transport>>,
    /// Locked while it is being opened.
    socket: tokio::sync::Mutex<Option<Arc<Socket>>>,
    /// Locked while somebody finds out whether it is there.
    probing: tokio::sync::Mutex<()>,
    seen: Mutex<Option<Seen>>,
    has_answered: AtomicBool,
    open: Semaphore,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    Http,
    Socket,
}

impl Transport {
    fn other(self) -> Self {
        match self {
            Self::Http => Self::Socket,
            Self::Socket => Self::Http,
        }
    }
}

#[derive(Clone, Copy)]
struct Seen {
    at: Instant,
    is_there: bool,
}

/// Why a call has no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failed {
    /// It has not run.
    NotSent(String),
    /// It has not run: too many are open.
    Busy,
    /// It may have run.
    Broken(String),
    /// It has run, and its answer is longer than a message may be.
    TooLarge,
}

/// Why a call has no answer by one transport.
pub(super) enum Missed {
    /// The worker does not speak it; the call has not run.
    OtherTransport,
    Failed(Failed),
}

impl Worker {
    pub(super) fn new(at: SocketAddr, http: http::Client) -> Self {
        Self {
            at,
            http,
            transport: Mutex::default(),
            socket: tokio::sync::Mutex::default(),
            probing: tokio::sync::Mutex::default(),
            seen: Mutex::default(),
            has_answered: AtomicBool::new(false),
            open: Semaphore::new(MAX_OPEN),
        }
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.at
    }

    pub(super) fn open_calls(&self) -> usize {
        MAX_OPEN - self.open.available_permits()
    }

    /// Whether it was not there a moment ago.
    pub(super) fn is_down(&self) -> bool {
        self.verdict() == Some(false)
    }

    /// Whether it can be connected to, or could be a moment ago. All who ask at once wait for the same
    /// connection.
    pub(super) async fn is_there(&self) -> bool {
        if let Some(is_there) = self.verdict() {
            return is_there;
        }
        let _alone = self.probing.lock().await;
        if let Some(is_there) = self.verdict() {
            return is_there;
        }
        let is_there = match self.transport() {
            None => self.learn().await.is_ok(),
            Some(_) => {
                let connected = timeout(CONNECT_DEADLINE, TcpStream::connect(self.at)).await;
                matches!(connected, Ok(Ok(_)))
            }
        };
        self.see(is_there);
        is_there
    }

    /// Calls it by the transport that it spoke last, or by the other one if it refuses that.
    pub(super) async fn call(&self, service: &str, payload: &str) -> Result<Answer, Failed> {
        let Ok(_permit) = self.open.try_acquire() else {
            return Err(Failed::Busy);
        };
        let called = self.try_both(service, payload).await;
        match &called {
            Ok(_) => self.see(true),
            Err(Failed::NotSent(_)) => self.see(false),
            Err(Failed::TooLarge) => self.see(true),
            Err(Failed::Busy | Failed::Broken(_)) => {}
        }
        called
    }

    async fn try_both(&self, service: &str, payload: &str) -> Result<Answer, Failed> {
        let first = match self.transport() {
            Some(transport) => transport,
            None => self.learn().await.map_err(Failed::NotSent)?,
        };
        // One that is busy may have let a handshake pass, and then says that it is no HTTP worker.
        let mut patience = CONNECT_DEADLINE;
        for transport in [first, first.other(), first] {
            let called = match transport {
                Transport::Http => http::call(&self.http, self.at, service, payload).await,
                Transport::Socket => self.call_by_socket(service, payload, patience).await,
            };
            match called {
                Err(Missed::OtherTransport) if transport == Transport::Http => patience = BUSY,
                Err(Missed::OtherTransport) => {}
                Err(Missed::Failed(failed)) => return Err(self.explain(failed).await),
                Ok(answer) => {
                    *lock(&self.transport) = Some(transport);
                    self.has_answered.store(true, Ordering::Relaxed);
                    return Ok(answer);
                }
            }
        }
        *lock(&self.transport) = None;
        let reason = "it speaks neither of Grenache's transports";
        Err(self.explain(Failed::NotSent(reason.into())).await)
    }

    /// What a failure means of a worker that has never answered.
    async fn explain(&self, failed: Failed) -> Failed {
        let may_be_tls = match failed {
            Failed::NotSent(_) | Failed::Broken(_) => !self.has_answered.load(Ordering::Relaxed),
            Failed::Busy | Failed::TooLarge => false,
        };
        match may_be_tls && tls::is_spoken_at(self.at).await {
            true => Failed::NotSent(TLS.into()),
            false => failed,
        }
    }

    fn transport(&self) -> Option<Transport> {
        *lock(&self.transport)
    }

    /// Finds out which transport it speaks. Who takes no WebSocket is expected to speak HTTP.
    async fn learn(&self) -> Result<Transport, String> {
        let asked = Instant::now();
        let mut kept = self.socket.lock().await;
        if let Some(transport) = self.transport() {
            return Ok(transport);
        }
        let transport = match self.connect(asked, PATIENCE).await {
            Ok(socket) => {
                *kept = Some(socket);
                Transport::Socket
            }
            Err(ConnectError::NotASocket) => Transport::Http,
            Err(ConnectError::Unreachable(reason)) => return Err(reason),
        };
        *lock(&self.transport) = Some(transport);
        Ok(transport)
    }

    async fn call_by_socket(
        &self,
        service: &str,
        payload: &str,
        patience: Duration,
    ) -> Result<Answer, Missed> {
        // The one that is open may be about to close; a new one is not.
        let (socket, is_new) = self.socket(patience).await?;
        match socket.call(service, payload).await {
            Err(Failed::NotSent(_)) if !is_new => {
                let (socket, _) = self.socket(patience).await?;
                socket.call(service, payload).await.map_err(Missed::Failed)
            }
            called => called.map_err(Missed::Failed),
        }
    }

    /// The open socket, or a new one; and whether it is new.
    async fn socket(&self, patience: Duration) -> Result<(Arc<Socket>, bool), Missed> {
        let asked = Instant::now();
        let mut kept = self.socket.lock().await;
        if let Some(socket) = kept.as_ref().filter(|socket| socket.is_open()) {
            return Ok((Arc::clone(socket), false));
        }
        *kept = None;
        match self.connect(asked, patience).await {
            Ok(socket) => {
                *kept = Some(Arc::clone(&socket));
                Ok((socket, true))
            }
            Err(ConnectError::NotASocket) => Err(Missed::OtherTransport),
            Err(ConnectError::Unreachable(reason)) => Err(Missed::Failed(Failed::NotSent(reason))),
        }
    }

    /// Opens a socket, for who holds the lock and has waited for it since `asked`. If somebody has
    /// missed the worker meanwhile, who waited has missed it too: each would take a second more
    /// otherwise, one after the other, while another worker could answer.
    async fn connect(
        &self,
        asked: Instant,
        patience: Duration,
    ) -> Result<Arc<Socket>, ConnectError> {
        if self.is_missed_since(asked) {
            let reason = "it was not there a moment ago";
            return Err(ConnectError::Unreachable(reason.into()));
        }
        let connected = Socket::connect(self.at, patience).await;
        if let Err(ConnectError::Unreachable(_)) = connected {
            // Before the lock is given back, so that the next one knows.
            self.see(false);
        }
        connected.map(Arc::new)
    }

    fn is_missed_since(&self, asked: Instant) -> bool {
        lock(&self.seen).is_some_and(|seen| !seen.is_there && seen.at >= asked)
    }

    fn see(&self, is_there: bool) {
        let at = Instant::now();
        *lock(&self.seen) = Some(Seen { at, is_there });
    }

    fn verdict(&self) -> Option<bool> {
        let seen = *lock(&self.seen);
        let seen = seen.filter(|seen| seen.at.elapsed() < VERDICT);
        seen.map(|seen| seen.is_there)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
