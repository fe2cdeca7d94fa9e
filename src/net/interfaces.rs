//! The addresses of this machine: which can be used now, and which could and cannot any more.
//!
//! The system tells nobody whose connection cannot go on because the address it was made from is
//! gone: what is sent is tried again for minutes. So the addresses are looked at once a second, and at
//! once when a listener has news, and a connection [ends](Tied) with its address. A task does
//! that beside the loop: a machine with a thousand interfaces takes milliseconds to list them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::{AsyncRead, AsyncWrite, FutureExt};
use libp2p::core::ConnectedPoint;
use libp2p::core::muxing::{StreamMuxer, StreamMuxerEvent};
use libp2p::tcp::tokio::TcpStream;
use socket2::SockRef;
use tokio::sync::{Notify, watch};
use tokio::time::sleep;

use super::host;

/// How often the addresses are looked at when nothing gives a reason to.
const INTERVAL: Duration = Duration::from_secs(1);

/// How often while one is there that cannot be used yet: IPv6 asks first whether somebody else has it.
const SETTLING: Duration = Duration::from_millis(200);

/// How long they are left alone after that, whatever gives a reason.
const PAUSE: Duration = Duration::from_millis(20);

/// How long an interface may be down before its addresses are gone: a cable that is plugged in again
/// breaks no connection.
const DOWN: Duration = Duration::from_millis(500);

/// The addresses that are remembered as gone. IPv6 has new ones every day.
const MAX_LOST: usize = 256;

/// Where nobody is, to ask the system for the address that it would use. Nothing is sent.
const ANYWHERE: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];

/// The addresses of this machine, watched.
#[derive(Debug)]
pub(crate) struct Interfaces {
    known: watch::Receiver<Known>,
    look: Arc<Notify>,
}

/// What is known of the addresses of this machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Known {
    usable: BTreeSet<IpAddr>,
    /// Some that are there cannot be used yet.
    settles: bool,
    lost: BTreeSet<IpAddr>,
    /// From where it would reach [`ANYWHERE`].
    routes: [Option<IpAddr>; 2],
    /// Since when addresses are down that are usable until now.
    down: BTreeMap<IpAddr, Instant>,
}

impl Interfaces {
    /// Watches from now on, until this and every [`Tied`] connection is dropped.
    pub(crate) fn watched() -> Self {
        let mut now = Known::default();
        now.look();
        let (sender, known) = watch::channel(now.clone());
        let look = Arc::new(Notify::new());
        tokio::spawn(watch(now, sender, Arc::clone(&look)));
        Self { known, look }
    }

    /// Never changes: for a node that only this machine can reach.
    pub(crate) fn constant() -> Self {
        Self {
            known: watch::channel(Known::default()).1,
            look: Arc::default(),
        }
    }

    /// Returns when something has changed since the last time. Cancel-safe.
    pub(crate) async fn changed(&mut self) {
        if self.known.changed().await.is_err() {
            std::future::pending().await
        }
    }

    /// There is a reason to look.
    pub(crate) fn look(&self) {
        self.look.notify_one();
    }

    /// Whether this machine had the address and has it no more.
    pub(crate) fn has_lost(&self, address: &IpAddr) -> bool {
        self.known.borrow().lost.contains(address)
    }

    /// What ties connections to their addresses.
    pub(crate) fn ties(&self) -> Ties {
        Ties(self.known.clone())
    }
}

async fn watch(mut known: Known, sender: watch::Sender<Known>, look: Arc<Notify>) {
    loop {
        tokio::select! {
            () = sleep(if known.settles { SETTLING } else { INTERVAL }) => {}
            () = look.notified() => {}
            () = sender.closed() => return,
        }
        if known.look() {
            sender.send_replace(known.clone());
        }
        sleep(PAUSE).await;
    }
}

