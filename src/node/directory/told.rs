//! What another grape has been told of this one's workers, and when it is told more: decided without
//! I/O or a clock.

use std::time::{Duration, Instant};

use crate::net::Outcome;
use crate::proto::wire::{Batch, ErrorCode, MAX_CHANGES};
use crate::store::workers::Workers;

/// The pause before a grape that did not take a batch is told again, and the longest one that it
/// grows to, doubled each time: within the lease of a worker, eight times over.
const RETRY: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(16);

#[derive(Debug, Default)]
pub(super) struct Told {
    /// The connection over which. After another one the grape may have forgotten everything.
    connected: Option<u64>,
    /// The number of the last change it has confirmed.
    up_to: u64,
    /// It is being told.
    busy: bool,
    /// It did not take the last batch, and is told nothing before this.
    retry: Option<Instant>,
    /// How many batches it did not take, one after the other.
    failures: u32,
    /// It is another implementation, which has no registry.
    lacks_registry: bool,
}

/// The changes up to a number, for a grape.
#[derive(Debug)]
pub(super) struct News {
    pub(super) batch: Batch,
    /// What [`Told::on_outcome`] wants to know again.
    pub(super) sent: Sent,
}

/// What a batch was.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    connected: Option<u64>,
    up_to: u64,
}

impl Told {
    /// The grape is connected to by this connection, or by none.
    pub(super) fn on_connected(&mut self, connected: Option<u64>, now: Instant) {
        if self.connected == connected {
            return;
        }
        *self = Self {
            connected,
            busy: self.busy,
            // Soon, and not at once: it may be one that cuts the connection at each batch.
            retry: match self.failures {
                0 => None,
                _ => self.retry.map(|at| at.min(now + RETRY)),
            },
            failures: self.failures,
            ..Self::default()
        };
    }

    /// The last change that it has confirmed, if it can be told at all.
    pub(super) fn confirmed(&self) -> Option<u64> {
        let can_be_told = self.connected.is_some() && !self.lacks_registry;
        can_be_told.then_some(self.up_to)
    }

    pub(super) fn is_busy(&self) -> bool {
        self.busy
    }

    /// What to tell it now, if anything. It is busy from then on, until the
    /// [outcome](Self::on_outcome).
    pub(super) fn next(&mut self, workers: &Workers, now: Instant) -> Option<News> {
        while self.has_news(workers) && self.retry.is_none_or(|at| at <= now) {
            let (batch, up_to) = match self.connected {
                Some(_) => {
                    let (changes, up_to) = workers.changes(self.up_to, MAX_CHANGES, now);
                    let find = Vec::new();
                    (Batch { changes, find }, up_to)
                }
                // Asking it anything connects to it.
                None => (Batch::default(), self.up_to),
            };
            if batch.changes.is_empty() && self.connected.is_some() {
                // What has expired meanwhile need not be told.
                self.up_to = up_to;
                continue;
            }
            self.busy = true;
            let connected = self.connected;
            let sent = Sent { connected, up_to };
            return Some(News { batch, sent });
        }
        None
    }

    /// When [`next`](Self::next), which had nothing, has something although nothing happens.
    pub(super) fn due(&self, workers: &Workers) -> Option<Instant> {
        self.retry.filter(|_| self.has_news(workers))
    }

    /// What has become of a batch.
    pub(super) fn on_outcome(&mut self, sent: Sent, outcome: &Outcome, now: Instant) {
        self.busy = false;
        match outcome {
            Outcome::Answered(Ok(_)) => {
                self.failures = 0;
                // Asking has connected to it; once that is known it is told, without a pause.
                self.retry = self.connected.is_none().then(|| now + RETRY);
                // Connected anew it is told everything.
                if self.connected == sent.connected {
                    self.up_to = self.up_to.max(sent.up_to);
                }
            }
            Outcome::Answered(Err(error)) if error.code == ErrorCode::UnknownService => {
                self.lacks_registry = true;
            }
            _ => {
                let pause = RETRY.saturating_mul(1 << self.failures.min(8));
                self.retry = Some(now + pause.min(RETRY_MAX));
                self.failures = self.failures.saturating_add(1);
            }
        }
    }

