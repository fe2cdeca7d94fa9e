//! The provider records that a grape keeps for others, within fixed bounds.
//!
//! One table serves Kademlia (see [`Records`](super::Records)), the rendezvous server and the registry
//! of [names](super::names), so that a name announced by more than one of them is held once. It does no I/O, and time comes in as `now`.
//!
//! Invariants, whatever strangers send:
//! * No bound in [`Bounds`] is ever exceeded, and no function walks all the records.
//! * A record has exactly one item in each index, however often it is renewed.
//! * An expired record is never returned, swept or not; a withdrawn one is gone at once, and what
//!   was under way by Kademlia meanwhile does not bring it back.
//! * A full store is shared fairly: prefixes share the store, the peers of a prefix share the
//!   prefix. Who holds more makes room for who holds less, never the other way round.
//! * A peer's addresses and envelope are held once and only while it has a record.
//! * Whoever is connected is named before all others, then who was heard of lately, and last who was
//!   cut off; of equals each in turn.
//!
//! What it leaves to others: whether a record is true, who may announce it, and how often.

mod upkeep;

use std::{
    collections::hash_map::RandomState,
    collections::{BTreeMap, HashMap, HashSet},
    hash::BuildHasher,
    mem,
    num::{NonZeroU32, NonZeroU64},
    ops::Bound,
    sync::Arc,
    time::{Duration, Instant},
};

use libp2p::{
    Multiaddr, PeerId,
    kad::{ProviderRecord, RecordKey, store},
};

use crate::limits::{Bounds, MAX_ADDRESSES, MAX_ANNOUNCED};
use crate::name;
use crate::proto::addresses;
use crate::proto::rendezvous::{Envelopes, Form};
use crate::proto::wire::{MAX_ADDRESS, MAX_RECORD};

use super::heap::{Heap, Order};
use super::index::Index;
use super::ring::{Linked, Links, Ring};
use super::slab::Slab;
use super::weights::{Weight, Weights};
use super::withdrawn::Withdrawn;
use super::{Nanos, Prefix, nanos};
pub(crate) use upkeep::Due;
use upkeep::{NEVER, OfAsked};

/// Bytes of a key: room for the multihash of any common hash; a name's has 34.
const MAX_KEY: usize = 64;

/// Longest rendezvous namespace in bytes, from the rendezvous specification.
const MAX_NAMESPACE_BYTES: usize = 255;

/// Bytes of addresses and envelope that weigh as much as one record, which takes some 200 itself.
/// An ordinary peer (four addresses, in an envelope of either form) stays below it and weighs its records only.
const BYTES_PER_LOAD: usize = 512;

/// The registrations that are looked at for a page of all namespaces: as many as one key has.
const LOOKED_AT: usize = 1_000;

/// Expired records that an insert drops: more than it can add, so that they never pile up.
const EXPIRED_PER_INSERT: usize = 4;

/// Expired records that one sweep drops: 4 ms of work when each was its peer's only one.
const EXPIRED_PER_SWEEP: usize = 1_024;

/// The road by which a record came.
#[derive(Clone, Debug)]
pub(crate) enum Origin {
    /// Kademlia's ADD_PROVIDER.
    Kademlia,
    /// A registration, by rendezvous or by the registry of names. The record is then found by all
    /// roads until it goes.
    Rendezvous {
        /// The namespace, whose hash the key is: the caller has made the key from it.
        namespace: Arc<str>,
        /// The signed peer record, which the caller has verified; it replaces the peer's earlier one in
        /// every form.
        envelope: Envelopes,
    },
}

/// What keeps a record when its lease has ended.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Upkeep<'a> {
    /// Its peer, which renews it.
    Renewed,
    /// This grape: for so long at most it asks the peer before a lease ends whether it lives.
    Asked {
        longest: Duration,
        /// Those of its addresses that are at the host that it has come from. An empty list leaves
        /// those known so far.
        own: &'a [Multiaddr],
    },
}

/// A record to insert: `peer` provides `key` for `ttl`.
#[derive(Clone, Debug)]
pub(crate) struct NewRecord<'a> {
    /// What is provided: normally the multihash of a name.
    pub(crate) key: &'a [u8],
    /// Who provides it.
    pub(crate) peer: PeerId,
    /// Where the peer's connection comes from, as seen by this node and not as claimed.
    pub(crate) prefix: Prefix,
    /// Where the peer can be dialled. An empty list leaves the addresses known so far.
    pub(crate) addresses: &'a [Multiaddr],
    /// The road by which the record came.
    pub(crate) origin: Origin,
    /// The lease, cut to the longest one that is granted.
    pub(crate) ttl: Duration,
    /// What keeps it after that.
    pub(crate) upkeep: Upkeep<'a>,
}

/// Why a record was not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    /// The key, the namespace or the envelope is longer than the bounds allow.
    #[error("the record is too large")]
    TooLarge,
    /// The peer holds as many records as a peer may.
    #[error("the peer holds too many records")]
    PeerFull,
    /// The key has as many providers as it may, and none from a more crowded prefix.
    #[error("the key has too many providers")]
    KeyFull,
    /// The store or the peer's prefix is full, and nobody there holds more than the peer would.
    #[error("the store is full")]
    Full,
    /// It comes by Kademlia, and the peer has just taken the name back.
    #[error("the peer has taken the name back")]
    Withdrawn,
}

/// How a connection with a peer has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parting {
    /// This node has closed it, because nothing was said over it any more.
    AtRest,
    /// It has broken, or the peer has closed it: most often that is gone.
    CutOff,
}

/// Live providers of a key, in the order in which they are worth asking.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sample {
    /// The name behind the key is known.
    pub(crate) is_named: bool,
    /// Those that are connected.
    pub(crate) near: Vec<Provider>,
    pub(crate) far: Vec<Provider>,
}

/// A live provider of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Provider {
    /// Who provides the key.
    pub(crate) peer: PeerId,
    /// Where it can be dialled, as it said last; may be empty.
    pub(crate) addresses: Vec<Multiaddr>,
    /// When its lease ends.
    pub(crate) expires: Instant,
}

/// A live rendezvous registration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Registration {
    /// The namespace registered under.
    pub(crate) namespace: Arc<str>,
    /// Who registered.
    pub(crate) peer: PeerId,
    /// The peer's signed record in the form that was asked for, as it sent it last.
    pub(crate) envelope: Arc<[u8]>,
    /// The lease granted at the last registration, in whole seconds.
    pub(crate) ttl: Duration,
    /// When the lease ends.
    pub(crate) expires: Instant,
    /// The number of the last registration.
    pub(crate) sequence: u64,
}

/// Registrations in the order of their numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    /// The registrations, oldest number first.
    pub(crate) registrations: Vec<Registration>,
    /// What to pass as `after` for those that follow: the highest number that was returned or
    /// passed in. With the namespace it is the whole rendezvous cookie, so the server keeps none.
    pub(crate) last: u64,
}

/// What a store holds now and what has happened to it since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stats {
    /// Records held, own ones not counted.
    pub(crate) records: u64,
    /// Those of them that rendezvous discovery returns.
    pub(crate) registrations: u64,
    /// Keys that have a record.
    pub(crate) keys: u64,
    /// Peers that have a record.
    pub(crate) peers: u64,
    /// Names that this node announces itself.
    pub(crate) own: u64,
    /// Records dropped to make room for somebody who held less.
    pub(crate) evicted: u64,
    /// Inserts refused.
    pub(crate) refused: u64,
    /// Records dropped because their lease had ended.
    pub(crate) expired: u64,
}

/// The bounded table of provider records. The module's documentation gives its invariants.
#[derive(Debug)]
pub(crate) struct Providers {
    local: PeerId,
    bounds: Bounds,
    /// The longest lease; a longer one is cut.
    lease: Duration,
    /// Leases are kept as nanoseconds since here: half the size of an `Instant`, and exact.
    epoch: Instant,
    next_sequence: u64,
    own: HashMap<RecordKey, ProviderRecord>,
    hasher: RandomState,
    keys: Slab<Key>,
    by_key: Index,
    peers: Slab<Peer>,
    by_peer: Index,
    /// Everybody who is connected, also who has no record.
    connected: HashSet<PeerId>,
    records: Slab<Record>,
    by_id: Index,
    by_expiry: Heap<OfAll>,
    /// The peers that are asked whether they live.
    by_due: Heap<OfAsked>,
    by_sequence: BTreeMap<NonZeroU64, RecordSlot>,
    weights: Weights,
    withdrawn: Withdrawn,
    evicted: u64,
    refused: u64,
    expired: u64,
}

impl Providers {
    /// An empty store of the node `local`.
    ///
    /// Registrations are numbered from `first_sequence`. Pass the wall clock in microseconds: a
    /// cookie from before a restart then still means "what came since", where counting from 0 would
    /// hide every new registration from its holder.
    pub(crate) fn new(
        local: PeerId,
        bounds: Bounds,
        lease: Duration,
        first_sequence: u64,
        now: Instant,
    ) -> Self {
        Self {
            local,
            bounds,
            lease,
            epoch: now,
            next_sequence: first_sequence.max(1),
            own: HashMap::new(),
            hasher: RandomState::new(),
            keys: Slab::default(),
            by_key: Index::default(),
            peers: Slab::default(),
            by_peer: Index::default(),
            connected: HashSet::new(),
            records: Slab::default(),
            by_id: Index::default(),
            by_expiry: Heap::default(),
            by_due: Heap::default(),
            by_sequence: BTreeMap::new(),
            weights: Weights::default(),
            withdrawn: Withdrawn::default(),
            evicted: 0,
            refused: 0,
            expired: 0,
        }
    }

