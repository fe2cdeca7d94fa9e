//! Requests and replies.
//!
//! * [`serve`]: the requests of others. A stream may carry one or many; each is served by the same
//!   handlers within one [`budget`], and its [`replies`] leave as they come.
//! * [`link`]: the way to one peer, which all requests to it share.
//! * [`kept`]: requests to a peer, pipelined over a stream that stays open. Used once it is known
//!   that the peer is one of ours, which serves such streams.
//! * [`single`]: a stream for each request, as every libp2p implementation can; the first requests
//!   to a peer, and all to a foreign one.
//! * [`outbox`]: the frames that wait to be written to a stream of either side.
//! * [`streams`]: opens and accepts the streams, and knows nothing of what they carry.
//!
//! Only opening a stream takes the Swarm's task; reading, decoding, handling and writing do not.

mod budget;
pub(crate) mod kept;
pub(crate) mod link;
mod outbox;
pub(crate) mod replies;
pub(crate) mod serve;
pub(crate) mod single;
pub(crate) mod streams;

use crate::proto::wire::{ErrorCode, RemoteError};

/// What became of a caller's request.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// The provider answered.
    Answered(Result<Vec<u8>, RemoteError>),
    /// It was never sent.
    NotSent(String),
    /// It was sent, and may have run.
    Broken(String),
    /// Its deadline has passed; it may have run, and may still.
    TimedOut,
}

impl Outcome {
    /// What it says as the answer to whether a name is served; `None`: it is none.
    pub(crate) fn serves(self) -> Option<bool> {
        match self {
            Self::Answered(Ok(payload)) => Some(payload == [1]),
            // Another implementation, which cannot be asked this.
            Self::Answered(Err(error)) if error.code == ErrorCode::UnknownService => Some(true),
            Self::Answered(Err(_)) | Self::NotSent(_) | Self::Broken(_) | Self::TimedOut => None,
        }
    }
}
