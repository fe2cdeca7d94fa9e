//! Our rendezvous codec and libp2p's own rendezvous behaviours understand each other, in both directions.

use std::{collections::HashMap, time::Duration};

use futures::StreamExt;
use libp2p::{
    Multiaddr, PeerId, Swarm, SwarmBuilder,
    core::{Transport, transport::MemoryTransport, upgrade},
    identity::Keypair,
    noise,
    rendezvous::{self, Namespace as StockNamespace, client, server},
    request_response::{self, Message, ProtocolSupport},
    swarm::{NetworkBehaviour, SwarmEvent},
    yamux,
};
use tokio::sync::mpsc;

use crate::limits::RENDEZVOUS_PROTOCOL;

use super::{
    Codec, Cookie, Form, Namespace, Page, Registration, Request, Response, SignedPeer, Status, Ttl,
    page_len,
};

type Ours = request_response::Behaviour<Codec>;

const DEADLINE: Duration = Duration::from_secs(10);

fn ours(support: ProtocolSupport) -> Ours {
    Ours::new(
        [(RENDEZVOUS_PROTOCOL, support)],
        request_response::Config::default(),
    )
}

fn swarm<B: NetworkBehaviour>(behaviour: impl FnOnce(Keypair) -> B) -> Swarm<B> {
    let transport = |key: &Keypair| {
        let noise = noise::Config::new(key).expect("a fresh key signs");
        MemoryTransport::new()
            .upgrade(upgrade::Version::V1)
            .authenticate(noise)
            .multiplex(yamux::Config::default())
    };
    SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_other_transport(transport)
        .expect("transport")
        .with_behaviour(|key| behaviour(key.clone()))
        .expect("behaviour")
        .build()
}

/// Drives `swarm` until `pick` takes an event.
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
    tokio::time::timeout(DEADLINE, picked)
        .await
        .expect("event before the deadline")
}

async fn listen<B: NetworkBehaviour>(swarm: &mut Swarm<B>) -> Multiaddr {
    swarm
        .listen_on("/memory/0".parse().expect("address"))
        .expect("listening");
    until(swarm, |event| match event {
        SwarmEvent::NewListenAddr { address, .. } => Some(address),
        _ => None,
    })
    .await
}

async fn connect<B: NetworkBehaviour>(swarm: &mut Swarm<B>, address: Multiaddr) {
    swarm.dial(address).expect("dialling");
    until(swarm, |event| {
        matches!(event, SwarmEvent::ConnectionEstablished { .. }).then_some(())
    })
    .await;
}

/// The least that serves the protocol: no bounds, no expiry.
#[derive(Default)]
struct Shelf {
    sequence: u64,
    registrations: HashMap<(Namespace, PeerId), (u64, Registration)>,
}

impl Shelf {
    fn answer(&mut self, sender: PeerId, request: Request) -> Response {
        match request {
            Request::Register { record, .. } if record.peer() != sender => {
                Response::Registered(Err(Status::NotAuthorized))
            }
            Request::Register {
                namespace,
                record,
                ttl,
            } => {
                let ttl = ttl.unwrap_or(Ttl::DEFAULT);
                self.sequence += 1;
                let registration = Registration {
                    namespace: namespace.clone(),
                    record,
                    ttl,
                };
                self.registrations
                    .insert((namespace, sender), (self.sequence, registration));
                Response::Registered(Ok(ttl))
            }
            Request::Unregister { namespace } => {
                self.registrations.remove(&(namespace, sender));
                Response::Unregistered
            }
            Request::Discover {
                namespace,
                cookie,
                limit,
            } => Response::Discovered(self.page(namespace, cookie, page_len(limit))),
        }
    }

    fn page(
        &self,
        namespace: Option<Namespace>,
        cookie: Option<Cookie>,
        len: usize,
    ) -> Result<Page, Status> {
        let after = cookie
            .map(|cookie| cookie.sequence_for(namespace.as_ref()))
            .transpose()?;
        let after = after.unwrap_or(0);
        let asked =
            |found: &Registration| namespace.as_ref().is_none_or(|ns| *ns == found.namespace);
        let mut found: Vec<_> = self.registrations.values().cloned().collect();
        found.retain(|(sequence, registration)| *sequence > after && asked(registration));
        found.sort_by_key(|(sequence, _)| *sequence);
        found.truncate(len);
        let last = found.last().map_or(after, |(sequence, _)| *sequence);
        let registrations = found
            .into_iter()
            .map(|(_, registration)| registration)
            .collect();
        Ok(Page {
            registrations,
            cookie: Cookie::after(last, namespace.as_ref()),
        })
    }
}

