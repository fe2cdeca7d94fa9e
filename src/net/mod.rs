//! Carries what [`proto`](crate::proto) decides: the only place that knows libp2p's Swarm.
//!
//! One task owns the Swarm and runs the [driver](driver). Each concern is a struct with private
//! state: [discovery], [names], [rendezvous], [values], [checks], [rpc], [connectivity]. They do not know each other; what one
//! learns and another needs goes up to the driver and down again. Nothing in the loop waits but its
//! `select!`, and every channel, table and frame has a bound.

mod admission;
mod checks;
pub(crate) mod connectivity;
pub(crate) mod discovery;
mod dns;
mod driver;
mod forms;
mod interfaces;
mod liveness;
mod names;
mod rendezvous;
pub(crate) mod rpc;
mod swarm;
mod turns;
mod values;
mod yamux;

use std::sync::Arc;
use std::time::Duration;

use libp2p::{Multiaddr, PeerId};
use tokio::sync::{mpsc, oneshot, watch};

pub(crate) use connectivity::KnownGrape;
pub use connectivity::Status;
pub(crate) use discovery::{Sought, Waiter};
pub(crate) use rpc::Outcome;
pub(crate) use rpc::kept::Question;
pub(crate) use rpc::link::{Lane, Link};
pub(crate) use rpc::replies::Responder;
pub(crate) use rpc::serve::{Carried, Inbound, Server, ServesQuestion, Withdrawal};
pub(crate) use rpc::single::Outbound;

use crate::error::{AnnounceError, SpawnError};
use crate::identity::Identity;
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::name::{Key, ServiceName};
use crate::proto::addresses::host;
use crate::proto::bep44::Target;
use crate::proto::routes::Routes;
use crate::store::Registry;

/// The commands that may wait for the loop; who sends one more waits.
const COMMANDS: usize = 256;

/// What connections run over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    /// TCP and QUIC, with names resolved by DNS.
    Network,
    /// Channels inside this process.
    Memory,
}

/// What a node is, as plain configuration.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) identity: Identity,
    pub(crate) transport: Transport,
    pub(crate) listen: Vec<Multiaddr>,
    /// Addresses that others reach this node at although it does not listen on them.
    pub(crate) external: Vec<Multiaddr>,
    pub(crate) bootstrap: Vec<Multiaddr>,
    /// Keeps other nodes' announcements and answers for them.
    pub(crate) registrar: bool,
    /// Only these may connect.
    pub(crate) allowed: Option<Vec<PeerId>>,
    /// These may not.
    pub(crate) blocked: Vec<PeerId>,
    /// The longest lease that is granted: from [`MIN_LEASE`](crate::limits::MIN_LEASE) to [`LEASE`](crate::limits::LEASE).
    pub(crate) lease: Duration,
    pub(crate) limits: Limits,
}

impl Settings {
    /// Whether nothing but this machine is reached from this node, and it from nothing else, whatever
    /// becomes of the network.
    fn is_of_this_machine(&self) -> bool {
        let is_loopback = |address: &Multiaddr| host(address).is_some_and(|ip| ip.is_loopback());
        let mut all = self.listen.iter().chain(&self.bootstrap);
        self.transport == Transport::Memory || all.all(is_loopback)
    }
}

/// What a node asks its driver to do.
#[derive(Debug)]
pub(crate) enum Command {
    /// Serve a name and announce it; answered when it is published.
    Announce {
        name: ServiceName,
        handler: mpsc::Sender<Inbound>,
        done: oneshot::Sender<Result<(), AnnounceError>>,
    },
    /// Take a name back; answered when the grapes are about to be told.
    Withdraw {
        name: ServiceName,
        done: oneshot::Sender<()>,
    },
    Lookup(ServiceName, Waiter),
    Request(Outbound),
    /// Tell the closest grapes that this one carries requests to workers of a name; answered when
    /// they are told, dropped if they cannot be.
    Carry {
        key: Key,
        done: oneshot::Sender<()>,
    },
    /// This grape does not carry requests for a name any more.
    Uncarry(Key),
    /// Keep a verified value and send it to the closest grapes; answers whether it is kept.
    PutValue {
        target: Target,
        value: Vec<u8>,
        done: oneshot::Sender<bool>,
    },
    /// Ask the closest grapes for a value; answers with all different ones, unverified.
    GetValue {
        target: Target,
        done: oneshot::Sender<Vec<Vec<u8>>>,
    },
    /// Close the connections with a peer and refuse new ones.
    Block(PeerId),
    Unblock(PeerId),
    /// Withdraw all names, finish what is open, stop.
    Shutdown(oneshot::Sender<()>),
}

/// A running driver, as its node holds it.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) status: watch::Receiver<Status>,
    pub(crate) routes: Arc<Routes<Link>>,
    pub(crate) server: Arc<Server>,
    pub(crate) registry: Arc<Registry>,
    /// The other grapes that this node knows.
    pub(crate) grapes: watch::Receiver<Vec<KnownGrape>>,
    pub(crate) metrics: Arc<Metrics>,
}

/// Starts a node's driver; returns when it listens on every address.
pub(crate) async fn start(settings: Settings) -> Result<Handle, SpawnError> {
    driver::start(settings).await
}
