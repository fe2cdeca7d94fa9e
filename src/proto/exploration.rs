//! Decides when a grape looks for other grapes again while it knows only a few.
//!
//! Kademlia looks half a second after it has met a new grape, and then every five minutes. Of two
//! grapes that join at the same time by the same third one, each may ask before the other can be
//! named: they ask again, soon after what they know has changed and ever less often after that.

use std::time::{Duration, Instant};

/// The first pause: about what a grape takes to be dialled back.
const MIN_PAUSE: Duration = Duration::from_millis(200);

/// The longest pause.
const MAX_PAUSE: Duration = Duration::from_secs(60);

/// When to look for other grapes.
#[derive(Debug, Default)]
pub(crate) struct Exploration {
    next: Option<(Instant, Duration)>,
}

impl Exploration {
    /// The grapes that are known have changed; there are `some` to ask, and not so many that
    /// Kademlia's own walks are enough.
    pub(crate) fn on_grapes(&mut self, some: bool, now: Instant) {
        self.next = some.then_some((now + MIN_PAUSE, MIN_PAUSE));
    }

    /// Whether it is time to look.
    pub(crate) fn poll(&mut self, now: Instant) -> bool {
        let Some((at, pause)) = self.next.filter(|(at, _)| *at <= now) else {
            return false;
        };
        let pause = (2 * pause).min(MAX_PAUSE);
        self.next = Some((at.max(now) + pause, pause));
        true
    }

    /// When [`poll`](Self::poll) is to be called again.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.next.map(|(at, _)| at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_looks_ever_less_often_until_something_changes() {
        let (mut now, mut exploration) = (Instant::now(), Exploration::default());
        assert_eq!(
            (exploration.next_due(), exploration.poll(now)),
            (None, false)
        );
        exploration.on_grapes(true, now);
        let mut pause = MIN_PAUSE;
        for _ in 0..20 {
            assert_eq!(exploration.next_due(), Some(now + pause));
            assert!(!exploration.poll(now));
            now += pause;
            assert!(exploration.poll(now));
            pause = (2 * pause).min(MAX_PAUSE);
        }
        exploration.on_grapes(true, now);
        assert_eq!(exploration.next_due(), Some(now + MIN_PAUSE));
        exploration.on_grapes(false, now);
        assert_eq!(exploration.next_due(), None);
    }
}
