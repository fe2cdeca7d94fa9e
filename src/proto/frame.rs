//! One frame: an unsigned-varint length, then that many bytes.
//!
//! Invariants:
//! * A length beyond the caller's limit is refused before anything is allocated for it.
//! * The buffer grows as bytes arrive, to at most twice what has arrived: a claimed length costs the sender
//!   as much as it costs us.
//! * [`read_frame`] reads nothing beyond the frame and has no time-out: who reads from a stranger
//!   sets one. [`FrameReader`] reads ahead, and has both.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use futures::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::error::Elapsed;
use tokio::time::timeout;
use unsigned_varint::{decode, encode};

/// The multiformats specification ends an unsigned varint after 9 bytes (63 bits).
const MAX_PREFIX_LEN: usize = 9;

/// First allocation for a body; most messages fit, and a stranger's claim alone buys no more.
const FIRST_CHUNK_LEN: usize = 4 * 1024;

/// Up to here prefix and body are joined in one write, which yamux then sends as one frame (it splits at this
/// size anyway). Above, a second write is cheaper than the copy.
const MAX_JOINED_LEN: usize = 16 * 1024;

/// Why no frame could be read. Turns into an [`io::Error`] that carries it as its source.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The sender announced more bytes than the reader takes. The rest of the stream is unread.
    #[error("frame of {len} bytes exceeds the limit of {max} bytes")]
    TooLarge {
        /// Announced length of the body in bytes.
        len: u64,
        /// The reader's limit in bytes.
        max: usize,
    },
    /// The reader has no room for the frame now, and has read past it.
    #[error("no room for a frame of {len} bytes now")]
    NoRoom {
        /// Announced length of the body in bytes.
        len: usize,
        /// How the body begins: enough to tell what it would have been.
        head: Vec<u8>,
    },
    /// The stream ended inside a frame.
    #[error("stream ended inside a frame")]
    Truncated,
    /// The length is not a minimally encoded unsigned varint of at most 9 bytes.
    #[error("frame length is not an unsigned varint")]
    MalformedLength,
    /// The stream itself failed.
    #[error(transparent)]
    Io(io::Error),
}

impl From<io::Error> for FrameError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Truncated,
            _ => Self::Io(error),
        }
    }
}

impl From<Elapsed> for FrameError {
    fn from(elapsed: Elapsed) -> Self {
        Self::Io(elapsed.into())
    }
}

impl From<FrameError> for io::Error {
    fn from(error: FrameError) -> Self {
        let kind = match error {
            FrameError::TooLarge { .. } | FrameError::MalformedLength => io::ErrorKind::InvalidData,
            FrameError::NoRoom { .. } => io::ErrorKind::OutOfMemory,
            FrameError::Truncated => io::ErrorKind::UnexpectedEof,
            FrameError::Io(error) => return error,
        };
        Self::new(kind, error)
    }
}

/// Reads the body of the next frame, at most `max` bytes; `None` if the stream ends before its first byte.
///
/// Not cancel-safe: what a dropped call has read is lost, and the stream is then inside a frame.
pub async fn read_frame<R>(io: &mut R, max: usize) -> Result<Option<Vec<u8>>, FrameError>
where
    R: AsyncRead + Unpin,
{
    let Some(len) = read_len(io).await? else {
        return Ok(None);
    };
    match usize::try_from(len) {
        Ok(len) if len <= max => read_body(io, len).await.map(Some),
        _ => Err(FrameError::TooLarge { len, max }),
    }
}

/// Writes `body` as one frame and flushes it.
///
/// The caller keeps to the reader's limit; none is checked here. Not cancel-safe: a dropped call may leave
/// half a frame on the stream.
pub async fn write_frame<W>(io: &mut W, body: &[u8]) -> io::Result<()>
where
    W: AsyncWrite + Unpin,
{
    let mut buffer = encode::usize_buffer();
    let prefix = encode::usize(body.len(), &mut buffer);
    if body.len() <= MAX_JOINED_LEN {
        io.write_all(&[prefix, body].concat()).await?;
    } else {
        io.write_all(prefix).await?;
        io.write_all(body).await?;
    }
    io.flush().await
}

