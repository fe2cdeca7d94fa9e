//! Describes a node and starts it.

use std::time::Duration;

use libp2p::{Multiaddr, PeerId};

use super::Node;
use crate::error::SpawnError;
use crate::identity::Identity;
use crate::limits::{LEASE, Limits, MAX_BOOTSTRAP, MIN_LEASE};
use crate::net::{self, Settings, Transport};

/// What a node is for. A preset of its [`Builder`], nothing more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// Keeps the announcements of others and answers for them: Kademlia server, rendezvous point,
    /// bootstrap node.
    Grape,
    /// Announces, looks up and calls names.
    Peer,
}

/// Describes a node; [`spawn`](Self::spawn) starts it.
///
/// Without further calls it has a new identity, does not listen and knows no grape.
#[derive(Debug)]
#[must_use = "a node runs only once it is spawned"]
pub struct Builder {
    settings: Settings,
}

impl Builder {
    pub(super) fn new(role: Role) -> Self {
        let settings = Settings {
            identity: Identity::generate(),
            transport: Transport::Network,
            listen: Vec::new(),
            external: Vec::new(),
            bootstrap: Vec::new(),
            registrar: matches!(role, Role::Grape),
            allowed: None,
            blocked: Vec::new(),
            lease: LEASE,
            limits: Limits::default(),
        };
        Self { settings }
    }

    /// The node's key pair; a new one by default.
    pub fn identity(mut self, identity: Identity) -> Self {
        self.settings.identity = identity;
        self
    }

    /// Listens on these addresses: `/ip4/<ip>/tcp/<port>` and `/ip4/<ip>/udp/<port>/quic-v1`, or
    /// `/ip6/...`. Port 0 is any free one, 0.0.0.0 every interface. A node that announces names
    /// must listen.
    pub fn listen(mut self, addresses: impl IntoIterator<Item = Multiaddr>) -> Self {
        self.settings.listen.extend(addresses);
        self
    }

    /// Tells others these addresses too, for a node behind a forwarded port.
    pub fn external(mut self, addresses: impl IntoIterator<Item = Multiaddr>) -> Self {
        self.settings.external.extend(addresses);
        self
    }

    /// The grapes to join the network by. A `/p2p/<id>` at the end is checked when given and
    /// learned when not. At most [`MAX_BOOTSTRAP`].
    pub fn bootstrap(mut self, addresses: impl IntoIterator<Item = Multiaddr>) -> Self {
        self.settings.bootstrap.extend(addresses);
        self
    }

    /// Lets only these peers connect. Without this call everybody may.
    pub fn allow_only(mut self, peers: impl IntoIterator<Item = PeerId>) -> Self {
        let allowed = self.settings.allowed.get_or_insert_default();
        allowed.extend(peers);
        self
    }

    /// Lets these peers not connect, until [`Node::unblock`].
    pub fn block(mut self, peers: impl IntoIterator<Item = PeerId>) -> Self {
        self.settings.blocked.extend(peers);
        self
    }

    /// What the node takes on at once.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.settings.limits = limits;
        self
    }

    /// The longest lease that a grape grants: [`LEASE`] by default, which is the most, and at least
    /// [`MIN_LEASE`]. Peers renew after a third of it.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.settings.lease = lease.clamp(MIN_LEASE, LEASE);
        self
    }

    /// Runs over channels inside this process; addresses are then `/memory/<number>`.
    pub(crate) fn in_memory(mut self) -> Self {
        self.settings.transport = Transport::Memory;
        self
    }

    /// Starts the node in a task of its own; returns when it listens on every address. The
    /// bootstrap grapes are dialled in the background.
    ///
    /// Must be called within a Tokio runtime with I/O and time enabled. Cancel-safe: a node whose
    /// future is dropped ends.
    ///
    /// # Errors
    /// [`SpawnError::Listen`] if an address cannot be listened on,
    /// [`SpawnError::TooManyBootstrap`], [`SpawnError::Limits`] if one of them is out of its range,
    /// [`SpawnError::Transport`].
    pub async fn spawn(self) -> Result<Node, SpawnError> {
        let given = self.settings.bootstrap.len();
        if given > MAX_BOOTSTRAP {
            return Err(SpawnError::TooManyBootstrap {
                given,
                max: MAX_BOOTSTRAP,
            });
        }
        self.settings.limits.check()?;
        let peer = self.settings.identity.peer_id();
        let handle = net::start(self.settings).await?;
        Ok(Node::new(peer, handle))
    }
}
