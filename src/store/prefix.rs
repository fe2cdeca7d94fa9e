//! Which network somebody is in.

use std::net::IpAddr;

use libp2p::Multiaddr;

use crate::proto::addresses;

/// The network that a peer belongs to when the store is shared out: what one holder of addresses
/// gets for free, a /24 of IPv4 or a /48 of IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Prefix {
    /// The first 24 bits of an IPv4 address, also of one mapped into IPv6.
    V4([u8; 3]),
    /// The first 48 bits of an IPv6 address.
    V6([u8; 6]),
    /// No IP address: the memory transport, or nothing known.
    Local,
}

impl From<IpAddr> for Prefix {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(v4) => {
                let [a, b, c, _] = v4.octets();
                Self::V4([a, b, c])
            }
            IpAddr::V6(v6) => {
                let [a, b, c, d, e, f, ..] = v6.octets();
                Self::V6([a, b, c, d, e, f])
            }
        }
    }
}

impl From<&Multiaddr> for Prefix {
    fn from(address: &Multiaddr) -> Self {
        addresses::host(address).map_or(Self::Local, Self::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_is_a_24_of_ipv4_and_a_48_of_ipv6() {
        let table = [
            ("/ip4/192.0.2.77/tcp/1", Prefix::V4([192, 0, 2])),
            ("/ip4/192.0.2.78/udp/1/quic-v1", Prefix::V4([192, 0, 2])),
            ("/ip6/::ffff:192.0.2.77/tcp/1", Prefix::V4([192, 0, 2])),
            (
                "/ip6/2001:db8:1:2::3/tcp/1",
                Prefix::V6([0x20, 0x01, 0x0d, 0xb8, 0, 1]),
            ),
            (
                "/ip4/127.0.0.1/ip4/192.0.2.77/tcp/1",
                Prefix::V4([192, 0, 2]),
            ),
            ("/memory/1", Prefix::Local),
            ("/dns/example.org/tcp/1", Prefix::Local),
        ];
        for (address, prefix) in table {
            let parsed: Multiaddr = address.parse().unwrap();
            assert_eq!(Prefix::from(&parsed), prefix, "{address}");
        }
        assert_eq!(Prefix::from(&Multiaddr::empty()), Prefix::Local);
    }
}
