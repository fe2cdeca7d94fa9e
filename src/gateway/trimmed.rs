//! A WebSocket's stream on which messages that are too long arrive trimmed.
//!
//! What reads a WebSocket ends the connection at a message beyond its limit, and with it every call that
//! shares the connection. Here the reader gets the beginning of such a message, in which stands whose
//! call it is, and the rest is thrown away as it comes.
//!
//! * Only the heads of the remote's data frames are looked at. Whatever breaks the protocol is left to the
//!   reader.
//! * Text arrives as binary: text that is cut amid a character, or is no UTF-8, would end the
//!   connection too. The reader decodes it, one message at a time.

use std::io::{self, Cursor};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::tungstenite::protocol::frame::FrameHeader;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};

/// What is left of a message that is too long, in bytes: enough for an id of any length that makes sense.
const BEGINNING: u64 = 4 << 10;

/// The last byte of a trimmed message, which ends no text.
const MARK: u8 = 0xff;

/// The bytes that are read at once.
const CHUNK: usize = 8 << 10;

/// The end of the head of an HTTP message.
const HEAD_END: &[u8; 4] = b"\r\n\r\n";

/// What a message is that a [`Trimmed`] stream has carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrived<'a> {
    Whole(&'a [u8]),
    /// The beginning of one that was too long.
    Beginning(&'a [u8]),
}

impl<'a> Arrived<'a> {
    pub(super) fn from(message: &'a [u8]) -> Self {
        match message.split_last() {
            Some((&MARK, beginning)) => Self::Beginning(beginning),
            _ => Self::Whole(message),
        }
    }
}

/// A stream that carries a WebSocket. What is written to it goes out as it is.
#[derive(Debug)]
pub(super) struct Trimmed<S> {
    stream: S,
    trimmer: Trimmer,
    /// What the reader has yet to take, but for what it has taken.
    passed: Vec<u8>,
    taken: usize,
}

impl<S> Trimmed<S> {
    /// A stream that begins with a frame. No message on it is longer than `max`.
    pub(super) fn new(stream: S, max: usize) -> Self {
        Self::behind(State::Head, stream, max)
    }

    /// A stream that begins with the answer to a handshake.
    pub(super) fn with_handshake(stream: S, max: usize) -> Self {
        Self::behind(State::Handshake(0), stream, max)
    }

    fn behind(state: State, stream: S, max: usize) -> Self {
        Self {
            stream,
            trimmer: Trimmer::new(state, max as u64),
            passed: Vec::new(),
            taken: 0,
        }
    }

    /// Gives the reader what waits for it; says whether there was anything.
    fn give(&mut self, buffer: &mut ReadBuf<'_>) -> bool {
        let waiting = &self.passed[self.taken..];
        let count = waiting.len().min(buffer.remaining());
        buffer.put_slice(&waiting[..count]);
        self.taken += count;
        if self.taken == self.passed.len() {
            // A connection at rest holds nothing.
            (self.passed, self.taken) = Default::default();
        }
        count > 0
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Trimmed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while buffer.remaining() > 0 && !this.give(buffer) {
            let mut chunk = [MaybeUninit::uninit(); CHUNK];
            let mut chunk = ReadBuf::uninit(&mut chunk);
            ready!(Pin::new(&mut this.stream).poll_read(cx, &mut chunk))?;
            if chunk.filled().is_empty() {
                break;
            }
            this.trimmer.feed(chunk.filled(), &mut this.passed)?;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Trimmed<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Reads frames, and says what of them is passed on. Does no I/O.
#[derive(Debug)]
struct Trimmer {
    max: u64,
    state: State,
    /// The bytes of the head that is arriving.
    head: Vec<u8>,
    /// The bytes of the message that is arriving, as its heads have told so far.
    message: u64,
    /// Its beginning has been passed on as a whole message: the rest is not wanted.
    is_trimmed: bool,
}

#[derive(Debug)]
enum State {
    /// So many bytes of its end have come.
    Handshake(usize),
    Head,
    /// So many bytes go on as they are.
    Pass(u64),
    /// The beginning of a message that is too long, and how much comes behind it.
    Begin {
        header: FrameHeader,
        beginning: Vec<u8>,
        rest: u64,
    },
    /// So many bytes go nowhere.
    Drop(u64),
    /// No WebSocket: everything goes on as it is.
    Broken,
}

impl Trimmer {
    fn new(state: State, max: u64) -> Self {
        Self {
            max: max.max(BEGINNING),
            state,
            head: Vec::new(),
            message: 0,
            is_trimmed: false,
        }
    }

    /// Takes what has arrived, and appends what of it is passed on.
    fn feed(&mut self, mut input: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        while !input.is_empty() {
            input = self.step(input, out)?;
        }
        Ok(())
    }

    /// Takes some of the input; returns the rest.
    fn step<'a>(&mut self, input: &'a [u8], out: &mut Vec<u8>) -> io::Result<&'a [u8]> {
        match &mut self.state {
            State::Head => {
                let (byte, rest) = input.split_at(1);
                self.head.extend_from_slice(byte);
                self.try_head(out)?;
                return Ok(rest);
            }
            State::Handshake(seen) => {
                let byte = input[0];
                *seen = match byte == HEAD_END[*seen] {
                    true => *seen + 1,
                    false => usize::from(byte == HEAD_END[0]),
                };
                out.push(byte);
                if *seen == HEAD_END.len() {
                    self.state = State::Head;
                }
                return Ok(&input[1..]);
            }
            State::Begin {
                header,
                beginning,
                rest,
            } => {
                let missing = BEGINNING as usize - beginning.len();
                let (more, behind) = input.split_at(missing.min(input.len()));
                beginning.extend_from_slice(more);
                if more.len() == missing {
                    let dropped = *rest;
                    append_beginning(header, beginning, out)?;
                    self.drop_bytes(dropped);
                }
                return Ok(behind);
            }
            State::Pass(left) => {
                let (passed, rest) = split(input, left);
                out.extend_from_slice(passed);
                self.end_of_frame();
                return Ok(rest);
            }
            State::Drop(left) => {
                let (_, rest) = split(input, left);
                self.end_of_frame();
                return Ok(rest);
            }
            State::Broken => out.extend_from_slice(input),
        }
        Ok(&[])
    }

    fn end_of_frame(&mut self) {
        if let State::Pass(0) | State::Drop(0) = self.state {
            self.state = State::Head;
        }
    }

    fn pass(&mut self, count: u64) {
        self.state = State::Pass(count);
        self.end_of_frame();
    }

    fn drop_bytes(&mut self, count: u64) {
        self.state = State::Drop(count);
        self.end_of_frame();
    }

    /// Decides what becomes of a frame, once its head is whole.
    fn try_head(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        let (header, len) = match FrameHeader::parse(&mut Cursor::new(&self.head)) {
            Ok(Some(head)) => head,
            Ok(None) => return Ok(()),
            Err(_) => {
                out.append(&mut self.head);
                self.state = State::Broken;
                return Ok(());
            }
        };
        let mut head = std::mem::take(&mut self.head);
        let OpCode::Data(data) = header.opcode else {
            out.append(&mut head);
            self.pass(len);
            return Ok(());
        };
        if data != Data::Continue {
            (self.message, self.is_trimmed) = (0, false);
        }
        self.message = self.message.saturating_add(len);
        if self.is_trimmed {
            self.drop_bytes(len);
        } else if self.message > self.max {
            self.is_trimmed = true;
            self.trim(data, header, len, out)?;
        } else {
            if data == Data::Text {
                head[0] = head[0] & 0xf0 | u8::from(OpCode::Data(Data::Binary));
            }
            out.append(&mut head);
            self.pass(len);
        }
        Ok(())
    }

    /// Ends a message at the frame by which it is too long.
    fn trim(
        &mut self,
        data: Data,
        mut header: FrameHeader,
        len: u64,
        out: &mut Vec<u8>,
    ) -> io::Result<()> {
        if data == Data::Continue {
            // The frames before it are its beginning.
            append_beginning(&mut header, &mut Vec::new(), out)?;
            self.drop_bytes(len);
            return Ok(());
        }
        header.opcode = OpCode::Data(Data::Binary);
        self.state = State::Begin {
            header,
            beginning: Vec::new(),
            // It is longer than the limit, which is no less than that.
            rest: len - BEGINNING,
        };
        Ok(())
    }
}

/// Takes as many bytes of the input as are left.
fn split<'a>(input: &'a [u8], left: &mut u64) -> (&'a [u8], &'a [u8]) {
    let count = usize::try_from(*left).map_or(input.len(), |left| left.min(input.len()));
    *left -= count as u64;
    input.split_at(count)
}

/// Appends the last frame of a trimmed message.
fn append_beginning(
    header: &mut FrameHeader,
    beginning: &mut Vec<u8>,
    out: &mut Vec<u8>,
) -> io::Result<()> {
    if let Some(mask) = header.mask.replace([0; 4]) {
        let mask = mask.iter().cycle();
        beginning
            .iter_mut()
            .zip(mask)
            .for_each(|(byte, mask)| *byte ^= mask);
    } else {
        header.mask = None;
    }
    beginning.push(MARK);
    header.is_final = true;
    let written = header.format(beginning.len() as u64, out);
    written.map_err(io::Error::other)?;
    out.append(beginning);
    Ok(())
}

#[cfg(test)]
mod tests {
    use futures::{SinkExt, StreamExt};
    use proptest::prelude::*;
    use tokio_tungstenite::WebSocketStream;
    use tokio_tungstenite::tungstenite::Message;
    use tokio_tungstenite::tungstenite::protocol::Role;
    use tokio_tungstenite::tungstenite::protocol::frame::Frame;

    use super::*;

    const MAX: usize = 10_000;

    fn text(len: usize) -> String {
        let id = "[\"r\",";
        format!("{id}{}", "ü".repeat((len - id.len()) / 2))
    }

    /// One message in frames of these lengths.
    fn fragments(text: &str, lengths: &[usize]) -> Vec<Message> {
        let mut rest = text.as_bytes();
        let count = lengths.len();
        let frame = |(index, length): (usize, &usize)| {
            let (part, behind) = rest.split_at((*length).min(rest.len()));
            rest = behind;
            let data = if index == 0 {
                Data::Text
            } else {
                Data::Continue
            };
            let frame = Frame::message(part.to_vec(), OpCode::Data(data), index + 1 == count);
            Message::Frame(frame)
        };
        lengths.iter().enumerate().map(frame).collect()
    }

    /// What arrives of these messages, sent by one in this role, through a pipe of so many bytes.
    async fn arriving(sent: Vec<Message>, role: Role, pipe: usize) -> Vec<Vec<u8>> {
        let (near, far) = tokio::io::duplex(pipe);
        let other = match role {
            Role::Client => Role::Server,
            Role::Server => Role::Client,
        };
        let mut sender = WebSocketStream::from_raw_socket(near, role, None).await;
        let trimmed = Trimmed::new(far, MAX);
        let mut reader = WebSocketStream::from_raw_socket(trimmed, other, None).await;
        let sends = async move {
            for message in sent {
                sender.send(message).await.unwrap();
            }
            sender.close(None).await.unwrap();
            while sender.next().await.is_some() {}
        };
        let reads = async move {
            let mut arrived = Vec::new();
            while let Some(message) = reader.next().await {
                match message.unwrap() {
                    Message::Binary(bytes) => arrived.push(bytes.to_vec()),
                    Message::Close(_) => {}
                    other => panic!("{other:?}"),
                }
            }
            arrived
        };
        tokio::join!(sends, reads).1
    }

    #[tokio::test]
    async fn a_message_that_is_too_long_is_trimmed_and_those_around_it_are_whole() {
        for role in [Role::Client, Role::Server] {
            for pipe in [1, 7, 64 << 10] {
                let long = text(3 * MAX);
                let sent = ["first", &text(MAX), &long, "", "last"].map(Message::text);
                let arrived = arriving(sent.to_vec(), role, pipe).await;
                let arrived: Vec<_> = arrived.iter().map(|one| Arrived::from(one)).collect();
                let expected = [
                    Arrived::Whole(b"first"),
                    Arrived::Whole(text(MAX).as_bytes()),
                    Arrived::Beginning(&long.as_bytes()[..BEGINNING as usize]),
                    Arrived::Whole(b""),
                    Arrived::Whole(b"last"),
                ]
                .map(|one| format!("{one:?}"));
                let arrived: Vec<_> = arrived.iter().map(|one| format!("{one:?}")).collect();
                assert_eq!(arrived, expected, "{role:?} {pipe}");
            }
        }
    }

    #[tokio::test]
    async fn a_message_in_fragments_is_trimmed_at_the_one_by_which_it_is_too_long() {
        let long = text(2 * MAX);
        for (lengths, beginning) in [
            (&[5, MAX - 5, MAX][..], MAX),
            (&[5, 2 * MAX - 10, 5], 5),
            (&[2 * MAX - 1, 1], BEGINNING as usize),
            (&[MAX, 0, 0, 1, 2, MAX - 3, 0], MAX),
        ] {
            let mut sent = vec![Message::text("first")];
            sent.extend(fragments(&long, lengths));
            // A control frame may come between the frames of a message.
            sent.insert(2, Message::Pong("pong".into()));
            sent.push(Message::text("last"));
            let (near, far) = tokio::io::duplex(256);
            let mut sender = WebSocketStream::from_raw_socket(near, Role::Client, None).await;
            let trimmed = Trimmed::new(far, MAX);
            let mut reader = WebSocketStream::from_raw_socket(trimmed, Role::Server, None).await;
            let sends = async move {
                for message in sent {
                    sender.send(message).await.unwrap();
                }
                sender
            };
            let reads = async {
                let mut arrived = Vec::new();
                while arrived.len() < 3 {
                    match reader.next().await.unwrap().unwrap() {
                        Message::Binary(bytes) => arrived.push(bytes),
                        Message::Pong(_) => {}
                        other => panic!("{other:?}"),
                    }
                }
                arrived
            };
            let (_sender, arrived) = tokio::join!(sends, reads);
            assert_eq!(&arrived[0][..], b"first");
            let trimmed = Arrived::from(&arrived[1]);
            let expected = Arrived::Beginning(&long.as_bytes()[..beginning]);
            assert_eq!(
                format!("{trimmed:?}"),
                format!("{expected:?}"),
                "{lengths:?}"
            );
            assert_eq!(&arrived[2][..], b"last");
        }
    }

    #[test]
    fn the_beginning_is_passed_on_before_the_rest_has_come() {
        let mut trimmer = Trimmer::new(State::Head, MAX as u64);
        let mut out = Vec::new();
        let mut endless = vec![0x82, 127];
        endless.extend((u64::MAX >> 1).to_be_bytes());
        endless.extend([b'x'; BEGINNING as usize]);
        trimmer.feed(&endless, &mut out).unwrap();
        let len = out.len();
        assert_eq!(out.last(), Some(&MARK));
        for _ in 0..1_000 {
            trimmer.feed(&[b'x'; 4_096], &mut out).unwrap();
        }
        assert_eq!((out.len(), trimmer.head.capacity()), (len, 0));
    }

    #[test]
    fn the_answer_to_a_handshake_comes_before_the_frames() {
        let mut trimmer = Trimmer::new(State::Handshake(0), MAX as u64);
        let (head, frame) = (b"HTTP/1.1 101 ok\r\na: b\r\r\n\r\n", b"\x81\x01x");
        let mut out = Vec::new();
        trimmer
            .feed(&[&head[..], frame].concat(), &mut out)
            .unwrap();
        assert_eq!(out, [&head[..], b"\x82\x01x"].concat());
    }

    proptest! {
        #[test]
        fn whatever_arrives_takes_bounded_room(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..50),
        ) {
            let mut trimmer = Trimmer::new(State::Head, MAX as u64);
            let mut out = Vec::new();
            for piece in &pieces {
                let before = out.len();
                trimmer.feed(piece, &mut out).unwrap();
                prop_assert!(out.len() - before <= piece.len() + BEGINNING as usize + 32);
            }
        }
    }
}
