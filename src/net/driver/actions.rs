//! Carries out what the concerns decide.

use std::sync::Arc;
use std::time::Instant;

use libp2p::swarm::DialError;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::{Multiaddr, PeerId, kad};

use super::Driver;
use crate::error::{AnnounceError, LookupError};
use crate::name::ServiceName;
use crate::net::connectivity::{Keepers, KnownGrape, describe, without_id};
use crate::net::rpc::kept::Question;
use crate::net::rpc::link::Lane;
use crate::net::rpc::single::Outbound;
use crate::net::{discovery, names};
use crate::proto::announce::Place;
use crate::proto::capabilities::Capability;
use crate::proto::lookup::{Outcome, Step};
use crate::proto::registrations::Known;

/// The dials to one candidate of lookups at once: one for the addresses that came first, which may be
/// wrong, and some for those that came later.
const MAX_DIALS: usize = 4;

impl Driver {
    pub(super) fn carry_out(&mut self) {
        let now = Instant::now();
        if self.grapes.is_look_due(now) {
            self.look_at_grapes(now);
        }
        self.carry_out_lookups(now);
        self.carry_out_names(now);
        while let Some((name, place)) = self.discovery.announcements.poll_publish(now) {
            self.publish(name, place, now);
        }
        self.measure();
    }

    pub(super) fn carry_out_names(&mut self, now: Instant) {
        let announces = self.discovery.announcements.len() > 0;
        let record = announces.then(|| self.rendezvous.signed()).flatten();
        while let Some(message) = self.names.poll_message(record.as_ref(), now) {
            self.metrics.names_requests.add(1);
            self.send(message);
        }
        while let Some(name) = self.names.registrations.poll_walk(now) {
            let kad = &mut self.swarm.behaviour_mut().kad;
            self.discovery.walk(kad, name);
        }
        while let Some(name) = self.names.registrations.poll_published() {
            let published = self.discovery.announcements.on_kept(&name);
            self.on_published(published, &name);
        }
        while let Some(grape) = self.names.registrations.poll_without_registry() {
            self.on_no_registry(grape);
        }
        let by_kademlia = self.registrar || self.names.registrations.knows_one_without_registry();
        self.discovery.announcements.use_kademlia(by_kademlia);
    }

    /// Asks a provider by a stream of its own, and keeps one open for further questions if lookups ask
    /// it again and again.
    pub(super) fn ask_serves(&mut self, peer: PeerId, name: ServiceName) {
        let behaviour = self.swarm.behaviour_mut();
        let asked_again = self.requests.ask_serves(&mut behaviour.single, peer, name);
        if asked_again {
            self.keep_stream(peer, Lane::Small);
        }
    }

    /// Keeps a stream to a peer, if it is one that keeps them.
    pub(super) fn keep_stream(&mut self, peer: PeerId, lane: Lane) {
        if self.connectivity.can(&peer, Capability::KeptStreams) {
            let streams = &mut self.swarm.behaviour_mut().streams;
            let metrics = Arc::clone(&self.metrics);
            self.routes
                .link(peer)
                .keep(lane, metrics, || streams.open(peer));
        }
    }

    /// Sends a message over a kept stream if there is one, and otherwise over one of its own. What
    /// finds no room is not sent.
    pub(super) fn send(&mut self, message: names::Message) {
        let (peer, lane) = (message.peer, Lane::of(&message.payload));
        let (service, payload) = (message.service.into(), message.payload.into());
        let question = Question {
            service: &service,
            payload: &payload,
            deadline: message.deadline,
        };
        let link = self.routes.link(peer);
        let Err(outcome) = link.lane(lane).offer(question, message.outcome) else {
            return;
        };
        let Ok(slot) = Arc::clone(link.single()).try_acquire_owned() else {
            return;
        };
        let request = Outbound {
            provider: peer,
            service,
            payload,
            deadline: message.deadline,
            outcome,
            slot,
        };
        let behaviour = self.swarm.behaviour_mut();
        self.requests.call(&mut behaviour.single, request);
        self.keep_stream(peer, lane);
    }

