//! Whom this node is connected to: its bootstrap grapes, grapes that dialled it, all peers.
//!
//! A grape that dials this grape is dialled back at an address it tells, at the host it came from
//! and nowhere else, before Kademlia may pass it on: what a peer claims is never believed, and no
//! peer can make this node dial a third.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::time::Instant;

use libp2p::core::ConnectedPoint;
use libp2p::core::transport::timeout::TransportTimeoutError;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::{ConnectionId, DialError};
use libp2p::{Multiaddr, PeerId, identify};
use tokio::sync::watch;

use super::dns::Unresolved;
use super::host;
use crate::error::{DialFailure, causes, innermost, system_error};
use crate::limits::MAX_ADDRESSES;
use crate::proto::bootstrap::{BootstrapStatus, Bootstraps, peer_of};
use crate::proto::capabilities::{Capabilities, Capability};

/// The nodes that are not connected of which it is remembered what they can do: as many as a routing
/// table may hold.
const MAX_REMEMBERED: usize = 20 * 256;

/// What a node knows of its own place in the network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Each bootstrap address, in the order they were given.
    pub bootstrap: Vec<BootstrapStatus>,
    /// The addresses this node can be dialled at, each ending in `/p2p/<id>`.
    pub addresses: Vec<Multiaddr>,
    /// How many peers are connected, grapes and others.
    pub peers: usize,
    /// Whether this node has asked its way through the whole network once, so that it knows the
    /// grapes near it and some of all others. It begins half a second after it has met the first.
    pub explored: bool,
    /// Whether a grape has heard of another running node with this node's key, so that messages to it may
    /// reach the other one. Known within some 20 seconds, while both announce names.
    pub elsewhere: bool,
}

impl Status {
    /// Whether a bootstrap grape is connected.
    pub fn is_online(&self) -> bool {
        self.bootstrap.iter().any(|entry| entry.connected.is_some())
    }
}

/// Another grape that a grape knows: connected, or in its routing table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KnownGrape {
    pub(crate) peer: PeerId,
    /// It is told of workers, as far as it has said what it can do.
    pub(crate) takes_workers: bool,
    /// A number that no earlier connection with any peer has had; none if it is not connected.
    pub(crate) connected: Option<u64>,
}

/// The other nodes that keep what is announced, as far as a node knows them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Keepers {
    pub(crate) grapes: Vec<KnownGrape>,
    /// Those that keep it for Kademlia or as a rendezvous point only.
    pub(crate) foreign: Vec<PeerId>,
    /// How many more are in the routing table and have not told what they can do.
    pub(crate) untold: usize,
}

/// The connections of a node.
#[derive(Debug)]
pub(crate) struct Connectivity {
    local: PeerId,
    pub(crate) bootstraps: Bootstraps<ConnectionId>,
    peers: HashMap<PeerId, Peer>,
    /// What those of the routing table told that are not connected any more.
    remembered: HashMap<PeerId, Capabilities>,
    /// How many peers have connected so far.
    connected: u64,
    /// Dials to a candidate of a lookup, or back to a grape.
    dials: HashMap<PeerId, Vec<(ConnectionId, Vec<Multiaddr>)>>,
    addresses: Vec<Multiaddr>,
    explored: bool,
    /// The grapes that have heard of another node with this node's key.
    elsewhere: HashSet<PeerId>,
    status: watch::Sender<Status>,
}

#[derive(Debug, Default)]
struct Peer {
    connections: HashMap<ConnectionId, Multiaddr>,
    /// The number of this connection of all that were made.
    number: u64,
    /// What it can do, once it has told.
    told: Option<Capabilities>,
    /// A dial of this node's has led to it.
    is_reached: bool,
    /// This node has tried to dial it back.
    dialled_back: bool,
}

impl Peer {
    fn can(&self, capability: Capability) -> bool {
        self.told.is_some_and(|told| told.has(capability))
    }

    fn keeps_announcements(&self) -> bool {
        self.told.is_some_and(Capabilities::keeps_announcements)
    }

