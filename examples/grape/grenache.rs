//! The command line of grenache-grape, so that a grape can take its place.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use grapevine::gateway::{Config, Gateway};
use grapevine::limits::MAX_REQUEST_TIME;
use grapevine::{Multiaddr, Node};
use tokio::net::lookup_host;

use crate::common::flags::{dial_address, port_number, quoted, seconds};
use crate::common::{Failure, USAGE, note};

/// The flags of grenache-grape 1.0.0, under its names.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Grenache")]
pub(crate) struct Grenache {
    /// Listen on this port over TCP and QUIC [default: 20001]
    #[arg(
        long,
        visible_alias = "dht_port",
        value_name = "PORT",
        value_parser = port_number,
        conflicts_with = "listen"
    )]
    dp: Option<u16>,
    /// Serve Grenache's HTTP API on this port; without it there is none
    #[arg(long, visible_alias = "api_port", value_name = "PORT", value_parser = port_number)]
    aph: Option<u16>,
    /// Let Grenache's callers reach other peers by this port beside that of the API [default: any]
    #[arg(long, value_name = "PORT", value_parser = port_number)]
    carrier_port: Option<u16>,
    /// Join by these grapes, separated by commas: host:port, or as in --bootstrap
    #[arg(long, value_name = "GRAPES", value_parser = grapes)]
    bn: Vec<Grapes>,
    /// Listen on this host only; without it the API is for this machine, all else for everybody
    #[arg(short, long, visible_alias = "b", value_name = "HOST")]
    bind: Option<String>,
    /// Forget a worker after so many milliseconds unless it is announced again
    #[arg(
        long = "dht_peer_maxAge",
        visible_alias = "dpa",
        value_name = "MS",
        default_value = "120000",
        value_parser = milliseconds
    )]
    peer_max_age: Duration,
    /// Refuse requests to the API with a longer body than this
    #[arg(
        long = "check_maxPayloadSize",
        value_name = "BYTES",
        default_value = "8192",
        value_parser = bytes
    )]
    max_payload_size: usize,
    /// Give up a request between Grenache and other peers after so long, if its caller waits on: 1 to 300
    #[arg(
        long,
        value_name = "SECONDS",
        default_value = "300",
        value_parser = request_timeout
    )]
    request_timeout: Duration,
    #[command(flatten)]
    ignored: Ignored,
}

/// Flags that are taken and do nothing: what they tune is not there.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Grenache, without a meaning here")]
struct Ignored {
    /// How many of a lookup's messages are under way at once
    #[arg(long, visible_alias = "dht_concurrency", value_name = "N")]
    dc: Option<String>,
    /// How many lookups are remembered
    #[arg(long = "dht_maxTables", value_name = "N")]
    max_tables: Option<String>,
    /// How many values are kept
    #[arg(long = "dht_maxValues", value_name = "N")]
    max_values: Option<String>,
    /// How long what was found is remembered
    #[arg(long = "cache_maxAge", value_name = "MS")]
    cache_max_age: Option<String>,
    /// How often other grapes are checked
    #[arg(long, visible_alias = "dht_nodeLiveness", value_name = "MS")]
    dnl: Option<String>,
}

/// The grapes of one flag: none, where it is empty.
#[derive(Clone, Debug)]
struct Grapes(Vec<Multiaddr>);

impl Grenache {
    /// The grapes to join by.
    pub(crate) fn bootstrap(&self) -> impl Iterator<Item = Multiaddr> {
        self.bn.iter().flat_map(|Grapes(grapes)| grapes.clone())
    }

    /// The port to listen on, if one is given.
    pub(crate) fn port(&self) -> Option<u16> {
        self.dp
    }

    /// The only host to listen on, if one is given.
    pub(crate) async fn host(&self) -> Result<Option<IpAddr>, Failure> {
        let Some(host) = &self.bind else {
            return Ok(None);
        };
        let found = lookup_host((host.as_str(), 0)).await;
        let found = found.ok().and_then(|mut found| found.next());
        let message = || format!("--bind: {} is no host of this machine", quoted(host));
        let found = found.ok_or_else(|| Failure::new(USAGE, message()))?;
        Ok(Some(found.ip()))
    }

    /// Serves the API, if a port is given for it.
    pub(crate) async fn serve(
        &self,
        node: &Node,
        host: Option<IpAddr>,
    ) -> Result<Option<Gateway>, Failure> {
        self.tell_ignored();
        let Some(port) = self.aph else {
            if self.carrier_port.is_some() {
                note("without a meaning here: --carrier-port; it goes with --aph");
            }
            return Ok(None);
        };
        let mut config = Config {
            lease: self.peer_max_age,
            max_body: self.max_payload_size,
            carrier_port: self.carrier_port.unwrap_or(0),
            deadline: self.request_timeout,
            ..Config::default()
        };
        config.api = SocketAddr::new(host.unwrap_or(config.api.ip()), port);
        let gateway = Gateway::spawn(node.clone(), config).await?;
        let tls_client = gateway.tls_client();
        tokio::spawn(async move {
            let client = tls_client.await;
            note(&format!(
                "a client at {client} speaks TLS (\"secure\" in Grenache), which grapes do not: it cannot \
                 reach Rust peers; run it without"
            ));
        });
        Ok(Some(gateway))
    }

    fn tell_ignored(&self) {
        let ignored = &self.ignored;
        let flags = [
            ("--dc", &ignored.dc),
            ("--dht_maxTables", &ignored.max_tables),
            ("--dht_maxValues", &ignored.max_values),
            ("--cache_maxAge", &ignored.cache_max_age),
            ("--dnl", &ignored.dnl),
        ];
        let given = flags.iter().filter(|(_, value)| value.is_some());
        let given: Vec<&str> = given.map(|(flag, _)| *flag).collect();
        if !given.is_empty() {
            note(&format!("without a meaning here: {}", given.join(", ")));
        }
    }
}

fn grapes(text: &str) -> Result<Grapes, String> {
    let parts = text.split(',').filter(|part| !part.is_empty());
    parts
        .map(dial_address)
        .collect::<Result<_, _>>()
        .map(Grapes)
}

fn bytes(text: &str) -> Result<usize, String> {
    text.parse()
        .map_err(|_| format!("{} is not a number of bytes", quoted(text)))
}

fn request_timeout(text: &str) -> Result<Duration, String> {
    seconds(text, 1, MAX_REQUEST_TIME.as_secs())
}

fn milliseconds(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(count @ 1..) => Ok(Duration::from_millis(count)),
        _ => Err(format!("{} is not a number of milliseconds", quoted(text))),
    }
}
