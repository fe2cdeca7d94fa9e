//! Requests and replies over libp2p's request-response behaviour, one stream for each.
//!
//! * Outbound: a caller learns whether its request can have run. The codec notes when the first
//!   byte is about to be written; what fails before that was never sent.
//! * Inbound: a request takes a place in a budget of count and bytes, held until its handler has
//!   answered *and* its reply has left or the stream has failed, so that neither slow handlers nor
//!   slow readers make memory grow. Beyond the budget the answer is `busy`, or, when a reply finds no
//!   room after its handler has run, `too-large`. One peer gets three quarters of it at most.
//! * Requests that are still arriving have a budget of as many bytes, so that frames that never end
//!   neither make memory grow nor take the places of those that do.
//! * The names served are known here, so that `grapevine/serves` is answered at once.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::io::{AsyncRead, AsyncWrite};
use libp2p::request_response::{
    self, InboundRequestId, Message, OutboundFailure, OutboundRequestId, ResponseChannel,
};
use libp2p::{PeerId, StreamProtocol};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::timeout;

use crate::limits::{FRAME_DEADLINE, Limits};
use crate::name::ServiceName;
use crate::proto::frame::{FrameError, read_frame, read_frame_if, write_frame};
use crate::proto::wire::{self, DecodeError, ErrorCode, RemoteError, Reply, RequestRef};

/// The request-response behaviour of the Swarm.
pub(crate) type Behaviour = request_response::Behaviour<RpcCodec>;

type Event = request_response::Event<Call, Reply>;

/// A handler's answer to the request with that ticket.
pub(crate) type Answer = (Ticket, Result<Vec<u8>, RemoteError>);

/// Names an inbound request between the loop and its handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Ticket(u64);

/// A request on its way to a handler.
#[derive(Debug)]
pub(crate) struct Inbound {
    pub(crate) from: PeerId,
    pub(crate) payload: Vec<u8>,
    pub(crate) ticket: Ticket,
    /// Has room for one answer of each request that is open.
    pub(crate) answers: mpsc::Sender<Answer>,
}

/// A caller's request to one provider.
#[derive(Debug)]
pub(crate) struct Outbound {
    pub(crate) provider: PeerId,
    pub(crate) service: String,
    pub(crate) payload: Arc<[u8]>,
    pub(crate) outcome: oneshot::Sender<Outcome>,
    /// Held while the request is open.
    pub(crate) slot: OwnedSemaphorePermit,
}

/// What became of a caller's request.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The provider answered.
    Answered(Result<Vec<u8>, RemoteError>),
    /// It was never sent.
    NotSent(String),
    /// It was sent, and may have run.
    Broken(String),
}

/// What the driver must know of an event.
#[derive(Debug)]
pub(crate) enum Learned {
    /// A peer said whether it serves a name; `None`: it did not answer.
    Serves(PeerId, ServiceName, Option<bool>),
    /// A request went to its handler.
    Dispatched,
    /// A request was answered with an error.
    Refused,
}

/// All requests of a node.
#[derive(Debug)]
pub(crate) struct Rpc {
    next_id: u64,
    outbound: HashMap<OutboundRequestId, Pending>,
    services: HashMap<ServiceName, mpsc::Sender<Inbound>>,
    open: HashMap<Ticket, Open>,
    streams: HashMap<InboundRequestId, Ticket>,
    peers: HashMap<PeerId, Usage>,
    bytes: usize,
    max_requests: usize,
    max_bytes: usize,
    answers: mpsc::Sender<Answer>,
    stopping: bool,
}

#[derive(Debug)]
enum Pending {
    Caller {
        outcome: oneshot::Sender<Outcome>,
        sent: Arc<AtomicBool>,
        _slot: OwnedSemaphorePermit,
    },
    Serves(PeerId, ServiceName),
}

/// What a peer has of the budget.
#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    requests: usize,
    bytes: usize,
}

