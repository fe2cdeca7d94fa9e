//! Networks of about as many grapes as are responsible for a name: each of its nodes may take it for a
//! small one or for a large one, and finds what any other announces.
//!
//! Real grapes with Grenache's API, over TCP on loopback. Those that are killed end as abruptly as in a
//! crash.

use std::net::SocketAddr;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use grapevine::gateway::{Config, Gateway};
use grapevine::{Multiaddr, Node, Role, Service, ServiceName, Status};
use serde_json::json;
use tokio::runtime::Runtime;
use tokio::time::timeout;

use crate::http::post;

const ANY: &str = "/ip4/127.0.0.1/tcp/0";

/// The lookups at once.
const AT_ONCE: usize = 32;

async fn in_time<T>(scenario: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(300), scenario)
        .await
        .expect("the scenario hangs")
}

/// A grape with Grenache's API, in a runtime of its own; dropping it is a crash.
struct Grape {
    node: Node,
    api: SocketAddr,
    /// What it announces beside workers.
    service: Option<Service>,
    runtime: Option<Runtime>,
}

impl Grape {
    async fn start(listen: Multiaddr, bootstrap: Vec<Multiaddr>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let started = runtime.spawn(async move {
            let node = loop {
                let builder = Node::builder(Role::Grape).bootstrap(bootstrap.clone());
                // The port of one that was killed is free a moment later.
                match builder.listen([listen.clone()]).spawn().await {
                    Ok(node) => break node,
                    Err(_) => tokio::task::yield_now().await,
                }
            };
            let config = Config {
                api: "127.0.0.1:0".parse().unwrap(),
                ..Config::default()
            };
            let gateway = Gateway::spawn(node.clone(), config).await.unwrap();
            let api = gateway.api_address();
            // It serves as long as the runtime.
            tokio::spawn(async move {
                let _gateway = gateway;
                std::future::pending::<()>().await
            });
            (node, api)
        });
        let (node, api) = started.await.unwrap();
        Self {
            node,
            api,
            service: None,
            runtime: Some(runtime),
        }
    }

    /// A worker and a name, both called after it.
    async fn announce(&mut self, port: u16) {
        let body = json!({"rid": "r", "data": [worker(port), port]}).to_string();
        assert_eq!(post(self.api, "/announce", &body).await.text(), "1");
        let name: ServiceName = peer(port).parse().unwrap();
        let node = self.node.clone();
        let runtime = self.runtime.as_ref().unwrap();
        let announced = runtime.spawn(async move { node.announce(&name).await.unwrap() });
        self.service = Some(announced.await.unwrap());
    }

    /// Returns when it finds the worker and the name.
    async fn finds(&self, port: u16) {
        let body = json!({"rid": "r", "data": worker(port)}).to_string();
        let expected = json!([format!("127.0.0.1:{port}")]).to_string();
        while post(self.api, "/lookup", &body).await.text() != expected {}
        let name: ServiceName = peer(port).parse().unwrap();
        while self.node.lookup(&name).await.is_err() {}
    }

    fn addresses(&self) -> Vec<Multiaddr> {
        self.node.addresses()
    }
}

impl Drop for Grape {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn worker(port: u16) -> String {
    format!("worker{port}")
}

fn peer(port: u16) -> String {
    format!("peer{port}")
}

/// An address without the id at its end.
fn place(node: &Node) -> Multiaddr {
    let mut address = node.addresses().swap_remove(0);
    address.pop();
    address
}

/// Of so many steps each looks at as many of all pairs, and all together at each pair.
const STEPS: usize = 3;

/// Grapes that join by the first two of them; each announces a worker and a name of its own number.
struct Net {
    grapes: Vec<(u16, Grape)>,
    last: u16,
    steps: usize,
}

impl Net {
    fn new() -> Self {
        Self {
            grapes: Vec::new(),
            last: 0,
            steps: 0,
        }
    }

    async fn grow(&mut self, to: usize) {
        while self.grapes.len() < to {
            self.start(ANY.parse().unwrap()).await;
        }
    }

    async fn start(&mut self, listen: Multiaddr) {
        let known = self.grapes.iter().take(2);
        let bootstrap: Vec<_> = known.flat_map(|(_, grape)| grape.addresses()).collect();
        let joins = !bootstrap.is_empty();
        let mut grape = Grape::start(listen, bootstrap).await;
        if joins {
            let mut status = grape.node.status();
            status.wait_for(Status::is_online).await.unwrap();
        }
        self.last += 1;
        grape.announce(self.last).await;
        self.grapes.push((self.last, grape));
    }

    /// Kills grapes that are no bootstrap grapes, the youngest first.
    fn shrink(&mut self, to: usize) {
        self.grapes.truncate(to);
    }

    /// Kills the youngest grape and starts another one in its place, with a key of its own.
    async fn restart(&mut self) {
        let (_, killed) = self.grapes.pop().unwrap();
        let at = place(&killed.node);
        drop(killed);
        self.start(at).await;
    }

    /// Returns when each grape finds what others announce, a third of them each time.
    async fn find_each_other(&mut self) {
        let mut finding = FuturesUnordered::new();
        for (index, (_, seeker)) in self.grapes.iter().enumerate() {
            let others = self.grapes.iter().enumerate();
            let others = others.filter(|(other, _)| *other != index);
            let its_turn = |other: usize| (other + index + self.steps).is_multiple_of(STEPS);
            for (_, (number, _)) in others.filter(|(other, _)| its_turn(*other)) {
                if finding.len() >= AT_ONCE {
                    finding.next().await;
                }
                finding.push(seeker.finds(*number));
            }
        }
        while finding.next().await.is_some() {}
        drop(finding);
        self.steps += 1;
    }
}

#[tokio::test]
async fn what_any_grape_announces_is_found_at_each_while_the_network_crosses_twenty() {
    in_time(async {
        let mut net = Net::new();
        for grapes in [18, 20, 21, 23] {
            net.grow(grapes).await;
            net.find_each_other().await;
        }
        for grapes in [20, 18] {
            net.shrink(grapes);
            net.find_each_other().await;
        }
    })
    .await;
}

#[tokio::test]
async fn what_any_grape_announces_is_found_at_each_beside_the_ghosts_of_others() {
    in_time(async {
        let mut net = Net::new();
        net.grow(17).await;
        for grapes in [18, 19, 20, 21] {
            net.grow(grapes).await;
            for _ in 0..4 {
                net.restart().await;
            }
            net.find_each_other().await;
        }
        net.shrink(18);
        net.find_each_other().await;
    })
    .await;
}

#[tokio::test]
async fn a_grape_that_is_restarted_again_and_again_is_known_once_and_found() {
    in_time(async {
        let mut net = Net::new();
        net.grow(2).await;
        for _ in 0..24 {
            net.restart().await;
        }
        for _ in 0..STEPS {
            net.find_each_other().await;
        }
        let known = |grape: &Grape| grape.node.metrics().grapes;
        for (_, grape) in &net.grapes {
            while known(grape) != 1 {
                tokio::task::yield_now().await;
            }
        }
    })
    .await;
}
