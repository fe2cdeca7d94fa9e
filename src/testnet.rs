//! A small network inside one process, for tests and examples.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::try_join_all;
use libp2p::Multiaddr;
use libp2p::multiaddr::Protocol;
use rand::seq::IndexedRandom;

use crate::Status;
use crate::error::SpawnError;
use crate::node::{Builder, Node, Role};

/// The grapes that a further node joins by.
const BOOTSTRAP: usize = 8;

/// The earlier grapes that a grape joins by. It stays connected to these for good, so that as many
/// as in [`BOOTSTRAP`] would keep a large network busy with nothing else.
const GRAPE_BOOTSTRAP: usize = 3;

/// The grapes that start at once, when there are at least as many. Kademlia explores a small routing
/// table again whenever a grape comes half a second after the last one, so that one by one is the
/// slowest way to start many.
const BATCH: usize = 32;

/// In a network of this size each grape meets a hundred others when it joins: the next ones start
/// when it has, so that the machine keeps up.
const CROWD: usize = 128;

/// How long a connection rests before it is closed: a network of hundreds would fill the memory of
/// its one process with the connections of each to most of the others.
const IDLE: Duration = Duration::from_secs(30);

/// Grapes that know each other, over channels instead of sockets.
///
/// The nodes are real in all but the transport. It ends with its last node.
#[derive(Clone, Debug)]
pub struct Testnet {
    grapes: Vec<Node>,
}

impl Testnet {
    /// Starts `grapes` grapes, each with earlier ones as bootstrap (of more than 3, with 3 of
    /// them drawn at random), and returns when each is connected to one.
    ///
    /// Cancel-safe: grapes whose future is dropped end.
    ///
    /// # Errors
    /// As [`Builder::spawn`].
    pub async fn new(grapes: usize) -> Result<Self, SpawnError> {
        let mut testnet = Self { grapes: Vec::new() };
        while testnet.grapes.len() < grapes {
            let started = testnet.grapes.len();
            let batch = match started < BOOTSTRAP {
                true => 1,
                false => BATCH.min(started).min(grapes - started),
            };
            let spawned = (0..batch).map(|_| {
                let drawn = testnet.grapes.sample(&mut rand::rng(), GRAPE_BOOTSTRAP);
                testnet.joining(Role::Grape, drawn).spawn()
            });
            for grape in try_join_all(spawned).await? {
                if started > 0 {
                    let crowded = started >= CROWD;
                    let has_joined =
                        |status: &Status| status.is_online() && (status.explored || !crowded);
                    // Fails only if the grape has stopped, which its user then sees.
                    let _ = grape.status().wait_for(has_joined).await;
                }
                testnet.grapes.push(grape);
            }
        }
        Ok(testnet)
    }

    /// The grapes, in the order they were started.
    pub fn grapes(&self) -> &[Node] {
        &self.grapes
    }

    /// Describes a further node that joins by the grapes (the first 8) and listens in this
    /// process.
    pub fn builder(&self, role: Role) -> Builder {
        self.joining(role, self.grapes.iter().take(BOOTSTRAP))
    }

    /// Describes a further node that joins by these grapes only, and listens in this process.
    pub fn joining<'a>(&self, role: Role, grapes: impl IntoIterator<Item = &'a Node>) -> Builder {
        let bootstrap = grapes.into_iter().flat_map(Node::addresses);
        Node::builder(role)
            .in_memory()
            .limits(crate::limits::Limits {
                // The memory of all the other nodes is this process's too.
                memory: None,
                idle: IDLE,
                // All grapes of hundreds at once would leave the process time for little else.
                explore: None,
                ..Default::default()
            })
            .listen([free_address()])
            .bootstrap(bootstrap)
    }

    /// Starts a peer that joins by the grapes. Cancel-safe.
    ///
    /// # Errors
    /// As [`Builder::spawn`].
    pub async fn peer(&self) -> Result<Node, SpawnError> {
        self.builder(Role::Peer).spawn().await
    }
}

/// An address that no other node of this process has.
fn free_address() -> Multiaddr {
    // The transport draws numbers for port 0 at random; these never meet.
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    Multiaddr::empty().with(Protocol::Memory(number))
}
