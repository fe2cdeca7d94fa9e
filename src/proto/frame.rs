//! One frame: an unsigned-varint length, then that many bytes.
//!
//! Invariants:
//! * A length beyond the caller's limit is refused before anything is allocated for it.
//! * The buffer grows as bytes arrive, to at most twice what has arrived: a claimed length costs the sender
//!   as much as it costs us.
//! * Nothing beyond the frame is read, so frames can follow each other on one stream.
//!
//! There is no time-out here: who reads from a stranger sets one.

use std::io;

use futures::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
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
        len: u64,
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
    read_frame_if(io, max, |_| true).await
}

/// As [`read_frame`], for a reader that shares its memory out: asks `has_room` before the buffer grows beyond its
/// first 4 KiB, each time for the bytes by which it grows. Where it says no, the frame is skipped and the result is
/// [`FrameError::NoRoom`].
pub async fn read_frame_if<R>(
    io: &mut R,
    max: usize,
    has_room: impl FnMut(usize) -> bool,
) -> Result<Option<Vec<u8>>, FrameError>
where
    R: AsyncRead + Unpin,
{
    let Some(len) = read_len(io).await? else {
        return Ok(None);
    };
    match usize::try_from(len) {
        Ok(len) if len <= max => read_body(io, len, has_room).await.map(Some),
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

async fn read_body<R>(
    io: &mut R,
    len: usize,
    mut has_room: impl FnMut(usize) -> bool,
) -> Result<Vec<u8>, FrameError>
where
    R: AsyncRead + Unpin,
{
    let mut body = vec![0; len.min(FIRST_CHUNK_LEN)];
    io.read_exact(&mut body).await?;
    while body.len() < len {
        let arrived = body.len();
        let next = len.min(arrived * 2);
        if !has_room(next - arrived) {
            body.truncate(FIRST_CHUNK_LEN);
            body.shrink_to_fit();
            skip(io, len - arrived, &mut body).await?;
            return Err(FrameError::NoRoom { len: len as u64 });
        }
        body.reserve_exact(next - arrived);
        body.resize(next, 0);
        io.read_exact(&mut body[arrived..]).await?;
    }
    Ok(body)
}

/// Reads so many bytes and forgets them: a sender that is not read from would wait for ever, and not hear why.
async fn skip<R>(io: &mut R, mut len: usize, buffer: &mut [u8]) -> io::Result<()>
where
    R: AsyncRead + Unpin,
{
    while len > 0 {
        let chunk = len.min(buffer.len());
        io.read_exact(&mut buffer[..chunk]).await?;
        len -= chunk;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        pin::Pin,
        task::{Context, Poll},
    };

    use futures::{executor::block_on, io::Cursor};
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
    fn room_is_asked_for_as_bytes_arrive() {
        let body = vec![1; 3 * FIRST_CHUNK_LEN];
        let stream = [framed(&body), framed(b"next")].concat();
        let read = |room: usize| {
            let (mut left, mut asked) = (room, Vec::new());
            let mut bytes = Cursor::new(stream.as_slice());
            let has_room = |grows| {
                asked.push(grows);
                left.checked_sub(grows).map(|rest| left = rest).is_some()
            };
            let result = block_on(read_frame_if(&mut bytes, MAX, has_room));
            let next = block_on(read_frame(&mut bytes, MAX)).unwrap();
            assert_eq!(next.as_deref(), Some(b"next".as_slice()));
            (result, asked)
        };
        let (result, asked) = read(2 * FIRST_CHUNK_LEN);
        assert_eq!(result.unwrap().unwrap(), body);
        assert_eq!(asked, [FIRST_CHUNK_LEN, FIRST_CHUNK_LEN]);
        let (result, _) = read(2 * FIRST_CHUNK_LEN - 1);
        let len = body.len() as u64;
        assert!(matches!(result, Err(FrameError::NoRoom { len: l }) if l == len));
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
}
