//! The replies of one stream: what waits to be written, and what it holds of the budget.

use std::io;
use std::mem;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use futures::future::poll_fn;
use futures::io::{AsyncWrite, AsyncWriteExt};
use libp2p::PeerId;
use tokio::time::timeout;

use super::budget::{Budget, Held, Usage};
use super::outbox::{Left, Others, Outbox, Outlet, SMALL, append, send};
use crate::limits::{FRAME_DEADLINE, MAX_PIPELINED};
use crate::proto::wire::{ErrorCode, RemoteError, ReplyRef};

#[derive(Debug)]
pub(super) struct Replies {
    /// Who asks.
    peer: PeerId,
    budget: Arc<Budget>,
    of_peer: Arc<Usage>,
    /// The requests that were read and whose replies neither the task has taken nor their handlers
    /// have written.
    open: AtomicUsize,
    /// The requests that have arrived are being read.
    more: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    frames: Outbox<Large>,
    /// The replies that wait.
    waiting: usize,
    /// What the small replies that wait hold.
    held: Held,
    phase: Phase,
    /// Who waits until one more request may be read.
    reader: Option<Waker>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Reading,
    /// The stream ends with the last reply.
    Draining,
    /// Nobody reads what is answered.
    Closed,
}

/// A reply that is encoded when its turn comes.
#[derive(Debug)]
struct Large {
    id: u64,
    payload: Vec<u8>,
    held: Held,
}

/// Answers one request, exactly once: dropping it answers `handler-failed`.
#[derive(Debug)]
pub(crate) struct Responder {
    id: u64,
    replies: Arc<Replies>,
    held: Held,
    answered: bool,
}

impl Replies {
    pub(super) fn new(peer: PeerId, budget: Arc<Budget>, of_peer: Arc<Usage>) -> Arc<Self> {
        Arc::new(Self {
            peer,
            budget,
            of_peer,
            open: AtomicUsize::new(0),
            more: AtomicBool::new(false),
            state: Mutex::default(),
        })
    }

    /// Whether another request has arrived, or has to be waited for.
    pub(super) fn set_more(&self, more: bool) {
        self.more.store(more, Ordering::Release);
    }

    /// What is to answer a request that was read, and whether there is room for another one.
    pub(super) fn expect(self: &Arc<Self>, id: u64) -> (Responder, bool) {
        let has_room = self.open.fetch_add(1, Ordering::AcqRel) + 1 < MAX_PIPELINED;
        let responder = Responder {
            id,
            replies: Arc::clone(self),
            held: Held::default(),
            answered: false,
        };
        (responder, has_room)
    }