    /// It says that it is one, and this node has reason to know it: anybody may connect and say so.
    fn is_taken_for_grape(&self) -> bool {
        self.can(Capability::Names) && self.is_reached
    }
}

/// What has become of a connection.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Change {
    /// It is the first or was the last one with the peer.
    pub(crate) peer: bool,
    /// It leads to a bootstrap grape.
    pub(crate) bootstrap: bool,
}

impl Connectivity {
    pub(crate) fn new(
        local: PeerId,
        bootstrap: Vec<Multiaddr>,
        now: Instant,
    ) -> (Self, watch::Receiver<Status>) {
        let (status, receiver) = watch::channel(Status::default());
        let connectivity = Self {
            local,
            bootstraps: Bootstraps::new(bootstrap, now),
            peers: HashMap::new(),
            remembered: HashMap::new(),
            connected: 0,
            dials: HashMap::new(),
            addresses: Vec::new(),
            explored: false,
            elsewhere: HashSet::new(),
            status,
        };
        connectivity.publish();
        (connectivity, receiver)
    }

    pub(crate) fn is_connected(&self, peer: &PeerId) -> bool {
        self.peers.contains_key(peer)
    }

    /// The grapes this node is connected to, bootstrap grapes or not.
    pub(crate) fn grapes(&self) -> Vec<PeerId> {
        let mut grapes = self.bootstraps.connected();
        let named = grapes.len();
        for (peer, known) in &self.peers {
            if known.is_taken_for_grape() && !grapes[..named].contains(peer) {
                grapes.push(*peer);
            }
        }
        grapes
    }

    /// Whether somebody is connected that has said that it keeps what is announced.
    pub(crate) fn knows_keeper(&self) -> bool {
        let mut reached = self.peers.values().filter(|peer| peer.is_reached);
        let bootstraps = || self.bootstraps.connected();
        reached.any(Peer::keeps_announcements)
            || bootstraps().iter().any(|grape| self.is_keeper(grape))
    }

    /// Whether a connected peer is taken for one that keeps what is announced.
    pub(crate) fn is_keeper(&self, peer: &PeerId) -> bool {
        let known = self.peers.get(peer);
        let keeps_announcements = known.is_some_and(Peer::keeps_announcements);
        let is_reached = known.is_some_and(|known| known.is_reached);
        keeps_announcements && (is_reached || self.bootstraps.connected().contains(peer))
    }

    /// Those that are connected and those of the routing table that keep what is announced, each once.
    pub(crate) fn keepers(&mut self, routed: HashSet<PeerId>) -> Keepers {
        self.remembered.retain(|peer, _| routed.contains(peer));
        let bootstraps = self.bootstraps.connected();
        let mut peers: Vec<_> = bootstraps.iter().copied().chain(routed).collect();
        let reached = self.peers.iter().filter(|(_, known)| known.is_reached);
        peers.extend(reached.map(|(peer, _)| *peer));
        peers.sort_unstable();
        peers.dedup();
        let mut keepers = Keepers::default();
        for peer in peers {
            let known = self.peers.get(&peer);
            let connected = known.map(|known| known.number);
            let told = match known {
                Some(known) => known.told,
                None => self.remembered.get(&peer).copied(),
            };
            match told {
                Some(told) if told.has(Capability::Names) => {
                    let takes_workers = told.has(Capability::Registry);
                    keepers.grapes.push(KnownGrape {
                        peer,
                        connected,
                        takes_workers,
                    });
                }
                Some(told) if told.keeps_announcements() => keepers.foreign.push(peer),
                // One that the user has named is taken for a grape until it says otherwise.
                None if bootstraps.contains(&peer) => keepers.grapes.push(KnownGrape {
                    peer,
                    connected,
                    takes_workers: false,
                }),
                None if known.is_none() => keepers.untold += 1,
                _ => {}
            }
        }
        keepers
    }

    /// Whether a connected peer has told that it can do something.
    pub(crate) fn can(&self, peer: &PeerId, capability: Capability) -> bool {
        let known = self.peers.get(peer);
        known.is_some_and(|known| known.can(capability))
    }

