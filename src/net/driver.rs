//! The loop that owns the Swarm: it routes events and commands to the concerns and carries out what
//! they decide. It holds no logic of its own, and waits nowhere but in its `select!`.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use libp2p::core::ConnectedPoint;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError, SwarmEvent};
use libp2p::{Multiaddr, PeerId, Swarm, identify, kad, ping};
use socket2::{Domain, Socket, Type};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep_until, timeout};
use void::Void;

use super::connectivity::{Connectivity, KnownGrape, describe};
use super::discovery::{self, Discovery, Waiter};
use super::names::{self, Names};
use super::rendezvous::{self, Rendezvous};
use super::rpc::kept::{KeptStreams, Lane, Outgoing};
use super::rpc::serve::{Inbound, Server};
use super::rpc::single::{Outbound, Requests, Serves};
use super::swarm::{Behaviour, BehaviourEvent, build};
use super::values::Values;
use super::{COMMANDS, Command, Handle, Settings};
use crate::error::{AnnounceError, LookupError, SpawnError, explain};
use crate::limits::{
    KEEP_ALIVE_INTERVAL, MAX_ADDRESSES, MAX_ANNOUNCED, MAX_LOOKUPS, SHUTDOWN_DEADLINE,
};
use crate::metrics::Metrics;
use crate::name::ServiceName;
use crate::proto::announce::Place;
use crate::proto::exploration::Exploration;
use crate::proto::lookup::{Grapes, Outcome, Plan, SMALL, Source, Step};
use crate::proto::rate::RateLimit;
use crate::proto::registrations::{Known, Scope};
use crate::proto::routes::Routes;
use crate::store::{NewRecord, Origin, Prefix, Registry};

/// How often expired records are dropped, and lookups that nobody waits for.
const HOUSEKEEPING: Duration = Duration::from_secs(1);

/// How long an address may take to be listened on. The system answers at once; interfaces are told
/// by events that follow within milliseconds.
const LISTEN_DEADLINE: Duration = Duration::from_secs(5);

/// The provider records taken from one peer by Kademlia each second: as many as by rendezvous.
const RECORDS_PER_SECOND: u32 = 2_000;

/// The values taken from one peer each second: to verify a signature takes some 50 us of the loop.
const VALUES_PER_SECOND: u32 = 200;

/// Why the loop ended. It never does by itself.
#[derive(Debug)]
enum Stop {
    /// Somebody asked for it and waits.
    Asked(oneshot::Sender<()>),
    /// Nobody holds the node any more.
    Unused,
}

/// Binds every address and starts the loop in a task of its own.
pub(super) async fn start(settings: Settings) -> Result<Handle, SpawnError> {
    let metrics = Arc::new(Metrics::default());
    let now = Instant::now();
    let local = settings.identity.peer_id();
    let registry = Registry::new(local, settings.limits.store.clone(), now);
    let server = Server::new(&settings.limits, Arc::clone(&metrics));
    if settings.registrar {
        server.keep(Arc::clone(&registry));
    }
    let mut swarm = build(&settings, Arc::clone(&server), Arc::clone(&registry))
        .map_err(|error| SpawnError::Transport(error.to_string()))?;
    let early = listen(&mut swarm, &settings.listen).await?;
    let bootstrap = settings.bootstrap.clone();
    let (connectivity, status) = Connectivity::new(local, bootstrap, now);
    // As far within the idle time-out as with the default one.
    let keep_alive_interval = KEEP_ALIVE_INTERVAL.min(settings.limits.idle * 3 / 8);
    let (sender, commands) = mpsc::channel(COMMANDS);
    let (known_grapes, grapes) = watch::channel(Vec::new());
    let routes = Arc::new(Mutex::new(Routes::new()));
    let kept = Arc::new(KeptStreams::default());
    let mut driver = Driver {
        swarm,
        commands,
        dropped: FuturesUnordered::new(),
        housekeeping: now + HOUSEKEEPING,
        keep_alive: now + keep_alive_interval,
        keep_alive_interval,
        connectivity,
        discovery: Discovery::new(local),
        names: Names::new(),
        rendezvous: Rendezvous::new(settings.identity.keypair().clone()),
        values: Values::default(),
        server: Arc::clone(&server),
        registry: Arc::clone(&registry),
        requests: Requests::default(),
        kept: Arc::clone(&kept),
        handlers: HashMap::new(),
        publishing: HashMap::new(),
        held: HashSet::new(),
        records: RateLimit::new(RECORDS_PER_SECOND),
        puts: RateLimit::new(VALUES_PER_SECOND),
        registrar: settings.registrar,
        grapes: known_grapes,
        grapes_changed: false,
        looked_around: false,
        exploration: Exploration::default(),
        routes: Arc::clone(&routes),
        metrics: Arc::clone(&metrics),
    };
    for address in settings.external {
        driver.on_address(address);
    }
    for event in early {
        driver.on_swarm_event(event);
    }
    driver.carry_out();
    tokio::spawn(driver.run());
    Ok(Handle {
        commands: sender,
        status,
        routes,
        kept,
        server,
        registry,
        grapes,
        metrics,
    })
}