/// An inbound request that holds a place in the budget.
#[derive(Debug)]
struct Open {
    peer: PeerId,
    id: u64,
    bytes: usize,
    /// Until the handler has answered.
    channel: Option<ResponseChannel<Reply>>,
    /// Until the reply has left or the stream has failed.
    stream: Option<InboundRequestId>,
}

impl Rpc {
    /// The receiver gets the handlers' answers, each to be handed to
    /// [`on_answer`](Self::on_answer).
    pub(crate) fn new(limits: &Limits) -> (Self, mpsc::Receiver<Answer>) {
        let (answers, receiver) = mpsc::channel(limits.inbound_requests.max(1));
        let rpc = Self {
            next_id: 0,
            outbound: HashMap::new(),
            services: HashMap::new(),
            open: HashMap::new(),
            streams: HashMap::new(),
            peers: HashMap::new(),
            bytes: 0,
            max_requests: limits.inbound_requests,
            max_bytes: limits.inbound_bytes,
            answers,
            stopping: false,
        };
        (rpc, receiver)
    }

    /// Requests for the name go to this channel from now on.
    pub(crate) fn serve(&mut self, name: ServiceName, handler: mpsc::Sender<Inbound>) {
        self.services.insert(name, handler);
    }

    /// The name is not served any more.
    pub(crate) fn unserve(&mut self, name: &ServiceName) {
        self.services.remove(name);
    }

    /// Refuses new requests from now on.
    pub(crate) fn stop(&mut self) {
        self.stopping = true;
    }

    /// How many inbound requests are open.
    pub(crate) fn open_requests(&self) -> usize {
        self.open.len()
    }

    /// Sends a caller's request.
    pub(crate) fn call(&mut self, behaviour: &mut Behaviour, request: Outbound) {
        let sent = Arc::new(AtomicBool::new(false));
        let call = self.outgoing(request.service, request.payload, Arc::clone(&sent));
        let id = behaviour.send_request(&request.provider, call);
        let pending = Pending::Caller {
            outcome: request.outcome,
            sent,
            _slot: request.slot,
        };
        self.outbound.insert(id, pending);
    }

    /// Asks a peer whether it serves a name.
    pub(crate) fn ask_serves(
        &mut self,
        behaviour: &mut Behaviour,
        peer: PeerId,
        name: ServiceName,
    ) {
        let payload = name.as_ref().as_bytes().into();
        let call = self.outgoing(wire::SERVES.to_owned(), payload, Arc::default());
        let id = behaviour.send_request(&peer, call);
        self.outbound.insert(id, Pending::Serves(peer, name));
    }

    /// Asks a peer something, so that neither side takes the connection for idle.
    pub(crate) fn keep_alive(&mut self, behaviour: &mut Behaviour, peer: PeerId) {
        let payload = b"keep-alive".as_slice().into();
        let call = self.outgoing(wire::SERVES.to_owned(), payload, Arc::default());
        // Nobody waits for the answer.
        behaviour.send_request(&peer, call);
    }

    /// A handler has answered, or dropped its request.
    pub(crate) fn on_answer(&mut self, behaviour: &mut Behaviour, (ticket, outcome): Answer) {
        let Some(open) = self.open.get_mut(&ticket) else {
            return;
        };
        let Some(channel) = open.channel.take() else {
            return;
        };
        let (id, peer) = (open.id, open.peer);
        let bytes = weight(outcome.as_ref().map_or(0, Vec::len));
        let outcome = if self.has_room(&peer, bytes) {
            self.charge(ticket, peer, bytes);
            outcome
        } else {
            let message = "too many replies wait to be read";
            Err(RemoteError::new(ErrorCode::TooLarge, message))
        };
        // The stream may have failed; then its end was or will be told by an event.
        let _ = behaviour.send_response(channel, Reply { id, outcome });
        self.release_if_over(ticket);
    }

