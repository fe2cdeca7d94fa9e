//! Announces programs that speak no libp2p: workers, each at an IP address and a port.
//!
//! A grape tells the others what changes of its workers, in batches over the RPC, so that each has
//! all of them and answers for them from its own memory. To a node of libp2p, the grape itself is the
//! provider of its workers' names: it carries the requests to them.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use futures::stream::{FuturesUnordered, StreamExt};
use libp2p::PeerId;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::sleep_until;

use super::{Node, call};
use crate::name::{self, ServiceName};
use crate::net::{Carried, Command, KnownGrape, Outcome};
use crate::proto::bep44::Target;
use crate::proto::wire::{Batch, ErrorCode, MAX_CHANGES, REGISTRY};
use crate::store::Registry;
use crate::store::workers::Full;

/// How long a grape may take to confirm a batch.
const BATCH_DEADLINE: Duration = Duration::from_secs(5);

/// The pause before a grape that did not take a batch is told again.
const RETRY: Duration = Duration::from_secs(1);

/// What others ask of this grape's workers that may wait; one more is answered `busy`.
const CARRIED: usize = 1_024;

/// The puts and gets of values at once; further ones wait. Kademlia walks all its queries at each
/// step.
const MAX_VALUE_QUERIES: usize = 32;

/// The workers of the network, as the grapes tell each other of them.
#[derive(Clone, Debug)]
pub(crate) struct Directory {
    node: Node,
    registry: Arc<Registry>,
}

/// What all directories of a node share.
#[derive(Debug)]
pub(super) struct Shared {
    queries: Semaphore,
    /// Set once the other grapes are told of this one's workers.
    telling: OnceLock<()>,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            queries: Semaphore::new(MAX_VALUE_QUERIES),
            telling: OnceLock::new(),
        }
    }
}

/// Who serves a name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// Live workers, at any grape.
    pub(crate) workers: Vec<SocketAddr>,
    /// Whether a node of libp2p has announced it and is live.
    pub(crate) peers: bool,
}

/// Why a value was not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PutError {
    #[error("this grape keeps a newer value, or too many values")]
    Full,
    #[error("this grape is shutting down")]
    Closed,
}

impl Node {
    /// The workers of the network; this node must be a grape. The first call begins to tell the
    /// other grapes of this one's.
    pub(crate) fn directory(&self) -> Directory {
        let handle = &self.shared.handle;
        let registry = Arc::clone(&handle.registry);
        self.shared.directory.telling.get_or_init(|| {
            let grapes = handle.grapes.clone();
            let teller = Teller {
                node: Arc::downgrade(&self.shared),
                registry: Arc::clone(&registry),
                grapes: HashMap::new(),
            };
            tokio::spawn(teller.run(grapes));
        });
        Directory {
            node: self.clone(),
            registry,
        }
    }
}

impl Directory {
    /// A worker serves a service for so long, or goes on to. The other grapes hear of it in the
    /// background.
    pub(crate) fn announce(
        &self,
        service: &str,
        at: SocketAddr,
        lease: Duration,
    ) -> Result<(), Full> {
        let service = name::digest(service);
        let announced = self
            .registry
            .workers()
            .announce(&service, at, lease, Instant::now());
        if announced? {
            self.registry.on_changed();
        }
        Ok(())
    }

    /// A worker of this grape is gone; says whether it was known.
    pub(crate) fn withdraw(&self, service: &str, at: SocketAddr) -> bool {
        let service = name::digest(service);
        let withdrawn = self.registry.workers().withdraw(&service, at);
        if withdrawn {
            self.registry.on_changed();
        }
        withdrawn
    }

    /// Who serves a name: of the workers a fair sample of at most `limit`.
    pub(crate) async fn lookup(&self, service: &str, limit: usize) -> Found {
        let (digest, now) = (name::digest(service), Instant::now());
        let workers = self.registry.workers().sample(&digest, limit, now);
        let peers = match ServiceName::from_wire(service) {
            Ok(name) if self.registry.providers().has_providers(&name.key(), now) => {
                self.has_live_peers(&name).await
            }
            _ => false,
        };
        Found { workers, peers }
    }

    /// Whether a provider of the name is live that does not just carry requests to workers.
    async fn has_live_peers(&self, name: &ServiceName) -> bool {
        let Ok(live) = self.node.lookup(name).await else {
            return false;
        };
        let (digest, now) = (name.digest(), Instant::now());
        let carriers = self.registry.workers().grapes(&digest, usize::MAX, now);
        live.iter()
            .any(|provider| !carriers.contains(&provider.peer))
    }

    /// The workers that announced themselves at this grape: those it carries requests to.
    pub(crate) fn own_workers(&self, service: &str) -> Vec<SocketAddr> {
        let workers = self.registry.workers();
        workers.own(&name::digest(service), Instant::now())
    }

    /// Stores a verified value at this grape and at those closest to its target; returns when they
    /// have it.
    pub(crate) async fn put(&self, target: Target, value: Vec<u8>) -> Result<(), PutError> {
        let _permit = self.node.shared.directory.queries.acquire().await;
        let (done, kept) = oneshot::channel();
        let command = Command::PutValue {
            target,
            value,
            done,
        };
        let sent = self.node.send(command).await;
        sent.map_err(|super::Closed| PutError::Closed)?;
        match kept.await {
            Ok(true) => Ok(()),
            Ok(false) => Err(PutError::Full),
            Err(_) => Err(PutError::Closed),
        }
    }

