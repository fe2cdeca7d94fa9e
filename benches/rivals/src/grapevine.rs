//! Grapevine through its public API: requests to an announced name.

use grapevine::{Multiaddr, Node, Role, ServiceName};

use crate::load::{Caller, Client, Latencies, Load, send_with};

/// Serves echoes; returns where.
pub(crate) async fn serve(listen: &str) -> String {
    let node = Node::builder(Role::Grape)
        .listen([address(listen)])
        .spawn()
        .await
        .expect("loopback can be listened on");
    let mut service = node.announce(&echo()).await.expect("the name is free");
    tokio::spawn(async move {
        while let Some(request) = service.next().await {
            let payload = request.payload().to_vec();
            request.reply(payload);
        }
    });
    let address = node.addresses().first().map(Multiaddr::to_string);
    address.expect("it listens")
}

pub(crate) async fn connect(server: &str) -> impl Client {
    let node = Node::builder(Role::Peer)
        .bootstrap([address(server)])
        .spawn()
        .await;
    Requests(node.expect("a client needs no address"))
}

struct Requests(Node);

struct Request {
    node: Node,
    name: ServiceName,
    payload: Vec<u8>,
}

impl Client for Requests {
    async fn send(&mut self, load: Load) -> Latencies {
        let caller = |_| Request {
            node: self.0.clone(),
            name: echo(),
            payload: vec![b'x'; load.bytes],
        };
        send_with((0..load.in_flight).map(caller), load).await.0
    }
}

impl Caller for Request {
    async fn call(&mut self) -> usize {
        let reply = self.node.request(&self.name, self.payload.clone()).await;
        reply.expect("the server answers").payload.len()
    }
}

fn echo() -> ServiceName {
    "echo".parse().expect("a name")
}

fn address(text: &str) -> Multiaddr {
    text.parse().expect("an address")
}
