//! Serves the requests of others, each stream in a task of its own.
//!
//! A request takes its part of the [budget](super::budget) before it goes to its handler. Beyond the
//! budget the answer is `busy` or, when a reply finds no room after its handler has run, `too-large`.
//! A stream that has [`MAX_PIPELINED`](crate::limits::MAX_PIPELINED) requests open is not read further.

use std::collections::HashMap;
use std::error::Error;
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use futures::future::{Either, select};
use futures::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use libp2p::PeerId;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::consume_budget;

use super::budget::Budget;
use super::replies::{Replies, Responder};
use crate::limits::{FRAME_DEADLINE, Limits, MAX_SERVED_STREAMS};
use crate::metrics::Metrics;
use crate::name::ServiceName;
use crate::proto::frame::{FrameError, FrameReader};
use crate::proto::wire::{
    self, Batch, Change, ErrorCode, MAX_WITHDRAWN, NamesRequest, RemoteError, Request, RequestRef,
    Withdrawn,
};
use crate::store::{BatchRefused, NotTaken, Registry};

/// What is said to whoever calls a name that nobody serves here.
const NOT_SERVED: &str = "not served here";

/// What is said to whoever asks and does not read.
const UNREAD: &str = "too many answers wait to be read";

/// What serves the requests of others, shared by all their streams.
#[derive(Debug)]
pub(crate) struct Server {
    services: RwLock<HashMap<ServiceName, mpsc::Sender<Inbound>>>,
    /// How often they have changed.
    changes: AtomicU64,
    budget: Arc<Budget>,
    /// How long a stream may rest between two requests.
    rest: Duration,
    /// One permit for each stream that is served.
    streams: Arc<Semaphore>,
    stopping: AtomicBool,
    /// The tables of a grape.
    registry: Option<Arc<Registry>>,
    /// Where requests for this grape's workers go.
    carrier: RwLock<Option<mpsc::Sender<Carried>>>,
    metrics: Arc<Metrics>,
}

/// Where requests for a service go.
#[derive(Debug)]
enum Route {
    Handler(mpsc::Sender<Inbound>),
    Carrier(ServiceName, mpsc::Sender<Carried>),
}

/// The handler of a stream's last request, which most often is that of the next one too.
#[derive(Debug)]
struct LastRoute {
    service: String,
    /// Does not keep a service from ending.
    handler: mpsc::WeakSender<Inbound>,
    /// How often the services had changed before.
    changes: u64,
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

/// Another node, and the host its connection comes from: none in this process, the unspecified one where it
/// was dialled by a name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Remote {
    pub(crate) peer: PeerId,
    pub(crate) host: Option<IpAddr>,
}

/// What another node asks of a worker of this grape's.
#[derive(Debug)]
pub(crate) enum Carried {
    /// Whether a live one serves the name.
    Asks(ServiceName, ServesQuestion),
    /// To serve a request for the name.
    Call(ServiceName, Inbound),
    /// To take back workers that are gone.
    Withdraw(Withdrawal),
}

/// Workers of this grape's that another one asks to take back. Dropping it answers with an error.
#[derive(Debug)]
pub(crate) struct Withdrawal {
    pub(crate) workers: Vec<Change>,
    /// Where the other grape is.
    pub(crate) host: Option<IpAddr>,
    responder: Responder,
}

impl Withdrawal {
    pub(crate) fn answer(self, withdrawn: Withdrawn) {
        self.responder.answer(Ok(withdrawn.encode()));
    }
}

/// Whether a name is served. Dropping it says that nobody knows.
#[derive(Debug)]
pub(crate) struct ServesQuestion(Responder);

impl ServesQuestion {
    pub(crate) fn answer(self, serves: bool) {
        self.0.answer(Ok(vec![u8::from(serves)]));
    }
}

/// A request on its way to a handler.
#[derive(Debug)]
pub(crate) struct Inbound {
    pub(crate) payload: Vec<u8>,
    pub(crate) responder: Responder,
}

