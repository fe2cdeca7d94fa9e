//! Grenache's side of a grape, by its own words: what `WIRE` shows was captured from grenache-grape
//! and its clients.

mod workers;

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use futures::{SinkExt, StreamExt};
use grapevine::chat::{ChatMessage, ChatReply};
use grapevine::error::RequestError;
use grapevine::gateway::{Config, Gateway, GatewayError};
use grapevine::proto::wire::ErrorCode;
use grapevine::{Node, Request, RequestOptions, Role, Testnet};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{WebSocketStream, client_async};

use crate::http::{answer, post, send};
#[cfg(target_os = "linux")]
use workers::BlackHole;
use workers::{LATE, Transport, Worker};

/// No scenario takes longer than this, however busy the machine.
async fn in_time<T>(scenario: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(90), scenario)
        .await
        .expect("the scenario hangs")
}

/// Two grapes, the first of which speaks Grenache.
struct Net {
    testnet: Testnet,
    gateway: Gateway,
}

impl Net {
    async fn start() -> Self {
        Self::with(Config::default()).await
    }

    async fn with(config: Config) -> Self {
        let testnet = Testnet::new(2).await.unwrap();
        let api = "127.0.0.1:0".parse().unwrap();
        let config = Config { api, ..config };
        let grape = testnet.grapes()[0].clone();
        let gateway = Gateway::spawn(grape, config).await.unwrap();
        Self { testnet, gateway }
    }

    /// What the API answers with status 200.
    async fn ask(&self, path: &str, data: Value) -> String {
        let body = json!({"rid": "r", "data": data}).to_string();
        let answer = post(self.gateway.api_address(), path, &body).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.text().into()
    }

    /// Announces a worker, and waits until it is known to the whole network.
    async fn announce(&self, name: &str, worker: &Worker) -> Node {
        let announced = self.ask("/announce", json!([name, worker.at.port()])).await;
        assert_eq!(announced, "1");
        let caller = self.testnet.peer().await.unwrap();
        let name = name.parse().unwrap();
        while caller.lookup(&name).await.is_err() {}
        caller
    }

