//! Finds the live providers of names: decides whom to ask, whom to dial and when to stop.
//!
//! Kademlia and the points (grapes that are asked directly) are asked at once. What they name are
//! *candidates* only, since anybody on the path may name anybody: a candidate is dialled and asked
//! whether it serves the name, and only who says yes is live.
//!
//! In a network of few grapes each one keeps every name. A few of them are asked then, and Kademlia
//! only if that leaves room for doubt: if one of them does not answer (at once when it says so, after
//! [`PATIENCE`] when it says nothing), or if none names a live provider and there are grapes that were
//! not asked. See [`Plan`].
//!
//! * Concurrent lookups of one name are one (single flight).
//! * A lookup ends when every source and every candidate has answered, or
//!   [`LOOKUP_SETTLE`] after the first live provider, or at [`LOOKUP_DEADLINE`]. So "nobody" is
//!   known as soon as the last source has said so, never by waiting.
//! * Who wants *all* that are named, not just some, has a deadline of their own: the lookup goes on up to
//!   it for as long as a candidate may still answer ([`Lookups::want_all`]), and then says who was named
//!   and not reached. Who wants some is not kept waiting for that.
//! * An empty answer of Kademlia is asked again once: its queries can end empty although the key
//!   exists. One that comes from fewer grapes than have not answered says nothing: the lookup then fails as
//!   one that took too long, and never says that nobody announces the name.
//! * Who is late with a connection or an answer makes room for others and is waited for all the same, while
//!   nobody is live: to be slow is not to be gone.
//! * At most [`MAX_CANDIDATES`] are dialled for a lookup, an equal part of them for each source, so
//!   that one that makes providers up cannot hide those that another one names.
//!
//! Does no I/O: it takes what happened and `now`, and says what to do as [`Step`]s. `Q` is
//! Kademlia's query id, which nobody but Kademlia can make.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::hash::Hash;
use std::time::{Duration, Instant};

use libp2p::{Multiaddr, PeerId};
use rand::seq::IndexedRandom;

use crate::limits::{
    DIAL_DEADLINE, LOOKUP_DEADLINE, LOOKUP_SETTLE, MAX_ADDRESSES, MAX_CANDIDATES, SERVES_DEADLINE,
};
use crate::name::ServiceName;
use crate::proto::grapes::SURELY_SMALL;

/// How long the grapes that were asked may take before Kademlia is asked as well: many round trips.
const PATIENCE: Duration = Duration::from_millis(200);

/// How long a candidate that is late is waited for while nobody is live: with [`DIAL_DEADLINE`] as long as
/// a request may take. A machine that is so busy that it answers later answers no request in time.
const LATE: Duration = Duration::from_secs(7);

/// The grapes of a small network that are asked: one that is dead or lies hides nobody from the others.
const WITNESSES: usize = 3;

/// The answers of Kademlia that fill its share: one grape that makes up providers leaves room for
/// those that others name.
const KADEMLIA_ANSWERS: usize = 2;

/// How many times its share of candidates a source may name: those that find no room wait until others
/// have failed.
const NAMED: usize = 4;

/// Whom a lookup asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Grapes that are asked by their registry of names.
    registries: Vec<PeerId>,
    /// Grapes that are asked by rendezvous.
    points: Vec<PeerId>,
    /// Those asked keep all names, and Kademlia need not be asked at once.
    keep_all: bool,
    /// There are no other grapes.
    all_asked: bool,
}

/// The grapes that a lookup may ask.
#[derive(Clone, Debug, Default)]
pub(crate) struct Connected {
    /// The bootstrap grapes with a registry of names.
    pub(crate) registries: Vec<PeerId>,
    /// Those without, which are rendezvous points.
    pub(crate) points: Vec<PeerId>,
    /// Other grapes with a registry.
    pub(crate) others: Vec<PeerId>,
    /// How many grapes there are, connected or not, if that is known.
    pub(crate) count: Option<usize>,
}

impl Plan {
    /// Whom to ask, drawn at random where a few are as good as all.
    pub(crate) fn draw(grapes: &Connected) -> Self {
        let (registries, points) = (&grapes.registries, grapes.points.clone());
        let small = grapes.count.filter(|count| *count < SURELY_SMALL);
        let Some(count) = small.filter(|_| !registries.is_empty()) else {
            return Self {
                registries: registries.clone(),
                points,
                ..Self::default()
            };
        };
        // Those that the user has named come first.
        let mut drawn = registries
            .sample(&mut rand::rng(), WITNESSES)
            .copied()
            .collect::<Vec<_>>();
        let room = WITNESSES - drawn.len();
        drawn.extend(grapes.others.sample(&mut rand::rng(), room));
        Self {
            all_asked: drawn.len() + points.len() >= count,
            registries: drawn,
            points,
            keep_all: true,
        }
    }
}

/// What is to be done for a lookup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step<Q> {
    /// Ask Kademlia for providers; tell the query's id with [`Lookups::on_query_started`].
    Query(ServiceName),
    /// End a query nobody needs any more.
    FinishQuery(Q),
    /// Ask a grape for providers, by its registry of names.
    Find(PeerId, ServiceName),
    /// Ask a grape for providers, by rendezvous.
    Discover(PeerId, ServiceName),
    /// Connect to a candidate at these addresses.
    Dial(PeerId, Vec<Multiaddr>),
    /// Ask a connected candidate whether it serves the name.
    Ask(PeerId, ServiceName),
    /// A provider is live. More may come until [`Step::Done`].
    Found(ServiceName, PeerId),
    /// This is the outcome for who wants some; the lookup goes on for who wants all.
    Settled(ServiceName, Outcome),
    /// Who wants all, until then or earlier, has all that are live: these were named and not reached.
    Unreached(ServiceName, Instant, Vec<PeerId>),
    /// Who wants all, until then or earlier, has waited for nobody, and it is too late.
    TooLate(ServiceName, Instant),
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

/// Who has answered a query of Kademlia's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answered {
    /// At least as many of the grapes that were asked as not.
    Most,
    Fewer,
    Nobody,
}

/// Who names providers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    /// A grape that the query has met, by the number of its answer: Kademlia does not tell who it is.
    Kademlia(usize),
    /// A grape that was asked directly.
    Point(PeerId),
}

/// A peer that a source names.
#[derive(Debug)]
struct Candidate {
    /// Who named it first.
    source: Source,
    state: State,
    /// The addresses that a dial was given.
    tried: Vec<Multiaddr>,
    /// Those that came while a dial was under way; tried if it fails.
    untried: Vec<Multiaddr>,
    /// Until when it is waited for although it is late.
    patience: Option<Instant>,
    /// Its host has said that nobody listens at one of its addresses.
    is_refused: bool,
    /// It was asked once more after a question that was cut off.
    is_asked_again: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// As many as may be are dialled for who has named it.
    Waiting,
    /// Dialled, until this time.
    Dialling(Instant),
    /// Asked, until this time.
    Asked(Instant),
    /// Dialled for longer than others wait for it.
    LateDial,
    /// Asked for longer than that, the last time until then.
    LateAnswer(Instant),
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
    /// Too few grapes have answered Kademlia to believe that they know of nobody.
    doubtful: bool,
    query: Query<Q>,
    /// Those that were asked, and those of them that have not answered.
    asked: HashSet<PeerId>,
    points: HashSet<PeerId>,
    /// One of them has failed.
    failed: bool,
    /// There are no other grapes.
    all_asked: bool,
    /// How many were asked, Kademlia included.
    sources: usize,
    candidates: HashMap<PeerId, Candidate>,
    live: Vec<PeerId>,
    /// Until when somebody wants all who are named.
    wanted: BTreeSet<Instant>,
    /// Who wants some has the outcome.
    is_settled: bool,
    /// Its entries in [`Lookups::deadlines`].
    deadlines: Vec<Instant>,
}

#[derive(Debug, PartialEq, Eq)]
enum Query<Q> {
    /// Asked for if the points leave room for doubt.
    Deferred,
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
    /// A bootstrap grape may be about to be connected.
    expecting: bool,
    queries: HashMap<Q, ServiceName>,
    deadlines: BTreeSet<(Instant, ServiceName)>,
    steps: VecDeque<Step<Q>>,
}