    /// Stores a record, or renews it and the peer's addresses, envelope and prefix.
    ///
    /// A renewal succeeds unless it is too large. It never shortens the lease, and one by Kademlia
    /// keeps a registration alive too: the peer evidently still announces the key. Larger addresses
    /// or a larger envelope that find no room are ignored, and so is a new prefix that is full.
    ///
    /// When the store is full, the soonest to expire of the heaviest peer's records in the heaviest
    /// prefix goes, if the newcomer's prefix stays lighter than that prefix; otherwise that of the
    /// heaviest peer in the newcomer's own prefix, if the newcomer stays lighter than that peer.
    pub(crate) fn insert(&mut self, new: NewRecord<'_>, now: Instant) -> Result<(), Refused> {
        let now = self.nanos(now);
        self.drop_expired(now, EXPIRED_PER_INSERT);
        let outcome = self.admit(&new, now);
        self.refused += u64::from(outcome.is_err());
        outcome
    }

    /// Drops the record of `peer` for `key`, by whichever road it came; says whether there was one.
    ///
    /// For [`WITHDRAWN`](crate::limits::WITHDRAWN) Kademlia does not bring it back: its messages have
    /// no order, and one that announces the name may be under way.
    pub(crate) fn withdraw(&mut self, key: &[u8], peer: &PeerId, now: Instant) -> bool {
        let now = self.nanos(now);
        let was_kept = self.drop_record(key, peer);
        // Who takes back what it never announced does not make others' withdrawals forgotten.
        if was_kept || self.withdrawn.has_room(now) {
            self.withdrawn.add(key, peer, now);
        }
        was_kept
    }

    fn drop_record(&mut self, key: &[u8], peer: &PeerId) -> bool {
        self.find(key, peer).is_some_and(|slot| self.remove(slot))
    }

    /// Drops all records of `peer`, at most [`Bounds::per_peer`], and returns their number.
    pub(crate) fn withdraw_all(&mut self, peer: &PeerId) -> usize {
        let Some((slot, _)) = self.peer(peer) else {
            return 0;
        };
        let mut withdrawn = 0;
        while let Some(soonest) = self.soonest_of(slot) {
            withdrawn += usize::from(self.remove(soonest));
        }
        withdrawn
    }

    /// A peer has a connection, its first. What it announces from now on is near.
    pub(crate) fn on_connected(&mut self, peer: PeerId) {
        self.connected.insert(peer);
        let slot = self.peer(&peer).map(|(slot, _)| slot);
        if let Some(peer) = slot.and_then(|slot| self.peers.get_mut(slot.0)) {
            peer.is_connected = true;
        }
    }

    /// A peer has no connection any more.
    pub(crate) fn on_disconnected(&mut self, peer: &PeerId, parting: Parting) {
        self.connected.remove(peer);
        let slot = self.peer(peer).map(|(slot, _)| slot);
        let Some(peer) = slot.and_then(|slot| self.peers.get_mut(slot.0)) else {
            return;
        };
        peer.is_connected = false;
        let is_near = |slot: &u32| {
            let record = self.records.get(*slot);
            record.is_some_and(|record| record.standing == Standing::Near)
        };
        let count = peer.near as usize;
        let near: Vec<_> = peer.records.slots().filter(is_near).take(count).collect();
        let standing = match parting {
            Parting::AtRest => Standing::Far,
            Parting::CutOff => Standing::CutOff,
        };
        for slot in near {
            self.place(RecordSlot::new(slot), standing);
        }
    }

    /// Up to `limit` live providers of `key`, own announcements not included: first those that are
    /// connected, then those that were heard of lately, then the others.
    ///
    /// Each call goes on where the last one for this key stopped, so that n equal providers have all
    /// been returned after n / `limit` calls.
    pub(crate) fn sample(&self, key: &[u8], limit: usize, now: Instant) -> Sample {
        let Some((_, key)) = self.key(key) else {
            return Sample::default();
        };
        let preferred = self.preferred(key, limit, self.nanos(now), |_| true);
        let mut sample = Sample {
            is_named: key.namespace.is_some(),
            ..Sample::default()
        };
        for (_, record) in preferred {
            let kind = match record.standing {
                Standing::Near => &mut sample.near,
                Standing::Far | Standing::CutOff => &mut sample.far,
            };
            kind.extend(self.provider(record));
        }
        sample
    }

    /// Up to `limit` live registrations whose records are held in that form: those of one namespace's
    /// `key`, or all. Of all, so many are looked at that a page may be short and not the last one.
    ///
    /// Every registration and re-registration takes a new number. With an `after`, those with a higher
    /// number are returned, lowest first; one that this store has not given out yet counts as 0.
    /// Without, and if a namespace has more than `limit`, those are that are worth asking most, as
    /// [`sample`](Self::sample) has it; the page after it begins with the lowest number.
    pub(crate) fn registrations(
        &self,
        key: Option<&[u8]>,
        after: Option<u64>,
        limit: usize,
        form: Form,
        now: Instant,
    ) -> Page {
        let now = self.nanos(now);
        if let (Some(key), None) = (key, after)
            && let Some(registrations) = self.crowd(key, limit, form, now)
        {
            return Page {
                registrations,
                last: 0,
            };
        }
        let after = after.filter(|after| *after < self.next_sequence);
        let after = after.unwrap_or(0);
        let numbered: &mut dyn Iterator<Item = (NonZeroU64, RecordSlot)> = match key {
            Some(key) => &mut self.numbers_of(key, after, now).into_iter(),
            None => &mut self.all_numbers(after, now),
        };
        let mut page = Page {
            registrations: Vec::new(),
            last: after,
        };
        for (number, slot) in numbered {
            if page.registrations.len() == limit {
                break;
            }
            page.last = number.get();
            page.registrations.extend(self.registration(slot, form));
        }
        page
    }

    /// Drops expired records and returns their number.
    ///
    /// At most 1,024 go in one call, so that the end of a flood does not stall the caller; the rest
    /// stays invisible and goes with later sweeps and inserts.
    pub(crate) fn sweep(&mut self, now: Instant) -> usize {
        let now = self.nanos(now);
        self.drop_expired(now, EXPIRED_PER_SWEEP)
    }

    /// The longest lease that is granted.
    pub(crate) fn lease(&self) -> Duration {
        self.lease
    }

    /// The signed record of a peer that has registered something.
    pub(crate) fn envelope(&self, peer: &PeerId) -> Option<Envelopes> {
        let (_, peer) = self.peer(peer)?;
        peer.payload.envelope.clone()
    }

    /// The addresses at which a peer that provides something can be dialled; none of an unknown one.
    pub(crate) fn addresses(&self, peer: &PeerId) -> Vec<Multiaddr> {
        self.peer(peer)
            .map(|(_, peer)| peer.payload.addresses.to_vec())
            .unwrap_or_default()
    }

    /// Until when a peer provides a key.
    pub(crate) fn held_until(&self, key: &[u8], peer: &PeerId) -> Option<Instant> {
        let record = self.records.get(self.find(key, peer)?.index())?;
        Some(self.instant(record.expires))
    }

    /// Where a peer that provides something was connected from.
    pub(crate) fn prefix(&self, peer: &PeerId) -> Option<Prefix> {
        self.peer(peer).map(|(_, peer)| peer.prefix)
    }

    /// What the store holds and what has happened to it.
    pub(crate) fn stats(&self) -> Stats {
        Stats {
            records: self.records.len() as u64,
            registrations: self.by_sequence.len() as u64,
            keys: self.keys.len() as u64,
            peers: self.peers.len() as u64,
            own: self.own.len() as u64,
            evicted: self.evicted,
            refused: self.refused,
            expired: self.expired,
        }
    }

    fn admit(&mut self, new: &NewRecord<'_>, now: Nanos) -> Result<(), Refused> {
        self.check_sizes(new)?;
        match new.origin {
            Origin::Kademlia if self.withdrawn.has(new.key, &new.peer, now) => {
                return Err(Refused::Withdrawn);
            }
            Origin::Kademlia => {}
            Origin::Rendezvous { .. } => self.withdrawn.remove(new.key, &new.peer),
        }
        let lease = new.ttl.min(self.lease);
        let expires = now.saturating_add(nanos(lease));
        let slot = match self.find(new.key, &new.peer) {
            Some(slot) => {
                self.renew(slot, new, expires);
                slot
            }
            None => self.add(new, expires)?,
        };
        if let Origin::Rendezvous { namespace, .. } = &new.origin {
            self.register(slot, namespace, lease);
        }
        if let Upkeep::Asked { longest, .. } = new.upkeep {
            self.ask_until(slot, now.saturating_add(nanos(longest)));
        }
        Ok(())
    }

    /// A record is prolonged until then, while its peer lives.
    fn ask_until(&mut self, slot: RecordSlot, until: Nanos) {
        let Some(record) = self.records.get_mut(slot.index()) else {
            return;
        };
        let until = u32::try_from(until / 1_000_000_000).unwrap_or(u32::MAX);
        record.asked_until = until.max(record.asked_until);
        let (peer, ends) = (record.id.peer, record.expires);
        self.watch(peer, ends);
    }

    fn check_sizes(&self, new: &NewRecord<'_>) -> Result<(), Refused> {
        let fits = match &new.origin {
            Origin::Kademlia => true,
            Origin::Rendezvous {
                namespace,
                envelope,
            } => namespace.len() <= MAX_NAMESPACE_BYTES && envelope.longest() <= MAX_RECORD,
        };
        if fits && new.key.len() <= MAX_KEY {
            Ok(())
        } else {
            Err(Refused::TooLarge)
        }
    }

