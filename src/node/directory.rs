//! Announces programs that speak no libp2p: workers, each at an IP address and a port.
//!
//! A grape tells the others what changes of its workers, in batches over the RPC, so that each has
//! all of them and answers for them from its own memory. To a node of libp2p, the grape itself is the
//! provider of its workers' names: it carries the requests to them.

mod carrying;
mod looks;
mod teller;
mod told;
mod withdrawing;

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use futures::stream::{FuturesUnordered, StreamExt};
use libp2p::PeerId;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::timeout;

use super::{Node, call};
use crate::error::LookupError;
use crate::name::{self, ServiceName};
use crate::net::{Carried, Command, KnownGrape, Outcome};
use crate::proto::bep44::Target;
use crate::proto::grapes::SURELY_SMALL;
use crate::proto::wire::{Batch, BatchReply, Digest, REGISTRY};
use crate::store::Registry;
use crate::store::workers::{Full, draw};

use looks::Looks;
use teller::Teller;

/// How long a grape may take to say which workers it has.
const FIND_DEADLINE: Duration = Duration::from_secs(2);

/// What others ask of this grape's workers that may wait; one more is answered `busy`.
const CARRIED: usize = 1_024;

/// How long other grapes are waited for that may have more workers of a name, by who has some: within
/// the 2.5 seconds that Grenache's Link waits.
const MORE_PATIENCE: Duration = Duration::from_secs(2);

/// How long other grapes are waited for that may keep another version of a value.
const VALUE_PATIENCE: Duration = Duration::from_secs(1);

/// The puts and gets of values at once; further ones wait. Kademlia walks all its queries at each
/// step.
const MAX_VALUE_QUERIES: usize = 32;

/// The workers of the network, as the grapes tell each other of them.
#[derive(Clone, Debug)]
pub(crate) struct Directory {
    node: Node,
    registry: Arc<Registry>,
    looks: Arc<Looks>,
}

/// What all directories of a node share.
#[derive(Debug)]
pub(super) struct Shared {
    queries: Semaphore,
    /// Set once the other grapes are told of this one's workers.
    telling: OnceLock<()>,
    /// The last change of this grape's workers that all of them have confirmed.
    confirmed: watch::Sender<u64>,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            queries: Semaphore::new(MAX_VALUE_QUERIES),
            telling: OnceLock::new(),
            confirmed: watch::Sender::new(0),
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

/// Whether anybody serves a name could not be found out in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it takes too long to find out who serves the name")]
pub(crate) struct NotKnown;

/// Why a value was not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PutError {
    #[error("this grape keeps a newer value, or too many values")]
    Full,
    #[error("this grape is shutting down")]
    Closed,
}

