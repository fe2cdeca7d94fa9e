//! Frames that wait to be written to a stream, and the half of the stream's task that writes them.
//!
//! Whoever has something to send adds it under the lock of what the stream's users share, so that a
//! small frame costs no queue and no allocation of its own. The task takes all that waits in one go
//! and never waits for more. Where others may be about to add a frame, it lets them run first whose
//! turn it is already, because a write costs more than a frame. Where nobody else is, or enough wait
//! to keep the remote busy, the small frames are written by who has added the last one, under that
//! lock: to wake the task would take longer. It never waits for the remote, but on QUIC it may wait
//! while the connection's task sends some datagrams.
//!
//! Large frames wait as what they are made of. They go after the small ones that wait, so many at a
//! time as are worth one write: a small frame that comes then waits for those.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::pin::Pin;
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

/// The half of a stream that is written to.
pub(super) type Outlet = Box<dyn AsyncWrite + Send + Unpin>;

/// How much of the small frames has left at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    Nothing,
    /// The task has to go on.
    Part,
    All,
}

pub(super) struct Outbox<L> {
    small: Vec<u8>,
    /// What they will take: as much as last time.
    expected: usize,
    large: VecDeque<L>,
    /// Where frames are written, while nobody does.
    outlet: Option<Outlet>,
    /// What was written may not have left.
    unflushed: bool,
    /// The task that writes, once it has seen for the first time that there is nothing for it to do.
    writer: Option<Waker>,
    /// It has not seen that since it was woken.
    woken: bool,
    /// Those that could run when there was something to write again have had their turn.
    settled: bool,
}

impl<L> Default for Outbox<L> {
    fn default() -> Self {
        Self {
            small: Vec::new(),
            expected: 0,
            large: VecDeque::new(),
            outlet: None,
            unflushed: false,
            writer: None,
            woken: false,
            settled: false,
        }
    }
}

impl<L> Outbox<L> {
    /// Adds the frame whose content `content` writes.
    pub(super) fn add_small(
        &mut self,
        content: impl FnOnce(&mut Vec<u8>) -> Result<(), EncodeError>,
    ) {
        if self.small.capacity() == 0 {
            self.small.reserve(self.expected);
        }
        append(&mut self.small, content);
    }

    /// Adds what a large frame is made of.
    pub(super) fn add_large(&mut self, frame: L) {
        self.large.push_back(frame);
    }

    /// Writes the small frames if that is possible without waiting and the task does not write now.
    pub(super) fn write_small(&mut self) -> Left {
        let (Some(outlet), Some(writer)) = (&mut self.outlet, &self.writer) else {
            return Left::Nothing;
        };
        // What cannot be written now wakes the task when it can, and fails there too.
        let mut cx = Context::from_waker(writer);
        let len = self.small.len();
        let mut written = 0;
        while written < len
            && let Poll::Ready(Ok(some)) =
                Pin::new(&mut *outlet).poll_write(&mut cx, &self.small[written..])
            && some > 0
        {
            written += some;
        }
        self.unflushed = !matches!(Pin::new(outlet).poll_flush(&mut cx), Poll::Ready(Ok(())));
        match written {
            0 => Left::Nothing,
            _ if written < len => {
                self.small.drain(..written);
                Left::Part
            }
            _ => {
                self.expected = len.min(WRITE_LEN);
                self.small.clear();
                release(&mut self.small);
                Left::All
            }
        }
    }

    /// The task that writes, if it has to be woken for what waits.
    pub(super) fn writer(&mut self) -> Option<Waker> {
        if self.is_idle() || self.woken {
            return None;
        }
        self.woken = true;
        self.writer.clone()
    }

    /// What everything is written to: the task does not write now.
    pub(super) fn put(&mut self, outlet: Outlet) {
        self.outlet = Some(outlet);
    }

    /// The large frames that wait.
    pub(super) fn large(&self) -> usize {
        self.large.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.small.is_empty() && self.large.is_empty()
    }

    fn is_idle(&self) -> bool {
        self.is_empty() && !self.unflushed
    }

