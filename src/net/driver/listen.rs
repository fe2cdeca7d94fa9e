//! Listens, before the loop begins.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use libp2p::multiaddr::Protocol;
use libp2p::swarm::SwarmEvent;
use libp2p::{Multiaddr, Swarm};
use socket2::{Domain, Socket, Type};
use tokio::time::timeout;

use crate::error::{SpawnError, explain};
use crate::net::swarm::{Behaviour, BehaviourEvent};

/// How long an address may take to be listened on. The system answers at once; interfaces are told
/// by events that follow within milliseconds.
const LISTEN_DEADLINE: Duration = Duration::from_secs(5);

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
