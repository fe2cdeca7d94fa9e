//! The services of Grenache's users, unmodified: Node programs on its packages, and our programs, by
//! two grapes, each on the other one than its partner.
//!
//! What Grenache does too runs on its own grapes as well, which shows that the tests are right.

mod grapes;
mod http;
mod node;
mod seed;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use grapes::{Grape, Maker, network};
use grapevine::{Node, Role, Service};
use http::Connection;
use node::Form;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::process::{Program, Run, in_time, run, run_other};

/// The most addresses that a lookup answers.
const SAMPLE: usize = 100;

/// Requests after which every one of a few providers has had one, but for once in 10^15 times.
const MANY: usize = 200;

/// Runs a scenario on our grapes, if there is a Node.
async fn with_node<F: Future<Output = ()>>(scenario: impl FnOnce() -> F) {
    if node::is_here() {
        in_time(scenario()).await;
    }
}

/// Runs a scenario on our grapes, and on Grenache's if there is a Node.
async fn on_both<F: Future<Output = ()>>(scenario: impl Fn(Maker) -> F) {
    in_time(scenario(Maker::Ours)).await;
    with_node(|| scenario(Maker::Grenache)).await;
}

/// As [`on_both`], where our grapes need a Node too.
async fn on_both_with_node<F: Future<Output = ()>>(scenario: impl Fn(Maker) -> F) {
    with_node(|| scenario(Maker::Ours)).await;
    with_node(|| scenario(Maker::Grenache)).await;
}

/// The program `peer`, when it has announced its name.
async fn peer(name: &str, grape: &Grape) -> Program {
    let listen = "/ip4/127.0.0.1/tcp/0";
    let given = [name, "--listen", listen, "--bootstrap", &grape.address()];
    let mut peer = Program::start("peer", &given);
    assert_eq!(peer.line().await, format!("announced {name}"));
    peer
}

/// One message by the program `chat`.
async fn send(grape: &Grape, name: &str, text: &str) -> Run {
    let by = ["--bootstrap", &grape.address(), "--timeout", "1"];
    run("chat", &[&by[..], &["--to", name, text]].concat()).await
}

/// A node in this process, so that a test decides how it answers.
async fn rust_node(grape: &Grape) -> Node {
    Node::builder(Role::Peer)
        .listen(["/ip4/127.0.0.1/tcp/0".parse().unwrap()])
        .bootstrap([grape.address().parse().unwrap()])
        .spawn()
        .await
        .unwrap()
}

async fn rust_service(node: &Node, name: &str) -> Service {
    node.announce(&name.parse().unwrap()).await.unwrap()
}

fn is_timeout(outcome: &Value) -> bool {
    ["ERR_TIMEOUT", "ERR_REQUEST_GENERIC: ESOCKETTIMEDOUT"].contains(&error(outcome))
}

#[track_caller]
fn error(outcome: &Value) -> &str {
    let error = outcome["error"].as_str();
    error.unwrap_or_else(|| panic!("no error: {outcome}"))
}

fn echo(text: &str) -> Value {
    json!({ "result": format!("Echo: {text}") })
}

#[tokio::test]
async fn a_node_client_calls_a_node_server_at_the_other_grape() {
    on_both_with_node(async |maker| {
        let [one, two] = network(maker, &[]).await;
        for transport in node::TRANSPORTS {
            for (here, there) in [(&one, &two), (&two, &one)] {
                let name = format!("{transport}-{}", here.url());
                let mut server = node::server(&name, here, transport, Form::Text).await;
                let outcomes = node::call(&name, there, transport, &["hello", "boom"]).await;
                assert_eq!(outcomes[0], echo("hello"));
                assert_eq!(error(&outcomes[1]), "something went wrong");
                for payload in ["hello", "boom"] {
                    let printed = json!({ "payload": payload }).to_string();
                    assert_eq!(server.program.line().await, printed);
                }
            }
            let absent = node::call("absent", &one, transport, &["hello"]).await;
            assert_eq!(absent, [json!({ "error": "ERR_GRAPE_LOOKUP_EMPTY" })]);
        }
    })
    .await;
}

