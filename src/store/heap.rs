//! The slots of a slab in the order in which they become due.
//!
//! Each item knows its place, so that any of them can be put off or taken out; and a heap holds each
//! exactly once, at 4 to 8 bytes, however often it is put off.

use std::marker::PhantomData;

use super::Nanos;
use super::slab::Slab;

/// What a heap must know of its items. One that is in two heaps has a place for each.
pub(super) trait Order {
    type Item;

    fn due(item: &Self::Item) -> Nanos;

    /// Where the heap keeps the item; its own to write.
    fn place(item: &mut Self::Item) -> &mut u32;
}

/// A binary heap of slots.
#[derive(Debug)]
pub(super) struct Heap<O> {
    slots: Vec<u32>,
    order: PhantomData<O>,
}

impl<O> Default for Heap<O> {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            order: PhantomData,
        }
    }
}

impl<O: Order> Heap<O> {
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// All slots, in no order.
    pub(super) fn slots(&self) -> impl Iterator<Item = u32> {
        self.slots.iter().copied()
    }

    /// The slot that is due first.
    pub(super) fn first(&self) -> Option<u32> {
        self.slots.first().copied()
    }

    pub(super) fn insert(&mut self, slot: u32, items: &mut Slab<O::Item>) {
        self.slots.push(slot);
        self.settle(self.slots.len() - 1, items);
    }

    /// An item has become due at another time.
    pub(super) fn update(&mut self, slot: u32, items: &mut Slab<O::Item>) {
        if let Some(place) = self.find(slot, items) {
            self.settle(place, items);
        }
    }

    /// Takes out a slot, of which the item is still there.
    pub(super) fn remove(&mut self, slot: u32, items: &mut Slab<O::Item>) {
        let Some(place) = self.find(slot, items) else {
            return;
        };
        self.slots.swap_remove(place);
        if place < self.slots.len() {
            self.settle(place, items);
        }
    }

    fn find(&self, slot: u32, items: &mut Slab<O::Item>) -> Option<usize> {
        let place = *O::place(items.get_mut(slot)?) as usize;
        (self.slots.get(place) == Some(&slot)).then_some(place)
    }

    /// Moves what stands at a place up or down to where it belongs.
    fn settle(&mut self, mut place: usize, items: &mut Slab<O::Item>) {
        let slot = self.slots[place];
        let due = |slot: u32, items: &Slab<O::Item>| items.get(slot).map(O::due);
        let own = due(slot, items);
        while place > 0 {
            let above = (place - 1) / 2;
            if due(self.slots[above], items) <= own {
                break;
            }
            self.put(self.slots[above], place, items);
            place = above;
        }
        loop {
            let below = [2 * place + 1, 2 * place + 2];
            let below = below.into_iter().filter(|below| *below < self.slots.len());
            let Some(below) = below.min_by_key(|below| due(self.slots[*below], items)) else {
                break;
            };
            if due(self.slots[below], items) >= own {
                break;
            }
            self.put(self.slots[below], place, items);
            place = below;
        }
        self.put(slot, place, items);
    }

    fn put(&mut self, slot: u32, place: usize, items: &mut Slab<O::Item>) {
        self.slots[place] = slot;
        if let Some(item) = items.get_mut(slot) {
            *O::place(item) = place as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug)]
    struct Item {
        due: Nanos,
        place: u32,
    }

    #[derive(Debug)]
    struct ByDue;

    impl Order for ByDue {
        type Item = Item;

        fn due(item: &Item) -> Nanos {
            item.due
        }

        fn place(item: &mut Item) -> &mut u32 {
            &mut item.place
        }
    }

    proptest! {
        #[test]
        fn first_is_always_what_a_plain_list_says(
            steps in prop::collection::vec((0_u8..4, 0_usize..20, 0_u64..50), 1..200),
        ) {
            let (mut items, mut heap) = (Slab::default(), Heap::<ByDue>::default());
            let mut list: Vec<(u32, Nanos)> = Vec::new();
            for (what, which, due) in steps {
                let which = which.checked_rem(list.len()).filter(|_| what > 1);
                match which {
                    None => {
                        let slot = items.insert(Item { due, place: 0 });
                        heap.insert(slot, &mut items);
                        list.push((slot, due));
                    }
                    Some(which) if what == 2 => {
                        let (slot, known) = &mut list[which];
                        *known = due;
                        items.get_mut(*slot).unwrap().due = due;
                        heap.update(*slot, &mut items);
                    }
                    Some(which) => {
                        let (slot, _) = list.swap_remove(which);
                        heap.remove(slot, &mut items);
                        items.remove(slot);
                    }
                }
                prop_assert_eq!(heap.len(), list.len());
                let first = heap.first().map(|slot| items.get(slot).unwrap().due);
                prop_assert_eq!(first, list.iter().map(|(_, due)| *due).min());
            }
        }
    }
}
