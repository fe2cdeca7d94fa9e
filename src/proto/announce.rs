//! Keeps announcements alive: decides when each name is published where, beside the grapes that have
//! a registry of names (see [`registrations`](super::registrations)).
//!
//! To others a name is published in two ways: through Kademlia, to the grapes closest to its key, and
//! at the rendezvous point of each bootstrap grape, which confirms with the lease it grants. It is renewed
//! after a third of the shortest lease granted, jittered, so that many names do not come due at
//! once. A grape that (re)connects gets every name at once.
//!
//! At most [`MAX_IN_FLIGHT`] publications are under way, so that a node with thousands of names
//! neither floods its grapes nor the loop.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use libp2p::PeerId;
use rand::RngExt;

use crate::limits::{LEASE, MIN_LEASE, RENEWALS_PER_LEASE, WITHDRAWN};
use crate::name::ServiceName;

/// The publications under way at once: a few round trips' worth, far below a grape's stream limits.
const MAX_IN_FLIGHT: usize = 32;

/// How soon a refused publication is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// Where a name is published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Place {
    /// The grapes closest to the key.
    Kademlia,
    /// The rendezvous point of one grape.
    Rendezvous(PeerId),
}

/// The names that a node announces.
#[derive(Debug)]
pub(crate) struct Announcements {
    names: HashMap<ServiceName, Announcement>,
    /// Bootstrap grapes without a registry.
    grapes: HashSet<PeerId>,
    /// Kademlia is needed.
    by_kademlia: bool,
    /// What is to be published next, and the same as a set.
    ready: VecDeque<(ServiceName, Place)>,
    queued: HashSet<(ServiceName, Place)>,
    in_flight: HashSet<(ServiceName, Place)>,
    /// Those in flight whose name has been withdrawn since: what they lead to is undone.
    stale: HashSet<(ServiceName, Place)>,
    due: BTreeSet<(Instant, ServiceName, Place)>,
    /// The shortest lease that a grape has granted. Kademlia grants without saying how long.
    granted: Duration,
}

#[derive(Debug, Default)]
struct Announcement {
    in_kademlia: bool,
    confirmed: bool,
    published: bool,
    /// When each place is due, to find it in `Announcements::due`.
    due: HashMap<Place, Instant>,
}

impl Announcements {
    pub(crate) fn new() -> Self {
        Self {
            names: HashMap::new(),
            grapes: HashSet::new(),
            by_kademlia: true,
            ready: VecDeque::new(),
            queued: HashSet::new(),
            in_flight: HashSet::new(),
            stale: HashSet::new(),
            due: BTreeSet::new(),
            granted: LEASE,
        }
    }

    /// Starts to announce a name; returns whether it is new.
    pub(crate) fn announce(&mut self, name: &ServiceName) -> bool {
        if self.names.contains_key(name) {
            return false;
        }
        self.names.insert(name.clone(), Announcement::default());
        let points = self.grapes.iter().copied().map(Place::Rendezvous);
        let places: Vec<_> = points.chain([Place::Kademlia]).collect();
        for place in places {
            self.publish(name, place);
        }
        true
    }

    /// Stops announcing a name; returns whether it was announced.
    pub(crate) fn withdraw(&mut self, name: &ServiceName) -> bool {
        let Some(announcement) = self.names.remove(name) else {
            return false;
        };
        for (place, at) in announcement.due {
            self.due.remove(&(at, name.clone(), place));
        }
        let in_flight = self.in_flight.iter().filter(|(busy, _)| busy == name);
        self.stale.extend(in_flight.cloned());
        true
    }

    /// How many names are announced.
    pub(crate) fn len(&self) -> usize {
        self.names.len()
    }

    /// The names that are announced.
    pub(crate) fn names(&self) -> impl Iterator<Item = &ServiceName> {
        self.names.keys()
    }

    /// Whether there are grapes that only Kademlia reaches. By default there are.
    pub(crate) fn use_kademlia(&mut self, needed: bool) {
        if std::mem::replace(&mut self.by_kademlia, needed) || !needed {
            return;
        }
        let names: Vec<_> = self.names.keys().cloned().collect();
        for name in names {
            self.publish(&name, Place::Kademlia);
        }
    }

