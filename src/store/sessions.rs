//! Which of several nodes with one key announces what.
//!
//! Two nodes may have copies of one key: the grape takes them for one peer, and keeps one record for
//! each of its names. A node tells a number that it has drawn at its start, its *session*. As long as
//! one session is heard of there is nothing to keep but that. Once there is another one it is noted who
//! holds which name and where each can be dialled, so that what one of them takes back stays announced
//! by the other.
//!
//! What finds no room is not noted: such a name is gone when any of them takes it back, and comes again
//! with the next renewal.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use libp2p::PeerId;

use crate::limits::{LEASE, RENEWALS_PER_LEASE};
use crate::name::Key;

/// The peers whose sessions are known: 3 MB.
const MAX_PEERS: usize = 20_000;

/// The sessions of one peer; one more takes the place of the one that was heard of longest ago.
const MAX_SESSIONS: usize = 4;

/// The names that are noted of one peer, and of all: 10 MB.
const MAX_NAMES_OF_PEER: usize = 2_000;
const MAX_NAMES: usize = 50_000;

/// After as long a session that is there has been heard of again: it renews its leases more often.
const SILENT: Duration = LEASE
    .checked_div(RENEWALS_PER_LEASE)
    .unwrap()
    .saturating_add(SLACK);

/// As long a session is taken to be there after it was heard of, where it checks in every 10 seconds.
const HEARD: Duration = Duration::from_secs(15);

const SLACK: Duration = Duration::from_secs(5);

/// A session is forgotten when its leases have ended.
const FORGOTTEN: Duration = LEASE.saturating_add(SLACK);

/// How often those are looked for.
const SWEEP: Duration = Duration::from_secs(10);

/// The sessions of peers, each with what it says of itself (`C`).
#[derive(Debug)]
pub(super) struct Sessions<C> {
    peers: HashMap<PeerId, Peer<C>>,
    /// How many names are noted.
    names: usize,
    swept: Instant,
}

#[derive(Debug)]
struct Peer<C> {
    sessions: Vec<Session<C>>,
    /// The one that was there alone: names that are not noted are its own.
    first: u64,
    names: HashMap<Key, Vec<(u64, Instant)>>,
    /// Some found no room.
    is_full: bool,
}

#[derive(Debug)]
struct Session<C> {
    number: u64,
    begun: Instant,
    heard: Instant,
    claim: Option<C>,
}

/// What becomes of a name that a session takes back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict<C> {
    /// Nobody else holds it.
    Gone,
    /// Another session does, until then, who says this of itself.
    Held(C, Instant),
}

