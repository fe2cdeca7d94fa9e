//! People and programs find each other by name and talk, with no central server.

pub mod chat;
pub mod error;
pub mod identity;
pub mod limits;
mod metrics;
pub mod name;
mod net;
mod node;
pub mod proto;
#[doc(hidden)]
pub mod store;
pub mod testnet;
pub mod text;

pub use libp2p::identity::Keypair;
pub use libp2p::{Multiaddr, PeerId};

pub use identity::Identity;
pub use metrics::Snapshot;
pub use name::ServiceName;
pub use net::Status;
pub use node::{Builder, Delivery, Node, Provider, Reply, Request, RequestOptions, Role, Service};
pub use proto::bootstrap::BootstrapStatus;
pub use testnet::Testnet;
