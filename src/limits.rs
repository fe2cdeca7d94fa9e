//! The protocol ids, sizes and intervals that several modules share, and what an operator may want to
//! change ([`Limits`]), each with its reason.
//!
//! What a frame may carry, and how many names a peer may announce and look up each second, is part of
//! the [wire](crate::proto#limits). What one module alone uses stands in that module.

use std::fmt::Debug;
use std::ops::RangeInclusive;
use std::time::Duration;

use libp2p::StreamProtocol;

/// Kademlia between grapes and their clients. Its own id keeps this network apart from others.
pub const KAD_PROTOCOL: StreamProtocol = StreamProtocol::new("/grapevine/kad/1.0.0");

/// The standard rendezvous protocol, so that a stock client works against a grape.
pub const RENDEZVOUS_PROTOCOL: StreamProtocol = StreamProtocol::new("/rendezvous/1.0.0");

/// Requests and replies.
pub const RPC_PROTOCOL: StreamProtocol = StreamProtocol::new("/grapevine/rpc/1.0.0");

/// The same on streams that stay open and carry many requests. Its own id, because other
/// implementations of requests and replies take one request on a stream.
pub const KEPT_PROTOCOL: StreamProtocol = StreamProtocol::new("/grapevine/rpc/kept/1.0.0");

/// Told by who keeps names and answers for them by the RPC: a grape.
pub const NAMES_PROTOCOL: StreamProtocol = StreamProtocol::new("/grapevine/names/1.0.0");

/// Told by who keeps other grapes' workers by the RPC.
pub const REGISTRY_PROTOCOL: StreamProtocol = StreamProtocol::new("/grapevine/registry/1.0.0");

/// The protocol version that identify tells.
pub const IDENTIFY_VERSION: &str = "/grapevine/1.0.0";

/// The agent that identify tells, for people: what a node can do is told by its protocols.
pub const AGENT_VERSION: &str = concat!("grapevine/", env!("CARGO_PKG_VERSION"));

/// How long a grape keeps an announcement that is not renewed, at most: a killed peer's name is gone
/// then. Three renewals fit in, so that one lost message does not make a living peer disappear.
pub const LEASE: Duration = Duration::from_secs(90);

/// How long a grape asks a provider that announced itself by Kademlia whether it lives, instead of
/// forgetting it when a lease ends: as long as Kademlia's specification lets such a record live.
pub const KADEMLIA_VALIDITY: Duration = Duration::from_secs(48 * 3_600);

/// A lease is renewed when this part of it has passed.
pub const RENEWALS_PER_LEASE: u32 = 3;

/// The shortest lease a grape grants. Below it renewals would be the main load.
pub const MIN_LEASE: Duration = Duration::from_secs(3);

/// How long a name that was taken back stays so for Kademlia. Its announcements come on streams of
/// their own, and one that was under way may arrive after the withdrawal.
pub const WITHDRAWN: Duration = Duration::from_secs(5);

/// How long a whole lookup may take. It ends much sooner, as soon as those that are asked have answered
/// or are given up; only a machine or a network that is overloaded takes so long, and is not to be taken
/// for one in which nobody announces the name. Who cannot wait has a deadline of their own.
pub const LOOKUP_DEADLINE: Duration = Duration::from_secs(30);

/// How long a lookup that has found a live provider waits for slower ones.
pub const LOOKUP_SETTLE: Duration = Duration::from_millis(500);

/// How long a lookup waits for a connection with a provider: one that is gone refuses TCP at once and
/// leaves QUIC without an answer. Three round trips of a bad line fit in; a later connection still counts.
pub const DIAL_DEADLINE: Duration = Duration::from_secs(3);

/// How long a provider may take to say whether it serves the name.
pub const SERVES_DEADLINE: Duration = Duration::from_secs(3);

/// The lookups that run at once; further ones wait. Kademlia walks all its queries at each step,
/// so that more of them at once would be slower than one after another. The questions whether a
/// provider serves its names fit into [`MAX_RPC_STREAMS`] beside the requests to it.
pub const MAX_LOOKUPS: usize = 64;

/// The rendezvous streams of one connection: a discovery for each lookup, and registrations.
pub const MAX_RENDEZVOUS_STREAMS: usize = 112;

/// The providers that one lookup dials. A name with more of them is found by some of them.
pub const MAX_CANDIDATES: usize = 64;

/// How long a request may take when its caller does not say, as in Grenache.
pub const REQUEST_DEADLINE: Duration = Duration::from_secs(10);

/// The longest that a caller waits for a reply, whatever its deadline: five times as long as Grenache's
/// callers do by default, between whom and our peers a grape is a caller.
pub const MAX_REQUEST_TIME: Duration = Duration::from_secs(300);