    /// A grape keeps the name in its registry. Returns whether the name is published now and was not
    /// before.
    pub(crate) fn on_kept(&mut self, name: &ServiceName) -> bool {
        let Some(announcement) = self.names.get_mut(name) else {
            return false;
        };
        announcement.confirmed = true;
        self.newly_published(name)
    }

    /// A bootstrap grape without a registry is connected: it may be new or have lost everything.
    pub(crate) fn on_grape(&mut self, grape: PeerId) {
        self.grapes.insert(grape);
        let names: Vec<_> = self.names.keys().cloned().collect();
        for name in names {
            self.publish(&name, Place::Rendezvous(grape));
            self.publish(&name, Place::Kademlia);
        }
    }

    /// This node has other addresses: every name is published again.
    pub(crate) fn on_addresses(&mut self) {
        // What is under way tells the old ones.
        self.stale.extend(self.in_flight.iter().cloned());
        let points = self.grapes.iter().copied().map(Place::Rendezvous);
        let places: Vec<_> = points.chain([Place::Kademlia]).collect();
        let names: Vec<_> = self.names.keys().cloned().collect();
        for name in &names {
            for place in &places {
                self.publish(name, *place);
            }
        }
    }

    /// A bootstrap grape is gone.
    pub(crate) fn on_grape_gone(&mut self, grape: &PeerId) {
        self.grapes.remove(grape);
        let alone = self.grapes.is_empty();
        let place = Place::Rendezvous(*grape);
        self.queued.retain(|(_, queued)| *queued != place);
        self.in_flight.retain(|(_, busy)| *busy != place);
        self.stale.retain(|(_, stale)| *stale != place);
        for (name, announcement) in &mut self.names {
            // What Kademlia sent last may not have arrived.
            announcement.in_kademlia &= !alone;
            if let Some(at) = announcement.due.remove(&place) {
                self.due.remove(&(at, name.clone(), place));
            }
        }
    }

    /// The next publication to begin, if one may.
    pub(crate) fn poll_publish(&mut self, now: Instant) -> Option<(ServiceName, Place)> {
        while let Some((at, ..)) = self.due.first()
            && *at <= now
            && let Some((_, name, place)) = self.due.pop_first()
        {
            self.publish(&name, place);
        }
        while self.in_flight.len() < MAX_IN_FLIGHT {
            let next = self.ready.pop_front()?;
            if self.queued.remove(&next) && self.names.contains_key(&next.0) {
                self.in_flight.insert(next.clone());
                return Some(next);
            }
        }
        None
    }

