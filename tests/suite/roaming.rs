//! Machines whose addresses change while programs run on them: a peer in another network, an interface
//! that is down for a while, one more address, a grape that moves.

use std::time::{Duration, Instant};

use crate::namespace::{Machine, Network, can_be_made};
use crate::process::{Program, in_time};

/// Who has moved is found again within this, on a machine that is busy with other tests: what notices a
/// connection that is dead by its silence takes six seconds over QUIC and twenty over TCP.
const FOUND: Duration = Duration::from_secs(3);

const TRANSPORTS: [Transport; 2] = [Transport::Tcp, Transport::Quic];

#[derive(Clone, Copy, Debug)]
enum Transport {
    Tcp,
    Quic,
}

impl Transport {
    /// An address on port 20001, or on any where the host is all of them.
    fn at(self, host: &str) -> String {
        let ip = if host.contains(':') { "ip6" } else { "ip4" };
        let port = if matches!(host, "0.0.0.0" | "::") {
            0
        } else {
            20_001
        };
        match self {
            Self::Tcp => format!("/{ip}/{host}/tcp/{port}"),
            Self::Quic => format!("/{ip}/{host}/udp/{port}/quic-v1"),
        }
    }
}

/// A grape at 10.0.0.1, fd00::1 and 10.0.1.1, and machines beside it.
struct Net {
    network: Network,
    grape: Program,
    at_grape: Machine,
    peer: Machine,
    caller: Machine,
}

impl Net {
    async fn new() -> Self {
        let mut network = Network::new().await;
        let at_grape = network
            .machine(&["10.0.0.1/24", "10.0.1.1/24", "fd00::1/64"])
            .await;
        let peer = network.machine(&["10.0.0.2/24", "fd00::2/64"]).await;
        let caller = network.machine(&["10.0.0.3/24", "fd00::3/64"]).await;
        let grape = grape(&at_grape, &[]).await;
        Self {
            network,
            grape,
            at_grape,
            peer,
            caller,
        }
    }

    /// A peer that has announced its name by the grape.
    async fn peer(&self, listen: &str, bootstrap: &str) -> Program {
        let given = ["client1", "--listen", listen, "--bootstrap", bootstrap];
        let mut peer = self.peer.start("peer", &given);
        peer.says("connected to the grape").await;
        assert_eq!(peer.line().await, "announced client1");
        peer
    }
}

async fn grape(machine: &Machine, more: &[&str]) -> Program {
    let all = ["--listen", "0.0.0.0:20001", "--listen", "[::]:20001"];
    let mut grape = machine.start("grape", &[&all, more].concat());
    let heading = grape.line().await;
    assert!(heading.ends_with(" listens on:"), "{heading}");
    grape
}

/// Writes to the peer until it answers, and tells how long that has taken.
async fn answered(caller: &Machine, bootstrap: &str) -> Duration {
    let start = Instant::now();
    loop {
        let given = [
            "--bootstrap",
            bootstrap,
            "--timeout",
            "1",
            "--to",
            "client1",
            "hello",
        ];
        let chat = caller.run("chat", &given).await;
        if chat.stdout == "Echo: hello\n" {
            return start.elapsed();
        }
    }
}