    /// All different values that this grape and those closest to the target keep for it, of which
    /// any may be forged.
    pub(crate) async fn get(&self, target: Target) -> Vec<Vec<u8>> {
        let _permit = self.node.shared.directory.queries.acquire().await;
        let (done, found) = oneshot::channel();
        let command = Command::GetValue { target, done };
        // A node that is shut down knows of none.
        match self.node.send(command).await {
            Ok(()) => found.await.unwrap_or_default(),
            Err(super::Closed) => Vec::new(),
        }
    }

    /// What other nodes ask of this grape's workers. Only the first call gets anything.
    pub(crate) fn carry(&self) -> mpsc::Receiver<Carried> {
        let (carrier, carried) = mpsc::channel(CARRIED);
        self.node.shared.handle.server.carry(carrier);
        carried
    }
}

/// Tells the other grapes what changes of this one's workers.
struct Teller {
    node: Weak<super::Shared>,
    registry: Arc<Registry>,
    grapes: HashMap<PeerId, Told>,
}

/// What a grape has been told.
#[derive(Debug, Default)]
struct Told {
    /// The connection over which. After another one the grape may have forgotten everything.
    connected: Option<u64>,
    /// The number of the last change it has confirmed.
    up_to: u64,
    /// It is being told.
    busy: bool,
    /// It did not take the last batch and is told again then.
    retry: Option<Instant>,
    /// It is another implementation, which has no registry.
    is_deaf: bool,
}

/// A grape's answer to a batch with the changes up to a number.
struct Answer {
    grape: PeerId,
    connected: Option<u64>,
    up_to: u64,
    outcome: Outcome,
}

impl Teller {
    /// Runs as long as its node.
    async fn run(mut self, mut grapes: watch::Receiver<Vec<KnownGrape>>) {
        let mut telling = FuturesUnordered::new();
        loop {
            let known = grapes.borrow_and_update().clone();
            self.on_grapes(&known);
            let Some(shared) = self.node.upgrade() else {
                return;
            };
            let now = Instant::now();
            for (grape, connected, batch, up_to) in self.batches(now) {
                let node = Node {
                    shared: Arc::clone(&shared),
                };
                telling.push(async move {
                    let payload = batch.encode().unwrap_or_default();
                    let call = call::call_peer(&node, grape, REGISTRY, payload, BATCH_DEADLINE);
                    Answer {
                        grape,
                        connected,
                        up_to,
                        outcome: call.await,
                    }
                });
            }
            drop(shared);
            let retry = self.grapes.values().filter_map(|told| told.retry).min();
            tokio::select! {
                () = self.registry.changed() => {}
                changed = grapes.changed() => if changed.is_err() { return },
                Some(answer) = telling.next() => self.on_answer(answer),
                () = until(retry) => {}
            }
        }
    }

    fn on_grapes(&mut self, known: &[KnownGrape]) {
        self.grapes
            .retain(|peer, told| told.busy || known.iter().any(|grape| grape.peer == *peer));
        for grape in known {
            let told = self.grapes.entry(grape.peer).or_default();
            if told.connected != grape.connected {
                *told = Told {
                    connected: grape.connected,
                    busy: told.busy,
                    ..Told::default()
                };
            }
        }
    }

    /// What to tell which grapes now.
    fn batches(&mut self, now: Instant) -> Vec<(PeerId, Option<u64>, Batch, u64)> {
        let workers = self.registry.workers();
        let mut batches = Vec::new();
        for (grape, told) in &mut self.grapes {
            let waits = told.retry.is_some_and(|at| at > now);
            if told.busy || told.is_deaf || waits || told.up_to >= workers.last_change() {
                continue;
            }
            let (batch, up_to) = match told.connected {
                Some(_) => {
                    let (changes, up_to) = workers.changes(told.up_to, MAX_CHANGES, now);
                    let find = Vec::new();
                    (Batch { changes, find }, up_to)
                }
                // Asking it anything connects to it.
                None => (Batch::default(), told.up_to),
            };
            if batch.changes.is_empty() && told.connected.is_some() {
                told.up_to = up_to;
                continue;
            }
            told.busy = true;
            told.retry = None;
            batches.push((*grape, told.connected, batch, up_to));
        }
        batches
    }

    fn on_answer(&mut self, answer: Answer) {
        let Some(told) = self.grapes.get_mut(&answer.grape) else {
            return;
        };
        told.busy = false;
        match answer.outcome {
            Outcome::Answered(Ok(_)) if told.connected == answer.connected => {
                told.up_to = told.up_to.max(answer.up_to);
            }
            // Connected anew: it is told everything.
            Outcome::Answered(Ok(_)) => {}
            Outcome::Answered(Err(error)) if error.code == ErrorCode::UnknownService => {
                told.is_deaf = true;
            }
            outcome => {
                tracing::debug!(grape = %answer.grape, ?outcome, "a grape took no batch");
                told.retry = Some(Instant::now() + RETRY);
            }
        }
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
