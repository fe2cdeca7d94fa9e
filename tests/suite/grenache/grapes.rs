//! Grapes as processes, ours and Grenache's, on one command line.

use std::fmt::{self, Display};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use super::http::Connection;
use super::node;
use crate::process::Program;

/// Below the ports that systems give to connections, so that none of those takes one meanwhile.
const PORTS: std::ops::Range<u16> = 10_000..32_000;

/// How long a grape that does not accept a connection yet is left alone.
const PAUSE: Duration = Duration::from_millis(10);

/// Whose grapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Maker {
    Ours,
    Grenache,
}

impl Display for Maker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ours => "Grapevine",
            Self::Grenache => "Grenache",
        })
    }
}

/// A grape that runs.
pub(super) struct Grape {
    pub(super) program: Program,
    dht: u16,
    api: u16,
}

/// Starts grapes that join by the first two of them.
pub(super) fn start<const N: usize>(maker: Maker, more: &[&str]) -> [Grape; N] {
    let dht: [u16; N] = std::array::from_fn(|_| free_port());
    let known = &dht[..N.min(2)];
    dht.map(|port| {
        let others = known.iter().filter(|known| **known != port);
        let others: Vec<_> = others.map(|port| format!("127.0.0.1:{port}")).collect();
        Grape::start(maker, port, &others.join(","), more)
    })
}

/// As [`start`]; returns when each is ready.
pub(super) async fn network<const N: usize>(maker: Maker, more: &[&str]) -> [Grape; N] {
    let mut grapes = start(maker, more);
    for grape in &mut grapes {
        grape.http().await;
        if maker == Maker::Ours && N > 1 {
            grape.program.says("connected to the grape").await;
        }
    }
    grapes
}

impl Grape {
    fn start(maker: Maker, dht: u16, others: &str, more: &[&str]) -> Self {
        let api = free_port();
        let (dht_flag, api_flag) = (dht.to_string(), api.to_string());
        let flags = ["--dp", &dht_flag, "--aph", &api_flag, "--bn", others];
        let flags = [&flags, more].concat();
        let program = match maker {
            Maker::Ours => Program::start("grape", &flags),
            Maker::Grenache => node::start("node_modules/grenache-grape/bin/grape.js", &flags),
        };
        Self { program, dht, api }
    }

    /// Where Grenache's clients find it.
    pub(super) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.api)
    }

    /// Where our nodes find it.
    pub(super) fn address(&self) -> String {
        format!("/ip4/127.0.0.1/tcp/{}", self.dht)
    }

    pub(super) fn api(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.api).into()
    }

    /// A connection to its API, as soon as it accepts one.
    pub(super) async fn http(&self) -> Connection {
        loop {
            if let Ok(connection) = Connection::open(self.api()).await {
                return connection;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// A port that is free for TCP and UDP, and given to nobody else in this process.
fn free_port() -> u16 {
    static TRIED: AtomicU16 = AtomicU16::new(0);
    let count = PORTS.end - PORTS.start;
    // Another run of these tests begins elsewhere.
    let first = std::process::id() % u32::from(count);
    loop {
        let tried = u32::from(TRIED.fetch_add(1, Ordering::Relaxed));
        let offset = (first + tried) % u32::from(count);
        let port = PORTS.start + u16::try_from(offset).unwrap();
        if TcpListener::bind(("0.0.0.0", port)).is_ok()
            && UdpSocket::bind(("0.0.0.0", port)).is_ok()
        {
            return port;
        }
    }
}
