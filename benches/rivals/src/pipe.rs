//! Frames with ids over one stream, pipelined: what the ceilings run on.
//!
//! One task reads and writes, and waits only when it can do neither. It reads all that has arrived
//! before it writes all that came of it, so that frames are coalesced and never wait for more. A
//! request costs no allocation, no channel and no wake-up of its own.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use futures::io::{AsyncRead, AsyncWrite};
use unsigned_varint::{decode, encode};

use crate::load::{Client, Latencies, Load};

/// What is read at once at most: several of the largest frames.
const READ_LEN: usize = 256 * 1024;

/// What may wait to be written while more is read: more than any load has in flight, so that the two
/// sides never wait for each other.
const WRITE_LEN: usize = 4 * 1024 * 1024;

/// The id before each payload.
const ID_LEN: usize = 8;

/// Both directions of a stream.
pub(crate) struct Pipe<S> {
    stream: S,
    /// What has been read, of which `begin..end` has not been taken.
    arrived: Box<[u8]>,
    begin: usize,
    end: usize,
    /// What is to be written, from `written` on.
    out: Vec<u8>,
    written: usize,
    flushed: bool,
}

/// Whether more frames are wanted.
enum Next {
    Go,
    Stop,
}

/// Answers each frame with itself until the stream ends.
pub(crate) async fn echo(stream: impl AsyncRead + AsyncWrite + Unpin) {
    let mut pipe = Pipe::new(stream);
    let echoed = pipe.exchange(|frame, _, out| {
        append_frame(out, &[frame]);
        Next::Go
    });
    // A client that goes away resets its connection.
    let _ = echoed.await;
}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Client for Pipe<S> {
    async fn send(&mut self, load: Load) -> Latencies {
        let payload = vec![b'x'; load.bytes];
        let start = Instant::now();
        let end = start + load.time;
        let mut asked = vec![start; load.in_flight];
        let mut open = load.in_flight;
        let mut latencies = Latencies::default();
        for id in 0..load.in_flight as u64 {
            append_frame(&mut self.out, &[&id.to_le_bytes(), &payload]);
        }
        let replies = self.exchange(|frame, now, out| {
            let (id, echo) = frame.split_first_chunk::<ID_LEN>().expect("an id");
            assert_eq!(echo.len(), load.bytes, "an echo is as long");
            let asked = &mut asked[u64::from_le_bytes(*id) as usize];
            latencies.record(now - *asked);
            if now < end {
                *asked = now;
                append_frame(out, &[id, &payload]);
            } else {
                open -= 1;
            }
            if open == 0 { Next::Stop } else { Next::Go }
        });
        replies.await.expect("the server answers");
        latencies
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Pipe<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self {
            stream,
            arrived: vec![0; READ_LEN].into(),
            begin: 0,
            end: 0,
            out: Vec::new(),
            written: 0,
            flushed: true,
        }
    }

    /// Writes what there is and what comes of the frames that arrive, until that is enough.
    async fn exchange(
        &mut self,
        mut on_frame: impl FnMut(&[u8], Instant, &mut Vec<u8>) -> Next,
    ) -> io::Result<()> {
        poll_fn(|cx| self.poll_exchange(cx, &mut on_frame)).await
    }

    fn poll_exchange(
        &mut self,
        cx: &mut Context<'_>,
        on_frame: &mut impl FnMut(&[u8], Instant, &mut Vec<u8>) -> Next,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut readable = true;
            while readable && self.out.len() < WRITE_LEN {
                let room = &mut self.arrived[self.end..];
                match Pin::new(&mut self.stream).poll_read(cx, room)? {
                    Poll::Ready(0) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                    Poll::Ready(read) => {
                        self.end += read;
                        if let Next::Stop = self.take_frames(on_frame)? {
                            return Poll::Ready(Ok(()));
                        }
                    }
                    Poll::Pending => readable = false,
                }
            }
            let written = self.poll_write(cx)?;
            if !readable || written.is_pending() {
                return Poll::Pending;
            }
        }
    }

    fn take_frames(
        &mut self,
        on_frame: &mut impl FnMut(&[u8], Instant, &mut Vec<u8>) -> Next,
    ) -> io::Result<Next> {
        let now = Instant::now();
        let mut next = Next::Go;
        loop {
            let (len, rest) = match decode::usize(&self.arrived[self.begin..self.end]) {
                Ok(decoded) => decoded,
                Err(decode::Error::Insufficient) => break,
                Err(error) => return Err(io::Error::other(error)),
            };
            let Some(frame) = rest.get(..len) else {
                break;
            };
            self.begin = self.end - rest.len() + len;
            next = on_frame(frame, now, &mut self.out);
        }
        self.arrived.copy_within(self.begin..self.end, 0);
        (self.begin, self.end) = (0, self.end - self.begin);
        Ok(next)
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.out.len() {
            let rest = &self.out[self.written..];
            self.written += ready!(Pin::new(&mut self.stream).poll_write(cx, rest))?;
            self.flushed = false;
        }
        self.out.clear();
        self.written = 0;
        if !self.flushed {
            ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
            self.flushed = true;
        }
        Poll::Ready(Ok(()))
    }
}

/// Appends a frame whose content is these parts.
fn append_frame(out: &mut Vec<u8>, parts: &[&[u8]]) {
    let len = parts.iter().map(|part| part.len()).sum();
    out.extend_from_slice(encode::usize(len, &mut encode::usize_buffer()));
    for part in parts {
        out.extend_from_slice(part);
    }
}
