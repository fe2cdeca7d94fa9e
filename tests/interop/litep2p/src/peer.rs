//! A peer made of stock litep2p: Kademlia, identify, and streams.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::{Stream, StreamExt};
use litep2p::config::ConfigBuilder;
use litep2p::crypto::ed25519::{Keypair, PublicKey};
use litep2p::protocol::libp2p::identify::{self, IdentifyEvent};
use litep2p::protocol::libp2p::kademlia::{
    self, KademliaEvent, KademliaHandle, KademliaMode, QueryId, Quorum, RecordKey,
};
use litep2p::protocol::libp2p::ping;
use litep2p::substream::Substream;
use litep2p::transport::{quic, tcp};
use litep2p::types::multiaddr::Multiaddr;
use litep2p::{Litep2p, Litep2pEvent, PeerId, ProtocolName};
use prost::Message;
use serde_bytes::ByteBuf;
use tokio::sync::{mpsc, oneshot};

use crate::streams::{Opener, Streams};
use crate::wire::{
    self, ChatMessage, ChatReply, NamesReply, NamesRequest, Refusal, Reply, Request,
};

const NOT_FOUND: u8 = 3;
const UNREACHABLE: u8 = 4;
const REFUSED: u8 = 7;

type Found = Vec<(String, Vec<String>)>;

/// Why a verb failed, as an exit code.
#[derive(Debug)]
pub struct Failure {
    pub exit: u8,
    pub message: String,
}

impl Failure {
    pub fn new(exit: u8, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { exit, message }
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::new(1, error.to_string())
    }
}

enum Order {
    Dial(PeerId, Vec<Multiaddr>, oneshot::Sender<()>),
    Provide(RecordKey, oneshot::Sender<Option<Found>>),
    Find(RecordKey, oneshot::Sender<Option<Found>>),
}

pub struct Peer {
    keypair: Keypair,
    addresses: Vec<String>,
    grape: PeerId,
    told: Vec<String>,
    names: Arc<Mutex<HashSet<String>>>,
    orders: mpsc::Sender<Order>,
    rpc: Opener,
    rendezvous: Opener,
}

impl Peer {
    pub async fn start(bootstrap: &[String], quic: bool) -> Result<Self, Failure> {
        let keypair = Keypair::generate();
        let (rpc, rpc_opener, inbound) = Streams::new(wire::RPC);
        let (rendezvous, rendezvous_opener, _) = Streams::new(wire::RENDEZVOUS);
        let (identify, mut identified) = identify::Config::new("/grapevine/1.0.0".into(), None);
        let (ping, _pings) = ping::Config::default();
        let (kademlia, kademlia_handle) = kademlia::ConfigBuilder::new()
            .with_mode(KademliaMode::Client)
            .with_protocol_names(vec![ProtocolName::from(wire::KADEMLIA)])
            .build();
        let config = ConfigBuilder::new()
            .with_keypair(keypair.clone())
            .with_libp2p_identify(identify)
            .with_libp2p_ping(ping)
            .with_libp2p_kademlia(kademlia)
            .with_user_protocol(Box::new(rpc))
            .with_user_protocol(Box::new(rendezvous));
        let config = match quic {
            true => config.with_quic(quic::config::Config {
                listen_addresses: vec!["/ip4/127.0.0.1/udp/0/quic-v1".parse()?],
                ..Default::default()
            }),
            false => config.with_tcp(tcp::config::Config {
                listen_addresses: vec!["/ip4/127.0.0.1/tcp/0".parse()?],
                ..Default::default()
            }),
        };
        let litep2p = Litep2p::new(config.build())?;
        let own: Vec<Multiaddr> = litep2p.listen_addresses().cloned().collect();
        for address in &own {
            let _ = litep2p.public_addresses().add_address(address.clone());
        }
        let addresses = own
            .iter()
            .map(|address| plain(&address.to_string()))
            .collect();
        let (orders, received) = mpsc::channel(64);
        tokio::spawn(drive(litep2p, kademlia_handle, received));
        let names = Arc::new(Mutex::new(HashSet::new()));
        tokio::spawn(serve(inbound, Arc::clone(&names)));
        let mut grapes = Vec::new();
        for address in bootstrap {
            let (address, id) = address
                .rsplit_once("/p2p/")
                .ok_or(Failure::new(2, "no id"))?;
            let peer: PeerId = id.parse().map_err(|_| Failure::new(2, "no id"))?;
            let (dialled, done) = oneshot::channel();
            let order = Order::Dial(peer, vec![address.parse()?], dialled);
            let _ = orders.send(order).await;
            done.await
                .map_err(|_| Failure::new(UNREACHABLE, "no grape"))?;
            grapes.push(peer);
        }
        let grape = *grapes.first().ok_or(Failure::new(2, "no --bootstrap"))?;
        let told = told_by(grape, &mut identified).await?;
        tokio::spawn(async move { while identified.next().await.is_some() {} });
        Ok(Self {
            keypair,
            addresses,
            grape,
            told,
            names,
            orders,
            rpc: rpc_opener,
            rendezvous: rendezvous_opener,
        })
    }

