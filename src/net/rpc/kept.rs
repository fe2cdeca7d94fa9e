//! Requests to a peer, pipelined over one stream that is kept open.
//!
//! * A caller enters its request under a lock that all callers share for a moment; a task for each
//!   stream reads and writes. Writes carry all requests that wait, and never wait for more.
//! * Replies are matched by id, in any order. A reply with an id that was never given out ends the
//!   stream; one whose caller has gone away is dropped.
//! * Every request has a deadline, and the stream one timer for all of them.
//! * A stream that ends fails exactly the requests that were written to it, as "may have run"; those
//!   still waiting were not sent.
//! * One that rests for [`KEPT_IDLE`] is closed, so that it does not keep a connection open.

mod calls;

use std::io;
use std::mem;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use futures::future::{Either, poll_fn, select};
use futures::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use libp2p::swarm::Stream;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, Sleep, sleep_until, timeout, timeout_at};

use super::Outcome;
use super::outbox::{Others, Outbox, SMALL, send};
use crate::limits::{CONNECT_TIMEOUT, FRAME_DEADLINE, MAX_PIPELINED_TO_PEER, MAX_REQUEST_TIME};
use crate::metrics::Counter;
use crate::proto::frame::{FrameReader, append_frame_with};
use crate::proto::wire::{self, Reply, RequestRef};

use calls::{Caller, Calls, Written};

/// How long a stream rests before it is closed: less than an idle connection.
const KEPT_IDLE: Duration = Duration::from_secs(60);

/// How long a stream waits for its first request. The remote waits twice as long: of the two this
/// side closes first, because it knows that nothing is on its way.
const FIRST_REQUEST: Duration = FRAME_DEADLINE.checked_div(2).expect("not by zero");

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
    /// One permit for each request that is not open.
    slots: Semaphore,
}

#[derive(Debug, Default)]
struct State {
    phase: Phase,
    calls: Calls,
    frames: Outbox<Large>,
    /// The calls that were answered since frames were taken: their callers may come again.
    answered: usize,
    /// The requests that were entered since then.
    entered: u64,
    /// When the task looks after its calls next.
    alarm: Option<Instant>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Closed,
    Opening,
    Open,
}

/// A request that is encoded when its turn comes.
#[derive(Debug)]
struct Large {
    id: u64,
    service: Arc<str>,
    payload: Bytes,
}

/// A request that was entered. Dropping it gives it up; it may still run.
#[derive(Debug)]
struct Asked<'a> {
    kept: &'a Kept,
    id: u64,
    outcome: oneshot::Receiver<Outcome>,
    has_ended: bool,
}

impl Kept {
    /// The requests that are open.
    pub(crate) fn load(&self) -> usize {
        MAX_PIPELINED_TO_PEER - self.slots.available_permits()
    }

    /// Sends a request when there is a slot for it, and returns by the deadline. `None` if no stream
    /// is open, or it ended before the request was written to it.
    pub(crate) async fn ask(&self, question: Question<'_>) -> Option<Outcome> {
        match self.slots.try_acquire() {
            Ok(slot) => slot.forget(),
            Err(_) => match timeout_at(question.deadline, self.slots.acquire()).await {
                Ok(slot) => slot.ok()?.forget(),
                Err(_) => return Some(Outcome::TimedOut),
            },
        }
        match self.enter(question)?.await {
            Outcome::NotSent(_) => None,
            outcome => Some(outcome),
        }
    }

