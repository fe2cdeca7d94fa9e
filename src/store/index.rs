//! Finds a slot by a hash of what is in it: 6 to 11 bytes for each slot.
//!
//! One table that doubles would hash 200,000 items again at once, for 10 ms. Here a sixty-fourth of
//! them moves, the others later.

use std::array;

use hashbrown::HashTable;

const SHARDS: usize = 64;

/// The slots of a slab. What is in them stays there: each call is told the hash of an item.
#[derive(Debug)]
pub(super) struct Index {
    shards: [HashTable<u32>; SHARDS],
}

impl Default for Index {
    fn default() -> Self {
        Self {
            shards: array::from_fn(|_| HashTable::new()),
        }
    }
}

impl Index {
    /// The slot with that hash that is the one meant.
    pub(super) fn find(&self, hash: u64, is_it: impl Fn(u32) -> bool) -> Option<u32> {
        let found = self.shards[shard(hash)].find(hash, |slot| is_it(*slot));
        found.copied()
    }

    /// Adds a slot that is not there yet. `hash_of` gives the hashes of those that are.
    pub(super) fn insert(&mut self, hash: u64, slot: u32, hash_of: impl Fn(u32) -> u64) {
        self.shards[shard(hash)].insert_unique(hash, slot, |slot| hash_of(*slot));
    }

    /// Puts another slot in the place of one with the same hash.
    pub(super) fn replace(&mut self, hash: u64, slot: u32, by: u32) {
        if let Some(found) = self.shards[shard(hash)].find_mut(hash, |other| *other == slot) {
            *found = by;
        }
    }

    pub(super) fn remove(&mut self, hash: u64, slot: u32) {
        let found = self.shards[shard(hash)].find_entry(hash, |other| *other == slot);
        if let Ok(entry) = found {
            entry.remove();
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(HashTable::len).sum()
    }
}

/// By bits that the table of a shard has no other use for: it takes the lowest for the place and
/// the highest seven as a tag.
fn shard(hash: u64) -> usize {
    (hash >> 48) as usize % SHARDS
}
