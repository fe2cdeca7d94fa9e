//! Bounded HTTP servers: so many connections, and a deadline for each head of a request and for whoever
//! is to take an answer.
//!
//! Deadlines for bodies and for what a request leads to are the routes' matter, and so is the room that
//! answers take until they are read.

mod patient;
mod places;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::StatusCode;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncWriteExt, copy, sink};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tower_service::Service;

use crate::error::{ListenError, explain};
use crate::node::Node;
use patient::Patient;
pub(crate) use places::Places;

/// The connections that are served at once; the next ones wait in the system's queue, and those of a
/// network that has [enough](Places) are closed. An idle one holds 20 KB.
const MAX_CONNECTIONS: usize = 4_096;

/// How long a client may take to send the head of a request, and how long a connection may rest
/// between two: longer than Grenache's clients wait between the requests of a conversation.
const HEAD_DEADLINE: Duration = Duration::from_secs(30);

/// The most that is read ahead on one connection, and so the longest head of a request.
const MAX_BUFFER: usize = 16 << 10;

/// The pause after the system has refused a connection, for want of file descriptors: without it
/// the loop would spin until one is closed.
const REFUSED_PAUSE: Duration = Duration::from_millis(50);

/// The first byte of TLS, and no byte that HTTP begins with.
const TLS_HANDSHAKE: u8 = 0x16;

/// The fatal alert `handshake_failure` of TLS 1.2.
const TLS_ALERT: [u8; 7] = [0x15, 3, 3, 0, 2, 2, 40];

/// How long requests under way may take when a server is told to stop.
pub(crate) const DRAIN: Duration = Duration::from_secs(1);

/// The two ends of a connection. Routes find it as an extension of each request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ends {
    /// The address that the client connected to.
    pub(crate) here: IpAddr,
    /// Where the client is.
    pub(crate) there: IpAddr,
}

/// A socket that listens.
pub(crate) struct Listener {
    socket: TcpListener,
    address: SocketAddr,
}

/// Servers, and what they do beside. Dropping them cuts all their connections.
#[derive(Debug)]
pub(crate) struct Serving {
    tasks: JoinSet<()>,
    stop: watch::Sender<()>,
    tls_clients: watch::Sender<Option<IpAddr>>,
}

impl Serving {
    pub(crate) fn new() -> Self {
        Self {
            tasks: JoinSet::new(),
            stop: watch::Sender::new(()),
            tls_clients: watch::Sender::new(None),
        }
    }

    /// Changes when they are told to stop.
    pub(crate) fn stopped(&self) -> watch::Receiver<()> {
        self.stop.subscribe()
    }

    /// Serves routes until they are told to stop.
    pub(crate) fn serve(&mut self, listener: Listener, routes: Router) {
        let tls_clients = self.tls_clients.clone();
        self.spawn(listener.serve(routes, self.stopped(), tls_clients));
    }

    /// The last client that began to speak TLS, which no server here does.
    pub(crate) fn tls_clients(&self) -> watch::Receiver<Option<IpAddr>> {
        self.tls_clients.subscribe()
    }

    /// Runs a task that ends when they are told to stop.
    pub(crate) fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(task);
    }

    /// Takes no more connections, answers what is under way for up to [`DRAIN`], and closes.
    pub(crate) async fn shutdown(mut self) {
        self.stop.send_replace(());
        while self.tasks.join_next().await.is_some() {}
    }
}

impl Listener {
    pub(crate) async fn bind(address: SocketAddr) -> Result<Self, ListenError> {
        let bound = async {
            let socket = TcpListener::bind(address).await?;
            let address = socket.local_addr()?;
            Ok(Self { socket, address })
        };
        bound.await.map_err(|error: io::Error| ListenError {
            address,
            reason: explain(&error),
        })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves the routes until `stop` changes or its sender is dropped. Dropping the future cuts
    /// all connections.
    async fn serve(
        self,
        router: Router,
        mut stop: watch::Receiver<()>,
        tls_clients: watch::Sender<Option<IpAddr>>,
    ) {
        let mut connections = JoinSet::new();
        let places = Places::new(MAX_CONNECTIONS);
        loop {
            while connections.try_join_next().is_some() {}
            let accepted = tokio::select! {
                _ = stop.changed() => break,
                _ = connections.join_next(), if connections.len() >= MAX_CONNECTIONS => continue,
                accepted = self.socket.accept(), if connections.len() < MAX_CONNECTIONS => accepted,
            };
            match accepted {
                Ok((stream, from)) => {
                    if let Some(place) = places.take(from.ip()) {
                        let (router, tls) = (router.clone(), tls_clients.clone());
                        let conversation = converse(stream, router, stop.clone(), tls);
                        connections.spawn(async move {
                            let _place = place;
                            conversation.await;
                        });
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(REFUSED_PAUSE).await;
                }
            }
        }
        // Who connects from now on is refused at once.
        drop(self.socket);
        let drained = async { while connections.join_next().await.is_some() {} };
        // What is left after it is cut off.
        let _ = timeout(DRAIN, drained).await;
    }
}

/// Whether a node still runs, as an answer to whoever restarts what does not.
pub(crate) fn health(node: &Node) -> (StatusCode, &'static str) {
    match node.status().has_changed() {
        Ok(_) => (StatusCode::OK, "ok"),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "the node is shut down"),
    }
}

async fn converse(
    stream: TcpStream,
    router: Router,
    mut stop: watch::Receiver<()>,
    tls_clients: watch::Sender<Option<IpAddr>>,
) {
    let Ok(ends) = Ends::of(&stream) else {
        // It is closed already.
        return;
    };
    // Fails only if it is closed already.
    let _ = stream.set_nodelay(true);
    let speaks_tls = tokio::select! {
        speaks_tls = speaks_tls(&stream) => speaks_tls,
        _ = stop.changed() => return,
    };
    if speaks_tls {
        tls_clients.send_replace(Some(ends.there));
        // Who is gone already has no use for it.
        let _ = timeout(DRAIN, refuse_tls(stream)).await;
        return;
    }
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(ends);
        router.clone().call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .max_buf_size(MAX_BUFFER)
        .serve_connection(TokioIo::new(Patient::new(stream)), service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        _ = stop.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, there = %ends.there, "a connection ended");
    }
}

/// Whether a client begins with a handshake of TLS: one with Grenache's `secure` does.
async fn speaks_tls(stream: &TcpStream) -> bool {
    let mut first = [0];
    let begun = timeout(HEAD_DEADLINE, stream.peek(&mut first)).await;
    matches!(begun, Ok(Ok(1))) && first[0] == TLS_HANDSHAKE
}

async fn refuse_tls(mut stream: TcpStream) -> io::Result<()> {
    stream.write_all(&TLS_ALERT).await?;
    stream.shutdown().await?;
    // What it has sent is read, or it might see a reset instead.
    copy(&mut stream, &mut sink()).await.map(drop)
}

impl Ends {
    fn of(stream: &TcpStream) -> io::Result<Self> {
        Ok(Self {
            here: stream.local_addr()?.ip().to_canonical(),
            there: stream.peer_addr()?.ip().to_canonical(),
        })
    }
}
