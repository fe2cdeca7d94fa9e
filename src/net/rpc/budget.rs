//! What a node takes on at once of others' requests: their number and their bytes.
//!
//! A request that is admitted *holds* its part until its reply has left or the stream has failed, so
//! that neither slow handlers nor slow readers make memory grow. A peer may hold three times what is
//! left: three quarters of everything when it is alone, three sevenths beside another one, and so on. However
//! many ids somebody has, there is room for one more.
//!
//! Requests that are still arriving have a budget of as many bytes, so that frames that never end
//! neither make memory grow nor take the places of those that do.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use libp2p::PeerId;
use tokio::sync::{Notify, Semaphore};

use crate::limits::Limits;

#[derive(Debug)]
pub(super) struct Budget {
    max_requests: usize,
    max_bytes: usize,
    total: Usage,
    peers: Mutex<HashMap<PeerId, Weak<Usage>>>,
    idle: Notify,
}

/// What is used of the budget, by all or by one peer.
#[derive(Debug)]
pub(super) struct Usage {
    requests: AtomicUsize,
    bytes: AtomicUsize,
    /// The bytes of short answers that have not left.
    short: AtomicUsize,
    /// The bytes that frames still arriving may take.
    arriving: Arc<Semaphore>,
}

/// A part of the budget, to be [given back](Budget::give_back).
#[derive(Debug, Default)]
#[must_use = "what is not given back is lost"]
pub(super) struct Held {
    requests: usize,
    bytes: usize,
    short: usize,
}

/// The bytes of short answers that one peer may leave unread beside its requests, each counted as
/// [`SHORT_ANSWER`] more: some hundred lookups under way. All connections that a node accepts may
/// hold 256 MiB.
const SHORT_ANSWERS: usize = 64 * 1024;

/// What an answer takes beside its payload.
const SHORT_ANSWER: usize = 128;

/// How many times what is left a peer may hold.
const GREED: usize = 3;

impl Budget {
    pub(super) fn new(limits: &Limits) -> Self {
        Self {
            max_requests: limits.inbound_requests,
            max_bytes: limits.inbound_bytes,
            total: Usage::new(limits.inbound_bytes),
            peers: Mutex::default(),
            idle: Notify::new(),
        }
    }

    /// How many requests are open.
    pub(super) fn open_requests(&self) -> usize {
        self.total.requests.load(Ordering::Acquire)
    }

    /// Returns when no request is open.
    pub(super) async fn idle(&self) {
        loop {
            let idle = self.idle.notified();
            if self.open_requests() == 0 {
                return;
            }
            idle.await;
        }
    }

    /// What a peer uses, all its streams together.
    pub(super) fn usage_of(&self, peer: PeerId) -> Arc<Usage> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(usage) = peers.get(&peer).and_then(Weak::upgrade) {
            return usage;
        }
        peers.retain(|_, usage| usage.strong_count() > 0);
        let usage = Arc::new(Usage::new(share(self.max_bytes)));
        peers.insert(peer, Arc::downgrade(&usage));
        usage
    }

    /// The budgets of bytes that are still arriving from a peer.
    pub(super) fn arriving(&self, of_peer: &Usage) -> Vec<Arc<Semaphore>> {
        [&self.total, of_peer]
            .map(|usage| Arc::clone(&usage.arriving))
            .into()
    }

    /// Takes a request with such a payload in; `None` if there is no room.
    pub(super) fn admit(&self, of_peer: &Usage, payload: usize) -> Option<Held> {
        // Counted first, so that two streams cannot both take the last place.
        let open = self.total.requests.fetch_add(1, Ordering::AcqRel);
        let of_peer_open = of_peer.requests.fetch_add(1, Ordering::AcqRel);
        let mut held = Held {
            requests: 1,
            ..Held::default()
        };
        let left = self.max_requests.saturating_sub(open);
        let fits = of_peer_open < GREED * left;
        if fits && self.grow(of_peer, &mut held, payload) {
            return Some(held);
        }
        self.give_back(of_peer, held);
        None
    }

    /// Takes a request in that is answered at once, and most often in few bytes: while the peer leaves
    /// few of such answers unread, they hold nothing else.
    pub(super) fn admit_short(&self, of_peer: &Usage) -> Option<Held> {
        let mut held = Held::default();
        let fits = Self::grow_short(of_peer, &mut held, SHORT_ANSWER);
        if fits {
            Some(held)
        } else {
            self.admit(of_peer, 0)
        }
    }

    fn grow_short(of_peer: &Usage, held: &mut Held, bytes: usize) -> bool {
        let unread = of_peer.short.fetch_add(bytes, Ordering::AcqRel);
        let fits = unread + bytes <= SHORT_ANSWERS;
        if fits {
            held.short += bytes;
        } else {
            of_peer.short.fetch_sub(bytes, Ordering::AcqRel);
        }
        fits
    }

    /// Takes room for a further payload of a request that was admitted; `false`, and nothing taken,
    /// if there is none.
    pub(super) fn grow(&self, of_peer: &Usage, held: &mut Held, payload: usize) -> bool {
        if held.short > 0 {
            if Self::grow_short(of_peer, held, payload) {
                return true;
            }
            let admitted = self.admit(of_peer, payload);
            let is_admitted = admitted.is_some();
            held.merge(admitted.unwrap_or_default());
            return is_admitted;
        }
        let bytes = weight(payload);
        if bytes == 0 {
            return true;
        }
        let total = self.total.bytes.fetch_add(bytes, Ordering::AcqRel);
        let of_peer_total = of_peer.bytes.fetch_add(bytes, Ordering::AcqRel);
        // What would be left beside it. The last that finds room leaves some for another one.
        let left = self.max_bytes.checked_sub(total + bytes);
        let fits = left.is_some_and(|left| of_peer_total + bytes <= GREED * left);
        if fits {
            held.bytes += bytes;
        } else {
            self.total.bytes.fetch_sub(bytes, Ordering::AcqRel);
            of_peer.bytes.fetch_sub(bytes, Ordering::AcqRel);
        }
        fits
    }

    pub(super) fn give_back(&self, of_peer: &Usage, held: Held) {
        let Held {
            requests,
            bytes,
            short,
        } = held;
        if short > 0 {
            of_peer.short.fetch_sub(short, Ordering::AcqRel);
        }
        if bytes > 0 {
            self.total.bytes.fetch_sub(bytes, Ordering::AcqRel);
            of_peer.bytes.fetch_sub(bytes, Ordering::AcqRel);
        }
        if requests > 0 {
            of_peer.requests.fetch_sub(requests, Ordering::AcqRel);
            if self.total.requests.fetch_sub(requests, Ordering::AcqRel) == requests {
                self.idle.notify_waiters();
            }
        }
    }

    #[cfg(test)]
    pub(super) fn held_bytes(&self) -> usize {
        self.total.bytes.load(Ordering::Acquire)
    }
}

