//! A grape: keeps the names that peers announce, and tells who asks where they are.
//!
//! Two grapes that know each other, in two terminals, in either order:
//!
//! ```text
//! cargo run --release --example grape -- --listen /ip4/127.0.0.1/tcp/20001 --bootstrap /ip4/127.0.0.1/tcp/20002
//! cargo run --release --example grape -- --listen /ip4/127.0.0.1/tcp/20002 --bootstrap /ip4/127.0.0.1/tcp/20001
//! ```
//!
//! Each prints its addresses, ready to be another program's `--bootstrap`:
//!
//! ```text
//! Grape 12D3KooWFpvk… listens on:
//! /ip4/127.0.0.1/tcp/20001/p2p/12D3KooWFpvk…
//! ```
//!
//! and tells on stderr what becomes of the other one:
//!
//! ```text
//! connected to the grape 12D3..hTpEYyh4 at /ip4/127.0.0.1/tcp/20002
//! ```
//!
//! It runs until Ctrl-C. Then try the examples `peer` and `chat`.

#[path = "../common/mod.rs"]
mod common;
mod grenache;

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use futures::future::OptionFuture;
use grapevine::error::ListenError;
use grapevine::gateway::{Gateway, GatewayError};
use grapevine::monitor::Monitor;
use grapevine::multiaddr::Protocol;
use grapevine::{Multiaddr, Node, PeerId, Role};

use common::flags::{self, Flags, quoted};
use common::key::Key;
use common::output::Output;
use common::stop::Stop;
use common::{Failure, RUNTIME, grapes, run, shut_down};
use grenache::Grenache;

/// The port that `peer` and `chat` look for a grape on.
const PORT: u16 = 20_001;

const AFTER_HELP: &str = "\
Examples:
  grape --identity grape.key
          the first grape of a network, with an id that it keeps
  grape --identity grape.key --bootstrap /dns/example.org/tcp/20001
          a further one, which joins by the first
  grape --listen /ip4/127.0.0.1/tcp/0
          for a try: on this machine only, on any free port
  grape --dp 20001 --aph 30001 --bn '127.0.0.1:20002'
          in place of a grape of Grenache

Its addresses go to standard output, news of other grapes and errors to standard error.
RUST_LOG=grapevine=debug logs there too.

Exit codes: 0 stopped by a signal, 1 the system refused something, 2 wrong usage";

/// Keep the names that peers announce, and tell who asks where they are.
///
/// Without --listen: TCP and QUIC on port 20001 of every interface.
#[derive(Debug, Parser)]
#[command(name = "grape", version, after_help = AFTER_HELP)]
struct Cli {
    #[command(flatten)]
    network: Flags,
    /// Forget a name after so many seconds unless its peer renews it: 3 to 90
    #[arg(long, value_name = "SECONDS", default_value = "90", value_parser = lease)]
    lease: Duration,
    /// Let only this peer connect (repeatable; list the grapes of --bootstrap too)
    #[arg(long, value_name = "PEERID", value_parser = peer_id)]
    allow: Vec<PeerId>,
    /// Do not let this peer connect (repeatable)
    #[arg(long, value_name = "PEERID", value_parser = peer_id)]
    block: Vec<PeerId>,
    /// Serve metrics to Prometheus, as /metrics, and /healthz at this address, e.g. 127.0.0.1:9100
    #[arg(long, value_name = "IP:PORT", value_parser = socket_address)]
    metrics: Option<SocketAddr>,
    #[command(flatten)]
    grenache: Grenache,
    /// Programs that start grapes of Grenache by hand say the program's name twice
    #[arg(hide = true, value_name = "NAME", value_parser = own_name)]
    again: Option<String>,
}

fn main() -> ExitCode {
    let cli: Cli = flags::parse(None);
    allow_many_files();
    run(|stop| serve(cli, stop))
}

async fn serve(cli: Cli, stop: Stop) -> Result<u8, Failure> {
    let host = cli.grenache.host().await?;
    let key = match cli.network.key(&stop).await {
        Ok(key) => key?,
        Err(cause) => return Ok(cause.code()),
    };
    let node = match stop.or(start(&cli, &key, host)).await {
        Ok(node) => node?,
        Err(cause) => return Ok(cause.code()),
    };
    let edges = match Edges::open(&cli, &node, host).await {
        Ok(edges) => edges,
        Err(failure) => {
            shut_down(&node).await;
            return Err(failure);
        }
    };
    let output = Output::stdout(stop.clone());
    let cause = stop.or(work(&cli, &node, &edges, output)).await;
    edges.shutdown().await;
    shut_down(&node).await;
    Ok(cause.map_or_else(|cause| cause.code(), |()| 0))
}

/// What serves HTTP beside the node.
struct Edges {
    gateway: Option<Gateway>,
    monitor: Option<Monitor>,
}

impl Edges {
    async fn open(cli: &Cli, node: &Node, host: Option<IpAddr>) -> Result<Self, Failure> {
        let gateway = cli.grenache.serve(node, host).await?;
        let monitor = match cli.metrics {
            Some(address) => Some(Monitor::spawn(node.clone(), address).await?),
            None => None,
        };
        Ok(Self { gateway, monitor })
    }

