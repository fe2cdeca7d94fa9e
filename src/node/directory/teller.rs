//! Tells the other grapes what changes of this one's workers.
//!
//! In a network of up to [`K`](kad::K_VALUE) grapes each one is responsible for every name, and is
//! told of every worker. In a larger one the grape provides its workers' names in Kademlia, which
//! finds the grapes that are responsible; who looks a name up asks the grape for the workers.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use futures::future::{Either, FutureExt};
use futures::stream::{FuturesUnordered, StreamExt};
use libp2p::PeerId;
use tokio::sync::{oneshot, watch};
use tokio::time::sleep_until;

use super::carrying::Carrying;
use super::is_small;
use crate::name;
use crate::net::{Command, KnownGrape, Outcome};
use crate::node::{Node, Shared, call};
use crate::proto::wire::{Batch, Digest, ErrorCode, MAX_CHANGES, REGISTRY};
use crate::store::Registry;

/// How long a grape may take to confirm a batch.
const BATCH_DEADLINE: Duration = Duration::from_secs(5);

/// The pause before a grape that did not take a batch is told again.
const RETRY: Duration = Duration::from_secs(1);

/// The task that tells the other grapes.
pub(super) struct Teller {
    node: Weak<Shared>,
    registry: Arc<Registry>,
    grapes: HashMap<PeerId, Told>,
    carrying: Carrying,
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

/// The changes up to a number, for a grape.
struct Outgoing {
    grape: PeerId,
    connected: Option<u64>,
    up_to: u64,
    batch: Batch,
}

/// A grape's answer to them.
struct Answer {
    grape: PeerId,
    connected: Option<u64>,
    up_to: u64,
    outcome: Outcome,
}

impl Outgoing {
    async fn send(self, node: Node) -> Answer {
        let outcome = match self.batch.encode() {
            Ok(payload) => {
                call::call_peer(&node, self.grape, REGISTRY, payload, BATCH_DEADLINE).await
            }
            // It is within the bounds.
            Err(error) => Outcome::NotSent(error.to_string()),
        };
        Answer {
            grape: self.grape,
            connected: self.connected,
            up_to: self.up_to,
            outcome,
        }
    }
}

/// Provides a service that this grape's workers serve, or does not any more.
async fn carry(node: Node, service: Digest, is_served: bool) -> Digest {
    let key = name::key(&service);
    if !is_served {
        // A node that is shut down provides nothing.
        let _ = node.send(Command::Uncarry(key)).await;
        return service;
    }
    let (done, carried) = oneshot::channel();
    if node.send(Command::Carry { key, done }).await.is_ok() {
        // One that could not be provided is tried again when it is due.
        let _ = carried.await;
    }
    service
}

/// What has become of something that was told.
enum Ended {
    Batch(Answer),
    Carried(Digest),
}

impl Teller {
    pub(super) fn new(node: Weak<Shared>, registry: Arc<Registry>) -> Self {
        Self {
            node,
            registry,
            grapes: HashMap::new(),
            carrying: Carrying::default(),
        }
    }

    /// Runs as long as its node.
    pub(super) async fn run(mut self, mut grapes: watch::Receiver<Vec<KnownGrape>>) {
        let mut telling = FuturesUnordered::new();
        loop {
            let known = grapes.borrow_and_update().clone();
            let now = Instant::now();
            let Some(shared) = self.node.upgrade() else {
                return;
            };
            let node = Node { shared };
            let due = if is_small(&known) {
                self.on_grapes(&known);
                for batch in self.batches(now) {
                    telling.push(Either::Left(batch.send(node.clone()).map(Ended::Batch)));
                }
                self.grapes.values().filter_map(|told| told.retry).min()
            } else {
                self.carrying.learn(&self.registry.workers(), now);
                while let Some(service) = self.carrying.poll(now) {
                    let is_served = self.registry.workers().has_own(&service, now);
                    let carried = carry(node.clone(), service, is_served);
                    telling.push(Either::Right(carried.map(Ended::Carried)));
                }
                self.carrying.next_due()
            };
            drop(node);
            tokio::select! {
                () = self.registry.changed() => {}
                changed = grapes.changed() => if changed.is_err() { return },
                Some(ended) = telling.next() => match ended {
                    Ended::Batch(answer) => self.on_answer(answer),
                    Ended::Carried(service) => {
                        let now = Instant::now();
                        let is_served = self.registry.workers().has_own(&service, now);
                        self.carrying.on_carried(service, is_served, now);
                    }
                },
                () = until(due) => {}
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
    fn batches(&mut self, now: Instant) -> Vec<Outgoing> {
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
            batches.push(Outgoing {
                grape: *grape,
                connected: told.connected,
                up_to,
                batch,
            });
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
