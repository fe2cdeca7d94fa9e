//! Announce, lookup and request: what users of the library rely on.
//!
//! Nodes that are to be killed run in a [`Killable`] runtime of their own, over loopback TCP;
//! dropping it is as abrupt as a crash.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use futures::StreamExt;
use grapevine::error::{
    AnnounceError, DialFailure, LookupError, NoGrape, RequestError, SpawnError,
};
use grapevine::limits::{Limits, MIN_LEASE};
use grapevine::proto::wire::{ErrorCode, MAX_PAYLOAD};
use grapevine::{
    Builder, Delivery, Identity, Multiaddr, Node, PeerId, Reply, RequestOptions, Role, ServiceName,
    Status, Testnet,
};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

const TCP: &str = "/ip4/127.0.0.1/tcp/0";
const QUIC: &str = "/ip4/127.0.0.1/udp/0/quic-v1";

fn name(text: &str) -> ServiceName {
    text.parse().unwrap()
}

fn address(text: &str) -> Multiaddr {
    text.parse().unwrap()
}

/// No scenario takes longer than this, however busy the machine.
async fn in_time<T>(scenario: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(90), scenario)
        .await
        .expect("the scenario hangs")
}

/// Answers `Echo: <text>` until the node is shut down.
async fn echo(node: &Node, text: &str) {
    let service = node.announce(&name(text)).await.unwrap();
    tokio::spawn(service.serve(|request| async move {
        let answer = format!("Echo: {}", request.text().unwrap());
        request.reply(answer);
    }));
}

/// A node on a loopback socket.
fn on(role: Role, listen: &str, grapes: &[&Node]) -> Builder {
    Node::builder(role)
        .listen([address(listen)])
        .bootstrap(grapes.iter().flat_map(|grape| grape.addresses()))
}

/// A node that can be killed without a goodbye.
struct Killable {
    node: Node,
    runtime: Option<Runtime>,
}

impl Killable {
    fn spawn(builder: Builder) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        runtime.spawn(async move { sender.send(builder.spawn().await.unwrap()) });
        let node = receiver.recv().unwrap();
        let runtime = Some(runtime);
        Self { node, runtime }
    }

    async fn echo(&self, text: &'static str) {
        let node = self.node.clone();
        let runtime = self.runtime.as_ref().unwrap();
        let announced = runtime.spawn(async move { echo(&node, text).await });
        announced.await.unwrap();
    }

    /// Lets it do nothing until what is returned is dropped.
    fn stop(&self) -> std::sync::mpsc::Sender<()> {
        let (stopped, waits) = std::sync::mpsc::channel();
        let (go_on, going_on) = std::sync::mpsc::channel::<()>();
        self.runtime.as_ref().unwrap().spawn(async move {
            stopped.send(()).unwrap();
            // An error means that it was dropped.
            let _ = going_on.recv();
        });
        waits.recv().unwrap();
        go_on
    }
}

