//! HTTP/1.1 by axum and hyper: a kept connection for each request in flight, with TLS and without.

use axum::Router;
use axum::routing::post;
use axum::serve::ListenerExt;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::HOST;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;

use crate::load::{Caller, Client, Latencies, Load, send_with};
use crate::tcp;
use crate::tls::{self, Credentials, Encrypted};

/// Serves echoes; returns where.
pub(crate) async fn serve() -> String {
    let listener = tcp::listen().await;
    let address = listener.local_addr().expect("it is bound").to_string();
    let listener = listener.tap_io(|stream| tcp::without_delay(stream));
    tokio::spawn(async { axum::serve(listener, echo()).await });
    address
}

/// The same over TLS; returns where, and the certificate.
pub(crate) async fn serve_tls() -> String {
    let listener = tcp::listen().await;
    let address = listener.local_addr().expect("it is bound");
    let credentials = Credentials::generate();
    let listener = Encrypted::new(listener, &credentials);
    tokio::spawn(async { axum::serve(listener, echo()).await });
    credentials.introduce(address)
}

fn echo() -> Router {
    Router::new().route("/echo", post(async |payload: Bytes| payload))
}

pub(crate) fn connect(server: &str) -> impl Client {
    Connections::new(server, None)
}

pub(crate) fn connect_tls(server: &str) -> impl Client {
    let (address, certificate) = tls::introduced(server);
    Connections::new(address, Some(tls::connector(&certificate)))
}

struct Connections {
    server: String,
    encryption: Option<TlsConnector>,
    resting: Vec<SendRequest<Full<Bytes>>>,
}

struct Connection {
    server: String,
    sender: SendRequest<Full<Bytes>>,
    payload: Bytes,
}

impl Connections {
    fn new(server: &str, encryption: Option<TlsConnector>) -> Self {
        Self {
            server: server.to_owned(),
            encryption,
            resting: Vec::new(),
        }
    }

    async fn open(&self) -> SendRequest<Full<Bytes>> {
        match &self.encryption {
            None => begin(tcp::dial(&self.server).await).await,
            Some(tls) => begin(tls::dial(tls, &self.server).await).await,
        }
    }
}

async fn begin<S>(stream: S) -> SendRequest<Full<Bytes>>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let handshake = handshake(TokioIo::new(stream)).await;
    let (sender, connection) = handshake.expect("nothing is sent yet");
    tokio::spawn(connection);
    sender
}

impl Client for Connections {
    async fn send(&mut self, load: Load) -> Latencies {
        while self.resting.len() < load.in_flight {
            let sender = self.open().await;
            self.resting.push(sender);
        }
        let payload = Bytes::from(vec![b'x'; load.bytes]);
        let resting = self.resting.len() - load.in_flight;
        let callers = self.resting.drain(resting..).map(|sender| Connection {
            server: self.server.clone(),
            sender,
            payload: payload.clone(),
        });
        let (latencies, callers) = send_with(callers, load).await;
        let senders = callers.into_iter().map(|caller| caller.sender);
        self.resting.extend(senders);
        latencies
    }
}

impl Caller for Connection {
    async fn call(&mut self) -> usize {
        let request = Request::post("/echo")
            .header(HOST, &self.server)
            .body(Full::new(self.payload.clone()))
            .expect("a request");
        // Its task frees the connection some time after the last reply was read.
        self.sender.ready().await.expect("the connection is kept");
        let reply = self.sender.send_request(request).await;
        let reply = reply.expect("the server answers");
        assert_eq!(reply.status(), StatusCode::OK);
        let body = reply.into_body().collect().await.expect("a whole body");
        body.to_bytes().len()
    }
}
