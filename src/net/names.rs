//! What other nodes are told and asked of names by the RPC: registries of grapes, and providers.
//!
//! [`Registrations`] decides what each grape is told; lookups decide who is asked. What begins in
//! one turn of the loop goes to a grape in one message. This struct keeps the messages under way.

use std::collections::{BTreeSet, HashMap};
use std::time::{self, Duration};

use futures::FutureExt;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use libp2p::{Multiaddr, PeerId};
use rand::RngExt;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use super::rendezvous::Records;
use super::rpc::Outcome;
use crate::limits::SERVES_DEADLINE;
use crate::name::ServiceName;
use crate::proto::grapes::Grapes;
use crate::proto::registrations::{Answer, Registrations, Update};
use crate::proto::wire::{ErrorCode, MAX_SOUGHT, NAMES, NamesReply, NamesRequest, SERVES};

/// How long a grape may take to keep what it is told, and to answer what it is asked.
const UPDATE_DEADLINE: Duration = Duration::from_secs(5);
const FIND_DEADLINE: Duration = Duration::from_secs(3);

/// What the driver must know of an answer.
#[derive(Debug)]
pub(crate) enum Learned {
    /// A grape was told of this node's names, and knows of so many other nodes with its key.
    Told(PeerId, u64),
    /// A grape has no registry; these names were asked for.
    NoRegistry(PeerId, Vec<ServiceName>),
    /// A grape named providers of each of these names; `None`: it did not answer.
    Found(PeerId, Vec<(ServiceName, Option<Providers>)>),
    /// A peer said whether it serves a name; `None`: it did not answer.
    Serves(PeerId, ServiceName, Option<bool>),
    /// The question whether it does was not sent.
    NotAsked(PeerId, ServiceName),
}

/// Providers and where they can be dialled.
pub(crate) type Providers = Vec<(PeerId, Vec<Multiaddr>)>;

/// The messages on names that are under way, and what is told whom.
#[derive(Debug)]
pub(crate) struct Names {
    pub(crate) registrations: Registrations,
    /// Tells this node from another one with its key.
    session: u64,
    under_way: FuturesUnordered<BoxFuture<'static, Answered>>,
    /// What is asked of each grape at the end of this turn.
    sought: HashMap<PeerId, Vec<ServiceName>>,
}

/// A message that is to be sent; what waits for its outcome is told by the sender.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) peer: PeerId,
    pub(crate) service: &'static str,
    pub(crate) payload: Vec<u8>,
    pub(crate) deadline: Instant,
    pub(crate) outcome: oneshot::Sender<Outcome>,
}

#[derive(Debug)]
enum Asked {
    /// How many names it announces; `None`: those that were to be could not.
    Update {
        announced: Option<usize>,
    },
    Find(Vec<ServiceName>),
    Serves(ServiceName),
}

#[derive(Debug)]
pub(crate) struct Answered {
    peer: PeerId,
    asked: Asked,
    outcome: Outcome,
}

impl Names {
    pub(crate) fn new() -> Self {
        Self {
            registrations: Registrations::new(),
            session: rand::rng().random(),
            under_way: FuturesUnordered::new(),
            sought: HashMap::new(),
        }
    }

    /// The next answer; pending while nothing is under way.
    pub(crate) async fn next(&mut self) -> Answered {
        match self.under_way.next().await {
            Some(answered) => answered,
            None => std::future::pending().await,
        }
    }

    /// A grape is to be asked for providers of a name.
    pub(crate) fn find(&mut self, grape: PeerId, name: ServiceName) {
        self.sought.entry(grape).or_default().push(name);
    }

    /// The next message to send. `record` is this node's own, without which nothing is announced.
    pub(crate) fn poll_message(
        &mut self,
        record: Option<&Records>,
        now: time::Instant,
    ) -> Option<Message> {
        if let Some(message) = self.next_question() {
            return Some(message);
        }
        let update = self.registrations.poll_update(now)?;
        Some(self.tell(update, record))
    }

    fn next_question(&mut self) -> Option<Message> {
        let (&grape, names) = self.sought.iter_mut().next()?;
        let find: Vec<_> = names.drain(..names.len().min(MAX_SOUGHT)).collect();
        if names.is_empty() {
            self.sought.remove(&grape);
        }
        let request = NamesRequest {
            find: find.clone(),
            ..NamesRequest::default()
        };
        Some(self.request(grape, &request, Asked::Find(find), FIND_DEADLINE))
    }

    fn tell(&mut self, update: Update, record: Option<&Records>) -> Message {
        let wanted = update.announce.len();
        let record = record.filter(|_| wanted > 0);
        let request = NamesRequest {
            announce: record.map_or_else(Vec::new, |_| update.announce),
            record: record.map(|record| record.standard.envelope().to_vec()),
            legacy: record.map(|record| record.legacy.envelope().to_vec()),
            withdraw: update.withdraw,
            find: Vec::new(),
            session: Some(self.session),
        };
        let announced = (request.announce.len() == wanted).then_some(wanted);
        let asked = Asked::Update { announced };
        self.request(update.grape, &request, asked, UPDATE_DEADLINE)
    }

