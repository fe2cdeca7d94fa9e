//! The WebSocket to a worker: many calls at once, answered in any order.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use futures::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_tungstenite::tungstenite::{self, Message, protocol::WebSocketConfig};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

use super::worker::{CONNECT_DEADLINE, Failed, MAX_OPEN};
use crate::gateway::rpc::{self, Answer, MAX_MESSAGE, Rid};
use crate::limits::FRAME_DEADLINE;

/// A socket without calls is closed after this.
const IDLE: Duration = Duration::from_secs(60);

/// What is read ahead on a socket at rest, which it holds as long as it lives.
const BUFFER: usize = 8 << 10;

/// An open socket. Dropping it closes it.
pub(super) struct Socket {
    calls: mpsc::Sender<Call>,
}

struct Call {
    rid: Rid,
    message: String,
    /// Dropped if the message was not written.
    outcome: oneshot::Sender<Result<Answer, String>>,
}

/// The calls that wait for an answer.
type Open = HashMap<Rid, oneshot::Sender<Result<Answer, String>>>;

/// Why there is no socket.
pub(super) enum ConnectError {
    Unreachable(String),
    /// Something answers, or rather listens, but takes no WebSocket.
    NotASocket,
}

impl Socket {
    /// Connects, and gives the worker so long for the handshake.
    pub(super) async fn connect(at: SocketAddr, patience: Duration) -> Result<Self, ConnectError> {
        let connected = timeout(CONNECT_DEADLINE, TcpStream::connect(at)).await;
        let unreachable = |reason: String| ConnectError::Unreachable(reason);
        let stream = connected
            .map_err(|_| unreachable("it does not answer".into()))?
            .map_err(|error| unreachable(error.to_string()))?;
        // Fails only if it is closed already.
        let _ = stream.set_nodelay(true);
        let config = WebSocketConfig::default()
            .read_buffer_size(BUFFER)
            .write_buffer_size(BUFFER)
            .max_message_size(Some(MAX_MESSAGE))
            .max_frame_size(Some(MAX_MESSAGE));
        let handshake = client_async_with_config(format!("ws://{at}/ws"), stream, Some(config));
        match timeout(patience, handshake).await {
            Ok(Ok((socket, _))) => {
                // Each open call finds room, so that nobody waits.
                let (calls, queue) = mpsc::channel(MAX_OPEN);
                tokio::spawn(carry(socket, queue));
                Ok(Self { calls })
            }
            Ok(Err(tungstenite::Error::Io(error))) => Err(unreachable(error.to_string())),
            Ok(Err(_)) | Err(_) => Err(ConnectError::NotASocket),
        }
    }

    pub(super) fn is_open(&self) -> bool {
        !self.calls.is_closed()
    }

    pub(super) async fn call(&self, service: &str, payload: &str) -> Result<Answer, Failed> {
        let not_sent = || Failed::NotSent("the socket is closed".into());
        let rid = Rid::random();
        let message = rpc::question(rid, service, payload).map_err(|_| not_sent())?;
        let (outcome, answered) = oneshot::channel();
        let call = Call {
            rid,
            message,
            outcome,
        };
        self.calls.send(call).await.map_err(|_| not_sent())?;
        match answered.await {
            Ok(outcome) => outcome.map_err(Failed::Broken),
            Err(_) => Err(not_sent()),
        }
    }
}

/// Writes calls and reads answers until either side closes.
async fn carry(mut socket: WebSocketStream<TcpStream>, mut queue: mpsc::Receiver<Call>) {
    let mut open = Open::new();
    let reason = loop {
        let idle_at = Instant::now() + IDLE;
        tokio::select! {
            // First, so that nothing is written to a socket that is known to be closed.
            biased;
            message = socket.next() => match message {
                Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => {
                    settle(&message, &mut open);
                }
                // Pings are answered by the library.
                Some(Ok(_)) => {}
                Some(Err(error)) => break error.to_string(),
                None => break "the worker closed the connection".into(),
            },
            call = queue.recv() => {
                // Nobody is left who could call, or wait for an answer.
                let Some(call) = call else { break "nobody calls".into() };
                if let Err(reason) = write(&mut socket, call, &mut queue, &mut open).await {
                    break reason;
                }
            }
            () = sleep_until(idle_at), if open.is_empty() => break "at rest".into(),
        }
    };
    // From here on nothing more is taken: what waits in the queue was not sent.
    drop(queue);
    for (_, outcome) in open {
        // Who called may have given up.
        let _ = outcome.send(Err(reason.clone()));
    }
    // Who does not take the goodbye is gone already.
    let _ = timeout(FRAME_DEADLINE, socket.close(None)).await;
}

/// Writes a call, and those that wait behind it.
async fn write(
    socket: &mut WebSocketStream<TcpStream>,
    call: Call,
    queue: &mut mpsc::Receiver<Call>,
    open: &mut Open,
) -> Result<(), String> {
    if open.len() >= 2 * MAX_OPEN {
        open.retain(|_, outcome| !outcome.is_closed());
    }
    let written = async {
        let mut next = Some(call);
        while let Some(Call {
            rid,
            message,
            outcome,
        }) = next
        {
            open.insert(rid, outcome);
            socket.feed(Message::text(message)).await?;
            next = queue.try_recv().ok();
        }
        socket.flush().await
    };
    match timeout(FRAME_DEADLINE, written).await {
        Ok(written) => written.map_err(|error| error.to_string()),
        Err(_) => Err("the worker does not read".into()),
    }
}

/// Gives an answer to who waits for it. What answers no open call is none.
fn settle(message: &Message, open: &mut HashMap<Rid, oneshot::Sender<Result<Answer, String>>>) {
    let Ok(text) = message.to_text() else { return };
    let Ok((Some(rid), answer)) = rpc::read_answer(text) else {
        return;
    };
    if let Some(outcome) = open.remove(&rid) {
        // Who called may have given up.
        let _ = outcome.send(Ok(answer));
    }
}
