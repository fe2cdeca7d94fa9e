//! Notices a connection that has died when its peer connects again.
//!
//! Who has got another address comes back by another connection, and what is sent over the first one is
//! lost until it is found to be dead: after six seconds over QUIC, and after twenty over TCP. So a
//! connection beside which its peer opens another is asked for a sign of life at once. One that
//! does not answer within [`PROBE_TIMEOUT`] is closed, with the requests under way on it; the newer one stands.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::net::IpAddr;
use std::task::{Context, Poll};
use std::time::Duration;

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::core::upgrade::{DeniedUpgrade, ReadyUpgrade};
use libp2p::swarm::handler::{ConnectionEvent, DialUpgradeError};
use libp2p::swarm::{
    CloseConnection, ConnectionClosed, ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent,
    ConnectionId, FromSwarm, NetworkBehaviour, NotifyHandler, StreamUpgradeError,
    SubstreamProtocol, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
};
use libp2p::{Multiaddr, PeerId, StreamProtocol, ping};

use super::host;

/// How long a connection may take to answer. What the answer says does not matter.
const PROBE_TIMEOUT: Duration = Duration::from_millis(1_500);

/// Asks older connections.
#[derive(Debug, Default)]
pub(crate) struct Behaviour {
    connections: HashMap<PeerId, Vec<ConnectionId>>,
    /// What is asked, and what is closed, next.
    asked: VecDeque<(PeerId, ConnectionId)>,
    dead: VecDeque<(PeerId, ConnectionId)>,
}

/// A sign of life is to be asked for.
#[derive(Debug)]
pub(crate) struct Ask;

/// There was none.
#[derive(Debug)]
pub(crate) struct Silent;

impl Behaviour {
    fn handler(&mut self, peer: PeerId, connection: ConnectionId, remote: &Multiaddr) -> Handler {
        let known = self.connections.entry(peer).or_default();
        // One to this machine itself is closed by the system.
        let may_die = host(remote).is_some_and(|ip: IpAddr| !ip.is_loopback());
        if may_die {
            self.asked.extend(known.iter().map(|older| (peer, *older)));
        }
        known.push(connection);
        Handler::default()
    }
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = Handler;
    type ToSwarm = Infallible;

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(self.handler(peer, connection, remote))
    }

    fn handle_established_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        remote: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(self.handler(peer, connection, remote))
    }

    fn on_swarm_event(&mut self, event: FromSwarm) {
        if let FromSwarm::ConnectionClosed(ConnectionClosed {
            peer_id,
            connection_id,
            ..
        }) = event
            && let Some(known) = self.connections.get_mut(&peer_id)
        {
            known.retain(|known| *known != connection_id);
            if known.is_empty() {
                self.connections.remove(&peer_id);
            }
        }
    }

    fn on_connection_handler_event(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        Silent: THandlerOutEvent<Self>,
    ) {
        // The last one is the business of those who watch each connection.
        let others = self
            .connections
            .get(&peer)
            .is_some_and(|known| known.len() > 1);
        if others {
            tracing::debug!(%peer, "a connection beside a newer one is dead");
            self.dead.push_back((peer, connection));
        }
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        if let Some((peer_id, connection)) = self.dead.pop_front() {
            return Poll::Ready(ToSwarm::CloseConnection {
                peer_id,
                connection: CloseConnection::One(connection),
            });
        }
        match self.asked.pop_front() {
            Some((peer_id, connection)) => Poll::Ready(ToSwarm::NotifyHandler {
                peer_id,
                handler: NotifyHandler::One(connection),
                event: Ask,
            }),
            None => Poll::Pending,
        }
    }
}

/// Asks one connection, one question at a time.
#[derive(Debug, Default)]
pub(crate) struct Handler {
    is_asked: bool,
    is_silent: bool,
    under_way: bool,
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Ask;
    type ToBehaviour = Silent;
    type InboundProtocol = DeniedUpgrade;
    type OutboundProtocol = ReadyUpgrade<StreamProtocol>;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = ();

    fn listen_protocol(&self) -> SubstreamProtocol<Self::InboundProtocol> {
        SubstreamProtocol::new(DeniedUpgrade, ())
    }

    fn on_behaviour_event(&mut self, Ask: Ask) {
        self.is_asked |= !self.under_way;
    }

    fn poll(
        &mut self,
        _: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<Self::OutboundProtocol, (), Silent>> {
        if std::mem::take(&mut self.is_silent) {
            return Poll::Ready(ConnectionHandlerEvent::NotifyBehaviour(Silent));
        }
        if !std::mem::take(&mut self.is_asked) {
            return Poll::Pending;
        }
        self.under_way = true;
        // Every libp2p speaks it; who does not says so, which is a sign of life as well.
        let protocol = SubstreamProtocol::new(ReadyUpgrade::new(ping::PROTOCOL_NAME), ());
        Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest {
            protocol: protocol.with_timeout(PROBE_TIMEOUT),
        })
    }

    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<Self::InboundProtocol, Self::OutboundProtocol>,
    ) {
        match event {
            ConnectionEvent::FullyNegotiatedOutbound(_) => self.under_way = false,
            ConnectionEvent::DialUpgradeError(DialUpgradeError { error, .. }) => {
                self.under_way = false;
                self.is_silent = matches!(error, StreamUpgradeError::Timeout);
            }
            _ => {}
        }
    }
}