/// How long a peer may take to send one frame it has begun, or to take one.
pub const FRAME_DEADLINE: Duration = Duration::from_secs(10);

/// The requests with payloads below 64 KiB that a node has open on the stream that it keeps to a
/// peer; further ones wait their turn. With the other two it stays below three quarters of
/// [`Limits::inbound_requests`], what the peer lets one node have open.
pub const MAX_PIPELINED_TO_PEER: usize = 512;

/// Those with larger payloads, on a stream of their own.
pub const MAX_LARGE_TO_PEER: usize = 64;

/// The streams of one protocol, each with a single request, that a node has open to a peer: js-libp2p
/// takes 32 on a connection and resets the next one.
pub const MAX_STREAMS_TO_PEER: usize = 31;

/// Those of them that are left to the node's own questions, so that requests that take long do not
/// keep it from asking whether a name is served.
pub const MAX_QUESTIONS_TO_PEER: usize = 8;

/// The requests to one peer that have a stream of their own; further ones wait their turn.
pub const MAX_SINGLE_REQUESTS: usize = MAX_STREAMS_TO_PEER - MAX_QUESTIONS_TO_PEER;

/// The requests open on one stream; it is not read further until one of them is answered.
pub const MAX_PIPELINED: usize = 1_024;

/// The RPC streams that a connection accepts, and as many that it opens.
pub const MAX_RPC_STREAMS: usize = 160;

/// The RPC streams that a node serves at once, all connections together: a resting one holds
/// 22 KiB after small requests, and at most 70.
pub const MAX_SERVED_STREAMS: usize = 16_384;

/// The streams of one connection that yamux accepts: all protocols together. As few as their limits
/// add up to, because each may hold 256 KiB that nobody reads.
pub const MAX_STREAMS: usize = 320;

/// How long a dial and the handshake after it may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How often a bootstrap grape is asked something when nothing else is: well within the default
/// [`Limits::idle`], at which either side would close the connection.
pub const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(45);

/// How often a connection is checked to be alive, and how long the answer may take. The second answer
/// that is missing closes it: who is gone without a word is noticed within half a minute.
pub const PING_INTERVAL: Duration = Duration::from_secs(8);
/// See [`PING_INTERVAL`].
pub const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// How often QUIC tells that a connection lives; after three times that without a word it is dead.
/// TCP's end is told by the system.
pub const QUIC_KEEP_ALIVE: Duration = Duration::from_secs(2);

/// The first and the longest pause before a bootstrap address is dialled again.
pub const REDIAL_MIN: Duration = Duration::from_millis(250);
/// See [`REDIAL_MIN`]. Short, because a grape that is restarted should be found within seconds.
pub const REDIAL_MAX: Duration = Duration::from_secs(5);

/// The bootstrap addresses a node takes.
pub const MAX_BOOTSTRAP: usize = 64;

/// The names that one node announces.
pub const MAX_ANNOUNCED: usize = 20_000;

/// The addresses of a provider that are kept and dialled.
pub const MAX_ADDRESSES: usize = 8;

/// How long shutting down waits for the withdrawals and the open requests.
pub const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(2);

/// What a node takes on at once. Every field bounds something a remote can make grow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The requests of others that are open at once; one more is answered `busy`. One peer may have three
    /// times as many as are left: three quarters when it is alone. 2,048 by default, so that three that
    /// have all they may have under way find room; from 1 to a million.
    pub inbound_requests: usize,
    /// The payload bytes of those requests and of their replies that are held at once, and again as
    /// many of requests that are still arriving. 64 MiB by default, 64 of the largest payloads; at most
    /// 2 GiB. Those
    /// of up to 4 KiB do not count; the number of requests bounds them. Beside them each peer may leave
    /// 64 KiB of short answers on names and workers unread.
    pub inbound_bytes: usize,
    /// The established connections that others opened. 4,096 by default, each about 100 KB.
    pub inbound_connections: u32,
    /// The connections that others have begun and not finished. 512 by default.
    pub pending_connections: u32,
    /// The connections from one address prefix (/24 of IPv4, /48 of IPv6), so that one network
    /// cannot take them all. 2,048 by default.
    pub connections_per_prefix: u32,
    /// The connections with one peer. 8 by default: TCP and QUIC, each way, twice.
    pub connections_per_peer: u32,
    /// No new connection is accepted while the process uses more bytes of memory than this.
    /// 1 GiB by default; `None` switches the check off.
    pub memory: Option<usize>,
    /// A connection on which nothing happens is closed after this. 120 s by default: longer than a
    /// renewal interval, so that announcing peers stay connected to their grapes. A grape of a network
    /// of many hundred saves memory by less: it meets most of the others, and dials who is needed. From a
    /// second to a day.
    pub idle: Duration,
    /// How often a node asks its way through the whole network again, so that its routing table
    /// stays good. Every 5 minutes by default, as libp2p has it, from a second to a day; `None`: only
    /// when it joins.
    pub explore: Option<Duration>,
    /// The provider records that a grape keeps.
    pub store: Bounds,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            inbound_requests: 2_048,
            inbound_bytes: 64 << 20,
            inbound_connections: 4_096,
            pending_connections: 512,
            connections_per_prefix: 2_048,
            connections_per_peer: 8,
            memory: Some(1 << 30),
            idle: Duration::from_secs(120),
            explore: Some(Duration::from_secs(300)),
            store: Bounds::default(),
        }
    }
}

