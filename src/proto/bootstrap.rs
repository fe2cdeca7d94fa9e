//! Keeps a node connected to its bootstrap grapes: decides when each address is dialled.
//!
//! An address may end in `/p2p/<id>`, which is then what the node there must be; without it the id
//! is learned. An address is dialled at once, again after a growing, jittered pause while it fails,
//! and again at once when its connection closes. A connection that closes as soon as it stands has
//! failed too: the grape does not let this node in, and must not be dialled in a loop. The node's own
//! address is not dialled twice, unless it is a name that DNS may lead elsewhere the next time. Where
//! a peer answers that is no grape, the address is dialled again once that connection has closed.

use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId};

use crate::error::{DialFailure, NoGrape};
use crate::limits::{REDIAL_MAX, REDIAL_MIN};

/// A connection that closes within this has failed.
const LASTING: Duration = Duration::from_secs(1);

/// The bootstrap addresses of a node. `C` is the id of a connection attempt.
#[derive(Debug)]
pub(crate) struct Bootstraps<C> {
    entries: Vec<Entry<C>>,
}

#[derive(Debug)]
struct Entry<C> {
    address: Multiaddr,
    expected: Option<PeerId>,
    state: State<C>,
    last_failure: Option<DialFailure>,
    backoff: ExponentialBackoff,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State<C> {
    Due(Instant),
    Dialling(C),
    /// To this peer, since then.
    Connected(PeerId, Instant),
    /// To this one, which is no grape.
    Astray(PeerId),
    /// Never to be dialled again.
    GivenUp,
}

/// What is known of one bootstrap address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootstrapStatus {
    /// The address as it was given.
    pub address: Multiaddr,
    /// The grape that it is connected to.
    pub connected: Option<PeerId>,
    /// Why the last dial failed.
    pub last_failure: Option<DialFailure>,
}

impl<C: Copy + Eq> Bootstraps<C> {
    /// Every address is due at `now`.
    pub(crate) fn new(addresses: impl IntoIterator<Item = Multiaddr>, now: Instant) -> Self {
        let entries = addresses
            .into_iter()
            .map(|address| Entry {
                expected: peer_of(&address),
                address,
                state: State::Due(now),
                last_failure: None,
                backoff: backoff(),
            })
            .collect();
        Self { entries }
    }

    /// The next address to dial, if one is due; the caller answers with
    /// [`on_dialling`](Self::on_dialling).
    pub(crate) fn due(&self, now: Instant) -> Option<(usize, &Multiaddr, Option<PeerId>)> {
        self.entries
            .iter()
            .enumerate()
            .find(|(_, entry)| matches!(entry.state, State::Due(at) if at <= now))
            .map(|(index, entry)| (index, &entry.address, entry.expected))
    }