    fn add(&mut self, new: &NewRecord<'_>, expires: Nanos) -> Result<RecordSlot, Refused> {
        let known = self.peer(&new.peer);
        let held = known.map_or(0, |(_, peer)| peer.records.len());
        let known = known.map(|(slot, _)| slot);
        if held >= self.bounds.per_peer {
            return Err(Refused::PeerFull);
        }
        let replaced = self.crowded_out_by(new)?;
        let peer = match known {
            Some(slot) => {
                self.refresh(slot, new)?;
                self.make_room(self.weight(slot), 1)?;
                slot
            }
            None => {
                let payload = self.payload(new, None);
                self.make_room(Weight::none(new.prefix), 1 + payload.load())?;
                self.add_peer(new, payload)
            }
        };
        if let Some(slot) = replaced {
            self.evicted += u64::from(self.remove(slot));
        }
        let key = self.key_slot(new);
        Ok(self.add_record(RecordId { key, peer }, expires))
    }

    fn add_record(&mut self, id: RecordId, expires: Nanos) -> RecordSlot {
        let slot = RecordSlot::new(self.records.vacant());
        let peer = self.peers.get(id.peer.0);
        self.records.insert(Record {
            id,
            expires,
            sequence: None,
            asked_until: 0,
            ttl_seconds: 0,
            standing: Standing::when_heard(peer),
            links: Links::default(),
            in_all: 0,
            in_peer: 0,
        });
        let (records, hasher) = (&self.records, &self.hasher);
        let hash_of = |slot| records.get(slot).map_or(0, |held| hasher.hash_one(held.id));
        self.by_id
            .insert(hasher.hash_one(id), slot.index(), hash_of);
        self.by_expiry.insert(slot.index(), &mut self.records);
        self.reweigh(id.peer, |peer, records| {
            peer.records.insert(slot.index(), records);
        });
        self.link(slot);
        slot
    }

    fn add_peer(&mut self, new: &NewRecord<'_>, payload: Payload) -> PeerSlot {
        let slot = PeerSlot(self.peers.insert(Peer {
            id: new.peer,
            prefix: new.prefix,
            payload,
            is_connected: self.connected.contains(&new.peer),
            due: NEVER,
            in_asked: 0,
            near: 0,
            records: Heap::default(),
            registrations: 0,
        }));
        let (peers, hasher) = (&self.peers, &self.hasher);
        let hash_of = |slot| peers.get(slot).map_or(0, |held| hasher.hash_one(held.id));
        self.by_peer
            .insert(hasher.hash_one(new.peer), slot.0, hash_of);
        slot
    }

    fn key_slot(&mut self, new: &NewRecord<'_>) -> KeySlot {
        if let Some((slot, _)) = self.key(new.key) {
            return slot;
        }
        let slot = KeySlot(self.keys.insert(Key {
            bytes: new.key.into(),
            namespace: None,
            rings: Default::default(),
        }));
        let (keys, hasher) = (&self.keys, &self.hasher);
        let hash_of = |slot| {
            let held = keys.get(slot);
            held.map_or(0, |held| hasher.hash_one(held.bytes.as_slice()))
        };
        self.by_key
            .insert(hasher.hash_one(new.key), slot.0, hash_of);
        slot
    }

    /// The record that goes when `new` comes to a full key: of a peer that was cut off, or else of the
    /// most crowded prefix there, the soonest to expire. One pass over the key's records, so at most
    /// [`Bounds::per_key`] steps.
    fn crowded_out_by(&self, new: &NewRecord<'_>) -> Result<Option<RecordSlot>, Refused> {
        let full = |key: &Key| key.providers() >= self.bounds.per_key;
        let Some((_, key)) = self.key(new.key).filter(|(_, key)| full(key)) else {
            return Ok(None);
        };
        if let Some(slot) = key.ring(Standing::CutOff).turn() {
            return Ok(Some(RecordSlot::new(slot)));
        }
        let mut crowds: HashMap<Prefix, (usize, (Nanos, RecordSlot))> = HashMap::new();
        for (slot, record) in self.records_of_key(key) {
            let candidate = (record.expires, slot);
            let prefix = self.weight(record.id.peer).prefix;
            let (crowd, soonest) = crowds.entry(prefix).or_insert((0, candidate));
            *crowd += 1;
            *soonest = candidate.min(*soonest);
        }
        let newcomers = crowds.get(&new.prefix).map_or(0, |&(crowd, _)| crowd);
        match crowds.into_values().max() {
            Some((crowd, (_, slot))) if crowd > newcomers + 1 => Ok(Some(slot)),
            _ => Err(Refused::KeyFull),
        }
    }

    /// Evicts until `load` more fits, as far as `newcomer` has a claim to it.
    fn make_room(&mut self, newcomer: Weight, load: u32) -> Result<(), Refused> {
        while let Some(peer) = self.next_to_yield(newcomer, load)? {
            let evicted = self.soonest_of(peer).is_some_and(|slot| self.remove(slot));
            if !evicted {
                return Err(Refused::Full);
            }
            self.evicted += 1;
        }
        Ok(())
    }

    /// The peer that gives up a record before `load` more fits; none when it fits already.
    ///
    /// Both comparisons ask for one more than a tie: of two equals neither can push the other out.
    fn next_to_yield(&self, newcomer: Weight, load: u32) -> Result<Option<PeerSlot>, Refused> {
        let prefix_load = self.weights.of(newcomer.prefix) + load;
        let prefix_is_full = prefix_load as usize > self.bounds.per_prefix;
        let store_is_full = (self.weights.total + load) as usize > self.bounds.records;
        if !prefix_is_full && !store_is_full {
            return Ok(None);
        }
        let heavier = |prefix: &Weight| !prefix_is_full && prefix.load > prefix_load;
        let victim = match self.weights.heaviest_prefix().filter(heavier) {
            Some(heaviest) => self.weights.heaviest_peer(heaviest.prefix),
            None => self
                .weights
                .heaviest_peer(newcomer.prefix)
                .filter(|&(_, heaviest)| heaviest > newcomer.load + load),
        };
        victim.map(|(peer, _)| Some(peer)).ok_or(Refused::Full)
    }

    /// Takes over what `new` says about a known peer, as far as there is room.
    fn refresh(&mut self, slot: PeerSlot, new: &NewRecord<'_>) -> Result<(), Refused> {
        let weight = self.weight(slot);
        let moved = self.weights.of(new.prefix) + weight.load;
        if new.prefix != weight.prefix && moved as usize <= self.bounds.per_prefix {
            self.reweigh(slot, |peer, _| peer.prefix = new.prefix);
        }
        let Some(peer) = self.peers.get(slot.0) else {
            return Ok(());
        };
        let payload = self.payload(new, Some(&peer.payload));
        let growth = payload.load().saturating_sub(peer.payload.load());
        if growth > 0 {
            self.make_room(self.weight(slot), growth)?;
        }
        self.reweigh(slot, |peer, _| peer.payload = payload);
        Ok(())
    }

    fn payload(&self, new: &NewRecord<'_>, known: Option<&Payload>) -> Payload {
        let envelope = match &new.origin {
            Origin::Rendezvous { envelope, .. } => Some(envelope.clone()),
            Origin::Kademlia => known.and_then(|known| known.envelope.clone()),
        };
        let addresses: Box<[_]> = addresses::plain(&new.peer, new.addresses)
            .filter(|address| address.len() <= MAX_ADDRESS)
            .take(MAX_ADDRESSES)
            .collect();
        let addresses = match known {
            // Kademlia announces external addresses only, often none, while the same peer's
            // rendezvous registration has some.
            Some(known) if addresses.is_empty() => known.addresses.clone(),
            _ => addresses,
        };
        let own = match (new.upkeep, known) {
            (Upkeep::Asked { own, .. }, _) if !own.is_empty() => {
                let own = addresses::plain(&new.peer, own);
                own.filter(|own| addresses.contains(own)).collect()
            }
            (_, Some(known)) => known.own.clone(),
            (_, None) => Box::default(),
        };
        Payload {
            addresses,
            own,
            envelope,
        }
    }

    fn renew(&mut self, slot: RecordSlot, new: &NewRecord<'_>, expires: Nanos) {
        let Some(record) = self.records.get_mut(slot.index()) else {
            return;
        };
        let (peer, goes_on) = (record.id.peer, expires > record.expires);
        if goes_on {
            record.expires = expires;
            self.by_expiry.update(slot.index(), &mut self.records);
            if let Some(peer) = self.peers.get_mut(peer.0) {
                peer.records.update(slot.index(), &mut self.records);
            }
        }
        self.on_heard(slot);
        // The lease is renewed whether or not there is room for what else changed.
        let _ = self.refresh(peer, new);
    }

    /// A peer was heard of: its record has the place of one that lives.
    fn on_heard(&mut self, slot: RecordSlot) {
        let Some(record) = self.records.get(slot.index()) else {
            return;
        };
        let standing = Standing::when_heard(self.peers.get(record.id.peer.0));
        if record.standing != standing {
            self.place(slot, standing);
        }
    }

    /// Gives the record a number, unless there was no room for its peer's envelope.
    fn register(&mut self, slot: RecordSlot, namespace: &Arc<str>, ttl: Duration) {
        let Some(record) = self.records.get_mut(slot.index()) else {
            return;
        };
        let id = record.id;
        let peer = self.peers.get(id.peer.0);
        if peer.is_none_or(|peer| peer.payload.envelope.is_none()) {
            return;
        }
        let sequence = NonZeroU64::new(self.next_sequence);
        self.next_sequence = self.next_sequence.saturating_add(1);
        let earlier = mem::replace(&mut record.sequence, sequence);
        record.ttl_seconds = u16::try_from(ttl.as_secs()).unwrap_or(u16::MAX);
        if let Some(sequence) = sequence {
            self.by_sequence.insert(sequence, slot);
        }
        if let Some(key) = self.keys.get_mut(id.key.0) {
            key.namespace.get_or_insert_with(|| Arc::clone(namespace));
        }
        match earlier {
            Some(earlier) => {
                self.by_sequence.remove(&earlier);
            }
            None => self.reweigh(id.peer, |peer, _| peer.registrations += 1),
        }
    }

