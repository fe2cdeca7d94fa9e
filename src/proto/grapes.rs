//! Decides what a node makes of the grapes that it knows: whether their network is a small one, when
//! to look which are known, and when to ask for more.
//!
//! Which grapes there are is the business of whoever holds the connections and the routing table;
//! only their number counts here, and what grapes say of it themselves. Of two that disagree the
//! higher one is believed: a grape that lies makes this node ask around, and nothing worse.
//!
//! Two nodes need not agree on the size of their network, and what is announced by one is found by the
//! other: what holds for a small network only is done well below [`SMALL`], what is needed in a large one
//! from there on, and what a small one suffices with goes on until [`SURELY_LARGE`].
//!
//! An id that nobody answers for is no grape. Those that are not connected are dialled in turn, one by one.
//!
//! Does no I/O: it takes what happened and `now`.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use libp2p::{PeerId, kad};

use super::exploration::Exploration;
use super::registrations::Scope;

/// A small network has fewer grapes than this: Kademlia's replication factor, so that each one is
/// responsible for every name.
pub(crate) const SMALL: usize = kad::K_VALUE.get();

/// Who knows fewer than this takes it that each grape keeps every name, and asks a few instead of
/// those that Kademlia finds: less than [`SMALL`] by more than two nodes are apart for long.
pub(crate) const SURELY_SMALL: usize = SMALL - 4;

/// Who knows at least as many leaves it to Kademlia alone to find out whom to tell.
pub(crate) const SURELY_LARGE: usize = SMALL + 8;

/// How long after one look at the known grapes the next is taken, for each grape of a large network:
/// each is a look at all of them, and a grape that joins hundreds meets some in every moment.
const PAUSE_PER_GRAPE: Duration = Duration::from_millis(2);

/// The longest such pause.
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// How often one grape that is not connected is dialled to see whether it is there, at least, and for each
/// grape of a large network: every one within a quarter of an hour where nobody is missing.
const CHECK: Duration = Duration::from_secs(10);
const CHECK_PER_GRAPE: Duration = Duration::from_millis(100);

/// How soon the next one is dialled if one was not there: many may have gone together.
const CHECK_AGAIN: Duration = Duration::from_secs(1);

/// What is made of the other grapes.
#[derive(Debug)]
pub(crate) struct Grapes {
    /// How many were known at the last look, and how many other nodes that keep Kademlia's records.
    known: usize,
    strangers: usize,
    /// How many there are by each grape's word, itself included.
    said: HashMap<PeerId, u64>,
    /// When the last look was, and when the next is.
    looked: Instant,
    due: Option<Instant>,
    /// Whether the grapes near this node have been asked for once.
    looked_around: bool,
    exploration: Exploration,
    /// The grape that was dialled last to see whether it is there, and when the next one is.
    checked: Option<PeerId>,
    next_check: Instant,
}

