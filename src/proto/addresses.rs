//! Addresses of a peer as they are kept and handed on: each once, and without the peer's id.
//!
//! Implementations differ in whether `/p2p/<id>` stands behind an address. libp2p's Kademlia puts it
//! behind all that it reads, so that one address comes in two forms and is counted as two; and
//! go-libp2p before 0.26 does not dial an address that has it.

use std::collections::HashSet;
use std::net::IpAddr;

use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId};

/// The addresses of `peer`, in their order, each once and without its id behind it. Left out are
/// those that lead to another peer, and those that say nothing else.
pub(crate) fn plain<'a>(
    peer: &'a PeerId,
    addresses: impl IntoIterator<Item = &'a Multiaddr> + 'a,
) -> impl Iterator<Item = Multiaddr> + 'a {
    let mut seen = HashSet::new();
    let addresses = addresses.into_iter();
    addresses
        .filter_map(|address| without_id(peer, address))
        .filter(move |address| seen.insert(address.clone()))
}

/// The host that an address leads to: the last one that it names, which is what transports dial, so that
/// nobody passes for another host by an address of their own making. In-process ones have none, and are
/// all one host; nor has one by a name.
pub(crate) fn host(address: &Multiaddr) -> Option<IpAddr> {
    let hosts = address.iter().filter_map(|part| match part {
        Protocol::Ip4(ip) => Some(ip.into()),
        Protocol::Ip6(ip) => Some(IpAddr::from(ip).to_canonical()),
        _ => None,
    });
    hosts.last()
}

fn without_id(peer: &PeerId, address: &Multiaddr) -> Option<Multiaddr> {
    let mut plain = address.clone();
    loop {
        match plain.iter().last()? {
            Protocol::P2p(id) if id == *peer => drop(plain.pop()),
            Protocol::P2p(_) => return None,
            _ => return Some(plain),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(addresses: &[String]) -> Vec<Multiaddr> {
        let parsed = addresses.iter().map(|address| address.parse());
        parsed.collect::<Result<_, _>>().expect("addresses")
    }

    #[test]
    fn each_address_is_kept_once_and_without_the_peers_id() {
        let (peer, other) = (PeerId::random(), PeerId::random());
        let table = [
            (
                vec!["/ip4/192.0.2.1/tcp/1".to_owned()],
                vec!["/ip4/192.0.2.1/tcp/1".to_owned()],
            ),
            (
                vec![
                    format!("/ip4/192.0.2.1/tcp/1/p2p/{peer}"),
                    "/ip4/192.0.2.1/udp/1/quic-v1".into(),
                    "/ip4/192.0.2.1/tcp/1".into(),
                    format!("/ip4/192.0.2.1/tcp/1/p2p/{peer}/p2p/{peer}"),
                ],
                vec![
                    "/ip4/192.0.2.1/tcp/1".into(),
                    "/ip4/192.0.2.1/udp/1/quic-v1".into(),
                ],
            ),
            (vec![format!("/ip4/192.0.2.1/tcp/1/p2p/{other}")], vec![]),
            (
                vec![format!("/ip4/192.0.2.1/tcp/1/p2p/{other}/p2p/{peer}")],
                vec![],
            ),
            (
                vec![format!(
                    "/ip4/192.0.2.1/tcp/1/p2p/{other}/p2p-circuit/p2p/{peer}"
                )],
                vec![format!("/ip4/192.0.2.1/tcp/1/p2p/{other}/p2p-circuit")],
            ),
            (vec![format!("/p2p/{peer}"), String::new()], vec![]),
        ];
        for (given, expected) in table {
            let (given, expected) = (parsed(&given), parsed(&expected));
            let plain: Vec<_> = plain(&peer, &given).collect();
            assert_eq!(plain, expected, "{given:?}");
        }
    }
}
