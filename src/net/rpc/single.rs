//! A stream for each request, by libp2p's request-response behaviour: outbound only.
//!
//! At most [`MAX_STREAMS_TO_PEER`](crate::limits::MAX_STREAMS_TO_PEER) are open to a peer. Callers wait
//! for a slot of its [`Link`](super::link::Link) before they come here; questions of this node's own
//! wait here.
//!
//! A caller learns whether its request can have run: the codec notes when the first byte is about to
//! be written, and what fails before that was never sent.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use libp2p::request_response::{self, Message, OutboundFailure, OutboundRequestId};
use libp2p::{PeerId, StreamProtocol};
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::{Instant, timeout, timeout_at};

use super::Outcome;
use crate::limits::{FRAME_DEADLINE, MAX_QUESTIONS_TO_PEER, SERVES_DEADLINE};
use crate::name::ServiceName;
use crate::net::checks::Verdict;
use crate::net::turns::Turns;
use crate::proto::frame::{read_frame, write_frame};
use crate::proto::wire::{self, ErrorCode, RemoteError, Reply, RequestRef};

/// How long a stream may take to close behind its reply: its place is then another's. js-libp2p closes it
/// in a later turn than it replies.
const CLOSING: Duration = Duration::from_millis(100);

/// The request-response behaviour of the Swarm.
pub(crate) type Behaviour = request_response::Behaviour<Codec>;

type Event = request_response::Event<Call, Reply>;

/// A caller's request to one provider.
#[derive(Debug)]
pub(crate) struct Outbound {
    pub(crate) provider: PeerId,
    pub(crate) service: Arc<str>,
    pub(crate) payload: Bytes,
    /// When the stream is closed, whether or not the answer is there.
    pub(crate) deadline: Instant,
    pub(crate) outcome: oneshot::Sender<Outcome>,
    /// Held while the stream is open, even if the caller goes away.
    pub(crate) slot: OwnedSemaphorePermit,
}

/// What a question of this node's own has led to.
#[derive(Debug)]
pub(crate) enum Answered {
    /// A peer said whether it serves a name; `None`: it did not answer.
    Serves(PeerId, ServiceName, Option<bool>),
    /// A peer was asked whether it lives, of a name if one is known.
    Alive(PeerId, Option<ServiceName>, Verdict),
}

/// The requests that have a stream of their own.
#[derive(Debug)]
pub(crate) struct Requests {
    last_id: u64,
    open: HashMap<OutboundRequestId, Open>,
    /// Each with the time until which it may be answered.
    questions: Turns<(Question, Instant)>,
    /// The questions that have been answered, or given up.
    answered: VecDeque<Answered>,
}

/// What this node asks a peer of its own accord.
#[derive(Debug)]
enum Question {
    Serves(ServiceName),
    Alive(Option<ServiceName>),
    /// Nobody waits for the answer.
    KeepAlive,
}

#[derive(Debug)]
enum Open {
    Caller {
        outcome: oneshot::Sender<Outcome>,
        deadline: Instant,
        sent: Arc<AtomicBool>,
        _slot: OwnedSemaphorePermit,
    },
    Question(PeerId, Question),
}

impl Requests {
    pub(crate) fn new() -> Self {
        Self {
            last_id: 0,
            open: HashMap::new(),
            questions: Turns::new(MAX_QUESTIONS_TO_PEER),
            answered: VecDeque::new(),
        }
    }

