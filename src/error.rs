//! One error enum for each verb. All are `Clone + PartialEq` and name no libp2p type but addresses and
//! ids. They say in [`is_retryable`](RequestError::is_retryable) whether the same call may succeed
//! later without a change.

use std::io::{self, ErrorKind};
#[cfg(feature = "http")]
use std::net::SocketAddr;
use std::{error, fmt};

use libp2p::{Multiaddr, PeerId};
use thiserror::Error;

use crate::limits::OutOfRange;
use crate::name::ServiceName;
pub use crate::proto::wire::{ErrorCode, RemoteError};

/// Why a node could not start.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SpawnError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {reason}")]
    Listen {
        /// The address as it was given.
        address: Multiaddr,
        /// What the system said, with the remedy where there is one.
        reason: String,
    },
    /// More bootstrap addresses than a node takes.
    #[error("{given} bootstrap addresses were given; at most {max} are taken")]
    TooManyBootstrap {
        /// How many were given.
        given: usize,
        /// How many are taken.
        max: usize,
    },
    /// A limit that no node can work by.
    #[error("limits: {0}")]
    Limits(#[from] OutOfRange),
    /// The encrypted transport could not be set up.
    #[error("cannot set up the transport: {0}")]
    Transport(String),
}

impl SpawnError {
    /// Whether the same call may succeed later: the program that uses a port may end, an address
    /// may come up.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Listen { .. } => true,
            Self::TooManyBootstrap { .. } | Self::Limits(_) | Self::Transport(_) => false,
        }
    }
}

/// Why a name could not be announced.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum AnnounceError {
    /// This node announces the name already.
    #[error("this node announces {0} already")]
    AlreadyAnnounced(ServiceName),
    /// This node announces as many names as one node may.
    #[error("this node announces {max} names already, the most that one node may")]
    TooMany {
        /// How many one node may announce.
        max: usize,
    },
    /// This node does not listen, so that nobody could call it.
    #[error("this node does not listen; give it an address to listen on")]
    NotListening,
    /// No grape can ever be reached: none was given, or each one given is refused.
    #[error("no grape to announce at: {0}")]
    NoGrape(NoGrape),
    /// The node was shut down.
    #[error("the node is shut down")]
    Closed,
}

impl AnnounceError {
    /// Whether the same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::NoGrape(_) => true,
            Self::AlreadyAnnounced(_)
            | Self::TooMany { .. }
            | Self::NotListening
            | Self::Closed => false,
        }
    }
}

fn peers(count: usize) -> String {
    match count {
        1 => "1 peer".into(),
        _ => format!("{count} peers"),
    }
}

/// Why a lookup found nobody.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LookupError {
    /// Nobody announces the name.
    #[error("nobody announces {0}")]
    NotFound(ServiceName),
    /// The name is announced, but none of its providers answers.
    #[error("{name} is announced by {}, but none can be reached", peers(*providers))]
    Unreachable {
        /// The name that was looked up.
        name: ServiceName,
        /// How many providers were tried.
        providers: usize,
    },
    /// No grape can be asked.
    #[error("no grape to ask: {0}")]
    NoGrape(NoGrape),
    /// No answer within [`LOOKUP_DEADLINE`](crate::limits::LOOKUP_DEADLINE), or none from most of the grapes
    /// that are responsible.
    #[error("looking up {0} took too long")]
    TimedOut(ServiceName),
    /// The node was shut down.
    #[error("the node is shut down")]
    Closed,
}

impl LookupError {
    /// Whether the same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::NotFound(_) | Self::Unreachable { .. } | Self::NoGrape(_) | Self::TimedOut(_) => {
                true
            }
            Self::Closed => false,
        }
    }
}

/// Why a request was not answered with `ok`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RequestError {
    /// The name could not be resolved; nothing was sent.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// No provider could be reached; nothing was sent.
    #[error("{name} cannot be reached: {reason}")]
    Unreachable {
        /// The name that was called.
        name: ServiceName,
        /// Why the last provider could not be reached.
        reason: String,
    },
    /// A provider is named for the name and could not be reached in time; nothing was sent to it.
    #[error("{provider} is named for {name}, and does not answer")]
    Unreached {
        /// The name that was called.
        name: ServiceName,
        /// The provider that was named. Nobody has proved that it is one.
        provider: PeerId,
    },
    /// Every provider has its hands full; none has run the request.
    #[error("every provider of {0} is busy")]
    Busy(ServiceName),
    /// The provider answered with an error of its own.
    #[error("{provider} answered: {error}")]
    Remote {
        /// The provider that answered.
        provider: PeerId,
        /// What it answered.
        error: Box<RemoteError>,
    },
    /// The connection broke after the request was sent: it may have run.
    #[error("the connection to {provider} broke; the request may have run: {reason}")]
    Interrupted {
        /// The provider that the request was sent to.
        provider: PeerId,
        /// How it broke.
        reason: String,
    },
    /// The deadline passed. If the request was sent, it may have run.
    #[error("no reply from {0} in time; the request may have run")]
    TimedOut(ServiceName),
    /// The payload is larger than a frame carries; nothing was sent.
    #[error("the payload has {len} bytes; at most {max} can be sent")]
    TooLarge {
        /// Its length in bytes.
        len: usize,
        /// The most that can be sent, in bytes.
        max: usize,
    },
    /// The node was shut down.
    #[error("the node is shut down")]
    Closed,
}