    /// Enters a request that has a slot; `None` if no stream is open.
    fn enter(&self, question: Question<'_>) -> Option<Asked<'_>> {
        let (caller, outcome) = oneshot::channel();
        let mut state = self.lock();
        let entered = match state.phase {
            Phase::Open => state.enter(question, caller),
            Phase::Closed | Phase::Opening => None,
        };
        drop(state);
        let Some((id, writer)) = entered else {
            self.slots.add_permits(1);
            return None;
        };
        if let Some(writer) = writer {
            writer.wake();
        }
        Some(Asked {
            kept: self,
            id,
            outcome,
            has_ended: false,
        })
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
    pub(super) async fn keep(&self, stream: oneshot::Receiver<Stream>, sent: &Counter) {
        match timeout(CONNECT_TIMEOUT, stream).await {
            Ok(Ok(stream)) => self.run(stream, sent).await,
            // The requests go on as before, one stream each.
            _ => self.lock().phase = Phase::Closed,
        }
    }

    async fn run(&self, stream: impl AsyncRead + AsyncWrite + Unpin, sent: &Counter) {
        let (reader, writer) = stream.split();
        let ended = {
            // What arrives was asked for: one frame at a time, and decoded for a caller that waits.
            let frames = FrameReader::new(reader, Vec::new());
            let reading = std::pin::pin!(self.read(frames));
            let writing = std::pin::pin!(self.write(writer, sent));
            match select(reading, writing).await {
                Either::Left((result, _)) | Either::Right((result, _)) => result,
            }
        };
        let reason = match ended {
            Ok(()) => "the peer closed the stream".to_owned(),
            Err(error) => error.to_string(),
        };
        self.end(&reason);
    }

    /// Requests may be asked from now on.
    fn open(&self, rests_until: Instant) {
        let mut state = self.lock();
        state.phase = Phase::Open;
        state.alarm = Some(rests_until);
    }

    /// Nothing is asked any more; who waits is told.
    fn end(&self, reason: &str) {
        let mut state = self.lock();
        state.phase = Phase::Closed;
        state.alarm = None;
        drop(state.frames.clear());
        let unwritten = state.calls.end_unwritten();
        let written = state.calls.end_all();
        drop(state);
        self.tell(unwritten, || Outcome::NotSent(reason.into()));
        self.tell(written, || Outcome::Broken(reason.into()));
    }

    /// Tells callers whose calls have ended.
    fn tell(&self, callers: Vec<Caller>, outcome: impl Fn() -> Outcome) {
        self.slots.add_permits(callers.len());
        for caller in callers {
            // One that went away does not want to know.
            let _ = caller.send(outcome());
        }
    }

    async fn read<R: AsyncRead + Unpin>(&self, mut frames: FrameReader<R>) -> io::Result<()> {
        let (mut replies, mut answers) = (Vec::new(), Vec::new());
        loop {
            // The writing half watches for rest, and callers have deadlines of their own.
            let patience = 2 * MAX_REQUEST_TIME.max(KEPT_IDLE);
            let mut frame = frames
                .next(wire::MAX_FRAME, patience, FRAME_DEADLINE)
                .await?;
            if frame.is_none() {
                return Ok(());
            }
            // All that has arrived together.
            while let Some(reply) = frame {
                replies.push(Reply::decode(reply).map_err(io::Error::other)?);
                frame = frames.arrived(wire::MAX_FRAME)?;
            }
            self.answer(&mut replies, &mut answers)?;
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
        drop(state);
        self.slots.add_permits(answers.len());
        for (caller, outcome) in answers.drain(..) {
            // One that went away does not want to know.
            let _ = caller.send(outcome);
        }
        result
    }

    async fn write<W: AsyncWrite + Unpin>(&self, mut io: W, sent: &Counter) -> io::Result<()> {
        let mut frames = Vec::new();
        let mut rests_until = Instant::now() + FIRST_REQUEST;
        let mut timer = std::pin::pin!(sleep_until(rests_until));
        self.open(rests_until);
        loop {
            match poll_fn(|cx| self.poll_turn(cx, timer.as_mut(), &mut frames)).await {
                Turn::Write { requests } => {
                    sent.add(requests);
                    send(&mut io, &mut frames).await?;
                    rests_until = Instant::now() + KEPT_IDLE;
                }
                Turn::Alarm => {
                    let Some(alarm) = self.on_alarm(Instant::now(), rests_until) else {
                        return Ok(());
                    };
                    timer.as_mut().reset(alarm);
                }
            }
        }
    }

    /// What the task has to do next.
    fn poll_turn(
        &self,
        cx: &mut Context<'_>,
        mut timer: Pin<&mut Sleep>,
        frames: &mut Vec<u8>,
    ) -> Poll<Turn> {
        let mut state = self.lock();
        let others = state.others();
        if state.frames.poll(cx, others).is_ready() {
            let requests = state.take(frames);
            return Poll::Ready(Turn::Write { requests });
        }
        if let Some(alarm) = state.alarm
            && alarm < timer.deadline()
        {
            timer.as_mut().reset(alarm);
        }
        drop(state);
        ready!(timer.poll(cx));
        Poll::Ready(Turn::Alarm)
    }

    /// Ends the calls whose deadline has passed. Returns when to look again; `None` if the stream
    /// has rested long enough.
    fn on_alarm(&self, now: Instant, rests_until: Instant) -> Option<Instant> {
        let mut state = self.lock();
        let (due, next) = state.calls.expire(now);
        let rests = state.calls.len() == 0 && state.frames.is_empty();
        state.alarm = match next {
            None if rests && now >= rests_until => None,
            // One that is at rest is looked at again when it has rested long enough.
            None => Some(rests_until.max(now)),
            Some(next) => Some(next),
        };
        if state.alarm.is_none() {
            // Whoever comes now finds no stream, instead of one that is about to end.
            state.phase = Phase::Closed;
        }
        let alarm = state.alarm;
        drop(state);
        self.tell(due, || Outcome::TimedOut);
        alarm
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the task of a stream has to do.
enum Turn {
    Write { requests: u64 },
    Alarm,
}

impl State {
    /// Opens a call. Returns its id and whom to wake; `None` if the request cannot be encoded.
    fn enter(&mut self, question: Question<'_>, caller: Caller) -> Option<(u64, Option<Waker>)> {
        let Question {
            service,
            payload,
            deadline,
        } = question;
        self.alarm = self.alarm.min(Some(deadline));
        self.entered += 1;
        if payload.len() > SMALL {
            let id = self.calls.enter(caller, deadline, Written::Later);
            let large = Large {
                id,
                service: Arc::clone(service),
                payload: payload.clone(),
            };
            return Some((id, self.frames.add_large(large)));
        }
        let id = self.calls.enter(caller, deadline, Written::Next);
        let request = RequestRef {
            id,
            service,
            payload,
        };
        match self.frames.add_small(|frame| request.append_to(frame)) {
            Ok(writer) => Some((id, writer)),
            Err(error) => {
                tracing::debug!(%error, "a request cannot be sent");
                self.calls.end(id);
                None
            }
        }
    }

    fn others(&self) -> Others {
        match (self.calls.len(), self.answered) {
            (..=1, ..=1) => Others::None,
            _ => Others::Some,
        }
    }

    /// Takes what waits to be written. Returns how many requests have come since the last time.
    fn take(&mut self, frames: &mut Vec<u8>) -> u64 {
        let calls = &mut self.calls;
        self.frames.take(frames, |large, frames| {
            // One whose caller went away is not sent.
            if calls.on_written(large.id) {
                let request = RequestRef {
                    id: large.id,
                    service: &large.service,
                    payload: &large.payload,
                };
                let appended = append_frame_with(frames, |frame| request.append_to(frame));
                if let Err(error) = appended {
                    tracing::debug!(%error, "a request cannot be sent");
                }
            }
        });
        calls.on_turn();
        self.answered = 0;
        mem::take(&mut self.entered)
    }
}

impl Default for Kept {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            slots: Semaphore::new(MAX_PIPELINED_TO_PEER),
        }
    }
}

impl Future for Asked<'_> {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        let outcome = ready!(Pin::new(&mut self.outcome).poll(cx));
        self.has_ended = true;
        // Every call that ends is told how.
        Poll::Ready(outcome.unwrap_or(Outcome::NotSent("it was dropped".into())))
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        if !self.has_ended && self.kept.lock().calls.end(self.id).is_some() {
            self.kept.slots.add_permits(1);
        }
    }
}

#[cfg(test)]
mod tests {
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
        let (near, far) = duplex(1 << 20);
        let kept = Arc::new(Kept::default());
        let running = Arc::clone(&kept);
        tokio::spawn(async move {
            let sent = Counter::default();
            running.run(near.compat(), &sent).await;
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
        kept.enter(question)
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
            append_frame_with(&mut frame, |frame| reply.append_to(frame)).unwrap();
            self.0.write_all(&frame).await.unwrap();
        }
    }

    fn answer(outcome: Outcome) -> Vec<u8> {
        match outcome {
            Outcome::Answered(Ok(payload)) => payload,
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
                matches!(caller.await, Outcome::Broken(_)),
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
        assert!(matches!(written.await, Outcome::Broken(_)));
        assert!(matches!(waits.await, Outcome::NotSent(_)));
        assert!(ask_within(&kept, "late", FRAME_DEADLINE).is_none());
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
        assert!(matches!(sooner.await, Outcome::TimedOut));
        assert!((2..=3).contains(&start.elapsed().as_secs()));
        assert!(matches!(later.await, Outcome::TimedOut));
        assert!((20..=21).contains(&start.elapsed().as_secs()));
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
