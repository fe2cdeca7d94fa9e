//! Finds the live providers of names: decides whom to ask, whom to dial and when to stop.
//!
//! Kademlia and the rendezvous points are asked at once. What they name are *candidates* only, since
//! anybody on the path may name anybody: a candidate is dialled and asked whether it serves the
//! name, and only who says yes is live.
//!
//! * Concurrent lookups of one name are one (single flight).
//! * A lookup ends when every source and every candidate has answered, or
//!   [`LOOKUP_SETTLE`] after the first live provider, or at [`LOOKUP_DEADLINE`]. So "nobody" is
//!   known as soon as the last source has said so, never by waiting.
//! * An empty answer of Kademlia is asked again once: its queries can end empty although the key
//!   exists.
//! * At most [`MAX_CANDIDATES`] are dialled for a lookup.
//!
//! Does no I/O: it takes what happened and `now`, and says what to do as [`Step`]s. `Q` is
//! Kademlia's query id, which nobody but Kademlia can make.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::time::Instant;

use libp2p::{Multiaddr, PeerId};

use crate::limits::{
    LOOKUP_DEADLINE, LOOKUP_SETTLE, MAX_ADDRESSES, MAX_CANDIDATES, SERVES_DEADLINE,
};
use crate::name::ServiceName;

/// What is to be done for a lookup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step<Q> {
    /// Ask Kademlia for providers; tell the query's id with [`Lookups::on_query_started`].
    Query(ServiceName),
    /// End a query nobody needs any more.
    FinishQuery(Q),
    /// Ask a rendezvous point for providers.
    Discover(PeerId, ServiceName),
    /// Connect to a candidate at these addresses.
    Dial(PeerId, Vec<Multiaddr>),
    /// Ask a connected candidate whether it serves the name.
    Ask(PeerId, ServiceName),
    /// Call [`Lookups::on_timer`] for this name then.
    Wake(Instant, ServiceName),
    /// A provider is live. More may come until [`Step::Done`].
    Found(ServiceName, PeerId),
    /// The lookup is over.
    Done(ServiceName, Outcome),
}

/// How a lookup ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// These providers answered, in the order of their answers. Never empty.
    Live(Vec<PeerId>),
    /// No source names a provider, or each named one says that it does not serve the name.
    NotFound,
    /// So many providers were named, and none answered.
    Unreachable(usize),
    /// No source answered: whether the name is announced is not known.
    Unanswered,
    /// The deadline passed before the sources had answered.
    TimedOut,
}

/// A peer that a source names.
#[derive(Debug)]
struct Candidate {
    state: State,
    /// The addresses that a dial was given.
    tried: Vec<Multiaddr>,
    /// Those that came while a dial was under way; tried if it fails.
    untried: Vec<Multiaddr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Dialling,
    /// Asked at this time.
    Asked(Instant),
    Live,
    /// Says that it does not serve the name.
    Withdrawn,
    Unreachable,
}

#[derive(Debug)]
struct Lookup<Q> {
    started: Instant,
    first_live: Option<Instant>,
    /// A source has answered.
    answered: bool,
    query: Query<Q>,
    points: HashSet<PeerId>,
    candidates: HashMap<PeerId, Candidate>,
    live: Vec<PeerId>,
}

#[derive(Debug, PartialEq, Eq)]
enum Query<Q> {
    /// Asked for, its id not told yet; `again` when it is the second one.
    Starting {
        again: bool,
    },
    Running {
        id: Q,
        again: bool,
    },
    Done,
}

/// All lookups of a node.
#[derive(Debug)]
pub(crate) struct Lookups<Q> {
    local: PeerId,
    running: HashMap<ServiceName, Lookup<Q>>,
    queries: HashMap<Q, ServiceName>,
    steps: VecDeque<Step<Q>>,
}

impl<Q: Copy + Eq + Hash> Lookups<Q> {
    /// `local` is never its own candidate.
    pub(crate) fn new(local: PeerId) -> Self {
        Self {
            local,
            running: HashMap::new(),
            queries: HashMap::new(),
            steps: VecDeque::new(),
        }
    }

    /// The next thing to do; to be called after every other call until it returns `None`.
    pub(crate) fn poll_step(&mut self) -> Option<Step<Q>> {
        self.steps.pop_front()
    }

    /// Starts a lookup that also asks these rendezvous points. One that runs already is joined.
    pub(crate) fn start(
        &mut self,
        name: &ServiceName,
        points: impl IntoIterator<Item = PeerId>,
        now: Instant,
    ) {
        if self.running.contains_key(name) {
            return;
        }
        let points: HashSet<PeerId> = points.into_iter().collect();
        for point in &points {
            self.steps.push_back(Step::Discover(*point, name.clone()));
        }
        self.steps.push_back(Step::Query(name.clone()));
        self.steps
            .push_back(Step::Wake(now + LOOKUP_DEADLINE, name.clone()));
        let lookup = Lookup {
            started: now,
            first_live: None,
            answered: false,
            query: Query::Starting { again: false },
            points,
            candidates: HashMap::new(),
            live: Vec::new(),
        };
        self.running.insert(name.clone(), lookup);
    }