impl Usage {
    fn new(max_bytes: usize) -> Self {
        let arriving = Semaphore::new(max_bytes.min(Semaphore::MAX_PERMITS));
        Self {
            requests: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            short: AtomicUsize::new(0),
            arriving: Arc::new(arriving),
        }
    }
}

impl Held {
    /// Whether the request was admitted; others are answered without.
    pub(super) fn is_some(&self) -> bool {
        self.requests > 0 || self.short > 0
    }

    /// Holds what another one holds as well.
    pub(super) fn merge(&mut self, other: Self) {
        self.requests += other.requests;
        self.bytes += other.bytes;
        self.short += other.short;
    }
}

/// What a payload takes of the budget of bytes: a small one nothing, so that short messages go on
/// while slow readers hold all of it. The budget of requests bounds those.
fn weight(payload: usize) -> usize {
    if payload <= super::outbox::SMALL {
        0
    } else {
        payload
    }
}

/// What one peer may use of the bytes that are still arriving.
fn share(budget: usize) -> usize {
    (budget - budget / 4).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(inbound_requests: usize, inbound_bytes: usize) -> Budget {
        Budget::new(&Limits {
            inbound_requests,
            inbound_bytes,
            ..Limits::default()
        })
    }

    /// Lets a peer take as many requests as it gets.
    fn take_all(budget: &Budget, payload: usize) -> (Arc<Usage>, Vec<Held>) {
        let usage = budget.usage_of(PeerId::random());
        let held = std::iter::from_fn(|| budget.admit(&usage, payload)).collect();
        (usage, held)
    }

    #[test]
    fn a_peer_gets_three_times_what_is_left_and_the_next_one_always_some() {
        let budget = budget(1_024, 64 << 20);
        let mut taken = Vec::new();
        for expected in [768, 192, 48, 12, 3] {
            let (usage, held) = take_all(&budget, 0);
            assert_eq!(held.len(), expected);
            taken.push((usage, held));
        }
        for (usage, held) in taken {
            held.into_iter()
                .for_each(|held| budget.give_back(&usage, held));
        }
        assert_eq!(budget.open_requests(), 0);
        assert_eq!(take_all(&budget, 0).1.len(), 768);
    }

    #[test]
    fn a_budget_of_one_is_used() {
        let budget = budget(1, 64 << 20);
        let (usage, held) = take_all(&budget, 0);
        assert_eq!(held.len(), 1);
        assert_eq!(take_all(&budget, 0).1.len(), 0);
        held.into_iter()
            .for_each(|held| budget.give_back(&usage, held));
        assert_eq!(take_all(&budget, 0).1.len(), 1);
    }

    #[test]
    fn bytes_are_shared_in_the_same_way() {
        let budget = budget(1_024, 64 << 20);
        for expected in [48, 12, 3, 0] {
            let (usage, held) = take_all(&budget, 1 << 20);
            assert_eq!(held.len(), expected);
            std::mem::forget((usage, held));
        }
        // What is small takes none of them.
        let rest: usize = 1_024 - 63;
        assert_eq!(take_all(&budget, 100).1.len(), (3 * rest).div_ceil(4));
    }
}
