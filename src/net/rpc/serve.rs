//! Serves the requests of others, each stream in a task of its own.
//!
//! A request takes a *place* in a budget of count and bytes, and keeps it until its reply has left
//! or the stream has failed: neither slow handlers nor slow readers make memory grow. Beyond the
//! budget the answer is `busy` or, when a reply finds no room after its handler has run, `too-large`.
//! One peer gets three quarters of it at most. A stream that has [`MAX_PIPELINED`] requests open is
//! not read further.
//!
//! Requests that are still arriving have a budget of as many bytes, so that frames that never end
//! neither make memory grow nor take the places of those that do.

use std::collections::HashMap;
use std::error::Error;
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

use futures::future::{Either, select};
use futures::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use libp2p::PeerId;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::mpsc::{self, OwnedPermit};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::limits::{FRAME_DEADLINE, Limits, MAX_PIPELINED, MAX_SERVED_STREAMS};
use crate::metrics::Metrics;
use crate::name::ServiceName;
use crate::proto::frame::{FrameError, FrameReader, FrameWriter};
use crate::proto::wire::{
    self, Batch, DecodeError, ErrorCode, NamesRequest, RemoteError, ReplyRef, Request,
};
use crate::store::{NotTaken, Registry};

/// The replies that are taken from the queue for one write.
const WRITE_BATCH: usize = 256;

/// The bytes of answers on names that one peer may leave unread without a place in the budget, each
/// counted as [`SHORT_ANSWER`] more: some hundred lookups under way. All connections that a node
/// accepts may hold 256 MiB.
const SHORT_ANSWERS: usize = 64 * 1024;

/// What an answer takes beside its payload.
const SHORT_ANSWER: usize = 128;

/// What is said to whoever calls a name that nobody serves here.
const NOT_SERVED: &str = "not served here";

/// What serves the requests of others, shared by all their streams.
#[derive(Debug)]
pub(crate) struct Server {
    services: RwLock<HashMap<ServiceName, mpsc::Sender<Inbound>>>,
    peers: Mutex<HashMap<PeerId, Weak<Usage>>>,
    total: Usage,
    max_requests: usize,
    max_bytes: usize,
    /// How long a stream may rest between two requests.
    rest: Duration,
    /// One permit for each stream that is served.
    streams: Arc<Semaphore>,
    stopping: AtomicBool,
    idle: Notify,
    /// The tables of a grape.
    registry: OnceLock<Arc<Registry>>,
    /// Where requests for this grape's workers go.
    carrier: OnceLock<mpsc::Sender<Carried>>,
    metrics: Arc<Metrics>,
}

/// Where a request goes.
enum Route {
    Handler(mpsc::Sender<Inbound>),
    Carrier(ServiceName, mpsc::Sender<Carried>),
}

impl Route {
    fn send(self, inbound: Inbound) -> Result<(), TrySendError<Inbound>> {
        let (name, carrier) = match self {
            Self::Handler(handler) => return handler.try_send(inbound),
            Self::Carrier(name, carrier) => (name, carrier),
        };
        match carrier.try_reserve() {
            Ok(place) => {
                place.send(Carried::Call(name, inbound));
                Ok(())
            }
            Err(TrySendError::Full(())) => Err(TrySendError::Full(inbound)),
            Err(TrySendError::Closed(())) => Err(TrySendError::Closed(inbound)),
        }
    }
}

/// Another node, and the host its connection comes from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Remote {
    pub(crate) peer: PeerId,
    pub(crate) host: Option<IpAddr>,
}

/// What another node asks of a worker of this grape's.
#[derive(Debug)]
pub(crate) enum Carried {
    /// Whether a live one serves the name.
    Asks(ServiceName, Question),
    /// To serve a request for the name.
    Call(ServiceName, Inbound),
}

/// Whether a name is served. Dropping it says that nobody knows.
#[derive(Debug)]
pub(crate) struct Question(Responder);

impl Question {
    pub(crate) fn answer(self, serves: bool) {
        self.0.answer(Ok(vec![u8::from(serves)]));
    }
}

