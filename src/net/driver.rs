//! The loop that owns the Swarm: it routes events and commands to the concerns, carries out what they
//! decide, and passes on what one learns and another needs. It waits nowhere but in its `select!`.

mod actions;
mod checks;
mod events;
mod listen;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use libp2p::{PeerId, Swarm, kad};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::sleep_until;
use void::Void;

use super::checks::Checks;
use super::connectivity::{Connectivity, KnownGrape};
use super::discovery::{self, Discovery, Waiter};
use super::forms::Forms;
use super::interfaces::Interfaces;
use super::names::Names;
use super::rendezvous::Rendezvous;
use super::rpc::link::{Lane, Link};
use super::rpc::serve::{Inbound, Server};
use super::rpc::single::Requests;
use super::swarm::{Behaviour, build};
use super::values::Values;
use super::{COMMANDS, Command, Handle, Settings};
use crate::error::{AnnounceError, LookupError, SpawnError};
use crate::limits::{KEEP_ALIVE_INTERVAL, MAX_ANNOUNCED, MAX_LOOKUPS, SHUTDOWN_DEADLINE};
use crate::metrics::Metrics;
use crate::name::ServiceName;
use crate::proto::capabilities::Capability;
use crate::proto::grapes::Grapes;
use crate::proto::lookup::{Connected, Plan};
use crate::proto::rate::RateLimit;
use crate::proto::registrations::Registrations;
use crate::proto::routes::Routes;
use crate::store::Registry;

use listen::{Listening, listen};

/// How long a node that has served names stays connected after its last reply: a connection that is
/// closed throws away what the other end has not acknowledged.
const LINGER: Duration = Duration::from_millis(50);

