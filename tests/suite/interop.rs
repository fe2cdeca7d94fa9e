//! Other implementations of the public protocols: stock libp2p behaviours, none of our code on their
//! side, over TCP.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join_all;
use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, StreamExt};
use grapevine::error::{LookupError, RequestError};
use grapevine::limits::{LEASE, MIN_LEASE, SERVES_DEADLINE};
use grapevine::{Multiaddr, Node, PeerId, RequestOptions, Role, ServiceName};
use libp2p::kad::store::MemoryStore;
use libp2p::multiaddr::Protocol;
use libp2p::request_response::{self, Message, ProtocolSupport};
use libp2p::swarm::{NetworkBehaviour, SwarmEvent};
use libp2p::{
    StreamProtocol, Swarm, SwarmBuilder, identify, identity, kad, noise, rendezvous, tcp, yamux,
};
use prost::Message as _;
use tokio::sync::watch;
use tokio::time::timeout;

const DEADLINE: Duration = Duration::from_secs(30);

/// The sha2-256 multihash of `client1`, as another implementation computes it.
const CLIENT1_KEY: &str = "12201917e33407c28366c8e3b975b17e7374589312676b90229adb4ce6e58552e223";

/// No scenario takes longer than this, however busy the machine.
async fn in_time<T>(scenario: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(60), scenario)
        .await
        .expect("the scenario hangs")
}

fn client1() -> ServiceName {
    "client1".parse().unwrap()
}

fn client1_key() -> kad::RecordKey {
    let byte = |at: usize| u8::from_str_radix(&CLIENT1_KEY[at..at + 2], 16).unwrap();
    let bytes: Vec<u8> = (0..CLIENT1_KEY.len()).step_by(2).map(byte).collect();
    kad::RecordKey::new(&bytes)
}

fn any_port() -> Multiaddr {
    "/ip4/127.0.0.1/tcp/0".parse().unwrap()
}

async fn grape() -> Node {
    let grape = Node::builder(Role::Grape).listen([any_port()]);
    grape.spawn().await.unwrap()
}

/// A node of ours that joins by the grape.
async fn peer(grape: &Node) -> Node {
    let peer = Node::builder(Role::Peer)
        .listen([any_port()])
        .bootstrap(grape.addresses());
    peer.spawn().await.unwrap()
}

/// A node of ours that announces `client1` and echoes.
async fn echo(grape: &Node) -> Node {
    let node = peer(grape).await;
    let service = node.announce(&client1()).await.unwrap();
    tokio::spawn(service.serve(|request| async move {
        let answer = format!("Echo: {}", request.text().unwrap());
        request.reply(answer);
    }));
    node
}

/// A swarm of libp2p's own behaviours over TCP, Noise and Yamux.
fn stock<B: NetworkBehaviour>(behaviour: impl FnOnce(&identity::Keypair) -> B) -> Swarm<B> {
    SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(
            tcp::Config::default(),
            noise::Config::new,
            yamux::Config::default,
        )
        .unwrap()
        .with_behaviour(|keypair| behaviour(keypair))
        .unwrap()
        .with_swarm_config(|config| config.with_idle_connection_timeout(DEADLINE))
        .build()
}

/// Drives the swarm until `pick` takes an event.
async fn until<B: NetworkBehaviour, T>(
    swarm: &mut Swarm<B>,
    mut pick: impl FnMut(SwarmEvent<B::ToSwarm>) -> Option<T>,
) -> T {
    let picked = async {
        loop {
            if let Some(picked) = pick(swarm.select_next_some().await) {
                return picked;
            }
        }
    };
    timeout(DEADLINE, picked)
        .await
        .expect("the event comes in time")
}

/// Drives a swarm in the background.
fn run<B>(mut swarm: Swarm<B>)
where
    B: NetworkBehaviour<ToSwarm: Send> + Send,
{
    tokio::spawn(async move {
        loop {
            swarm.select_next_some().await;
        }
    });
}

async fn connect<B: NetworkBehaviour>(swarm: &mut Swarm<B>, node: &Node) {
    swarm.dial(node.addresses()[0].clone()).unwrap();
    until(swarm, |event| match event {
        SwarmEvent::ConnectionEstablished { peer_id, .. } => Some(peer_id),
        _ => None,
    })
    .await;
}

/// Listens, and tells the address to others.
async fn listen<B: NetworkBehaviour>(swarm: &mut Swarm<B>) -> Multiaddr {
    swarm.listen_on(any_port()).unwrap();
    let address = until(swarm, |event| match event {
        SwarmEvent::NewListenAddr { address, .. } => Some(address),
        _ => None,
    })
    .await;
    swarm.add_external_address(address.clone());
    address
}

fn identify(keypair: &identity::Keypair) -> identify::Behaviour {
    let config = identify::Config::new("/another/1.0.0".into(), keypair.public());
    // An agent is for people: nobody takes this one for more than it can do.
    identify::Behaviour::new(config.with_agent_version("grapevine/9.9.9".into()))
}

mod stock_identify {
    use super::*;

    /// The ids of ours that a node tells, in order.
    async fn told(node: &Node) -> Vec<String> {
        let mut client = stock(identify);
        connect(&mut client, node).await;
        let ids = until(&mut client, |event| match event {
            SwarmEvent::Behaviour(identify::Event::Received { info, .. }) => Some(info.protocols),
            _ => None,
        })
        .await;
        let ids = ids.iter().map(ToString::to_string);
        let mut ids: Vec<_> = ids.filter(|id| id.starts_with("/grapevine/")).collect();
        ids.sort_unstable();
        ids
    }

    #[tokio::test]
    async fn what_a_node_can_do_is_told_by_ids_of_protocols() {
        in_time(async {
            let grape = grape().await;
            let of_peer = ["/grapevine/rpc/1.0.0", "/grapevine/rpc/kept/1.0.0"];
            assert_eq!(told(&peer(&grape).await).await, of_peer);
            let of_grape = [
                "/grapevine/kad/1.0.0",
                "/grapevine/names/1.0.0",
                "/grapevine/registry/1.0.0",
                "/grapevine/rpc/1.0.0",
                "/grapevine/rpc/kept/1.0.0",
            ];
            assert_eq!(told(&grape).await, of_grape);
        })
        .await;
    }
}

mod stock_rendezvous {
    use super::*;
    use rendezvous::client;
    use rendezvous::{Cookie, Namespace, Registration};

    #[derive(NetworkBehaviour)]
    struct Client {
        rendezvous: client::Behaviour,
        identify: identify::Behaviour,
    }

    /// A stock client that is connected to the grape and has an address to register.
    async fn client(grape: &Node) -> (Swarm<Client>, Multiaddr) {
        let mut client = stock(|keypair| Client {
            rendezvous: client::Behaviour::new(keypair.clone()),
            identify: identify(keypair),
        });
        let address = listen(&mut client).await;
        connect(&mut client, grape).await;
        (client, address)
    }

