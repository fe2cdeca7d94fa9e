//! The registry of names: what other nodes tell and ask by the RPC, many names in one message.
//!
//! A peer announces itself and nobody else: the connection proves who it is, its signed record where
//! it says that it is, and the host that it connects from is what its records are bounded by. What
//! it sends is bounded in names per second. A message takes the lock for a portion of its names at
//! a time, so that no other user of the table waits for all of it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libp2p::{Multiaddr, PeerId};

use super::sessions::Verdict;
use super::{NewRecord, Origin, Prefix, Registry, Upkeep};
use crate::name::{Key, ServiceName};
use crate::proto::rate::RateLimit;
use crate::proto::rendezvous::{Envelopes, Form, RecordError, SignedPeer};
use crate::proto::wire::{MAX_PROVIDERS, NamesReply, NamesRequest, Provided};

/// The names that one peer announces each second on average, as many as by the other roads, and at
/// once: all it may have. To keep them takes a third of them a renewal, 667 a second.
const NAMES_PER_SECOND: u32 = 2_000;
const NAMES_AT_ONCE: u32 = 22_000;

/// What a signed record that was not seen before counts for: to verify it takes as long as to keep
/// so many names, some 60 us.
const RECORD_COST: usize = 20;

/// The names that one peer looks up each second: 5 % of a core. So many providers in an answer count
/// for one more.
const LOOKUPS_PER_SECOND: u32 = 10_000;
const PROVIDERS_PER_LOOKUP: usize = 8;

/// The names that are handled under one lock: 0.2 ms.
const PORTION: usize = 64;

/// Why a message was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotTaken {
    #[error("more is asked for than one peer may")]
    TooFast,
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("the record is signed by somebody else")]
    Foreign,
    #[error("the record of the legacy form is of another one")]
    NotLegacy,
}

/// How fast each peer may use the registry of names.
#[derive(Debug)]
pub(super) struct Rates {
    announced: RateLimit,
    withdrawn: RateLimit,
    sought: RateLimit,
}

impl Default for Rates {
    fn default() -> Self {
        Self {
            announced: RateLimit::with_burst(NAMES_PER_SECOND, NAMES_AT_ONCE),
            withdrawn: RateLimit::with_burst(NAMES_PER_SECOND, NAMES_AT_ONCE),
            sought: RateLimit::new(LOOKUPS_PER_SECOND),
        }
    }
}

impl Rates {
    pub(super) fn sweep(&mut self, now: Instant) {
        self.announced.sweep(now);
        self.withdrawn.sweep(now);
        self.sought.sweep(now);
    }
}

/// What a peer has proved to have said of itself, and where it is connected from.
#[derive(Clone, Debug)]
pub(super) struct Claim {
    addresses: Vec<Multiaddr>,
    envelope: Envelopes,
    prefix: Prefix,
}

impl Claim {
    /// A record of a name of such a peer's.
    fn record<'a>(
        &'a self,
        peer: PeerId,
        name: &ServiceName,
        key: &'a Key,
        ttl: Duration,
    ) -> NewRecord<'a> {
        NewRecord {
            key,
            peer,
            prefix: self.prefix,
            addresses: &self.addresses,
            origin: Origin::Rendezvous {
                namespace: Arc::clone(name.shared()),
                envelope: self.envelope.clone(),
            },
            ttl,
            upkeep: Upkeep::Renewed,
        }
    }
}

impl Registry {
    /// Takes what a peer tells of its own names, and answers what it asks. `host` is where its
    /// connection comes from.
    pub(crate) fn on_names(
        &self,
        peer: PeerId,
        host: Option<IpAddr>,
        request: &NamesRequest,
        now: Instant,
    ) -> Result<NamesReply, NotTaken> {
        let sought = request.find.len();
        if self.rates().sought.take(peer, sought, now) < sought {
            return Err(NotTaken::TooFast);
        }
        let withdrawn = request.withdraw.len();
        if self.rates().withdrawn.take(peer, withdrawn, now) < withdrawn {
            return Err(NotTaken::TooFast);
        }
        let elsewhere = request
            .session
            .map_or(0, |session| self.hear(peer, session, now));
        self.take_back(peer, request, now);
        let prefix = host.map_or(Prefix::Local, Prefix::from);
        let refused = self.keep(peer, prefix, request, now)?;
        let found: Vec<_> = request
            .find
            .iter()
            .map(|name| self.named(name, now))
            .collect();
        let providers: usize = found.iter().map(Vec::len).sum();
        let more = providers / PROVIDERS_PER_LOOKUP;
        self.rates().sought.take(peer, more, now);
        Ok(NamesReply {
            found,
            refused,
            lease: millis(self.granted()),
            grapes: self.grapes(),
            elsewhere,
        })
    }

