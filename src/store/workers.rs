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
//! * A crowded table is shared fairly between the address prefixes that grapes announce from, and a
//!   crowded service between those prefixes and then between the grapes of one. The workers of this
//!   grape have places of their own, which no other grape can take.

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

/// The workers of this grape, and as many of all others together, of which one network never takes
/// more than half. 200,000 take 27 MB.
pub(super) const MAX_WORKERS: usize = 200_000;

/// The workers of one service, of this grape's and of all others': ten times what one answer names.
const MAX_PER_SERVICE: usize = 1_000;

/// What a grape counts for beside its workers, in workers: what is kept of it takes 300 bytes. So
/// the grapes need no bound of their own, which strangers' keys could use up.
const GRAPE_LOAD: usize = 2;

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
    /// The workers of other grapes, and what these grapes count for.
    load: usize,
    last_change: u64,
    /// This grape's workers by the number of their last change, and those that are gone.
    changes: BTreeMap<u64, u32>,
    gone: BTreeMap<u64, Gone>,
    grapes: Slab<Grape>,
    grape_slots: HashMap<PeerId, GrapeSlot>,
    /// The part of `load` that comes from each prefix.
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
            load: 0,
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
        let slot = self.grape_slot(grape, prefix);
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

    /// The other grapes at which one of these workers of a service announced itself.
    pub(crate) fn grapes_of(
        &self,
        service: &Digest,
        workers: &[SocketAddr],
        now: Instant,
    ) -> Vec<PeerId> {
        let is_one = |worker: &&Worker| workers.contains(&worker.at.into());
        let mut slots: Vec<_> = self
            .live(service, now)
            .filter(is_one)
            .map(|worker| worker.grape)
            .collect();
        draw(&mut slots, usize::MAX);
        let grapes = slots.iter().filter_map(|slot| self.grapes.get(*slot));
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
        let replaced = self.crowded_out_by(grape, service)?;
        self.take_place(grape)?;
        if let Some(slot) = replaced {
            self.remove(slot);
        }
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

    /// The worker that goes when a new one of that grape comes to a full service: of the most crowded
    /// prefix there, or else of the newcomer's own, the one of the most crowded grape that is the
    /// soonest to expire. One pass over the service's workers.
    ///
    /// Both comparisons ask for one more than a tie: of two equals neither can push the other out.
    fn crowded_out_by(&self, grape: GrapeSlot, service: &Digest) -> Result<Option<u32>, Full> {
        let is_own = grape == OWN;
        let of_kind = |(_, worker): &(u32, &Worker)| (worker.grape == OWN) == is_own;
        if self.all(service).filter(of_kind).count() < MAX_PER_SERVICE {
            return Ok(None);
        }
        let newcomer = self.grapes.get(grape).ok_or(Full::Service)?;
        let mut grapes: HashMap<GrapeSlot, (usize, (Nanos, u32))> = HashMap::new();
        for (slot, worker) in self.all(service).filter(of_kind) {
            let candidate = (worker.expires, slot);
            let (crowd, soonest) = grapes.entry(worker.grape).or_insert((0, candidate));
            *crowd += 1;
            *soonest = candidate.min(*soonest);
        }
        let own = grapes.get(&grape).map_or(0, |(crowd, _)| *crowd);
        let prefix_of = |grape| self.grapes.get(grape).map(|grape| grape.prefix);
        let mut prefixes: HashMap<Prefix, usize> = HashMap::new();
        for (grape, (crowd, _)) in &grapes {
            if let Some(prefix) = prefix_of(*grape) {
                *prefixes.entry(prefix).or_default() += crowd;
            }
        }
        let newcomers = prefixes.get(&newcomer.prefix).copied().unwrap_or(0);
        let most_crowded = prefixes.into_iter().max_by_key(|(_, crowd)| *crowd);
        let (from, at_most) = match most_crowded {
            Some((prefix, crowd)) if crowd > newcomers + 1 => (prefix, 0),
            _ => (newcomer.prefix, own + 1),
        };
        let of_prefix = grapes
            .into_iter()
            .filter(|(grape, _)| prefix_of(*grape) == Some(from));
        match of_prefix.map(|(_, crowded)| crowded).max() {
            Some((crowd, (_, slot))) if crowd > at_most => Ok(Some(slot)),
            _ => Err(Full::Service),
        }
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
                let load = grape.load_of_one_more();
                self.load -= load;
                if let Some(of_prefix) = self.by_prefix.get_mut(&grape.prefix) {
                    *of_prefix -= load;
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
        // Even who is alone leaves room for the second one.
        let prefixes = self.by_prefix.len().max(2);
        let Some(grape) = self.grapes.get_mut(grape) else {
            return Err(Full::Table);
        };
        let load = grape.load_of_one_more();
        let of_prefix = self.by_prefix.entry(grape.prefix).or_default();
        // Whoever holds more than a fair share finds no room in a table that is half full, so that
        // the other half is there for those who hold less.
        let is_crowded = self.load + load > MAX_WORKERS / 2;
        let is_full = self.load + load > MAX_WORKERS;
        if is_full || is_crowded && *of_prefix + load > MAX_WORKERS / prefixes {
            return Err(Full::Table);
        }
        *of_prefix += load;
        self.load += load;
        grape.workers += 1;
        self.others += 1;
        Ok(())
    }

    fn grape_slot(&mut self, peer: PeerId, prefix: Prefix) -> GrapeSlot {
        if let Some(slot) = self.grape_slots.get(&peer) {
            return *slot;
        }
        self.by_prefix.entry(prefix).or_default();
        let slot = self.grapes.insert(Grape {
            peer,
            prefix,
            workers: 0,
        });
        self.grape_slots.insert(peer, slot);
        slot
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

impl Grape {
    /// What one more worker of it counts for: with the first one the grape itself.
    fn load_of_one_more(&self) -> usize {
        match self.workers {
            0 => 1 + GRAPE_LOAD,
            _ => 1,
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
        assert_eq!(scene.far.load, 0);
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
        let stored = stored.count();
        assert_eq!(stored, MAX_WORKERS / 2 - GRAPE_LOAD);
        for n in 0..1_000 {
            apply(honest, network(2), MAX_WORKERS + n).unwrap();
        }
        assert_eq!(workers.len(), (0, stored + 1_001));
        workers
            .announce(&name::digest("own"), at(1), LEASE, now)
            .unwrap();
    }

    #[test]
    fn keys_that_come_and_go_take_the_places_of_no_other_grape() {
        let now = Instant::now();
        let mut workers = Workers::new(now);
        let service = name::digest("a");
        for n in 0..20_000 {
            let change = told(&n.to_string(), 1, Some(MAX_WORKER_LEASE));
            workers
                .apply(PeerId::random(), network(1), &change, now)
                .unwrap();
        }
        // Even from among them.
        let change = told("a", 1, Some(LEASE));
        workers
            .apply(PeerId::random(), network(1), &change, now)
            .unwrap();
        assert_eq!(workers.sample(&service, 9, now), [at(1)]);
        // What they count for bounds them.
        let more = (0..MAX_WORKERS).take_while(|n| {
            let change = told(&n.to_string(), 2, Some(MAX_WORKER_LEASE));
            let applied = workers.apply(PeerId::random(), network(1), &change, now);
            applied.is_ok()
        });
        let grapes = MAX_WORKERS / 2 / (1 + GRAPE_LOAD);
        assert_eq!(more.count(), grapes - 20_001);
        workers
            .apply(PeerId::random(), network(2), &change, now)
            .unwrap();
        assert_eq!(workers.grape_slots.len(), grapes + 1);
    }

    #[test]
    fn workers_that_others_make_up_leave_all_places_of_a_service_to_own_ones() {
        let now = Instant::now();
        let mut workers = Workers::new(now);
        let (service, stranger) = (name::digest("a"), PeerId::random());
        for port in 1..=1_000 {
            let change = told("a", port, Some(LEASE));
            workers.apply(stranger, network(1), &change, now).unwrap();
        }
        let one_more = told("a", 1_001, Some(LEASE));
        let refused = workers.apply(stranger, network(1), &one_more, now);
        assert_eq!(refused, Err(Full::Service));
        let announce = |workers: &mut Workers, port| {
            let announced = workers.announce(&service, at(port), LEASE, now);
            announced.map(drop)
        };
        for port in 1..=1_000 {
            announce(&mut workers, port).unwrap();
        }
        assert_eq!(announce(&mut workers, 1_001), Err(Full::Service));
        assert_eq!(workers.own(&service, now).len(), 1_000);
    }

    #[test]
    fn a_crowded_service_is_shared_between_prefixes_and_between_the_grapes_of_one() {
        let mut crowd = Crowd::new(4);
        // Grapes 0 and 1 are of one network, 2 and 3 of others.
        crowd.flood(0, 2_000);
        assert_eq!(crowd.held(), [1_000, 0, 0, 0]);
        crowd.flood(2, 300);
        assert_eq!(crowd.held(), [700, 0, 300, 0]);
        crowd.flood(1, 2_000);
        assert_eq!(crowd.held(), [350, 350, 300, 0]);
        crowd.flood(3, 2_000);
        crowd.flood(2, 2_000);
        let [a, b, c, d] = crowd.held()[..] else {
            panic!("four grapes");
        };
        for share in [a + b, c, d] {
            assert!((332..=335).contains(&share), "{share}");
        }
        assert!(a.abs_diff(b) <= 1, "{a} {b}");
    }

    /// Grapes of a few networks that have workers of one service.
    struct Crowd {
        workers: Workers,
        grapes: Vec<PeerId>,
        port: u16,
        now: Instant,
    }

    impl Crowd {
        fn new(grapes: usize) -> Self {
            let now = Instant::now();
            Self {
                workers: Workers::new(now),
                grapes: (0..grapes).map(|_| PeerId::random()).collect(),
                port: 0,
                now,
            }
        }

        fn prefix(grape: usize) -> Prefix {
            network([0, 0, 1, 2, 3, 3][grape])
        }

        /// So many new workers of one grape; returns how many were refused.
        fn flood(&mut self, grape: usize, workers: usize) -> usize {
            let mut refused = 0;
            for _ in 0..workers {
                self.port = self.port.wrapping_add(1);
                let change = told("a", self.port, Some(LEASE));
                let (peer, prefix) = (self.grapes[grape], Self::prefix(grape));
                let applied = self.workers.apply(peer, prefix, &change, self.now);
                refused += usize::from(applied.is_err());
            }
            refused
        }

        /// How many workers each grape has.
        fn held(&self) -> Vec<usize> {
            let service = name::digest("a");
            let of = |peer| {
                let slot = self.workers.grape_slots.get(peer);
                let all = self.workers.all(&service);
                all.filter(|(_, worker)| Some(&worker.grape) == slot)
                    .count()
            };
            self.grapes.iter().map(of).collect()
        }

        /// Whether the counts are those of what is held.
        fn check(&self) {
            let held = self.held();
            let load = |grapes: &[usize]| -> usize {
                let held = grapes.iter().map(|grape| held[*grape]);
                held.map(|held| held + if held > 0 { GRAPE_LOAD } else { 0 })
                    .sum()
            };
            let all: Vec<_> = (0..held.len()).collect();
            assert_eq!(self.workers.others, held.iter().sum::<usize>());
            assert!(self.workers.others <= MAX_PER_SERVICE);
            assert_eq!(self.workers.load, load(&all));
            for grape in 0..held.len() {
                let prefix = Self::prefix(grape);
                let same = all.iter().filter(|other| Self::prefix(**other) == prefix);
                let same: Vec<_> = same.copied().collect();
                let counted = self.workers.by_prefix.get(&prefix);
                assert_eq!(counted.copied().unwrap_or(0), load(&same));
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        /// Whoever floods a service in whatever order: who is refused holds his share of it.
        #[test]
        fn who_is_refused_has_a_fair_share_of_the_service(
            floods in prop::collection::vec((0_usize..6, 1_usize..700), 1..8),
        ) {
            let mut crowd = Crowd::new(6);
            for (grape, workers) in floods {
                let refused = crowd.flood(grape, workers);
                crowd.check();
                let held = crowd.held();
                let of_prefix = |prefix| -> usize {
                    let of = |other: &usize| Crowd::prefix(*other) == prefix;
                    (0..6).filter(of).map(|other| held[other]).sum()
                };
                for other in (0..6).filter(|_| refused > 0) {
                    let (prefix, own) = (Crowd::prefix(other), Crowd::prefix(grape));
                    prop_assert!(of_prefix(prefix) <= of_prefix(own) + 1);
                    prop_assert!(prefix != own || held[other] <= held[grape] + 1);
                }
            }
            crowd.now += LEASE;
            crowd.workers.sweep(crowd.now);
            crowd.check();
            prop_assert!(crowd.workers.grape_slots.is_empty());
            prop_assert!(crowd.workers.by_prefix.is_empty());
        }
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
