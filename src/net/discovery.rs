//! Who serves which name: carries [`Lookups`] and [`Announcements`] to and from Kademlia.
//!
//! Both decide; this struct keeps the ids of Kademlia's queries and the callers that wait.

use std::collections::HashMap;
use std::time::Instant;

use libp2p::core::Endpoint;
use libp2p::kad::{
    self, GetClosestPeersError, GetClosestPeersOk, GetProvidersError, GetProvidersOk,
    InboundRequest, ProgressStep, QueryId, QueryResult, QueryStats, RecordKey,
};
use libp2p::swarm::{ConnectionId, NetworkBehaviour};
use libp2p::{Multiaddr, PeerId};
use tokio::sync::{mpsc, oneshot};

use super::connectivity::{is_plain, without_id};
use crate::error::LookupError;
use crate::limits::MAX_ADDRESSES;
use crate::name::{Key, ServiceName};
use crate::proto::addresses;
use crate::proto::announce::{Announcements, Place};
use crate::proto::lookup::{Answered, Lookups, Outcome};
use crate::store::Records;

/// The Kademlia behaviour of the Swarm.
pub(crate) type Kademlia = kad::Behaviour<Records>;

/// Where a caller waits for a lookup.
#[derive(Debug)]
pub(crate) enum Waiter {
    /// For all live providers.
    All(oneshot::Sender<Result<Vec<PeerId>, LookupError>>),
    /// For the first one.
    First(oneshot::Sender<Result<PeerId, LookupError>>),
    /// For every provider that is named, for no longer than until then.
    Every {
        until: Instant,
        told: mpsc::Sender<Sought>,
    },
}

/// What a caller that waits for every provider is told, for each one and at the end.
#[derive(Debug)]
pub(crate) enum Sought {
    /// A provider is live.
    Live(PeerId),
    /// The lookup is over; these were named and not reached.
    Over(Result<Vec<PeerId>, LookupError>),
}

/// What the driver must know of an event of Kademlia.
#[derive(Debug)]
pub(crate) enum Learned {
    /// The answer of this number to a query named providers of a name.
    Providers(ServiceName, usize, Vec<PeerId>),
    /// A peer asks this node to keep a provider record of its own.
    Record(kad::ProviderRecord),
    /// A peer asks this node to keep a value.
    Value(PeerId, kad::Record),
    /// A name was sent to the closest grapes; `false`: there was none.
    Provided(ServiceName, bool),
    /// These grapes are the closest to a name's key.
    Walked(ServiceName, Vec<PeerId>),
    /// This node has asked for the grapes nearest to it; `false`: there was nobody to ask.
    LookedAround(bool),
}

/// Lookups and announcements of a node.
#[derive(Debug)]
pub(crate) struct Discovery {
    pub(crate) lookups: Lookups<QueryId>,
    pub(crate) announcements: Announcements,
    waiters: HashMap<ServiceName, Vec<Waiter>>,
    providing: HashMap<QueryId, Provided>,
    walks: HashMap<QueryId, Walk>,
}

/// What the closest grapes are asked for.
#[derive(Debug)]
enum Walk {
    /// To know who is there.
    Around,
    /// To tell them of a name.
    For(ServiceName),
}

/// What a query provides.
#[derive(Debug)]
enum Provided {
    /// A name that this node announces.
    Own(ServiceName),
    /// The name of a worker that this grape carries requests to; who waits for it is told.
    Carried(oneshot::Sender<()>),
}

impl Discovery {
    pub(crate) fn new(local: PeerId) -> Self {
        Self {
            lookups: Lookups::new(local),
            announcements: Announcements::new(),
            waiters: HashMap::new(),
            providing: HashMap::new(),
            walks: HashMap::new(),
        }
    }

    /// Somebody waits for a lookup of the name.
    pub(crate) fn wait(&mut self, name: ServiceName, waiter: Waiter) {
        self.waiters.entry(name).or_default().push(waiter);
    }

