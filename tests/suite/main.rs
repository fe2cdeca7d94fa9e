//! Scenarios on real nodes, real sockets and the real programs.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, reason = "a test says what it could not test")]

mod interop;
mod network;
