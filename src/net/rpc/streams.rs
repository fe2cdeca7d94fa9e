//! Opens and accepts RPC streams: a behaviour without any logic of its own.
//!
//! An accepted stream goes to a task that [serves](super::serve) it, at most [`MAX_RPC_STREAMS`] for
//! each connection; one more is closed at once. An opened stream, one that is to be kept, goes to
//! whoever asked for it.
//!
//! Being part of each connection from its first moment on, it also tells a grape's table who is connected.
//!
//! Streams of requests and replies are accepted under several ids, all served alike: what this node
//! can do is told by them, see [`Capabilities`](crate::proto::capabilities::Capabilities).

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::future::{self, Ready};
use std::iter::Cloned;
use std::net::{IpAddr, Ipv4Addr};
use std::slice;
use std::sync::Arc;
use std::task::{Context, Poll};

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::core::upgrade::{InboundUpgrade, ReadyUpgrade, UpgradeInfo};
use libp2p::multiaddr::Protocol;
use libp2p::swarm::handler::{
    ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound,
};
use libp2p::swarm::{
    ConnectionClosed, ConnectionDenied, ConnectionError, ConnectionHandler, ConnectionHandlerEvent,
    ConnectionId, FromSwarm, NetworkBehaviour, NotifyHandler, Stream, SubstreamProtocol, THandler,
    THandlerInEvent, THandlerOutEvent, ToSwarm,
};
use libp2p::{Multiaddr, PeerId, StreamProtocol};
use tokio::sync::oneshot;

use super::serve::{Remote, Server, serve};
use crate::limits::{
    KEPT_PROTOCOL, MAX_RPC_STREAMS, NAMES_PROTOCOL, REGISTRY_PROTOCOL, RPC_PROTOCOL,
};
use crate::net::host;
use crate::store::Parting;

/// The ids under which a peer and a grape accept streams.
const OF_PEER: &[StreamProtocol] = &[RPC_PROTOCOL, KEPT_PROTOCOL];
const OF_GRAPE: &[StreamProtocol] = &[
    RPC_PROTOCOL,
    KEPT_PROTOCOL,
    NAMES_PROTOCOL,
    REGISTRY_PROTOCOL,
];

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

    /// Opens a stream that is to be kept to a connected peer that keeps such. The receiver fails if
    /// there is none to be had.
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
        let open = self.connections.entry(peer).or_default();
        open.push(connection);
        if let Some(registry) = self.server.registry()
            && open.len() == 1
        {
            // Before anything is said over it.
            registry.providers().on_connected(peer);
        }
        let is_here = matches!(remote.iter().next(), Some(Protocol::Memory(_)));
        let unknown = (!is_here).then_some(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let host = host(remote).or(unknown);
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
            cause,
            ..
        }) = event
            && let Some(open) = self.connections.get_mut(&peer_id)
        {
            open.retain(|known| *known != connection_id);
            if !open.is_empty() {
                return;
            }
            self.connections.remove(&peer_id);
            if let Some(registry) = self.server.registry() {
                let parting = match cause {
                    None | Some(ConnectionError::KeepAliveTimeout) => Parting::AtRest,
                    Some(ConnectionError::IO(_)) => Parting::CutOff,
                };
                registry.providers().on_disconnected(&peer_id, parting);
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

/// Accepts a stream under any of these ids.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Accepted(&'static [StreamProtocol]);

impl UpgradeInfo for Accepted {
    type Info = StreamProtocol;
    type InfoIter = Cloned<slice::Iter<'static, StreamProtocol>>;

    fn protocol_info(&self) -> Self::InfoIter {
        self.0.iter().cloned()
    }
}

impl<C> InboundUpgrade<C> for Accepted {
    type Output = C;
    type Error = Infallible;
    type Future = Ready<Result<C, Infallible>>;

    fn upgrade_inbound(self, stream: C, _: StreamProtocol) -> Self::Future {
        future::ready(Ok(stream))
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
    type InboundProtocol = Accepted;
    type OutboundProtocol = ReadyUpgrade<StreamProtocol>;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = Asker;

    fn listen_protocol(&self) -> SubstreamProtocol<Self::InboundProtocol, ()> {
        let ids = match self.server.registry() {
            Some(_) => OF_GRAPE,
            None => OF_PEER,
        };
        SubstreamProtocol::new(Accepted(ids), ())
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
                protocol: SubstreamProtocol::new(ReadyUpgrade::new(KEPT_PROTOCOL), asker),
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
