//! What a stranger may send: connections that keep to no rule, and messages written by hand.
//!
//! A [`Stranger`] has passed the handshake, which everybody can; from there on it opens raw streams
//! and writes what it likes. Nothing here uses the codecs under test.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::task::{Context, Poll};

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::core::PeerRecord;
use libp2p::core::muxing::{StreamMuxerBox, StreamMuxerExt, SubstreamBox};
use libp2p::core::upgrade::OutboundConnectionUpgrade;
use libp2p::identity::Keypair;
use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId, noise, tcp, yamux};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

pub(crate) const KAD: &str = "/grapevine/kad/1.0.0";
pub(crate) const RENDEZVOUS: &str = "/rendezvous/1.0.0";
pub(crate) const RPC: &str = "/grapevine/rpc/1.0.0";

const MULTISTREAM: &str = "/multistream/1.0.0";
const NOISE: &str = "/noise";
const YAMUX: &str = "/yamux/1.0.0";
const PING: &str = "/ipfs/ping/1.0.0";

/// Where honest nodes connect from, and strangers that are not told otherwise.
pub(crate) const HOME: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// A host of another address prefix.
pub(crate) const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(127, 0, 9, 1);

type Opened = oneshot::Sender<SubstreamBox>;

/// An authenticated connection that is told what to do stream by stream. It ends when dropped.
pub(crate) struct Stranger {
    pub(crate) keypair: Keypair,
    wanted: mpsc::Sender<Opened>,
}

/// A TCP connection on which nothing has been said.
pub(crate) async fn knock(from: Ipv4Addr, address: &Multiaddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    // A port that it takes stays free for honest nodes at other addresses of this machine.
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(true)?;
    socket.bind(SocketAddr::from((from, 0)))?;
    socket.connect(socket_address(address)).await
}

/// A connection that is encrypted and authenticated, and no more.
pub(crate) async fn handshake(
    keypair: &Keypair,
    from: Ipv4Addr,
    address: &Multiaddr,
) -> io::Result<noise::Output<tcp::tokio::TcpStream>> {
    let stream = knock(from, address).await?;
    stream.set_nodelay(true)?;
    let mut stream = tcp::tokio::TcpStream(stream);
    propose(&mut stream, NOISE).await?;
    let noise = noise::Config::new(keypair).map_err(io::Error::other)?;
    let (_, stream) = noise
        .upgrade_outbound(stream, NOISE)
        .await
        .map_err(io::Error::other)?;
    Ok(stream)
}

impl Stranger {
    /// Connects with a new key.
    pub(crate) async fn connect(address: &Multiaddr) -> io::Result<Self> {
        Self::connect_as(Keypair::generate_ed25519(), HOME, address).await
    }

    /// Connects with this key from that host.
    pub(crate) async fn connect_as(
        keypair: Keypair,
        from: Ipv4Addr,
        address: &Multiaddr,
    ) -> io::Result<Self> {
        let mut stream = handshake(&keypair, from, address).await?;
        propose(&mut stream, YAMUX).await?;
        let muxer = yamux::Config::default()
            .upgrade_outbound(stream, YAMUX)
            .await?;
        let (wanted, requests) = mpsc::channel(1_024);
        tokio::spawn(drive(StreamMuxerBox::new(muxer), requests));
        Ok(Self { keypair, wanted })
    }

    pub(crate) fn peer_id(&self) -> PeerId {
        self.keypair.public().to_peer_id()
    }

    /// A stream on which nothing has been said.
    pub(crate) async fn open(&self) -> io::Result<SubstreamBox> {
        let (sender, opened) = oneshot::channel();
        let closed = |_| io::Error::from(io::ErrorKind::ConnectionAborted);
        if self.wanted.send(sender).await.is_err() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        opened.await.map_err(closed)
    }

    /// A stream that has proposed a protocol and sent these bytes along.
    pub(crate) async fn start(&self, protocol: &str, bytes: &[u8]) -> io::Result<SubstreamBox> {
        let mut stream = self.open().await?;
        let hello = [&line(MULTISTREAM), &line(protocol), bytes].concat();
        stream.write_all(&hello).await?;
        stream.flush().await?;
        Ok(stream)
    }

    /// Sends the bytes on a stream of their own, closes this side, and returns what comes back until
    /// the other side closes; an error if it resets the stream or refuses the protocol.
    pub(crate) async fn exchange(&self, protocol: &str, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut stream = self.start(protocol, bytes).await?;
        stream.close().await?;
        accepted(&mut stream, protocol).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        Ok(answer)
    }
}

