//! The calling side: picks a provider, sends, and decides what a failure means.

use std::str::Utf8Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libp2p::PeerId;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::{Closed, Node};
use crate::error::RequestError;
use crate::limits::{MAX_REQUEST_TIME, REQUEST_DEADLINE};
use crate::name::ServiceName;
use crate::net::{Command, Lane, Outbound, Outcome, Outgoing, Waiter};
use crate::proto::routes::{Pick, Slots};
use crate::proto::wire::{ErrorCode, MAX_PAYLOAD, RemoteError};

/// How a request is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestOptions {
    /// How long the whole call may take, lookup and further attempts included. 10 seconds by
    /// default, at most [`MAX_REQUEST_TIME`].
    pub deadline: Duration,
    /// What to do when it is not known whether an attempt has run.
    pub delivery: Delivery,
}

/// What to do when it is not known whether an attempt has run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Delivery {
    /// Fail: the request never runs twice.
    #[default]
    AtMostOnce,
    /// Try the next provider: for requests that may run twice.
    AtLeastOnce,
}

impl Default for RequestOptions {
    fn default() -> Self {
        Self {
            deadline: REQUEST_DEADLINE,
            delivery: Delivery::default(),
        }
    }
}

/// What a provider answered.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Reply {
    /// Who answered, proved by its key.
    pub provider: PeerId,
    /// What it answered.
    pub payload: Vec<u8>,
}

impl Reply {
    /// What was answered, as text.
    ///
    /// # Errors
    /// If it is not UTF-8.
    pub fn text(&self) -> Result<&str, Utf8Error> {
        std::str::from_utf8(&self.payload)
    }
}

/// What is sent to one provider after another.
struct Message<'a> {
    node: &'a Node,
    service: Arc<str>,
    payload: Arc<[u8]>,
}

/// A call under way.
struct Call<'a> {
    node: &'a Node,
    name: &'a ServiceName,
    message: Message<'a>,
    delivery: Delivery,
    tried: Vec<PeerId>,
    /// What the last attempt that failed has to say.
    failure: Option<RequestError>,
}

/// What an attempt leads to.
enum Verdict {
    Over(Result<Reply, RequestError>),
    /// It has not run, or may run again: the next provider may have it.
    Next(RequestError),
}

pub(super) async fn request(
    node: &Node,
    name: &ServiceName,
    payload: Vec<u8>,
    options: RequestOptions,
) -> Result<Reply, RequestError> {
    let mut call = Call::new(node, name, payload, options.delivery)?;
    let result = within(name, options.deadline, call.run()).await;
    if let (Err(RequestError::TimedOut(_)), Some(silent)) = (&result, call.tried.last()) {
        // It may be gone without a word: the next request looks first.
        node.routes().forget(name, silent);
    }
    result
}

pub(super) async fn request_to(
    node: &Node,
    provider: PeerId,
    name: &ServiceName,
    payload: Vec<u8>,
    options: RequestOptions,
) -> Result<Reply, RequestError> {
    let mut call = Call::new(node, name, payload, options.delivery)?;
    let attempt = async {
        if !node.routes().is_connected(&provider) {
            // Dials it, if it still announces the name.
            node.wait_for(name, Waiter::All).await?;
        }
        let slots = node.routes().slots(provider);
        let pick = Pick {
            provider,
            slots,
            stale: false,
        };
        match call.attempt(pick).await {
            Verdict::Over(result) => result,
            Verdict::Next(error) => Err(error),
        }
    };
    within(name, options.deadline, attempt).await
}

async fn within<T>(
    name: &ServiceName,
    deadline: Duration,
    call: impl Future<Output = Result<T, RequestError>>,
) -> Result<T, RequestError> {
    timeout(deadline.min(MAX_REQUEST_TIME), call)
        .await
        .unwrap_or_else(|_| Err(RequestError::TimedOut(name.clone())))
}

/// Calls a service of one peer that is no name: one of the protocol's own.
pub(super) async fn call_peer(
    node: &Node,
    peer: PeerId,
    service: &str,
    payload: Vec<u8>,
    deadline: Duration,
) -> Outcome {
    let message = Message {
        node,
        service: service.into(),
        payload: payload.into(),
    };
    let slots = node.routes().slots(peer);
    match timeout(deadline, message.send(peer, &slots)).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(Closed)) => Outcome::NotSent("this node is shut down".into()),
        Err(_) => Outcome::Broken("it did not answer in time".into()),
    }
}

