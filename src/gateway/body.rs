//! Bodies of HTTP messages, bounded in size and time.

use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes, HttpBody};
use futures::StreamExt;
use tokio::time::timeout;

/// The bytes of a body that is too long that are looked at: enough to show whose it is.
const BEGINNING: usize = 4 << 10;

/// Why there is no body.
#[derive(Debug)]
pub(super) enum BodyError {
    TooLarge(TooLarge),
    TooSlow,
    Broken,
    /// There was no room for it.
    NoRoom,
}

/// A body that is longer than it may be.
#[derive(Debug)]
pub(super) struct TooLarge {
    /// Its first bytes, as many as have come.
    pub(super) beginning: Vec<u8>,
    rest: BodyDataStream,
}

/// Reads a body of at most `max` bytes. `grow` is told the bytes of each part of it but the first, and
/// says whether there is room for them.
pub(super) async fn read(
    body: Body,
    max: usize,
    deadline: Duration,
    mut grow: impl FnMut(usize) -> bool,
) -> Result<Bytes, BodyError> {
    let is_announced = body.size_hint().lower() > max as u64;
    let mut rest = body.into_data_stream();
    // Of what is too long in any case, what comes first will do.
    let enough = if is_announced { 1 } else { max + 1 };
    let mut first = Bytes::new();
    let mut more = Vec::new();
    let whole = async {
        while first.len() + more.len() < enough {
            let Some(chunk) = rest.next().await else {
                return Ok(());
            };
            let chunk = chunk.map_err(|_| BodyError::Broken)?;
            if first.is_empty() {
                // Most have no other, and are not copied.
                first = chunk;
            } else if grow(chunk.len()) {
                more.extend_from_slice(&chunk);
            } else {
                return Err(BodyError::NoRoom);
            }
        }
        Ok(())
    };
    timeout(deadline, whole)
        .await
        .unwrap_or(Err(BodyError::TooSlow))?;
    let body = match more.is_empty() {
        true => first,
        false => [&first[..], &more[..]].concat().into(),
    };
    if body.len() <= max && !is_announced {
        return Ok(body);
    }
    let beginning = body[..body.len().min(BEGINNING)].to_vec();
    Err(BodyError::TooLarge(TooLarge { beginning, rest }))
}

impl TooLarge {
    /// Throws the rest away, for so long at most. A client that is still sending when its connection is
    /// closed would see that instead of its answer.
    pub(super) async fn discard(mut self, patience: Duration) {
        let discarded = async { while let Some(Ok(_)) = self.rest.next().await {} };
        // Either end is the same.
        let _ = timeout(patience, discarded).await;
    }
}