    pub fn id(&self) -> String {
        self.keypair.public().to_peer_id().to_string()
    }

    pub fn identify(&self) -> Vec<String> {
        self.told.clone()
    }

    pub async fn find(&self, name: &str, road: &str) -> Result<Vec<String>, Failure> {
        let found = self.providers(name, road).await?;
        let line =
            |(peer, addresses): &(String, Vec<String>)| format!("{peer} {}", addresses.join(" "));
        Ok(found.iter().map(line).collect())
    }

    async fn providers(&self, name: &str, road: &str) -> Result<Found, Failure> {
        let found = match road {
            "kademlia" => self.query(Order::Find, name).await?,
            "rendezvous" => self.registered(name).await?,
            "names" => self.named(name).await?,
            _ => return Err(Failure::new(2, "no such road")),
        };
        match found.is_empty() {
            true => Err(Failure::new(NOT_FOUND, format!("nobody announces {name}"))),
            false => Ok(found),
        }
    }

    async fn query(
        &self,
        order: impl FnOnce(RecordKey, oneshot::Sender<Option<Found>>) -> Order,
        name: &str,
    ) -> Result<Found, Failure> {
        let (answer, answered) = oneshot::channel();
        let _ = self
            .orders
            .send(order(RecordKey::from(wire::key(name)), answer))
            .await;
        let answer = answered.await?;
        answer.ok_or_else(|| Failure::new(1, "the query failed"))
    }

    async fn registered(&self, name: &str) -> Result<Found, Failure> {
        let discover = wire::Rendezvous {
            kind: Some(3),
            discover: Some(wire::Namespace {
                namespace: name.into(),
                limit: Some(50),
            }),
            ..Default::default()
        };
        let page = self
            .ask_point(discover)
            .await?
            .discovered
            .unwrap_or_default();
        let records = page.registrations.iter();
        records.map(|found| certify(&found.record)).collect()
    }

    async fn named(&self, name: &str) -> Result<Found, Failure> {
        let reply = self
            .tell(NamesRequest {
                find: vec![name.into()],
                ..Default::default()
            })
            .await?;
        let provider = |provider: &wire::Provider| {
            let addresses = provider.addresses.iter().map(|bytes| address(bytes));
            Ok((
                peer(&provider.peer)?,
                addresses.collect::<Result<_, Failure>>()?,
            ))
        };
        reply.found.iter().flatten().map(provider).collect()
    }

    pub async fn call(&self, name: &str, text: &str, road: &str) -> Result<String, Failure> {
        let provider = self.live(name, road).await?;
        let reply = self.request(provider, name, text.as_bytes()).await?;
        Ok(String::from_utf8(reply)?)
    }