    /// When [`poll_publish`](Self::poll_publish) has something to do again.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(at, ..)| *at)
    }

    /// A rendezvous point holds the name for so long. Returns whether the name is published now
    /// and was not before.
    pub(crate) fn on_registered(
        &mut self,
        name: &ServiceName,
        grape: PeerId,
        lease: Duration,
        now: Instant,
    ) -> bool {
        let place = Place::Rendezvous(grape);
        if !self.has_ended(name, place) {
            return false;
        }
        self.granted = self.granted.min(lease).max(MIN_LEASE);
        let renew = now + renewal(self.granted);
        self.schedule(name, place, renew);
        let Some(announcement) = self.names.get_mut(name) else {
            return false;
        };
        announcement.confirmed = true;
        // Scheduled when a longer lease was expected.
        if let Some(at) = announcement.due.get(&Place::Kademlia)
            && *at > renew
        {
            self.schedule(name, Place::Kademlia, renew);
        }
        self.newly_published(name)
    }

    /// Kademlia has sent the name to the closest grapes. Returns as
    /// [`on_registered`](Self::on_registered) does.
    pub(crate) fn on_provided(&mut self, name: &ServiceName, now: Instant) -> bool {
        if !self.has_ended(name, Place::Kademlia) {
            return false;
        }
        let Some(announcement) = self.names.get_mut(name) else {
            return false;
        };
        let first = !std::mem::replace(&mut announcement.in_kademlia, true);
        let renew = if first {
            // A grape that remembers an earlier withdrawal has refused it.
            WITHDRAWN + Duration::from_secs(1)
        } else {
            renewal(self.granted)
        };
        self.schedule(
            name,
            Place::Kademlia,
            now + renew.min(renewal(self.granted)),
        );
        self.newly_published(name)
    }

    /// A place did not take the name. Returns as [`on_registered`](Self::on_registered) does.
    pub(crate) fn on_refused(&mut self, name: &ServiceName, place: Place, now: Instant) -> bool {
        if !self.has_ended(name, place) {
            return false;
        }
        self.schedule(name, place, now + RETRY);
        self.newly_published(name)
    }

    /// A publication is over; `false` if it counts for nothing. One that was begun for an earlier
    /// announcement of the name is begun again, because its withdrawal follows it.
    fn has_ended(&mut self, name: &ServiceName, place: Place) -> bool {
        let entry = (name.clone(), place);
        if !self.in_flight.remove(&entry) {
            return false;
        }
        let stale = self.stale.remove(&entry);
        if stale && self.names.contains_key(name) {
            self.publish(name, place);
        }
        !stale
    }

    /// Kademlia does not confirm: it counts only where no rendezvous point is about to.
    fn newly_published(&mut self, name: &ServiceName) -> bool {
        let pending = self.grapes.iter().any(|grape| {
            let entry = (name.clone(), Place::Rendezvous(*grape));
            self.in_flight.contains(&entry) || self.queued.contains(&entry)
        });
        let Some(announcement) = self.names.get_mut(name) else {
            return false;
        };
        let published = announcement.confirmed || (announcement.in_kademlia && !pending);
        published && !std::mem::replace(&mut announcement.published, true)
    }

    fn publish(&mut self, name: &ServiceName, place: Place) {
        if let Some(announcement) = self.names.get_mut(name)
            && let Some(at) = announcement.due.remove(&place)
        {
            self.due.remove(&(at, name.clone(), place));
        }
        if place == Place::Kademlia && !self.by_kademlia {
            return;
        }
        let entry = (name.clone(), place);
        if !self.in_flight.contains(&entry) && self.queued.insert(entry.clone()) {
            self.ready.push_back(entry);
        }
    }

    fn schedule(&mut self, name: &ServiceName, place: Place, at: Instant) {
        if let Place::Rendezvous(grape) = place
            && !self.grapes.contains(&grape)
        {
            return;
        }
        let Some(announcement) = self.names.get_mut(name) else {
            return;
        };
        if let Some(before) = announcement.due.insert(place, at) {
            self.due.remove(&(before, name.clone(), place));
        }
        self.due.insert((at, name.clone(), place));
    }
}

