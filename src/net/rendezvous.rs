//! The standard rendezvous protocol, both sides.
//!
//! As a client it registers this node's names at its bootstrap grapes, which confirm with the lease
//! they grant, asks them for providers, and takes names back at once. As a registrar it keeps the
//! registrations in the store that Kademlia's records are in, so that one set of bounds holds and a
//! name taken back is gone on both roads.
//!
//! Signed records have two [forms](Form), of which stock nodes read one. A registrar that does not take the
//! standard one gets the legacy one; who asks is answered in the form that it reads, so its questions wait
//! until that is known.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libp2p::identity::Keypair;
use libp2p::request_response::{
    self, InboundRequestId, Message, OutboundFailure, OutboundRequestId, ResponseChannel,
};
use libp2p::{Multiaddr, PeerId};

use crate::limits::{LEASE, MAX_CANDIDATES, MAX_STREAMS_TO_PEER, MIN_LEASE};
use crate::name::ServiceName;
use crate::net::connectivity::Hosts;
use crate::net::turns::Turns;
use crate::proto::rate::RateLimit;
use crate::proto::rendezvous::{
    Codec, Cookie, Envelopes, Form, Malformed, Namespace, Page, RecordError, Registration, Request,
    Response, SignedPeer, Status, Ttl, page_len,
};
use crate::store::{NewRecord, Origin, Prefix, Providers, Upkeep};

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
    /// A peer's discoveries wait until it is known which form of records it reads.
    Unread(PeerId),
    /// A registration that waited for a withdrawal is to be made now.
    Resume(PeerId, ServiceName),
}

/// The registrations and discoveries of a node, and those of others that it serves.
#[derive(Debug)]
pub(crate) struct Rendezvous {
    keypair: Keypair,
    addresses: Vec<Multiaddr>,
    /// This node's addresses, signed; made anew when they change.
    records: Option<Records>,
    /// Grapes that have taken the legacy form when they did not take the standard one.
    legacy: HashSet<PeerId>,
    /// Discoveries of peers of which it is not known yet which form they read. What a connection may have
    /// open bounds them.
    unread: HashMap<PeerId, Vec<Unanswered>>,
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

/// This node's addresses, signed in both forms. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Records {
    pub(crate) standard: SignedPeer,
    pub(crate) legacy: SignedPeer,
}

/// A discovery that waits for its answer.
#[derive(Debug)]
struct Unanswered {
    id: InboundRequestId,
    discovery: Discovery,
    channel: ResponseChannel<Response>,
}

#[derive(Debug)]
struct Discovery {
    namespace: Option<Namespace>,
    cookie: Option<Cookie>,
    limit: Option<u64>,
}

/// What a registrar knows of a peer by its connection.
pub(crate) struct Asker {
    /// Where the connection comes from.
    pub(crate) prefix: Prefix,
    pub(crate) hosts: Hosts,
    /// The form of records that it reads, once that is known.
    pub(crate) reads: Option<Form>,
}

