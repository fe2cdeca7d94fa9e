//! What a user holds: a [`Node`], made by a [`Builder`] for a [`Role`].

mod builder;
mod call;
#[cfg(feature = "gateway")]
mod directory;
mod seeking;
mod service;

use std::sync::Arc;

use libp2p::{Multiaddr, PeerId};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::timeout;

pub use builder::{Builder, Role};
pub use call::{Delivery, Replies, Reply, RequestOptions};
pub use service::{Request, Service};

#[cfg(feature = "gateway")]
pub(crate) use crate::net::{Carried, ServesQuestion};
#[cfg(feature = "gateway")]
pub(crate) use crate::store::workers::Full;
#[cfg(feature = "gateway")]
pub(crate) use directory::{Directory, Found, NotKnown, PutError};

use crate::error::{AnnounceError, LookupError, RequestError};
use crate::limits::{LOOKUP_DEADLINE, MAX_LOOKUPS, SHUTDOWN_DEADLINE};
use crate::metrics::{Kept, Snapshot};
use crate::name::ServiceName;
use crate::net::{Command, Handle, Link, Status, Waiter};
use crate::proto::routes::Routes;

/// A member of the network: it announces names, looks names up and calls them.
///
/// Cheap to clone; all clones are the same node. It runs in a task of its own until
/// [`shutdown`](Self::shutdown), or until the last clone and the last [`Service`] are dropped; then
/// it takes its names back in the background, if the runtime lives long enough.
#[derive(Clone, Debug)]
pub struct Node {
    shared: Arc<Shared>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    peer: PeerId,
    handle: Handle,
    lookups: Arc<Semaphore>,
    #[cfg(feature = "gateway")]
    directory: directory::Shared,
}

/// A live provider of a name: it has just said that it serves it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Provider {
    /// Its id, proved by its key.
    pub peer: PeerId,
}

impl Node {
    /// Begins to describe a node.
    pub fn builder(role: Role) -> Builder {
        Builder::new(role)
    }

