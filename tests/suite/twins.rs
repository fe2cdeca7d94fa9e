//! Two running nodes with copies of one key: what one takes back stays announced by the other, and each
//! hears of the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use grapevine::{Identity, Multiaddr, Node, Role, ServiceName, Status};
use tokio::time::timeout;

/// The messages of a conversation.
const MESSAGES: usize = 70;

async fn in_time<T>(scenario: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(120), scenario)
        .await
        .expect("the scenario hangs")
}

fn any() -> Multiaddr {
    "/ip4/127.0.0.1/tcp/0".parse().unwrap()
}

fn name() -> ServiceName {
    "client1".parse().unwrap()
}

async fn grape() -> Node {
    let grape = Node::builder(Role::Grape).listen([any()]).spawn().await;
    grape.unwrap()
}

/// Announces the name and answers with its own.
async fn twin(identity: &Identity, grape: &Node, says: &'static str) -> Node {
    let node = Node::builder(Role::Peer)
        .identity(identity.clone())
        .listen([any()])
        .bootstrap(grape.addresses());
    let node = node.spawn().await.unwrap();
    let service = node.announce(&name()).await.unwrap();
    tokio::spawn(service.serve(move |request| async move { request.reply(says) }));
    node
}

/// What a node that has just started is answered.
async fn ask(grape: &Node) -> String {
    let caller = Node::builder(Role::Peer).bootstrap(grape.addresses());
    let caller = caller.spawn().await.unwrap();
    let reply = caller.request(&name(), "hello").await.unwrap();
    reply.text().unwrap().into()
}

#[tokio::test]
async fn whoever_stays_of_two_nodes_with_one_key_is_found_while_the_other_leaves() {
    in_time(async {
        let identity = Identity::generate();
        let grape = grape().await;
        for stays in ["old", "new"] {
            let old = twin(&identity, &grape, "old").await;
            let new = twin(&identity, &grape, "new").await;
            let (leaves, stay) = match stays {
                "old" => (new, old),
                _ => (old, new),
            };
            let left = Arc::new(AtomicBool::new(false));
            for message in 0..MESSAGES {
                if message == MESSAGES / 4 {
                    let (leaves, left) = (leaves.clone(), Arc::clone(&left));
                    tokio::spawn(async move {
                        leaves.shutdown().await;
                        left.store(true, Ordering::SeqCst);
                    });
                }
                let has_left = left.load(Ordering::SeqCst);
                let answer = ask(&grape).await;
                assert!(!has_left || answer == stays, "{message}: {answer}");
            }
            assert!(left.load(Ordering::SeqCst), "it has left meanwhile");
            stay.shutdown().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_conversation_with_the_one_that_leaves_goes_on_with_the_other() {
    in_time(async {
        let identity = Identity::generate();
        let grape = grape().await;
        let old = twin(&identity, &grape, "old").await;
        let caller = Node::builder(Role::Peer).bootstrap(grape.addresses());
        let caller = caller.spawn().await.unwrap();
        let ask = || async {
            let reply = caller.request(&name(), "hello").await.unwrap();
            reply.text().unwrap().to_owned()
        };
        assert_eq!(ask().await, "old");
        let _new = twin(&identity, &grape, "new").await;
        let leaving = tokio::spawn(async move { old.shutdown().await });
        while ask().await != "new" {}
        leaving.await.unwrap();
        assert_eq!(ask().await, "new");
    })
    .await;
}

#[tokio::test]
async fn each_of_two_nodes_with_one_key_hears_of_the_other_and_that_it_has_left() {
    in_time(async {
        let identity = Identity::generate();
        let grape = grape().await;
        let old = twin(&identity, &grape, "old").await;
        let new = twin(&identity, &grape, "new").await;
        for node in [&old, &new] {
            let mut status = node.status();
            let hears = |status: &Status| status.elsewhere;
            status.wait_for(hears).await.unwrap();
        }
        old.shutdown().await;
        let mut status = new.status();
        status.wait_for(|status| !status.elsewhere).await.unwrap();
    })
    .await;
}