    /// Ends a lookup that nobody waits for any more.
    pub(crate) fn cancel(&mut self, name: &ServiceName) {
        if let Some(lookup) = self.running.remove(name) {
            self.drop_query(&lookup.query);
        }
    }

    /// Kademlia began the query that was asked for.
    pub(crate) fn on_query_started(&mut self, name: &ServiceName, id: Q) {
        let Some(lookup) = self.running.get_mut(name) else {
            self.steps.push_back(Step::FinishQuery(id));
            return;
        };
        let again = matches!(lookup.query, Query::Starting { again: true });
        lookup.query = Query::Running { id, again };
        self.queries.insert(id, name.clone());
    }

    /// The name that a query is for.
    pub(crate) fn name_of(&self, id: &Q) -> Option<&ServiceName> {
        self.queries.get(id)
    }

    /// A query has ended; `answered` tells whether any grape has answered it.
    pub(crate) fn on_query_ended(&mut self, id: &Q, answered: bool, now: Instant) {
        let Some(name) = self.queries.remove(id) else {
            return;
        };
        let Some(lookup) = self.running.get_mut(&name) else {
            return;
        };
        let first_time = matches!(lookup.query, Query::Running { again: false, .. });
        lookup.answered |= answered;
        if first_time && answered && lookup.candidates.is_empty() {
            lookup.query = Query::Starting { again: true };
            self.steps.push_back(Step::Query(name));
            return;
        }
        lookup.query = Query::Done;
        self.settle(&name, now);
    }

    /// A rendezvous point has answered, or failed to; its providers came by
    /// [`on_candidate`](Self::on_candidate).
    pub(crate) fn on_discovered(
        &mut self,
        point: &PeerId,
        name: &ServiceName,
        answered: bool,
        now: Instant,
    ) {
        if let Some(lookup) = self.running.get_mut(name) {
            lookup.answered |= answered;
            lookup.points.remove(point);
            self.settle(name, now);
        }
    }

    /// A source names a provider. No address means that Kademlia may know one.
    pub(crate) fn on_candidate(
        &mut self,
        name: &ServiceName,
        peer: PeerId,
        addresses: Vec<Multiaddr>,
        connected: bool,
        now: Instant,
    ) {
        let Some(lookup) = self.running.get_mut(name) else {
            return;
        };
        if peer == self.local {
            return;
        }
        let full = lookup.candidates.len() >= MAX_CANDIDATES;
        match lookup.candidates.get_mut(&peer) {
            None if full => {}
            None => {
                let mut candidate = Candidate::new(addresses);
                if connected {
                    candidate.ask(name, peer, now, &mut self.steps);
                } else {
                    candidate.dial(peer, &mut self.steps);
                }
                lookup.candidates.insert(peer, candidate);
            }
            Some(candidate) => {
                candidate.add(addresses);
                if candidate.state == State::Unreachable && !candidate.untried.is_empty() {
                    candidate.dial(peer, &mut self.steps);
                }
            }
        }
    }

    /// A connection to a peer stands.
    pub(crate) fn on_connected(&mut self, peer: &PeerId, now: Instant) {
        for (name, lookup) in &mut self.running {
            if let Some(candidate) = lookup.candidates.get_mut(peer)
                && matches!(candidate.state, State::Dialling | State::Unreachable)
            {
                candidate.ask(name, *peer, now, &mut self.steps);
            }
        }
    }

    /// A peer cannot be dialled at the addresses of the last [`Step::Dial`].
    pub(crate) fn on_dial_failed(&mut self, peer: &PeerId, now: Instant) {
        let mut given_up = Vec::new();
        for (name, lookup) in &mut self.running {
            let Some(candidate) = lookup.candidates.get_mut(peer) else {
                continue;
            };
            if candidate.state != State::Dialling {
                continue;
            }
            if candidate.untried.is_empty() {
                candidate.state = State::Unreachable;
                given_up.push(name.clone());
            } else {
                candidate.dial(*peer, &mut self.steps);
            }
        }
        for name in given_up {
            self.settle(&name, now);
        }
    }

    /// A candidate said whether it serves the name; `None`: it did not answer.
    pub(crate) fn on_answer(
        &mut self,
        peer: &PeerId,
        name: &ServiceName,
        serves: Option<bool>,
        now: Instant,
    ) {
        let Some(lookup) = self.running.get_mut(name) else {
            return;
        };
        let Some(candidate) = lookup.candidates.get_mut(peer) else {
            return;
        };
        if !matches!(candidate.state, State::Asked(_)) {
            return;
        }
        candidate.state = match serves {
            Some(true) => State::Live,
            Some(false) => State::Withdrawn,
            None => State::Unreachable,
        };
        if serves == Some(true) {
            lookup.live.push(*peer);
            self.steps.push_back(Step::Found(name.clone(), *peer));
            if lookup.first_live.is_none() {
                lookup.first_live = Some(now);
                self.steps
                    .push_back(Step::Wake(now + LOOKUP_SETTLE, name.clone()));
            }
        }
        self.settle(name, now);
    }

