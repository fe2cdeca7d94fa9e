//! The protocol's messages on a stream, for libp2p's request-response behaviour.

use std::{io, time::Duration};

use futures::io::{AsyncRead, AsyncWrite};
use libp2p::{StreamProtocol, request_response};

use super::{MAX_REQUEST_LEN, MAX_RESPONSE_LEN, Malformed, Request, Response, page_len, wire};
use crate::proto::frame::{FrameError, read_frame, write_frame};

/// How long one message may take to arrive. It is a few packets, and a server answers from memory; a sender
/// slower than this is holding the stream.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// Reads and writes one request and its response on a stream of their own, at either end.
///
/// What follows a message on the stream is left unread: the stream is closed after the response anyway, and
/// waiting for its end would let a sender hold it. Reading needs a Tokio runtime with its timer.
///
/// A client's codec remembers what it asked until the response is read, so a response of another kind is
/// an error, and so is a stream that ends without one, except after [`Request::Unregister`]. That relies on
/// request-response using one clone for each stream, as its `&mut self` across both calls asks for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Codec {
    asked: Option<Asked>,
}

#[derive(Debug, Clone, Copy)]
enum Asked {
    Register,
    Unregister,
    Discover { limit: usize },
}

impl request_response::Codec for Codec {
    type Protocol = StreamProtocol;
    /// A client sends `Ok`; a server receives either, and answers a [`Malformed`] with itself turned into a
    /// [`Response`].
    type Request = Result<Request, Malformed>;
    type Response = Response;

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Self::Request>
    where
        T: AsyncRead + Unpin + Send,
    {
        let frame = in_time(READ_TIMEOUT, read_frame(io, MAX_REQUEST_LEN)).await?;
        let bytes = frame.ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(wire::decode_request(&bytes)?)
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Response>
    where
        T: AsyncRead + Unpin + Send,
    {
        let asked = self.asked.take();
        let asked = asked.ok_or_else(|| invalid_input("no request was written"))?;
        let frame = in_time(READ_TIMEOUT, read_frame(io, MAX_RESPONSE_LEN)).await?;
        match (asked, frame) {
            (Asked::Unregister, _) => Ok(Response::Unregistered),
            (_, None) => Err(io::ErrorKind::UnexpectedEof.into()),
            (Asked::Register, Some(bytes)) => Ok(wire::decode_registered(&bytes)?),
            (Asked::Discover { limit }, Some(bytes)) => Ok(wire::decode_discovered(&bytes, limit)?),
        }
    }

    async fn write_request<T>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        request: Self::Request,
    ) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        let request = request.map_err(|_| invalid_input("a malformed request is not sent"))?;
        self.asked = Some(match &request {
            Request::Register { .. } => Asked::Register,
            Request::Unregister { .. } => Asked::Unregister,
            Request::Discover { limit, .. } => Asked::Discover {
                limit: page_len(*limit),
            },
        });
        write_frame(io, &wire::encode_request(&request)).await
    }

    /// Fails for a page of more registrations than a client would look at.
    async fn write_response<T>(
        &mut self,
        _: &StreamProtocol,
        io: &mut T,
        response: Response,
    ) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        match wire::encode_response(&response)? {
            Some(bytes) => write_frame(io, &bytes).await,
            None => Ok(()),
        }
    }
}

async fn in_time<T>(
    limit: Duration,
    read: impl Future<Output = Result<T, FrameError>>,
) -> io::Result<T> {
    match tokio::time::timeout(limit, read).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "message did not arrive in time",
        )),
    }
}

