//! Grenache's workers, one for each transport, which do with a payload what it says.

use std::net::SocketAddr;
use std::time::Duration;

use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tokio_tungstenite::accept_async;
use tokio_tungstenite::tungstenite::Message;

/// How long it takes for a late answer: longer than a call does by default.
pub(super) const LATE: Duration = Duration::from_secs(11);

/// Which transport a worker speaks.
#[derive(Clone, Copy, Debug)]
pub(super) enum Transport {
    Socket,
    Http,
    /// None that we do: a worker with Grenache's `secure`.
    Tls,
}

/// A worker. Dropping it closes its port, and its connections.
pub(super) struct Worker {
    pub(super) at: SocketAddr,
    task: JoinHandle<()>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Worker {
    pub(super) async fn start(transport: Transport) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let mut open = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                match transport {
                    Transport::Socket => open.spawn(by_socket(stream)),
                    Transport::Http => open.spawn(by_http(stream)),
                    Transport::Tls => open.spawn(by_tls(stream)),
                };
            }
        });
        Self { at, task }
    }

    /// Closes it; returns when its port is free.
    pub(super) async fn stop(mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }
}

/// The port of a host that is gone: who connects gets no answer at all.
#[cfg(target_os = "linux")]
pub(super) struct BlackHole {
    pub(super) at: SocketAddr,
    _listener: TcpListener,
    _waiting: TcpStream,
}

#[cfg(target_os = "linux")]
impl BlackHole {
    pub(super) async fn new() -> Self {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        // The system drops what comes after the one connection that may wait to be accepted.
        let listener = socket.listen(0).unwrap();
        let at = listener.local_addr().unwrap();
        Self {
            at,
            _waiting: TcpStream::connect(at).await.unwrap(),
            _listener: listener,
        }
    }
}

/// What it answers; `None` is nothing, ever.
fn answer(question: &str) -> Option<String> {
    let question: Value = serde_json::from_str(question).unwrap();
    let (rid, payload) = (&question[0], &question[2]);
    // Of a chat message, its text.
    let text = payload.as_str().or(payload["message"].as_str());
    Some(match text {
        Some("fail") => json!([rid, "something went wrong", null]).to_string(),
        Some("both") => json!([rid, "e", "data"]).to_string(),
        Some("nothing") => json!([rid, null, null]).to_string(),
        Some("hang") => return None,
        Some("large") => json!([rid, null, "x".repeat(3 << 20)]).to_string(),
        Some("broken") => format!("[{rid},null,{{"),
        Some(text) => json!([rid, null, format!("Echo: {text}")]).to_string(),
        None => json!([rid, null, {"echo": payload}]).to_string(),
    })
}

async fn by_socket(stream: TcpStream) {
    // What is not a handshake is not answered at all.
    let Ok(mut socket) = accept_async(stream).await else {
        return;
    };
    let mut held = Vec::new();
    while let Some(Ok(message)) = socket.next().await {
        let Message::Text(question) = message else {
            continue;
        };
        if question.contains("\"hold\"") {
            held.push(question);
            continue;
        }
        if question.contains("\"release\"") {
            for question in held.drain(..) {
                let answer = answer(&question).unwrap();
                socket.send(Message::text(answer)).await.unwrap();
            }
        }
        if question.contains("\"late\"") {
            sleep(LATE).await;
        }
        if question.contains("\"die\"") {
            return;
        }
        // What belongs to nobody must disturb nobody.
        let stray = Message::text("[\"0\",null,\"stray\"]");
        socket.send(stray).await.unwrap();
        if let Some(answer) = answer(&question) {
            socket.send(Message::text(answer)).await.unwrap();
        }
    }
}

/// As Grenache's, it leaves a WebSocket's handshake unanswered.
async fn by_http(mut stream: TcpStream) {
    loop {
        let Some((head, body)) = request(&mut stream).await else {
            return;
        };
        if head.starts_with("GET") {
            continue;
        }
        if body.contains("\"die\"") {
            return;
        }
        if body.contains("\"late\"") {
            sleep(LATE).await;
        }
        let Some(answer) = answer(&body) else {
            continue;
        };
        let length = answer.len();
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(answer.as_bytes()).await.unwrap();
    }
}

/// As Node, it leaves what is not TLS unanswered; a hello, for which it has no certificate, it refuses.
async fn by_tls(mut stream: TcpStream) {
    let mut first = [0; 512];
    let Ok(length @ 1..) = stream.read(&mut first).await else {
        return;
    };
    let record = usize::from(u16::from_be_bytes([first[3], first[4]]));
    if first[0] == 0x16 && length == 5 + record && first[5] == 1 {
        let _ = stream.write_all(&[0x15, 3, 3, 0, 2, 2, 40]).await;
    }
}

async fn request(stream: &mut TcpStream) -> Option<(String, String)> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    let length = head.split("content-length: ").nth(1);
    let length = length.and_then(|rest| rest.split("\r\n").next());
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).await.ok()?;
    Some((head_line(&head), String::from_utf8(body).unwrap()))
}

fn head_line(head: &str) -> String {
    head.to_uppercase()
}