impl Drop for Killable {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[tokio::test]
async fn an_announced_name_is_found_and_answers() {
    in_time(async {
        let testnet = Testnet::new(2).await.unwrap();
        let (server, client) = (testnet.peer().await.unwrap(), testnet.peer().await.unwrap());
        echo(&server, "client1").await;
        let live = client.lookup(&name("client1")).await.unwrap();
        assert_eq!(live.len(), 1);
        assert_eq!(live[0].peer, server.peer_id());
        let reply = client.request(&name("client1"), "hello").await.unwrap();
        assert_eq!(reply.text().unwrap(), "Echo: hello");
        assert_eq!(reply.provider, server.peer_id());
    })
    .await;
}

#[tokio::test]
async fn every_transport_carries_a_request() {
    in_time(async {
        for listen in [TCP, QUIC] {
            let grape = on(Role::Grape, listen, &[]).spawn().await.unwrap();
            let server = on(Role::Peer, listen, &[&grape]).spawn().await.unwrap();
            let client = Node::builder(Role::Peer)
                .bootstrap(grape.addresses())
                .spawn()
                .await
                .unwrap();
            echo(&server, "client1").await;
            let reply = client.request(&name("client1"), listen).await.unwrap();
            assert_eq!(reply.text().unwrap(), format!("Echo: {listen}"));
        }
    })
    .await;
}

#[tokio::test]
async fn a_grape_is_reached_by_its_host_name() {
    in_time(async {
        let grape = on(Role::Grape, TCP, &[]).spawn().await.unwrap();
        let by_name = grape.addresses()[0]
            .to_string()
            .replace("/ip4/127.0.0.1", "/dns4/localhost");
        let peer = Node::builder(Role::Peer)
            .bootstrap([address(&by_name)])
            .spawn()
            .await
            .unwrap();
        peer.status().wait_for(Status::is_online).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn the_grapes_id_is_learned_where_the_address_names_none() {
    in_time(async {
        let grape = on(Role::Grape, TCP, &[]).spawn().await.unwrap();
        let text = grape.addresses()[0].to_string();
        let without_id = text.split("/p2p/").next().unwrap();
        let peer = Node::builder(Role::Peer)
            .bootstrap([address(without_id)])
            .spawn()
            .await
            .unwrap();
        let mut status = peer.status();
        let status = status.wait_for(Status::is_online).await.unwrap();
        assert_eq!(status.bootstrap[0].connected, Some(grape.peer_id()));
    })
    .await;
}

#[tokio::test]
async fn a_wrong_id_is_refused_and_both_ids_are_named() {
    in_time(async {
        let grape = on(Role::Grape, TCP, &[]).spawn().await.unwrap();
        let text = grape.addresses()[0].to_string();
        let expected = PeerId::random();
        let wrong = text.replace(&grape.peer_id().to_string(), &expected.to_string());
        let peer = Node::builder(Role::Peer)
            .listen([address(TCP)])
            .bootstrap([address(&wrong)])
            .spawn()
            .await
            .unwrap();
        let AnnounceError::NoGrape(no_grape) = peer.announce(&name("client1")).await.unwrap_err()
        else {
            panic!("announced without a grape");
        };
        let found = grape.peer_id();
        assert_eq!(
            no_grape.tried[0].1,
            DialFailure::WrongPeer { expected, found }
        );
        let message = no_grape.to_string();
        assert!(message.contains(&expected.to_string()), "{message}");
        assert!(message.contains(&found.to_string()), "{message}");
        assert!(matches!(
            peer.lookup(&name("client1")).await,
            Err(LookupError::NoGrape(_))
        ));
    })
    .await;
}

#[tokio::test]
async fn a_name_that_nobody_announces_is_an_error_at_once() {
    in_time(async {
        let testnet = Testnet::new(1).await.unwrap();
        let client = testnet.peer().await.unwrap();
        let error = client.lookup(&name("nobody")).await.unwrap_err();
        assert_eq!(error, LookupError::NotFound(name("nobody")));
        let error = client.request(&name("nobody"), "hello").await.unwrap_err();
        assert_eq!(
            error,
            RequestError::Lookup(LookupError::NotFound(name("nobody")))
        );
    })
    .await;
}

#[tokio::test]
async fn a_withdrawn_name_is_gone_from_every_grape() {
    in_time(async {
        let testnet = Testnet::new(3).await.unwrap();
        let (server, client) = (testnet.peer().await.unwrap(), testnet.peer().await.unwrap());
        let service = server.announce(&name("client1")).await.unwrap();
        client.lookup(&name("client1")).await.unwrap();
        service.withdraw().await;
        let error = client.lookup(&name("client1")).await.unwrap_err();
        assert_eq!(error, LookupError::NotFound(name("client1")));
        stored(&testnet, 0).await;
    })
    .await;
}

/// Waits until every grape holds so many records.
async fn stored(testnet: &Testnet, records: u64) {
    all_store(testnet.grapes(), records).await;
}

async fn all_store(grapes: &[Node], records: u64) {
    for grape in grapes {
        while grape.metrics().stored != records {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test]
async fn a_name_reaches_and_leaves_the_grapes_that_its_peer_has_not_joined_by() {
    in_time(async {
        let testnet = Testnet::new(6).await.unwrap();
        let grapes = testnet.grapes();
        let joined = |grape: usize| testnet.joining(Role::Peer, [&grapes[grape]]).spawn();
        let (server, client) = (joined(0).await.unwrap(), joined(5).await.unwrap());
        let service = server.announce(&name("client1")).await.unwrap();
        stored(&testnet, 1).await;
        let live = client.lookup(&name("client1")).await.unwrap();
        assert_eq!(live[0].peer, server.peer_id());
        service.withdraw().await;
        // The lease of 90 seconds would outlive this scenario.
        stored(&testnet, 0).await;
        let error = client.lookup(&name("client1")).await.unwrap_err();
        assert_eq!(error, LookupError::NotFound(name("client1")));
    })
    .await;
}

#[tokio::test]
async fn in_a_large_network_a_name_is_kept_by_some_grapes_and_taken_back_from_each() {
    in_time(async {
        let testnet = Testnet::new(24).await.unwrap();
        let grapes = testnet.grapes();
        for grape in grapes {
            let mut status = grape.status();
            status.wait_for(|status| status.explored).await.unwrap();
        }
        let joined = |grape: usize| testnet.joining(Role::Peer, [&grapes[grape]]).spawn();
        let (server, client) = (joined(0).await.unwrap(), joined(23).await.unwrap());
        let service = server.announce(&name("client1")).await.unwrap();
        let stored = || {
            grapes
                .iter()
                .map(|grape| grape.metrics().stored)
                .sum::<u64>()
        };
        // The closest twenty, and perhaps the one that it has joined by.
        while stored() < 20 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let live = client.lookup(&name("client1")).await.unwrap();
        assert_eq!(live[0].peer, server.peer_id());
        service.withdraw().await;
        while stored() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_lookup_in_a_small_network_needs_no_kademlia() {
    in_time(async {
        let testnet = Testnet::new(2).await.unwrap();
        let (server, client) = (testnet.peer().await.unwrap(), testnet.peer().await.unwrap());
        echo(&server, "client1").await;
        // Once it has looked around, which Kademlia does not announce.
        loop {
            let before = client.metrics();
            client.lookup(&name("client1")).await.unwrap();
            let after = client.metrics();
            if after.kademlia_requests == before.kademlia_requests {
                assert_eq!(after.names_requests - before.names_requests, 2);
                break;
            }
        }
        let before = client.metrics();
        client.lookup(&name("nobody")).await.unwrap_err();
        let after = client.metrics();
        assert_eq!(after.kademlia_requests, before.kademlia_requests);
    })
    .await;
}

#[tokio::test]
async fn a_grape_that_joins_later_is_told_of_every_name() {
    in_time(async {
        let first = on(Role::Grape, TCP, &[]).spawn().await.unwrap();
        let server = on(Role::Peer, TCP, &[&first]).spawn().await.unwrap();
        let names: Vec<_> = (0..50).map(|n| name(&format!("name{n}"))).collect();
        let announced = names.iter().map(|name| server.announce(name));
        let _services = futures::future::try_join_all(announced).await.unwrap();
        let second = on(Role::Grape, TCP, &[&first]).spawn().await.unwrap();
        let client = on(Role::Peer, TCP, &[&second]).spawn().await.unwrap();
        all_store(&[first.clone(), second.clone()], 50).await;
        for name in &names {
            client.lookup(name).await.unwrap();
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_a_whole_directory_outlive_their_lease_and_go_with_their_peer() {
    in_time(async {
        // With a lease this short, more of them would come faster than a grape takes names of one peer.
        const NAMES: u64 = 3_500;
        let grape = || on(Role::Grape, TCP, &[]).lease(2 * MIN_LEASE);
        let first = grape().spawn().await.unwrap();
        let second = grape().bootstrap(first.addresses()).spawn().await.unwrap();
        let server = on(Role::Peer, TCP, &[&first]).spawn().await.unwrap();
        let names: Vec<_> = (0..NAMES).map(|n| name(&format!("name{n}"))).collect();
        let services = futures::stream::iter(&names)
            .map(|name| server.announce(name))
            .buffer_unordered(1_000)
            .map(Result::unwrap)
            .collect::<Vec<_>>()
            .await;
        all_store(&[first.clone(), second.clone()], NAMES).await;
        // Another peer's name that is not renewed shows that a lease has passed.
        for _ in 0..2 {
            let killed = Killable::spawn(on(Role::Peer, TCP, &[&second]));
            killed.echo("killed").await;
            drop(killed);
            all_store(&[first.clone(), second.clone()], NAMES).await;
        }
        drop(services);
        all_store(&[first, second], 0).await;
    })
    .await;
}

#[tokio::test]
async fn dropping_the_service_or_the_announcement_takes_the_name_back() {
    in_time(async {
        let testnet = Testnet::new(1).await.unwrap();
        let (server, client) = (testnet.peer().await.unwrap(), testnet.peer().await.unwrap());
        let service = server.announce(&name("client1")).await.unwrap();
        assert_eq!(
            server.announce(&name("client1")).await.unwrap_err(),
            AnnounceError::AlreadyAnnounced(name("client1"))
        );
        drop(service);
        let error = client.lookup(&name("client1")).await.unwrap_err();
        assert_eq!(error, LookupError::NotFound(name("client1")));
        // At once again, before the loop can have seen the drop.
        drop(server.announce(&name("client1")).await.unwrap());
        let _service = server.announce(&name("client1")).await.unwrap();
        client.lookup(&name("client1")).await.unwrap();

        // A grape that is not there: the announcement waits, and is given up.
        let waiting = on(Role::Peer, TCP, &[])
            .bootstrap([address("/ip4/127.0.0.1/tcp/1")])
            .spawn()
            .await
            .unwrap();
        for _ in 0..2 {
            let name = name("client2");
            let waited = timeout(Duration::from_millis(50), waiting.announce(&name)).await;
            // The second time it would be announced already, had the first not been given up.
            assert!(waited.is_err(), "announced without a grape, or refused");
        }
    })
    .await;
}

#[tokio::test]
async fn a_peer_is_not_taken_for_a_grape() {
    in_time(async {
        for listen in [TCP, QUIC] {
            let peer = on(Role::Peer, listen, &[]).spawn().await.unwrap();
            let lost = on(Role::Peer, listen, &[&peer]).spawn().await.unwrap();
            let expected = NoGrape {
                tried: vec![(peer.addresses()[0].clone(), DialFailure::NotAGrape)],
            };
            assert_eq!(
                lost.announce(&name("client1")).await.unwrap_err(),
                AnnounceError::NoGrape(expected.clone())
            );
            assert_eq!(
                lost.lookup(&name("client1")).await.unwrap_err(),
                LookupError::NoGrape(expected)
            );
            assert!(!lost.status().borrow().is_online());
        }
    })
    .await;
}

#[tokio::test]
async fn what_cannot_be_announced_says_why() {
    in_time(async {
        let testnet = Testnet::new(1).await.unwrap();
        let silent = Node::builder(Role::Peer)
            .bootstrap(testnet.grapes()[0].addresses())
            .spawn()
            .await
            .unwrap();
        assert_eq!(
            silent.announce(&name("client1")).await.unwrap_err(),
            AnnounceError::NotListening
        );
        let alone = on(Role::Peer, TCP, &[]).spawn().await.unwrap();
        assert!(matches!(
            alone.announce(&name("client1")).await.unwrap_err(),
            AnnounceError::NoGrape(_)
        ));
        let error = alone.lookup(&name("client1")).await.unwrap_err();
        assert!(matches!(error, LookupError::NoGrape(_)), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_port_in_use_is_a_clear_error() {
    in_time(async {
        let first = on(Role::Grape, TCP, &[]).spawn().await.unwrap();
        let text = first.addresses()[0].to_string();
        let taken = text.split("/p2p/").next().unwrap();
        let error = on(Role::Grape, taken, &[]).spawn().await.unwrap_err();
        let SpawnError::Listen { address, reason } = &error else {
            panic!("{error}");
        };
        assert_eq!(address.to_string(), taken);
        assert!(reason.contains("another program uses this port"), "{error}");
    })
    .await;
}

#[tokio::test]
async fn requests_spread_over_all_providers_and_broadcast_reaches_each() {
    in_time(async {
        let testnet = Testnet::new(2).await.unwrap();
        let client = testnet.peer().await.unwrap();
        let mut servers = Vec::new();
        for _ in 0..5 {
            let server = testnet.peer().await.unwrap();
            echo(&server, "client1").await;
            servers.push(server.peer_id());
        }
        client.lookup(&name("client1")).await.unwrap();
        let mut counts: HashMap<PeerId, usize> = HashMap::new();
        for _ in 0..200 {
            let reply = client.request(&name("client1"), "hello").await.unwrap();
            *counts.entry(reply.provider).or_default() += 1;
        }
        assert_eq!(counts.len(), 5, "{counts:?}");
        // Fair would be 40 each.
        assert!(counts.values().all(|count| *count >= 10), "{counts:?}");
        let replies: Vec<Reply> = client
            .broadcast(&name("client1"), "all")
            .map(Result::unwrap)
            .collect()
            .await;
        let mut answered: Vec<_> = replies.iter().map(|reply| reply.provider).collect();
        answered.sort();
        servers.sort();
        assert_eq!(answered, servers);
    })
    .await;
}

/// Who wants all waits for who stands still; who wants some does not, also beside it.
#[tokio::test(flavor = "multi_thread")]
async fn a_broadcast_waits_for_all_who_are_named_and_tells_whom_it_did_not_reach() {
    in_time(async {
        let grape = on(Role::Grape, TCP, &[]).spawn().await.unwrap();
        let [quick, slow] = [(); 2].map(|()| Killable::spawn(on(Role::Peer, TCP, &[&grape])));
        for server in [&quick, &slow] {
            server.echo("client1").await;
        }
        let ids = [quick.node.peer_id(), slow.node.peer_id()];
        let options = |seconds| RequestOptions {
            deadline: Duration::from_secs(seconds),
            ..RequestOptions::default()
        };
        let client = on(Role::Peer, TCP, &[&grape]).spawn().await.unwrap();
        let going_on = slow.stop();
        let mut replies = client.broadcast_with(&name("client1"), "all", options(60));
        let first = replies.next().await.unwrap().unwrap();
        assert_eq!(first.provider, ids[0]);
        let some = client.lookup(&name("client1")).await.unwrap();
        assert_eq!(some.len(), 1, "{some:?}");
        drop(going_on);
        let second = replies.next().await.unwrap().unwrap();
        assert_eq!(second.provider, ids[1]);
        assert!(replies.next().await.is_none());

        let client = on(Role::Peer, TCP, &[&grape]).spawn().await.unwrap();
        let _going_on = slow.stop();
        let replies = client.broadcast_with(&name("client1"), "all", options(2));
        let replies: Vec<_> = replies.collect().await;
        let unreached = RequestError::Unreached {
            name: name("client1"),
            provider: ids[1],
        };
        assert_eq!(replies.len(), 2, "{replies:?}");
        assert_eq!(replies[0].as_ref().unwrap().provider, ids[0]);
        assert_eq!(replies[1], Err(unreached));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_killed_in_mid_run_costs_no_request_that_may_be_retried() {
    in_time(async {
        let grape = on(Role::Grape, TCP, &[]).spawn().await.unwrap();
        let mut servers = Vec::new();
        for _ in 0..2 {
            let server = Killable::spawn(on(Role::Peer, TCP, &[&grape]));
            server.echo("client1").await;
            servers.push(server);
        }
        let client = on(Role::Peer, TCP, &[&grape]).spawn().await.unwrap();
        assert_eq!(client.lookup(&name("client1")).await.unwrap().len(), 2);
        let options = RequestOptions {
            delivery: Delivery::AtLeastOnce,
            ..RequestOptions::default()
        };
        let mut servers = servers.into_iter();
        for number in 0..300 {
            if number == 100 {
                drop(servers.next());
            }
            let text = number.to_string();
            let reply = client
                .request_with(&name("client1"), text.clone(), options.clone())
                .await
                .unwrap();
            assert_eq!(reply.text().unwrap(), format!("Echo: {text}"));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_peer_is_not_live_and_leaves_the_store_with_its_lease() {
    in_time(async {
        let grape = on(Role::Grape, TCP, &[])
            .lease(MIN_LEASE)
            .spawn()
            .await
            .unwrap();
        let server = Killable::spawn(on(Role::Peer, TCP, &[&grape]));
        server.echo("client1").await;
        let client = on(Role::Peer, TCP, &[&grape]).spawn().await.unwrap();
        client.request(&name("client1"), "hello").await.unwrap();
        drop(server);
        let error = client.lookup(&name("client1")).await.unwrap_err();
        let unreachable = LookupError::Unreachable {
            name: name("client1"),
            providers: 1,
        };
        assert!(
            error == unreachable || error == LookupError::NotFound(name("client1")),
            "{error}"
        );
        while grape.metrics().stored > 0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let error = client.lookup(&name("client1")).await.unwrap_err();
        assert_eq!(error, LookupError::NotFound(name("client1")));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_stay_reachable_when_their_grape_is_killed() {
    in_time(async {
        let second = on(Role::Grape, TCP, &[]).spawn().await.unwrap();
        let first = Killable::spawn(on(Role::Grape, TCP, &[&second]));
        first
            .node
            .status()
            .wait_for(Status::is_online)
            .await
            .unwrap();
        let server = on(Role::Peer, TCP, &[&first.node]).spawn().await.unwrap();
        echo(&server, "client1").await;
        // Kademlia takes it to the other grape in the background.
        while second.metrics().stored == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        drop(first);
        let client = on(Role::Peer, TCP, &[&second]).spawn().await.unwrap();
        client.request(&name("client1"), "hello").await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grape_that_comes_late_or_again_is_found_by_its_peers() {
    in_time(async {
        let identity = Identity::generate();
        // A port that is free now.
        let probe = on(Role::Grape, TCP, &[]).spawn().await.unwrap();
        let text = probe.addresses()[0].to_string();
        let listen = text.split("/p2p/").next().unwrap().to_owned();
        probe.shutdown().await;

        let peer = || {
            Node::builder(Role::Peer)
                .listen([address(TCP)])
                .bootstrap([address(&listen)])
        };
        let server = peer().spawn().await.unwrap();
        let announced = tokio::spawn({
            let server = server.clone();
            async move { echo(&server, "client1").await }
        });
        let mut status = server.status();
        let failed = |status: &Status| status.bootstrap[0].last_failure.is_some();
        status.wait_for(failed).await.unwrap();

        let grape = || on(Role::Grape, &listen, &[]).identity(identity.clone());
        let first = Killable::spawn(grape());
        announced.await.unwrap();
        let client = peer().spawn().await.unwrap();
        client.request(&name("client1"), "hello").await.unwrap();
        drop(first);

        status.wait_for(|status| !status.is_online()).await.unwrap();
        let again = spawn_when_free(grape).await;
        assert_eq!(again.peer_id(), identity.peer_id());
        status.wait_for(Status::is_online).await.unwrap();
        while again.metrics().stored == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let late = peer().spawn().await.unwrap();
        late.request(&name("client1"), "hello").await.unwrap();
    })
    .await;
}

/// The system may take a moment to free the port of a killed node.
async fn spawn_when_free(builder: impl Fn() -> Builder) -> Node {
    loop {
        match builder().spawn().await {
            Ok(node) => return node,
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

#[tokio::test]
async fn a_request_that_is_dropped_or_whose_handler_panics_is_answered() {
    in_time(async {
        let testnet = Testnet::new(1).await.unwrap();
        let (server, client) = (testnet.peer().await.unwrap(), testnet.peer().await.unwrap());
        let service = server.announce(&name("client1")).await.unwrap();
        tokio::spawn(service.serve(|request| async move {
            match request.text().unwrap() {
                "drop" => drop(request),
                "panic" => panic!("as the test wants"),
                "fail" => request.fail("no luck"),
                "refuse" => request.refuse("no sense"),
                _ => request.reply("ok"),
            }
        }));
        for (text, code) in [
            ("drop", ErrorCode::HandlerFailed),
            ("panic", ErrorCode::HandlerFailed),
            ("fail", ErrorCode::HandlerFailed),
            ("refuse", ErrorCode::BadRequest),
        ] {
            let RequestError::Remote { provider, error } =
                client.request(&name("client1"), text).await.unwrap_err()
            else {
                panic!("{text} is not answered by the remote");
            };
            assert_eq!((provider, error.code), (server.peer_id(), code), "{text}");
        }
        client.request(&name("client1"), "ok").await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_slow_handler_delays_no_other_request() {
    in_time(async {
        let testnet = Testnet::new(1).await.unwrap();
        let (server, client) = (testnet.peer().await.unwrap(), testnet.peer().await.unwrap());
        let mut service = server.announce(&name("client1")).await.unwrap();
        let slow = tokio::spawn({
            let client = client.clone();
            async move { client.request(&name("client1"), "slow").await }
        });
        let held = service.next().await.unwrap();
        tokio::spawn(service.serve(|request| async move { request.reply("fast") }));
        for _ in 0..20 {
            let reply = client.request(&name("client1"), "fast").await.unwrap();
            assert_eq!(reply.text().unwrap(), "fast");
        }
        held.reply("at last");
        assert_eq!(slow.await.unwrap().unwrap().text().unwrap(), "at last");
    })
    .await;
}

#[tokio::test]
async fn a_deadline_ends_a_request_whose_handler_is_silent() {
    in_time(async {
        let testnet = Testnet::new(1).await.unwrap();
        let (server, client) = (testnet.peer().await.unwrap(), testnet.peer().await.unwrap());
        let _silent = server.announce(&name("client1")).await.unwrap();
        let options = RequestOptions {
            deadline: Duration::from_millis(100),
            ..RequestOptions::default()
        };
        let error = client
            .request_with(&name("client1"), "hello", options)
            .await
            .unwrap_err();
        assert_eq!(error, RequestError::TimedOut(name("client1")));
        assert!(!error.is_retryable(), "it may have run");
    })
    .await;
}

#[tokio::test]
async fn payloads_up_to_the_limit_are_carried_and_larger_ones_refused() {
    in_time(async {
        let testnet = Testnet::new(1).await.unwrap();
        let (server, client) = (testnet.peer().await.unwrap(), testnet.peer().await.unwrap());
        let service = server.announce(&name("client1")).await.unwrap();
        tokio::spawn(service.serve(|request| async move {
            let len = request.payload().len();
            request.reply(vec![7; len + usize::from(len == MAX_PAYLOAD - 1) * 2]);
        }));
        for len in [0, 1, 65_536, MAX_PAYLOAD] {
            let reply = client
                .request(&name("client1"), vec![1; len])
                .await
                .unwrap();
            assert_eq!(reply.payload.len(), len);
        }
        let error = client
            .request(&name("client1"), vec![1; MAX_PAYLOAD + 1])
            .await
            .unwrap_err();
        let (len, max) = (MAX_PAYLOAD + 1, MAX_PAYLOAD);
        assert_eq!(error, RequestError::TooLarge { len, max });
        let error = client
            .request(&name("client1"), vec![1; MAX_PAYLOAD - 1])
            .await
            .unwrap_err();
        let code = ErrorCode::TooLarge;
        assert!(matches!(&error, RequestError::Remote { error, .. } if error.code == code));
    })
    .await;
}

#[tokio::test]
async fn a_busy_provider_is_passed_over_and_all_busy_is_an_error() {
    in_time(async {
        let testnet = Testnet::new(1).await.unwrap();
        let limits = Limits {
            inbound_requests: 1,
            memory: None,
            ..Limits::default()
        };
        let (busy, free, client) = (
            testnet
                .builder(Role::Peer)
                .limits(limits)
                .spawn()
                .await
                .unwrap(),
            testnet.peer().await.unwrap(),
            testnet.peer().await.unwrap(),
        );
        let mut service = busy.announce(&name("client1")).await.unwrap();
        let first = tokio::spawn({
            let client = client.clone();
            async move { client.request(&name("client1"), "first").await }
        });
        let held = service.next().await.unwrap();
        let error = client
            .request(&name("client1"), "second")
            .await
            .unwrap_err();
        assert_eq!(error, RequestError::Busy(name("client1")));
        assert!(error.is_retryable());
        echo(&free, "client1").await;
        let reply = client.request(&name("client1"), "third").await.unwrap();
        assert_eq!(reply.provider, free.peer_id());
        held.reply("done");
        first.await.unwrap().unwrap();
    })
    .await;
}

#[tokio::test]
async fn the_first_request_for_a_name_goes_on_to_a_provider_that_answers_later() {
    in_time(async {
        let grape = on(Role::Grape, TCP, &[]).spawn().await.unwrap();
        let limits = Limits {
            inbound_requests: 1,
            ..Limits::default()
        };
        let busy = on(Role::Peer, TCP, &[&grape]).limits(limits);
        let busy = busy.spawn().await.unwrap();
        let mut service = busy.announce(&name("client1")).await.unwrap();
        let ask = |text: &'static str| {
            let client = on(Role::Peer, TCP, &[&grape]);
            tokio::spawn(async move {
                let client = client.spawn().await.unwrap();
                client.request(&name("client1"), text).await
            })
        };
        let first = ask("first");
        let held = service.next().await.unwrap();
        let late = Killable::spawn(on(Role::Peer, TCP, &[&grape]));
        late.echo("client1").await;
        let stopped = late.stop();
        let second = ask("second");
        while busy.metrics().requests_refused == 0 {
            tokio::task::yield_now().await;
        }
        drop(stopped);
        let reply = second.await.unwrap().unwrap();
        assert_eq!(reply.provider, late.node.peer_id());
        held.reply("done");
        first.await.unwrap().unwrap();
    })
    .await;
}

#[tokio::test]
async fn shutting_down_withdraws_answers_what_is_open_and_closes() {
    in_time(async {
        let testnet = Testnet::new(1).await.unwrap();
        let (server, client) = (testnet.peer().await.unwrap(), testnet.peer().await.unwrap());
        let mut service = server.announce(&name("client1")).await.unwrap();
        let ask = |text: &'static str| {
            let client = client.clone();
            tokio::spawn(async move { client.request(&name("client1"), text).await })
        };
        // The first ones have streams of their own; then there is one that is kept.
        for _ in 0..20 {
            let asked = ask("before");
            service.next().await.unwrap().reply("answered");
            asked.await.unwrap().unwrap();
        }
        let open = ask("open");
        let held = service.next().await.unwrap();
        let (closing, closed) = oneshot::channel();
        tokio::spawn({
            let server = server.clone();
            async move {
                server.shutdown().await;
                closing.send(()).unwrap();
            }
        });
        assert!(service.next().await.is_none(), "the service ends");
        held.reply("in time");
        assert_eq!(open.await.unwrap().unwrap().text().unwrap(), "in time");
        closed.await.unwrap();
        let error = client.lookup(&name("client1")).await.unwrap_err();
        assert_eq!(error, LookupError::NotFound(name("client1")));
        assert_eq!(
            server.lookup(&name("x")).await.unwrap_err(),
            LookupError::Closed
        );
        assert_eq!(
            server.announce(&name("x")).await.unwrap_err(),
            AnnounceError::Closed
        );
        server.shutdown().await;
    })
    .await;
}

#[tokio::test]
async fn many_names_of_one_node_are_all_found_and_all_taken_back() {
    in_time(async {
        let testnet = Testnet::new(2).await.unwrap();
        let (server, client) = (testnet.peer().await.unwrap(), testnet.peer().await.unwrap());
        let (sender, mut services) = mpsc::channel(300);
        for number in 0..300 {
            let (server, sender) = (server.clone(), sender.clone());
            tokio::spawn(async move {
                let service = server
                    .announce(&name(&format!("name{number}")))
                    .await
                    .unwrap();
                sender.send(service).await.unwrap();
            });
        }
        let mut held = Vec::new();
        while held.len() < 300 {
            held.push(services.recv().await.unwrap());
        }
        let lookups = (0..300).map(|number| {
            let client = client.clone();
            async move { client.lookup(&name(&format!("name{number}"))).await }
        });
        for found in futures::future::join_all(lookups).await {
            assert_eq!(found.unwrap()[0].peer, server.peer_id());
        }
        server.shutdown().await;
        stored(&testnet, 0).await;
    })
    .await;
}

#[tokio::test]
async fn blocked_and_uninvited_peers_are_not_let_in() {
    in_time(async {
        let open = on(Role::Grape, TCP, &[]).spawn().await.unwrap();
        let peer = on(Role::Peer, TCP, &[&open]).spawn().await.unwrap();
        let mut status = peer.status();
        status.wait_for(Status::is_online).await.unwrap();
        open.block(peer.peer_id()).await;
        status.wait_for(|status| !status.is_online()).await.unwrap();
        open.unblock(peer.peer_id()).await;
        status.wait_for(Status::is_online).await.unwrap();

        let invited = Identity::generate();
        let private = on(Role::Grape, TCP, &[])
            .allow_only([invited.peer_id()])
            .spawn()
            .await
            .unwrap();
        let guest = on(Role::Peer, TCP, &[&private])
            .identity(invited)
            .spawn()
            .await
            .unwrap();
        guest.status().wait_for(Status::is_online).await.unwrap();
        let stranger = on(Role::Peer, TCP, &[&private]).spawn().await.unwrap();
        let error = stranger.lookup(&name("client1")).await.unwrap_err();
        assert!(
            matches!(error, LookupError::NoGrape(_) | LookupError::NotFound(_)),
            "{error}"
        );
    })
    .await;
}

#[tokio::test]
async fn one_port_serves_both_families() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        eprintln!("this machine has no IPv6: nothing to test");
        return;
    }
    in_time(async {
        let first = on(Role::Grape, TCP, &[]).spawn().await.unwrap();
        let text = first.addresses()[0].to_string();
        let port = text.split('/').nth(4).unwrap().to_owned();
        first.shutdown().await;
        let both = [
            format!("/ip4/0.0.0.0/tcp/{port}"),
            format!("/ip6/::/tcp/{port}"),
        ];
        let grape = spawn_when_free(|| {
            Node::builder(Role::Grape).listen(both.iter().map(|text| address(text)))
        })
        .await;
        let families = |family: &str| {
            let addresses = grape.addresses();
            addresses
                .iter()
                .any(|address| address.to_string().starts_with(family))
        };
        assert!(families("/ip4/"));
        assert!(families("/ip6/"));
    })
    .await;
}

/// The payload of one of a million requests: its number, and for some a lot more.
fn numbered(number: u32) -> Vec<u8> {
    let len = match number {
        _ if number.is_multiple_of(20_000) => 100 * 1024,
        _ if number.is_multiple_of(500) => 8 * 1024,
        _ => 8,
    };
    let mut payload = vec![0; len];
    payload[..4].copy_from_slice(&number.to_le_bytes());
    payload
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_million_requests_none_is_lost_or_run_twice_whoever_is_cancelled() {
    const REQUESTS: u32 = 1_000_000;
    let scenario = async {
        let grape = on(Role::Grape, TCP, &[]).spawn().await.unwrap();
        let server = on(Role::Peer, TCP, &[&grape]).spawn().await.unwrap();
        let client = on(Role::Peer, TCP, &[&grape]).spawn().await.unwrap();
        let service = server.announce(&name("client1")).await.unwrap();
        let runs: Arc<[AtomicU8]> = (0..REQUESTS).map(|_| AtomicU8::new(0)).collect();
        let counted = Arc::clone(&runs);
        tokio::spawn(service.serve(move |request| {
            let counted = Arc::clone(&counted);
            async move {
                let payload = request.payload().to_vec();
                let number = u32::from_le_bytes(payload[..4].try_into().unwrap());
                counted[number as usize].fetch_add(1, Ordering::Relaxed);
                // Replies overtake each other.
                if number.is_multiple_of(3) {
                    tokio::task::yield_now().await;
                }
                request.reply(payload);
            }
        }));
        let is_cancelled = |number: u32| number % 4 == 1;
        let callers = (0..4).map(|caller| {
            let client = client.clone();
            let requests = (caller..REQUESTS).step_by(4).map(move |number| {
                let client = client.clone();
                // Other callers are cancelled at other times.
                let number = number ^ (number >> 2 & 3);
                async move {
                    let (name, payload) = (name("client1"), numbered(number));
                    let request = client.request(&name, payload.clone());
                    if is_cancelled(number) {
                        // Dropped at some point of its way.
                        let time = Duration::from_micros((number % 2_000).into());
                        let _ = timeout(time, request).await;
                    } else {
                        assert_eq!(request.await.unwrap().payload, payload);
                    }
                }
            });
            tokio::spawn(
                futures::stream::iter(requests)
                    .buffer_unordered(64)
                    .collect::<()>(),
            )
        });
        for caller in callers.collect::<Vec<_>>() {
            caller.await.unwrap();
        }
        // What was cancelled gives its place back as well.
        while server.metrics().open_requests > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        for (number, runs) in (0..).zip(runs.iter()) {
            let runs = runs.load(Ordering::Relaxed);
            assert!(
                runs == 1 || runs == 0 && is_cancelled(number),
                "{number} ran {runs} times"
            );
        }
    };
    timeout(Duration::from_secs(300), scenario)
        .await
        .expect("the scenario hangs");
}

#[tokio::test]
async fn a_peer_that_asks_much_at_once_makes_another_one_wait_for_one_request() {
    const MANY: u64 = 300;
    in_time(async {
        let grape = on(Role::Grape, TCP, &[]).spawn().await.unwrap();
        let server = on(Role::Peer, TCP, &[&grape]).spawn().await.unwrap();
        let greedy = on(Role::Peer, TCP, &[&grape]).spawn().await.unwrap();
        let modest = on(Role::Peer, TCP, &[&grape]).spawn().await.unwrap();
        let mut service = server.announce(&name("client1")).await.unwrap();
        let ask = |node: &Node| {
            let node = node.clone();
            tokio::spawn(async move { node.request(&name("client1"), "hello").await })
        };
        let received = async |count| {
            while server.metrics().requests_received < count {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let mut asked: Vec<_> = (0..MANY).map(|_| ask(&greedy)).collect();
        received(MANY).await;
        let first = service.next().await.unwrap();
        asked.push(ask(&modest));
        received(MANY + 1).await;
        first.reply("hello");
        let mut order = Vec::new();
        for _ in 0..MANY {
            let request = service.next().await.unwrap();
            order.push(request.peer());
            request.reply("hello");
        }
        let place = order.iter().position(|from| *from == modest.peer_id());
        assert!(place.unwrap() <= 1, "{place:?}");
        for reply in asked {
            reply.await.unwrap().unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn a_name_announced_again_at_once_is_found() {
    in_time(async {
        let testnet = Testnet::new(2).await.unwrap();
        let (server, client) = (testnet.peer().await.unwrap(), testnet.peer().await.unwrap());
        let names: Vec<_> = (0..100)
            .map(|number| name(&format!("name{number}")))
            .collect();
        let announce_all =
            || futures::future::try_join_all(names.iter().map(|name| server.announce(name)));
        drop(announce_all().await.unwrap());
        let _services = announce_all().await.unwrap();
        for name in &names {
            client.lookup(name).await.unwrap();
        }
        // Given up while its registration is under way, and announced again.
        for number in 0..30 {
            let name = name(&format!("hasty{number}"));
            let _ = timeout(Duration::from_micros(number * 50), server.announce(&name)).await;
            let _service = server.announce(&name).await.unwrap();
            client.lookup(&name).await.unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn a_provider_whose_connection_broke_is_called_again() {
    in_time(async {
        let testnet = Testnet::new(1).await.unwrap();
        let (server, client) = (testnet.peer().await.unwrap(), testnet.peer().await.unwrap());
        echo(&server, "client1").await;
        let provider = client.lookup(&name("client1")).await.unwrap().remove(0);
        let mut status = client.status();
        for direct in [false, true] {
            client.request(&name("client1"), "before").await.unwrap();
            client.block(server.peer_id()).await;
            status.wait_for(|status| status.peers == 1).await.unwrap();
            client.unblock(server.peer_id()).await;
            let options = RequestOptions::default();
            if direct {
                client
                    .request_to(provider.peer, &name("client1"), "after", options)
                    .await
                    .unwrap();
            } else {
                client.request(&name("client1"), "after").await.unwrap();
            }
        }
    })
    .await;
}
