//! Scenarios on real nodes, real sockets and the real programs.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod network;
