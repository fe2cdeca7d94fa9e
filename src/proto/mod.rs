//! What goes over the wire: frames and messages, and the bounds on both.

pub mod frame;
pub mod rendezvous;
