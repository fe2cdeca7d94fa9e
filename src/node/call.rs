//! The calling side: picks a provider, sends, and decides what a failure means.

use std::fmt;
use std::pin::Pin;
use std::str::Utf8Error;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{self, BoxStream, FuturesUnordered, Stream, StreamExt};
use libp2p::PeerId;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout, timeout_at};

use super::seeking::Seeking;
use super::{Closed, Node};
use crate::error::{LookupError, RequestError};
use crate::limits::{MAX_REQUEST_TIME, REQUEST_DEADLINE, SHUTDOWN_DEADLINE};
use crate::name::ServiceName;
use crate::net::{Command, Lane, Link, Outbound, Outcome, Question, Sought, Waiter};
use crate::proto::routes::Pick;
use crate::proto::wire::{ErrorCode, MAX_PAYLOAD, RemoteError};

/// How often it is looked whether a peer that is shutting down is gone, at least.
const GONE: Duration = Duration::from_millis(20);

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

/// The replies to a [broadcast](Node::broadcast), each as it comes.
///
/// Ends after the last one; a failed lookup is its only item. A provider that was named and could not be
/// reached is an item too, [`RequestError::Unreached`], so that who has collected no error has asked all. Dropping it drops the requests that are
/// not answered; they may still run.
#[must_use = "nothing is sent before it is polled"]
pub struct Replies(BoxStream<'static, Result<Reply, RequestError>>);

impl Replies {
    pub(super) fn new(
        replies: impl Stream<Item = Result<Reply, RequestError>> + Send + 'static,
    ) -> Self {
        Self(replies.boxed())
    }
}

impl Stream for Replies {
    type Item = Result<Reply, RequestError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next_unpin(context)
    }
}

impl fmt::Debug for Replies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replies").finish_non_exhaustive()
    }
}

/// What is sent to one provider after another.
struct Message<'a> {
    node: &'a Node,
    service: &'a Arc<str>,
    payload: Bytes,
    begun: Instant,
    deadline: Instant,
}

/// A call under way.
struct Call<'a> {
    name: &'a ServiceName,
    message: Message<'a>,
    delivery: Delivery,
    /// The providers that have failed, and the last one that was asked.
    tried: Vec<PeerId>,
    asked: Option<PeerId>,
    /// What the last attempt that failed has to say.
    failure: Option<RequestError>,
    /// A provider that is shutting down.
    leaving: Option<PeerId>,
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
    payload: Bytes,
    options: RequestOptions,
) -> Result<Reply, RequestError> {
    let message = Message::within_bounds(node, name, payload, &options)?;
    let first = match message.pick(name, &[]) {
        Some(pick) => {
            let outcome = message.at_once(&pick.link).await;
            outcome.map(|outcome| (pick.provider, outcome))
        }
        None => None,
    };
    if let Some((provider, Outcome::Answered(Ok(payload)))) = first {
        return Ok(Reply { provider, payload });
    }
    // Most requests end there, and bear nothing of what others may need.
    let mut call = Call::new(name, message, options.delivery);
    Box::pin(call.run(first)).await
}

pub(super) async fn request_to(
    node: &Node,
    provider: PeerId,
    name: &ServiceName,
    payload: Bytes,
    options: RequestOptions,
) -> Result<Reply, RequestError> {
    let message = Message::within_bounds(node, name, payload, &options)?;
    let mut call = Call::new(name, message, options.delivery);
    if !node.routes().is_connected(&provider) {
        // Dials it, if it still announces the name.
        call.find(provider).await?;
    }
    let link = node.routes().link(provider);
    match call.attempt(provider, &link).await {
        Verdict::Over(result) => result,
        Verdict::Next(error) => Err(error),
    }
}

pub(super) fn broadcast(
    node: Node,
    name: ServiceName,
    payload: Bytes,
    options: RequestOptions,
) -> impl Stream<Item = Result<Reply, RequestError>> + Send + 'static {
    let begin = async move {
        let end = Instant::now() + options.deadline.min(MAX_REQUEST_TIME);
        let sought = Seeking::new(&node, &name, end);
        let broadcast = Broadcast {
            sought: Some(sought),
            message: (node, name, payload),
            options,
            end,
            asked: FuturesUnordered::new(),
            failures: Vec::new(),
        };
        stream::unfold(broadcast, Broadcast::next)
    };
    stream::once(begin).flatten()
}

