//! Scenarios on real nodes, real sockets and the real programs.

mod interop;
mod network;
