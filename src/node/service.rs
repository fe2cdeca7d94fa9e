//! The serving side: a [`Service`] yields the [`Request`]s for an announced name.

mod turns;

use std::iter;
use std::str::Utf8Error;

use futures::FutureExt;
use libp2p::PeerId;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::Node;
use crate::name::ServiceName;
use crate::net::{Command, Inbound, Responder};
use crate::proto::wire::{DecodeError, ErrorCode, MAX_PAYLOAD, RemoteError};
use turns::Turns;

/// The requests that wait in a channel for a handler, where one more is answered `busy`, and about
/// as many that were taken from it. The node's own limit on open requests comes first by default.
const QUEUE: usize = 1_024;

/// A name that this node announces and serves.
///
/// Dropping it takes the name back: requests that come then are answered `unknown-service`, and
/// grapes forget the name at once.
#[derive(Debug)]
#[must_use = "dropping a service takes its name back"]
pub struct Service {
    name: ServiceName,
    requests: mpsc::Receiver<Inbound>,
    /// Those that were taken from the channel.
    waiting: Turns<PeerId, Inbound>,
    /// Room to take them with.
    taken: Vec<Inbound>,
    node: Node,
}

/// A request that waits for a reply.
///
/// Dropping it, also by a panic, answers `handler-failed`, so that the caller never hangs.
#[derive(Debug)]
#[must_use = "a request that is dropped is answered with an error"]
pub struct Request {
    payload: Vec<u8>,
    responder: Responder,
}

impl Service {
    pub(super) fn new(name: ServiceName, node: Node) -> (Self, mpsc::Sender<Inbound>) {
        let (handler, requests) = mpsc::channel(QUEUE);
        let service = Self {
            name,
            requests,
            waiting: Turns::default(),
            taken: Vec::new(),
            node,
        };
        (service, handler)
    }

    /// The name that is served.
    pub fn name(&self) -> &ServiceName {
        &self.name
    }

    /// The next request; `None` once the node is shut down. Where several peers' requests wait, each
    /// peer has its turn. Cancel-safe.
    pub async fn next(&mut self) -> Option<Request> {
        match self.waiting.len() {
            0 => {
                self.requests.recv_many(&mut self.taken, QUEUE).await;
            }
            // What has come meanwhile may be another peer's.
            1..QUEUE => {
                self.requests
                    .recv_many(&mut self.taken, QUEUE)
                    .now_or_never();
            }
            QUEUE.. => {}
        }
        for inbound in self.taken.drain(..) {
            self.waiting.push(inbound.responder.peer(), inbound);
        }
        self.waiting.pop().map(Request::from)
    }

    /// Runs a handler for every request, each in a task of its own, so that a slow one delays no
    /// other and one that panics takes nothing down. Returns once the node is shut down.
    ///
    /// Cancel-safe: dropping the future aborts the handlers that run.
    pub async fn serve<F, R>(mut self, handler: F)
    where
        F: Fn(Request) -> R,
        R: Future<Output = ()> + Send + 'static,
    {
        // As many as the node lets in: it bounds the open requests, not this.
        let mut running = JoinSet::new();
        while let Some(request) = self.next().await {
            running.spawn(handler(request));
            while running.try_join_next().is_some() {}
        }
        while running.join_next().await.is_some() {}
    }

    /// Takes the name back, and returns when that is on its way to every grape. Requests that wait
    /// in the queue are answered with an error.
    ///
    /// Cancel-safe: dropping the future takes the name back as well.
    pub async fn withdraw(self) {
        let (done, withdrawn) = oneshot::channel();
        let command = Command::Withdraw {
            name: self.name.clone(),
            done,
        };
        if self.node.send(command).await.is_ok() {
            // An error means that the node is shut down, which withdraws as well.
            let _ = withdrawn.await;
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // Requests in the queue have not run: their callers may go on to the next provider.
        self.requests.close();
        let waiting = iter::from_fn(|| self.waiting.pop());
        let queued = iter::from_fn(|| self.requests.recv().now_or_never().flatten());
        for inbound in waiting.chain(queued) {
            let message = "not served any more";
            let error = RemoteError::new(ErrorCode::UnknownService, message);
            inbound.responder.answer(Err(error));
        }
    }
}

impl From<Inbound> for Request {
    fn from(inbound: Inbound) -> Self {
        Self {
            payload: inbound.payload,
            responder: inbound.responder,
        }
    }
}

impl Request {
    /// Who asks, proved by its key.
    pub fn peer(&self) -> PeerId {
        self.responder.peer()
    }

    /// What was sent, at most [`MAX_PAYLOAD`] bytes.
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// Takes out what was sent, for a handler that passes it on; [`payload`](Self::payload) is empty then.
    pub fn take_payload(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.payload)
    }

    /// What was sent, as text.
    ///
    /// # Errors
    /// If it is not UTF-8.
    pub fn text(&self) -> Result<&str, Utf8Error> {
        std::str::from_utf8(&self.payload)
    }

    /// Answers. More than [`MAX_PAYLOAD`] bytes cannot be sent; the caller then gets `too-large`.
    pub fn reply(self, payload: impl Into<Vec<u8>>) {
        let payload = payload.into();
        let len = payload.len();
        if len > MAX_PAYLOAD {
            let message = format!("the reply has {len} bytes; at most {MAX_PAYLOAD} are carried");
            return self.too_large(message);
        }
        self.answer(Ok(payload));
    }

    /// Answers `handler-failed` with a message for the caller.
    pub fn fail(self, message: impl Into<String>) {
        self.answer(Err(RemoteError::new(ErrorCode::HandlerFailed, message)));
    }

    /// Answers `too-large` with a message for the caller: the reply would be over a limit.
    pub fn too_large(self, message: impl Into<String>) {
        self.answer(Err(RemoteError::new(ErrorCode::TooLarge, message)));
    }

    /// Answers a payload that cannot be read: `too-large` if a part of it is over its limit, otherwise
    /// `bad-request`.
    pub fn unread(self, error: &DecodeError) {
        self.answer(Err(error.into()));
    }

    /// Answers `bad-request` with a message for the caller.
    pub fn refuse(self, message: impl Into<String>) {
        self.answer(Err(RemoteError::new(ErrorCode::BadRequest, message)));
    }

    /// Answers as a node does: with an error code that callers act on.
    pub(crate) fn answer(self, outcome: Result<Vec<u8>, RemoteError>) {
        self.responder.answer(outcome);
    }
}
