//! Tells the other grapes what changes of this one's workers, in two ways.
//!
//! A grape that knows few others tells each of them of every worker. One that knows [many](SMALL)
//! provides its workers' names in Kademlia, which finds the grapes that are responsible; who looks a name
//! up asks the grape for the workers. Between [`SMALL`] and [`SURELY_LARGE`] it does both, and whom it has begun
//! to tell it tells on: how many grapes another one knows of does not matter to what it finds.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use futures::future::FutureExt;
use futures::stream::{FuturesUnordered, StreamExt};
use libp2p::{Multiaddr, PeerId};
use tokio::sync::{oneshot, watch};
use tokio::time::sleep_until;

use super::carrying::Carrying;
use super::told::{News, Sent, Told};
use crate::name;
use crate::net::{Command, KnownGrape, Outcome};
use crate::node::{Node, Shared, call};
use crate::proto::grapes::{SMALL, SURELY_LARGE, SURELY_SMALL};
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
    /// The network is so large that names are provided in Kademlia.
    carries: bool,
    /// Where this grape can be dialled.
    addresses: Vec<Multiaddr>,
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

/// Provides a service that this grape's workers serve.
async fn provide(node: Node, service: Digest) -> Ended {
    let (done, provided) = oneshot::channel();
    let key = name::key(&service);
    if node.send(Command::Carry { key, done }).await.is_ok() {
        // One that could not be provided is tried again when it is due.
        let _ = provided.await;
    }
    Ended::Provided(service)
}

/// Provides a service no longer.
async fn take_back(node: Node, service: Digest) -> Ended {
    // A node that is shut down provides nothing.
    let _ = node.send(Command::Uncarry(name::key(&service))).await;
    Ended::TakenBack(service)
}

/// What has become of something that was told.
enum Ended {
    Batch(Answer),
    Provided(Digest),
    TakenBack(Digest),
}

impl Teller {
    pub(super) fn new(node: Weak<Shared>, registry: Arc<Registry>) -> Self {
        Self {
            node,
            registry,
            grapes: HashMap::new(),
            carrying: Carrying::default(),
            carries: false,
            addresses: Vec::new(),
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
            self.on_grapes(&known, now);
            let (outgoing, due) = self.poll(now);
            for news in outgoing {
                telling.push(news.send(node.clone()).map(Ended::Batch).boxed());
            }
            self.carry_in(known.len(), now);
            self.carry_from(node.addresses(), now);
            while let Some(service) = self.carrying.poll(now) {
                telling.push(match self.serves(&service, now) {
                    true => provide(node.clone(), service).boxed(),
                    false => take_back(node.clone(), service).boxed(),
                });
            }
            let due = due.into_iter().chain(self.carrying.next_due()).min();
            let confirmed = self.grapes.values().filter_map(Told::confirmed).min();
            let shared = &node.shared.directory;
            shared.confirmed.send_replace(confirmed.unwrap_or(u64::MAX));
            drop(node);
            tokio::select! {
                () = self.registry.changed() => {}
                changed = grapes.changed() => if changed.is_err() { return },
                Some(ended) = telling.next() => match ended {
                    Ended::Batch(answer) => self.on_answer(answer),
                    Ended::Provided(service) => {
                        self.carrying.on_provided(service, Instant::now());
                    }
                    Ended::TakenBack(service) => {
                        let now = Instant::now();
                        let again = self.serves(&service, now).then_some(now);
                        self.carrying.on_taken_back(service, again);
                    }
                },
                () = until(due) => {}
            }
        }
    }

    fn on_grapes(&mut self, known: &[KnownGrape], now: Instant) {
        self.grapes
            .retain(|peer, told| told.is_busy() || known.iter().any(|grape| grape.peer == *peer));
        let is_for_all = known.len() < SURELY_LARGE;
        for grape in known.iter().filter(|grape| grape.takes_workers) {
            let told = match is_for_all {
                true => Some(self.grapes.entry(grape.peer).or_default()),
                false => self.grapes.get_mut(&grape.peer),
            };
            if let Some(told) = told {
                told.on_connected(grape.connected, now);
            }
        }
    }

    /// Decides whether names are provided in Kademlia, in a network of so many other grapes.
    fn carry_in(&mut self, grapes: usize, now: Instant) {
        // One that comes and goes makes no difference each time.
        self.carries = grapes >= SMALL || self.carries && grapes >= SURELY_SMALL;
        match self.carries {
            true => self.carrying.learn(&self.registry.workers(), now),
            false => self.carrying.stop(now),
        }
    }

    /// What others are told of the names, they are told again when it has changed.
    fn carry_from(&mut self, addresses: Vec<Multiaddr>, now: Instant) {
        if self.addresses != addresses {
            self.addresses = addresses;
            self.carrying.provide_again(now);
        }
    }

    /// Whether a service is to be provided in Kademlia.
    fn serves(&self, service: &Digest, now: Instant) -> bool {
        self.carries && self.registry.workers().has_own(service, now)
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