#[tokio::test]
async fn a_node_client_waits_no_longer_for_a_node_server_than_it_wants_to() {
    on_both_with_node(async |maker| {
        let [one, two] = network(maker, &[]).await;
        for transport in node::TRANSPORTS {
            let name = format!("{transport}-server");
            let _server = node::server(&name, &one, transport, Form::Text).await;
            let late = node::call(&name, &two, transport, &["hang"]).await;
            assert!(is_timeout(&late[0]), "{late:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_node_client_calls_a_rust_peer_at_the_other_grape() {
    with_node(async || {
        let [one, two] = network(Maker::Ours, &[]).await;
        for (here, there) in [(&one, &two), (&two, &one)] {
            let name = format!("peer-{}", here.url());
            let mut peer = peer(&name, here).await;
            for transport in node::TRANSPORTS {
                let outcomes = node::call(&name, there, transport, &["hello", "again"]).await;
                assert_eq!(outcomes, [echo("hello"), echo("again")], "{transport}");
                for text in ["hello", "again"] {
                    let printed = peer.line().await;
                    assert!(printed.ends_with(&format!(": {text}")), "{printed}");
                }
            }
        }
    })
    .await;
}

/// One message by the program `chat`, signed.
async fn send_signed(grape: &Grape, name: &str, text: &str) -> Run {
    let by = ["--bootstrap", &grape.address(), "--timeout", "1"];
    run(
        "chat",
        &[&by[..], &["--name", "ann", "--to", name, text]].concat(),
    )
    .await
}

#[tokio::test]
async fn chat_reaches_a_node_chat_at_the_other_grape() {
    with_node(async || {
        let [one, two] = network(Maker::Ours, &[]).await;
        for transport in node::TRANSPORTS {
            for (here, there) in [(&one, &two), (&two, &one)] {
                let name = format!("{transport}-{}", here.url());
                let mut server = node::server(&name, here, transport, Form::Chat).await;
                for text in ["hello", "grüß dich \u{1f347}", "two\nlines"] {
                    let chats = [
                        ("", send(there, &name, text).await),
                        ("ann", send_signed(there, &name, text).await),
                    ];
                    for (from, chat) in chats {
                        // Further lines of a reply are indented.
                        let shown = text.replace('\n', "\n  ");
                        assert_eq!(chat.stdout, format!("Echo: {shown}\n"), "{chat:?}");
                        assert_eq!(chat.code, Some(0));
                        let printed = server.program.line().await;
                        let printed: Value = serde_json::from_str(&printed).unwrap();
                        let message = &printed["payload"];
                        assert_eq!(
                            (&message["message"], &message["from"]),
                            (&json!(text), &json!(from))
                        );
                        let id = message["id"].as_str().unwrap();
                        assert!(
                            id.len() == 32 && u128::from_str_radix(id, 16).is_ok(),
                            "{id}"
                        );
                        assert!(message["sent_at"].as_u64().is_some(), "{message}");
                        assert_eq!(message.as_object().unwrap().len(), 4);
                    }
                }
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_node_chat_reaches_people_and_peers_at_the_other_grape() {
    with_node(async || {
        let [one, two] = network(Maker::Ours, &[]).await;
        let mut peer = peer("client1", &one).await;
        let given = [
            "--name",
            "ann",
            "--listen",
            "/ip4/127.0.0.1/tcp/0",
            "--bootstrap",
        ];
        let mut ann = Program::start("chat", &[&given[..], &[&one.address()]].concat());
        ann.says("announced ann").await;
        for transport in node::TRANSPORTS {
            let texts = ["hello", "grüß dich \u{1f347}"];
            let outcomes = node::call_in(Form::Chat, "client1", &two, transport, &texts).await;
            assert_eq!(outcomes, texts.map(echo), "{transport}");
            let outcomes = node::call_in(Form::Chat, "ann", &two, transport, &texts).await;
            for outcome in outcomes {
                assert_eq!(outcome["error"], Value::Null, "{outcome}");
            }
            for text in texts {
                for program in [&mut peer, &mut ann] {
                    let printed = program.line().await;
                    assert!(printed.ends_with(&format!(": {text}")), "{printed}");
                }
            }
        }
    })
    .await;
}

#[tokio::test]
async fn requests_in_rust_reach_a_node_server_as_strings() {
    with_node(async || {
        let [one, two] = network(Maker::Ours, &[]).await;
        let client = rust_node(&two).await;
        for transport in node::TRANSPORTS {
            let mut server = node::server(transport, &one, transport, Form::Text).await;
            let name = transport.parse().unwrap();
            for text in ["hello", "two\nlines"] {
                let reply = client.request(&name, text).await.unwrap();
                assert_eq!(reply.text().unwrap(), format!("Echo: {text}"));
                let printed = server.program.line().await;
                assert_eq!(printed, json!({ "payload": text }).to_string());
            }
        }
    })
    .await;
}

#[tokio::test]
async fn errors_and_time_outs_of_node_servers_are_told_by_chat() {
    with_node(async || {
        let [one, two] = network(Maker::Ours, &[]).await;
        for transport in node::TRANSPORTS {
            let name = format!("{transport}-server");
            let _server = node::server(&name, &one, transport, Form::Chat).await;
            let failed = send(&two, &name, "boom").await;
            assert_eq!(failed.code, Some(7), "{failed:?}");
            assert!(failed.stderr.contains("something went wrong"), "{failed:?}");
            let silent = send(&two, &name, "hang").await;
            assert_eq!(silent.code, Some(5), "{silent:?}");
        }
        let absent = send(&two, "absent", "hello").await;
        assert_eq!(absent.code, Some(3), "{absent:?}");
        let start = "error: nobody announces absent";
        assert!(absent.stderr.starts_with(start), "{absent:?}");
    })
    .await;
}

#[tokio::test]
async fn errors_and_time_outs_of_rust_services_are_told_by_node_clients() {
    with_node(async || {
        let [one, two] = network(Maker::Ours, &[]).await;
        let odd = rust_node(&one).await;
        let refusing = rust_service(&odd, "refusing").await;
        tokio::spawn(refusing.serve(|request| async move { request.fail("not today") }));
        let mut silent = rust_service(&odd, "silent").await;
        tokio::spawn(async move {
            let mut held = Vec::new();
            while let Some(request) = silent.next().await {
                held.push(request);
            }
        });
        for transport in node::TRANSPORTS {
            let failed = node::call("refusing", &two, transport, &["hello"]).await;
            assert!(error(&failed[0]).contains("not today"), "{failed:?}");
            let late = node::call("silent", &two, transport, &["hello"]).await;
            assert!(is_timeout(&late[0]), "{late:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_killed_node_server_is_never_reached_and_forgotten_within_its_lease() {
    with_node(async || {
        let lease = Duration::from_secs(3);
        let [one, two] = network(Maker::Ours, &["--dht_peer_maxAge", "3000"]).await;
        let mut server = node::server("client1", &one, "ws", Form::Chat).await;
        let address = format!("127.0.0.1:{}", server.port);
        let mut apis = [one.http().await, two.http().await];
        for api in &mut apis {
            while api.lookup("client1").await != [address.clone()] {}
        }
        assert_eq!(send(&two, "client1", "hello").await.stdout, "Echo: hello\n");
        server.program.signal(Signal::KILL);
        server.program.end().await;
        let killed = Instant::now();
        loop {
            let asked = killed.elapsed();
            let chat = send(&two, "client1", "hello").await;
            assert_eq!(chat.stdout, "");
            if chat.code == Some(3) {
                break;
            }
            assert_eq!(chat.code, Some(4), "{chat:?}");
            assert!(asked < lease, "still announced after {asked:?}");
        }
        for api in &mut apis {
            while !api.lookup("client1").await.is_empty() {}
        }
    })
    .await;
}

#[tokio::test]
async fn a_node_client_is_told_that_a_rust_peer_was_killed() {
    with_node(async || {
        let [one, two] = network(Maker::Ours, &["--dht_peer_maxAge", "3000"]).await;
        let mut peer = peer("client1", &one).await;
        let outcomes = node::call("client1", &two, "ws", &["hello"]).await;
        assert_eq!(outcomes, [echo("hello")]);
        peer.signal(Signal::KILL);
        peer.end().await;
        for transport in node::TRANSPORTS {
            let outcomes = node::call("client1", &two, transport, &["hello"]).await;
            assert!(outcomes[0]["error"].is_string(), "{outcomes:?}");
        }
        let mut api = two.http().await;
        while !api.lookup("client1").await.is_empty() {}
    })
    .await;
}

#[tokio::test]
async fn both_kinds_of_clients_spread_over_both_kinds_of_providers() {
    with_node(async || {
        let [one, two] = network(Maker::Ours, &[]).await;
        let mut providers = vec![peer("client1", &one).await, peer("client1", &two).await];
        for (grape, transport) in [(&one, "ws"), (&two, "ws")] {
            providers.push(
                node::server("client1", grape, transport, Form::Text)
                    .await
                    .program,
            );
        }
        let mut api = two.http().await;
        while api.lookup("client1").await.len() < 3 {}
        let texts: Vec<_> = (0..MANY).map(|number| number.to_string()).collect();
        let texts: Vec<&str> = texts.iter().map(|text| &**text).collect();

        let outcomes = node::call("client1", &two, "ws", &texts).await;
        let echoes: Vec<_> = texts.iter().map(|text| echo(text)).collect();
        assert_eq!(outcomes, echoes);
        for provider in &mut providers {
            provider.line().await;
        }

        let client = rust_node(&two).await;
        let name = "client1".parse().unwrap();
        for _ in 0..MANY {
            let reply = client.request(&name, "from Rust").await.unwrap();
            assert_eq!(reply.text().unwrap(), "Echo: from Rust");
        }
        for provider in &mut providers {
            while !provider.line().await.contains("from Rust") {}
        }
    })
    .await;
}

#[tokio::test]
async fn the_test_that_grenache_users_have_passes_with_the_command_grape() {
    on_both_with_node(async |maker| {
        let commands = match maker {
            Maker::Ours => crate::process::path("grape").parent().unwrap().to_owned(),
            Maker::Grenache => node::script("node_modules/.bin"),
        };
        let path = std::env::var_os("PATH").unwrap();
        let paths = std::iter::once(commands).chain(std::env::split_paths(&path));
        let mut command = node::command("integration.js", &[]);
        command.env("PATH", std::env::join_paths(paths).unwrap());
        let run = run_other(command).await;
        assert_eq!(run.code, Some(0), "{run:?}");
        let hash = "6d33adc2b6b2c14c3036feefb7fedbca1a880527";
        assert_eq!(run.stdout, format!("{}\n", json!({ "hash": hash })));
    })
    .await;
}

/// The command of Grenache checks no signature, so that its grapes refuse what is signed.
#[tokio::test]
async fn a_signed_value_is_replaced_by_its_owner_alone_and_by_newer_ones_only() {
    with_node(async || {
        let [one, two] = network(Maker::Ours, &[]).await;
        let (mut owner, mut reader) = (node::Link::to(&one), node::Link::to(&two));
        let first = owner.does("sign", &json!({ "v": "first", "seq": 1 })).await;
        let hash = &first["result"];
        let salted = json!({ "v": "salted", "seq": 7, "salt": "salty" });
        let other = owner.does("sign", &salted).await;
        assert_ne!(*hash, other["result"]);

        let refused = [
            (json!({ "v": "stale", "seq": 0 }), 302),
            (json!({ "v": "mismatch", "seq": 5, "cas": 3 }), 301),
        ];
        for (value, code) in refused {
            assert_eq!(owner.does("sign", &value).await["code"], code, "{value}");
        }
        let forged = json!({ "v": "forged", "seq": 9, "sig": "00".repeat(64) });
        let forged = owner.does("sign", &forged).await;
        assert_ne!(forged["result"], *hash, "{forged}");
        let swapped = json!({ "v": "swapped", "seq": 5, "cas": 1 });
        assert_eq!(owner.does("sign", &swapped).await["result"], *hash);

        for link in [&mut reader, &mut owner] {
            let found = loop {
                let found = link.does("get", hash).await["result"].take();
                if found["seq"] == 5 {
                    break found;
                }
            };
            assert_eq!(found["v"], "swapped");
            let salty = json!({ "hash": other["result"], "salt": "salty" });
            let found = link.does("get", &salty).await["result"].take();
            assert_eq!((&found["v"], &found["seq"]), (&json!("salted"), &json!(7)));
            assert_eq!(found["salt"], "salty");
            assert_eq!(found["k"].as_str().unwrap().len(), 64);
            assert_eq!(found["sig"].as_str().unwrap().len(), 128);
        }
    })
    .await;
}

#[tokio::test]
async fn a_value_outlives_the_grape_that_took_it() {
    on_both_with_node(async |maker| {
        let [mut one, two, three] = network(maker, &[]).await;
        let mut link = node::Link::to(&one);
        let value = json!({ "v": "here to stay" });
        let hash = link.does("put", &value).await["result"].take();
        for grape in [&two, &three] {
            let mut link = node::Link::to(grape);
            while link.does("get", &hash).await["result"]["v"] != "here to stay" {}
        }
        one.program.signal(Signal::KILL);
        one.program.end().await;
        for grape in [&two, &three] {
            let mut link = node::Link::to(grape);
            let mut found = link.does("get", &hash).await;
            // Grenache's grapes may wait for the dead one longer than the client for them.
            while maker == Maker::Grenache && found["error"] == "ESOCKETTIMEDOUT" {
                found = link.does("get", &hash).await;
            }
            assert_eq!(found["result"]["v"], "here to stay", "{found}");
        }
    })
    .await;
}

#[tokio::test]
async fn what_is_announced_at_one_grape_is_found_at_every_grape_within_a_second() {
    on_both(async |maker| {
        found_everywhere::<2>(maker).await;
        found_everywhere::<5>(maker).await;
        found_everywhere::<20>(maker).await;
    })
    .await;
}

async fn found_everywhere<const N: usize>(maker: Maker) {
    let grapes: [Grape; N] = network(maker, &[]).await;
    let mut apis = Vec::new();
    for grape in &grapes {
        apis.push(grape.http().await);
    }
    // Grapes that have just been started may not know each other yet.
    for number in 0..N {
        until_found(&mut apis, number, &format!("early-{number}")).await;
    }
    let mut slowest = Duration::ZERO;
    for number in 0..N.min(5) {
        let took = until_found(&mut apis, number, &format!("service-{number}")).await;
        slowest = slowest.max(took);
    }
    eprintln!("{maker}, {N} grapes: found at all of them within {slowest:?}");
    let is_in_time = slowest < Duration::from_secs(1);
    assert!(
        is_in_time || maker == Maker::Grenache,
        "{N} grapes: {slowest:?}"
    );
}

/// Announces a service at one of these grapes; returns how long it took until all found it.
async fn until_found(apis: &mut [Connection], at: usize, name: &str) -> Duration {
    apis[at].announce(name, 1_337).await;
    let announced = Instant::now();
    for api in apis {
        while api.lookup(name).await != ["127.0.0.1:1337"] {}
    }
    announced.elapsed()
}

/// Grenache's grapes forget most of them. The benchmark `grenache` does it with 100,000.
#[tokio::test]
async fn ten_thousand_services_are_all_found_from_every_grape() {
    const SERVICES: usize = 10_000;
    in_time(async {
        let grapes: [Grape; 2] = network(Maker::Ours, &[]).await;
        let mut api = grapes[0].http().await;
        let service = |number| {
            (
                format!("service-{number}"),
                1_024 + (number % 60_000) as u16,
            )
        };
        for (name, port) in (0..SERVICES).map(service) {
            api.announce(&name, port).await;
        }
        for grape in &grapes {
            let mut api = grape.http().await;
            for (name, port) in (0..SERVICES).map(service) {
                assert_eq!(
                    api.lookup(&name).await,
                    [format!("127.0.0.1:{port}")],
                    "{name}"
                );
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_lookup_draws_a_fair_sample_of_a_thousand_providers() {
    on_both(async |maker| {
        const PROVIDERS: u16 = 1_000;
        let grapes: [Grape; 2] = network(maker, &[]).await;
        let mut api = grapes[0].http().await;
        for port in 0..PROVIDERS {
            api.announce("client1", 1_024 + port).await;
        }
        for grape in &grapes {
            let mut api = grape.http().await;
            let mut drawn: HashMap<String, usize> = HashMap::new();
            for _ in 0..MANY {
                let mut sample = api.lookup("client1").await;
                sample.sort_unstable();
                sample.dedup();
                assert_eq!(sample.len(), SAMPLE);
                for provider in sample {
                    *drawn.entry(provider).or_default() += 1;
                }
            }
            // Each is expected 20 times, with a standard deviation of 4.
            assert_eq!(drawn.len(), usize::from(PROVIDERS));
            let most = drawn.values().max();
            assert!(most < Some(&60), "{most:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn everything_can_be_started_at_once() {
    on_both_with_node(async |maker| {
        let [one, two] = grapes::start(maker, &[]);
        let _server = node::start("server.js", &["client1", "0", &one.url()]);
        let client = ["client1", &two.url(), "ws", "hello", "--until-answered"];
        let client = run_other(node::command("client.js", &client)).await;
        assert_eq!(client.stdout, format!("{}\n", echo("hello")), "{client:?}");
    })
    .await;
}
