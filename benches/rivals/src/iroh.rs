//! iroh over QUIC: a stream for each request, or one kept stream; no relay, no discovery.

use futures::io::{AsyncRead, AsyncWrite};
use iroh::endpoint::{Connection, presets};
use iroh::{Endpoint, EndpointAddr, EndpointId, RelayMode};
use tokio::io::join;
use tokio_util::compat::TokioAsyncReadCompatExt;

use crate::load::{Caller, Client, Latencies, Load, send_with};
use crate::pipe::{Pipe, echo};

const STREAMS: &[u8] = b"rivals/streams";
const KEPT: &[u8] = b"rivals/kept";

/// The longest message.
const MAX_LEN: usize = 64 * 1024;

/// Serves echoes; returns where.
pub(crate) async fn serve() -> String {
    let endpoint = endpoint().await;
    let address = format!("{} {}", endpoint.id(), endpoint.bound_sockets()[0]);
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            let connection = incoming.await.expect("a client that can speak");
            match connection.alpn() == KEPT {
                true => tokio::spawn(serve_kept(connection)),
                false => tokio::spawn(serve_streams(connection)),
            };
        }
    });
    address
}

async fn serve_kept(connection: Connection) {
    let (send, receive) = connection.accept_bi().await.expect("a stream");
    echo(join(receive, send).compat()).await;
}

async fn serve_streams(connection: Connection) {
    // An error is the end.
    while let Ok((mut send, mut receive)) = connection.accept_bi().await {
        tokio::spawn(async move {
            let payload = receive.read_to_end(MAX_LEN).await.expect("a request");
            send.write_all(&payload).await.expect("the client reads");
            send.finish().expect("it is finished once");
        });
    }
}

pub(crate) async fn connect_streams(server: &str) -> impl Client {
    let (endpoint, connection) = connect(server, STREAMS).await;
    Streams {
        connection,
        _endpoint: endpoint,
    }
}

pub(crate) async fn connect_kept(server: &str) -> impl Client {
    let (endpoint, connection) = connect(server, KEPT).await;
    let (send, receive) = connection.open_bi().await.expect("a stream");
    Kept {
        pipe: Pipe::new(join(receive, send).compat()),
        _endpoint: endpoint,
    }
}

async fn connect(server: &str, protocol: &[u8]) -> (Endpoint, Connection) {
    let (id, socket) = server.split_once(' ').expect("an id and a socket");
    let id: EndpointId = id.parse().expect("an id");
    let address = EndpointAddr::new(id).with_ip_addr(socket.parse().expect("a socket"));
    let endpoint = endpoint().await;
    let connection = endpoint.connect(address, protocol).await;
    (endpoint, connection.expect("the server answers"))
}

async fn endpoint() -> Endpoint {
    Endpoint::builder(presets::Minimal)
        .relay_mode(RelayMode::Disabled)
        .alpns([STREAMS, KEPT].map(Vec::from).into())
        .clear_ip_transports()
        .bind_addr("127.0.0.1:0")
        .expect("an address")
        .bind()
        .await
        .expect("loopback can be bound")
}

struct Kept<S> {
    pipe: Pipe<S>,
    /// Closes its connections when dropped.
    _endpoint: Endpoint,
}

struct Streams {
    connection: Connection,
    _endpoint: Endpoint,
}

struct Call {
    connection: Connection,
    payload: Vec<u8>,
}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Client for Kept<S> {
    async fn send(&mut self, load: Load) -> Latencies {
        self.pipe.send(load).await
    }
}

impl Client for Streams {
    async fn send(&mut self, load: Load) -> Latencies {
        let caller = |_| Call {
            connection: self.connection.clone(),
            payload: vec![b'x'; load.bytes],
        };
        send_with((0..load.in_flight).map(caller), load).await.0
    }
}

impl Caller for Call {
    async fn call(&mut self) -> usize {
        let (mut send, mut receive) = self.connection.open_bi().await.expect("a stream");
        send.write_all(&self.payload)
            .await
            .expect("the server reads");
        send.finish().expect("it is finished once");
        receive.read_to_end(MAX_LEN).await.expect("a reply").len()
    }
}
