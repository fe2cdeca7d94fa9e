//! From Grenache's callers to the network: one port that speaks both of Grenache's RPC transports,
//! and sends each request to a provider of the service it names.
//!
//! WebSocket at `/ws` and `/`, text frames; HTTP `POST /`, also compressed (`grc-compress: gzip`) and
//! with the head of the message in the header `_gr`. A message that cannot be read, or is too long, is
//! answered with an error, where Grenache's workers answer nothing: with its `rid` if that can be read.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Router};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use futures::future::{Either, ready};
use futures::stream::FuturesUnordered;
use futures::{FutureExt, SinkExt, Stream, StreamExt};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use serde_json::value::RawValue;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::create_response_with_body;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

use super::body::{self, BodyError};
use super::payload;
use super::rpc::{self, MAX_MESSAGE, Question};
use super::trimmed::{Arrived, Trimmed};
use crate::error::{LookupError, RequestError};
use crate::http::{DRAIN, Ends, Places};
use crate::limits::FRAME_DEADLINE;
use crate::name::ServiceName;
use crate::node::{Node, RequestOptions};
use crate::proto::wire::RemoteError;

/// The WebSockets that are open at once; one more is refused, as is one of a network that has
/// [enough](Places). Each may hold a message of 2 MiB that
/// is still arriving.
const MAX_SOCKETS: usize = 1_024;

/// The requests open on one socket; one more is refused. As many answers that the client has not taken
/// stop the reading.
const MAX_OPEN: usize = 1_024;

/// The bytes of all requests that are carried at once, in KiB: 64 MiB, as much as a node holds of
/// the requests to itself. One more is refused.
const MAX_CARRIED: usize = 64 << 10;

/// The bytes of all answers that have not been taken, in KiB, as many again; those of up to
/// [`SMALL`] do not count, so that they go on while slow readers hold all of it. One more is said to
/// find no room.
const MAX_ANSWERS: usize = 64 << 10;

/// What is said to one request too many.
const BUSY: &str = "this grape is busy: too many requests are open";

/// The number of connections bounds such answers.
const SMALL: usize = 4 << 10;

/// A socket on which nothing happens is closed after this. Grenache's clients close theirs after
/// two minutes.
const SOCKET_IDLE: Duration = Duration::from_secs(150);

/// How long a client may take to send a request over HTTP, which it may stream: as long as Grenache's
/// clients wait by default.
const BODY_DEADLINE: Duration = Duration::from_secs(60);

/// The bytes of requests over HTTP that are arriving, in KiB, but for the first part of each.
const MAX_ARRIVING: usize = 64 << 10;

/// How long a request that is too long is read on behind its answer.
const DISCARD: Duration = Duration::from_secs(10);

/// How long a client may take for what is written to its socket, as to any other answer.
const WRITE_DEADLINE: Duration = Duration::from_secs(30);

/// How long sockets are waited for that close, once their time to answer has passed.
const GOODBYE: Duration = Duration::from_millis(100);

/// What is read ahead on a socket at rest, which it holds as long as it lives.
const SOCKET_BUFFER: usize = 8 << 10;

/// What the routes stand on.
pub(super) struct Carrier {
    node: Node,
    deadline: Duration,
    sockets: Arc<Semaphore>,
    places: Places,
    carried: Semaphore,
    arriving: Semaphore,
    answers: Arc<Semaphore>,
    stop: watch::Receiver<()>,
}

/// An answer, and its part of [`MAX_ANSWERS`].
struct Answer {
    text: String,
    room: Option<OwnedSemaphorePermit>,
}

impl Carrier {
    pub(super) fn new(node: Node, deadline: Duration, stop: watch::Receiver<()>) -> Self {
        Self {
            node,
            deadline,
            sockets: Arc::new(Semaphore::new(MAX_SOCKETS)),
            places: Places::new(MAX_SOCKETS),
            carried: Semaphore::new(MAX_CARRIED),
            arriving: Semaphore::new(MAX_ARRIVING),
            answers: Arc::new(Semaphore::new(MAX_ANSWERS)),
            stop,
        }
    }

