//! People and programs find each other by name and talk, with no central server.
//!
//! *Grapes* form a Kademlia DHT. A *peer* announces a name; anybody who knows one grape looks the
//! name up and sends requests to it, encrypted and straight to the peer. [`Node`] is all of it; what
//! it does is a matter of its [`Role`].
//!
//! ```
//! use grapevine::{ServiceName, Testnet};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Two grapes in this process. Elsewhere: Node::builder(Role::Peer).bootstrap([...]).spawn()
//! let testnet = Testnet::new(2).await?;
//! let name: ServiceName = "client1".parse()?;
//!
//! // One side announces the name and answers.
//! let server = testnet.peer().await?;
//! let mut service = server.announce(&name).await?;
//! tokio::spawn(async move {
//!     while let Some(request) = service.next().await {
//!         let echo = format!("Echo: {}", String::from_utf8_lossy(request.payload()));
//!         request.reply(echo);
//!     }
//! });
//!
//! // The other side knows nothing but the name.
//! let client = testnet.peer().await?;
//! let reply = client.request(&name, "hello").await?;
//! assert_eq!(reply.text()?, "Echo: hello");
//! assert_eq!(reply.provider, server.peer_id());
//!
//! client.shutdown().await;
//! server.shutdown().await;
//! # Ok(())
//! # }
//! ```
//!
//! * **Announcing** is a lease: [`Node::announce`] returns once a grape holds the name, renews it
//!   while the [`Service`] lives and takes it back when that is dropped.
//! * **Looking up** does not lie: [`Node::lookup`] returns who has just been dialled and has said
//!   that it serves the name, and an error at once when nobody does.
//! * **Requests** ([`Node::request`]) spread over the providers of a name, go on to the next one when
//!   one cannot be reached or is busy, and never run twice unless [`Delivery`] allows it.
//!   [`Node::broadcast`] asks all of them.
//! * **Everything a remote can send is bounded**, in size, number, rate and time: see [`limits`].
//! * **At the edges**, behind features of their names: `gateway` speaks to Grenache's programs, `monitor`
//!   to Prometheus.
//! * The [wire](proto) is one page; libp2p's stock Kademlia and rendezvous clients work against a
//!   grape.
//!
//! The library never prints, and reads neither environment nor command line. It logs by `tracing`.

#![cfg_attr(
    not(feature = "gateway"),
    allow(
        dead_code,
        unused_imports,
        reason = "the gateway is who uses the directory of workers"
    )
)]

pub mod chat;
pub mod error;
#[cfg(feature = "gateway")]
pub mod gateway;
#[cfg(feature = "http")]
mod http;
pub mod identity;
pub mod limits;
mod metrics;
#[cfg(feature = "monitor")]
pub mod monitor;
pub mod name;
mod net;
mod node;
pub mod proto;
mod store;
pub mod testnet;
pub mod text;

pub use libp2p::identity::Keypair;
pub use libp2p::{Multiaddr, PeerId, multiaddr};

pub use identity::Identity;
pub use metrics::Snapshot;
pub use name::ServiceName;
pub use net::Status;
pub use node::{
    Builder, Delivery, Node, Provider, Replies, Reply, Request, RequestOptions, Role, Service,
};
pub use proto::bootstrap::BootstrapStatus;
pub use testnet::Testnet;
