//! Grenache's HTTP API: paths, answers and errors are those of grenache-grape 1.0.0, byte for byte.
//!
//! A request is a JSON object whose `data` is the argument; the method does not matter, and neither
//! does `rid`. An answer is JSON with status 200, and so are most errors: a string. What grenache-grape
//! answers with the text of a JavaScript exception is `ERR_GRAPE_PAYLOAD_INVALID` here, with the same
//! status; where it never answers, `ERR_GRAPE_HASH_FORMAT`; and port 0, for which it announces its own
//! DHT port, is no port here.

use std::borrow::Cow;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Extension;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Request, State};
use axum::http::header::CONNECTION;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use tokio::time::sleep;

use super::body::{self, BodyError};
use super::{Config, rpc, values};
use crate::http::{self, Ends};
use crate::node::{Directory, Found, Full, Node, NotKnown};
use crate::proto::wire::{MAX_FOUND, Withdrawn};

/// A grape that has just started does not say yet that nobody serves a name: services that start with
/// it are about to announce themselves, and Grenache's clients remember an empty answer for 10 seconds.
const YOUNG: Duration = Duration::from_secs(5);

/// How long such an answer is held back: well within the 2.5 seconds that Link 1.0.0 waits.
const HELD: Duration = Duration::from_millis(1_500);

/// What is said where another grape does not take a worker back, or has not said that it does.
const STILL_NAMED: &str = "ERR_GRAPE_UNANNOUNCE: another grape still names it; close its port first, \
                           or unannounce it there";

/// How long a body may take to arrive.
const BODY_DEADLINE: Duration = Duration::from_secs(10);

/// How long what is too long is thrown away before its connection is closed.
const DISCARD: Duration = Duration::from_secs(1);

/// How often a name is looked up meanwhile.
const RECHECK: Duration = Duration::from_millis(20);

/// What the routes stand on.
pub(super) struct Api {
    node: Node,
    directory: Directory,
    started: Instant,
    /// Where the carrier listens, at the address that the client uses.
    carrier_port: u16,
    lease: Duration,
    max_body: usize,
}

/// A request's body, whole.
struct Payload(Bytes);

/// The argument of a request: the `data` of its object, undecoded.
struct Call<'a> {
    data: Option<&'a RawValue>,
}

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// A JSON string, with this status.
    Said(StatusCode, Cow<'static, str>),
    /// Bare text, with this status.
    Bare(StatusCode, &'static str),
}

impl Api {
    pub(super) fn new(
        node: Node,
        directory: Directory,
        config: &Config,
        carrier_port: u16,
    ) -> Self {
        Self {
            directory,
            started: Instant::now(),
            node,
            carrier_port,
            lease: config.lease,
            max_body: config.max_body,
        }
    }

    /// Who serves a name. While this grape is young it waits for somebody.
    async fn find(&self, service: &str) -> Result<Found, NotKnown> {
        let asked = Instant::now();
        loop {
            let found = self.directory.lookup(service, MAX_FOUND).await?;
            let is_final = self.started.elapsed() > YOUNG || asked.elapsed() > HELD;
            if found.peers || !found.workers.is_empty() || is_final {
                return Ok(found);
            }
            sleep(RECHECK).await;
        }
    }

    pub(super) fn routes(self) -> Router {
        Router::new()
            .route("/announce", any(announce))
            .route("/unannounce", any(unannounce))
            .route("/lookup", any(lookup))
            .route("/put", any(put))
            .route("/get", any(get))
            .route("/healthz", any(healthz))
            .fallback(unknown)
            .with_state(Arc::new(self))
    }
}

async fn announce(
    State(api): State<Arc<Api>>,
    Extension(ends): Extension<Ends>,
    payload: Payload,
) -> Result<Response, Failure> {
    let text = payload.text();
    let (service, at) = worker(&text, ends)?;
    match api.directory.announce(&service, at, api.lease) {
        Ok(()) => Ok(json("1")),
        Err(Full::Service | Full::Table) => Err(Failure::said("ERR_GRAPE_FULL")),
    }
}

async fn unannounce(
    State(api): State<Arc<Api>>,
    Extension(ends): Extension<Ends>,
    payload: Payload,
) -> Result<Response, Failure> {
    let text = payload.text();
    let (service, at) = worker(&text, ends)?;
    match api.directory.withdraw(&service, at).await {
        Withdrawn::Gone => Ok(json("1")),
        Withdrawn::Unknown => Ok(json("0")),
        Withdrawn::Left => Err(Failure::said(STILL_NAMED)),
    }
}

async fn lookup(
    State(api): State<Arc<Api>>,
    Extension(ends): Extension<Ends>,
    payload: Payload,
) -> Result<Response, Failure> {
    let text = payload.text();
    let data = Call::parse(&text)?.data;
    let service = data
        .and_then(rpc::text)
        .filter(|service| !service.is_empty());
    let service = service.ok_or(Failure::said("ERR_GRAPE_LOOKUP"))?;
    let found = api.find(&service).await;
    let mut found = found.map_err(|NotKnown| Failure::said("ERR_TIMEOUT"))?;
    if found.peers {
        found.workers.truncate(MAX_FOUND - 1);
        let carrier = SocketAddr::new(ends.here, api.carrier_port);
        found.workers.push(carrier);
    }
    Ok(json(addresses(&found.workers)))
}

async fn put(State(api): State<Arc<Api>>, payload: Payload) -> Result<Response, Failure> {
    let text = payload.text();
    let put = values::Put::parse(Call::parse(&text)?.data)?;
    let target = values::put(&api.directory, put).await?;
    Ok(json(format!("\"{target}\"")))
}

async fn get(State(api): State<Arc<Api>>, payload: Payload) -> Result<Response, Failure> {
    let text = payload.text();
    let get = values::Get::parse(Call::parse(&text)?.data)?;
    let found = values::get(&api.directory, api.node.peer_id(), get).await;
    // Nothing found is an empty body, which is not JSON.
    Ok(found.map_or_else(|| ().into_response(), json))
}

async fn healthz(State(api): State<Arc<Api>>) -> (StatusCode, &'static str) {
    http::health(&api.node)
}

async fn unknown(payload: Payload) -> Failure {
    match Call::parse(&payload.text()) {
        Ok(_) => Failure::said("ERR_REQ_NOTFOUND"),
        Err(failure) => failure,
    }
}

/// Who announces what: a service, at the client's address and the port it names.
fn worker(text: &str, ends: Ends) -> Result<(Cow<'_, str>, SocketAddr), Failure> {
    let data = Call::parse(text)?.data;
    let items = data.and_then(|data| serde_json::from_str::<Vec<&RawValue>>(data.get()).ok());
    let items = items.ok_or(Failure::said("ERR_GRAPE_ANNOUNCE"))?;
    let port = items.get(1).ok_or(Failure::PORT)?;
    // As in JavaScript, 1337.0 is an integer.
    let port: f64 = serde_json::from_str(port.get()).map_err(|_| Failure::PORT)?;
    if port.fract() != 0.0 || port == 0.0 {
        return Err(Failure::PORT);
    }
    let service = rpc::text(items[0]).ok_or(Failure::INVALID)?;
    if !(1.0..=65_535.0).contains(&port) {
        return Err(Failure::said("All queries failed"));
    }
    Ok((service, SocketAddr::new(ends.there, port as u16)))
}

fn addresses(workers: &[SocketAddr]) -> String {
    use fmt::Write;

    let mut json = String::with_capacity(2 + 24 * workers.len());
    json.push('[');
    for (index, worker) in workers.iter().enumerate() {
        let comma = if index > 0 { "," } else { "" };
        // Writing to memory does not fail.
        let _ = write!(json, "{comma}\"{worker}\"");
    }
    json.push(']');
    json
}

/// An answer. Without a content type, as grenache-grape gives none.
fn json(text: impl Into<Body>) -> Response {
    Response::new(text.into())
}

impl Payload {
    /// The body as text. As in Node.js, what is not UTF-8 becomes replacement characters.
    fn text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.0)
    }
}

