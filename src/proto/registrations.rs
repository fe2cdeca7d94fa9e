//! Keeps a node's names at the grapes that have a registry of names: decides what each is told when.
//!
//! In a network of few grapes each one is responsible for every name. In a larger one a name belongs
//! to the grapes closest to its key, which Kademlia finds by a *walk*: once, again after a long
//! while, and when one of those grapes fails. The bootstrap grapes are told of every name in any case.
//!
//! * One message at a time is under way to a grape, with all that it has to be told: what it is told
//!   has an order, so that a withdrawal is never overtaken.
//! * A grape is told of new names at once, and of all of its names again in *rounds*, each begun
//!   when a third of the lease that it grants has passed, jittered. One that (re)connects may have
//!   lost everything and is told of every name.
//! * One that has no registry is left to Kademlia and rendezvous until it reconnects. One that does not
//!   answer is tried again after growing pauses.
//!
//! A name is *published* when who looks it up finds it: as soon as one grape keeps it where all are
//! responsible, otherwise when half of those closest to its key do, or all of them have been told and some
//! grape keeps it.
//!
//! Does no I/O: it takes what happened and `now`.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::ops::Bound;
use std::time::{Duration, Instant};

use libp2p::PeerId;
use rand::RngExt;

use crate::limits::{LEASE, MAX_ANNOUNCED, MIN_LEASE, RENEWALS_PER_LEASE};
use crate::name::ServiceName;
use crate::proto::wire::MAX_NAMES;

/// The walks under way at once: each asks some twenty grapes.
const MAX_WALKS: usize = 16;

/// How long the grapes that a walk has found are good, while none of them fails.
const WALK_INTERVAL: Duration = Duration::from_secs(600);

/// How often a bootstrap grape is told something, if only that this node is there: it tells in turn whether
/// another node with the same key is.
const CHECK_IN: Duration = Duration::from_secs(10);

/// The first and the longest pause before a grape that did not answer is told again. The very first
/// time there is none: a stream that had rested closes just as it is used.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// How soon a name is told again that a grape did not take.
const REFUSED: Duration = Duration::from_secs(2);

/// The longest lease that is believed: so long a grape that fails is told of withdrawals.
const LONGEST: Duration = Duration::from_secs(24 * 3_600);

/// The failures in a row after which a grape's names are taken elsewhere.
const FAILED: u32 = 2;

/// Names in the order in which they were announced. No number is used twice.
type Number = u64;

/// Which grapes are responsible for a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Every grape that is known.
    All,
    /// Those closest to its key.
    Closest,
}

/// A grape that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) peer: PeerId,
    /// It is told of every name, whatever the scope.
    pub(crate) is_bootstrap: bool,
    /// It runs another implementation.
    pub(crate) is_foreign: bool,
}

/// What a grape is told in one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Update {
    pub(crate) grape: PeerId,
    pub(crate) announce: Vec<ServiceName>,
    pub(crate) withdraw: Vec<ServiceName>,
}

/// What became of an [`Update`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The grape keeps what was announced for so long, but for those at these places.
    Taken {
        lease: Duration,
        refused: BTreeSet<usize>,
    },
    NoRegistry,
    /// It did not answer, or is busy.
    Failed,
}

/// The names of a node and the grapes that keep them.
#[derive(Debug)]
pub(crate) struct Registrations {
    numbers: HashMap<ServiceName, Number>,
    names: BTreeMap<Number, Name>,
    last: Number,
    grapes: HashMap<PeerId, Grape>,
    /// When each grape has to be told something.
    due: BTreeSet<(Instant, PeerId)>,
    scope: Scope,
    /// When the closest grapes of each name are looked for.
    walks: BTreeSet<(Instant, Number)>,
    walking: usize,
    /// How many grapes have no registry, and those of which that has just turned out.
    without_registry: usize,
    found_without: Vec<PeerId>,
    /// Those that have just been published.
    published: VecDeque<ServiceName>,
}

#[derive(Debug)]
struct Name {
    name: ServiceName,
    /// Some grape was told of it, and may keep it even if it has not answered.
    told: bool,
    /// A grape keeps it, or has.
    kept: bool,
    /// Who looks it up finds it.
    published: bool,
    /// What has become of it at the closest grapes, from the end of its first walk until it is published.
    telling: Option<Telling>,
    /// Its entry in [`Registrations::walks`].
    walk: Option<Instant>,
}

/// How far the grapes closest to a name have been told of it.
#[derive(Debug)]
struct Telling {
    open: BTreeSet<PeerId>,
    kept: usize,
    enough: usize,
}

#[derive(Debug)]
struct Grape {
    /// It is told of every name, and otherwise of those that it is among the closest to.
    every: bool,
    is_bootstrap: bool,
    closest_to: BTreeSet<Number>,
    /// `None`: it has no registry.
    ledger: Option<Ledger>,
    in_flight: Option<InFlight>,
    failures: u32,
    /// Nothing is told before.
    not_before: Option<Instant>,
    /// Its entry in [`Registrations::due`].
    due: Option<Instant>,
}

/// What the registry of a grape keeps of this node's names, and what it has to be told.
#[derive(Debug)]
struct Ledger {
    /// The lease that it grants.
    lease: Duration,
    /// Those that it is told of next.
    pending: BTreeSet<Number>,
    /// Those that it did not take, and when it is told of them again.
    refused: BTreeSet<Number>,
    retry: Option<Instant>,
    /// Those that it may keep and that are taken back, and until when it may keep any.
    withdrawn: BTreeSet<ServiceName>,
    keeps_until: Instant,
    /// Where the round is, if one is under way.
    round: Option<Number>,
    next_round: Instant,
    next_check_in: Instant,
}

#[derive(Debug)]
struct InFlight {
    announce: Vec<Number>,
    withdraw: Vec<ServiceName>,
}

impl Registrations {
    pub(crate) fn new() -> Self {
        Self {
            numbers: HashMap::new(),
            names: BTreeMap::new(),
            last: 0,
            grapes: HashMap::new(),
            due: BTreeSet::new(),
            scope: Scope::All,
            walks: BTreeSet::new(),
            walking: 0,
            without_registry: 0,
            found_without: Vec::new(),
            published: VecDeque::new(),
        }
    }

    /// Starts to announce a name, which is not announced yet.
    pub(crate) fn announce(&mut self, name: &ServiceName, now: Instant) {
        self.last += 1;
        let number = self.last;
        // A grape that was to be told that it is gone may still keep it.
        let (mut told, mut touched) = (false, Vec::new());
        for (peer, grape) in &mut self.grapes {
            let Some(ledger) = &mut grape.ledger else {
                continue;
            };
            let is_kept = ledger.withdrawn.remove(name);
            told |= is_kept;
            if is_kept && !grape.every {
                // Until a walk says otherwise.
                grape.closest_to.insert(number);
            }
            if is_kept || grape.every {
                ledger.pending.insert(number);
                touched.push(*peer);
            }
        }
        self.numbers.insert(name.clone(), number);
        let entry = Name {
            name: name.clone(),
            told,
            kept: false,
            published: false,
            telling: None,
            walk: None,
        };
        self.names.insert(number, entry);
        if self.scope == Scope::Closest {
            self.walk_at(number, now);
        }
        self.reschedule_those(&touched, now);
    }