impl Server {
    /// The server of a node; that of a grape has its tables.
    pub(crate) fn new(
        limits: &Limits,
        registry: Option<Arc<Registry>>,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Arc::new(Self {
            services: RwLock::default(),
            changes: AtomicU64::new(0),
            budget: Arc::new(Budget::new(limits)),
            rest: limits.idle,
            streams: Arc::new(Semaphore::new(MAX_SERVED_STREAMS)),
            stopping: AtomicBool::new(false),
            registry,
            carrier: RwLock::default(),
            metrics,
        })
    }

    /// The tables, if this node is a grape.
    pub(crate) fn registry(&self) -> Option<&Arc<Registry>> {
        self.registry.as_ref()
    }

    /// Requests for this grape's workers go to this channel from now on, unless they go to another
    /// one that somebody receives from; says whether they do.
    pub(crate) fn carry(&self, carrier: mpsc::Sender<Carried>) -> bool {
        let mut current = self.carrier.write().unwrap_or_else(PoisonError::into_inner);
        let is_free = current.as_ref().is_none_or(mpsc::Sender::is_closed);
        if is_free {
            *current = Some(carrier);
        }
        is_free
    }

    /// Requests for the name go to this channel from now on.
    pub(crate) fn serve(&self, name: ServiceName, handler: mpsc::Sender<Inbound>) {
        let mut services = self
            .services
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        services.insert(name, handler);
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// The name is not served any more.
    pub(crate) fn unserve(&self, name: &ServiceName) {
        let mut services = self
            .services
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        services.remove(name);
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// Refuses new requests from now on.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// How many requests are open.
    pub(crate) fn open_requests(&self) -> usize {
        self.budget.open_requests()
    }

    /// Returns when no request is open.
    pub(crate) async fn idle(&self) {
        self.budget.idle().await;
    }

    /// A place for one more stream, if there is one.
    pub(crate) fn stream_place(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.streams).try_acquire_owned().ok()
    }

    pub(crate) fn handler(&self, service: &str) -> Option<mpsc::Sender<Inbound>> {
        let services = self.services.read().unwrap_or_else(PoisonError::into_inner);
        services.get(service).cloned()
    }

    /// Where requests for a service go, if anywhere; `last` remembers it.
    fn route_after(&self, last: &mut Option<LastRoute>, service: &str) -> Option<Route> {
        // Read first, so that a change that comes meanwhile makes the route old.
        let changes = self.changes.load(Ordering::Acquire);
        let is_still_so = |last: &&LastRoute| last.changes == changes && last.service == service;
        let handler = last.as_ref().filter(is_still_so);
        if let Some(handler) = handler.and_then(|last| last.handler.upgrade()) {
            return Some(Route::Handler(handler));
        }
        let route = self.route(service)?;
        // Whether this grape has a worker can change without a change of the services.
        if let Route::Handler(handler) = &route {
            *last = Some(LastRoute {
                service: service.to_owned(),
                handler: handler.downgrade(),
                changes,
            });
        }
        Some(route)
    }

    fn route(&self, service: &str) -> Option<Route> {
        if let Some(handler) = self.handler(service) {
            return Some(Route::Handler(handler));
        }
        let name = ServiceName::from_wire(service).ok()?;
        let carrier = self.carrier_for(&name)?.clone();
        Some(Route::Carrier(name, carrier))
    }

    /// Answers whether a name is served here, by this node or by a worker of this grape's.
    fn on_serves(&self, payload: &[u8], responder: Responder) {
        let name = std::str::from_utf8(payload).ok();
        let Some(name) = name.and_then(|text| ServiceName::from_wire(text).ok()) else {
            let message = "the payload is not a name";
            return responder.answer(Err(RemoteError::new(ErrorCode::BadRequest, message)));
        };
        if self.stopping.load(Ordering::Relaxed) {
            return ServesQuestion(responder).answer(false);
        }
        if self.handler(name.as_ref()).is_some() {
            return ServesQuestion(responder).answer(true);
        }
        match self.carrier_for(&name) {
            // A full queue drops the question, and with it answers that nobody knows.
            Some(carrier) => drop(carrier.try_send(Carried::Asks(name, ServesQuestion(responder)))),
            None => ServesQuestion(responder).answer(false),
        }
    }

    /// Where requests for a name go that a worker of this grape's serves.
    fn carrier_for(&self, name: &ServiceName) -> Option<mpsc::Sender<Carried>> {
        let carrier = self.carrier.read().unwrap_or_else(PoisonError::into_inner);
        let (carrier, registry) = (carrier.as_ref()?, self.registry.as_ref()?);
        let has_own = registry.workers().has_own(&name.digest(), Instant::now());
        has_own.then(|| carrier.clone())
    }

    /// Answers at once what a grape alone serves, unless the answer would wait to be read.
    fn answer_short(
        &self,
        mut responder: Responder,
        answer: impl FnOnce(&Registry) -> Result<Vec<u8>, RemoteError>,
    ) {
        let answer = match self.registry.as_ref() {
            None => Err(RemoteError::new(ErrorCode::UnknownService, NOT_SERVED)),
            Some(registry) if responder.admit_short() => answer(registry),
            Some(_) => Err(RemoteError::new(ErrorCode::Busy, UNREAD)),
        };
        responder.answer(answer);
    }

    /// Takes what another grape tells of its workers.
    fn on_batch(&self, remote: Remote, payload: &[u8], responder: Responder) {
        let refuse = |code, error: &dyn Error| RemoteError::new(code, error.to_string());
        self.answer_short(responder, |registry| {
            let batch = Batch::decode(payload);
            let batch = batch.map_err(|error| RemoteError::from(&error))?;
            let reply = registry.on_batch(remote.peer, remote.host, &batch, Instant::now());
            let reply = reply.map_err(|error| match error {
                BatchRefused::TooFast => refuse(ErrorCode::Busy, &error),
                BatchRefused::Repeated => refuse(ErrorCode::BadRequest, &error),
            })?;
            let encoded = reply.encode();
            encoded.map_err(|error| refuse(ErrorCode::HandlerFailed, &error))
        });
    }

    /// Takes back workers of this grape's for another grape, which was told that they are gone.
    fn on_withdraw(&self, remote: Remote, payload: &[u8], mut responder: Responder) {
        let refuse = |code, message: &str| Err(RemoteError::new(code, message));
        if self.registry.is_none() {
            return responder.answer(refuse(ErrorCode::UnknownService, NOT_SERVED));
        }
        let is_withdrawal = |batch: &Batch| {
            batch.changes.len() <= MAX_WITHDRAWN
                && batch.changes.iter().all(|change| change.lease.is_none())
        };
        let Some(batch) = Batch::decode(payload).ok().filter(is_withdrawal) else {
            return responder.answer(refuse(ErrorCode::BadRequest, "no withdrawal of workers"));
        };
        if !responder.admit(payload.len()) {
            return responder.answer(refuse(ErrorCode::Busy, "too many requests are open"));
        }
        let carrier = self.carrier.read().unwrap_or_else(PoisonError::into_inner);
        let Some(carrier) = carrier.as_ref() else {
            // It takes no workers.
            return responder.answer(Ok(Withdrawn::Unknown.encode()));
        };
        let workers = batch.changes.iter();
        let withdrawal = Withdrawal {
            workers: workers
                .map(|change| change.seen_from(remote.host))
                .collect(),
            host: remote.host,
            responder,
        };
        // A full queue drops it.
        drop(carrier.try_send(Carried::Withdraw(withdrawal)));
    }

    /// Keeps, takes back and finds names for another node.
    fn on_names(&self, remote: Remote, payload: &[u8], responder: Responder) {
        self.answer_short(responder, |registry| {
            self.answer_on_names(registry, remote, payload)
        });
    }

    fn answer_on_names(
        &self,
        registry: &Registry,
        remote: Remote,
        payload: &[u8],
    ) -> Result<Vec<u8>, RemoteError> {
        let request = NamesRequest::decode(payload).map_err(|error| RemoteError::from(&error))?;
        let reply = registry.on_names(remote.peer, remote.host, &request, Instant::now());
        let reply = reply.map_err(|error| match error {
            NotTaken::TooFast => RemoteError::new(ErrorCode::Busy, error.to_string()),
            error => RemoteError::new(ErrorCode::BadRequest, error.to_string()),
        })?;
        let kept = request.announce.len() - reply.refused.len();
        tracing::debug!(
            peer = %remote.peer,
            kept,
            refused = reply.refused.len(),
            withdrawn = request.withdraw.len(),
            sought = request.find.len(),
            "a peer tells and asks of names"
        );
        self.metrics.names_told.add(kept as u64);
        self.metrics.names_sought.add(request.find.len() as u64);
        let encoded = reply.encode();
        encoded.map_err(|error| RemoteError::new(ErrorCode::HandlerFailed, error.to_string()))
    }
}

/// Serves one stream until the remote has closed its side and every reply has left, or it fails.
pub(crate) async fn serve(
    server: Arc<Server>,
    remote: Remote,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) {
    let (reader, writer) = stream.split();
    let peer = remote.peer;
    let of_peer = server.budget.usage_of(peer);
    let frames = FrameReader::new(reader, server.budget.arriving(&of_peer));
    let replies = Replies::new(peer, Arc::clone(&server.budget), of_peer);
    let _closing = Closing(&replies);
    let ended = {
        let reading = std::pin::pin!(read(&server, remote, frames, &replies));
        let writing = std::pin::pin!(replies.write(writer));
        match select(reading, writing).await {
            Either::Left((result, writing)) => {
                replies.drain();
                // What was asked before a fault is still answered.
                let written = writing.await;
                result.and(written)
            }
            Either::Right((result, _)) => result,
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "an RPC stream has failed");
    }
}

/// Closes a stream's replies with its task, however that ends.
struct Closing<'a>(&'a Replies);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