    pub async fn chat(&self, name: &str, text: &str, road: &str) -> Result<String, Failure> {
        let id = ByteBuf::from(self.id().into_bytes()[..16].to_vec());
        let message = ChatMessage {
            id: id.clone(),
            from: "litep2p".into(),
            text: text.into(),
            sent_at: 1_700_000_000_000,
        };
        let provider = self.live(name, road).await?;
        let payload = serde_cbor::to_vec(&message)?;
        let receipt = self.request(provider, name, &payload).await?;
        let receipt: ChatReply = serde_cbor::from_slice(&receipt)?;
        match receipt.id == id {
            true => Ok(receipt.reply.unwrap_or_default()),
            false => Err(Failure::new(1, "the receipt is for another message")),
        }
    }

    /// The first provider that can be dialled and says that it serves the name.
    async fn live(&self, name: &str, road: &str) -> Result<PeerId, Failure> {
        for (id, addresses) in self.providers(name, road).await? {
            let peer: PeerId = id.parse().map_err(|_| Failure::new(1, "no id"))?;
            let addresses = addresses.iter().filter_map(|address| address.parse().ok());
            let (dialled, done) = oneshot::channel();
            let _ = self
                .orders
                .send(Order::Dial(peer, addresses.collect(), dialled))
                .await;
            if done.await.is_err() {
                continue;
            }
            let serves = self
                .exchange(peer, "grapevine/serves", name.as_bytes())
                .await?;
            let unknown = serves
                .error
                .is_some_and(|error| error.code == "unknown-service");
            if unknown || serves.ok.is_some_and(|ok| *ok == [1]) {
                return Ok(peer);
            }
        }
        Err(Failure::new(
            UNREACHABLE,
            format!("no provider of {name} can be reached"),
        ))
    }

    async fn request(&self, to: PeerId, service: &str, payload: &[u8]) -> Result<Vec<u8>, Failure> {
        let reply = self.exchange(to, service, payload).await?;
        match (reply.ok, reply.error) {
            (Some(payload), _) => Ok(payload.into_vec()),
            (None, Some(Refusal { code, message })) => {
                Err(Failure::new(REFUSED, format!("{code}: {message}")))
            }
            (None, None) => Err(Failure::new(1, "an empty reply")),
        }
    }

    /// One request on a stream of its own.
    async fn exchange(&self, to: PeerId, service: &str, payload: &[u8]) -> Result<Reply, Failure> {
        let mut stream = self.open(&self.rpc, to).await?;
        wire::write_frame(&mut stream, &request(1, service, payload)?).await?;
        let reply = wire::read_frame(&mut stream).await?.unwrap_or_default();
        Ok(serde_cbor::from_slice(&reply)?)
    }

    async fn open(&self, opener: &Opener, to: PeerId) -> Result<Substream, Failure> {
        let opened = opener.open(to).await;
        opened.map_err(|error| Failure::new(UNREACHABLE, error))
    }

    /// Sends so many requests on one stream, without waiting in between.
    pub async fn pipe(&self, name: &str, count: u64, road: &str) -> Result<(), Failure> {
        let provider = self.live(name, road).await?;
        let (mut reads, mut writes) = tokio::io::split(self.open(&self.rpc, provider).await?);
        let send = async {
            for id in 1..=count {
                let request = request(id, name, format!("request {id}").as_bytes())?;
                wire::write_frame(&mut writes, &request).await?;
            }
            Ok::<_, Failure>(())
        };
        let receive = async {
            let mut open: HashSet<u64> = (1..=count).collect();
            while !open.is_empty() {
                let reply = wire::read_frame(&mut reads).await?.unwrap_or_default();
                let reply: Reply = serde_cbor::from_slice(&reply)?;
                let expected = format!("Echo: request {}", reply.id);
                let is_echo = reply
                    .ok
                    .as_ref()
                    .is_some_and(|ok| **ok == *expected.as_bytes());
                if !is_echo || !open.remove(&reply.id) {
                    return Err(Failure::new(REFUSED, format!("not the reply: {reply:?}")));
                }
            }
            Ok(())
        };
        tokio::try_join!(send, receive).map(|_| ())
    }

