//! Yamux, with bounds that libp2p's own wrapper of it does not let one set.
//!
//! A stream's receive window grows while its reader keeps up, up to what the connection has in all,
//! and what is in a window takes memory while nobody reads it: by default 1 GiB for each connection.

use std::collections::VecDeque;
use std::future::{Ready, ready};
use std::io;
use std::iter::{Once, once};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use futures::{AsyncRead, AsyncWrite, ready};
use libp2p::core::muxing::{StreamMuxer, StreamMuxerEvent};
use libp2p::core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo};
use yamux::{Config, Connection, ConnectionError, Mode, Stream};

use crate::limits::MAX_STREAMS;

/// The least window of a stream, by the protocol.
const WINDOW: usize = 256 << 10;

/// What windows may grow by, all streams of a connection together: enough for one that goes around the
/// world in 250 ms to carry 60 MiB a second.
const GROWTH: usize = 16 << 20;

/// The most of one stream's bytes that leaves before another stream has its turn: a payload of 16 KiB with
/// what is around it in one piece, and on a line of 100 Mbit/s a wait of 3 ms.
const PIECE: usize = 32 << 10;

/// Makes connections carry streams.
#[derive(Clone, Debug)]
pub(super) struct Yamux(Config);

/// A connection that carries streams.
#[derive(Debug)]
pub(super) struct Muxer<C> {
    connection: Connection<C>,
    /// Streams of the remote's that nobody has taken yet; the connection bounds their number.
    inbound: VecDeque<Stream>,
    /// Who waits for one.
    waiting: Option<Waker>,
}

impl Yamux {
    pub(super) fn new() -> Self {
        let mut config = Config::default();
        config.set_max_num_streams(MAX_STREAMS);
        config.set_max_connection_receive_window(Some(MAX_STREAMS * WINDOW + GROWTH));
        config.set_split_send_size(PIECE);
        Self(config)
    }
}

impl UpgradeInfo for Yamux {
    type Info = &'static str;
    type InfoIter = Once<Self::Info>;

    fn protocol_info(&self) -> Self::InfoIter {
        once("/yamux/1.0.0")
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> InboundConnectionUpgrade<C> for Yamux {
    type Output = Muxer<C>;
    type Error = io::Error;
    type Future = Ready<io::Result<Self::Output>>;

    fn upgrade_inbound(self, io: C, _: Self::Info) -> Self::Future {
        ready(Ok(Muxer::new(io, self.0, Mode::Server)))
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> OutboundConnectionUpgrade<C> for Yamux {
    type Output = Muxer<C>;
    type Error = io::Error;
    type Future = Ready<io::Result<Self::Output>>;

    fn upgrade_outbound(self, io: C, _: Self::Info) -> Self::Future {
        ready(Ok(Muxer::new(io, self.0, Mode::Client)))
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> Muxer<C> {
    fn new(io: C, config: Config, mode: Mode) -> Self {
        Self {
            connection: Connection::new(io, config, mode),
            inbound: VecDeque::new(),
            waiting: None,
        }
    }

    /// Makes the connection go on, until the remote opens a stream.
    fn poll_connection(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Result<Stream, ConnectionError>> {
        let opened = ready!(self.connection.poll_next_inbound(context));
        Poll::Ready(opened.unwrap_or(Err(ConnectionError::Closed)))
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> StreamMuxer for Muxer<C> {
    type Substream = Stream;
    type Error = ConnectionError;

    fn poll_inbound(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Result<Stream, ConnectionError>> {
        if let Some(stream) = self.inbound.pop_front() {
            return Poll::Ready(Ok(stream));
        }
        self.waiting = Some(context.waker().clone());
        self.poll_connection(context)
    }

    fn poll_outbound(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Result<Stream, ConnectionError>> {
        self.connection.poll_new_outbound(context)
    }

    fn poll_close(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), ConnectionError>> {
        self.connection.poll_close(context)
    }

    fn poll(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Result<StreamMuxerEvent, ConnectionError>> {
        let stream = ready!(self.poll_connection(context))?;
        self.inbound.push_back(stream);
        if let Some(waiting) = self.waiting.take() {
            waiting.wake();
        }
        // There may be more to read; others have their turn first.
        context.waker().wake_by_ref();
        Poll::Pending
    }
}
