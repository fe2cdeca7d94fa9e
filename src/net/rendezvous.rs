//! The standard rendezvous protocol, both sides.
//!
//! As a client it registers this node's names at its bootstrap grapes, which confirm with the lease
//! they grant, asks them for providers, and takes names back at once. As a registrar it keeps the
//! registrations in the store that Kademlia's records are in, so that one set of bounds holds and a
//! name taken back is gone on both roads.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libp2p::identity::Keypair;
use libp2p::request_response::{self, Message, OutboundRequestId};
use libp2p::{Multiaddr, PeerId};

use crate::limits::{LEASE, MAX_CANDIDATES, MAX_STREAMS_TO_PEER, MIN_LEASE};
use crate::name::ServiceName;
use crate::net::turns::Turns;
use crate::proto::rate::RateLimit;
use crate::proto::rendezvous::{
    Codec, Cookie, Malformed, Namespace, Page, Registration, Request, Response, SignedPeer, Status,
    Ttl, page_len,
};
use crate::store::{NewRecord, Origin, Prefix, Providers};

/// The rendezvous behaviour of the Swarm.
pub(crate) type Behaviour = request_response::Behaviour<Codec>;

type Event = request_response::Event<Result<Request, Malformed>, Response>;

/// What the driver must know of an event.
#[derive(Debug)]
pub(crate) enum Learned {
    /// A grape holds a name for so long.
    Registered(PeerId, ServiceName, Duration),
    /// A grape did not take a name.
    Refused(PeerId, ServiceName),
    /// A grape named providers; `None`: it did not answer.
    Discovered(PeerId, ServiceName, Option<Vec<(PeerId, Vec<Multiaddr>)>>),
    /// A registration that waited for a withdrawal is to be made now.
    Resume(PeerId, ServiceName),
}

/// The registrations and discoveries of a node, and those of others that it serves.
#[derive(Debug)]
pub(crate) struct Rendezvous {
    keypair: Keypair,
    addresses: Vec<Multiaddr>,
    /// This node's addresses, signed; made anew when they change.
    record: Option<SignedPeer>,
    asked: HashMap<OutboundRequestId, (PeerId, Asked)>,
    /// What is asked of each grape, and what waits for its turn to be.
    turns: Turns<(Request, Asked)>,
    /// Withdrawals under way.
    unregistering: HashSet<(PeerId, ServiceName)>,
    /// Withdrawals that wait for a stream.
    waiting: VecDeque<(PeerId, ServiceName)>,
    /// Registrations that wait for a withdrawal of the same name, which could overtake them.
    held: HashSet<(PeerId, ServiceName)>,
    rate: RateLimit,
}

#[derive(Debug)]
enum Asked {
    Register(ServiceName),
    Discover(ServiceName),
    Unregister(ServiceName),
}

/// The requests that a registrar takes from one peer each second: one that announces 20,000 names
/// renews 667 of them.
const REQUESTS_PER_SECOND: u32 = 2_000;

/// The withdrawals under way at once, to stay within a connection's streams.
const MAX_UNREGISTERING: usize = 32;

impl Rendezvous {
    pub(crate) fn new(keypair: Keypair) -> Self {
        Self {
            keypair,
            addresses: Vec::new(),
            record: None,
            asked: HashMap::new(),
            turns: Turns::new(MAX_STREAMS_TO_PEER),
            unregistering: HashSet::new(),
            waiting: VecDeque::new(),
            held: HashSet::new(),
            rate: RateLimit::new(REQUESTS_PER_SECOND),
        }
    }

    /// This node's addresses have changed.
    pub(crate) fn on_addresses(&mut self, addresses: Vec<Multiaddr>) {
        self.addresses = addresses;
        self.record = None;
    }

    /// A peer has no connection any more.
    pub(crate) fn on_disconnected(&mut self, peer: &PeerId) {
        self.rate.forget(peer);
    }

    /// How many withdrawals no grape has confirmed yet.
    pub(crate) fn unregistering(&self) -> usize {
        self.unregistering.len() + self.waiting.len()
    }