    pub(super) fn routes(self) -> Router {
        Router::new()
            .route("/", get(upgrade).post(post))
            .route("/ws", get(upgrade))
            .with_state(Arc::new(self))
    }

    /// Returns once it is told to stop and its sockets are closed, or have had the time for that.
    pub(super) fn closed(&self) -> impl Future<Output = ()> + use<> {
        let (sockets, mut stop) = (Arc::clone(&self.sockets), self.stop.clone());
        async move {
            // An error is a word as well.
            let _ = stop.changed().await;
            let all = sockets.acquire_many(MAX_SOCKETS as u32);
            let _ = timeout(DRAIN + GOODBYE, all).await;
        }
    }

    /// Answers one message.
    async fn carry(&self, message: &str, header: Option<&str>) -> Result<Answer, rpc::Malformed> {
        let question = Question::parse(message, header)?;
        let outcome = self.request(&question, message.len()).await;
        let text = rpc::answer(question.rid, outcome);
        Ok(self.hold(text).unwrap_or_else(|| {
            // It must be small, and `rid` is as long as the caller likes.
            let is_short = question.rid.len() < SMALL / 2;
            let rid = if is_short { question.rid } else { "null" };
            let no_room = "the answer finds no room at this grape";
            Answer::small(rpc::answer(rid, Err(no_room.into())))
        }))
    }

    /// Answers one message, and says what that is in HTTP.
    async fn answer(&self, message: &[u8], header: Option<&str>) -> (StatusCode, Answer) {
        let answer = match str::from_utf8(message) {
            Ok(message) => self.carry(message, header).await,
            Err(_) => Err(rpc::Malformed),
        };
        match answer {
            Ok(answer) => (StatusCode::OK, answer),
            Err(rpc::Malformed) => {
                let refused = refuse(message, header, "ERR_REQUEST_INVALID");
                (StatusCode::BAD_REQUEST, refused)
            }
        }
    }

    async fn answer_zipped(&self, body: &[u8], header: Option<&str>) -> (StatusCode, Answer) {
        match Unzipped::from(body) {
            Unzipped::Whole(message) => self.answer(&message, header).await,
            Unzipped::TooLong(message) => {
                let refused = refuse(&message, header, &rpc::too_long());
                (StatusCode::PAYLOAD_TOO_LARGE, refused)
            }
            // As in Grenache, what is not compressed after all is taken as it is.
            Unzipped::Not => self.answer(body, header).await,
        }
    }

    /// Reads the body of a request.
    async fn read(&self, body: Body) -> Result<Bytes, BodyError> {
        let mut room = Vec::new();
        let grow = |bytes| {
            let part = self.arriving.try_acquire_many(kilobytes(bytes));
            part.map(|part| room.push(part)).is_ok()
        };
        body::read(body, MAX_MESSAGE, BODY_DEADLINE, grow).await
    }

    /// An answer with its room; `None` if there is none.
    fn hold(&self, text: String) -> Option<Answer> {
        if text.len() <= SMALL {
            return Some(Answer::small(text));
        }
        let answers = Arc::clone(&self.answers);
        let room = answers.try_acquire_many_owned(kilobytes(text.len())).ok()?;
        let room = Some(room);
        Some(Answer { text, room })
    }

    async fn request(&self, question: &Question<'_>, len: usize) -> Result<String, String> {
        let name: ServiceName = question.service.parse().map_err(to_text)?;
        let Ok(_room) = self.carried.try_acquire_many(kilobytes(len)) else {
            return Err(BUSY.into());
        };
        let payload = question.payload.unwrap_or(RawValue::NULL);
        let (payload, form) = payload::request(payload);
        let options = RequestOptions {
            deadline: self.deadline,
            ..RequestOptions::default()
        };
        let reply = self.node.request_with(&name, payload, options).await;
        let reply = reply.map_err(explain)?;
        let json = form.json(&reply.payload);
        json.ok_or_else(|| format!("{name} answered something else than text"))
    }
}

impl Answer {
    fn small(text: String) -> Self {
        let room = None;
        Self { text, room }
    }
}

