//! Who takes part. Each is an echo server and a client, in a process each.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::common::{self, Process};
use crate::kept::Security;
use crate::load::obey;
use crate::{grapevine, grpc, http, iroh, kept, tcp};

const TCP: &str = "/ip4/127.0.0.1/tcp/0";
const QUIC: &str = "/ip4/127.0.0.1/udp/0/quic-v1";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contender {
    GrapevineTcp,
    GrapevineQuic,
    KeptTcp,
    KeptQuic,
    KeptTls,
    BareTcp,
    Tonic,
    TonicTls,
    Axum,
    AxumTls,
    IrohStreams,
    IrohKept,
    Grenache,
}

pub(crate) use Contender::*;

impl Contender {
    pub(crate) const ALL: [Self; 13] = [
        GrapevineTcp,
        GrapevineQuic,
        KeptTcp,
        KeptQuic,
        KeptTls,
        BareTcp,
        Tonic,
        TonicTls,
        Axum,
        AxumTls,
        IrohStreams,
        IrohKept,
        Grenache,
    ];

    /// What a filter is matched with.
    pub(crate) fn id(self) -> &'static str {
        match self {
            GrapevineTcp => "grapevine-tcp",
            GrapevineQuic => "grapevine-quic",
            KeptTcp => "ceiling-tcp",
            KeptQuic => "ceiling-quic",
            KeptTls => "ceiling-tls",
            BareTcp => "bare-tcp",
            Tonic => "tonic",
            TonicTls => "tonic-tls",
            Axum => "axum",
            AxumTls => "axum-tls",
            IrohStreams => "iroh-streams",
            IrohKept => "iroh-kept",
            Grenache => "grenache",
        }
    }

    /// What it is, for tables.
    pub(crate) fn title(self) -> &'static str {
        match self {
            GrapevineTcp => "**Grapevine**, TCP",
            GrapevineQuic => "**Grapevine**, QUIC",
            KeptTcp => "ceiling: one kept libp2p stream, TCP",
            KeptQuic => "ceiling: one kept libp2p stream, QUIC",
            KeptTls => "the same over TCP with TLS instead of Noise",
            BareTcp => "bare TCP, pipelined, not encrypted",
            Tonic => "tonic gRPC, unary, not encrypted",
            TonicTls => "tonic gRPC, unary, TLS",
            Axum => "axum HTTP/1.1, a connection each, not encrypted",
            AxumTls => "axum HTTP/1.1, a connection each, TLS",
            IrohStreams => "iroh, a stream for each request",
            IrohKept => "iroh, one kept stream, pipelined",
            Grenache => "Grenache ws, Node.js, not encrypted",
        }
    }

    /// Why it cannot take part here, if it cannot.
    pub(crate) fn absence(self) -> Option<String> {
        if self != Grenache {
            return None;
        }
        let node = Command::new("node")
            .arg("--version")
            .stdout(Stdio::null())
            .status();
        if !node.is_ok_and(|status| status.success()) {
            return Some("there is no `node`".into());
        }
        let packages = grenache().join("node_modules/grenache-nodejs-ws");
        let missing = "its packages are not installed: `npm ci --prefix benches/rivals/grenache`";
        (!packages.is_dir()).then(|| missing.into())
    }

    /// Starts its server, then its client, which waits for loads.
    pub(crate) fn start(self, threads: usize) -> (Process, Process) {
        let mut server = self.process("server", threads, "");
        let mut client = self.process("client", threads, &server.line());
        assert_eq!(client.line(), "ready", "{} does not start", self.id());
        (server, client)
    }

    fn process(self, part: &str, threads: usize, argument: &str) -> Process {
        if self == Grenache {
            let script = grenache().join("echo.js");
            return Process::start(Command::new("node").arg(script).args([part, argument]));
        }
        Process::part(part, &[self.id(), &threads.to_string(), argument])
    }

    /// Is its server, until the parent process lets it go.
    pub(crate) async fn serve(self) {
        let address = match self {
            GrapevineTcp => grapevine::serve(TCP).await,
            GrapevineQuic => grapevine::serve(QUIC).await,
            KeptTcp => kept::serve(TCP, Security::Noise).await,
            KeptTls => kept::serve(TCP, Security::Tls).await,
            KeptQuic => kept::serve(QUIC, Security::Noise).await,
            BareTcp => tcp::serve().await,
            Tonic => grpc::serve().await,
            TonicTls => grpc::serve_tls().await,
            Axum => http::serve().await,
            AxumTls => http::serve_tls().await,
            IrohStreams | IrohKept => iroh::serve().await,
            Grenache => unreachable!("it is not written in Rust"),
        };
        println!("{address}");
        let released = tokio::task::spawn_blocking(common::until_released);
        released.await.expect("waiting does not fail");
    }

    /// Is its client, until the parent process lets it go.
    pub(crate) async fn call(self, server: &str) {
        match self {
            GrapevineTcp | GrapevineQuic => obey(grapevine::connect(server).await).await,
            KeptTcp | KeptQuic => obey(kept::connect(server, Security::Noise).await).await,
            KeptTls => obey(kept::connect(server, Security::Tls).await).await,
            BareTcp => obey(tcp::connect(server).await).await,
            Tonic => obey(grpc::connect(server).await).await,
            TonicTls => obey(grpc::connect_tls(server).await).await,
            Axum => obey(http::connect(server)).await,
            AxumTls => obey(http::connect_tls(server)).await,
            IrohStreams => obey(iroh::connect_streams(server).await).await,
            IrohKept => obey(iroh::connect_kept(server).await).await,
            Grenache => unreachable!("it is not written in Rust"),
        }
    }
}

fn grenache() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("grenache")
}