impl<Q: Copy + Eq + Hash> Lookups<Q> {
    /// `local` is never its own candidate.
    pub(crate) fn new(local: PeerId) -> Self {
        Self {
            local,
            running: HashMap::new(),
            expecting: false,
            queries: HashMap::new(),
            deadlines: BTreeSet::new(),
            steps: VecDeque::new(),
        }
    }

    /// The next thing to do; to be called after every other call until it returns `None`.
    pub(crate) fn poll_step(&mut self) -> Option<Step<Q>> {
        self.steps.pop_front()
    }

    /// Starts a lookup. One that runs already is joined.
    pub(crate) fn start(&mut self, name: &ServiceName, plan: &Plan, now: Instant) {
        if self.running.contains_key(name) {
            return;
        }
        for grape in &plan.registries {
            self.steps.push_back(Step::Find(*grape, name.clone()));
        }
        for point in &plan.points {
            self.steps.push_back(Step::Discover(*point, name.clone()));
        }
        let points: HashSet<_> = plan
            .registries
            .iter()
            .chain(&plan.points)
            .copied()
            .collect();
        let lookup = Lookup {
            started: now,
            first_live: None,
            answered: false,
            doubtful: false,
            query: Query::Deferred,
            sources: points.len() + 1,
            asked: points.clone(),
            points,
            failed: false,
            all_asked: plan.all_asked,
            candidates: HashMap::new(),
            live: Vec::new(),
            wanted: BTreeSet::new(),
            is_settled: false,
            deadlines: Vec::new(),
        };
        self.running.insert(name.clone(), lookup);
        self.wake(name, now + LOOKUP_DEADLINE);
        if self.expecting {
            self.wake(name, now + LOOKUP_SETTLE);
        }
        if plan.keep_all {
            self.wake(name, now + PATIENCE);
        } else {
            self.query(name);
        }
    }

    /// Asks Kademlia too.
    fn query(&mut self, name: &ServiceName) {
        if let Some(lookup) = self.running.get_mut(name) {
            lookup.query = Query::Starting { again: false };
            self.steps.push_back(Step::Query(name.clone()));
        }
    }

    /// Whether a bootstrap grape may be about to be connected: meanwhile nobody is said to be not
    /// found, for as long as slow providers are waited for.
    pub(crate) fn expect(&mut self, expecting: bool, now: Instant) {
        if std::mem::replace(&mut self.expecting, expecting) == expecting {
            return;
        }
        let started = |(name, lookup): (&ServiceName, &Lookup<Q>)| (name.clone(), lookup.started);
        for (name, started) in self.running.iter().map(started).collect::<Vec<_>>() {
            match expecting {
                true => self.wake(&name, started + LOOKUP_SETTLE),
                false => self.settle(&name, now),
            }
        }
    }

    /// A bootstrap grape is connected: the lookups that run ask it too.
    pub(crate) fn on_bootstrap(&mut self, grape: PeerId, has_registry: bool) {
        for (name, lookup) in &mut self.running {
            if lookup.asked.insert(grape) {
                lookup.points.insert(grape);
                lookup.sources += 1;
                self.steps.push_back(match has_registry {
                    true => Step::Find(grape, name.clone()),
                    false => Step::Discover(grape, name.clone()),
                });
            }
        }
    }

    /// There are more grapes than this node knew of when it began its lookups.
    pub(crate) fn on_more_grapes(&mut self) {
        for lookup in self.running.values_mut() {
            lookup.all_asked = false;
        }
    }

    /// Somebody wants all who are named for a running lookup, and waits for them until then. Returns
    /// those that are live already.
    pub(crate) fn want_all(&mut self, name: &ServiceName, until: Instant) -> Vec<PeerId> {
        let Some(lookup) = self.running.get_mut(name) else {
            return Vec::new();
        };
        let live = lookup.live.clone();
        if lookup.wanted.insert(until) {
            self.wake(name, until);
        }
        live
    }

    /// Somebody wants some of a running lookup, which may go on for others only.
    pub(crate) fn want_some(&mut self, name: &ServiceName) {
        if let Some(lookup) = self.running.get(name).filter(|lookup| lookup.is_settled) {
            let step = Step::Settled(name.clone(), lookup.verdict(false));
            self.steps.push_back(step);
        }
    }

    /// Whether a lookup of the name runs.
    pub(crate) fn is_running(&self, name: &ServiceName) -> bool {
        self.running.contains_key(name)
    }

    /// The addresses of a [`Step::Dial`] were not used, because too many dials to the peer were under
    /// way already: they are tried when one of those fails.
    pub(crate) fn put_back(&mut self, peer: &PeerId, addresses: &[Multiaddr]) {
        for lookup in self.running.values_mut() {
            if let Some(candidate) = lookup.candidates.get_mut(peer) {
                let (put_back, tried) = std::mem::take(&mut candidate.tried)
                    .into_iter()
                    .partition(|address| addresses.contains(address));
                candidate.tried = tried;
                candidate.untried.extend::<Vec<_>>(put_back);
            }
        }
    }

    /// How many lookups run.
    pub(crate) fn len(&self) -> usize {
        self.running.len()
    }

