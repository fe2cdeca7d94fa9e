//! The replies of one stream: what waits to be written, and what it holds of the budget.

use std::io;
use std::mem;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use futures::future::poll_fn;
use futures::io::{AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::budget::{Budget, Held, Usage};
use super::outbox::{Others, Outbox, SMALL, append, send};
use crate::limits::{FRAME_DEADLINE, MAX_PIPELINED};
use crate::proto::wire::{ErrorCode, RemoteError, ReplyRef};

#[derive(Debug)]
pub(super) struct Replies {
    budget: Arc<Budget>,
    of_peer: Arc<Usage>,
    /// The requests that were read and whose replies have not been taken to be written.
    open: AtomicUsize,
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
    pub(super) fn new(budget: Arc<Budget>, of_peer: Arc<Usage>) -> Arc<Self> {
        Arc::new(Self {
            budget,
            of_peer,
            open: AtomicUsize::new(0),
            state: Mutex::default(),
        })
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
    pub(super) async fn write<W: AsyncWrite + Unpin>(&self, mut io: W) -> io::Result<()> {
        let mut frames = Vec::new();
        while let Some(leaving) = poll_fn(|cx| self.poll_take(cx, &mut frames)).await {
            send(&mut io, &mut frames).await?;
            drop(leaving);
        }
        timeout(FRAME_DEADLINE, io.close()).await?
    }

    /// What is still answered gives its part of the budget back at once: nobody will read it.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.phase = Phase::Closed;
        let mut held = mem::take(&mut state.held);
        for large in state.frames.clear() {
            held.merge(large.held);
        }
        drop(state);
        self.budget.give_back(&self.of_peer, held);
    }

    /// Takes the replies that wait; `None` after the last one.
    fn poll_take(&self, cx: &mut Context<'_>, frames: &mut Vec<u8>) -> Poll<Option<Leaving<'_>>> {
        let mut state = self.lock();
        let open = self.open.load(Ordering::Acquire);
        if state.phase == Phase::Draining && open == 0 {
            return Poll::Ready(None);
        }
        let others = match state.waiting == open {
            true => Others::None,
            false => Others::Some,
        };
        if state.frames.poll(cx, others).is_pending() {
            return Poll::Pending;
        }
        let (held, taken) = state.take(frames);
        self.open.fetch_sub(taken, Ordering::AcqRel);
        let reader = state.reader.take();
        drop(state);
        if let Some(reader) = reader {
            reader.wake();
        }
        Poll::Ready(Some(Leaving {
            replies: self,
            held,
        }))
    }

    fn answer(&self, id: u64, outcome: Result<Vec<u8>, RemoteError>, held: Held) {
        let mut state = self.lock();
        if state.phase == Phase::Closed {
            drop(state);
            return self.budget.give_back(&self.of_peer, held);
        }
        let writer = state.add(id, outcome, held);
        drop(state);
        if let Some(writer) = writer {
            writer.wake();
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
    /// Adds a reply. Returns whom to wake.
    fn add(&mut self, id: u64, outcome: Result<Vec<u8>, RemoteError>, held: Held) -> Option<Waker> {
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

    /// Takes the replies that wait. Returns what they hold, and how many they are.
    fn take(&mut self, frames: &mut Vec<u8>) -> (Held, usize) {
        let mut held = mem::take(&mut self.held);
        let mut taken = self.waiting - self.frames.large();
        self.frames.take(frames, |large, frames| {
            let reply = ReplyRef {
                id: large.id,
                outcome: Ok(&large.payload),
            };
            append(frames, |frame| reply.append_to(frame));
            held.merge(large.held);
            taken += 1;
        });
        self.waiting -= taken;
        (held, taken)
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
