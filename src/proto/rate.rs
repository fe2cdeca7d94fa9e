//! A token bucket for each peer: how many messages of a kind it may send.

use std::collections::HashMap;
use std::time::Instant;

use libp2p::PeerId;

/// Bounds what each peer sends to `per_second` on average, and more than that in a burst.
///
/// A peer's bucket is dropped with its last connection, so that there are never more of them than
/// connections; who reconnects to get a full one pays for a handshake. Where connections are not
/// watched, [`sweep`](Self::sweep) drops those that are full again.
#[derive(Debug)]
pub(crate) struct RateLimit {
    per_second: f64,
    burst: f64,
    buckets: HashMap<PeerId, Bucket>,
}

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    filled: Instant,
}

impl RateLimit {
    /// Twice as many as in a second may come at once.
    pub(crate) fn new(per_second: u32) -> Self {
        Self::with_burst(per_second, per_second.saturating_mul(2))
    }

    pub(crate) fn with_burst(per_second: u32, burst: u32) -> Self {
        Self {
            per_second: per_second.into(),
            burst: burst.into(),
            buckets: HashMap::new(),
        }
    }

    /// Takes a token of the peer's; `false` when it has none left.
    pub(crate) fn admit(&mut self, peer: PeerId, now: Instant) -> bool {
        self.take(peer, 1, now) == 1
    }

    /// Takes up to so many tokens of the peer's; returns how many there were.
    pub(crate) fn take(&mut self, peer: PeerId, wanted: usize, now: Instant) -> usize {
        let bucket = self.buckets.entry(peer).or_insert(Bucket {
            tokens: self.burst,
            filled: now,
        });
        bucket.tokens = bucket.tokens_at(now, self.per_second).min(self.burst);
        bucket.filled = bucket.filled.max(now);
        let taken = wanted.min(bucket.tokens as usize);
        bucket.tokens -= taken as f64;
        taken
    }

    /// Drops the buckets that are full again: they are as good as none.
    pub(crate) fn sweep(&mut self, now: Instant) {
        let (per_second, burst) = (self.per_second, self.burst);
        self.buckets
            .retain(|_, bucket| bucket.tokens_at(now, per_second) < burst);
    }

    /// The peer has disconnected.
    pub(crate) fn forget(&mut self, peer: &PeerId) {
        self.buckets.remove(peer);
    }
}

impl Bucket {
    fn tokens_at(&self, now: Instant, per_second: f64) -> f64 {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.tokens + passed * per_second
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_burst_of_twice_the_rate_passes_and_then_the_rate_holds() {
        let mut limit = RateLimit::new(10);
        let (peer, start) = (PeerId::random(), Instant::now());
        let burst = (0..100).filter(|_| limit.admit(peer, start)).count();
        assert_eq!(burst, 20);
        let later = start + Duration::from_secs(1);
        let refilled = (0..100).filter(|_| limit.admit(peer, later)).count();
        assert_eq!(refilled, 10);
    }

    #[test]
    fn one_peer_does_not_use_another_peers_tokens() {
        let mut limit = RateLimit::new(1);
        let (greedy, honest, now) = (PeerId::random(), PeerId::random(), Instant::now());
        while limit.admit(greedy, now) {}
        assert!(limit.admit(honest, now));
    }

    #[test]
    fn a_bucket_that_is_full_again_is_dropped_and_no_other() {
        let mut limit = RateLimit::with_burst(10, 100);
        let (peer, start) = (PeerId::random(), Instant::now());
        assert_eq!(limit.take(peer, 70, start), 70);
        assert_eq!(limit.take(peer, 70, start), 30);
        limit.sweep(start + Duration::from_secs(9));
        assert_eq!(limit.buckets.len(), 1);
        limit.sweep(start + Duration::from_secs(10));
        assert!(limit.buckets.is_empty());
        assert_eq!(limit.take(peer, 200, start), 100);
    }
}