    /// When to call [`on_time`](Self::on_time).
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// Ends a lookup that nobody waits for any more.
    pub(crate) fn cancel(&mut self, name: &ServiceName) {
        self.remove(name);
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

    /// A query has ended.
    pub(crate) fn on_query_ended(&mut self, id: &Q, answered: Answered, now: Instant) {
        let Some(name) = self.queries.remove(id) else {
            return;
        };
        let Some(lookup) = self.running.get_mut(&name) else {
            return;
        };
        let first_time = matches!(lookup.query, Query::Running { again: false, .. });
        lookup.answered |= answered != Answered::Nobody;
        if first_time && answered != Answered::Nobody && lookup.candidates.is_empty() {
            lookup.query = Query::Starting { again: true };
            self.steps.push_back(Step::Query(name));
            return;
        }
        lookup.doubtful = answered == Answered::Fewer;
        lookup.query = Query::Done;
        self.settle(&name, now);
    }

    /// A point has answered, or failed to; its providers came by
    /// [`on_candidate`](Self::on_candidate).
    pub(crate) fn on_discovered(
        &mut self,
        point: &PeerId,
        name: &ServiceName,
        answered: bool,
        now: Instant,
    ) {
        if let Some(lookup) = self.running.get_mut(name)
            && lookup.points.remove(point)
        {
            lookup.answered |= answered;
            lookup.failed |= !answered;
            self.settle(name, now);
        }
    }

    /// A grape that was to be asked by its registry has none: it is asked by rendezvous.
    pub(crate) fn on_no_registry(&mut self, point: &PeerId, name: &ServiceName) {
        let lookup = self.running.get(name);
        if lookup.is_some_and(|lookup| lookup.points.contains(point)) {
            self.steps.push_back(Step::Discover(*point, name.clone()));
        }
    }

    /// A source names a provider. No address means that Kademlia may know one.
    pub(crate) fn on_candidate(
        &mut self,
        name: &ServiceName,
        source: Source,
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
        let (may_name, may_dial) = (lookup.may_name(source), lookup.may_dial(source));
        let max_addresses = lookup.sources * MAX_ADDRESSES;
        match lookup.candidates.get_mut(&peer) {
            None if !may_name => {}
            None if !may_dial => {
                let candidate = Candidate::new(source, addresses);
                lookup.candidates.insert(peer, candidate);
            }
            None => {
                let mut candidate = Candidate::new(source, addresses);
                let until = if connected {
                    candidate.ask(name, peer, now, &mut self.steps)
                } else {
                    candidate.dial(peer, now, &mut self.steps)
                };
                lookup.candidates.insert(peer, candidate);
                self.wake(name, until);
            }
            Some(candidate) => {
                candidate.add(addresses, max_addresses);
                let until = match candidate.state {
                    // This source has room for it.
                    State::Waiting if may_dial && connected => {
                        candidate.source = source;
                        candidate.ask(name, peer, now, &mut self.steps)
                    }
                    State::Waiting if may_dial => {
                        candidate.source = source;
                        candidate.dial(peer, now, &mut self.steps)
                    }
                    // Beside a dial that is under way: the addresses that came first may be wrong ones.
                    State::Unreachable | State::Dialling(_) | State::LateDial
                        if !candidate.untried.is_empty() =>
                    {
                        candidate.dial(peer, now, &mut self.steps)
                    }
                    _ => return,
                };
                self.wake(name, until);
            }
        }
    }

    /// A connection to a peer stands.
    pub(crate) fn on_connected(&mut self, peer: &PeerId, now: Instant) {
        let mut asked = Vec::new();
        for (name, lookup) in &mut self.running {
            if let Some(candidate) = lookup.candidates.get_mut(peer)
                && matches!(
                    candidate.state,
                    State::Waiting | State::Dialling(_) | State::LateDial | State::Unreachable
                )
            {
                let until = candidate.ask(name, *peer, now, &mut self.steps);
                asked.push((name.clone(), until));
            }
        }
        for (name, until) in asked {
            self.wake(&name, until);
        }
    }

    /// A peer's host has said that nobody listens at one of the addresses of a dial that has failed:
    /// that the others are silent does not mean that the peer stands still.
    pub(crate) fn on_refused(&mut self, peer: &PeerId) {
        for lookup in self.running.values_mut() {
            if let Some(candidate) = lookup.candidates.get_mut(peer) {
                candidate.is_refused = true;
            }
        }
    }

    /// A dial to a peer has failed; `others` tells whether more of them are under way.
    pub(crate) fn on_dial_failed(&mut self, peer: &PeerId, others: bool, now: Instant) {
        let (mut given_up, mut dialled) = (Vec::new(), Vec::new());
        for (name, lookup) in &mut self.running {
            let wants_all = lookup.wants_all(now);
            let Some(candidate) = lookup.candidates.get_mut(peer) else {
                continue;
            };
            let (State::Dialling(_) | State::LateDial | State::Unreachable) = candidate.state
            else {
                continue;
            };
            // Nobody has refused, so that it may only stand still: who wants all has it dialled again.
            let is_late = matches!(candidate.state, State::Dialling(until) if now >= until);
            let again = is_late && !others && wants_all && !candidate.is_refused;
            if again {
                candidate.untried.append(&mut candidate.tried);
            }
            if again || !candidate.untried.is_empty() {
                let until = candidate.dial(*peer, now, &mut self.steps);
                dialled.push((name.clone(), until));
            } else if !others {
                candidate.state = State::Unreachable;
                given_up.push(name.clone());
            }
        }
        for (name, until) in dialled {
            self.wake(&name, until);
        }
        for name in given_up {
            self.settle(&name, now);
        }
    }

    /// A candidate said whether it serves the name; `None`: it did not answer. `connected` tells whether a
    /// connection with it stands.
    pub(crate) fn on_answer(
        &mut self,
        peer: &PeerId,
        name: &ServiceName,
        serves: Option<bool>,
        connected: bool,
        now: Instant,
    ) {
        let Some(lookup) = self.running.get_mut(name) else {
            return;
        };
        let wants_all = lookup.wants_all(now);
        let is_waited_for = wants_all || lookup.live.is_empty();
        let Some(candidate) = lookup.candidates.get_mut(peer) else {
            return;
        };
        let (State::Asked(until) | State::LateAnswer(until)) = candidate.state else {
            return;
        };
        // It took the question and is slow, or stands still for a while; or the question went with one of
        // its connections, and another stands.
        let is_late = now >= until;
        let is_cut_off = connected && !candidate.is_asked_again;
        if serves.is_none() && (is_late || is_cut_off) && is_waited_for {
            candidate.is_asked_again |= !is_late;
            let until = candidate.ask(name, *peer, now, &mut self.steps);
            let mut wake_at = until;
            if is_late && !wants_all {
                candidate.state = State::LateAnswer(until);
                wake_at = candidate.be_patient(now);
            }
            self.wake(name, wake_at);
            return self.settle(name, now);
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
                self.wake(name, now + LOOKUP_SETTLE);
            }
        }
        self.settle(name, now);
    }

    /// Time has passed.
    pub(crate) fn on_time(&mut self, now: Instant) {
        while let Some((at, _)) = self.deadlines.first()
            && *at <= now
            && let Some((at, name)) = self.deadlines.pop_first()
        {
            if let Some(lookup) = self.running.get_mut(&name) {
                lookup.deadlines.retain(|known| *known != at);
            }
            self.on_deadline(&name, now);
        }
    }

    fn on_deadline(&mut self, name: &ServiceName, now: Instant) {
        let Some(lookup) = self.running.get_mut(name) else {
            return;
        };
        let wants_all = lookup.wants_all(now);
        let mut dialled = Vec::new();
        let mut late = None;
        for (peer, candidate) in &mut lookup.candidates {
            match candidate.state {
                // These were put back; a dial that has hung so long may be given up meanwhile.
                State::Dialling(until) if now >= until && !candidate.untried.is_empty() => {
                    dialled.push(candidate.dial(*peer, now, &mut self.steps));
                }
                // Who wants all waits for the end of a dial and of a question, however long that takes.
                State::Dialling(until) if now >= until && !wants_all => {
                    candidate.state = State::LateDial;
                    late = late.max(Some(candidate.be_patient(now)));
                }
                State::Asked(until) if now >= until && !wants_all => {
                    candidate.state = State::LateAnswer(until);
                    late = late.max(Some(candidate.be_patient(now)));
                }
                _ => {}
            }
        }
        if let Some(until) = late {
            self.wake(name, until);
        }
        for until in dialled {
            self.wake(name, until);
        }
        self.settle(name, now);
    }

    /// Dials those that waited, as far as there is room now.
    fn refill(&mut self, name: &ServiceName, now: Instant) {
        while let Some(lookup) = self.running.get_mut(name)
            && let Some(peer) = lookup.next_waiting()
            && let Some(candidate) = lookup.candidates.get_mut(&peer)
        {
            let until = candidate.dial(peer, now, &mut self.steps);
            self.wake(name, until);
        }
    }

    /// Ends the lookup when nothing can change its outcome in time.
    fn settle(&mut self, name: &ServiceName, now: Instant) {
        self.refill(name, now);
        let Some(lookup) = self.running.get_mut(name) else {
            return;
        };
        if lookup.query == Query::Deferred {
            match lookup.is_in_doubt(now) {
                Some(true) => self.query(name),
                Some(false) => lookup.query = Query::Done,
                None => {}
            }
        }
        let Some(lookup) = self.running.get(name) else {
            return;
        };
        let complete = lookup.is_complete(self.expecting, now);
        self.tell_unreached(name, complete, now);
        let Some(lookup) = self.running.get_mut(name) else {
            return;
        };
        if !complete && !lookup.is_due(now) {
            return;
        }
        let outcome = lookup.verdict(complete);
        if lookup.wanted.is_empty() {
            self.remove(name);
            self.steps.push_back(Step::Done(name.clone(), outcome));
        } else if !lookup.is_settled {
            lookup.is_settled = true;
            self.steps.push_back(Step::Settled(name.clone(), outcome));
        }
    }

    /// Tells those who want all and need not, or do not, wait any longer.
    fn tell_unreached(&mut self, name: &ServiceName, complete: bool, now: Instant) {
        let Some(lookup) = self.running.get_mut(name) else {
            return;
        };
        let told = |until: &Instant| complete || *until <= now;
        let Some(last) = lookup.wanted.iter().rfind(|until| told(until)).copied() else {
            return;
        };
        lookup.wanted.retain(|until| !told(until));
        if !lookup.live.is_empty() {
            let step = Step::Unreached(name.clone(), last, lookup.unreached());
            self.steps.push_back(step);
        } else if !complete {
            self.steps.push_back(Step::TooLate(name.clone(), last));
        }
    }