    /// Whether anybody still waits for the name. Callers that went away are forgotten.
    pub(crate) fn is_awaited(&mut self, name: &ServiceName) -> bool {
        let Some(waiters) = self.waiters.get_mut(name) else {
            return false;
        };
        waiters.retain(|waiter| !waiter.is_gone());
        if waiters.is_empty() {
            self.waiters.remove(name);
            return false;
        }
        true
    }

    /// The names that somebody waits for.
    pub(crate) fn awaited(&self) -> Vec<ServiceName> {
        self.waiters.keys().cloned().collect()
    }

    /// The lookup of a name runs: it goes on for as long as a caller wants all who are named.
    pub(crate) fn on_started(&mut self, name: &ServiceName) {
        for waiter in self.waiters.get(name).into_iter().flatten() {
            if let Waiter::Every { until, .. } = waiter {
                self.lookups.want_all(name, *until);
            }
        }
    }

    /// Somebody waits for a lookup that runs already.
    pub(crate) fn join(&mut self, name: ServiceName, waiter: Waiter) {
        match &waiter {
            Waiter::Every { until, told } => {
                for provider in self.lookups.want_all(&name, *until) {
                    tell(told, Sought::Live(provider));
                }
            }
            _ => self.lookups.want_some(&name),
        }
        self.wait(name, waiter);
    }

    /// A provider is live: who waits for the first one has it.
    pub(crate) fn on_found(&mut self, name: &ServiceName, provider: PeerId) {
        let Some(waiters) = self.waiters.get_mut(name) else {
            return;
        };
        let firsts = waiters.extract_if(.., |waiter| matches!(waiter, Waiter::First(_)));
        for waiter in firsts {
            waiter.answer(Ok(vec![provider]));
        }
        for waiter in &*waiters {
            if let Waiter::Every { told, .. } = waiter {
                tell(told, Sought::Live(provider));
            }
        }
        if waiters.is_empty() {
            // The lookup goes on for the routes, though nobody waits for it.
            self.waiters.remove(name);
        }
    }

    /// Who wants some of those that a lookup finds has waited long enough.
    pub(crate) fn on_settled(&mut self, name: &ServiceName, outcome: &Outcome) {
        let Some(waiters) = self.waiters.get_mut(name) else {
            return;
        };
        let result = result_of(name, outcome);
        let wants_some = |waiter: &mut Waiter| !matches!(waiter, Waiter::Every { .. });
        for waiter in waiters.extract_if(.., wants_some) {
            waiter.answer(result.clone());
        }
    }

    /// Who wants all that are named, until then or earlier, has waited long enough.
    pub(crate) fn on_whole(
        &mut self,
        name: &ServiceName,
        last: Instant,
        unreached: Result<&[PeerId], LookupError>,
    ) {
        let Some(waiters) = self.waiters.get_mut(name) else {
            return;
        };
        let is_meant =
            |waiter: &mut Waiter| matches!(waiter, Waiter::Every { until, .. } if *until <= last);
        for waiter in waiters.extract_if(.., is_meant) {
            waiter.answer(unreached.clone().map(<[PeerId]>::to_vec));
        }
    }

    /// A lookup is over: everybody who waits is answered.
    pub(crate) fn on_done(&mut self, name: &ServiceName, outcome: &Outcome) {
        self.answer(name, &result_of(name, outcome));
    }

    /// Nothing can be looked up: everybody who waits for the name is told why.
    pub(crate) fn refuse(&mut self, name: &ServiceName, error: LookupError) {
        self.answer(name, &Err(error));
    }

    fn answer(&mut self, name: &ServiceName, result: &Result<Vec<PeerId>, LookupError>) {
        for waiter in self.waiters.remove(name).unwrap_or_default() {
            waiter.answer(result.clone());
        }
    }

    /// Asks Kademlia for providers.
    pub(crate) fn query(&mut self, kad: &mut Kademlia, name: &ServiceName) {
        let id = kad.get_providers(RecordKey::new(&name.key()));
        self.lookups.on_query_started(name, id);
    }

    /// Asks for the grapes nearest to this node: all of them, in a network of few.
    pub(crate) fn look_around(&mut self, kad: &mut Kademlia, local: PeerId) {
        let id = kad.get_closest_peers(local);
        self.walks.insert(id, Walk::Around);
    }