    pub async fn serve(&self, name: &str, road: &str) -> Result<Vec<String>, Failure> {
        locked(&self.names).insert(name.into());
        match road {
            "kademlia" => drop(self.query(Order::Provide, name).await?),
            "rendezvous" => {
                let register = wire::Rendezvous {
                    kind: Some(0),
                    register: Some(wire::Register {
                        namespace: name.into(),
                        record: self.record()?,
                        ttl: Some(7_200),
                    }),
                    ..Default::default()
                };
                self.ask_point(register).await?;
            }
            "names" => {
                let reply = self
                    .tell(NamesRequest {
                        announce: vec![name.into()],
                        record: Some(ByteBuf::from(self.record()?)),
                        ..Default::default()
                    })
                    .await?;
                if !reply.refused.is_empty() {
                    return Err(Failure::new(REFUSED, "the grape does not keep the name"));
                }
            }
            _ => return Err(Failure::new(2, "no such road")),
        }
        let serving = std::iter::once(format!("serving {name}"));
        Ok(serving.chain(self.addresses.iter().cloned()).collect())
    }

    pub async fn withdraw(&self, name: &str, road: &str) -> Result<Vec<String>, Failure> {
        locked(&self.names).remove(name);
        if road == "names" {
            self.tell(NamesRequest {
                withdraw: vec![name.into()],
                ..Default::default()
            })
            .await?;
        }
        if road == "rendezvous" {
            let unregister = wire::Rendezvous {
                kind: Some(2),
                unregister: Some(wire::Namespace {
                    namespace: name.into(),
                    limit: None,
                }),
                ..Default::default()
            };
            let mut stream = self.open(&self.rendezvous, self.grape).await?;
            wire::write_frame(&mut stream, &unregister.encode_to_vec()).await?;
        }
        Ok(Vec::new())
    }

    fn record(&self) -> Result<Vec<u8>, Failure> {
        let addresses = self.addresses.iter().map(|address| {
            let address: Multiaddr = address.parse()?;
            Ok(wire::Address {
                multiaddr: address.to_vec(),
            })
        });
        let record = wire::PeerRecord {
            peer: self.keypair.public().to_peer_id().to_bytes(),
            sequence: std::time::UNIX_EPOCH.elapsed()?.as_secs(),
            addresses: addresses.collect::<Result<_, Failure>>()?,
        };
        Ok(seal(&self.keypair, wire::STANDARD, record.encode_to_vec()))
    }

    async fn tell(&self, message: NamesRequest) -> Result<NamesReply, Failure> {
        let payload = serde_cbor::to_vec(&message)?;
        let reply = self
            .request(self.grape, "grapevine/names", &payload)
            .await?;
        Ok(serde_cbor::from_slice(&reply)?)
    }

    async fn ask_point(&self, message: wire::Rendezvous) -> Result<wire::Rendezvous, Failure> {
        let mut stream = self.open(&self.rendezvous, self.grape).await?;
        wire::write_frame(&mut stream, &message.encode_to_vec()).await?;
        let response = wire::read_frame(&mut stream).await?.unwrap_or_default();
        let response = wire::Rendezvous::decode(response.as_slice())?;
        let registered = response
            .registered
            .as_ref()
            .map(|registered| registered.status);
        let discovered = response
            .discovered
            .as_ref()
            .map(|discovered| discovered.status);
        match registered.or(discovered) {
            Some(0) => Ok(response),
            status => Err(Failure::new(
                REFUSED,
                format!("rendezvous: status {status:?}"),
            )),
        }
    }
}