    fn remove(&mut self, name: &ServiceName) {
        let Some(lookup) = self.running.remove(name) else {
            return;
        };
        for at in lookup.deadlines {
            self.deadlines.remove(&(at, name.clone()));
        }
        if let Query::Running { id, .. } = lookup.query {
            self.queries.remove(&id);
            self.steps.push_back(Step::FinishQuery(id));
        }
    }

    fn wake(&mut self, name: &ServiceName, at: Instant) {
        if let Some(lookup) = self.running.get_mut(name) {
            lookup.deadlines.push(at);
            self.deadlines.insert((at, name.clone()));
        }
    }
}

impl<Q> Lookup<Q> {
    /// Whether Kademlia may know of more than the points that were asked; `None`: it shows later.
    fn is_in_doubt(&self, now: Instant) -> Option<bool> {
        let waiting = !self.points.is_empty();
        if self.failed || waiting && now >= self.started + PATIENCE {
            return Some(true);
        }
        if waiting || self.candidates.values().any(Candidate::is_open) {
            return None;
        }
        let is_withdrawn = |candidate: &Candidate| candidate.state == State::Withdrawn;
        let nobody = self.candidates.values().all(is_withdrawn);
        Some(self.live.is_empty() && !(nobody && self.all_asked))
    }

    /// The next candidate that waits and may be dialled.
    fn next_waiting(&self) -> Option<PeerId> {
        let mut waiting = self
            .candidates
            .iter()
            .filter(|(_, candidate)| candidate.state == State::Waiting)
            .peekable();
        waiting.peek()?;
        let taken = self.count(Candidate::takes_place);
        let next = waiting.find(|(_, candidate)| self.has_room(candidate.source, &taken, 1));
        next.map(|(peer, _)| *peer)
    }

    /// How many candidates of each source are `counted`.
    fn count(&self, counted: fn(&Candidate) -> bool) -> HashMap<Source, usize> {
        let mut counts = HashMap::new();
        for candidate in self.candidates.values().filter(|named| counted(named)) {
            *counts.entry(candidate.source).or_default() += 1;
        }
        counts
    }

    /// Whether a source has room for one more candidate beside those that count, where they may be so
    /// many times its share. One grape that answers Kademlia has a part of Kademlia's share.
    fn has_room(&self, source: Source, counts: &HashMap<Source, usize>, times: usize) -> bool {
        let share = times * (MAX_CANDIDATES / self.sources).max(1);
        let of_one = counts.get(&source).copied().unwrap_or_default();
        match source {
            Source::Point(_) => of_one < share,
            Source::Kademlia(_) => {
                let by_kademlia =
                    |(source, _): &(&Source, _)| matches!(source, Source::Kademlia(_));
                let of_all: usize = counts
                    .iter()
                    .filter(by_kademlia)
                    .map(|(_, count)| count)
                    .sum();
                of_one < (share / KADEMLIA_ANSWERS).max(1) && of_all < share
            }
        }
    }

    /// Whether another candidate of a source may be dialled now.
    fn may_dial(&self, source: Source) -> bool {
        self.has_room(source, &self.count(Candidate::takes_place), 1)
    }

    /// Whether a source may name another candidate, now or for later.
    fn may_name(&self, source: Source) -> bool {
        self.has_room(source, &self.count(|_| true), NAMED)
    }

    /// Whether somebody waits for all who are named.
    fn wants_all(&self, now: Instant) -> bool {
        self.wanted.last().is_some_and(|until| *until > now)
    }

    /// Whether nothing can be learned any more.
    fn is_complete(&self, expecting: bool, now: Instant) -> bool {
        let may_learn = expecting && self.live.is_empty() && now < self.started + LOOKUP_SETTLE;
        let sources_done = self.query_done() && self.points.is_empty() && !may_learn;
        let is_awaited = |candidate: &Candidate| {
            candidate.is_open() || candidate.is_late(now) && self.live.is_empty()
        };
        sources_done && !self.candidates.values().any(is_awaited)
    }

    /// Whether who wants some has waited long enough.
    fn is_due(&self, now: Instant) -> bool {
        let settled = self
            .first_live
            .is_some_and(|first| now >= first + LOOKUP_SETTLE);
        settled || now >= self.started + LOOKUP_DEADLINE
    }

    /// The outcome as things stand.
    fn verdict(&self, complete: bool) -> Outcome {
        let unanswered = self.unreached().len();
        if !self.live.is_empty() {
            Outcome::Live(self.live.clone())
        } else if unanswered > 0 {
            Outcome::Unreachable(unanswered)
        } else if complete && !self.answered && self.candidates.is_empty() {
            Outcome::Unanswered
        } else if complete && !self.doubtful {
            Outcome::NotFound
        } else {
            Outcome::TimedOut
        }
    }

    /// Those that were named, have not said that they do not serve the name, and have not answered.
    fn unreached(&self) -> Vec<PeerId> {
        let unreached = self
            .candidates
            .iter()
            .filter(|(_, named)| !matches!(named.state, State::Live | State::Withdrawn));
        unreached.map(|(peer, _)| *peer).collect()
    }

    fn query_done(&self) -> bool {
        matches!(self.query, Query::Done)
    }
}

impl Candidate {
    fn new(source: Source, addresses: Vec<Multiaddr>) -> Self {
        let mut candidate = Self {
            source,
            state: State::Waiting,
            tried: Vec::new(),
            untried: Vec::new(),
            patience: None,
            is_refused: false,
            is_asked_again: false,
        };
        candidate.add(addresses, MAX_ADDRESSES);
        candidate
    }

    /// Takes further addresses, until there are `max`: as many as a provider may have for each source.
    fn add(&mut self, addresses: Vec<Multiaddr>, max: usize) {
        for address in addresses {
            let known = self.tried.contains(&address) || self.untried.contains(&address);
            if !known && self.tried.len() + self.untried.len() < max {
                self.untried.push(address);
            }
        }
    }

    /// Returns until when it is dialled.
    fn dial<Q>(&mut self, peer: PeerId, now: Instant, steps: &mut VecDeque<Step<Q>>) -> Instant {
        let until = now + DIAL_DEADLINE;
        let addresses = std::mem::take(&mut self.untried);
        self.tried.extend(addresses.iter().cloned());
        self.state = State::Dialling(until);
        steps.push_back(Step::Dial(peer, addresses));
        until
    }

    /// Returns until when it is asked.
    fn ask<Q>(
        &mut self,
        name: &ServiceName,
        peer: PeerId,
        now: Instant,
        steps: &mut VecDeque<Step<Q>>,
    ) -> Instant {
        let until = now + SERVES_DEADLINE;
        self.state = State::Asked(until);
        steps.push_back(Step::Ask(peer, name.clone()));
        until
    }

    fn is_open(&self) -> bool {
        matches!(self.state, State::Dialling(_) | State::Asked(_))
    }

    /// Whether it may answer yet although others are not kept waiting for it.
    fn is_late(&self, now: Instant) -> bool {
        let is_late = matches!(self.state, State::LateDial | State::LateAnswer(_));
        is_late && self.patience.is_some_and(|until| now < until)
    }

    /// It is late, and waited for until then.
    fn be_patient(&mut self, now: Instant) -> Instant {
        *self.patience.get_or_insert(now + LATE)
    }