impl Known {
    /// Asks the system. Returns whether that makes a difference.
    fn look(&mut self) -> bool {
        let Ok(interfaces) = if_addrs::get_if_addrs() else {
            return false;
        };
        self.settles = false;
        let mut addresses = Vec::new();
        for interface in interfaces {
            let (ip, is_up) = (interface.ip().to_canonical(), interface.is_oper_up());
            let is_ready = is_up && (self.usable.contains(&ip) || is_ready(ip));
            self.settles |= is_up && !is_ready;
            addresses.push((ip, is_ready));
        }
        self.update(&addresses, ANYWHERE.map(source), Instant::now())
    }

    /// Takes the addresses that there are, each with whether it can be used. Returns whether
    /// that makes a difference.
    fn update(
        &mut self,
        addresses: &[(IpAddr, bool)],
        routes: [Option<IpAddr>; 2],
        now: Instant,
    ) -> bool {
        let mut usable: BTreeSet<_> = addresses
            .iter()
            .filter_map(|(ip, is_up)| is_up.then_some(*ip))
            .collect();
        let was_up = |ip: &IpAddr| !usable.contains(ip) && self.usable.contains(ip);
        let down = addresses.iter().map(|(ip, _)| *ip).filter(was_up);
        let since = |ip: IpAddr| (ip, self.down.get(&ip).copied().unwrap_or(now));
        let down: BTreeMap<_, _> = down.map(since).collect();
        self.down = down;
        let still = self.down.iter().filter(|(_, since)| now < **since + DOWN);
        usable.extend(still.map(|(ip, _)| *ip));
        let changed = self.usable != usable || self.routes != routes;
        self.lost.extend(&self.usable - &usable);
        self.lost.retain(|ip| !usable.contains(ip));
        while self.lost.len() > MAX_LOST {
            self.lost.pop_first();
        }
        (self.usable, self.routes) = (usable, routes);
        changed
    }
}

/// Whether the system lets an address be used that it has.
fn is_ready(ip: IpAddr) -> bool {
    // One of a link cannot be told from that of another without more.
    let is_of_link = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
    is_of_link || UdpSocket::bind((ip, 0)).is_ok()
}

/// The address from which this machine would reach another.
fn source(remote: IpAddr) -> Option<IpAddr> {
    let any: IpAddr = match remote {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect((remote, 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// Ties connections to the addresses that they are made from.
#[derive(Clone, Debug)]
pub(crate) struct Ties(watch::Receiver<Known>);

/// A connection that breaks when the address that it was made from is gone.
pub(crate) struct Tied<C> {
    connection: C,
    lost: Option<BoxFuture<'static, ()>>,
}

impl Ties {
    /// Ties a connection to this address of the machine, if it may go.
    pub(crate) fn tie<C>(&self, connection: C, local: Option<IpAddr>) -> Tied<C> {
        let mut known = self.0.clone();
        let lost = local
            .map(|ip| ip.to_canonical())
            .filter(|ip| !ip.is_loopback());
        let lost = lost.map(|local| {
            let lost = async move {
                let is_lost = |known: &Known| known.lost.contains(&local);
                if known.wait_for(is_lost).await.is_err() {
                    std::future::pending().await
                }
            };
            lost.boxed()
        });
        Tied { connection, lost }
    }

    /// As [`tie`](Self::tie), of a transport that does not tell the address but the ends: what the
    /// system uses for that remote, where a listener is for all addresses.
    pub(crate) fn tie_between<C>(&self, connection: C, ends: &ConnectedPoint) -> Tied<C> {
        let local = match ends {
            ConnectedPoint::Listener { local_addr, .. } => host(local_addr),
            ConnectedPoint::Dialer { .. } => None,
        };
        let local = local.filter(|ip| !ip.is_unspecified());
        let local = local.or_else(|| source(host(ends.get_remote_address())?));
        self.tie(connection, local)
    }
}

impl<C> Tied<C> {
    /// What a connection that has nothing to do leads to.
    fn poll_lost<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        match self.lost.as_mut().map(|lost| lost.poll_unpin(cx)) {
            Some(Poll::Ready(())) => {
                self.lost = Some(std::future::ready(()).boxed());
                let reason = "the address that it was made from is gone";
                Poll::Ready(Err(io::Error::new(io::ErrorKind::NetworkDown, reason)))
            }
            _ => Poll::Pending,
        }
    }
}

impl AsyncRead for Tied<TcpStream> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let read = Pin::new(&mut self.connection).poll_read(cx, buffer);
        if read.is_ready() {
            return read;
        }
        let lost = self.poll_lost(cx);
        if lost.is_ready() {
            // The system would go on to send what it holds, as soon as there is a way again, and that
            // would overtake what is said by then. It only fails on a socket that is closed.
            let _ = SockRef::from(&self.connection.0).set_linger(Some(Duration::ZERO));
        }
        lost
    }
}

impl AsyncWrite for Tied<TcpStream> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write_vectored(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_close(cx)
    }
}

