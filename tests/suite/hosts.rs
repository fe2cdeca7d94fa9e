//! Grapes that are named by a host: what DNS says now, and not what it said at the start.

use std::fs;

use tempfile::TempDir;

use crate::namespace::{Machine, Network, can_be_made};
use crate::process::{Program, in_time};

/// Where the grape of [`Net`] is named.
const NAMED: &str = "grape.test:20001";

/// A grape, a name server that knows it, and a machine for programs that join by its name.
struct Net {
    grape: Program,
    machine: Machine,
    servers: Machine,
    _server: Program,
    hosts: TempDir,
    network: Network,
    _others: Vec<Machine>,
}

const GRAPE: &str = "10.0.0.1";
const SERVER: &str = "10.0.0.53";

impl Net {
    async fn new() -> Self {
        let mut network = Network::new().await;
        let at_grape = network.machine(&["10.0.0.1/24"]).await;
        let servers = network.machine(&["10.0.0.53/24"]).await;
        let machine = network.machine(&["10.0.0.2/24"]).await;
        let hosts = tempfile::tempdir().unwrap();
        fs::write(hosts.path().join("hosts"), format!("{GRAPE} grape.test\n")).unwrap();
        Self {
            grape: grape(&at_grape).await,
            _server: servers.serves_names(&hosts.path().join("hosts")).await,
            machine,
            servers,
            hosts,
            network,
            _others: vec![at_grape],
        }
    }

    /// DNS says from now on that the grape is at this address.
    fn says(&self, address: &str) {
        let hosts = self.hosts.path().join("hosts");
        fs::write(hosts, format!("{address} grape.test\n")).unwrap();
    }

    fn peer(&self) -> Program {
        let listen = "/ip4/0.0.0.0/tcp/0";
        let given = ["client1", "--listen", listen, "--bootstrap", NAMED];
        self.machine.start("peer", &given)
    }
}

async fn grape(machine: &Machine) -> Program {
    let mut grape = machine.start("grape", &["--listen", "/ip4/0.0.0.0/tcp/20001"]);
    let heading = grape.line().await;
    assert!(heading.ends_with(" listens on:"), "{heading}");
    grape
}

#[tokio::test]
async fn a_peer_that_was_started_before_dns_resolves_once_it_is_there() {
    if !can_be_made() {
        return;
    }
    in_time(async {
        let net = Net::new().await;
        let mut peer = net.peer();
        peer.says_of("waiting for the grape", "this machine has no name server")
            .await;
        net.machine.asks(SERVER);
        assert_eq!(peer.line().await, "announced client1");
    })
    .await;
}

#[tokio::test]
async fn a_name_server_that_was_replaced_is_not_asked_any_more() {
    if !can_be_made() {
        return;
    }
    in_time(async {
        let net = Net::new().await;
        net.machine.asks("10.0.0.99");
        let mut peer = net.peer();
        peer.says_of("waiting for the grape", "no name server answers")
            .await;
        net.machine.asks(SERVER);
        assert_eq!(peer.line().await, "announced client1");
    })
    .await;
}

#[tokio::test]
async fn a_host_that_is_written_into_etc_hosts_is_found_without_a_name_server() {
    if !can_be_made() {
        return;
    }
    in_time(async {
        let net = Net::new().await;
        let mut peer = net.peer();
        peer.says("waiting for the grape").await;
        let hosts = format!("{GRAPE} grape.test\n");
        fs::write(net.machine.etc("hosts"), hosts).unwrap();
        assert_eq!(peer.line().await, "announced client1");
    })
    .await;
}

#[tokio::test]
async fn a_host_that_dns_did_not_know_is_found_when_it_does() {
    if !can_be_made() {
        return;
    }
    in_time(async {
        let net = Net::new().await;
        net.machine.asks(SERVER);
        fs::write(net.hosts.path().join("hosts"), "").unwrap();
        let mut peer = net.peer();
        peer.says_of("waiting for the grape", "DNS knows no such host")
            .await;
        net.says(GRAPE);
        assert_eq!(peer.line().await, "announced client1");
    })
    .await;
}

#[tokio::test]
async fn a_grape_that_has_moved_is_found_where_dns_says_now() {
    if !can_be_made() {
        return;
    }
    in_time(async {
        let mut net = Net::new().await;
        net.machine.asks(SERVER);
        let mut peer = net.peer();
        assert_eq!(peer.line().await, "announced client1");
        let elsewhere = net.network.machine(&["10.0.0.4/24"]).await;
        let _moved = grape(&elsewhere).await;
        net.says("10.0.0.4");
        net.grape.signal(rustix::process::Signal::KILL);
        peer.says("lost the grape").await;
        peer.says("connected to the grape").await;
        let at = ["--bootstrap", "/ip4/10.0.0.4/tcp/20001"];
        let given = [&at[..], &["--to", "client1", "hello"]].concat();
        let chat = net.servers.run("chat", &given).await;
        assert_eq!(chat.stdout, "Echo: hello\n", "{}", chat.stderr);
    })
    .await;
}
