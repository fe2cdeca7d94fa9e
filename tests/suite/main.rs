//! Scenarios on real nodes, real sockets and the real programs.

// Helpers of tests are tests too.
#![allow(clippy::unwrap_used)]

mod network;
mod programs;