/// What is used of the budget, by all or by one peer.
#[derive(Debug)]
struct Usage {
    requests: AtomicUsize,
    bytes: AtomicUsize,
    /// The bytes of short answers on names that have not left; see [`SHORT_ANSWERS`].
    short: AtomicUsize,
    /// The bytes that frames still arriving may take.
    arriving: Arc<Semaphore>,
}

/// A request on its way to a handler.
#[derive(Debug)]
pub(crate) struct Inbound {
    pub(crate) from: PeerId,
    pub(crate) payload: Vec<u8>,
    pub(crate) responder: Responder,
}

/// Answers one request, exactly once: dropping it answers `handler-failed`.
#[derive(Debug)]
pub(crate) struct Responder {
    id: u64,
    place: Option<Place>,
    /// Room in the stream's queue of replies.
    permit: Option<OwnedPermit<Answer>>,
}

#[derive(Debug)]
struct Answer {
    id: u64,
    outcome: Result<Vec<u8>, RemoteError>,
    /// Given back when the reply has left.
    _place: Option<Place>,
}

/// A place in the budget; dropping it gives it back.
#[derive(Debug)]
struct Place {
    server: Arc<Server>,
    of_peer: Arc<Usage>,
    bytes: usize,
    /// It is one of the short answers that a peer may leave unread.
    is_short: bool,
}

