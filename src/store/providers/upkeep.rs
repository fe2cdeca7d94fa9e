//! Providers that announce themselves once and live on: who is asked whether it lives before its
//! leases end.
//!
//! A peer is due when half of a lease or less is left, at a time drawn at random, so that thousands that
//! came at once do not come due at once. It is due again a while later until it is confirmed or its
//! records are gone: one that is dead is gone within a lease. One look is at all records of a peer, and
//! there is one for each question.

use std::sync::Arc;
use std::time::Instant;

use libp2p::{Multiaddr, PeerId};
use rand::RngExt;

use super::{Key, Order, Peer, PeerSlot, Providers, Record, RecordSlot};
use crate::name::ServiceName;
use crate::store::{Nanos, Prefix, nanos};

/// Never due.
pub(super) const NEVER: Nanos = Nanos::MAX;

/// The names that a peer is asked of at once. That it answers says that it lives, for all others.
const NAMES_ASKED: usize = 16;

/// How often a peer that does not answer is due before its lease ends, at least.
const TRIES: u64 = 3;

/// A peer that is to be asked whether it lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Due {
    pub(crate) peer: PeerId,
    /// Where it was connected from.
    pub(crate) prefix: Prefix,
    /// Where it may be dialled: at the host that it has come from, and nowhere else.
    pub(crate) own: Vec<Multiaddr>,
    /// What it is to be asked of, as far as the names behind its keys are known.
    pub(crate) names: Vec<ServiceName>,
}

/// Peers, the first to be due first.
#[derive(Debug)]
pub(super) struct OfAsked;

impl Order for OfAsked {
    type Item = Peer;

    fn due(peer: &Peer) -> Nanos {
        peer.due
    }

    fn place(peer: &mut Peer) -> &mut u32 {
        &mut peer.in_asked
    }
}

/// What one look at the records of a peer has shown.
#[derive(Debug, Default)]
struct Look {
    /// Those that are prolonged if it lives.
    due: Vec<RecordSlot>,
    /// When the first of the others ends.
    soonest: Option<Nanos>,
}

impl Providers {
    /// The next peer that is to be asked whether it lives.
    pub(crate) fn poll_due(&mut self, now: Instant) -> Option<Due> {
        let now = self.nanos(now);
        loop {
            let slot = self.by_due.first()?;
            let peer = self.peers.get(slot).filter(|peer| peer.due <= now)?;
            let look = self.look(peer, now);
            let again = match look.due.is_empty() {
                true => look.soonest.map_or(NEVER, |ends| self.before(ends)),
                false => now + nanos(self.lease) / (3 * TRIES),
            };
            let due = (!look.due.is_empty()).then(|| self.describe(peer, &look.due));
            self.put_off(PeerSlot(slot), again);
            if due.is_some() {
                return due;
            }
        }
    }

    /// A peer lives: its leases that end soon are prolonged.
    pub(crate) fn confirm(&mut self, peer: &PeerId, now: Instant) {
        let now = self.nanos(now);
        let Some((slot, peer)) = self.peer(peer) else {
            return;
        };
        let look = self.look(peer, now);
        let mut soonest = look.soonest.unwrap_or(NEVER);
        for record in look.due {
            soonest = soonest.min(self.prolong(record, now));
        }
        let again = match soonest {
            NEVER => NEVER,
            ends => self.before(ends),
        };
        self.put_off(slot, again);
    }

    /// A peer has said that it does not serve a name.
    pub(crate) fn disown(&mut self, key: &[u8], peer: &PeerId) {
        self.drop_record(key, peer);
    }

    /// The name behind a key has become known.
    pub(crate) fn name(&mut self, key: &[u8], name: &Arc<str>) {
        let slot = self.key(key).map(|(slot, _)| slot);
        if let Some(key) = slot.and_then(|slot| self.keys.get_mut(slot.0)) {
            key.namespace.get_or_insert_with(|| Arc::clone(name));
        }
    }

    /// A record of this peer is to be prolonged while that lives.
    pub(super) fn watch(&mut self, slot: PeerSlot, ends: Nanos) {
        let is_watched = self.peers.get(slot.0).is_none_or(|peer| peer.due != NEVER);
        if !is_watched {
            let due = self.before(ends);
            self.put_off(slot, due);
        }
    }