    /// Sends a caller's request.
    pub(crate) fn call(&mut self, behaviour: &mut Behaviour, request: Outbound) {
        let sent = Arc::new(AtomicBool::new(false));
        let call = Call {
            id: self.next_id(),
            service: request.service,
            payload: request.payload,
            deadline: request.deadline,
            sent: Arc::clone(&sent),
        };
        let id = behaviour.send_request(&request.provider, call);
        let open = Open::Caller {
            outcome: request.outcome,
            deadline: request.deadline,
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
        let again = self.questions.is_busy(&peer);
        self.question(behaviour, peer, Question::Serves(name));
        again
    }

    /// Asks a peer whether it lives, by the question whether it serves a name. Without a name any answer
    /// will do.
    pub(crate) fn ask_whether_alive(
        &mut self,
        behaviour: &mut Behaviour,
        peer: PeerId,
        name: Option<ServiceName>,
    ) {
        self.question(behaviour, peer, Question::Alive(name));
    }

    /// Whether a peer is being asked anything.
    pub(crate) fn is_asking(&self, peer: &PeerId) -> bool {
        self.questions.is_busy(peer)
    }

    /// Asks a peer something, so that neither side takes the connection for idle.
    pub(crate) fn keep_alive(&mut self, behaviour: &mut Behaviour, peer: PeerId) {
        self.question(behaviour, peer, Question::KeepAlive);
    }

    /// Asks now, or in its turn.
    fn question(&mut self, behaviour: &mut Behaviour, peer: PeerId, question: Question) {
        let deadline = Instant::now() + SERVES_DEADLINE;
        if let Some((question, deadline)) = self.questions.begin(peer, (question, deadline)) {
            self.ask(behaviour, peer, question, deadline);
        }
    }

    fn ask(
        &mut self,
        behaviour: &mut Behaviour,
        peer: PeerId,
        question: Question,
        deadline: Instant,
    ) {
        let payload = match &question {
            Question::Serves(name) | Question::Alive(Some(name)) => {
                Bytes::copy_from_slice(name.as_ref().as_bytes())
            }
            Question::Alive(None) | Question::KeepAlive => Bytes::from_static(b"keep-alive"),
        };
        let call = Call {
            id: self.next_id(),
            service: wire::SERVES.into(),
            payload,
            deadline,
            sent: Arc::default(),
        };
        let id = behaviour.send_request(&peer, call);
        self.open.insert(id, Open::Question(peer, question));
    }

    /// The next answer to a question.
    pub(crate) fn poll_answered(&mut self) -> Option<Answered> {
        self.answered.pop_front()
    }
    /// Handles what the behaviour tells.
    pub(crate) fn on_event(&mut self, behaviour: &mut Behaviour, event: Event) {
        match event {
            Event::Message {
                message:
                    Message::Response {
                        request_id,
                        response,
                    },
                ..
            } => {
                let outcome = Outcome::Answered(response.outcome);
                self.on_outcome(behaviour, &request_id, outcome);
            }
            Event::OutboundFailure {
                peer,
                request_id,
                error,
                ..
            } => {
                if matches!(
                    error,
                    OutboundFailure::ConnectionClosed | OutboundFailure::DialFailure
                ) && !behaviour.is_connected(&peer)
                {
                    self.give_up(peer);
                }
                let outcome = self.failure(&request_id, &error);
                self.on_outcome(behaviour, &request_id, outcome);
            }
            // Inbound streams are served elsewhere.
            _ => {}
        }
    }

    fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    /// A peer is gone: what waits for its turn is not asked.
    fn give_up(&mut self, peer: PeerId) {
        for (question, _) in self.questions.give_up(&peer) {
            self.on_answer(peer, question, Outcome::NotSent(String::new()));
        }
    }

    /// A question under way has ended: the next one has its turn, unless it has waited for too long.
    fn next_question(&mut self, behaviour: &mut Behaviour, peer: PeerId) {
        while let Some((question, deadline)) = self.questions.end(&peer) {
            if Instant::now() < deadline {
                return self.ask(behaviour, peer, question, deadline);
            }
            self.on_answer(peer, question, Outcome::NotSent(String::new()));
        }
    }

    fn failure(&self, id: &OutboundRequestId, error: &OutboundFailure) -> Outcome {
        let (sent, deadline) = match self.open.get(id) {
            Some(Open::Caller { sent, deadline, .. }) => {
                (sent.load(Ordering::Acquire), Some(*deadline))
            }
            _ => (true, None),
        };
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Outcome::TimedOut;
        }
        match error {
            // Who says that it does not speak the protocol lives.
            OutboundFailure::UnsupportedProtocols
                if matches!(
                    self.open.get(id),
                    Some(Open::Question(_, Question::Alive(_)))
                ) =>
            {
                let refusal = RemoteError::new(ErrorCode::UnknownService, String::new());
                Outcome::Answered(Err(refusal))
            }
            OutboundFailure::UnsupportedProtocols => {
                Outcome::NotSent("the peer does not speak Grapevine's RPC".into())
            }
            OutboundFailure::DialFailure => Outcome::NotSent("it does not answer".into()),
            error if sent => Outcome::Broken(error.to_string()),
            error => Outcome::NotSent(error.to_string()),
        }
    }

    fn on_outcome(&mut self, behaviour: &mut Behaviour, id: &OutboundRequestId, outcome: Outcome) {
        match self.open.remove(id) {
            Some(Open::Caller {
                outcome: caller, ..
            }) => {
                // A caller that went away does not want to know.
                let _ = caller.send(outcome);
            }
            Some(Open::Question(peer, question)) => {
                // Before whoever learns it looks whether anything else is asked.
                self.next_question(behaviour, peer);
                self.on_answer(peer, question, outcome);
            }
            None => {}
        }
    }

    fn on_answer(&mut self, peer: PeerId, question: Question, outcome: Outcome) {
        let answered = match question {
            Question::Serves(name) => Answered::Serves(peer, name, outcome.serves()),
            Question::Alive(name) => Answered::Alive(peer, name, verdict(&outcome)),
            Question::KeepAlive => return,
        };
        self.answered.push_back(answered);
    }
}

/// What an answer says of whether a provider lives. Who answers with an error lives as well.
fn verdict(outcome: &Outcome) -> Verdict {
    match outcome {
        Outcome::Answered(Ok(serves)) if *serves != [1] => Verdict::Disowns,
        Outcome::Answered(_) => Verdict::Lives,
        Outcome::NotSent(_) | Outcome::Broken(_) | Outcome::TimedOut => Verdict::Silent,
    }
}

/// A request that is to be written.
#[derive(Debug)]
pub(crate) struct Call {
    id: u64,
    service: Arc<str>,
    payload: Bytes,
    deadline: Instant,
    /// Set when the first byte is about to be written.
    sent: Arc<AtomicBool>,
}

/// Frames of CBOR on a stream, see [`crate::proto`].
#[derive(Clone, Debug, Default)]
pub(crate) struct Codec {
    /// The id of the request that this clone has written, and until when its reply may come.
    expected: Option<(u64, Instant)>,
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
        let Some((id, deadline)) = self.expected else {
            return Err(io::Error::other("nothing was asked"));
        };
        // How long the handler may take is the caller's to say.
        let frame = timeout_at(deadline, read_frame(io, wire::MAX_FRAME)).await??;
        let Some(frame) = frame else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let reply = Reply::decode(&frame).map_err(io::Error::other)?;
        // Without a readable id the remote could not know it.
        let refused = reply.id == 0 && reply.outcome.is_err();
        if reply.id != id && !refused {
            return Err(io::Error::other("the reply's id is of another request"));
        }
        // The remote counts the stream until it has closed its side too. One that does not is not waited
        // for.
        let _ = timeout(CLOSING, io.read(&mut [0])).await;
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
        self.expected = Some((call.id, call.deadline));
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