    fn namespace(text: &str) -> Namespace {
        Namespace::new(text.into()).unwrap()
    }

    async fn register(client: &mut Swarm<Client>, grape: &Node, text: &str) -> u64 {
        let behaviour = &mut client.behaviour_mut().rendezvous;
        let two_hours = Some(7_200);
        behaviour
            .register(namespace(text), grape.peer_id(), two_hours)
            .unwrap();
        until(client, |event| match event {
            SwarmEvent::Behaviour(ClientEvent::Rendezvous(client::Event::Registered {
                ttl,
                ..
            })) => Some(ttl),
            SwarmEvent::Behaviour(ClientEvent::Rendezvous(event)) => panic!("{event:?}"),
            _ => None,
        })
        .await
    }

    async fn discover(
        client: &mut Swarm<Client>,
        grape: &Node,
        text: &str,
        cookie: Option<Cookie>,
    ) -> (Vec<Registration>, Cookie) {
        let behaviour = &mut client.behaviour_mut().rendezvous;
        behaviour.discover(Some(namespace(text)), cookie, Some(10), grape.peer_id());
        until(client, |event| match event {
            SwarmEvent::Behaviour(ClientEvent::Rendezvous(client::Event::Discovered {
                registrations,
                cookie,
                ..
            })) => Some((registrations, cookie)),
            SwarmEvent::Behaviour(ClientEvent::Rendezvous(event)) => panic!("{event:?}"),
            _ => None,
        })
        .await
    }

    fn peers(registrations: &[Registration]) -> Vec<PeerId> {
        let peer = |found: &Registration| found.record.peer_id();
        registrations.iter().map(peer).collect()
    }

    #[tokio::test]
    async fn a_stock_client_registers_for_the_grapes_lease_and_is_discovered() {
        in_time(async {
            let grape = grape().await;
            let (mut one, address) = client(&grape).await;
            let (mut two, _) = client(&grape).await;
            assert_eq!(register(&mut one, &grape, "room").await, LEASE.as_secs());

            let (found, cookie) = discover(&mut two, &grape, "room", None).await;
            assert_eq!(peers(&found), [*one.local_peer_id()]);
            assert_eq!(found[0].record.addresses(), [address]);
            assert_eq!(found[0].namespace, namespace("room"));
            assert!(found[0].ttl <= LEASE.as_secs());

            let (none, cookie) = discover(&mut two, &grape, "room", Some(cookie)).await;
            assert_eq!(peers(&none), [], "a cookie leaves out what was seen");
            register(&mut two, &grape, "room").await;
            let (new, _) = discover(&mut two, &grape, "room", Some(cookie)).await;
            assert_eq!(peers(&new), [*two.local_peer_id()]);
        })
        .await;
    }

    #[derive(NetworkBehaviour)]
    struct Provider {
        rendezvous: client::Behaviour,
        rpc: request_response::Behaviour<by_hand::Codec>,
    }

