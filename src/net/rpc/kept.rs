//! Requests to a peer, pipelined over one stream that is kept open.
//!
//! * Writes carry all requests that wait, and never wait for more.
//! * Replies are matched by id, in any order. A reply with an id that was never given out ends the
//!   stream; one whose caller has gone away is dropped.
//! * A stream that ends fails exactly the requests that were written to it, as "may have run"; those
//!   still in the queue were not sent.
//! * One that rests for [`KEPT_IDLE`] is closed, so that it does not keep a connection open.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::{Either, select};
use futures::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::PeerId;
use libp2p::swarm::Stream;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;

use super::Outcome;
use crate::limits::{CONNECT_TIMEOUT, FRAME_DEADLINE, MAX_PIPELINED, MAX_REQUEST_TIME};
use crate::proto::frame::{FrameReader, append_frame};
use crate::proto::wire::{self, Reply, RequestRef};

/// How long a stream rests before it is closed: less than an idle connection.
const KEPT_IDLE: Duration = Duration::from_secs(60);

/// See [`super::serve`].
const WRITE_CHUNK: usize = 64 * 1024;

/// Payloads from this size on go over a stream of their own, so that small ones need not wait for
/// them: about what a millisecond of encryption is worth.
const LARGE: usize = 64 * 1024;

/// A request to be sent.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) service: Arc<str>,
    pub(crate) payload: Arc<[u8]>,
    pub(crate) outcome: oneshot::Sender<Outcome>,
}

/// The streams that are kept open, by peer.
#[derive(Debug, Default)]
pub(crate) struct KeptStreams {
    streams: Mutex<HashMap<(PeerId, Lane), Kept>>,
}

#[derive(Debug)]
enum Kept {
    Opening,
    Open(mpsc::Sender<Outgoing>),
}

/// Which of a peer's streams a payload goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Lane {
    Small,
    Large,
}

impl Lane {
    pub(crate) fn of(payload: &[u8]) -> Self {
        if payload.len() < LARGE {
            Self::Small
        } else {
            Self::Large
        }
    }
}

impl KeptStreams {
    /// The queue of the stream to a peer, if there is one.
    pub(crate) fn get(&self, peer: PeerId, lane: Lane) -> Option<mpsc::Sender<Outgoing>> {
        match self.lock().get(&(peer, lane))? {
            Kept::Open(queue) if !queue.is_closed() => Some(queue.clone()),
            _ => None,
        }
    }

    /// Opens a stream to a peer by `open`, unless there is one, and keeps it until it rests or
    /// breaks.
    pub(crate) fn keep(
        self: &Arc<Self>,
        peer: PeerId,
        lane: Lane,
        open: impl FnOnce(PeerId) -> oneshot::Receiver<Stream>,
    ) {
        match self.lock().entry((peer, lane)) {
            Entry::Occupied(_) => return,
            Entry::Vacant(vacant) => {
                vacant.insert(Kept::Opening);
            }
        }
        let (streams, stream) = (Arc::clone(self), open(peer));
        tokio::spawn(async move {
            // Without a stream the requests go on as before, one stream each.
            if let Ok(Ok(stream)) = timeout(CONNECT_TIMEOUT, stream).await {
                let (queue, requests) = mpsc::channel(MAX_PIPELINED);
                streams.lock().insert((peer, lane), Kept::Open(queue));
                run(stream, requests).await;
            }
            streams.lock().remove(&(peer, lane));
        });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(PeerId, Lane), Kept>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The requests that were written and not answered.
#[derive(Debug, Default)]
struct Open {
    last_id: u64,
    callers: HashMap<u64, oneshot::Sender<Outcome>>,
}

async fn run(stream: Stream, mut requests: mpsc::Receiver<Outgoing>) {
    let (reader, writer) = stream.split();
    let open = Mutex::default();
    let ended = {
        // What arrives was asked for: replies to at most so many requests of this node's own.
        let budget = Arc::new(Semaphore::new(Semaphore::MAX_PERMITS));
        let reading = std::pin::pin!(read(FrameReader::new(reader, budget), &open));
        let writing = std::pin::pin!(write(writer, &mut requests, &open));
        match select(reading, writing).await {
            Either::Left((result, _)) | Either::Right((result, _)) => result,
        }
    };
    let reason = match ended {
        Ok(()) => "the peer closed the stream".to_owned(),
        Err(error) => error.to_string(),
    };
    for (_, caller) in lock(&open).callers.drain() {
        // A caller that went away does not want to know.
        let _ = caller.send(Outcome::Broken(reason.clone()));
    }
    requests.close();
    while let Some(request) = requests.recv().await {
        // As above.
        let _ = request.outcome.send(Outcome::NotSent(reason.clone()));
    }
}

fn lock(open: &Mutex<Open>) -> MutexGuard<'_, Open> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn read<R: AsyncRead + Unpin>(
    mut frames: FrameReader<R>,
    open: &Mutex<Open>,
) -> io::Result<()> {
    loop {
        // The writing half watches for rest, and callers have deadlines of their own.
        let patience = 2 * MAX_REQUEST_TIME.max(KEPT_IDLE);
        let frame = frames
            .next(wire::MAX_FRAME, patience, FRAME_DEADLINE)
            .await?;
        let Some(frame) = frame else {
            return Ok(());
        };
        let reply = Reply::decode(frame).map_err(io::Error::other)?;
        let caller = {
            let mut open = lock(open);
            if reply.id == 0 || reply.id > open.last_id {
                return Err(io::Error::other("a reply to a request that was never made"));
            }
            open.callers.remove(&reply.id)
        };
        if let Some(caller) = caller {
            // A caller that went away does not want to know.
            let _ = caller.send(Outcome::Answered(reply.outcome));
        }
    }
}

async fn write<W: AsyncWrite + Unpin>(
    mut writer: W,
    requests: &mut mpsc::Receiver<Outgoing>,
    open: &Mutex<Open>,
) -> io::Result<()> {
    let (mut batch, mut buffer, mut frame) = (Vec::new(), Vec::new(), Vec::new());
    loop {
        match timeout(KEPT_IDLE, requests.recv_many(&mut batch, MAX_PIPELINED)).await {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(_) if lock(open).is_resting() => return Ok(()),
            Err(_) => continue,
        }
        for request in batch.drain(..) {
            if request.outcome.is_closed() {
                continue;
            }
            frame.clear();
            let id = lock(open).enter(request.outcome);
            let reference = RequestRef {
                id,
                service: &request.service,
                payload: &request.payload,
            };
            reference.append_to(&mut frame).map_err(io::Error::other)?;
            append_frame(&mut buffer, &frame);
            if buffer.len() >= WRITE_CHUNK {
                timeout(FRAME_DEADLINE, writer.write_all(&buffer)).await??;
                buffer.clear();
            }
        }
        let rest = async {
            writer.write_all(&buffer).await?;
            writer.flush().await
        };
        timeout(FRAME_DEADLINE, rest).await??;
        buffer.clear();
        if frame.capacity() > WRITE_CHUNK {
            (buffer, frame) = (Vec::new(), Vec::new());
        }
    }
}

impl Open {
    fn enter(&mut self, caller: oneshot::Sender<Outcome>) -> u64 {
        self.last_id += 1;
        // Those whose callers went away are forgotten before they could pile up.
        if self.callers.len() >= 2 * MAX_PIPELINED {
            self.callers.retain(|_, caller| !caller.is_closed());
        }
        self.callers.insert(self.last_id, caller);
        self.last_id
    }

    fn is_resting(&mut self) -> bool {
        self.callers.retain(|_, caller| !caller.is_closed());
        self.callers.is_empty()
    }
}