/// Listens on every address. Returns all that has happened meanwhile: others may connect to the first
/// address before the last one is bound.
async fn listen(
    swarm: &mut Swarm<Behaviour>,
    addresses: &[Multiaddr],
) -> Result<Vec<SwarmEvent<BehaviourEvent>>, SpawnError> {
    let mut events = Vec::new();
    for address in addresses {
        let failed = |reason: String| SpawnError::Listen {
            address: address.clone(),
            reason,
        };
        probe(address).map_err(|error| failed(explain(&error)))?;
        let listener = swarm
            .listen_on(address.clone())
            .map_err(|error| failed(explain(&error)))?;
        let first = async {
            loop {
                let event = swarm.select_next_some().await;
                let is_bound = match &event {
                    SwarmEvent::NewListenAddr { listener_id, .. } => *listener_id == listener,
                    SwarmEvent::ListenerClosed {
                        listener_id,
                        reason: Err(error),
                        ..
                    } if *listener_id == listener => return Err(explain(error)),
                    _ => false,
                };
                events.push(event);
                if is_bound {
                    return Ok(());
                }
            }
        };
        match timeout(LISTEN_DEADLINE, first).await {
            Ok(result) => result.map_err(failed)?,
            Err(_) => return Err(failed("no network interface has such an address".into())),
        }
    }
    // What an address of all interfaces leads to is told in one go.
    while let Some(Some(event)) = swarm.next().now_or_never() {
        events.push(event);
    }
    Ok(events)
}

/// Fails if another program listens on the address. libp2p shares TCP ports (`SO_REUSEPORT`): two
/// grapes on one port would each get some of the connections.
fn probe(address: &Multiaddr) -> io::Result<()> {
    let mut parts = address.iter();
    let ip: IpAddr = match parts.next() {
        Some(Protocol::Ip4(ip)) => ip.into(),
        Some(Protocol::Ip6(ip)) => ip.into(),
        _ => return Ok(()),
    };
    match parts.next() {
        Some(Protocol::Tcp(port)) => {
            let address = SocketAddr::new(ip, port);
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
            if address.is_ipv6() {
                // As libp2p does: the same port of IPv4 may be this node's own.
                socket.set_only_v6(true)?;
            }
            // A connection that has just closed is no listener.
            socket.set_reuse_address(true)?;
            socket.bind(&address.into())
        }
        _ => Ok(()),
    }
}

struct Driver {
    swarm: Swarm<Behaviour>,
    commands: mpsc::Receiver<Command>,
    /// One for each name served, done when its handler is dropped.
    dropped: FuturesUnordered<BoxFuture<'static, (ServiceName, mpsc::Sender<Inbound>)>>,
    /// When the next housekeeping is due.
    housekeeping: Instant,
    /// When the bootstrap grapes are asked something.
    keep_alive: Instant,
    keep_alive_interval: Duration,
    connectivity: Connectivity,
    discovery: Discovery,
    names: Names,
    rendezvous: Rendezvous,
    values: Values,
    server: Arc<Server>,
    registry: Arc<Registry>,
    requests: Requests,
    kept: Arc<KeptStreams>,
    handlers: HashMap<ServiceName, mpsc::Sender<Inbound>>,
    /// Who waits for a name to be published.
    publishing: HashMap<ServiceName, oneshot::Sender<Result<(), AnnounceError>>>,
    /// Names to look up as soon as it is known whether a grape can be reached.
    held: HashSet<ServiceName>,
    records: RateLimit,
    puts: RateLimit,
    registrar: bool,
    /// The other grapes that this one knows, and whether they may have changed.
    grapes: watch::Sender<Vec<KnownGrape>>,
    grapes_changed: bool,
    /// Whether the grapes near this node have been asked for once.
    looked_around: bool,
    exploration: Exploration,
    routes: Arc<Mutex<Routes>>,
    metrics: Arc<Metrics>,
}

impl Driver {
    async fn run(mut self) {
        let stop = match self.serve().await {
            Ok(never) => void::unreachable(never),
            Err(stop) => stop,
        };
        self.shut_down().await;
        // Frees the ports.
        drop(self);
        if let Stop::Asked(done) = stop {
            // Who asked may be gone.
            let _ = done.send(());
        }
    }

    async fn serve(&mut self) -> Result<Void, Stop> {
        loop {
            let due = self.next_due();
            tokio::select! {
                event = self.swarm.select_next_some() => self.on_swarm_event(event),
                Some((name, handler)) = self.dropped.next() => self.on_handler_gone(&name, &handler),
                answered = self.names.next() => self.on_names(answered),
                command = self.commands.recv() => match command {
                    Some(Command::Shutdown(done)) => return Err(Stop::Asked(done)),
                    Some(command) => self.on_command(command),
                    None => return Err(Stop::Unused),
                },
                () = sleep_until(due.into()) => self.on_time(),
            }
            self.carry_out();
        }
    }

    /// Withdraws every name, lets open requests finish and stops; ends within
    /// [`SHUTDOWN_DEADLINE`].
    async fn shut_down(&mut self) {
        self.server.stop();
        let names: Vec<_> = self.discovery.announcements.names().cloned().collect();
        for name in names {
            self.withdraw(&name);
        }
        // The last senders: every service now ends.
        self.dropped.clear();
        for name in self.discovery.awaited() {
            self.discovery.refuse(&name, LookupError::Closed);
        }
        let deadline = tokio::time::Instant::now() + SHUTDOWN_DEADLINE;
        while self.withdrawing() > 0 || self.server.open_requests() > 0 {
            self.carry_out_names(Instant::now());
            let server = Arc::clone(&self.server);
            tokio::select! {
                event = self.swarm.select_next_some() => self.on_swarm_event(event),
                answered = self.names.next() => self.on_names(answered),
                () = server.idle(), if server.open_requests() > 0 => {}
                () = sleep_until(deadline) => break,
            }
        }
        let peers: Vec<_> = self.swarm.connected_peers().copied().collect();
        for peer in peers {
            // Only fails when the peer is gone already.
            let _ = self.swarm.disconnect_peer_id(peer);
        }
        while self.swarm.connected_peers().next().is_some() {
            tokio::select! {
                _ = self.swarm.select_next_some() => {}
                () = sleep_until(deadline) => break,
            }
        }
    }