impl<C> StreamMuxer for Tied<C>
where
    C: StreamMuxer + Unpin,
    C::Error: Send + Sync + 'static,
{
    type Substream = C::Substream;
    type Error = io::Error;

    fn poll_inbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Self::Substream>> {
        let inbound = Pin::new(&mut self.connection).poll_inbound(cx);
        inbound.map_err(io::Error::other)
    }

    fn poll_outbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Self::Substream>> {
        let outbound = Pin::new(&mut self.connection).poll_outbound(cx);
        outbound.map_err(io::Error::other)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let closed = Pin::new(&mut self.connection).poll_close(cx);
        closed.map_err(io::Error::other)
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<StreamMuxerEvent>> {
        let event = Pin::new(&mut self.connection).poll(cx);
        if event.is_ready() {
            return event.map_err(io::Error::other);
        }
        let lost = self.poll_lost(cx);
        if lost.is_ready() {
            // Its streams would outlive it. How it closes does not matter any more.
            let _ = Pin::new(&mut self.connection).poll_close(cx);
        }
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
    const OTHER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));

    fn known(addresses: &[(IpAddr, bool)], now: Instant) -> Known {
        let mut known = Known::default();
        known.update(addresses, [None; 2], now);
        known
    }

    #[test]
    fn an_address_that_is_removed_is_lost_until_it_is_back() {
        let now = Instant::now();
        let mut known = known(&[(ONE, true), (OTHER, true)], now);
        assert!(!known.update(&[(OTHER, true), (ONE, true)], [None; 2], now));
        assert!(known.update(&[(OTHER, true)], [None; 2], now));
        assert_eq!(known.lost, [ONE].into());
        assert!(known.update(&[(ONE, true), (OTHER, true)], [None; 2], now));
        assert!(known.lost.is_empty());
    }

    #[test]
    fn an_interface_may_be_down_for_a_moment() {
        let now = Instant::now();
        let mut known = known(&[(ONE, true)], now);
        assert!(!known.update(&[(ONE, false)], [None; 2], now));
        assert!(!known.update(&[(ONE, true)], [None; 2], now + DOWN));
        let down = now + 2 * DOWN;
        assert!(!known.update(&[(ONE, false)], [None; 2], down));
        assert!(known.update(&[(ONE, false)], [None; 2], down + DOWN));
        assert_eq!(known.lost, [ONE].into());
        assert!(!known.update(&[(ONE, false)], [None; 2], down + 2 * DOWN));
        assert!(known.update(&[(ONE, true)], [None; 2], down + 3 * DOWN));
        assert!(known.lost.is_empty());
    }

    #[test]
    fn an_address_that_was_never_up_is_not_lost() {
        let now = Instant::now();
        let mut known = known(&[(ONE, false)], now);
        assert!(!known.update(&[], [None; 2], now));
        assert!(known.lost.is_empty());
    }

    #[test]
    fn only_so_many_lost_addresses_are_remembered() {
        let now = Instant::now();
        let mut known = Known::default();
        for n in 0..1_000_u32 {
            let ip = Ipv4Addr::from_bits(n).into();
            known.update(&[(ip, true)], [None; 2], now);
        }
        assert_eq!(known.lost.len(), MAX_LOST);
    }

    #[test]
    fn another_route_is_a_change() {
        let now = Instant::now();
        let mut known = known(&[(ONE, true)], now);
        assert!(known.update(&[(ONE, true)], [Some(ONE), None], now));
        assert!(!known.update(&[(ONE, true)], [Some(ONE), None], now));
    }
}