    /// Registers a name at a grape; `false` when this node has no address to tell.
    pub(crate) fn register(
        &mut self,
        behaviour: &mut Behaviour,
        grape: PeerId,
        name: ServiceName,
    ) -> bool {
        let entry = (grape, name.clone());
        // What was announced again need not be withdrawn.
        self.waiting.retain(|waiting| *waiting != entry);
        if self.unregistering.contains(&entry) {
            self.held.insert(entry);
            return true;
        }
        let Some(record) = self.signed() else {
            return false;
        };
        let Ok(namespace) = Namespace::new(name.as_ref()) else {
            return false;
        };
        let request = Request::Register {
            namespace,
            record,
            ttl: Some(Ttl::from_secs(LEASE.as_secs())),
        };
        self.ask(behaviour, grape, request, Asked::Register(name));
        true
    }

    /// Takes a name back at a grape.
    pub(crate) fn unregister(
        &mut self,
        behaviour: &mut Behaviour,
        grape: PeerId,
        name: &ServiceName,
    ) {
        let entry = (grape, name.clone());
        self.held.remove(&entry);
        self.waiting.push_back(entry);
        self.unregister_next(behaviour);
    }

    fn unregister_next(&mut self, behaviour: &mut Behaviour) {
        while self.unregistering.len() < MAX_UNREGISTERING
            && let Some((grape, name)) = self.waiting.pop_front()
        {
            let Ok(namespace) = Namespace::new(name.as_ref()) else {
                continue;
            };
            self.unregistering.insert((grape, name.clone()));
            let request = Request::Unregister { namespace };
            self.ask(behaviour, grape, request, Asked::Unregister(name));
        }
    }

    /// Asks a grape for providers of a name.
    pub(crate) fn discover(
        &mut self,
        behaviour: &mut Behaviour,
        grape: PeerId,
        name: ServiceName,
    ) -> Option<Learned> {
        let Ok(namespace) = Namespace::new(name.as_ref()) else {
            return Some(Learned::Discovered(grape, name, None));
        };
        let request = Request::Discover {
            namespace: Some(namespace),
            cookie: None,
            limit: Some(MAX_CANDIDATES as u64),
        };
        self.ask(behaviour, grape, request, Asked::Discover(name));
        None
    }

    /// Handles what the behaviour tells. `prefix` is where the peer's connection comes from.
    pub(crate) fn on_event(
        &mut self,
        behaviour: &mut Behaviour,
        store: &mut Providers,
        prefix: impl FnOnce(&PeerId) -> Prefix,
        event: Event,
        now: Instant,
    ) -> Option<Learned> {
        match event {
            Event::Message { peer, message, .. } => match message {
                Message::Request {
                    request, channel, ..
                } => {
                    let response = self.serve(store, prefix, peer, request, now);
                    // The peer may be gone; nobody else waits for this.
                    let _ = behaviour.send_response(channel, response);
                    None
                }
                Message::Response {
                    request_id,
                    response,
                } => self.on_response(behaviour, request_id, Some(response)),
            },
            Event::OutboundFailure {
                request_id, error, ..
            } => {
                tracing::debug!(%error, "a rendezvous request failed");
                self.on_response(behaviour, request_id, None)
            }
            Event::InboundFailure { .. } | Event::ResponseSent { .. } => None,
        }
    }

    /// Asks a grape something, now or in its turn.
    fn ask(&mut self, behaviour: &mut Behaviour, grape: PeerId, request: Request, asked: Asked) {
        if let Some((request, asked)) = self.turns.begin(grape, (request, asked)) {
            self.send(behaviour, grape, request, asked);
        }
    }

    fn send(&mut self, behaviour: &mut Behaviour, grape: PeerId, request: Request, asked: Asked) {
        let id = behaviour.send_request(&grape, Ok(request));
        self.asked.insert(id, (grape, asked));
    }

    /// This node's addresses, signed by it; none while it has no address.
    pub(crate) fn signed(&mut self) -> Option<SignedPeer> {
        if self.record.is_none() && !self.addresses.is_empty() {
            match SignedPeer::sign(&self.keypair, self.addresses.iter().cloned()) {
                Ok(record) => self.record = Some(record),
                Err(error) => tracing::warn!(%error, "cannot sign this node's addresses"),
            }
        }
        self.record.clone()
    }

