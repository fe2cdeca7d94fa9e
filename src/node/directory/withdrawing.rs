//! Takes a worker back, at this grape and wherever else it announced itself: a client of Grenache that goes
//! on by another grape leaves behind what it announced at the first one.
//!
//! Nothing proves who a worker is, but that it is at an address. For another grape, this one takes a
//! worker back if that grape is where a client might be that may do the same by this one's API: on
//! the worker's host, or on this one. For any other only if nobody listens at the worker's address, so
//! that a stranger takes nothing away that is of use.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use futures::future::join_all;
use libp2p::PeerId;
use libp2p::multiaddr::Protocol;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{Directory, has_all};
use crate::error::LookupError;
use crate::name::{self, ServiceName};
use crate::net::{Outcome, Withdrawal};
use crate::node::call;
use crate::proto::wire::{Batch, Change, Digest, ErrorCode, MAX_WITHDRAWN, WITHDRAW, Withdrawn};
use crate::store::Prefix;

/// How long a grape at which a worker announced itself may take.
const ASK_DEADLINE: Duration = Duration::from_secs(2);

/// How long the other grapes may take to confirm that a worker is gone.
const TELL_DEADLINE: Duration = Duration::from_secs(1);

/// How long it may take to see that somebody listens at an address: shorter than who asks waits.
const PROBE_DEADLINE: Duration = Duration::from_millis(500);

impl Directory {
    /// A worker is gone, at whichever grape it announced itself. Returns when no grape that can be told
    /// names it any more, or it is known that one does.
    pub(crate) async fn withdraw(&self, service: &str, at: SocketAddr) -> Withdrawn {
        let (digest, aliases) = (name::digest(service), self.aliases(at));
        let was_own = self.withdraw_own(&digest, &aliases);
        let Some(others) = self.grapes_of(service, &aliases).await else {
            return Withdrawn::Left;
        };
        let asked = others
            .iter()
            .map(|grape| self.ask(*grape, &digest, &aliases));
        let asked = join_all(asked).await;
        if asked.contains(&Withdrawn::Left) || was_own && !self.is_told().await {
            return Withdrawn::Left;
        }
        match was_own || asked.contains(&Withdrawn::Gone) {
            true => Withdrawn::Gone,
            false => Withdrawn::Unknown,
        }
    }

    /// Takes back what another grape asks for.
    pub(crate) async fn withdraw_for_other(&self, withdrawal: Withdrawal) {
        let mut withdrawn = Withdrawn::Unknown;
        for worker in &withdrawal.workers {
            let mut aliases = self.aliases(worker.at);
            let own = self.registry.workers().own(&worker.service, Instant::now());
            aliases.retain(|at| own.contains(at));
            let may = self.may_withdraw(withdrawal.host, worker.at);
            if !may && is_any_there(&aliases).await {
                return withdrawal.answer(Withdrawn::Left);
            }
            if self.withdraw_own(&worker.service, &aliases) {
                withdrawn = Withdrawn::Gone;
            }
        }
        if withdrawn == Withdrawn::Gone && !self.is_told().await {
            withdrawn = Withdrawn::Left;
        }
        withdrawal.answer(withdrawn);
    }

    /// Takes back a worker of this grape; says whether it was known.
    fn withdraw_own(&self, service: &Digest, aliases: &[SocketAddr]) -> bool {
        let mut was_own = false;
        for at in aliases {
            was_own |= self.registry.workers().withdraw(service, *at);
        }
        if was_own {
            self.registry.on_changed();
        }
        was_own
    }

    /// Whether a client on that host could take the worker back by itself.
    fn may_withdraw(&self, host: Option<IpAddr>, worker: SocketAddr) -> bool {
        // One without a host is in this process. Of an unspecified one nothing is known: it may be any.
        host.is_none_or(|host| {
            let host = host.to_canonical();
            host.is_loopback() || host == worker.ip() || self.own_hosts().contains(&host)
        })
    }