    /// Stops announcing a name.
    pub(crate) fn withdraw(&mut self, name: &ServiceName, now: Instant) {
        let Some(number) = self.numbers.remove(name) else {
            return;
        };
        let Some(entry) = self.names.remove(&number) else {
            return;
        };
        if let Some(at) = entry.walk {
            self.walks.remove(&(at, number));
        }
        let mut touched = Vec::new();
        for (peer, grape) in &mut self.grapes {
            let is_kept = grape.closest_to.remove(&number) || grape.every;
            let Some(ledger) = &mut grape.ledger else {
                continue;
            };
            ledger.pending.remove(&number);
            ledger.refused.remove(&number);
            if !is_kept {
                continue;
            }
            if entry.told && ledger.withdrawn.len() < MAX_ANNOUNCED {
                ledger.withdrawn.insert(name.clone());
                if grape.failures == 0 {
                    // What is taken back waits for nothing.
                    grape.not_before = None;
                }
            }
            touched.push(*peer);
        }
        self.reschedule_those(&touched, now);
    }

    /// The grapes that are known now.
    pub(crate) fn on_grapes(&mut self, known: &[Known], scope: Scope, now: Instant) {
        let has_grown = self.scope == Scope::All && scope == Scope::Closest;
        if self.scope != scope {
            self.scope = scope;
            self.share_out(now);
        }
        self.drop_unknown(known, now);
        let mut found_without = Vec::new();
        for known in known {
            let every = known.is_bootstrap || scope == Scope::All;
            let grape = self
                .grapes
                .entry(known.peer)
                .or_insert_with(|| Grape::new(now));
            if known.is_foreign && grape.ledger.take().is_some() {
                self.without_registry += 1;
                self.found_without.push(known.peer);
                found_without.push((known.peer, grape.closest_to.iter().copied().collect()));
            }
            if every
                && !grape.every
                && let Some(ledger) = &mut grape.ledger
            {
                let all = self.names.keys();
                let new = all.filter(|number| !grape.closest_to.contains(number));
                ledger.pending.extend(new);
            }
            if has_grown && grape.every {
                // Until a walk says otherwise.
                grape.closest_to = self.names.keys().copied().collect();
            }
            grape.every = every;
            grape.is_bootstrap = known.is_bootstrap;
        }
        for (grape, numbers) in found_without {
            self.is_told(&grape, numbers);
        }
        self.reschedule_all(now);
    }

    /// The network is a large one from now on, and every name belongs to some grapes; or it is not
    /// any more.
    fn share_out(&mut self, now: Instant) {
        match self.scope {
            Scope::Closest => self.walk_for(self.names.keys().copied().collect(), now),
            Scope::All => {
                self.walks.clear();
                for entry in self.names.values_mut() {
                    entry.walk = None;
                }
                self.look_whether_published(self.names.keys().copied().collect::<Vec<_>>());
            }
        }
    }

    /// Forgets grapes that are not known any more; of a large network only those that keep nothing,
    /// because a walk finds some that no routing table has room for.
    fn drop_unknown(&mut self, known: &[Known], now: Instant) {
        let scope = self.scope;
        let known: HashSet<_> = known.iter().map(|known| known.peer).collect();
        let is_lost = |peer: &PeerId, grape: &Grape| {
            let is_needed = scope == Scope::Closest && grape.is_needed();
            !known.contains(peer) && !is_needed
        };
        let lost: Vec<_> = self
            .grapes
            .extract_if(|peer, grape| is_lost(peer, grape))
            .collect();
        for (peer, grape) in lost {
            if let Some(at) = grape.due {
                self.due.remove(&(at, peer));
            }
            self.without_registry -= usize::from(grape.ledger.is_none());
            self.walk_for(grape.closest_to, now);
        }
    }

    /// A grape is connected: it may be new or have lost everything.
    pub(crate) fn on_connected(&mut self, peer: &PeerId, now: Instant) {
        let Some(grape) = self.grapes.get_mut(peer) else {
            return;
        };
        (grape.failures, grape.not_before) = (0, None);
        self.without_registry -= usize::from(grape.ledger.is_none());
        let ledger = grape.ledger.get_or_insert_with(|| Ledger::new(now));
        ledger.pending = match grape.every {
            true => self.names.keys().copied().collect(),
            false => grape.closest_to.clone(),
        };
        (ledger.refused, ledger.retry, ledger.round) = Default::default();
        self.reschedule(peer, now);
    }

    /// This node has other addresses. A grape keeps them once for all names, so that one name has to be
    /// told again.
    pub(crate) fn on_addresses(&mut self, now: Instant) {
        let first = self.names.keys().next().copied();
        for grape in self.grapes.values_mut() {
            let Some(ledger) = &mut grape.ledger else {
                continue;
            };
            let number = match grape.every {
                true => first,
                false => grape.closest_to.first().copied(),
            };
            ledger.pending.extend(number);
            (grape.failures, grape.not_before) = (0, None);
        }
        self.reschedule_all(now);
    }

    /// A grape's last connection has closed: what it keeps is told again soon, which connects.
    pub(crate) fn on_disconnected(&mut self, peer: &PeerId, now: Instant) {
        let Some(grape) = self.grapes.get_mut(peer) else {
            return;
        };
        let soon = now + RETRY_MIN.mul_f64(rand::rng().random_range(0.5..1.0));
        grape.not_before = Some(soon);
        if let Some(ledger) = &mut grape.ledger {
            ledger.next_round = ledger.next_round.min(soon);
        }
        self.reschedule(peer, now);
    }

    /// The next message to send, if one is due.
    pub(crate) fn poll_update(&mut self, now: Instant) -> Option<Update> {
        while let Some(&(at, peer)) = self.due.first()
            && at <= now
        {
            let grape = self.grapes.get_mut(&peer);
            let update = grape.and_then(|grape| grape.next_update(&mut self.names, now));
            self.reschedule(&peer, now);
            if let Some((announce, withdraw)) = update {
                return Some(Update {
                    grape: peer,
                    announce,
                    withdraw,
                });
            }
        }
        None
    }

    /// The next name whose closest grapes are to be looked for.
    pub(crate) fn poll_walk(&mut self, now: Instant) -> Option<ServiceName> {
        let (at, _) = self.walks.first()?;
        if *at > now || self.walking >= MAX_WALKS {
            return None;
        }
        let (_, number) = self.walks.pop_first()?;
        let entry = self.names.get_mut(&number)?;
        entry.walk = None;
        self.walking += 1;
        Some(entry.name.clone())
    }

