//! The Swarm: transports, behaviours and their settings, each chosen on purpose.

use std::io;
use std::num::NonZeroU8;
use std::sync::Arc;

use libp2p::allow_block_list::{self, AllowedPeers, BlockedPeers};
use libp2p::connection_limits::{self, ConnectionLimits};
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::timeout::TransportTimeout;
use libp2p::core::transport::{Boxed, MemoryTransport};
use libp2p::core::upgrade::Version;
use libp2p::request_response::{self, ProtocolSupport};
use libp2p::swarm::NetworkBehaviour;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::{
    PeerId, Swarm, Transport as _, identify, identity, kad, memory_connection_limits, noise, ping,
    quic, swarm, tcp,
};

use super::interfaces::Ties;
use super::rpc::serve::Server;
use super::rpc::{single, streams};
use super::yamux::Yamux;
use super::{Settings, Transport};
use super::{admission, dns, forms, liveness};
use crate::limits::{
    AGENT_VERSION, CONNECT_TIMEOUT, FRAME_DEADLINE, IDENTIFY_VERSION, KAD_PROTOCOL,
    LOOKUP_DEADLINE, Limits, MAX_RENDEZVOUS_STREAMS, MAX_REQUEST_TIME, MAX_RPC_STREAMS,
    MAX_STREAMS, PING_INTERVAL, PING_TIMEOUT, QUIC_KEEP_ALIVE, RENDEZVOUS_PROTOCOL, RPC_PROTOCOL,
};
use crate::proto::rendezvous;
use crate::store::{Records, Registry};

/// Everything that a node's connections speak, and what admits them.
#[derive(NetworkBehaviour)]
pub(crate) struct Behaviour {
    pub(crate) blocked: allow_block_list::Behaviour<BlockedPeers>,
    allowed: Toggle<allow_block_list::Behaviour<AllowedPeers>>,
    prefixes: admission::Behaviour,
    connections: connection_limits::Behaviour,
    memory: Toggle<memory_connection_limits::Behaviour>,
    identify: identify::Behaviour,
    ping: ping::Behaviour,
    pub(crate) kad: kad::Behaviour<Records>,
    pub(crate) rendezvous: request_response::Behaviour<rendezvous::Codec>,
    pub(crate) forms: forms::Behaviour,
    /// Before `single`, which speaks the same protocol and accepts no stream.
    pub(crate) streams: streams::Behaviour,
    pub(crate) single: single::Behaviour,
    liveness: liveness::Behaviour,
}

/// Builds a node's Swarm. It does not listen or dial yet.
pub(crate) fn build(
    settings: &Settings,
    server: Arc<Server>,
    registry: Arc<Registry>,
    ties: &Ties,
) -> io::Result<Swarm<Behaviour>> {
    let keypair = settings.identity.keypair();
    let peer = settings.identity.peer_id();
    let transport = match settings.transport {
        Transport::Network => network(keypair, ties)?,
        Transport::Memory => memory(keypair)?,
    };
    let config = swarm::Config::with_tokio_executor()
        .with_idle_connection_timeout(settings.limits.idle)
        // A provider has TCP and QUIC addresses on a few interfaces: try them all at once.
        .with_dial_concurrency_factor(NonZeroU8::new(8).unwrap_or(NonZeroU8::MIN))
        // One stream for each request: a burst must not be cut off while it negotiates.
        .with_max_negotiating_inbound_streams(MAX_RPC_STREAMS);
    Ok(Swarm::new(
        transport,
        behaviour(settings, keypair, server, registry),
        peer,
        config,
    ))
}

fn behaviour(
    settings: &Settings,
    keypair: &identity::Keypair,
    server: Arc<Server>,
    registry: Arc<Registry>,
) -> Behaviour {
    let limits = &settings.limits;
    Behaviour {
        blocked: blocked(&settings.blocked),
        allowed: allowed(settings.allowed.as_deref()).into(),
        prefixes: admission::Behaviour::new(
            limits.connections_per_prefix,
            // The other half stays free for all other prefixes.
            (limits.pending_connections / 2).max(1),
        ),
        connections: connection_limits::Behaviour::new(connection_limits(limits)),
        memory: limits
            .memory
            .map(memory_connection_limits::Behaviour::with_max_bytes)
            .into(),
        identify: identify::Behaviour::new(
            // Without a signed record: libp2p would make one in a form of its own, for which
            // js-libp2p throws the whole message away and go-libp2p all addresses.
            identify::Config::new(IDENTIFY_VERSION.into(), keypair.public())
                .with_agent_version(AGENT_VERSION.into())
                // A peer that begins to listen must be told of to those it is connected to.
                .with_push_listen_addr_updates(true)
                // Addresses that a peer merely claims are not dialled: nothing is cached.
                .with_cache_size(0),
        ),
        ping: ping::Behaviour::new(
            ping::Config::new()
                .with_interval(PING_INTERVAL)
                .with_timeout(PING_TIMEOUT),
        ),
        kad: kademlia(settings, registry),
        rendezvous: request_response::Behaviour::with_codec(
            rendezvous::Codec::default(),
            [(
                RENDEZVOUS_PROTOCOL,
                match settings.registrar {
                    true => ProtocolSupport::Full,
                    false => ProtocolSupport::Outbound,
                },
            )],
            request_response::Config::default()
                .with_request_timeout(FRAME_DEADLINE)
                .with_max_concurrent_streams(MAX_RENDEZVOUS_STREAMS),
        ),
        forms: forms::behaviour(),
        streams: streams::Behaviour::new(server),
        single: request_response::Behaviour::with_codec(
            single::Codec::default(),
            [(RPC_PROTOCOL, ProtocolSupport::Outbound)],
            request_response::Config::default()
                .with_request_timeout(MAX_REQUEST_TIME)
                .with_max_concurrent_streams(MAX_RPC_STREAMS),
        ),
        liveness: liveness::Behaviour::default(),
    }
}