impl<C: Clone> Sessions<C> {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            peers: HashMap::new(),
            names: 0,
            swept: now,
        }
    }

    /// Whether a session of a peer would be the second one.
    pub(super) fn is_second(&self, peer: &PeerId, number: u64) -> bool {
        let known = self.peers.get(peer);
        known.is_some_and(|known| known.sessions.len() == 1 && known.sessions[0].number != number)
    }

    /// A session of a peer is heard of; `claim` is what the peer has said of itself so far, if this is
    /// the [second](Self::is_second) one. Returns how many others are there by what is known.
    pub(super) fn hear(
        &mut self,
        peer: PeerId,
        number: u64,
        claim: Option<C>,
        now: Instant,
    ) -> u64 {
        if self.peers.len() >= MAX_PEERS && !self.peers.contains_key(&peer) {
            return 0;
        }
        let known = self.peers.entry(peer).or_insert_with(|| Peer {
            sessions: Vec::new(),
            first: number,
            names: HashMap::new(),
            is_full: false,
        });
        if let Some(session) = known.sessions.iter_mut().find(|s| s.number == number) {
            session.heard = now;
            return known.elsewhere(number, now);
        }
        if let [alone] = &mut known.sessions[..] {
            known.first = alone.number;
            alone.claim = claim;
        }
        if known.sessions.len() >= MAX_SESSIONS {
            known.sessions.sort_unstable_by_key(|session| session.heard);
            known.sessions.remove(0);
        }
        known.sessions.push(Session {
            number,
            begun: now,
            heard: now,
            claim: None,
        });
        0
    }

    /// Whether a peer has several sessions, so that [`hold`](Self::hold) is to be told.
    pub(super) fn has_several(&self, peer: &PeerId) -> bool {
        self.peers
            .get(peer)
            .is_some_and(|peer| peer.sessions.len() > 1)
    }

    /// What a session of a peer that has several says of itself.
    pub(super) fn claim(&mut self, peer: &PeerId, number: u64, claim: C) {
        let known = self.peers.get_mut(peer);
        let session =
            known.and_then(|known| known.sessions.iter_mut().find(|s| s.number == number));
        if let Some(session) = session {
            session.claim = Some(claim);
        }
    }

    /// A session of a peer that has several holds a name, until then; the peer held it until `before`.
    pub(super) fn hold(
        &mut self,
        peer: &PeerId,
        number: u64,
        key: Key,
        before: Option<Instant>,
        until: Instant,
    ) {
        let Some(known) = self.peers.get_mut(peer) else {
            return;
        };
        let is_new = !known.names.contains_key(&key);
        if is_new && (known.names.len() >= MAX_NAMES_OF_PEER || self.names >= MAX_NAMES) {
            known.is_full = true;
            return;
        }
        self.names += usize::from(is_new);
        let first = known.first;
        let holders = known.names.entry(key).or_insert_with(|| {
            let before = before.filter(|_| first != number);
            before.map(|before| (first, before)).into_iter().collect()
        });
        holders.retain(|(holder, _)| *holder != number);
        holders.push((number, until));
    }

    /// A session takes a name back, which the peer holds until `until`.
    pub(super) fn take_back(
        &mut self,
        peer: &PeerId,
        number: u64,
        key: &Key,
        until: Option<Instant>,
        now: Instant,
    ) -> Verdict<C> {
        let Some(known) = self.peers.get_mut(peer) else {
            return Verdict::Gone;
        };
        let holders = match known.names.get_mut(key) {
            Some(holders) => {
                holders.retain(|(holder, until)| *holder != number && *until > now);
                holders.clone()
            }
            None if known.is_full || known.first == number => Vec::new(),
            None => until
                .map(|until| (known.first, until))
                .into_iter()
                .collect(),
        };
        let held = holders.iter().rev().find_map(|(holder, until)| {
            let session = known.live(*holder, number, now)?;
            Some(Verdict::Held(session.claim.clone()?, *until))
        });
        if held.is_none() && known.names.remove(key).is_some() {
            self.names -= 1;
        }
        held.unwrap_or(Verdict::Gone)
    }

    /// Forgets sessions that were not heard of for longer than a lease, and what is noted of peers that
    /// have one left.
    pub(super) fn sweep(&mut self, now: Instant) {
        if now < self.swept + SWEEP {
            return;
        }
        self.swept = now;
        for known in self.peers.values_mut() {
            known
                .sessions
                .retain(|session| now < session.heard + FORGOTTEN);
            if let [alone] = &mut known.sessions[..] {
                (known.first, alone.claim) = (alone.number, None);
                known.names = HashMap::new();
                known.is_full = false;
            }
        }
        self.peers.retain(|_, known| !known.sessions.is_empty());
        self.names = self.peers.values().map(|known| known.names.len()).sum();
    }
}

impl<C> Peer<C> {
    fn session(&self, number: u64) -> Option<&Session<C>> {
        self.sessions
            .iter()
            .find(|session| session.number == number)
    }

    /// Another session, unless it has fallen silent since this one began: then it is one of before.
    fn live(&self, number: u64, this: u64, now: Instant) -> Option<&Session<C>> {
        let begun = self.session(this).map_or(now, |this| this.begun);
        let other = self.session(number)?;
        (other.heard > begun || now < begun + SILENT).then_some(other)
    }

