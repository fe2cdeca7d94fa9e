//! The edge to Grenache: its HTTP API for whoever announces and looks up there, and its transports
//! for requests in both directions.
//!
//! A [`Gateway`] is an ordinary client of a [`Node`], which should be a grape. Grenache's programs
//! (`grenache-nodejs-link` and what stands on it) use it in place of `grenache-grape`.
//!
//! * `api` answers `POST /announce`, `/lookup`, `/put` and `/get` as grenache-grape 1.0.0 does, word
//!   for word, and beyond it `/unannounce` and `/healthz`.
//!
//! Everything here is plain HTTP from strangers: nothing proves who announces. It is bound to this
//! machine unless told otherwise.

mod api;
mod listener;
mod values;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::node::Node;
use api::Api;
use listener::Listener;

/// How a [`Gateway`] is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where the HTTP API listens; port 0 is any free one. 127.0.0.1:30001 by default, the port of
    /// Grenache's examples on this machine only.
    pub api: SocketAddr,
    /// How long a worker that does not announce itself again is found. 120 seconds by default, as in
    /// Grenache, whose clients announce again after at most 180, and its servers after one.
    pub lease: Duration,
    /// The longest body of a request to the API, in bytes. 8,192 by default, as Grenache means it.
    pub max_body: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            api: (Ipv4Addr::LOCALHOST, 30_001).into(),
            lease: Duration::from_secs(120),
            max_body: 8_192,
        }
    }
}

/// Why a gateway could not start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GatewayError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {reason}")]
    Listen {
        /// The address as it was given.
        address: SocketAddr,
        /// What the system said, with the remedy where there is one.
        reason: String,
    },
}

/// Grenache's HTTP API, served for a node. Dropping it closes all its connections at once.
#[derive(Debug)]
pub struct Gateway {
    api: SocketAddr,
    tasks: JoinSet<()>,
    stop: watch::Sender<()>,
}

impl Gateway {
    /// Starts to serve, and returns when clients can connect.
    ///
    /// Must be called within a Tokio runtime with I/O and time enabled.
    ///
    /// # Errors
    /// [`GatewayError::Listen`] if an address cannot be listened on.
    pub async fn spawn(node: Node, config: Config) -> Result<Self, GatewayError> {
        let listener = bind(config.api).await?;
        let (stop, stopped) = watch::channel(());
        let api = listener.address();
        let routes = Api::new(node, &config).routes();
        let mut tasks = JoinSet::new();
        tasks.spawn(listener.serve(routes, stopped));
        Ok(Self { api, tasks, stop })
    }

    /// Where the HTTP API listens.
    pub fn api_address(&self) -> SocketAddr {
        self.api
    }

    /// Takes no more connections, answers what is under way for up to a second, and closes.
    pub async fn shutdown(mut self) {
        self.stop.send_replace(());
        while self.tasks.join_next().await.is_some() {}
    }
}

async fn bind(address: SocketAddr) -> Result<Listener, GatewayError> {
    Listener::bind(address).await.map_err(|error| {
        let reason = match error.kind() {
            io::ErrorKind::AddrInUse => format!("{error}; stop what uses it, or take another port"),
            io::ErrorKind::AddrNotAvailable => format!("{error}; this machine does not have it"),
            io::ErrorKind::PermissionDenied => format!("{error}; take a port above 1023"),
            _ => error.to_string(),
        };
        GatewayError::Listen { address, reason }
    })
}