    /// Looks which grapes are known, and tells all who have to know.
    fn look_at_grapes(&mut self, now: Instant) {
        let routed = discovery::routed(&mut self.swarm.behaviour_mut().kad);
        let Keepers {
            grapes: known,
            foreign,
            untold,
        } = {
            let routed = routed.iter().map(|(peer, _)| *peer);
            self.connectivity.keepers(routed.collect())
        };
        if self.registrar {
            self.registry.on_routed(routed);
        }
        let peer = |grape: &KnownGrape| grape.peer;
        let others = {
            let before = self.known_grapes.borrow();
            before.iter().map(peer).ne(known.iter().map(peer))
        };
        if others {
            tracing::debug!(grapes = known.len(), "the known grapes have changed");
        }
        let is_connected = |grape: &PeerId| self.connectivity.is_connected(grape);
        let strangers = foreign.len() + untold;
        self.grapes
            .on_known(known.len(), strangers, others, is_connected, now);
        self.registry.on_grapes(known.len());
        let bootstraps = self.connectivity.bootstraps.connected();
        let grapes = known.iter().map(|grape| (grape.peer, false));
        let foreign = foreign.into_iter().map(|peer| (peer, true));
        let kinds = grapes.chain(foreign).map(|(peer, is_foreign)| Known {
            is_bootstrap: bootstraps.contains(&peer),
            peer,
            is_foreign,
        });
        let registrations = &mut self.names.registrations;
        registrations.on_grapes(&kinds.collect::<Vec<_>>(), self.grapes.scope(), now);
        self.known_grapes.send_if_modified(|before| {
            let changed = *before != known;
            *before = known;
            changed
        });
    }

    pub(super) fn measure(&mut self) {
        let open = self.server.open_requests();
        self.metrics.open_requests.set(open as u64);
        let announced = self.discovery.announcements.len();
        self.metrics.announced.set(announced as u64);
    }

    pub(super) fn carry_out_lookups(&mut self, now: Instant) {
        while let Some(step) = self.discovery.lookups.poll_step() {
            self.carry_out_lookup(step, now);
        }
    }

    pub(super) fn carry_out_lookup(&mut self, step: Step<kad::QueryId>, now: Instant) {
        tracing::trace!(?step, "a lookup goes on");
        let behaviour = self.swarm.behaviour_mut();
        match step {
            Step::Query(name) => self.discovery.query(&mut behaviour.kad, &name),
            Step::FinishQuery(id) => {
                if let Some(mut query) = behaviour.kad.query_mut(&id) {
                    query.finish();
                }
            }
            Step::Find(grape, name) => self.names.find(grape, name),
            Step::Discover(grape, name) => {
                let learned = self
                    .rendezvous
                    .discover(&mut behaviour.rendezvous, grape, name);
                self.on_rendezvous(learned, now);
            }
            Step::Dial(peer, addresses) => self.dial_candidate(peer, addresses, now),
            Step::Ask(peer, name) if self.routes.link(peer).lane(Lane::Small).is_open() => {
                let message = self.names.ask_serves(peer, name);
                self.send(message);
            }
            Step::Ask(peer, name) => self.ask_serves(peer, name),
            Step::Found(name, provider) => {
                self.routes.found(&name, provider, now);
                self.discovery.on_found(&name, provider);
            }
            Step::Settled(name, outcome) => self.discovery.on_settled(&name, &outcome),
            Step::Unreached(name, last, unreached) => {
                self.discovery.on_whole(&name, last, Ok(&unreached));
            }
            Step::TooLate(name, last) => {
                let late = Err(LookupError::TimedOut(name.clone()));
                self.discovery.on_whole(&name, last, late);
            }
            Step::Done(name, outcome) => {
                tracing::debug!(%name, ?outcome, "a lookup is over");
                let live: &[PeerId] = match &outcome {
                    Outcome::Live(providers) => providers,
                    _ => &[],
                };
                self.metrics.lookups_found.add(u64::from(!live.is_empty()));
                self.routes.looked_up(&name, live, now);
                match outcome {
                    // A grape alone knows all there is to know.
                    Outcome::Unanswered if !self.registrar || self.knows_others() => {
                        let silent = self.connectivity.bootstraps.silent();
                        self.discovery.refuse(&name, LookupError::NoGrape(silent));
                    }
                    outcome => self.discovery.on_done(&name, &outcome),
                }
                self.release_held();
            }
        }
    }