/// The bytes of an answer, which give its room back once they have left.
struct Held {
    bytes: Vec<u8>,
    _room: Option<OwnedSemaphorePermit>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// A client's socket.
type Socket = WebSocketStream<Trimmed<TokioIo<Upgraded>>>;

async fn upgrade(
    State(carrier): State<Arc<Carrier>>,
    Extension(ends): Extension<Ends>,
    mut request: Request,
) -> Response {
    let Ok(response) = create_response_with_body(&request, Body::empty) else {
        return StatusCode::UPGRADE_REQUIRED.into_response();
    };
    let place = carrier.places.take(ends.there);
    let permit = Arc::clone(&carrier.sockets).try_acquire_owned();
    let (Some(place), Ok(permit)) = (place, permit) else {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    };
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let _place = (place, permit);
        // Fails if the client is gone before it has seen the answer.
        if let Ok(socket) = open(upgraded).await {
            converse(socket, carrier).await;
        }
    });
    response
}

async fn open(upgraded: OnUpgrade) -> hyper::Result<Socket> {
    let stream = Trimmed::new(TokioIo::new(upgraded.await?), MAX_MESSAGE);
    let config = WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE + 1))
        .max_frame_size(Some(MAX_MESSAGE + 1))
        .read_buffer_size(SOCKET_BUFFER)
        .write_buffer_size(SOCKET_BUFFER);
    Ok(WebSocketStream::from_raw_socket(stream, Role::Server, Some(config)).await)
}

/// Serves a socket to its end. The requests open on it end with it, unless it ends because the grape
/// is told to stop: then what is open is answered for up to [`DRAIN`].
async fn converse(mut socket: Socket, carrier: Arc<Carrier>) {
    let mut stop = carrier.stop.clone();
    let mut open = FuturesUnordered::new();
    let mut patience = Duration::ZERO;
    loop {
        let idle_at = Instant::now() + SOCKET_IDLE;
        tokio::select! {
            Some(answer) = open.next(), if !open.is_empty() => {
                // Who does not read has no use for answers.
                let Some(()) = write(&mut socket, answer, &mut open).await else { return };
            }
            message = socket.next(), if open.len() < 2 * MAX_OPEN => match message {
                Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => {
                    open.push(match open.len() < MAX_OPEN {
                        true => Either::Left(reply(&carrier, message)),
                        false => Either::Right(ready(refuse(&message.into_data(), None, BUSY))),
                    });
                }
                // Pings are answered by the library.
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return,
            },
            () = sleep_until(idle_at), if open.is_empty() => break,
            told = stop.changed() => {
                // Or the gateway is dropped, which closes everything at once.
                patience = told.map_or(Duration::ZERO, |()| DRAIN);
                break;
            }
        }
    }
    let drained = async {
        while let Some(answer) = open.next().await {
            write(&mut socket, answer, &mut open).await?;
        }
        Some(())
    };
    if let Ok(None) = timeout(patience, drained).await {
        return;
    }
    // Who does not take the goodbye is gone already.
    let _ = timeout(FRAME_DEADLINE, socket.close(None)).await;
}

/// Writes an answer, and those that wait behind it; `None` if the client does not take them.
async fn write(
    socket: &mut Socket,
    answer: Answer,
    open: &mut (impl Stream<Item = Answer> + Unpin),
) -> Option<()> {
    let write = async {
        // What is fed is copied, and held until it is flushed.
        let mut rooms = Vec::new();
        let mut next = Some(answer);
        while let Some(Answer { text, room }) = next {
            rooms.extend(room);
            socket.feed(Message::text(text)).await?;
            next = open.next().now_or_never().flatten();
        }
        socket.flush().await
    };
    timeout(WRITE_DEADLINE, write).await.ok()?.ok()
}

async fn reply(carrier: &Carrier, message: Message) -> Answer {
    let message = message.into_data();
    match Arrived::from(&message) {
        Arrived::Whole(message) => carrier.answer(message, None).await.1,
        Arrived::Beginning(beginning) => refuse(beginning, None, &rpc::too_long()),
    }
}

