//! Whom a request goes to: the live providers known for each name, and how busy each one is.
//!
//! Of the connected providers not tried yet, two are drawn at random and the one with fewer requests
//! under way is taken (power of two choices), which spreads well without
//! any node knowing the load of all. What is known of a name is used for [`FRESH`] without asking,
//! and for as long as one provider stays connected while it is being asked for again.
//!
//! At most [`MAX_NAMES`] names are known; those used least recently go first. Callers that pick at
//! the same time do not wait for each other.

use std::cmp;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use libp2p::PeerId;
use rand::seq::IteratorRandom;

use crate::name::ServiceName;

/// The names whose providers are kept: about 200 bytes each.
const MAX_NAMES: usize = 16_384;

/// How many of them go at once, so that room is rarely made.
const FORGOTTEN: usize = MAX_NAMES / 8;

/// The providers kept for one name.
const MAX_PROVIDERS: usize = 64;

/// How long the providers of a name are used before they are looked up again. A third of a lease,
/// so that a provider that comes is used within one renewal interval.
const FRESH: Duration = Duration::from_secs(30);

/// The way to one peer, as far as it matters whom to choose.
pub(crate) trait Link: Default {
    fn is_connected(&self) -> bool;

    fn set_connected(&self, connected: bool);

    /// The requests under way.
    fn load(&self) -> usize;
}

/// What is known of the providers of the names that this node calls, and the links to peers.
#[derive(Debug)]
pub(crate) struct Routes<L> {
    names: RwLock<HashMap<ServiceName, Route<L>>>,
    links: RwLock<HashMap<PeerId, Arc<L>>>,
    epoch: Instant,
}

#[derive(Debug)]
struct Route<L> {
    providers: Vec<(PeerId, Arc<L>)>,
    /// In milliseconds since the epoch, as all times here.
    looked_up: AtomicU64,
    used: AtomicU64,
}

/// A provider that a request may go to.
#[derive(Debug)]
pub(crate) struct Pick<L> {
    pub(crate) provider: PeerId,
    pub(crate) link: Arc<L>,
    /// The name should be looked up again, beside the request.
    pub(crate) stale: bool,
}

impl<L: Link> Routes<L> {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            names: RwLock::default(),
            links: RwLock::default(),
            epoch: now,
        }
    }

    /// A provider for the next attempt, none of `tried`.
    pub(crate) fn pick(
        &self,
        name: &ServiceName,
        tried: &[PeerId],
        now: Instant,
    ) -> Option<Pick<L>> {
        let names = self.names();
        let route = names.get(name)?;
        // One that is not connected has to be looked up: only that knows where to dial it.
        let mut able = route
            .providers
            .iter()
            .filter(|(peer, link)| link.is_connected() && !tried.contains(peer));
        let first = able.next()?;
        let (provider, link) = match able.next() {
            None => first,
            Some(second) => {
                let mut drawn = [first; 2];
                [first, second]
                    .into_iter()
                    .chain(able)
                    .sample_fill(&mut rand::rng(), &mut drawn);
                less_busy(drawn)
            }
        };
        Some(Pick {
            provider: *provider,
            link: Arc::clone(link),
            stale: route.use_now(self.millis(now)),
        })
    }

    /// The link to a peer.
    pub(crate) fn link(&self, peer: PeerId) -> Arc<L> {
        if let Some(link) = self.links().get(&peer) {
            return Arc::clone(link);
        }
        let mut links = write(&self.links);
        if links.len() >= MAX_NAMES {
            links.retain(|_, link| is_needed(link));
        }
        Arc::clone(links.entry(peer).or_default())
    }

    /// A provider of the name is live.
    pub(crate) fn found(&self, name: &ServiceName, provider: PeerId, now: Instant) {
        let link = self.link(provider);
        let mut names = self.names_with_room_for(name);
        let now = self.millis(now);
        let route = names.entry(name.clone()).or_insert_with(|| Route::new(now));
        *route.looked_up.get_mut() = now;
        let is_known = route.providers.iter().any(|(known, _)| *known == provider);
        if !is_known && route.providers.len() < MAX_PROVIDERS {
            route.providers.push((provider, link));
        }
    }

    /// A lookup has ended with exactly these providers.
    pub(crate) fn looked_up(&self, name: &ServiceName, providers: &[PeerId], now: Instant) {
        if providers.is_empty() {
            write(&self.names).remove(name);
            return;
        }
        let providers = providers.iter().take(MAX_PROVIDERS);
        let providers = providers.map(|peer| (*peer, self.link(*peer))).collect();
        let route = Route {
            providers,
            ..Route::new(self.millis(now))
        };
        self.names_with_room_for(name).insert(name.clone(), route);
    }

    /// A provider does not serve the name, or cannot be reached.
    pub(crate) fn forget(&self, name: &ServiceName, provider: &PeerId) {
        let mut names = write(&self.names);
        if let Some(route) = names.get_mut(name) {
            route.providers.retain(|(known, _)| known != provider);
            if route.providers.is_empty() {
                names.remove(name);
            }
        }
    }

    pub(crate) fn is_connected(&self, peer: &PeerId) -> bool {
        self.links()
            .get(peer)
            .is_some_and(|link| link.is_connected())
    }

    pub(crate) fn on_connected(&self, peer: PeerId) {
        self.link(peer).set_connected(true);
    }

    pub(crate) fn on_disconnected(&self, peer: &PeerId) {
        let mut links = write(&self.links);
        if let Some(link) = links.get(peer) {
            link.set_connected(false);
            if !is_needed(link) {
                links.remove(peer);
            }
        }
    }

    fn names(&self) -> RwLockReadGuard<'_, HashMap<ServiceName, Route<L>>> {
        self.names.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn links(&self) -> RwLockReadGuard<'_, HashMap<PeerId, Arc<L>>> {
        self.links.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The names, with room for this one.
    fn names_with_room_for(
        &self,
        name: &ServiceName,
    ) -> RwLockWriteGuard<'_, HashMap<ServiceName, Route<L>>> {
        let mut names = write(&self.names);
        if names.len() >= MAX_NAMES && !names.contains_key(name) {
            let mut used: Vec<_> = names
                .values_mut()
                .map(|route| *route.used.get_mut())
                .collect();
            let (_, last, _) = used.select_nth_unstable(FORGOTTEN);
            let last = *last;
            names.retain(|_, route| *route.used.get_mut() > last);
        }
        names
    }

    fn millis(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.epoch).as_millis() as u64
    }
}