async fn read<R: AsyncRead + Unpin>(
    server: &Arc<Server>,
    remote: Remote,
    mut frames: FrameReader<R>,
    replies: &Arc<Replies>,
) -> io::Result<()> {
    let refuse = |id, code, error: &dyn Error| {
        server.metrics.requests_refused.add(1);
        let (responder, has_room) = replies.expect(id);
        responder.answer(Err(RemoteError::new(code, error.to_string())));
        has_room
    };
    let mut last_route = None;
    // The first request of a stream is on its way already.
    let mut patience = FRAME_DEADLINE;
    loop {
        replies.set_more(frames.has_more(wire::MAX_FRAME));
        let frame = match frames.next(wire::MAX_FRAME, patience, FRAME_DEADLINE).await {
            Ok(Some(frame)) => frame,
            Ok(None) => return Ok(()),
            Err(FrameError::NoRoom { len, head }) => {
                let id = wire::salvage_id(&head).unwrap_or_default();
                let error = FrameError::NoRoom { len, head };
                if !refuse(id, ErrorCode::Busy, &error) {
                    replies.room().await;
                }
                continue;
            }
            Err(error @ FrameError::TooLarge { .. }) => {
                refuse(0, ErrorCode::TooLarge, &error);
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        let decoded;
        let request = if let Some(request) = RequestRef::peek(frame) {
            request
        } else {
            decoded = match Request::decode_any(frame) {
                Ok(request) => request,
                Err(error) => {
                    let id = wire::salvage_id(frame).unwrap_or_default();
                    refuse(id, ErrorCode::of(&error), &error);
                    // Who sends what is no request is not listened to any further.
                    return Ok(());
                }
            };
            decoded.as_ref()
        };
        let (responder, has_room) = replies.expect(request.id);
        dispatch(server, remote, &mut last_route, request, responder);
        consume_budget().await;
        if !has_room {
            replies.room().await;
        }
        // A stream that has carried a request may rest before the next one.
        patience = server.rest;
    }
}

/// Hands a request to its handler, or answers why not.
fn dispatch(
    server: &Server,
    remote: Remote,
    last_route: &mut Option<LastRoute>,
    request: RequestRef<'_>,
    mut responder: Responder,
) {
    let refuse = |responder: Responder, code, message: &str| {
        server.metrics.requests_refused.add(1);
        responder.answer(Err(RemoteError::new(code, message)));
    };
    if request.service == wire::SERVES {
        // A node that is shutting down serves nothing.
        return server.on_serves(request.payload, responder);
    }
    if server.stopping.load(Ordering::Relaxed) {
        return refuse(
            responder,
            ErrorCode::ShuttingDown,
            "this node is shutting down",
        );
    }
    match request.service {
        wire::REGISTRY => return server.on_batch(remote, request.payload, responder),
        wire::WITHDRAW => return server.on_withdraw(remote, request.payload, responder),
        wire::NAMES => return server.on_names(remote, request.payload, responder),
        _ => {}
    }
    let Some(route) = server.route_after(last_route, request.service) else {
        return refuse(responder, ErrorCode::UnknownService, NOT_SERVED);
    };
    if !responder.admit(request.payload.len()) {
        return refuse(responder, ErrorCode::Busy, "too many requests are open");
    }
    let inbound = Inbound {
        payload: request.payload.to_vec(),
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

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
    use tokio_util::compat::TokioAsyncReadCompatExt;

    use super::*;
    use crate::limits::{Bounds, LEASE};
    use crate::proto::frame::append_frame_with;
    use crate::proto::wire::Reply;

    /// A client's end of a stream that is served.
    struct Client {
        stream: DuplexStream,
        server: Arc<Server>,
    }

    impl Client {
        fn new(limits: &Limits, name: &str) -> (Self, mpsc::Receiver<Inbound>) {
            Self::with(limits, None, name)
        }

        fn with(
            limits: &Limits,
            registry: Option<Arc<Registry>>,
            name: &str,
        ) -> (Self, mpsc::Receiver<Inbound>) {
            let (near, far) = duplex(1 << 20);
            let server = Server::new(limits, registry, Arc::default());
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
            let mut frame = Vec::new();
            let request = RequestRef {
                id,
                service,
                payload,
            };
            append_frame_with(&mut frame, |frame| request.append_to(frame)).unwrap();
            self.stream.write_all(&frame).await.unwrap();
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
    async fn answers_on_workers_that_nobody_reads_hold_their_part_of_the_budget() {
        let limits = Limits {
            inbound_bytes: 100_000,
            ..Limits::default()
        };
        let now = Instant::now();
        let registry = Registry::new(PeerId::random(), Bounds::default(), LEASE, now);
        let find: Vec<_> = (0..16).map(|n| [n; 32]).collect();
        for service in &find {
            for port in 1..=100 {
                let at = ([127, 0, 0, 1], port).into();
                let announced = registry.workers().announce(service, at, LEASE, now);
                announced.unwrap();
            }
        }
        let (mut client, mut requests) = Client::with(&limits, Some(registry), "client1");
        let changes = Vec::new();
        let batch = Batch { changes, find }.encode().unwrap();
        let asked = 200;
        for id in 1..=asked {
            client.ask(id, wire::REGISTRY, &batch).await;
        }
        // It has handled all of them once this one has arrived.
        client.ask(asked + 1, "client1", b"").await;
        requests.recv().await.unwrap();
        let mut replies = FrameReader::new(client.stream.compat(), Vec::new());
        let mut answered = 0;
        for _ in 1..=asked {
            let frame = replies.next(wire::MAX_FRAME, FRAME_DEADLINE, FRAME_DEADLINE);
            let reply = Reply::decode(frame.await.unwrap().unwrap()).unwrap();
            answered += usize::from(reply.outcome.is_ok());
        }
        // The stream holds 93 of them, the budget eleven.
        assert!((1..=110).contains(&answered), "{answered}");
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
        assert_eq!(server.budget.held_bytes(), 0);
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