    /// Asks for the grapes closest to a name's key.
    pub(crate) fn walk(&mut self, kad: &mut Kademlia, name: ServiceName) {
        let id = kad.get_closest_peers(name.key().to_vec());
        self.walks.insert(id, Walk::For(name));
    }

    /// Sends a name to the closest grapes.
    pub(crate) fn provide(&mut self, kad: &mut Kademlia, name: ServiceName, now: Instant) {
        match kad.start_providing(RecordKey::new(&name.key())) {
            Ok(id) => {
                self.providing.insert(id, Provided::Own(name));
            }
            Err(error) => {
                tracing::warn!(%name, ?error, "cannot provide the name");
                self.announcements.on_refused(&name, Place::Kademlia, now);
            }
        }
    }

    /// Sends the key of a worker's name to the closest grapes, as one of this grape's own.
    pub(crate) fn carry(&mut self, kad: &mut Kademlia, key: &Key, done: oneshot::Sender<()>) {
        // Too many names are one fewer that others find; who waits is told by the dropped sender.
        if let Ok(id) = kad.start_providing(RecordKey::new(key)) {
            self.providing.insert(id, Provided::Carried(done));
        }
    }

    /// Handles what Kademlia tells.
    pub(crate) fn on_event(
        &mut self,
        kad: &mut Kademlia,
        event: kad::Event,
        now: Instant,
    ) -> Option<Learned> {
        match event {
            kad::Event::OutboundQueryProgressed {
                id,
                result,
                step,
                stats,
            } => self.on_progress(kad, id, result, (&step, &stats), now),
            kad::Event::InboundRequest {
                request: InboundRequest::AddProvider { record },
            } => record.map(Learned::Record),
            kad::Event::InboundRequest {
                request: InboundRequest::PutRecord { source, record, .. },
            } => record.map(|record| Learned::Value(source, record)),
            _ => None,
        }
    }

    fn on_progress(
        &mut self,
        kad: &mut Kademlia,
        id: QueryId,
        result: QueryResult,
        (step, stats): (&ProgressStep, &QueryStats),
        now: Instant,
    ) -> Option<Learned> {
        let last = step.last;
        match result {
            QueryResult::GetProviders(Ok(GetProvidersOk::FoundProviders { providers, .. })) => {
                let name = self.lookups.name_of(&id)?.clone();
                let answer = step.count.get();
                Some(Learned::Providers(
                    name,
                    answer,
                    providers.into_iter().collect(),
                ))
            }
            QueryResult::GetProviders(result) if last => {
                self.lookups
                    .on_query_ended(&id, answered(&result, stats), now);
                None
            }
            QueryResult::GetClosestPeers(result) if last => Some(match self.walks.remove(&id)? {
                Walk::Around => {
                    let (Ok(GetClosestPeersOk { peers, .. })
                    | Err(GetClosestPeersError::Timeout { peers, .. })) = result;
                    Learned::LookedAround(!peers.is_empty())
                }
                Walk::For(name) => {
                    // Who was met until its time was over need not be close.
                    let closest = result.map(|found| found.peers).unwrap_or_default();
                    let closest = closest.into_iter().map(|info| info.peer_id);
                    Learned::Walked(name, closest.collect())
                }
            }),
            QueryResult::StartProviding(result) => {
                let provided = result.is_ok() && Self::knows_grapes(kad);
                match self.providing.remove(&id)? {
                    Provided::Own(name) => Some(Learned::Provided(name, provided)),
                    Provided::Carried(done) => {
                        // Who asked may be gone.
                        let _ = done.send(());
                        None
                    }
                }
            }
            _ => None,
        }
    }

    /// Whether a walk through the whole network has ended.
    pub(crate) fn has_explored(event: &kad::Event) -> bool {
        let kad::Event::OutboundQueryProgressed { result, step, .. } = event else {
            return false;
        };
        matches!(result, QueryResult::Bootstrap(_)) && step.last
    }

    /// Whether the routing table holds a grape.
    pub(crate) fn knows_grapes(kad: &mut Kademlia) -> bool {
        kad.kbuckets().next().is_some()
    }

