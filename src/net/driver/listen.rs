//! Listens, before the loop begins, and keeps the addresses that others are told.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use libp2p::multiaddr::Protocol;
use libp2p::swarm::SwarmEvent;
use libp2p::{Multiaddr, PeerId, Swarm};
use socket2::{Domain, Socket, Type};
use tokio::time::timeout;

use crate::error::{SpawnError, explain};
use crate::net::host;
use crate::net::swarm::{Behaviour, BehaviourEvent};
use crate::proto::addresses;

/// How long an address may take to be listened on. The system answers at once; interfaces are told
/// by events that follow within milliseconds.
const LISTEN_DEADLINE: Duration = Duration::from_secs(5);

/// The addresses at which others reach this node.
#[derive(Debug)]
pub(super) struct Listening {
    /// Those that were given: who forwards them knows why.
    external: Vec<Multiaddr>,
    /// Those that listeners have, also while the machine has lost them.
    bound: Vec<Multiaddr>,
}

impl Listening {
    pub(super) fn new(local: PeerId, given: Vec<Multiaddr>) -> Self {
        let mut external = Vec::new();
        for address in given {
            match addresses::plain(&local, [&address]).next() {
                Some(address) => external.push(address),
                None => {
                    tracing::warn!(%address, "an address of another node is not told to others");
                }
            }
        }
        let bound = Vec::new();
        Self { external, bound }
    }

    /// A listener has an address, as the system tells it.
    pub(super) fn on_bound(&mut self, address: Multiaddr) {
        if !self.bound.contains(&address) {
            self.bound.push(address);
        }
    }

    /// A listener has it no more.
    pub(super) fn on_expired(&mut self, address: &Multiaddr) {
        self.bound.retain(|known| known != address);
    }

    /// Those that others are told of, each once.
    pub(super) fn told(&self, is_lost: impl Fn(&IpAddr) -> bool) -> Vec<Multiaddr> {
        let is_there = |address: &&Multiaddr| !host(address).is_some_and(|ip| is_lost(&ip));
        let bound = self.bound.iter().filter(is_there);
        let bound = bound.filter(|address| !self.external.contains(address));
        self.external.iter().chain(bound).cloned().collect()
    }
}

/// Listens on every address. Returns all that has happened meanwhile: others may connect to the first
/// address before the last one is bound.
pub(super) async fn listen(
    swarm: &mut Swarm<Behaviour>,
    addresses: &[Multiaddr],
) -> Result<Vec<SwarmEvent<BehaviourEvent>>, SpawnError> {
    let mut events = Vec::new();
    for address in addresses {
        let failed = |reason: String| SpawnError::Listen {
            address: address.clone(),
            reason,
        };
        probe(address).map_err(|error| failed(explain(&error)))?;
        let listener = swarm
            .listen_on(address.clone())
            .map_err(|error| failed(explain(&error)))?;
        let first = async {
            loop {
                let event = swarm.select_next_some().await;
                let is_bound = match &event {
                    SwarmEvent::NewListenAddr { listener_id, .. } => *listener_id == listener,
                    SwarmEvent::ListenerClosed {
                        listener_id,
                        reason: Err(error),
                        ..
                    } if *listener_id == listener => return Err(explain(error)),
                    _ => false,
                };
                events.push(event);
                if is_bound {
                    return Ok(());
                }
            }
        };
        match timeout(LISTEN_DEADLINE, first).await {
            Ok(result) => result.map_err(failed)?,
            Err(_) => return Err(failed("no network interface has such an address".into())),
        }
    }
    // What an address of all interfaces leads to is told in one go.
    while let Some(Some(event)) = swarm.next().now_or_never() {
        events.push(event);
    }
    Ok(events)
}

/// Fails if another program listens on the address. libp2p shares TCP ports (`SO_REUSEPORT`): two
/// grapes on one port would each get some of the connections.
fn probe(address: &Multiaddr) -> io::Result<()> {
    let mut parts = address.iter();
    let ip: IpAddr = match parts.next() {
        Some(Protocol::Ip4(ip)) => ip.into(),
        Some(Protocol::Ip6(ip)) => ip.into(),
        _ => return Ok(()),
    };
    match parts.next() {
        Some(Protocol::Tcp(port)) => {
            let address = SocketAddr::new(ip, port);
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
            if address.is_ipv6() {
                // As libp2p does: the same port of IPv4 may be this node's own.
                socket.set_only_v6(true)?;
            }
            // A connection that has just closed is no listener.
            socket.set_reuse_address(true)?;
            socket.bind(&address.into())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Multiaddr {
        text.parse().unwrap()
    }

    #[test]
    fn what_the_machine_has_lost_is_told_again_when_it_is_back() {
        let (own, given) = (
            address("/ip4/10.0.0.1/tcp/1"),
            address("/ip4/10.0.0.1/tcp/2"),
        );
        let mut listening = Listening::new(PeerId::random(), vec![given.clone()]);
        listening.on_bound(own.clone());
        listening.on_bound(own.clone());
        listening.on_bound(given.clone());
        assert_eq!(listening.told(|_| false), [given.clone(), own.clone()]);
        let forwarded = listening.told(|_| true);
        assert_eq!(forwarded, std::slice::from_ref(&given));
        assert_eq!(listening.told(|_| false), [given.clone(), own.clone()]);
        listening.on_expired(&own);
        listening.on_expired(&given);
        assert_eq!(listening.told(|_| false), [given]);
    }
}
