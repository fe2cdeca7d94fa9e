//! The workers that grapes announce for programs that speak no libp2p: each at an IP address and a
//! port, under the digest of a service's name.
//!
//! This grape's own workers carry a number that grows with every change, so that another grape is
//! told exactly what has changed since it was told last; those of other grapes come from them.
//!
//! Invariants:
//! * No bound below is ever exceeded, and no function walks all the records.
//! * An expired worker is never returned, swept or not; a withdrawn one is gone at once.
//! * A worker that stops is gone from this grape when its lease ends, and from the others as soon as
//!   they hear of that, at the latest an eighth of the lease afterwards.
//! * A crowded table is shared fairly between the address prefixes that grapes announce from.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasher;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use libp2p::PeerId;
use rand::seq::SliceRandom;

use super::heap::{Heap, Order};
use super::index::Index;
use super::slab::Slab;
use super::{Nanos, Prefix, nanos};
use crate::proto::wire::{Change, Digest};

/// The workers of this grape, and as many of all others together. 200,000 take 27 MB.
const MAX_WORKERS: usize = 200_000;

/// The workers of one service: ten times what one answer names.
const MAX_PER_SERVICE: usize = 1_000;

/// The grapes whose workers are kept.
const MAX_GRAPES: usize = 4_096;

/// Withdrawals that are remembered for grapes that have not been told. One that is forgotten sooner
/// goes with its lease.
const MAX_GONE: usize = 100_000;

/// Leases end within this: nobody announces less often than once an hour.
const MAX_WORKER_LEASE: Duration = Duration::from_secs(3_600);

/// A renewal is told to the other grapes once this part of the lease has passed since they were told
/// last. They keep the worker that much longer, so that they never forget it first.
const TOLD_PER_LEASE: u32 = 8;

/// Expired workers that one sweep drops: a few milliseconds of work.
const EXPIRED_PER_SWEEP: usize = 4_096;

/// The number of a grape; this one's is [`OWN`].
type GrapeSlot = u32;

const OWN: GrapeSlot = GrapeSlot::MAX;

/// No further worker of the service.
const END: u32 = u32::MAX;

/// Why a worker was not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Full {
    #[error("the service has too many workers")]
    Service,
    #[error("too many workers are announced")]
    Table,
}

#[derive(Debug)]
pub(crate) struct Workers {
    epoch: Instant,
    hasher: RandomState,
    /// The first worker of each service; the others follow by `Worker::next`.
    services: Index,
    workers: Slab<Worker>,
    by_expiry: Heap<ByExpiry>,
    own: usize,
    others: usize,
    last_change: u64,
    /// This grape's workers by the number of their last change, and those that are gone.
    changes: BTreeMap<u64, u32>,
    gone: BTreeMap<u64, Gone>,
    grapes: Slab<Grape>,
    grape_slots: HashMap<PeerId, GrapeSlot>,
    by_prefix: HashMap<Prefix, usize>,
}

#[derive(Debug)]
struct Worker {
    service: Digest,
    at: At,
    grape: GrapeSlot,
    next: u32,
    /// The place in `by_expiry`.
    place: u32,
    /// The lease of the last announcement, in milliseconds: [`MAX_WORKER_LEASE`] is some millions.
    lease: u32,
    expires: Nanos,
    /// When the other grapes were to be told of it last, and its number then.
    told: Nanos,
    change: u64,
}

/// The soonest to expire first.
#[derive(Debug)]
struct ByExpiry;

impl Order for ByExpiry {
    type Item = Worker;

    fn due(worker: &Worker) -> Nanos {
        worker.expires
    }

    fn place(worker: &mut Worker) -> &mut u32 {
        &mut worker.place
    }
}

/// An address in 19 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct At {
    ip: IpAddr,
    port: [u8; 2],
}

#[derive(Debug)]
struct Gone {
    service: Digest,
    at: At,
    /// When the other grapes have forgotten it, told or not.
    until: Nanos,
}

