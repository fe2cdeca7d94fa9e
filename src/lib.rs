//! People and programs find each other by name and talk, with no central server.

#[doc(hidden)]
pub mod proto;