    /// When time alone makes something due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        let update = self.due.first().map(|(at, _)| *at);
        let walk = self.walks.first().map(|(at, _)| *at);
        let walk = walk.filter(|_| self.walking < MAX_WALKS);
        update.into_iter().chain(walk).min()
    }

    /// A walk has ended at these grapes.
    pub(crate) fn on_walked(&mut self, name: &ServiceName, closest: &[PeerId], now: Instant) {
        self.walking = self.walking.saturating_sub(1);
        let Some(&number) = self.numbers.get(name) else {
            return;
        };
        if self.scope == Scope::All {
            return;
        }
        if closest.is_empty() {
            return self.walk_at(number, now + REFUSED);
        }
        let jitter = rand::rng().random_range(0.8..1.0);
        self.walk_at(number, now + WALK_INTERVAL.mul_f64(jitter));
        let told = self.names.get(&number).is_some_and(|entry| entry.told);
        for (peer, grape) in &mut self.grapes {
            let is_lost = !closest.contains(peer) && grape.closest_to.remove(&number);
            if !is_lost || grape.every {
                continue;
            }
            let Some(ledger) = &mut grape.ledger else {
                continue;
            };
            ledger.pending.remove(&number);
            ledger.refused.remove(&number);
            if told {
                // It would not hear of a withdrawal any more.
                ledger.withdrawn.insert(name.clone());
            }
        }
        for peer in closest {
            let grape = self.grapes.entry(*peer).or_insert_with(|| Grape::new(now));
            if grape.closest_to.insert(number)
                && !grape.every
                && let Some(ledger) = &mut grape.ledger
            {
                ledger.withdrawn.remove(name);
                ledger.pending.insert(number);
            }
        }
        self.reschedule_all(now);
        self.begin_telling(number, closest);
    }

    /// From now on it counts which of the closest grapes keep a name.
    fn begin_telling(&mut self, number: Number, closest: &[PeerId]) {
        let grapes = &self.grapes;
        let ours = closest.iter().filter(|peer| {
            let grape = grapes.get(*peer);
            grape.is_some_and(|grape| grape.ledger.is_some())
        });
        let (told, open): (BTreeSet<_>, _) = ours.partition(|peer| {
            let grape = grapes.get(*peer);
            grape.is_some_and(|grape| grape.has_been_told(number))
        });
        let Some(entry) = self.names.get_mut(&number) else {
            return;
        };
        if entry.published {
            return;
        }
        entry.telling = Some(Telling {
            kept: told.len(),
            enough: (told.len() + open.len()).div_ceil(2),
            open,
        });
        self.look_whether_published([number]);
    }

    /// Looks whether names are published that have not been so far.
    fn look_whether_published(&mut self, numbers: impl IntoIterator<Item = Number>) {
        for number in numbers {
            if let Some(entry) = self.names.get_mut(&number)
                && entry.is_published_now(self.scope)
            {
                self.published.push_back(entry.name.clone());
            }
        }
    }

    /// The next name that is published now and was not before.
    pub(crate) fn poll_published(&mut self) -> Option<ServiceName> {
        self.published.pop_front()
    }

    /// What became of the message that was under way to a grape.
    pub(crate) fn on_answer(&mut self, peer: &PeerId, answer: Answer, now: Instant) {
        let Some(told) = self.grapes.get_mut(peer).and_then(|g| g.in_flight.take()) else {
            return;
        };
        let announced = told.announce.clone();
        match answer {
            Answer::Taken { lease, refused } => self.on_taken(peer, &told, lease, &refused, now),
            Answer::NoRegistry => self.on_no_registry(peer, now),
            Answer::Failed => self.on_failed(peer, told, now),
        }
        self.reschedule(peer, now);
        self.is_told(peer, announced);
    }

    /// A grape needs not be waited for any more, for these names to be published.
    fn is_told(&mut self, peer: &PeerId, numbers: Vec<Number>) {
        for number in &numbers {
            if let Some(telling) = self.names.get_mut(number).and_then(|e| e.telling.as_mut()) {
                telling.open.remove(peer);
            }
        }
        self.look_whether_published(numbers);
    }

    fn on_taken(
        &mut self,
        peer: &PeerId,
        told: &InFlight,
        lease: Duration,
        refused: &BTreeSet<usize>,
        now: Instant,
    ) {
        let Some(grape) = self.grapes.get_mut(peer) else {
            return;
        };
        (grape.failures, grape.not_before) = (0, None);
        let Some(ledger) = &mut grape.ledger else {
            return;
        };
        ledger.keeps_until = ledger.keeps_until.max(now + lease.min(LONGEST));
        // A longer one is no reason to be heard of less often.
        ledger.lease = lease.clamp(MIN_LEASE, LEASE);
        ledger.next_round = ledger.next_round.min(now + ledger.renewal());
        for (index, number) in told.announce.iter().enumerate() {
            let Some(entry) = self.names.get_mut(number) else {
                continue;
            };
            if refused.contains(&index) {
                ledger.refused.insert(*number);
                continue;
            }
            entry.kept = true;
            if let Some(telling) = &mut entry.telling
                && telling.open.remove(peer)
            {
                telling.kept += 1;
            }
        }
        if !ledger.refused.is_empty() {
            ledger.retry.get_or_insert(now + REFUSED);
        }
    }

    fn on_failed(&mut self, peer: &PeerId, told: InFlight, now: Instant) {
        let Some(grape) = self.grapes.get_mut(peer) else {
            return;
        };
        let Some(ledger) = &mut grape.ledger else {
            return;
        };
        let announced = told.announce.into_iter();
        let still = announced.filter(|number| self.names.contains_key(number));
        ledger.pending.extend(still);
        for name in told.withdraw {
            let again = self.numbers.get(&name);
            match again.and_then(|number| self.names.get_mut(number)) {
                Some(entry)
                    if grape.every || again.is_some_and(|n| grape.closest_to.contains(n)) =>
                {
                    entry.told = true;
                }
                _ => {
                    ledger.withdrawn.insert(name);
                }
            }
        }
        if now >= ledger.keeps_until {
            // It has forgotten them by itself.
            ledger.withdrawn.clear();
        }
        grape.failures += 1;
        if grape.failures > 1 {
            let doublings = (grape.failures - FAILED).min(8);
            grape.not_before = Some(now + (RETRY_MIN * (1 << doublings)).min(RETRY_MAX));
        }
        if grape.failures == FAILED && self.scope == Scope::Closest {
            let numbers = grape.closest_to.clone();
            self.walk_for(numbers, now);
        }
    }

    /// How many grapes have to be told that a name is gone, and may yet take that.
    pub(crate) fn withdrawing(&self) -> usize {
        let is_open = |grape: &&Grape| {
            let told = grape.in_flight.as_ref();
            let telling = told.is_some_and(|told| !told.withdraw.is_empty());
            let ledger = grape.ledger.as_ref();
            let to_tell = ledger.is_some_and(|ledger| !ledger.withdrawn.is_empty());
            grape.failures == 0 && (telling || to_tell)
        };
        self.grapes.values().filter(is_open).count()
    }

    /// Whether a grape is known to have no registry.
    pub(crate) fn lacks_registry(&self, peer: &PeerId) -> bool {
        let grape = self.grapes.get(peer);
        grape.is_some_and(|grape| grape.ledger.is_none())
    }

    /// A grape has answered that it has no registry.
    pub(crate) fn on_no_registry(&mut self, peer: &PeerId, now: Instant) {
        let Some(grape) = self.grapes.get_mut(peer) else {
            return;
        };
        let closest_to = grape.closest_to.iter().copied().collect();
        if grape.ledger.take().is_some() {
            self.without_registry += 1;
            self.found_without.push(*peer);
        }
        self.reschedule(peer, now);
        self.is_told(peer, closest_to);
    }

    /// The next grape that turned out to have no registry.
    pub(crate) fn poll_without_registry(&mut self) -> Option<PeerId> {
        self.found_without.pop()
    }

    /// Whether a grape that is known has no registry, so that Kademlia has to tell it.
    pub(crate) fn knows_one_without_registry(&self) -> bool {
        self.without_registry > 0
    }

    /// Looks for the grapes of names, again or for the first time.
    fn walk_for(&mut self, numbers: BTreeSet<Number>, now: Instant) {
        if self.scope == Scope::Closest {
            for number in numbers {
                self.walk_at(number, now);
            }
        }
    }

    fn walk_at(&mut self, number: Number, at: Instant) {
        let Some(entry) = self.names.get_mut(&number) else {
            return;
        };
        if let Some(before) = entry.walk.replace(at) {
            self.walks.remove(&(before, number));
        }
        self.walks.insert((at, number));
    }

    fn reschedule_all(&mut self, now: Instant) {
        let peers: Vec<_> = self.grapes.keys().copied().collect();
        self.reschedule_those(&peers, now);
    }

    fn reschedule_those(&mut self, peers: &[PeerId], now: Instant) {
        for peer in peers {
            self.reschedule(peer, now);
        }
    }

    fn reschedule(&mut self, peer: &PeerId, now: Instant) {
        let Some(grape) = self.grapes.get_mut(peer) else {
            return;
        };
        let due = grape.next_due(self.names.is_empty(), now);
        if due == grape.due {
            return;
        }
        if let Some(before) = std::mem::replace(&mut grape.due, due) {
            self.due.remove(&(before, *peer));
        }
        if let Some(at) = due {
            self.due.insert((at, *peer));
        }
    }
}