#[derive(Debug)]
struct Grape {
    peer: PeerId,
    prefix: Prefix,
    workers: usize,
}

impl Workers {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            epoch: now,
            hasher: RandomState::new(),
            services: Index::default(),
            workers: Slab::default(),
            by_expiry: Heap::default(),
            own: 0,
            others: 0,
            last_change: 0,
            changes: BTreeMap::new(),
            gone: BTreeMap::new(),
            grapes: Slab::default(),
            grape_slots: HashMap::new(),
            by_prefix: HashMap::new(),
        }
    }

    /// A worker of this grape serves a service for so long, or goes on to. Says whether there is
    /// something new to tell the other grapes.
    pub(crate) fn announce(
        &mut self,
        service: &Digest,
        at: SocketAddr,
        lease: Duration,
        now: Instant,
    ) -> Result<bool, Full> {
        let now = self.nanos(now);
        let lease = lease.min(MAX_WORKER_LEASE);
        let milliseconds = lease.as_millis() as u32;
        let lease = nanos(lease);
        let (slot, is_new) = self.insert(service, at.into(), OWN, now + lease)?;
        let Some(worker) = self.workers.get_mut(slot) else {
            return Ok(false);
        };
        worker.lease = milliseconds;
        if !is_new && now < worker.told + lease / Nanos::from(TOLD_PER_LEASE) {
            return Ok(false);
        }
        self.last_change += 1;
        worker.told = now;
        let before = std::mem::replace(&mut worker.change, self.last_change);
        self.changes.remove(&before);
        self.changes.insert(self.last_change, slot);
        Ok(true)
    }

    /// A worker of this grape is gone; says whether it was known.
    pub(crate) fn withdraw(&mut self, service: &Digest, at: SocketAddr) -> bool {
        let slot = self.find(service, at.into(), OWN);
        slot.is_some_and(|slot| self.remove(slot))
    }

    /// Another grape has a worker, or has lost one.
    pub(crate) fn apply(
        &mut self,
        grape: PeerId,
        prefix: Prefix,
        change: &Change,
        now: Instant,
    ) -> Result<(), Full> {
        let (service, at) = (&change.service, change.at.into());
        let Some(lease) = change.lease else {
            let slot = self.grape_slots.get(&grape).copied();
            if let Some(slot) = slot.and_then(|slot| self.find(service, at, slot)) {
                self.remove(slot);
            }
            return Ok(());
        };
        let slot = self.grape_slot(grape, prefix).ok_or(Full::Table)?;
        let now = self.nanos(now);
        let lease = Duration::from_millis(lease).min(MAX_WORKER_LEASE);
        let expires = now + nanos(lease);
        let result = self.insert(service, at, slot, expires).map(drop);
        self.release_grape(slot);
        result
    }

    /// Up to `limit` addresses of live workers of a service, at any grape; of more, any.
    pub(crate) fn sample(&self, service: &Digest, limit: usize, now: Instant) -> Vec<SocketAddr> {
        let mut addresses: Vec<_> = self.live(service, now).map(|worker| worker.at).collect();
        // One that has announced itself at two grapes counts once.
        draw(&mut addresses, limit);
        addresses.into_iter().map(SocketAddr::from).collect()
    }

    /// The live workers of a service that announced themselves at this grape.
    pub(crate) fn own(&self, service: &Digest, now: Instant) -> Vec<SocketAddr> {
        let own = self
            .live(service, now)
            .filter(|worker| worker.grape == OWN)
            .map(|worker| worker.at.into());
        own.collect()
    }

    /// Whether a live worker of a service announced itself at this grape.
    pub(crate) fn has_own(&self, service: &Digest, now: Instant) -> bool {
        self.live(service, now).any(|worker| worker.grape == OWN)
    }

    /// Up to `limit` other grapes that have a live worker of a service.
    pub(crate) fn grapes(&self, service: &Digest, limit: usize, now: Instant) -> Vec<PeerId> {
        let mut grapes: Vec<_> = self.live(service, now).map(|worker| worker.grape).collect();
        draw(&mut grapes, limit);
        let grapes = grapes.iter().filter_map(|slot| self.grapes.get(*slot));
        grapes.map(|grape| grape.peer).collect()
    }

    /// What has changed after that number, and the number up to which the changes go: at most
    /// `limit` of them, oldest first.
    pub(crate) fn changes(&self, after: u64, limit: usize, now: Instant) -> (Vec<Change>, u64) {
        let now = self.nanos(now);
        let set = self.changes.range(after + 1..).take(limit);
        let gone = self.gone.range(after + 1..).take(limit);
        let mut changes: Vec<_> = set
            .map(|(number, slot)| (*number, self.set(*slot, now)))
            .chain(gone.map(|(number, gone)| (*number, Some(gone.into()))))
            .collect();
        changes.sort_unstable_by_key(|(number, _)| *number);
        changes.truncate(limit);
        let up_to = match changes.last() {
            Some((number, _)) if changes.len() == limit => *number,
            _ => self.last_change,
        };
        let changes = changes.into_iter().filter_map(|(_, change)| change);
        (changes.collect(), up_to)
    }

    /// The number of the last change.
    pub(crate) fn last_change(&self) -> u64 {
        self.last_change
    }

    /// How many workers are held: this grape's and those of all others.
    pub(crate) fn len(&self) -> (usize, usize) {
        (self.own, self.others)
    }

    /// Drops workers whose lease has ended, a few thousand at most: the rest stays invisible and
    /// goes with later sweeps. Says whether the other grapes have something to be told.
    pub(crate) fn sweep(&mut self, now: Instant) -> bool {
        let before = self.last_change;
        let now = self.nanos(now);
        for _ in 0..EXPIRED_PER_SWEEP {
            let first = self.by_expiry.first().and_then(|slot| self.at(slot));
            let Some((slot, _)) = first.filter(|(_, worker)| worker.expires <= now) else {
                break;
            };
            self.remove(slot);
        }
        while let Some(gone) = self.gone.first_entry()
            && gone.get().until <= now
        {
            gone.remove();
        }
        self.last_change > before
    }

    fn nanos(&self, now: Instant) -> Nanos {
        nanos(now.saturating_duration_since(self.epoch))
    }

    /// What to tell of a worker of this grape, if it is live.
    fn set(&self, slot: u32, now: Nanos) -> Option<Change> {
        let worker = self.workers.get(slot)?;
        let keep = worker.keep();
        let lease = Duration::from_nanos(keep.saturating_sub(now));
        (worker.expires > now).then_some(Change {
            service: worker.service,
            at: worker.at.into(),
            lease: Some(lease.as_millis() as u64),
        })
    }

    /// All records of a service, expired or not.
    fn all(&self, service: &Digest) -> impl Iterator<Item = (u32, &Worker)> {
        let first = self.first(service).unwrap_or(END);
        std::iter::successors(self.at(first), |(_, worker)| self.at(worker.next))
    }

    fn live(&self, service: &Digest, now: Instant) -> impl Iterator<Item = &Worker> {
        let now = self.nanos(now);
        self.all(service)
            .map(|(_, worker)| worker)
            .filter(move |worker| worker.expires > now)
    }

    fn at(&self, slot: u32) -> Option<(u32, &Worker)> {
        Some((slot, self.workers.get(slot)?))
    }

    fn first(&self, service: &Digest) -> Option<u32> {
        let is_of = |slot| {
            let worker = self.workers.get(slot);
            worker.is_some_and(|worker| worker.service == *service)
        };
        self.services.find(self.hasher.hash_one(service), is_of)
    }

    fn find(&self, service: &Digest, at: At, grape: GrapeSlot) -> Option<u32> {
        let mut all = self.all(service);
        let found = all.find(|(_, worker)| worker.at == at && worker.grape == grape);
        found.map(|(slot, _)| slot)
    }

    /// Stores or renews a worker; says where, and whether it is new.
    fn insert(
        &mut self,
        service: &Digest,
        at: At,
        grape: GrapeSlot,
        expires: Nanos,
    ) -> Result<(u32, bool), Full> {
        if let Some(slot) = self.find(service, at, grape) {
            if let Some(worker) = self.workers.get_mut(slot)
                && worker.expires < expires
            {
                worker.expires = expires;
                self.by_expiry.update(slot, &mut self.workers);
            }
            return Ok((slot, false));
        }
        if self.all(service).count() >= MAX_PER_SERVICE {
            return Err(Full::Service);
        }
        self.take_place(grape)?;
        let slot = self.workers.insert(Worker {
            service: *service,
            at,
            grape,
            next: END,
            place: 0,
            lease: 0,
            expires,
            told: 0,
            change: 0,
        });
        self.by_expiry.insert(slot, &mut self.workers);
        self.link(service, slot);
        Ok((slot, true))
    }

    fn link(&mut self, service: &Digest, slot: u32) {
        let Some(first) = self.first(service) else {
            let hash = self.hasher.hash_one(service);
            let (workers, hasher) = (&self.workers, &self.hasher);
            self.services.insert(hash, slot, |slot| {
                let worker = workers.get(slot);
                worker.map_or(0, |worker| hasher.hash_one(worker.service))
            });
            return;
        };
        // Behind the first, so that the table need not change.
        let next = self.workers.get_mut(first).map(|first| {
            let next = first.next;
            first.next = slot;
            next
        });
        if let (Some(next), Some(worker)) = (next, self.workers.get_mut(slot)) {
            worker.next = next;
        }
    }

    fn unlink(&mut self, service: &Digest, slot: u32, next: u32) {
        let Some(first) = self.first(service) else {
            return;
        };
        let hash = self.hasher.hash_one(service);
        if first != slot {
            let before = self
                .all(service)
                .find(|(_, worker)| worker.next == slot)
                .map(|(before, _)| before);
            if let Some(before) = before.and_then(|before| self.workers.get_mut(before)) {
                before.next = next;
            }
        } else if next == END {
            self.services.remove(hash, slot);
        } else {
            self.services.replace(hash, slot, next);
        }
    }

    fn remove(&mut self, slot: u32) -> bool {
        let Some(worker) = self.workers.get(slot) else {
            return false;
        };
        let (service, at, grape) = (worker.service, worker.at, worker.grape);
        let (next, change, until) = (worker.next, worker.change, worker.keep());
        self.by_expiry.remove(slot, &mut self.workers);
        self.unlink(&service, slot, next);
        self.workers.remove(slot);
        if grape == OWN {
            self.own -= 1;
            self.changes.remove(&change);
            self.note_gone(service, at, until);
        } else {
            self.others -= 1;
            if let Some(grape) = self.grapes.get_mut(grape) {
                grape.workers -= 1;
                if let Some(workers) = self.by_prefix.get_mut(&grape.prefix) {
                    *workers -= 1;
                }
            }
            self.release_grape(grape);
        }
        true
    }

    fn note_gone(&mut self, service: Digest, at: At, until: Nanos) {
        if self.gone.len() >= MAX_GONE {
            self.gone.pop_first();
        }
        self.last_change += 1;
        let gone = Gone { service, at, until };
        self.gone.insert(self.last_change, gone);
    }

    /// Counts one more worker of a grape, if there is room for it.
    fn take_place(&mut self, grape: GrapeSlot) -> Result<(), Full> {
        if grape == OWN {
            if self.own >= MAX_WORKERS {
                return Err(Full::Table);
            }
            self.own += 1;
            return Ok(());
        }
        let prefixes = self.by_prefix.len().max(1);
        let Some(grape) = self.grapes.get_mut(grape) else {
            return Err(Full::Table);
        };
        let of_prefix = self.by_prefix.entry(grape.prefix).or_default();
        // Whoever holds more than a fair share finds no room in a table that is half full, so that
        // the other half is there for those who hold less.
        let is_crowded = self.others >= MAX_WORKERS / 2;
        if self.others >= MAX_WORKERS || is_crowded && *of_prefix >= MAX_WORKERS / prefixes {
            return Err(Full::Table);
        }
        *of_prefix += 1;
        grape.workers += 1;
        self.others += 1;
        Ok(())
    }

    fn grape_slot(&mut self, peer: PeerId, prefix: Prefix) -> Option<GrapeSlot> {
        if let Some(slot) = self.grape_slots.get(&peer) {
            return Some(*slot);
        }
        if self.grape_slots.len() >= MAX_GRAPES {
            return None;
        }
        self.by_prefix.entry(prefix).or_default();
        let slot = self.grapes.insert(Grape {
            peer,
            prefix,
            workers: 0,
        });
        self.grape_slots.insert(peer, slot);
        Some(slot)
    }

    /// A grape without workers is forgotten.
    fn release_grape(&mut self, slot: GrapeSlot) {
        let Some(grape) = self.grapes.get(slot).filter(|grape| grape.workers == 0) else {
            return;
        };
        let (peer, prefix) = (grape.peer, grape.prefix);
        self.grapes.remove(slot);
        self.grape_slots.remove(&peer);
        if self.by_prefix.get(&prefix) == Some(&0) {
            self.by_prefix.remove(&prefix);
        }
    }
}

