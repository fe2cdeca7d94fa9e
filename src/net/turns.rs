//! What waits for its turn at each peer, because only so much may be under way to one at once.

use std::collections::{HashMap, VecDeque};

use libp2p::PeerId;

/// Things that are under way to peers, and those that wait, in their order.
#[derive(Debug)]
pub(crate) struct Turns<T> {
    at_once: usize,
    peers: HashMap<PeerId, Turn<T>>,
}

#[derive(Debug)]
struct Turn<T> {
    under_way: usize,
    waiting: VecDeque<T>,
}

impl<T> Turns<T> {
    /// For so many at once to each peer, at least one.
    pub(crate) fn new(at_once: usize) -> Self {
        Self {
            at_once: at_once.max(1),
            peers: HashMap::new(),
        }
    }

    /// Returns what may begin now; otherwise it waits until something has [ended](Self::end).
    pub(crate) fn begin(&mut self, peer: PeerId, next: T) -> Option<T> {
        let turn = self.peers.entry(peer).or_insert_with(|| Turn {
            under_way: 0,
            waiting: VecDeque::new(),
        });
        if turn.under_way >= self.at_once {
            turn.waiting.push_back(next);
            return None;
        }
        turn.under_way += 1;
        Some(next)
    }

    /// Something under way has ended; returns what begins in its place.
    pub(crate) fn end(&mut self, peer: &PeerId) -> Option<T> {
        let turn = self.peers.get_mut(peer)?;
        let next = turn.waiting.pop_front();
        if next.is_none() {
            turn.under_way -= 1;
            if turn.under_way == 0 {
                self.peers.remove(peer);
            }
        }
        next
    }

    /// Takes all that waits for a peer: it would wait in vain.
    pub(crate) fn give_up(&mut self, peer: &PeerId) -> VecDeque<T> {
        let turn = self.peers.get_mut(peer);
        turn.map_or_else(VecDeque::new, |turn| std::mem::take(&mut turn.waiting))
    }

    /// Whether anything is under way to a peer.
    pub(crate) fn is_busy(&self, peer: &PeerId) -> bool {
        self.peers.contains_key(peer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_much_at_once_begins_in_order_as_others_end() {
        let (one, other) = (PeerId::random(), PeerId::random());
        let mut turns = Turns::new(2);
        let begun: Vec<_> = (0..5).map(|n| turns.begin(one, n)).collect();
        assert_eq!(begun, [Some(0), Some(1), None, None, None]);
        assert_eq!(
            turns.begin(other, 9),
            Some(9),
            "each peer has its own turns"
        );
        let ended: Vec<_> = (0..5).map(|_| turns.end(&one)).collect();
        assert_eq!(ended, [Some(2), Some(3), Some(4), None, None]);
        assert!(!turns.is_busy(&one));
        assert!(turns.is_busy(&other));
    }

    #[test]
    fn what_is_given_up_does_not_begin() {
        let (one, mut turns) = (PeerId::random(), Turns::new(1));
        for n in 0..3 {
            turns.begin(one, n);
        }
        assert_eq!(turns.give_up(&one), [1, 2]);
        assert_eq!(turns.begin(one, 3), None, "the first is still under way");
        assert_eq!(turns.end(&one), Some(3));
        assert_eq!(turns.end(&one), None);
        assert_eq!(turns.end(&one), None, "once too often");
        assert_eq!(turns.begin(one, 4), Some(4));
    }
}
