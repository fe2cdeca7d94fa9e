//! A stream for each request, by libp2p's request-response behaviour: outbound only.
//!
//! A caller learns whether its request can have run: the codec notes when the first byte is about to
//! be written, and what fails before that was never sent.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures::io::{AsyncRead, AsyncWrite};
use libp2p::request_response::{self, Message, OutboundFailure, OutboundRequestId};
use libp2p::{PeerId, StreamProtocol};
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::timeout;

use super::Outcome;
use crate::limits::FRAME_DEADLINE;
use crate::name::ServiceName;
use crate::proto::frame::{read_frame, write_frame};
use crate::proto::wire::{self, Reply, RequestRef};

/// The request-response behaviour of the Swarm.
pub(crate) type Behaviour = request_response::Behaviour<Codec>;

type Event = request_response::Event<Call, Reply>;

/// A caller's request to one provider.
#[derive(Debug)]
pub(crate) struct Outbound {
    pub(crate) provider: PeerId,
    pub(crate) service: Arc<str>,
    pub(crate) payload: Bytes,
    pub(crate) outcome: oneshot::Sender<Outcome>,
    /// Held while the stream is open, even if the caller goes away.
    pub(crate) slot: OwnedSemaphorePermit,
}

/// A peer said whether it serves a name; `None`: it did not answer.
#[derive(Debug)]
pub(crate) struct Serves(
    pub(crate) PeerId,
    pub(crate) ServiceName,
    pub(crate) Option<bool>,
);

/// The requests that have a stream of their own.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    last_id: u64,
    open: HashMap<OutboundRequestId, Open>,
}

#[derive(Debug)]
enum Open {
    Caller {
        outcome: oneshot::Sender<Outcome>,
        sent: Arc<AtomicBool>,
        _slot: OwnedSemaphorePermit,
    },
    Serves(PeerId, ServiceName),
}

impl Requests {
    /// Sends a caller's request.
    pub(crate) fn call(&mut self, behaviour: &mut Behaviour, request: Outbound) {
        let sent = Arc::new(AtomicBool::new(false));
        let call = self.outgoing(request.service, request.payload, Arc::clone(&sent));
        let id = behaviour.send_request(&request.provider, call);
        let open = Open::Caller {
            outcome: request.outcome,
            sent,
            _slot: request.slot,
        };
        self.open.insert(id, open);
    }

    /// Asks a peer whether it serves a name. Returns whether it is being asked of another one already.
    pub(crate) fn ask_serves(
        &mut self,
        behaviour: &mut Behaviour,
        peer: PeerId,
        name: ServiceName,
    ) -> bool {
        let is_asked = |open: &Open| matches!(open, Open::Serves(asked, _) if *asked == peer);
        let again = self.open.values().any(is_asked);
        let payload = Bytes::copy_from_slice(name.as_ref().as_bytes());
        let call = self.outgoing(wire::SERVES.into(), payload, Arc::default());
        let id = behaviour.send_request(&peer, call);
        self.open.insert(id, Open::Serves(peer, name));
        again
    }

    /// Asks a peer something, so that neither side takes the connection for idle.
    pub(crate) fn keep_alive(&mut self, behaviour: &mut Behaviour, peer: PeerId) {
        let payload = Bytes::from_static(b"keep-alive");
        let call = self.outgoing(wire::SERVES.into(), payload, Arc::default());
        // Nobody waits for the answer.
        behaviour.send_request(&peer, call);
    }

    /// Handles what the behaviour tells.
    pub(crate) fn on_event(&mut self, event: Event) -> Option<Serves> {
        match event {
            Event::Message {
                message:
                    Message::Response {
                        request_id,
                        response,
                    },
                ..
            } => self.on_outcome(&request_id, Outcome::Answered(response.outcome)),
            Event::OutboundFailure {
                request_id, error, ..
            } => {
                let outcome = self.failure(&request_id, &error);
                self.on_outcome(&request_id, outcome)
            }
            // Inbound streams are served elsewhere.
            _ => None,
        }
    }

    fn outgoing(&mut self, service: Arc<str>, payload: Bytes, sent: Arc<AtomicBool>) -> Call {
        self.last_id += 1;
        Call {
            id: self.last_id,
            service,
            payload,
            sent,
        }
    }

    fn failure(&self, id: &OutboundRequestId, error: &OutboundFailure) -> Outcome {
        let sent = match self.open.get(id) {
            Some(Open::Caller { sent, .. }) => sent.load(Ordering::Acquire),
            _ => true,
        };
        match error {
            OutboundFailure::UnsupportedProtocols => {
                Outcome::NotSent("the peer does not speak Grapevine's RPC".into())
            }
            OutboundFailure::DialFailure => Outcome::NotSent("it does not answer".into()),
            error if sent => Outcome::Broken(error.to_string()),
            error => Outcome::NotSent(error.to_string()),
        }
    }

    fn on_outcome(&mut self, id: &OutboundRequestId, outcome: Outcome) -> Option<Serves> {
        match self.open.remove(id)? {
            Open::Caller {
                outcome: caller, ..
            } => {
                // A caller that went away does not want to know.
                let _ = caller.send(outcome);
                None
            }
            Open::Serves(peer, name) => Some(Serves(peer, name, outcome.serves())),
        }
    }
}

/// A request that is to be written.
#[derive(Debug)]
pub(crate) struct Call {
    id: u64,
    service: Arc<str>,
    payload: Bytes,
    /// Set when the first byte is about to be written.
    sent: Arc<AtomicBool>,
}

/// Frames of CBOR on a stream, see [`crate::proto`].
#[derive(Clone, Debug, Default)]
pub(crate) struct Codec {
    /// The id of the request that this clone has written.
    expected: Option<u64>,
}

impl request_response::Codec for Codec {
    type Protocol = StreamProtocol;
    type Request = Call;
    type Response = Reply;

    async fn read_request<T>(&mut self, _: &StreamProtocol, _: &mut T) -> io::Result<Call>
    where
        T: AsyncRead + Unpin + Send,
    {
        Err(io::ErrorKind::Unsupported.into())
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
        self.expected = Some(call.id);
        let request = RequestRef {
            id: call.id,
            service: &call.service,
            payload: &call.payload,
        };
        let frame = request.encode().map_err(io::Error::other)?;
        call.sent.store(true, Ordering::Release);
        timeout(FRAME_DEADLINE, write_frame(io, &frame)).await?
    }

    async fn write_response<T>(&mut self, _: &StreamProtocol, _: &mut T, _: Reply) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        Err(io::ErrorKind::Unsupported.into())
    }
}