/// Signs a record, in the form of that domain and payload type.
pub fn seal(keypair: &Keypair, form: (&[u8], &[u8]), payload: Vec<u8>) -> Vec<u8> {
    let envelope = wire::Envelope {
        public_key: [&[8, 1, 0x12, 32][..], &keypair.public().to_bytes()].concat(),
        payload_type: form.1.to_vec(),
        signature: keypair.sign(&wire::signed_part(form, &payload)),
        payload,
    };
    envelope.encode_to_vec()
}

/// Who has signed a record of either form, and where it says that it is.
pub fn certify(envelope: &[u8]) -> Result<(String, Vec<String>), Failure> {
    let envelope = wire::Envelope::decode(envelope)?;
    let forms = [wire::STANDARD, wire::LEGACY].into_iter();
    let form = forms
        .into_iter()
        .find(|(_, kind)| envelope.payload_type == *kind);
    let form = form.ok_or(Failure::new(1, "an unknown payload type"))?;
    let key = envelope.public_key.strip_prefix(&[8, 1, 0x12, 32]);
    let key = PublicKey::try_from_bytes(key.unwrap_or_default());
    let key = key.map_err(|_| Failure::new(1, "no key of Ed25519"))?;
    let signed = wire::signed_part(form, &envelope.payload);
    let record = wire::PeerRecord::decode(envelope.payload.as_slice())?;
    let is_own = record.peer == key.to_peer_id().to_bytes();
    if !is_own || !key.verify(&signed, &envelope.signature) {
        return Err(Failure::new(1, "the signature is not valid"));
    }
    let addresses = record.addresses.iter().map(|info| address(&info.multiaddr));
    Ok((peer(&record.peer)?, addresses.collect::<Result<_, _>>()?))
}

fn peer(bytes: &[u8]) -> Result<String, Failure> {
    let peer = PeerId::from_bytes(bytes).map_err(|_| Failure::new(1, "no id"))?;
    Ok(peer.to_string())
}

fn address(bytes: &[u8]) -> Result<String, Failure> {
    Ok(Multiaddr::try_from(bytes.to_vec())?.to_string())
}

fn request(id: u64, service: &str, payload: &[u8]) -> Result<Vec<u8>, Failure> {
    let request = Request {
        id,
        service: service.into(),
        payload: ByteBuf::from(payload),
    };
    Ok(serde_cbor::to_vec(&request)?)
}