/// Appends the frame whose content `append` writes; after an error, nothing.
pub fn append_frame_with<E>(
    out: &mut Vec<u8>,
    append: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
) -> Result<(), E> {
    let begin = out.len();
    // Room for the length of a small frame; a longer one moves the content.
    out.push(0);
    if let Err(error) = append(out) {
        out.truncate(begin);
        return Err(error);
    }
    let mut buffer = encode::usize_buffer();
    let prefix = encode::usize(out.len() - begin - 1, &mut buffer);
    match *prefix {
        [len] => out[begin] = len,
        _ => drop(out.splice(begin..=begin, prefix.iter().copied())),
    }
    Ok(())
}

/// Reads frames that follow each other on a stream, many of them with one read.
///
/// Holds what has arrived and not been asked for, in a buffer that grows with what has arrived, not
/// with what is claimed. Beyond its first 16 KiB it takes from a budget that readers share,
/// until it is empty again.
#[derive(Debug)]
pub struct FrameReader<R> {
    io: R,
    buffer: Vec<u8>,
    /// Where in `buffer` the next frame begins, and where what has arrived ends.
    begin: usize,
    end: usize,
    budgets: Vec<Arc<Semaphore>>,
    held: Vec<OwnedSemaphorePermit>,
}

/// The smallest read: most messages fit, and a stream that is silent holds no more.
const MIN_READ: usize = 4 * 1024;

/// What a buffer may hold without asking: a payload as large as yamux carries in one frame, and what
/// surrounds it.
const FREE_LEN: usize = 17 * 1024;

/// How much of a frame that finds no room is kept, to tell what it was.
const HEAD_LEN: usize = 512;

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Begins to read, within each of these budgets of bytes.
    pub fn new(io: R, budgets: Vec<Arc<Semaphore>>) -> Self {
        Self {
            io,
            buffer: Vec::new(),
            begin: 0,
            end: 0,
            budgets,
            held: Vec::new(),
        }
    }

    /// The body of the next frame, at most `max` bytes; `None` if the stream ends before it.
    ///
    /// Fails with [`io::ErrorKind::TimedOut`] if the frame does not begin within `patience`, or once
    /// begun is not whole within `deadline`. After [`FrameError::NoRoom`] the reader is at the next
    /// frame; after every other error it must not be used again.
    pub async fn next(
        &mut self,
        max: usize,
        patience: Duration,
        deadline: Duration,
    ) -> Result<Option<&[u8]>, FrameError> {
        if self.begin == self.end {
            self.empty();
            if !timeout(patience, self.fill()).await?? {
                return Ok(None);
            }
        }
        let body = match self.body(max)? {
            (body, true) => body,
            _ => timeout(deadline, self.complete(max)).await??,
        };
        self.begin = body.end;
        Ok(Some(&self.buffer[body]))
    }

    /// Whether all of another frame, of at most `max` bytes, has arrived.
    pub fn has_more(&self, max: usize) -> bool {
        self.begin < self.end && matches!(self.body(max), Ok((_, true)))
    }

    /// The body of the next frame, at most `max` bytes, if all of it has arrived; reads nothing.
    pub fn arrived(&mut self, max: usize) -> Result<Option<&[u8]>, FrameError> {
        if self.begin == self.end {
            return Ok(None);
        }
        let (body, is_whole) = self.body(max)?;
        if !is_whole {
            return Ok(None);
        }
        self.begin = body.end;
        Ok(Some(&self.buffer[body]))
    }

    /// Reads on until the frame is whole.
    async fn complete(&mut self, max: usize) -> Result<Range<usize>, FrameError> {
        loop {
            if !self.make_room(max)? {
                return Err(self.skip(max).await?);
            }
            if !self.fill().await? {
                return Err(FrameError::Truncated);
            }
            if let (body, true) = self.body(max)? {
                return Ok(body);
            }
        }
    }

    /// Where the next frame's body is or will be, and whether it is whole.
    fn body(&self, max: usize) -> Result<(Range<usize>, bool), FrameError> {
        let arrived = &self.buffer[self.begin..self.end];
        let (len, rest) = match decode::u64(arrived) {
            Ok(decoded) => decoded,
            Err(decode::Error::Insufficient) if arrived.len() < MAX_PREFIX_LEN => {
                return Ok((self.end..self.end, false));
            }
            Err(_) => return Err(FrameError::MalformedLength),
        };
        let len = match usize::try_from(len) {
            Ok(len) if len <= max => len,
            _ => return Err(FrameError::TooLarge { len, max }),
        };
        let begin = self.end - rest.len();
        Ok((begin..begin + len, rest.len() >= len))
    }

    /// Reads what there is, into the room there is; `false` at the end of the stream.
    async fn fill(&mut self) -> io::Result<bool> {
        if self.buffer.is_empty() {
            self.buffer.resize(MIN_READ, 0);
        }
        let read = self.io.read(&mut self.buffer[self.end..]).await?;
        self.end += read;
        Ok(read > 0)
    }

    /// Forgets what has been read; a buffer that has grown far is given back.
    fn empty(&mut self) {
        (self.begin, self.end) = (0, 0);
        self.held.clear();
        if self.buffer.len() > FREE_LEN {
            self.buffer.truncate(FREE_LEN);
            self.buffer.shrink_to_fit();
        }
    }

    /// Makes room behind what has arrived, for the frame that is being read and not beyond it;
    /// `false` if a budget has none.
    fn make_room(&mut self, max: usize) -> Result<bool, FrameError> {
        if self.begin > 0 {
            self.buffer.copy_within(self.begin..self.end, 0);
            (self.begin, self.end) = (0, self.end - self.begin);
        }
        if self.end < self.buffer.len() {
            return Ok(true);
        }
        let (body, _) = self.body(max)?;
        let len = self.buffer.len();
        let grown = (2 * len).min(body.end.max(FREE_LEN)).max(len + 1);
        let more = grown.saturating_sub(len.max(FREE_LEN));
        if more > 0 && !self.take(more) {
            return Ok(false);
        }
        self.buffer.resize(grown, 0);
        Ok(true)
    }

    /// Takes bytes of every budget, or of none.
    fn take(&mut self, bytes: usize) -> bool {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let taken: Result<Vec<_>, _> = self
            .budgets
            .iter()
            .map(|budget| Arc::clone(budget).try_acquire_many_owned(bytes))
            .collect();
        let Ok(taken) = taken else {
            return false;
        };
        self.held.extend(taken);
        true
    }

    /// Reads past a frame: a sender that is not read from would wait for ever, and not hear why.
    async fn skip(&mut self, max: usize) -> Result<FrameError, FrameError> {
        let (body, _) = self.body(max)?;
        let head = &self.buffer[body.start..self.end];
        let head = head[..head.len().min(HEAD_LEN)].to_vec();
        let (len, mut left) = (body.len(), body.end - self.end);
        self.empty();
        while left > 0 {
            let chunk = left.min(self.buffer.len());
            self.io.read_exact(&mut self.buffer[..chunk]).await?;
            left -= chunk;
        }
        Ok(FrameError::NoRoom { len, head })
    }
}