    /// Somebody with a peer's key is heard of; returns how many others with it are there.
    fn hear(&self, peer: PeerId, session: u64, now: Instant) -> u64 {
        let is_second = self.sessions().is_second(&peer, session);
        let claim = is_second.then(|| self.claimed(&peer)).flatten();
        let elsewhere = self.sessions().hear(peer, session, claim, now);
        if elsewhere > 0 {
            tracing::debug!(%peer, elsewhere, "several nodes have one key");
        }
        elsewhere
    }

    /// What a peer that has registered something has said of itself.
    fn claimed(&self, peer: &PeerId) -> Option<Claim> {
        let store = self.providers();
        Some(Claim {
            addresses: store.addresses(peer),
            envelope: store.envelope(peer)?,
            prefix: store.prefix(peer)?,
        })
    }

    /// Keeps a peer's names; returns the places of those that are not kept.
    fn keep(
        &self,
        peer: PeerId,
        prefix: Prefix,
        request: &NamesRequest,
        now: Instant,
    ) -> Result<Vec<u64>, NotTaken> {
        let (names, Some(record)) = (&request.announce, &request.record) else {
            return Ok(Vec::new());
        };
        let legacy = request.legacy.as_deref();
        let Some(claim) = self.verify(peer, prefix, record, legacy, now)? else {
            return Ok((0..names.len() as u64).collect());
        };
        let several = request
            .session
            .filter(|_| self.sessions().has_several(&peer));
        if let Some(session) = several {
            self.sessions().claim(&peer, session, claim.clone());
        }
        let admitted = self.rates().announced.take(peer, names.len(), now);
        let ttl = self.granted();
        let mut refused = Vec::new();
        let numbered: Vec<_> = (0..).zip(&names[..admitted]).collect();
        for portion in numbered.chunks(PORTION) {
            let mut held = Vec::new();
            let mut store = self.providers();
            for (number, name) in portion {
                let key = name.key();
                let before = several.and_then(|_| store.held_until(&key, &peer));
                if let Err(error) = store.insert(claim.record(peer, name, &key, ttl), now) {
                    tracing::debug!(%peer, %name, %error, "a name was refused");
                    refused.push(*number);
                } else if let Some(session) = several {
                    held.push((session, key, before));
                }
            }
            drop(store);
            for (session, key, before) in held {
                self.sessions().hold(&peer, session, key, before, now + ttl);
            }
        }
        refused.extend(admitted as u64..names.len() as u64);
        Ok(refused)
    }

    /// Checks a signed record, unless it is the one that the peer sent before; `None` if the peer
    /// sends too many.
    fn verify(
        &self,
        peer: PeerId,
        prefix: Prefix,
        record: &[u8],
        legacy: Option<&[u8]>,
        now: Instant,
    ) -> Result<Option<Claim>, NotTaken> {
        let known = {
            let store = self.providers();
            let envelope = store.envelope(&peer);
            envelope.map(|envelope| (envelope, store.addresses(&peer)))
        };
        let is_known = |(known, _): &(Envelopes, _)| known.are(record, legacy);
        if let Some((envelope, addresses)) = known.filter(is_known) {
            return Ok(Some(Claim {
                addresses,
                envelope,
                prefix,
            }));
        }
        let cost = RECORD_COST * (1 + usize::from(legacy.is_some()));
        if self.rates().announced.take(peer, cost, now) < cost {
            return Ok(None);
        }
        let signed = own(peer, record)?;
        let mut envelope = Envelopes::from(&signed);
        if let Some(legacy) = legacy {
            let legacy = own(peer, legacy)?;
            if (signed.form(), legacy.form()) != (Form::Standard, Form::Legacy) {
                return Err(NotTaken::NotLegacy);
            }
            envelope = envelope.and(&legacy);
        }
        Ok(Some(Claim {
            addresses: signed.addresses().to_vec(),
            envelope,
            prefix,
        }))
    }

    /// Drops a peer's names, but for those that another session of it holds.
    fn take_back(&self, peer: PeerId, request: &NamesRequest, now: Instant) {
        let several = request
            .session
            .filter(|_| self.sessions().has_several(&peer));
        for portion in request.withdraw.chunks(PORTION) {
            if let Some(session) = several {
                portion
                    .iter()
                    .for_each(|name| self.take_back_of(peer, session, name, now));
                continue;
            }
            let mut store = self.providers();
            for name in portion {
                store.withdraw(&name.key(), &peer, now);
            }
        }
    }