    /// When the next address will be due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        let due = |entry: &Entry<C>| match entry.state {
            State::Due(at) => Some(at),
            _ => None,
        };
        self.entries.iter().filter_map(due).min()
    }

    /// The address is being dialled.
    pub(crate) fn on_dialling(&mut self, index: usize, connection: C) {
        self.entries[index].state = State::Dialling(connection);
    }

    /// The address's grape is connected already.
    pub(crate) fn on_known(&mut self, index: usize, peer: PeerId, now: Instant) {
        self.entries[index].connected(peer, now);
    }

    /// A dial has led to a peer; returns whether it was one of ours.
    pub(crate) fn on_connected(&mut self, connection: C, peer: PeerId, now: Instant) -> bool {
        let Some(entry) = self.dialling(connection) else {
            return false;
        };
        entry.connected(peer, now);
        true
    }

    /// A dial has failed; returns whether it was one of ours.
    pub(crate) fn on_failed(&mut self, connection: C, failure: DialFailure, now: Instant) -> bool {
        let Some(index) = self.position(connection) else {
            return false;
        };
        self.refuse(index, failure, now);
        true
    }

    /// An address cannot be dialled.
    pub(crate) fn refuse(&mut self, index: usize, failure: DialFailure, now: Instant) {
        let entry = &mut self.entries[index];
        entry.state = if failure.is_retryable() || is_named(&entry.address) {
            State::Due(now + entry.backoff.next().unwrap_or(REDIAL_MAX))
        } else {
            State::GivenUp
        };
        entry.last_failure = Some(failure);
    }

    /// The machine has come into another network: what failed may succeed, what is under way may be on
    /// a way that is gone, and the node's own address may be another's.
    pub(crate) fn on_other_network(&mut self, now: Instant) {
        for entry in &mut self.entries {
            if !matches!(entry.state, State::Connected(..) | State::Astray(_)) {
                entry.state = State::Due(now);
            }
            entry.backoff = backoff();
        }
    }

    /// A peer has said what it is, and it is no grape; returns whether it was taken for one.
    pub(crate) fn on_no_grape(&mut self, peer: &PeerId) -> bool {
        let mut was_taken = false;
        for entry in &mut self.entries {
            if matches!(entry.state, State::Connected(connected, _) if connected == *peer) {
                entry.state = State::Astray(*peer);
                entry.last_failure = Some(DialFailure::NotAGrape);
                was_taken = true;
            }
        }
        was_taken
    }

    /// The last connection to a peer has closed; `has_spoken` tells whether it had said what it is.
    pub(crate) fn on_disconnected(&mut self, peer: &PeerId, has_spoken: bool, now: Instant) {
        for entry in &mut self.entries {
            let since = match entry.state {
                State::Connected(connected, since) if connected == *peer => since,
                State::Astray(connected) if connected == *peer => {
                    entry.state = State::Due(now + entry.backoff.next().unwrap_or(REDIAL_MAX));
                    continue;
                }
                _ => continue,
            };
            if now < since + LASTING {
                let reason = "it closes the connection at once; it may not let this node in";
                entry.last_failure = Some(DialFailure::Unreachable(reason.into()));
                entry.state = State::Due(now + entry.backoff.next().unwrap_or(REDIAL_MAX));
            } else if !has_spoken {
                let reason = "it accepts connections and says nothing; restart it";
                entry.last_failure = Some(DialFailure::Unreachable(reason.into()));
                entry.state = State::Due(now + entry.backoff.next().unwrap_or(REDIAL_MAX));
            } else {
                entry.backoff = backoff();
                entry.state = State::Due(now);
            }
        }
    }

    /// The grapes that are connected, each once.
    pub(crate) fn connected(&self) -> Vec<PeerId> {
        let mut peers = Vec::new();
        for entry in &self.entries {
            if let State::Connected(peer, _) = entry.state
                && !peers.contains(&peer)
            {
                peers.push(peer);
            }
        }
        peers
    }

    /// Whether an address is still at its first dial: nothing is known about it yet.
    pub(crate) fn is_starting(&self) -> bool {
        self.entries.iter().any(|entry| {
            entry.last_failure.is_none()
                && matches!(entry.state, State::Due(_) | State::Dialling(_))
        })
    }

    /// Whether no address can be expected to lead to a grape without somebody's doing: there is
    /// none, or each is answered by another node than it names or by one that is no grape.
    pub(crate) fn is_hopeless(&self) -> bool {
        let is_lost = |entry: &Entry<C>| match (&entry.state, &entry.last_failure) {
            (State::GivenUp | State::Astray(_), _) => true,
            (State::Connected(..), _) => false,
            (_, Some(DialFailure::WrongPeer { .. } | DialFailure::NotAGrape)) => true,
            _ => false,
        };
        self.entries.iter().all(is_lost)
    }

    /// Why no grape is connected.
    pub(crate) fn failures(&self) -> NoGrape {
        let tried = self.entries.iter().filter_map(|entry| {
            let failure = entry.last_failure.clone()?;
            Some((entry.address.clone(), failure))
        });
        NoGrape {
            tried: tried.collect(),
        }
    }

    /// Why no grape answers, although one may be connected.
    pub(crate) fn silent(&self) -> NoGrape {
        let tried = self.entries.iter().map(|entry| {
            let failure = entry.last_failure.clone();
            let silent = || DialFailure::Unreachable("it does not answer".into());
            (entry.address.clone(), failure.unwrap_or_else(silent))
        });
        NoGrape {
            tried: tried.collect(),
        }
    }

    /// What is known of each address, in the order they were given.
    pub(crate) fn status(&self) -> Vec<BootstrapStatus> {
        let status = |entry: &Entry<C>| BootstrapStatus {
            address: entry.address.clone(),
            connected: match entry.state {
                State::Connected(peer, _) => Some(peer),
                _ => None,
            },
            last_failure: entry.last_failure.clone(),
        };
        self.entries.iter().map(status).collect()
    }

    fn position(&self, connection: C) -> Option<usize> {
        self.entries
            .iter()
            .position(|entry| entry.state == State::Dialling(connection))
    }

    fn dialling(&mut self, connection: C) -> Option<&mut Entry<C>> {
        let index = self.position(connection)?;
        self.entries.get_mut(index)
    }
}

