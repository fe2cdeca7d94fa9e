//! gRPC by tonic: unary calls over one connection, with TLS and without.

use bytes::Bytes;
use tokio::net::TcpListener;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{
    Certificate, Channel, ClientTlsConfig, Endpoint, Identity, Server, ServerTlsConfig,
};
use tonic::{Request, Response, Status};

use crate::load::{Caller, Client, Latencies, Load, send_with};
use crate::tcp;
use crate::tls::{self, Credentials};

include!(concat!(env!("OUT_DIR"), "/rivals.Echo.rs"));

use echo_client::EchoClient;
use echo_server::{Echo, EchoServer};

/// A request or a reply.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Message {
    #[prost(bytes = "bytes", tag = "1")]
    payload: Bytes,
}

struct Echoes;

#[tonic::async_trait]
impl Echo for Echoes {
    async fn echo(&self, request: Request<Message>) -> Result<Response<Message>, Status> {
        Ok(Response::new(request.into_inner()))
    }
}

/// Serves echoes; returns where.
pub(crate) async fn serve() -> String {
    let listener = tcp::listen().await;
    let address = listener.local_addr().expect("it is bound");
    serve_at(listener, Server::builder());
    format!("http://{address}")
}

/// The same over TLS; returns where, and the certificate.
pub(crate) async fn serve_tls() -> String {
    let listener = tcp::listen().await;
    let address = listener.local_addr().expect("it is bound");
    let credentials = Credentials::generate();
    let identity = Identity::from_pem(&credentials.certificate, &credentials.key);
    let server = Server::builder().tls_config(ServerTlsConfig::new().identity(identity));
    serve_at(listener, server.expect("a key and its certificate"));
    credentials.introduce(address)
}

fn serve_at(listener: TcpListener, mut server: Server) {
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let server = server.add_service(EchoServer::new(Echoes));
    tokio::spawn(server.serve_with_incoming(incoming));
}

pub(crate) async fn connect(server: &str) -> impl Client {
    connect_to(Endpoint::from_shared(server.to_owned()).expect("an address")).await
}

pub(crate) async fn connect_tls(server: &str) -> impl Client {
    let (address, certificate) = tls::introduced(server);
    let trusted = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(certificate))
        .domain_name(tls::HOST);
    let endpoint = Endpoint::from_shared(format!("https://{address}")).expect("an address");
    connect_to(endpoint.tls_config(trusted).expect("a certificate")).await
}

async fn connect_to(endpoint: Endpoint) -> Calls {
    let channel = endpoint.connect().await.expect("the server answers");
    Calls(EchoClient::new(channel))
}

struct Calls(EchoClient<Channel>);

struct Call {
    client: EchoClient<Channel>,
    payload: Bytes,
}

impl Client for Calls {
    async fn send(&mut self, load: Load) -> Latencies {
        let payload = Bytes::from(vec![b'x'; load.bytes]);
        let caller = |_| Call {
            client: self.0.clone(),
            payload: payload.clone(),
        };
        send_with((0..load.in_flight).map(caller), load).await.0
    }
}

impl Caller for Call {
    async fn call(&mut self) -> usize {
        let payload = self.payload.clone();
        let reply = self.client.echo(Message { payload }).await;
        reply
            .expect("the server answers")
            .into_inner()
            .payload
            .len()
    }
}
