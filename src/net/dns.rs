//! Dials addresses that name a host, by what the system says of names at that moment.
//!
//! libp2p's transport reads `/etc/resolv.conf` and `/etc/hosts` when it is made, and a node lives longer
//! than what is in them: a machine gets its name servers after its programs have started, and others
//! in another network. So each dial of a name has a resolver of its own, which asks anew and keeps
//! nothing. Files are read on a thread for that, and the loop never waits.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt;
use hickory_resolver::config::{ResolverConfig, ResolverOpts};
use hickory_resolver::system_conf::read_system_conf;
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::{Boxed, DialOpts, ListenerId, TransportError, TransportEvent};
use libp2p::{Multiaddr, PeerId, Transport as TransportTrait, dns};
use thiserror::Error;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use crate::error::causes;
use crate::limits::CONNECT_TIMEOUT;
use crate::proto::bootstrap::is_named;

/// How long a name may take: the rest of [`CONNECT_TIMEOUT`] is for the host.
const RESOLVE_TIMEOUT: Duration = CONNECT_TIMEOUT.saturating_sub(Duration::from_secs(2));

/// How long one name server may take, whatever the system would wait.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

type Output = (PeerId, StreamMuxerBox);

/// Why a name leads to no address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(crate) enum Unresolved {
    #[error("DNS knows no such host; correct its name or give its IP address")]
    Unknown,
    #[error(
        "this machine has no name server: connect it to a network, or give the host's IP address"
    )]
    NoServer,
    #[error(
        "no name server answers: look at this machine's network, or give the host's IP address"
    )]
    Silent,
}

/// Dials names and all that the transport within dials.
pub(crate) struct Transport {
    inner: Shared,
}

#[derive(Clone)]
struct Shared(Arc<Mutex<Boxed<Output>>>);

impl Transport {
    pub(crate) fn new(inner: Boxed<Output>) -> Self {
        let inner = Shared(Arc::new(Mutex::new(inner)));
        Self { inner }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Boxed<Output>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TransportTrait for Transport {
    type Output = Output;
    type Error = io::Error;
    type ListenerUpgrade = <Boxed<Output> as TransportTrait>::ListenerUpgrade;
    type Dial = <Boxed<Output> as TransportTrait>::Dial;

    fn listen_on(
        &mut self,
        id: ListenerId,
        address: Multiaddr,
    ) -> Result<(), TransportError<io::Error>> {
        self.inner.lock().listen_on(id, address)
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        self.inner.lock().remove_listener(id)
    }

    fn dial(
        &mut self,
        address: Multiaddr,
        opts: DialOpts,
    ) -> Result<Self::Dial, TransportError<io::Error>> {
        if !is_named(&address) {
            return self.inner.lock().dial(address, opts);
        }
        Ok(dial_by_name(self.inner.clone(), address, opts).boxed())
    }

    fn poll(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, io::Error>> {
        Pin::new(&mut *self.inner.lock()).poll(cx)
    }
}

async fn dial_by_name(inner: Shared, address: Multiaddr, opts: DialOpts) -> io::Result<Output> {
    let is_resolved = Arc::new(AtomicBool::new(false));
    let resolved = Resolved {
        inner,
        is_resolved: Arc::clone(&is_resolved),
    };
    let (mut transport, has_servers) =
        timeout(RESOLVE_TIMEOUT, spawn_blocking(|| configured(resolved)))
            .await
            .map_err(|_| io::Error::other(Unresolved::Silent))?
            .map_err(io::Error::other)?;
    let dial = transport.dial(address, opts).map_err(io::Error::other)?;
    tokio::pin!(dial);
    let outcome = tokio::select! {
        outcome = &mut dial => outcome,
        () = sleep(RESOLVE_TIMEOUT) => match is_resolved.load(Ordering::Relaxed) {
            true => dial.await,
            false => return Err(io::Error::other(Unresolved::Silent)),
        }
    };
    outcome.map_err(|error| match unresolved(&error, has_servers) {
        Some(unresolved) => io::Error::other(unresolved),
        None => io::Error::other(error),
    })
}

/// A transport with the configuration of now, and whether that has a name server. Without one, names
/// of `/etc/hosts` lead somewhere.
fn configured(inner: Resolved) -> (dns::tokio::Transport<Resolved>, bool) {
    let (config, mut opts) = match read_system_conf() {
        Ok(read) => read,
        Err(error) => {
            tracing::debug!(%error, "this machine has no configuration of DNS");
            (ResolverConfig::default(), ResolverOpts::default())
        }
    };
    let has_servers = !config.name_servers.is_empty();
    opts.timeout = opts.timeout.min(ANSWER_TIMEOUT);
    (
        dns::tokio::Transport::custom(inner, config, opts),
        has_servers,
    )
}

fn unresolved(error: &(dyn std::error::Error + 'static), has_servers: bool) -> Option<Unresolved> {
    let cause = causes(error).find_map(|cause| cause.downcast_ref::<dns::ResolveError>())?;
    Some(match cause.is_no_records_found() {
        true => Unresolved::Unknown,
        false if has_servers => Unresolved::Silent,
        false => Unresolved::NoServer,
    })
}

/// The transport within, for a dial of one name: knows whether the name has led to an address.
struct Resolved {
    inner: Shared,
    is_resolved: Arc<AtomicBool>,
}

impl TransportTrait for Resolved {
    type Output = Output;
    type Error = io::Error;
    type ListenerUpgrade = <Boxed<Output> as TransportTrait>::ListenerUpgrade;
    type Dial = <Boxed<Output> as TransportTrait>::Dial;

    fn listen_on(
        &mut self,
        _: ListenerId,
        address: Multiaddr,
    ) -> Result<(), TransportError<io::Error>> {
        Err(TransportError::MultiaddrNotSupported(address))
    }

    fn remove_listener(&mut self, _: ListenerId) -> bool {
        false
    }

    fn dial(
        &mut self,
        address: Multiaddr,
        opts: DialOpts,
    ) -> Result<Self::Dial, TransportError<io::Error>> {
        self.is_resolved.store(true, Ordering::Relaxed);
        self.inner.lock().dial(address, opts)
    }

    fn poll(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, io::Error>> {
        Poll::Pending
    }
}