/// A request to all providers of a name, each of which is asked as soon as it is found.
struct Broadcast {
    /// What the lookup finds, until it is over.
    sought: Option<Seeking>,
    message: (Node, ServiceName, Bytes),
    options: RequestOptions,
    end: Instant,
    asked: FuturesUnordered<BoxFuture<'static, Result<Reply, RequestError>>>,
    /// What the lookup had to say at its end.
    failures: Vec<RequestError>,
}

impl Broadcast {
    async fn next(mut self) -> Option<(Result<Reply, RequestError>, Self)> {
        loop {
            if let Some(failure) = self.failures.pop() {
                return Some((Err(failure), self));
            }
            tokio::select! {
                biased;
                Some(found) = next_of(&mut self.sought) => self.on_found(found),
                Some(reply) = self.asked.next() => return Some((reply, self)),
                else => return None,
            }
        }
    }

    fn on_found(&mut self, found: Sought) {
        match found {
            Sought::Live(provider) => self.ask(provider),
            Sought::Over(Ok(unreached)) => {
                let name = &self.message.1;
                let failure = |provider| RequestError::Unreached {
                    name: name.clone(),
                    provider,
                };
                self.failures.extend(unreached.into_iter().map(failure));
                self.sought = None;
            }
            Sought::Over(Err(error)) => {
                self.failures.push(error.into());
                self.sought = None;
            }
        }
    }

    fn ask(&mut self, provider: PeerId) {
        let (node, name, payload) = self.message.clone();
        let options = RequestOptions {
            deadline: self.end.saturating_duration_since(Instant::now()),
            ..self.options.clone()
        };
        let asked = async move { request_to(&node, provider, &name, payload, options).await };
        self.asked.push(asked.boxed());
    }
}

/// What a lookup that is not over finds next.
async fn next_of(sought: &mut Option<Seeking>) -> Option<Sought> {
    Some(sought.as_mut()?.next().await)
}

/// Calls a service of one peer that is no name: one of the protocol's own.
pub(super) async fn call_peer(
    node: &Node,
    peer: PeerId,
    service: &str,
    payload: Vec<u8>,
    time: Duration,
) -> Outcome {
    let service = service.into();
    let message = Message::new(node, &service, payload.into(), time);
    let link = node.routes().link(peer);
    match message.send(peer, &link).await {
        Ok(Outcome::TimedOut) => Outcome::Broken("it did not answer in time".into()),
        Ok(outcome) => outcome,
        Err(Closed) => Outcome::NotSent("this node is shut down".into()),
    }
}

/// Returns when a peer that is shutting down has no connection any more, or has not closed it in time.
async fn gone(node: &Node, peer: PeerId) {
    let mut status = node.status();
    let end = Instant::now() + 2 * SHUTDOWN_DEADLINE;
    while node.routes().is_connected(&peer) && Instant::now() < end {
        // The status may be told before the routes are.
        let _ = timeout(GONE, status.changed()).await;
    }
}

impl<'a> Message<'a> {
    fn new(node: &'a Node, service: &'a Arc<str>, payload: Bytes, time: Duration) -> Self {
        let begun = Instant::now();
        Self {
            node,
            service,
            payload,
            begun,
            deadline: begun + time,
        }
    }

    /// A message of any caller's, with any deadline.
    fn within_bounds(
        node: &'a Node,
        name: &'a ServiceName,
        payload: Bytes,
        options: &RequestOptions,
    ) -> Result<Self, RequestError> {
        let (len, max) = (payload.len(), MAX_PAYLOAD);
        if len > max {
            return Err(RequestError::TooLarge { len, max });
        }
        let time = options.deadline.min(MAX_REQUEST_TIME);
        Ok(Self::new(node, name.shared(), payload, time))
    }

    /// Whom to send it to, if one is known that is none of `tried`.
    fn pick(&self, name: &ServiceName, tried: &[PeerId]) -> Option<Pick<Link>> {
        // As old as the message, which saves a look at the clock.
        let now = self.begun.into_std();
        let pick = self.node.routes().pick(name, tried, now)?;
        if pick.stale {
            self.refresh(name);
        }
        Some(pick)
    }

