//! The edge to Grenache: its HTTP API for whoever announces and looks up there, and its transports
//! for requests in both directions.
//!
//! A [`Gateway`] serves beside a [`Node`] that is a grape. Grenache's programs (`grenache-nodejs-link` and what stands on it) use it in place of `grenache-grape`.
//!
//! * `api` answers `POST /announce`, `/lookup`, `/put` and `/get` as grenache-grape 1.0.0 does, word
//!   for word, and beyond it `/unannounce` and `/healthz`.
//! * `carrier` takes the requests of Grenache's callers to libp2p peers. A lookup that finds such
//!   peers names its address beside those of Grenache's workers.
//! * `workers` takes the requests of libp2p's callers to the workers that announced here, for which
//!   the grape stands as their provider.
//! * `payload` says what is what in the JSON of one world and the bytes of the other.
//!
//! Everything here is plain HTTP from strangers: nothing proves who announces. It is bound to this
//! machine unless told otherwise.

mod api;
mod body;
mod carrier;
mod payload;
mod rpc;
mod trimmed;
mod values;
mod workers;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use crate::error::ListenError;
use crate::http::{Listener, Serving};
use crate::limits::MAX_REQUEST_TIME;
use crate::node::Node;
use api::Api;
use carrier::Carrier;
use workers::Workers;

/// How a [`Gateway`] is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where the HTTP API listens; port 0 is any free one. 127.0.0.1:30001 by default, the port of
    /// Grenache's examples on this machine only.
    pub api: SocketAddr,
    /// The port, on the same host, at which Grenache's callers reach libp2p peers; 0, the default, is
    /// any free one. Lookups tell it.
    pub carrier_port: u16,
    /// How long a worker that does not announce itself again is found. 120 seconds by default, as in
    /// Grenache, whose clients announce again after at most 180, and its servers after one.
    pub lease: Duration,
    /// The longest body of a request to the API, in bytes. 8,192 by default, as Grenache means it.
    pub max_body: usize,
    /// When a request that is carried is given up, in either direction. Its caller's own deadline does not
    /// cross over, and is meant to come first: [`MAX_REQUEST_TIME`] by default, which is also the most.
    pub deadline: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            api: (Ipv4Addr::LOCALHOST, 30_001).into(),
            carrier_port: 0,
            lease: Duration::from_secs(120),
            max_body: 8_192,
            deadline: MAX_REQUEST_TIME,
        }
    }
}

/// Why a gateway could not start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GatewayError {
    /// An address cannot be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Only grapes know what Grenache's programs announce.
    #[error("the node is no grape: build it with Role::Grape")]
    NotAGrape,
    /// The node's other gateway must be shut down first.
    #[error("the node has a gateway already")]
    AlreadyRunning,
}

/// Grenache's side of a node. Dropping it closes all its connections at once.
#[derive(Debug)]
pub struct Gateway {
    api: SocketAddr,
    carrier: SocketAddr,
    serving: Serving,
}

impl Gateway {
    /// Starts to serve for a grape, and returns when clients can connect. A node has one gateway at a
    /// time.
    ///
    /// Must be called within a Tokio runtime with I/O and time enabled. Cancel-safe: dropping the
    /// future frees the ports.
    ///
    /// # Errors
    /// See [`GatewayError`].
    pub async fn spawn(node: Node, config: Config) -> Result<Self, GatewayError> {
        let directory = node.directory().ok_or(GatewayError::NotAGrape)?;
        let api = Listener::bind(config.api).await?;
        let carrier = SocketAddr::new(config.api.ip(), config.carrier_port);
        let carrier = Listener::bind(carrier).await?;
        let deadline = config.deadline.min(MAX_REQUEST_TIME);
        let mut gateway = Self {
            api: api.address(),
            carrier: carrier.address(),
            serving: Serving::new(),
        };
        let serving = &mut gateway.serving;
        let carried = directory.carry().ok_or(GatewayError::AlreadyRunning)?;
        let workers = Workers::new(directory.clone(), deadline);
        serving.spawn(workers.serve(carried, serving.stopped()));
        let to_peers = Carrier::new(node.clone(), deadline, serving.stopped());
        serving.spawn(to_peers.closed());
        serving.serve(carrier, to_peers.routes());
        let answers = Api::new(node, directory, &config, gateway.carrier.port());
        serving.serve(api, answers.routes());
        Ok(gateway)
    }

    /// Where the HTTP API listens.
    pub fn api_address(&self) -> SocketAddr {
        self.api
    }

    /// Where Grenache's callers reach libp2p peers, over WebSocket and HTTP.
    pub fn carrier_address(&self) -> SocketAddr {
        self.carrier
    }

    /// Returns when a client has begun to speak TLS, with where it is: one of Grenache's with `secure`. It
    /// cannot use the API, nor reach libp2p peers. Cancel-safe.
    pub fn tls_client(&self) -> impl Future<Output = IpAddr> + Send + use<> {
        let mut clients = self.serving.tls_clients();
        async move {
            match clients
                .wait_for(Option::is_some)
                .await
                .map(|client| *client)
            {
                Ok(Some(client)) => client,
                // It is shut down.
                _ => std::future::pending().await,
            }
        }
    }

    /// Takes no more connections, answers what is under way for up to a second, and closes. Dropping
    /// the future closes at once.
    pub async fn shutdown(self) {
        self.serving.shutdown().await;
    }
}