    async fn shutdown(self) {
        let gateway = OptionFuture::from(self.gateway.map(Gateway::shutdown));
        let monitor = OptionFuture::from(self.monitor.map(Monitor::shutdown));
        tokio::join!(gateway, monitor);
    }
}

impl From<GatewayError> for Failure {
    fn from(error: GatewayError) -> Self {
        Self::new(RUNTIME, error)
    }
}

impl From<ListenError> for Failure {
    fn from(error: ListenError) -> Self {
        Self::new(RUNTIME, error)
    }
}

async fn start(cli: &Cli, key: &Key, host: Option<IpAddr>) -> Result<Node, Failure> {
    let port = cli.grenache.port().unwrap_or(PORT);
    let listen = match host {
        Some(host) => flags::tcp_and_quic(host, port),
        None => flags::all_interfaces(port),
    };
    let mut builder = cli
        .network
        .builder(Role::Grape, key, listen)
        .bootstrap(cli.grenache.bootstrap())
        .block(cli.block.iter().copied())
        .lease(cli.lease);
    if !cli.allow.is_empty() {
        builder = builder.allow_only(cli.allow.iter().copied());
    }
    Ok(builder.spawn().await?)
}

async fn work(cli: &Cli, node: &Node, edges: &Edges, output: Output) {
    let heading = format!("Grape {} listens on:", node.peer_id());
    let addresses = node.addresses();
    output.print(heading).await;
    for address in addresses.iter().filter(|a| is_dialable(a)) {
        output.print(address.to_string()).await;
    }
    if let Some(gateway) = &edges.gateway {
        let api = gateway.api_address();
        let line = match api.ip().is_unspecified() {
            true => format!("Grenache API: HTTP on {}", dialled(api)),
            false => format!("Grenache API: http://{api}"),
        };
        output.print(line).await;
        let carrier = gateway.carrier_address();
        let line = format!(
            "Grenache callers reach other peers at: {}",
            dialled(carrier)
        );
        output.print(line).await;
    }
    if let Some(monitor) = &edges.monitor {
        let address = monitor.address();
        let line = match address.ip().is_unspecified() {
            true => format!("Metrics: /metrics over HTTP on {}", dialled(address)),
            false => format!("Metrics: http://{address}/metrics"),
        };
        output.print(line).await;
    }
    if cli.network.identity.is_none() {
        output
            .note("this id ends with the program; --identity FILE keeps it")
            .await;
    }
    let grapes = grapes::tell(node.clone(), output.clone());
    tokio::join!(grapes, tell_addresses(node, addresses, output));
}

/// Tells where this grape is dialled when that is not what was told.
async fn tell_addresses(node: &Node, mut told: Vec<Multiaddr>, output: Output) {
    let mut status = node.status();
    status.mark_changed();
    while status.changed().await.is_ok() {
        let addresses = status.borrow_and_update().addresses.clone();
        let gone = told.iter().filter(|address| !addresses.contains(address));
        let new = addresses.iter().filter(|address| !told.contains(address));
        let gone = gone.map(|address| (address, "no longer reached at"));
        let news: Vec<_> = gone
            .chain(new.map(|address| (address, "now reached at")))
            .collect();
        for (address, what) in news.into_iter().filter(|(address, _)| is_dialable(address)) {
            output.note(&format!("{what} {address}")).await;
        }
        told = addresses;
    }
}

/// Where a socket is dialled. Nobody can dial "any address".
fn dialled(address: SocketAddr) -> String {
    match address.ip().is_unspecified() {
        true => format!("port {} of this machine", address.port()),
        false => address.to_string(),
    }
}

/// As many open files as the system allows: each connection takes one, and what shells start may
/// have 1,024 unless it asks for more.
#[cfg(unix)]
fn allow_many_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Then there are fewer connections.
    let _ = setrlimit(Resource::Nofile, limit);
}

#[cfg(not(unix))]
fn allow_many_files() {}

/// A link-local address needs a zone, which differs from machine to machine.
fn is_dialable(address: &Multiaddr) -> bool {
    !matches!(address.iter().next(), Some(Protocol::Ip6(ip)) if is_link_local(ip))
}

fn is_link_local(ip: Ipv6Addr) -> bool {
    ip.is_unicast_link_local()
}

fn own_name(text: &str) -> Result<String, String> {
    match text {
        "grape" => Ok(text.into()),
        _ => Err(format!(
            "a grape takes no name; \"peer {text}\" announces one"
        )),
    }
}

fn lease(text: &str) -> Result<Duration, String> {
    flags::seconds(text, 3, 90)
}

fn socket_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        format!(
            "{} is not an IP address and a port, such as 127.0.0.1:9100 or [::1]:9100",
            quoted(text)
        )
    })
}

fn peer_id(text: &str) -> Result<PeerId, String> {
    text.parse().map_err(|_| {
        format!(
            "{} is not an id: it is what follows /p2p/ in an address, such as \
             12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN",
            quoted(text)
        )
    })
}