impl Name {
    /// Whether who looks it up finds it, and did not before.
    fn is_published_now(&mut self, scope: Scope) -> bool {
        let is_found = match (scope, &self.telling) {
            (Scope::All, _) => self.kept,
            (Scope::Closest, None) => false,
            (Scope::Closest, Some(telling)) => {
                let by_enough = telling.kept > 0 && telling.kept >= telling.enough;
                by_enough || self.kept && telling.open.is_empty()
            }
        };
        if !is_found || self.published {
            return false;
        }
        self.published = true;
        self.telling = None;
        true
    }
}

impl Grape {
    /// Whether it was told of a name that it is to keep, and has taken it.
    fn has_been_told(&self, number: Number) -> bool {
        let ledger = self.ledger.as_ref();
        let in_flight = self.in_flight.as_ref();
        let is_taken = ledger.is_some_and(|ledger| {
            !ledger.pending.contains(&number) && !ledger.refused.contains(&number)
        });
        is_taken && !in_flight.is_some_and(|told| told.announce.contains(&number))
    }

    fn new(now: Instant) -> Self {
        Self {
            every: false,
            is_bootstrap: false,
            closest_to: BTreeSet::new(),
            ledger: Some(Ledger::new(now)),
            in_flight: None,
            failures: 0,
            not_before: None,
            due: None,
        }
    }

    /// Whether it keeps names by itself, or is to hear that one is gone.
    fn is_needed(&self) -> bool {
        let ledger = self.ledger.as_ref();
        let has_withdrawn = ledger.is_some_and(|ledger| !ledger.withdrawn.is_empty());
        !self.closest_to.is_empty() || has_withdrawn || self.in_flight.is_some()
    }

    /// When there is something to tell.
    fn next_due(&self, nothing_announced: bool, now: Instant) -> Option<Instant> {
        let ledger = self.ledger.as_ref()?;
        if self.in_flight.is_some() {
            return None;
        }
        let keeps_nothing = match self.every {
            true => nothing_announced,
            false => self.closest_to.is_empty(),
        };
        let due = match (ledger.is_behind(), keeps_nothing) {
            // An earlier one stays as it is.
            (true, _) => self.due.map_or(now, |due| due.min(now)),
            (false, true) => return None,
            (false, false) => {
                let check_in = self.is_bootstrap.then_some(ledger.next_check_in);
                let due = ledger.retry.into_iter().chain(check_in);
                due.fold(ledger.next_round, Instant::min)
            }
        };
        Some(self.not_before.map_or(due, |at| at.max(due)))
    }

    /// What to tell now, which is then under way.
    fn next_update(
        &mut self,
        names: &mut BTreeMap<Number, Name>,
        now: Instant,
    ) -> Option<(Vec<ServiceName>, Vec<ServiceName>)> {
        if self.in_flight.is_some() {
            return None;
        }
        let ledger = self.ledger.as_mut()?;
        ledger.on_time(now);
        let mut announce: Vec<Number> = Vec::new();
        // New names do not keep a round from going on, nor the other way round.
        ledger.take_pending(MAX_NAMES / 2, &mut announce);
        if let Some(from) = ledger.round {
            let range = (Bound::Included(from), Bound::Unbounded);
            match self.every {
                true => ledger.go_on(names.range(range).map(|(number, _)| number), &mut announce),
                false => ledger.go_on(self.closest_to.range(range), &mut announce),
            }
        }
        ledger.take_pending(MAX_NAMES, &mut announce);
        let mut withdraw = Vec::new();
        while withdraw.len() < MAX_NAMES
            && let Some(name) = ledger.withdrawn.pop_first()
        {
            withdraw.push(name);
        }
        let checks_in = self.is_bootstrap && now >= ledger.next_check_in && !names.is_empty();
        if announce.is_empty() && withdraw.is_empty() && !checks_in {
            return None;
        }
        ledger.next_check_in = now + CHECK_IN;
        if !announce.is_empty() {
            // What it grants is not known yet: at least as long as ours do, from when it arrives.
            ledger.keeps_until = ledger.keeps_until.max(now + 2 * LEASE);
        }
        let mut told = Vec::with_capacity(announce.len());
        for number in &announce {
            if let Some(entry) = names.get_mut(number) {
                entry.told = true;
                told.push(entry.name.clone());
            }
        }
        self.in_flight = Some(InFlight {
            announce,
            withdraw: withdraw.clone(),
        });
        Some((told, withdraw))
    }
}

