//! Asks providers whether they live, and keeps or drops what they have announced.

use std::time::Instant;

use libp2p::PeerId;
use libp2p::swarm::ConnectionId;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};

use super::Driver;
use crate::name::ServiceName;
use crate::net::checks::{Begun, Over, PER_TURN, Verdict};
use crate::net::rpc::single::Answered;
use crate::proto::capabilities::Capability;
use crate::proto::routes::Link as _;
use crate::store::Due;

impl Driver {
    /// Begins to ask those who are due.
    pub(super) fn check_providers(&mut self, now: Instant) {
        let mut count = 0;
        while count < PER_TURN && self.checks.has_room() {
            let due = self.registry.providers().poll_due(now);
            let Some(due) = due else {
                break;
            };
            count += 1;
            self.check(due);
        }
        self.checks.on_turn(count, now);
    }

    fn check(&mut self, due: Due) {
        let peer = due.peer;
        if self.connectivity.can(&peer, Capability::Names) {
            // A grape renews what it announces.
            return;
        }
        let is_connected = self.connectivity.is_connected(&peer);
        match self.checks.begin(due.clone(), is_connected) {
            Begun::Ask(names) => self.ask_whether_alive(peer, names),
            Begun::Nothing => {}
            Begun::Dial(own) => {
                // At no other address: what third parties say of it is not believed.
                let opts = DialOpts::peer_id(peer)
                    .addresses(own)
                    .condition(PeerCondition::DisconnectedAndNotDialing)
                    .allocate_new_port()
                    .build();
                let connection = opts.connection_id();
                match self.swarm.dial(opts) {
                    Ok(()) => self.checks.on_dialling(due, connection),
                    Err(error) => tracing::debug!(%peer, %error, "a provider is not dialled"),
                }
            }
        }
    }

    /// A dial has ended, perhaps one of those.
    pub(super) fn on_check_dialled(&mut self, connection: ConnectionId, is_connected: bool) {
        if let Some((peer, names)) = self.checks.on_dialled(connection, is_connected) {
            self.ask_whether_alive(peer, names);
        }
    }

    fn ask_whether_alive(&mut self, peer: PeerId, names: Vec<ServiceName>) {
        let behaviour = &mut self.swarm.behaviour_mut().single;
        if names.is_empty() {
            return self.requests.ask_whether_alive(behaviour, peer, None);
        }
        for name in names {
            self.requests.ask_whether_alive(behaviour, peer, Some(name));
        }
    }

    /// A question of this node's own has its answer, or has none.
    pub(super) fn on_answered_question(&mut self, answered: Answered, now: Instant) {
        match answered {
            Answered::Serves(peer, name, serves) => {
                let connected = self.connectivity.is_connected(&peer);
                self.discovery
                    .lookups
                    .on_answer(&peer, &name, serves, connected, now);
            }
            Answered::Alive(peer, name, verdict) => {
                self.on_verdict(peer, name.as_ref(), verdict, now);
            }
        }
    }

    fn on_verdict(
        &mut self,
        peer: PeerId,
        name: Option<&ServiceName>,
        verdict: Verdict,
        now: Instant,
    ) {
        if let Some(name) = name.filter(|_| verdict == Verdict::Disowns) {
            tracing::debug!(%peer, %name, "a provider does not serve a name any more");
            self.registry.providers().disown(&name.key(), &peer);
        }
        let Some(over) = self.checks.on_verdict(&peer, verdict) else {
            return;
        };
        tracing::trace!(%peer, lives = over.lives, "a provider was asked whether it lives");
        if over.lives {
            self.registry.providers().confirm(&peer, now);
        }
        self.part_with(peer, &over);
    }

    /// Closes a connection that was made to ask a provider, or that takes the place of another: it can be
    /// made again.
    fn part_with(&mut self, peer: PeerId, over: &Over) {
        let crowd = over.is_dialable && self.connectivity.is_crowded(self.inbound);
        let is_used = self.routes.link(peer).load() > 0 || self.requests.is_asking(&peer);
        if is_used {
            return;
        }
        // The peer may be gone already, and may have connected by itself meanwhile.
        if let Some(dialled) = over.dialled {
            self.swarm.close_connection(dialled);
        }
        if crowd {
            let _ = self.swarm.disconnect_peer_id(peer);
        }
    }
}
