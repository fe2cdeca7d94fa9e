//! Scenarios on real nodes, real sockets and the real programs.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, reason = "a test says what it could not test")]

mod border;
mod conformance;
mod gateway;
mod grenache;
// What it measures is read from Linux's /proc.
#[cfg(target_os = "linux")]
mod hostile;
#[cfg(target_os = "linux")]
mod hosts;
mod http;
mod interop;
#[cfg(target_os = "linux")]
mod namespace;
mod network;
mod process;
mod programs;
#[cfg(target_os = "linux")]
mod roaming;
mod twins;
