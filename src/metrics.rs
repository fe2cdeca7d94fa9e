//! Counters of what a node has done, cheap enough to be always on.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::store::Stats;

/// A number that only grows.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that is set.
#[derive(Debug, Default)]
pub(crate) struct Gauge(AtomicU64);

impl Gauge {
    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counters that a node's driver writes.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    pub(crate) lookups: Counter,
    pub(crate) lookups_found: Counter,
    pub(crate) kademlia_requests: Counter,
    pub(crate) names_requests: Counter,
    pub(crate) requests_sent: Counter,
    pub(crate) requests_received: Counter,
    pub(crate) requests_refused: Counter,
    pub(crate) names_told: Counter,
    pub(crate) names_sought: Counter,
    pub(crate) open_requests: Gauge,
    pub(crate) peers: Gauge,
    pub(crate) announced: Gauge,
}

/// What a node has done since it started, and what it holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// Lookups begun; several callers of one name at once are one.
    pub lookups: u64,
    /// Lookups that found a live provider.
    pub lookups_found: u64,
    /// Kademlia requests sent by queries for lookups.
    pub kademlia_requests: u64,
    /// Requests sent to the registries of names of grapes; each may be for many names.
    pub names_requests: u64,
    /// Requests sent to other nodes.
    pub requests_sent: u64,
    /// Requests of other nodes that went to a handler.
    pub requests_received: u64,
    /// Requests of other nodes that were answered with an error instead.
    pub requests_refused: u64,
    /// Requests of other nodes that are open now.
    pub open_requests: u64,
    /// Names that other nodes announced or renewed at this grape's registry, and that it keeps.
    pub names_told: u64,
    /// Names that other nodes looked up in it.
    pub names_sought: u64,
    /// Peers connected now.
    pub peers: u64,
    /// Other grapes known now.
    pub grapes: u64,
    /// Names this node announces now.
    pub announced: u64,
    /// Provider records of other nodes kept now.
    pub stored: u64,
    /// Workers kept now: those that announced themselves at this grape, and those of other grapes.
    pub workers: u64,
    /// Values kept now.
    pub values: u64,
    /// Provider records dropped to make room for somebody who held fewer.
    pub evicted: u64,
    /// Provider records refused.
    pub refused: u64,
    /// Provider records dropped because their lease had ended.
    pub expired: u64,
}

/// What a node keeps for others now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kept {
    pub(crate) grapes: usize,
    pub(crate) records: Stats,
    pub(crate) workers: usize,
    pub(crate) values: usize,
}

impl Metrics {
    /// What has been counted, beside what is kept now.
    pub(crate) fn snapshot(&self, kept: Kept) -> Snapshot {
        Snapshot {
            lookups: self.lookups.count(),
            lookups_found: self.lookups_found.count(),
            kademlia_requests: self.kademlia_requests.count(),
            names_requests: self.names_requests.count(),
            requests_sent: self.requests_sent.count(),
            requests_received: self.requests_received.count(),
            requests_refused: self.requests_refused.count(),
            open_requests: self.open_requests.value(),
            names_told: self.names_told.count(),
            names_sought: self.names_sought.count(),
            peers: self.peers.value(),
            grapes: kept.grapes as u64,
            announced: self.announced.value(),
            stored: kept.records.records,
            workers: kept.workers as u64,
            values: kept.values as u64,
            evicted: kept.records.evicted,
            refused: kept.records.refused,
            expired: kept.records.expired,
        }
    }
}