impl Server {
    pub(crate) fn new(limits: &Limits, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            services: RwLock::default(),
            peers: Mutex::default(),
            total: Usage::new(limits.inbound_bytes),
            max_requests: limits.inbound_requests,
            max_bytes: limits.inbound_bytes,
            rest: limits.idle,
            streams: Arc::new(Semaphore::new(MAX_SERVED_STREAMS)),
            stopping: AtomicBool::new(false),
            idle: Notify::new(),
            registry: OnceLock::new(),
            carrier: OnceLock::new(),
            metrics,
        })
    }

    /// This node is a grape, which other grapes tell of their workers.
    pub(crate) fn keep(&self, registry: Arc<Registry>) {
        // Once, when the node starts.
        let _ = self.registry.set(registry);
    }

    /// Requests for this grape's workers go to this channel from now on. Only the first counts.
    pub(crate) fn carry(&self, carrier: mpsc::Sender<Carried>) {
        let _ = self.carrier.set(carrier);
    }

    /// Requests for the name go to this channel from now on.
    pub(crate) fn serve(&self, name: ServiceName, handler: mpsc::Sender<Inbound>) {
        let mut services = self
            .services
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        services.insert(name, handler);
    }

    /// The name is not served any more.
    pub(crate) fn unserve(&self, name: &ServiceName) {
        let mut services = self
            .services
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        services.remove(name);
    }

    /// Refuses new requests from now on.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// How many requests are open.
    pub(crate) fn open_requests(&self) -> usize {
        self.total.requests.load(Ordering::Acquire)
    }

    /// Returns when no request is open.
    pub(crate) async fn idle(&self) {
        loop {
            let idle = self.idle.notified();
            if self.open_requests() == 0 {
                return;
            }
            idle.await;
        }
    }

    /// A place for one more stream, if there is one.
    pub(crate) fn stream_place(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.streams).try_acquire_owned().ok()
    }

    fn handler(&self, service: &str) -> Option<mpsc::Sender<Inbound>> {
        let services = self.services.read().unwrap_or_else(PoisonError::into_inner);
        services.get(service).cloned()
    }

    /// Where requests for a service go.
    fn route(&self, service: &str) -> Option<Route> {
        if let Some(handler) = self.handler(service) {
            return Some(Route::Handler(handler));
        }
        let name = ServiceName::from_wire(service).ok()?;
        let carrier = self.carrier_for(&name)?.clone();
        Some(Route::Carrier(name, carrier))
    }

    /// What a peer uses, all its streams together.
    fn usage_of(&self, peer: PeerId) -> Arc<Usage> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(usage) = peers.get(&peer).and_then(Weak::upgrade) {
            return usage;
        }
        peers.retain(|_, usage| usage.strong_count() > 0);
        let usage = Arc::new(Usage::new(share(self.max_bytes)));
        peers.insert(peer, Arc::downgrade(&usage));
        usage
    }

    /// A place for a request, if there is one.
    fn place(self: &Arc<Self>, of_peer: &Arc<Usage>, payload: usize) -> Option<Place> {
        // Counted first, so that two streams cannot both take the last place.
        let open = self.total.requests.fetch_add(1, Ordering::AcqRel);
        let of_peer_open = of_peer.requests.fetch_add(1, Ordering::AcqRel);
        let mut place = Place {
            server: Arc::clone(self),
            of_peer: Arc::clone(of_peer),
            bytes: 0,
            is_short: false,
        };
        let fits = open < self.max_requests && of_peer_open < share(self.max_requests);
        (fits && place.take(payload)).then_some(place)
    }

    /// Answers whether a name is served here, by this node or by a worker of this grape's.
    fn on_serves(&self, payload: &[u8], responder: Responder) {
        let name = std::str::from_utf8(payload).ok();
        let Some(name) = name.and_then(|text| ServiceName::from_wire(text).ok()) else {
            let message = "the payload is not a name";
            return responder.answer(Err(RemoteError::new(ErrorCode::BadRequest, message)));
        };
        if self.stopping.load(Ordering::Relaxed) {
            return Question(responder).answer(false);
        }
        if self.handler(name.as_ref()).is_some() {
            return Question(responder).answer(true);
        }
        match self.carrier_for(&name) {
            // A full queue drops the question, and with it answers that nobody knows.
            Some(carrier) => drop(carrier.try_send(Carried::Asks(name, Question(responder)))),
            None => Question(responder).answer(false),
        }
    }

    /// Where requests for a name go that a worker of this grape's serves.
    fn carrier_for(&self, name: &ServiceName) -> Option<&mpsc::Sender<Carried>> {
        let (carrier, registry) = (self.carrier.get()?, self.registry.get()?);
        let has_own = registry.workers().has_own(&name.digest(), Instant::now());
        has_own.then_some(carrier)
    }

    /// Takes what another grape tells of its workers.
    fn on_batch(&self, remote: Remote, payload: &[u8]) -> Result<Vec<u8>, RemoteError> {
        let Some(registry) = self.registry.get() else {
            return Err(RemoteError::new(ErrorCode::UnknownService, NOT_SERVED));
        };
        let refuse = |error: &dyn Error| RemoteError::new(ErrorCode::BadRequest, error.to_string());
        let batch = Batch::decode(payload).map_err(|error| refuse(&error))?;
        let reply = registry.on_batch(remote.peer, remote.host, &batch, Instant::now());
        reply.encode().map_err(|error| refuse(&error))
    }

    /// Keeps, takes back and finds names for another node.
    fn on_names(
        self: &Arc<Self>,
        remote: Remote,
        usage: &Arc<Usage>,
        payload: &[u8],
        mut responder: Responder,
    ) {
        let Some(registry) = self.registry.get() else {
            let error = RemoteError::new(ErrorCode::UnknownService, NOT_SERVED);
            return responder.answer(Err(error));
        };
        let busy = || {
            Err(RemoteError::new(
                ErrorCode::Busy,
                "too many answers wait to be read",
            ))
        };
        // It has its answer at once, and takes a place in the budget only if that is a long one.
        let short = Place::of_short_answer(self, usage);
        let Some(mut place) = short.or_else(|| self.place(usage, 0)) else {
            return responder.answer(busy());
        };
        let answer = answer_on_names(registry, remote, payload);
        let len = answer.as_ref().map_or(0, Vec::len);
        responder.place = match place.is_short && !place.take(len) {
            true => self.place(usage, 0),
            false => Some(place),
        };
        let has_room = responder.place.is_some();
        responder.answer(if has_room { answer } else { busy() });
    }
}