    /// Handles what the behaviour tells.
    pub(crate) fn on_event(&mut self, behaviour: &mut Behaviour, event: Event) -> Option<Learned> {
        match event {
            Event::Message { peer, message, .. } => match message {
                Message::Request {
                    request_id,
                    request,
                    channel,
                } => self.on_request(behaviour, peer, request_id, request, channel),
                Message::Response {
                    request_id,
                    response,
                } => self.on_outcome(request_id, Outcome::Answered(response.outcome)),
            },
            Event::OutboundFailure {
                request_id, error, ..
            } => {
                let outcome = self.failure(&request_id, &error);
                self.on_outcome(request_id, outcome)
            }
            Event::InboundFailure { request_id, .. } | Event::ResponseSent { request_id, .. } => {
                self.on_stream_ended(&request_id);
                None
            }
        }
    }

    fn outgoing(&mut self, service: String, payload: Arc<[u8]>, sent: Arc<AtomicBool>) -> Call {
        self.next_id += 1;
        Call::Out {
            id: self.next_id,
            service,
            payload,
            sent,
        }
    }

    fn failure(&self, id: &OutboundRequestId, error: &OutboundFailure) -> Outcome {
        let sent = match self.outbound.get(id) {
            Some(Pending::Caller { sent, .. }) => sent.load(Ordering::Acquire),
            _ => true,
        };
        match error {
            OutboundFailure::UnsupportedProtocols => {
                Outcome::NotSent("the peer does not speak Grapevine's RPC".into())
            }
            OutboundFailure::DialFailure => Outcome::NotSent("it does not answer".into()),
            OutboundFailure::Timeout => Outcome::Broken("no reply in time".into()),
            error if sent => Outcome::Broken(error.to_string()),
            error => Outcome::NotSent(error.to_string()),
        }
    }

    fn on_outcome(&mut self, id: OutboundRequestId, outcome: Outcome) -> Option<Learned> {
        match self.outbound.remove(&id)? {
            Pending::Caller {
                outcome: caller, ..
            } => {
                // A caller that went away does not want to know.
                let _ = caller.send(outcome);
                None
            }
            Pending::Serves(peer, name) => {
                let serves = match outcome {
                    Outcome::Answered(Ok(payload)) => Some(payload == [1]),
                    // Another implementation, which cannot be asked this.
                    Outcome::Answered(Err(error)) if error.code == ErrorCode::UnknownService => {
                        Some(true)
                    }
                    Outcome::Answered(Err(_)) | Outcome::NotSent(_) | Outcome::Broken(_) => None,
                };
                Some(Learned::Serves(peer, name, serves))
            }
        }
    }

    fn on_request(
        &mut self,
        behaviour: &mut Behaviour,
        peer: PeerId,
        stream: InboundRequestId,
        call: Call,
        channel: ResponseChannel<Reply>,
    ) -> Option<Learned> {
        let (id, refusal, channel) = match call {
            Call::In(request, _) if request.service == wire::SERVES => {
                let id = request.id;
                let outcome = self.serves(&request.payload);
                let _ = behaviour.send_response(channel, Reply { id, outcome });
                return None;
            }
            Call::In(request, _arriving) => {
                let id = request.id;
                match self.dispatch(peer, stream, request, channel) {
                    Ok(()) => return Some(Learned::Dispatched),
                    Err((error, channel)) => (id, error, channel),
                }
            }
            Call::Malformed { id, error } => (id, error, channel),
            // The codec never reads one.
            Call::Out { .. } => return None,
        };
        let outcome = Err(refusal);
        let _ = behaviour.send_response(channel, Reply { id, outcome });
        Some(Learned::Refused)
    }

    fn serves(&self, payload: &[u8]) -> Result<Vec<u8>, RemoteError> {
        let name = std::str::from_utf8(payload)
            .ok()
            .and_then(|text| ServiceName::from_wire(text).ok());
        match name {
            Some(name) => Ok(vec![u8::from(
                !self.stopping && self.services.contains_key(&name),
            )]),
            None => Err(RemoteError::new(
                ErrorCode::BadRequest,
                "the payload is not a name",
            )),
        }
    }

