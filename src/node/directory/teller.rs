//! Tells the other grapes what changes of this one's workers.
//!
//! In a network of up to [`K`](libp2p::kad::K_VALUE) grapes each one is responsible for every name, and is
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
use super::told::{News, Sent, Told};
use crate::name;
use crate::net::{Command, KnownGrape, Outcome};
use crate::node::{Node, Shared, call};
use crate::proto::wire::{Digest, REGISTRY};
use crate::store::Registry;

/// How long a grape may take to confirm a batch.
const BATCH_DEADLINE: Duration = Duration::from_secs(5);

/// The task that tells the other grapes.
pub(super) struct Teller {
    node: Weak<Shared>,
    registry: Arc<Registry>,
    grapes: HashMap<PeerId, Told>,
    carrying: Carrying,
}

/// What a grape is told.
struct Outgoing {
    grape: PeerId,
    news: News,
}

/// A grape's answer to it.
struct Answer {
    grape: PeerId,
    sent: Sent,
    outcome: Outcome,
}

impl Outgoing {
    async fn send(self, node: Node) -> Answer {
        let outcome = match self.news.batch.encode() {
            Ok(payload) => {
                call::call_peer(&node, self.grape, REGISTRY, payload, BATCH_DEADLINE).await
            }
            // It is within the bounds.
            Err(error) => Outcome::NotSent(error.to_string()),
        };
        Answer {
            grape: self.grape,
            sent: self.news.sent,
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
                self.on_grapes(&known, now);
                let (outgoing, due) = self.poll(now);
                for news in outgoing {
                    telling.push(Either::Left(news.send(node.clone()).map(Ended::Batch)));
                }
                due
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

    fn on_grapes(&mut self, known: &[KnownGrape], now: Instant) {
        self.grapes
            .retain(|peer, told| told.is_busy() || known.iter().any(|grape| grape.peer == *peer));
        for grape in known.iter().filter(|grape| grape.takes_workers) {
            let told = self.grapes.entry(grape.peer).or_default();
            told.on_connected(grape.connected, now);
        }
    }

    /// What to tell which grapes now, and when to look again.
    fn poll(&mut self, now: Instant) -> (Vec<Outgoing>, Option<Instant>) {
        let workers = self.registry.workers();
        let next = |(grape, told): (&PeerId, &mut Told)| {
            let grape = *grape;
            let news = told.next(&workers, now)?;
            Some(Outgoing { grape, news })
        };
        let outgoing = self.grapes.iter_mut().filter_map(next).collect();
        let due = self.grapes.values().filter_map(|told| told.due(&workers));
        (outgoing, due.min())
    }

    fn on_answer(&mut self, answer: Answer) {
        if !matches!(answer.outcome, Outcome::Answered(Ok(_))) {
            tracing::debug!(grape = %answer.grape, outcome = ?answer.outcome, "a grape took no batch");
        }
        if let Some(told) = self.grapes.get_mut(&answer.grape) {
            told.on_outcome(answer.sent, &answer.outcome, Instant::now());
        }
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
