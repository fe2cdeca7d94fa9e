//! A token bucket for each peer: how many messages of a kind it may send.

use std::collections::HashMap;
use std::time::Instant;

use libp2p::PeerId;

/// Bounds what each peer sends to `per_second` on average and twice that in a burst.
///
/// A peer's bucket is dropped with its last connection, so that there are never more of them than
/// connections; who reconnects to get a full one pays for a handshake.
#[derive(Debug)]
pub(crate) struct RateLimit {
    per_second: f64,
    buckets: HashMap<PeerId, Bucket>,
}

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    filled: Instant,
}

impl RateLimit {
    pub(crate) fn new(per_second: u32) -> Self {
        Self {
            per_second: per_second.into(),
            buckets: HashMap::new(),
        }
    }

    /// Takes a token of the peer's; `false` when it has none left.
    pub(crate) fn admit(&mut self, peer: PeerId, now: Instant) -> bool {
        let full = 2.0 * self.per_second;
        let bucket = self.buckets.entry(peer).or_insert(Bucket {
            tokens: full,
            filled: now,
        });
        let passed = now.saturating_duration_since(bucket.filled).as_secs_f64();
        bucket.tokens = (bucket.tokens + passed * self.per_second).min(full);
        bucket.filled = now;
        let admitted = bucket.tokens >= 1.0;
        if admitted {
            bucket.tokens -= 1.0;
        }
        admitted
    }

    /// The peer has disconnected.
    pub(crate) fn forget(&mut self, peer: &PeerId) {
        self.buckets.remove(peer);
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
}