impl RequestError {
    /// Whether the same call may be repeated without running twice, and may succeed then.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Lookup(error) => error.is_retryable(),
            Self::Unreachable { .. } | Self::Unreached { .. } | Self::Busy(_) => true,
            Self::Remote { .. }
            | Self::Interrupted { .. }
            | Self::TimedOut(_)
            | Self::TooLarge { .. }
            | Self::Closed => false,
        }
    }
}

/// What became of each bootstrap address when no grape is connected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NoGrape {
    /// Each address that was tried, and why it failed.
    pub tried: Vec<(Multiaddr, DialFailure)>,
}

impl fmt::Display for NoGrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.tried.is_empty() {
            return f.write_str("no bootstrap address was given");
        }
        for (index, (address, failure)) in self.tried.iter().enumerate() {
            if index > 0 {
                f.write_str("; ")?;
            }
            write!(f, "{address}: {failure}")?;
        }
        Ok(())
    }
}

/// Why an address could not be dialled.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DialFailure {
    /// Another node than the expected one answers there.
    #[error("expected the node {expected}, but {found} answers there; correct the /p2p/ part")]
    WrongPeer {
        /// The id that the address ends in.
        expected: PeerId,
        /// The id of the node that answers.
        found: PeerId,
    },
    /// A node answers there that is no grape.
    #[error("a peer answers there, not a grape; use the address of a grape")]
    NotAGrape,
    /// The address leads to this node itself.
    #[error("this is the node's own address, or another node has a copy of its key")]
    OwnAddress,
    /// Nobody answers, or not in our protocols.
    #[error("{0}")]
    Unreachable(String),
}

impl DialFailure {
    /// Whether dialling the same address again can lead to another end.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::WrongPeer { .. } | Self::NotAGrape | Self::Unreachable(_) => true,
            Self::OwnAddress => false,
        }
    }
}

/// A socket address cannot be listened on.
#[cfg(feature = "http")]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot listen on {address}: {reason}")]
#[non_exhaustive]
pub struct ListenError {
    /// The address as it was given.
    pub address: SocketAddr,
    /// What the system said, with the remedy where there is one.
    pub reason: String,
}

/// What the system said, with the remedy where there is one.
pub(crate) fn explain(error: &(dyn error::Error + 'static)) -> String {
    match system_error(error) {
        Some(ErrorKind::AddrInUse) => {
            "another program uses this port; stop it or choose another one".into()
        }
        Some(ErrorKind::PermissionDenied) => {
            "this port needs privileges; choose one above 1023".into()
        }
        Some(ErrorKind::AddrNotAvailable) => "this machine has no such address".into(),
        _ => innermost(error).to_string(),
    }
}

/// What kind of error the system gave; libraries may have kept nothing of it but the text.
pub(crate) fn system_error(error: &(dyn error::Error + 'static)) -> Option<ErrorKind> {
    let text = innermost(error).to_string();
    let (_, code) = text.rsplit_once("(os error ")?;
    let code = code.strip_suffix(')')?.parse().ok()?;
    Some(io::Error::from_raw_os_error(code).kind())
}

/// An error and what has led to it: libraries wrap what the system said in several layers.
pub(crate) fn causes<'a>(
    error: &'a (dyn error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn error::Error + 'static)> {
    std::iter::successors(Some(error), |error| {
        // What an I/O error wraps is not its source.
        let inner = error.downcast_ref().and_then(io::Error::get_ref);
        inner.map(|inner| inner as _).or_else(|| error.source())
    })
}

/// The cause that says most.
pub(crate) fn innermost<'a>(error: &'a (dyn error::Error + 'static)) -> &'a dyn error::Error {
    causes(error).last().unwrap_or(error)
}