/// Keeps a connection going and opens the streams that are asked for. Of what the other side opens,
/// pings are answered, or it would hang up.
async fn drive(mut muxer: StreamMuxerBox, mut requests: mpsc::Receiver<Opened>) {
    let (mut opening, mut answers) = (VecDeque::new(), JoinSet::new());
    // Either end closes it; nobody waits for why.
    let _ = poll_fn(|cx| turn(cx, &mut muxer, &mut requests, &mut opening, &mut answers)).await;
}

/// Answers pings until the stream ends; whatever else it is for is never answered.
async fn answer_pings(mut stream: SubstreamBox) -> io::Result<()> {
    if accepted(&mut stream, PING).await.is_err() {
        std::future::pending::<()>().await;
    }
    let consent = [line(MULTISTREAM), line(PING)].concat();
    stream.write_all(&consent).await?;
    loop {
        stream.flush().await?;
        let mut ping = [0; 32];
        stream.read_exact(&mut ping).await?;
        stream.write_all(&ping).await?;
    }
}

fn turn(
    cx: &mut Context<'_>,
    muxer: &mut StreamMuxerBox,
    requests: &mut mpsc::Receiver<Opened>,
    opening: &mut VecDeque<Opened>,
    answers: &mut JoinSet<io::Result<()>>,
) -> Poll<io::Result<()>> {
    while let Poll::Ready(request) = requests.poll_recv(cx) {
        let Some(request) = request else {
            return Poll::Ready(Ok(()));
        };
        opening.push_back(request);
    }
    while !opening.is_empty()
        && let Poll::Ready(stream) = muxer.poll_outbound_unpin(cx)
    {
        let stream = stream?;
        if let Some(request) = opening.pop_front() {
            drop(request.send(stream));
        }
    }
    while let Poll::Ready(stream) = muxer.poll_inbound_unpin(cx) {
        answers.spawn(answer_pings(stream?));
    }
    // Last: only so does the connection watch the streams that were opened just now.
    match muxer.poll_unpin(cx) {
        Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
        _ => Poll::Pending,
    }
}

async fn propose(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), what: &str) -> io::Result<()> {
    let hello = [line(MULTISTREAM), line(what)].concat();
    stream.write_all(&hello).await?;
    stream.flush().await?;
    accepted(stream, what).await
}

/// Reads the other side's consent to a protocol.
pub(crate) async fn accepted(stream: &mut (impl AsyncRead + Unpin), what: &str) -> io::Result<()> {
    for expected in [MULTISTREAM, what] {
        let expected = line(expected);
        let mut answer = vec![0; expected.len()];
        stream.read_exact(&mut answer).await?;
        if answer != expected {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
    }
    Ok(())
}

/// The first line of every negotiation.
pub(crate) fn multistream_hello() -> Vec<u8> {
    line(MULTISTREAM)
}

fn socket_address(address: &Multiaddr) -> SocketAddr {
    let mut parts = address.iter();
    match (parts.next(), parts.next()) {
        (Some(Protocol::Ip4(ip)), Some(Protocol::Tcp(port))) => (IpAddr::from(ip), port).into(),
        _ => panic!("{address} is not of TCP"),
    }
}

fn line(text: &str) -> Vec<u8> {
    let text = format!("{text}\n");
    prefixed(text.as_bytes())
}

/// The bytes behind their length as an unsigned varint.
pub(crate) fn prefixed(bytes: &[u8]) -> Vec<u8> {
    [&varint(bytes.len() as u64), bytes].concat()
}

pub(crate) fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

/// CBOR's first bytes of a value: its kind and its length or number.
pub(crate) fn cbor_head(major: u8, number: u64) -> Vec<u8> {
    let major = major << 5;
    match number {
        0..24 => vec![major | number as u8],
        24..0x100 => vec![major | 24, number as u8],
        0x100..0x1_0000 => [&[major | 25], &(number as u16).to_be_bytes()[..]].concat(),
        _ => [&[major | 26], &(number as u32).to_be_bytes()[..]].concat(),
    }
}

pub(crate) fn cbor_uint(number: u64) -> Vec<u8> {
    cbor_head(0, number)
}

pub(crate) fn cbor_bytes(bytes: &[u8]) -> Vec<u8> {
    [&cbor_head(2, bytes.len() as u64), bytes].concat()
}

pub(crate) fn cbor_text(text: &str) -> Vec<u8> {
    [&cbor_head(3, text.len() as u64), text.as_bytes()].concat()
}

pub(crate) fn cbor_map(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = cbor_head(5, entries.len() as u64);
    for (key, value) in entries {
        bytes.extend(cbor_text(key));
        bytes.extend(value);
    }
    bytes
}

/// The content of a frame that is a request.
pub(crate) fn request(id: u64, service: &str, payload: &[u8]) -> Vec<u8> {
    cbor_map(&[
        ("id", cbor_uint(id)),
        ("service", cbor_text(service)),
        ("payload", cbor_bytes(payload)),
    ])
}

fn cbor_texts(texts: &[String]) -> Vec<u8> {
    let texts = texts.iter().map(|text| cbor_text(text));
    let head = cbor_head(4, texts.len() as u64);
    [head, texts.collect::<Vec<_>>().concat()].concat()
}

/// The frame, with its length, of a request on names.
pub(crate) fn names(announce: &[String], record: Option<&[u8]>, find: &[String]) -> Vec<u8> {
    let mut entries = vec![
        ("announce", cbor_texts(announce)),
        ("withdraw", cbor_texts(&[])),
        ("find", cbor_texts(find)),
    ];
    entries.extend(record.map(|record| ("record", cbor_bytes(record))));
    prefixed(&request(7, "grapevine/names", &cbor_map(&entries)))
}

fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    [&[number << 3 | 2], prefixed(bytes).as_slice()].concat()
}