/// An address without an id behind it.
fn plain(address: &str) -> String {
    address.split("/p2p/").next().unwrap_or_default().to_owned()
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What identify tells of a grape: its agent, its protocols, its addresses.
async fn told_by(
    grape: PeerId,
    identified: &mut (impl Stream<Item = IdentifyEvent> + Unpin),
) -> Result<Vec<String>, Failure> {
    while let Some(IdentifyEvent::PeerIdentified {
        peer,
        user_agent,
        supported_protocols,
        listen_addresses,
        ..
    }) = identified.next().await
    {
        if peer == grape {
            let mut protocols: Vec<_> = supported_protocols
                .iter()
                .map(ToString::to_string)
                .collect();
            protocols.sort_unstable();
            let addresses = listen_addresses.iter().map(ToString::to_string);
            return Ok(user_agent
                .into_iter()
                .chain(protocols)
                .chain(addresses)
                .collect());
        }
    }
    Err(Failure::new(1, "identify has ended"))
}

/// Answers the requests of others.
async fn serve(mut inbound: mpsc::Receiver<Substream>, names: Arc<Mutex<HashSet<String>>>) {
    while let Some(mut stream) = inbound.recv().await {
        let names = Arc::clone(&names);
        tokio::spawn(async move {
            while let Ok(Some(request)) = wire::read_frame(&mut stream).await {
                let Ok(request) = serde_cbor::from_slice(&request) else {
                    return;
                };
                let reply = reply(&names, request);
                let Ok(reply) = serde_cbor::to_vec(&reply) else {
                    return;
                };
                if wire::write_frame(&mut stream, &reply).await.is_err() {
                    return;
                }
            }
            stream.close().await;
        });
    }
}

fn reply(names: &Mutex<HashSet<String>>, request: Request) -> Reply {
    let Request {
        id,
        service,
        payload,
    } = request;
    let serves = |name: &str| locked(names).contains(name);
    let text = String::from_utf8_lossy(&payload);
    let ok = match service.as_str() {
        "grapevine/serves" => Some(vec![u8::from(serves(&text))]),
        service if !serves(service) => None,
        _ if payload
            .first()
            .is_some_and(|byte| (0xa0..=0xbf).contains(byte)) =>
        {
            let message: Result<ChatMessage, _> = serde_cbor::from_slice(&payload);
            let receipt = message.map(|message| ChatReply {
                id: message.id,
                reply: Some(format!("Echo: {}", message.text)),
            });
            receipt
                .ok()
                .and_then(|receipt| serde_cbor::to_vec(&receipt).ok())
        }
        _ => Some(format!("Echo: {text}").into_bytes()),
    };
    let error = ok.is_none().then(|| Refusal {
        code: "unknown-service".into(),
        message: String::new(),
    });
    Reply {
        id,
        ok: ok.map(ByteBuf::from),
        error,
    }
}

/// Owns litep2p: dials, and asks Kademlia.
async fn drive(
    mut litep2p: Litep2p,
    mut kademlia: KademliaHandle,
    mut orders: mpsc::Receiver<Order>,
) {
    let mut connected = HashSet::new();
    let mut dials: Vec<(PeerId, oneshot::Sender<()>)> = Vec::new();
    let mut queries: HashMap<QueryId, oneshot::Sender<Option<Found>>> = HashMap::new();
    loop {
        tokio::select! {
            order = orders.recv() => match order {
                None => return,
                Some(Order::Dial(peer, _, done)) if connected.contains(&peer) => {
                    let _ = done.send(());
                }
                Some(Order::Dial(peer, addresses, done)) => {
                    let with_id = addresses.iter().filter_map(|address| format!("{address}/p2p/{peer}").parse().ok());
                    let with_id: Vec<Multiaddr> = with_id.collect();
                    kademlia.add_known_peer(peer, with_id.clone()).await;
                    litep2p.add_known_address(peer, with_id.into_iter());
                    if litep2p.dial(&peer).await.is_ok() {
                        dials.push((peer, done));
                    }
                }
                Some(Order::Provide(key, done)) => {
                    let id = kademlia.start_providing(key, Quorum::One).await;
                    queries.insert(id, done);
                }
                Some(Order::Find(key, done)) => {
                    let id = kademlia.get_providers(key).await;
                    queries.insert(id, done);
                }
            },
            event = litep2p.next_event() => match event {
                None => return,
                Some(Litep2pEvent::ConnectionEstablished { peer, .. }) => {
                    connected.insert(peer);
                    for (_, done) in dials.extract_if(.., |(dialled, _)| *dialled == peer) {
                        let _ = done.send(());
                    }
                }
                Some(Litep2pEvent::ConnectionClosed { peer, .. }) => {
                    connected.remove(&peer);
                }
                // Of whom is not told; one dial is under way at a time.
                Some(_) => dials.clear(),
            },
            event = kademlia.next() => {
                let (id, found) = match event {
                    None => return,
                    Some(KademliaEvent::GetProvidersSuccess { query_id, providers, .. }) => {
                        let provider = |provider: kademlia::ContentProvider| {
                            let addresses = provider.addresses.iter().map(ToString::to_string);
                            (provider.peer.to_string(), addresses.collect())
                        };
                        (query_id, Some(providers.into_iter().map(provider).collect()))
                    }
                    Some(KademliaEvent::AddProviderSuccess { query_id, .. }) => (query_id, Some(Vec::new())),
                    Some(KademliaEvent::QueryFailed { query_id }) => (query_id, None),
                    Some(_) => continue,
                };
                if let Some(done) = queries.remove(&id) {
                    let _ = done.send(found);
                }
            }
        }
    }
}
