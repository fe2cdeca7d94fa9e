//! People and programs find each other by name and talk, with no central server.

pub mod chat;
pub mod identity;
pub mod name;
pub mod proto;
pub mod text;