    /// The address a peer is connected from, for its prefix.
    pub(crate) fn remote_address(&self, peer: &PeerId) -> Option<&Multiaddr> {
        self.peers.get(peer)?.connections.values().next()
    }

    /// This node can be dialled at these addresses.
    pub(crate) fn on_addresses(&mut self, addresses: &[Multiaddr]) {
        let with_id = |address: &Multiaddr| address.clone().with_p2p(self.local);
        let addresses = addresses.iter().map(with_id);
        self.addresses = addresses
            .map(|told| told.unwrap_or_else(|other| other))
            .collect();
        self.publish();
    }

    /// How many dials to this peer are under way.
    pub(crate) fn dials(&self, peer: &PeerId) -> usize {
        self.dials.get(peer).map_or(0, Vec::len)
    }

    /// Whether a dial to this peer at an address is under way.
    pub(crate) fn is_dialling(&self, peer: &PeerId, address: &Multiaddr) -> bool {
        let mut dials = self.dials.get(peer).into_iter().flatten();
        dials.any(|(_, addresses)| addresses.contains(address))
    }

    /// A dial to a peer has begun.
    pub(crate) fn on_dialling(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        addresses: Vec<Multiaddr>,
    ) {
        let dials = self.dials.entry(peer).or_default();
        dials.push((connection, addresses));
    }

    /// A connection stands.
    pub(crate) fn on_established(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        endpoint: &ConnectedPoint,
        now: Instant,
    ) -> Change {
        self.dials.remove(&peer);
        let known = self.peers.entry(peer).or_default();
        known.is_reached |= endpoint.is_dialer();
        let first = known.connections.is_empty();
        if first {
            self.connected += 1;
            known.number = self.connected;
        }
        let remote = endpoint.get_remote_address().clone();
        known.connections.insert(connection, remote);
        let bootstrap = self.bootstraps.on_connected(connection, peer, now);
        self.publish();
        Change {
            peer: first,
            bootstrap,
        }
    }

    /// A connection has closed.
    pub(crate) fn on_closed(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        now: Instant,
    ) -> Change {
        let Some(known) = self.peers.get_mut(&peer) else {
            return Change::default();
        };
        known.connections.remove(&connection);
        if !known.connections.is_empty() {
            return Change::default();
        }
        let (told, is_reached) = (known.told, known.is_reached);
        self.peers.remove(&peer);
        if let Some(told) = told
            && is_reached
            && told.has(Capability::Kademlia)
            && self.remembered.len() < MAX_REMEMBERED
        {
            self.remembered.insert(peer, told);
        }
        self.elsewhere.remove(&peer);
        let has_spoken = told.is_some();
        let bootstrap = self.bootstraps.connected().contains(&peer);
        self.bootstraps.on_disconnected(&peer, has_spoken, now);
        self.publish();
        Change {
            peer: true,
            bootstrap,
        }
    }

    /// A dial has failed. Returns the peer and the addresses if the dial was begun for a lookup.
    pub(crate) fn on_dial_failed(
        &mut self,
        connection: ConnectionId,
        peer: Option<PeerId>,
        failure: DialFailure,
        now: Instant,
    ) -> Option<(PeerId, Vec<Multiaddr>)> {
        if self.bootstraps.on_failed(connection, failure, now) {
            self.publish();
        }
        let peer = peer?;
        let dials = self.dials.get_mut(&peer)?;
        let index = dials.iter().position(|(dial, _)| *dial == connection)?;
        let (_, addresses) = dials.swap_remove(index);
        if dials.is_empty() {
            self.dials.remove(&peer);
        }
        Some((peer, addresses))
    }

    /// A peer has told what it speaks. Returns whether it is no grape and was taken for one, because
    /// a bootstrap address has led to it.
    pub(crate) fn on_identified(&mut self, peer: PeerId, info: &identify::Info) -> bool {
        let Some(known) = self.peers.get_mut(&peer) else {
            return false;
        };
        let told = Capabilities::told(&info.protocols);
        known.told = Some(told);
        let was_taken = !told.keeps_announcements() && self.bootstraps.on_no_grape(&peer);
        self.publish();
        was_taken
    }