fn answer_on_names(
    registry: &Registry,
    remote: Remote,
    payload: &[u8],
) -> Result<Vec<u8>, RemoteError> {
    let request = NamesRequest::decode(payload).map_err(|error| match error {
        DecodeError::TooLarge { .. } => RemoteError::new(ErrorCode::TooLarge, error.to_string()),
        error => RemoteError::new(ErrorCode::BadRequest, error.to_string()),
    })?;
    let reply = registry.on_names(remote.peer, remote.host, &request, Instant::now());
    let reply = reply.map_err(|error| match error {
        NotTaken::TooFast => RemoteError::new(ErrorCode::Busy, error.to_string()),
        error => RemoteError::new(ErrorCode::BadRequest, error.to_string()),
    })?;
    let encoded = reply.encode();
    encoded.map_err(|error| RemoteError::new(ErrorCode::HandlerFailed, error.to_string()))
}

impl Usage {
    fn new(max_bytes: usize) -> Self {
        let arriving = Semaphore::new(max_bytes.min(Semaphore::MAX_PERMITS));
        Self {
            requests: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            short: AtomicUsize::new(0),
            arriving: Arc::new(arriving),
        }
    }
}

impl Place {
    /// The place of an answer on names, which takes nothing of the budget while the peer leaves few of
    /// them unread.
    fn of_short_answer(server: &Arc<Server>, of_peer: &Arc<Usage>) -> Option<Self> {
        let mut place = Self {
            server: Arc::clone(server),
            of_peer: Arc::clone(of_peer),
            bytes: 0,
            is_short: true,
        };
        place.take(SHORT_ANSWER).then_some(place)
    }

    fn take_short(&mut self, bytes: usize) -> bool {
        let held = self.of_peer.short.fetch_add(bytes, Ordering::AcqRel);
        let fits = held + bytes <= SHORT_ANSWERS;
        if fits {
            self.bytes += bytes;
        } else {
            self.of_peer.short.fetch_sub(bytes, Ordering::AcqRel);
        }
        fits
    }

    /// Takes room for a payload; `false`, and nothing taken, if there is none.
    fn take(&mut self, payload: usize) -> bool {
        if self.is_short {
            return self.take_short(payload);
        }
        let bytes = weight(payload);
        let held = self.server.total.bytes.fetch_add(bytes, Ordering::AcqRel);
        let of_peer = self.of_peer.bytes.fetch_add(bytes, Ordering::AcqRel);
        let max = self.server.max_bytes;
        let fits = bytes == 0 || held + bytes <= max && of_peer + bytes <= share(max);
        if fits {
            self.bytes += bytes;
        } else {
            self.server.total.bytes.fetch_sub(bytes, Ordering::AcqRel);
            self.of_peer.bytes.fetch_sub(bytes, Ordering::AcqRel);
        }
        fits
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.is_short {
            self.of_peer.short.fetch_sub(self.bytes, Ordering::AcqRel);
            return;
        }
        let total = &self.server.total;
        total.bytes.fetch_sub(self.bytes, Ordering::AcqRel);
        self.of_peer.bytes.fetch_sub(self.bytes, Ordering::AcqRel);
        self.of_peer.requests.fetch_sub(1, Ordering::AcqRel);
        if total.requests.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.server.idle.notify_waiters();
        }
    }
}

/// What a payload takes of the budget of bytes: a small one nothing, so that short messages go on
/// while slow readers hold all of it. The budget of requests bounds those.
fn weight(payload: usize) -> usize {
    const SMALL: usize = 4 * 1024;
    if payload <= SMALL { 0 } else { payload }
}

/// What one peer may use of a budget.
fn share(budget: usize) -> usize {
    (budget - budget / 4).max(1)
}

impl Responder {
    pub(crate) fn answer(mut self, outcome: Result<Vec<u8>, RemoteError>) {
        self.send(outcome);
    }

    fn send(&mut self, outcome: Result<Vec<u8>, RemoteError>) {
        let Some(permit) = self.permit.take() else {
            return;
        };
        let mut place = self.place.take();
        let len = outcome.as_ref().map_or(0, Vec::len);
        // That of a short answer has been taken.
        let fits = |place: &mut Place| place.is_short || place.take(len);
        let outcome = if place.as_mut().is_none_or(fits) {
            outcome
        } else {
            let message = "too many replies wait to be read";
            Err(RemoteError::new(ErrorCode::TooLarge, message))
        };
        permit.send(Answer {
            id: self.id,
            outcome,
            _place: place,
        });
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        if self.permit.is_some() {
            let message = "the handler gave no answer";
            self.send(Err(RemoteError::new(ErrorCode::HandlerFailed, message)));
        }
    }
}