    fn on_response(
        &mut self,
        behaviour: &mut Behaviour,
        id: OutboundRequestId,
        response: Option<Response>,
    ) -> Option<Learned> {
        let (grape, asked) = self.asked.remove(&id)?;
        if let Some((request, asked)) = self.turns.end(&grape) {
            self.send(behaviour, grape, request, asked);
        }
        Some(match asked {
            Asked::Register(name) => match response {
                Some(Response::Registered(Ok(ttl))) => Learned::Registered(grape, name, ttl.into()),
                _ => Learned::Refused(grape, name),
            },
            Asked::Discover(name) => {
                let registrations = match response {
                    Some(Response::Discovered(Ok(page))) => Some(page.registrations),
                    _ => None,
                };
                let provider =
                    |found: Registration| (found.record.peer(), found.record.addresses().to_vec());
                let providers = registrations.map(|found| {
                    found
                        .into_iter()
                        // No signature covers the namespace.
                        .filter(|found| found.namespace.as_str() == name.as_ref())
                        .map(provider)
                        .collect()
                });
                Learned::Discovered(grape, name, providers)
            }
            Asked::Unregister(name) => {
                let entry = (grape, name);
                self.unregistering.remove(&entry);
                self.unregister_next(behaviour);
                if !self.held.remove(&entry) {
                    return None;
                }
                let (grape, name) = entry;
                Learned::Resume(grape, name)
            }
        })
    }

    fn serve(
        &mut self,
        store: &mut Providers,
        prefix: impl FnOnce(&PeerId) -> Prefix,
        peer: PeerId,
        request: Result<Request, Malformed>,
        now: Instant,
    ) -> Response {
        let request = match request {
            Ok(request) => request,
            Err(malformed) => return malformed.into(),
        };
        let admitted = self.rate.admit(peer, now);
        match request {
            Request::Register {
                namespace,
                record,
                ttl,
            } => Response::Registered(if admitted {
                register(store, prefix(&peer), peer, &namespace, &record, ttl, now)
            } else {
                Err(Status::Unavailable)
            }),
            // Never refused: it makes room.
            Request::Unregister { namespace } => {
                if let Some(key) = key_of(&namespace) {
                    store.withdraw(&key, &peer, now);
                }
                Response::Unregistered
            }
            Request::Discover {
                namespace,
                cookie,
                limit,
            } => Response::Discovered(if admitted {
                discover(store, namespace.as_ref(), cookie.as_ref(), limit, now)
            } else {
                Err(Status::Unavailable)
            }),
        }
    }
}

fn register(
    store: &mut Providers,
    prefix: Prefix,
    peer: PeerId,
    namespace: &Namespace,
    record: &SignedPeer,
    ttl: Option<Ttl>,
    now: Instant,
) -> Result<Ttl, Status> {
    if record.peer() != peer {
        return Err(Status::NotAuthorized);
    }
    let key = key_of(namespace).ok_or(Status::InvalidNamespace)?;
    let asked = ttl.unwrap_or(Ttl::DEFAULT).into();
    let granted = store.lease().min(asked).max(MIN_LEASE);
    let new = NewRecord {
        key: &key,
        peer,
        prefix,
        addresses: record.addresses(),
        origin: Origin::Rendezvous {
            namespace: namespace.as_str().into(),
            envelope: Arc::from(record.envelope()),
        },
        ttl: granted,
    };
    match store.insert(new, now) {
        Ok(()) => Ok(Ttl::from_secs(granted.as_secs())),
        Err(error) => {
            tracing::debug!(%peer, %namespace, %error, "a registration was refused");
            Err(Status::Unavailable)
        }
    }
}

fn discover(
    store: &Providers,
    namespace: Option<&Namespace>,
    cookie: Option<&Cookie>,
    limit: Option<u64>,
    now: Instant,
) -> Result<Page, Status> {
    let after = match cookie {
        Some(cookie) => cookie.sequence_for(namespace)?,
        None => 0,
    };
    let key = match namespace {
        Some(namespace) => Some(key_of(namespace).ok_or(Status::InvalidNamespace)?),
        None => None,
    };
    let page = store.registrations(
        key.as_ref().map(<[u8; 34]>::as_slice),
        after,
        page_len(limit),
        now,
    );
    let registrations = page.registrations.iter().filter_map(|stored| {
        Some(Registration {
            namespace: Namespace::new(stored.namespace.as_ref()).ok()?,
            record: SignedPeer::from_verified(stored.peer, Arc::clone(&stored.envelope)),
            ttl: Ttl::from_secs(stored.ttl.as_secs()),
        })
    });
    Ok(Page {
        registrations: registrations.collect(),
        cookie: Cookie::after(page.last, namespace),
    })
}

/// A namespace that is a name has that name's key, so that both roads lead to one record.
fn key_of(namespace: &Namespace) -> Option<[u8; 34]> {
    ServiceName::from_wire(namespace.as_str())
        .ok()
        .map(|name| name.key())
}
