//! What has just been taken back, so that an announcement that was under way does not bring it back.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};

use libp2p::PeerId;

use super::{Nanos, nanos};
use crate::limits::WITHDRAWN;

/// The withdrawals that are remembered: all names of one peer. 1 MB, and only while there are so many.
const MAX: usize = 20_000;

/// Names that were taken back within [`WITHDRAWN`]; of more than [`MAX`] the latest.
///
/// An entry is a hash of the name's key and the peer, keyed at random: whom another entry is
/// mistaken for has to announce a name again, which it does in any case.
#[derive(Debug, Default)]
pub(super) struct Withdrawn {
    hasher: RandomState,
    until: HashMap<u64, Nanos>,
    /// In the order of time, also those that were removed since.
    oldest: VecDeque<(Nanos, u64)>,
}

impl Withdrawn {
    pub(super) fn add(&mut self, key: &[u8], peer: &PeerId, now: Nanos) {
        self.forget_old(now);
        let (hash, until) = (self.hash(key, peer), now.saturating_add(nanos(WITHDRAWN)));
        self.until.insert(hash, until);
        self.oldest.push_back((until, hash));
    }

    /// Whether there is room for one that may be of no use.
    pub(super) fn has_room(&mut self, now: Nanos) -> bool {
        self.forget_old(now);
        self.oldest.len() < MAX / 2
    }

    pub(super) fn has(&self, key: &[u8], peer: &PeerId, now: Nanos) -> bool {
        if self.until.is_empty() {
            return false;
        }
        let until = self.until.get(&self.hash(key, peer));
        until.is_some_and(|until| now < *until)
    }

    /// The peer announces the name again.
    pub(super) fn remove(&mut self, key: &[u8], peer: &PeerId) {
        if !self.until.is_empty() {
            self.until.remove(&self.hash(key, peer));
        }
    }

    fn forget_old(&mut self, now: Nanos) {
        while let Some(&(until, hash)) = self.oldest.front()
            && (until <= now || self.oldest.len() >= MAX)
        {
            self.oldest.pop_front();
            // It may have been taken back again later.
            if self.until.get(&hash) == Some(&until) {
                self.until.remove(&hash);
            }
        }
        if self.oldest.is_empty() {
            (self.until, self.oldest) = Default::default();
        }
    }

    fn hash(&self, key: &[u8], peer: &PeerId) -> u64 {
        self.hasher.hash_one((key, peer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_back_stays_so_for_a_while_unless_it_is_announced_again() {
        let (mut withdrawn, peer, other) =
            (Withdrawn::default(), PeerId::random(), PeerId::random());
        withdrawn.add(b"a", &peer, 10);
        withdrawn.add(b"b", &peer, 10);
        withdrawn.remove(b"b", &peer);
        assert!(withdrawn.has(b"a", &peer, 11));
        assert!(!withdrawn.has(b"b", &peer, 11));
        assert!(!withdrawn.has(b"a", &other, 11));
        assert!(!withdrawn.has(b"a", &peer, 10 + nanos(WITHDRAWN)));
        // Announced and taken back again: the first time does not end the second.
        withdrawn.add(b"b", &peer, 20);
        withdrawn.add(b"c", &peer, 10 + nanos(WITHDRAWN));
        assert!(withdrawn.has(b"b", &peer, 19 + nanos(WITHDRAWN)));
    }

    #[test]
    fn a_flood_leaves_no_more_than_the_limit_and_nothing_in_the_end() {
        let (mut withdrawn, peer) = (Withdrawn::default(), PeerId::random());
        for number in 0..3 * MAX as u64 {
            withdrawn.add(&number.to_be_bytes(), &peer, number);
            assert!(withdrawn.oldest.len() <= MAX && withdrawn.until.len() <= MAX);
        }
        let last = 3 * MAX as u64 - 1;
        assert!(withdrawn.has(&last.to_be_bytes(), &peer, last));
        withdrawn.add(b"later", &peer, last + 2 * nanos(WITHDRAWN));
        assert_eq!((withdrawn.oldest.len(), withdrawn.until.len()), (1, 1));
        assert!(withdrawn.until.capacity() < 100);
    }
}