fn invalid_input(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

#[cfg(test)]
mod tests {
    use std::{
        pin::Pin,
        sync::LazyLock,
        task::{Context, Poll},
    };

    use futures::{executor::block_on, io::Cursor};
    use libp2p::{identity::Keypair, request_response::Codec as _};
    use proptest::{option, prelude::*, sample::Index};

    use crate::limits::RENDEZVOUS_PROTOCOL;

    use super::{
        super::{
            Cookie, Form, MAX_REGISTRATIONS, Namespace, Page, Registration, SignedPeer, Status, Ttl,
        },
        *,
    };

    static PEERS: LazyLock<Vec<SignedPeer>> = LazyLock::new(|| {
        let peer = |port| {
            let address = format!("/ip4/127.0.0.1/tcp/{port}").parse().unwrap();
            SignedPeer::sign(&Keypair::generate_ed25519(), &[address], Form::Standard).unwrap()
        };
        (1..=3).map(peer).collect()
    });

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap()
    }

    fn asked(request: &Request) -> (Codec, Vec<u8>) {
        let (mut codec, mut stream) = (Codec::default(), Cursor::new(Vec::new()));
        block_on(codec.write_request(&RENDEZVOUS_PROTOCOL, &mut stream, Ok(request.clone())))
            .unwrap();
        (codec, stream.into_inner())
    }

    fn answered(response: &Response) -> io::Result<Vec<u8>> {
        let (mut codec, mut stream) = (Codec::default(), Cursor::new(Vec::new()));
        block_on(codec.write_response(&RENDEZVOUS_PROTOCOL, &mut stream, response.clone()))?;
        Ok(stream.into_inner())
    }

    fn read_request(bytes: &[u8]) -> io::Result<Result<Request, Malformed>> {
        let mut stream = Cursor::new(bytes);
        runtime().block_on(Codec::default().read_request(&RENDEZVOUS_PROTOCOL, &mut stream))
    }

    fn read_response(mut codec: Codec, bytes: &[u8]) -> io::Result<Response> {
        let mut stream = Cursor::new(bytes);
        runtime().block_on(codec.read_response(&RENDEZVOUS_PROTOCOL, &mut stream))
    }

    fn framed(message: &[u8]) -> Vec<u8> {
        [&[message.len() as u8], message].concat()
    }

    fn namespace(text: &str) -> Namespace {
        Namespace::new(text).unwrap()
    }

    fn discover(limit: u64) -> Request {
        Request::Discover {
            namespace: None,
            cookie: None,
            limit: Some(limit),
        }
    }

    fn register() -> Request {
        Request::Register {
            namespace: namespace("a"),
            record: PEERS[0].clone(),
            ttl: None,
        }
    }

    fn unregister() -> Request {
        Request::Unregister {
            namespace: namespace("a"),
        }
    }

    fn page(len: usize) -> Page {
        let registration = |at: usize| Registration {
            namespace: namespace("a"),
            record: PEERS[at % PEERS.len()].clone(),
            ttl: Ttl::from_secs(90),
        };
        let registrations = (0..len).map(registration).collect();
        Page {
            registrations,
            cookie: Cookie::after(len as u64, None),
        }
    }

    #[test]
    fn encoding_is_pinned() {
        let (_, bytes) = asked(&unregister());
        assert_eq!(bytes, framed(b"\x08\x02\x22\x03\x0a\x01a"));

        let cookie = Some(Cookie::from_bytes(b"cc".to_vec()).unwrap());
        let (_, bytes) = asked(&Request::Discover {
            namespace: Some(namespace("a")),
            cookie,
            limit: Some(7),
        });
        assert_eq!(
            bytes,
            framed(b"\x08\x03\x2a\x09\x0a\x01a\x10\x07\x1a\x02cc")
        );

        let bytes = answered(&Response::Registered(Ok(Ttl::from_secs(90)))).unwrap();
        assert_eq!(bytes, framed(b"\x08\x01\x1a\x04\x08\x00\x18\x5a"));

        let bytes = answered(&Response::Registered(Err(Status::NotAuthorized))).unwrap();
        assert_eq!(bytes, framed(b"\x08\x01\x1a\x03\x08\xc8\x01"));

        let bytes = answered(&Response::Discovered(Err(Status::Unavailable))).unwrap();
        assert_eq!(bytes, framed(b"\x08\x04\x32\x03\x18\x90\x03"));
    }

    #[test]
    fn wrong_content_is_answered_with_its_status() {
        use super::Malformed::*;
        for (message, malformed) in [
            (b"".as_slice(), Register(Status::InvalidNamespace)),
            (b"\x12\x03\x0a\x01\xff", Register(Status::InvalidNamespace)),
            (
                b"\x12\x03\x0a\x01a",
                Register(Status::InvalidSignedPeerRecord),
            ),
            (
                b"\x12\x06\x0a\x01a\x12\x01a",
                Register(Status::InvalidSignedPeerRecord),
            ),
            (b"\x08\x02", Unregister(Status::InvalidNamespace)),
            (
                b"\x08\x03\x2a\x03\x0a\x01\xff",
                Discover(Status::InvalidNamespace),
            ),
        ] {
            assert_eq!(
                read_request(&framed(message)).unwrap(),
                Err(malformed),
                "{message:?}"
            );
        }
        assert_eq!(
            Response::from(Register(Status::InvalidTtl)),
            Response::Registered(Err(Status::InvalidTtl))
        );
        assert_eq!(
            Response::from(Unregister(Status::InvalidNamespace)),
            Response::Unregistered
        );
        assert_eq!(
            Response::from(Discover(Status::InvalidCookie)),
            Response::Discovered(Err(Status::InvalidCookie))
        );
    }

    #[test]
    fn too_long_cookie_is_invalid() {
        let mut message = vec![0x08, 0x03, 0x2A, 0x84, 0x04, 0x1A, 0x81, 0x04];
        message.extend([7; Cookie::MAX_LEN + 1]);
        let bytes = [&[0x89, 0x04], message.as_slice()].concat();
        let request = read_request(&bytes).unwrap();
        assert_eq!(request, Err(Malformed::Discover(Status::InvalidCookie)));
    }

    #[test]
    fn empty_namespace_and_cookie_of_a_discovery_count_as_absent() {
        let request = read_request(&framed(b"\x08\x03\x2a\x04\x0a\x00\x1a\x00")).unwrap();
        assert_eq!(
            request,
            Ok(Request::Discover {
                namespace: None,
                cookie: None,
                limit: None
            })
        );
    }

    #[test]
    fn what_is_no_request_ends_the_stream() {
        for message in [
            b"\x08\x01".as_slice(),
            b"\x08\x04",
            b"\x08\x09",
            b"\x0b",
            b"\x12\x09",
        ] {
            let error = read_request(&framed(message)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{message:?}");
        }
        let error = read_request(b"").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn too_long_messages_are_refused_unread() {
        let error = read_request(&[0x81, 0x40]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "frame of 8193 bytes exceeds the limit of 8192 bytes"
        );
        let error = read_response(asked(&register()).0, &[0x81, 0x80, 0x10]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "frame of 262145 bytes exceeds the limit of 262144 bytes"
        );
    }

    #[test]
    fn what_follows_a_message_is_ignored() {
        let bytes = [asked(&unregister()).1, vec![0xFF; 20]].concat();
        assert_eq!(read_request(&bytes).unwrap(), Ok(unregister()));
    }

    #[test]
    fn end_of_stream_answers_an_unregister_and_nothing_else() {
        assert_eq!(answered(&Response::Unregistered).unwrap(), b"");
        let answer = read_response(asked(&unregister()).0, b"").unwrap();
        assert_eq!(answer, Response::Unregistered);
        for request in [register(), discover(1)] {
            let error = read_response(asked(&request).0, b"").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn response_to_another_question_is_refused() {
        let registered = answered(&Response::Registered(Ok(Ttl::MAX))).unwrap();
        let discovered = answered(&Response::Discovered(Ok(page(1)))).unwrap();
        assert!(read_response(asked(&discover(1)).0, &registered).is_err());
        assert!(read_response(asked(&register()).0, &discovered).is_err());
        assert!(read_response(Codec::default(), &discovered).is_err());
    }

    #[test]
    fn no_more_registrations_are_used_than_were_asked_for() {
        let bytes = answered(&Response::Discovered(Ok(page(3)))).unwrap();
        for (limit, used) in [(1, 1), (2, 2), (3, 3), (4, 3), (0, 3), (u64::MAX, 3)] {
            let response = read_response(asked(&discover(limit)).0, &bytes).unwrap();
            let Response::Discovered(Ok(page)) = response else {
                panic!("{response:?}")
            };
            assert_eq!(page.registrations.len(), used, "limit {limit}");
        }
    }

    #[test]
    fn wrong_registration_does_not_hide_the_others() {
        let mut bytes = answered(&Response::Discovered(Ok(page(3)))).unwrap();
        let second = PEERS[1].envelope();
        let at = bytes
            .windows(second.len())
            .position(|window| window == second)
            .unwrap();
        bytes[at + second.len() - 1] ^= 1;
        let response = read_response(asked(&discover(3)).0, &bytes).unwrap();
        let Response::Discovered(Ok(page)) = response else {
            panic!("{response:?}")
        };
        let peers: Vec<_> = page
            .registrations
            .iter()
            .map(|found| found.record.peer())
            .collect();
        assert_eq!(peers, [PEERS[0].peer(), PEERS[2].peer()]);
    }

    #[test]
    fn undefined_status_is_an_error_and_never_a_success() {
        let undefined: [&[u8]; 4] = [b"\x01", b"\x63", b"\x68", b"\xff\xff\x7f"];
        for code in undefined {
            let part = [b"\x18\x5a\x08", code].concat();
            let message = [&[0x08, 0x01, 0x1A, part.len() as u8], part.as_slice()].concat();
            let response = read_response(asked(&register()).0, &framed(&message)).unwrap();
            assert_eq!(
                response,
                Response::Registered(Err(Status::InternalError)),
                "{code:?}"
            );
        }
    }

    #[test]
    fn full_page_of_the_largest_registrations_fits() {
        let key = Keypair::generate_ed25519();
        let long = |port| {
            format!("/dns4/{}/tcp/{port}", "a".repeat(238))
                .parse()
                .unwrap()
        };
        let long: Vec<_> = (1..=15).map(long).collect();
        let record = SignedPeer::sign(&key, &long, Form::Legacy).unwrap();
        assert!(record.envelope().len() > SignedPeer::MAX_LEN - 256);
        let namespace = namespace(&"n".repeat(255));
        let cookie = Cookie::after(1, Some(&namespace));
        let registration = Registration {
            namespace,
            record,
            ttl: Ttl::MAX,
        };
        let full = |len| Page {
            registrations: vec![registration.clone(); len],
            cookie: cookie.clone(),
        };
        let bytes = answered(&Response::Discovered(Ok(full(MAX_REGISTRATIONS)))).unwrap();
        let response = read_response(asked(&discover(0)).0, &bytes).unwrap();
        assert_eq!(response, Response::Discovered(Ok(full(MAX_REGISTRATIONS))));
        assert!(answered(&Response::Discovered(Ok(full(MAX_REGISTRATIONS + 1)))).is_err());
    }

    #[test]
    fn malformed_request_is_never_sent() {
        let (mut codec, mut stream) = (Codec::default(), Cursor::new(Vec::new()));
        let request = Err(Malformed::Discover(Status::InvalidCookie));
        assert!(block_on(codec.write_request(&RENDEZVOUS_PROTOCOL, &mut stream, request)).is_err());
        assert!(stream.into_inner().is_empty());
    }

    struct Stalled;

    impl AsyncRead for Stalled {
        fn poll_read(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Pending
        }
    }

    #[test]
    fn stalled_sender_times_out() {
        let read = async { in_time(Duration::from_millis(1), read_frame(&mut Stalled, 1)).await };
        assert_eq!(
            runtime().block_on(read).unwrap_err().kind(),
            io::ErrorKind::TimedOut
        );
    }

    fn any_namespace() -> impl Strategy<Value = Namespace> {
        "\\PC{1,60}".prop_map(|text| namespace(&text))
    }

    fn any_ttl() -> impl Strategy<Value = Ttl> {
        any::<u64>().prop_map(Ttl::from_secs)
    }

    fn any_peer() -> impl Strategy<Value = SignedPeer> {
        any::<Index>().prop_map(|index| index.get(&PEERS).clone())
    }

    fn any_cookie() -> impl Strategy<Value = Cookie> {
        prop::collection::vec(any::<u8>(), 1..=Cookie::MAX_LEN)
            .prop_map(|bytes| Cookie::from_bytes(bytes).unwrap())
    }

    fn any_status() -> impl Strategy<Value = Status> {
        prop::sample::select(vec![
            Status::InvalidNamespace,
            Status::InvalidSignedPeerRecord,
            Status::InvalidTtl,
            Status::InvalidCookie,
            Status::NotAuthorized,
            Status::InternalError,
            Status::Unavailable,
        ])
    }

    fn any_request() -> impl Strategy<Value = Request> {
        let limit = 1..=MAX_REGISTRATIONS as u64;
        prop_oneof![
            (any_namespace(), any_peer(), option::of(any_ttl())).prop_map(
                |(namespace, record, ttl)| Request::Register {
                    namespace,
                    record,
                    ttl
                }
            ),
            any_namespace().prop_map(|namespace| Request::Unregister { namespace }),
            (option::of(any_namespace()), option::of(any_cookie()), limit).prop_map(
                |(namespace, cookie, limit)| Request::Discover {
                    namespace,
                    cookie,
                    limit: Some(limit)
                }
            ),
        ]
    }

    fn any_page() -> impl Strategy<Value = Page> {
        let registration =
            (any_namespace(), any_peer(), any_ttl()).prop_map(|(namespace, record, ttl)| {
                Registration {
                    namespace,
                    record,
                    ttl,
                }
            });
        (prop::collection::vec(registration, 0..4), any_cookie()).prop_map(
            |(registrations, cookie)| Page {
                registrations,
                cookie,
            },
        )
    }

    /// A response, and a question that it answers.
    fn any_response() -> impl Strategy<Value = (Request, Response)> {
        prop_oneof![
            prop::result::maybe_ok(any_ttl(), any_status())
                .prop_map(|result| (register(), Response::Registered(result))),
            prop::result::maybe_ok(any_page(), any_status())
                .prop_map(|result| (discover(0), Response::Discovered(result))),
            Just((unregister(), Response::Unregistered)),
        ]
    }

    /// Truncated, or with one byte replaced.
    fn damage(mut bytes: Vec<u8>, at: Index, replacement: Option<u8>) -> Vec<u8> {
        if !bytes.is_empty() {
            let at = at.index(bytes.len());
            match replacement {
                Some(byte) => bytes[at] = byte,
                None => bytes.truncate(at),
            }
        }
        bytes
    }

    proptest! {
        #[test]
        fn every_request_survives_the_round_trip(request in any_request()) {
            let (_, bytes) = asked(&request);
            prop_assert!(bytes.len() <= MAX_REQUEST_LEN);
            prop_assert_eq!(read_request(&bytes).unwrap(), Ok(request));
        }

        #[test]
        fn every_response_survives_the_round_trip((request, response) in any_response()) {
            let bytes = answered(&response).unwrap();
            prop_assert_eq!(read_response(asked(&request).0, &bytes).unwrap(), response);
        }

        #[test]
        fn damaged_request_is_read_without_panic(
            request in any_request(), at: Index, replacement: Option<u8>,
        ) {
            let _ = read_request(&damage(asked(&request).1, at, replacement));
        }

        #[test]
        fn damaged_response_is_read_without_panic(
            (request, response) in any_response(), at: Index, replacement: Option<u8>,
        ) {
            let bytes = damage(answered(&response).unwrap(), at, replacement);
            let _ = read_response(asked(&request).0, &bytes);
        }

        #[test]
        fn any_message_is_read_without_panic(message in prop::collection::vec(any::<u8>(), 0..127)) {
            let bytes = framed(&message);
            let _ = read_request(&bytes);
            for request in [register(), discover(0), unregister()] {
                let _ = read_response(asked(&request).0, &bytes);
            }
        }
    }
}