    /// Drops a name of one session of a peer's; what another one holds is from then on where that one is.
    fn take_back_of(&self, peer: PeerId, session: u64, name: &ServiceName, now: Instant) {
        let key = name.key();
        let until = self.providers().held_until(&key, &peer);
        let verdict = self.sessions().take_back(&peer, session, &key, until, now);
        let mut store = self.providers();
        match verdict {
            Verdict::Gone => {
                store.withdraw(&key, &peer, now);
            }
            Verdict::Held(claim, until) => {
                let ttl = until.saturating_duration_since(now);
                if let Err(error) = store.insert(claim.record(peer, name, &key, ttl), now) {
                    tracing::debug!(%peer, %name, %error, "a name is not kept for another session");
                }
            }
        }
    }

    /// The providers of a name, this grape and those that carry requests for it included.
    fn named(&self, name: &ServiceName, now: Instant) -> Vec<Provided> {
        let providers = self.providers_of(&name.key(), Some(name.shared()), MAX_PROVIDERS, now);
        let provided = providers.into_iter().map(|provider| {
            let lease = millis(provider.expires.saturating_duration_since(now));
            Provided::new(provider.peer, provider.addresses, lease)
        });
        Provided::that_fit(provided)
    }

    fn granted(&self) -> Duration {
        self.providers().lease()
    }
}

/// Reads a record that must be the sender's own.
fn own(peer: PeerId, record: &[u8]) -> Result<SignedPeer, NotTaken> {
    let signed = SignedPeer::from_envelope(record.to_vec())?;
    match signed.peer() == peer {
        true => Ok(signed),
        false => Err(NotTaken::Foreign),
    }
}