    fn numbers_of(&self, key: &[u8], after: u64, now: Nanos) -> Vec<(NonZeroU64, RecordSlot)> {
        let Some((_, key)) = self.key(key) else {
            return Vec::new();
        };
        let mut numbered: Vec<_> = self
            .records_of_key(key)
            .filter(|(_, record)| record.expires > now)
            .filter_map(|(slot, record)| Some((record.sequence.filter(|n| n.get() > after)?, slot)))
            .collect();
        numbered.sort_unstable();
        numbered
    }

    /// The registrations of a key that are worth asking most, if there are more of them than `limit`.
    fn crowd(&self, key: &[u8], limit: usize, form: Form, now: Nanos) -> Option<Vec<Registration>> {
        let (_, key) = self.key(key)?;
        let is_registered = |record: &Record| {
            let peer = self.peers.get(record.id.peer.0);
            let envelope = peer.and_then(|peer| peer.payload.envelope.as_ref()?.of(form));
            record.sequence.is_some() && envelope.is_some()
        };
        let is_live = |record: &Record| record.expires > now && is_registered(record);
        let live = self
            .records_of_key(key)
            .filter(|(_, record)| is_live(record));
        if live.take(limit + 1).count() <= limit {
            return None;
        }
        let preferred = self.preferred(key, limit, now, is_registered);
        let slots = preferred.into_iter().map(|(slot, _)| slot);
        Some(
            slots
                .filter_map(|slot| self.registration(slot, form))
                .collect(),
        )
    }

    fn all_numbers(
        &self,
        after: u64,
        now: Nanos,
    ) -> impl Iterator<Item = (NonZeroU64, RecordSlot)> {
        let above = NonZeroU64::new(after).map_or(Bound::Unbounded, Bound::Excluded);
        let live = move |(_, slot): &(NonZeroU64, RecordSlot)| {
            let record = self.records.get(slot.index());
            record.is_some_and(|record| record.expires > now)
        };
        self.by_sequence
            .range((above, Bound::Unbounded))
            .map(|(&number, &slot)| (number, slot))
            .filter(live)
            .take(LOOKED_AT)
    }

    fn registration(&self, slot: RecordSlot, form: Form) -> Option<Registration> {
        let record = self.records.get(slot.index())?;
        let peer = self.peers.get(record.id.peer.0)?;
        Some(Registration {
            namespace: self.keys.get(record.id.key.0)?.namespace.clone()?,
            peer: peer.id,
            envelope: Arc::clone(peer.payload.envelope.as_ref()?.of(form)?),
            ttl: Duration::from_secs(record.ttl_seconds.into()),
            expires: self.instant(record.expires),
            sequence: record.sequence?.get(),
        })
    }

    fn provider(&self, record: &Record) -> Option<Provider> {
        let peer = self.peers.get(record.id.peer.0)?;
        Some(Provider {
            peer: peer.id,
            addresses: peer.payload.addresses.to_vec(),
            expires: self.instant(record.expires),
        })
    }

    fn drop_expired(&mut self, now: Nanos, limit: usize) -> usize {
        let mut dropped = 0;
        while dropped < limit
            && let Some(first) = self.by_expiry.first()
            && self
                .records
                .get(first)
                .is_some_and(|first| first.expires <= now)
            && self.remove(RecordSlot::new(first))
        {
            dropped += 1;
        }
        self.expired += dropped as u64;
        dropped
    }

    fn remove(&mut self, slot: RecordSlot) -> bool {
        let Some(record) = self.records.get(slot.index()) else {
            return false;
        };
        let (id, sequence) = (record.id, record.sequence);
        self.by_id.remove(self.hasher.hash_one(id), slot.index());
        self.by_expiry.remove(slot.index(), &mut self.records);
        if let Some(sequence) = sequence {
            self.by_sequence.remove(&sequence);
        }
        self.unlink(slot);
        self.drop_empty(id.key);
        self.reweigh(id.peer, |peer, records| peer.forget(slot, records));
        self.records.remove(slot.index());
        true
    }

    /// Gives a record another place among those of its key.
    fn place(&mut self, slot: RecordSlot, standing: Standing) {
        self.unlink(slot);
        if let Some(record) = self.records.get_mut(slot.index()) {
            record.standing = standing;
        }
        self.link(slot);
    }

    /// Puts a record among those of its key and its standing, where its turn comes last.
    fn link(&mut self, slot: RecordSlot) {
        let Some(Record { id, standing, .. }) = self.records.get(slot.index()) else {
            return;
        };
        let (id, standing) = (*id, *standing);
        let Some(key) = self.keys.get_mut(id.key.0) else {
            return;
        };
        key.rings[standing as usize].insert(slot.index(), &mut self.records);
        if let Some(peer) = self.peers.get_mut(id.peer.0) {
            peer.near += u32::from(standing == Standing::Near);
        }
    }

    /// Takes a record from among those of its key.
    fn unlink(&mut self, slot: RecordSlot) {
        let Some(Record { id, standing, .. }) = self.records.get(slot.index()) else {
            return;
        };
        let (id, standing) = (*id, *standing);
        let Some(key) = self.keys.get_mut(id.key.0) else {
            return;
        };
        key.rings[standing as usize].remove(slot.index(), &mut self.records);
        if let Some(peer) = self.peers.get_mut(id.peer.0) {
            peer.near -= u32::from(standing == Standing::Near);
        }
    }

    /// Drops a key that has no record any more.
    fn drop_empty(&mut self, slot: KeySlot) {
        let Some(key) = self.keys.get(slot.0).filter(|key| key.providers() == 0) else {
            return;
        };
        let hash = self.hasher.hash_one(key.bytes.as_slice());
        self.by_key.remove(hash, slot.0);
        self.keys.remove(slot.0);
    }

    /// Changes a peer, keeps its weight in step and drops it with its last record.
    fn reweigh(&mut self, slot: PeerSlot, change: impl FnOnce(&mut Peer, &mut Slab<Record>)) {
        let Some(peer) = self.peers.get_mut(slot.0) else {
            return;
        };
        let before = peer.weight();
        change(peer, &mut self.records);
        let after = peer.weight();
        if peer.records.len() == 0 {
            let hash = self.hasher.hash_one(peer.id);
            self.by_peer.remove(hash, slot.0);
            self.by_due.remove(slot.0, &mut self.peers);
            self.peers.remove(slot.0);
        }
        self.weights.change(slot, before, after);
    }

    fn weight(&self, slot: PeerSlot) -> Weight {
        let peer = self.peers.get(slot.0);
        peer.map_or(Weight::none(Prefix::Local), Peer::weight)
    }

    fn soonest_of(&self, peer: PeerSlot) -> Option<RecordSlot> {
        let soonest = self.peers.get(peer.0)?.records.first()?;
        Some(RecordSlot::new(soonest))
    }

    fn find(&self, key: &[u8], peer: &PeerId) -> Option<RecordSlot> {
        let (key, _) = self.key(key)?;
        let (peer, _) = self.peer(peer)?;
        let id = RecordId { key, peer };
        let is_it = |slot| self.records.get(slot).is_some_and(|held| held.id == id);
        let slot = self.by_id.find(self.hasher.hash_one(id), is_it)?;
        Some(RecordSlot::new(slot))
    }

    fn key(&self, key: &[u8]) -> Option<(KeySlot, &Key)> {
        let is_it = |slot| {
            let held = self.keys.get(slot);
            held.is_some_and(|held| held.bytes.as_slice() == key)
        };
        let slot = self.by_key.find(self.hasher.hash_one(key), is_it)?;
        Some((KeySlot(slot), self.keys.get(slot)?))
    }

    fn peer(&self, peer: &PeerId) -> Option<(PeerSlot, &Peer)> {
        let is_it = |slot| self.peers.get(slot).is_some_and(|held| held.id == *peer);
        let slot = self.by_peer.find(self.hasher.hash_one(peer), is_it)?;
        Some((PeerSlot(slot), self.peers.get(slot)?))
    }

    /// The records of a key, expired or not, in the order in which they are worth asking. Equals have
    /// their turns.
    fn records_of_key<'a>(
        &'a self,
        key: &'a Key,
    ) -> impl Iterator<Item = (RecordSlot, &'a Record)> {
        let all = key.rings.iter().flat_map(|ring| ring.iter(&self.records));
        all.map(|(slot, record)| (RecordSlot::new(slot), record))
    }

    /// The first live records of a key that are wanted, at most so many, whose turn is over then.
    fn preferred<'a>(
        &'a self,
        key: &'a Key,
        limit: usize,
        now: Nanos,
        is_wanted: impl Fn(&Record) -> bool,
    ) -> Vec<(RecordSlot, &'a Record)> {
        let live = |(_, record): &(RecordSlot, &Record)| record.expires > now && is_wanted(record);
        let preferred: Vec<_> = self.records_of_key(key).filter(live).take(limit).collect();
        for (slot, record) in &preferred {
            key.ring(record.standing)
                .turn_after(slot.index(), &self.records);
        }
        preferred
    }

    fn nanos(&self, at: Instant) -> Nanos {
        nanos(at.saturating_duration_since(self.epoch))
    }

    fn instant(&self, at: Nanos) -> Instant {
        self.epoch + Duration::from_nanos(at)
    }
}