    /// The other grapes at which a worker may have announced itself; `None` if that is not known.
    async fn grapes_of(&self, service: &str, aliases: &[SocketAddr]) -> Option<Vec<PeerId>> {
        let (digest, now) = (name::digest(service), Instant::now());
        let mut grapes = self.registry.workers().grapes_of(&digest, aliases, now);
        let has_all = has_all(&self.node.shared.handle.grapes.borrow());
        let name = ServiceName::from_wire(service).ok();
        // This one has heard of all workers, or nobody else finds a name of Grenache's alone.
        let Some(name) = name.filter(|_| !has_all) else {
            return Some(grapes);
        };
        let found = match self.node.lookup(&name).await {
            Ok(found) => found,
            Err(LookupError::NotFound(_)) => Vec::new(),
            // Somebody is named for it and cannot be asked.
            Err(_) => return None,
        };
        for provider in found {
            if !grapes.contains(&provider.peer) {
                grapes.push(provider.peer);
            }
        }
        Some(grapes)
    }

    /// Asks another grape to take a worker back.
    async fn ask(&self, grape: PeerId, service: &Digest, aliases: &[SocketAddr]) -> Withdrawn {
        let change = |at: &SocketAddr| Change {
            service: *service,
            at: *at,
            lease: None,
        };
        let batch = Batch {
            changes: aliases.iter().map(change).collect(),
            find: Vec::new(),
        };
        let payload = batch.encode().unwrap_or_default();
        let outcome = call::call_peer(&self.node, grape, WITHDRAW, payload, ASK_DEADLINE).await;
        let withdrawn = match outcome {
            Outcome::Answered(Ok(payload)) => Withdrawn::decode(&payload),
            // A provider that is no grape has no workers.
            Outcome::Answered(Err(error)) if error.code == ErrorCode::UnknownService => {
                Withdrawn::Unknown
            }
            _ => Withdrawn::Left,
        };
        if withdrawn != Withdrawn::Left {
            self.forget(grape, &batch.changes);
        }
        withdrawn
    }

    /// Another grape has these workers no more, which it tells this one too.
    fn forget(&self, grape: PeerId, changes: &[Change]) {
        let mut workers = self.registry.workers();
        for change in changes {
            // What takes one back needs no room.
            let _ = workers.apply(grape, Prefix::Local, change, Instant::now());
        }
    }

    /// Whether the other grapes have confirmed what changed of this one's workers, soon enough.
    async fn is_told(&self) -> bool {
        let last = self.registry.workers().last_change();
        let mut confirmed = self.node.shared.directory.confirmed.subscribe();
        let told = confirmed.wait_for(|confirmed| *confirmed >= last);
        matches!(timeout(TELL_DEADLINE, told).await, Ok(Ok(_)))
    }

    /// The addresses that mean the same worker here and elsewhere: one on this host has several.
    fn aliases(&self, at: SocketAddr) -> Vec<SocketAddr> {
        let at = SocketAddr::new(at.ip().to_canonical(), at.port());
        let own = self.own_hosts();
        let mut aliases = vec![at];
        if at.ip().is_loopback() || own.contains(&at.ip()) {
            let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
            let hosts = own.into_iter().chain(loopback);
            aliases.extend(hosts.map(|host| SocketAddr::new(host, at.port())));
            aliases.sort_unstable();
            aliases.dedup();
            aliases.truncate(MAX_WITHDRAWN);
        }
        aliases
    }

    /// The hosts of the addresses at which this grape can be dialled.
    fn own_hosts(&self) -> Vec<IpAddr> {
        let host = |part: Protocol<'_>| match part {
            Protocol::Ip4(ip) => Some(IpAddr::from(ip)),
            Protocol::Ip6(ip) => Some(IpAddr::from(ip).to_canonical()),
            _ => None,
        };
        let addresses = self.node.addresses();
        let hosts = addresses
            .iter()
            .filter_map(|address| address.iter().find_map(host));
        hosts.collect()
    }
}

/// Whether somebody may listen at any of these addresses: only a host that refuses says that nobody does.
async fn is_any_there(addresses: &[SocketAddr]) -> bool {
    let probes = addresses.iter().map(|at| async move {
        let connected = timeout(PROBE_DEADLINE, TcpStream::connect(at)).await;
        !matches!(connected, Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused)
    });
    join_all(probes).await.contains(&true)
}