    /// How many withdrawals no grape has confirmed yet.
    fn withdrawing(&self) -> usize {
        self.rendezvous.unregistering() + self.names.registrations.withdrawing()
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Announce {
                name,
                handler,
                done,
            } => self.on_announce(name, handler, done),
            Command::Withdraw { name, done } => {
                self.withdraw(&name);
                // The dropped handler would only withdraw again. The caller may be gone.
                let _ = done.send(());
            }
            Command::Lookup(name, waiter) => self.on_lookup(name, waiter),
            Command::Request(request) => {
                let (peer, lane) = (request.provider, Lane::of(&request.payload));
                let behaviour = self.swarm.behaviour_mut();
                self.requests.call(&mut behaviour.single, request);
                if self.connectivity.is_ours(&peer) {
                    let open = |peer| behaviour.streams.open(peer);
                    self.kept.keep(peer, lane, open);
                }
            }
            Command::Carry { key, done } => {
                let kad = &mut self.swarm.behaviour_mut().kad;
                self.discovery.carry(kad, &key, done);
            }
            Command::Uncarry(key) => {
                let kad = &mut self.swarm.behaviour_mut().kad;
                kad.stop_providing(&kad::RecordKey::new(&key));
            }
            Command::PutValue {
                target,
                value,
                done,
            } => {
                let kad = &mut self.swarm.behaviour_mut().kad;
                self.values.put(kad, target, value, done);
            }
            Command::GetValue { target, done } => {
                let kad = &mut self.swarm.behaviour_mut().kad;
                self.values.get(kad, target, done);
            }
            Command::Block(peer) => {
                self.swarm.behaviour_mut().blocked.block_peer(peer);
                let kad = &mut self.swarm.behaviour_mut().kad;
                kad.remove_peer(&peer);
                self.registry.providers().withdraw_all(&peer);
            }
            Command::Unblock(peer) => {
                self.swarm.behaviour_mut().blocked.unblock_peer(peer);
            }
            // Ends the loop before it comes here.
            Command::Shutdown(_) => {}
        }
    }

    fn on_announce(
        &mut self,
        name: ServiceName,
        handler: mpsc::Sender<Inbound>,
        done: oneshot::Sender<Result<(), AnnounceError>>,
    ) {
        // One that was dropped a moment ago makes room at once.
        if self
            .handlers
            .get(&name)
            .is_some_and(mpsc::Sender::is_closed)
        {
            self.withdraw(&name);
        }
        let refusal = if self.discovery.announcements.len() >= MAX_ANNOUNCED {
            Some(AnnounceError::TooMany { max: MAX_ANNOUNCED })
        } else if self.swarm.external_addresses().next().is_none() {
            Some(AnnounceError::NotListening)
        } else if self.is_cut_off() {
            Some(AnnounceError::NoGrape(
                self.connectivity.bootstraps.failures(),
            ))
        } else if !self.discovery.announcements.announce(&name) {
            Some(AnnounceError::AlreadyAnnounced(name.clone()))
        } else {
            None
        };
        if let Some(error) = refusal {
            // Who asked may be gone.
            let _ = done.send(Err(error));
            return;
        }
        self.names.registrations.announce(&name, Instant::now());
        self.server.serve(name.clone(), handler.clone());
        self.handlers.insert(name.clone(), handler.clone());
        self.publishing.insert(name.clone(), done);
        let watched = name;
        self.dropped.push(
            async move {
                handler.closed().await;
                (watched, handler)
            }
            .boxed(),
        );
    }

    /// A name's handler was dropped; if it is still this one, the name is taken back.
    fn on_handler_gone(&mut self, name: &ServiceName, handler: &mpsc::Sender<Inbound>) {
        let current = self.handlers.get(name);
        if current.is_some_and(|current| current.same_channel(handler)) {
            self.withdraw(name);
        }
    }

    fn withdraw(&mut self, name: &ServiceName) {
        self.handlers.remove(name);
        self.publishing.remove(name);
        self.server.unserve(name);
        if !self.discovery.announcements.withdraw(name) {
            return;
        }
        self.names.registrations.withdraw(name, Instant::now());
        let grapes = self.connectivity.grapes().into_iter();
        let behaviour = self.swarm.behaviour_mut();
        behaviour
            .kad
            .stop_providing(&kad::RecordKey::new(&name.key()));
        for grape in grapes.filter(|grape| !self.names.registrations.answers(grape)) {
            self.rendezvous
                .unregister(&mut behaviour.rendezvous, grape, name);
        }
    }

    fn on_lookup(&mut self, name: ServiceName, waiter: Waiter) {
        self.discovery.wait(name.clone(), waiter);
        if !self.discovery.lookups.is_running(&name) {
            self.held.insert(name);
            self.release_held();
        }
    }

    /// Starts the lookups that waited for a grape, or tells why there is none.
    fn release_held(&mut self) {
        if self.held.is_empty() {
            return;
        }
        let grapes = self.grapes_to_ask();
        if grapes.bootstraps.is_empty() && self.connectivity.bootstraps.is_starting() {
            return;
        }
        // A grape that is not connected any more can be dialled, if Kademlia knows it.
        let kad = &mut self.swarm.behaviour_mut().kad;
        let cut_off = self.connectivity.grapes().is_empty() && !Discovery::knows_grapes(kad);
        if cut_off && !self.registrar {
            let failures = self.connectivity.bootstraps.failures();
            for name in self.held.drain() {
                let failures = failures.clone();
                self.discovery.refuse(&name, LookupError::NoGrape(failures));
            }
            return;
        }
        // One whose caller has its first provider goes on for a while.
        let room = (2 * MAX_LOOKUPS).saturating_sub(self.discovery.lookups.len());
        let started: Vec<_> = self.held.iter().take(room).cloned().collect();
        for name in started {
            self.held.remove(&name);
            self.metrics.lookups.add(1);
            let plan = Plan::draw(&grapes);
            self.discovery.lookups.start(&name, &plan, Instant::now());
        }
    }

    /// What is known of the grapes that a lookup may ask.
    fn grapes_to_ask(&self) -> Grapes {
        let registrations = &self.names.registrations;
        let bootstraps = self.connectivity.bootstraps.connected();
        let mut others = Vec::new();
        let mut count = None;
        let known = self.grapes.borrow().len();
        // A grape has some of the names itself, and asks Kademlia for the others.
        if self.looked_around && !self.registrar && self.names.most_grapes() <= known as u64 {
            count = Some(known);
            others = self.connectivity.grapes();
            others.retain(|grape| {
                let is_ours = self.connectivity.is_ours(grape) && !registrations.is_deaf(grape);
                is_ours && !bootstraps.contains(grape)
            });
        }
        let with_kind = |grape| (grape, registrations.is_deaf(&grape));
        Grapes {
            bootstraps: bootstraps.into_iter().map(with_kind).collect(),
            others,
            count,
        }
    }

    /// Whether this node can never reach a grape as things stand, and is none itself.
    fn is_cut_off(&self) -> bool {
        !self.registrar && self.connectivity.bootstraps.is_hopeless()
    }

    /// When time alone makes something happen.
    fn next_due(&self) -> Instant {
        let due = [
            self.connectivity.bootstraps.next_due(),
            self.discovery.announcements.next_due(),
            self.names.registrations.next_due(),
            self.discovery.lookups.next_deadline(),
            self.exploration.next_due(),
        ];
        let due = due.into_iter().flatten().min();
        due.unwrap_or(self.housekeeping)
            .min(self.housekeeping)
            .min(self.keep_alive)
    }

    /// What has become due of the announcements is carried out after every turn of the loop.
    fn on_time(&mut self) {
        let now = Instant::now();
        self.dial_bootstraps(now);
        self.discovery.lookups.on_time(now);
        if self.exploration.poll(now) && self.needs_to_look() {
            self.look_around();
        }
        if now >= self.keep_alive {
            self.keep_alive(now);
        }
        if now >= self.housekeeping {
            self.keep_house(now);
        }
    }

    /// Whether a grape that is not known would matter. To look keeps this node connected to all that
    /// there are.
    fn needs_to_look(&self) -> bool {
        let announces = self.discovery.announcements.len() > 0;
        self.registrar || announces || self.names.most_grapes() > self.grapes.borrow().len() as u64
    }

    fn keep_alive(&mut self, now: Instant) {
        for grape in self.connectivity.bootstraps.connected() {
            let behaviour = &mut self.swarm.behaviour_mut().single;
            self.requests.keep_alive(behaviour, grape);
        }
        self.keep_alive = now + self.keep_alive_interval;
    }

    fn keep_house(&mut self, now: Instant) {
        self.registry.sweep(now);
        for name in self.discovery.awaited() {
            if !self.discovery.is_awaited(&name) {
                self.held.remove(&name);
                self.discovery.lookups.cancel(&name);
            }
        }
        self.release_held();
        self.housekeeping = now + HOUSEKEEPING;
    }
}