    /// Looks a name up again beside the request.
    fn refresh(&self, name: &ServiceName) {
        let (node, name) = (self.node.clone(), name.clone());
        tokio::spawn(async move {
            // What it finds is in the routes; an error is met by the next request.
            let _ = node.wait_for(&name, Waiter::All).await;
        });
    }

    /// Sends it over a stream that is kept open, if there is one and a slot is free.
    async fn at_once(&self, link: &Link) -> Option<Outcome> {
        let asked = link
            .lane(Lane::of(&self.payload))
            .try_ask(self.question())?;
        asked.await
    }

    /// Sends it to a peer when there is a slot for it: over a stream that is kept open if there is
    /// one, and otherwise over one of its own. Ends by the deadline.
    async fn send(&self, provider: PeerId, link: &Link) -> Result<Outcome, Closed> {
        if let Some(outcome) = self.over_kept_stream(link).await {
            return Ok(outcome);
        }
        let sent = self.over_single_stream(provider, link);
        self.wait(sent).await.unwrap_or(Ok(Outcome::TimedOut))
    }

    /// `None` if there is no such stream, or it ended before the request was written to it.
    async fn over_kept_stream(&self, link: &Link) -> Option<Outcome> {
        link.lane(Lane::of(&self.payload))
            .ask(self.question())
            .await
    }

    fn question(&self) -> Question<'_> {
        Question {
            service: self.service,
            payload: &self.payload,
            deadline: self.deadline,
        }
    }

    async fn over_single_stream(&self, provider: PeerId, link: &Link) -> Result<Outcome, Closed> {
        let kept = link.lane(Lane::of(&self.payload));
        let slot = loop {
            let opened = kept.opened();
            // Those that have a stream of their own may take long, and a kept one may be there before
            // any of them has ended.
            if let Some(outcome) = self.over_kept_stream(link).await {
                return Ok(outcome);
            }
            tokio::select! {
                biased;
                slot = Arc::clone(link.single()).acquire_owned() => break slot.map_err(|_| Closed)?,
                () = opened => {}
            }
        };
        self.node.count_request();
        let (sender, outcome) = oneshot::channel();
        let command = Command::Request(Outbound {
            provider,
            service: Arc::clone(self.service),
            payload: self.payload.clone(),
            deadline: self.deadline,
            outcome: sender,
            slot,
        });
        self.node.send(command).await?;
        outcome.await.map_err(|_| Closed)
    }

    /// Waits for something until the deadline.
    async fn wait<T>(&self, something: impl Future<Output = T>) -> Option<T> {
        timeout_at(self.deadline, something).await.ok()
    }
}

impl<'a> Call<'a> {
    fn new(name: &'a ServiceName, message: Message<'a>, delivery: Delivery) -> Self {
        Self {
            name,
            message,
            delivery,
            tried: Vec::new(),
            asked: None,
            failure: None,
            leaving: None,
        }
    }

    /// Goes on after a first attempt, if there was one.
    async fn run(&mut self, first: Option<(PeerId, Outcome)>) -> Result<Reply, RequestError> {
        let first = first.and_then(|(provider, outcome)| {
            self.asked = Some(provider);
            let verdict = self.judge(provider, outcome);
            self.conclude(provider, verdict)
        });
        let result = match first {
            Some(result) => result,
            None => self.try_all().await,
        };
        if let (Err(RequestError::TimedOut(_)), Some(silent)) = (&result, self.asked) {
            // It may be gone without a word: the next request looks first.
            self.message.node.routes().forget(self.name, &silent);
        }
        result
    }

    /// Tries all providers; once more when one that was leaving is gone: another node may have its key, and
    /// is not asked as long as the connection with the one that leaves stands.
    async fn try_all(&mut self) -> Result<Reply, RequestError> {
        let result = self.try_each().await;
        let (Err(error), Some(leaving)) = (&result, self.leaving.take()) else {
            return result;
        };
        if !error.is_retryable() {
            return result;
        }
        let gone = gone(self.message.node, leaving);
        if self.message.wait(gone).await.is_none() {
            return result;
        }
        self.tried.clear();
        self.try_each().await
    }