fn millis(lease: Duration) -> u64 {
    u64::try_from(lease.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use libp2p::identity::Keypair;
    use libp2p::kad::RecordKey;

    use super::*;
    use crate::limits::{Bounds, LEASE};
    use crate::store::Records;

    struct Scene {
        registry: Arc<Registry>,
        keypair: Keypair,
        /// What the peer says of itself; a later one would differ by its time.
        record: Vec<u8>,
        now: Instant,
    }

    impl Scene {
        fn new() -> Self {
            let (now, keypair) = (Instant::now(), Keypair::generate_ed25519());
            Self {
                registry: Registry::new(PeerId::random(), Bounds::default(), LEASE, now),
                record: signed(&keypair, 1),
                keypair,
                now,
            }
        }

        fn peer(&self) -> PeerId {
            self.keypair.public().to_peer_id()
        }

        fn ask(&self, request: &NamesRequest) -> Result<NamesReply, NotTaken> {
            let host = Some([127, 0, 0, 1].into());
            self.registry.on_names(self.peer(), host, request, self.now)
        }

        fn announce(&self, names: &[ServiceName]) -> NamesReply {
            let request = NamesRequest {
                announce: names.to_vec(),
                record: Some(self.record.clone()),
                ..NamesRequest::default()
            };
            self.ask(&request).unwrap()
        }

        fn withdraw(&self, names: &[ServiceName]) {
            let request = NamesRequest {
                withdraw: names.to_vec(),
                ..NamesRequest::default()
            };
            self.ask(&request).unwrap();
        }

        fn find(&self, name: &ServiceName) -> Vec<Provided> {
            let request = NamesRequest {
                find: vec![name.clone()],
                ..NamesRequest::default()
            };
            self.ask(&request).unwrap().found.swap_remove(0)
        }
    }

    fn signed(keypair: &Keypair, port: u16) -> Vec<u8> {
        let address = format!("/ip4/10.0.0.1/tcp/{port}").parse().unwrap();
        let record = SignedPeer::sign(keypair, &[address], Form::Standard).unwrap();
        record.envelope().to_vec()
    }

    fn names(count: usize) -> Vec<ServiceName> {
        (0..count)
            .map(|n| format!("name{n}").parse().unwrap())
            .collect()
    }

    #[test]
    fn what_is_announced_is_found_on_every_road_until_it_is_taken_back() {
        let scene = Scene::new();
        let names = names(2);
        let reply = scene.announce(&names);
        assert_eq!((reply.lease, reply.grapes), (millis(LEASE), 1));
        assert_eq!(reply.refused, [0; 0]);
        let expected = Provided {
            peer: scene.peer(),
            addresses: vec!["/ip4/10.0.0.1/tcp/1".parse().unwrap()],
            lease: millis(LEASE),
        };
        assert_eq!(scene.find(&names[0]), [expected]);
        let key = names[0].key();
        let page = scene.registry.providers().registrations(
            Some(&key),
            None,
            9,
            Form::Standard,
            scene.now,
        );
        assert_eq!(page.registrations[0].namespace.as_ref(), names[0].as_ref());
        let records = Records(Arc::clone(&scene.registry));
        let kademlia = || {
            use libp2p::kad::store::RecordStore;
            records.providers(&RecordKey::new(&key)).len()
        };
        assert_eq!(kademlia(), 1);
        scene.withdraw(&names[..1]);
        assert_eq!((scene.find(&names[0]), kademlia()), (vec![], 0));
        assert_eq!(scene.find(&names[1]).len(), 1);
    }

    #[test]
    fn a_record_of_either_form_is_taken_and_registrations_have_it_in_the_forms_it_came_in() {
        let scene = Scene::new();
        let name = names(1);
        let address: Multiaddr = "/ip4/10.0.0.1/tcp/1".parse().unwrap();
        let [standard, legacy] = [Form::Standard, Form::Legacy].map(|form| {
            let record = SignedPeer::sign(&scene.keypair, std::slice::from_ref(&address), form);
            record.unwrap().envelope().to_vec()
        });
        let announce = |record: &[u8], legacy: Option<&[u8]>| {
            let request = NamesRequest {
                announce: name.clone(),
                record: Some(record.to_vec()),
                legacy: legacy.map(<[u8]>::to_vec),
                ..NamesRequest::default()
            };
            scene.ask(&request).map(|reply| reply.refused)
        };
        let held = |form| {
            let store = scene.registry.providers();
            let page = store.registrations(Some(&name[0].key()), None, 9, form, scene.now);
            let envelopes = page.registrations.into_iter();
            let envelopes = envelopes.map(|registration| registration.envelope.to_vec());
            envelopes.collect::<Vec<_>>()
        };
        for (record, other, expected) in [
            (&standard, None, [vec![standard.clone()], vec![]]),
            (&legacy, None, [vec![], vec![legacy.clone()]]),
            (
                &standard,
                Some(&legacy[..]),
                [vec![standard.clone()], vec![legacy.clone()]],
            ),
        ] {
            assert_eq!(announce(record, other).unwrap(), [0; 0]);
            assert_eq!([held(Form::Standard), held(Form::Legacy)], expected);
            assert_eq!(
                scene.find(&name[0])[0].addresses,
                std::slice::from_ref(&address)
            );
        }
        for (record, other) in [
            (&legacy, &standard),
            (&standard, &standard),
            (&legacy, &legacy),
        ] {
            let refused = announce(record, Some(other));
            assert!(matches!(refused, Err(NotTaken::NotLegacy)), "{refused:?}");
        }
    }

    #[test]
    fn a_message_takes_back_then_announces_then_looks_up() {
        let scene = Scene::new();
        let name = names(1);
        let request = NamesRequest {
            announce: name.clone(),
            record: Some(scene.record.clone()),
            withdraw: name.clone(),
            find: name,
            ..NamesRequest::default()
        };
        assert_eq!(scene.ask(&request).unwrap().found[0].len(), 1);
    }

    #[test]
    fn only_a_record_that_the_peer_itself_has_signed_is_taken() {
        let scene = Scene::new();
        let mut request = NamesRequest {
            announce: names(1),
            ..NamesRequest::default()
        };
        let other = signed(&Keypair::generate_ed25519(), 1);
        request.record = Some(other);
        assert!(matches!(scene.ask(&request), Err(NotTaken::Foreign)));
        request.record = Some(vec![0; 100]);
        assert!(matches!(scene.ask(&request), Err(NotTaken::Record(_))));
        assert_eq!(scene.find(&request.announce[0]), []);
    }

    #[test]
    fn a_new_record_brings_new_addresses_and_the_old_one_is_not_verified_again() {
        let mut scene = Scene::new();
        let name = names(1);
        let announce = |scene: &Scene, port| {
            let request = NamesRequest {
                announce: name.clone(),
                record: Some(signed(&scene.keypair, port)),
                ..NamesRequest::default()
            };
            scene.ask(&request).unwrap()
        };
        announce(&scene, 1);
        announce(&scene, 2);
        let second = "/ip4/10.0.0.1/tcp/2".parse().unwrap();
        assert_eq!(scene.find(&name[0])[0].addresses, [second]);
        // As often as the rate allows when each is another one, and so far the burst.
        let changes = (0..u16::MAX).take_while(|port| announce(&scene, *port).refused.is_empty());
        let burst = NAMES_AT_ONCE as usize / (RECORD_COST + 1);
        assert!(changes.count() <= burst);
        scene.now += Duration::from_secs(1);
        let known = scene.registry.providers().envelope(&scene.peer()).unwrap();
        let request = NamesRequest {
            announce: name.clone(),
            record: Some(known.of(Form::Standard).unwrap().to_vec()),
            ..NamesRequest::default()
        };
        for _ in 0..NAMES_PER_SECOND - 1 {
            assert_eq!(scene.ask(&request).unwrap().refused, [0; 0]);
        }
    }

    #[test]
    fn a_peer_announces_all_it_may_have_at_once_and_then_so_many_a_second() {
        let mut scene = Scene::new();
        let max = Bounds::default().per_peer;
        for portion in names(max).chunks(1_000) {
            assert_eq!(scene.announce(portion).refused, [0; 0]);
        }
        // What is left of the burst, all of it for renewals.
        let mut renewed = 0;
        for portion in names(3_000).chunks(1_000) {
            renewed += portion.len() - scene.announce(portion).refused.len();
        }
        assert_eq!(renewed, NAMES_AT_ONCE as usize - max - RECORD_COST);
        scene.now += Duration::from_secs(1);
        let mut renewed = 0;
        for portion in names(3_000).chunks(1_000) {
            renewed += portion.len() - scene.announce(portion).refused.len();
        }
        assert_eq!(renewed, NAMES_PER_SECOND as usize);
        // The places are those of the names that were not looked at.
        let reply = scene.announce(&names(5));
        assert_eq!(reply.refused, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn names_beyond_what_a_peer_may_have_are_refused_by_their_places() {
        let scene = Scene::new();
        let max = Bounds::default().per_peer;
        let all = names(max + 2);
        for portion in all[..max].chunks(1_000) {
            scene.announce(portion);
        }
        let last = [all[max].clone(), all[0].clone(), all[max + 1].clone()];
        assert_eq!(scene.announce(&last).refused, [0, 2]);
    }

    #[test]
    fn who_looks_up_too_fast_is_refused_until_later() {
        let mut scene = Scene::new();
        let request = NamesRequest {
            find: names(16),
            ..NamesRequest::default()
        };
        let answered = (0..).take_while(|_| scene.ask(&request).is_ok()).count();
        assert_eq!(answered, 2 * LOOKUPS_PER_SECOND as usize / 16);
        scene.now += Duration::from_secs(1);
        assert!(scene.ask(&request).is_ok());
    }

    #[test]
    fn of_two_nodes_with_one_key_each_takes_back_what_it_has_announced() {
        let mut scene = Scene::new();
        let name = names(1);
        let say = |scene: &Scene, session: u64, announce: bool| {
            let request = NamesRequest {
                announce: name[..usize::from(announce)].to_vec(),
                record: announce.then(|| signed(&scene.keypair, session as u16)),
                withdraw: name[usize::from(announce)..].to_vec(),
                session: Some(session),
                ..NamesRequest::default()
            };
            scene.ask(&request).unwrap().elsewhere
        };
        let at = |scene: &Scene| {
            let mut found = scene.find(&name[0]);
            found.pop().map(|found| found.addresses[0].to_string())
        };
        say(&scene, 1, true);
        scene.now += Duration::from_secs(5);
        say(&scene, 2, true);
        scene.now += Duration::from_secs(5);
        assert_eq!(say(&scene, 1, true), 1, "the other one has come");
        assert_eq!(at(&scene).as_deref(), Some("/ip4/10.0.0.1/tcp/1"));
        say(&scene, 1, false);
        assert_eq!(at(&scene).as_deref(), Some("/ip4/10.0.0.1/tcp/2"));
        say(&scene, 2, false);
        assert_eq!(at(&scene), None);
    }

    #[test]
    fn what_was_under_way_by_kademlia_does_not_bring_a_name_back() {
        let mut scene = Scene::new();
        let name = names(1);
        let by_kademlia = |scene: &Scene| {
            let new = NewRecord {
                key: &name[0].key(),
                peer: scene.peer(),
                prefix: Prefix::Local,
                addresses: &[],
                origin: Origin::Kademlia,
                ttl: LEASE,
                upkeep: Upkeep::Renewed,
            };
            scene.registry.providers().insert(new, scene.now).is_ok()
        };
        scene.announce(&name);
        scene.withdraw(&name);
        assert!(!by_kademlia(&scene));
        assert_eq!(scene.find(&name[0]), []);
        // Announced again it is there at once, and Kademlia may renew it.
        scene.announce(&name);
        assert!(by_kademlia(&scene));
        scene.withdraw(&name);
        scene.now += crate::limits::WITHDRAWN;
        assert!(by_kademlia(&scene), "this is a new announcement");
    }
}