/// Serves one stream until the remote has closed its side and every reply has left, or it fails.
pub(crate) async fn serve(
    server: Arc<Server>,
    remote: Remote,
    stream: impl AsyncRead + AsyncWrite + Unpin,
) {
    let (reader, writer) = stream.split();
    let (replies, mut queue) = mpsc::channel(MAX_PIPELINED);
    let peer = remote.peer;
    let usage = server.usage_of(peer);
    let budgets = [&server.total, &*usage].map(|usage| Arc::clone(&usage.arriving));
    let frames = FrameReader::new(reader, budgets.into());
    let ended = {
        let reading = std::pin::pin!(read(&server, remote, &usage, frames, replies));
        let writing = std::pin::pin!(write(FrameWriter::new(writer, FRAME_DEADLINE), &mut queue));
        match select(reading, writing).await {
            Either::Left((Ok(()), writing)) => writing.await,
            Either::Left((Err(error), writing)) => {
                // What was asked before the fault is still answered.
                let _ = writing.await;
                Err(error)
            }
            Either::Right((result, _)) => result,
        }
    };
    // What handlers still answer gives its places back at once: nobody will read it.
    queue.close();
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "an RPC stream has failed");
    }
    while queue.recv().await.is_some() {}
}

async fn read<R: AsyncRead + Unpin>(
    server: &Arc<Server>,
    remote: Remote,
    usage: &Arc<Usage>,
    mut frames: FrameReader<R>,
    replies: mpsc::Sender<Answer>,
) -> io::Result<()> {
    let mut patience = FRAME_DEADLINE;
    loop {
        let Ok(permit) = replies.clone().reserve_owned().await else {
            return Ok(());
        };
        let refuse = |permit: OwnedPermit<Answer>, id, code, error: &dyn Error| {
            server.metrics.requests_refused.add(1);
            permit.send(Answer {
                id,
                outcome: Err(RemoteError::new(code, error.to_string())),
                _place: None,
            });
        };
        let frame = match frames.next(wire::MAX_FRAME, patience, FRAME_DEADLINE).await {
            Ok(Some(frame)) => frame,
            Ok(None) => return Ok(()),
            Err(FrameError::NoRoom { len, head }) => {
                let id = wire::salvage_id(&head).unwrap_or_default();
                refuse(
                    permit,
                    id,
                    ErrorCode::Busy,
                    &FrameError::NoRoom { len, head },
                );
                continue;
            }
            Err(error @ FrameError::TooLarge { .. }) => {
                refuse(permit, 0, ErrorCode::TooLarge, &error);
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        match Request::decode(frame) {
            Ok(request) => dispatch(server, remote, usage, request, permit),
            Err(error) => {
                let code = match error {
                    DecodeError::TooLarge { .. } => ErrorCode::TooLarge,
                    _ => ErrorCode::BadRequest,
                };
                let id = wire::salvage_id(frame).unwrap_or_default();
                refuse(permit, id, code, &error);
                // Who sends what is no request is not listened to any further.
                return Ok(());
            }
        }
        // A stream that has carried a request may rest before the next one.
        patience = server.rest;
    }
}

/// Hands a request to its handler, or answers why not.
fn dispatch(
    server: &Arc<Server>,
    remote: Remote,
    usage: &Arc<Usage>,
    request: Request,
    permit: OwnedPermit<Answer>,
) {
    let mut responder = Responder {
        id: request.id,
        place: None,
        permit: Some(permit),
    };
    match request.service.as_str() {
        wire::SERVES => return server.on_serves(&request.payload, responder),
        wire::REGISTRY => return responder.answer(server.on_batch(remote, &request.payload)),
        wire::NAMES => return server.on_names(remote, usage, &request.payload, responder),
        _ => {}
    }
    let refuse = |responder: Responder, code, message: &str| {
        server.metrics.requests_refused.add(1);
        responder.answer(Err(RemoteError::new(code, message)));
    };
    if server.stopping.load(Ordering::Relaxed) {
        return refuse(
            responder,
            ErrorCode::ShuttingDown,
            "this node is shutting down",
        );
    }
    let name = request.service;
    let Some(route) = server.route(&name) else {
        return refuse(responder, ErrorCode::UnknownService, NOT_SERVED);
    };
    responder.place = server.place(usage, request.payload.len());
    if responder.place.is_none() {
        return refuse(responder, ErrorCode::Busy, "too many requests are open");
    }
    let inbound = Inbound {
        from: remote.peer,
        payload: request.payload,
        responder,
    };
    match route.send(inbound) {
        Ok(()) => server.metrics.requests_received.add(1),
        Err(TrySendError::Full(inbound)) => {
            let message = "the handler's queue is full";
            refuse(inbound.responder, ErrorCode::Busy, message);
        }
        Err(TrySendError::Closed(inbound)) => {
            refuse(inbound.responder, ErrorCode::UnknownService, NOT_SERVED);
        }
    }
}

/// Writes replies as they come, those that wait together in one go.
async fn write<W: AsyncWrite + Unpin>(
    mut frames: FrameWriter<W>,
    queue: &mut mpsc::Receiver<Answer>,
) -> io::Result<()> {
    let mut batch = Vec::new();
    while queue.recv_many(&mut batch, WRITE_BATCH).await > 0 {
        for answer in &batch {
            let reply = ReplyRef {
                id: answer.id,
                outcome: answer.outcome.as_deref(),
            };
            frames.add(|content| reply.append_to(content)).await?;
        }
        frames.flush().await?;
        // Gives the places back.
        batch.clear();
    }
    frames.close().await
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
    use tokio_util::compat::TokioAsyncReadCompatExt;

    use super::*;
    use crate::proto::frame::append_frame;
    use crate::proto::wire::{Reply, RequestRef};

    /// A client's end of a stream that is served.
    struct Client {
        stream: DuplexStream,
        server: Arc<Server>,
    }

    impl Client {
        fn new(limits: &Limits, name: &str) -> (Self, mpsc::Receiver<Inbound>) {
            let (near, far) = duplex(1 << 20);
            let server = Server::new(limits, Arc::default());
            let (handler, requests) = mpsc::channel(100);
            server.serve(name.parse().unwrap(), handler);
            let remote = Remote {
                peer: PeerId::random(),
                host: None,
            };
            tokio::spawn(serve(Arc::clone(&server), remote, far.compat()));
            let stream = near;
            (Self { stream, server }, requests)
        }

        async fn ask(&mut self, id: u64, service: &str, payload: &[u8]) {
            let (mut frame, mut framed) = (Vec::new(), Vec::new());
            let request = RequestRef {
                id,
                service,
                payload,
            };
            request.append_to(&mut frame).unwrap();
            append_frame(&mut framed, &frame);
            self.stream.write_all(&framed).await.unwrap();
        }

        /// The next reply; all of these tests have short ones.
        async fn reply(&mut self) -> Reply {
            let len = self.stream.read_u8().await.unwrap();
            let mut frame = vec![0; len.into()];
            self.stream.read_exact(&mut frame).await.unwrap();
            Reply::decode(&frame).unwrap()
        }

        async fn is_closed(&mut self) -> bool {
            self.stream.read(&mut [0]).await.unwrap() == 0
        }
    }

    fn code(reply: &Reply) -> &ErrorCode {
        &reply.outcome.as_ref().unwrap_err().code
    }

    #[tokio::test]
    async fn one_stream_carries_many_requests_and_replies_in_any_order() {
        let (mut client, mut requests) = Client::new(&Limits::default(), "client1");
        for id in 1..=20 {
            client.ask(id, "client1", &[id as u8]).await;
        }
        let mut held = Vec::new();
        for _ in 0..20 {
            held.push(requests.recv().await.unwrap());
        }
        for inbound in held.into_iter().rev() {
            inbound.responder.answer(Ok(inbound.payload));
        }
        for id in (1..=20).rev() {
            let outcome = Ok(vec![id as u8]);
            assert_eq!(client.reply().await, Reply { id, outcome });
        }
        client.server.idle().await;
    }

    #[tokio::test]
    async fn each_refusal_has_its_code_and_the_id_it_is_for() {
        let limits = Limits {
            inbound_requests: 1,
            ..Limits::default()
        };
        let (mut client, mut requests) = Client::new(&limits, "client1");
        client.ask(1, "unknown", b"").await;
        assert_eq!(code(&client.reply().await), &ErrorCode::UnknownService);
        client.ask(2, "client1", b"holds the only place").await;
        let held = requests.recv().await.unwrap();
        client.ask(3, "client1", b"").await;
        let busy = client.reply().await;
        assert_eq!((busy.id, code(&busy)), (3, &ErrorCode::Busy));
        client.ask(4, wire::SERVES, b"client1").await;
        let outcome = Ok(vec![1]);
        assert_eq!(client.reply().await, Reply { id: 4, outcome });
        drop(held);
        let failed = client.reply().await;
        assert_eq!((failed.id, code(&failed)), (2, &ErrorCode::HandlerFailed));
        client.server.stop();
        client.ask(5, "client1", b"").await;
        assert_eq!(code(&client.reply().await), &ErrorCode::ShuttingDown);
        client.ask(6, wire::SERVES, b"client1").await;
        let outcome = Ok(vec![0]);
        assert_eq!(client.reply().await, Reply { id: 6, outcome });
    }

    #[tokio::test]
    async fn what_was_asked_before_a_fault_is_answered_and_then_the_stream_ends() {
        let (mut client, mut requests) = Client::new(&Limits::default(), "client1");
        client.ask(1, "client1", b"good").await;
        let held = requests.recv().await.unwrap();
        client.stream.write_all(&[1, 0xff]).await.unwrap();
        let refused = client.reply().await;
        assert_eq!((refused.id, code(&refused)), (0, &ErrorCode::BadRequest));
        held.responder.answer(Ok(b"still".to_vec()));
        assert_eq!(client.reply().await.outcome, Ok(b"still".to_vec()));
        assert!(client.is_closed().await);
    }

    #[tokio::test]
    async fn a_client_that_is_gone_gives_its_places_back() {
        let (mut client, mut requests) = Client::new(&Limits::default(), "client1");
        client.ask(1, "client1", &[0; 10_000]).await;
        let held = requests.recv().await.unwrap();
        let server = Arc::clone(&client.server);
        assert_eq!(server.open_requests(), 1);
        drop(client);
        held.responder.answer(Ok(vec![0; 10_000]));
        server.idle().await;
        assert_eq!(server.total.bytes.load(Ordering::Acquire), 0);
    }

    #[tokio::test]
    async fn one_peer_does_not_get_every_place() {
        let limits = Limits {
            inbound_requests: 8,
            ..Limits::default()
        };
        let (mut client, mut requests) = Client::new(&limits, "client1");
        for id in 1..=7 {
            client.ask(id, "client1", b"").await;
        }
        let mut held = Vec::new();
        for _ in 0..6 {
            held.push(requests.recv().await.unwrap());
        }
        let refused = client.reply().await;
        assert_eq!((refused.id, code(&refused)), (7, &ErrorCode::Busy));
    }

    #[tokio::test]
    async fn large_replies_beyond_the_budget_are_refused_and_small_ones_go_on() {
        let limits = Limits {
            inbound_bytes: 100_000,
            ..Limits::default()
        };
        let (mut client, mut requests) = Client::new(&limits, "client1");
        for id in [1, 2] {
            client.ask(id, "client1", b"").await;
        }
        let large = requests.recv().await.unwrap();
        let small = requests.recv().await.unwrap();
        large.responder.answer(Ok(vec![0; 100_001]));
        let refused = client.reply().await;
        assert_eq!((refused.id, code(&refused)), (1, &ErrorCode::TooLarge));
        small.responder.answer(Ok(b"small".to_vec()));
        assert_eq!(client.reply().await.outcome, Ok(b"small".to_vec()));
    }
}
