//! Opens and accepts RPC streams: a behaviour without any logic of its own.
//!
//! An accepted stream goes to a task that [serves](super::serve) it, at most [`MAX_RPC_STREAMS`] for
//! each connection; one more is closed at once. An opened stream goes to whoever asked for it.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::core::upgrade::ReadyUpgrade;
use libp2p::swarm::handler::{
    ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound,
};
use libp2p::swarm::{
    ConnectionClosed, ConnectionDenied, ConnectionHandler, ConnectionHandlerEvent, ConnectionId,
    FromSwarm, NetworkBehaviour, NotifyHandler, Stream, SubstreamProtocol, THandler,
    THandlerInEvent, THandlerOutEvent, ToSwarm,
};
use libp2p::{Multiaddr, PeerId, StreamProtocol};
use tokio::sync::oneshot;

use super::serve::{Remote, Server, serve};
use crate::limits::{MAX_RPC_STREAMS, RPC_PROTOCOL};
use crate::net::host;

/// Who waits for a stream; dropped when there will be none.
type Asker = oneshot::Sender<Stream>;

pub(crate) struct Behaviour {
    server: Arc<Server>,
    connections: HashMap<PeerId, Vec<ConnectionId>>,
    asked: VecDeque<(PeerId, ConnectionId, Asker)>,
}

impl Behaviour {
    pub(crate) fn new(server: Arc<Server>) -> Self {
        Self {
            server,
            connections: HashMap::new(),
            asked: VecDeque::new(),
        }
    }

    /// Opens a stream to a connected peer. The receiver fails if there is none to be had.
    pub(crate) fn open(&mut self, peer: PeerId) -> oneshot::Receiver<Stream> {
        let (asker, stream) = oneshot::channel();
        // The oldest: a later one may only be to prove an address.
        let oldest = self.connections.get(&peer).and_then(|open| open.first());
        if let Some(connection) = oldest {
            self.asked.push_back((peer, *connection, asker));
        }
        stream
    }

    fn handler(&mut self, peer: PeerId, connection: ConnectionId, remote: &Multiaddr) -> Handler {
        self.connections.entry(peer).or_default().push(connection);
        let host = host(remote);
        Handler {
            remote: Remote { peer, host },
            server: Arc::clone(&self.server),
            accepted: Arc::new(()),
            asked: VecDeque::new(),
        }
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
            && let Some(open) = self.connections.get_mut(&peer_id)
        {
            open.retain(|known| *known != connection_id);
            if open.is_empty() {
                self.connections.remove(&peer_id);
            }
        }
    }

    fn on_connection_handler_event(
        &mut self,
        _: PeerId,
        _: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        match self.asked.pop_front() {
            Some((peer_id, connection, asker)) => Poll::Ready(ToSwarm::NotifyHandler {
                peer_id,
                handler: NotifyHandler::One(connection),
                event: asker,
            }),
            None => Poll::Pending,
        }
    }
}

pub(crate) struct Handler {
    remote: Remote,
    server: Arc<Server>,
    /// Shared with the task of each stream that was accepted.
    accepted: Arc<()>,
    asked: VecDeque<Asker>,
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Asker;
    type ToBehaviour = Infallible;
    type InboundProtocol = ReadyUpgrade<StreamProtocol>;
    type OutboundProtocol = ReadyUpgrade<StreamProtocol>;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = Asker;

    fn listen_protocol(&self) -> SubstreamProtocol<Self::InboundProtocol, ()> {
        SubstreamProtocol::new(ReadyUpgrade::new(RPC_PROTOCOL), ())
    }

    fn on_behaviour_event(&mut self, asker: Asker) {
        self.asked.push_back(asker);
    }

    fn poll(
        &mut self,
        _: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<Self::OutboundProtocol, Asker, Infallible>> {
        match self.asked.pop_front() {
            Some(asker) => Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest {
                protocol: SubstreamProtocol::new(ReadyUpgrade::new(RPC_PROTOCOL), asker),
            }),
            None => Poll::Pending,
        }
    }

    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<
            Self::InboundProtocol,
            Self::OutboundProtocol,
            Self::InboundOpenInfo,
            Self::OutboundOpenInfo,
        >,
    ) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound {
                protocol: stream,
                ..
            }) => {
                // The handler itself holds one of the references.
                let full = Arc::strong_count(&self.accepted) > MAX_RPC_STREAMS;
                let place = self.server.stream_place().filter(|_| !full);
                let Some(place) = place else {
                    tracing::debug!(peer = %self.remote.peer, "too many streams: one is closed");
                    return;
                };
                let (server, remote) = (Arc::clone(&self.server), self.remote);
                let accepted = Arc::clone(&self.accepted);
                tokio::spawn(async move {
                    serve(server, remote, stream).await;
                    drop((accepted, place));
                });
            }
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound {
                protocol: stream,
                info: asker,
            }) => {
                // Who asked may be gone; the stream is then closed.
                let _ = asker.send(stream);
            }
            // Dropping the asker tells it.
            ConnectionEvent::DialUpgradeError(DialUpgradeError { error, .. }) => {
                tracing::debug!(peer = %self.remote.peer, %error, "no stream to be had");
            }
            _ => {}
        }
    }
}