/// Carrying out what the concerns decide.
impl Driver {
    fn carry_out(&mut self) {
        let now = Instant::now();
        if std::mem::take(&mut self.grapes_changed) {
            self.tell_grapes(now);
        }
        self.carry_out_lookups(now);
        self.carry_out_names(now);
        while let Some((name, place)) = self.discovery.announcements.poll_publish(now) {
            self.publish(name, place, now);
        }
        self.measure();
    }

    fn carry_out_names(&mut self, now: Instant) {
        let announces = self.discovery.announcements.len() > 0;
        let record = announces.then(|| self.rendezvous.signed()).flatten();
        while let Some(message) = self.names.poll_message(record.as_ref(), now) {
            self.metrics.names_requests.add(1);
            self.send(message);
        }
        while let Some(name) = self.names.registrations.poll_walk(now) {
            let kad = &mut self.swarm.behaviour_mut().kad;
            self.discovery.walk(kad, name);
        }
        while let Some(grape) = self.names.registrations.poll_deaf() {
            self.on_deaf(grape);
        }
        let by_kademlia = self.registrar || self.names.registrations.knows_deaf();
        self.discovery.announcements.use_kademlia(by_kademlia);
    }

    /// Asks a provider by a stream of its own, and keeps one open for further questions if lookups ask
    /// it again and again.
    fn ask_serves(&mut self, peer: PeerId, name: ServiceName) {
        let behaviour = self.swarm.behaviour_mut();
        let asked_again = self.requests.ask_serves(&mut behaviour.single, peer, name);
        if asked_again && self.connectivity.is_ours(&peer) {
            let open = |peer| behaviour.streams.open(peer);
            self.kept.keep(peer, Lane::Small, open);
        }
    }