impl Ledger {
    fn new(now: Instant) -> Self {
        let mut ledger = Self {
            lease: LEASE,
            pending: BTreeSet::new(),
            refused: BTreeSet::new(),
            retry: None,
            withdrawn: BTreeSet::new(),
            keeps_until: now,
            round: None,
            next_round: now,
            next_check_in: now + CHECK_IN,
        };
        ledger.next_round += ledger.renewal();
        ledger
    }

    /// How long after one round the next one begins.
    fn renewal(&self) -> Duration {
        let jitter = rand::rng().random_range(0.8..1.0);
        (self.lease / RENEWALS_PER_LEASE).mul_f64(jitter)
    }

    /// Whether there is something to tell at once.
    fn is_behind(&self) -> bool {
        !self.pending.is_empty() || !self.withdrawn.is_empty() || self.round.is_some()
    }

    /// Begins a round, and repeats what was refused, when it is time.
    fn on_time(&mut self, now: Instant) {
        if self.round.is_none() && self.next_round <= now {
            self.round = Some(Number::MIN);
            self.next_round = now + self.renewal();
        }
        if self.retry.is_some_and(|at| at <= now) {
            self.retry = None;
            self.pending.append(&mut self.refused);
        }
    }

    fn take_pending(&mut self, up_to: usize, announce: &mut Vec<Number>) {
        while announce.len() < up_to
            && let Some(number) = self.pending.pop_first()
        {
            announce.push(number);
        }
    }

