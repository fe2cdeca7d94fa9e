//! Requests to a peer, pipelined over one stream that is kept open.
//!
//! * A caller enters its request under a lock that all callers share for a moment; a task for each
//!   stream reads and writes. Writes carry all requests that wait, and never wait for more. A small
//!   request that is the only open one leaves at once, and so do those of half of many callers.
//! * Replies are matched by id, in any order. A reply with an id that was never given out ends the
//!   stream; one whose caller has gone away is dropped.
//! * Every request has a deadline, and the stream one timer for all of them.
//! * A stream that ends fails exactly the requests that were written to it, as "may have run"; those
//!   still waiting were not sent.
//! * One that rests for [`KEPT_IDLE`] is closed, so that it does not keep a connection open.

mod calls;

use std::io;
use std::mem;
use std::ops::ControlFlow;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use futures::future::poll_fn;
use futures::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use libp2p::swarm::Stream;
use tokio::sync::futures::Notified;
use tokio::sync::{Notify, Semaphore, SemaphorePermit, oneshot};
use tokio::task::consume_budget;
use tokio::time::{Instant, Sleep, sleep_until, timeout, timeout_at};
use void::Void;

use super::Outcome;
use super::outbox::{Left, Others, Outbox, Outlet, SMALL, append, send};
use crate::limits::{CONNECT_TIMEOUT, FRAME_DEADLINE, MAX_REQUEST_TIME};
use crate::metrics::Metrics;
use crate::proto::frame::FrameReader;
use crate::proto::wire::{self, Reply, RequestRef};

use calls::{Calls, Written};

pub(crate) use calls::Caller;

/// How long a stream rests before it is closed: less than an idle connection.
const KEPT_IDLE: Duration = Duration::from_secs(60);

/// How long a stream waits for its first request. The remote waits twice as long: of the two this
/// side closes first, because it knows that nothing is on its way.
const FIRST_REQUEST: Duration = FRAME_DEADLINE.checked_div(2).expect("not by zero");

/// How soon a stream is looked at again that should rest and does not.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// From so many calls on, half of them leave at once when they have come: the peer then works on one
/// half while the other is answered here, and asks again. With one thread on each side, 32 callers
/// got a seventh more requests through by that, 64 a quarter and 256 four fifths; 16 lost some where
/// each side had two.
const HALVED: usize = 32;

/// What is asked of a peer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Question<'a> {
    pub(crate) service: &'a Arc<str>,
    pub(crate) payload: &'a Bytes,
    pub(crate) deadline: Instant,
}

/// A stream that may be kept open, as its callers and its task share it.
#[derive(Debug)]
pub(crate) struct Kept {
    state: Mutex<State>,
    /// One permit for each request that is not open, and whose frame does not wait either.
    slots: Semaphore,
    max: usize,
    /// Requests can be sent now.
    opened: Notify,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    calls: Calls,
    frames: Outbox<Large>,
    /// The small requests that wait to be written.
    waiting: usize,
    /// The calls that were answered since frames were taken: their callers may come again.
    answered: usize,
    /// When the calls are looked after next, and whom to wake to do it sooner.
    alarm: Instant,
    watcher: Option<Waker>,
    /// Until when the stream is open though nothing is asked.
    rests_until: Instant,
    /// Where requests are counted.
    metrics: Option<Arc<Metrics>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Closed,
    Opening,
    Open,
    /// It has rested long enough, and nothing is asked any more.
    Closing,
}

/// A request that is encoded when its turn comes.
#[derive(Debug)]
struct Large {
    id: u64,
    service: Arc<str>,
    payload: Bytes,
}

/// A request that was entered: `None` if the stream ended before it was written. Dropping it gives it
/// up; it may still run.
#[derive(Debug)]
pub(crate) struct Asked<'a> {
    kept: &'a Kept,
    id: u64,
    outcome: oneshot::Receiver<Outcome>,
    has_ended: bool,
}

impl Kept {
    /// A stream on which so many requests may be open.
    pub(super) fn new(max: usize) -> Self {
        let now = Instant::now();
        let state = State {
            phase: Phase::Closed,
            calls: Calls::default(),
            frames: Outbox::default(),
            waiting: 0,
            answered: 0,
            alarm: now,
            watcher: None,
            rests_until: now,
            metrics: None,
        };
        Self {
            state: Mutex::new(state),
            slots: Semaphore::new(max),
            max,
            opened: Notify::new(),
        }
    }