    fn knows_others(&self) -> bool {
        !self.known_grapes.borrow().is_empty()
    }

    pub(super) fn dial_candidate(&mut self, peer: PeerId, addresses: Vec<Multiaddr>, now: Instant) {
        let dials = self.connectivity.dials(&peer);
        let is_new = |address: &Multiaddr| !self.connectivity.is_dialling(&peer, address);
        let new: Vec<_> = addresses.iter().filter(|a| is_new(a)).cloned().collect();
        if dials > 0 && new.is_empty() {
            return;
        }
        if dials >= MAX_DIALS {
            self.discovery.lookups.put_back(&peer, &new);
            return;
        }
        // Kademlia may be dialling it with fewer addresses; the connection limits bear a second.
        // A port of its own, as for every dial here: one that is dialled from again and again is
        // refused by the system while an earlier connection to the same address winds down.
        // In the form of Kademlia's, so that none that it knows too is dialled twice.
        let with_id = |address: Multiaddr| address.with_p2p(peer).unwrap_or_else(|other| other);
        let opts = DialOpts::peer_id(peer)
            .addresses(new.iter().cloned().map(with_id).collect())
            .extend_addresses_through_behaviour()
            .condition(PeerCondition::Disconnected)
            .allocate_new_port()
            .build();
        let connection = opts.connection_id();
        match self.swarm.dial(opts) {
            Ok(()) => self.connectivity.on_dialling(peer, connection, new),
            Err(DialError::DialPeerConditionFalse(_)) => {
                self.discovery.lookups.on_connected(&peer, now);
            }
            Err(_) => self.discovery.lookups.on_dial_failed(&peer, dials > 0, now),
        }
    }

    /// Dials a candidate at the addresses that are left when another key has answered at one of them;
    /// says whether there are any.
    pub(super) fn dial_others(
        &mut self,
        peer: PeerId,
        mut addresses: Vec<Multiaddr>,
        wrong: &Multiaddr,
    ) -> bool {
        let wrong = without_id(wrong);
        addresses.retain(|address| without_id(address) != wrong);
        if addresses.is_empty() {
            return false;
        }
        // At these only: Kademlia may have named the wrong one as well.
        let opts = DialOpts::peer_id(peer)
            .addresses(addresses.clone())
            .condition(PeerCondition::Disconnected)
            .allocate_new_port()
            .build();
        let connection = opts.connection_id();
        let is_dialled = self.swarm.dial(opts).is_ok();
        if is_dialled {
            self.connectivity.on_dialling(peer, connection, addresses);
        }
        is_dialled
    }

    /// Dials a grape where it is known to be, to see whether it is there.
    pub(super) fn dial_known(&mut self, grape: PeerId) {
        let opts = DialOpts::peer_id(grape)
            .condition(PeerCondition::DisconnectedAndNotDialing)
            .allocate_new_port()
            .build();
        if let Err(error) = self.swarm.dial(opts) {
            tracing::debug!(%grape, %error, "a grape is not dialled");
        }
    }

    pub(super) fn publish(&mut self, name: ServiceName, place: Place, now: Instant) {
        let behaviour = self.swarm.behaviour_mut();
        match place {
            Place::Kademlia => self.discovery.provide(&mut behaviour.kad, name, now),
            Place::Rendezvous(grape) => {
                let behaviour = &mut behaviour.rendezvous;
                let sent = self.rendezvous.register(behaviour, grape, name.clone());
                if !sent {
                    let published = self.discovery.announcements.on_refused(&name, place, now);
                    self.on_published(published, &name);
                }
            }
        }
    }

    pub(super) fn on_published(&mut self, published: bool, name: &ServiceName) {
        if published && let Some(done) = self.publishing.remove(name) {
            tracing::debug!(%name, "a name is announced");
            // Who asked may be gone.
            let _ = done.send(Ok(()));
        }
    }