/// Our codec as a server in a task of its own; it reports what it has handled.
async fn our_server() -> (PeerId, Multiaddr, mpsc::UnboundedReceiver<Request>) {
    let mut swarm = swarm(|_| ours(ProtocolSupport::Inbound));
    let address = listen(&mut swarm).await;
    let peer = *swarm.local_peer_id();
    let (handled, requests) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut shelf = Shelf::default();
        loop {
            let event = swarm.select_next_some().await;
            let SwarmEvent::Behaviour(request_response::Event::Message { peer, message, .. }) =
                event
            else {
                continue;
            };
            let Message::Request {
                request, channel, ..
            } = message
            else {
                continue;
            };
            let response = match request {
                Ok(request) => {
                    let response = shelf.answer(peer, request.clone());
                    let _ = handled.send(request);
                    response
                }
                Err(malformed) => malformed.into(),
            };
            let _ = swarm.behaviour_mut().send_response(channel, response);
        }
    });
    (peer, address, requests)
}

/// A stock client that is connected to `server` and has one address to register.
async fn stock_client(server: &Multiaddr) -> Swarm<client::Behaviour> {
    let mut client = swarm(client::Behaviour::new);
    connect(&mut client, server.clone()).await;
    client.add_external_address(client_address());
    client
}

fn client_address() -> Multiaddr {
    "/ip4/127.0.0.1/tcp/4001".parse().expect("address")
}

fn stock_namespace(text: &str) -> StockNamespace {
    StockNamespace::new(text.into()).expect("namespace")
}

async fn stock_event(client: &mut Swarm<client::Behaviour>) -> client::Event {
    until(client, |event| match event {
        SwarmEvent::Behaviour(event) => Some(event),
        _ => None,
    })
    .await
}

async fn stock_register(
    client: &mut Swarm<client::Behaviour>,
    server: PeerId,
    namespace: &str,
    ttl: Option<u64>,
) -> Result<u64, rendezvous::ErrorCode> {
    let namespace = stock_namespace(namespace);
    client
        .behaviour_mut()
        .register(namespace, server, ttl)
        .expect("an external address");
    match stock_event(client).await {
        client::Event::Registered { ttl, .. } => Ok(ttl),
        client::Event::RegisterFailed { error, .. } => Err(error),
        other => panic!("{other:?}"),
    }
}