/// What Kademlia asks, see [`Records`](super::Records).
impl Providers {
    /// Stores an announcement of this node. Anybody else's is inserted under the prefix of its
    /// first address, which is only claimed: the driver has Kademlia hand those out and inserts
    /// them with the prefix of the connection.
    pub(super) fn add_provider(
        &mut self,
        record: ProviderRecord,
        now: Instant,
    ) -> store::Result<()> {
        if record.provider == self.local {
            return self.provide(record);
        }
        let ttl = match record.expires {
            Some(expires) => expires.saturating_duration_since(now),
            None => self.lease,
        };
        let new = NewRecord {
            key: record.key.as_ref(),
            peer: record.provider,
            prefix: record.addresses.first().map_or(Prefix::Local, Prefix::from),
            addresses: &record.addresses,
            origin: Origin::Kademlia,
            ttl,
            upkeep: Upkeep::Renewed,
        };
        self.insert(new, now)
            .map_err(|_| store::Error::MaxProvidedKeys)
    }

    /// Whether anybody else has announced a key.
    pub(crate) fn has_providers(&self, key: &[u8], now: Instant) -> bool {
        let now = self.nanos(now);
        self.key(key).is_some_and(|(_, key)| {
            let mut records = self.records_of_key(key);
            records.any(|(_, record)| record.expires > now)
        })
    }

    /// This node's own announcement of a key, and where it can be dialled for it.
    pub(super) fn own(&self, key: &[u8]) -> Option<&ProviderRecord> {
        if self.own.is_empty() {
            return None;
        }
        self.own.get(&RecordKey::new(&key))
    }

    pub(super) fn provided(&self) -> impl Iterator<Item = ProviderRecord> {
        self.own.values().cloned()
    }

    pub(super) fn remove_provider(&mut self, key: &RecordKey, provider: &PeerId) {
        if *provider == self.local {
            self.own.remove(key);
        }
        self.drop_record(key.as_ref(), provider);
    }

    fn provide(&mut self, record: ProviderRecord) -> store::Result<()> {
        if self.own.len() >= MAX_ANNOUNCED && !self.own.contains_key(&record.key) {
            return Err(store::Error::MaxProvidedKeys);
        }
        self.own.insert(record.key.clone(), record);
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct KeySlot(u32);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct PeerSlot(pub(super) u32);

/// A record is known by whose it is and for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct RecordId {
    key: KeySlot,
    peer: PeerSlot,
}

/// Never 0, so that a free place in the slab takes no more than a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct RecordSlot(NonZeroU32);

impl RecordSlot {
    fn new(index: u32) -> Self {
        Self(NonZeroU32::MIN.saturating_add(index))
    }

    fn index(self) -> u32 {
        self.0.get() - 1
    }
}

#[derive(Debug)]
struct Record {
    id: RecordId,
    expires: Nanos,
    /// The number of the last registration; none when the record came by Kademlia only.
    sequence: Option<NonZeroU64>,
    /// Until when it is prolonged while its peer lives, in seconds as leases are kept in
    /// nanoseconds; 0: it is not.
    asked_until: u32,
    ttl_seconds: u16,
    standing: Standing,
    /// The other records of the key and of the same standing.
    links: Links,
    /// The places in the heap of all records and in that of the peer's.
    in_all: u32,
    in_peer: u32,
}

impl Linked for Record {
    fn links(&self) -> Links {
        self.links
    }

    fn links_mut(&mut self) -> &mut Links {
        &mut self.links
    }
}

/// How much an asker may expect of a provider, the most first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// It is connected.
    Near,
    /// It was alive when it was heard of last.
    Far,
    /// Its connection has broken since.
    CutOff,
}

impl Standing {
    const COUNT: usize = 3;

    /// That of what a peer says now.
    fn when_heard(peer: Option<&Peer>) -> Self {
        match peer.is_some_and(|peer| peer.is_connected) {
            true => Self::Near,
            false => Self::Far,
        }
    }
}

/// All records, the soonest to expire first.
#[derive(Debug)]
struct OfAll;

impl Order for OfAll {
    type Item = Record;

    fn due(record: &Record) -> Nanos {
        record.expires
    }

    fn place(record: &mut Record) -> &mut u32 {
        &mut record.in_all
    }
}

/// The records of one peer, the soonest to expire first.
#[derive(Debug)]
struct OfPeer;

impl Order for OfPeer {
    type Item = Record;

    fn due(record: &Record) -> Nanos {
        record.expires
    }

    fn place(record: &mut Record) -> &mut u32 {
        &mut record.in_peer
    }
}

#[derive(Debug)]
struct Key {
    bytes: KeyBytes,
    namespace: Option<Arc<str>>,
    /// The records of each standing.
    rings: [Ring; Standing::COUNT],
}

impl Key {
    fn ring(&self, standing: Standing) -> &Ring {
        &self.rings[standing as usize]
    }

    fn providers(&self) -> usize {
        self.rings.iter().map(Ring::len).sum()
    }
}

/// The bytes of a key, those of a name's in place.
#[derive(Debug)]
enum KeyBytes {
    Name(name::Key),
    Other(Box<[u8]>),
}

impl KeyBytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Name(bytes) => bytes,
            Self::Other(bytes) => bytes,
        }
    }
}

impl From<&[u8]> for KeyBytes {
    fn from(bytes: &[u8]) -> Self {
        match bytes.try_into() {
            Ok(name) => Self::Name(name),
            Err(_) => Self::Other(bytes.into()),
        }
    }
}

#[derive(Debug)]
struct Peer {
    id: PeerId,
    prefix: Prefix,
    payload: Payload,
    is_connected: bool,
    /// When it is asked whether it lives, and its place among all that are.
    due: Nanos,
    in_asked: u32,
    records: Heap<OfPeer>,
    /// How many of them are near.
    near: u32,
    registrations: u32,
}

impl Peer {
    fn weight(&self) -> Weight {
        let payload = self.payload.load();
        Weight {
            prefix: self.prefix,
            load: match self.records.len() {
                0 => 0,
                // Bounded by `Bounds::per_peer`.
                records => records as u32 + payload,
            },
        }
    }

    fn forget(&mut self, slot: RecordSlot, records: &mut Slab<Record>) {
        self.records.remove(slot.index(), records);
        let record = records.get(slot.index());
        let was_registered = record.is_some_and(|record| record.sequence.is_some());
        self.registrations -= u32::from(was_registered);
        if self.registrations == 0 {
            self.payload.envelope = None;
        }
    }
}

/// What a peer said about itself.
#[derive(Debug)]
struct Payload {
    addresses: Box<[Multiaddr]>,
    /// Where it is asked whether it lives.
    own: Box<[Multiaddr]>,
    envelope: Option<Envelopes>,
}

impl Payload {
    fn load(&self) -> u32 {
        let addresses = self.addresses.iter().chain(&self.own);
        let addresses: usize = addresses.map(Multiaddr::len).sum();
        let bytes = addresses + self.envelope.as_ref().map_or(0, Envelopes::len);
        u32::try_from(bytes / BYTES_PER_LOAD).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::limits::LEASE;

    const SECOND: Duration = Duration::from_secs(1);

    fn peer(n: u32) -> PeerId {
        let mut bytes = vec![0x12, 0x20];
        bytes.extend(n.to_be_bytes().repeat(8));
        PeerId::from_bytes(&bytes).unwrap()
    }

    fn key(n: u32) -> Vec<u8> {
        n.to_be_bytes().repeat(8)
    }

    fn network(n: u32) -> Prefix {
        let [_, a, b, c] = n.to_be_bytes();
        Prefix::V4([a, b, c])
    }

    fn address(n: u32) -> Multiaddr {
        format!("/ip4/10.0.0.1/tcp/{n}").parse().unwrap()
    }

    fn rendezvous(envelope: &[u8]) -> Origin {
        Origin::Rendezvous {
            namespace: "client1".into(),
            envelope: envelope.into(),
        }
    }

    fn tight() -> Bounds {
        Bounds {
            records: 100,
            per_prefix: 60,
            per_peer: 30,
            per_key: 10,
        }
    }

    /// A store and a clock that only the test moves.
    struct Scene {
        store: Providers,
        now: Instant,
    }

    impl Scene {
        fn new(bounds: Bounds) -> Self {
            let now = Instant::now();
            let store = Providers::new(peer(u32::MAX), bounds, LEASE, 1, now);
            Self { store, now }
        }

        fn insert(&mut self, new: NewRecord<'_>) -> Result<(), Refused> {
            self.store.insert(new, self.now)
        }

        fn announce(&mut self, from: Prefix, who: u32, what: u32) -> Result<(), Refused> {
            self.insert(NewRecord {
                prefix: from,
                ..record(&key(what), who)
            })
        }

        fn register(&mut self, who: u32, what: u32) {
            self.insert(NewRecord {
                origin: rendezvous(&who.to_be_bytes()),
                ..record(&key(what), who)
            })
            .unwrap();
        }

        fn providers(&self, what: u32) -> Vec<PeerId> {
            let sample = self.sample(what, usize::MAX);
            let mut providers: Vec<_> = sample.into_iter().map(|found| found.peer).collect();
            providers.sort_unstable();
            providers
        }

        fn page_of(&self, form: Form, after: u64) -> Page {
            self.store
                .registrations(None, Some(after), 9, form, self.now)
        }

        fn sample(&self, what: u32, limit: usize) -> Vec<Provider> {
            let sample = self.store.sample(&key(what), limit, self.now);
            sample.near.into_iter().chain(sample.far).collect()
        }

        fn page(
            &self,
            what: Option<u32>,
            after: impl Into<Option<u64>>,
            limit: usize,
        ) -> (Vec<PeerId>, u64) {
            let after = after.into();
            let key = what.map(key);
            let page =
                self.store
                    .registrations(key.as_deref(), after, limit, Form::Standard, self.now);
            let peers = page.registrations.iter().map(|found| found.peer).collect();
            (peers, page.last)
        }
    }

    fn record(key: &[u8], who: u32) -> NewRecord<'_> {
        NewRecord {
            key,
            peer: peer(who),
            prefix: network(0),
            addresses: &[],
            origin: Origin::Kademlia,
            ttl: 90 * SECOND,
            upkeep: Upkeep::Renewed,
        }
    }

