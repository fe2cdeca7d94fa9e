//! The WebSocket to a worker: many calls at once, answered in any order.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::select;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::{self, Message, protocol::WebSocketConfig};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

use super::worker::{CONNECT_DEADLINE, Failed, MAX_OPEN};
use crate::gateway::rpc::{self, Answer, MAX_MESSAGE, Rid};
use crate::gateway::trimmed::{Arrived, Trimmed};
use crate::limits::FRAME_DEADLINE;

/// A socket without calls is closed after this.
const IDLE: Duration = Duration::from_secs(60);

/// How long a worker may not read what is written to it: one that computes reads nothing meanwhile, and
/// those who call it have deadlines of their own.
const STALL: Duration = Duration::from_secs(60);

/// What is read ahead on a socket at rest, which it holds as long as it lives.
const BUFFER: usize = 8 << 10;

/// An open socket. Dropping it closes it.
pub(super) struct Socket {
    calls: mpsc::Sender<Call>,
}

struct Call {
    rid: Rid,
    message: String,
    outcome: Outcome,
}

/// Where the answer to a call goes. Dropped if the call was not written.
type Outcome = oneshot::Sender<Result<Answer, Failed>>;

/// The calls that wait for an answer.
#[derive(Default)]
struct Open(Mutex<HashMap<Rid, Outcome>>);

type Stream = WebSocketStream<Trimmed<TcpStream>>;

/// Why there is no socket.
pub(super) enum ConnectError {
    Unreachable(String),
    /// Something answers, or rather listens, but takes no WebSocket.
    NotASocket,
}

impl Socket {
    /// Connects, and gives the worker so long for the handshake; any time without a limit.
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
            .max_message_size(Some(MAX_MESSAGE + 1))
            .max_frame_size(Some(MAX_MESSAGE + 1));
        let stream = Trimmed::with_handshake(stream, MAX_MESSAGE);
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
            Ok(outcome) => outcome,
            Err(_) => Err(not_sent()),
        }
    }
}

/// Writes calls and reads answers until either side closes.
async fn carry(socket: Stream, queue: mpsc::Receiver<Call>) {
    let (sink, stream) = socket.split();
    let open = Open::default();
    let reason = {
        let reading = pin!(read(stream, &open));
        let writing = pin!(write_all(sink, queue, &open));
        // Reading comes first, so that nothing is written to a socket that is known to be closed. What
        // waits in the queue then was not sent.
        select(reading, writing).await.factor_first().0
    };
    for (_, outcome) in open.take() {
        // Who called may have given up.
        let _ = outcome.send(Err(Failed::Broken(reason.clone())));
    }
}

/// Gives each answer to who waits for it, until the worker closes; returns why.
async fn read(mut stream: SplitStream<Stream>, open: &Open) -> String {
    while let Some(message) = stream.next().await {
        match message {
            Ok(message @ (Message::Text(_) | Message::Binary(_))) => settle(message, open),
            // Pings are answered by the library.
            Ok(_) => {}
            Err(error) => return error.to_string(),
        }
    }
    "the worker closed the connection".into()
}

/// Writes each call, until nobody calls any more; returns why.
async fn write_all(
    mut sink: SplitSink<Stream, Message>,
    mut queue: mpsc::Receiver<Call>,
    open: &Open,
) -> String {
    let reason = loop {
        match timeout(IDLE, queue.recv()).await {
            Ok(Some(call)) => match write(&mut sink, call, &mut queue, open).await {
                Ok(()) => {}
                Err(reason) => return reason,
            },
            Ok(None) => break "nobody calls",
            Err(_) if open.is_empty() => break "at rest",
            Err(_) => {}
        }
    };
    // From here on nothing more is taken: what waits in the queue was not sent.
    drop(queue);
    // Who does not take the goodbye is gone already.
    let _ = timeout(FRAME_DEADLINE, sink.close()).await;
    reason.into()
}

/// Writes a call, and those that wait behind it.
async fn write(
    sink: &mut SplitSink<Stream, Message>,
    call: Call,
    queue: &mut mpsc::Receiver<Call>,
    open: &Open,
) -> Result<(), String> {
    open.forget_abandoned();
    let written = async {
        let mut next = Some(call);
        while let Some(Call {
            rid,
            message,
            outcome,
        }) = next
        {
            open.add(rid, outcome);
            sink.feed(Message::text(message)).await?;
            next = queue.try_recv().ok();
        }
        sink.flush().await
    };
    match timeout(STALL, written).await {
        Ok(written) => written.map_err(|error: tungstenite::Error| error.to_string()),
        Err(_) => Err("the worker does not read".into()),
    }
}

/// Gives an answer to who waits for it. What answers no open call is none.
fn settle(message: Message, open: &Open) {
    let bytes = message.into_data();
    let (beginning, otherwise) = match Arrived::from(&bytes) {
        Arrived::Beginning(beginning) => (beginning, Failed::TooLarge),
        Arrived::Whole(whole) => {
            let text = str::from_utf8(whole).ok();
            match text.and_then(|text| rpc::read_answer(text).ok()) {
                Some((Some(rid), answer)) => return open.settle(&rid, Ok(answer)),
                Some((None, _)) => return,
                None => (
                    whole,
                    Failed::Broken("the worker's answer is no JSON".into()),
                ),
            }
        }
    };
    if let Some(rid) = rpc::own_rid_in(beginning) {
        open.settle(&rid, Err(otherwise));
    }
}

impl Open {
    fn add(&self, rid: Rid, outcome: Outcome) {
        self.calls().insert(rid, outcome);
    }

    fn settle(&self, rid: &Rid, outcome: Result<Answer, Failed>) {
        if let Some(waiting) = self.calls().remove(rid) {
            // Who called may have given up.
            let _ = waiting.send(outcome);
        }
    }

    fn is_empty(&self) -> bool {
        self.calls().is_empty()
    }

    /// Forgets the calls that nobody waits for, if they are many.
    fn forget_abandoned(&self) {
        let mut calls = self.calls();
        if calls.len() >= 2 * MAX_OPEN {
            calls.retain(|_, outcome| !outcome.is_closed());
        }
    }

    fn take(&self) -> HashMap<Rid, Outcome> {
        std::mem::take(&mut *self.calls())
    }

    fn calls(&self) -> MutexGuard<'_, HashMap<Rid, Outcome>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
