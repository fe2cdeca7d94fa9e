//! Whether nodes of libp2p serve a name beside Grenache's workers, as it was when they were looked at
//! last.
//!
//! To look takes as long as the slowest provider, and anybody may have announced one that is never
//! going to answer. Who knows of workers already does not wait for it: looking goes on in the
//! background, and what came of it is kept for those who ask next.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lru::LruCache;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::proto::wire::Digest;

/// How long who knows of workers waits for a first look, from when it began. A peer that is there answers within it,
/// and Grenache's Link, which waits for 2.5 s, is told of the workers in time.
const PATIENCE: Duration = Duration::from_millis(250);

/// A verdict that is older is looked at again, beside whoever asks.
const FRESH: Duration = Duration::from_secs(1);

/// How long a verdict holds: longer than the slowest look, so that with one name that is asked for
/// all the time nobody waits twice.
const KEPT: Duration = Duration::from_secs(10);

/// The names whose verdicts are remembered; the least recently used one is forgotten first.
const MAX_KNOWN: NonZeroUsize = NonZeroUsize::new(1_024).unwrap();

/// The names that are looked at at once: half of the lookups that a node runs, so that names without
/// workers, for which somebody waits, find room.
const MAX_LOOKS: usize = crate::limits::MAX_LOOKUPS / 2;

/// Dropping it ends the looks that are under way.
#[derive(Debug, Default)]
pub(super) struct Looks {
    table: Mutex<Table>,
    ended: Notify,
    under_way: Mutex<JoinSet<()>>,
}

#[derive(Debug)]
struct Table {
    verdicts: LruCache<Digest, Verdict>,
    /// When the looks have begun.
    under_way: HashMap<Digest, Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Verdict {
    at: Instant,
    is_served: bool,
}

impl Looks {
    /// Whether a service is served, as far as that is known or soon will be. If it may have changed,
    /// `look` finds out.
    pub(super) async fn verdict<L>(
        self: &Arc<Self>,
        service: Digest,
        look: impl FnOnce() -> L,
    ) -> bool
    where
        L: Future<Output = bool> + Send + 'static,
    {
        let now = Instant::now();
        if self.table().begin(service, now) {
            self.spawn(service, look());
        }
        let patience = self.table().patience(&service, now);
        let known = async {
            loop {
                let mut ended = std::pin::pin!(self.ended.notified());
                // From here on no end is missed.
                ended.as_mut().enable();
                if let Some(is_served) = self.table().verdict(&service, Instant::now()) {
                    return is_served;
                }
                ended.await;
            }
        };
        timeout(patience, known).await.unwrap_or(false)
    }

    /// Somebody has looked at a service.
    pub(super) fn on_seen(&self, service: Digest, is_served: bool) {
        self.table().end(service, is_served, Instant::now());
        self.ended.notify_waiters();
    }

    fn spawn(self: &Arc<Self>, service: Digest, look: impl Future<Output = bool> + Send + 'static) {
        let looks = Arc::downgrade(self);
        let mut under_way = lock(&self.under_way);
        while under_way.try_join_next().is_some() {}
        under_way.spawn(async move {
            let is_served = look.await;
            if let Some(looks) = looks.upgrade() {
                looks.on_seen(service, is_served);
            }
        });
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }
}

impl Default for Table {
    fn default() -> Self {
        Self {
            verdicts: LruCache::new(MAX_KNOWN),
            under_way: HashMap::new(),
        }
    }
}

impl Table {
    fn verdict(&mut self, service: &Digest, now: Instant) -> Option<bool> {
        let verdict = self.verdicts.get(service)?;
        (now < verdict.at + KEPT).then_some(verdict.is_served)
    }

    /// Whether somebody is to look at a service, who says what has come of it.
    fn begin(&mut self, service: Digest, now: Instant) -> bool {
        let verdict = self.verdicts.peek(&service);
        let is_fresh = verdict.is_some_and(|verdict| now < verdict.at + FRESH);
        let has_room = self.under_way.len() < MAX_LOOKS;
        if is_fresh || !has_room || self.under_way.contains_key(&service) {
            return false;
        }
        self.under_way.insert(service, now);
        true
    }

    /// How long to wait for the look that is under way: nothing if there is none.
    fn patience(&self, service: &Digest, now: Instant) -> Duration {
        let begun = self.under_way.get(service);
        begun.map_or(Duration::ZERO, |begun| {
            (*begun + PATIENCE).saturating_duration_since(now)
        })
    }

    fn end(&mut self, service: Digest, is_served: bool, at: Instant) {
        self.under_way.remove(&service);
        self.verdicts.put(service, Verdict { at, is_served });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    const SERVICE: Digest = [7; 32];

    #[test]
    fn a_verdict_holds_for_some_seconds_and_is_looked_at_again_meanwhile() {
        let (mut table, mut now) = (Table::default(), Instant::now());
        assert_eq!(table.verdict(&SERVICE, now), None);
        assert!(table.begin(SERVICE, now));
        assert!(!table.begin(SERVICE, now), "somebody looks");
        assert_eq!(table.patience(&SERVICE, now), PATIENCE);
        now += 2 * PATIENCE;
        assert_eq!(table.patience(&SERVICE, now), Duration::ZERO, "it is slow");
        table.end(SERVICE, true, now);
        assert!(!table.begin(SERVICE, now), "it is fresh");
        now += FRESH;
        assert_eq!(table.verdict(&SERVICE, now), Some(true));
        assert!(table.begin(SERVICE, now));
        now += KEPT - FRESH;
        assert_eq!(table.verdict(&SERVICE, now), None);
        table.end(SERVICE, false, now);
        assert_eq!(table.verdict(&SERVICE, now), Some(false));
    }

    #[test]
    fn only_so_many_names_are_looked_at_and_remembered() {
        let (mut table, now) = (Table::default(), Instant::now());
        let service = |n: usize| {
            let mut service = [0; 32];
            service[..8].copy_from_slice(&n.to_be_bytes());
            service
        };
        let begun = (0..100).filter(|n| table.begin(service(*n), now)).count();
        assert_eq!(begun, MAX_LOOKS);
        table.end(service(0), true, now);
        assert!(table.begin(service(100), now));
        for n in 0..2 * MAX_KNOWN.get() {
            table.end(service(n), true, now);
        }
        assert_eq!(table.verdicts.len(), MAX_KNOWN.get());
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_waits_for_a_look_only_so_long_and_never_for_a_later_one() {
        let looks = Arc::new(Looks::default());
        assert!(looks.verdict(SERVICE, || ready(true)).await);
        assert!(looks.verdict(SERVICE, pending::<bool>).await);
        let asked = tokio::time::Instant::now();
        assert!(!looks.verdict([1; 32], pending::<bool>).await);
        assert_eq!(asked.elapsed(), PATIENCE);
        looks.on_seen([1; 32], true);
        assert!(looks.verdict([1; 32], pending::<bool>).await);
        assert_eq!(asked.elapsed(), PATIENCE);
    }

    #[tokio::test]
    async fn looks_end_with_who_asked_for_them() {
        let looks = Arc::new(Looks::default());
        let held = Arc::new(());
        let look = Arc::clone(&held);
        let asked = looks.verdict(SERVICE, || async move {
            let _look = look;
            pending().await
        });
        assert!(!asked.await);
        drop(looks);
        while Arc::strong_count(&held) > 1 {
            tokio::task::yield_now().await;
        }
    }
}