    /// Time has passed.
    pub(crate) fn on_timer(&mut self, name: &ServiceName, now: Instant) {
        let Some(lookup) = self.running.get_mut(name) else {
            return;
        };
        for candidate in lookup.candidates.values_mut() {
            if matches!(candidate.state, State::Asked(at) if now >= at + SERVES_DEADLINE) {
                candidate.state = State::Unreachable;
            }
        }
        self.settle(name, now);
    }

    /// Ends the lookup when nothing can change its outcome in time.
    fn settle(&mut self, name: &ServiceName, now: Instant) {
        let Some(lookup) = self.running.get(name) else {
            return;
        };
        let Some(outcome) = lookup.outcome(now) else {
            return;
        };
        if let Some(lookup) = self.running.remove(name) {
            self.drop_query(&lookup.query);
        }
        self.steps.push_back(Step::Done(name.clone(), outcome));
    }

    fn drop_query(&mut self, query: &Query<Q>) {
        if let Query::Running { id, .. } = query {
            self.queries.remove(id);
            self.steps.push_back(Step::FinishQuery(*id));
        }
    }
}

impl<Q> Lookup<Q> {
    fn outcome(&self, now: Instant) -> Option<Outcome> {
        let sources_done = self.query_done() && self.points.is_empty();
        let complete = sources_done && !self.candidates.values().any(Candidate::is_open);
        let settled = self
            .first_live
            .is_some_and(|first| now >= first + LOOKUP_SETTLE);
        let late = now >= self.started + LOOKUP_DEADLINE;
        if !(complete || settled || late) {
            return None;
        }
        let unanswered = self
            .candidates
            .values()
            .filter(|candidate| candidate.state != State::Withdrawn)
            .count();
        Some(if !self.live.is_empty() {
            Outcome::Live(self.live.clone())
        } else if unanswered > 0 {
            Outcome::Unreachable(unanswered)
        } else if complete && !self.answered && self.candidates.is_empty() {
            Outcome::Unanswered
        } else if complete {
            Outcome::NotFound
        } else {
            Outcome::TimedOut
        })
    }

    fn query_done(&self) -> bool {
        matches!(self.query, Query::Done)
    }
}

impl Candidate {
    fn new(addresses: Vec<Multiaddr>) -> Self {
        let mut candidate = Self {
            state: State::Unreachable,
            tried: Vec::new(),
            untried: Vec::new(),
        };
        candidate.add(addresses);
        candidate
    }

    fn add(&mut self, addresses: Vec<Multiaddr>) {
        for address in addresses {
            let known = self.tried.contains(&address) || self.untried.contains(&address);
            // Two sources may each tell as many addresses as a provider may have.
            if !known && self.tried.len() + self.untried.len() < 2 * MAX_ADDRESSES {
                self.untried.push(address);
            }
        }
    }

    fn dial<Q>(&mut self, peer: PeerId, steps: &mut VecDeque<Step<Q>>) {
        let addresses = std::mem::take(&mut self.untried);
        self.tried.extend(addresses.iter().cloned());
        self.state = State::Dialling;
        steps.push_back(Step::Dial(peer, addresses));
    }

    fn ask<Q>(
        &mut self,
        name: &ServiceName,
        peer: PeerId,
        now: Instant,
        steps: &mut VecDeque<Step<Q>>,
    ) {
        self.state = State::Asked(now);
        steps.push_back(Step::Ask(peer, name.clone()));
        steps.push_back(Step::Wake(now + SERVES_DEADLINE, name.clone()));
    }

    fn is_open(&self) -> bool {
        matches!(self.state, State::Dialling | State::Asked(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How a lookup ends whose one rendezvous point and whose Kademlia name nobody.
    fn outcome(point_answers: bool, kademlia_answers: bool) -> Outcome {
        let (now, point) = (Instant::now(), PeerId::random());
        let name: ServiceName = "client1".parse().unwrap();
        let mut lookups = Lookups::new(PeerId::random());
        lookups.start(&name, [point], now);
        lookups.on_discovered(&point, &name, point_answers, now);
        let mut queries = 0;
        loop {
            match lookups.poll_step().expect("it ends") {
                Step::Query(name) => {
                    queries += 1;
                    lookups.on_query_started(&name, queries);
                    lookups.on_query_ended(&queries, kademlia_answers, now);
                }
                Step::Done(_, outcome) => return outcome,
                _ => {}
            }
        }
    }

    #[test]
    fn a_name_is_not_found_only_if_somebody_said_so() {
        assert_eq!(outcome(true, true), Outcome::NotFound);
        assert_eq!(outcome(true, false), Outcome::NotFound);
        assert_eq!(outcome(false, true), Outcome::NotFound);
        assert_eq!(outcome(false, false), Outcome::Unanswered);
    }
}