    /// Fills a message with the next names of the round, of which these are left; it ends with the
    /// last one.
    fn go_on<'a>(
        &mut self,
        mut rest: impl Iterator<Item = &'a Number>,
        announce: &mut Vec<Number>,
    ) {
        let new = announce.len();
        self.round = loop {
            if announce.len() >= MAX_NAMES {
                break rest.next().copied();
            }
            let Some(number) = rest.next() else {
                break None;
            };
            if announce[..new].binary_search(number).is_err() && !self.pending.contains(number) {
                announce.push(*number);
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn name(number: usize) -> ServiceName {
        format!("name{number}").parse().unwrap()
    }

    fn known(peer: PeerId) -> Known {
        Known {
            peer,
            is_bootstrap: false,
            is_foreign: false,
        }
    }

    fn taken() -> Answer {
        Answer::Taken {
            lease: LEASE,
            refused: BTreeSet::new(),
        }
    }

    /// A machine under test, and what its grapes keep.
    struct Scene {
        registrations: Registrations,
        now: Instant,
        kept: HashMap<PeerId, HashMap<ServiceName, Instant>>,
    }

    impl Scene {
        fn new(grapes: &[PeerId]) -> Self {
            let mut scene = Self {
                registrations: Registrations::new(),
                now: Instant::now(),
                kept: HashMap::new(),
            };
            scene.knows(grapes, Scope::All);
            scene
        }

        fn knows(&mut self, grapes: &[PeerId], scope: Scope) {
            let known: Vec<_> = grapes.iter().copied().map(known).collect();
            self.registrations.on_grapes(&known, scope, self.now);
        }

        fn announce(&mut self, numbers: impl IntoIterator<Item = usize>) {
            for number in numbers {
                self.registrations.announce(&name(number), self.now);
            }
        }

        fn withdraw(&mut self, number: usize) {
            self.registrations.withdraw(&name(number), self.now);
        }

        fn update(&mut self) -> Option<Update> {
            self.registrations.poll_update(self.now)
        }

        fn answer(&mut self, peer: &PeerId, answer: Answer) -> Vec<ServiceName> {
            self.registrations.on_answer(peer, answer, self.now);
            std::iter::from_fn(|| self.registrations.poll_published()).collect()
        }

        /// Lets every grape keep what it is told; returns how many messages that took.
        fn settle(&mut self) -> usize {
            let mut messages = 0;
            while let Some(update) = self.update() {
                messages += 1;
                assert!(update.announce.len() <= MAX_NAMES && update.withdraw.len() <= MAX_NAMES);
                let kept = self.kept.entry(update.grape).or_default();
                for name in &update.withdraw {
                    kept.remove(name);
                }
                for name in update.announce {
                    kept.insert(name, self.now);
                }
                self.answer(&update.grape, taken());
            }
            messages
        }

        fn kept_by(&self, grape: &PeerId) -> usize {
            self.kept.get(grape).map_or(0, HashMap::len)
        }
    }

    fn grapes(count: usize) -> Vec<PeerId> {
        (0..count).map(|_| PeerId::random()).collect()
    }

    #[test]
    fn every_grape_of_a_small_network_is_told_of_every_name_in_few_messages() {
        let grapes = grapes(3);
        let mut scene = Scene::new(&grapes);
        scene.announce(0..2_500);
        assert_eq!(scene.settle(), 9);
        assert!(grapes.iter().all(|grape| scene.kept_by(grape) == 2_500));
        assert_eq!(scene.settle(), 0);
    }

    #[test]
    fn a_name_is_told_at_once_and_confirmed_by_the_first_grape_that_keeps_it() {
        let grapes = grapes(2);
        let mut scene = Scene::new(&grapes);
        scene.announce([1]);
        let (first, second) = (scene.update().unwrap(), scene.update().unwrap());
        assert_eq!(first.announce, [name(1)]);
        assert_eq!(scene.answer(&first.grape, taken()), [name(1)]);
        assert_eq!(scene.answer(&second.grape, taken()), []);
    }

    #[test]
    fn in_a_large_network_a_name_is_published_when_half_of_the_closest_keep_it() {
        let all = grapes(24);
        let (bootstrap, closest) = (all[0], &all[1..5]);
        let mut scene = Scene::new(&[]);
        let kinds = all.iter().map(|grape| Known {
            is_bootstrap: *grape == bootstrap,
            ..known(*grape)
        });
        let kinds: Vec<_> = kinds.collect();
        let now = scene.now;
        scene.registrations.on_grapes(&kinds, Scope::Closest, now);
        let (failed, lacks) = (Answer::Failed, Answer::NoRegistry);
        // How many keep it, and how many have answered, when it is published.
        for (number, answers, kept, answered) in [
            (1, [taken(), taken(), taken(), taken()], 2, 2),
            (
                2,
                [
                    failed.clone(),
                    failed.clone(),
                    failed.clone(),
                    failed.clone(),
                ],
                0,
                4,
            ),
            (
                3,
                [failed.clone(), taken(), failed.clone(), failed.clone()],
                1,
                4,
            ),
            (4, [failed.clone(), taken(), lacks, failed], 1, 4),
        ] {
            scene.announce([number]);
            let update = scene.update().unwrap();
            assert_eq!(update.grape, bootstrap);
            assert_eq!(
                scene.answer(&bootstrap, taken()),
                [],
                "others do not ask it"
            );
            assert_eq!(scene.registrations.poll_walk(now), Some(name(number)));
            scene.registrations.on_walked(&name(number), closest, now);
            let mut keep = HashMap::new();
            loop {
                let update = scene.update().unwrap();
                let index = closest.iter().position(|grape| *grape == update.grape);
                let answer = answers[index.unwrap()].clone();
                let keeps = matches!(answer, Answer::Taken { .. });
                keep.insert(update.grape, keeps);
                if scene.answer(&update.grape, answer).contains(&name(number)) {
                    break;
                }
            }
            let keepers = keep.values().filter(|keeps| **keeps).count();
            assert_eq!((keepers, keep.len()), (kept, answered), "{number}");
            scene.withdraw(number);
            for grape in &all {
                scene.registrations.on_connected(grape, now);
            }
            scene.settle();
        }
    }

    #[test]
    fn a_bootstrap_grape_hears_of_this_node_also_between_renewals() {
        let grapes = grapes(2);
        let mut scene = Scene::new(&[]);
        let kinds = grapes.iter().map(|grape| Known {
            is_bootstrap: *grape == grapes[0],
            ..known(*grape)
        });
        let (kinds, now) = (kinds.collect::<Vec<_>>(), scene.now);
        scene.registrations.on_grapes(&kinds, Scope::All, now);
        scene.now += CHECK_IN;
        assert_eq!(scene.update(), None, "there is nothing to take back");
        scene.announce([1]);
        scene.settle();
        scene.now += CHECK_IN;
        let expected = Update {
            grape: grapes[0],
            announce: Vec::new(),
            withdraw: Vec::new(),
        };
        assert_eq!(scene.update(), Some(expected));
        assert_eq!(scene.answer(&grapes[0], taken()), []);
        assert_eq!(scene.update(), None);
    }

    #[test]
    fn all_names_are_renewed_within_a_third_of_the_lease_that_the_grape_grants() {
        let grapes = grapes(2);
        let mut scene = Scene::new(&grapes);
        scene.announce([1, 2]);
        let absurd = Answer::Taken {
            lease: Duration::MAX,
            refused: BTreeSet::new(),
        };
        let update = scene.update().unwrap();
        scene.answer(&update.grape, absurd);
        let update = scene.update().unwrap();
        let lease = 6 * SECOND;
        let refused = BTreeSet::new();
        scene.answer(&update.grape, Answer::Taken { lease, refused });
        scene.settle();
        scene.now += 2 * SECOND;
        let renewed = scene.update().unwrap();
        assert_eq!(renewed.announce, [name(1), name(2)]);
        // One that wants it more often makes nobody else be told more often.
        assert_eq!((renewed.grape, scene.update()), (update.grape, None));
        scene.now += LEASE / RENEWALS_PER_LEASE;
        assert_eq!(scene.update().unwrap().announce, [name(1), name(2)]);
    }

    #[test]
    fn one_message_at_a_time_is_under_way_to_a_grape() {
        let grapes = grapes(1);
        let mut scene = Scene::new(&grapes);
        scene.announce([1]);
        scene.update().unwrap();
        scene.announce([2]);
        scene.withdraw(1);
        assert_eq!(scene.update(), None);
        scene.answer(&grapes[0], taken());
        let next = scene.update().unwrap();
        assert_eq!(
            (next.announce, next.withdraw),
            (vec![name(2)], vec![name(1)])
        );
    }

    #[test]
    fn a_name_that_no_grape_was_told_of_is_not_taken_back_there() {
        let grapes = grapes(1);
        let mut scene = Scene::new(&grapes);
        scene.announce([1]);
        scene.withdraw(1);
        assert_eq!(scene.update(), None);
        assert_eq!(scene.registrations.withdrawing(), 0);
        // One that may be kept is, even if it is to be told again.
        scene.announce([2]);
        scene.settle();
        scene.registrations.on_connected(&grapes[0], scene.now);
        scene.withdraw(2);
        assert_eq!(scene.registrations.withdrawing(), 1);
        assert_eq!(scene.update().unwrap().withdraw, [name(2)]);
    }

    #[test]
    fn a_name_announced_again_is_told_after_its_withdrawal() {
        let grapes = grapes(1);
        let mut scene = Scene::new(&grapes);
        scene.announce([1]);
        scene.settle();
        scene.withdraw(1);
        let update = scene.update().unwrap();
        assert_eq!(update.withdraw, [name(1)]);
        scene.announce([1]);
        scene.answer(&grapes[0], taken());
        let update = scene.update().unwrap();
        assert_eq!((update.announce, update.withdraw), (vec![name(1)], vec![]));
    }

    #[test]
    fn a_grape_that_comes_back_is_told_of_every_name_at_once() {
        let grapes = grapes(1);
        let mut scene = Scene::new(&grapes);
        scene.announce(0..10);
        scene.settle();
        scene.registrations.on_disconnected(&grapes[0], scene.now);
        scene.kept.clear();
        scene.registrations.on_connected(&grapes[0], scene.now);
        scene.settle();
        assert_eq!(scene.kept_by(&grapes[0]), 10);
    }

    #[test]
    fn a_grape_whose_connection_has_closed_is_told_again_soon() {
        let grapes = grapes(1);
        let mut scene = Scene::new(&grapes);
        scene.announce([1]);
        scene.settle();
        scene.registrations.on_disconnected(&grapes[0], scene.now);
        assert_eq!(scene.update(), None, "not at once");
        scene.now += RETRY_MIN;
        assert_eq!(scene.update().unwrap().announce, [name(1)]);
    }

    #[test]
    fn what_a_grape_refuses_is_told_again_and_nothing_else() {
        let grapes = grapes(1);
        let mut scene = Scene::new(&grapes);
        scene.announce([1, 2]);
        scene.update().unwrap();
        let refused = BTreeSet::from([1]);
        let kept = scene.answer(
            &grapes[0],
            Answer::Taken {
                lease: LEASE,
                refused,
            },
        );
        assert_eq!(kept, [name(1)]);
        assert_eq!(scene.update(), None);
        scene.now += REFUSED;
        assert_eq!(scene.update().unwrap().announce, [name(2)]);
    }

    #[test]
    fn names_that_a_grape_keeps_are_renewed_however_many_it_refuses() {
        let grapes = grapes(1);
        let mut scene = Scene::new(&grapes);
        scene.announce(0..2 * MAX_NAMES);
        let kept: HashSet<_> = (MAX_NAMES..2 * MAX_NAMES).map(name).collect();
        let mut heard: HashMap<ServiceName, Instant> = HashMap::new();
        let end = scene.now + 2 * LEASE;
        while scene.now < end {
            while let Some(update) = scene.update() {
                let mut refused = BTreeSet::new();
                for (place, name) in update.announce.iter().enumerate() {
                    if kept.contains(name) {
                        heard.insert(name.clone(), scene.now);
                    } else {
                        refused.insert(place);
                    }
                }
                let lease = LEASE;
                scene.answer(&update.grape, Answer::Taken { lease, refused });
            }
            scene.now += SECOND;
            assert!(heard.values().all(|at| scene.now - *at < LEASE / 2));
        }
        assert_eq!(heard.len(), kept.len());
    }

    #[test]
    fn what_is_taken_back_waits_for_no_refused_name() {
        let grapes = grapes(1);
        let mut scene = Scene::new(&grapes);
        scene.announce([1, 2]);
        let update = scene.update().unwrap();
        let (lease, refused) = (LEASE, BTreeSet::from([0]));
        scene.answer(&update.grape, Answer::Taken { lease, refused });
        assert_eq!(scene.update(), None);
        scene.withdraw(2);
        assert_eq!(scene.update().unwrap().withdraw, [name(2)]);
    }

    #[test]
    fn a_name_of_a_large_network_that_comes_and_goes_during_a_walk_is_taken_back() {
        let grapes = grapes(30);
        let mut scene = Scene::new(&[]);
        scene.knows(&grapes, Scope::Closest);
        scene.announce([1]);
        assert_eq!(scene.registrations.poll_walk(scene.now), Some(name(1)));
        scene
            .registrations
            .on_walked(&name(1), &grapes[..2], scene.now);
        scene.settle();
        scene.withdraw(1);
        scene.announce([1]);
        scene.withdraw(1);
        scene.settle();
        assert!(grapes.iter().all(|grape| scene.kept_by(grape) == 0));
    }

    #[test]
    fn a_silent_grape_is_told_again_at_once_and_then_ever_less_often() {
        let grapes = grapes(1);
        let mut scene = Scene::new(&grapes);
        scene.announce([1]);
        let mut pause = RETRY_MIN;
        assert!(scene.update().is_some());
        scene.answer(&grapes[0], Answer::Failed);
        for _ in 0..10 {
            assert_eq!(
                scene.update().map(|update| update.announce),
                Some(vec![name(1)])
            );
            scene.answer(&grapes[0], Answer::Failed);
            assert_eq!(scene.update(), None);
            scene.now += pause;
            pause = (2 * pause).min(RETRY_MAX);
        }
    }

    #[test]
    fn a_withdrawal_that_failed_is_repeated_unless_the_name_is_announced_again() {
        let grapes = grapes(1);
        let mut scene = Scene::new(&grapes);
        scene.announce([1, 2]);
        scene.settle();
        scene.withdraw(1);
        scene.withdraw(2);
        scene.update().unwrap();
        scene.announce([2]);
        scene.answer(&grapes[0], Answer::Failed);
        let again = scene.update().unwrap();
        assert_eq!(
            (again.announce, again.withdraw),
            (vec![name(2)], vec![name(1)])
        );
    }

    #[test]
    fn a_grape_that_has_forgotten_all_by_itself_is_not_told_of_withdrawals_any_more() {
        let grapes = grapes(1);
        let mut scene = Scene::new(&grapes);
        scene.announce([1]);
        scene.settle();
        let told = scene.now;
        scene.withdraw(1);
        while let Some(due) = scene.registrations.next_due() {
            scene.now = due;
            let update = scene.update().unwrap();
            assert_eq!(update.withdraw, [name(1)]);
            scene.answer(&grapes[0], Answer::Failed);
        }
        let elapsed = scene.now - told;
        assert!((2 * LEASE..=2 * LEASE + RETRY_MAX).contains(&elapsed));
    }

    #[test]
    fn a_grape_without_registry_is_left_alone_until_it_reconnects() {
        let grapes = grapes(2);
        let mut scene = Scene::new(&grapes);
        scene.announce([1]);
        let update = scene.update().unwrap();
        scene.answer(&update.grape, Answer::NoRegistry);
        scene.settle();
        assert_eq!(
            scene.registrations.poll_without_registry(),
            Some(update.grape)
        );
        assert_eq!(scene.registrations.poll_without_registry(), None);
        assert!(scene.registrations.knows_one_without_registry());
        scene.announce([2]);
        scene.withdraw(1);
        scene.settle();
        assert_eq!(scene.kept_by(&update.grape), 0);
        scene.registrations.on_connected(&update.grape, scene.now);
        scene.settle();
        assert_eq!(scene.kept_by(&update.grape), 1);
    }

    #[test]
    fn a_foreign_grape_is_not_even_asked() {
        let (ours, foreign) = (PeerId::random(), PeerId::random());
        let mut scene = Scene::new(&[]);
        let is_foreign = true;
        let foreign = Known {
            is_foreign,
            ..known(foreign)
        };
        let known = [known(ours), foreign];
        scene.registrations.on_grapes(&known, Scope::All, scene.now);
        assert_eq!(
            scene.registrations.poll_without_registry(),
            Some(foreign.peer)
        );
        scene.registrations.on_grapes(&known, Scope::All, scene.now);
        assert_eq!(
            scene.registrations.poll_without_registry(),
            None,
            "only once"
        );
        scene.announce([1]);
        assert_eq!(scene.update().unwrap().grape, ours);
        assert_eq!(scene.update(), None);
    }

    #[test]
    fn a_large_network_is_walked_for_each_name_and_the_closest_are_told() {
        let grapes = grapes(30);
        let mut scene = Scene::new(&[]);
        scene.knows(&grapes[..25], Scope::Closest);
        scene.announce(0..40);
        assert_eq!(scene.update(), None);
        let mut walked = 0;
        while let Some(name) = scene.registrations.poll_walk(scene.now) {
            // One of them is not in the routing table.
            let closest = [grapes[walked % 20], grapes[29]];
            scene.registrations.on_walked(&name, &closest, scene.now);
            walked += 1;
        }
        assert_eq!(walked, 40);
        scene.settle();
        assert_eq!(scene.kept_by(&grapes[0]), 2);
        assert_eq!(scene.kept_by(&grapes[29]), 40);
        assert_eq!(scene.kept_by(&grapes[24]), 0);
        // It goes on being told, and of withdrawals too.
        scene.knows(&grapes[..25], Scope::Closest);
        scene.withdraw(0);
        scene.settle();
        assert_eq!(scene.kept_by(&grapes[29]), 39);
    }

    #[test]
    fn names_of_a_grape_that_fails_are_walked_again() {
        let grapes = grapes(25);
        let mut scene = Scene::new(&[]);
        scene.knows(&grapes, Scope::Closest);
        scene.announce([1]);
        scene.registrations.poll_walk(scene.now).unwrap();
        scene
            .registrations
            .on_walked(&name(1), &grapes[..2], scene.now);
        scene.settle();
        scene.now += LEASE / RENEWALS_PER_LEASE;
        for _ in 0..FAILED {
            while let Some(update) = scene.update() {
                let fails = update.grape == grapes[0];
                scene.answer(&update.grape, if fails { Answer::Failed } else { taken() });
            }
        }
        assert_eq!(scene.registrations.poll_walk(scene.now), Some(name(1)));
        assert_eq!(scene.registrations.poll_walk(scene.now), None);
    }

    #[test]
    fn a_network_that_grows_and_shrinks_keeps_every_name() {
        let grapes = grapes(25);
        let mut scene = Scene::new(&grapes[..5]);
        scene.announce([1]);
        scene.settle();
        scene.knows(&grapes, Scope::Closest);
        assert_eq!(scene.registrations.poll_walk(scene.now), Some(name(1)));
        scene
            .registrations
            .on_walked(&name(1), &grapes[20..], scene.now);
        scene.settle();
        assert!(grapes[20..].iter().all(|grape| scene.kept_by(grape) == 1));
        assert!(grapes[..20].iter().all(|grape| scene.kept_by(grape) == 0));
        scene.knows(&grapes[5..10], Scope::All);
        scene.settle();
        assert!(grapes[5..10].iter().all(|grape| scene.kept_by(grape) == 1));
        assert_eq!(scene.registrations.poll_walk(scene.now), None);
    }

    #[test]
    fn a_bootstrap_grape_of_a_large_network_is_told_of_every_name_while_it_is_one() {
        let grapes = grapes(25);
        let mut scene = Scene::new(&[]);
        let mut known: Vec<_> = grapes.iter().copied().map(known).collect();
        known[0].is_bootstrap = true;
        let (first, now) = (grapes[0], scene.now);
        scene.registrations.on_grapes(&known, Scope::Closest, now);
        scene.announce([1, 2]);
        while let Some(walked) = scene.registrations.poll_walk(now) {
            let closest = if walked == name(1) {
                &grapes[..2]
            } else {
                &grapes[2..4]
            };
            scene.registrations.on_walked(&walked, closest, now);
        }
        scene.settle();
        assert_eq!(scene.kept_by(&first), 2);
        assert_eq!(
            (scene.kept_by(&grapes[1]), scene.kept_by(&grapes[4])),
            (1, 0)
        );
        // As one of many it goes on being told of what it is among the closest to.
        known[0].is_bootstrap = false;
        scene.registrations.on_grapes(&known, Scope::Closest, now);
        scene.kept.clear();
        scene.now += LEASE / RENEWALS_PER_LEASE;
        scene.settle();
        assert_eq!(scene.kept_by(&first), 1);
        assert_eq!(scene.registrations.poll_walk(scene.now), None);
    }

    #[derive(Clone, Debug)]
    enum Happening {
        Announce(usize),
        Withdraw(usize),
        Connects(usize),
        Disconnects(usize),
        Knows(usize),
        HasNoRegistry(usize),
        Asks(u8),
        Passes(u32),
    }

    fn happening() -> impl Strategy<Value = Happening> {
        prop_oneof![
            (0..6usize).prop_map(Happening::Announce),
            (0..6usize).prop_map(Happening::Withdraw),
            (0..3usize).prop_map(Happening::Connects),
            (0..3usize).prop_map(Happening::Disconnects),
            (1..4usize).prop_map(Happening::Knows),
            (0..3usize).prop_map(Happening::HasNoRegistry),
            (0..4u8).prop_map(Happening::Asks),
            (0..40u32).prop_map(Happening::Passes),
        ]
    }

    proptest! {
        /// Whatever happens, once grapes answer they keep exactly what is announced, and renewals
        /// never stop.
        #[test]
        fn grapes_keep_in_the_end_exactly_what_is_announced(
            happenings in proptest::collection::vec(happening(), 0..80)
        ) {
            let grapes = grapes(3);
            let mut scene = Scene::new(&grapes);
            let mut announced = HashSet::new();
            for happening in happenings {
                match happening {
                    Happening::Announce(number) => if announced.insert(name(number)) {
                        scene.announce([number]);
                    },
                    Happening::Withdraw(number) => {
                        announced.remove(&name(number));
                        scene.withdraw(number);
                    }
                    Happening::Connects(grape) => {
                        scene.kept.remove(&grapes[grape]);
                        scene.registrations.on_connected(&grapes[grape], scene.now);
                    }
                    Happening::Disconnects(grape) => {
                        scene.registrations.on_disconnected(&grapes[grape], scene.now);
                    }
                    Happening::Knows(count) => {
                        for lost in &grapes[count..] {
                            scene.kept.remove(lost);
                        }
                        scene.knows(&grapes[..count], Scope::All);
                    }
                    Happening::HasNoRegistry(grape) => {
                        scene.registrations.on_no_registry(&grapes[grape], scene.now);
                    }
                    // One in four messages arrives and its answer does not; one is lost.
                    Happening::Asks(luck) => if luck > 1 {
                        scene.settle();
                    } else if let Some(update) = scene.update() {
                        if luck == 0 {
                            let now = scene.now;
                            let kept = scene.kept.entry(update.grape).or_default();
                            for name in &update.withdraw {
                                kept.remove(name);
                            }
                            kept.extend(update.announce.into_iter().map(|name| (name, now)));
                        }
                        scene.answer(&update.grape, Answer::Failed);
                    },
                    Happening::Passes(seconds) => scene.now += seconds * SECOND,
                }
            }
            scene.knows(&grapes, Scope::All);
            for grape in &grapes {
                if scene.registrations.lacks_registry(grape) {
                    // What it kept before was no registry's, or is lost with its connection.
                    scene.kept.remove(grape);
                    scene.registrations.on_connected(grape, scene.now);
                }
            }
            prop_assert!(!scene.registrations.knows_one_without_registry());
            for _ in 0..4 {
                scene.now += LEASE / RENEWALS_PER_LEASE;
                scene.settle();
            }
            for grape in &grapes {
                let kept = scene.kept.remove(grape).unwrap_or_default();
                let fresh = kept.values().all(|at| *at + LEASE > scene.now);
                prop_assert!(fresh);
                prop_assert_eq!(kept.into_keys().collect::<HashSet<_>>(), announced.clone());
            }
        }
    }
}