    fn check_invariants(store: &Providers) {
        let Providers {
            bounds, records, ..
        } = store;
        assert!(store.weights.total as usize <= bounds.records);
        assert!(store.own.len() <= MAX_ANNOUNCED);
        assert_eq!(store.by_expiry.len(), records.len());
        assert_eq!(store.by_id.len(), records.len());
        assert_eq!(store.by_key.len(), store.keys.len());
        assert_eq!(store.by_peer.len(), store.peers.len());

        let mut registrations = 0;
        for (slot, record) in records.iter() {
            let slot = RecordSlot::new(slot);
            let key = store.keys.get(record.id.key.0).unwrap();
            let peer = store.peers.get(record.id.peer.0).unwrap();
            assert_eq!(store.find(key.bytes.as_slice(), &peer.id), Some(slot));
            if let Some(sequence) = record.sequence {
                assert_eq!(store.by_sequence.get(&sequence), Some(&slot));
                assert!(store.registration(slot, Form::Standard).is_some());
                registrations += 1;
            }
        }
        assert_eq!(store.by_sequence.len(), registrations);
        let soonest = records.iter().map(|(_, record)| record.expires).min();
        let first = store.by_expiry.first().and_then(|slot| records.get(slot));
        assert_eq!(first.map(|record| record.expires), soonest);
        check_keys(store);
        check_peers(store);
    }

    fn check_keys(store: &Providers) {
        let mut held = 0;
        for (slot, key) in store.keys.iter() {
            let records: BTreeMap<_, _> = store.records_of_key(key).collect();
            assert!(records.values().all(|record| record.id.key.0 == slot));
            for standing in [Standing::Near, Standing::Far, Standing::CutOff] {
                let mut ring = key.ring(standing).iter(&store.records);
                assert!(ring.all(|(_, record)| record.standing == standing));
            }
            assert_eq!(records.len(), key.providers());
            assert!((1..=store.bounds.per_key).contains(&records.len()));
            held += records.len();
        }
        assert_eq!(held, store.records.len());
    }

    fn check_peers(store: &Providers) {
        let mut held: BTreeMap<PeerSlot, (usize, u32, Nanos)> = BTreeMap::new();
        for (_, record) in store.records.iter() {
            let none = (0, 0, Nanos::MAX);
            let (records, registrations, soonest) = held.entry(record.id.peer).or_insert(none);
            *records += 1;
            *registrations += u32::from(record.sequence.is_some());
            *soonest = record.expires.min(*soonest);
        }
        let mut weights = Weights::default();
        for (slot, peer) in store.peers.iter() {
            let slot = PeerSlot(slot);
            let first = store.soonest_of(slot).unwrap();
            let soonest = store.records.get(first.index()).unwrap().expires;
            let counts = (peer.records.len(), peer.registrations, soonest);
            assert_eq!(held[&slot], counts);
            assert_eq!(peer.is_connected, store.connected.contains(&peer.id));
            let is_near = |slot: &u32| store.records.get(*slot).unwrap().standing == Standing::Near;
            let near = peer.records.slots().filter(is_near).count();
            assert_eq!(near, peer.near as usize);
            assert!(peer.is_connected || near == 0);
            let is_watched = store.by_due.slots().any(|watched| watched == slot.0);
            assert_eq!(is_watched, peer.due != NEVER);
            assert!(peer.records.len() <= store.bounds.per_peer);
            weights.change(slot, Weight::none(peer.prefix), peer.weight());
            assert!(weights.of(peer.prefix) as usize <= store.bounds.per_prefix);
        }
        assert_eq!(store.weights, weights);
    }

    #[test]
    fn announced_name_is_found_until_its_lease_ends() {
        let mut scene = Scene::new(tight());
        scene.announce(network(0), 1, 1).unwrap();
        scene.now += 90 * SECOND - Duration::from_nanos(1);
        assert_eq!(scene.providers(1), [peer(1)]);
        scene.now += Duration::from_nanos(1);
        assert_eq!(scene.providers(1), [], "before the sweep");
        assert_eq!(scene.store.sweep(scene.now), 1);
        assert_eq!(scene.store.stats().expired, 1);
        check_invariants(&scene.store);
    }

    #[test]
    fn longer_lease_than_allowed_is_cut() {
        let mut scene = Scene::new(tight());
        let new = NewRecord {
            ttl: Duration::MAX,
            ..record(b"name", 1)
        };
        scene.insert(new).unwrap();
        scene.now += 90 * SECOND;
        assert_eq!(scene.store.sample(b"name", 1, scene.now), Sample::default());
    }

    #[test]
    fn withdrawn_name_is_not_found() {
        let mut scene = Scene::new(tight());
        for what in [1, 2, 3] {
            scene.register(1, what);
            scene.announce(network(0), 2, what).unwrap();
        }
        assert!(scene.store.withdraw(&key(1), &peer(1), scene.now));
        assert!(!scene.store.withdraw(&key(1), &peer(1), scene.now));
        assert_eq!(scene.providers(1), [peer(2)]);
        assert_eq!(scene.store.withdraw_all(&peer(1)), 2);
        assert_eq!(scene.providers(3), [peer(2)]);
        assert_eq!(scene.page(None, 0, 9).0, []);
        assert_eq!(scene.store.withdraw_all(&peer(2)), 3);
        assert_eq!(scene.store.stats(), Stats::default());
        check_invariants(&scene.store);
    }

    #[test]
    fn renewal_extends_the_lease_and_never_shortens_it() {
        let mut scene = Scene::new(tight());
        let lease = |ttl| NewRecord {
            ttl,
            ..record(b"name", 1)
        };
        scene.insert(lease(60 * SECOND)).unwrap();
        scene.now += 30 * SECOND;
        scene.insert(lease(SECOND)).unwrap();
        let ends = |scene: &Scene| scene.store.sample(b"name", 1, scene.now).far[0].expires;
        assert_eq!(ends(&scene), scene.now + 30 * SECOND);
        scene.insert(lease(60 * SECOND)).unwrap();
        assert_eq!(ends(&scene), scene.now + 60 * SECOND);
    }

    #[test]
    fn renewal_replaces_the_addresses_but_none_replaces_nothing() {
        let mut scene = Scene::new(tight());
        let [old, new] = [[address(1)], [address(2)]];
        let cases: [(&[Multiaddr], &[Multiaddr]); 3] = [(&old, &old), (&new, &new), (&[], &new)];
        for (announced, found) in cases {
            let announcement = NewRecord {
                addresses: announced,
                ..record(b"name", 1)
            };
            scene.insert(announcement).unwrap();
            assert_eq!(
                scene.store.sample(b"name", 1, scene.now).far[0].addresses,
                found
            );
        }
    }

    #[test]
    fn renewals_without_end_leave_one_item_in_each_index() {
        let mut scene = Scene::new(tight());
        for _ in 0..1_000 {
            scene.now += Duration::from_millis(1);
            scene.register(1, 1);
            scene.announce(network(0), 1, 1).unwrap();
        }
        check_invariants(&scene.store);
        let stats = scene.store.stats();
        assert_eq!((stats.records, stats.registrations), (1, 1));
    }

    #[test]
    fn oversized_records_are_refused_at_their_exact_bounds() {
        let table = [
            (64, 255, 4_096, Ok(())),
            (65, 255, 4_096, Err(Refused::TooLarge)),
            (64, 256, 4_096, Err(Refused::TooLarge)),
            (64, 255, 4_097, Err(Refused::TooLarge)),
        ];
        for (key, namespace, envelope, expected) in table {
            let mut scene = Scene::new(tight());
            let key = vec![0; key];
            let new = NewRecord {
                origin: Origin::Rendezvous {
                    namespace: "n".repeat(namespace).into(),
                    envelope: vec![0; envelope].as_slice().into(),
                },
                ..record(&key, 1)
            };
            assert_eq!(scene.insert(new), expected);
            assert_eq!(scene.store.stats().refused, u64::from(expected.is_err()));
        }
    }

    #[test]
    fn addresses_beyond_the_bounds_are_dropped() {
        let mut scene = Scene::new(tight());
        let long: Multiaddr = format!("/dns/{}/tcp/1", "d".repeat(256)).parse().unwrap();
        let mut addresses = vec![long];
        addresses.extend((1..20).map(address));
        let new = NewRecord {
            addresses: &addresses,
            ..record(b"name", 1)
        };
        scene.insert(new).unwrap();
        let found = scene.store.sample(b"name", 1, scene.now);
        assert_eq!(found.far[0].addresses, addresses[1..9]);
    }

    #[test]
    fn peer_announces_up_to_its_bound() {
        let mut scene = Scene::new(tight());
        for what in 0..30 {
            scene.announce(network(0), 1, what).unwrap();
        }
        assert_eq!(scene.announce(network(0), 1, 30), Err(Refused::PeerFull));
        assert_eq!(scene.announce(network(0), 1, 29), Ok(()), "a renewal");
        scene.store.withdraw(&key(0), &peer(1), scene.now);
        assert_eq!(scene.announce(network(0), 1, 30), Ok(()));
    }