    /// Tries the providers that are known, then those that a fresh lookup finds.
    async fn try_each(&mut self) -> Result<Reply, RequestError> {
        if let Some(result) = self.try_known().await {
            return result;
        }
        let nobody_known = self.tried.is_empty();
        if nobody_known {
            // The first that is live will do, and others most often need not be waited for.
            self.look_up(Waiter::First).await?;
            if let Some(result) = self.try_known().await {
                return result;
            }
        }
        // Those have failed: all others count, not just the first to answer.
        if let Err(error) = self.look_up(Waiter::All).await {
            return Err(self.failure.take().unwrap_or(error));
        }
        if !nobody_known {
            // Who failed before the lookup and is live now may be tried again: what failed has not run,
            // or may run twice.
            self.tried.clear();
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
            let pick = self.message.pick(self.name, &self.tried)?;
            self.asked = Some(pick.provider);
            let verdict = self.attempt(pick.provider, &pick.link).await;
            if let Some(result) = self.conclude(pick.provider, verdict) {
                return Some(result);
            }
        }
    }

    /// What an attempt leads to; `None`: to the next one.
    fn conclude(
        &mut self,
        provider: PeerId,
        verdict: Verdict,
    ) -> Option<Result<Reply, RequestError>> {
        match verdict {
            Verdict::Over(result) => Some(result),
            // Nothing is sent that nobody would wait for.
            Verdict::Next(error) if Instant::now() >= self.message.deadline => Some(Err(error)),
            Verdict::Next(error) => {
                self.tried.push(provider);
                self.failure = Some(error);
                None
            }
        }
    }

    /// Looks the name up, until the deadline.
    async fn look_up<T>(
        &self,
        waiter: impl FnOnce(oneshot::Sender<Result<T, LookupError>>) -> Waiter,
    ) -> Result<T, RequestError> {
        let looked_up = self.message.node.wait_for(self.name, waiter);
        match self.message.wait(looked_up).await {
            Some(result) => Ok(result?),
            // Nothing was sent.
            None => Err(LookupError::TimedOut(self.name.clone()).into()),
        }
    }

    /// Looks the name up until this provider of it is found: no other one will do, however early it
    /// answers.
    async fn find(&self, provider: PeerId) -> Result<(), RequestError> {
        let mut seeking = Seeking::new(self.message.node, self.name, self.message.deadline);
        let found = async {
            loop {
                match seeking.next().await {
                    Sought::Live(found) if found != provider => {}
                    // One that was not found may be connected all the same.
                    Sought::Live(_) | Sought::Over(Ok(_)) => return Ok(()),
                    Sought::Over(Err(error)) => return Err(error),
                }
            }
        };
        let found = self.message.wait(found).await;
        Ok(found.unwrap_or_else(|| Err(LookupError::TimedOut(self.name.clone())))?)
    }

    async fn attempt(&mut self, provider: PeerId, link: &Link) -> Verdict {
        match self.message.send(provider, link).await {
            Ok(outcome) => self.judge(provider, outcome),
            Err(Closed) => Verdict::Over(Err(RequestError::Closed)),
        }
    }

    fn judge(&mut self, provider: PeerId, outcome: Outcome) -> Verdict {
        match outcome {
            Outcome::Answered(Ok(payload)) => Verdict::Over(Ok(Reply { provider, payload })),
            Outcome::Answered(Err(error)) => self.judge_error(provider, error),
            Outcome::TimedOut => Verdict::Over(Err(RequestError::TimedOut(self.name.clone()))),
            Outcome::NotSent(reason) => {
                self.message.node.routes().forget(self.name, &provider);
                Verdict::Next(self.unreachable(&reason))
            }
            Outcome::Broken(reason) => {
                self.message.node.routes().forget(self.name, &provider);
                let error = RequestError::Interrupted { provider, reason };
                match self.delivery {
                    Delivery::AtMostOnce => Verdict::Over(Err(error)),
                    Delivery::AtLeastOnce => Verdict::Next(error),
                }
            }
        }
    }

    /// The remote says whether it has run the request.
    fn judge_error(&mut self, provider: PeerId, error: RemoteError) -> Verdict {
        if error.code == ErrorCode::ShuttingDown {
            self.leaving = Some(provider);
        }
        match error.code {
            ErrorCode::Busy => Verdict::Next(RequestError::Busy(self.name.clone())),
            ErrorCode::UnknownService | ErrorCode::ShuttingDown => {
                self.message.node.routes().forget(self.name, &provider);
                let reason = match error.message.is_empty() {
                    true => "it has withdrawn the name",
                    false => &error.message,
                };
                Verdict::Next(self.unreachable(reason))
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