async fn stock_discover(
    client: &mut Swarm<client::Behaviour>,
    server: PeerId,
    namespace: Option<&str>,
    cookie: Option<rendezvous::Cookie>,
    limit: Option<u64>,
) -> Result<(Vec<PeerId>, rendezvous::Cookie), rendezvous::ErrorCode> {
    let namespace = namespace.map(stock_namespace);
    client
        .behaviour_mut()
        .discover(namespace, cookie, limit, server);
    match stock_event(client).await {
        client::Event::Discovered {
            registrations,
            cookie,
            ..
        } => {
            for registration in &registrations {
                assert_eq!(registration.record.addresses(), [client_address()]);
            }
            Ok((
                registrations
                    .iter()
                    .map(|found| found.record.peer_id())
                    .collect(),
                cookie,
            ))
        }
        client::Event::DiscoverFailed { error, .. } => Err(error),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn stock_client_registers_and_unregisters_with_us() {
    let (server, address, mut requests) = our_server().await;
    let mut client = stock_client(&address).await;
    let me = *client.local_peer_id();

    assert_eq!(
        stock_register(&mut client, server, "client1", Some(90)).await,
        Ok(90)
    );
    assert_eq!(
        stock_register(&mut client, server, "client2", None).await,
        Ok(7200)
    );
    let (found, _) = stock_discover(&mut client, server, Some("client1"), None, None)
        .await
        .unwrap();
    assert_eq!(found, [me]);

    while requests.try_recv().is_ok() {}
    client
        .behaviour_mut()
        .unregister(stock_namespace("client1"), server);
    let unregister = Request::Unregister {
        namespace: Namespace::new("client1").unwrap(),
    };
    tokio::select! {
        handled = requests.recv() => assert_eq!(handled, Some(unregister)),
        event = stock_event(&mut client) => panic!("{event:?}"),
    }
    let (found, _) = stock_discover(&mut client, server, Some("client1"), None, None)
        .await
        .unwrap();
    assert_eq!(found, []);
    let (found, _) = stock_discover(&mut client, server, None, None, None)
        .await
        .unwrap();
    assert_eq!(found, [me]);
}

#[tokio::test]
async fn stock_client_pages_through_our_registrations() {
    let (server, address, _requests) = our_server().await;
    let mut client = stock_client(&address).await;
    let mut other = stock_client(&address).await;
    stock_register(&mut client, server, "name", None)
        .await
        .unwrap();
    stock_register(&mut other, server, "name", None)
        .await
        .unwrap();

    let name = Some("name");
    let (first, cookie) = stock_discover(&mut client, server, name, None, Some(1))
        .await
        .unwrap();
    assert_eq!(first, [*client.local_peer_id()]);
    let cookie = Some(cookie);
    let (second, cookie) = stock_discover(&mut client, server, name, cookie, Some(1))
        .await
        .unwrap();
    assert_eq!(second, [*other.local_peer_id()]);
    let cookie = Some(cookie);
    let (third, cookie) = stock_discover(&mut client, server, name, cookie, None)
        .await
        .unwrap();
    assert_eq!(third, []);

    stock_register(&mut client, server, "name", None)
        .await
        .unwrap();
    let cookie = Some(cookie);
    let (renewed, cookie) = stock_discover(&mut client, server, name, cookie, None)
        .await
        .unwrap();
    assert_eq!(renewed, [*client.local_peer_id()]);

    let cookie = Some(cookie);
    let result = stock_discover(&mut client, server, Some("other"), cookie, None).await;
    assert_eq!(result.err(), Some(rendezvous::ErrorCode::InvalidCookie));
}

#[tokio::test]
async fn stock_client_is_told_what_is_wrong() {
    let (server, address, _requests) = our_server().await;
    let mut client = stock_client(&address).await;
    let result = stock_register(&mut client, server, "", None).await;
    assert_eq!(result, Err(rendezvous::ErrorCode::InvalidNamespace));

    let long = format!("/dns4/{}/tcp/1", "a".repeat(255));
    for port in 1..20 {
        client.add_external_address(format!("{long}{port}").parse().expect("address"));
    }
    let result = stock_register(&mut client, server, "name", None).await;
    assert_eq!(result, Err(rendezvous::ErrorCode::InvalidSignedPeerRecord));
}

#[tokio::test]
async fn stock_clients_endless_ttl_is_cut() {
    let (server, address, _requests) = our_server().await;
    let mut client = stock_client(&address).await;
    let result = stock_register(&mut client, server, "name", Some(u64::MAX)).await;
    assert_eq!(result, Ok(Ttl::MAX.as_secs()));
}

/// libp2p's server in a task of its own.
async fn stock_server() -> (PeerId, Multiaddr) {
    let config = || server::Config::default().with_min_ttl(10).with_max_ttl(100);
    let mut swarm = swarm(|_| server::Behaviour::new(config()));
    let address = listen(&mut swarm).await;
    let peer = *swarm.local_peer_id();
    tokio::spawn(async move {
        loop {
            swarm.select_next_some().await;
        }
    });
    (peer, address)
}

async fn ask(client: &mut Swarm<Ours>, server: PeerId, request: Request) -> Response {
    client.behaviour_mut().send_request(&server, Ok(request));
    until(client, |event| match event {
        SwarmEvent::Behaviour(request_response::Event::Message {
            message: Message::Response { response, .. },
            ..
        }) => Some(response),
        SwarmEvent::Behaviour(request_response::Event::OutboundFailure { error, .. }) => {
            panic!("{error}")
        }
        _ => None,
    })
    .await
}

/// A client with our codec that is connected to `server`, and its record.
async fn our_client(server: &Multiaddr) -> (Swarm<Ours>, SignedPeer) {
    let mut record = None;
    let mut client = swarm(|key| {
        record = SignedPeer::sign(&key, &[client_address()], Form::Legacy).ok();
        ours(ProtocolSupport::Outbound)
    });
    connect(&mut client, server.clone()).await;
    (client, record.expect("record"))
}

fn name() -> Namespace {
    Namespace::new("name").expect("namespace")
}

fn register(record: &SignedPeer, seconds: u64) -> Request {
    Request::Register {
        namespace: name(),
        record: record.clone(),
        ttl: Some(Ttl::from_secs(seconds)),
    }
}

fn discover(cookie: Option<Cookie>) -> Request {
    Request::Discover {
        namespace: Some(name()),
        cookie,
        limit: Some(10),
    }
}

fn page(response: Response) -> Page {
    match response {
        Response::Discovered(Ok(page)) => page,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn we_register_discover_and_unregister_at_a_stock_server() {
    let (server, address) = stock_server().await;
    let (mut client, record) = our_client(&address).await;
    let ttl = Ttl::from_secs(90);

    let response = ask(&mut client, server, register(&record, 90)).await;
    assert_eq!(response, Response::Registered(Ok(ttl)));

    let first = page(ask(&mut client, server, discover(None)).await);
    assert_eq!(
        first.registrations,
        [Registration {
            namespace: name(),
            record,
            ttl
        }]
    );
    let next = page(ask(&mut client, server, discover(Some(first.cookie))).await);
    assert_eq!(next.registrations, []);

    let unregister = Request::Unregister { namespace: name() };
    assert_eq!(
        ask(&mut client, server, unregister).await,
        Response::Unregistered
    );
    assert_eq!(
        page(ask(&mut client, server, discover(None)).await).registrations,
        []
    );
}

#[tokio::test]
async fn we_understand_the_refusals_of_a_stock_server() {
    let (server, address) = stock_server().await;
    let (mut client, record) = our_client(&address).await;
    let (_, stranger) = our_client(&address).await;

    for (request, status) in [
        (register(&record, 1), Status::InvalidTtl),
        (register(&record, u64::MAX), Status::InvalidTtl),
        (register(&stranger, 90), Status::NotAuthorized),
    ] {
        let response = ask(&mut client, server, request).await;
        assert_eq!(response, Response::Registered(Err(status)));
    }

    let other = Namespace::new("other").unwrap();
    let response = ask(
        &mut client,
        server,
        discover(Some(Cookie::after(1, Some(&other)))),
    )
    .await;
    assert_eq!(response, Response::Discovered(Err(Status::InvalidCookie)));
}