    #[tokio::test]
    async fn a_provider_that_registered_for_hours_is_discovered_as_long_as_it_lives() {
        in_time(async {
            let grape = Node::builder(Role::Grape).listen([any_port()]);
            let grape = grape.lease(MIN_LEASE).spawn().await.unwrap();
            let mut provider = stock(|keypair| Provider {
                rendezvous: client::Behaviour::new(keypair.clone()),
                rpc: by_hand::behaviour(),
            });
            listen(&mut provider).await;
            connect(&mut provider, &grape).await;
            let behaviour = &mut provider.behaviour_mut().rendezvous;
            let two_hours = Some(7_200);
            behaviour
                .register(namespace("client1"), grape.peer_id(), two_hours)
                .unwrap();
            // It is asked once in a lease, or twice.
            for _ in 0..6 {
                let (request, channel) = until(&mut provider, |event| match event {
                    SwarmEvent::Behaviour(ProviderEvent::Rpc(
                        request_response::Event::Message {
                            message:
                                Message::Request {
                                    request, channel, ..
                                },
                            ..
                        },
                    )) => Some((request, channel)),
                    _ => None,
                })
                .await;
                let reply = by_hand::answer_to(&request, &[1]);
                let rpc = &mut provider.behaviour_mut().rpc;
                rpc.send_response(channel, reply).unwrap();
            }
            let id = *provider.local_peer_id();
            let (mut client, _) = client(&grape).await;
            let (found, _) = discover(&mut client, &grape, "client1", None).await;
            assert_eq!(peers(&found), [id]);
            drop(provider);
            while grape.metrics().stored > 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }

    #[tokio::test]
    async fn a_stock_client_that_unregisters_is_not_discovered() {
        in_time(async {
            let grape = grape().await;
            let (mut client, _) = client(&grape).await;
            register(&mut client, &grape, "room").await;
            register(&mut client, &grape, "other").await;
            let behaviour = &mut client.behaviour_mut().rendezvous;
            behaviour.unregister(namespace("room"), grape.peer_id());
            // Nothing confirms it; discoveries show it once it has arrived.
            loop {
                let (found, _) = discover(&mut client, &grape, "room", None).await;
                if found.is_empty() {
                    break;
                }
            }
            let (other, _) = discover(&mut client, &grape, "other", None).await;
            assert_eq!(peers(&other), [*client.local_peer_id()]);
        })
        .await;
    }

    #[tokio::test]
    async fn a_stock_client_stays_connected_without_speaking_anything_else() {
        in_time(async {
            let grape = grape().await;
            let (mut client, _) = client(&grape).await;
            // Identify comes last of what a node opens to a new peer and asks of it.
            until(&mut client, |event| match event {
                SwarmEvent::Behaviour(ClientEvent::Identify(identify::Event::Received {
                    ..
                })) => Some(()),
                _ => None,
            })
            .await;
            let closed = async {
                until(&mut client, |event| match event {
                    SwarmEvent::ConnectionClosed { cause, .. } => Some(cause),
                    _ => None,
                })
                .await
            };
            let cause = timeout(Duration::from_secs(1), closed).await;
            assert!(cause.is_err(), "the grape hung up: {cause:?}");
        })
        .await;
    }

    #[tokio::test]
    async fn a_stock_client_that_does_not_speak_identify_discovers_too() {
        in_time(async {
            let grape = grape().await;
            let node = echo(&grape).await;
            let mut client = stock(|keypair| client::Behaviour::new(keypair.clone()));
            connect(&mut client, &grape).await;
            let behaviour = client.behaviour_mut();
            behaviour.discover(Some(namespace("client1")), None, None, grape.peer_id());
            let found = until(&mut client, |event| match event {
                SwarmEvent::Behaviour(client::Event::Discovered { registrations, .. }) => {
                    Some(registrations)
                }
                SwarmEvent::Behaviour(event) => panic!("{event:?}"),
                _ => None,
            })
            .await;
            assert_eq!(peers(&found), [node.peer_id()]);
        })
        .await;
    }

    #[tokio::test]
    async fn a_name_that_a_node_announces_is_discovered_by_a_stock_client() {
        in_time(async {
            let grape = grape().await;
            let node = echo(&grape).await;
            let (mut client, _) = client(&grape).await;
            let (found, _) = discover(&mut client, &grape, "client1", None).await;
            assert_eq!(peers(&found), [node.peer_id()]);
            let with_id = |address: &Multiaddr| address.clone().with_p2p(node.peer_id()).unwrap();
            let addresses: Vec<_> = found[0].record.addresses().iter().map(with_id).collect();
            assert_eq!(addresses, node.addresses());
        })
        .await;
    }
}

/// Rendezvous as a stranger speaks it who signs and reads records in the standard form.
mod standard_rendezvous {
    use super::*;
    use libp2p::core::{PeerRecord, SignedEnvelope};

    #[derive(NetworkBehaviour)]
    struct Client {
        rendezvous: request_response::Behaviour<by_hand::Codec>,
        identify: request_response::Behaviour<Identify>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    struct Call {
        #[prost(int32, tag = "1")]
        kind: i32,
        #[prost(message, optional, tag = "2")]
        register: Option<Registration>,
        #[prost(message, optional, tag = "3")]
        registered: Option<Registered>,
        #[prost(message, optional, tag = "5")]
        discover: Option<Registration>,
        #[prost(message, optional, tag = "6")]
        discovered: Option<Discovered>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    struct Registration {
        #[prost(string, tag = "1")]
        namespace: String,
        #[prost(bytes = "vec", tag = "2")]
        record: Vec<u8>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    struct Registered {
        #[prost(int32, tag = "1")]
        status: i32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    struct Discovered {
        #[prost(message, repeated, tag = "1")]
        registrations: Vec<Registration>,
    }

    /// A client that sends a standard record in identify, as others do and Rust's libp2p does not.
    fn client() -> (Swarm<Client>, identity::Keypair) {
        let keypair = identity::Keypair::generate_ed25519();
        let client = SwarmBuilder::with_existing_identity(keypair.clone())
            .with_tokio()
            .with_tcp(
                tcp::Config::default(),
                noise::Config::new,
                yamux::Config::default,
            )
            .unwrap()
            .with_behaviour(|_| Client {
                rendezvous: by_hand::behaviour_of(&[StreamProtocol::new("/rendezvous/1.0.0")]),
                identify: request_response::Behaviour::with_codec(
                    Identify(record(&keypair, vec![])),
                    [(identify::PROTOCOL_NAME, ProtocolSupport::Inbound)],
                    request_response::Config::default(),
                ),
            })
            .unwrap()
            .with_swarm_config(|config| config.with_idle_connection_timeout(DEADLINE))
            .build();
        (client, keypair)
    }

    fn record(keypair: &identity::Keypair, addresses: Vec<Multiaddr>) -> Vec<u8> {
        let record = PeerRecord::new_interop(keypair, addresses).unwrap();
        record.into_signed_envelope().into_protobuf_encoding()
    }

    /// Answers identify with this signed record and nothing else.
    #[derive(Clone)]
    struct Identify(Vec<u8>);

    #[derive(Clone, PartialEq, prost::Message)]
    struct Identity {
        #[prost(bytes = "vec", tag = "8")]
        record: Vec<u8>,
    }

    impl request_response::Codec for Identify {
        type Protocol = StreamProtocol;
        type Request = ();
        type Response = ();

        async fn read_request<T>(&mut self, _: &StreamProtocol, _: &mut T) -> io::Result<()>
        where
            T: AsyncRead + Unpin + Send,
        {
            Ok(())
        }

        async fn read_response<T>(&mut self, _: &StreamProtocol, _: &mut T) -> io::Result<()>
        where
            T: AsyncRead + Unpin + Send,
        {
            Ok(())
        }

        async fn write_request<T>(
            &mut self,
            _: &StreamProtocol,
            _: &mut T,
            (): (),
        ) -> io::Result<()>
        where
            T: AsyncWrite + Unpin + Send,
        {
            Ok(())
        }

        async fn write_response<T>(
            &mut self,
            _: &StreamProtocol,
            io: &mut T,
            (): (),
        ) -> io::Result<()>
        where
            T: AsyncWrite + Unpin + Send,
        {
            let record = self.0.clone();
            by_hand::write(io, &Identity { record }.encode_to_vec()).await
        }
    }

    async fn ask(client: &mut Swarm<Client>, grape: &Node, call: Call) -> Call {
        let behaviour = &mut client.behaviour_mut().rendezvous;
        behaviour.send_request(&grape.peer_id(), call.encode_to_vec());
        loop {
            match client.select_next_some().await {
                SwarmEvent::Behaviour(ClientEvent::Identify(
                    request_response::Event::Message {
                        message: Message::Request { channel, .. },
                        ..
                    },
                )) => {
                    let identify = &mut client.behaviour_mut().identify;
                    identify.send_response(channel, ()).unwrap();
                }
                SwarmEvent::Behaviour(ClientEvent::Rendezvous(
                    request_response::Event::Message {
                        message: Message::Response { response, .. },
                        ..
                    },
                )) => return Call::decode(response.as_slice()).unwrap(),
                SwarmEvent::Behaviour(ClientEvent::Rendezvous(
                    request_response::Event::OutboundFailure { error, .. },
                )) => panic!("{error}"),
                _ => {}
            }
        }
    }

    /// The standard records among those that are found, and how many were found.
    async fn discover(client: &mut Swarm<Client>, grape: &Node) -> (Vec<PeerRecord>, usize) {
        let call = Call {
            kind: 3,
            discover: Some(Registration {
                namespace: "client1".into(),
                ..Registration::default()
            }),
            ..Call::default()
        };
        let found = ask(client, grape, call).await.discovered.unwrap();
        let records = found.registrations.iter().filter_map(|found| {
            let envelope = SignedEnvelope::from_protobuf_encoding(&found.record).unwrap();
            PeerRecord::from_signed_envelope_interop(envelope).ok()
        });
        (records.collect(), found.registrations.len())
    }

    #[tokio::test]
    async fn a_name_is_discovered_in_the_standard_form_by_who_sends_that_in_identify() {
        in_time(async {
            let grape = grape().await;
            let node = echo(&grape).await;
            let (mut client, _) = client();
            connect(&mut client, &grape).await;
            // At once, before the grape knows who asks.
            let (records, found) = discover(&mut client, &grape).await;
            assert_eq!((records[0].peer_id(), found), (node.peer_id(), 1));
        })
        .await;
    }

    #[tokio::test]
    async fn a_record_of_the_standard_form_is_registered_and_found() {
        in_time(async {
            let grape = grape().await;
            let (mut client, keypair) = client();
            connect(&mut client, &grape).await;
            let address: Multiaddr = "/ip4/127.0.0.1/tcp/1".parse().unwrap();
            let call = Call {
                register: Some(Registration {
                    namespace: "client1".into(),
                    record: record(&keypair, vec![address.clone()]),
                }),
                ..Call::default()
            };
            let registered = ask(&mut client, &grape, call).await.registered;
            assert_eq!(registered, Some(Registered { status: 0 }));
            let (records, found) = discover(&mut client, &grape).await;
            assert_eq!((records[0].addresses(), found), (&[address][..], 1));
        })
        .await;
    }
}

mod stock_kademlia {
    use super::*;

    type Kademlia = kad::Behaviour<MemoryStore>;

    fn kademlia(keypair: &identity::Keypair) -> Kademlia {
        let peer = keypair.public().to_peer_id();
        let protocol = StreamProtocol::new("/grapevine/kad/1.0.0");
        let config = kad::Config::new(protocol);
        let mut kad = kad::Behaviour::with_config(peer, MemoryStore::new(peer), config);
        kad.set_mode(Some(kad::Mode::Client));
        kad
    }

    fn know(kad: &mut Kademlia, grape: &Node) {
        let mut address = grape.addresses()[0].clone();
        assert!(matches!(address.pop(), Some(Protocol::P2p(_))));
        kad.add_address(&grape.peer_id(), address);
    }

    /// Announces `client1`, and returns when that has been sent.
    fn is_provided(event: &kad::Event) -> bool {
        let kad::Event::OutboundQueryProgressed { result, .. } = event else {
            return false;
        };
        match result {
            kad::QueryResult::StartProviding(result) => {
                assert!(result.is_ok(), "{result:?}");
                true
            }
            _ => false,
        }
    }

    /// Looks `client1` up until the grape has the record: Kademlia does not confirm one.
    async fn lookup(node: &Node) -> Result<Vec<PeerId>, LookupError> {
        loop {
            match node.lookup(&client1()).await {
                Err(LookupError::NotFound(_)) => tokio::task::yield_now().await,
                Ok(live) => return Ok(live.iter().map(|provider| provider.peer).collect()),
                Err(error) => return Err(error),
            }
        }
    }

    #[tokio::test]
    async fn a_name_that_a_node_announces_is_found_by_a_stock_client() {
        in_time(async {
            let grape = grape().await;
            let node = echo(&grape).await;
            let mut client = stock(kademlia);
            know(client.behaviour_mut(), &grape);
            client.behaviour_mut().get_providers(client1_key());
            let found = until(&mut client, |event| match event {
                SwarmEvent::Behaviour(kad::Event::OutboundQueryProgressed {
                    result: kad::QueryResult::GetProviders(result),
                    ..
                }) => match result.unwrap() {
                    kad::GetProvidersOk::FoundProviders { providers, .. } => Some(providers),
                    other => panic!("{other:?}"),
                },
                _ => None,
            })
            .await;
            assert_eq!(found.into_iter().collect::<Vec<_>>(), [node.peer_id()]);
        })
        .await;
    }

    #[derive(Clone, PartialEq, prost::Message)]
    struct KadMessage {
        #[prost(int32, tag = "1")]
        kind: i32,
        #[prost(bytes = "vec", tag = "2")]
        key: Vec<u8>,
        #[prost(message, repeated, tag = "9")]
        providers: Vec<KadPeer>,
        #[prost(int32, tag = "10")]
        cluster_level: i32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    struct KadPeer {
        #[prost(bytes = "vec", tag = "1")]
        id: Vec<u8>,
        #[prost(bytes = "vec", repeated, tag = "2")]
        addresses: Vec<Vec<u8>>,
    }

    /// The addresses of each provider of `client1`, as they are on the wire: stock Kademlia puts an id
    /// behind what it reads.
    async fn providers_on_the_wire(grape: &Node) -> Vec<(PeerId, Vec<Multiaddr>)> {
        let protocol = StreamProtocol::new("/grapevine/kad/1.0.0");
        let mut client = stock(|_| by_hand::behaviour_of(&[protocol]));
        connect(&mut client, grape).await;
        let get_providers = KadMessage {
            kind: 3,
            key: client1_key().to_vec(),
            cluster_level: 10,
            ..KadMessage::default()
        };
        let request = get_providers.encode_to_vec();
        client
            .behaviour_mut()
            .send_request(&grape.peer_id(), request);
        let reply = until(&mut client, |event| match event {
            SwarmEvent::Behaviour(request_response::Event::Message {
                message: Message::Response { response, .. },
                ..
            }) => Some(response),
            SwarmEvent::Behaviour(request_response::Event::OutboundFailure { error, .. }) => {
                panic!("{error}")
            }
            _ => None,
        })
        .await;
        let reply = KadMessage::decode(reply.as_slice()).unwrap();
        let provider = |provider: KadPeer| {
            let addresses = provider.addresses.into_iter().map(Multiaddr::try_from);
            let addresses = addresses.collect::<Result<Vec<_>, _>>().unwrap();
            (PeerId::from_bytes(&provider.id).unwrap(), addresses)
        };
        reply.providers.into_iter().map(provider).collect()
    }

    fn without_id(node: &Node) -> Vec<Multiaddr> {
        let addresses = node.addresses().into_iter().map(|mut address| {
            assert!(matches!(address.pop(), Some(Protocol::P2p(_))));
            address
        });
        addresses.collect()
    }

    #[tokio::test]
    async fn addresses_come_back_once_and_without_an_id() {
        in_time(async {
            // Of the grape itself, of a node of ours, and of a stock provider that tells its addresses
            // with and without its id.
            let grape = grape().await;
            let _service = grape.announce(&client1()).await.unwrap();
            let node = echo(&grape).await;
            let mut provider = stock(kademlia);
            let address = listen(&mut provider).await;
            let id = *provider.local_peer_id();
            let with_id = address.clone().with_p2p(id).unwrap();
            provider.add_external_address(with_id);
            know(provider.behaviour_mut(), &grape);
            let kad = provider.behaviour_mut();
            kad.start_providing(client1_key()).unwrap();
            run(provider);
            let mut providers = loop {
                let providers = providers_on_the_wire(&grape).await;
                if providers.len() == 3 {
                    break providers;
                }
            };
            providers.sort_unstable();
            let mut expected = [
                (grape.peer_id(), without_id(&grape)),
                (node.peer_id(), without_id(&node)),
                (id, vec![address]),
            ];
            expected.sort_unstable();
            assert_eq!(providers, expected);
        })
        .await;
    }

    #[derive(NetworkBehaviour)]
    struct Provider {
        kad: Kademlia,
        rpc: request_response::Behaviour<by_hand::Codec>,
        identify: identify::Behaviour,
    }

    /// A stock provider that is about to announce `client1` to a grape.
    async fn provider(grape: &Node) -> Swarm<Provider> {
        provider_at(std::slice::from_ref(grape)).await
    }

    async fn provider_at(grapes: &[Node]) -> Swarm<Provider> {
        let mut provider = stock(|keypair| Provider {
            kad: kademlia(keypair),
            rpc: by_hand::behaviour(),
            identify: identify(keypair),
        });
        listen(&mut provider).await;
        let kad = &mut provider.behaviour_mut().kad;
        for grape in grapes {
            know(kad, grape);
        }
        kad.start_providing(client1_key()).unwrap();
        provider
    }

    /// Answers every request with an echo.
    async fn serve(mut provider: Swarm<Provider>) -> Infallible {
        serve_in_rounds(&mut provider, Duration::ZERO, &AtomicUsize::new(0)).await
    }

    /// Answers with echoes, all at once that have come when none has for so long; and tells the most
    /// that it has had open.
    async fn serve_in_rounds(
        provider: &mut Swarm<Provider>,
        pause: Duration,
        most: &AtomicUsize,
    ) -> Infallible {
        let mut open = Vec::new();
        loop {
            let event = match open.is_empty() {
                true => Some(provider.select_next_some().await),
                false => timeout(pause, provider.select_next_some()).await.ok(),
            };
            match event {
                Some(SwarmEvent::Behaviour(ProviderEvent::Rpc(
                    request_response::Event::Message {
                        message:
                            Message::Request {
                                request, channel, ..
                            },
                        ..
                    },
                ))) => open.push((by_hand::serve("client1", &request), channel)),
                Some(_) => {}
                None => {
                    most.fetch_max(open.len(), Ordering::Relaxed);
                    for (reply, channel) in open.drain(..) {
                        let _ = provider.behaviour_mut().rpc.send_response(channel, reply);
                    }
                }
            }
        }
    }

    #[tokio::test]
    async fn a_stock_provider_that_knows_no_reserved_service_is_live_and_can_be_called() {
        in_time(async {
            let grape = grape().await;
            let provider = provider(&grape).await;
            let id = *provider.local_peer_id();
            tokio::spawn(serve(provider));
            let client = peer(&grape).await;
            assert_eq!(lookup(&client).await, Ok(vec![id]));
            // Long enough for what a node learns of it meanwhile to be used.
            for _ in 0..200 {
                let reply = client.request(&client1(), "hello").await.unwrap();
                assert_eq!(reply.text().unwrap(), "Echo: hello");
                assert_eq!(reply.provider, id);
            }
        })
        .await;
    }

    #[tokio::test]
    async fn a_stock_provider_has_no_more_streams_at_once_than_it_takes() {
        in_time(async {
            let grape = grape().await;
            let mut provider = provider(&grape).await;
            let names: Vec<ServiceName> = (0..40)
                .map(|n| format!("name{n}").parse().unwrap())
                .collect();
            let kad = &mut provider.behaviour_mut().kad;
            for name in &names {
                kad.start_providing(kad::RecordKey::new(&name.key()))
                    .unwrap();
            }
            let id = *provider.local_peer_id();
            let most = Arc::new(AtomicUsize::new(0));
            let shared = Arc::clone(&most);
            tokio::spawn(async move {
                serve_in_rounds(&mut provider, Duration::from_millis(20), &shared).await
            });
            let client = peer(&grape).await;
            assert_eq!(lookup(&client).await, Ok(vec![id]));
            // Beside the requests it is asked whether it serves other names.
            for at_once in [48, 500] {
                let name = client1();
                let requests = (0..at_once).map(|_| client.request(&name, "hello"));
                let lookups = names.iter().map(|name| async {
                    while let Err(error) = client.lookup(name).await {
                        assert_eq!(error, LookupError::NotFound(name.clone()));
                    }
                });
                let (replies, _) = tokio::join!(join_all(requests), join_all(lookups));
                for reply in replies {
                    assert_eq!(reply.unwrap().text().unwrap(), "Echo: hello");
                }
            }
            let most = most.load(Ordering::Relaxed);
            assert!((8..=31).contains(&most), "{most} at once");
        })
        .await;
    }

    #[tokio::test]
    async fn who_is_connected_is_found_among_many_that_are_gone() {
        in_time(async {
            let grape = grape().await;
            // They say what libp2p's own implementation says, and are gone without a word.
            let live = provider(&grape).await;
            let id = *live.local_peer_id();
            tokio::spawn(serve(live));
            let mut gone = Vec::new();
            for _ in 0..90 {
                gone.push(tokio::spawn(serve(provider(&grape).await)));
            }
            while grape.metrics().stored < 91 {
                tokio::task::yield_now().await;
            }
            for provider in gone {
                provider.abort();
            }
            while grape.metrics().peers > 1 {
                tokio::task::yield_now().await;
            }
            for _ in 0..16 {
                let client = peer(&grape).await;
                assert_eq!(
                    client.lookup(&client1()).await.map(|live| live[0].peer),
                    Ok(id)
                );
                client.shutdown().await;
            }
        })
        .await;
    }

    /// Grapes with the shortest lease, each of which knows the first.
    async fn grapes(count: usize) -> Vec<Node> {
        let mut grapes: Vec<Node> = Vec::new();
        for _ in 0..count {
            let grape = Node::builder(Role::Grape).listen([any_port()]);
            let known = grapes.first().map(Node::addresses).unwrap_or_default();
            let grape = grape.lease(MIN_LEASE).bootstrap(known);
            grapes.push(grape.spawn().await.unwrap());
        }
        grapes
    }

    /// Echoes, answers the question whether a name is served with this, and counts how often it is
    /// asked.
    async fn serve_and_say(
        mut provider: Swarm<Provider>,
        serves: Option<u8>,
        asked: watch::Sender<usize>,
    ) -> Infallible {
        loop {
            let event = provider.select_next_some().await;
            let SwarmEvent::Behaviour(ProviderEvent::Rpc(request_response::Event::Message {
                message:
                    Message::Request {
                        request, channel, ..
                    },
                ..
            })) = event
            else {
                continue;
            };
            let question = b"grapevine/serves";
            let is_asked = request.windows(question.len()).any(|part| part == question);
            let reply = match serves.filter(|_| is_asked) {
                Some(serves) => by_hand::answer_to(&request, &[serves]),
                None => by_hand::serve("client1", &request),
            };
            asked.send_modify(|asked| *asked += usize::from(is_asked));
            let _ = provider.behaviour_mut().rpc.send_response(channel, reply);
        }
    }

    /// Announces `client1` once, to all grapes, and is cut off from them if it is to be dialled.
    async fn announced_once(grapes: &[Node], is_dialled: bool) -> Swarm<Provider> {
        let mut provider = provider_at(grapes).await;
        until(&mut provider, |event| match event {
            SwarmEvent::Behaviour(ProviderEvent::Kad(event)) => is_provided(&event).then_some(()),
            _ => None,
        })
        .await;
        let have_it = || grapes.iter().all(|grape| grape.metrics().stored == 1);
        while !have_it() {
            // It is sent in the background.
            let _ = timeout(Duration::from_millis(10), provider.select_next_some()).await;
        }
        for grape in grapes.iter().filter(|_| is_dialled) {
            provider.disconnect_peer_id(grape.peer_id()).unwrap();
        }
        provider
    }

    #[tokio::test]
    async fn a_provider_that_announced_once_is_found_as_long_as_it_lives() {
        in_time(async {
            let cases = [(1, false), (1, true), (2, false), (2, true)];
            let all = cases.map(|(count, is_dialled)| async move {
                let grapes = grapes(count).await;
                let provider = announced_once(&grapes, is_dialled).await;
                let id = *provider.local_peer_id();
                let (sender, mut asked) = watch::channel(0);
                let serving = tokio::spawn(serve_and_say(provider, None, sender));
                // Three leases at least: it is asked once in a lease by each grape, or twice.
                asked.wait_for(|asked| *asked >= 6 * count).await.unwrap();
                for grape in &grapes {
                    let client = peer(grape).await;
                    let found = client.lookup(&client1()).await;
                    let found = found.map(|live| live[0].peer);
                    assert_eq!(found, Ok(id), "{count} {is_dialled}");
                }
                serving.abort();
                while grapes.iter().any(|grape| grape.metrics().stored > 0) {
                    tokio::task::yield_now().await;
                }
            });
            join_all(all).await;
        })
        .await;
    }

    #[tokio::test]
    async fn a_provider_that_says_that_it_does_not_serve_a_name_is_forgotten() {
        in_time(async {
            let grapes = grapes(1).await;
            let provider = announced_once(&grapes, false).await;
            let (sender, asked) = watch::channel(0);
            tokio::spawn(serve_and_say(provider, Some(0), sender));
            // So that the grape knows which name the key is of.
            let client = peer(&grapes[0]).await;
            assert!(client.lookup(&client1()).await.is_err());
            while grapes[0].metrics().stored > 0 {
                tokio::task::yield_now().await;
            }
            assert_eq!(
                grapes[0].metrics().expired,
                0,
                "dropped before its lease ended"
            );
            assert!(*asked.borrow() >= 2, "by the client and by the grape");
        })
        .await;
    }

    #[tokio::test]
    async fn a_provider_that_makes_up_addresses_makes_no_grape_dial_there() {
        in_time(async {
            let grapes = grapes(1).await;
            let bystander = tokio::net::TcpListener::bind("127.0.0.2:0").await.unwrap();
            let at = bystander.local_addr().unwrap();
            let mut provider = stock(|keypair| Provider {
                kad: kademlia(keypair),
                rpc: by_hand::behaviour(),
                identify: identify(keypair),
            });
            let address = format!("/ip4/127.0.0.2/tcp/{}", at.port()).parse().unwrap();
            provider.add_external_address(address);
            know(&mut provider.behaviour_mut().kad, &grapes[0]);
            let kad = &mut provider.behaviour_mut().kad;
            kad.start_providing(client1_key()).unwrap();
            while grapes[0].metrics().stored == 0 {
                let _ = timeout(Duration::from_millis(10), provider.select_next_some()).await;
            }
            drop(provider);
            while grapes[0].metrics().stored > 0 {
                tokio::task::yield_now().await;
            }
            let dialled = timeout(Duration::ZERO, bystander.accept()).await;
            assert!(dialled.is_err(), "{dialled:?}");
        })
        .await;
    }

    #[tokio::test]
    async fn a_request_that_had_no_turn_by_its_deadline_is_timed_out() {
        in_time(async {
            let grape = grape().await;
            let mut provider = provider(&grape).await;
            let id = *provider.local_peer_id();
            let client = peer(&grape).await;
            let found = {
                let most = AtomicUsize::new(0);
                let serving = serve_in_rounds(&mut provider, Duration::ZERO, &most);
                tokio::select! {
                    found = lookup(&client) => found,
                    never = serving => match never {},
                }
            };
            assert_eq!(found, Ok(vec![id]));
            tokio::spawn(async move {
                // An answer that is dropped would be one.
                let mut unanswered = Vec::new();
                loop {
                    unanswered.push(provider.select_next_some().await);
                }
            });
            let options = RequestOptions {
                deadline: Duration::from_secs(1),
                ..RequestOptions::default()
            };
            let name = client1();
            let request = || client.request_with(&name, "hello", options.clone());
            for reply in join_all((0..48).map(|_| request())).await {
                assert_eq!(reply, Err(RequestError::TimedOut(client1())));
            }
        })
        .await;
    }

    #[tokio::test]
    async fn a_stock_provider_that_speaks_no_rpc_is_not_live() {
        in_time(async {
            let grape = grape().await;
            let mut provider = stock(kademlia);
            listen(&mut provider).await;
            know(provider.behaviour_mut(), &grape);
            let kad = provider.behaviour_mut();
            kad.start_providing(client1_key()).unwrap();
            until(&mut provider, |event| match event {
                SwarmEvent::Behaviour(event) => is_provided(&event).then_some(()),
                _ => None,
            })
            .await;
            run(provider);
            let client = peer(&grape).await;
            let started = std::time::Instant::now();
            let unreachable = LookupError::Unreachable {
                name: client1(),
                providers: 1,
            };
            assert_eq!(lookup(&client).await, Err(unreachable));
            assert!(started.elapsed() < SERVES_DEADLINE, "it waited for nobody");
        })
        .await;
    }
}

#[tokio::test]
async fn identify_carries_no_signed_record() {
    in_time(async {
        // libp2p signs one in a form of its own, which others refuse with all that comes with it.
        let (grape, mut client) = (grape().await, stock(identify));
        connect(&mut client, &grape).await;
        let info = until(&mut client, |event| match event {
            SwarmEvent::Behaviour(identify::Event::Received { info, .. }) => Some(info),
            _ => None,
        })
        .await;
        assert!(info.signed_peer_record.is_none());
        let kad = StreamProtocol::new("/grapevine/kad/1.0.0");
        assert!(info.protocols.contains(&kad));
        assert!(!info.listen_addrs.is_empty());
    })
    .await;
}

/// A Kademlia server of another implementation that is no grape.
mod stock_server {
    use super::*;

    #[derive(NetworkBehaviour)]
    struct Server {
        kad: kad::Behaviour<MemoryStore>,
        identify: identify::Behaviour,
    }

    fn kademlia(keypair: &identity::Keypair) -> kad::Behaviour<MemoryStore> {
        let peer = keypair.public().to_peer_id();
        let config = kad::Config::new(StreamProtocol::new("/grapevine/kad/1.0.0"));
        kad::Behaviour::with_config(peer, MemoryStore::new(peer), config)
    }

    #[tokio::test]
    async fn is_kept_in_the_routing_table_and_not_taken_for_a_grape() {
        in_time(async {
            let first = grape().await;
            let mut server = stock(|keypair| Server {
                kad: kademlia(keypair),
                identify: identify(keypair),
            });
            server.behaviour_mut().kad.set_mode(Some(kad::Mode::Server));
            listen(&mut server).await;
            connect(&mut server, &first).await;
            let id = *server.local_peer_id();
            // Until it is dialled back.
            until(&mut server, |event| match event {
                SwarmEvent::ConnectionEstablished { endpoint, .. } => {
                    endpoint.is_listener().then_some(())
                }
                _ => None,
            })
            .await;
            run(server);
            let mut client = stock(kademlia);
            let mut address = first.addresses()[0].clone();
            address.pop();
            let kad = client.behaviour_mut();
            kad.add_address(&first.peer_id(), address);
            loop {
                client.behaviour_mut().get_closest_peers(id);
                let closest = until(&mut client, |event| match event {
                    SwarmEvent::Behaviour(kad::Event::OutboundQueryProgressed {
                        result: kad::QueryResult::GetClosestPeers(result),
                        ..
                    }) => Some(result.unwrap().peers),
                    _ => None,
                })
                .await;
                if closest.iter().any(|found| found.peer_id == id) {
                    break;
                }
            }
            assert_eq!(first.metrics().grapes, 0);
        })
        .await;
    }
}

/// Says that it serves Kademlia, and cannot be dialled.
mod stock_pretender {
    use super::*;

    #[derive(NetworkBehaviour)]
    struct Pretender {
        kad: kad::Behaviour<MemoryStore>,
        identify: identify::Behaviour,
    }

    #[tokio::test]
    async fn is_not_taken_for_a_grape() {
        in_time(async {
            let first = grape().await;
            for _ in 0..3 {
                let mut pretender = stock(|keypair| {
                    let peer = keypair.public().to_peer_id();
                    let config = kad::Config::new(StreamProtocol::new("/grapevine/kad/1.0.0"));
                    let mut kad = kad::Behaviour::with_config(peer, MemoryStore::new(peer), config);
                    kad.set_mode(Some(kad::Mode::Server));
                    Pretender {
                        kad,
                        identify: identify(keypair),
                    }
                });
                connect(&mut pretender, &first).await;
                until(&mut pretender, |event| match event {
                    SwarmEvent::Behaviour(PretenderEvent::Identify(identify::Event::Sent {
                        ..
                    })) => Some(()),
                    _ => None,
                })
                .await;
                run(pretender);
            }
            let second = Node::builder(Role::Grape).listen([any_port()]);
            let second = second.bootstrap(first.addresses()).spawn().await.unwrap();
            while first.metrics().grapes == 0 || second.metrics().grapes == 0 {
                tokio::task::yield_now().await;
            }
            assert_eq!((first.metrics().grapes, first.metrics().peers), (1, 4));
        })
        .await;
    }
}

/// A grape of another implementation: a stock rendezvous point and Kademlia server.
mod stock_grape {
    use super::*;

    #[derive(NetworkBehaviour)]
    struct Point {
        rendezvous: rendezvous::server::Behaviour,
        kad: kad::Behaviour<MemoryStore>,
        rpc: request_response::Behaviour<by_hand::Codec>,
        identify: identify::Behaviour,
    }

    /// Serves calls of a name that nobody calls, and nothing of the protocol's own, whatever it says.
    /// Returns where.
    async fn start(says: &[&'static str]) -> Multiaddr {
        let says = says.iter().map(|id| StreamProtocol::new(id));
        let protocols: Vec<_> = [by_hand::PROTOCOL].into_iter().chain(says).collect();
        let mut point = stock(|keypair| {
            let peer = keypair.public().to_peer_id();
            let protocol = StreamProtocol::new("/grapevine/kad/1.0.0");
            let config = kad::Config::new(protocol);
            let mut kad = kad::Behaviour::with_config(peer, MemoryStore::new(peer), config);
            kad.set_mode(Some(kad::Mode::Server));
            // By default it takes nothing for less than two hours.
            let short = rendezvous::server::Config::default().with_min_ttl(1);
            Point {
                rendezvous: rendezvous::server::Behaviour::new(short),
                kad,
                rpc: by_hand::behaviour_of(&protocols),
                identify: identify(keypair),
            }
        });
        let address = listen(&mut point).await;
        let address = address.with_p2p(*point.local_peer_id()).unwrap();
        tokio::spawn(async move {
            loop {
                let event = point.select_next_some().await;
                let SwarmEvent::Behaviour(PointEvent::Rpc(request_response::Event::Message {
                    message:
                        Message::Request {
                            request, channel, ..
                        },
                    ..
                })) = event
                else {
                    continue;
                };
                let reply = by_hand::serve("nobody", &request);
                let _ = point.behaviour_mut().rpc.send_response(channel, reply);
            }
        });
        address
    }

    #[tokio::test]
    async fn a_point_without_a_registry_is_told_and_asked_the_standard_ways() {
        in_time(async {
            // One says only when it is asked that it has none; of the other it is known before.
            for says in [&["/grapevine/names/1.0.0"] as &[_], &[]] {
                let point = start(says).await;
                let peer = || {
                    let peer = Node::builder(Role::Peer).listen([any_port()]);
                    peer.bootstrap([point.clone()]).spawn()
                };
                let (server, client) = (peer().await.unwrap(), peer().await.unwrap());
                let service = server.announce(&client1()).await.unwrap();
                let live = client.lookup(&client1()).await.unwrap();
                assert_eq!(live[0].peer, server.peer_id(), "{says:?}");
                service.withdraw().await;
                let error = client.lookup(&client1()).await.unwrap_err();
                assert_eq!(error, LookupError::NotFound(client1()), "{says:?}");
            }
        })
        .await;
    }

    #[tokio::test]
    async fn a_name_is_found_across_grapes_of_both_kinds() {
        in_time(async {
            let (ours, point) = (grape().await, start(&[]).await);
            let both = ours.addresses().into_iter().chain([point.clone()]);
            let server = Node::builder(Role::Peer).listen([any_port()]);
            let server = server.bootstrap(both).spawn().await.unwrap();
            let _service = server.announce(&client1()).await.unwrap();
            for by in [ours.addresses()[0].clone(), point] {
                let client = Node::builder(Role::Peer).bootstrap([by]);
                let client = client.spawn().await.unwrap();
                // The second grape hears of the name a moment later than the first.
                let live = loop {
                    match client.lookup(&client1()).await {
                        Err(LookupError::NotFound(_)) => tokio::task::yield_now().await,
                        found => break found.unwrap(),
                    }
                };
                assert_eq!(live[0].peer, server.peer_id());
            }
        })
        .await;
    }
}

#[tokio::test]
async fn a_stock_request_response_client_gets_an_echo() {
    in_time(async {
        let grape = grape().await;
        let node = echo(&grape).await;
        let mut client = stock(|_| by_hand::behaviour());
        connect(&mut client, &node).await;
        for (service, payload, expected) in [
            ("client1", "hello", by_hand::ok(7, b"Echo: hello")),
            ("client1", "", by_hand::ok(7, b"Echo: ")),
            ("grapevine/serves", "client1", by_hand::ok(7, &[1])),
            ("grapevine/serves", "client2", by_hand::ok(7, &[0])),
            (
                "client2",
                "hello",
                by_hand::error(7, "unknown-service", "not served here"),
            ),
        ] {
            let request = by_hand::request(7, service, payload.as_bytes());
            client
                .behaviour_mut()
                .send_request(&node.peer_id(), request);
            let reply = until(&mut client, |event| match event {
                SwarmEvent::Behaviour(request_response::Event::Message {
                    message: Message::Response { response, .. },
                    ..
                }) => Some(response),
                SwarmEvent::Behaviour(request_response::Event::OutboundFailure {
                    error, ..
                }) => panic!("{error}"),
                _ => None,
            })
            .await;
            assert_eq!(reply, expected, "{service} {payload}");
        }
    })
    .await;
}

/// The RPC as a stranger writes it after reading the protocol's page: frames of a varint and CBOR,
/// whole messages as bytes.
mod by_hand {
    use super::*;

    pub(super) const PROTOCOL: StreamProtocol = StreamProtocol::new("/grapevine/rpc/1.0.0");

    #[derive(Clone, Default)]
    pub(super) struct Codec;

    pub(super) fn behaviour() -> request_response::Behaviour<Codec> {
        behaviour_of(&[PROTOCOL])
    }

    /// One that offers these protocols, and takes all their streams for the same: as many at once as
    /// js-libp2p does.
    pub(super) fn behaviour_of(protocols: &[StreamProtocol]) -> request_response::Behaviour<Codec> {
        let protocols = protocols.iter().cloned();
        let protocols = protocols.map(|id| (id, ProtocolSupport::Full));
        let config = request_response::Config::default().with_max_concurrent_streams(32);
        request_response::Behaviour::new(protocols, config)
    }

    impl request_response::Codec for Codec {
        type Protocol = StreamProtocol;
        type Request = Vec<u8>;
        type Response = Vec<u8>;

        async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Vec<u8>>
        where
            T: AsyncRead + Unpin + Send,
        {
            read(io).await
        }

        async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Vec<u8>>
        where
            T: AsyncRead + Unpin + Send,
        {
            read(io).await
        }

        async fn write_request<T>(
            &mut self,
            _: &StreamProtocol,
            io: &mut T,
            request: Vec<u8>,
        ) -> io::Result<()>
        where
            T: AsyncWrite + Unpin + Send,
        {
            write(io, &request).await
        }

        async fn write_response<T>(
            &mut self,
            _: &StreamProtocol,
            io: &mut T,
            response: Vec<u8>,
        ) -> io::Result<()>
        where
            T: AsyncWrite + Unpin + Send,
        {
            write(io, &response).await
        }
    }

    async fn read(io: &mut (impl AsyncRead + Unpin + Send)) -> io::Result<Vec<u8>> {
        let (mut len, mut shift) = (0, 0);
        loop {
            let mut byte = [0];
            io.read_exact(&mut byte).await?;
            len |= usize::from(byte[0] & 0x7f) << shift;
            shift += 7;
            if byte[0] < 0x80 {
                break;
            }
        }
        let mut content = vec![0; len];
        io.read_exact(&mut content).await?;
        Ok(content)
    }

    pub(super) async fn write(
        io: &mut (impl AsyncWrite + Unpin + Send),
        content: &[u8],
    ) -> io::Result<()> {
        let mut len = content.len();
        let mut frame = Vec::new();
        while len >= 0x80 {
            frame.push(len as u8 | 0x80);
            len >>= 7;
        }
        frame.push(len as u8);
        frame.extend(content);
        io.write_all(&frame).await
    }

    /// A value of fewer than 24 bytes: its kind and length are one byte.
    fn short(kind: u8, bytes: &[u8]) -> Vec<u8> {
        assert!(bytes.len() < 24);
        [&[kind | bytes.len() as u8], bytes].concat()
    }

    fn text(text: &str) -> Vec<u8> {
        short(0x60, text.as_bytes())
    }

    fn bytes(bytes: &[u8]) -> Vec<u8> {
        short(0x40, bytes)
    }

    pub(super) fn request(id: u8, service: &str, payload: &[u8]) -> Vec<u8> {
        let entries = [
            text("id"),
            vec![id],
            text("service"),
            text(service),
            text("payload"),
            bytes(payload),
        ];
        [vec![0xa3], entries.concat()].concat()
    }

    pub(super) fn ok(id: u8, payload: &[u8]) -> Vec<u8> {
        ok_to(&[id], payload)
    }

    fn ok_to(id: &[u8], payload: &[u8]) -> Vec<u8> {
        let entries = [text("id"), id.to_vec(), text("ok"), bytes(payload)];
        [vec![0xa2], entries.concat()].concat()
    }

    pub(super) fn error(id: u8, code: &str, message: &str) -> Vec<u8> {
        error_to(&[id], code, message)
    }

    fn error_to(id: &[u8], code: &str, message: &str) -> Vec<u8> {
        let error = [text("code"), text(code), text("message"), text(message)].concat();
        let entries = [text("id"), id.to_vec(), text("error"), vec![0xa2], error];
        [vec![0xa2], entries.concat()].concat()
    }

    /// A reply to a request, of the one writer that this is tested with.
    pub(super) fn answer_to(request: &[u8], payload: &[u8]) -> Vec<u8> {
        ok_to(id_of(request), payload)
    }

    fn id_of(request: &[u8]) -> &[u8] {
        let len = match request[4] {
            0x18 => 2,
            0x19 => 3,
            _ => 1,
        };
        &request[4..4 + len]
    }

    /// A server of one echo, which knows no reserved service. It finds what it needs in a request at
    /// the places where the one writer it is tested with puts them: id, service, payload.
    pub(super) fn serve(name: &str, request: &[u8]) -> Vec<u8> {
        let id = id_of(request);
        let service = &request[4 + id.len()..];
        let service = &service[text("service").len()..];
        let Some(payload) = service.strip_prefix(text(name).as_slice()) else {
            return error_to(id, "unknown-service", "");
        };
        let payload = &payload[text("payload").len() + 1..];
        ok_to(id, &[b"Echo: ", payload].concat())
    }
}
