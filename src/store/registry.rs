//! What a grape keeps for others, shared by the loop that owns the Swarm and by what serves others
//! beside it.

use std::borrow::Cow;
use std::collections::HashMap;
use std::iter;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use std::vec;

use libp2p::kad::store::{self, RecordStore};
use libp2p::kad::{ProviderRecord, Record, RecordKey};
use libp2p::{Multiaddr, PeerId};
use tokio::sync::Notify;

use super::batches;
use super::names::Rates;
use super::providers::KADEMLIA_ANSWER;
use super::values::{NotKept, Values};
use super::workers::Workers;
use super::{Prefix, Providers};
use crate::limits::{Bounds, MAX_ADDRESSES};
use crate::name::SHA2_256;
use crate::proto::addresses;
use crate::proto::bep44::{DecodeError, Value};
use crate::proto::wire::Digest;

/// Why a value is not stored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotStored {
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error("the value belongs under another key")]
    OtherKey,
    #[error(transparent)]
    NotKept(#[from] NotKept),
}

/// The tables of a grape. Each lock is held for one operation, never while something waits, and no
/// two at once.
#[derive(Debug)]
pub(crate) struct Registry {
    local: PeerId,
    providers: Mutex<Providers>,
    workers: Mutex<Workers>,
    values: Mutex<Values>,
    rates: Mutex<Rates>,
    batch_rates: Mutex<batches::Rates>,
    /// Where this node and the grapes of its routing table can be dialled.
    places: Mutex<HashMap<PeerId, Vec<Multiaddr>>>,
    /// How many grapes this one knows, itself included.
    grapes: AtomicU64,
    /// This grape's workers have changed.
    changed: Notify,
}

impl Registry {
    pub(crate) fn new(local: PeerId, bounds: Bounds, lease: Duration, now: Instant) -> Arc<Self> {
        // A rendezvous cookie from before a restart then still means "what came since".
        let first_sequence = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(1, |since| since.as_micros() as u64);
        let providers = Providers::new(local, bounds, lease, first_sequence, now);
        Arc::new(Self {
            local,
            providers: Mutex::new(providers),
            workers: Mutex::new(Workers::new(now)),
            values: Mutex::new(Values::new(now)),
            rates: Mutex::default(),
            batch_rates: Mutex::default(),
            places: Mutex::default(),
            grapes: AtomicU64::new(1),
            changed: Notify::new(),
        })
    }

    /// The provider records.
    pub(crate) fn providers(&self) -> MutexGuard<'_, Providers> {
        self.providers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The workers.
    pub(crate) fn workers(&self) -> MutexGuard<'_, Workers> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The values.
    pub(crate) fn values(&self) -> MutexGuard<'_, Values> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn rates(&self) -> MutexGuard<'_, Rates> {
        self.rates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn batch_rates(&self) -> MutexGuard<'_, batches::Rates> {
        let rates = self.batch_rates.lock();
        rates.unwrap_or_else(PoisonError::into_inner)
    }

    /// How many grapes this one knows, itself included.
    pub(super) fn grapes(&self) -> u64 {
        self.grapes.load(Ordering::Relaxed)
    }

    /// This grape knows so many others.
    pub(crate) fn on_grapes(&self, others: usize) {
        self.grapes.store(others as u64 + 1, Ordering::Relaxed);
    }

    /// This node.
    pub(super) fn local(&self) -> PeerId {
        self.local
    }

    /// This node can be dialled at these addresses.
    pub(crate) fn on_addresses(&self, addresses: &[Multiaddr]) {
        let addresses = addresses::plain(&self.local, addresses).take(MAX_ADDRESSES);
        self.all_places().insert(self.local, addresses.collect());
    }

    /// The routing table holds these grapes, at these addresses.
    pub(crate) fn on_routed(&self, grapes: impl IntoIterator<Item = (PeerId, Vec<Multiaddr>)>) {
        let mut places = self.all_places();
        places.retain(|peer, _| *peer == self.local);
        for (peer, addresses) in grapes {
            let addresses = addresses::plain(&peer, &addresses).take(MAX_ADDRESSES);
            let addresses = addresses.collect();
            places.insert(peer, addresses);
        }
    }

    /// Where this node or a grape of the routing table can be dialled; none of anybody else.
    pub(super) fn places(&self, peer: &PeerId) -> Vec<Multiaddr> {
        self.all_places().get(peer).cloned().unwrap_or_default()
    }

