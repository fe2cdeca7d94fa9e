//! Frames that wait to be written to a stream, and the half of the stream's task that writes them.
//!
//! Whoever has something to send adds it under the lock of what the stream's users share, so that a
//! small frame costs no queue and no allocation of its own. The task takes all that waits in one go
//! and never waits for more. Where others may be about to add a frame, it lets them run first whose
//! turn it is already, because a write costs more than a frame.
//!
//! Large frames wait as what they are made of. They go after the small ones that wait, so many at a
//! time as are worth one write: a small frame that comes then waits for those.

use std::collections::VecDeque;
use std::io;
use std::task::{Context, Poll, Waker};

use futures::io::{AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use crate::limits::FRAME_DEADLINE;
use crate::proto::frame::append_frame_with;
use crate::proto::wire::EncodeError;

/// Payloads up to this size are encoded at once.
pub(super) const SMALL: usize = 4 * 1024;

/// The large frames that are taken together: what a remote has [`FRAME_DEADLINE`] to take.
pub(super) const WRITE_LEN: usize = 64 * 1024;

/// Who else may be about to add a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Others {
    None,
    Some,
}

/// What an empty buffer holds at most: it is used again by most streams, and many rest.
const KEPT_LEN: usize = 16 * 1024;

#[derive(Debug)]
pub(super) struct Outbox<L> {
    small: Vec<u8>,
    large: VecDeque<L>,
    /// The task that writes, while there is nothing for it to do.
    writer: Option<Waker>,
    /// Those that ran when there was something to write again have had their turn.
    settled: bool,
}

impl<L> Default for Outbox<L> {
    fn default() -> Self {
        Self {
            small: Vec::new(),
            large: VecDeque::new(),
            writer: None,
            settled: false,
        }
    }
}

impl<L> Outbox<L> {
    /// Adds the frame whose content `content` writes. Returns whom to wake.
    pub(super) fn add_small(
        &mut self,
        content: impl FnOnce(&mut Vec<u8>) -> Result<(), EncodeError>,
    ) -> Option<Waker> {
        append(&mut self.small, content);
        self.writer.take()
    }

    /// Adds what a large frame is made of. Returns whom to wake.
    pub(super) fn add_large(&mut self, frame: L) -> Option<Waker> {
        self.large.push_back(frame);
        self.writer.take()
    }

    /// The large frames that wait.
    pub(super) fn large(&self) -> usize {
        self.large.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.small.is_empty() && self.large.is_empty()
    }

    /// Ready when there is something to take and, as long as others are expected to add to it, the
    /// tasks that can run now have run.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, others: Others) -> Poll<()> {
        if self.is_empty() {
            release(&mut self.small);
            self.writer = Some(cx.waker().clone());
            self.settled = false;
            return Poll::Pending;
        }
        if others == Others::None || self.settled {
            return Poll::Ready(());
        }
        self.settled = true;
        // To the end of the queue of this worker, from which another one may take it.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Takes the small frames and what fits into one write of the large ones, which `append` writes.
    pub(super) fn take(&mut self, frames: &mut Vec<u8>, mut append: impl FnMut(L, &mut Vec<u8>)) {
        frames.clear();
        std::mem::swap(&mut self.small, frames);
        let enough = frames.len() + WRITE_LEN;
        while frames.len() < enough
            && let Some(large) = self.large.pop_front()
        {
            append(large, frames);
        }
        self.settled = false;
    }

    /// Drops everything that waits.
    pub(super) fn clear(&mut self) -> impl Iterator<Item = L> {
        self.small = Vec::new();
        std::mem::take(&mut self.large).into_iter()
    }
}

/// Writes frames and sees that they leave.
pub(super) async fn send<W: AsyncWrite + Unpin>(
    io: &mut W,
    frames: &mut Vec<u8>,
) -> io::Result<()> {
    for part in frames.chunks(WRITE_LEN) {
        timeout(FRAME_DEADLINE, io.write_all(part)).await??;
    }
    timeout(FRAME_DEADLINE, io.flush()).await??;
    release(frames);
    Ok(())
}

/// Appends a frame.
pub(super) fn append(
    frames: &mut Vec<u8>,
    content: impl FnOnce(&mut Vec<u8>) -> Result<(), EncodeError>,
) {
    // Lengths are checked long before, so that there is no reason to fail.
    if let Err(error) = append_frame_with(frames, content) {
        tracing::error!(%error, "a message cannot be sent");
    }
}

/// Does not hold for ever what a large frame took.
fn release(frames: &mut Vec<u8>) {
    if frames.capacity() > KEPT_LEN {
        *frames = Vec::new();
    }
}