impl<L> Route<L> {
    fn new(now: u64) -> Self {
        Self {
            providers: Vec::new(),
            looked_up: AtomicU64::new(now),
            used: AtomicU64::new(now),
        }
    }

    /// It is used. Returns whether it should be looked up again: the first who asks is told so.
    fn use_now(&self, now: u64) -> bool {
        // Written rarely, because all callers share it.
        if now > self.used.load(Ordering::Relaxed) + 100 {
            self.used.store(now, Ordering::Relaxed);
        }
        let looked_up = self.looked_up.load(Ordering::Relaxed);
        now >= looked_up + FRESH.as_millis() as u64
            && self
                .looked_up
                .compare_exchange(looked_up, now, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }
}

/// Whether anybody else holds a link, or will look for it when a request is made.
fn is_needed<L: Link>(link: &Arc<L>) -> bool {
    link.is_connected() || Arc::strong_count(link) > 1
}

/// Of two, the one with fewer requests under way; of equals, any.
fn less_busy<L: Link>([one, other]: [&(PeerId, Arc<L>); 2]) -> &(PeerId, Arc<L>) {
    match one.1.load().cmp(&other.1.load()) {
        cmp::Ordering::Less => one,
        cmp::Ordering::Greater => other,
        cmp::Ordering::Equal if rand::random() => one,
        cmp::Ordering::Equal => other,
    }
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;
    use std::sync::atomic::{AtomicBool, AtomicUsize};

    use super::*;

    fn name() -> ServiceName {
        "client1".parse().unwrap()
    }

    /// A link with so many requests under way.
    #[derive(Debug, Default)]
    struct TestLink {
        connected: AtomicBool,
        load: AtomicUsize,
    }

    impl Link for TestLink {
        fn is_connected(&self) -> bool {
            self.connected.load(Relaxed)
        }

        fn set_connected(&self, connected: bool) {
            self.connected.store(connected, Relaxed);
        }

        fn load(&self) -> usize {
            self.load.load(Relaxed)
        }
    }

    fn routes(providers: &[PeerId], now: Instant) -> Routes<TestLink> {
        let routes = Routes::new(now);
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
        let routes = routes(&providers, now);
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
        let routes = routes(&[busy, idle], now);
        routes.link(busy).load.store(1, Relaxed);
        for _ in 0..20 {
            assert_eq!(routes.pick(&name(), &[], now).unwrap().provider, idle);
        }
    }

    #[test]
    fn a_provider_that_is_not_connected_is_not_taken() {
        let (far, near, now) = (PeerId::random(), PeerId::random(), Instant::now());
        let routes = routes(&[far, near], now);
        routes.on_disconnected(&far);
        for _ in 0..20 {
            assert_eq!(routes.pick(&name(), &[], now).unwrap().provider, near);
        }
        assert!(routes.pick(&name(), &[near], now).is_none());
    }

    #[test]
    fn a_link_is_kept_while_its_peer_is_connected_or_somebody_uses_it() {
        let (one, routes) = (PeerId::random(), Routes::<TestLink>::new(Instant::now()));
        routes.on_connected(one);
        let link = routes.link(one);
        link.load.store(1, Relaxed);
        routes.on_disconnected(&one);
        assert!(Arc::ptr_eq(&link, &routes.link(one)), "somebody uses it");
        drop(link);
        routes.on_connected(one);
        assert_eq!(routes.link(one).load(), 1, "the same as before");
        routes.on_disconnected(&one);
        assert_eq!(routes.link(one).load(), 0, "a new one");
    }

    #[test]
    fn none_is_tried_twice() {
        let (one, now) = (PeerId::random(), Instant::now());
        let routes = routes(&[one], now);
        assert!(routes.pick(&name(), &[one], now).is_none());
    }

    #[test]
    fn what_is_stale_is_used_once_more_only_while_connected() {
        let (one, start) = (PeerId::random(), Instant::now());
        let routes = routes(&[one], start);
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
        let routes = routes(&[one], now);
        routes.forget(&name(), &one);
        assert!(routes.pick(&name(), &[], now).is_none());
    }

    #[test]
    fn an_empty_lookup_forgets_everybody() {
        let (one, now) = (PeerId::random(), Instant::now());
        let routes = routes(&[one], now);
        routes.looked_up(&name(), &[], now);
        assert!(routes.pick(&name(), &[], now).is_none());
    }
}