impl Limits {
    /// Whether every field is one that a node can work by.
    pub(crate) fn check(&self) -> Result<(), OutOfRange> {
        const TIMES: RangeInclusive<Duration> =
            Duration::from_secs(1)..=Duration::from_secs(24 * 60 * 60);
        in_range("inbound_requests", self.inbound_requests, &(1..=1_000_000))?;
        in_range("inbound_bytes", self.inbound_bytes, &(0..=2 << 30))?;
        in_range("idle", self.idle, &TIMES)?;
        self.explore
            .map_or(Ok(()), |explore| in_range("explore", explore, &TIMES))
    }
}

/// A field of [`Limits`] that no node can work by.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{limit} is {given}, which is not from {least} to {most}")]
#[non_exhaustive]
pub struct OutOfRange {
    /// The field.
    pub limit: &'static str,
    /// Its value.
    pub given: String,
    /// The least that it may be.
    pub least: String,
    /// The most that it may be.
    pub most: String,
}

fn in_range<T: Debug + PartialOrd>(
    limit: &'static str,
    given: T,
    range: &RangeInclusive<T>,
) -> Result<(), OutOfRange> {
    if range.contains(&given) {
        return Ok(());
    }
    let [given, least, most] =
        [&given, range.start(), range.end()].map(|value| format!("{value:?}"));
    Err(OutOfRange {
        limit,
        given,
        least,
        most,
    })
}

/// How much a grape's store of provider records holds. What bounds a single record is part of the
/// [wire](crate::proto#limits).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Records in total, where each full 512 bytes of a peer's addresses and envelope count as one
    /// more. 200,000: measured 30 MB when ten peers announce them all (45 MB by rendezvous), and
    /// 310 MB when an attacker makes up a peer for each, with almost 512 bytes of addresses.
    pub records: usize,
    /// Records of one address prefix. 100,000: one network never takes more than half the store.
    pub per_prefix: usize,
    /// Records of one peer. 20,000: a gateway in front of many services, a tenth of the store.
    pub per_peer: usize,
    /// Providers of one key. 1,000: fifty different full answers; nobody asks for more.
    pub per_key: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            records: 200_000,
            per_prefix: 100_000,
            per_peer: 20_000,
            per_key: 1_000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_no_node_can_work_by_are_named() {
        type Change = fn(&mut Limits);
        let table: [(Change, Result<(), &str>); 12] = [
            (|_| (), Ok(())),
            (
                |limits| limits.idle = Duration::ZERO,
                Err("idle is 0ns, which is not from 1s to 86400s"),
            ),
            (|limits| limits.idle = Duration::MAX, Err("idle")),
            (|limits| limits.idle = Duration::from_secs(1), Ok(())),
            (|limits| limits.idle = Duration::from_secs(86_400), Ok(())),
            (|limits| limits.explore = None, Ok(())),
            (
                |limits| limits.explore = Some(Duration::ZERO),
                Err("explore"),
            ),
            (
                |limits| limits.inbound_requests = 0,
                Err("inbound_requests is 0"),
            ),
            (
                |limits| limits.inbound_requests = usize::MAX,
                Err("inbound_requests"),
            ),
            (
                |limits| limits.inbound_bytes = usize::MAX,
                Err("inbound_bytes"),
            ),
            (|limits| limits.inbound_bytes = 2 << 30, Ok(())),
            (|limits| limits.store.records = 0, Ok(())),
        ];
        for (change, expected) in table {
            let mut limits = Limits::default();
            change(&mut limits);
            match (limits.check(), expected) {
                (Ok(()), Ok(())) => {}
                (Err(error), Err(start)) => {
                    assert!(error.to_string().starts_with(start), "{error}")
                }
                (given, expected) => panic!("{given:?} instead of {expected:?}"),
            }
        }
    }
}
