//! The registry of workers: what other grapes tell and ask by the RPC, many changes in one message.
//!
//! Whoever connects may say that it is a grape, so what each peer sends is bounded: in changes and in
//! questions per second, and by what the [table](super::workers) keeps for the host it connects from.
//! A message takes the lock for a portion of its changes at a time, so that no other user of the table
//! waits for all of it.

use std::net::IpAddr;
use std::time::Instant;

use libp2p::PeerId;

use super::workers::MAX_WORKERS;
use super::{Prefix, Registry};
use crate::proto::rate::RateLimit;
use crate::proto::wire::{Batch, BatchReply, Change, MAX_FOUND};

/// The changes that one peer tells each second on average, and at once: all it may have when it
/// connects anew. With all of them renewed every 15 seconds, an eighth of Grenache's lease, a grape
/// tells two thirds of it.
const CHANGES_PER_SECOND: u32 = 20_000;
const CHANGES_AT_ONCE: u32 = MAX_WORKERS as u32 + CHANGES_PER_SECOND;

/// What a change that finds no room counts for beside itself: to find that out takes a walk over all
/// workers of its service, some 20 us.
const REFUSED_COST: usize = 10;

/// The services that one peer asks for each second: a lookup of Grenache's asks for one, and the
/// grape that answers it may have thousands of clients. So many workers in an answer count for one
/// more.
const FINDS_PER_SECOND: u32 = 10_000;
const WORKERS_PER_FIND: usize = 32;

/// The changes that are handled under one lock: 0.2 ms.
const PORTION: usize = 64;

/// Why a batch was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BatchRefused {
    #[error("more is told or asked for than one grape may")]
    TooFast,
    #[error("a service is asked for twice")]
    Repeated,
}

/// How fast each peer may use the registry of workers.
#[derive(Debug)]
pub(super) struct Rates {
    told: RateLimit,
    sought: RateLimit,
}

impl Default for Rates {
    fn default() -> Self {
        Self {
            told: RateLimit::with_burst(CHANGES_PER_SECOND, CHANGES_AT_ONCE),
            sought: RateLimit::new(FINDS_PER_SECOND),
        }
    }
}

impl Rates {
    pub(super) fn sweep(&mut self, now: Instant) {
        self.told.sweep(now);
        self.sought.sweep(now);
    }
}

impl Registry {
    /// Takes what another grape tells of its workers, and answers what it asks. `host` is where its
    /// connection comes from.
    pub(crate) fn on_batch(
        &self,
        grape: PeerId,
        host: Option<IpAddr>,
        batch: &Batch,
        now: Instant,
    ) -> Result<BatchReply, BatchRefused> {
        let (told, sought) = (batch.changes.len(), batch.find.len());
        let repeats = |(index, service)| batch.find[..index].contains(service);
        if batch.find.iter().enumerate().any(repeats) {
            return Err(BatchRefused::Repeated);
        }
        if self.batch_rates().sought.take(grape, sought, now) < sought
            || self.batch_rates().told.take(grape, told, now) < told
        {
            return Err(BatchRefused::TooFast);
        }
        let refused = self.apply(grape, host, &batch.changes, now);
        self.batch_rates()
            .told
            .take(grape, REFUSED_COST * refused, now);
        let find = |service| {
            let mut own = self.workers().own(service, now);
            own.truncate(MAX_FOUND);
            own
        };
        let found: Vec<_> = batch.find.iter().map(find).collect();
        let workers: usize = found.iter().map(Vec::len).sum();
        let more = workers / WORKERS_PER_FIND;
        self.batch_rates().sought.take(grape, more, now);
        Ok(BatchReply {
            refused: refused as u64,
            found,
        })
    }

