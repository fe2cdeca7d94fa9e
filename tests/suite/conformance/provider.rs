//! A provider of each stock library that announced itself once, by Kademlia: it is sent no more at once
//! than it takes, and found as long as it lives.

use std::time::Duration;

use futures::future::join_all;
use grapevine::limits::MIN_LEASE;
use grapevine::{Node, Role, ServiceName};
use tokio::time::{Instant, timeout};

use super::driver::{self, Driver, Library};

/// A provider has been tried out within this, however busy the machine.
const DEADLINE: Duration = Duration::from_secs(120);

/// A grape with the shortest lease, a provider at it, and a peer that looks it up.
struct Scene {
    grape: Node,
    provider: Driver,
    peer: Node,
    name: ServiceName,
}

impl Scene {
    async fn new(library: Library) -> Self {
        let any_port = || ["/ip4/127.0.0.1/tcp/0".parse().unwrap()];
        let grape = Node::builder(Role::Grape).listen(any_port());
        let grape = grape.lease(MIN_LEASE).spawn().await.unwrap();
        let address = grape.addresses()[0].to_string();
        let mut provider = Driver::start(library, "tcp", &address).await;
        let name: ServiceName = format!("{}-once", library.name()).parse().unwrap();
        let served = provider.ask(&["serve", name.as_ref(), "kademlia"]).await;
        assert_eq!(served.exit, 0, "{library:?}: {:?}", served.lines);
        while grape.metrics().stored == 0 {
            tokio::task::yield_now().await;
        }
        let peer = Node::builder(Role::Peer).bootstrap(grape.addresses());
        let peer = peer.spawn().await.unwrap();
        Self {
            grape,
            provider,
            peer,
            name,
        }
    }
}

async fn of_each(test: impl AsyncFn(Scene)) {
    if !driver::are_here() {
        return;
    }
    for library in [Library::Js, Library::Go, Library::Litep2p] {
        let tried = timeout(DEADLINE, async { test(Scene::new(library).await).await });
        tried.await.unwrap_or_else(|_| panic!("{library:?} hangs"));
    }
}

#[tokio::test]
async fn a_stock_provider_answers_as_many_requests_at_once_as_are_made() {
    of_each(async |scene| {
        for at_once in [48, 500] {
            let requests = (0..at_once).map(|_| scene.peer.request(&scene.name, "hello"));
            for reply in join_all(requests).await {
                let library = scene.provider.library;
                let reply = reply.unwrap_or_else(|error| panic!("{library:?}: {error}"));
                assert_eq!(reply.text().unwrap(), "Echo: hello");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_stock_provider_that_announced_once_is_found_as_long_as_it_lives() {
    of_each(async |scene| {
        let library = scene.provider.library;
        let ends = Instant::now() + 3 * MIN_LEASE;
        while Instant::now() < ends {
            let found = scene.peer.lookup(&scene.name).await;
            assert!(found.is_ok(), "{library:?}: {found:?}");
        }
        drop(scene.provider);
        while scene.grape.metrics().stored > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
