//! Bare TCP, pipelined and not encrypted: what the machine can do.

use tokio::net::{TcpListener, TcpStream};
use tokio_util::compat::TokioAsyncReadCompatExt;

use crate::load::Client;
use crate::pipe::{Pipe, echo};

/// Serves echoes; returns where.
pub(crate) async fn serve() -> String {
    let listener = listen().await;
    let address = listener.local_addr().expect("it is bound").to_string();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            without_delay(&stream);
            tokio::spawn(echo(stream.compat()));
        }
    });
    address
}

pub(crate) async fn connect(server: &str) -> impl Client {
    Pipe::new(dial(server).await.compat())
}

/// A listener on loopback, at any port.
pub(crate) async fn listen() -> TcpListener {
    let listener = TcpListener::bind("127.0.0.1:0").await;
    listener.expect("loopback can be listened on")
}

pub(crate) async fn dial(server: &str) -> TcpStream {
    let stream = TcpStream::connect(server).await.expect("it listens");
    without_delay(&stream);
    stream
}

pub(crate) fn without_delay(stream: &TcpStream) {
    stream.set_nodelay(true).expect("a connection");
}