    /// Sends a message over a kept stream if there is one, and otherwise over one of its own. What
    /// finds no room is not sent.
    fn send(&mut self, message: names::Message) {
        let (peer, lane) = (message.peer, Lane::of(&message.payload));
        let mut request = Outgoing {
            service: message.service.into(),
            payload: message.payload.into(),
            outcome: message.outcome,
        };
        if let Some(queue) = self.kept.get(peer, lane) {
            match queue.try_send(request) {
                Ok(()) => return,
                Err(error) => request = error.into_inner(),
            }
        }
        let single = self.routes().slots(peer).single;
        let Ok(slot) = single.try_acquire_owned() else {
            return;
        };
        let request = Outbound {
            provider: peer,
            service: request.service,
            payload: request.payload,
            outcome: request.outcome,
            slot,
        };
        let behaviour = self.swarm.behaviour_mut();
        self.requests.call(&mut behaviour.single, request);
        if self.connectivity.is_ours(&peer) {
            let open = |peer| behaviour.streams.open(peer);
            self.kept.keep(peer, lane, open);
        }
    }

    fn tell_grapes(&mut self, now: Instant) {
        let kad = &mut self.swarm.behaviour_mut().kad;
        let routed = kad.kbuckets().flat_map(|bucket| {
            let peers = bucket.iter().map(|entry| *entry.node.key.preimage());
            peers.collect::<Vec<_>>()
        });
        let known = self.connectivity.known_grapes(routed);
        self.registry.on_grapes(known.len());
        let known_few = (1..SMALL).contains(&known.len());
        let scope = match known.len() < SMALL {
            true => Scope::All,
            false => Scope::Closest,
        };
        let bootstraps = self.connectivity.bootstraps.connected();
        let kinds = known.iter().map(|grape| Known {
            peer: grape.peer,
            is_bootstrap: bootstraps.contains(&grape.peer),
            is_foreign: self.connectivity.is_foreign(&grape.peer),
        });
        let registrations = &mut self.names.registrations;
        registrations.on_grapes(&kinds.collect::<Vec<_>>(), scope, now);
        let exploration = &mut self.exploration;
        self.grapes.send_if_modified(|before| {
            let peer = |grape: &KnownGrape| grape.peer;
            let met_another = before.iter().map(peer).ne(known.iter().map(peer));
            if met_another {
                tracing::debug!(grapes = known.len(), "the known grapes have changed");
                exploration.on_grapes(known_few, now);
            }
            let changed = *before != known;
            *before = known;
            changed
        });
    }

    fn measure(&mut self) {
        let stored = self.registry.providers().stats();
        self.metrics.stored.set(stored.records);
        self.metrics.evicted.set(stored.evicted);
        self.metrics.refused.set(stored.refused);
        let open = self.server.open_requests();
        self.metrics.open_requests.set(open as u64);
        let announced = self.discovery.announcements.len();
        self.metrics.announced.set(announced as u64);
    }

    fn carry_out_lookups(&mut self, now: Instant) {
        while let Some(step) = self.discovery.lookups.poll_step() {
            self.carry_out_lookup(step, now);
        }
    }

    fn carry_out_lookup(&mut self, step: Step<kad::QueryId>, now: Instant) {
        let behaviour = self.swarm.behaviour_mut();
        match step {
            Step::Query(name) => self.discovery.query(&mut behaviour.kad, &name),
            Step::FinishQuery(id) => {
                if let Some(mut query) = behaviour.kad.query_mut(&id) {
                    query.finish();
                }
            }
            Step::Find(grape, name) => self.names.find(grape, name),
            Step::Discover(grape, name) => {
                let learned = self
                    .rendezvous
                    .discover(&mut behaviour.rendezvous, grape, name);
                self.on_rendezvous(learned, now);
            }
            Step::Dial(peer, addresses) => self.dial_candidate(peer, addresses, now),
            Step::Ask(peer, name) if self.kept.get(peer, Lane::Small).is_some() => {
                let message = self.names.ask_serves(peer, name);
                self.send(message);
            }
            Step::Ask(peer, name) => self.ask_serves(peer, name),
            Step::Found(name, provider) => {
                self.routes().found(&name, provider, now);
                self.discovery.on_found(&name, provider);
            }
            Step::Done(name, outcome) => {
                let live: &[PeerId] = match &outcome {
                    Outcome::Live(providers) => providers,
                    _ => &[],
                };
                self.metrics.lookups_found.add(u64::from(!live.is_empty()));
                self.routes().looked_up(&name, live, now);
                match outcome {
                    // A grape alone knows all there is to know.
                    Outcome::Unanswered if !self.registrar => {
                        let silent = self.connectivity.bootstraps.silent();
                        self.discovery.refuse(&name, LookupError::NoGrape(silent));
                    }
                    outcome => self.discovery.on_done(&name, &outcome),
                }
                self.release_held();
            }
        }
    }