    /// Ready when there is something to take and, as long as others are expected to add to it, the
    /// tasks that can run now have run.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, others: Others) -> Poll<()> {
        if self.is_idle() {
            release(&mut self.small);
            self.writer = Some(cx.waker().clone());
            self.woken = false;
            self.settled = false;
            return Poll::Pending;
        }
        if others == Others::None || self.settled || self.is_empty() {
            return Poll::Ready(());
        }
        self.settled = true;
        // To the end of the queue of this worker, from which another one may take it.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Takes the small frames and what fits into one write of the large ones, which `append` writes,
    /// and what they are written to. The task alone does, and gives that [back](Self::put): without
    /// it this is not called.
    pub(super) fn take(
        &mut self,
        frames: &mut Vec<u8>,
        mut append: impl FnMut(L, &mut Vec<u8>),
    ) -> Option<Outlet> {
        frames.clear();
        std::mem::swap(&mut self.small, frames);
        self.expected = frames.len().min(WRITE_LEN);
        let enough = frames.len() + WRITE_LEN;
        if self.large.len() > 1 {
            // Instead of growing from frame to frame.
            frames.reserve(WRITE_LEN + KEPT_LEN);
        }
        while frames.len() < enough
            && let Some(large) = self.large.pop_front()
        {
            append(large, frames);
        }
        self.settled = false;
        self.unflushed = false;
        self.outlet.take()
    }

    /// The task that writes, to be woken though nothing waits.
    pub(super) fn end(&mut self) -> Option<Waker> {
        self.writer.take()
    }

    /// The large frames that wait; drops the small ones and the stream.
    pub(super) fn into_large(self) -> VecDeque<L> {
        self.large
    }
}

impl<L> fmt::Debug for Outbox<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outbox")
            .field("small", &self.small.len())
            .field("large", &self.large.len())
            .finish_non_exhaustive()
    }
}

/// Writes frames and sees that they leave.
pub(super) async fn send(outlet: &mut Outlet, frames: &mut Vec<u8>) -> io::Result<()> {
    for part in frames.chunks(WRITE_LEN) {
        timeout(FRAME_DEADLINE, outlet.write_all(part)).await??;
    }
    timeout(FRAME_DEADLINE, outlet.flush()).await??;
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

#[cfg(test)]
mod tests {
    use futures::future::poll_fn;
    use tokio::io::{AsyncReadExt as _, DuplexStream, duplex};
    use tokio_util::compat::TokioAsyncReadCompatExt;

    use super::*;

    /// An outbox whose stream takes so many bytes that are not read, and the other end.
    fn scene(buffer: usize) -> (Outbox<()>, DuplexStream) {
        let (near, far) = duplex(buffer);
        let mut outbox = Outbox::default();
        outbox.put(Box::new(near.compat()));
        (outbox, far)
    }

    /// Lets the task see that nothing waits.
    async fn rest(outbox: &mut Outbox<()>) {
        let rests = poll_fn(|cx| Poll::Ready(outbox.poll(cx, Others::None).is_pending()));
        assert!(rests.await);
    }

    fn add(outbox: &mut Outbox<()>, frame: &[u8]) {
        outbox.add_small(|content| {
            content.extend_from_slice(frame);
            Ok(())
        });
    }

    #[tokio::test]
    async fn a_frame_is_written_at_once_if_the_task_rests() {
        let (mut outbox, mut far) = scene(100);
        add(&mut outbox, b"early");
        assert_eq!(outbox.write_small(), Left::Nothing, "the task has not run");
        let mut frames = Vec::new();
        let mut outlet = outbox.take(&mut frames, |(), _| {}).unwrap();
        add(&mut outbox, b"meanwhile");
        assert_eq!(outbox.write_small(), Left::Nothing, "the task writes");
        send(&mut outlet, &mut frames).await.unwrap();
        outbox.put(outlet);
        let outlet = outbox.take(&mut frames, |(), _| {});
        outbox.put(outlet.unwrap());
        rest(&mut outbox).await;
        add(&mut outbox, b"now");
        assert_eq!(outbox.write_small(), Left::All);
        assert!(outbox.writer().is_none(), "nothing is left to do");
        let mut arrived = [0; 10];
        far.read_exact(&mut arrived).await.unwrap();
        assert_eq!(&arrived, b"\x05early\x03now");
    }

    #[tokio::test]
    async fn what_cannot_be_written_at_once_is_left_to_the_task_in_its_order() {
        let (mut outbox, mut far) = scene(4);
        rest(&mut outbox).await;
        add(&mut outbox, b"first");
        assert_eq!(outbox.write_small(), Left::Part);
        add(&mut outbox, b"second");
        assert_eq!(outbox.write_small(), Left::Nothing);
        assert!(outbox.writer().is_some());
        let mut frames = Vec::new();
        let mut outlet = outbox.take(&mut frames, |(), _| {}).unwrap();
        let mut arrived = [0; 13];
        let (sent, read) =
            tokio::join!(send(&mut outlet, &mut frames), far.read_exact(&mut arrived));
        sent.unwrap();
        read.unwrap();
        assert_eq!(&arrived, b"\x05first\x06second");
    }
}