    fn has_news(&self, workers: &Workers) -> bool {
        !self.busy && !self.lacks_registry && self.up_to < workers.last_change()
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::proto::wire::RemoteError;

    const LEASE: Duration = Duration::from_secs(120);

    /// A grape with one worker, and what it has told another one.
    struct Scene {
        workers: Workers,
        told: Told,
        now: Instant,
    }

    impl Scene {
        fn new(connected: Option<u64>) -> Self {
            let now = Instant::now();
            let mut scene = Self {
                workers: Workers::new(now),
                told: Told::default(),
                now,
            };
            scene.told.on_connected(connected, now);
            scene.announce(1);
            scene
        }

        fn announce(&mut self, port: u16) {
            let at = SocketAddr::from(([127, 0, 0, 1], port));
            let service = [port as u8; 32];
            let announced = self.workers.announce(&service, at, LEASE, self.now);
            announced.unwrap();
        }

        fn next(&mut self) -> Option<News> {
            self.told.next(&self.workers, self.now)
        }

        fn due(&self) -> Option<Duration> {
            let due = self.told.due(&self.workers)?;
            Some(due - self.now)
        }

        /// Tells it what there is to tell, with this outcome; returns how many changes these were.
        fn tell(&mut self, outcome: &Outcome) -> usize {
            let news = self.next().expect("there is something to tell");
            assert!(self.next().is_none(), "it is being told");
            assert_eq!(self.due(), None);
            self.told.on_outcome(news.sent, outcome, self.now);
            news.batch.changes.len()
        }
    }

    fn taken() -> Outcome {
        Outcome::Answered(Ok(Vec::new()))
    }

    fn refused(code: ErrorCode) -> Outcome {
        Outcome::Answered(Err(RemoteError::new(code, "")))
    }

    #[test]
    fn each_outcome_says_when_a_grape_is_told_again() {
        let table = [
            (taken(), None),
            (refused(ErrorCode::UnknownService), None),
            (refused(ErrorCode::Busy), Some(RETRY)),
            (refused(ErrorCode::BadRequest), Some(RETRY)),
            (Outcome::NotSent("gone".into()), Some(RETRY)),
        ];
        for (outcome, due) in table {
            let mut scene = Scene::new(Some(1));
            assert_eq!(scene.tell(&outcome), 1);
            assert!(scene.next().is_none());
            assert_eq!(scene.due(), due, "{outcome:?}");
            scene.announce(2);
            let is_taken = matches!(outcome, Outcome::Answered(Ok(_)));
            assert_eq!(scene.next().is_some(), is_taken, "{outcome:?}");
        }
    }

    #[test]
    fn a_grape_that_refuses_is_told_again_ever_more_seldom_until_it_takes_something() {
        let mut scene = Scene::new(Some(1));
        for seconds in [1, 2, 4, 8, 16, 16] {
            assert_eq!(scene.tell(&refused(ErrorCode::Busy)), 1);
            assert_eq!(scene.due(), Some(Duration::from_secs(seconds)));
            scene.now += Duration::from_secs(seconds);
        }
        assert_eq!(scene.tell(&taken()), 1);
        scene.announce(2);
        scene.tell(&refused(ErrorCode::Busy));
        assert_eq!(scene.due(), Some(RETRY));
    }

    #[test]
    fn what_has_expired_is_neither_told_nor_waited_for() {
        let mut scene = Scene::new(Some(1));
        scene.tell(&refused(ErrorCode::Busy));
        scene.now += LEASE + LEASE;
        scene.workers.sweep(scene.now);
        assert!(scene.next().is_none());
        assert_eq!(scene.due(), None, "or it would be due for ever");
    }

    #[test]
    fn what_comes_behind_a_thousand_expired_changes_is_told() {
        let mut scene = Scene::new(Some(1));
        for port in 2..=1_000 {
            scene.announce(port);
        }
        scene.now += LEASE + LEASE;
        scene.announce(1_001);
        assert_eq!(scene.tell(&taken()), 1);
        assert!(scene.next().is_none());
    }

    #[test]
    fn a_grape_is_connected_to_and_then_told_everything() {
        let mut scene = Scene::new(None);
        assert_eq!(scene.tell(&taken()), 0);
        assert_eq!(scene.due(), Some(RETRY), "should it not be connected");
        scene.told.on_connected(Some(1), scene.now);
        assert_eq!(scene.tell(&taken()), 1);
        scene.told.on_connected(Some(2), scene.now);
        assert_eq!(scene.tell(&taken()), 1, "it may have forgotten");
    }

    #[test]
    fn a_connection_that_comes_while_it_is_asked_for_is_used_at_once() {
        let mut scene = Scene::new(None);
        let news = scene.next().unwrap();
        scene.told.on_connected(Some(1), scene.now);
        scene.told.on_outcome(news.sent, &taken(), scene.now);
        assert_eq!(scene.tell(&taken()), 1);
    }

    #[test]
    fn a_grape_that_cuts_the_connection_at_each_batch_is_told_once_a_second() {
        let mut scene = Scene::new(Some(1));
        for connection in 2..9 {
            scene.tell(&Outcome::NotSent("cut".into()));
            scene.told.on_connected(None, scene.now);
            scene.told.on_connected(Some(connection), scene.now);
            assert!(scene.next().is_none());
            assert_eq!(scene.due(), Some(RETRY));
            scene.now += RETRY;
        }
    }
}
