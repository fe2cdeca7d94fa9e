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
use super::names::{Claim, Rates};
use super::providers::Provider;
use super::sessions::Sessions;
use super::values::{NotKept, Values};
use super::workers::Workers;
use super::{Prefix, Providers};
use crate::limits::{Bounds, MAX_ADDRESSES};
use crate::name::SHA2_256;
use crate::proto::addresses;
use crate::proto::bep44::{DecodeError, Value};
use crate::proto::wire::Digest;

/// Providers in one answer of Kademlia, which cuts its answers at the replication factor of 20.
const KADEMLIA_ANSWER: usize = 20;

/// Bytes of one provider's addresses in such an answer: four with an id, or one of the longest. Who
/// asked drops an answer of more than 16 KiB, half of which other grapes may take.
const KADEMLIA_ADDRESSES: usize = 256;

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
    sessions: Mutex<Sessions<Claim>>,
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
            sessions: Mutex::new(Sessions::new(now)),
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

    /// Who of those with one key announces what.
    pub(super) fn sessions(&self) -> MutexGuard<'_, Sessions<Claim>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.sessions().sweep(now);
        if self.workers().sweep(now) {
            self.on_changed();
        }
    }

    /// Up to `limit` providers of a key of Kademlia's, those first that are worth asking most: this
    /// node, who is connected, the grapes that carry requests to workers, and all others. `name` is the
    /// name behind it, if that is known.
    pub(super) fn providers_of(
        &self,
        key: &[u8],
        name: Option<&Arc<str>>,
        limit: usize,
        now: Instant,
    ) -> Vec<Provider> {
        let carriers = self.carriers(key, limit, now);
        let (own, lease, mut sample) = {
            let mut store = self.providers();
            let own = store.own(key).map(|own| own.provider);
            let sample = store.sample(key, limit, now);
            if let Some(name) = name.filter(|_| !sample.is_named) {
                // Who announced no more than the key can then be asked whether it serves the name.
                store.name(key, name);
            }
            (own, store.lease(), sample)
        };
        // However many are connected, workers are found as well.
        let rest = usize::from(!carriers.is_empty()) + usize::from(own.is_some());
        sample.near.truncate(limit.saturating_sub(rest));
        let place = |peer| Provider {
            peer,
            addresses: self.places(&peer),
            expires: now + lease,
        };
        // Most often there is one.
        let mut providers: Vec<_> = own.map(place).into_iter().chain(sample.near).collect();
        for carrier in carriers {
            // In a large network a grape provides the names that it carries requests for.
            if !providers.iter().any(|known| known.peer == carrier) {
                providers.push(place(carrier));
            }
        }
        for other in sample.far {
            if !providers.iter().any(|known| known.peer == other.peer) {
                providers.push(other);
            }
        }
        providers.truncate(limit);
        providers
    }

    /// The grapes that carry requests to workers of the service behind a key of Kademlia's: to a
    /// node of libp2p they are its providers.
    fn carriers(&self, key: &[u8], limit: usize, now: Instant) -> Vec<PeerId> {
        let digest = key.strip_prefix(&SHA2_256);
        let Some(digest) = digest.and_then(|digest| <&Digest>::try_from(digest).ok()) else {
            return Vec::new();
        };
        let workers = self.workers();
        let own = workers.has_own(digest, now).then_some(self.local);
        let others = workers.grapes(digest, limit, now);
        own.into_iter().chain(others).take(limit).collect()
    }
}

