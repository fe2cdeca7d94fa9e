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
use futures::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use libp2p::PeerId;
use libp2p::swarm::Stream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::Outcome;
use crate::limits::{CONNECT_TIMEOUT, FRAME_DEADLINE, MAX_PIPELINED, MAX_REQUEST_TIME};
use crate::proto::frame::{FrameReader, FrameWriter};
use crate::proto::wire::{self, Reply, RequestRef};

/// How long a stream rests before it is closed: less than an idle connection.
const KEPT_IDLE: Duration = Duration::from_secs(60);

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

async fn run(stream: impl AsyncRead + AsyncWrite + Unpin, mut requests: mpsc::Receiver<Outgoing>) {
    let (reader, writer) = stream.split();
    let open = Mutex::default();
    let ended = {
        // What arrives was asked for: one frame at a time, and decoded for a caller that waits.
        let frames = FrameReader::new(reader, Vec::new());
        let reading = std::pin::pin!(read(frames, &open));
        let writing = std::pin::pin!(write(
            FrameWriter::new(writer, FRAME_DEADLINE),
            &mut requests,
            &open
        ));
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
    mut frames: FrameWriter<W>,
    requests: &mut mpsc::Receiver<Outgoing>,
    open: &Mutex<Open>,
) -> io::Result<()> {
    let mut batch = Vec::new();
    // The remote waits only so long for the first request. Of the two this side closes first: it
    // knows that nothing is on its way.
    let mut rest = FRAME_DEADLINE / 2;
    loop {
        match timeout(rest, requests.recv_many(&mut batch, MAX_PIPELINED)).await {
            Ok(0) => return Ok(()),
            Ok(_) => rest = KEPT_IDLE,
            Err(_) if lock(open).is_resting() => return Ok(()),
            Err(_) => continue,
        }
        for request in batch.drain(..) {
            if request.outcome.is_closed() {
                continue;
            }
            let reference = RequestRef {
                id: lock(open).enter(request.outcome),
                service: &request.service,
                payload: &request.payload,
            };
            frames.add(|content| reference.append_to(content)).await?;
        }
        frames.flush().await?;
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

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
    use tokio_util::compat::TokioAsyncReadCompatExt;

    use super::*;
    use crate::proto::frame::append_frame;
    use crate::proto::wire::{ReplyRef, Request};

    /// The far end of a kept stream, and the queue of its near end.
    struct Scene {
        far: DuplexStream,
        queue: mpsc::Sender<Outgoing>,
    }

    impl Scene {
        fn new() -> Self {
            let (near, far) = duplex(1 << 20);
            let (queue, requests) = mpsc::channel(MAX_PIPELINED);
            tokio::spawn(run(near.compat(), requests));
            Self { far, queue }
        }

        async fn ask(&self, payload: &str) -> oneshot::Receiver<Outcome> {
            let (outcome, receiver) = oneshot::channel();
            let request = Outgoing {
                service: "client1".into(),
                payload: payload.as_bytes().into(),
                outcome,
            };
            self.queue.send(request).await.unwrap();
            receiver
        }

        /// The next request; all of these tests have short ones.
        async fn asked(&mut self) -> Request {
            let len = self.far.read_u8().await.unwrap();
            let mut frame = vec![0; len.into()];
            self.far.read_exact(&mut frame).await.unwrap();
            Request::decode(&frame).unwrap()
        }

        async fn reply(&mut self, id: u64, payload: &[u8]) {
            let mut frame = Vec::new();
            let outcome = Ok(payload);
            ReplyRef { id, outcome }.append_to(&mut frame).unwrap();
            let mut framed = Vec::new();
            append_frame(&mut framed, &frame);
            self.far.write_all(&framed).await.unwrap();
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
        let mut scene = Scene::new();
        let mut callers = Vec::new();
        let mut asked = Vec::new();
        for number in 0..10 {
            callers.push(scene.ask(&number.to_string()).await);
            asked.push(scene.asked().await);
        }
        for request in asked.iter().rev() {
            scene.reply(request.id, &request.payload).await;
        }
        for (number, caller) in callers.into_iter().enumerate() {
            assert_eq!(answer(caller.await.unwrap()), number.to_string().as_bytes());
        }
    }

    #[tokio::test]
    async fn a_reply_to_a_request_that_was_never_made_ends_the_stream() {
        for id in [0, 2, u64::MAX] {
            let mut scene = Scene::new();
            let caller = scene.ask("hello").await;
            assert_eq!(scene.asked().await.id, 1);
            scene.reply(id, b"made up").await;
            assert!(matches!(caller.await, Ok(Outcome::Broken(_))), "id {id}");
        }
    }

    #[tokio::test]
    async fn a_reply_that_comes_twice_or_after_its_caller_left_changes_nothing() {
        let mut scene = Scene::new();
        drop(scene.ask("who leaves").await);
        let stays = scene.ask("who stays").await;
        // The first may have been written before its caller left.
        let mut request = scene.asked().await;
        if request.payload == b"who leaves" {
            scene.reply(request.id, b"too late").await;
            request = scene.asked().await;
        }
        scene.reply(request.id, b"first").await;
        assert_eq!(answer(stays.await.unwrap()), b"first");
        scene.reply(request.id, b"again").await;
        let next = scene.ask("next").await;
        let id = scene.asked().await.id;
        scene.reply(id, b"fine").await;
        assert_eq!(answer(next.await.unwrap()), b"fine");
    }

    #[tokio::test]
    async fn a_stream_that_ends_inside_a_frame_breaks_what_was_written_and_nothing_else() {
        let mut scene = Scene::new();
        let written = scene.ask("written").await;
        scene.asked().await;
        scene.far.write_all(&[100, 0xa2]).await.unwrap();
        drop(scene.far);
        assert!(matches!(written.await, Ok(Outcome::Broken(_))));
        // What comes later is refused, or told that it was not sent.
        let (outcome, receiver) = oneshot::channel();
        let late = Outgoing {
            service: "client1".into(),
            payload: b"late".as_slice().into(),
            outcome,
        };
        let told = match scene.queue.send(late).await {
            Ok(()) => matches!(receiver.await, Ok(Outcome::NotSent(_)) | Err(_)),
            Err(_) => true,
        };
        assert!(told);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_rests_is_closed_and_one_that_waits_is_not() {
        let mut scene = Scene::new();
        let caller = scene.ask("slow").await;
        let id = scene.asked().await.id;
        tokio::time::advance(2 * KEPT_IDLE).await;
        scene.reply(id, b"at last").await;
        assert_eq!(answer(caller.await.unwrap()), b"at last");
        let mut end = [0];
        assert_eq!(scene.far.read(&mut end).await.unwrap(), 0, "closed at rest");
    }
}
