//! The places of connections, of which one network does not get all.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use crate::store::Prefix;

/// Counts the connections of each network. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    per_network: usize,
    taken: Arc<Mutex<HashMap<Prefix, usize>>>,
}

/// The place of one connection. Dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Place {
    of: Option<(Prefix, Places)>,
}

impl Places {
    /// Of so many places one network gets three quarters: what a proxy in front of many clients takes
    /// still fits in, and others find room beside it.
    pub(crate) fn new(all: usize) -> Self {
        Self {
            per_network: all - all / 4,
            taken: Arc::default(),
        }
    }

    /// A place for a connection from that host; `None` if its network has enough. This machine may take
    /// all.
    pub(crate) fn take(&self, host: IpAddr) -> Option<Place> {
        if host.to_canonical().is_loopback() {
            return Some(Place { of: None });
        }
        let network = Prefix::from(host);
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let count = taken.entry(network).or_default();
        if *count >= self.per_network {
            return None;
        }
        *count += 1;
        let of = Some((network, self.clone()));
        Some(Place { of })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some((network, places)) = &self.of else {
            return;
        };
        let mut taken = places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = taken.get_mut(network) {
            *count -= 1;
            if *count == 0 {
                taken.remove(network);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_network_gets_three_quarters_of_the_places_and_this_machine_all() {
        let places = Places::new(8);
        let take = |host: &str| {
            let taken = (0..10).map_while(|_| places.take(host.parse().unwrap()));
            taken.collect::<Vec<_>>()
        };
        let mut first = take("10.0.0.1");
        assert_eq!(first.len(), 6);
        assert_eq!(take("10.0.0.2").len(), 0, "of the same network");
        assert_eq!(take("::ffff:10.0.0.2").len(), 0);
        assert_eq!(take("10.0.1.1").len(), 6);
        assert_eq!((take("127.0.0.1").len(), take("::1").len()), (10, 10));
        first.truncate(4);
        assert_eq!(take("10.0.0.1").len(), 2);
        drop(first);
        assert!(places.taken.lock().unwrap().is_empty());
    }
}