    /// Hands a request to its handler, or says why not.
    fn dispatch(
        &mut self,
        peer: PeerId,
        stream: InboundRequestId,
        request: wire::Request,
        channel: ResponseChannel<Reply>,
    ) -> Result<(), (RemoteError, ResponseChannel<Reply>)> {
        let refuse = |code, message, channel| Err((RemoteError::new(code, message), channel));
        if self.stopping {
            return refuse(
                ErrorCode::ShuttingDown,
                "this node is shutting down",
                channel,
            );
        }
        let handler = ServiceName::from_wire(&request.service)
            .ok()
            .and_then(|name| self.services.get(&name));
        let Some(handler) = handler else {
            return refuse(ErrorCode::UnknownService, "not served here", channel);
        };
        let bytes = weight(request.payload.len());
        let of_peer = self.peers.get(&peer).copied().unwrap_or_default();
        if self.open.len() >= self.max_requests
            || of_peer.requests >= share(self.max_requests)
            || !self.has_room(&peer, bytes)
        {
            return refuse(ErrorCode::Busy, "too many requests are open", channel);
        }
        self.next_id += 1;
        let ticket = Ticket(self.next_id);
        let inbound = Inbound {
            from: peer,
            payload: request.payload,
            ticket,
            answers: self.answers.clone(),
        };
        match handler.try_send(inbound) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => {
                return refuse(ErrorCode::Busy, "the handler's queue is full", channel);
            }
            Err(mpsc::error::TrySendError::Closed(_)) => {
                return refuse(ErrorCode::UnknownService, "not served any more", channel);
            }
        }
        self.peers.entry(peer).or_default().requests += 1;
        self.streams.insert(stream, ticket);
        let open = Open {
            peer,
            id: request.id,
            bytes: 0,
            channel: Some(channel),
            stream: Some(stream),
        };
        self.open.insert(ticket, open);
        self.charge(ticket, peer, bytes);
        Ok(())
    }

    fn has_room(&self, peer: &PeerId, bytes: usize) -> bool {
        let of_peer = self.peers.get(peer).map_or(0, |usage| usage.bytes);
        self.bytes + bytes <= self.max_bytes && of_peer + bytes <= share(self.max_bytes)
    }

    fn charge(&mut self, ticket: Ticket, peer: PeerId, bytes: usize) {
        self.bytes += bytes;
        self.peers.entry(peer).or_default().bytes += bytes;
        if let Some(open) = self.open.get_mut(&ticket) {
            open.bytes += bytes;
        }
    }

    fn on_stream_ended(&mut self, stream: &InboundRequestId) {
        if let Some(ticket) = self.streams.remove(stream)
            && let Some(open) = self.open.get_mut(&ticket)
        {
            open.stream = None;
            self.release_if_over(ticket);
        }
    }

    fn release_if_over(&mut self, ticket: Ticket) {
        let over = |open: &Open| open.channel.is_none() && open.stream.is_none();
        if !self.open.get(&ticket).is_some_and(over) {
            return;
        }
        let Some(open) = self.open.remove(&ticket) else {
            return;
        };
        self.bytes -= open.bytes;
        if let Some(usage) = self.peers.get_mut(&open.peer) {
            usage.requests -= 1;
            usage.bytes -= open.bytes;
            if usage.requests == 0 {
                self.peers.remove(&open.peer);
            }
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
    (budget * 3 / 4).max(1)
}

/// What a stream carries: a request of ours, or what somebody sent as one.
#[derive(Debug)]
pub(crate) enum Call {
    Out {
        id: u64,
        service: String,
        payload: Arc<[u8]>,
        /// Set when the first byte is about to be written.
        sent: Arc<AtomicBool>,
    },
    /// With its part of the budget for what arrives.
    In(wire::Request, Option<OwnedSemaphorePermit>),
    /// Not a request; to be answered with the error.
    Malformed { id: u64, error: RemoteError },
}

/// Frames of CBOR on a stream, see [`crate::proto`].
#[derive(Clone, Debug)]
pub(crate) struct RpcCodec {
    /// The id of the request that this clone has written.
    expected: Option<u64>,
    /// The bytes that requests still arriving may take, all clones together.
    arriving: Arc<Semaphore>,
}

impl RpcCodec {
    pub(crate) fn new(limits: &Limits) -> Self {
        let bytes = limits.inbound_bytes.min(Semaphore::MAX_PERMITS);
        Self {
            expected: None,
            arriving: Arc::new(Semaphore::new(bytes)),
        }
    }

    /// A frame's content, with its part of the budget; what needs one chunk needs no part.
    async fn read_arriving<T>(&self, io: &mut T) -> Result<Option<Arrived>, FrameError>
    where
        T: AsyncRead + Unpin + Send,
    {
        let mut held: Option<OwnedSemaphorePermit> = None;
        let has_room = |bytes: usize| {
            let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
            let Ok(more) = Arc::clone(&self.arriving).try_acquire_many_owned(bytes) else {
                return false;
            };
            match &mut held {
                Some(held) => held.merge(more),
                None => held = Some(more),
            }
            true
        };
        let frame = read_frame_if(io, wire::MAX_FRAME, has_room).await?;
        Ok(frame.map(|frame| (frame, held)))
    }
}

type Arrived = (Vec<u8>, Option<OwnedSemaphorePermit>);

impl request_response::Codec for RpcCodec {
    type Protocol = StreamProtocol;
    type Request = Call;
    type Response = Reply;

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Call>
    where
        T: AsyncRead + Unpin + Send,
    {
        let malformed = |id, code, error: &dyn std::fmt::Display| Call::Malformed {
            id,
            error: RemoteError::new(code, error.to_string()),
        };
        match timeout(FRAME_DEADLINE, self.read_arriving(io)).await? {
            Ok(Some((frame, arriving))) => Ok(match wire::Request::decode(&frame) {
                Ok(request) => Call::In(request, arriving),
                Err(error) => {
                    let code = match error {
                        DecodeError::TooLarge { .. } => ErrorCode::TooLarge,
                        _ => ErrorCode::BadRequest,
                    };
                    malformed(wire::salvage_id(&frame).unwrap_or_default(), code, &error)
                }
            }),
            Ok(None) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error @ FrameError::TooLarge { .. }) => {
                Ok(malformed(0, ErrorCode::TooLarge, &error))
            }
            Err(error @ FrameError::NoRoom { .. }) => Ok(malformed(0, ErrorCode::Busy, &error)),
            Err(error) => Err(error.into()),
        }
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Reply>
    where
        T: AsyncRead + Unpin + Send,
    {
        // No time-out of its own: how long the handler may take is the caller's to say.
        let Some(frame) = read_frame(io, wire::MAX_FRAME).await? else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let reply = Reply::decode(&frame).map_err(io::Error::other)?;
        // Without a readable id the remote could not know it.
        let refused = reply.id == 0 && reply.outcome.is_err();
        if self.expected != Some(reply.id) && !refused {
            return Err(io::Error::other("the reply's id is of another request"));
        }
        Ok(reply)
    }

    async fn write_request<T>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        call: Call,
    ) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        let Call::Out {
            id,
            service,
            payload,
            sent,
        } = call
        else {
            return Err(io::Error::other("not a request of ours"));
        };
        self.expected = Some(id);
        let request = RequestRef {
            id,
            service: &service,
            payload: &payload,
        };
        let frame = request.encode().map_err(io::Error::other)?;
        sent.store(true, Ordering::Release);
        timeout(FRAME_DEADLINE, write_frame(io, &frame)).await?
    }

    async fn write_response<T>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        reply: Reply,
    ) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        let frame = reply.as_ref().encode().map_err(io::Error::other)?;
        // While a slow reader takes the frame, it is held once.
        drop(reply);
        timeout(FRAME_DEADLINE, write_frame(io, &frame)).await?
    }
}