    /// Whether a peer has told what it can do.
    pub(crate) fn has_told(&self, peer: &PeerId) -> bool {
        self.peers
            .get(peer)
            .is_some_and(|known| known.told.is_some())
    }

    /// Where to dial a grape back that has dialled this one, once.
    pub(crate) fn dial_back(&mut self, peer: &PeerId, tells: &[Multiaddr]) -> Vec<Multiaddr> {
        let known = self.peers.get_mut(peer);
        let known = known.filter(|known| known.can(Capability::Kademlia));
        let Some(known) = known.filter(|known| !known.is_reached && !known.dialled_back) else {
            return Vec::new();
        };
        known.dialled_back = true;
        self.hosts(peer).own(tells)
    }

    /// The hosts that a peer is connected from.
    pub(crate) fn hosts(&self, peer: &PeerId) -> Hosts {
        let known = self.peers.get(peer);
        let remotes = known
            .into_iter()
            .flat_map(|known| known.connections.values());
        Hosts(remotes.map(host).collect())
    }

    /// Whether there are so many connections that those are closed that can be made again: half of as
    /// many as others may open.
    pub(crate) fn is_crowded(&self, inbound: u32) -> bool {
        self.peers.len() > inbound as usize / 2
    }

    /// Whether a peer has said what it speaks, and is no grape by that.
    pub(crate) fn is_no_grape(&self, peer: &PeerId) -> bool {
        let known = self.peers.get(peer);
        known.is_some_and(|known| known.told.is_some() && !known.keeps_announcements())
    }

    /// A connected grape knows of so many other nodes with this node's key. Returns whether that is news.
    pub(crate) fn on_told(&mut self, grape: PeerId, elsewhere: u64) -> bool {
        let was_known = !self.elsewhere.is_empty();
        let changed = match elsewhere > 0 && self.is_connected(&grape) {
            true => self.elsewhere.insert(grape),
            false => self.elsewhere.remove(&grape),
        };
        if changed {
            self.publish();
        }
        !was_known && !self.elsewhere.is_empty()
    }

    /// This node has asked its way through the whole network.
    pub(crate) fn on_explored(&mut self) {
        if !std::mem::replace(&mut self.explored, true) {
            self.publish();
        }
    }

    /// Tells who watches, if anything has changed.
    pub(crate) fn publish(&self) {
        let mut bootstrap = self.bootstraps.status();
        for entry in &mut bootstrap {
            // Until it has said what it is, it may be no grape.
            let is_known = |peer: &PeerId| {
                let known = self.peers.get(peer);
                known.is_some_and(Peer::keeps_announcements)
            };
            entry.connected = entry.connected.filter(is_known);
        }
        let status = Status {
            bootstrap,
            addresses: self.addresses.clone(),
            peers: self.peers.len(),
            explored: self.explored,
            elsewhere: !self.elsewhere.is_empty(),
        };
        self.status.send_if_modified(|known| {
            let changed = *known != status;
            *known = status;
            changed
        });
    }
}

/// The hosts of a peer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Hosts(HashSet<Option<IpAddr>>);

impl Hosts {
    /// Those of the addresses that a peer tells that are at its own hosts, and lead nowhere else.
    pub(crate) fn own(&self, tells: &[Multiaddr]) -> Vec<Multiaddr> {
        let is_own = |address: &&Multiaddr| is_plain(address) && self.0.contains(&host(address));
        let own = tells.iter().filter(is_own).take(MAX_ADDRESSES);
        own.cloned().collect()
    }
}

