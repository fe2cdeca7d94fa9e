//! The bound: one stream of libp2p's transports, without a Swarm, kept open and pipelined.
//!
//! Transports and their settings are those of Grapevine. What this does not do is what an API has to:
//! names, a future for each request, CBOR, budgets, deadlines.

use std::future::poll_fn;
use std::io;
use std::task::{Context, Poll};

use futures::StreamExt;
use libp2p::core::Endpoint;
use libp2p::core::muxing::{StreamMuxerBox, StreamMuxerExt, SubstreamBox};
use libp2p::core::transport::{Boxed, DialOpts, ListenerId, PortUse, TransportEvent};
use libp2p::core::upgrade::Version;
use libp2p::identity::Keypair;
use libp2p::{PeerId, Transport, noise, quic, tcp, tls, yamux};

use crate::load::Client;
use crate::pipe::{Pipe, echo};

/// How TCP is encrypted. QUIC has its own way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Security {
    /// As Grapevine does: ChaCha20-Poly1305.
    Noise,
    /// As libp2p can too: AES-GCM.
    Tls,
}

/// Serves echoes; returns where.
pub(crate) async fn serve(listen: &str, security: Security) -> String {
    let mut transport = transport(security);
    transport
        .listen_on(ListenerId::next(), listen.parse().expect("an address"))
        .expect("loopback can be listened on");
    let Some(TransportEvent::NewAddress { listen_addr, .. }) = transport.next().await else {
        panic!("it does not listen");
    };
    tokio::spawn(async move {
        while let Some(event) = transport.next().await {
            if let Some((upgrade, _)) = event.into_incoming() {
                tokio::spawn(async move {
                    let (_, muxer) = upgrade.await.expect("a client that can speak");
                    echo(open(muxer, StreamMuxerExt::poll_inbound_unpin).await).await;
                });
            }
        }
    });
    listen_addr.to_string()
}

pub(crate) async fn connect(server: &str, security: Security) -> impl Client {
    let options = DialOpts {
        role: Endpoint::Dialer,
        port_use: PortUse::New,
    };
    let dial = transport(security)
        .dial(server.parse().expect("an address"), options)
        .expect("the address can be dialled");
    let (_, muxer) = dial.await.expect("the server answers");
    Pipe::new(open(muxer, StreamMuxerExt::poll_outbound_unpin).await)
}

/// Opens or accepts the only stream of a connection.
async fn open<F>(mut muxer: StreamMuxerBox, poll: F) -> SubstreamBox
where
    F: Fn(&mut StreamMuxerBox, &mut Context<'_>) -> Poll<io::Result<SubstreamBox>>,
{
    let stream = poll_fn(|cx| poll(&mut muxer, cx)).await;
    tokio::spawn(async move { while poll_fn(|cx| muxer.poll_unpin(cx)).await.is_ok() {} });
    stream.expect("a stream")
}

fn transport(security: Security) -> Boxed<(PeerId, StreamMuxerBox)> {
    let keypair = Keypair::generate_ed25519();
    let tcp = tcp::tokio::Transport::new(tcp::Config::default().nodelay(true));
    let tcp = match security {
        Security::Noise => tcp
            .upgrade(Version::V1Lazy)
            .authenticate(noise::Config::new(&keypair).expect("a key of its own"))
            .multiplex(yamux::Config::default())
            .boxed(),
        Security::Tls => tcp
            .upgrade(Version::V1Lazy)
            .authenticate(tls::Config::new(&keypair).expect("a key of its own"))
            .multiplex(yamux::Config::default())
            .boxed(),
    };
    let tcp = Transport::map(tcp, |(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)));
    quic::tokio::Transport::new(quic::Config::new(&keypair))
        .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)))
        .or_transport(tcp)
        .map(|either, _| either.into_inner())
        .boxed()
}
