//! Routes what the Swarm tells, and what other nodes answer.

use std::io::ErrorKind;
use std::time::Instant;

use libp2p::core::ConnectedPoint;
use libp2p::request_response::{self, Message};
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError, SwarmEvent};
use libp2p::{Multiaddr, PeerId, identify, kad, ping};

use super::Driver;
use crate::error::system_error;
use crate::limits::{KADEMLIA_VALIDITY, MAX_ADDRESSES};
use crate::name::ServiceName;
use crate::net::connectivity::{Connectivity, describe, without_id};
use crate::net::discovery::{self, Discovery};
use crate::net::forms;
use crate::net::names;
use crate::net::rendezvous;
use crate::net::rpc::link::Lane;
use crate::net::swarm::BehaviourEvent;
use crate::proto::addresses;
use crate::proto::announce::Place;
use crate::proto::capabilities::Capability;
use crate::proto::lookup::Source;
use crate::store::{NewRecord, Origin, Prefix, Upkeep};

impl Driver {
    pub(super) fn on_swarm_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        let now = Instant::now();
        match event {
            SwarmEvent::Behaviour(event) => self.on_behaviour_event(event, now),
            SwarmEvent::ConnectionEstablished {
                peer_id,
                connection_id,
                endpoint,
                ..
            } => self.on_established(peer_id, connection_id, &endpoint, now),
            SwarmEvent::ConnectionClosed {
                peer_id,
                connection_id,
                ..
            } => self.on_closed(peer_id, connection_id, now),
            SwarmEvent::OutgoingConnectionError {
                connection_id,
                peer_id,
                error,
            } => {
                self.on_dial_failed(connection_id, peer_id, &error, now);
            }
            SwarmEvent::NewListenAddr { address, .. } => {
                self.listening.on_bound(address);
                self.on_addresses();
                self.interfaces.look();
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                self.listening.on_expired(&address);
                self.on_addresses();
                self.interfaces.look();
            }
            SwarmEvent::ListenerError { error, .. } => {
                tracing::warn!(%error, "a listener has trouble");
            }
            _ => {}
        }
    }

    fn on_dial_failed(
        &mut self,
        connection: ConnectionId,
        peer: Option<PeerId>,
        error: &DialError,
        now: Instant,
    ) {
        let failure = describe(error, peer);
        tracing::debug!(?peer, reason = %failure, "a dial has failed");
        let mut wrong = None;
        match error {
            DialError::WrongPeerId { obtained, address } => {
                self.on_answered(*obtained, address, now);
                if let Some(peer) = peer {
                    // Where a name stands for the host, it leads there no longer.
                    let kad = &mut self.swarm.behaviour_mut().kad;
                    kad.remove_address(&peer, &without_id(address));
                }
                wrong = Some(address);
            }
            DialError::Transport(_) => {
                if let Some(peer) = peer.filter(|peer| !self.connectivity.is_connected(peer)) {
                    // Kademlia keeps a dead grape until its bucket is full, and each query would
                    // wait for it.
                    self.swarm.behaviour_mut().kad.remove_peer(&peer);
                    self.grapes.on_gone(now);
                }
            }
            _ => {}
        }
        self.on_check_dialled(connection, false);
        let failed = self
            .connectivity
            .on_dial_failed(connection, peer, failure, now);
        if let Some((peer, addresses)) = failed {
            let goes_on = wrong.is_some_and(|wrong| self.dial_others(peer, addresses, wrong));
            let others = goes_on || self.connectivity.dials(&peer) > 0;
            if is_refused(error) {
                self.discovery.lookups.on_refused(&peer);
            }
            self.discovery.lookups.on_dial_failed(&peer, others, now);
        }
        self.after_bootstrap_change();
    }

    /// A key answers at an address: every other id that was thought to be there is not, and a grape of
    /// which no other address is known is forgotten.
    fn on_answered(&mut self, found: PeerId, address: &Multiaddr, now: Instant) {
        let kad = &mut self.swarm.behaviour_mut().kad;
        for peer in discovery::others_at(kad, &found, address) {
            tracing::debug!(%peer, %found, %address, "another key answers where a grape was");
            let kad = &mut self.swarm.behaviour_mut().kad;
            let was_last = kad.remove_address(&peer, &without_id(address)).is_some();
            self.grapes.on_gone(now);
            if !was_last {
                // What else is known of it is most likely as old.
                self.dial_known(peer);
            }
        }
    }

    pub(super) fn on_established(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        endpoint: &ConnectedPoint,
        now: Instant,
    ) {
        let change = self
            .connectivity
            .on_established(peer, connection, endpoint, now);
        if change.peer {
            let address = endpoint.get_remote_address();
            tracing::debug!(%peer, %address, dialled = endpoint.is_dialer(), "a peer is connected");
            self.metrics
                .peers
                .set(self.swarm.network_info().num_peers() as u64);
            self.routes.on_connected(peer);
            self.names.registrations.on_connected(&peer, now);
        }
        self.on_check_dialled(connection, true);
        if endpoint.is_dialer() {
            self.on_answered(peer, endpoint.get_remote_address(), now);
        }
        if change.bootstrap {
            let address = endpoint.get_remote_address().clone();
            tracing::debug!(%peer, %address, "a bootstrap grape is connected");
            self.on_bootstrap(peer, Some(address));
            self.after_bootstrap_change();
        }
        self.discovery.lookups.on_connected(&peer, now);
    }

    pub(super) fn on_closed(&mut self, peer: PeerId, connection: ConnectionId, now: Instant) {
        let was_keeper = self.connectivity.is_keeper(&peer);
        let change = self.connectivity.on_closed(peer, connection, now);
        if change.peer {
            tracing::debug!(%peer, "a peer is gone");
            self.metrics
                .peers
                .set(self.swarm.network_info().num_peers() as u64);
            self.routes.on_disconnected(&peer);
            self.rendezvous.on_disconnected(&peer);
            self.forms.forget(&peer);
            self.names.registrations.on_disconnected(&peer, now);
            self.grapes.on_disconnected(&peer);
            self.records.forget(&peer);
            self.puts.forget(&peer);
            if was_keeper || change.bootstrap {
                self.grapes.on_lost(now);
            }
        }
        if change.bootstrap {
            tracing::debug!(%peer, "a bootstrap grape is gone");
            self.discovery.announcements.on_grape_gone(&peer);
            self.after_bootstrap_change();
        }
    }

    pub(super) fn on_behaviour_event(&mut self, event: BehaviourEvent, now: Instant) {
        match event {
            BehaviourEvent::Kad(event) => {
                if let kad::Event::OutboundQueryProgressed {
                    result: kad::QueryResult::GetProviders(_),
                    stats,
                    step,
                    ..
                } = &event
                    && step.last
                {
                    self.metrics
                        .kademlia_requests
                        .add(stats.num_requests().into());
                }
                if Discovery::has_explored(&event) {
                    self.connectivity.on_explored();
                }
                if matches!(event, kad::Event::RoutingUpdated { .. }) {
                    self.grapes.on_changed();
                }
                let Some(event) = self.values.on_event(event) else {
                    return;
                };
                let kad = &mut self.swarm.behaviour_mut().kad;
                let learned = self.discovery.on_event(kad, event, now);
                self.on_kademlia(learned, now);
            }
            BehaviourEvent::Rendezvous(event) => {
                let behaviour = self.swarm.behaviour_mut();
                let (connectivity, forms) = (&self.connectivity, &self.forms);
                let learned = self.rendezvous.on_event(
                    &mut behaviour.rendezvous,
                    &mut self.registry.providers(),
                    |peer| rendezvous::Asker {
                        prefix: prefix(connectivity, peer),
                        hosts: connectivity.hosts(peer),
                        reads: forms.of(peer),
                    },
                    event,
                    now,
                );
                self.on_rendezvous(learned, now);
            }
            BehaviourEvent::Single(event) => {
                let behaviour = &mut self.swarm.behaviour_mut().single;
                self.requests.on_event(behaviour, event);
                while let Some(answered) = self.requests.poll_answered() {
                    self.on_answered_question(answered, now);
                }
            }
            BehaviourEvent::Identify(identify::Event::Received { peer_id, info, .. }) => {
                self.on_identified(peer_id, &info);
                if self.forms.on_identified(&peer_id) {
                    self.ask_form(&peer_id);
                }
            }
            BehaviourEvent::Forms(event) => self.on_form(event, now),
            // A peer need not speak ping; the transport tells when its connection breaks.
            BehaviourEvent::Ping(ping::Event {
                result: Err(ping::Failure::Unsupported),
                ..
            }) => {}
            BehaviourEvent::Ping(ping::Event {
                peer,
                connection,
                result: Err(error),
            }) => {
                tracing::debug!(%peer, %error, "a connection is dead");
                self.swarm.close_connection(connection);
            }
            _ => {}
        }
    }

    pub(super) fn on_kademlia(&mut self, learned: Option<discovery::Learned>, now: Instant) {
        match learned {
            Some(discovery::Learned::Providers(name, answer, providers)) => {
                for peer in providers {
                    let kad = &mut self.swarm.behaviour_mut().kad;
                    let addresses = Discovery::addresses(kad, peer);
                    self.on_candidate(&name, Source::Kademlia(answer), peer, addresses, now);
                }
            }
            Some(discovery::Learned::Record(record)) => self.on_record(&record, now),
            Some(discovery::Learned::Value(peer, record)) => self.on_value(peer, &record, now),
            // Kademlia reports success before delivery; with no grape connected there was none.
            Some(discovery::Learned::Provided(name, true)) if self.connectivity.knows_keeper() => {
                let published = self.discovery.announcements.on_provided(&name, now);
                self.on_published(published, &name);
            }
            Some(discovery::Learned::Provided(name, _)) if self.registrar => {
                // Its own store holds the name: who asks this grape finds it.
                let published = self.discovery.announcements.on_provided(&name, now);
                self.on_published(published, &name);
            }
            Some(discovery::Learned::Provided(name, _)) => {
                self.discovery
                    .announcements
                    .on_refused(&name, Place::Kademlia, now);
            }
            Some(discovery::Learned::Walked(name, closest)) => {
                self.names.registrations.on_walked(&name, &closest, now);
            }
            Some(discovery::Learned::LookedAround(true)) => self.grapes.on_looked_around(),
            Some(discovery::Learned::LookedAround(false)) => {}
            None => {}
        }
    }

    pub(super) fn on_names(&mut self, answered: names::Answered) {
        let now = Instant::now();
        let learned = self.names.on_answer(answered, &mut self.grapes, now);
        if self.grapes.are_more() {
            // Before what the grape has found: there are others that may know more.
            self.discovery.lookups.on_more_grapes();
        }
        match learned {
            names::Learned::Told(grape, elsewhere) => self.on_told(grape, elsewhere),
            names::Learned::NoRegistry(grape, sought) => {
                for name in sought {
                    self.discovery.lookups.on_no_registry(&grape, &name);
                }
            }
            names::Learned::Found(grape, found) => {
                for (name, providers) in found {
                    self.on_found(grape, &name, providers, now);
                }
            }
            names::Learned::Serves(peer, name, serves) => {
                let connected = self.connectivity.is_connected(&peer);
                self.discovery
                    .lookups
                    .on_answer(&peer, &name, serves, connected, now);
            }
            names::Learned::NotAsked(peer, name) => self.ask_serves(peer, name),
        }
    }

    /// A grape has been told of this node's names, and knows of so many other nodes with its key.
    fn on_told(&mut self, grape: PeerId, elsewhere: u64) {
        if self.connectivity.on_told(grape, elsewhere) {
            tracing::warn!(
                id = %self.swarm.local_peer_id(),
                %grape,
                "another running node has this node's key: give each an identity of its own"
            );
        }
    }

    /// A grape that is asked directly has named providers, or has not answered.
    pub(super) fn on_found(
        &mut self,
        grape: PeerId,
        name: &ServiceName,
        providers: Option<names::Providers>,
        now: Instant,
    ) {
        let answered = providers.is_some();
        for (peer, addresses) in providers.unwrap_or_default() {
            self.on_candidate(name, Source::Point(grape), peer, addresses, now);
        }
        self.discovery
            .lookups
            .on_discovered(&grape, name, answered, now);
    }

    /// A grape without a registry is told of names by rendezvous and Kademlia.
    pub(super) fn on_no_registry(&mut self, grape: PeerId) {
        if self.connectivity.bootstraps.connected().contains(&grape) {
            self.discovery.announcements.on_grape(grape);
        }
    }

    pub(super) fn on_record(&mut self, record: &kad::ProviderRecord, now: Instant) {
        if !self.registrar || !self.records.admit(record.provider, now) {
            return;
        }
        let prefix = prefix(&self.connectivity, &record.provider);
        let own = self
            .connectivity
            .hosts(&record.provider)
            .own(&record.addresses);
        let upkeep = match self.connectivity.can(&record.provider, Capability::Names) {
            // A grape renews what it announces for its workers, and does not take it back.
            true => Upkeep::Renewed,
            false => Upkeep::Asked {
                longest: KADEMLIA_VALIDITY,
                own: &own,
            },
        };
        let mut store = self.registry.providers();
        let new = NewRecord {
            key: record.key.as_ref(),
            peer: record.provider,
            prefix,
            addresses: &record.addresses,
            origin: Origin::Kademlia,
            ttl: store.lease(),
            upkeep,
        };
        if let Err(error) = store.insert(new, now) {
            tracing::debug!(peer = %record.provider, %error, "a provider record was refused");
        }
    }

    pub(super) fn on_value(&mut self, peer: PeerId, record: &kad::Record, now: Instant) {
        if !self.registrar || !self.puts.admit(peer, now) {
            return;
        }
        let prefix = prefix(&self.connectivity, &peer);
        let key = record.key.as_ref();
        if let Err(error) = self.registry.put(key, &record.value, prefix, now) {
            tracing::debug!(%peer, %error, "a value was refused");
        }
    }

    pub(super) fn on_rendezvous(&mut self, learned: Option<rendezvous::Learned>, now: Instant) {
        let announcements = &mut self.discovery.announcements;
        match learned {
            Some(rendezvous::Learned::Registered(grape, name, lease)) => {
                let published = announcements.on_registered(&name, grape, lease, now);
                self.on_published(published, &name);
            }
            Some(rendezvous::Learned::Refused(grape, name)) => {
                let place = Place::Rendezvous(grape);
                let published = announcements.on_refused(&name, place, now);
                self.on_published(published, &name);
            }
            Some(rendezvous::Learned::Discovered(grape, name, providers)) => {
                self.on_found(grape, &name, providers, now);
            }
            Some(rendezvous::Learned::Unread(peer)) => self.want_form(peer),
            Some(rendezvous::Learned::Resume(grape, name)) => {
                self.publish(name, Place::Rendezvous(grape), now);
            }
            None => {}
        }
    }

    pub(super) fn on_candidate(
        &mut self,
        name: &ServiceName,
        source: Source,
        peer: PeerId,
        addresses: Vec<Multiaddr>,
        now: Instant,
    ) {
        let addresses: Vec<_> = addresses::plain(&peer, &addresses)
            .take(MAX_ADDRESSES)
            .collect();
        let connected = self.connectivity.is_connected(&peer);
        tracing::trace!(%name, %peer, ?source, ?addresses, connected, "a provider is named");
        self.discovery
            .lookups
            .on_candidate(name, source, peer, addresses, connected, now);
        // Kademlia keeps the addresses it heard only while its query runs: dial from inside it.
        self.carry_out_lookups(now);
    }

    /// A peer's discoveries wait until it is known which form of records it reads.
    fn want_form(&mut self, peer: PeerId) {
        if self.forms.want(peer) {
            self.ask_form(&peer);
        }
    }

    fn ask_form(&mut self, peer: &PeerId) {
        // To ask must not begin a dial.
        if self.connectivity.is_connected(peer) {
            self.swarm.behaviour_mut().forms.send_request(peer, ());
        }
    }

    /// A peer that asks has told its own signed record, or has not answered.
    fn on_form(&mut self, event: forms::Event, now: Instant) {
        let (peer, answer) = match &event {
            request_response::Event::Message {
                peer,
                message: Message::Response { response, .. },
                ..
            } => (peer, Ok(*response)),
            request_response::Event::OutboundFailure { peer, error, .. } => (peer, Err(error)),
            _ => return,
        };
        let identified = self.connectivity.has_told(peer);
        if self.forms.on_answer(peer, answer, identified) {
            return self.ask_form(peer);
        }
        let Some(form) = self.forms.of(peer) else {
            return;
        };
        let behaviour = &mut self.swarm.behaviour_mut().rendezvous;
        let store = self.registry.providers();
        self.rendezvous.on_reads(behaviour, &store, peer, form, now);
    }

    pub(super) fn on_identified(&mut self, peer: PeerId, info: &identify::Info) {
        if self.connectivity.on_identified(peer, info) {
            tracing::debug!(%peer, "a peer that is no grape answers at a bootstrap address");
            self.swarm.behaviour_mut().kad.remove_peer(&peer);
            self.discovery.announcements.on_grape_gone(&peer);
            self.grapes.on_changed();
            self.after_bootstrap_change();
        }
        if self.connectivity.is_keeper(&peer) {
            self.grapes.on_changed();
        }
        if self.routes.link(peer).wants_kept() {
            // They were sent before it was known that one can be kept.
            self.keep_stream(peer, Lane::Small);
            self.keep_stream(peer, Lane::Large);
        }
        // A grape is dialled back for its place in the routing table.
        if !self.registrar || !self.has_room_for(&peer) {
            return;
        }
        let back = self.connectivity.dial_back(&peer, &info.listen_addrs);
        if back.is_empty() {
            return;
        }
        let opts = DialOpts::peer_id(peer)
            .addresses(back)
            .condition(PeerCondition::Always)
            .allocate_new_port()
            .build();
        // The second connection goes when it has rested: Kademlia may ask by either, and would wait
        // for the answer to a question that was cut off.
        if let Err(error) = self.swarm.dial(opts) {
            tracing::debug!(%peer, %error, "cannot dial a grape back");
        }
    }

    /// Whether Kademlia's routing table would take a peer that it does not hold yet.
    pub(super) fn has_room_for(&mut self, peer: &PeerId) -> bool {
        let bucket = self.swarm.behaviour_mut().kad.kbucket(*peer);
        bucket.is_some_and(|bucket| bucket.num_entries() < kad::K_VALUE.get())
    }
}

/// Where a peer's connection comes from.
fn prefix(connectivity: &Connectivity, peer: &PeerId) -> Prefix {
    connectivity
        .remote_address(peer)
        .map_or(Prefix::Local, Prefix::from)
}

/// Whether the host at one of the addresses has said that nobody listens there.
fn is_refused(error: &DialError) -> bool {
    let DialError::Transport(errors) = error else {
        return false;
    };
    let refused = |error| system_error(error) == Some(ErrorKind::ConnectionRefused);
    errors.iter().any(|(_, error)| refused(error))
}