#[tokio::test]
async fn a_peer_that_comes_into_another_network_is_found_there_at_once() {
    if !can_be_made() {
        return;
    }
    in_time(async {
        for transport in TRANSPORTS {
            let net = Net::new().await;
            let grape = transport.at("10.0.0.1");
            let mut peer = net.peer(&transport.at("0.0.0.0"), &grape).await;
            answered(&net.caller, &grape).await;
            net.peer.ip("address delete 10.0.0.2/24 dev eth0").await;
            net.peer.ip("address add 10.0.0.22/24 dev eth0").await;
            let took = answered(&net.caller, &grape).await;
            assert!(took < FOUND, "{took:?} over {transport:?}");
            peer.says("lost the grape").await;
            peer.says("connected to the grape").await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_was_without_a_network_is_found_as_soon_as_it_has_one() {
    if !can_be_made() {
        return;
    }
    in_time(async {
        for transport in TRANSPORTS {
            let net = Net::new().await;
            let grape = transport.at("fd00::1");
            let mut peer = net.peer(&transport.at("::"), &grape).await;
            net.peer.ip("address delete fd00::2/64 dev eth0").await;
            peer.says("lost the grape").await;
            peer.says("waiting for the grape").await;
            net.peer.ip("address add fd00::22/64 dev eth0").await;
            let took = answered(&net.caller, &grape).await;
            assert!(took < FOUND, "{took:?} over {transport:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_peer_is_found_again_when_its_interface_was_down() {
    if !can_be_made() {
        return;
    }
    in_time(async {
        for transport in TRANSPORTS {
            let net = Net::new().await;
            let grape = transport.at("10.0.0.1");
            let mut peer = net.peer(&transport.at("10.0.0.2"), &grape).await;
            net.peer.ip("link set eth0 down").await;
            peer.says("lost the grape").await;
            peer.says("waiting for the grape").await;
            net.peer.ip("link set eth0 up").await;
            let took = answered(&net.caller, &grape).await;
            assert!(took < FOUND, "{took:?} over {transport:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn an_address_that_a_machine_gets_in_addition_is_announced() {
    if !can_be_made() {
        return;
    }
    in_time(async {
        let mut net = Net::new().await;
        net.at_grape.ip("address add 10.0.2.1/24 dev eth0").await;
        let added = "now reached at /ip4/10.0.2.1/tcp/20001/p2p/";
        net.grape.says(added).await;
        let _peer = net
            .peer("/ip4/0.0.0.0/tcp/0", &Transport::Tcp.at("10.0.0.1"))
            .await;
        // It reaches the grape, and nobody in the peer's first network.
        let caller = net.network.machine(&["10.0.1.3/24"]).await;
        net.peer.ip("address add 10.0.1.2/24 dev eth0").await;
        let took = answered(&caller, &Transport::Tcp.at("10.0.1.1")).await;
        assert!(took < FOUND, "{took:?}");
    })
    .await;
}

#[tokio::test]
async fn a_grape_that_moves_is_in_its_network_at_once() {
    if !can_be_made() {
        return;
    }
    in_time(async {
        for transport in TRANSPORTS {
            let mut net = Net::new().await;
            let first = transport.at("10.0.0.1");
            let at_other = net.network.machine(&["10.0.0.4/24"]).await;
            let mut other = grape(&at_other, &["--bootstrap", &first]).await;
            other.says("connected to the grape").await;
            let _peer = net.peer(&transport.at("0.0.0.0"), &first).await;
            answered(&net.caller, &transport.at("10.0.0.4")).await;
            at_other.ip("address delete 10.0.0.4/24 dev eth0").await;
            at_other.ip("address add 10.0.0.44/24 dev eth0").await;
            let took = answered(&net.caller, &transport.at("10.0.0.44")).await;
            assert!(took < FOUND, "{took:?} over {transport:?}");
            // The peer is told to the one that has not moved, and found by the one that has.
            other.says("lost the grape").await;
            other.says("connected to the grape").await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_grape_drops_the_connection_of_an_address_that_a_peer_has_left() {
    if !can_be_made() {
        return;
    }
    in_time(async {
        let net = Net::new().await;
        let mut grape = net
            .at_grape
            .start_telling("grape", &["--listen", "10.0.0.1:4000"]);
        let at = "/ip4/10.0.0.1/tcp/4000";
        let _peer = net.peer("/ip4/0.0.0.0/tcp/0", at).await;
        net.peer.ip("address delete 10.0.0.2/24 dev eth0").await;
        net.peer.ip("address add 10.0.0.22/24 dev eth0").await;
        grape
            .says_of("", "a connection beside a newer one is dead")
            .await;
        answered(&net.caller, at).await;
    })
    .await;
}

#[tokio::test]
async fn a_caller_that_comes_into_another_network_goes_on_calling() {
    if !can_be_made() {
        return;
    }
    in_time(async {
        for transport in TRANSPORTS {
            let net = Net::new().await;
            let grape = transport.at("10.0.0.1");
            let _peer = net.peer(&transport.at("0.0.0.0"), &grape).await;
            let mut caller = net.caller.start("chat", &["--bootstrap", &grape]);
            caller.types("client1").await;
            caller.types("one").await;
            assert_eq!(caller.line().await, "Echo: one");
            net.caller.ip("address delete 10.0.0.3/24 dev eth0").await;
            net.caller.ip("address add 10.0.0.33/24 dev eth0").await;
            caller.says("lost the grape").await;
            caller.says("connected to the grape").await;
            caller.types("two").await;
            assert_eq!(caller.line().await, "Echo: two", "over {transport:?}");
        }
    })
    .await;
}