    #[test]
    fn flood_does_not_keep_an_honest_peer_out() {
        // Flooding peers, networks they come from, whether the honest peer shares their first one.
        let table = [
            (3, 1, true),
            (4, 2, true),
            (4, 2, false),
            (50, 50, false),
            (50, 50, true),
            (20, 1, true),
            // So many peers that each holds a single record: told apart by their network only.
            (1_000, 2, false),
            (1_000, 20, false),
        ];
        for (flooders, networks, shared) in table {
            let case = format!("{flooders} flooders, {networks} networks, shared {shared}");
            let mut scene = Scene::new(tight());
            for what in 0..3_000 {
                let who = what % flooders;
                let _ = scene.announce(network(who % networks), who, 10_000 + what);
            }
            let home = if shared { network(0) } else { network(999) };
            scene.announce(home, 99_999, 0).expect(&case);
            assert_eq!(scene.providers(0), [peer(99_999)], "{case}");
            for what in 0..3_000 {
                let who = what % flooders;
                let _ = scene.announce(network(who % networks), who, 20_000 + what);
            }
            assert_eq!(scene.providers(0), [peer(99_999)], "{case}: still there");
            check_invariants(&scene.store);
        }
    }

    #[test]
    fn equals_do_not_push_each_other_out() {
        let mut scene = Scene::new(tight());
        for who in 0..100 {
            scene.announce(network(who % 2), who, who).unwrap();
        }
        assert_eq!(scene.announce(network(0), 100, 100), Err(Refused::Full));
        assert_eq!(scene.announce(network(0), 1, 100), Err(Refused::Full));
        assert_eq!(scene.store.stats().evicted, 0);
        assert_eq!(scene.announce(network(0), 0, 0), Ok(()), "a renewal");
    }

    #[test]
    fn evicted_is_what_the_heaviest_peer_renewed_least_recently() {
        let mut scene = Scene::new(tight());
        for what in 0..60 {
            scene.now += SECOND;
            scene.announce(network(0), what % 2, what).unwrap();
        }
        scene.announce(network(0), 1, 1).unwrap();
        scene.announce(network(0), 0, 0).unwrap();
        scene.announce(network(0), 2, 100).unwrap();
        assert_eq!(scene.providers(3), []);
        assert_eq!(scene.store.stats().evicted, 1);
    }

    #[test]
    fn large_payload_weighs_like_records() {
        let mut scene = Scene::new(tight());
        let bulky = |scene: &mut Scene, who| {
            scene.insert(NewRecord {
                origin: rendezvous(&[0; 4_096]),
                ..record(&key(who), who)
            })
        };
        // Each weighs 1 + 4,096 / 512 = 9 of the 60 that one network may take.
        for who in 0..6 {
            bulky(&mut scene, who).unwrap();
        }
        assert_eq!(bulky(&mut scene, 6), Err(Refused::Full));
        for who in 10..20 {
            scene.announce(network(0), who, who).unwrap();
        }
        assert_eq!(scene.store.stats().evicted, 1);
        check_invariants(&scene.store);
    }

    #[test]
    fn renewal_keeps_its_small_envelope_when_the_larger_has_no_room() {
        let mut scene = Scene::new(tight());
        scene.register(0, 0);
        for who in 1..60 {
            scene.announce(network(0), who, who).unwrap();
        }
        let outcome = scene.insert(NewRecord {
            origin: rendezvous(&[0; 4_096]),
            ..record(&key(0), 0)
        });
        assert_eq!(outcome, Ok(()));
        let page = scene.page_of(Form::Standard, 1);
        assert_eq!(page.registrations[0].envelope.len(), 4);
        check_invariants(&scene.store);
    }

    #[test]
    fn peer_that_moves_is_counted_in_its_new_network_if_there_is_room() {
        let mut scene = Scene::new(tight());
        scene.announce(network(1), 1, 1).unwrap();
        scene.announce(network(2), 1, 1).unwrap();
        assert_eq!(scene.store.weights.of(network(1)), 0);
        assert_eq!(scene.store.weights.of(network(2)), 1);
        for what in 0..60 {
            scene.announce(network(3), 2 + what % 2, what).unwrap();
        }
        scene.announce(network(3), 1, 1).unwrap();
        assert_eq!(scene.store.weights.of(network(2)), 1);
        check_invariants(&scene.store);
    }

    #[test]
    fn full_key_takes_newcomers_from_less_crowded_networks() {
        let mut scene = Scene::new(tight());
        for who in 0..10 {
            scene.announce(network(0), who, 1).unwrap();
        }
        for who in 10..12 {
            scene.announce(network(1), who, 1).unwrap();
        }
        assert_eq!(scene.announce(network(0), 12, 1), Err(Refused::KeyFull));
        let found = scene.providers(1);
        assert_eq!(found.len(), 10);
        assert!([10, 11].iter().all(|&who| found.contains(&peer(who))));
        for who in 13..99 {
            let _ = scene.announce(network(1), who, 1);
        }
        let of_first = (0..10).filter(|&who| scene.providers(1).contains(&peer(who)));
        assert_eq!(of_first.count(), 5, "two networks halve a key");
        check_invariants(&scene.store);
    }

    #[test]
    fn full_key_of_equal_networks_stays_as_it_is() {
        let mut scene = Scene::new(tight());
        for who in 0..10 {
            scene.announce(network(who), who, 1).unwrap();
        }
        assert_eq!(scene.announce(network(10), 10, 1), Err(Refused::KeyFull));
    }

    #[test]
    fn sample_returns_everyone_in_turn() {
        let mut scene = Scene::new(Bounds::default());
        for who in 0..95 {
            scene.announce(network(0), who, 1).unwrap();
            scene.announce(network(0), who, 2).unwrap();
        }
        let mut seen = BTreeSet::new();
        for _ in 0..5 {
            let sample = scene.sample(1, 20);
            assert_eq!(sample.len(), 20);
            seen.extend(sample.into_iter().map(|found| found.peer));
            // Another key in between does not disturb the turn.
            scene.sample(2, 7);
        }
        assert_eq!(seen.len(), 95);
        assert_eq!(scene.providers(1).len(), 95, "each once when all fit");
        assert_eq!(scene.sample(1, 0), []);
        let unknown = scene.store.sample(b"unknown", 20, scene.now);
        assert_eq!(unknown, Sample::default());
    }

    fn peers(found: &[Provider]) -> Vec<PeerId> {
        found.iter().map(|found| found.peer).collect()
    }

    #[test]
    fn who_is_connected_is_named_first_and_who_was_cut_off_last() {
        let mut scene = Scene::new(Bounds::default());
        let (live, resting, crowd) = (1, 2, 100..190);
        for who in crowd.clone().chain([live, resting]) {
            scene.store.on_connected(peer(who));
            scene.announce(network(0), who, 1).unwrap();
        }
        for who in crowd.clone() {
            scene.store.on_disconnected(&peer(who), Parting::CutOff);
        }
        scene.store.on_disconnected(&peer(resting), Parting::AtRest);
        check_invariants(&scene.store);
        let mut seen = BTreeSet::new();
        for _ in 0..16 {
            let sample = scene.store.sample(&key(1), 20, scene.now);
            assert_eq!(peers(&sample.near), [peer(live)]);
            assert_eq!(sample.far[0].peer, peer(resting));
            seen.extend(peers(&sample.far[1..]));
        }
        assert_eq!(seen.len(), crowd.count(), "the others in turn");
        // Who is heard of again is named with the living.
        scene.store.on_connected(peer(150));
        assert_eq!(scene.store.sample(&key(1), 9, scene.now).near.len(), 1);
        scene.announce(network(0), 150, 1).unwrap();
        assert_eq!(scene.store.sample(&key(1), 9, scene.now).near.len(), 2);
        check_invariants(&scene.store);
    }

    #[test]
    fn who_was_cut_off_makes_room_in_a_full_key() {
        let mut scene = Scene::new(tight());
        for who in 0..10 {
            scene.store.on_connected(peer(who));
            scene.announce(network(0), who, 1).unwrap();
        }
        assert_eq!(scene.announce(network(0), 10, 1), Err(Refused::KeyFull));
        scene.store.on_disconnected(&peer(3), Parting::CutOff);
        assert_eq!(scene.announce(network(0), 10, 1), Ok(()));
        assert!(!scene.providers(1).contains(&peer(3)));
        assert_eq!(scene.announce(network(0), 11, 1), Err(Refused::KeyFull));
        check_invariants(&scene.store);
    }

    #[test]
    fn discovery_of_a_crowd_begins_with_who_is_connected_and_misses_nobody() {
        let mut scene = Scene::new(Bounds::default());
        for who in 0..50 {
            scene.register(who, 1);
        }
        scene.store.on_connected(peer(30));
        scene.register(30, 1);
        let (first, cookie) = scene.page(Some(1), None, 20);
        assert_eq!((first[0], first.len(), cookie), (peer(30), 20, 0));
        let (mut all, mut cookie) = (BTreeSet::new(), cookie);
        loop {
            let (page, next) = scene.page(Some(1), cookie, 20);
            if page.is_empty() {
                break;
            }
            all.extend(page);
            cookie = next;
        }
        assert_eq!(all.len(), 50);
        scene.register(31, 1);
        assert_eq!(scene.page(Some(1), cookie, 20).0, [peer(31)]);
    }