    pub(super) fn dial_bootstraps(&mut self, now: Instant) {
        while let Some((index, address, expected)) = self.connectivity.bootstraps.due(now) {
            if let Some(peer) = expected
                && self.swarm.is_connected(&peer)
                && !self.connectivity.is_no_grape(&peer)
            {
                self.connectivity.bootstraps.on_known(index, peer, now);
                self.on_bootstrap(peer, None);
                continue;
            }
            let opts = match expected {
                Some(peer) => DialOpts::peer_id(peer)
                    .addresses(vec![address.clone()])
                    .condition(PeerCondition::Always)
                    .allocate_new_port()
                    .build(),
                None => DialOpts::unknown_peer_id()
                    .address(address.clone())
                    .allocate_new_port()
                    .build(),
            };
            let connection = opts.connection_id();
            match self.swarm.dial(opts) {
                Ok(()) => self.connectivity.bootstraps.on_dialling(index, connection),
                Err(error) => {
                    let failure = describe(&error, expected);
                    self.connectivity.bootstraps.refuse(index, failure, now);
                }
            }
        }
        self.connectivity.publish();
        self.after_bootstrap_change();
    }

    pub(super) fn after_bootstrap_change(&mut self) {
        let is_starting = self.connectivity.bootstraps.is_starting();
        self.discovery.lookups.expect(is_starting, Instant::now());
        self.release_held();
        if self.is_cut_off() {
            let failures = self.connectivity.bootstraps.failures();
            for (name, done) in std::mem::take(&mut self.publishing) {
                // Who asked may be gone.
                let _ = done.send(Err(AnnounceError::NoGrape(failures.clone())));
                self.withdraw(&name);
            }
        }
    }

    /// A bootstrap grape is connected.
    pub(super) fn on_bootstrap(&mut self, grape: PeerId, address: Option<Multiaddr>) {
        if let Some(address) = address {
            // So that the first query need not wait for identify.
            self.swarm.behaviour_mut().kad.add_address(&grape, address);
        }
        self.grapes.on_changed();
        let lacks_registry = self.names.registrations.lacks_registry(&grape);
        if lacks_registry {
            self.discovery.announcements.on_grape(grape);
        }
        self.discovery.lookups.on_bootstrap(grape, !lacks_registry);
        if self.connectivity.bootstraps.connected().len() == 1 {
            // Finds the neighbours, at once and once. The rest of the table Kademlia fills by
            // itself half a second later; to walk all of it for each bootstrap grape would only
            // multiply the connections.
            self.look_around();
        }
        self.connectivity.publish();
    }

    /// Asks for the grapes nearest to this node.
    pub(super) fn look_around(&mut self) {
        let local = *self.swarm.local_peer_id();
        let kad = &mut self.swarm.behaviour_mut().kad;
        self.discovery.look_around(kad, local);
    }

    /// The machine has other addresses, or others can be reached by them.
    pub(super) fn on_interfaces(&mut self) {
        tracing::debug!("the addresses of this machine have changed");
        self.on_addresses();
        let now = Instant::now();
        self.connectivity.bootstraps.on_other_network(now);
        self.dial_bootstraps(now);
    }

    /// This node may be reached at other addresses: those that keep its names are told.
    pub(super) fn on_addresses(&mut self) {
        let addresses = self
            .listening
            .told(|address| self.interfaces.has_lost(address));
        // Kademlia tells others of external addresses only.
        let before: Vec<_> = self.swarm.external_addresses().cloned().collect();
        let gone = before.iter().filter(|known| !addresses.contains(known));
        let new = addresses.iter().filter(|address| !before.contains(address));
        let (gone, new): (Vec<_>, Vec<_>) = (gone.collect(), new.collect());
        if gone.is_empty() && new.is_empty() {
            return;
        }
        for address in gone {
            self.swarm.remove_external_address(address);
        }
        for address in new {
            self.swarm.add_external_address(address.clone());
        }
        self.connectivity.on_addresses(&addresses);
        self.registry.on_addresses(&addresses);
        self.rendezvous.on_addresses(addresses);
        self.names.registrations.on_addresses(Instant::now());
        self.discovery.announcements.on_addresses();
    }
}