/// Whether DNS says where an address leads.
pub(crate) fn is_named(address: &Multiaddr) -> bool {
    use Protocol::{Dns, Dns4, Dns6, Dnsaddr};
    address
        .iter()
        .any(|part| matches!(part, Dns(_) | Dns4(_) | Dns6(_) | Dnsaddr(_)))
}

impl<C> Entry<C> {
    fn connected(&mut self, peer: PeerId, now: Instant) {
        self.state = State::Connected(peer, now);
        self.last_failure = None;
    }
}

/// The id that an address ends in.
pub(crate) fn peer_of(address: &Multiaddr) -> Option<PeerId> {
    match address.iter().last() {
        Some(Protocol::P2p(peer)) => Some(peer),
        _ => None,
    }
}

fn backoff() -> ExponentialBackoff {
    ExponentialBuilder::default()
        .with_min_delay(REDIAL_MIN)
        .with_max_delay(REDIAL_MAX)
        .with_jitter()
        .without_max_times()
        .build()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const ADDRESS: &str = "/ip4/127.0.0.1/tcp/20001";

    fn bootstraps(addresses: &[&str], now: Instant) -> Bootstraps<u32> {
        Bootstraps::new(addresses.iter().map(|text| text.parse().unwrap()), now)
    }

    fn unreachable() -> DialFailure {
        DialFailure::Unreachable("refused".into())
    }

    #[test]
    fn every_address_is_dialled_at_once() {
        let now = Instant::now();
        let mut bootstraps = bootstraps(&[ADDRESS, "/ip4/127.0.0.1/tcp/20002"], now);
        for connection in 0..2 {
            let (index, ..) = bootstraps.due(now).unwrap();
            bootstraps.on_dialling(index, connection);
        }
        assert!(bootstraps.due(now).is_none());
    }

    #[test]
    fn a_failing_address_is_dialled_again_after_growing_pauses() {
        let mut now = Instant::now();
        let mut bootstraps = bootstraps(&[ADDRESS], now);
        let mut pauses = Vec::new();
        for connection in 0..12 {
            bootstraps.on_dialling(0, connection);
            bootstraps.on_failed(connection, unreachable(), now);
            let at = bootstraps.next_due().unwrap();
            pauses.push(at - now);
            now = at;
        }
        assert!(pauses[0] >= REDIAL_MIN, "{pauses:?}");
        assert!(pauses[11] >= REDIAL_MAX, "{pauses:?}");
        assert!(
            pauses.iter().all(|pause| *pause <= 2 * REDIAL_MAX),
            "{pauses:?}"
        );
    }

    #[test]
    fn the_id_in_an_address_is_what_is_expected_there() {
        let grape = PeerId::random();
        let now = Instant::now();
        let with_id = format!("{ADDRESS}/p2p/{grape}");
        for (address, expected) in [(ADDRESS, None), (with_id.as_str(), Some(grape))] {
            let bootstraps = bootstraps(&[address], now);
            assert_eq!(bootstraps.due(now).unwrap().2, expected);
        }
    }

    #[test]
    fn a_node_with_only_wrong_or_own_addresses_is_hopeless() {
        let now = Instant::now();
        let wrong = DialFailure::WrongPeer {
            expected: PeerId::random(),
            found: PeerId::random(),
        };
        for (failure, hopeless) in [
            (wrong, true),
            (DialFailure::OwnAddress, true),
            (unreachable(), false),
        ] {
            let mut bootstraps = bootstraps(&[ADDRESS], now);
            assert!(bootstraps.is_starting());
            assert!(!bootstraps.is_hopeless());
            bootstraps.on_dialling(0, 1);
            bootstraps.on_failed(1, failure.clone(), now);
            assert!(!bootstraps.is_starting());
            assert_eq!(bootstraps.is_hopeless(), hopeless, "{failure}");
            assert_eq!(bootstraps.failures().tried[0].1, failure);
        }
        assert!(bootstraps(&[], now).is_hopeless());
    }

    #[test]
    fn the_nodes_own_address_is_not_dialled_twice() {
        let now = Instant::now();
        let mut bootstraps = bootstraps(&[ADDRESS], now);
        bootstraps.on_dialling(0, 1);
        bootstraps.on_failed(1, DialFailure::OwnAddress, now);
        assert_eq!(bootstraps.next_due(), None);
    }

    #[test]
    fn a_name_that_leads_to_this_node_may_lead_elsewhere_the_next_time() {
        let now = Instant::now();
        let mut bootstraps = bootstraps(&["/dns/grapes.example.org/tcp/20001"], now);
        bootstraps.on_dialling(0, 1);
        bootstraps.on_failed(1, DialFailure::OwnAddress, now);
        assert!(bootstraps.next_due().is_some());
        assert!(!bootstraps.is_hopeless());
    }

    #[test]
    fn in_another_network_every_address_is_dialled_at_once() {
        let now = Instant::now();
        let addresses = [
            "/ip4/10.0.0.1/tcp/1",
            "/ip4/10.0.0.2/tcp/1",
            "/ip4/10.0.0.3/tcp/1",
        ];
        let mut bootstraps = bootstraps(&[ADDRESS, addresses[0], addresses[1], addresses[2]], now);
        for (index, connection) in (0..4).enumerate() {
            bootstraps.on_dialling(index, connection);
        }
        let grape = PeerId::random();
        bootstraps.on_connected(0, grape, now);
        bootstraps.on_failed(1, unreachable(), now);
        bootstraps.on_failed(2, DialFailure::OwnAddress, now);
        assert!(bootstraps.due(now).is_none());
        bootstraps.on_other_network(now);
        for index in 1..4 {
            assert_eq!(bootstraps.due(now).unwrap().0, index);
            bootstraps.on_dialling(index, 10);
        }
        assert!(bootstraps.due(now).is_none());
        assert!(
            !bootstraps.on_failed(3, unreachable(), now),
            "it is forgotten"
        );
        assert_eq!(bootstraps.connected(), [grape]);
    }

    #[test]
    fn a_peer_that_is_no_grape_is_left_until_it_is_gone() {
        let (now, peer) = (Instant::now(), PeerId::random());
        let mut bootstraps = bootstraps(&[ADDRESS], now);
        bootstraps.on_dialling(0, 1);
        bootstraps.on_connected(1, peer, now);
        assert!(!bootstraps.on_no_grape(&PeerId::random()));
        assert!(bootstraps.on_no_grape(&peer));
        assert!(!bootstraps.on_no_grape(&peer), "only once");
        assert_eq!(
            (bootstraps.connected(), bootstraps.next_due()),
            (vec![], None)
        );
        assert!(bootstraps.is_hopeless());
        assert_eq!(bootstraps.failures().tried[0].1, DialFailure::NotAGrape);
        bootstraps.on_disconnected(&peer, true, now + LASTING);
        assert!(bootstraps.next_due().is_some());
        assert!(bootstraps.is_hopeless(), "while nobody else answers there");
        bootstraps.on_dialling(0, 2);
        bootstraps.on_connected(2, PeerId::random(), now);
        assert!(!bootstraps.is_hopeless());
    }

    #[test]
    fn somebody_elses_connection_changes_nothing() {
        let now = Instant::now();
        let mut bootstraps = bootstraps(&[ADDRESS], now);
        bootstraps.on_dialling(0, 1);
        assert!(!bootstraps.on_connected(2, PeerId::random(), now));
        assert!(!bootstraps.on_failed(2, unreachable(), now));
        assert!(bootstraps.is_starting());
    }

    /// Dials the only address, connects, and closes the connection after so long. Returns when the
    /// address is due again, after the closing.
    fn pause_after(lasted: Duration) -> Duration {
        let start = Instant::now();
        let address: Multiaddr = "/ip4/192.0.2.1/tcp/20001".parse().unwrap();
        let grape = PeerId::random();
        let mut bootstraps = Bootstraps::new([address], start);
        bootstraps.on_dialling(0, 1);
        assert!(bootstraps.on_connected(1, grape, start));
        bootstraps.on_disconnected(&grape, true, start + lasted);
        bootstraps.next_due().unwrap() - (start + lasted)
    }

    #[test]
    fn a_grape_that_was_lost_is_dialled_at_once() {
        assert_eq!(pause_after(LASTING), Duration::ZERO);
    }

    #[test]
    fn a_grape_that_turns_this_node_away_is_dialled_after_a_pause() {
        assert!(pause_after(Duration::from_millis(1)) >= REDIAL_MIN);
    }
}
