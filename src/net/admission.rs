//! Bounds the connections that come from one address prefix, so that one network (or one machine
//! with many keys) cannot take all the places that a grape has.
//!
//! Half-open connections are bounded on their own: they cost a stranger nothing, and must not use up
//! what all prefixes share. Outbound connections are the node's own choice and do not count.

use std::collections::HashMap;
use std::convert::Infallible;
use std::task::{Context, Poll};

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::swarm::{
    ConnectionClosed, ConnectionDenied, ConnectionId, FromSwarm, ListenFailure, NetworkBehaviour,
    THandler, THandlerInEvent, THandlerOutEvent, ToSwarm, dummy,
};
use libp2p::{Multiaddr, PeerId};

use crate::store::Prefix;

#[derive(Debug)]
pub(crate) struct Behaviour {
    max: u32,
    max_pending: u32,
    prefixes: HashMap<Prefix, Count>,
    connections: HashMap<ConnectionId, Connection>,
}

#[derive(Debug, Default)]
struct Count {
    open: u32,
    pending: u32,
}

#[derive(Debug)]
struct Connection {
    prefix: Prefix,
    pending: bool,
}

/// Why a connection is refused.
#[derive(Debug, thiserror::Error)]
#[error("{open} connections from this address prefix are open or half-open already")]
struct PrefixFull {
    open: u32,
}

impl Behaviour {
    /// At most `max` connections from one prefix, of which at most `max_pending` half-open.
    pub(crate) fn new(max: u32, max_pending: u32) -> Self {
        Self {
            max,
            max_pending,
            prefixes: HashMap::new(),
            connections: HashMap::new(),
        }
    }

    fn release(&mut self, connection: ConnectionId) {
        self.settle(connection);
        let Some(Connection { prefix, .. }) = self.connections.remove(&connection) else {
            return;
        };
        if let Some(count) = self.prefixes.get_mut(&prefix) {
            count.open -= 1;
            if count.open == 0 {
                self.prefixes.remove(&prefix);
            }
        }
    }

    /// The connection is not half-open any more.
    fn settle(&mut self, connection: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&connection)
            && std::mem::take(&mut connection.pending)
            && let Some(count) = self.prefixes.get_mut(&connection.prefix)
        {
            count.pending -= 1;
        }
    }
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_pending_inbound_connection(
        &mut self,
        connection: ConnectionId,
        _local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        let prefix = Prefix::from(remote);
        if let Some(count) = self.prefixes.get(&prefix)
            && (count.open >= self.max || count.pending >= self.max_pending)
        {
            let open = count.open;
            return Err(ConnectionDenied::new(PrefixFull { open }));
        }
        let count = self.prefixes.entry(prefix).or_default();
        count.open += 1;
        count.pending += 1;
        let pending = true;
        self.connections
            .insert(connection, Connection { prefix, pending });
        Ok(())
    }

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.settle(connection);
        Ok(dummy::ConnectionHandler)
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, event: FromSwarm) {
        match event {
            FromSwarm::ConnectionClosed(ConnectionClosed { connection_id, .. })
            | FromSwarm::ListenFailure(ListenFailure { connection_id, .. }) => {
                self.release(connection_id);
            }
            _ => {}
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
        Poll::Pending
    }
}