    fn dial_candidate(&mut self, peer: PeerId, addresses: Vec<Multiaddr>, now: Instant) {
        if self.connectivity.is_dialling(&peer) {
            self.discovery.lookups.put_back(&peer, &addresses);
            return;
        }
        // Kademlia may be dialling it with fewer addresses; the connection limits bear a second.
        // A port of its own, as for every dial here: one that is dialled from again and again is
        // refused by the system while an earlier connection to the same address winds down.
        let opts = DialOpts::peer_id(peer)
            .addresses(addresses)
            .extend_addresses_through_behaviour()
            .condition(PeerCondition::Disconnected)
            .allocate_new_port()
            .build();
        let connection = opts.connection_id();
        match self.swarm.dial(opts) {
            Ok(()) => self.connectivity.on_dialling(peer, connection),
            Err(DialError::DialPeerConditionFalse(_)) => {
                self.discovery.lookups.on_connected(&peer, now);
            }
            Err(_) => self.discovery.lookups.on_dial_failed(&peer, now),
        }
    }

    fn publish(&mut self, name: ServiceName, place: Place, now: Instant) {
        let behaviour = self.swarm.behaviour_mut();
        match place {
            Place::Kademlia => self.discovery.provide(&mut behaviour.kad, name, now),
            Place::Rendezvous(grape) => {
                let behaviour = &mut behaviour.rendezvous;
                let sent = self.rendezvous.register(behaviour, grape, name.clone());
                if !sent {
                    let published = self.discovery.announcements.on_refused(&name, place, now);
                    self.on_published(published, &name);
                }
            }
        }
    }

    fn on_published(&mut self, published: bool, name: &ServiceName) {
        if published && let Some(done) = self.publishing.remove(name) {
            // Who asked may be gone.
            let _ = done.send(Ok(()));
        }
    }

    fn dial_bootstraps(&mut self, now: Instant) {
        while let Some((index, address, expected)) = self.connectivity.bootstraps.due(now) {
            if let Some(peer) = expected
                && self.swarm.is_connected(&peer)
            {
                self.connectivity.bootstraps.on_known(index, peer, now);
                self.on_bootstrap(peer, None);
                continue;
            }
            let opts = match expected {
                Some(peer) => DialOpts::peer_id(peer)
                    .addresses(vec![address.clone()])
                    .condition(PeerCondition::Always)
                    .allocate_new_port()
                    .build(),
                None => DialOpts::unknown_peer_id()
                    .address(address.clone())
                    .allocate_new_port()
                    .build(),
            };
            let connection = opts.connection_id();
            match self.swarm.dial(opts) {
                Ok(()) => self.connectivity.bootstraps.on_dialling(index, connection),
                Err(error) => {
                    let failure = describe(&error, expected);
                    self.connectivity.bootstraps.refuse(index, failure, now);
                }
            }
        }
        self.connectivity.publish();
        self.after_bootstrap_change();
    }

    fn after_bootstrap_change(&mut self) {
        self.release_held();
        if self.is_cut_off() {
            let failures = self.connectivity.bootstraps.failures();
            for (name, done) in std::mem::take(&mut self.publishing) {
                // Who asked may be gone.
                let _ = done.send(Err(AnnounceError::NoGrape(failures.clone())));
                self.withdraw(&name);
            }
        }
    }

    /// A bootstrap grape is connected.
    fn on_bootstrap(&mut self, grape: PeerId, address: Option<Multiaddr>) {
        if let Some(address) = address {
            // So that the first query need not wait for identify.
            self.swarm.behaviour_mut().kad.add_address(&grape, address);
        }
        self.grapes_changed = true;
        if self.names.registrations.is_deaf(&grape) {
            self.discovery.announcements.on_grape(grape);
        }
        if self.connectivity.bootstraps.connected().len() == 1 {
            // Finds the neighbours, at once and once. The rest of the table Kademlia fills by
            // itself half a second later; to walk all of it for each bootstrap grape would only
            // multiply the connections.
            self.look_around();
        }
        self.connectivity.publish();
    }

    /// Asks for the grapes nearest to this node.
    fn look_around(&mut self) {
        let local = *self.swarm.local_peer_id();
        let kad = &mut self.swarm.behaviour_mut().kad;
        self.discovery.look_around(kad, local);
    }

    fn on_address(&mut self, address: Multiaddr) {
        // Kademlia and rendezvous tell others of external addresses only.
        self.swarm.add_external_address(address.clone());
        self.on_addresses();
        self.connectivity.on_listening(address);
    }

    fn on_addresses(&mut self) {
        let addresses = self.swarm.external_addresses().cloned().collect();
        self.rendezvous.on_addresses(addresses);
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Routing what the Swarm tells.
impl Driver {
    fn on_swarm_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        let now = Instant::now();
        match event {
            SwarmEvent::Behaviour(event) => self.on_behaviour_event(event, now),
            SwarmEvent::ConnectionEstablished {
                peer_id,
                connection_id,
                endpoint,
                ..
            } => self.on_established(peer_id, connection_id, &endpoint, now),
            SwarmEvent::ConnectionClosed {
                peer_id,
                connection_id,
                ..
            } => self.on_closed(peer_id, connection_id, now),
            SwarmEvent::OutgoingConnectionError {
                connection_id,
                peer_id,
                error,
            } => {
                if let (Some(peer), DialError::Transport(_)) = (peer_id, &error)
                    && !self.connectivity.is_connected(&peer)
                {
                    // Kademlia keeps a dead grape until its bucket is full, and each query would
                    // wait for it.
                    self.swarm.behaviour_mut().kad.remove_peer(&peer);
                    self.grapes_changed = true;
                }
                let failed = self
                    .connectivity
                    .on_dial_failed(connection_id, peer_id, &error, now);
                if let Some(peer) = failed {
                    self.discovery.lookups.on_dial_failed(&peer, now);
                }
                self.after_bootstrap_change();
            }
            SwarmEvent::NewListenAddr { address, .. } => self.on_address(address),
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                self.swarm.remove_external_address(&address);
                self.on_addresses();
                self.connectivity.on_unlistened(address);
            }
            SwarmEvent::ListenerError { error, .. } => {
                tracing::warn!(%error, "a listener has trouble");
            }
            _ => {}
        }
    }