    pub(crate) fn new(peer: PeerId, handle: Handle) -> Self {
        let shared = Shared {
            peer,
            handle,
            lookups: Arc::new(Semaphore::new(MAX_LOOKUPS)),
            #[cfg(feature = "gateway")]
            directory: directory::Shared::default(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// This node's id.
    pub fn peer_id(&self) -> PeerId {
        self.shared.peer
    }

    /// The addresses at which this node can be dialled, each ending in `/p2p/<id>`. Empty when it
    /// does not listen.
    pub fn addresses(&self) -> Vec<Multiaddr> {
        self.shared.handle.status.borrow().addresses.clone()
    }

    /// What this node knows of its place in the network, now and whenever that changes.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.shared.handle.status.clone()
    }

    /// What this node has done and holds.
    pub fn metrics(&self) -> Snapshot {
        let handle = &self.shared.handle;
        let (own, others) = handle.registry.workers().len();
        let kept = Kept {
            grapes: handle.grapes.borrow().len(),
            records: handle.registry.providers().stats(),
            workers: own + others,
            values: handle.registry.values().len(),
        };
        handle.metrics.snapshot(kept)
    }

    /// Announces a name, and returns when a grape holds it: from then on others find it.
    ///
    /// While no grape can be reached this waits for one, for as long as it takes; bound it by
    /// dropping the future. The announcement is renewed in the background, at every grape again when
    /// it reconnects, and taken back when the [`Service`] is dropped. A grape takes 20,000 names at
    /// once from one node, and beyond them 2,000 each second.
    ///
    /// Cancel-safe: dropping the future takes the name back.
    ///
    /// # Errors
    /// [`AnnounceError::AlreadyAnnounced`] if this node announces the name,
    /// [`AnnounceError::TooMany`] beyond [`MAX_ANNOUNCED`](crate::limits::MAX_ANNOUNCED) names,
    /// [`AnnounceError::NotListening`] if nobody could call this node,
    /// [`AnnounceError::NoGrape`] if no bootstrap address was given or each is answered by another
    /// node than it names, [`AnnounceError::Closed`] after [`shutdown`](Self::shutdown).
    pub async fn announce(&self, name: &ServiceName) -> Result<Service, AnnounceError> {
        let (service, handler) = Service::new(name.clone(), self.clone());
        let (done, published) = oneshot::channel();
        let command = Command::Announce {
            name: name.clone(),
            handler,
            done,
        };
        self.send(command)
            .await
            .map_err(|Closed| AnnounceError::Closed)?;
        published.await.unwrap_or(Err(AnnounceError::Closed))?;
        Ok(service)
    }

    /// Finds the live providers of a name: each has been dialled and has said that it serves it.
    ///
    /// Asks the bootstrap grapes and Kademlia at once; in a network of few grapes, of which each keeps
    /// every name, three of them, and Kademlia only if they leave room for doubt. Returns when all
    /// have answered, or [`LOOKUP_SETTLE`](crate::limits::LOOKUP_SETTLE) after the first live provider; at most
    /// [`MAX_CANDIDATES`](crate::limits::MAX_CANDIDATES) are dialled. This node itself is never
    /// among them. Concurrent lookups of one name are one; at most
    /// [`MAX_LOOKUPS`](crate::limits::MAX_LOOKUPS) run at once and the next ones wait.
    ///
    /// Cancel-safe.
    ///
    /// # Errors
    /// [`LookupError::NotFound`] as soon as it is known, [`LookupError::Unreachable`] if the name is
    /// announced and no provider answers, [`LookupError::NoGrape`] if there is nobody to ask,
    /// [`LookupError::TimedOut`] after [`LOOKUP_DEADLINE`] or when most grapes that are responsible have not
    /// answered, [`LookupError::Closed`].
    pub async fn lookup(&self, name: &ServiceName) -> Result<Vec<Provider>, LookupError> {
        let live = self.wait_for(name, Waiter::All).await?;
        Ok(live.into_iter().map(|peer| Provider { peer }).collect())
    }

    /// Sends a request to a live provider of the name, and returns its reply.
    ///
    /// As [`request_with`](Self::request_with) with the default [`RequestOptions`]: 10 seconds, and
    /// never run twice.
    ///
    /// # Errors
    /// As [`request_with`](Self::request_with).
    pub async fn request(
        &self,
        name: &ServiceName,
        payload: impl Into<Vec<u8>>,
    ) -> Result<Reply, RequestError> {
        self.request_with(name, payload, RequestOptions::default())
            .await
    }

    /// Sends a request to a live provider of the name, and returns its reply.
    ///
    /// The provider is one that is connected if there is one, and of two of those drawn at random
    /// the less busy. If it cannot be reached or is busy, the next one is tried, until none is left
    /// or the deadline passes. What may have run is not sent again, unless the options allow it.
    ///
    /// Cancel-safe; a dropped request may still run.
    ///
    /// # Errors
    /// See [`RequestError`]; [`is_retryable`](RequestError::is_retryable) tells whether the call
    /// can be repeated without running twice.
    pub async fn request_with(
        &self,
        name: &ServiceName,
        payload: impl Into<Vec<u8>>,
        options: RequestOptions,
    ) -> Result<Reply, RequestError> {
        call::request(self, name, payload.into().into(), options).await
    }

    /// Sends a request to one provider of the name: one that a lookup has found, one that has
    /// [answered](Reply::provider) or [asked](Request::peer) before, or any other.
    ///
    /// Cancel-safe; a dropped request may still run.
    ///
    /// # Errors
    /// As [`request_with`](Self::request_with). The name is looked up only if the provider is not
    /// connected.
    pub async fn request_to(
        &self,
        provider: PeerId,
        name: &ServiceName,
        payload: impl Into<Vec<u8>>,
        options: RequestOptions,
    ) -> Result<Reply, RequestError> {
        call::request_to(self, provider, name, payload.into().into(), options).await
    }

    /// Sends a request to every provider of the name, and yields each one's reply as it comes.
    ///
    /// As [`broadcast_with`](Self::broadcast_with) with the default [`RequestOptions`].
    pub fn broadcast(&self, name: &ServiceName, payload: impl Into<Vec<u8>>) -> Replies {
        self.broadcast_with(name, payload, RequestOptions::default())
    }

    /// Sends a request to every provider of the name, and yields each one's reply as it comes.
    ///
    /// Each is asked as soon as it is found live; all who are named are waited for, as long as the
    /// deadline allows, and those that were not reached by then are yielded as
    /// [`RequestError::Unreached`]. At most [`MAX_CANDIDATES`](crate::limits::MAX_CANDIDATES) are
    /// dialled. The deadline is that of the whole, from the first poll on.
    ///
    /// A lookup that a dead provider keeps waiting counts among the
    /// [`MAX_LOOKUPS`](crate::limits::MAX_LOOKUPS) until its end.
    pub fn broadcast_with(
        &self,
        name: &ServiceName,
        payload: impl Into<Vec<u8>>,
        options: RequestOptions,
    ) -> Replies {
        Replies::new(call::broadcast(
            self.clone(),
            name.clone(),
            payload.into().into(),
            options,
        ))
    }

    /// Closes the connections with a peer and refuses new ones, until [`unblock`](Self::unblock).
    /// Returns when that is about to happen; [`Builder::block`] lets none be opened before.
    ///
    /// Cancel-safe: a dropped call may still block.
    pub async fn block(&self, peer: PeerId) {
        // A node that is shut down has no connections.
        let _ = self.send(Command::Block(peer)).await;
    }

    /// Lets a blocked peer connect again. Cancel-safe, as [`block`](Self::block).
    pub async fn unblock(&self, peer: PeerId) {
        // See `block`.
        let _ = self.send(Command::Unblock(peer)).await;
    }

    /// Takes all names back, answers what is open, refuses what comes, closes the connections.
    ///
    /// Ends within [`SHUTDOWN_DEADLINE`]. Every later call of any clone fails with `Closed`.
    ///
    /// Cancel-safe: a dropped call may still shut the node down.
    pub async fn shutdown(&self) {
        let (done, stopped) = oneshot::channel();
        if self.send(Command::Shutdown(done)).await.is_ok() {
            // An error means that the loop has ended already.
            let _ = timeout(2 * SHUTDOWN_DEADLINE, stopped).await;
        }
    }

    pub(crate) async fn send(&self, command: Command) -> Result<(), Closed> {
        let commands = &self.shared.handle.commands;
        commands.send(command).await.map_err(|_| Closed)
    }

    pub(crate) fn routes(&self) -> &Routes<Link> {
        &self.shared.handle.routes
    }

    pub(crate) fn count_request(&self) {
        self.shared.handle.metrics.requests_sent.add(1);
    }

    /// Joins or starts a lookup, and waits for it as `waiter` says.
    pub(crate) async fn wait_for<T>(
        &self,
        name: &ServiceName,
        waiter: impl FnOnce(oneshot::Sender<Result<T, LookupError>>) -> Waiter,
    ) -> Result<T, LookupError> {
        let looked_up = async {
            let _permit = self.shared.lookups.acquire().await;
            let (sender, receiver) = oneshot::channel();
            let command = Command::Lookup(name.clone(), waiter(sender));
            self.send(command)
                .await
                .map_err(|Closed| LookupError::Closed)?;
            receiver.await.unwrap_or(Err(LookupError::Closed))
        };
        // The driver keeps the deadline; this covers the wait for a permit as well.
        timeout(2 * LOOKUP_DEADLINE, looked_up)
            .await
            .unwrap_or_else(|_| Err(LookupError::TimedOut(name.clone())))
    }
}

/// The node is shut down.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Closed;