    /// Whether another one has to wait for it.
    fn takes_place(&self) -> bool {
        self.is_open() || self.state == State::Live
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Kademlia at once, and these by rendezvous.
    fn by_rendezvous(points: &[PeerId]) -> Plan {
        Plan {
            points: points.to_vec(),
            ..Plan::default()
        }
    }

    /// A machine under test, with the steps it has taken.
    struct Scene {
        lookups: Lookups<u32>,
        name: ServiceName,
        now: Instant,
        steps: Vec<Step<u32>>,
    }

    impl Scene {
        fn new(points: &[PeerId]) -> Self {
            let mut scene = Self {
                lookups: Lookups::new(PeerId::random()),
                name: "client1".parse().unwrap(),
                now: Instant::now(),
                steps: Vec::new(),
            };
            let plan = by_rendezvous(points);
            scene.lookups.start(&scene.name, &plan, scene.now);
            scene.collect();
            scene.lookups.on_query_started(&scene.name, 1);
            scene
        }

        fn collect(&mut self) {
            while let Some(step) = self.lookups.poll_step() {
                self.steps.push(step);
            }
        }

        fn candidate(&mut self, peer: PeerId, addresses: &[&str], connected: bool) {
            self.named_by(Source::Kademlia(1), peer, addresses, connected);
        }

        fn named_by(&mut self, source: Source, peer: PeerId, addresses: &[&str], connected: bool) {
            let addresses = addresses.iter().map(|text| text.parse().unwrap()).collect();
            self.lookups
                .on_candidate(&self.name, source, peer, addresses, connected, self.now);
            self.collect();
        }

        fn dialling(&self) -> Option<PeerId> {
            let lookup = self.lookups.running.get(&self.name)?;
            let mut candidates = lookup.candidates.iter();
            let open = candidates.find(|(_, candidate)| candidate.is_open());
            open.map(|(peer, _)| *peer)
        }

        /// How many dials there were.
        fn dialled(&self) -> usize {
            let dials = |step: &&Step<u32>| matches!(step, Step::Dial(..));
            self.steps.iter().filter(dials).count()
        }

        fn query_ends(&mut self, id: u32) {
            let most = Answered::Most;
            self.lookups.on_query_ended(&id, most, self.now);
            self.collect();
        }

        fn answer(&mut self, peer: PeerId, serves: Option<bool>) {
            self.lookups
                .on_answer(&peer, &self.name, serves, false, self.now);
            self.collect();
        }

        fn dial_fails(&mut self, peer: PeerId) {
            self.lookups.on_dial_failed(&peer, false, self.now);
            self.collect();
        }

        fn connects(&mut self, peer: PeerId) {
            self.lookups.on_connected(&peer, self.now);
            self.collect();
        }

        fn passes(&mut self, time: Duration) {
            self.now += time;
            self.lookups.on_time(self.now);
            self.collect();
        }

        fn outcome(&self) -> Option<&Outcome> {
            self.steps.iter().find_map(|step| match step {
                Step::Done(_, outcome) => Some(outcome),
                _ => None,
            })
        }

        /// Until when all were wanted, and who was not reached.
        fn unreached(&self) -> Vec<(Instant, Vec<PeerId>)> {
            let told = |step: &Step<u32>| match step {
                Step::Unreached(_, until, peers) => Some((*until, sorted(peers.iter().copied()))),
                _ => None,
            };
            self.steps.iter().filter_map(told).collect()
        }

        fn dials_of(&self, peer: PeerId) -> Vec<Vec<String>> {
            let text =
                |addresses: &Vec<Multiaddr>| addresses.iter().map(ToString::to_string).collect();
            let dial = |step: &Step<u32>| match step {
                Step::Dial(dialled, addresses) if *dialled == peer => Some(text(addresses)),
                _ => None,
            };
            self.steps.iter().filter_map(dial).collect()
        }
    }

    fn sorted(peers: impl IntoIterator<Item = PeerId>) -> Vec<PeerId> {
        let mut peers: Vec<_> = peers.into_iter().collect();
        peers.sort();
        peers
    }

    const A: &str = "/ip4/10.0.0.1/tcp/1";
    const B: &str = "/ip4/10.0.0.2/tcp/2";

    #[test]
    fn asks_every_source_at_once() {
        let point = PeerId::random();
        let scene = Scene::new(&[point]);
        assert!(scene.steps.contains(&Step::Query(scene.name.clone())));
        let discover = Step::Discover(point, scene.name.clone());
        assert!(scene.steps.contains(&discover));
    }

    #[test]
    fn a_connected_candidate_is_asked_and_another_dialled_first() {
        let (near, far) = (PeerId::random(), PeerId::random());
        let mut scene = Scene::new(&[]);
        scene.candidate(near, &[], true);
        scene.candidate(far, &[A], false);
        assert!(scene.steps.contains(&Step::Ask(near, scene.name.clone())));
        assert!(!scene.steps.contains(&Step::Ask(far, scene.name.clone())));
        assert_eq!(scene.dials_of(far), [[A]]);
        scene.connects(far);
        assert!(scene.steps.contains(&Step::Ask(far, scene.name.clone())));
    }

    #[test]
    fn nobody_is_known_when_the_last_source_has_said_so_twice() {
        let point = PeerId::random();
        let mut scene = Scene::new(&[point]);
        scene
            .lookups
            .on_discovered(&point, &scene.name, true, scene.now);
        scene.query_ends(1);
        assert_eq!(scene.outcome(), None, "an empty answer is asked again");
        scene.lookups.on_query_started(&scene.name, 2);
        scene.query_ends(2);
        assert_eq!(scene.outcome(), Some(&Outcome::NotFound));
    }

    #[test]
    fn a_query_that_had_nobody_to_ask_is_not_repeated() {
        let mut scene = Scene::new(&[]);
        scene
            .lookups
            .on_query_ended(&1, Answered::Nobody, scene.now);
        scene.collect();
        assert_eq!(scene.outcome(), Some(&Outcome::Unanswered));
    }

    #[test]
    fn ends_at_once_when_everything_has_answered() {
        let (live, withdrawn, dead) = (PeerId::random(), PeerId::random(), PeerId::random());
        let mut scene = Scene::new(&[]);
        for peer in [live, withdrawn, dead] {
            scene.candidate(peer, &[A], false);
        }
        scene.query_ends(1);
        scene.connects(live);
        scene.answer(live, Some(true));
        scene.connects(withdrawn);
        scene.answer(withdrawn, Some(false));
        assert_eq!(scene.outcome(), None);
        scene.dial_fails(dead);
        assert_eq!(scene.outcome(), Some(&Outcome::Live(vec![live])));
    }

    #[test]
    fn waits_for_slow_ones_only_so_long_once_somebody_is_live() {
        let (fast, slow) = (PeerId::random(), PeerId::random());
        let mut scene = Scene::new(&[]);
        scene.candidate(fast, &[], true);
        scene.candidate(slow, &[A], false);
        scene.answer(fast, Some(true));
        scene.passes(LOOKUP_SETTLE / 2);
        assert_eq!(scene.outcome(), None);
        scene.passes(LOOKUP_SETTLE / 2);
        assert_eq!(scene.outcome(), Some(&Outcome::Live(vec![fast])));
        assert!(scene.steps.contains(&Step::FinishQuery(1)));
    }

    #[test]
    fn who_wants_all_waits_for_slow_ones_and_who_wants_some_does_not() {
        let (fast, slow) = (PeerId::random(), PeerId::random());
        let mut scene = Scene::new(&[]);
        let until = scene.now + LOOKUP_DEADLINE;
        assert_eq!(scene.lookups.want_all(&scene.name, until), []);
        scene.candidate(fast, &[], true);
        scene.candidate(slow, &[], true);
        scene.answer(fast, Some(true));
        scene.query_ends(1);
        scene.passes(LOOKUP_SETTLE);
        let some = Step::Settled(scene.name.clone(), Outcome::Live(vec![fast]));
        assert!(scene.steps.contains(&some));
        assert_eq!(scene.outcome(), None);
        // Who comes later and wants some has it too, and who wants all has the first.
        scene.steps.clear();
        scene.lookups.want_some(&scene.name.clone());
        assert_eq!(scene.lookups.want_all(&scene.name, until), [fast]);
        scene.collect();
        assert_eq!(scene.steps, [some]);
        // Longer than a question may take: it is asked once more.
        scene.passes(SERVES_DEADLINE);
        scene.answer(slow, None);
        scene.passes(SERVES_DEADLINE);
        scene.answer(slow, Some(true));
        let whole = Step::Unreached(scene.name.clone(), until, Vec::new());
        assert!(scene.steps.contains(&whole));
        assert_eq!(scene.outcome(), Some(&Outcome::Live(vec![fast, slow])));
    }

    #[test]
    fn who_wants_all_is_told_whom_a_lookup_did_not_reach() {
        let (fast, refusing, silent) = (PeerId::random(), PeerId::random(), PeerId::random());
        let gone = PeerId::random();
        for is_silent in [false, true] {
            let mut scene = Scene::new(&[]);
            let soon = scene.now + Duration::from_secs(5);
            let later = scene.now + Duration::from_secs(8);
            scene.lookups.want_all(&scene.name, soon);
            scene.lookups.want_all(&scene.name, later);
            for peer in [fast, refusing, silent] {
                scene.candidate(peer, &[A], false);
            }
            scene.query_ends(1);
            scene.connects(fast);
            scene.answer(fast, Some(true));
            scene.dial_fails(refusing);
            assert_eq!(scene.outcome(), None);
            if !is_silent {
                scene.dial_fails(silent);
                assert_eq!(scene.outcome(), Some(&Outcome::Live(vec![fast])));
                let told = scene.unreached();
                assert_eq!(told.len(), 1, "both at once");
                assert_eq!(told[0], (later, sorted([refusing, silent])));
                continue;
            }
            // A dial that nobody answers is tried again as long as there is time, one of which a part
            // was refused is not.
            scene.candidate(gone, &[A, B], false);
            scene.passes(Duration::from_secs(4));
            scene.dial_fails(silent);
            assert_eq!(scene.dials_of(silent), [[A], [A]]);
            scene.lookups.on_refused(&gone);
            scene.dial_fails(gone);
            assert_eq!(scene.dials_of(gone), [[A, B]]);
            scene.connects(gone);
            scene.answer(gone, Some(false));
            scene.passes(Duration::from_secs(1));
            assert_eq!(scene.unreached(), [(soon, sorted([refusing, silent]))]);
            assert_eq!(scene.outcome(), None);
            scene.passes(Duration::from_secs(3));
            assert_eq!(scene.unreached().len(), 2);
            assert_eq!(scene.outcome(), Some(&Outcome::Live(vec![fast])));
        }
    }

    #[test]
    fn who_wants_all_and_has_nobody_in_time_is_told_so() {
        let silent = PeerId::random();
        let mut scene = Scene::new(&[]);
        let until = scene.now + Duration::from_secs(2);
        scene.lookups.want_all(&scene.name, until);
        scene.candidate(silent, &[A], false);
        scene.passes(Duration::from_secs(2));
        assert_eq!(scene.unreached(), []);
        let late = Step::TooLate(scene.name.clone(), until);
        assert!(scene.steps.contains(&late));
        assert_eq!(scene.outcome(), None, "who wants some waits on");
    }

    #[test]
    fn who_has_withdrawn_does_not_count_as_announced() {
        let peer = PeerId::random();
        let mut scene = Scene::new(&[]);
        scene.candidate(peer, &[], true);
        scene.answer(peer, Some(false));
        scene.query_ends(1);
        assert_eq!(scene.outcome(), Some(&Outcome::NotFound));
    }

    #[test]
    fn one_that_never_answers_is_unreachable_in_the_end() {
        let peer = PeerId::random();
        for is_told in [false, true] {
            let mut scene = Scene::new(&[]);
            scene.candidate(peer, &[], true);
            scene.query_ends(1);
            scene.passes(SERVES_DEADLINE);
            if is_told {
                // It is asked again, but not by who has heard that it cannot be.
                scene.answer(peer, None);
                let asks = scene.steps.iter();
                let asks = asks.filter(|step| matches!(step, Step::Ask(..)));
                assert_eq!(asks.count(), 2);
            }
            assert_eq!(scene.outcome(), None);
            scene.passes(LATE);
            assert_eq!(scene.outcome(), Some(&Outcome::Unreachable(1)));
        }
    }

    #[test]
    fn one_whose_question_went_with_a_connection_is_asked_once_more_by_another() {
        let peer = PeerId::random();
        for (again, expected) in [
            (Some(true), Outcome::Live(vec![peer])),
            (None, Outcome::Unreachable(1)),
        ] {
            let mut scene = Scene::new(&[]);
            scene.candidate(peer, &[], true);
            scene.query_ends(1);
            for serves in [None, again] {
                assert_eq!(scene.outcome(), None);
                scene
                    .lookups
                    .on_answer(&peer, &scene.name, serves, true, scene.now);
                scene.collect();
            }
            scene.passes(LOOKUP_SETTLE);
            assert_eq!(scene.outcome(), Some(&expected));
        }
    }

    #[test]
    fn one_that_is_slow_is_found_and_keeps_nobody_from_being_asked() {
        let (slow, point) = (PeerId::random(), PeerId::random());
        for is_connected in [false, true] {
            let mut scene = small(&[point], true);
            scene.named_by(Source::Point(point), slow, &[A], is_connected);
            scene.says(point, true);
            assert!(!scene.asks_kademlia());
            scene.passes(DIAL_DEADLINE);
            assert!(scene.asks_kademlia());
            scene.lookups.on_query_started(&scene.name, 1);
            scene.query_ends(1);
            scene.passes(Duration::from_secs(1));
            if !is_connected {
                scene.connects(slow);
            }
            scene.answer(slow, Some(true));
            assert_eq!(scene.outcome(), Some(&Outcome::Live(vec![slow])));
        }
    }

    #[test]
    fn an_empty_answer_of_a_few_of_those_that_were_asked_is_no_answer() {
        for (answered, expected) in [
            (Answered::Most, Outcome::NotFound),
            (Answered::Fewer, Outcome::TimedOut),
            (Answered::Nobody, Outcome::NotFound),
        ] {
            let mut scene = Scene::new(&[]);
            scene.lookups.on_query_ended(&1, Answered::Fewer, scene.now);
            scene.collect();
            assert_eq!(scene.outcome(), None, "it is asked again");
            scene.lookups.on_query_started(&scene.name, 2);
            scene.lookups.on_query_ended(&2, answered, scene.now);
            scene.collect();
            assert_eq!(scene.outcome(), Some(&expected), "{answered:?}");
        }
    }

    #[test]
    fn one_that_cannot_be_dialled_in_time_is_unreachable_until_it_connects() {
        let peer = PeerId::random();
        let mut scene = Scene::new(&[]);
        scene.candidate(peer, &[A], false);
        scene.passes(DIAL_DEADLINE);
        assert_eq!(scene.outcome(), None, "Kademlia may name others");
        scene.connects(peer);
        scene.answer(peer, Some(true));
        scene.query_ends(1);
        assert_eq!(scene.outcome(), Some(&Outcome::Live(vec![peer])));
        let mut scene = Scene::new(&[]);
        scene.candidate(peer, &[A], false);
        scene.query_ends(1);
        scene.passes(DIAL_DEADLINE);
        assert_eq!(scene.outcome(), None);
        scene.passes(LATE);
        assert_eq!(scene.outcome(), Some(&Outcome::Unreachable(1)));
    }

    #[test]
    fn addresses_that_come_during_a_dial_are_tried_beside_it() {
        let peer = PeerId::random();
        let mut scene = Scene::new(&[]);
        scene.candidate(peer, &[A], false);
        scene.candidate(peer, &[A, B], false);
        assert_eq!(scene.dials_of(peer), [[A], [B]]);
        scene.query_ends(1);
        scene.lookups.on_dial_failed(&peer, true, scene.now);
        scene.collect();
        assert_eq!(scene.outcome(), None, "the other one may succeed");
        scene.dial_fails(peer);
        assert_eq!(scene.outcome(), Some(&Outcome::Unreachable(1)));
    }

    #[test]
    fn addresses_that_were_put_back_are_tried_when_a_dial_fails() {
        let (peer, b) = (PeerId::random(), B.parse().unwrap());
        let mut scene = Scene::new(&[]);
        scene.candidate(peer, &[A, B], false);
        scene.lookups.put_back(&peer, &[b]);
        scene.lookups.on_dial_failed(&peer, true, scene.now);
        scene.collect();
        assert_eq!(scene.dials_of(peer), [vec![A, B], vec![B]]);
        // Or when it has had its time.
        scene.lookups.put_back(&peer, &[B.parse().unwrap()]);
        scene.passes(DIAL_DEADLINE);
        assert_eq!(scene.dials_of(peer).len(), 3);
        scene.query_ends(1);
        scene.passes(DIAL_DEADLINE);
        scene.passes(LATE);
        assert_eq!(scene.outcome(), Some(&Outcome::Unreachable(1)));
    }

    #[test]
    fn nobody_is_not_found_while_a_bootstrap_grape_is_expected() {
        let (point, late) = (PeerId::random(), PeerId::random());
        for (connects, outcome) in [(true, None), (false, Some(Outcome::NotFound))] {
            let mut scene = Scene::new(&[]);
            scene.lookups.cancel(&scene.name);
            scene.lookups.expect(true, scene.now);
            let plan = Plan {
                registries: vec![point],
                keep_all: true,
                all_asked: true,
                ..Plan::default()
            };
            let (name, now) = (scene.name.clone(), scene.now);
            scene.lookups.start(&name, &plan, now);
            scene.lookups.on_discovered(&point, &name, true, now);
            scene.collect();
            assert_eq!(scene.outcome(), None);
            if connects {
                scene.lookups.on_bootstrap(late, true);
            }
            scene.lookups.expect(false, now);
            scene.collect();
            assert_eq!(scene.outcome(), outcome.as_ref());
            assert_eq!(
                scene.steps.contains(&Step::Find(late, name.clone())),
                connects
            );
            scene.lookups.on_discovered(&late, &name, true, now);
            scene.collect();
            assert_eq!(scene.outcome(), Some(&Outcome::NotFound));
        }
    }

    #[test]
    fn a_bootstrap_grape_is_not_expected_for_long() {
        let mut scene = Scene::new(&[]);
        scene.lookups.cancel(&scene.name);
        scene.lookups.expect(true, scene.now);
        scene
            .lookups
            .start(&scene.name, &by_rendezvous(&[]), scene.now);
        scene.lookups.on_query_started(&scene.name, 3);
        scene.query_ends(3);
        scene.lookups.on_query_started(&scene.name, 4);
        scene.query_ends(4);
        assert_eq!(scene.outcome(), None);
        scene.passes(LOOKUP_SETTLE);
        assert_eq!(scene.outcome(), Some(&Outcome::NotFound));
    }

    #[test]
    fn the_node_itself_is_no_candidate() {
        let mut scene = Scene::new(&[]);
        let local = scene.lookups.local;
        scene.candidate(local, &[A], false);
        scene
            .lookups
            .on_query_ended(&1, Answered::Nobody, scene.now);
        scene.collect();
        assert_eq!(scene.outcome(), Some(&Outcome::Unanswered));
    }

    #[test]
    fn no_more_candidates_are_dialled_than_the_limit() {
        let mut scene = Scene::new(&[]);
        for answer in 0..2 * NAMED * MAX_CANDIDATES {
            scene.named_by(Source::Kademlia(answer), PeerId::random(), &[A], false);
        }
        assert_eq!(scene.dialled(), MAX_CANDIDATES);
        // Each that fails makes room for another one, up to a bound.
        while let Some(peer) = scene.dialling() {
            scene.dial_fails(peer);
        }
        assert_eq!(scene.dialled(), NAMED * MAX_CANDIDATES);
    }

    #[test]
    fn a_source_that_names_many_leaves_places_to_the_others() {
        let point = PeerId::random();
        let mut scene = Scene::new(&[point]);
        let share = MAX_CANDIDATES / 2;
        for answer in 1..=3 * KADEMLIA_ANSWERS {
            for _ in 0..share {
                scene.named_by(Source::Kademlia(answer), PeerId::random(), &[A], false);
            }
            // One grape of many that answer Kademlia has a part of its share.
            let full = answer.min(KADEMLIA_ANSWERS) * share / KADEMLIA_ANSWERS;
            assert_eq!(scene.dialled(), full);
        }
        let named = PeerId::random();
        scene.named_by(Source::Point(point), named, &[B], false);
        assert_eq!(scene.dials_of(named), [[B]]);
        assert_eq!(scene.dialled(), share + 1);
    }

    #[test]
    fn one_that_waits_for_a_source_is_dialled_for_another_that_has_room() {
        let points = [PeerId::random(), PeerId::random()];
        let mut scene = Scene::new(&points);
        let share = MAX_CANDIDATES / 3;
        let peers: Vec<_> = (0..2 * share).map(|_| PeerId::random()).collect();
        for (count, point) in (1..).zip(points) {
            for peer in &peers {
                scene.named_by(Source::Point(point), *peer, &[A], false);
            }
            assert_eq!(scene.dialled(), count * share);
        }
    }

    #[test]
    fn those_that_found_no_room_are_dialled_when_others_fail() {
        let mut scene = Scene::new(&[]);
        let room = MAX_CANDIDATES / KADEMLIA_ANSWERS;
        let peers: Vec<_> = (0..room + 2).map(|_| PeerId::random()).collect();
        for peer in &peers {
            scene.candidate(*peer, &[A], false);
        }
        assert_eq!(scene.dialled(), room);
        scene.query_ends(1);
        scene.dial_fails(peers[0]);
        assert_eq!(scene.dialled(), room + 1);
        scene.connects(peers[1]);
        scene.answer(peers[1], Some(false));
        assert_eq!(scene.dialled(), room + 2);
        scene.passes(DIAL_DEADLINE);
        scene.passes(LATE);
        assert_eq!(scene.outcome(), Some(&Outcome::Unreachable(room + 1)));
        // One that is named again and again takes no room.
        for _ in 0..2 * NAMED * MAX_CANDIDATES {
            scene.candidate(peers[0], &[A], false);
        }
        // Those that are live are enough.
        let mut scene = Scene::new(&[]);
        for peer in &peers {
            scene.candidate(*peer, &[], true);
            scene.answer(*peer, Some(true));
        }
        scene.query_ends(1);
        assert_eq!(
            scene.outcome(),
            Some(&Outcome::Live(peers[..room].to_vec()))
        );
    }

    #[test]
    fn the_deadline_ends_a_lookup_whose_sources_are_silent() {
        let mut scene = Scene::new(&[PeerId::random()]);
        scene.passes(LOOKUP_DEADLINE);
        assert_eq!(scene.outcome(), Some(&Outcome::TimedOut));
    }

    #[test]
    fn a_second_start_joins_the_first() {
        let mut scene = Scene::new(&[]);
        let before = scene.steps.len();
        scene
            .lookups
            .start(&scene.name, &Plan::default(), scene.now);
        scene.collect();
        assert_eq!(scene.steps.len(), before);
    }

    #[test]
    fn a_cancelled_lookup_ends_its_query_and_says_nothing() {
        let mut scene = Scene::new(&[]);
        scene.lookups.cancel(&scene.name);
        scene.collect();
        assert!(scene.steps.contains(&Step::FinishQuery(1)));
        assert_eq!(scene.outcome(), None);
    }

    #[derive(Clone, Debug)]
    enum Happening {
        Candidate(usize, bool),
        Connected(usize),
        DialFailed(usize),
        Answer(usize, Option<bool>),
        QueryEnds,
        Discovered,
        Passes(u64),
    }

    fn happening() -> impl Strategy<Value = Happening> {
        let peer = 0..8usize;
        prop_oneof![
            (peer.clone(), any::<bool>()).prop_map(|(p, c)| Happening::Candidate(p, c)),
            peer.clone().prop_map(Happening::Connected),
            peer.clone().prop_map(Happening::DialFailed),
            (peer, any::<Option<bool>>()).prop_map(|(p, a)| Happening::Answer(p, a)),
            Just(Happening::QueryEnds),
            Just(Happening::Discovered),
            (0..1_000u64).prop_map(Happening::Passes),
        ]
    }

    proptest! {
        /// Whatever happens in whatever order, a lookup ends exactly once, by its deadline, with
        /// only those live that said so.
        #[test]
        fn every_lookup_ends_once_by_its_deadline(
            happenings in proptest::collection::vec(happening(), 0..60),
            keeps_all: bool,
            all_asked: bool,
        ) {
            let peers: Vec<_> = (0..8).map(|_| PeerId::random()).collect();
            let point = PeerId::random();
            let mut scene = if keeps_all { small(&[point], all_asked) } else { Scene::new(&[point]) };
            let mut said_yes = HashSet::new();
            for happening in happenings {
                match happening {
                    Happening::Candidate(p, connected) => scene.candidate(peers[p], &[A], connected),
                    Happening::Connected(p) => scene.connects(peers[p]),
                    Happening::DialFailed(p) => scene.dial_fails(peers[p]),
                    Happening::Answer(p, serves) => {
                        if serves == Some(true) {
                            said_yes.insert(peers[p]);
                        }
                        scene.answer(peers[p], serves);
                    }
                    Happening::QueryEnds => {
                        scene.query_ends(1);
                        if scene.outcome().is_none() {
                            scene.lookups.on_query_started(&scene.name, 2);
                        }
                        scene.query_ends(2);
                    }
                    Happening::Discovered => {
                        scene.lookups.on_discovered(&point, &scene.name, true, scene.now);
                        scene.collect();
                    }
                    Happening::Passes(millis) => scene.passes(Duration::from_millis(millis)),
                }
            }
            scene.passes(LOOKUP_DEADLINE);
            let done = |step: &&Step<u32>| matches!(step, Step::Done(..));
            prop_assert_eq!(scene.steps.iter().filter(done).count(), 1);
            if let Some(Outcome::Live(live)) = scene.outcome() {
                prop_assert!(live.iter().all(|peer| said_yes.contains(peer)));
                prop_assert!(!live.is_empty());
            }
        }
    }

    /// A lookup in a small network, of which these grapes are asked.
    fn small(witnesses: &[PeerId], all_asked: bool) -> Scene {
        let mut scene = Scene {
            lookups: Lookups::new(PeerId::random()),
            name: "client1".parse().unwrap(),
            now: Instant::now(),
            steps: Vec::new(),
        };
        let plan = Plan {
            registries: witnesses.to_vec(),
            keep_all: true,
            all_asked,
            ..Plan::default()
        };
        scene.lookups.start(&scene.name, &plan, scene.now);
        scene.collect();
        scene
    }

    impl Scene {
        fn asks_kademlia(&self) -> bool {
            self.steps.contains(&Step::Query(self.name.clone()))
        }

        /// A grape names these peers, all of them connected.
        fn witness(&mut self, grape: PeerId, named: &[PeerId]) {
            for peer in named {
                let source = Source::Point(grape);
                let name = &self.name;
                self.lookups
                    .on_candidate(name, source, *peer, vec![], true, self.now);
            }
            self.says(grape, true);
        }

        fn says(&mut self, grape: PeerId, answered: bool) {
            self.lookups
                .on_discovered(&grape, &self.name, answered, self.now);
            self.collect();
        }
    }

    #[test]
    fn in_a_small_network_a_live_provider_that_the_witnesses_name_is_enough() {
        let (a, b, live) = (PeerId::random(), PeerId::random(), PeerId::random());
        let mut scene = small(&[a, b], false);
        assert!(scene.steps.contains(&Step::Find(a, scene.name.clone())));
        scene.witness(a, &[live]);
        scene.answer(live, Some(true));
        assert_eq!(scene.outcome(), None, "the other may name others");
        scene.witness(b, &[]);
        assert_eq!(scene.outcome(), Some(&Outcome::Live(vec![live])));
        assert!(!scene.asks_kademlia());
    }

    #[test]
    fn nobody_is_known_when_all_grapes_there_are_say_so() {
        let a = PeerId::random();
        let mut scene = small(&[a], true);
        scene.witness(a, &[]);
        assert_eq!(scene.outcome(), Some(&Outcome::NotFound));
        assert!(!scene.asks_kademlia());
    }

    #[test]
    fn kademlia_is_asked_when_there_are_grapes_that_were_not_and_nobody_is_named() {
        let a = PeerId::random();
        let mut scene = small(&[a], false);
        scene.witness(a, &[]);
        assert!(scene.asks_kademlia());
        assert_eq!(scene.outcome(), None);
    }

    #[test]
    fn kademlia_is_asked_when_those_named_are_dead_even_if_all_grapes_were_asked() {
        let (a, dead) = (PeerId::random(), PeerId::random());
        let mut scene = small(&[a], true);
        scene.witness(a, &[dead]);
        assert!(!scene.asks_kademlia());
        scene.answer(dead, None);
        assert!(scene.asks_kademlia());
        // One that has withdrawn is not dead.
        let mut scene = small(&[a], true);
        scene.witness(a, &[dead]);
        scene.answer(dead, Some(false));
        assert_eq!(scene.outcome(), Some(&Outcome::NotFound));
    }

    #[test]
    fn kademlia_is_asked_at_once_when_a_witness_fails_and_soon_when_it_is_silent() {
        let (a, b) = (PeerId::random(), PeerId::random());
        let mut scene = small(&[a, b], true);
        scene.says(a, false);
        assert!(scene.asks_kademlia());
        let mut scene = small(&[a, b], true);
        scene.witness(a, &[]);
        assert!(!scene.asks_kademlia());
        scene.passes(PATIENCE);
        assert!(scene.asks_kademlia());
    }

    #[test]
    fn a_point_without_registry_is_asked_by_rendezvous_as_long_as_it_is_waited_for() {
        let a = PeerId::random();
        let mut scene = small(&[a], true);
        let (name, discover) = (scene.name.clone(), Step::Discover(a, scene.name.clone()));
        scene.lookups.on_no_registry(&a, &name);
        scene.collect();
        assert!(scene.steps.contains(&discover));
        scene.witness(a, &[]);
        scene.steps.clear();
        scene.lookups.on_no_registry(&a, &name);
        scene.collect();
        assert_eq!(scene.steps, []);
    }

    #[test]
    fn a_plan_asks_some_grapes_of_a_small_network_and_kademlia_in_every_other() {
        let peers: Vec<_> = (0..8).map(|_| PeerId::random()).collect();
        let of = |bootstraps: usize, points: usize, others: usize, count| {
            Plan::draw(&Connected {
                points: peers[..points].to_vec(),
                registries: peers[points..bootstraps].to_vec(),
                others: peers[bootstraps..bootstraps + others].to_vec(),
                count,
            })
        };
        for (plan, registries, points, keep_all, all_asked) in [
            (of(1, 0, 0, Some(1)), 1, 0, true, true),
            (of(1, 0, 5, Some(6)), 3, 0, true, false),
            (of(5, 0, 0, Some(5)), 3, 0, true, false),
            (of(2, 0, 1, Some(3)), 3, 0, true, true),
            (of(2, 1, 0, Some(2)), 1, 1, true, true),
            (of(2, 2, 3, Some(5)), 0, 2, false, false),
            (of(5, 1, 0, None), 4, 1, false, false),
            (of(5, 0, 3, Some(SURELY_SMALL)), 5, 0, false, false),
            (of(0, 0, 3, Some(3)), 0, 0, false, false),
        ] {
            let drawn = (plan.registries.len(), plan.points.len());
            assert_eq!(drawn, (registries, points), "{plan:?}");
            assert_eq!((plan.keep_all, plan.all_asked), (keep_all, all_asked));
        }
        assert!(of(1, 0, 5, Some(6)).registries.contains(&peers[0]));
    }

    /// How a lookup ends whose one rendezvous point and whose Kademlia name nobody.
    fn outcome(point_answers: bool, kademlia_answers: bool) -> Outcome {
        let (now, point) = (Instant::now(), PeerId::random());
        let name: ServiceName = "client1".parse().unwrap();
        let mut lookups = Lookups::new(PeerId::random());
        lookups.start(&name, &by_rendezvous(&[point]), now);
        lookups.on_discovered(&point, &name, point_answers, now);
        let mut queries = 0;
        loop {
            match lookups.poll_step().expect("it ends") {
                Step::Query(name) => {
                    queries += 1;
                    lookups.on_query_started(&name, queries);
                    let answered = match kademlia_answers {
                        true => Answered::Most,
                        false => Answered::Nobody,
                    };
                    lookups.on_query_ended(&queries, answered, now);
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