    fn all_places(&self) -> MutexGuard<'_, HashMap<PeerId, Vec<Multiaddr>>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a value that came from a host of that prefix to be stored under that key, if it is
    /// what it claims to be.
    pub(crate) fn put(
        &self,
        key: &[u8],
        value: &[u8],
        prefix: Prefix,
        now: Instant,
    ) -> Result<(), NotStored> {
        let value = Value::decode(value)?;
        if value.target() != key {
            return Err(NotStored::OtherKey);
        }
        Ok(self.values().insert(&value, prefix, now)?)
    }

    /// Returns when this grape's workers have changed since the last time.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Other grapes have something to be told.
    pub(crate) fn on_changed(&self) {
        self.changed.notify_one();
    }

    /// Drops what has expired.
    pub(crate) fn sweep(&self, now: Instant) {
        self.providers().sweep(now);
        self.values().sweep(now);
        self.rates().sweep(now);
        self.batch_rates().sweep(now);
        if self.workers().sweep(now) {
            self.on_changed();
        }
    }

    /// The grapes that carry requests to workers of the service behind a key of Kademlia's: to a
    /// node of libp2p they are its providers.
    pub(super) fn carriers(&self, key: &RecordKey, limit: usize) -> Vec<ProviderRecord> {
        let digest = key.as_ref().strip_prefix(&SHA2_256);
        let Some(digest) = digest.and_then(|digest| <&Digest>::try_from(digest).ok()) else {
            return Vec::new();
        };
        let now = Instant::now();
        let (own, others) = {
            let workers = self.workers();
            let own = workers.has_own(digest, now).then_some(self.local);
            (own, workers.grapes(digest, limit, now))
        };
        own.into_iter()
            .chain(others)
            .take(limit)
            .map(|provider| ProviderRecord {
                key: key.clone(),
                addresses: self.places(&provider),
                provider,
                expires: None,
            })
            .collect()
    }
}

/// The registry as Kademlia sees it.
#[derive(Clone, Debug)]
pub(crate) struct Records(pub(crate) Arc<Registry>);

impl RecordStore for Records {
    type RecordsIter<'a> = iter::Empty<Cow<'a, Record>>;
    type ProvidedIter<'a> = vec::IntoIter<Cow<'a, ProviderRecord>>;

    fn get(&self, key: &RecordKey) -> Option<Cow<'_, Record>> {
        let values = self.0.values();
        let kept = values.get(key.as_ref(), Instant::now())?;
        Some(Cow::Owned(Record::new(key.clone(), kept.bytes)))
    }

    /// Keeps a value of this node's own users. Anybody else's comes up as an event and is kept by
    /// the prefix of the connection.
    fn put(&mut self, record: Record) -> store::Result<()> {
        let (key, now) = (record.key.as_ref(), Instant::now());
        let stored = self.0.put(key, &record.value, Prefix::Local, now);
        stored.map_err(|_| store::Error::MaxRecords)
    }

    fn remove(&mut self, _: &RecordKey) {}

    fn records(&self) -> Self::RecordsIter<'_> {
        iter::empty()
    }

    fn add_provider(&mut self, record: ProviderRecord) -> store::Result<()> {
        self.0.providers().add_provider(record, Instant::now())
    }

    /// Providers that announced themselves, and grapes whose workers did.
    fn providers(&self, key: &RecordKey) -> Vec<ProviderRecord> {
        let mut providers = self.0.providers().providers(key, Instant::now());
        let room = KADEMLIA_ANSWER.saturating_sub(providers.len());
        for carrier in self.0.carriers(key, room.max(1)) {
            // In a large network a grape provides the names that it carries requests for.
            let is_known = |known: &ProviderRecord| known.provider == carrier.provider;
            if !providers.iter().any(is_known) {
                providers.push(carrier);
            }
        }
        for own in providers
            .iter_mut()
            .filter(|own| own.provider == self.0.local)
        {
            // Kademlia would name each address twice: it listens there, and tells others of it.
            own.addresses = self.0.places(&own.provider);
        }
        providers
    }

    fn provided(&self) -> Self::ProvidedIter<'_> {
        let provided: Vec<_> = self.0.providers().provided().map(Cow::Owned).collect();
        provided.into_iter()
    }

    fn remove_provider(&mut self, key: &RecordKey, provider: &PeerId) {
        self.0.providers().remove_provider(key, provider);
    }
}
