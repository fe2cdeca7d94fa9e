//! Whom a request goes to: the live providers known for each name, and how busy each one is.
//!
//! Of the connected providers not tried yet, two are drawn at random and the one with fewer requests
//! under way is taken (power of two choices), which spreads well without
//! any node knowing the load of all. What is known of a name is used for [`FRESH`] without asking,
//! and for as long as one provider stays connected while it is being asked for again.
//!
//! At most [`MAX_NAMES`] names are known; the one used least recently goes first.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libp2p::PeerId;
use lru::LruCache;
use rand::seq::IteratorRandom;
use tokio::sync::Semaphore;

use crate::limits::{MAX_REQUESTS_PER_PEER, MAX_SINGLE_REQUESTS};
use crate::name::ServiceName;

/// The names whose providers are kept: about 200 bytes each.
const MAX_NAMES: NonZeroUsize = NonZeroUsize::new(16_384).expect("not zero");

/// The providers kept for one name.
const MAX_PROVIDERS: usize = 64;

/// How long the providers of a name are used before they are looked up again. A third of a lease,
/// so that a provider that comes is used within one renewal interval.
const FRESH: Duration = Duration::from_secs(30);

/// What is known of the providers of the names that this node calls.
#[derive(Debug)]
pub(crate) struct Routes {
    names: LruCache<ServiceName, Route>,
    connected: HashSet<PeerId>,
    slots: HashMap<PeerId, Slots>,
}

/// The requests to one peer that may be under way.
#[derive(Clone, Debug)]
pub(crate) struct Slots {
    /// One permit for each request.
    pub(crate) all: Arc<Semaphore>,
    /// One more for each that has a stream of its own.
    pub(crate) single: Arc<Semaphore>,
}

#[derive(Debug)]
struct Route {
    providers: Vec<PeerId>,
    looked_up: Instant,
}

/// A provider that a request may go to.
#[derive(Debug)]
pub(crate) struct Pick {
    pub(crate) provider: PeerId,
    pub(crate) slots: Slots,
    /// The name should be looked up again, beside the request.
    pub(crate) stale: bool,
}

impl Routes {
    pub(crate) fn new() -> Self {
        Self {
            names: LruCache::new(MAX_NAMES),
            connected: HashSet::new(),
            slots: HashMap::new(),
        }
    }

    /// A provider for the next attempt, none of `tried`.
    pub(crate) fn pick(
        &mut self,
        name: &ServiceName,
        tried: &[PeerId],
        now: Instant,
    ) -> Option<Pick> {
        let route = self.names.get_mut(name)?;
        let stale = now >= route.looked_up + FRESH;
        // One that is not connected has to be looked up: only that knows where to dial it.
        let untried = route.providers.iter().filter(|peer| !tried.contains(peer));
        let connected = untried.filter(|peer| self.connected.contains(peer));
        let drawn = connected.copied().sample(&mut rand::rng(), 2);
        if stale && !drawn.is_empty() {
            // The caller looks it up again; the next one need not.
            route.looked_up = now;
        }
        let provider = drawn
            .into_iter()
            .max_by_key(|peer| (self.free_slots(peer), rand::random::<u32>()))?;
        Some(Pick {
            provider,
            slots: self.slots(provider),
            stale,
        })
    }

    /// The slots for requests to one peer.
    pub(crate) fn slots(&mut self, peer: PeerId) -> Slots {
        // A peer without a request under way needs no entry.
        if self.slots.len() >= MAX_NAMES.get() {
            self.slots.retain(|_, slots| slots.are_used());
        }
        self.slots.entry(peer).or_default().clone()
    }

    /// A provider of the name is live.
    pub(crate) fn found(&mut self, name: &ServiceName, provider: PeerId, now: Instant) {
        let route = self.names.get_or_insert_mut(name.clone(), || Route {
            providers: Vec::new(),
            looked_up: now,
        });
        route.looked_up = now;
        if !route.providers.contains(&provider) && route.providers.len() < MAX_PROVIDERS {
            route.providers.push(provider);
        }
    }

    /// A lookup has ended with exactly these providers.
    pub(crate) fn looked_up(&mut self, name: &ServiceName, providers: &[PeerId], now: Instant) {
        if providers.is_empty() {
            self.names.pop(name);
            return;
        }
        let providers = providers.iter().take(MAX_PROVIDERS).copied().collect();
        let route = Route {
            providers,
            looked_up: now,
        };
        self.names.put(name.clone(), route);
    }

