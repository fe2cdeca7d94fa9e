//! Calls to workers that speak Grenache's RPC over HTTP.

use std::net::SocketAddr;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};

use super::worker::{CONNECT_DEADLINE, Failed, Missed};
use crate::error::innermost;
use crate::gateway::body::{self, BodyError};
use crate::gateway::rpc::{self, Answer, MAX_MESSAGE, Rid};

/// The connections at rest to one worker. HTTP/1.1 takes one for each call that is open.
const MAX_IDLE: usize = 16;

/// How long a connection rests: less than the five seconds after which Node.js closes its end, so
/// that a call seldom meets a connection that is closing.
const IDLE: Duration = Duration::from_secs(3);

/// Keeps the connections to all workers. Cheap to clone.
pub(super) type Client = legacy::Client<HttpConnector, Body>;

pub(super) fn client() -> Client {
    let mut connector = HttpConnector::new();
    connector.set_connect_timeout(Some(CONNECT_DEADLINE));
    connector.set_nodelay(true);
    legacy::Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE)
        .pool_max_idle_per_host(MAX_IDLE)
        .build(connector)
}

/// Calls the worker at an address.
pub(super) async fn call(
    client: &Client,
    at: SocketAddr,
    service: &str,
    payload: &str,
) -> Result<Answer, Missed> {
    let question = rpc::question(Rid::random(), service, payload);
    let question = question.map_err(|_| not_sent("the call cannot be written"))?;
    let request = Request::post(format!("http://{at}/"))
        .header("grc-compress", "none")
        .body(Body::from(question))
        .map_err(not_sent)?;
    let response = client
        .request(request)
        .await
        .map_err(|error| match error.is_connect() {
            true => not_sent(innermost(&error)),
            false => broken(innermost(&error)),
        })?;
    let status = response.status();
    if status.is_client_error() || status == StatusCode::NOT_IMPLEMENTED {
        return Err(Missed::OtherTransport);
    }
    // How long it may take is the caller's matter.
    let body = Body::new(response.into_body());
    let body = body::read(body, MAX_MESSAGE, Duration::MAX, |_| true).await;
    if let Err(BodyError::TooLarge(_)) = body {
        return Err(Missed::Failed(Failed::TooLarge));
    }
    let answer = body.ok().and_then(|body| {
        let answer = rpc::read_answer(str::from_utf8(&body).ok()?);
        answer.ok().map(|(_, answer)| answer)
    });
    answer.ok_or_else(|| {
        broken(format!(
            "the worker answered {status}, but not in Grenache's RPC"
        ))
    })
}

fn not_sent(reason: impl ToString) -> Missed {
    Missed::Failed(Failed::NotSent(reason.to_string()))
}

fn broken(reason: impl ToString) -> Missed {
    Missed::Failed(Failed::Broken(reason.to_string()))
}