    /// The requests that are open.
    pub(super) fn load(&self) -> usize {
        self.max - self.slots.available_permits()
    }

    /// Whether requests can be sent.
    pub(crate) fn is_open(&self) -> bool {
        self.lock().phase == Phase::Open
    }

    /// Returns when a stream is opened after this call.
    pub(crate) fn opened(&self) -> Notified<'_> {
        self.opened.notified()
    }

    /// Sends a request when there is a slot for it, and returns by the deadline. `None` if no stream
    /// is open, or it ended before the request was written to it.
    pub(crate) async fn ask(&self, question: Question<'_>) -> Option<Outcome> {
        if !self.take_slot() {
            match timeout_at(question.deadline, self.slots.acquire()).await {
                Ok(slot) => slot.ok()?.forget(),
                Err(_) => return Some(Outcome::TimedOut),
            }
        }
        self.asked(question)?.await
    }

    /// Sends a request if a stream is open and a slot is free.
    pub(crate) fn try_ask(&self, question: Question<'_>) -> Option<Asked<'_>> {
        match self.take_slot() {
            true => self.asked(question),
            false => None,
        }
    }

    /// Sends a request if that is possible at once, whether or not the caller waits for it.
    pub(crate) fn offer(&self, question: Question<'_>, caller: Caller) -> Result<(), Caller> {
        match self.take_slot() {
            true => self.enter(question, caller).map(drop),
            false => Err(caller),
        }
    }

    /// Takes a slot for a request, if one is free.
    fn take_slot(&self) -> bool {
        self.slots
            .try_acquire()
            .map(SemaphorePermit::forget)
            .is_ok()
    }

    fn asked(&self, question: Question<'_>) -> Option<Asked<'_>> {
        let (caller, outcome) = oneshot::channel();
        let id = self.enter(question, caller).ok()?;
        Some(Asked {
            kept: self,
            id,
            outcome,
            has_ended: false,
        })
    }

    /// Enters a request that has a slot, if a stream is open; returns its id.
    fn enter(&self, question: Question<'_>, caller: Caller) -> Result<u64, Caller> {
        let mut state = self.lock();
        if state.phase != Phase::Open {
            drop(state);
            self.slots.add_permits(1);
            return Err(caller);
        }
        let is_sooner = question.deadline < state.alarm;
        let watcher = state.watcher.take_if(|_| is_sooner);
        let id = state.enter(question, caller);
        let writer = state.frames.writer();
        self.free(state);
        for task in [watcher, writer].into_iter().flatten() {
            task.wake();
        }
        Ok(id)
    }

    /// Whether a stream should be opened now; it is then to be [kept](Self::keep).
    pub(super) fn begin(&self) -> bool {
        let mut state = self.lock();
        let is_closed = state.phase == Phase::Closed;
        if is_closed {
            state.phase = Phase::Opening;
        }
        is_closed
    }

    /// Keeps the stream that is being opened, until it rests or breaks.
    pub(super) async fn keep(&self, stream: oneshot::Receiver<Stream>, metrics: Arc<Metrics>) {
        let mut ending = Ending {
            kept: self,
            reason: "this node has stopped".into(),
        };
        // Without a stream the requests go on as before, one stream each.
        if let Ok(Ok(stream)) = timeout(CONNECT_TIMEOUT, stream).await {
            self.run(stream, metrics, &mut ending.reason).await;
        }
    }

    /// Carries requests and replies until that ends for some reason.
    async fn run(
        &self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        metrics: Arc<Metrics>,
        reason: &mut String,
    ) {
        let (reader, writer) = stream.split();
        // What arrives was asked for: one frame at a time, and decoded for a caller that waits.
        let frames = FrameReader::new(reader, Vec::new());
        let timer = self.open(Box::new(writer), metrics);
        *reason = tokio::select! {
            biased;
            ended = self.read(frames) => match ended {
                Ok(()) => "the peer closed the stream".into(),
                Err(error) => error.to_string(),
            },
            Err(error) = self.write() => error.to_string(),
            () = self.watch(timer) => "the stream has rested".into(),
        };
    }

    /// Requests may be asked from now on. Returns the timer for their deadlines.
    fn open(&self, outlet: Outlet, metrics: Arc<Metrics>) -> Sleep {
        let mut state = self.lock();
        state.phase = Phase::Open;
        state.frames.put(outlet);
        state.metrics = Some(metrics);
        state.rests_until = Instant::now() + FIRST_REQUEST;
        state.alarm = state.rests_until;
        self.opened.notify_waiters();
        sleep_until(state.alarm)
    }

    /// Nothing is asked any more; who waits is told.
    fn end(&self, reason: &str) {
        let mut state = self.lock();
        state.phase = Phase::Closed;
        (state.waiting, state.answered) = (0, 0);
        let frames = mem::take(&mut state.frames);
        let (unwritten, written) = state.calls.end_all(frames.large());
        self.free(state);
        // Not under the lock: the stream ends with them.
        drop(frames);
        tell_all(unwritten, || Outcome::NotSent(reason.into()));
        tell_all(written, || Outcome::Broken(reason.into()));
    }

    async fn read<R: AsyncRead + Unpin>(&self, mut frames: FrameReader<R>) -> io::Result<()> {
        let (mut replies, mut answers) = (Vec::new(), Vec::new());
        loop {
            // Others watch for rest and for the deadlines of callers.
            let patience = 2 * MAX_REQUEST_TIME.max(KEPT_IDLE);
            let frame = frames
                .next(wire::MAX_FRAME, patience, FRAME_DEADLINE)
                .await?;
            let Some(frame) = frame else {
                return Ok(());
            };
            replies.push(Reply::decode(frame).map_err(io::Error::other)?);
            let rest = decode_arrived(&mut frames, &mut replies);
            // What came before a fault is still given to who asked for it.
            self.answer(&mut replies, &mut answers)?;
            rest?;
            consume_budget().await;
        }
    }

    /// Gives replies to their callers. `answers` is room that is used again.
    fn answer(
        &self,
        replies: &mut Vec<Reply>,
        answers: &mut Vec<(Caller, Outcome)>,
    ) -> io::Result<()> {
        let mut state = self.lock();
        let mut result = Ok(());
        state.answered += replies.len();
        for reply in replies.drain(..) {
            match state.calls.answer(reply.id) {
                Ok(Some(caller)) => answers.push((caller, Outcome::Answered(reply.outcome))),
                // It has ended before.
                Ok(None) => {}
                Err(never_asked) => result = Err(io::Error::other(never_asked)),
            }
        }
        self.free(state);
        answers.drain(..).for_each(tell);
        result
    }

    async fn write(&self) -> io::Result<Void> {
        let mut frames = Vec::new();
        loop {
            let mut outlet = poll_fn(|cx| self.poll_take(cx, &mut frames)).await?;
            send(&mut outlet, &mut frames).await?;
            self.lock().frames.put(outlet);
        }
    }

    /// Takes what waits to be written, and the stream.
    fn poll_take(&self, cx: &mut Context<'_>, frames: &mut Vec<u8>) -> Poll<io::Result<Outlet>> {
        let mut state = self.lock();
        let others = state.others();
        ready!(state.frames.poll(cx, others));
        let outlet = state.take(frames);
        self.free(state);
        Poll::Ready(outlet.ok_or(io::ErrorKind::BrokenPipe.into()))
    }

    /// Ends calls at their deadlines, whatever becomes of what is read and written. Returns when the
    /// stream has rested long enough.
    async fn watch(&self, timer: Sleep) {
        let mut timer = std::pin::pin!(timer);
        loop {
            poll_fn(|cx| self.poll_alarm(cx, timer.as_mut())).await;
            if self.on_alarm(Instant::now()).is_break() {
                return;
            }
        }
    }

    fn poll_alarm(&self, cx: &mut Context<'_>, mut timer: Pin<&mut Sleep>) -> Poll<()> {
        let mut state = self.lock();
        if state.alarm != timer.deadline() {
            timer.as_mut().reset(state.alarm);
        }
        // Every turn of the task comes by here, most often with the same waker.
        match &mut state.watcher {
            Some(watcher) => watcher.clone_from(cx.waker()),
            watcher => *watcher = Some(cx.waker().clone()),
        }
        drop(state);
        timer.poll(cx)
    }

    fn on_alarm(&self, now: Instant) -> ControlFlow<()> {
        let mut state = self.lock();
        let (due, next) = state.calls.expire(now);
        let is_idle = state.calls.len() == 0 && state.frames.is_empty();
        let has_rested = is_idle && now >= state.rests_until;
        if has_rested {
            // Whoever comes now finds no stream, instead of one that is about to end.
            state.phase = Phase::Closing;
        }
        // What is left behind and not written yet is looked at again as calls are.
        state.alarm = next.unwrap_or(state.rests_until.max(now + LOOK_AGAIN));
        self.free(state);
        tell_all(due, || Outcome::TimedOut);
        match has_rested {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    /// Lets go of the state, and gives back the permits of calls that have ended.
    fn free(&self, mut state: MutexGuard<'_, State>) {
        let freed = state.calls.freed();
        drop(state);
        if freed > 0 {
            self.slots.add_permits(freed);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Decodes the replies that have arrived together.
fn decode_arrived<R: AsyncRead + Unpin>(
    frames: &mut FrameReader<R>,
    replies: &mut Vec<Reply>,
) -> io::Result<()> {
    while let Some(frame) = frames.arrived(wire::MAX_FRAME)? {
        replies.push(Reply::decode(frame).map_err(io::Error::other)?);
    }
    Ok(())
}

/// Tells a caller how its call has ended.
fn tell((caller, outcome): (Caller, Outcome)) {
    // One that went away does not want to know.
    let _ = caller.send(outcome);
}

fn tell_all(callers: Vec<Caller>, outcome: impl Fn() -> Outcome) {
    for caller in callers {
        tell((caller, outcome()));
    }
}

/// Ends a stream with its task, however that ends: no caller waits for one that is gone.
struct Ending<'a> {
    kept: &'a Kept,
    reason: String,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.kept.end(&self.reason);
    }
}

impl State {
    /// Opens a call and hands over its request, which may leave at once. Returns its id.
    fn enter(&mut self, question: Question<'_>, caller: Caller) -> u64 {
        let Question {
            service,
            payload,
            deadline,
        } = question;
        self.alarm = self.alarm.min(deadline);
        if payload.len() > SMALL {
            let id = self.calls.enter(caller, deadline, Written::Later);
            let large = Large {
                id,
                service: Arc::clone(service),
                payload: payload.clone(),
            };
            self.frames.add_large(large);
            return id;
        }
        let id = self.calls.enter(caller, deadline, Written::Next);
        let request = RequestRef {
            id,
            service,
            payload,
        };
        self.waiting += 1;
        self.frames.add_small(|frame| request.append_to(frame));
        if self.is_enough() && self.frames.write_small() != Left::Nothing {
            // If the rest has to wait, it is on its way all the same.
            let requests = mem::take(&mut self.waiting);
            self.on_leaving(requests);
        }
        id
    }

    /// Whether the small requests that wait should leave at once.
    fn is_enough(&self) -> bool {
        // Those who were answered and have not asked again most often will.
        let all = self.calls.len() + self.answered.saturating_sub(self.waiting);
        let is_half = all >= HALVED && 2 * self.waiting >= all;
        is_half || self.others() == Others::None
    }

    /// Whether others may be about to ask. One who waits long for an answer counts as well.
    fn others(&self) -> Others {
        match (self.calls.len(), self.answered) {
            (..=1, ..=1) => Others::None,
            _ => Others::Some,
        }
    }

    /// Takes what waits to be written, and the stream.
    fn take(&mut self, frames: &mut Vec<u8>) -> Option<Outlet> {
        let (calls, mut requests) = (&mut self.calls, mem::take(&mut self.waiting));
        let outlet = self.frames.take(frames, |large, frames| {
            if !calls.on_written(large.id) {
                return;
            }
            requests += 1;
            let request = RequestRef {
                id: large.id,
                service: &large.service,
                payload: &large.payload,
            };
            append(frames, |frame| request.append_to(frame));
        });
        self.on_leaving(requests);
        outlet
    }

    /// So many requests are being written, and all small ones are.
    fn on_leaving(&mut self, requests: usize) {
        self.calls.on_turn();
        self.answered = 0;
        self.rests_until = Instant::now() + KEPT_IDLE;
        if let Some(metrics) = &self.metrics {
            metrics.requests_sent.add(requests as u64);
        }
    }
}

impl Future for Asked<'_> {
    type Output = Option<Outcome>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Outcome>> {
        let outcome = ready!(Pin::new(&mut self.outcome).poll(cx));
        self.has_ended = true;
        // Every call that ends is told how.
        Poll::Ready(
            outcome
                .ok()
                .filter(|outcome| !matches!(outcome, Outcome::NotSent(_))),
        )
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        if !self.has_ended {
            let mut state = self.kept.lock();
            state.calls.end(self.id);
            self.kept.free(state);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
    use tokio::task::yield_now;
    use tokio_util::compat::TokioAsyncReadCompatExt;

    use super::*;
    use crate::net::rpc::outbox::WRITE_LEN;
    use crate::proto::wire::{ReplyRef, Request};

    /// The remote end of a kept stream.
    struct Far(DuplexStream);

    /// A kept stream, and its remote end.
    async fn scene() -> (Arc<Kept>, Far) {
        scene_with(1 << 20, 512).await
    }

    /// One whose stream takes so many bytes that are not read, and so many requests.
    async fn scene_with(buffer: usize, max: usize) -> (Arc<Kept>, Far) {
        let (near, far) = duplex(buffer);
        let kept = Arc::new(Kept::new(max));
        let running = Arc::clone(&kept);
        tokio::spawn(async move {
            let (kept, reason) = (&*running, String::new());
            let mut ending = Ending { kept, reason };
            let (metrics, stream) = (Arc::default(), near.compat());
            kept.run(stream, metrics, &mut ending.reason).await;
        });
        while kept.lock().phase != Phase::Open {
            yield_now().await;
        }
        (kept, Far(far))
    }

    fn ask<'a>(kept: &'a Kept, payload: &str) -> Asked<'a> {
        let asked = ask_within(kept, payload, 2 * MAX_REQUEST_TIME);
        asked.expect("the stream is open")
    }

    fn ask_within<'a>(kept: &'a Kept, payload: &str, time: Duration) -> Option<Asked<'a>> {
        let question = Question {
            service: &"client1".into(),
            payload: &payload.as_bytes().to_vec().into(),
            deadline: Instant::now() + time,
        };
        kept.slots.try_acquire().expect("a slot").forget();
        kept.asked(question)
    }

    impl Far {
        /// The next request; all of these tests have short ones.
        async fn asked(&mut self) -> Request {
            let len = self.0.read_u8().await.unwrap();
            let mut frame = vec![0; len.into()];
            self.0.read_exact(&mut frame).await.unwrap();
            Request::decode(&frame).unwrap()
        }

        async fn reply(&mut self, id: u64, payload: &[u8]) {
            let mut frame = Vec::new();
            let reply = ReplyRef {
                id,
                outcome: Ok(payload),
            };
            append(&mut frame, |frame| reply.append_to(frame));
            self.0.write_all(&frame).await.unwrap();
        }
    }

    fn answer(outcome: Option<Outcome>) -> Vec<u8> {
        match outcome {
            Some(Outcome::Answered(Ok(payload))) => payload,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn replies_in_any_order_find_their_callers() {
        let (kept, mut far) = scene().await;
        let mut callers = Vec::new();
        let mut asked = Vec::new();
        for number in 0..10 {
            callers.push(ask(&kept, &number.to_string()));
            asked.push(far.asked().await);
        }
        for request in asked.iter().rev() {
            far.reply(request.id, &request.payload).await;
        }
        for (number, caller) in callers.into_iter().enumerate() {
            assert_eq!(answer(caller.await), number.to_string().as_bytes());
        }
    }

    #[tokio::test]
    async fn half_of_many_callers_do_not_wait_for_the_others() {
        let (kept, mut far) = scene().await;
        let callers: Vec<_> = (0..HALVED).map(|_| ask(&kept, "hello")).collect();
        for _ in &callers {
            let id = far.asked().await.id;
            far.reply(id, b"").await;
        }
        for caller in callers {
            answer(caller.await);
        }
        // No task runs from here on.
        let mut callers: Vec<_> = (1..HALVED / 2).map(|_| ask(&kept, "again")).collect();
        assert!(far.asked().now_or_never().is_none(), "too few to leave");
        callers.push(ask(&kept, "again"));
        for _ in &callers {
            assert!(far.asked().now_or_never().is_some());
        }
    }

    #[tokio::test]
    async fn large_and_small_requests_all_arrive() {
        let (kept, mut far) = scene().await;
        let payloads: Vec<_> = [10, 2 * SMALL, 20, WRITE_LEN, WRITE_LEN - 1, 0]
            .into_iter()
            .map(|len| "x".repeat(len))
            .collect();
        let callers: Vec<_> = payloads.iter().map(|payload| ask(&kept, payload)).collect();
        let mut frames = FrameReader::new((&mut far.0).compat(), Vec::new());
        let mut lens = Vec::new();
        for _ in &payloads {
            let frame = frames.next(wire::MAX_FRAME, FRAME_DEADLINE, FRAME_DEADLINE);
            let frame = frame.await.unwrap().unwrap();
            lens.push(Request::decode(frame).unwrap().payload.len());
        }
        // Small ones first, and each kind in its order.
        assert_eq!(lens, [10, 20, 0, 2 * SMALL, WRITE_LEN, WRITE_LEN - 1]);
        drop(callers);
    }

    #[tokio::test]
    async fn a_reply_to_a_request_that_was_never_made_ends_the_stream() {
        // No request, the next slot, the slot's next use.
        let made_up: [fn(u64) -> u64; 4] = [|_| 0, |id| id + 1, |id| id + 1024, |_| u64::MAX];
        for made_up in made_up {
            let (kept, mut far) = scene().await;
            let caller = ask(&kept, "hello");
            let id = far.asked().await.id;
            far.reply(made_up(id), b"made up").await;
            assert!(
                matches!(caller.await, Some(Outcome::Broken(_))),
                "{}",
                made_up(id)
            );
        }
    }

    #[tokio::test]
    async fn a_reply_that_comes_twice_or_after_its_caller_left_changes_nothing() {
        let (kept, mut far) = scene().await;
        let leaves = ask(&kept, "who leaves");
        let left = far.asked().await;
        drop(leaves);
        let stays = ask(&kept, "who stays");
        let request = far.asked().await;
        far.reply(left.id, b"too late").await;
        far.reply(request.id, b"first").await;
        assert_eq!(answer(stays.await), b"first");
        far.reply(request.id, b"again").await;
        let next = ask(&kept, "next");
        let id = far.asked().await.id;
        far.reply(id, b"fine").await;
        assert_eq!(answer(next.await), b"fine");
    }

    #[tokio::test]
    async fn a_large_request_that_is_given_up_before_its_turn_is_not_sent() {
        let (kept, mut far) = scene().await;
        let large = ask(&kept, &"x".repeat(2 * SMALL));
        drop(large);
        let small = ask(&kept, "small");
        let id = far.asked().await.id;
        far.reply(id, b"fine").await;
        assert_eq!(answer(small.await), b"fine");
    }

    #[tokio::test]
    async fn a_stream_that_ends_inside_a_frame_breaks_what_was_written_and_nothing_else() {
        let (kept, mut far) = scene().await;
        let written = ask(&kept, "written");
        far.asked().await;
        far.0.write_all(&[100, 0xa2]).await.unwrap();
        // Not written yet: the task has had no turn.
        let waits = ask(&kept, "waits");
        drop(far);
        assert!(matches!(written.await, Some(Outcome::Broken(_))));
        assert!(waits.await.is_none());
        assert!(ask_within(&kept, "late", FRAME_DEADLINE).is_none());
        assert_eq!(kept.load(), 0);
    }

    #[tokio::test]
    async fn a_request_that_has_left_in_part_may_have_run() {
        let (kept, far) = scene_with(16, 512).await;
        // The task rests, so that the caller writes.
        yield_now().await;
        let begun = ask(&kept, "longer than the stream takes");
        assert!(kept.lock().frames.writer().is_none(), "woken for the rest");
        drop(far);
        assert!(matches!(begun.await, Some(Outcome::Broken(_))));
        assert_eq!(kept.load(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn each_call_ends_at_its_own_deadline() {
        let (kept, mut far) = scene().await;
        let start = Instant::now();
        let [later, sooner] = [20, 2].map(|seconds| {
            let time = Duration::from_secs(seconds);
            ask_within(&kept, "slow", time).expect("the stream is open")
        });
        far.asked().await;
        assert!(matches!(sooner.await, Some(Outcome::TimedOut)));
        assert!((2..=3).contains(&start.elapsed().as_secs()));
        assert!(matches!(later.await, Some(Outcome::TimedOut)));
        assert!((20..=21).contains(&start.elapsed().as_secs()));
    }

    #[tokio::test(start_paused = true)]
    async fn deadlines_are_kept_while_the_remote_does_not_read() {
        let (kept, mut far) = scene_with(64, 512).await;
        let start = Instant::now();
        let small = ask_within(&kept, &"x".repeat(1_000), Duration::from_secs(5));
        yield_now().await;
        let waits = ask_within(&kept, "waits", Duration::from_secs(2)).expect("open");
        let large = ask_within(&kept, &"x".repeat(WRITE_LEN), Duration::from_secs(3));
        assert!(matches!(waits.await, Some(Outcome::TimedOut)));
        assert_eq!(start.elapsed().as_secs(), 2);
        assert!(matches!(
            large.expect("open").await,
            Some(Outcome::TimedOut)
        ));
        assert!(matches!(
            small.expect("open").await,
            Some(Outcome::TimedOut)
        ));
        assert_eq!(start.elapsed().as_secs(), 5);
        assert_eq!(kept.load(), 2, "the frames that wait keep their permits");
        let mut sink = vec![0; 2_000];
        let _ = far.0.read(&mut sink).await.unwrap();
        tokio::time::sleep(FRAME_DEADLINE).await;
        assert_eq!(
            kept.load(),
            0,
            "the stream has ended, and all is given back"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn requests_beyond_the_limit_wait_their_turn_or_time_out() {
        let (kept, mut far) = scene_with(1 << 20, 1).await;
        let service = "client1".into();
        let payload = Bytes::from_static(b"hello");
        let question = |seconds| Question {
            service: &service,
            payload: &payload,
            deadline: Instant::now() + Duration::from_secs(seconds),
        };
        let (first, second, third) = tokio::join!(
            biased;
            kept.ask(question(4)),
            kept.ask(question(2)),
            async {
                let third = kept.ask(question(3));
                let answers = async {
                    for _ in 0..2 {
                        let id = far.asked().await.id;
                        tokio::time::sleep(Duration::from_millis(2_500)).await;
                        far.reply(id, b"late").await;
                    }
                };
                tokio::join!(third, answers).0
            }
        );
        assert_eq!(answer(first), b"late");
        assert!(matches!(second, Some(Outcome::TimedOut)), "{second:?}");
        assert!(
            matches!(third, Some(Outcome::TimedOut)),
            "it had half a second left"
        );
        assert_eq!(kept.load(), 0);
    }

    #[tokio::test]
    async fn a_good_reply_before_a_bad_one_is_given_to_its_caller() {
        let (kept, mut far) = scene().await;
        let (good, bad) = (ask(&kept, "good"), ask(&kept, "bad"));
        let (id, _) = (far.asked().await.id, far.asked().await);
        let mut bytes = Vec::new();
        let reply = ReplyRef {
            id,
            outcome: Ok(b"fine"),
        };
        append(&mut bytes, |frame| reply.append_to(frame));
        bytes.extend([1, 0xff]);
        far.0.write_all(&bytes).await.unwrap();
        assert_eq!(answer(good.await), b"fine");
        assert!(matches!(bad.await, Some(Outcome::Broken(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_rests_is_closed_and_one_that_waits_is_not() {
        let (kept, mut far) = scene().await;
        let caller = ask(&kept, "slow");
        let id = far.asked().await.id;
        tokio::time::advance(MAX_REQUEST_TIME).await;
        far.reply(id, b"at last").await;
        assert_eq!(answer(caller.await), b"at last");
        let mut end = [0];
        assert_eq!(far.0.read(&mut end).await.unwrap(), 0, "closed at rest");
        assert!(ask_within(&kept, "late", FRAME_DEADLINE).is_none());
    }
}