/// Byte by byte, because a byte read too many would be the next frame's.
async fn read_len<R>(io: &mut R) -> Result<Option<u64>, FrameError>
where
    R: AsyncRead + Unpin,
{
    let mut prefix = [0; MAX_PREFIX_LEN];
    for at in 0..MAX_PREFIX_LEN {
        let byte = &mut prefix[at..=at];
        if io.read(byte).await? == 0 {
            return if at == 0 {
                Ok(None)
            } else {
                Err(FrameError::Truncated)
            };
        }
        if decode::is_last(byte[0]) {
            let (len, _) = decode::u64(&prefix).map_err(|_| FrameError::MalformedLength)?;
            return Ok(Some(len));
        }
    }
    Err(FrameError::MalformedLength)
}

async fn read_body<R>(io: &mut R, len: usize) -> Result<Vec<u8>, FrameError>
where
    R: AsyncRead + Unpin,
{
    let mut body = vec![0; len.min(FIRST_CHUNK_LEN)];
    io.read_exact(&mut body).await?;
    while body.len() < len {
        let arrived = body.len();
        let next = len.min(arrived * 2);
        body.reserve_exact(next - arrived);
        body.resize(next, 0);
        io.read_exact(&mut body[arrived..]).await?;
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use std::{
        pin::Pin,
        task::{Context, Poll},
    };

    use futures::{TryStreamExt, executor::block_on, io::Cursor};
    use proptest::prelude::*;

    use super::*;

    const MAX: usize = 100 * 1024;

    fn framed(body: &[u8]) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        block_on(write_frame(&mut bytes, body)).unwrap();
        bytes.into_inner()
    }

    fn read(bytes: &[u8], max: usize) -> Result<Option<Vec<u8>>, FrameError> {
        block_on(read_frame(&mut Cursor::new(bytes), max))
    }

    #[test]
    fn stream_that_ends_before_a_frame_is_no_frame() {
        assert!(matches!(read(&[], MAX), Ok(None)));
    }

    #[test]
    fn length_prefix_is_pinned() {
        assert_eq!(framed(b""), [0]);
        assert_eq!(framed(b"ab"), [2, b'a', b'b']);
        assert_eq!(framed(&[7; 300])[..2], [0xAC, 0x02]);
    }

    #[test]
    fn every_size_around_a_boundary_survives_the_round_trip() {
        let boundaries = [
            0,
            128,
            FIRST_CHUNK_LEN,
            2 * FIRST_CHUNK_LEN,
            MAX_JOINED_LEN,
            MAX,
        ];
        for boundary in boundaries {
            for len in boundary.saturating_sub(1)..=(boundary + 1).min(MAX) {
                let body: Vec<u8> = (0..len).map(|at| at as u8).collect();
                assert_eq!(
                    read(&framed(&body), MAX).unwrap().unwrap(),
                    body,
                    "{len} bytes"
                );
            }
        }
    }

    #[test]
    fn frame_above_the_limit_is_refused_by_its_length_alone() {
        let too_large = |bytes: &[u8], expected| match read(bytes, 10) {
            Err(FrameError::TooLarge { len, max: 10 }) => assert_eq!(len, expected),
            other => panic!("{other:?}"),
        };
        too_large(&[11], 11);
        too_large(
            &[0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F],
            u64::MAX >> 1,
        );
    }

    #[test]
    fn malformed_lengths_are_refused() {
        let not_minimal: &[u8] = &[0x80, 0x00];
        let endless: &[u8] = &[0xFF; 40];
        let ten_bytes: &[u8] = &[0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x01];
        for bytes in [not_minimal, endless, ten_bytes] {
            assert!(
                matches!(read(bytes, MAX), Err(FrameError::MalformedLength)),
                "{bytes:?}"
            );
        }
    }

    #[test]
    fn every_truncation_is_reported() {
        let frame = framed(&[1; 300]);
        for len in 1..frame.len() {
            assert!(
                matches!(read(&frame[..len], MAX), Err(FrameError::Truncated)),
                "{len} bytes"
            );
        }
    }

    #[test]
    fn errors_keep_their_type_inside_an_io_error() {
        let error = io::Error::from(read(&[11], 10).unwrap_err());
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert_eq!(
            error.to_string(),
            "frame of 11 bytes exceeds the limit of 10 bytes"
        );
        let source = error.get_ref().and_then(|source| source.downcast_ref());
        assert!(matches!(
            source,
            Some(FrameError::TooLarge { len: 11, max: 10 })
        ));

        let error = io::Error::from(read(&[3, 1], 10).unwrap_err());
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn frames_follow_each_other_on_one_stream() {
        let mut stream = Cursor::new([framed(b"one"), framed(b""), framed(b"three")].concat());
        for expected in [b"one".as_slice(), b"", b"three"] {
            let frame = block_on(read_frame(&mut stream, MAX)).unwrap();
            assert_eq!(frame.as_deref(), Some(expected));
        }
        assert!(block_on(read_frame(&mut stream, MAX)).unwrap().is_none());
    }

    /// Counts the calls and records the largest buffer that it was asked to fill.
    #[derive(Default)]
    struct Probe {
        supply: Vec<u8>,
        largest_buffer: usize,
        writes: usize,
    }

    impl AsyncRead for Probe {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buffer: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            self.largest_buffer = self.largest_buffer.max(buffer.len());
            let len = buffer.len().min(self.supply.len());
            buffer[..len].copy_from_slice(&self.supply[..len]);
            self.supply.drain(..len);
            Poll::Ready(Ok(len))
        }
    }

    impl AsyncWrite for Probe {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buffer: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.writes += 1;
            Poll::Ready(Ok(buffer.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn claimed_length_allocates_no_more_than_what_arrives() {
        let mut supply = framed(&vec![0; 64 << 20]);
        supply.truncate(10_000);
        let mut stream = Probe {
            supply,
            ..Probe::default()
        };
        let result = block_on(read_frame(&mut stream, 64 << 20));
        assert!(matches!(result, Err(FrameError::Truncated)));
        assert!(
            stream.largest_buffer <= 2 * 10_000,
            "{} bytes",
            stream.largest_buffer
        );
    }

    #[test]
    fn small_frame_is_one_write() {
        for (len, writes) in [(0, 1), (MAX_JOINED_LEN, 1), (MAX_JOINED_LEN + 1, 2)] {
            let mut stream = Probe::default();
            block_on(write_frame(&mut stream, &vec![0; len])).unwrap();
            assert_eq!(stream.writes, writes, "{len} bytes");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>, max in 0..MAX) {
            if let Ok(Some(body)) = read(&bytes, max) {
                prop_assert!(body.len() <= max && body.len() < bytes.len());
            }
        }
    }

    const PATIENCE: Duration = Duration::from_secs(10);

    fn budget(bytes: usize) -> Arc<Semaphore> {
        Arc::new(Semaphore::new(bytes))
    }

    /// All that a reader makes of a stream whose bytes come `at_once` at a time.
    async fn read_all(
        stream: &[u8],
        at_once: usize,
        budget: Arc<Semaphore>,
    ) -> (Vec<Vec<u8>>, Option<FrameError>) {
        let io = futures::stream::iter(stream.chunks(at_once).map(Ok)).into_async_read();
        let mut reader = FrameReader::new(io, vec![budget]);
        let mut frames = Vec::new();
        loop {
            match reader.next(MAX, PATIENCE, PATIENCE).await {
                Ok(Some(frame)) => frames.push(frame.to_vec()),
                Ok(None) => return (frames, None),
                Err(error) => return (frames, Some(error)),
            }
        }
    }

    #[tokio::test]
    async fn frames_are_read_however_they_arrive() {
        let bodies: Vec<_> = [0, 1, 127, 128, 5_000, MAX, 3]
            .map(|len| vec![len as u8; len])
            .into();
        let stream: Vec<u8> = bodies.iter().flat_map(|body| framed(body)).collect();
        for at_once in [1, 7, 4_096, 1_000_000] {
            let (frames, error) = read_all(&stream, at_once, budget(usize::MAX >> 4)).await;
            assert!(error.is_none(), "{error:?}");
            assert!(frames == bodies, "at {at_once} bytes at once");
        }
    }

    #[tokio::test]
    async fn a_stream_that_ends_inside_a_frame_is_truncated() {
        let stream = framed(&[1; 300]);
        for end in 1..stream.len() {
            let (frames, error) = read_all(&stream[..end], 64, budget(0)).await;
            assert!(frames.is_empty());
            assert!(
                matches!(error, Some(FrameError::Truncated)),
                "{end}: {error:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_claim_beyond_the_limit_ends_the_stream() {
        let (_, error) = read_all(&framed(&vec![0; MAX + 1]), 64, budget(0)).await;
        let Some(FrameError::TooLarge { len, max }) = error else {
            panic!("{error:?}");
        };
        assert_eq!((len, max), (MAX as u64 + 1, MAX));
    }

    #[tokio::test]
    async fn a_frame_without_room_is_skipped_and_room_is_given_back() {
        let large = vec![7; 3 * FREE_LEN];
        let stream = [framed(&large), framed(b"next"), framed(&large)].concat();
        for (room, fits) in [(4 * FREE_LEN, true), (FREE_LEN, false)] {
            let shared = budget(room);
            let io = Cursor::new(stream.as_slice());
            let mut reader = FrameReader::new(io, vec![Arc::clone(&shared)]);
            for expected in [large.as_slice(), b"next", &large] {
                let read = reader.next(4 * FREE_LEN, PATIENCE, PATIENCE).await;
                match read {
                    Ok(frame) => {
                        assert!(fits || expected == b"next");
                        assert_eq!(frame, Some(expected));
                    }
                    Err(FrameError::NoRoom { len, head }) => {
                        assert!(!fits);
                        assert_eq!(len, expected.len());
                        assert_eq!(head, expected[..HEAD_LEN]);
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            drop(reader);
            assert_eq!(shared.available_permits(), room);
        }
    }
}