#[derive(Debug)]
enum Asked {
    Register(ServiceName, Form),
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
            records: None,
            legacy: HashSet::new(),
            unread: HashMap::new(),
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
        self.records = None;
    }

    /// A peer has no connection any more.
    pub(crate) fn on_disconnected(&mut self, peer: &PeerId) {
        self.rate.forget(peer);
        self.legacy.remove(peer);
        self.unread.remove(peer);
    }

    /// It is known now which form of records a peer reads.
    pub(crate) fn on_reads(
        &mut self,
        behaviour: &mut Behaviour,
        store: &Providers,
        peer: &PeerId,
        form: Form,
        now: Instant,
    ) {
        for unanswered in self.unread.remove(peer).unwrap_or_default() {
            let form = form_of(store, peer).unwrap_or(form);
            let page = discover(store, &unanswered.discovery, form, now);
            let _ = behaviour.send_response(unanswered.channel, Response::Discovered(page));
        }
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
        let form = match self.legacy.contains(&grape) {
            true => Form::Legacy,
            false => Form::Standard,
        };
        self.register_in(behaviour, grape, name, form)
    }

    fn register_in(
        &mut self,
        behaviour: &mut Behaviour,
        grape: PeerId,
        name: ServiceName,
        form: Form,
    ) -> bool {
        let Some(records) = self.signed() else {
            return false;
        };
        let record = match form {
            Form::Standard => records.standard,
            Form::Legacy => records.legacy,
        };
        let Ok(namespace) = Namespace::new(name.as_ref()) else {
            return false;
        };
        let request = Request::Register {
            namespace,
            record,
            ttl: Some(Ttl::from_secs(LEASE.as_secs())),
        };
        self.ask(behaviour, grape, request, Asked::Register(name, form));
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

    /// Handles what the behaviour tells. `asker` is what is known of a peer that asks.
    pub(crate) fn on_event(
        &mut self,
        behaviour: &mut Behaviour,
        store: &mut Providers,
        asker: impl FnOnce(&PeerId) -> Asker,
        event: Event,
        now: Instant,
    ) -> Option<Learned> {
        match event {
            Event::Message { peer, message, .. } => match message {
                Message::Request {
                    request_id,
                    request,
                    channel,
                } => {
                    match self.serve(store, asker(&peer), peer, request, now) {
                        // The peer may be gone; nobody else waits for this.
                        Ok(response) => drop(behaviour.send_response(channel, response)),
                        Err(discovery) => {
                            self.unread.entry(peer).or_default().push(Unanswered {
                                id: request_id,
                                discovery,
                                channel,
                            });
                            return Some(Learned::Unread(peer));
                        }
                    }
                    None
                }
                Message::Response {
                    request_id,
                    response,
                } => self.on_response(behaviour, request_id, Ok(response)),
            },
            Event::OutboundFailure {
                request_id, error, ..
            } => {
                tracing::debug!(%error, "a rendezvous request failed");
                self.on_response(behaviour, request_id, Err(&error))
            }
            Event::InboundFailure {
                peer, request_id, ..
            } => {
                if let Some(unread) = self.unread.get_mut(&peer) {
                    unread.retain(|unanswered| unanswered.id != request_id);
                }
                None
            }
            Event::ResponseSent { .. } => None,
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
    pub(crate) fn signed(&mut self) -> Option<Records> {
        if self.records.is_none() && !self.addresses.is_empty() {
            match Records::sign(&self.keypair, &self.addresses) {
                Ok(records) => self.records = Some(records),
                Err(error) => tracing::warn!(%error, "cannot sign this node's addresses"),
            }
        }
        self.records.clone()
    }

    fn on_response(
        &mut self,
        behaviour: &mut Behaviour,
        id: OutboundRequestId,
        response: Result<Response, &OutboundFailure>,
    ) -> Option<Learned> {
        let (grape, asked) = self.asked.remove(&id)?;
        if let Some((request, asked)) = self.turns.end(&grape) {
            self.send(behaviour, grape, request, asked);
        }
        Some(match asked {
            Asked::Register(name, form) => {
                return self.on_registered(behaviour, grape, name, form, response);
            }
            Asked::Discover(name) => {
                let registrations = match response {
                    Ok(Response::Discovered(Ok(page))) => Some(page.registrations),
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

    fn on_registered(
        &mut self,
        behaviour: &mut Behaviour,
        grape: PeerId,
        name: ServiceName,
        form: Form,
        response: Result<Response, &OutboundFailure>,
    ) -> Option<Learned> {
        let is_taken = matches!(response, Ok(Response::Registered(Ok(_))));
        if !is_taken || form == Form::Standard {
            self.legacy.remove(&grape);
        } else {
            self.legacy.insert(grape);
        }
        match response {
            Ok(Response::Registered(Ok(ttl))) => Some(Learned::Registered(grape, name, ttl.into())),
            // Rust's libp2p ends the stream on which the standard form comes.
            Ok(Response::Registered(Err(Status::InvalidSignedPeerRecord)))
            | Err(OutboundFailure::Io(_))
                if form == Form::Standard =>
            {
                let again = self.register_in(behaviour, grape, name.clone(), Form::Legacy);
                (!again).then_some(Learned::Refused(grape, name))
            }
            _ => Some(Learned::Refused(grape, name)),
        }
    }

    /// The response to a request, or the discovery that has to wait for one.
    fn serve(
        &mut self,
        store: &mut Providers,
        asker: Asker,
        peer: PeerId,
        request: Result<Request, Malformed>,
        now: Instant,
    ) -> Result<Response, Discovery> {
        let request = match request {
            Ok(request) => request,
            Err(malformed) => return Ok(malformed.into()),
        };
        let admitted = self.rate.admit(peer, now);
        Ok(match request {
            Request::Register {
                namespace,
                record,
                ttl,
            } => Response::Registered(if admitted {
                register(store, &asker, peer, &namespace, &record, ttl, now)
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
            } if admitted => {
                let discovery = Discovery {
                    namespace,
                    cookie,
                    limit,
                };
                let Some(form) = form_of(store, &peer).or(asker.reads) else {
                    return Err(discovery);
                };
                Response::Discovered(discover(store, &discovery, form, now))
            }
            Request::Discover { .. } => Response::Discovered(Err(Status::Unavailable)),
        })
    }
}

impl Records {
    fn sign(keypair: &Keypair, addresses: &[Multiaddr]) -> Result<Self, RecordError> {
        Ok(Self {
            standard: SignedPeer::sign(keypair, addresses, Form::Standard)?,
            legacy: SignedPeer::sign(keypair, addresses, Form::Legacy)?,
        })
    }
}

/// The form of records that a peer reads: that in which it has registered itself, unless it was both.
fn form_of(store: &Providers, peer: &PeerId) -> Option<Form> {
    let envelopes = store.envelope(peer)?;
    let has = |form| envelopes.of(form).is_some();
    match (has(Form::Standard), has(Form::Legacy)) {
        (true, false) => Some(Form::Standard),
        (false, true) => Some(Form::Legacy),
        _ => None,
    }
}

fn register(
    store: &mut Providers,
    asker: &Asker,
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
    let asked: Duration = ttl.unwrap_or(Ttl::DEFAULT).into();
    let granted = store.lease().min(asked).max(MIN_LEASE);
    let new = NewRecord {
        key: &key,
        peer,
        prefix: asker.prefix,
        addresses: record.addresses(),
        origin: Origin::Rendezvous {
            namespace: namespace.as_str().into(),
            envelope: Envelopes::from(record),
        },
        ttl: granted,
        // Who has asked for more than a lease may renew it as late as that.
        upkeep: Upkeep::Asked {
            longest: asked,
            own: &asker.hosts.own(record.addresses()),
        },
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
    discovery: &Discovery,
    form: Form,
    now: Instant,
) -> Result<Page, Status> {
    let namespace = discovery.namespace.as_ref();
    let after = match &discovery.cookie {
        Some(cookie) => Some(cookie.sequence_for(namespace)?),
        None => None,
    };
    let key = match namespace {
        Some(namespace) => Some(key_of(namespace).ok_or(Status::InvalidNamespace)?),
        None => None,
    };
    let page = store.registrations(
        key.as_ref().map(<[u8; 34]>::as_slice),
        after,
        page_len(discovery.limit),
        form,
        now,
    );
    let registrations = page.registrations.iter().filter_map(|stored| {
        Some(Registration {
            namespace: Namespace::new(stored.namespace.as_ref()).ok()?,
            record: SignedPeer::from_verified(stored.peer, form, Arc::clone(&stored.envelope)),
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