/// Whether an address leads to the host that it begins with: transports dial the last one that it
/// names.
pub(super) fn is_plain(address: &Multiaddr) -> bool {
    let mut parts = address.iter().peekable();
    let host = parts.next();
    let leads_there = match (host, parts.next(), parts.peek()) {
        (Some(Protocol::Memory(_)), None | Some(Protocol::P2p(_)), None) => return true,
        (Some(Protocol::Ip4(_) | Protocol::Ip6(_)), Some(Protocol::Tcp(_)), _) => true,
        (
            Some(Protocol::Ip4(_) | Protocol::Ip6(_)),
            Some(Protocol::Udp(_)),
            Some(Protocol::QuicV1),
        ) => {
            parts.next();
            true
        }
        _ => false,
    };
    let ends_there = matches!(
        (parts.next(), parts.next()),
        (None | Some(Protocol::P2p(_)), None)
    );
    leads_there && ends_there
}

/// An address without the id that it may end in.
pub(super) fn without_id(address: &Multiaddr) -> Multiaddr {
    let mut address = address.clone();
    if peer_of(&address).is_some() {
        address.pop();
    }
    address
}

/// A dial error in words for a person.
pub(crate) fn describe(error: &DialError, expected: Option<PeerId>) -> DialFailure {
    match error {
        // The Swarm leaves out the addresses that it listens on itself.
        DialError::LocalPeerId { .. } | DialError::NoAddresses => DialFailure::OwnAddress,
        DialError::WrongPeerId { obtained, .. } => match expected {
            Some(expected) => DialFailure::WrongPeer {
                expected,
                found: *obtained,
            },
            None => DialFailure::Unreachable(format!("the node {obtained} answers there")),
        },
        DialError::Transport(errors) => {
            let reasons: Vec<_> = errors.iter().map(|(_, error)| reason(error)).collect();
            DialFailure::Unreachable(reasons.join(", "))
        }
        DialError::Denied { cause } => DialFailure::Unreachable(cause.to_string()),
        other => DialFailure::Unreachable(other.to_string()),
    }
}

/// The cause that says most, for a person.
fn reason(error: &(dyn std::error::Error + 'static)) -> String {
    let mut causes = causes(error);
    if let Some(unresolved) = causes.find_map(|cause| cause.downcast_ref::<Unresolved>()) {
        return unresolved.to_string();
    }
    let reason = innermost(error).to_string();
    if system_error(error) == Some(io::ErrorKind::ConnectionRefused) {
        return "nobody listens there: start a grape, or correct the address".into();
    }
    // libp2p keeps nothing but the text of these two.
    if reason == TransportTimeoutError::<io::Error>::Timeout.to_string() {
        return "nobody answers there: start a grape, correct the address, or look for a firewall"
            .into();
    }
    if reason == io::Error::from(io::ErrorKind::InvalidData).to_string() {
        return "another protocol is spoken there: use an address that a grape prints".into();
    }
    // "(os error 111)" tells a person nothing more.
    match reason.split_once(" (os error") {
        Some((reason, _)) => reason.into(),
        None => reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_leads_elsewhere_than_it_begins_is_not_plain() {
        for (address, expected) in [
            ("/ip4/192.0.2.1/tcp/1", true),
            ("/ip6/2001:db8::1/tcp/1", true),
            ("/ip4/192.0.2.1/udp/1/quic-v1", true),
            ("/memory/1", true),
            ("/ip4/192.0.2.1/ip4/198.51.100.1/tcp/1", false),
            ("/ip4/192.0.2.1/dns4/example.org/tcp/1", false),
            ("/ip4/192.0.2.1/tcp/1/ip4/198.51.100.1/tcp/1", false),
            ("/ip4/192.0.2.1/udp/1", false),
            ("/ip4/192.0.2.1/udp/1/quic-v1/ip4/198.51.100.1", false),
            ("/dns/example.org/tcp/1", false),
            ("/memory/1/tcp/1", false),
            ("/tcp/1", false),
            ("", false),
        ] {
            let parsed: Multiaddr = address.parse().expect("an address");
            assert_eq!(is_plain(&parsed), expected, "{address}");
            let with_id = parsed.with(Protocol::P2p(PeerId::random()));
            assert_eq!(is_plain(&with_id), expected, "{with_id}");
        }
    }
}
