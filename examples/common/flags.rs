//! The flags that all programs have, and errors in flags, one line each.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::process::exit;

use clap::Parser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use grapevine::multiaddr::Protocol;
use grapevine::{Builder, Multiaddr, Node, PeerId, Role};

use super::key::Key;
use super::stop::{Cause, Stop};
use super::{Failure, USAGE, complain};

/// How much of a wrong value an error repeats.
const SHOWN: usize = 60;

/// How this node takes part in the network.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Network")]
pub(crate) struct Flags {
    /// Listen on this address, e.g. /ip4/0.0.0.0/tcp/20001 or /ip4/0.0.0.0/udp/20001/quic-v1, or at
    /// ip:port over both; port 0 is any (repeatable)
    #[arg(long, value_name = "MULTIADDR", value_parser = listen_addresses)]
    listen: Vec<Listen>,
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

/// What one flag asks for.
#[derive(Clone, Debug)]
struct Listen(Vec<Multiaddr>);

impl Flags {
    /// The key to run by, for as long as the program runs.
    pub(crate) async fn key(&self, stop: &Stop) -> Result<Result<Key, Failure>, Cause> {
        let path = self.identity.clone();
        stop.or_blocking(move || Key::load(path.as_deref())).await
    }

    /// Describes a node by these flags; without --listen it listens on `listen`.
    pub(crate) fn builder(&self, role: Role, key: &Key, listen: Vec<Multiaddr>) -> Builder {
        let given = self.listen.iter().flat_map(|Listen(given)| given.clone());
        let listen = match self.listen.is_empty() {
            true => listen,
            false => given.collect(),
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
    let mut addresses = tcp_and_quic(Ipv4Addr::UNSPECIFIED.into(), port);
    if has_ipv6(port) {
        addresses.extend(tcp_and_quic(Ipv6Addr::UNSPECIFIED.into(), port));
    }
    addresses
}

/// Both on one port of one host.
pub(crate) fn tcp_and_quic(host: IpAddr, port: u16) -> Vec<Multiaddr> {
    let tcp = Multiaddr::from(host).with(Protocol::Tcp(port));
    let quic = Multiaddr::from(host).with(Protocol::Udp(port));
    vec![tcp, quic.with(Protocol::QuicV1)]
}

/// Whether this machine has IPv6 and the port is free there. Nobody has asked for it by name, so
/// that it is missing is no error.
fn has_ipv6(port: u16) -> bool {
    let address = (Ipv6Addr::LOCALHOST, port);
    TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok()
}

/// Reads the command line. `--help`, `--version` and errors end the process here. `hint` says how a
/// text is given that looks like a flag, where one can be.
pub(crate) fn parse<P: Parser>(hint: Option<&'static str>) -> P {
    let mut error = match P::try_parse() {
        Ok(parsed) => return parsed,
        Err(error) => error,
    };
    if error.kind() == ErrorKind::UnknownArgument {
        let hint = hint.into_iter().map(Into::into).collect();
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(hint));
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
    let address = host_and_port(text).or_else(|| address(text));
    let address = address.ok_or_else(|| {
        let example = "copy one that the grape prints, such as /ip4/127.0.0.1/tcp/20001 or \
                       /dns/example.org/udp/20001/quic-v1, or write host:port";
        is_not("the address of a grape", text, example)
    })?;
    refuse_wildcards(&address, text)?;
    Ok(address)
}

fn listen_addresses(text: &str) -> Result<Listen, String> {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Ok(Listen(tcp_and_quic(address.ip(), address.port())));
    }
    let is_local = |address: &Multiaddr| {
        matches!(
            address.iter().next(),
            Some(Protocol::Ip4(_) | Protocol::Ip6(_))
        ) && !matches!(address.iter().last(), Some(Protocol::P2p(_)))
    };
    let address = address(text).filter(is_local).ok_or_else(|| {
        let example = "write it like /ip4/0.0.0.0/tcp/20001 or /ip4/0.0.0.0/udp/20001/quic-v1, or \
                       with /ip6/::, or 0.0.0.0:20001 for both";
        is_not("an address to listen on", text, example)
    })?;
    Ok(Listen(vec![address]))
}

fn external_address(text: &str) -> Result<Multiaddr, String> {
    let address = address(text).ok_or_else(|| {
        let example = "write it like /ip4/203.0.113.7/tcp/20001";
        is_not("an address that others can dial", text, example)
    })?;
    refuse_wildcards(&address, text)?;
    Ok(address)
}

/// What is wrong with an address: the part that is, if it is plain which, or else how one looks.
fn is_not(what: &str, text: &str, example: &str) -> String {
    let reason = wrong_part(text).unwrap_or_else(|| example.into());
    format!("{} is not {what}: {reason}", quoted(text))
}

/// The first part of an address that cannot be right.
fn wrong_part(text: &str) -> Option<String> {
    let Some(parts) = text.strip_prefix('/') else {
        let (host, port) = text.rsplit_once(':')?;
        // Otherwise it may be an IPv6 address without a port.
        let is_port = !host.contains(':') || host.ends_with(']');
        return if is_port {
            port_number(port).err()
        } else {
            None
        };
    };
    if parts.ends_with('/') {
        return Some("leave out the / at its end".into());
    }
    let mut parts = parts.split('/').peekable();
    while let Some(kind) = parts.next() {
        if kind == "quic-v1" {
            continue;
        }
        let value = parts.next().unwrap_or_default();
        let wrong = match kind {
            "ip4" if value.parse::<Ipv4Addr>().is_err() => {
                Some(format!("{} is no IPv4 address", quoted(value)))
            }
            "ip6" if value.parse::<Ipv6Addr>().is_err() => {
                Some(format!("{} is no IPv6 address", quoted(value)))
            }
            "udp" if parts.peek() != Some(&"quic-v1") => {
                let quic = || format!("put /quic-v1 behind /udp/{value}");
                Some(port_number(value).err().unwrap_or_else(quic))
            }
            "tcp" | "udp" => port_number(value).err(),
            "p2p" if value.parse::<PeerId>().is_err() => {
                Some("what follows /p2p/ is no whole id: copy all of it".into())
            }
            _ => None,
        };
        if wrong.is_some() {
            return wrong;
        }
    }
    None
}

/// Refuses to dial any address of a machine, or any port.
fn refuse_wildcards(address: &Multiaddr, text: &str) -> Result<(), String> {
    let text = quoted(text);
    for part in address.iter() {
        let is_any = match part {
            Protocol::Ip4(ip) => ip.is_unspecified(),
            Protocol::Ip6(ip) => ip.is_unspecified(),
            _ => false,
        };
        if is_any {
            return Err(format!(
                "{text} is for listening; give the machine's own address"
            ));
        }
        if let Protocol::Tcp(0) | Protocol::Udp(0) = part {
            return Err(format!(
                "port 0 in {text} is for listening; give the port that is listened on"
            ));
        }
    }
    Ok(())
}

/// A port, or 0 for any.
pub(crate) fn port_number(text: &str) -> Result<u16, String> {
    text.parse().map_err(|_| {
        format!(
            "{} is not a port: give a whole number up to 65535",
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
