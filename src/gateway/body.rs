//! Bodies of HTTP messages, bounded in size and time.

use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use futures::StreamExt;
use tokio::time::timeout;

/// How long a body may take to arrive.
const DEADLINE: Duration = Duration::from_secs(10);

/// How long what is too long is thrown away before its connection is closed. A client that is
/// still sending would otherwise see it reset instead of the answer.
const DISCARD: Duration = Duration::from_secs(1);

/// Why there is no body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BodyError {
    TooLarge,
    TooSlow,
    Broken,
}

/// Reads a body of at most `max` bytes.
pub(super) async fn read(body: Body, max: usize) -> Result<Bytes, BodyError> {
    let announced = body.size_hint().lower();
    let mut chunks = body.into_data_stream();
    let whole = async {
        if announced > max as u64 {
            return Err(BodyError::TooLarge);
        }
        let Some(first) = chunks.next().await else {
            return Ok(Bytes::new());
        };
        let first = first.map_err(|_| BodyError::Broken)?;
        let mut more = Vec::new();
        while first.len() + more.len() <= max {
            match chunks.next().await {
                None if more.is_empty() => return Ok(first),
                None => return Ok([&first[..], &more[..]].concat().into()),
                Some(chunk) => more.extend_from_slice(&chunk.map_err(|_| BodyError::Broken)?),
            }
        }
        Err(BodyError::TooLarge)
    };
    let read = timeout(DEADLINE, whole).await;
    let read = read.unwrap_or(Err(BodyError::TooSlow));
    if read == Err(BodyError::TooLarge) {
        let discard = async { while let Some(Ok(_)) = chunks.next().await {} };
        // Either end is the same: the connection is closed.
        let _ = timeout(DISCARD, discard).await;
    }
    read
}