    /// Peers that are watched have a place in the heap, and no others.
    fn put_off(&mut self, slot: PeerSlot, due: Nanos) {
        let Some(peer) = self.peers.get_mut(slot.0) else {
            return;
        };
        match (std::mem::replace(&mut peer.due, due), due) {
            (NEVER, NEVER) => {}
            (NEVER, _) => self.by_due.insert(slot.0, &mut self.peers),
            (_, NEVER) => self.by_due.remove(slot.0, &mut self.peers),
            _ => self.by_due.update(slot.0, &mut self.peers),
        }
    }

    /// Some time before a lease ends that is not the same for all, and leaves time for some tries.
    fn before(&self, ends: Nanos) -> Nanos {
        let lease = nanos(self.lease);
        ends.saturating_sub(rand::rng().random_range(lease / 3..lease / 2))
    }

    fn look(&self, peer: &Peer, now: Nanos) -> Look {
        let mut look = Look::default();
        for slot in peer.records.slots() {
            let Some(record) = self.records.get(slot) else {
                continue;
            };
            if record.expires <= now || record.asked_until() <= record.expires {
                continue;
            }
            match record.expires - now <= nanos(self.lease) / 2 {
                true => look.due.push(RecordSlot::new(slot)),
                false => {
                    let ends = look.soonest.unwrap_or(NEVER);
                    look.soonest = Some(ends.min(record.expires));
                }
            }
        }
        look
    }

    fn describe(&self, peer: &Peer, due: &[RecordSlot]) -> Due {
        let name = |slot: &RecordSlot| {
            let record = self.records.get(slot.index())?;
            let Key { namespace, .. } = self.keys.get(record.id.key.0)?;
            ServiceName::from_wire(namespace.as_deref()?).ok()
        };
        // Not always of the same ones, if there are many.
        let start = rand::rng().random_range(0..due.len().max(1));
        let (later, first) = due.split_at(start.min(due.len()));
        let names = first.iter().chain(later).filter_map(name);
        Due {
            peer: peer.id,
            prefix: peer.prefix,
            own: peer.payload.own.to_vec(),
            names: names.take(NAMES_ASKED).collect(),
        }
    }

    /// Gives a record another lease; returns when that ends.
    fn prolong(&mut self, slot: RecordSlot, now: Nanos) -> Nanos {
        let lease = nanos(self.lease);
        let Some(record) = self.records.get_mut(slot.index()) else {
            return NEVER;
        };
        let ends = now.saturating_add(lease).min(record.asked_until());
        let peer = record.id.peer;
        record.expires = ends.max(record.expires);
        self.by_expiry.update(slot.index(), &mut self.records);
        if let Some(peer) = self.peers.get_mut(peer.0) {
            peer.records.update(slot.index(), &mut self.records);
        }
        self.on_heard(slot);
        ends
    }
}