    fn on_established(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        endpoint: &ConnectedPoint,
        now: Instant,
    ) {
        let change = self
            .connectivity
            .on_established(peer, connection, endpoint, now);
        if change.peer {
            self.metrics
                .peers
                .set(self.swarm.network_info().num_peers() as u64);
            self.routes().on_connected(peer);
            self.names.registrations.on_connected(&peer, now);
            self.grapes_changed = true;
        }
        if change.bootstrap {
            let address = endpoint.get_remote_address().clone();
            tracing::debug!(%peer, %address, "a bootstrap grape is connected");
            self.on_bootstrap(peer, Some(address));
            self.after_bootstrap_change();
        }
        self.discovery.lookups.on_connected(&peer, now);
    }

    fn on_closed(&mut self, peer: PeerId, connection: ConnectionId, now: Instant) {
        let change = self.connectivity.on_closed(peer, connection, now);
        if change.peer {
            self.metrics
                .peers
                .set(self.swarm.network_info().num_peers() as u64);
            self.routes().on_disconnected(&peer);
            self.rendezvous.on_disconnected(&peer);
            self.names.on_disconnected(&peer, now);
            self.records.forget(&peer);
            self.puts.forget(&peer);
            self.grapes_changed = true;
        }
        if change.bootstrap {
            tracing::debug!(%peer, "a bootstrap grape is gone");
            self.discovery.announcements.on_grape_gone(&peer);
            self.after_bootstrap_change();
        }
    }

    fn on_behaviour_event(&mut self, event: BehaviourEvent, now: Instant) {
        match event {
            BehaviourEvent::Kad(event) => {
                if let kad::Event::OutboundQueryProgressed {
                    result: kad::QueryResult::GetProviders(_),
                    stats,
                    step,
                    ..
                } = &event
                    && step.last
                {
                    self.metrics
                        .kademlia_requests
                        .add(stats.num_requests().into());
                }
                if Discovery::has_explored(&event) {
                    self.connectivity.on_explored();
                }
                self.grapes_changed |= matches!(event, kad::Event::RoutingUpdated { .. });
                let Some(event) = self.values.on_event(event) else {
                    return;
                };
                let kad = &mut self.swarm.behaviour_mut().kad;
                let learned = self.discovery.on_event(kad, event, now);
                self.on_kademlia(learned, now);
            }
            BehaviourEvent::Rendezvous(event) => {
                let behaviour = self.swarm.behaviour_mut();
                let connectivity = &self.connectivity;
                let learned = self.rendezvous.on_event(
                    &mut behaviour.rendezvous,
                    &mut self.registry.providers(),
                    |peer| prefix(connectivity, peer),
                    event,
                    now,
                );
                self.on_rendezvous(learned, now);
            }
            BehaviourEvent::Single(event) => {
                if let Some(Serves(peer, name, serves)) = self.requests.on_event(event) {
                    self.discovery.lookups.on_answer(&peer, &name, serves, now);
                }
            }
            BehaviourEvent::Identify(identify::Event::Received { peer_id, info, .. }) => {
                self.on_identified(peer_id, &info);
            }
            // A peer need not speak ping; the transport tells when its connection breaks.
            BehaviourEvent::Ping(ping::Event {
                result: Err(ping::Failure::Unsupported),
                ..
            }) => {}
            BehaviourEvent::Ping(ping::Event {
                peer,
                connection,
                result: Err(error),
            }) => {
                tracing::debug!(%peer, %error, "a connection is dead");
                self.swarm.close_connection(connection);
            }
            _ => {}
        }
    }

    fn on_kademlia(&mut self, learned: Option<discovery::Learned>, now: Instant) {
        match learned {
            Some(discovery::Learned::Providers(name, providers)) => {
                for peer in providers {
                    let kad = &mut self.swarm.behaviour_mut().kad;
                    let addresses = Discovery::stored_addresses(kad, &peer);
                    self.on_candidate(&name, Source::Kademlia, peer, addresses, now);
                }
            }
            Some(discovery::Learned::Record(record)) => self.on_record(&record, now),
            Some(discovery::Learned::Value(peer, record)) => self.on_value(peer, &record, now),
            // Kademlia reports success before delivery; with no grape connected there was none.
            Some(discovery::Learned::Provided(name, true))
                if !self.connectivity.grapes().is_empty() =>
            {
                let published = self.discovery.announcements.on_provided(&name, now);
                self.on_published(published, &name);
            }
            Some(discovery::Learned::Provided(name, _)) if self.registrar => {
                // Its own store holds the name: who asks this grape finds it.
                let published = self.discovery.announcements.on_provided(&name, now);
                self.on_published(published, &name);
            }
            Some(discovery::Learned::Provided(name, _)) => {
                self.discovery
                    .announcements
                    .on_refused(&name, Place::Kademlia, now);
            }
            Some(discovery::Learned::Walked(name, closest)) => {
                self.names.registrations.on_walked(&name, &closest, now);
            }
            Some(discovery::Learned::LookedAround(somebody)) => self.looked_around |= somebody,
            None => {}
        }
    }