/// The first of a provider's addresses, as many as an answer of Kademlia has room for.
fn those_that_fit(mut addresses: Vec<Multiaddr>) -> Vec<Multiaddr> {
    let ends = addresses.iter().scan(0, |end, address| {
        *end += address.len();
        Some(*end)
    });
    let count = ends.take_while(|end| *end <= KADEMLIA_ADDRESSES).count();
    addresses.truncate(count);
    addresses
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
        let providers = self
            .0
            .providers_of(key.as_ref(), None, KADEMLIA_ANSWER, Instant::now());
        let record = |provider: Provider| ProviderRecord {
            key: key.clone(),
            provider: provider.peer,
            expires: Some(provider.expires),
            addresses: those_that_fit(provider.addresses),
        };
        providers.into_iter().map(record).collect()
    }

    fn provided(&self) -> Self::ProvidedIter<'_> {
        let provided: Vec<_> = self.0.providers().provided().map(Cow::Owned).collect();
        provided.into_iter()
    }

    fn remove_provider(&mut self, key: &RecordKey, provider: &PeerId) {
        self.0.providers().remove_provider(key, provider);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::LEASE;
    use crate::name::ServiceName;
    use crate::proto::wire::MAX_ADDRESS;
    use crate::store::{NewRecord, Origin, Upkeep};

    struct Scene {
        registry: Arc<Registry>,
        name: ServiceName,
        now: Instant,
    }

    impl Scene {
        fn new() -> Self {
            let now = Instant::now();
            Self {
                registry: Registry::new(PeerId::random(), Bounds::default(), LEASE, now),
                name: "client1".parse().unwrap(),
                now,
            }
        }

        fn key(&self) -> RecordKey {
            RecordKey::new(&self.name.key())
        }

        fn announce(&self, addresses: &[Multiaddr]) -> PeerId {
            let peer = PeerId::random();
            let new = NewRecord {
                key: &self.name.key(),
                peer,
                prefix: Prefix::Local,
                addresses,
                origin: Origin::Kademlia,
                ttl: LEASE,
                upkeep: Upkeep::Renewed,
            };
            self.registry.providers().insert(new, self.now).unwrap();
            peer
        }

        fn found(&self) -> Vec<ProviderRecord> {
            Records(Arc::clone(&self.registry)).providers(&self.key())
        }
    }

    fn address(n: u32) -> Multiaddr {
        format!("/ip4/10.0.0.1/tcp/{n}").parse().unwrap()
    }

    #[test]
    fn an_answer_of_kademlia_has_room_for_every_provider() {
        let scene = Scene::new();
        for _ in 0..30 {
            let long = |n| {
                format!("/dns4/{}.{n}/tcp/1", "d".repeat(245))
                    .parse()
                    .unwrap()
            };
            let addresses: Vec<Multiaddr> = (0..8).map(long).collect();
            assert!(addresses.iter().all(|address| address.len() <= MAX_ADDRESS));
            scene.announce(&addresses);
        }
        let found = scene.found();
        assert_eq!(found.len(), KADEMLIA_ANSWER);
        let addresses = || found.iter().flat_map(|found| &found.addresses);
        assert_eq!(
            addresses().count(),
            KADEMLIA_ANSWER,
            "one of the longest for each"
        );
        assert!(addresses().map(Multiaddr::len).sum::<usize>() < 8 * 1_024);
        // Ordinary ones are all there.
        let ordinary: Vec<_> = (1..9).map(address).collect();
        assert_eq!(those_that_fit(ordinary.clone()), ordinary);
    }

    #[test]
    fn kademlia_finds_what_it_stores_for_others() {
        let scene = Scene::new();
        let mut records = Records(Arc::clone(&scene.registry));
        let provider = PeerId::random();
        let record = ProviderRecord::new(scene.key(), provider, vec![address(1)]);
        records.add_provider(record.clone()).unwrap();
        let found = scene.found();
        assert_eq!(found, [record]);
        assert_eq!(found[0].addresses, [address(1)]);
        assert!(!found[0].is_expired(Instant::now()));
        assert_eq!(records.provided().count(), 0);
        records.remove_provider(&scene.key(), &provider);
        assert_eq!(scene.found(), []);
    }

    #[test]
    fn workers_come_behind_who_is_connected_and_before_who_is_not() {
        let scene = Scene::new();
        let connect = |peer| scene.registry.providers().on_connected(peer);
        let own = ProviderRecord::new(scene.key(), scene.registry.local, vec![]);
        for _ in 0..40 {
            scene.announce(&[]);
        }
        let worker = ([127, 0, 0, 1], 1).into();
        let service = scene.name.digest();
        let mut workers = scene.registry.workers();
        workers
            .announce(&service, worker, LEASE, scene.now)
            .unwrap();
        drop(workers);
        let peers = || -> Vec<_> { scene.found().iter().map(|found| found.provider).collect() };
        assert_eq!(peers()[0], scene.registry.local, "nobody is connected");
        assert_eq!(peers().len(), KADEMLIA_ANSWER);
        for near in 1..=40 {
            let peer = scene.announce(&[]);
            connect(peer);
            // It is heard of over its connection.
            let new = ProviderRecord::new(scene.key(), peer, vec![]);
            scene
                .registry
                .providers()
                .add_provider(new, scene.now)
                .unwrap();
            let at = peers()
                .iter()
                .position(|found| *found == scene.registry.local);
            assert_eq!(at, Some(near.min(KADEMLIA_ANSWER - 1)));
        }
        // What this grape announces itself comes first of all, and once.
        let mut records = Records(Arc::clone(&scene.registry));
        records.add_provider(own).unwrap();
        let local = |found: &&PeerId| **found == scene.registry.local;
        assert_eq!(peers()[0], scene.registry.local);
        assert_eq!(peers().iter().filter(local).count(), 1);
    }
}