async fn post(State(carrier): State<Arc<Carrier>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let header = head.headers.get("_gr").map(HeaderValue::to_str);
    let Ok(header) = header.transpose() else {
        let refused = rpc::answer("null", Err("ERR_HEADER_PARSE_GR".into()));
        return (StatusCode::INTERNAL_SERVER_ERROR, refused).into_response();
    };
    let is_compressed = is_compressed(&head.headers);
    let (status, answer) = match carrier.read(body).await {
        Ok(body) if is_compressed => carrier.answer_zipped(&body, header).await,
        Ok(body) => carrier.answer(&body, header).await,
        Err(error) => refuse_body(error, header),
    };
    let bytes = match is_compressed {
        true => gzip(answer.text.as_bytes()).unwrap_or_else(|_| answer.text.into_bytes()),
        false => answer.text.into_bytes(),
    };
    let _room = answer.room;
    let body = Bytes::from_owner(Held { bytes, _room });
    (status, Body::from(body)).into_response()
}

fn refuse_body(error: BodyError, header: Option<&str>) -> (StatusCode, Answer) {
    let refuse = |status, error: &str| (status, self::refuse(&[], header, error));
    match error {
        BodyError::TooLarge(body) => {
            // As it is: of what is compressed, whose it is shows in the header alone.
            let refused = self::refuse(&body.beginning, header, &rpc::too_long());
            // It is answered at once, and may be sent to its end.
            tokio::spawn(body.discard(DISCARD));
            (StatusCode::PAYLOAD_TOO_LARGE, refused)
        }
        BodyError::TooSlow => refuse(StatusCode::REQUEST_TIMEOUT, "ERR_REQUEST_TIMEOUT"),
        BodyError::Broken => refuse(StatusCode::BAD_REQUEST, "ERR_REQUEST_INVALID"),
        BodyError::NoRoom => refuse(StatusCode::SERVICE_UNAVAILABLE, BUSY),
    }
}

/// The answer to a message that is not carried: to whose it is, if that stands in its beginning or in its
/// header.
fn refuse(message: &[u8], header: Option<&str>, error: &str) -> Answer {
    let header = header.map(str::as_bytes);
    let rid = header.and_then(rpc::rid_in).or(rpc::rid_in(message));
    let rid = rid.filter(|rid| rid.len() < SMALL / 2);
    Answer::small(rpc::answer(rid.unwrap_or("null"), Err(error.into())))
}

/// What a Grenache client is told, in Grenache's words where it has them.
fn explain(error: RequestError) -> String {
    match error {
        RequestError::Lookup(LookupError::NotFound(_)) => "ERR_GRAPE_LOOKUP_EMPTY".into(),
        RequestError::Lookup(LookupError::TimedOut(_)) | RequestError::TimedOut(_) => {
            "ERR_TIMEOUT".into()
        }
        RequestError::Remote { error, .. } => explain_remote(*error),
        other => other.to_string(),
    }
}

/// The provider's own words, if it has any.
fn explain_remote(error: RemoteError) -> String {
    match error.message.is_empty() {
        true => error.code.to_string(),
        false => error.message,
    }
}

fn is_compressed(headers: &HeaderMap) -> bool {
    let how = headers
        .get("grc-compress")
        .and_then(|how| how.to_str().ok());
    how.is_some_and(|how| how.contains("gzip"))
}

/// What comes of a body that is said to be compressed.
enum Unzipped {
    Whole(Vec<u8>),
    /// It is longer than a message may be; these are its first bytes.
    TooLong(Vec<u8>),
    Not,
}

impl Unzipped {
    fn from(body: &[u8]) -> Self {
        let mut message = Vec::new();
        let mut decoder = GzDecoder::new(body).take(MAX_MESSAGE as u64 + 1);
        match decoder.read_to_end(&mut message) {
            Ok(_) if message.len() <= MAX_MESSAGE => Self::Whole(message),
            Ok(_) => Self::TooLong(message),
            Err(_) => Self::Not,
        }
    }
}

fn gzip(answer: &[u8]) -> io::Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(answer)?;
    encoder.finish()
}

/// What so many bytes take of the room, of which no message is without a part.
fn kilobytes(bytes: usize) -> u32 {
    u32::try_from(bytes >> 10)
        .unwrap_or(u32::MAX)
        .saturating_add(1)
}

fn to_text(error: impl ToString) -> String {
    error.to_string()
}