    fn on_names(&mut self, answered: names::Answered) {
        let now = Instant::now();
        match self.names.on_answer(answered, now) {
            names::Learned::Kept(names) => {
                for name in names {
                    let published = self.discovery.announcements.on_kept(&name);
                    self.on_published(published, &name);
                }
            }
            names::Learned::Deaf(grape, sought) => {
                for name in sought {
                    self.discovery.lookups.on_deaf(&grape, &name);
                }
            }
            names::Learned::Found(grape, found) => {
                for (name, providers) in found {
                    self.on_found(grape, &name, providers, now);
                }
            }
            names::Learned::Serves(peer, name, serves) => {
                self.discovery.lookups.on_answer(&peer, &name, serves, now);
            }
            names::Learned::NotAsked(peer, name) => self.ask_serves(peer, name),
        }
        if self.names.counts_changed() {
            let known = self.grapes.borrow().len();
            if self.names.most_grapes() != known as u64 {
                let known_few = (1..SMALL).contains(&known);
                self.exploration.on_grapes(known_few, now);
            }
        }
    }

    /// A grape that is asked directly has named providers, or has not answered.
    fn on_found(
        &mut self,
        grape: PeerId,
        name: &ServiceName,
        providers: Option<names::Providers>,
        now: Instant,
    ) {
        let answered = providers.is_some();
        for (peer, addresses) in providers.unwrap_or_default() {
            self.on_candidate(name, Source::Point(grape), peer, addresses, now);
        }
        self.discovery
            .lookups
            .on_discovered(&grape, name, answered, now);
    }

    /// A grape without a registry is told of names by rendezvous and Kademlia.
    fn on_deaf(&mut self, grape: PeerId) {
        if self.connectivity.bootstraps.connected().contains(&grape) {
            self.discovery.announcements.on_grape(grape);
        }
    }

    fn on_record(&mut self, record: &kad::ProviderRecord, now: Instant) {
        if !self.registrar || !self.records.admit(record.provider, now) {
            return;
        }
        let prefix = prefix(&self.connectivity, &record.provider);
        let mut store = self.registry.providers();
        let new = NewRecord {
            key: record.key.as_ref(),
            peer: record.provider,
            prefix,
            addresses: &record.addresses,
            origin: Origin::Kademlia,
            ttl: store.lease(),
        };
        if let Err(error) = store.insert(new, now) {
            tracing::debug!(peer = %record.provider, %error, "a provider record was refused");
        }
    }

    fn on_value(&mut self, peer: PeerId, record: &kad::Record, now: Instant) {
        if !self.registrar || !self.puts.admit(peer, now) {
            return;
        }
        let prefix = prefix(&self.connectivity, &peer);
        let key = record.key.as_ref();
        if let Err(error) = self.registry.put(key, &record.value, prefix, now) {
            tracing::debug!(%peer, %error, "a value was refused");
        }
    }

    fn on_rendezvous(&mut self, learned: Option<rendezvous::Learned>, now: Instant) {
        let announcements = &mut self.discovery.announcements;
        match learned {
            Some(rendezvous::Learned::Registered(grape, name, lease)) => {
                let published = announcements.on_registered(&name, grape, lease, now);
                self.on_published(published, &name);
            }
            Some(rendezvous::Learned::Refused(grape, name)) => {
                let place = Place::Rendezvous(grape);
                let published = announcements.on_refused(&name, place, now);
                self.on_published(published, &name);
            }
            Some(rendezvous::Learned::Discovered(grape, name, providers)) => {
                self.on_found(grape, &name, providers, now);
            }
            Some(rendezvous::Learned::Resume(grape, name)) => {
                self.publish(name, Place::Rendezvous(grape), now);
            }
            None => {}
        }
    }

    fn on_candidate(
        &mut self,
        name: &ServiceName,
        source: Source,
        peer: PeerId,
        mut addresses: Vec<Multiaddr>,
        now: Instant,
    ) {
        addresses.truncate(MAX_ADDRESSES);
        let connected = self.connectivity.is_connected(&peer);
        self.discovery
            .lookups
            .on_candidate(name, source, peer, addresses, connected, now);
        // Kademlia keeps the addresses it heard only while its query runs: dial from inside it.
        self.carry_out_lookups(now);
    }

    fn on_identified(&mut self, peer: PeerId, info: &identify::Info) {
        let back = self.connectivity.on_identified(peer, info, self.registrar);
        self.grapes_changed = true;
        // A grape is dialled back for its place in the routing table.
        if back.is_empty() || !self.has_room_for(&peer) {
            return;
        }
        let opts = DialOpts::peer_id(peer)
            .addresses(back)
            .condition(PeerCondition::Always)
            .allocate_new_port()
            .build();
        // The second connection goes when it has rested: Kademlia may ask by either, and would wait
        // for the answer to a question that was cut off.
        if let Err(error) = self.swarm.dial(opts) {
            tracing::debug!(%peer, %error, "cannot dial a grape back");
        }
    }

    /// Whether Kademlia's routing table would take a peer that it does not hold yet.
    fn has_room_for(&mut self, peer: &PeerId) -> bool {
        let bucket = self.swarm.behaviour_mut().kad.kbucket(*peer);
        bucket.is_some_and(|bucket| bucket.num_entries() < kad::K_VALUE.get())
    }
}

/// Where a peer's connection comes from.
fn prefix(connectivity: &Connectivity, peer: &PeerId) -> Prefix {
    connectivity
        .remote_address(peer)
        .map_or(Prefix::Local, Prefix::from)
}
