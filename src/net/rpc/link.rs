//! The way to one peer: what all requests to it share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use libp2p::swarm::Stream;
use tokio::sync::{Semaphore, oneshot};

use super::kept::Kept;
use crate::limits::{MAX_LARGE_TO_PEER, MAX_PIPELINED_TO_PEER, MAX_SINGLE_REQUESTS};
use crate::metrics::Metrics;
use crate::proto::routes;

/// Payloads from this size on go over a stream of their own, so that small ones need not wait for
/// them: about what a millisecond of encryption is worth.
const LARGE: usize = 64 * 1024;

#[derive(Debug)]
pub(crate) struct Link {
    connected: AtomicBool,
    /// One permit for each request that may have a stream of its own.
    single: Arc<Semaphore>,
    small: Kept,
    large: Kept,
}

/// Which of a peer's streams a payload goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    Small,
    Large,
}

impl Lane {
    pub(crate) fn of(payload: &[u8]) -> Self {
        if payload.len() < LARGE {
            Self::Small
        } else {
            Self::Large
        }
    }
}

impl Link {
    /// The slots for requests that have a stream of their own, never closed.
    pub(crate) fn single(&self) -> &Arc<Semaphore> {
        &self.single
    }

    /// Whether requests have streams of their own for which a kept one would do.
    pub(crate) fn wants_kept(&self) -> bool {
        self.single.available_permits() < MAX_SINGLE_REQUESTS
    }

    /// Keeps a stream for payloads of a lane, which `open` opens, unless there is one.
    pub(crate) fn keep(
        self: Arc<Self>,
        lane: Lane,
        metrics: Arc<Metrics>,
        open: impl FnOnce() -> oneshot::Receiver<Stream>,
    ) {
        if self.lane(lane).begin() {
            let stream = open();
            tokio::spawn(async move { self.lane(lane).keep(stream, metrics).await });
        }
    }

    /// The kept stream for payloads of a lane.
    pub(crate) fn lane(&self, lane: Lane) -> &Kept {
        match lane {
            Lane::Small => &self.small,
            Lane::Large => &self.large,
        }
    }
}

impl Default for Link {
    fn default() -> Self {
        Self {
            connected: AtomicBool::new(false),
            single: Arc::new(Semaphore::new(MAX_SINGLE_REQUESTS)),
            small: Kept::new(MAX_PIPELINED_TO_PEER),
            large: Kept::new(MAX_LARGE_TO_PEER),
        }
    }
}

impl routes::Link for Link {
    fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Acquire)
    }

    fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Release);
    }

    fn load(&self) -> usize {
        let single = MAX_SINGLE_REQUESTS - self.single.available_permits();
        self.small.load() + self.large.load() + single
    }
}