    /// The question whether a peer serves a name.
    pub(crate) fn ask_serves(&mut self, peer: PeerId, name: ServiceName) -> Message {
        let payload = name.as_ref().as_bytes().to_vec();
        self.send(peer, SERVES, payload, Asked::Serves(name), SERVES_DEADLINE)
    }

    fn request(
        &mut self,
        grape: PeerId,
        request: &NamesRequest,
        asked: Asked,
        deadline: Duration,
    ) -> Message {
        // It is within the bounds.
        let payload = request.encode().unwrap_or_default();
        self.send(grape, NAMES, payload, asked, deadline)
    }

    fn send(
        &mut self,
        peer: PeerId,
        service: &'static str,
        payload: Vec<u8>,
        asked: Asked,
        deadline: Duration,
    ) -> Message {
        let (outcome, answer) = oneshot::channel();
        let deadline = Instant::now() + deadline;
        let answered = timeout_at(deadline, answer).map(move |answer| {
            let outcome = match answer {
                Ok(Ok(outcome)) => outcome,
                Ok(Err(_)) => Outcome::NotSent("there was no room for it".into()),
                Err(_) => Outcome::Broken("it did not answer in time".into()),
            };
            Answered {
                peer,
                asked,
                outcome,
            }
        });
        self.under_way.push(answered.boxed());
        Message {
            peer,
            service,
            payload,
            deadline,
            outcome,
        }
    }

    /// Handles an answer, of which `grapes` learns how many there are.
    pub(crate) fn on_answer(
        &mut self,
        answered: Answered,
        grapes: &mut Grapes,
        now: time::Instant,
    ) -> Learned {
        let Answered {
            peer,
            asked,
            outcome,
        } = answered;
        match asked {
            Asked::Update { announced } => {
                let reply = read(peer, outcome, grapes, now);
                self.on_told(peer, announced, reply, now)
            }
            Asked::Find(names) => {
                let reply = read(peer, outcome, grapes, now);
                self.on_found(peer, names, reply, now)
            }
            Asked::Serves(name) => match outcome {
                Outcome::NotSent(_) => Learned::NotAsked(peer, name),
                outcome => Learned::Serves(peer, name, outcome.serves()),
            },
        }
    }

    fn on_told(
        &mut self,
        grape: PeerId,
        announced: Option<usize>,
        reply: Reply,
        now: time::Instant,
    ) -> Learned {
        let mut elsewhere = 0;
        let answer = match reply {
            Reply::Read(reply) => {
                elsewhere = reply.elsewhere;
                let index = |number: &u64| usize::try_from(*number).ok();
                let refused: BTreeSet<_> = reply.refused.iter().filter_map(index).collect();
                let lease = Duration::from_millis(reply.lease);
                let is_sane = |announced| refused.last().is_none_or(|last| *last < announced);
                match announced.is_some_and(is_sane) {
                    true => Answer::Taken { lease, refused },
                    false => Answer::Failed,
                }
            }
            Reply::NoRegistry => Answer::NoRegistry,
            Reply::Nothing => Answer::Failed,
        };
        self.registrations.on_answer(&grape, answer, now);
        Learned::Told(grape, elsewhere)
    }

    fn on_found(
        &mut self,
        grape: PeerId,
        names: Vec<ServiceName>,
        reply: Reply,
        now: time::Instant,
    ) -> Learned {
        let found = match reply {
            Reply::Read(reply) if reply.found.len() == names.len() => reply.found,
            Reply::NoRegistry => {
                self.registrations.on_no_registry(&grape, now);
                return Learned::NoRegistry(grape, names);
            }
            _ => {
                let unanswered = names.into_iter().map(|name| (name, None));
                return Learned::Found(grape, unanswered.collect());
            }
        };
        let providers = found.into_iter().map(|of_name| {
            let provider = of_name
                .into_iter()
                .map(|provided| (provided.peer, provided.addresses));
            Some(provider.collect())
        });
        Learned::Found(grape, names.into_iter().zip(providers).collect())
    }
}

/// What came back.
enum Reply {
    Read(NamesReply),
    /// The peer has no registry.
    NoRegistry,
    Nothing,
}

fn read(grape: PeerId, outcome: Outcome, grapes: &mut Grapes, now: time::Instant) -> Reply {
    match outcome {
        Outcome::Answered(Ok(payload)) => match NamesReply::decode(&payload) {
            Ok(reply) => {
                grapes.on_said(grape, reply.grapes, now);
                Reply::Read(reply)
            }
            Err(error) => {
                tracing::debug!(%error, "a registry's answer makes no sense");
                Reply::Nothing
            }
        },
        Outcome::Answered(Err(error)) if error.code == ErrorCode::UnknownService => {
            Reply::NoRegistry
        }
        outcome => {
            tracing::debug!(?outcome, "a registry did not answer");
            Reply::Nothing
        }
    }
}
