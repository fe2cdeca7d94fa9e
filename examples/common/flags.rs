//! The flags that all programs have, and errors in flags, one line each.

use std::net::{Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::process::exit;

use clap::Parser;
use clap::error::{ContextKind, ErrorKind};
use grapevine::multiaddr::Protocol;
use grapevine::{Builder, Multiaddr, Node, Role};

use super::key::Key;
use super::{Failure, USAGE, complain};

/// How much of a wrong value an error repeats.
const SHOWN: usize = 60;

/// How this node takes part in the network.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Network")]
pub(crate) struct Flags {
    /// Listen on this address, e.g. /ip4/0.0.0.0/tcp/20001 or /ip4/0.0.0.0/udp/20001/quic-v1; port 0 is any
    /// (repeatable)
    #[arg(long, value_name = "MULTIADDR", value_parser = listen_address)]
    listen: Vec<Multiaddr>,
    /// Join by the grape at this address, or at host:port; a /p2p/<ID> at its end is checked (repeatable)
    #[arg(long, value_name = "MULTIADDR", value_delimiter = ',', value_parser = dial_address)]
    pub(crate) bootstrap: Vec<Multiaddr>,
    /// Tell others this address too, e.g. that of a forwarded port (repeatable)
    #[arg(long, value_name = "MULTIADDR", value_parser = external_address)]
    external: Vec<Multiaddr>,
    /// Keep the node's key in this file; made when missing, and used by one running program only
    #[arg(long, value_name = "FILE")]
    pub(crate) identity: Option<PathBuf>,
}

impl Flags {
    /// The key to run by, for as long as the program runs.
    pub(crate) fn key(&self) -> Result<Key, Failure> {
        Key::load(self.identity.as_deref())
    }

    /// Describes a node by these flags; without --listen it listens on `listen`.
    pub(crate) fn builder(&self, role: Role, key: &Key, listen: Vec<Multiaddr>) -> Builder {
        let listen = match self.listen.is_empty() {
            true => listen,
            false => self.listen.clone(),
        };
        Node::builder(role)
            .identity(key.identity.clone())
            .listen(listen)
            .external(self.external.clone())
            .bootstrap(self.bootstrap.clone())
    }
}

/// Every interface, over TCP and QUIC; IPv6 where the machine has it.
pub(crate) fn all_interfaces(port: u16) -> Vec<Multiaddr> {
    let mut hosts = vec!["/ip4/0.0.0.0"];
    if has_ipv6(port) {
        hosts.push("/ip6/::");
    }
    let addresses = hosts.into_iter().flat_map(|host| {
        [
            format!("{host}/tcp/{port}"),
            format!("{host}/udp/{port}/quic-v1"),
        ]
    });
    addresses
        .filter_map(|address| address.parse().ok())
        .collect()
}

/// Whether this machine has IPv6 and the port is free there. Nobody has asked for it by name, so
/// that it is missing is no error.
fn has_ipv6(port: u16) -> bool {
    let address = (Ipv6Addr::LOCALHOST, port);
    TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok()
}

/// Reads the command line. `--help`, `--version` and errors end the process here.
pub(crate) fn parse<P: Parser>() -> P {
    let mut error = match P::try_parse() {
        Ok(parsed) => return parsed,
        Err(error) => error,
    };
    if error.get(ContextKind::SuggestedArg).is_none() {
        // Nobody means a mistyped flag as a value.
        error.remove(ContextKind::Suggested);
    }
    // What a value parser of ours says needs no usage below it.
    if error.kind() == ErrorKind::ValueValidation
        && let Some(reason) = std::error::Error::source(&error)
    {
        let flag = error.get(ContextKind::InvalidArg);
        let flag = flag.map_or_else(String::new, |flag| format!("{flag}: "));
        complain(&format!("{flag}{reason}"));
        exit(USAGE.into());
    }
    error.exit()
}

/// An address to dial; `host:port` is TCP.
pub(crate) fn dial_address(text: &str) -> Result<Multiaddr, String> {
    // Lists may have spaces after their commas.
    let text = text.trim();
    host_and_port(text)
        .or_else(|| address(text))
        .ok_or_else(|| {
            format!(
                "{} is not the address of a grape: copy one that the grape prints, \
             such as /ip4/127.0.0.1/tcp/20001 or /dns/example.org/udp/20001/quic-v1, \
             or write host:port",
                quoted(text)
            )
        })
}

fn listen_address(text: &str) -> Result<Multiaddr, String> {
    let is_local = |address: &Multiaddr| {
        matches!(
            address.iter().next(),
            Some(Protocol::Ip4(_) | Protocol::Ip6(_))
        ) && !matches!(address.iter().last(), Some(Protocol::P2p(_)))
    };
    address(text).filter(is_local).ok_or_else(|| {
        format!(
            "{} is not an address to listen on: write it like /ip4/0.0.0.0/tcp/20001 \
             or /ip4/0.0.0.0/udp/20001/quic-v1, or with /ip6/::",
            quoted(text)
        )
    })
}

fn external_address(text: &str) -> Result<Multiaddr, String> {
    address(text).ok_or_else(|| {
        format!(
            "{} is not an address that others can dial: write it like /ip4/203.0.113.7/tcp/20001",
            quoted(text)
        )
    })
}

/// As people and other programs write it, an IPv6 address in brackets.
fn host_and_port(text: &str) -> Option<Multiaddr> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Some(Multiaddr::from(address.ip()).with(Protocol::Tcp(address.port())));
    }
    let (host, port) = text.split_once(':')?;
    let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if host.is_empty() || !host.chars().all(is_name) {
        return None;
    }
    let tcp = Protocol::Tcp(port.parse().ok()?);
    Some(Multiaddr::from(Protocol::Dns(host.into())).with(tcp))
}

/// A host, TCP or QUIC, and perhaps an id: what the nodes speak.
fn address(text: &str) -> Option<Multiaddr> {
    let address: Multiaddr = text.parse().ok()?;
    let mut parts = address.iter();
    let Some(
        Protocol::Ip4(_)
        | Protocol::Ip6(_)
        | Protocol::Dns(_)
        | Protocol::Dns4(_)
        | Protocol::Dns6(_),
    ) = parts.next()
    else {
        return None;
    };
    match parts.next() {
        Some(Protocol::Tcp(_)) => {}
        Some(Protocol::Udp(_)) if parts.next() == Some(Protocol::QuicV1) => {}
        _ => return None,
    }
    match (parts.next(), parts.next()) {
        (None | Some(Protocol::P2p(_)), None) => Some(address.clone()),
        _ => None,
    }
}

/// A whole number of seconds from `min` to `max`.
#[allow(dead_code, reason = "peer has no flag of this kind")]
pub(crate) fn seconds(text: &str, min: u64, max: u64) -> Result<std::time::Duration, String> {
    match text.parse() {
        Ok(seconds) if (min..=max).contains(&seconds) => {
            Ok(std::time::Duration::from_secs(seconds))
        }
        _ => Err(format!(
            "{} is not a whole number of seconds from {min} to {max}",
            quoted(text)
        )),
    }
}

/// A wrong value as an error repeats it.
pub(crate) fn quoted(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("\"{}...\"", &text[..end]),
        None => format!("\"{text}\""),
    }
}
