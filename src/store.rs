//! What a grape keeps for others: provider records, workers, values. All bounded, shared fairly between
//! networks, and gone when their lease ends.
//!
//! Each table is a struct without I/O, to which time comes as `now`; [`Registry`] holds them all, each
//! behind its own lock.

mod batches;
mod heap;
mod index;
mod names;
mod prefix;
mod providers;
mod registry;
mod ring;
mod sessions;
mod slab;
pub(crate) mod values;
mod weights;
mod withdrawn;
pub(crate) mod workers;

use std::time::Duration;

pub(crate) use batches::BatchRefused;
pub(crate) use names::NotTaken;
pub(crate) use prefix::Prefix;
pub(crate) use providers::{Due, NewRecord, Origin, Parting, Providers, Stats, Upkeep};
pub(crate) use registry::{Records, Registry};

/// Nanoseconds since a table was made.
type Nanos = u64;

fn nanos(duration: Duration) -> Nanos {
    Nanos::try_from(duration.as_nanos()).unwrap_or(Nanos::MAX)
}