impl Message<'_> {
    /// Sends it to a peer when there is a slot for it: over a stream that is kept open if there is
    /// one, and otherwise over one of its own.
    async fn send(&self, provider: PeerId, slots: &Slots) -> Result<Outcome, Closed> {
        let _slot = slots.all.acquire().await.map_err(|_| Closed)?;
        self.node.count_request();
        if let Some(outcome) = self.over_kept_stream(provider).await {
            return Ok(outcome);
        }
        let slot = Arc::clone(&slots.single).acquire_owned().await;
        let slot = slot.map_err(|_| Closed)?;
        // One may have been opened while this waited.
        if let Some(outcome) = self.over_kept_stream(provider).await {
            return Ok(outcome);
        }
        let (sender, outcome) = oneshot::channel();
        let command = Command::Request(Outbound {
            provider,
            service: Arc::clone(&self.service),
            payload: Arc::clone(&self.payload),
            outcome: sender,
            slot,
        });
        self.node.send(command).await?;
        outcome.await.map_err(|_| Closed)
    }

    /// `None` if there is no such stream, or it ended before the request was written to it.
    async fn over_kept_stream(&self, provider: PeerId) -> Option<Outcome> {
        let lane = Lane::of(&self.payload);
        let queue = self.node.kept_stream(provider, lane)?;
        let (sender, outcome) = oneshot::channel();
        let request = Outgoing {
            service: Arc::clone(&self.service),
            payload: Arc::clone(&self.payload),
            outcome: sender,
        };
        queue.send(request).await.ok()?;
        match outcome.await {
            Ok(Outcome::NotSent(_)) | Err(_) => None,
            Ok(outcome) => Some(outcome),
        }
    }
}

impl<'a> Call<'a> {
    fn new(
        node: &'a Node,
        name: &'a ServiceName,
        payload: Vec<u8>,
        delivery: Delivery,
    ) -> Result<Self, RequestError> {
        let (len, max) = (payload.len(), MAX_PAYLOAD);
        if len > max {
            return Err(RequestError::TooLarge { len, max });
        }
        let message = Message {
            node,
            service: name.shared(),
            payload: payload.into(),
        };
        Ok(Self {
            node,
            name,
            message,
            delivery,
            tried: Vec::new(),
            failure: None,
        })
    }

    /// Tries the providers that are known, then those that a fresh lookup finds.
    async fn run(&mut self) -> Result<Reply, RequestError> {
        if let Some(result) = self.try_known().await {
            return result;
        }
        if self.tried.is_empty() {
            self.node.wait_for(self.name, Waiter::First).await?;
        } else {
            // Those known have failed: all others count, not just the first to answer.
            match self.node.wait_for(self.name, Waiter::All).await {
                // Those that are live now may be tried again: what failed has not run, or may run
                // twice.
                Ok(_) => self.tried.clear(),
                Err(error) => return Err(self.failure.take().unwrap_or(error.into())),
            }
        }
        if let Some(result) = self.try_known().await {
            return result;
        }
        Err(self
            .failure
            .take()
            .unwrap_or_else(|| self.unreachable("it does not answer")))
    }

    async fn try_known(&mut self) -> Option<Result<Reply, RequestError>> {
        loop {
            let pick = self
                .node
                .routes()
                .pick(self.name, &self.tried, Instant::now());
            let pick = pick?;
            if pick.stale {
                self.refresh();
            }
            self.tried.push(pick.provider);
            match self.attempt(pick).await {
                Verdict::Over(result) => return Some(result),
                Verdict::Next(error) => self.failure = Some(error),
            }
        }
    }

    /// Looks the name up again beside the request.
    fn refresh(&self) {
        let (node, name) = (self.node.clone(), self.name.clone());
        tokio::spawn(async move {
            // What it finds is in the routes; an error is met by the next request.
            let _ = node.wait_for(&name, Waiter::All).await;
        });
    }

    async fn attempt(&mut self, pick: Pick) -> Verdict {
        match self.message.send(pick.provider, &pick.slots).await {
            Ok(outcome) => self.judge(pick.provider, outcome),
            Err(Closed) => Verdict::Over(Err(RequestError::Closed)),
        }
    }

    fn judge(&self, provider: PeerId, outcome: Outcome) -> Verdict {
        match outcome {
            Outcome::Answered(Ok(payload)) => Verdict::Over(Ok(Reply { provider, payload })),
            Outcome::Answered(Err(error)) => self.judge_error(provider, error),
            Outcome::NotSent(reason) => {
                self.node.routes().forget(self.name, &provider);
                Verdict::Next(self.unreachable(&reason))
            }
            Outcome::Broken(reason) => {
                self.node.routes().forget(self.name, &provider);
                let error = RequestError::Interrupted { provider, reason };
                match self.delivery {
                    Delivery::AtMostOnce => Verdict::Over(Err(error)),
                    Delivery::AtLeastOnce => Verdict::Next(error),
                }
            }
        }
    }

    /// The remote says whether it has run the request.
    fn judge_error(&self, provider: PeerId, error: RemoteError) -> Verdict {
        match error.code {
            ErrorCode::Busy => Verdict::Next(RequestError::Busy(self.name.clone())),
            ErrorCode::UnknownService | ErrorCode::ShuttingDown => {
                self.node.routes().forget(self.name, &provider);
                Verdict::Next(self.unreachable("it has withdrawn the name"))
            }
            _ => {
                let error = Box::new(error);
                Verdict::Over(Err(RequestError::Remote { provider, error }))
            }
        }
    }

    fn unreachable(&self, reason: &str) -> RequestError {
        RequestError::Unreachable {
            name: self.name.clone(),
            reason: reason.into(),
        }
    }
}