    /// Applies changes in their order; returns how many found no room.
    fn apply(
        &self,
        grape: PeerId,
        host: Option<IpAddr>,
        changes: &[Change],
        now: Instant,
    ) -> usize {
        let prefix = host.map_or(Prefix::Local, Prefix::from);
        let mut refused = 0;
        for portion in changes.chunks(PORTION) {
            let mut workers = self.workers();
            for change in portion {
                let change = change.seen_from(host);
                refused += usize::from(workers.apply(grape, prefix, &change, now).is_err());
            }
        }
        refused
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::limits::{Bounds, LEASE};
    use crate::name;
    use crate::proto::wire::MAX_CHANGES;

    struct Scene {
        registry: Arc<Registry>,
        grape: PeerId,
        now: Instant,
    }

    impl Scene {
        fn new() -> Self {
            let now = Instant::now();
            Self {
                registry: Registry::new(PeerId::random(), Bounds::default(), LEASE, now),
                grape: PeerId::random(),
                now,
            }
        }

        fn send(&self, batch: &Batch) -> Result<BatchReply, BatchRefused> {
            let host = Some([10, 0, 0, 1].into());
            self.registry.on_batch(self.grape, host, batch, self.now)
        }

        /// How many full batches of one service's workers are taken, one after the other.
        fn tell(&self, at_most: usize) -> usize {
            let change = |n| Change {
                service: name::digest("a"),
                at: ([10, 0, 0, 1], n as u16).into(),
                lease: Some(1_000),
            };
            let batch = Batch {
                changes: (0..MAX_CHANGES).map(change).collect(),
                find: Vec::new(),
            };
            (0..at_most)
                .take_while(|_| self.send(&batch).is_ok())
                .count()
        }
    }

    fn find(names: &[&str]) -> Batch {
        Batch {
            changes: Vec::new(),
            find: names.iter().map(|name| name::digest(name)).collect(),
        }
    }

    #[test]
    fn a_grape_tells_all_it_may_have_at_once_and_then_so_many_a_second() {
        let mut scene = Scene::new();
        let burst = CHANGES_AT_ONCE as usize / MAX_CHANGES;
        assert_eq!(scene.tell(2 * burst), burst);
        assert!(scene.send(&find(&["a"])).is_ok(), "this is another rate");
        scene.now += Duration::from_secs(1);
        let rate = CHANGES_PER_SECOND as usize / MAX_CHANGES;
        assert_eq!(scene.tell(2 * burst), rate);
    }

    #[test]
    fn changes_that_find_no_room_count_for_more() {
        let scene = Scene::new();
        scene.tell(1);
        let other = Scene {
            registry: Arc::clone(&scene.registry),
            ..Scene::new()
        };
        // Of the same network it gets half of the places, and those who get none ask no longer.
        let burst = CHANGES_AT_ONCE as usize / MAX_CHANGES;
        let taken = other.tell(burst);
        assert!(taken < burst / 5, "{taken}");
    }

    #[test]
    fn who_asks_too_fast_is_refused_until_later_and_full_answers_count_for_more() {
        let mut scene = Scene::new();
        let asked = |scene: &Scene| {
            let answered = (0..).take_while(|_| scene.send(&find(&["a"])).is_ok());
            answered.count()
        };
        assert_eq!(asked(&scene), 2 * FINDS_PER_SECOND as usize);
        for port in 1..=200 {
            let (service, at) = (name::digest("a"), ([127, 0, 0, 1], port).into());
            let announced = scene
                .registry
                .workers()
                .announce(&service, at, LEASE, scene.now);
            announced.unwrap();
        }
        scene.now += Duration::from_secs(1);
        let cost = 1 + MAX_FOUND / WORKERS_PER_FIND;
        assert_eq!(asked(&scene), FINDS_PER_SECOND as usize / cost);
    }

    #[test]
    fn a_service_is_asked_for_once_in_a_message() {
        let scene = Scene::new();
        assert!(scene.send(&find(&["a", "b"])).is_ok());
        let repeated = scene.send(&find(&["a", "b", "a"]));
        assert_eq!(repeated, Err(BatchRefused::Repeated));
    }
}
