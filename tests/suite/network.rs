//! Announce, lookup and request, over a network in one process.

use std::time::Duration;

use grapevine::error::{LookupError, RequestError};
use grapevine::{Node, Role, ServiceName, Testnet};
use tokio::time::timeout;

fn name(text: &str) -> ServiceName {
    text.parse().unwrap()
}

/// No scenario takes longer than this, however busy the machine.
async fn in_time<T>(scenario: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(60), scenario)
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
async fn a_withdrawn_name_is_not_found() {
    in_time(async {
        let testnet = Testnet::new(2).await.unwrap();
        let (server, client) = (testnet.peer().await.unwrap(), testnet.peer().await.unwrap());
        let service = server.announce(&name("client1")).await.unwrap();
        client.lookup(&name("client1")).await.unwrap();
        service.withdraw().await;
        let error = client.lookup(&name("client1")).await.unwrap_err();
        assert_eq!(error, LookupError::NotFound(name("client1")));
    })
    .await;
}

#[tokio::test]
async fn a_peer_without_a_grape_is_told_so() {
    in_time(async {
        let alone = Node::builder(Role::Peer).spawn().await.unwrap();
        let error = alone.lookup(&name("client1")).await.unwrap_err();
        assert!(matches!(error, LookupError::NoGrape(_)), "{error}");
    })
    .await;
}