fn blocked(peers: &[PeerId]) -> allow_block_list::Behaviour<BlockedPeers> {
    let mut behaviour = allow_block_list::Behaviour::default();
    for peer in peers {
        behaviour.block_peer(*peer);
    }
    behaviour
}

fn allowed(peers: Option<&[PeerId]>) -> Option<allow_block_list::Behaviour<AllowedPeers>> {
    let mut behaviour = allow_block_list::Behaviour::default();
    for peer in peers? {
        behaviour.allow_peer(*peer);
    }
    Some(behaviour)
}

fn connection_limits(limits: &Limits) -> ConnectionLimits {
    ConnectionLimits::default()
        .with_max_pending_incoming(Some(limits.pending_connections))
        .with_max_established_incoming(Some(limits.inbound_connections))
        .with_max_established_per_peer(Some(limits.connections_per_peer))
}

fn kademlia(settings: &Settings, registry: Arc<Registry>) -> kad::Behaviour<Records> {
    let mut config = kad::Config::new(KAD_PROTOCOL);
    config
        .set_query_timeout(LOOKUP_DEADLINE)
        // Strangers' records come up as events and enter the store by its bounds.
        .set_record_filtering(kad::StoreInserts::FilterBoth)
        .set_provider_record_ttl(Some(settings.lease))
        // We renew leases ourselves; values are kept for a time, by those that they were sent to.
        .set_provider_publication_interval(None)
        .set_publication_interval(None)
        .set_replication_interval(None)
        .set_caching(kad::Caching::Disabled)
        .set_periodic_bootstrap_interval(settings.limits.explore);
    let peer = settings.identity.peer_id();
    let mut kad = kad::Behaviour::with_config(peer, Records(registry), config);
    // Never by libp2p's guess from addresses: a peer that has one is no grape.
    kad.set_mode(Some(if settings.registrar {
        kad::Mode::Server
    } else {
        kad::Mode::Client
    }));
    kad
}

fn network(
    keypair: &identity::Keypair,
    ties: &Ties,
) -> io::Result<Boxed<(PeerId, StreamMuxerBox)>> {
    let transport = dns::Transport::new(tcp_and_quic(keypair, ties)?);
    Ok(TransportTimeout::new(transport, CONNECT_TIMEOUT).boxed())
}

fn tcp_and_quic(
    keypair: &identity::Keypair,
    ties: &Ties,
) -> io::Result<Boxed<(PeerId, StreamMuxerBox)>> {
    let (of_tcp, of_quic) = (ties.clone(), ties.clone());
    let noise = noise::Config::new(keypair).map_err(io::Error::other)?;
    let tcp = tcp::tokio::Transport::new(tcp::Config::default().nodelay(true))
        .map(move |stream, _| {
            let local = stream.0.local_addr().ok();
            of_tcp.tie(stream, local.map(|local| local.ip()))
        })
        .upgrade(Version::V1Lazy)
        .authenticate(noise)
        .multiplex(Yamux::new())
        .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)));
    let mut quic = quic::Config::new(keypair);
    quic.handshake_timeout = CONNECT_TIMEOUT;
    // A peer that is gone without a word is noticed well before a request's deadline.
    quic.keep_alive_interval = QUIC_KEEP_ALIVE;
    quic.max_idle_timeout = 3 * QUIC_KEEP_ALIVE.as_millis() as u32;
    quic.max_concurrent_stream_limit = MAX_STREAMS as u32;
    let quic = quic::tokio::Transport::new(quic).map(move |(peer, muxer), ends| {
        let muxer = of_quic.tie_between(muxer, &ends);
        (peer, StreamMuxerBox::new(muxer))
    });
    Ok(quic
        .or_transport(tcp)
        .map(|either, _| either.into_inner())
        .boxed())
}

fn memory(keypair: &identity::Keypair) -> io::Result<Boxed<(PeerId, StreamMuxerBox)>> {
    let noise = noise::Config::new(keypair).map_err(io::Error::other)?;
    let transport = MemoryTransport::new()
        .upgrade(Version::V1Lazy)
        .authenticate(noise)
        .multiplex(Yamux::new())
        .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)));
    Ok(TransportTimeout::new(transport, CONNECT_TIMEOUT).boxed())
}