fn number(field: u8, value: u64) -> Vec<u8> {
    [&[field << 3], varint(value).as_slice()].concat()
}

/// A peer as Kademlia writes it.
pub(crate) fn kad_peer(peer: &PeerId, addresses: &[Multiaddr]) -> Vec<u8> {
    let mut bytes = field(1, &peer.to_bytes());
    for address in addresses {
        bytes.extend(field(2, &address.to_vec()));
    }
    bytes.extend(number(3, 1));
    bytes
}

/// ADD_PROVIDER with its length.
pub(crate) fn add_provider(key: &[u8], peer: &PeerId, addresses: &[Multiaddr]) -> Vec<u8> {
    let message = [
        number(1, 2),
        field(2, key),
        field(9, &kad_peer(peer, addresses)),
    ];
    prefixed(&message.concat())
}

/// GET_PROVIDERS with its length.
pub(crate) fn get_providers(key: &[u8]) -> Vec<u8> {
    prefixed(&[number(1, 3), field(2, key)].concat())
}

/// An answer to any question of Kademlia's with these providers, with its length.
pub(crate) fn providers(peers: &[Vec<u8>]) -> Vec<u8> {
    let peers: Vec<u8> = peers.iter().flat_map(|peer| field(9, peer)).collect();
    prefixed(&[number(1, 3), peers].concat())
}

/// DISCOVER_RESPONSE with these peers' envelopes, with its length.
pub(crate) fn discovered(namespace: &str, envelopes: &[Vec<u8>]) -> Vec<u8> {
    let registration = |envelope: &Vec<u8>| {
        let registration = [
            field(1, namespace.as_bytes()),
            field(2, envelope),
            number(3, 90),
        ];
        field(1, &registration.concat())
    };
    let registrations: Vec<u8> = envelopes.iter().flat_map(registration).collect();
    let response = [registrations, field(2, &[0; 8]), number(3, 0)];
    prefixed(&[number(1, 4), field(6, &response.concat())].concat())
}

/// PUT_VALUE with its length.
pub(crate) fn put_value(key: &[u8], value: &[u8]) -> Vec<u8> {
    let record = [field(1, key), field(2, value)].concat();
    let message = [number(1, 0), field(2, key), field(3, &record)];
    prefixed(&message.concat())
}

/// A peer's addresses, signed by it.
pub(crate) fn envelope(keypair: &Keypair, addresses: Vec<Multiaddr>) -> Vec<u8> {
    let record = PeerRecord::new(keypair, addresses).expect("an ed25519 key signs");
    record.into_signed_envelope().into_protobuf_encoding()
}

/// REGISTER with its length.
pub(crate) fn register(namespace: &str, envelope: &[u8]) -> Vec<u8> {
    let register = [
        field(1, namespace.as_bytes()),
        field(2, envelope),
        number(3, 7_200),
    ];
    let message = [number(1, 0), field(2, &register.concat())];
    prefixed(&message.concat())
}
