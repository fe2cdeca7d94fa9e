//! Decides when a grape provides the names of its workers in Kademlia.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use crate::limits::{LEASE, RENEWALS_PER_LEASE};
use crate::proto::wire::{Digest, MAX_CHANGES};
use crate::store::workers::Workers;

/// The names under way at once: each is a walk through the network.
const MAX_IN_FLIGHT: usize = 16;

/// A provider record is renewed as every other.
const RENEWAL: Duration = LEASE.checked_div(RENEWALS_PER_LEASE).unwrap();

/// The services that are provided, and when they are next.
#[derive(Debug, Default)]
pub(super) struct Carrying {
    /// The last change of the workers that was looked at.
    up_to: u64,
    due: BTreeSet<(Instant, Digest)>,
    /// When each service is due, to find it in `due`; `None`: it is under way.
    services: HashMap<Digest, Option<Instant>>,
    in_flight: usize,
}

impl Carrying {
    /// Looks at what has changed: a service that is new is due at once, and so is one that may have
    /// lost its last worker.
    pub(super) fn learn(&mut self, workers: &Workers, now: Instant) {
        while self.up_to < workers.last_change() {
            let (changes, up_to) = workers.changes(self.up_to, MAX_CHANGES, now);
            self.up_to = up_to;
            for change in changes {
                let known = self.services.contains_key(&change.service);
                if change.lease.is_some() != known {
                    self.schedule(change.service, now);
                }
            }
        }
    }

    /// Takes back all that is provided, as it becomes due: at once.
    pub(super) fn stop(&mut self, now: Instant) {
        if std::mem::take(&mut self.up_to) > 0 {
            self.all_at(now);
        }
    }

    /// This grape has other addresses: all that is provided is due at once.
    pub(super) fn provide_again(&mut self, now: Instant) {
        self.all_at(now);
    }

    /// The next service that is due.
    pub(super) fn poll(&mut self, now: Instant) -> Option<Digest> {
        let is_due = self.due.first().is_some_and(|(at, _)| *at <= now);
        if !is_due || self.in_flight >= MAX_IN_FLIGHT {
            return None;
        }
        let (_, service) = self.due.pop_first()?;
        self.services.insert(service, None);
        self.in_flight += 1;
        Some(service)
    }

    /// When [`poll`](Self::poll) has something again; while much is under way, when that ends.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let (at, _) = self.due.first()?;
        (self.in_flight < MAX_IN_FLIGHT).then_some(*at)
    }

    /// A service has been provided. What has changed of it meanwhile is not forgotten.
    pub(super) fn on_provided(&mut self, service: Digest, now: Instant) {
        self.in_flight = self.in_flight.saturating_sub(1);
        if self.services.get(&service) == Some(&None) {
            self.schedule(service, now + RENEWAL);
        }
    }

    /// A service is not provided any more; `again` says when it is to be once more.
    pub(super) fn on_taken_back(&mut self, service: Digest, again: Option<Instant>) {
        self.in_flight = self.in_flight.saturating_sub(1);
        if let Some(Some(at)) = self.services.remove(&service) {
            self.due.remove(&(at, service));
        }
        if let Some(at) = again {
            self.schedule(service, at);
        }
    }

    fn all_at(&mut self, at: Instant) {
        let all: Vec<_> = self.services.keys().copied().collect();
        for service in all {
            self.schedule(service, at);
        }
    }

    fn schedule(&mut self, service: Digest, at: Instant) {
        if let Some(Some(before)) = self.services.insert(service, Some(at)) {
            self.due.remove(&(before, service));
        }
        self.due.insert((at, service));
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    const AT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 1);

    #[test]
    fn a_service_is_provided_at_once_then_renewed_then_taken_back() {
        let (mut now, service) = (Instant::now(), [7; 32]);
        let (mut workers, mut carrying) = (Workers::new(now), Carrying::default());
        workers.announce(&service, AT, LEASE, now).unwrap();
        carrying.learn(&workers, now);
        assert_eq!(carrying.poll(now), Some(service));
        assert_eq!(carrying.poll(now), None, "it is under way");
        carrying.on_provided(service, now);
        assert_eq!(carrying.next_due(), Some(now + RENEWAL));
        now += RENEWAL;
        assert_eq!(carrying.poll(now), Some(service));
        carrying.on_provided(service, now);
        workers.withdraw(&service, AT);
        carrying.learn(&workers, now);
        assert_eq!(carrying.poll(now), Some(service), "without a pause");
        carrying.on_taken_back(service, None);
        assert_eq!((carrying.poll(now), carrying.next_due()), (None, None));
        assert!(carrying.services.is_empty());
    }

    #[test]
    fn what_changes_while_it_is_under_way_is_done_afterwards() {
        let (now, service) = (Instant::now(), [7; 32]);
        let (mut workers, mut carrying) = (Workers::new(now), Carrying::default());
        workers.announce(&service, AT, LEASE, now).unwrap();
        carrying.learn(&workers, now);
        assert_eq!(carrying.poll(now), Some(service));
        workers.withdraw(&service, AT);
        carrying.learn(&workers, now);
        carrying.on_provided(service, now);
        assert_eq!(carrying.poll(now), Some(service), "to be taken back");
        carrying.on_taken_back(service, Some(now));
        assert_eq!(carrying.poll(now), Some(service), "it is served again");
    }

    #[test]
    fn who_stops_takes_everything_back_and_may_begin_anew() {
        let (now, service) = (Instant::now(), [7; 32]);
        let (mut workers, mut carrying) = (Workers::new(now), Carrying::default());
        workers.announce(&service, AT, LEASE, now).unwrap();
        for _ in 0..2 {
            carrying.learn(&workers, now);
            assert_eq!(carrying.poll(now), Some(service));
            carrying.on_provided(service, now);
            assert_eq!(carrying.poll(now), None);
            carrying.stop(now);
            carrying.stop(now);
            assert_eq!(carrying.poll(now), Some(service));
            carrying.on_taken_back(service, None);
            assert_eq!((carrying.poll(now), carrying.next_due()), (None, None));
        }
    }

    #[test]
    fn what_is_provided_is_provided_again_from_another_address() {
        let now = Instant::now();
        let (mut workers, mut carrying) = (Workers::new(now), Carrying::default());
        for service in [[1; 32], [2; 32]] {
            workers.announce(&service, AT, LEASE, now).unwrap();
        }
        carrying.learn(&workers, now);
        let (done, busy) = (carrying.poll(now).unwrap(), carrying.poll(now).unwrap());
        carrying.on_provided(done, now);
        carrying.provide_again(now);
        // The one that is under way tells the old address.
        carrying.on_provided(busy, now);
        let again: BTreeSet<_> = std::iter::from_fn(|| carrying.poll(now)).collect();
        assert_eq!(again, [done, busy].into());
    }

    #[test]
    fn only_so_many_are_under_way() {
        let now = Instant::now();
        let (mut workers, mut carrying) = (Workers::new(now), Carrying::default());
        for n in 0..100 {
            workers.announce(&[n; 32], AT, LEASE, now).unwrap();
        }
        carrying.learn(&workers, now);
        let polled: Vec<_> = std::iter::from_fn(|| carrying.poll(now)).collect();
        assert_eq!((polled.len(), carrying.next_due()), (MAX_IN_FLIGHT, None));
        carrying.on_provided(polled[0], now);
        assert!(carrying.poll(now).is_some() && carrying.poll(now).is_none());
    }
}