impl FromRequest<Arc<Api>> for Payload {
    type Rejection = Failure;

    async fn from_request(request: Request, api: &Arc<Api>) -> Result<Self, Failure> {
        // A query makes another path of it, as in grenache-grape.
        if request.uri().query().is_some() {
            return Err(Failure::said("ERR_REQ_NOTFOUND"));
        }
        let body = body::read(request.into_body(), api.max_body, BODY_DEADLINE, |_| true).await;
        match body {
            Ok(body) => Ok(Self(body)),
            Err(BodyError::TooLarge(body)) => {
                body.discard(DISCARD).await;
                Err(Failure::TOO_LARGE)
            }
            Err(BodyError::TooSlow) => Err(Failure::TOO_SLOW),
            Err(BodyError::Broken | BodyError::NoRoom) => Err(Failure::INVALID),
        }
    }
}

impl<'a> Call<'a> {
    fn parse(text: &'a str) -> Result<Self, Failure> {
        serde_json::from_str(text).map_err(|_| Failure::INVALID)
    }
}

/// Any JSON but `null` is a call: what is not an object has no `data`. The last of several counts.
impl<'de> Deserialize<'de> for Call<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Call<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut data = None;
                while let Some(key) = map.next_key::<Cow<'de, str>>()? {
                    match &*key {
                        "data" => data = Some(map.next_value()?),
                        _ => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(Call { data })
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
                while items.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Call { data: None })
            }

            fn visit_str<E: Error>(self, _: &str) -> Result<Self::Value, E> {
                Ok(Call { data: None })
            }

            fn visit_bool<E: Error>(self, _: bool) -> Result<Self::Value, E> {
                Ok(Call { data: None })
            }

            fn visit_i64<E: Error>(self, _: i64) -> Result<Self::Value, E> {
                Ok(Call { data: None })
            }

            fn visit_u64<E: Error>(self, _: u64) -> Result<Self::Value, E> {
                Ok(Call { data: None })
            }

            fn visit_f64<E: Error>(self, _: f64) -> Result<Self::Value, E> {
                Ok(Call { data: None })
            }
        }

        deserializer.deserialize_any(Any)
    }
}

impl Failure {
    pub(super) const INVALID: Self = Self::Bare(
        StatusCode::INTERNAL_SERVER_ERROR,
        "ERR_GRAPE_PAYLOAD_INVALID",
    );
    const TOO_LARGE: Self = Self::Bare(StatusCode::PAYLOAD_TOO_LARGE, "ERR_GRAPE_PAYLOAD_SIZE");
    const TOO_SLOW: Self = Self::Bare(StatusCode::REQUEST_TIMEOUT, "ERR_GRAPE_PAYLOAD_TIMEOUT");
    const PORT: Self = Self::said("ERR_GRAPE_SERVICE_PORT");

    pub(super) const fn said(message: &'static str) -> Self {
        Self::Said(StatusCode::OK, Cow::Borrowed(message))
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        match self {
            // None of our messages has a character that JSON escapes.
            Self::Said(status, message) => (status, json(format!("\"{message}\""))).into_response(),
            Self::Bare(status, text) => {
                let mut response = (status, json(text)).into_response();
                if matches!(
                    status,
                    StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT
                ) {
                    let close = HeaderValue::from_static("close");
                    response.headers_mut().insert(CONNECTION, close);
                }
                response
            }
        }
    }
}