impl Worker {
    /// How long the other grapes keep it, from what they were to be told of it last.
    fn keep(&self) -> Nanos {
        let lease = nanos(Duration::from_millis(self.lease.into()));
        self.told + lease + lease / Nanos::from(TOLD_PER_LEASE)
    }
}

/// Leaves at most `limit` different items, any of them.
pub(crate) fn draw<T: Copy + Ord>(items: &mut Vec<T>, limit: usize) {
    items.sort_unstable();
    items.dedup();
    if items.len() > limit {
        let (any, _) = items.partial_shuffle(&mut rand::rng(), limit);
        *items = any.to_vec();
    }
}

impl From<&Gone> for Change {
    fn from(gone: &Gone) -> Self {
        Self {
            service: gone.service,
            at: gone.at.into(),
            lease: None,
        }
    }
}

impl From<SocketAddr> for At {
    fn from(at: SocketAddr) -> Self {
        Self {
            ip: at.ip().to_canonical(),
            port: at.port().to_be_bytes(),
        }
    }
}

impl From<At> for SocketAddr {
    fn from(at: At) -> Self {
        Self::new(at.ip, u16::from_be_bytes(at.port))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::name;

    const LEASE: Duration = Duration::from_secs(120);

    fn at(n: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], n))
    }

    fn network(n: u8) -> Prefix {
        IpAddr::from([10, 0, n, 1]).into()
    }

    fn told(service: &str, port: u16, lease: Option<Duration>) -> Change {
        Change {
            service: name::digest(service),
            at: at(port),
            lease: lease.map(|lease| lease.as_millis() as u64),
        }
    }

    /// Two grapes, of which the second is told what the first has.
    struct Scene {
        near: Workers,
        far: Workers,
        up_to: u64,
        grape: PeerId,
        now: Instant,
    }

    impl Scene {
        fn new() -> Self {
            let now = Instant::now();
            Self {
                near: Workers::new(now),
                far: Workers::new(now),
                up_to: 0,
                grape: PeerId::random(),
                now,
            }
        }

        fn announce(&mut self, service: &str, port: u16) -> bool {
            let service = name::digest(service);
            let announced = self.near.announce(&service, at(port), LEASE, self.now);
            announced.unwrap()
        }

        /// Tells everything, in batches of so many.
        fn tell(&mut self, batch: usize) -> usize {
            let mut told = 0;
            while self.up_to < self.near.last_change() {
                let (changes, up_to) = self.near.changes(self.up_to, batch, self.now);
                for change in &changes {
                    let prefix = network(1);
                    self.far
                        .apply(self.grape, prefix, change, self.now)
                        .unwrap();
                }
                told += changes.len();
                self.up_to = up_to;
            }
            told
        }

        fn near(&self, service: &str) -> Vec<SocketAddr> {
            self.near.sample(&name::digest(service), 100, self.now)
        }

        fn far(&self, service: &str) -> Vec<SocketAddr> {
            self.far.sample(&name::digest(service), 100, self.now)
        }
    }

    #[test]
    fn what_is_announced_at_one_grape_is_known_at_the_other_once_it_is_told() {
        let mut scene = Scene::new();
        scene.announce("a", 1);
        scene.announce("a", 2);
        scene.announce("b", 3);
        assert_eq!(scene.far("a"), []);
        assert_eq!(scene.tell(2), 3);
        assert_eq!(scene.far("a"), [at(1), at(2)]);
        assert_eq!(scene.far("b"), [at(3)]);
        let service = name::digest("a");
        assert!(scene.near.has_own(&service, scene.now));
        assert!(!scene.far.has_own(&service, scene.now));
        assert_eq!(scene.far.grapes(&service, 9, scene.now), [scene.grape]);
        assert_eq!(scene.near.grapes(&service, 9, scene.now), []);
    }

    #[test]
    fn a_withdrawn_worker_is_gone_everywhere_and_may_come_back() {
        let mut scene = Scene::new();
        scene.announce("a", 1);
        scene.tell(9);
        assert!(scene.near.withdraw(&name::digest("a"), at(1)));
        assert!(!scene.near.withdraw(&name::digest("a"), at(1)));
        assert_eq!(scene.near("a"), []);
        scene.tell(9);
        assert_eq!(scene.far("a"), []);
        assert!(scene.announce("a", 1), "is told at once");
        scene.tell(9);
        assert_eq!(scene.far("a"), [at(1)]);
    }

    #[test]
    fn a_renewal_is_told_once_an_eighth_of_the_lease_has_passed() {
        let mut scene = Scene::new();
        assert!(scene.announce("a", 1));
        scene.tell(9);
        scene.now += LEASE / 8 - Duration::from_nanos(1);
        assert!(!scene.announce("a", 1));
        assert_eq!(scene.tell(9), 0);
        scene.now += Duration::from_nanos(1);
        assert!(scene.announce("a", 1));
        assert_eq!(scene.tell(9), 1);
    }

    #[test]
    fn the_other_grapes_never_forget_a_worker_before_its_own_does() {
        let mut scene = Scene::new();
        scene.announce("a", 1);
        scene.tell(9);
        // The last renewal that they are not told of.
        scene.now += LEASE / 8 - Duration::from_millis(1);
        scene.announce("a", 1);
        scene.now += LEASE - Duration::from_millis(1);
        assert_eq!((scene.near("a").len(), scene.far("a").len()), (1, 1));
        scene.now += Duration::from_millis(2);
        assert_eq!(scene.near("a"), [], "before the sweep");
        assert!(scene.near.sweep(scene.now), "they are told that it is gone");
        scene.tell(9);
        assert_eq!(scene.far("a"), []);
        scene.far.sweep(scene.now);
        assert_eq!((scene.near.len(), scene.far.len()), ((0, 0), (0, 0)));
    }

    #[test]
    fn a_grape_that_hears_nothing_forgets_within_an_eighth_more_than_the_lease() {
        let mut scene = Scene::new();
        scene.announce("a", 1);
        scene.tell(9);
        scene.now += LEASE + LEASE / 8;
        assert_eq!(scene.far("a"), []);
        scene.far.sweep(scene.now);
        assert_eq!(scene.far.len(), (0, 0));
        assert!(scene.far.grape_slots.is_empty() && scene.far.by_prefix.is_empty());
        scene.near.sweep(scene.now);
        assert!(scene.near.gone.is_empty(), "nobody needs to be told");
    }

    #[test]
    fn an_answer_is_a_fair_sample_of_many_workers() {
        let mut scene = Scene::new();
        for port in 1..=1_000 {
            scene.announce("a", port);
        }
        let full = scene
            .near
            .announce(&name::digest("a"), at(1_001), LEASE, scene.now);
        assert_eq!(full, Err(Full::Service));
        let mut seen = std::collections::HashSet::new();
        for _ in 0..200 {
            let sample = scene.near("a");
            assert_eq!(sample.len(), 100);
            seen.extend(sample);
        }
        // One that is as likely as any other is missed 200 times in a row once in 10^9 runs.
        assert_eq!(seen.len(), 1_000);
    }

    #[test]
    fn one_network_that_fills_the_table_leaves_room_for_others_and_for_own_workers() {
        let mut workers = Workers::new(Instant::now());
        let now = Instant::now();
        let (flooding, honest) = (PeerId::random(), PeerId::random());
        let mut apply = |grape, prefix, n: usize| {
            let change = told(&n.to_string(), 1, Some(LEASE));
            workers.apply(grape, prefix, &change, now)
        };
        apply(honest, network(2), 0).unwrap();
        let stored = (1..=MAX_WORKERS).filter(|n| apply(flooding, network(1), *n).is_ok());
        assert_eq!(stored.count(), MAX_WORKERS / 2);
        for n in 0..1_000 {
            apply(honest, network(2), MAX_WORKERS + n).unwrap();
        }
        assert_eq!(workers.len(), (0, MAX_WORKERS / 2 + 1_001));
        workers
            .announce(&name::digest("own"), at(1), LEASE, now)
            .unwrap();
    }

    proptest! {
        /// Whatever happens in whatever order: both grapes know what a plain list says, and the
        /// indexes hold nothing else.
        #[test]
        fn both_grapes_agree_with_a_plain_list(
            steps in prop::collection::vec((0_u8..3, 0_u8..3, 1_u16..4, 0_u64..60), 1..80),
        ) {
            let mut scene = Scene::new();
            let mut list: HashMap<(u8, u16), Instant> = HashMap::new();
            for (what, service, port, pause) in steps {
                scene.now += Duration::from_secs(pause);
                list.retain(|_, expires| *expires > scene.now);
                let name = service.to_string();
                if what == 0 {
                    let known = scene.near.withdraw(&name::digest(&name), at(port));
                    if list.remove(&(service, port)).is_some() {
                        prop_assert!(known);
                    }
                } else {
                    scene.announce(&name, port);
                    list.insert((service, port), scene.now + LEASE);
                }
                scene.near.sweep(scene.now);
                scene.far.sweep(scene.now);
                scene.tell(2);
                for service in 0..3 {
                    let expected = list.keys().filter(|(of, _)| *of == service);
                    let mut expected: Vec<_> = expected.map(|(_, port)| at(*port)).collect();
                    expected.sort_unstable();
                    for (whose, mut found) in [
                        ("near", scene.near(&service.to_string())),
                        ("far", scene.far(&service.to_string())),
                    ] {
                        found.sort_unstable();
                        prop_assert_eq!(&found, &expected, "{}", whose);
                    }
                }
                prop_assert_eq!(scene.near.len(), (list.len(), 0));
                prop_assert_eq!(scene.near.changes.len(), list.len());
                prop_assert_eq!(scene.near.by_expiry.len(), list.len());
                prop_assert_eq!(scene.far.len(), (0, list.len()));
            }
        }
    }
}