    /// Where a provider that a query has just named can be dialled, as far as this node's own store and
    /// Kademlia know.
    pub(crate) fn addresses(kad: &mut Kademlia, peer: PeerId) -> Vec<Multiaddr> {
        let mut addresses = kad.store_mut().0.providers().addresses(&peer);
        // What it would add to a dial. It keeps most of that only while its query runs, and one that has
        // to wait for its turn is dialled later.
        let (any, dialer) = (ConnectionId::new_unchecked(0), Endpoint::Dialer);
        let known = kad.handle_pending_outbound_connection(any, Some(peer), &[], dialer);
        addresses.extend(known.unwrap_or_default());
        addresses::plain(&peer, &addresses)
            .take(MAX_ADDRESSES)
            .collect()
    }
}

/// Who has answered a query that is over.
fn answered(result: &Result<GetProvidersOk, GetProvidersError>, stats: &QueryStats) -> Answered {
    let (is_whole, closest) = match result {
        Ok(GetProvidersOk::FinishedWithNoAdditionalRecord { closest_peers }) => {
            (true, closest_peers.as_slice())
        }
        Ok(GetProvidersOk::FoundProviders { .. }) => (true, [].as_slice()),
        Err(GetProvidersError::Timeout { closest_peers, .. }) => (false, closest_peers.as_slice()),
    };
    match closest.is_empty() {
        true => Answered::Nobody,
        false if is_whole && stats.num_successes() >= stats.num_failures() => Answered::Most,
        false => Answered::Fewer,
    }
}

fn result_of(name: &ServiceName, outcome: &Outcome) -> Result<Vec<PeerId>, LookupError> {
    match outcome {
        Outcome::Live(providers) => Ok(providers.clone()),
        Outcome::NotFound | Outcome::Unanswered => Err(LookupError::NotFound(name.clone())),
        Outcome::Unreachable(providers) => Err(LookupError::Unreachable {
            name: name.clone(),
            providers: *providers,
        }),
        Outcome::TimedOut => Err(LookupError::TimedOut(name.clone())),
    }
}

/// Tells a caller, whose channel has room for all that one lookup finds.
fn tell(told: &mpsc::Sender<Sought>, sought: Sought) {
    // A caller that went away does not want to know.
    let _ = told.try_send(sought);
}

/// The grapes of the routing table and where each is.
pub(crate) fn routed(kad: &mut Kademlia) -> Vec<(PeerId, Vec<Multiaddr>)> {
    let mut grapes = Vec::new();
    for bucket in kad.kbuckets() {
        grapes.extend(bucket.iter().map(|entry| {
            let addresses = entry.node.value.clone().into_vec();
            (*entry.node.key.preimage(), addresses)
        }));
    }
    grapes
}

/// The grapes that the routing table has at an address, but for one; none where a name stands for the
/// host, which may stand for several.
pub(crate) fn others_at(kad: &mut Kademlia, found: &PeerId, address: &Multiaddr) -> Vec<PeerId> {
    let address = without_id(address);
    if !is_plain(&address) {
        return Vec::new();
    }
    let mut others = routed(kad);
    others.retain(|(grape, known)| {
        grape != found && known.iter().any(|known| without_id(known) == address)
    });
    others.into_iter().map(|(grape, _)| grape).collect()
}

impl Waiter {
    fn is_gone(&self) -> bool {
        match self {
            Self::All(sender) => sender.is_closed(),
            Self::First(sender) => sender.is_closed(),
            Self::Every { told, .. } => told.is_closed(),
        }
    }

    /// Answers with the providers, or to who wants every one with those that were not reached. A
    /// caller that went away does not want to know.
    fn answer(self, result: Result<Vec<PeerId>, LookupError>) {
        match self {
            Self::All(sender) => drop(sender.send(result)),
            Self::First(sender) => {
                // A lookup that succeeds has at least one provider.
                if let Some(result) = result.map(|live| live.first().copied()).transpose() {
                    drop(sender.send(result));
                }
            }
            Self::Every { told, .. } => tell(&told, Sought::Over(result)),
        }
    }
}