/// How often expired records are dropped, and lookups that nobody waits for.
const HOUSEKEEPING: Duration = Duration::from_secs(1);

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
    let registry = Registry::new(local, settings.limits.store.clone(), settings.lease, now);
    let kept = settings.registrar.then(|| Arc::clone(&registry));
    let server = Server::new(&settings.limits, kept, Arc::clone(&metrics));
    let interfaces = match settings.is_of_this_machine() {
        true => Interfaces::constant(),
        false => Interfaces::watched(),
    };
    let ties = interfaces.ties();
    let mut swarm = build(&settings, Arc::clone(&server), Arc::clone(&registry), &ties)
        .map_err(|error| SpawnError::Transport(error.to_string()))?;
    let early = listen(&mut swarm, &settings.listen).await?;
    let bootstrap = settings.bootstrap.clone();
    let (connectivity, status) = Connectivity::new(local, bootstrap, now);
    // As far within the idle time-out as with the default one.
    let keep_alive_interval = KEEP_ALIVE_INTERVAL.min(settings.limits.idle * 3 / 8);
    let (sender, commands) = mpsc::channel(COMMANDS);
    let (known_grapes, grapes) = watch::channel(Vec::new());
    let routes = Arc::new(Routes::new(now));
    let mut driver = Driver {
        swarm,
        commands,
        dropped: FuturesUnordered::new(),
        housekeeping: now + HOUSEKEEPING,
        keep_alive: now + keep_alive_interval,
        keep_alive_interval,
        connectivity,
        interfaces,
        listening: Listening::new(local, settings.external),
        discovery: Discovery::new(local),
        names: Names::new(),
        forms: Forms::default(),
        rendezvous: Rendezvous::new(settings.identity.keypair().clone()),
        values: Values::default(),
        server: Arc::clone(&server),
        registry: Arc::clone(&registry),
        requests: Requests::new(),
        publishing: HashMap::new(),
        held: HashSet::new(),
        records: RateLimit::new(RECORDS_PER_SECOND),
        puts: RateLimit::new(VALUES_PER_SECOND),
        registrar: settings.registrar,
        inbound: settings.limits.inbound_connections,
        checks: Checks::new(now),
        grapes: Grapes::new(now),
        known_grapes,
        routes: Arc::clone(&routes),
        metrics: Arc::clone(&metrics),
    };
    driver.on_addresses();
    for event in early {
        driver.on_swarm_event(event);
    }
    driver.carry_out();
    tokio::spawn(driver.run());
    Ok(Handle {
        commands: sender,
        status,
        routes,
        server,
        registry,
        grapes,
        metrics,
    })
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
    interfaces: Interfaces,
    listening: Listening,
    discovery: Discovery,
    names: Names,
    forms: Forms,
    rendezvous: Rendezvous,
    values: Values,
    server: Arc<Server>,
    registry: Arc<Registry>,
    requests: Requests,
    /// Who waits for a name to be published.
    publishing: HashMap<ServiceName, oneshot::Sender<Result<(), AnnounceError>>>,
    /// Names to look up as soon as it is known whether a grape can be reached.
    held: HashSet<ServiceName>,
    records: RateLimit,
    puts: RateLimit,
    registrar: bool,
    /// The connections that others may open.
    inbound: u32,
    /// The providers that are being asked whether they live.
    checks: Checks,
    grapes: Grapes,
    known_grapes: watch::Sender<Vec<KnownGrape>>,
    routes: Arc<Routes<Link>>,
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
                () = self.interfaces.changed() => self.on_interfaces(),
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

    /// Lets what was answered last reach those who asked.
    async fn linger(&mut self) {
        let end = tokio::time::Instant::now() + LINGER;
        loop {
            tokio::select! {
                event = self.swarm.select_next_some() => self.on_swarm_event(event),
                () = sleep_until(end) => return,
            }
        }
    }

    /// Withdraws every name, lets open requests finish and stops; ends within
    /// [`SHUTDOWN_DEADLINE`].
    async fn shut_down(&mut self) {
        let deadline = tokio::time::Instant::now() + SHUTDOWN_DEADLINE;
        let names: Vec<_> = self.discovery.announcements.names().cloned().collect();
        let serves = !names.is_empty();
        if serves {
            self.take_back_all(&names, deadline - SHUTDOWN_DEADLINE / 2)
                .await;
        }
        self.server.stop();
        for name in names {
            self.server.unserve(&name);
        }
        // The last senders: every service now ends.
        self.dropped.clear();
        for name in self.discovery.awaited() {
            self.discovery.refuse(&name, LookupError::Closed);
        }
        while self.withdrawing() > 0 || self.server.open_requests() > 0 {
            self.carry_out_names(Instant::now());
            let server = Arc::clone(&self.server);
            let due = self.names.registrations.next_due();
            tokio::select! {
                event = self.swarm.select_next_some() => self.on_swarm_event(event),
                answered = self.names.next() => self.on_names(answered),
                () = sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() => {}
                () = server.idle(), if server.open_requests() > 0 => {}
                () = sleep_until(deadline) => break,
            }
        }
        if serves {
            self.linger().await;
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

    /// Withdraws names and goes on serving them until the grapes have confirmed that, so that who asks them
    /// is not sent here to be turned away: another node may serve the same names, even under the same key.
    async fn take_back_all(&mut self, names: &[ServiceName], deadline: tokio::time::Instant) {
        for name in names {
            self.take_back(name);
        }
        while self.withdrawing() > 0 {
            self.carry_out_names(Instant::now());
            let due = self.names.registrations.next_due();
            tokio::select! {
                event = self.swarm.select_next_some() => self.on_swarm_event(event),
                answered = self.names.next() => self.on_names(answered),
                () = sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() => {}
                () = sleep_until(deadline) => return,
            }
        }
        // Who was sent here before is on the way.
        self.linger().await;
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
                self.keep_stream(peer, lane);
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
        let current = self.server.handler(name.as_ref());
        if current.is_some_and(|current| current.is_closed()) {
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
        let current = self.server.handler(name.as_ref());
        if current.is_some_and(|current| current.same_channel(handler)) {
            self.withdraw(name);
        }
    }

    fn withdraw(&mut self, name: &ServiceName) {
        self.server.unserve(name);
        self.take_back(name);
    }

    /// Announces a name no longer.
    fn take_back(&mut self, name: &ServiceName) {
        tracing::debug!(%name, "a name is taken back");
        self.publishing.remove(name);
        if !self.discovery.announcements.withdraw(name) {
            return;
        }
        self.names.registrations.withdraw(name, Instant::now());
        let grapes = self.connectivity.grapes().into_iter();
        let behaviour = self.swarm.behaviour_mut();
        behaviour
            .kad
            .stop_providing(&kad::RecordKey::new(&name.key()));
        let registrations = &self.names.registrations;
        let by_registry = |grape: &PeerId| has_registry(&self.connectivity, registrations, grape);
        for grape in grapes.filter(|grape| !by_registry(grape)) {
            self.rendezvous
                .unregister(&mut behaviour.rendezvous, grape, name);
        }
    }

    fn on_lookup(&mut self, name: ServiceName, waiter: Waiter) {
        if self.discovery.lookups.is_running(&name) {
            return self.discovery.join(name, waiter);
        }
        self.discovery.wait(name.clone(), waiter);
        self.held.insert(name);
        self.release_held();
    }

    /// Starts the lookups that waited for a grape, or tells why there is none.
    fn release_held(&mut self) {
        if self.held.is_empty() {
            return;
        }
        let grapes = self.grapes_to_ask();
        let has_none = grapes.registries.is_empty() && grapes.points.is_empty();
        if has_none && self.connectivity.bootstraps.is_starting() {
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
            tracing::debug!(%name, "a lookup begins");
            let plan = Plan::draw(&grapes);
            self.discovery.lookups.start(&name, &plan, Instant::now());
            self.discovery.on_started(&name);
        }
    }

    /// What is known of the grapes that a lookup may ask.
    fn grapes_to_ask(&self) -> Connected {
        let registrations = &self.names.registrations;
        let bootstraps = self.connectivity.bootstraps.connected();
        // A grape has some of the names itself, and asks Kademlia for the others.
        let count = self.grapes.count().filter(|_| !self.registrar);
        let mut others = Vec::new();
        if count.is_some() {
            others = self.connectivity.grapes();
            others.retain(|grape| {
                let has_registry = has_registry(&self.connectivity, registrations, grape);
                has_registry && !bootstraps.contains(grape)
            });
        }
        let (points, registries) = bootstraps
            .iter()
            .partition(|grape| registrations.lacks_registry(grape));
        Connected {
            registries,
            points,
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
            self.grapes.next_due(),
        ];
        let checks = self.registrar.then(|| self.checks.next_turn());
        let due = due.into_iter().flatten().chain(checks).min();
        due.unwrap_or(self.housekeeping)
            .min(self.housekeeping)
            .min(self.keep_alive)
    }

    /// What has become due of the announcements is carried out after every turn of the loop.
    fn on_time(&mut self) {
        let now = Instant::now();
        self.dial_bootstraps(now);
        self.discovery.lookups.on_time(now);
        if self.grapes.poll_exploration(now) && self.needs_to_look() {
            self.look_around();
        }
        if self.registrar && now >= self.checks.next_turn() {
            self.check_providers(now);
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
        self.registrar || announces || self.grapes.are_more()
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
        self.check_a_grape(now);
        self.housekeeping = now + HOUSEKEEPING;
    }

    /// Sees whether a grape is there that has not been heard of for long, now and then.
    fn check_a_grape(&mut self, now: Instant) {
        if !self.needs_to_look() {
            return;
        }
        let (connectivity, kad) = (&self.connectivity, &mut self.swarm.behaviour_mut().kad);
        let apart = || {
            let routed = discovery::routed(kad).into_iter();
            let grapes = routed.map(|(grape, _)| grape);
            grapes
                .filter(|grape| !connectivity.is_connected(grape))
                .collect()
        };
        if let Some(grape) = self.grapes.poll_check(apart, now) {
            self.dial_known(grape);
        }
    }
}

/// Whether a grape is known to have a registry of names, so that it need not be told and asked by
/// other means.
fn has_registry(
    connectivity: &Connectivity,
    registrations: &Registrations,
    grape: &PeerId,
) -> bool {
    connectivity.can(grape, Capability::Names) && !registrations.lacks_registry(grape)
}