impl Node {
    /// The workers of the network, if this node is a grape. The first call begins to tell the other
    /// grapes of this one's.
    pub(crate) fn directory(&self) -> Option<Directory> {
        let handle = &self.shared.handle;
        let registry = Arc::clone(handle.server.registry()?);
        self.shared.directory.telling.get_or_init(|| {
            let grapes = handle.grapes.clone();
            let teller = Teller::new(Arc::downgrade(&self.shared), Arc::clone(&registry));
            tokio::spawn(teller.run(grapes));
        });
        Some(Directory {
            node: self.clone(),
            registry,
            looks: Arc::default(),
        })
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

    /// Who serves a name: of the workers a fair sample of at most `limit`. If this grape knows of some,
    /// it does not wait long for whoever else there may be; if it knows of none, it fails when it could
    /// not find out in time whether there are any.
    pub(crate) async fn lookup(&self, service: &str, limit: usize) -> Result<Found, NotKnown> {
        let (digest, now) = (name::digest(service), Instant::now());
        let workers = self.registry.workers().sample(&digest, limit, now);
        let Ok(name) = ServiceName::from_wire(service) else {
            // A name that only Grenache's users can have.
            let peers = false;
            return Ok(Found { workers, peers });
        };
        let is_provided = self.registry.providers().has_providers(&name.key(), now);
        let is_known = is_provided || !workers.is_empty();
        // What this grape has been told of nobody, another one may know: it may be one of more than
        // either has met.
        if !is_known || !has_all(&self.node.shared.handle.grapes.borrow()) {
            return self.lookup_afar(&name, workers, limit).await;
        }
        let look = {
            let (node, registry) = (self.node.clone(), Arc::clone(&self.registry));
            || async move { has_live_peers(&node, &registry, &name).await }
        };
        let peers = match (is_provided, workers.is_empty()) {
            (false, _) => false,
            (true, false) => self.looks.verdict(digest, look).await,
            (true, true) => {
                let peers = look().await;
                self.looks.on_seen(digest, peers);
                peers
            }
        };
        Ok(Found { workers, peers })
    }

    /// Asks the providers that Kademlia finds which workers they have.
    async fn lookup_afar(
        &self,
        name: &ServiceName,
        own: Vec<SocketAddr>,
        limit: usize,
    ) -> Result<Found, NotKnown> {
        let has_own = !own.is_empty();
        let mut found = Found {
            workers: own,
            peers: false,
        };
        let more = self.find_afar(name, &mut found);
        if has_own {
            // Whoever has not answered by then is left out.
            let _ = timeout(MORE_PATIENCE, more).await;
        } else {
            more.await?;
        }
        draw(&mut found.workers, limit);
        Ok(found)
    }

    async fn find_afar(&self, name: &ServiceName, found: &mut Found) -> Result<(), NotKnown> {
        let live = match self.node.lookup(name).await {
            Ok(live) => live,
            Err(LookupError::TimedOut(_)) => return Err(NotKnown),
            // Nobody is there.
            Err(_) => return Ok(()),
        };
        let digest = name.digest();
        let mut asked: FuturesUnordered<_> = live
            .iter()
            .map(|provider| self.workers_at(provider.peer, digest))
            .collect();
        while let Some(workers) = asked.next().await {
            // A provider without workers serves the name itself.
            found.peers |= workers.is_empty();
            found.workers.extend(workers);
        }
        Ok(())
    }

    /// The workers of another node; of one that is no grape, none.
    async fn workers_at(&self, peer: PeerId, service: Digest) -> Vec<SocketAddr> {
        let batch = Batch {
            changes: Vec::new(),
            find: vec![service],
        };
        let payload = batch.encode().unwrap_or_default();
        let outcome = call::call_peer(&self.node, peer, REGISTRY, payload, FIND_DEADLINE).await;
        let Outcome::Answered(Ok(payload)) = outcome else {
            return Vec::new();
        };
        let reply = BatchReply::decode(&payload).unwrap_or_default();
        reply.found.into_iter().next().unwrap_or_default()
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
        match timeout(VALUE_PATIENCE, kept).await {
            // A grape that does not answer is not waited for: this one keeps the value.
            Ok(Ok(true)) | Err(_) => Ok(()),
            Ok(Ok(false)) => Err(PutError::Full),
            Ok(Err(_)) => Err(PutError::Closed),
        }
    }

    /// All different values that this grape and those closest to the target keep for it, of which
    /// any may be forged.
    pub(crate) async fn get(&self, target: Target) -> Vec<Vec<u8>> {
        let own = self.registry.values().get(&target, Instant::now());
        if let Some(value) = own.as_ref().filter(|value| !value.is_mutable) {
            // There is no other one.
            return vec![value.bytes.clone()];
        }
        let _permit = self.node.shared.directory.queries.acquire().await;
        let (done, found) = oneshot::channel();
        let command = Command::GetValue { target, done };
        if self.node.send(command).await.is_err() {
            // A node that is shut down knows of none.
            return Vec::new();
        }
        let Some(own) = own else {
            return found.await.unwrap_or_default();
        };
        // A grape that does not answer is not waited for.
        let others = timeout(VALUE_PATIENCE, found).await;
        others.map_or_else(|_| vec![own.bytes], Result::unwrap_or_default)
    }

    /// What other nodes ask of this grape's workers; `None` while somebody else receives it.
    pub(crate) fn carry(&self) -> Option<mpsc::Receiver<Carried>> {
        let (carrier, carried) = mpsc::channel(CARRIED);
        let is_ours = self.node.shared.handle.server.carry(carrier);
        is_ours.then_some(carried)
    }
}

/// Whether a provider of the name is live that does not just carry requests to workers.
async fn has_live_peers(node: &Node, registry: &Registry, name: &ServiceName) -> bool {
    let Ok(live) = node.lookup(name).await else {
        return false;
    };
    let (digest, now) = (name.digest(), Instant::now());
    let carriers = registry.workers().grapes(&digest, usize::MAX, now);
    live.iter()
        .any(|provider| !carriers.contains(&provider.peer))
}

/// Whether a grape that knows these others is told of every worker and every name, as far as it can tell.
fn has_all(known: &[KnownGrape]) -> bool {
    known.len() < SURELY_SMALL
}