impl Record {
    /// Until when it is prolonged while its peer lives; long past if it is not.
    fn asked_until(&self) -> Nanos {
        Nanos::from(self.asked_until) * 1_000_000_000
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::time::Duration;

    use super::*;
    use crate::limits::{Bounds, KADEMLIA_VALIDITY, LEASE};
    use crate::store::{NewRecord, Origin, Upkeep};

    const SECOND: Duration = Duration::from_secs(1);

    struct Scene {
        store: Providers,
        now: Instant,
    }

    impl Scene {
        fn new() -> Self {
            let now = Instant::now();
            let store = Providers::new(PeerId::random(), Bounds::default(), LEASE, 1, now);
            Self { store, now }
        }

        fn announce(&mut self, peer: PeerId, key: &[u8], longest: Duration) {
            let own = ["/ip4/10.0.0.1/tcp/1".parse().unwrap()];
            let new = NewRecord {
                key,
                peer,
                prefix: Prefix::Local,
                addresses: &own,
                origin: Origin::Kademlia,
                ttl: LEASE.min(longest),
                upkeep: Upkeep::Asked { longest, own: &own },
            };
            self.store.insert(new, self.now).unwrap();
        }

        fn is_found(&self, key: &[u8]) -> bool {
            !self.store.sample(key, 1, self.now).far.is_empty()
        }

        /// Who becomes due within this time, second by second.
        fn due_within(&mut self, time: Duration) -> Vec<Vec<PeerId>> {
            let mut due = Vec::new();
            for _ in 0..time.as_secs() {
                self.now += SECOND;
                self.store.sweep(self.now);
                let mut peers = Vec::new();
                while let Some(next) = self.store.poll_due(self.now) {
                    peers.push(next.peer);
                }
                due.push(peers);
            }
            due
        }
    }

    #[test]
    fn who_lives_is_found_as_long_as_such_a_record_is_good() {
        let (mut scene, peer) = (Scene::new(), PeerId::random());
        scene.announce(peer, b"name", KADEMLIA_VALIDITY);
        let ends = scene.now + KADEMLIA_VALIDITY;
        let mut asked = 0;
        while scene.now + SECOND < ends {
            scene.now += SECOND;
            while let Some(due) = scene.store.poll_due(scene.now) {
                assert_eq!(due.own.len(), 1);
                scene.store.confirm(&due.peer, scene.now);
                asked += 1;
            }
            assert!(scene.is_found(b"name"));
        }
        // Each after half of a lease to two thirds.
        let (rare, often) = (
            KADEMLIA_VALIDITY.as_secs() / 61,
            KADEMLIA_VALIDITY.as_secs() / 44,
        );
        assert!((rare..=often).contains(&asked), "{asked}");
        scene.now += SECOND;
        assert!(!scene.is_found(b"name"));
        scene.store.sweep(scene.now);
        assert_eq!(
            (scene.store.poll_due(scene.now), scene.store.by_due.len()),
            (None, 0)
        );
    }

    #[test]
    fn who_is_dead_is_asked_some_times_and_gone_within_a_lease() {
        let (mut scene, peer) = (Scene::new(), PeerId::random());
        scene.announce(peer, b"name", KADEMLIA_VALIDITY);
        let due = scene.due_within(LEASE - SECOND);
        assert!(scene.is_found(b"name"));
        let asked = due.iter().flatten().count();
        assert!((3..=5).contains(&asked), "{asked} times");
        scene.due_within(2 * SECOND);
        assert!(!scene.is_found(b"name"));
        assert_eq!(scene.store.by_due.len(), 0);
    }

    #[test]
    fn who_renews_in_time_is_not_asked() {
        let (mut scene, peer) = (Scene::new(), PeerId::random());
        for _ in 0..20 {
            scene.announce(peer, b"name", KADEMLIA_VALIDITY);
            let due = scene.due_within(LEASE / 3);
            assert!(due.iter().all(Vec::is_empty));
        }
        // Nor who has asked for no more than it was granted.
        let other = PeerId::random();
        scene.announce(other, b"other", LEASE / 2);
        let due = scene.due_within(LEASE);
        assert!(due.iter().flatten().all(|due| *due == peer));
        assert!(!scene.is_found(b"other"));
    }

    #[test]
    fn thousands_that_came_at_once_do_not_come_due_at_once() {
        let mut scene = Scene::new();
        for n in 0..5_000_u32 {
            let key = n.to_be_bytes().repeat(8);
            scene.announce(PeerId::random(), &key, KADEMLIA_VALIDITY);
        }
        let mut asked: HashMap<PeerId, usize> = HashMap::new();
        for second in 0..10 * LEASE.as_secs() {
            scene.now += SECOND;
            let mut peers = Vec::new();
            while let Some(due) = scene.store.poll_due(scene.now) {
                scene.store.confirm(&due.peer, scene.now);
                peers.push(due.peer);
            }
            // 333 when they are spread evenly.
            assert!(peers.len() <= 500, "{} after {second} s", peers.len());
            for peer in peers {
                *asked.entry(peer).or_default() += 1;
            }
        }
        assert_eq!(asked.len(), 5_000);
        assert!(asked.values().all(|asked| (14..=20).contains(asked)));
    }

    #[test]
    fn a_peer_is_asked_of_names_that_are_known_and_keeps_those_that_it_serves() {
        let (mut scene, peer) = (Scene::new(), PeerId::random());
        let names: Vec<ServiceName> = (0..20)
            .map(|n| format!("name{n}").parse().unwrap())
            .collect();
        for name in &names {
            scene.announce(peer, &name.key(), KADEMLIA_VALIDITY);
        }
        scene.announce(peer, b"of no name", KADEMLIA_VALIDITY);
        for name in &names[1..] {
            scene.store.name(&name.key(), name.shared());
        }
        scene.now += LEASE * 2 / 3;
        let due = scene.store.poll_due(scene.now).unwrap();
        assert_eq!(due.names.len(), NAMES_ASKED);
        assert!(!due.names.contains(&names[0]));
        assert_eq!(scene.store.poll_due(scene.now), None, "it is being asked");
        let disowned = &due.names[0];
        scene.store.disown(&disowned.key(), &peer);
        scene.store.confirm(&peer, scene.now);
        scene.now += LEASE / 2;
        for name in &names {
            assert_eq!(scene.is_found(&name.key()), name != disowned);
        }
        assert!(scene.is_found(b"of no name"));
    }
}
