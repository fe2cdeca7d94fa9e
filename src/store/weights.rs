//! Who takes up how much of the provider records: the heaviest makes room first.

use std::collections::{BTreeSet, HashMap};

use super::Prefix;
use super::providers::PeerSlot;

/// What a peer takes up: its records and the size of its payload, in records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Weight {
    pub(super) prefix: Prefix,
    pub(super) load: u32,
}

impl Weight {
    pub(super) fn none(prefix: Prefix) -> Self {
        Self { prefix, load: 0 }
    }
}

/// The weights of all peers and prefixes in order, so that the heaviest is found at once.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Weights {
    pub(super) total: u32,
    by_prefix: HashMap<Prefix, u32>,
    prefixes: BTreeSet<(u32, Prefix)>,
    peers: BTreeSet<(Prefix, u32, PeerSlot)>,
}

impl Weights {
    pub(super) fn of(&self, prefix: Prefix) -> u32 {
        self.by_prefix.get(&prefix).copied().unwrap_or_default()
    }

    pub(super) fn heaviest_prefix(&self) -> Option<Weight> {
        let &(load, prefix) = self.prefixes.last()?;
        Some(Weight { prefix, load })
    }

    pub(super) fn heaviest_peer(&self, prefix: Prefix) -> Option<(PeerSlot, u32)> {
        let first = (prefix, u32::MIN, PeerSlot(u32::MIN));
        let last = (prefix, u32::MAX, PeerSlot(u32::MAX));
        let &(_, load, peer) = self.peers.range(first..=last).next_back()?;
        Some((peer, load))
    }

    pub(super) fn change(&mut self, peer: PeerSlot, before: Weight, after: Weight) {
        if before == after {
            return;
        }
        if before.load > 0 {
            self.peers.remove(&(before.prefix, before.load, peer));
            self.set_prefix(before.prefix, self.of(before.prefix) - before.load);
        }
        if after.load > 0 {
            self.peers.insert((after.prefix, after.load, peer));
            self.set_prefix(after.prefix, self.of(after.prefix) + after.load);
        }
        self.total = self.total - before.load + after.load;
    }

    fn set_prefix(&mut self, prefix: Prefix, load: u32) {
        let before = match load {
            0 => self.by_prefix.remove(&prefix),
            load => self.by_prefix.insert(prefix, load),
        };
        if let Some(before) = before {
            self.prefixes.remove(&(before, prefix));
        }
        if load > 0 {
            self.prefixes.insert((load, prefix));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_heaviest_are_those_of_a_plain_list(
            changes in proptest::collection::vec((0..6u32, 0..3u8, 0..20u32), 0..60),
        ) {
            let mut weights = Weights::default();
            let mut plain: HashMap<u32, Weight> = HashMap::new();
            for (peer, prefix, load) in changes {
                let prefix = Prefix::V4([prefix, 0, 0]);
                let after = Weight { prefix, load };
                let before = plain.insert(peer, after).unwrap_or(Weight::none(prefix));
                weights.change(PeerSlot(peer), before, after);
                let load_of = |prefix| -> u32 {
                    let there = plain.values().filter(|weight| weight.prefix == prefix);
                    there.map(|weight| weight.load).sum()
                };
                let loads = plain.values().map(|weight| load_of(weight.prefix));
                let heaviest = loads.max().filter(|load| *load > 0);
                prop_assert_eq!(weights.heaviest_prefix().map(|weight| weight.load), heaviest);
                prop_assert_eq!(weights.total, plain.values().map(|weight| weight.load).sum::<u32>());
                prop_assert_eq!(weights.of(prefix), load_of(prefix));
                let there = plain.values().filter(|weight| weight.prefix == prefix);
                let heaviest = there.map(|weight| weight.load).max().filter(|load| *load > 0);
                prop_assert_eq!(weights.heaviest_peer(prefix).map(|(_, load)| load), heaviest);
            }
        }
    }
}
