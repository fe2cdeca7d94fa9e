//! What waits for a handler, given out to each peer in turn: one that sends a thousand requests at
//! once makes another one wait for one of them, not for all.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

/// Items of several owners. Each owner's come in their order; owners take turns.
#[derive(Debug)]
pub(super) struct Turns<O, T> {
    lanes: Vec<Lane<O, T>>,
    /// The lane of each owner of whom something waits.
    lane_of: HashMap<O, usize>,
    /// These lanes, whose turn is next first.
    turns: VecDeque<usize>,
    free: Vec<usize>,
    /// Where the last item went: most often the next one goes there too.
    last: usize,
    len: usize,
}

/// What waits of one owner. Nothing does if the lane is free.
#[derive(Debug)]
struct Lane<O, T> {
    owner: O,
    items: VecDeque<T>,
}

impl<O, T> Default for Turns<O, T> {
    fn default() -> Self {
        Self {
            lanes: Vec::new(),
            lane_of: HashMap::new(),
            turns: VecDeque::new(),
            free: Vec::new(),
            last: 0,
            len: 0,
        }
    }
}

impl<O: Copy + Eq + Hash, T> Turns<O, T> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn push(&mut self, owner: O, item: T) {
        let goes_there_too = |lane: &Lane<O, T>| lane.owner == owner && !lane.items.is_empty();
        if !self.lanes.get(self.last).is_some_and(goes_there_too) {
            self.last = match self.lane_of.get(&owner) {
                Some(at) => *at,
                None => self.open(owner),
            };
        }
        self.lanes[self.last].items.push_back(item);
        self.len += 1;
    }

    pub(super) fn pop(&mut self) -> Option<T> {
        let at = self.turns.pop_front()?;
        let lane = &mut self.lanes[at];
        let item = lane.items.pop_front()?;
        self.len -= 1;
        if lane.items.is_empty() {
            lane.items = VecDeque::new();
            self.lane_of.remove(&lane.owner);
            self.free.push(at);
        } else {
            self.turns.push_back(at);
        }
        Some(item)
    }

    fn open(&mut self, owner: O) -> usize {
        let lane = Lane {
            owner,
            items: VecDeque::new(),
        };
        let at = match self.free.pop() {
            Some(at) => {
                self.lanes[at] = lane;
                at
            }
            None => {
                self.lanes.push(lane);
                self.lanes.len() - 1
            }
        };
        self.lane_of.insert(owner, at);
        self.turns.push_back(at);
        at
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn owners_take_turns_however_much_one_has() {
        let mut turns = Turns::default();
        for item in 0..5 {
            turns.push('a', ('a', item));
        }
        for owner in ['b', 'c', 'b'] {
            turns.push(owner, (owner, 0));
        }
        let order: String = std::iter::from_fn(|| turns.pop())
            .map(|(owner, _)| owner)
            .collect();
        assert_eq!(order, "abcabaaa");
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_each_owners_order_is_kept(
            steps in vec(proptest::option::weighted(0.6, 0..4_u8), 0..200),
        ) {
            let mut turns = Turns::default();
            let (mut given, mut taken, mut count) = (0, [None; 4], 0);
            for step in steps {
                match step {
                    Some(owner) => {
                        turns.push(owner, (owner, given));
                        given += 1;
                    }
                    None => {
                        let before = turns.len();
                        let popped = turns.pop();
                        prop_assert_eq!(popped.is_some(), before > 0);
                        if let Some((owner, item)) = popped {
                            count += 1;
                            let last = taken[usize::from(owner)].replace(item);
                            prop_assert!(last < Some(item));
                        }
                    }
                }
            }
            let rest = std::iter::from_fn(|| turns.pop()).count();
            prop_assert_eq!(turns.len(), 0);
            prop_assert_eq!(count + rest, given);
        }
    }
}