    /// Returns when one more request may be read.
    pub(super) async fn room(&self) {
        poll_fn(|cx| {
            let mut state = self.lock();
            if self.open.load(Ordering::Acquire) < MAX_PIPELINED {
                return Poll::Ready(());
            }
            state.reader = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Nothing more is read: the stream ends with the last reply.
    pub(super) fn drain(&self) {
        self.lock().phase = Phase::Draining;
    }

    /// Writes replies as they come, those that wait together in one go, until the last one.
    pub(super) async fn write(
        &self,
        outlet: impl AsyncWrite + Send + Unpin + 'static,
    ) -> io::Result<()> {
        self.lock().frames.put(Box::new(outlet));
        let mut frames = Vec::new();
        loop {
            let (mut outlet, leaving) = poll_fn(|cx| self.poll_take(cx, &mut frames)).await?;
            let Some(leaving) = leaving else {
                return timeout(FRAME_DEADLINE, outlet.close()).await?;
            };
            send(&mut outlet, &mut frames).await?;
            drop(leaving);
            self.lock().frames.put(outlet);
        }
    }

    /// What is still answered gives its part of the budget back at once: nobody will read it.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.phase = Phase::Closed;
        let mut held = mem::take(&mut state.held);
        let frames = mem::take(&mut state.frames);
        drop(state);
        for large in frames.into_large() {
            held.merge(large.held);
        }
        self.budget.give_back(&self.of_peer, held);
    }

    /// Takes the replies that wait, `None` after the last one, and the stream.
    fn poll_take(
        &self,
        cx: &mut Context<'_>,
        frames: &mut Vec<u8>,
    ) -> Poll<io::Result<(Outlet, Option<Leaving<'_>>)>> {
        let mut state = self.lock();
        let is_last = state.phase == Phase::Draining && self.open.load(Ordering::Acquire) == 0;
        let others = self.others(&state);
        if !is_last {
            ready!(state.frames.poll(cx, others));
        }
        let (outlet, leaving) = state.take(frames);
        let leaving = (!is_last).then(|| self.leave(state, leaving));
        let missing = io::ErrorKind::BrokenPipe;
        Poll::Ready(outlet.map(|outlet| (outlet, leaving)).ok_or(missing.into()))
    }

    /// Whether other requests that were read may be answered soon.
    fn others(&self, state: &State) -> Others {
        match state.waiting == self.open.load(Ordering::Acquire) {
            true => Others::None,
            false => Others::Some,
        }
    }

    fn answer(&self, id: u64, outcome: Result<Vec<u8>, RemoteError>, held: Held) {
        let mut state = self.lock();
        if state.phase == Phase::Closed {
            drop(state);
            return self.budget.give_back(&self.of_peer, held);
        }
        state.add(id, outcome, held);
        let reads_on = self.more.load(Ordering::Acquire);
        let alone = self.others(&state) == Others::None && !reads_on;
        let at_once = alone && state.frames.large() == 0;
        if at_once && state.frames.write_small() == Left::All {
            let leaving = state.take_small();
            drop(self.leave(state, leaving));
        } else if let Some(writer) = state.frames.writer() {
            drop(state);
            writer.wake();
        }
    }

    /// So many replies leave, and hold so much until that is done, or until the transport has them.
    fn leave(
        &self,
        mut state: MutexGuard<'_, State>,
        (held, replies): (Held, usize),
    ) -> Leaving<'_> {
        let open = self.open.fetch_sub(replies, Ordering::AcqRel) - replies;
        let writer = match state.phase == Phase::Draining && open == 0 {
            true => state.frames.end(),
            // What could not be flushed is left to it.
            false => state.frames.writer(),
        };
        let reader = state.reader.take();
        drop(state);
        for task in [writer, reader].into_iter().flatten() {
            task.wake();
        }
        Leaving {
            replies: self,
            held,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What replies hold until they have left, or cannot.
struct Leaving<'a> {
    replies: &'a Replies,
    held: Held,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        let held = mem::take(&mut self.held);
        self.replies.budget.give_back(&self.replies.of_peer, held);
    }
}

impl State {
    /// Adds a reply.
    fn add(&mut self, id: u64, outcome: Result<Vec<u8>, RemoteError>, held: Held) {
        self.waiting += 1;
        let outcome = match outcome {
            Ok(payload) if payload.len() > SMALL => {
                return self.frames.add_large(Large { id, payload, held });
            }
            outcome => outcome,
        };
        self.held.merge(held);
        let reply = ReplyRef {
            id,
            outcome: outcome.as_deref(),
        };
        self.frames.add_small(|frame| reply.append_to(frame))
    }

    /// The small replies leave. Returns what they hold, and how many they are.
    fn take_small(&mut self) -> (Held, usize) {
        let small = self.waiting - self.frames.large();
        self.waiting -= small;
        (mem::take(&mut self.held), small)
    }

    /// Takes the replies that wait, and the stream. Returns also what they hold, and how many they
    /// are.
    fn take(&mut self, frames: &mut Vec<u8>) -> (Option<Outlet>, (Held, usize)) {
        let (mut held, small) = self.take_small();
        let mut large_ones = 0;
        let outlet = self.frames.take(frames, |large, frames| {
            let reply = ReplyRef {
                id: large.id,
                outcome: Ok(&large.payload),
            };
            append(frames, |frame| reply.append_to(frame));
            held.merge(large.held);
            large_ones += 1;
        });
        self.waiting -= large_ones;
        (outlet, (held, small + large_ones))
    }
}

impl Responder {
    /// Takes a part of the budget for a request with such a payload; `false` if there is none.
    pub(super) fn admit(&mut self, payload: usize) -> bool {
        self.hold(|budget, of_peer| budget.admit(of_peer, payload))
    }

    /// The same for a request that is answered at once.
    pub(super) fn admit_short(&mut self) -> bool {
        self.hold(Budget::admit_short)
    }

    fn hold(&mut self, admit: impl FnOnce(&Budget, &Usage) -> Option<Held>) -> bool {
        let admitted = admit(&self.replies.budget, &self.replies.of_peer);
        let is_admitted = admitted.is_some();
        self.held = admitted.unwrap_or_default();
        is_admitted
    }

    /// Who asks, proved by its key.
    pub(crate) fn peer(&self) -> PeerId {
        self.replies.peer
    }

    pub(crate) fn answer(mut self, outcome: Result<Vec<u8>, RemoteError>) {
        self.send(outcome);
    }

    fn send(&mut self, outcome: Result<Vec<u8>, RemoteError>) {
        self.answered = true;
        let mut held = mem::take(&mut self.held);
        let len = outcome.as_ref().map_or(0, Vec::len);
        let Replies {
            budget, of_peer, ..
        } = &*self.replies;
        let fits = !held.is_some() || budget.grow(of_peer, &mut held, len);
        let outcome = if fits {
            outcome
        } else {
            let message = "too many replies wait to be read";
            Err(RemoteError::new(ErrorCode::TooLarge, message))
        };
        self.replies.answer(self.id, outcome, held);
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        if !self.answered {
            let message = "the handler gave no answer";
            self.send(Err(RemoteError::new(ErrorCode::HandlerFailed, message)));
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, DuplexStream, duplex};
    use tokio::task::{JoinHandle, yield_now};
    use tokio_util::compat::TokioAsyncReadCompatExt;

    use super::*;
    use crate::limits::Limits;

    /// Replies to a stream that takes so many bytes that are not read, their task, which rests, and
    /// the remote end.
    async fn scene(buffer: usize) -> (Arc<Replies>, JoinHandle<io::Result<()>>, DuplexStream) {
        let (near, far) = duplex(buffer);
        let budget = Arc::new(Budget::new(&Limits::default()));
        let peer = PeerId::random();
        let of_peer = budget.usage_of(peer);
        let replies = Replies::new(peer, budget, of_peer);
        let writing = Arc::clone(&replies);
        let task = tokio::spawn(async move { writing.write(near.compat()).await });
        yield_now().await;
        (replies, task, far)
    }

    fn request(replies: &Arc<Replies>) -> Responder {
        let (mut responder, _) = replies.expect(1);
        assert!(responder.admit(0));
        responder
    }

    /// The bytes of the reply that carries this.
    fn frame(payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        let reply = ReplyRef {
            id: 1,
            outcome: Ok(payload),
        };
        append(&mut frame, |frame| reply.append_to(frame));
        frame
    }

    #[tokio::test]
    async fn the_last_reply_ends_a_stream_that_drains_and_leaves_at_once() {
        let (replies, task, mut far) = scene(100).await;
        let responder = request(&replies);
        replies.drain();
        yield_now().await;
        responder.answer(Ok(b"last".to_vec()));
        assert_eq!(replies.budget.open_requests(), 0, "it has left");
        task.await.unwrap().unwrap();
        let mut arrived = Vec::new();
        far.read_to_end(&mut arrived).await.unwrap();
        assert_eq!(arrived, frame(b"last"));
    }

    #[tokio::test]
    async fn a_reply_that_leaves_in_part_holds_its_budget_until_all_of_it_has() {
        let (replies, task, mut far) = scene(4).await;
        let responder = request(&replies);
        replies.drain();
        responder.answer(Ok(b"in two parts".to_vec()));
        yield_now().await;
        assert_eq!(replies.budget.open_requests(), 1);
        let mut arrived = Vec::new();
        far.read_to_end(&mut arrived).await.unwrap();
        assert_eq!(arrived, frame(b"in two parts"));
        task.await.unwrap().unwrap();
        assert_eq!(replies.budget.open_requests(), 0);
    }

    #[tokio::test]
    async fn replies_wait_for_each_other_while_requests_are_being_read() {
        let (replies, _task, mut far) = scene(100).await;
        replies.set_more(true);
        request(&replies).answer(Ok(b"one".to_vec()));
        assert_eq!(replies.budget.open_requests(), 1, "the task writes it");
        replies.set_more(false);
        request(&replies).answer(Ok(b"two".to_vec()));
        let mut arrived = vec![0; frame(b"one").len() + frame(b"two").len()];
        far.read_exact(&mut arrived).await.unwrap();
        assert_eq!(arrived, [frame(b"one"), frame(b"two")].concat());
    }
}
