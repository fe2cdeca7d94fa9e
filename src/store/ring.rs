//! Slots of a slab that take turns.
//!
//! Each item knows its neighbours, so that any of them can be taken out, at 8 bytes each.

use std::iter;
use std::sync::atomic::{AtomicU32, Ordering};

use super::slab::Slab;

/// The neighbours of an item; the ring's own to write.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Links {
    next: u32,
    previous: u32,
}

/// What a ring must know of its items.
pub(super) trait Linked {
    fn links(&self) -> Links;

    fn links_mut(&mut self) -> &mut Links;
}

/// A ring of slots. An item is in one at a time.
#[derive(Debug, Default)]
pub(super) struct Ring {
    len: u32,
    /// Whose turn it is. Atomic, so that turns are taken through `&self`.
    turn: AtomicU32,
}

impl Ring {
    pub(super) fn len(&self) -> usize {
        self.len as usize
    }

    /// Whose turn it is.
    pub(super) fn turn(&self) -> Option<u32> {
        (self.len > 0).then(|| self.turn.load(Ordering::Relaxed))
    }

    /// The next turn is that of the slot after this one of its own.
    pub(super) fn turn_after<T: Linked>(&self, slot: u32, items: &Slab<T>) {
        if let Some(item) = items.get(slot) {
            self.turn.store(item.links().next, Ordering::Relaxed);
        }
    }

    /// Puts a slot in, so that all others have their turn before it.
    pub(super) fn insert<T: Linked>(&mut self, slot: u32, items: &mut Slab<T>) {
        self.len += 1;
        let next = *self.turn.get_mut();
        let links = items.get(next).map(T::links);
        match links.filter(|_| self.len > 1) {
            None => {
                *self.turn.get_mut() = slot;
                join(slot, slot, items);
            }
            Some(Links { previous, .. }) => {
                join(previous, slot, items);
                join(slot, next, items);
            }
        }
    }

    /// Takes out a slot that is in this ring, and of which the item is still there.
    pub(super) fn remove<T: Linked>(&mut self, slot: u32, items: &mut Slab<T>) {
        let Some(Links { next, previous }) = items.get(slot).map(T::links) else {
            return;
        };
        self.len -= 1;
        join(previous, next, items);
        let turn = self.turn.get_mut();
        if *turn == slot {
            *turn = next;
        }
    }

    /// All slots once, from the one on whose turn it is.
    pub(super) fn iter<'a, T: Linked>(
        &self,
        items: &'a Slab<T>,
    ) -> impl Iterator<Item = (u32, &'a T)> + use<'a, T> {
        let at = |slot: u32| Some((slot, items.get(slot)?));
        let first = self.turn().and_then(at);
        let all = iter::successors(first, move |(_, item)| at(item.links().next));
        all.take(self.len())
    }
}

/// Makes two slots neighbours.
fn join<T: Linked>(before: u32, after: u32, items: &mut Slab<T>) {
    if let Some(item) = items.get_mut(before) {
        item.links_mut().next = after;
    }
    if let Some(item) = items.get_mut(after) {
        item.links_mut().previous = before;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    impl Linked for Links {
        fn links(&self) -> Links {
            *self
        }

        fn links_mut(&mut self) -> &mut Links {
            self
        }
    }

    proptest! {
        #[test]
        fn turns_are_taken_as_in_a_plain_list(
            steps in prop::collection::vec((0_u8..4, 0_usize..9), 1..100),
        ) {
            let (mut items, mut ring) = (Slab::default(), Ring::default());
            // In the order of their turns.
            let mut list: Vec<u32> = Vec::new();
            for (what, which) in steps {
                let which = which.checked_rem(list.len()).filter(|_| what > 1);
                match which {
                    None => {
                        let slot = items.insert(Links::default());
                        ring.insert(slot, &mut items);
                        list.push(slot);
                    }
                    Some(which) if what == 2 => {
                        ring.turn_after(list[which], &items);
                        list.rotate_left(which + 1);
                    }
                    Some(which) => {
                        let slot = list.remove(which);
                        ring.remove(slot, &mut items);
                        items.remove(slot);
                    }
                }
                let turns: Vec<_> = ring.iter(&items).map(|(slot, _)| slot).collect();
                prop_assert_eq!(&turns, &list);
                prop_assert_eq!(ring.turn(), list.first().copied());
                prop_assert_eq!(ring.len(), list.len());
            }
        }
    }
}