impl Grapes {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            known: 0,
            strangers: 0,
            said: HashMap::new(),
            looked: now,
            due: None,
            looked_around: false,
            exploration: Exploration::default(),
            checked: None,
            next_check: now + CHECK,
        }
    }

    /// Those that are known may have changed.
    pub(crate) fn on_changed(&mut self) {
        let pause = match self.known {
            0..SMALL => Duration::ZERO,
            known => (PAUSE_PER_GRAPE * known as u32).min(MAX_PAUSE),
        };
        self.due.get_or_insert(self.looked + pause);
    }

    /// Whether it is time to look which are known; tell by [`on_known`](Self::on_known).
    pub(crate) fn is_look_due(&self, now: Instant) -> bool {
        self.due.is_some_and(|due| due <= now)
    }

    /// So many others are known now, and perhaps not the same as before, and so many other nodes that
    /// keep Kademlia's records. What was said by those that are not connected any more is forgotten.
    pub(crate) fn on_known(
        &mut self,
        known: usize,
        strangers: usize,
        others: bool,
        is_connected: impl Fn(&PeerId) -> bool,
        now: Instant,
    ) {
        (self.known, self.strangers) = (known, strangers);
        (self.looked, self.due) = (now, None);
        self.said.retain(|grape, _| is_connected(grape));
        if others {
            self.exploration.on_grapes(self.knows_few(), now);
        }
    }

    /// A grape has said how many there are.
    pub(crate) fn on_said(&mut self, grape: PeerId, count: u64, now: Instant) {
        if self.said.insert(grape, count) == Some(count) {
            return;
        }
        self.on_changed();
        if self.most_said() != self.known as u64 {
            self.exploration.on_grapes(self.knows_few(), now);
        }
    }

    /// A peer has no connection any more.
    pub(crate) fn on_disconnected(&mut self, peer: &PeerId) {
        self.said.remove(peer);
    }

    /// A grape has no connection any more: whoever asks around finds out whether it is gone.
    pub(crate) fn on_lost(&mut self, now: Instant) {
        self.exploration.on_grapes(self.knows_few(), now);
        self.on_changed();
    }

    /// The grapes near this node were asked for, and somebody has answered.
    pub(crate) fn on_looked_around(&mut self) {
        self.looked_around = true;
    }

    /// Whether it is time to ask for the grapes near this node again.
    pub(crate) fn poll_exploration(&mut self, now: Instant) -> bool {
        self.exploration.poll(now)
    }

    /// The next grape to dial to see whether it is there, of these that are not connected, if it is time:
    /// each has its turn.
    pub(crate) fn poll_check(
        &mut self,
        apart: impl FnOnce() -> Vec<PeerId>,
        now: Instant,
    ) -> Option<PeerId> {
        if now < self.next_check {
            return None;
        }
        self.next_check = now + CHECK.max(CHECK_PER_GRAPE * self.known as u32);
        let apart = apart();
        let after = |peer: &&PeerId| self.checked.is_none_or(|checked| **peer > checked);
        let next = apart.iter().filter(after).min().or(apart.iter().min());
        self.checked = next.copied();
        self.checked
    }

    /// A grape is not where it was known to be, and is forgotten.
    pub(crate) fn on_gone(&mut self, now: Instant) {
        self.next_check = self.next_check.min(now + CHECK_AGAIN);
        self.on_changed();
    }

    /// When time alone makes something due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.due
            .into_iter()
            .chain(self.exploration.next_due())
            .min()
    }

    /// Which grapes are responsible for a name. What a grape says is known sooner than what this node
    /// finds; to look for the closest ones is right in any case.
    pub(crate) fn scope(&self) -> Scope {
        match self.known < SURELY_SMALL && self.most_said() <= SURELY_SMALL as u64 {
            true => Scope::All,
            false => Scope::Closest,
        }
    }

    /// How many others keep what is announced, grapes or not; `None` while this node has not looked
    /// around, or somebody says that there are more grapes.
    pub(crate) fn count(&self) -> Option<usize> {
        let all = self.known + self.strangers;
        (self.looked_around && !self.are_more()).then_some(all)
    }

    /// Whether somebody says that there are more than are known.
    pub(crate) fn are_more(&self) -> bool {
        self.most_said() > self.known as u64
    }

    fn most_said(&self) -> u64 {
        self.said.values().copied().max().unwrap_or_default()
    }

    /// There is somebody to ask, and Kademlia's own walks are not enough.
    fn knows_few(&self) -> bool {
        (1..SMALL).contains(&self.known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(3_600);

    /// A node that has just looked, and knows so many others.
    fn knowing(known: usize, now: Instant) -> Grapes {
        let mut grapes = Grapes::new(now);
        grapes.on_known(known, 0, true, |_| true, now);
        grapes
    }

    #[test]
    fn a_small_network_is_looked_at_at_once_and_a_large_one_at_intervals() {
        let now = Instant::now();
        for (known, pause) in [
            (0, Duration::ZERO),
            (SMALL - 1, Duration::ZERO),
            (SMALL, 20 * PAUSE_PER_GRAPE),
            (1_000, MAX_PAUSE),
        ] {
            let mut grapes = knowing(known, now);
            assert!(!grapes.is_look_due(now + LONG), "nothing has changed");
            grapes.on_changed();
            grapes.on_changed();
            assert_eq!(grapes.due, Some(now + pause), "{known}");
            assert!(grapes.is_look_due(now + pause));
            grapes.on_known(known, 0, false, |_| true, now + pause);
            assert!(!grapes.is_look_due(now + LONG));
        }
    }

    #[test]
    fn names_belong_to_all_grapes_while_nobody_knows_of_many() {
        let now = Instant::now();
        let most = SURELY_SMALL as u64;
        for (known, said, scope) in [
            (0, 0, Scope::All),
            (SURELY_SMALL - 1, most, Scope::All),
            (SURELY_SMALL, 0, Scope::Closest),
            (3, most + 1, Scope::Closest),
            (3, u64::MAX, Scope::Closest),
        ] {
            let mut grapes = knowing(known, now);
            grapes.on_said(PeerId::random(), said, now);
            assert_eq!(grapes.scope(), scope, "{known} are known, {said} are said");
        }
    }

    #[test]
    fn the_count_is_known_once_this_node_has_looked_and_nobody_knows_of_more() {
        let (now, one, other) = (Instant::now(), PeerId::random(), PeerId::random());
        let mut grapes = knowing(3, now);
        assert_eq!(grapes.count(), None);
        grapes.on_looked_around();
        assert_eq!(grapes.count(), Some(3));
        grapes.on_said(one, 3, now);
        assert_eq!((grapes.count(), grapes.are_more()), (Some(3), false));
        grapes.on_said(other, 4, now);
        assert_eq!((grapes.count(), grapes.are_more()), (None, true));
        // Who is gone has nothing to say.
        grapes.on_disconnected(&other);
        assert_eq!(grapes.count(), Some(3));
        grapes.on_said(other, 4, now);
        grapes.on_known(3, 0, false, |grape| *grape == one, now);
        assert_eq!(grapes.count(), Some(3));
    }

    #[test]
    fn what_others_say_makes_a_node_of_few_grapes_ask_again() {
        let (now, grape) = (Instant::now(), PeerId::random());
        for (known, said, asks) in [
            (3, 4, true),
            (3, 3, false),
            (0, 5, false),
            (SMALL, 99, false),
        ] {
            let mut grapes = Grapes::new(now);
            grapes.on_known(known, 0, false, |_| true, now);
            assert!(!grapes.poll_exploration(now + LONG));
            grapes.on_said(grape, said, now);
            assert!(grapes.is_look_due(now + MAX_PAUSE));
            assert_eq!(grapes.poll_exploration(now + LONG), asks, "{known}, {said}");
            // The same again is nothing new.
            grapes.on_known(known, 0, false, |_| true, now);
            grapes.on_said(grape, said, now);
            assert!(!grapes.is_look_due(now + LONG));
        }
    }

    #[test]
    fn those_that_are_not_connected_are_dialled_in_turn_and_sooner_while_some_are_gone() {
        let now = Instant::now();
        let mut apart = [(); 3].map(|()| PeerId::random()).to_vec();
        let mut grapes = knowing(3, now);
        let check = |grapes: &mut Grapes, after| grapes.poll_check(|| apart.clone(), now + after);
        assert_eq!(check(&mut grapes, Duration::ZERO), None);
        let turns = (1..=4).map(|turn| check(&mut grapes, turn * CHECK).unwrap());
        let turns: Vec<_> = turns.collect();
        assert_eq!(check(&mut grapes, 4 * CHECK + CHECK_AGAIN), None);
        grapes.on_gone(now + 4 * CHECK);
        assert!(check(&mut grapes, 4 * CHECK + CHECK_AGAIN).is_some());
        apart.sort_unstable();
        assert_eq!((&turns[..3], turns[3]), (&apart[..], apart[0]));
        assert_eq!(grapes.poll_check(Vec::new, now + 9 * CHECK), None);
    }
}