    /// A provider does not serve the name, or cannot be reached.
    pub(crate) fn forget(&mut self, name: &ServiceName, provider: &PeerId) {
        if let Some(route) = self.names.peek_mut(name) {
            route.providers.retain(|known| known != provider);
            if route.providers.is_empty() {
                self.names.pop(name);
            }
        }
    }

    pub(crate) fn is_connected(&self, peer: &PeerId) -> bool {
        self.connected.contains(peer)
    }

    pub(crate) fn on_connected(&mut self, peer: PeerId) {
        self.connected.insert(peer);
    }

    pub(crate) fn on_disconnected(&mut self, peer: &PeerId) {
        self.connected.remove(peer);
        if let Entry::Occupied(slots) = self.slots.entry(*peer)
            && !slots.get().are_used()
        {
            slots.remove();
        }
    }

    fn free_slots(&self, peer: &PeerId) -> usize {
        self.slots
            .get(peer)
            .map_or(MAX_REQUESTS_PER_PEER, |slots| slots.all.available_permits())
    }
}

impl Slots {
    fn are_used(&self) -> bool {
        Arc::strong_count(&self.all) > 1 || Arc::strong_count(&self.single) > 1
    }
}

impl Default for Slots {
    fn default() -> Self {
        Self {
            all: Arc::new(Semaphore::new(MAX_REQUESTS_PER_PEER)),
            single: Arc::new(Semaphore::new(MAX_SINGLE_REQUESTS)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> ServiceName {
        "client1".parse().unwrap()
    }

    fn routes(providers: &[PeerId], now: Instant) -> Routes {
        let mut routes = Routes::new();
        routes.looked_up(&name(), providers, now);
        for provider in providers {
            routes.on_connected(*provider);
        }
        routes
    }

    #[test]
    fn requests_spread_over_all_providers() {
        let providers: Vec<_> = (0..5).map(|_| PeerId::random()).collect();
        let now = Instant::now();
        let mut routes = routes(&providers, now);
        let mut counts: HashMap<PeerId, usize> = HashMap::new();
        for _ in 0..1_000 {
            let pick = routes.pick(&name(), &[], now).unwrap();
            *counts.entry(pick.provider).or_default() += 1;
        }
        assert!(
            counts.values().all(|count| (100..300).contains(count)),
            "{counts:?}"
        );
    }

    #[test]
    fn of_two_providers_the_less_busy_one_is_taken() {
        let (busy, idle, now) = (PeerId::random(), PeerId::random(), Instant::now());
        let mut routes = routes(&[busy, idle], now);
        let _held = routes.slots(busy).all.try_acquire_owned().unwrap();
        let keep = routes.slots(busy);
        for _ in 0..20 {
            assert_eq!(routes.pick(&name(), &[], now).unwrap().provider, idle);
        }
        drop(keep);
    }

    #[test]
    fn a_provider_that_is_not_connected_is_not_taken() {
        let (far, near, now) = (PeerId::random(), PeerId::random(), Instant::now());
        let mut routes = routes(&[far, near], now);
        routes.on_disconnected(&far);
        for _ in 0..20 {
            assert_eq!(routes.pick(&name(), &[], now).unwrap().provider, near);
        }
        assert!(routes.pick(&name(), &[near], now).is_none());
    }

    #[test]
    fn none_is_tried_twice() {
        let (one, now) = (PeerId::random(), Instant::now());
        let mut routes = routes(&[one], now);
        assert!(routes.pick(&name(), &[one], now).is_none());
    }

    #[test]
    fn what_is_stale_is_used_once_more_only_while_connected() {
        let (one, start) = (PeerId::random(), Instant::now());
        let mut routes = routes(&[one], start);
        let later = start + FRESH;
        assert!(routes.pick(&name(), &[], later).unwrap().stale);
        assert!(
            !routes.pick(&name(), &[], later).unwrap().stale,
            "one refresh is enough"
        );
        routes.on_disconnected(&one);
        assert!(routes.pick(&name(), &[], later + FRESH).is_none());
    }

    #[test]
    fn a_provider_that_is_forgotten_is_not_picked() {
        let (one, now) = (PeerId::random(), Instant::now());
        let mut routes = routes(&[one], now);
        routes.forget(&name(), &one);
        assert!(routes.pick(&name(), &[], now).is_none());
    }

    #[test]
    fn an_empty_lookup_forgets_everybody() {
        let (one, now) = (PeerId::random(), Instant::now());
        let mut routes = routes(&[one], now);
        routes.looked_up(&name(), &[], now);
        assert!(routes.pick(&name(), &[], now).is_none());
    }
}