    #[test]
    fn discovery_returns_registrations_only_and_goes_on_after_the_cookie() {
        let mut scene = Scene::new(tight());
        scene.register(1, 1);
        scene.register(2, 1);
        scene.announce(network(0), 3, 1).unwrap();
        scene.register(4, 1);
        scene.register(5, 2);
        assert_eq!(scene.page(Some(1), 0, 2), (vec![peer(1), peer(2)], 2));
        assert_eq!(scene.page(Some(1), 2, 2), (vec![peer(4)], 3));
        assert_eq!(scene.page(Some(1), 3, 2), (vec![], 3));
        assert_eq!(scene.page(None, 2, 9), (vec![peer(4), peer(5)], 4));
        scene.register(1, 1);
        assert_eq!(scene.page(Some(1), 3, 2), (vec![peer(1)], 5));
        let foreign = scene.page(Some(1), 1_000, 9);
        assert_eq!(foreign, (vec![peer(2), peer(4), peer(1)], 5));
        scene.now += 90 * SECOND;
        assert_eq!(scene.page(Some(1), 0, 9), (vec![], 0), "expired");
        assert_eq!(scene.page(None, 0, 9), (vec![], 0), "expired");
    }

    #[test]
    fn registration_carries_namespace_envelope_and_granted_lease() {
        let mut scene = Scene::new(tight());
        scene.register(1, 1);
        scene.now += 30 * SECOND;
        scene.announce(network(0), 1, 1).unwrap();
        let page = scene.page_of(Form::Standard, 0);
        let expected = Registration {
            namespace: "client1".into(),
            peer: peer(1),
            envelope: 1_u32.to_be_bytes().as_slice().into(),
            ttl: 90 * SECOND,
            expires: scene.now + 90 * SECOND,
            sequence: 1,
        };
        assert_eq!(page.registrations, [expected]);
    }

    #[test]
    fn own_names_stand_apart_from_a_flood_and_within_their_bound() {
        let mut scene = Scene::new(tight());
        let local = peer(u32::MAX);
        let own = |n| ProviderRecord::new(key(n), local, vec![]);
        for n in 1..=MAX_ANNOUNCED as u32 {
            scene.store.add_provider(own(n), scene.now).unwrap();
        }
        scene.store.add_provider(own(2), scene.now).unwrap();
        assert!(scene.store.add_provider(own(0), scene.now).is_err());
        for who in 0..500 {
            let _ = scene.announce(network(who), who, 1);
        }
        assert!(scene.store.own(&key(1)).is_some());
        assert_eq!(scene.providers(1).len(), 10);
        assert_eq!(scene.store.provided().count(), MAX_ANNOUNCED);
        scene.store.remove_provider(&key(1).into(), &local);
        assert!(scene.store.own(&key(1)).is_none());
        assert_eq!(scene.store.stats().own, MAX_ANNOUNCED as u64 - 1);
    }

    #[test]
    fn sweep_and_insert_drop_the_expired_in_small_portions() {
        let mut scene = Scene::new(Bounds::default());
        for what in 0..3_000 {
            scene.announce(network(0), 1, what).unwrap();
        }
        scene.now += 91 * SECOND;
        assert_eq!(scene.store.sweep(scene.now), 1_024);
        scene.announce(network(0), 1, 9_999).unwrap();
        assert_eq!(scene.store.sweep(scene.now), 1_024);
        assert_eq!(scene.store.sweep(scene.now), 3_000 - 2 * 1_024 - 4);
        assert_eq!(scene.store.stats().records, 1);
        check_invariants(&scene.store);
    }

    #[test]
    fn million_inserts_stay_within_the_bounds() {
        let bounds = Bounds {
            records: 2_000,
            per_prefix: 1_000,
            per_peer: 200,
            per_key: 50,
        };
        let mut scene = Scene::new(bounds);
        let peers: Vec<_> = (0..5_000).map(peer).collect();
        let keys: Vec<_> = (0..7_919).map(key).collect();
        let template = record(&[], 0);
        for n in 0..1_000_000_u32 {
            let noise = n.wrapping_mul(2_654_435_761) >> 8;
            let (who, what) = (noise % 5_000, noise % 7_919);
            let _ = scene.insert(NewRecord {
                peer: peers[who as usize],
                key: &keys[what as usize],
                prefix: network(who % 40),
                ..template.clone()
            });
            if n % 1_000 == 0 {
                scene.now += SECOND;
            }
            if n % 250_000 == 0 {
                check_invariants(&scene.store);
            }
        }
        check_invariants(&scene.store);
        let slots = scene.store.keys.slots() + scene.store.peers.slots();
        assert!(slots <= 2 * 2_001, "{slots} slots");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert {
            who: u32,
            what: u32,
            from: u32,
            envelope: Option<usize>,
            seconds: u32,
        },
        Withdraw(u32, u32),
        WithdrawAll(u32),
        Connect(u32),
        Disconnect(u32, Parting),
        Wait(u32),
        Sweep,
    }

    fn step() -> impl Strategy<Value = Step> {
        let envelope = prop::option::of(prop_oneof![Just(4_usize), 500_usize..2_000]);
        let insert = (0..9_u32, 0..7_u32, 0..3_u32, envelope, 1..90_u32).prop_map(
            |(who, what, from, envelope, seconds)| Step::Insert {
                who,
                what,
                from,
                envelope,
                seconds,
            },
        );
        prop_oneof![
            12 => insert,
            2 => (0..9_u32, 0..7_u32).prop_map(|(who, what)| Step::Withdraw(who, what)),
            1 => (0..9_u32).prop_map(Step::WithdrawAll),
            2 => (0..9_u32).prop_map(Step::Connect),
            1 => (0..9_u32).prop_map(|who| Step::Disconnect(who, Parting::AtRest)),
            1 => (0..9_u32).prop_map(|who| Step::Disconnect(who, Parting::CutOff)),
            2 => (0..30_u32).prop_map(Step::Wait),
            1 => Just(Step::Sweep),
        ]
    }

    /// What was accepted and has neither ended nor been withdrawn, with the end of its lease.
    type Model = BTreeMap<(u32, u32), Instant>;

    fn found(scene: &Scene) -> BTreeSet<(u32, u32)> {
        let who_of = |id: PeerId| (0..9).find(|&who| peer(who) == id).unwrap();
        let of = |what| scene.providers(what).into_iter().map(move |id| (id, what));
        let all = (0..7).flat_map(of);
        all.map(|(id, what)| (who_of(id), what)).collect()
    }

    /// Nobody who holds clearly more than the refused one would have, in its network or as one.
    fn check_refusal(store: &Providers, who: u32, from: Prefix) {
        let known = store.peer(&peer(who));
        let refused = known.map_or(Weight::none(from), |(_, peer)| peer.weight());
        let neighbour = store.weights.heaviest_peer(refused.prefix);
        assert!(neighbour.is_none_or(|(_, load)| load <= refused.load + 1));
        let network = store.weights.of(refused.prefix);
        let heaviest = store.weights.heaviest_prefix().unwrap();
        let network_is_full = network as usize >= store.bounds.per_prefix;
        assert!(network_is_full || heaviest.load <= network + 1);
    }

    fn apply(scene: &mut Scene, model: &mut Model, step: &Step) {
        match *step {
            Step::Insert {
                who,
                what,
                from,
                envelope,
                seconds,
            } => {
                let outcome = scene.insert(NewRecord {
                    prefix: network(from),
                    origin: envelope.map_or(Origin::Kademlia, |size| rendezvous(&vec![0; size])),
                    ttl: seconds * SECOND,
                    ..record(&key(what), who)
                });
                let expires = scene.now + seconds * SECOND;
                match model.get_mut(&(who, what)) {
                    Some(held) => {
                        assert_eq!(outcome, Ok(()), "a renewal was refused");
                        *held = expires.max(*held);
                    }
                    None if outcome.is_ok() => {
                        model.insert((who, what), expires);
                    }
                    None if outcome == Err(Refused::Full) && envelope.is_none() => {
                        check_refusal(&scene.store, who, network(from));
                    }
                    None => {}
                }
            }
            Step::Withdraw(who, what) => {
                scene.store.drop_record(&key(what), &peer(who));
                model.remove(&(who, what));
            }
            Step::WithdrawAll(who) => {
                scene.store.withdraw_all(&peer(who));
                model.retain(|(of, _), _| *of != who);
            }
            Step::Connect(who) => scene.store.on_connected(peer(who)),
            Step::Disconnect(who, parting) => scene.store.on_disconnected(&peer(who), parting),
            Step::Wait(seconds) => scene.now += seconds * SECOND,
            Step::Sweep => {
                scene.store.sweep(scene.now);
            }
        }
        model.retain(|_, expires| *expires > scene.now);
    }

    proptest! {
        #[test]
        fn store_agrees_with_a_naive_table(steps in prop::collection::vec(step(), 1..200)) {
            let bounds = Bounds {
                records: 14,
                per_prefix: 9,
                per_peer: 5,
                per_key: 4,
            };
            let mut scene = Scene::new(bounds);
            let mut model = Model::new();
            for step in &steps {
                let evicted = scene.store.stats().evicted;
                apply(&mut scene, &mut model, step);
                check_invariants(&scene.store);

                let found = found(&scene);
                let expected: BTreeSet<_> = model.keys().copied().collect();
                prop_assert!(found.is_subset(&expected), "{found:?} beyond {expected:?}");
                let missing = (expected.len() - found.len()) as u64;
                let evicted = scene.store.stats().evicted - evicted;
                prop_assert!(missing <= evicted, "{missing} lost, {evicted} evicted");
                model.retain(|record, _| found.contains(record));
            }
        }
    }
}