    /// A peer that announces a name and answers as told.
    async fn serve<R>(&self, name: &str, handler: impl Fn(Request) -> R + Send + 'static) -> Node
    where
        R: Future<Output = ()> + Send + 'static,
    {
        let peer = self.testnet.peer().await.unwrap();
        let service = peer.announce(&name.parse().unwrap()).await.unwrap();
        tokio::spawn(service.serve(handler));
        peer
    }

    /// The address at which Grenache's callers reach a libp2p peer.
    async fn found(&self, name: &str) -> SocketAddr {
        loop {
            let found = self.ask("/lookup", json!(name)).await;
            let found: Vec<SocketAddr> = serde_json::from_str(&found).unwrap();
            if let [at] = found[..] {
                assert_eq!(at, self.gateway.carrier_address());
                return at;
            }
        }
    }
}

async fn echo(request: Request) {
    let echo = format!("Echo: {}", request.text().unwrap());
    request.reply(echo);
}

async fn socket(at: SocketAddr, path: &str) -> WebSocketStream<TcpStream> {
    let stream = TcpStream::connect(at).await.unwrap();
    let (socket, _) = client_async(format!("ws://{at}{path}"), stream)
        .await
        .unwrap();
    socket
}

/// The next text that arrives.
async fn text(socket: &mut WebSocketStream<TcpStream>) -> String {
    loop {
        if let Message::Text(text) = socket.next().await.unwrap().unwrap() {
            return text.as_str().into();
        }
    }
}

const KEY: &str = "8a88e3dd7409f195fd52db2d3cba5d72ca6709bf1d94121bf3748801b40f6f5c";

/// Path, `data`, status and answer, in this order at one grape. `ID` stands for 40 digits.
const WIRE: [(&str, &str, u16, &str); 22] = [
    ("/announce", r#"["rpc_test",1437]"#, 200, "1"),
    ("/lookup", r#""rpc_test""#, 200, r#"["127.0.0.1:1437"]"#),
    ("/lookup", r#""absent""#, 200, "[]"),
    ("/lookup", r#""""#, 200, r#""ERR_GRAPE_LOOKUP""#),
    (
        "/announce",
        r#"["x","1337"]"#,
        200,
        r#""ERR_GRAPE_SERVICE_PORT""#,
    ),
    (
        "/put",
        r#"{"v":"hello world"}"#,
        200,
        r#""6d33adc2b6b2c14c3036feefb7fedbca1a880527""#,
    ),
    (
        "/get",
        r#""6d33adc2b6b2c14c3036feefb7fedbca1a880527""#,
        200,
        r#"{"id":"ID","token":null,"v":"hello world"}"#,
    ),
    (
        "/get",
        r#"{"hash":"6d33adc2b6b2c14c3036feefb7fedbca1a880527"}"#,
        200,
        r#"{"id":"ID","token":null,"v":"hello world"}"#,
    ),
    (
        "/get",
        r#""0000000000000000000000000000000000000000""#,
        200,
        "",
    ),
    (
        "/put",
        r#"{"v":"first","k":"KEY","seq":1,"sig":"5e2c3fc427f6f13f717b2ebab39ffb7a25bd03c7c79921e6320d63352853a6983c49e6ecedfbaaf83dd21972be0eaeb6842b689ff4a67f1a32a225367dc93701"}"#,
        200,
        r#""9ad19e0f16eef714cb90c6f195dbce66e94580f9""#,
    ),
    (
        "/get",
        r#""9ad19e0f16eef714cb90c6f195dbce66e94580f9""#,
        200,
        r#"{"id":"ID","token":null,"v":"first","sig":"5e2c3fc427f6f13f717b2ebab39ffb7a25bd03c7c79921e6320d63352853a6983c49e6ecedfbaaf83dd21972be0eaeb6842b689ff4a67f1a32a225367dc93701","k":"KEY","seq":1}"#,
    ),
    (
        "/put",
        r#"{"v":"second","k":"KEY","seq":2,"sig":"dce5d8f44665043b688ceae43d9a863020a63f1c373026f31a9bcf637767fd284a4c3d44adea1fe595927057fd3da5c852581354e0daa3681aa7eb1eddcff708","salt":"salty"}"#,
        200,
        r#""e5c995f0bf95d6413d8567f828cdaa2b2ba7cf2c""#,
    ),
    (
        "/get",
        r#"{"hash":"e5c995f0bf95d6413d8567f828cdaa2b2ba7cf2c","salt":"salty"}"#,
        200,
        r#"{"id":"ID","token":null,"v":"second","sig":"dce5d8f44665043b688ceae43d9a863020a63f1c373026f31a9bcf637767fd284a4c3d44adea1fe595927057fd3da5c852581354e0daa3681aa7eb1eddcff708","k":"KEY","seq":2,"salt":"salty"}"#,
    ),
    (
        "/get",
        r#""e5c995f0bf95d6413d8567f828cdaa2b2ba7cf2c""#,
        200,
        "",
    ),
    (
        "/put",
        r#"{"v":"stale","k":"KEY","seq":1,"sig":"87716fe7ae939890aa81790e764b5307021a1aa65b903910a255016e4ad8caddffd9b473f7d8f14edd10a58252d6cf8b8155783f6e576202180e271437338f00"}"#,
        302,
        r#""302 sequence number less than current""#,
    ),
    (
        "/put",
        r#"{"v":"casbad","k":"KEY","seq":5,"cas":3,"sig":"1b52fc45806e7fee5775a04295266b60666c7dd4018ebe4866e3125a347a356b1c935ea7ca6a8bf1a3b61c8a8bdc8ca95123fa1f35e0f018d68cffa48014cc08"}"#,
        301,
        r#""301 CAS mismatch, re-read and try again""#,
    ),
    (
        "/put",
        r#"{"v":"casok","k":"KEY","seq":5,"cas":1,"sig":"9208d45faf940ac830a9979b050915f2a30768eec35b7d53a9bc01ca220d58193e91757d723c1a20c6d7a553ec73766f644980957a43d1ccb892db083d1ce303"}"#,
        200,
        r#""9ad19e0f16eef714cb90c6f195dbce66e94580f9""#,
    ),
    (
        "/put",
        r#"{"v":"forged","k":"KEY","seq":9,"sig":"00000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"}"#,
        200,
        r#""All queries failed""#,
    ),
    (
        "/get",
        r#""9ad19e0f16eef714cb90c6f195dbce66e94580f9""#,
        200,
        r#"{"id":"ID","token":null,"v":"casok","sig":"9208d45faf940ac830a9979b050915f2a30768eec35b7d53a9bc01ca220d58193e91757d723c1a20c6d7a553ec73766f644980957a43d1ccb892db083d1ce303","k":"KEY","seq":5}"#,
    ),
    // Beyond Grenache.
    ("/unannounce", r#"["rpc_test",1437]"#, 200, "1"),
    ("/unannounce", r#"["rpc_test",1437]"#, 200, "0"),
    ("/lookup", r#""rpc_test""#, 200, "[]"),
];

#[tokio::test]
async fn answers_are_those_of_grenache() {
    in_time(async {
        let net = Net::start().await;
        for (path, data, status, expected) in WIRE {
            let data = data.replace("KEY", KEY);
            let body = format!(r#"{{"rid":"6673ed5f-8538-489f-8a2f-c8c89a236279","data":{data}}}"#);
            let answer = post(net.gateway.api_address(), path, &body).await;
            let mut text = answer.text().to_owned();
            if let Some(id) = text.find(r#""id":""#) {
                text.replace_range(id + 6..id + 46, "ID");
            }
            let expected = (status, expected.replace("KEY", KEY));
            assert_eq!((answer.status, text), expected, "{path} {data}");
        }
    })
    .await;
}

/// Method, path, body, status and answer. All but those that say so are grenache-grape 1.0.0's.
const ODD: [(&str, &str, &str, u16, &str); 66] = [
    ("POST", "/lookup", "", 500, "ERR_GRAPE_PAYLOAD_INVALID"),
    ("POST", "/lookup", "{", 500, "ERR_GRAPE_PAYLOAD_INVALID"),
    (
        "POST",
        "/lookup",
        r#"{"data":"x"}x"#,
        500,
        "ERR_GRAPE_PAYLOAD_INVALID",
    ),
    ("POST", "/lookup", r#"{"data":"x"} "#, 200, "[]"),
    ("POST", "/lookup", "{}", 200, r#""ERR_GRAPE_LOOKUP""#),
    ("POST", "/lookup", "[]", 200, r#""ERR_GRAPE_LOOKUP""#),
    ("POST", "/lookup", r#"["x"]"#, 200, r#""ERR_GRAPE_LOOKUP""#),
    ("POST", "/lookup", "5", 200, r#""ERR_GRAPE_LOOKUP""#),
    ("POST", "/lookup", "-5", 200, r#""ERR_GRAPE_LOOKUP""#),
    ("POST", "/lookup", "5.5", 200, r#""ERR_GRAPE_LOOKUP""#),
    ("POST", "/lookup", "true", 200, r#""ERR_GRAPE_LOOKUP""#),
    ("POST", "/lookup", r#""x""#, 200, r#""ERR_GRAPE_LOOKUP""#),
    (
        "POST",
        "/lookup",
        r#"{"data":5}"#,
        200,
        r#""ERR_GRAPE_LOOKUP""#,
    ),
    (
        "POST",
        "/lookup",
        r#"{"data":null}"#,
        200,
        r#""ERR_GRAPE_LOOKUP""#,
    ),
    (
        "POST",
        "/lookup",
        r#"{"data":["x"]}"#,
        200,
        r#""ERR_GRAPE_LOOKUP""#,
    ),
    ("POST", "/lookup", r#"{"data":5,"data":"x"}"#, 200, "[]"),
    ("GET", "/lookup", r#"{"data":"x"}"#, 200, "[]"),
    ("DELETE", "/lookup", r#"{"data":"x"}"#, 200, "[]"),
    ("HEAD", "/lookup", r#"{"data":"x"}"#, 200, ""),
    ("GET", "/lookup", "", 500, "ERR_GRAPE_PAYLOAD_INVALID"),
    ("POST", "/lookup?x=1", "{}", 200, r#""ERR_REQ_NOTFOUND""#),
    ("POST", "/lookup/", "{}", 200, r#""ERR_REQ_NOTFOUND""#),
    ("POST", "//lookup", "{}", 200, r#""ERR_REQ_NOTFOUND""#),
    ("POST", "/LOOKUP", "{}", 200, r#""ERR_REQ_NOTFOUND""#),
    ("POST", "/nope", "{}", 200, r#""ERR_REQ_NOTFOUND""#),
    ("POST", "/nope", "no JSON", 500, "ERR_GRAPE_PAYLOAD_INVALID"),
    ("POST", "/", "{}", 200, r#""ERR_REQ_NOTFOUND""#),
    ("GET", "/", "", 500, "ERR_GRAPE_PAYLOAD_INVALID"),
    ("POST", "/announce", "{}", 200, r#""ERR_GRAPE_ANNOUNCE""#),
    (
        "POST",
        "/announce",
        r#"{"data":"x"}"#,
        200,
        r#""ERR_GRAPE_ANNOUNCE""#,
    ),
    (
        "POST",
        "/announce",
        r#"{"data":{}}"#,
        200,
        r#""ERR_GRAPE_ANNOUNCE""#,
    ),
    (
        "POST",
        "/announce",
        r#"{"data":[]}"#,
        200,
        r#""ERR_GRAPE_SERVICE_PORT""#,
    ),
    (
        "POST",
        "/announce",
        r#"{"data":["x"]}"#,
        200,
        r#""ERR_GRAPE_SERVICE_PORT""#,
    ),
    (
        "POST",
        "/announce",
        r#"{"data":["x",null]}"#,
        200,
        r#""ERR_GRAPE_SERVICE_PORT""#,
    ),
    (
        "POST",
        "/announce",
        r#"{"data":["x",1.5]}"#,
        200,
        r#""ERR_GRAPE_SERVICE_PORT""#,
    ),
    (
        "POST",
        "/announce",
        r#"{"data":["x",-1]}"#,
        200,
        r#""All queries failed""#,
    ),
    (
        "POST",
        "/announce",
        r#"{"data":["x",65536]}"#,
        200,
        r#""All queries failed""#,
    ),
    (
        "POST",
        "/announce",
        r#"{"data":["x",1e100]}"#,
        200,
        r#""All queries failed""#,
    ),
    ("POST", "/announce", r#"{"data":["y",1e3]}"#, 200, "1"),
    (
        "POST",
        "/announce",
        r#"{"data":["y",1000.0,"more"]}"#,
        200,
        "1",
    ),
    (
        "POST",
        "/lookup",
        r#"{"data":"y"}"#,
        200,
        r#"["127.0.0.1:1000"]"#,
    ),
    (
        "POST",
        "/announce",
        r#"{"data":["two words",65535]}"#,
        200,
        "1",
    ),
    (
        "POST",
        "/lookup",
        r#"{"data":"two words"}"#,
        200,
        r#"["127.0.0.1:65535"]"#,
    ),
    (
        "POST",
        "/put",
        r#"{"data":"hello world"}"#,
        200,
        r#""6d33adc2b6b2c14c3036feefb7fedbca1a880527""#,
    ),
    (
        "POST",
        "/put",
        r#"{"data":5}"#,
        200,
        r#""opts.v not given""#,
    ),
    (
        "POST",
        "/put",
        r#"{"data":{}}"#,
        200,
        r#""opts.v not given""#,
    ),
    (
        "POST",
        "/put",
        r#"{"data":{"v":{"b":1,"a":"x"}}}"#,
        200,
        r#""ff1fc5948c6876cde2c2a60a32628dce1909350d""#,
    ),
    (
        "POST",
        "/put",
        r#"{"data":{"v":[1,"a",{"z":2}]}}"#,
        200,
        r#""6956f8881eea2a4286854178407f674741d00ac7""#,
    ),
    (
        "POST",
        "/put",
        r#"{"data":{"v":{"a":null,"b":1}}}"#,
        200,
        r#""8daa1e9a2d0de47a5de58f02346c6e59901adce7""#,
    ),
    (
        "POST",
        "/put",
        r#"{"data":{"v":[null,1]}}"#,
        200,
        r#""d1e0b53f7a123ec6f12393fa36c18b01fe1bac1b""#,
    ),
    (
        "POST",
        "/put",
        r#"{"data":{"v":5.5}}"#,
        200,
        r#""fd512d5838b7f0c9fa46debf0d0f0d0d28ea81a1""#,
    ),
    (
        "POST",
        "/put",
        r#"{"data":{"v":true}}"#,
        200,
        r#""1c9d0d26a5211fc7a715823784aaafaeaf7e88c7""#,
    ),
    (
        "POST",
        "/put",
        r#"{"data":{"v":"x","k":"aa"}}"#,
        200,
        r#""opts.k ed25519 public key must be 32 bytes""#,
    ),
    (
        "POST",
        "/put",
        r#"{"data":{"v":"x","k":""}}"#,
        200,
        r#""ab9c6a62e28dfec67c4f220290a2348d7841fadf""#,
    ),
    ("POST", "/get", r#"{"data":"6d33"}"#, 200, ""),
    (
        "POST",
        "/get",
        r#"{"data":5}"#,
        200,
        r#""ERR_GRAPE_GENERIC""#,
    ),
    (
        "POST",
        "/get",
        r#"{"data":[]}"#,
        200,
        r#""ERR_GRAPE_GENERIC""#,
    ),
    (
        "POST",
        "/get",
        r#"{"data":{"hash":null}}"#,
        200,
        r#""ERR_GRAPE_GENERIC""#,
    ),
    // Where grenache-grape's answer is the text of an exception, announces itself, or is none.
    ("POST", "/lookup", "null", 500, "ERR_GRAPE_PAYLOAD_INVALID"),
    (
        "POST",
        "/announce",
        r#"{"data":[5,1437]}"#,
        500,
        "ERR_GRAPE_PAYLOAD_INVALID",
    ),
    (
        "POST",
        "/announce",
        r#"{"data":["x",0]}"#,
        200,
        r#""ERR_GRAPE_SERVICE_PORT""#,
    ),
    ("POST", "/put", "{}", 500, "ERR_GRAPE_PAYLOAD_INVALID"),
    (
        "POST",
        "/put",
        r#"{"data":{"v":"x","k":5}}"#,
        500,
        "ERR_GRAPE_PAYLOAD_INVALID",
    ),
    (
        "POST",
        "/get",
        r#"{"data":null}"#,
        500,
        "ERR_GRAPE_PAYLOAD_INVALID",
    ),
    (
        "POST",
        "/get",
        r#"{"data":"zz"}"#,
        200,
        r#""ERR_GRAPE_HASH_FORMAT""#,
    ),
    ("GET", "/healthz", "", 200, "ok"),
];

#[tokio::test]
async fn odd_requests_are_answered_as_by_grenache() {
    in_time(async {
        let net = Net::start().await;
        for (method, path, body, status, expected) in ODD {
            let at = net.gateway.api_address();
            let answer = send(at, method, path, "", body.as_bytes()).await;
            let given = (answer.status, answer.text());
            assert_eq!(given, (status, expected), "{method} {path} {body}");
        }
    })
    .await;
}

#[tokio::test]
async fn buffers_are_taken_in_every_form_that_grenaches_clients_write() {
    in_time(async {
        let net = Net::start().await;
        let hex = "5e2c3fc427f6f13f717b2ebab39ffb7a25bd03c7c79921e6320d63352853a6983c49e6ecedfbaaf83dd21972be0eaeb6842b689ff4a67f1a32a225367dc93701";
        let octets = |digits: &str| -> Vec<u8> {
            let pairs = (0..digits.len()).step_by(2);
            pairs.map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
        };
        let (k, sig) = (octets(KEY), octets(hex));
        for (k, sig) in [
            (json!(k), json!(sig)),
            (json!({"type": "Buffer", "data": k}), json!({"type": "Buffer", "data": sig})),
            (json!(json!(k).to_string()), json!(hex)),
        ] {
            // Stored by the first one; the others are the same value, and refused as such.
            let put = json!({"data": {"v": "first", "k": k, "sig": sig, "seq": 1}});
            let answer = post(net.gateway.api_address(), "/put", &put.to_string()).await;
            assert!(matches!(answer.status, 200 | 302), "{answer:?}");
            let found = net.ask("/get", json!("9ad19e0f16eef714cb90c6f195dbce66e94580f9"));
            assert!(found.await.contains(r#""v":"first""#), "{answer:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn values_are_shown_as_javascript_shows_them() {
    in_time(async {
        let net = Net::start().await;
        for (v, shown) in [
            (json!(5), "5"),
            (json!([1, "a", [2, 3], {"z": 2}]), "1,a,2,3,[object Object]"),
            (json!({"a": 1}), "[object Object]"),
            (json!("\u{1f347} \"quoted\"\n"), "\u{1f347} \"quoted\"\n"),
        ] {
            let hash = net.ask("/put", json!({"v": v})).await;
            let hash: String = serde_json::from_str(&hash).unwrap();
            let found: Value = serde_json::from_str(&net.ask("/get", json!(hash)).await).unwrap();
            assert_eq!(found["v"], shown);
        }
    })
    .await;
}

#[tokio::test]
async fn a_lookup_names_at_most_100_workers() {
    in_time(async {
        let net = Net::start().await;
        for port in 1..=150 {
            assert_eq!(net.ask("/announce", json!(["two words", port])).await, "1");
        }
        let found = net.ask("/lookup", json!("two words")).await;
        let found: Vec<SocketAddr> = serde_json::from_str(&found).unwrap();
        assert_eq!(found.len(), 100);
    })
    .await;
}

#[tokio::test]
async fn a_worker_that_stops_announcing_itself_is_gone_after_its_lease() {
    in_time(async {
        let lease = Duration::from_millis(300);
        let net = Net::with(Config {
            lease,
            ..Config::default()
        })
        .await;
        assert_eq!(net.ask("/announce", json!(["two words", 1437])).await, "1");
        while net.ask("/lookup", json!("two words")).await != "[]" {}
    })
    .await;
}

/// What a grape answers to `/unannounce` or `/lookup`.
async fn asked(gateway: &Gateway, path: &str, data: &Value) -> String {
    let body = json!({"rid": "r", "data": data}).to_string();
    post(gateway.api_address(), path, &body).await.text().into()
}

/// Grapes with an API each.
async fn gateways(testnet: &Testnet) -> Vec<Gateway> {
    let mut gateways = Vec::new();
    for grape in testnet.grapes() {
        let config = Config {
            api: "127.0.0.1:0".parse().unwrap(),
            ..Config::default()
        };
        gateways.push(Gateway::spawn(grape.clone(), config).await.unwrap());
    }
    gateways
}

#[tokio::test]
async fn a_worker_is_taken_back_at_any_grape_from_all_of_them() {
    in_time(async {
        let testnet = Testnet::new(3).await.unwrap();
        let gateways = gateways(&testnet).await;
        for name in ["client1", "two words"] {
            // At one grape, and at two after a client has gone on by another one.
            for (announced_at, taken_back_at) in [
                (&[0][..], 0),
                (&[0], 1),
                (&[0, 1], 1),
                (&[0, 1], 2),
                (&[0, 1, 2], 0),
            ] {
                let worker = Worker::start(Transport::Socket).await;
                let announce = json!([name, worker.at.port()]);
                for index in announced_at {
                    let answer = asked(&gateways[*index], "/announce", &announce).await;
                    assert_eq!(answer, "1");
                }
                let expected = json!([worker.at]).to_string();
                for gateway in &gateways {
                    while asked(gateway, "/lookup", &json!(name)).await != expected {}
                }
                let taken_back = &gateways[taken_back_at];
                let answer = asked(taken_back, "/unannounce", &announce).await;
                assert_eq!(answer, "1", "{announced_at:?} {taken_back_at}");
                // At once, at each of them.
                for grape in testnet.grapes() {
                    assert_eq!(
                        grape.metrics().workers,
                        0,
                        "{announced_at:?} {taken_back_at}"
                    );
                }
                let answer = asked(taken_back, "/unannounce", &announce).await;
                assert_eq!(answer, "0");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_body_is_as_long_as_it_may_be() {
    in_time(async {
        let net = Net::start().await;
        let at = net.gateway.api_address();
        let body = |len: usize| format!(r#"{{"data":"{}"}}"#, "x".repeat(len - 11));
        assert_eq!(post(at, "/lookup", &body(8_192)).await.text(), "[]");
        let refused = post(at, "/lookup", &body(8_193)).await;
        assert_eq!(
            (refused.status, refused.text()),
            (413, "ERR_GRAPE_PAYLOAD_SIZE")
        );
        // The length is not known before the end.
        let mut stream = TcpStream::connect(at).await.unwrap();
        let head = "POST /lookup HTTP/1.1\r\nhost: grape\r\ntransfer-encoding: chunked\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        for _ in 0..9 {
            let chunk = format!("400\r\n{}\r\n", "x".repeat(1_024));
            stream.write_all(chunk.as_bytes()).await.unwrap();
        }
        let refused = answer(&mut stream).await;
        assert_eq!(
            (refused.status, refused.text()),
            (413, "ERR_GRAPE_PAYLOAD_SIZE")
        );
    })
    .await;
}

#[tokio::test]
async fn ten_megabytes_sent_at_once_are_answered() {
    in_time(async {
        let net = Net::start().await;
        let body = "x".repeat(10 << 20);
        let refused = post(net.gateway.api_address(), "/lookup", &body).await;
        assert_eq!(
            (refused.status, refused.text()),
            (413, "ERR_GRAPE_PAYLOAD_SIZE")
        );
    })
    .await;
}

#[tokio::test]
async fn bodies_that_never_end_hold_up_nobody() {
    in_time(async {
        let net = Net::start().await;
        let mut slow = Vec::new();
        for length in [10 << 20, 8_000] {
            let mut stream = TcpStream::connect(net.gateway.api_address()).await.unwrap();
            let head = format!(
                "POST /announce HTTP/1.1\r\nhost: grape\r\ncontent-length: {length}\r\n\r\n{{"
            );
            stream.write_all(head.as_bytes()).await.unwrap();
            slow.push(stream);
        }
        assert_eq!(net.ask("/lookup", json!("absent")).await, "[]");
        let [large, small] = &mut slow[..] else {
            unreachable!()
        };
        assert_eq!(answer(large).await.status, 413);
        assert_eq!(answer(small).await.status, 408);
    })
    .await;
}

#[cfg(unix)]
#[tokio::test]
async fn a_thousand_idle_connections_hold_up_nobody() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    in_time(async {
        let mut limit = getrlimit(Resource::Nofile);
        limit.current = limit.maximum;
        setrlimit(Resource::Nofile, limit).unwrap();
        let net = Net::start().await;
        let mut idle = Vec::new();
        for at in [net.gateway.api_address(), net.gateway.carrier_address()] {
            for count in 0..1_000 {
                let mut stream = TcpStream::connect(at).await.unwrap();
                if count % 2 == 0 {
                    stream.write_all(b"POST /lookup HT").await.unwrap();
                }
                idle.push(stream);
            }
        }
        let _peer = net.serve("client1", echo).await;
        let at = net.found("client1").await;
        let answer = post(at, "/", r#"["r","client1","hello"]"#).await;
        assert_eq!(answer.text(), r#"["r",null,"Echo: hello"]"#);
        drop(idle);
    })
    .await;
}

#[tokio::test]
async fn a_port_that_is_taken_is_named_with_the_remedy() {
    in_time(async {
        let net = Net::start().await;
        let config = Config {
            api: net.gateway.api_address(),
            ..Config::default()
        };
        let grape = net.testnet.grapes()[1].clone();
        let refused = Gateway::spawn(grape, config).await.unwrap_err();
        let GatewayError::Listen(refused) = refused else {
            panic!("{refused}");
        };
        assert_eq!(refused.address, net.gateway.api_address());
        let reason = refused.reason;
        assert!(
            reason.contains("another program uses this port"),
            "{reason}"
        );
    })
    .await;
}

#[tokio::test]
async fn a_gateway_that_is_shut_down_frees_its_ports() {
    in_time(async {
        let net = Net::start().await;
        let at = [net.gateway.api_address(), net.gateway.carrier_address()];
        let mut kept = socket(at[1], "/ws").await;
        net.gateway.shutdown().await;
        for at in at {
            TcpListener::bind(at).await.unwrap();
        }
        while let Some(Ok(_)) = kept.next().await {}
    })
    .await;
}

#[tokio::test]
async fn what_is_under_way_is_answered_when_a_gateway_is_shut_down() {
    in_time(async {
        let net = Net::start().await;
        let (asked, mut asking) = tokio::sync::mpsc::channel(2);
        let handler = move |request| {
            let asked = asked.clone();
            async move { asked.send(request).await.unwrap() }
        };
        let _peer = net.serve("client1", handler).await;
        let at = net.found("client1").await;
        let call = r#"["r","client1","hello"]"#;
        let mut socket = socket(at, "/ws").await;
        socket.send(Message::text(call)).await.unwrap();
        let by_socket = asking.recv().await.unwrap();
        let by_http = tokio::spawn(async move { post(at, "/", call).await });
        let by_http = (asking.recv().await.unwrap(), by_http);
        let answers = async {
            // It has stopped once it takes no more connections.
            while TcpStream::connect(at).await.is_ok() {}
            by_socket.reply("one");
            by_http.0.reply("two");
            assert_eq!(text(&mut socket).await, r#"["r",null,"one"]"#);
            while let Some(Ok(_)) = socket.next().await {}
            assert_eq!(by_http.1.await.unwrap().text(), r#"["r",null,"two"]"#);
        };
        tokio::join!(net.gateway.shutdown(), answers);
    })
    .await;
}

#[tokio::test]
async fn a_gateway_that_is_shut_down_waits_for_its_sockets() {
    in_time(async {
        let net = Net::start().await;
        let (asked, mut asking) = tokio::sync::mpsc::channel(1);
        let handler = move |request| {
            let asked = asked.clone();
            async move { asked.send(request).await.unwrap() }
        };
        let _peer = net.serve("client1", handler).await;
        let at = net.found("client1").await;
        let mut socket = socket(at, "/ws").await;
        let call = r#"["r","client1","hello"]"#;
        socket.send(Message::text(call)).await.unwrap();
        let request = asking.recv().await.unwrap();
        let ports = [net.gateway.api_address(), at];
        let mut shutdown = std::pin::pin!(net.gateway.shutdown());
        assert!(futures::poll!(&mut shutdown).is_pending());
        for port in ports {
            while TcpStream::connect(port).await.is_ok() {}
        }
        tokio::task::yield_now().await;
        assert!(futures::poll!(&mut shutdown).is_pending());
        request.reply("one");
        shutdown.await;
        // The answer and the goodbye are there, without a further step of the gateway's.
        let mut stream = socket.into_inner().into_std().unwrap();
        let mut frames = Vec::new();
        stream.read_to_end(&mut frames).unwrap();
        assert_eq!(frames, b"\x81\x10[\"r\",null,\"one\"]\x88\x00");
    })
    .await;
}

#[tokio::test]
async fn a_grape_has_one_gateway_after_the_other() {
    in_time(async {
        let mut net = Net::start().await;
        let config = || Config {
            api: "127.0.0.1:0".parse().unwrap(),
            ..Config::default()
        };
        let grape = net.testnet.grapes()[0].clone();
        let second = Gateway::spawn(grape.clone(), config()).await.unwrap_err();
        assert_eq!(second, GatewayError::AlreadyRunning);
        let peer = net.testnet.peer().await.unwrap();
        let of_a_peer = Gateway::spawn(peer, config()).await.unwrap_err();
        assert_eq!(of_a_peer, GatewayError::NotAGrape);

        let worker = Worker::start(Transport::Http).await;
        let caller = net.announce("worker1", &worker).await;
        net.gateway.shutdown().await;
        net.gateway = Gateway::spawn(grape, config()).await.unwrap();
        let reply = caller.request(&"worker1".parse().unwrap(), "hello").await;
        assert_eq!(reply.unwrap().text().unwrap(), "Echo: hello");
    })
    .await;
}

#[tokio::test]
async fn grenaches_callers_reach_a_peer() {
    in_time(async {
        let net = Net::start().await;
        let _peer = net.serve("client1", echo).await;
        let at = net.found("client1").await;
        let calls = [
            (r#"["a","client1","hello"]"#, r#"["a",null,"Echo: hello"]"#),
            (
                r#"[7,"client1",{"m":"h"}]"#,
                r#"[7,null,"Echo: {\"m\":\"h\"}"]"#,
            ),
            (
                r#"["m","client1",{"message":"hi"}]"#,
                r#"["m",null,"Echo: hi"]"#,
            ),
            (r#"["c","client1"]"#, r#"["c",null,"Echo: null"]"#),
            (
                r#"["d","absent","x"]"#,
                r#"["d","ERR_GRAPE_LOOKUP_EMPTY",null]"#,
            ),
            (r#"["UUID"]"#, r#"["UUID","ERR_REQUEST_INVALID",null]"#),
            (r#"["r","client1",{"#, r#"["r","ERR_REQUEST_INVALID",null]"#),
            ("no JSON", r#"[null,"ERR_REQUEST_INVALID",null]"#),
        ];
        for path in ["/ws", "/"] {
            let mut socket = socket(at, path).await;
            for (question, answer) in calls {
                socket.send(Message::text(question)).await.unwrap();
                assert_eq!(text(&mut socket).await, answer);
            }
        }
        for (question, answer) in calls {
            assert_eq!(post(at, "/", question).await.text(), answer);
        }
        let head = "_gr: [\"s\",\"client1\"]\r\n_a: act\r\n_ar: {}\r\n";
        let streamed = send(at, "POST", "/", head, br#"["UUID","rpc","x"]"#).await;
        assert_eq!(streamed.text(), r#"["s",null,"Echo: x"]"#);
        let refused = send(at, "POST", "/", "_gr: \u{7f}\r\n", b"[]").await;
        assert_eq!(refused.status, 400, "{refused:?}");
    })
    .await;
}

#[tokio::test]
async fn a_chat_message_of_grenaches_caller_gets_the_answer_of_its_receipt() {
    in_time(async {
        let net = Net::start().await;
        let handler = |request: Request| async move {
            let message = ChatMessage::decode(request.payload()).unwrap();
            let reply = (message.text != "nothing").then(|| format!("{}: [1]", message.from));
            request.reply(message.receipt(reply).encode().unwrap());
        };
        let _peer = net.serve("client1", handler).await;
        let at = net.found("client1").await;
        for (text, answer) in [("hello", json!("ann: [1]")), ("nothing", Value::Null)] {
            let call = json!(["r", "client1", {"message": text, "from": "ann"}]);
            let expected = json!(["r", null, answer]).to_string();
            assert_eq!(post(at, "/", &call.to_string()).await.text(), expected);
        }
    })
    .await;
}

#[tokio::test]
async fn a_compressed_call_gets_a_compressed_answer() {
    in_time(async {
        let net = Net::start().await;
        let _peer = net.serve("client1", echo).await;
        let at = net.found("client1").await;
        let mut question = GzEncoder::new(Vec::new(), Compression::default());
        question.write_all(br#"["z","client1","zip"]"#).unwrap();
        let question = question.finish().unwrap();
        let answer = send(at, "POST", "/", "grc-compress: gzip\r\n", &question).await;
        let answer = std::io::read_to_string(GzDecoder::new(&answer.body[..])).unwrap();
        assert_eq!(answer, r#"["z",null,"Echo: zip"]"#);
        // Ten megabytes in ten kilobytes.
        let mut bomb = GzEncoder::new(Vec::new(), Compression::best());
        bomb.write_all(&vec![b' '; 10 << 20]).unwrap();
        let bomb = bomb.finish().unwrap();
        let refused = send(at, "POST", "/", "grc-compress: gzip\r\n", &bomb).await;
        assert_eq!(refused.status, 413);
        let answer = std::io::read_to_string(GzDecoder::new(&refused.body[..])).unwrap();
        assert_eq!(answer, too_long("null"));
    })
    .await;
}

#[tokio::test]
async fn calls_on_one_socket_are_answered_in_any_order() {
    in_time(async {
        let net = Net::start().await;
        let peer = net.testnet.peer().await.unwrap();
        let mut service = peer.announce(&"client1".parse().unwrap()).await.unwrap();
        let at = net.found("client1").await;
        let mut socket = socket(at, "/ws").await;
        for rid in 0..100 {
            let question = format!(r#"[{rid},"client1","{rid}"]"#);
            socket.send(Message::text(question)).await.unwrap();
        }
        let mut open = Vec::new();
        while open.len() < 100 {
            open.push(service.next().await.unwrap());
        }
        for request in open.into_iter().rev() {
            echo(request).await;
        }
        let mut answered: Vec<u32> = Vec::new();
        while answered.len() < 100 {
            let answer = text(&mut socket).await;
            let (rid, None::<()>, echo): (u32, _, String) = serde_json::from_str(&answer).unwrap()
            else {
                panic!("{answer}");
            };
            assert_eq!(echo, format!("Echo: {rid}"));
            answered.push(rid);
        }
        answered.sort_unstable();
        assert!(answered.into_iter().eq(0..100));
    })
    .await;
}

#[tokio::test]
async fn what_a_peer_says_of_a_failure_reaches_grenaches_caller() {
    in_time(async {
        let net = Net::start().await;
        let handler = |request: Request| async move {
            match request.text().unwrap() {
                "fail" => request.fail("something went wrong"),
                "bytes" => request.reply([0xff]),
                _ => drop(request),
            }
        };
        let _peer = net.serve("client1", handler).await;
        let at = net.found("client1").await;
        let mut socket = socket(at, "/ws").await;
        for (payload, error) in [
            ("fail", "something went wrong"),
            ("bytes", "client1 answered something else than text"),
        ] {
            let question = json!(["r", "client1", payload]).to_string();
            socket.send(Message::text(question)).await.unwrap();
            let answer = json!(["r", error, null]).to_string();
            assert_eq!(text(&mut socket).await, answer);
        }
        let question = json!(["r", "client1", "drop"]).to_string();
        socket.send(Message::text(question)).await.unwrap();
        let (_, error, None::<()>): (String, String, _) =
            serde_json::from_str(&text(&mut socket).await).unwrap()
        else {
            panic!("an error and a result");
        };
        assert!(!error.is_empty());
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_does_not_answer_is_a_timeout_to_grenaches_caller() {
    in_time(async {
        let deadline = Duration::from_millis(300);
        let net = Net::with(Config {
            deadline,
            ..Config::default()
        })
        .await;
        let peer = net.testnet.peer().await.unwrap();
        let mut service = peer.announce(&"client1".parse().unwrap()).await.unwrap();
        let at = net.found("client1").await;
        let call = post(at, "/", r#"["r","client1","x"]"#);
        let (answer, _request) = tokio::join!(call, service.next());
        assert_eq!(answer.text(), r#"["r","ERR_TIMEOUT",null]"#);
    })
    .await;
}

/// What is answered to a request that is longer than one may be.
fn too_long(rid: &str) -> String {
    let error = "ERR_REQUEST_SIZE: a request through this grape has at most 2097152 bytes";
    format!(r#"[{rid},"{error}",null]"#)
}

#[tokio::test]
async fn a_request_that_is_too_long_fails_alone() {
    in_time(async {
        let net = Net::start().await;
        let peer = net.testnet.peer().await.unwrap();
        let mut service = peer.announce(&"client1".parse().unwrap()).await.unwrap();
        let at = net.found("client1").await;
        let mut socket = socket(at, "/ws").await;
        socket
            .send(Message::text(r#"[1,"client1","first"]"#))
            .await
            .unwrap();
        let first = service.next().await.unwrap();
        let long = format!(r#"["long","client1","{}"]"#, "x".repeat(5 << 19));
        for _ in 0..3 {
            socket.send(Message::text(&*long)).await.unwrap();
            assert_eq!(text(&mut socket).await, too_long(r#""long""#));
        }
        // No UTF-8, and no JSON.
        socket
            .send(Message::binary(&b"[\"u\",\"client1\",\"\xc3\"]"[..]))
            .await
            .unwrap();
        assert_eq!(
            text(&mut socket).await,
            r#"["u","ERR_REQUEST_INVALID",null]"#
        );
        // Within the limit of messages, and beyond that of payloads.
        let large = json!([2, "client1", "x".repeat((1 << 20) + 1)]).to_string();
        socket.send(Message::text(large)).await.unwrap();
        let answer = text(&mut socket).await;
        assert!(
            answer.starts_with("[2,") && answer.contains("1048576"),
            "{answer}"
        );
        socket
            .send(Message::text(r#"[3,"client1","last"]"#))
            .await
            .unwrap();
        let last = service.next().await.unwrap();
        for (rid, request) in [(1, first), (3, last)] {
            let expected = json!([rid, null, format!("Echo: {}", request.text().unwrap())]);
            echo(request).await;
            assert_eq!(text(&mut socket).await, expected.to_string());
        }

        let refused = post(at, "/", &long).await;
        assert_eq!(
            (refused.status, refused.text()),
            (413, &*too_long(r#""long""#))
        );
        let head = "_gr: [\"s\",\"client1\"]\r\n";
        let refused = send(at, "POST", "/", head, &[b' '; 3 << 20]).await;
        assert_eq!(refused.text(), too_long(r#""s""#));
    })
    .await;
}

#[tokio::test]
async fn an_http_connection_goes_on_behind_a_request_that_is_too_long() {
    in_time(async {
        let net = Net::start().await;
        let _peer = net.serve("client1", echo).await;
        let at = net.found("client1").await;
        let mut stream = TcpStream::connect(at).await.unwrap();
        let head = "POST / HTTP/1.1\r\nhost: grape\r\ncontent-length: 3145728\r\n\r\n[\"a\",";
        stream.write_all(head.as_bytes()).await.unwrap();
        // It is answered before the rest is sent.
        let mut answer = vec![0; 1_024];
        let length = stream.read(&mut answer).await.unwrap();
        let answer = String::from_utf8_lossy(&answer[..length]);
        assert!(answer.ends_with(&too_long(r#""a""#)), "{answer}");
        stream.write_all(&vec![b' '; (3 << 20) - 5]).await.unwrap();
        let call = r#"["b","client1","hello"]"#;
        let head = format!(
            "POST / HTTP/1.1\r\nhost: grape\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{call}",
            call.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let answered = self::answer(&mut stream).await;
        assert_eq!(answered.text(), r#"["b",null,"Echo: hello"]"#);
    })
    .await;
}

#[tokio::test]
async fn an_answer_that_is_too_long_fails_its_call_alone() {
    in_time(async {
        let net = Net::start().await;
        for (name, transport) in [
            ("by-socket", Transport::Socket),
            ("by-http", Transport::Http),
        ] {
            let worker = Worker::start(transport).await;
            let caller = net.announce(name, &worker).await;
            let name = name.parse().unwrap();
            let held = match transport {
                // The others share its connection.
                Transport::Socket => 8,
                Transport::Http | Transport::Tls => 0,
            };
            let held = (0..held).map(|_| caller.request(&name, "hold"));
            let held = futures::future::join_all(held);
            let others = async {
                for (payload, code, message) in [
                    ("large", ErrorCode::TooLarge, "more than 2097152 bytes"),
                    ("broken", ErrorCode::HandlerFailed, ""),
                    ("large", ErrorCode::TooLarge, "more than 2097152 bytes"),
                ] {
                    let refused = caller.request(&name, payload).await.unwrap_err();
                    let RequestError::Remote { error, .. } = refused else {
                        panic!("{refused}");
                    };
                    assert_eq!(error.code, code, "{error}");
                    assert!(error.message.contains(message), "{error}");
                }
                let reply = caller.request(&name, "release").await.unwrap();
                assert_eq!(reply.text().unwrap(), "Echo: release");
            };
            let (held, ()) = tokio::join!(held, others);
            for reply in held {
                assert_eq!(reply.unwrap().text().unwrap(), "Echo: hold");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn who_waits_longer_than_usual_gets_a_late_answer() {
    in_time(async {
        let net = Net::start().await;
        let handler = |request: Request| async move {
            tokio::time::sleep(LATE).await;
            echo(request).await;
        };
        let _peer = net.serve("peer", handler).await;
        let at = net.found("peer").await;
        let call = r#"["r","peer","x"]"#;
        let by_http = post(at, "/", call);
        let by_socket = async {
            let mut socket = socket(at, "/ws").await;
            socket.send(Message::text(call)).await.unwrap();
            text(&mut socket).await
        };
        let mut waits = Vec::new();
        for (name, transport) in [
            ("by-socket", Transport::Socket),
            ("by-http", Transport::Http),
        ] {
            let worker = Worker::start(transport).await;
            let caller = net.announce(name, &worker).await;
            waits.push(async move {
                let options = RequestOptions {
                    deadline: 5 * LATE,
                    ..RequestOptions::default()
                };
                let name = name.parse().unwrap();
                let _worker = worker;
                caller.request_with(&name, "late", options).await
            });
        }
        let waits = futures::future::join_all(waits);
        let (by_http, by_socket, replies) = tokio::join!(by_http, by_socket, waits);
        assert_eq!(by_http.text(), r#"["r",null,"Echo: x"]"#);
        assert_eq!(by_socket, r#"["r",null,"Echo: x"]"#);
        for reply in replies {
            assert_eq!(reply.unwrap().text().unwrap(), "Echo: late");
        }
    })
    .await;
}

#[tokio::test]
async fn answers_that_nobody_reads_take_a_bounded_room() {
    in_time(async {
        let net = Net::start().await;
        // JSON makes six times as many of them: more than the system takes of a connection.
        let large = |request: Request| async move { request.reply("\u{1}".repeat(1_000_000)) };
        let _large = net.serve("large", large).await;
        let _small = net.serve("small", echo).await;
        let at = net.found("large").await;
        let call = r#"["r","large",""]"#;
        let no_room = "finds no room";
        let mut unread = Vec::new();
        loop {
            let socket = TcpSocket::new_v4().unwrap();
            socket.set_recv_buffer_size(4 << 10).unwrap();
            let mut stream = socket.connect(at).await.unwrap();
            let length = call.len();
            let head =
                format!("POST / HTTP/1.1\r\nhost: grape\r\ncontent-length: {length}\r\n\r\n");
            stream.write_all((head + call).as_bytes()).await.unwrap();
            // The head, and no more than the beginning of what it announces.
            let mut begun = [0; 110];
            stream.read_exact(&mut begun).await.unwrap();
            if String::from_utf8_lossy(&begun).contains(no_room) {
                break;
            }
            unread.push(stream);
            assert!(unread.len() < 20, "eleven of them fill the room");
        }
        let answer = post(at, "/", r#"["r","small","hello"]"#).await;
        assert_eq!(answer.text(), r#"["r",null,"Echo: hello"]"#);
        let mut socket = socket(at, "/ws").await;
        socket.send(Message::text(call)).await.unwrap();
        assert!(text(&mut socket).await.contains(no_room));
        drop(unread);
        while post(at, "/", call).await.text().contains(no_room) {}
    })
    .await;
}

#[tokio::test]
async fn a_node_calls_a_worker_of_either_transport() {
    in_time(async {
        let net = Net::start().await;
        for (name, transport) in [
            ("by-socket", Transport::Socket),
            ("by-http", Transport::Http),
        ] {
            let worker = Worker::start(transport).await;
            let caller = net.announce(name, &worker).await;
            let name = name.parse().unwrap();
            for (payload, reply) in [
                ("hello", "Echo: hello"),
                (r#"{"a":1}"#, r#"{"echo":{"a":1}}"#),
                ("[1, 2]", r#"{"echo":[1,2]}"#),
                ("nothing", "null"),
            ] {
                let answered = caller.request(&name, payload).await.unwrap();
                assert_eq!(answered.text().unwrap(), reply, "{transport:?}");
            }
            for (payload, message) in [("fail", "something went wrong"), ("both", "e")] {
                let refused = caller.request(&name, payload).await.unwrap_err();
                let RequestError::Remote { error, .. } = refused else {
                    panic!("{refused}");
                };
                assert_eq!(
                    (error.code, &*error.message),
                    (ErrorCode::HandlerFailed, message)
                );
            }
            let refused = caller.request(&name, [0xff]).await.unwrap_err();
            let RequestError::Remote { error, .. } = refused else {
                panic!("{refused}");
            };
            assert_eq!(error.code, ErrorCode::BadRequest);
        }
    })
    .await;
}

#[tokio::test]
async fn a_chat_message_to_a_worker_is_answered_in_kind() {
    in_time(async {
        let net = Net::start().await;
        let worker = Worker::start(Transport::Socket).await;
        let caller = net.announce("client1", &worker).await;
        let name = "client1".parse().unwrap();
        for (text, reply) in [("hello", Some("Echo: hello")), ("nothing", None)] {
            let message = ChatMessage::new("ann", text);
            let reply = message.receipt(reply.map(Into::into));
            let answered = caller
                .request(&name, message.encode().unwrap())
                .await
                .unwrap();
            assert_eq!(ChatReply::decode(&answered.payload), Ok(reply));
        }
    })
    .await;
}

#[tokio::test]
async fn calls_to_one_worker_run_side_by_side() {
    in_time(async {
        let net = Net::start().await;
        for (name, transport) in [
            ("by-socket", Transport::Socket),
            ("by-http", Transport::Http),
        ] {
            let worker = Worker::start(transport).await;
            let caller = net.announce(name, &worker).await;
            let name = name.parse().unwrap();
            // One that never ends is in the way of none.
            let hangs = caller.request(&name, "hang");
            let calls = (0..100).map(|number| {
                let (caller, name) = (&caller, &name);
                async move {
                    let reply = caller.request(name, format!("n{number}")).await.unwrap();
                    assert_eq!(reply.text().unwrap(), format!("Echo: n{number}"));
                }
            });
            let calls = futures::future::join_all(calls);
            tokio::select! {
                _ = hangs => panic!("it was to hang"),
                _ = calls => {}
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_worker_that_does_not_answer_is_a_failure_to_the_caller() {
    in_time(async {
        let deadline = Duration::from_millis(300);
        let net = Net::with(Config {
            deadline,
            ..Config::default()
        })
        .await;
        let worker = Worker::start(Transport::Socket).await;
        let caller = net.announce("client1", &worker).await;
        let refused = caller.request(&"client1".parse().unwrap(), "hang").await;
        let Err(RequestError::Remote { error, .. }) = refused else {
            panic!("{refused:?}");
        };
        let message = "the worker has not answered within 0.3 s";
        assert_eq!(
            (error.code, &*error.message),
            (ErrorCode::HandlerFailed, message)
        );
    })
    .await;
}

#[tokio::test]
async fn a_worker_that_speaks_tls_is_said_to() {
    in_time(async {
        let net = Net::start().await;
        let worker = Worker::start(Transport::Tls).await;
        let caller = net.announce("client1", &worker).await;
        let refused = caller.request(&"client1".parse().unwrap(), "hello").await;
        let Err(RequestError::Unreachable { reason, .. }) = refused else {
            panic!("{refused:?}");
        };
        assert!(reason.contains("it speaks TLS"), "{reason}");
        // One that can be reached has the call.
        let other = Worker::start(Transport::Socket).await;
        net.announce("client1", &other).await;
        for _ in 0..10 {
            let reply = caller.request(&"client1".parse().unwrap(), "hello").await;
            assert_eq!(reply.unwrap().text().unwrap(), "Echo: hello");
        }
    })
    .await;
}

#[tokio::test]
async fn a_client_that_speaks_tls_is_refused_in_its_own_words() {
    in_time(async {
        let net = Net::start().await;
        let gateway = &net.gateway;
        for at in [gateway.api_address(), gateway.carrier_address()] {
            let mut stream = TcpStream::connect(at).await.unwrap();
            stream.write_all(&[0x16, 3, 1, 0, 45, 1]).await.unwrap();
            let mut alert = [0; 7];
            stream.read_exact(&mut alert).await.unwrap();
            assert_eq!(alert, [0x15, 3, 3, 0, 2, 2, 40]);
            assert!(gateway.tls_client().await.is_loopback());
        }
    })
    .await;
}

#[tokio::test]
async fn a_call_that_may_have_run_is_not_made_again() {
    in_time(async {
        let net = Net::start().await;
        for (name, transport) in [
            ("by-socket", Transport::Socket),
            ("by-http", Transport::Http),
        ] {
            let worker = Worker::start(transport).await;
            let caller = net.announce(name, &worker).await;
            let name = name.parse().unwrap();
            let refused = caller.request(&name, "die").await;
            let Err(RequestError::Remote { error, .. }) = refused else {
                panic!("{refused:?}");
            };
            assert_eq!(error.code, ErrorCode::HandlerFailed, "{error}");
            // The worker lives: it has only closed the connection.
            let reply = caller.request(&name, "hello").await.unwrap();
            assert_eq!(reply.text().unwrap(), "Echo: hello");
        }
    })
    .await;
}

#[tokio::test]
async fn a_call_goes_to_a_worker_that_is_there() {
    in_time(async {
        let net = Net::start().await;
        // Without an open connection, on which a call might be lost with the worker.
        let gone = Worker::start(Transport::Http).await;
        let caller = net.announce("client1", &gone).await;
        let there = Worker::start(Transport::Socket).await;
        net.announce("client1", &there).await;
        gone.stop().await;
        for _ in 0..20 {
            let reply = caller.request(&"client1".parse().unwrap(), "hello").await;
            assert_eq!(reply.unwrap().text().unwrap(), "Echo: hello");
        }
    })
    .await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_worker_whose_host_is_gone_fails_no_call_that_another_one_answers() {
    in_time(async {
        let net = Net::start().await;
        let there = Worker::start(Transport::Socket).await;
        let caller = net.announce("client1", &there).await;
        let gone = BlackHole::new().await;
        let announced = net.ask("/announce", json!(["client1", gone.at.port()]));
        assert_eq!(announced.await, "1");
        let name = "client1".parse().unwrap();
        let calls = (0..60).map(|_| caller.request(&name, "hello"));
        for reply in futures::future::join_all(calls).await {
            assert_eq!(reply.unwrap().text().unwrap(), "Echo: hello");
        }
    })
    .await;
}

#[tokio::test]
async fn a_worker_that_is_gone_is_not_live() {
    in_time(async {
        let net = Net::start().await;
        let name = "client1".parse().unwrap();
        let worker = Worker::start(Transport::Http).await;
        let caller = net.announce("client1", &worker).await;
        worker.stop().await;
        // Its lease is far longer than this may take.
        while caller.lookup(&name).await.is_ok() {}
    })
    .await;
}

#[tokio::test]
async fn workers_and_peers_of_one_name_share_its_callers() {
    in_time(async {
        let net = Net::start().await;
        let handler = |request: Request| async move { request.reply("from the peer") };
        let _peer = net.serve("client1", handler).await;
        let at = net.found("client1").await;
        let worker = Worker::start(Transport::Socket).await;
        let caller = net.announce("client1", &worker).await;
        let both = HashSet::from([at, worker.at]);
        // What is found out about the peer late is told to the next one.
        loop {
            let found = net.ask("/lookup", json!("client1")).await;
            let found: HashSet<SocketAddr> = serde_json::from_str(&found).unwrap();
            if found == both {
                break;
            }
            assert!(found.is_subset(&both), "{found:?}");
        }
        let mut answers = HashSet::new();
        while answers.len() < 2 {
            let reply = caller.request(&"client1".parse().unwrap(), "hello").await;
            answers.insert(reply.unwrap().payload);
        }
        let both = ["Echo: hello", "from the peer"].map(|answer| answer.as_bytes().to_vec());
        assert_eq!(answers, both.into());
    })
    .await;
}

/// Announces a name at a grape for an address where nobody answers, and is gone without a word.
async fn announce_and_vanish(grape: &Node, name: &str, at: SocketAddr) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let SocketAddr::V4(at) = at else {
        panic!("an address of IPv4");
    };
    let address = format!("/ip4/{}/tcp/{}", at.ip(), at.port());
    let (grapes, name) = (grape.addresses(), name.parse().unwrap());
    let announced = runtime.spawn(async move {
        let peer = Node::builder(Role::Peer).bootstrap(grapes);
        let peer = peer.external([address.parse().unwrap()]).spawn().await;
        peer.unwrap().announce(&name).await.unwrap()
    });
    // To drop it might take the name back before the runtime has ended.
    std::mem::forget(announced.await.unwrap());
    runtime.shutdown_background();
}

#[tokio::test]
async fn a_peer_that_never_answers_delays_no_lookup_that_finds_workers() {
    in_time(async {
        let any = "/ip4/127.0.0.1/tcp/0".parse().unwrap();
        let grape = Node::builder(Role::Grape).listen([any]).spawn().await;
        let grape = grape.unwrap();
        let config = Config {
            api: "127.0.0.1:0".parse().unwrap(),
            ..Config::default()
        };
        let gateway = Gateway::spawn(grape.clone(), config).await.unwrap();
        let at = gateway.api_address();
        let announce = r#"{"data":["client1",1337]}"#;
        assert_eq!(post(at, "/announce", announce).await.text(), "1");
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        announce_and_vanish(&grape, "client1", silent.local_addr().unwrap()).await;

        let lookup = || async {
            let found = post(at, "/lookup", r#"{"data":"client1"}"#).await;
            assert_eq!(found.text(), r#"["127.0.0.1:1337"]"#);
        };
        let asking = async {
            loop {
                lookup().await;
            }
        };
        let mut dialled = tokio::select! {
            dialled = silent.accept() => dialled.unwrap().0,
            () = asking => unreachable!(),
        };
        let mut unread = Vec::new();
        let given_up = dialled.read_to_end(&mut unread);
        let asked_on = async {
            for _ in 0..10 {
                lookup().await;
            }
        };
        tokio::select! {
            _ = given_up => panic!("lookups wait for the peer"),
            () = asked_on => {}
        }
    })
    .await;
}

#[tokio::test]
async fn in_a_large_network_only_the_responsible_grapes_know_and_all_find() {
    in_time(async {
        // So many that each knows enough others to tell not all of them of its workers.
        let testnet = Testnet::new(36).await.unwrap();
        for grape in testnet.grapes() {
            let mut status = grape.status();
            status.wait_for(|status| status.explored).await.unwrap();
        }
        let api = "127.0.0.1:0".parse().unwrap();
        let gateway = |index: usize| {
            let config = Config {
                api,
                ..Config::default()
            };
            Gateway::spawn(testnet.grapes()[index].clone(), config)
        };
        let (near, far) = (gateway(3).await.unwrap(), gateway(27).await.unwrap());
        let ask = |path, data: Value| {
            let body = json!({"rid": "r", "data": data}).to_string();
            let at = far.api_address();
            async move { post(at, path, &body).await.text().to_owned() }
        };
        let worker = Worker::start(Transport::Socket).await;
        let announce = json!({"rid": "r", "data": ["client1", worker.at.port()]}).to_string();
        let announced = post(near.api_address(), "/announce", &announce).await;
        assert_eq!(announced.text(), "1");
        let expected = json!([worker.at]).to_string();
        while ask("/lookup", json!("client1")).await != expected {}
        assert_eq!(ask("/lookup", json!("client2")).await, "[]");
        let told = testnet.grapes().iter();
        let told = told.filter(|grape| grape.metrics().workers > 0).count();
        assert_eq!(told, 1, "only the grape that it announced itself at");
        let caller = testnet.peer().await.unwrap();
        let reply = caller.request(&"client1".parse().unwrap(), "hello").await;
        assert_eq!(reply.unwrap().text(), Ok("Echo: hello"));
        let announced = json!(["client1", worker.at.port()]);
        assert_eq!(ask("/unannounce", announced).await, "1");
        assert_eq!(testnet.grapes()[3].metrics().workers, 0);
    })
    .await;
}