fn renewal(lease: Duration) -> Duration {
    (lease / RENEWALS_PER_LEASE).mul_f64(rand::rng().random_range(0.8..1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(number: usize) -> ServiceName {
        format!("name{number}").parse().unwrap()
    }

    fn publish_all(announcements: &mut Announcements, now: Instant) -> Vec<(ServiceName, Place)> {
        let mut published = Vec::new();
        while let Some(next) = announcements.poll_publish(now) {
            published.push(next);
        }
        published
    }

    #[test]
    fn a_name_goes_to_kademlia_and_to_every_bootstrap_grape() {
        let (a, b, now) = (PeerId::random(), PeerId::random(), Instant::now());
        let mut announcements = Announcements::new();
        announcements.on_grape(a);
        announcements.announce(&name(1));
        announcements.on_grape(b);
        let mut places: Vec<_> = publish_all(&mut announcements, now)
            .into_iter()
            .map(|(_, place)| place)
            .collect();
        places.sort();
        let mut expected = [Place::Kademlia, Place::Rendezvous(a), Place::Rendezvous(b)];
        expected.sort();
        assert_eq!(places, expected);
    }

    #[test]
    fn a_name_is_published_when_a_grape_confirms_it() {
        let (grape, now) = (PeerId::random(), Instant::now());
        let mut announcements = Announcements::new();
        announcements.on_grape(grape);
        announcements.announce(&name(1));
        publish_all(&mut announcements, now);
        assert!(
            !announcements.on_provided(&name(1), now),
            "not confirmed yet"
        );
        assert!(announcements.on_registered(&name(1), grape, LEASE, now));
        assert!(
            !announcements.on_registered(&name(1), grape, LEASE, now),
            "only once"
        );
    }

    #[test]
    fn kademlia_counts_when_no_rendezvous_point_takes_the_name() {
        let (grape, now) = (PeerId::random(), Instant::now());
        let mut announcements = Announcements::new();
        announcements.on_grape(grape);
        announcements.announce(&name(1));
        publish_all(&mut announcements, now);
        announcements.on_provided(&name(1), now);
        assert!(announcements.on_refused(&name(1), Place::Rendezvous(grape), now));
    }

    #[test]
    fn every_place_is_renewed_within_a_third_of_the_shortest_lease_granted() {
        let (grape, now) = (PeerId::random(), Instant::now());
        let lease = Duration::from_secs(6);
        let mut announcements = Announcements::new();
        announcements.on_grape(grape);
        announcements.announce(&name(1));
        publish_all(&mut announcements, now);
        // Kademlia first, when no lease is known yet.
        announcements.on_provided(&name(1), now);
        announcements.on_registered(&name(1), grape, lease, now);
        let later = now + lease / RENEWALS_PER_LEASE;
        assert_eq!(publish_all(&mut announcements, later).len(), 2);
    }

    #[test]
    fn a_refused_name_is_tried_again() {
        let (grape, now) = (PeerId::random(), Instant::now());
        let place = Place::Rendezvous(grape);
        let mut announcements = Announcements::new();
        announcements.on_grape(grape);
        announcements.announce(&name(1));
        publish_all(&mut announcements, now);
        announcements.on_refused(&name(1), place, now);
        let again = publish_all(&mut announcements, now + RETRY);
        assert_eq!(again, [(name(1), place)]);
    }

    #[test]
    fn a_grape_that_comes_back_gets_every_name_at_once() {
        let (grape, now) = (PeerId::random(), Instant::now());
        let mut announcements = Announcements::new();
        announcements.on_grape(grape);
        for number in 0..3 {
            announcements.announce(&name(number));
        }
        for (name, place) in publish_all(&mut announcements, now) {
            match place {
                Place::Kademlia => announcements.on_provided(&name, now),
                Place::Rendezvous(grape) => announcements.on_registered(&name, grape, LEASE, now),
            };
        }
        announcements.on_grape_gone(&grape);
        announcements.on_grape(grape);
        assert_eq!(publish_all(&mut announcements, now).len(), 6);
    }

    #[test]
    fn a_withdrawn_name_is_not_published_again() {
        let (grape, now) = (PeerId::random(), Instant::now());
        let mut announcements = Announcements::new();
        announcements.on_grape(grape);
        announcements.announce(&name(1));
        announcements.announce(&name(2));
        announcements.on_provided(&name(1), now);
        assert!(announcements.withdraw(&name(1)));
        let published = publish_all(&mut announcements, now + 2 * LEASE);
        assert!(published.iter().all(|(published, _)| *published == name(2)));
        assert!(!announcements.withdraw(&name(1)));
    }

    #[test]
    fn a_name_announced_again_is_published_again_whatever_was_in_flight() {
        let (grape, now) = (PeerId::random(), Instant::now());
        let mut announcements = Announcements::new();
        announcements.on_grape(grape);
        announcements.announce(&name(1));
        publish_all(&mut announcements, now);
        announcements.withdraw(&name(1));
        announcements.announce(&name(1));
        assert!(
            !announcements.on_registered(&name(1), grape, LEASE, now),
            "this was the withdrawn one"
        );
        announcements.on_provided(&name(1), now);
        assert_eq!(publish_all(&mut announcements, now).len(), 2);
        assert!(announcements.on_registered(&name(1), grape, LEASE, now));
    }

    #[test]
    fn many_names_are_published_a_few_at_a_time_and_all_in_the_end() {
        let now = Instant::now();
        let mut announcements = Announcements::new();
        for number in 0..1_000 {
            announcements.announce(&name(number));
        }
        let mut published = HashSet::new();
        loop {
            let some = publish_all(&mut announcements, now);
            if some.is_empty() {
                break;
            }
            assert!(some.len() <= MAX_IN_FLIGHT);
            for (name, _) in some {
                announcements.on_provided(&name, now);
                published.insert(name);
            }
        }
        assert_eq!(published.len(), 1_000);
    }
}