    fn elsewhere(&self, this: u64, now: Instant) -> u64 {
        let Some(begun) = self.session(this).map(|this| this.begun) else {
            return 0;
        };
        let is_there = |other: &&Session<C>| {
            other.number != this && other.heard > begun && now < other.heard + HEARD
        };
        self.sessions.iter().filter(is_there).count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::ServiceName;

    const SECOND: Duration = Duration::from_secs(1);

    /// A peer whose names are kept, and its sessions, each of which says its number.
    struct Scene {
        sessions: Sessions<u64>,
        peer: PeerId,
        kept: HashMap<Key, Instant>,
        claim: Option<u64>,
        now: Instant,
    }

    impl Scene {
        fn new() -> Self {
            let now = Instant::now();
            Self {
                sessions: Sessions::new(now),
                peer: PeerId::random(),
                kept: HashMap::new(),
                claim: None,
                now,
            }
        }

        fn hear(&mut self, number: u64) -> u64 {
            self.now += SECOND;
            self.sessions.hear(self.peer, number, self.claim, self.now)
        }

        fn announce(&mut self, number: u64, name: &str) -> u64 {
            let elsewhere = self.hear(number);
            let (key, until) = (key(name), self.now + LEASE);
            let before = self.kept.insert(key, until);
            if self.sessions.has_several(&self.peer) {
                self.sessions.claim(&self.peer, number, number);
                self.sessions.hold(&self.peer, number, key, before, until);
            }
            self.claim = Some(number);
            elsewhere
        }

        /// Takes a name back; returns who holds it then.
        fn take_back(&mut self, number: u64, name: &str) -> Option<u64> {
            self.hear(number);
            let (key, now) = (key(name), self.now);
            let until = self.kept.get(&key).copied();
            match self
                .sessions
                .take_back(&self.peer, number, &key, until, now)
            {
                Verdict::Gone => {
                    self.kept.remove(&key);
                    None
                }
                Verdict::Held(claim, _) => Some(claim),
            }
        }
    }

    fn key(name: &str) -> Key {
        name.parse::<ServiceName>().unwrap().key()
    }

    #[test]
    fn what_one_session_takes_back_stays_announced_by_the_other() {
        for (first_leaves, names) in [(true, ["a", "a"]), (false, ["a", "a"])] {
            let mut scene = Scene::new();
            for (number, name) in (1..).zip(names) {
                scene.announce(number, name);
            }
            let (leaves, stays) = if first_leaves { (1, 2) } else { (2, 1) };
            assert_eq!(scene.take_back(leaves, "a"), Some(stays));
            assert_eq!(scene.take_back(leaves, "a"), Some(stays), "said twice");
            assert_eq!(scene.take_back(stays, "a"), None);
            assert_eq!(scene.sessions.names, 0);
        }
    }

    #[test]
    fn a_name_of_one_session_alone_goes_with_it() {
        let mut scene = Scene::new();
        scene.announce(1, "a");
        scene.announce(1, "c");
        scene.announce(2, "b");
        scene.announce(1, "a");
        assert_eq!(scene.take_back(1, "a"), None);
        assert_eq!(
            scene.take_back(2, "c"),
            Some(1),
            "of before the other one came"
        );
        assert_eq!(scene.take_back(1, "c"), None);
        assert_eq!(scene.take_back(1, "b"), Some(2));
        assert_eq!(scene.take_back(2, "b"), None);
    }

    #[test]
    fn one_that_was_killed_and_started_again_holds_nothing_for_long() {
        let mut scene = Scene::new();
        scene.announce(1, "a");
        scene.announce(2, "a");
        scene.now += SILENT;
        assert_eq!(scene.announce(2, "a"), 0, "nobody else was heard of since");
        assert_eq!(scene.take_back(2, "a"), None);
    }

    #[test]
    fn each_of_two_that_are_there_is_told_of_the_other() {
        let mut scene = Scene::new();
        assert_eq!((scene.announce(1, "a"), scene.hear(1)), (0, 0));
        assert_eq!(
            scene.announce(2, "a"),
            0,
            "it may be the first one, started again"
        );
        assert_eq!((scene.hear(1), scene.hear(2)), (1, 1));
        scene.now += HEARD;
        assert_eq!(scene.hear(2), 0, "the first one has left");
        assert_eq!(scene.hear(1), 1);
    }

    #[test]
    fn what_is_kept_of_sessions_is_bounded_and_forgotten() {
        let mut scene = Scene::new();
        for number in 0..3 * MAX_SESSIONS as u64 {
            scene.hear(number);
        }
        let known = &scene.sessions.peers[&scene.peer];
        assert_eq!(known.sessions.len(), MAX_SESSIONS);
        for number in 0..2 * MAX_NAMES_OF_PEER {
            scene.announce(99, &format!("name{number}"));
        }
        assert_eq!(scene.sessions.names, MAX_NAMES_OF_PEER);
        assert_eq!(
            scene.take_back(99, "name3999"),
            None,
            "not noted, so not kept"
        );
        for _ in 0..2 * MAX_PEERS {
            scene.sessions.hear(PeerId::random(), 1, None, scene.now);
        }
        assert_eq!(scene.sessions.peers.len(), MAX_PEERS);
        scene.sessions.sweep(scene.now + FORGOTTEN);
        assert_eq!((scene.sessions.peers.len(), scene.sessions.names), (0, 0));
    }
}
