//! A stand-in for one node: workers and values in memory, so that the gateway runs.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::{Node, Request};
use crate::name::ServiceName;
use crate::proto::bep44::{Refusal, Target};

/// What Grenache's workers and values are to the network. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Directory {
    node: Node,
}

/// What a lookup finds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Found {
    /// Where live workers are: a fair sample.
    pub(crate) workers: Vec<SocketAddr>,
    /// Whether a live libp2p peer provides the name.
    pub(crate) peers: bool,
}

/// No room for another worker.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("no room for another worker")]
pub(crate) struct Full;

/// Why a value was not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PutError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("no grape took the value")]
    Unreachable,
}

/// What other nodes ask this grape on behalf of its workers.
#[derive(Debug)]
pub(crate) enum Carried {
    /// Does a live worker serve the name?
    Asks {
        name: ServiceName,
        answer: oneshot::Sender<bool>,
    },
    /// A request for it.
    Call { name: ServiceName, request: Request },
}

#[derive(Debug)]
pub(super) struct Local {
    workers: Mutex<HashMap<String, HashMap<SocketAddr, Instant>>>,
    values: Mutex<HashMap<Target, Vec<u8>>>,
    carried: mpsc::Sender<Carried>,
    receiver: Mutex<Option<mpsc::Receiver<Carried>>>,
}

impl Default for Local {
    fn default() -> Self {
        let (carried, receiver) = mpsc::channel(1_024);
        Self {
            workers: Mutex::default(),
            values: Mutex::default(),
            carried,
            receiver: Mutex::new(Some(receiver)),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Node {
    pub(crate) fn directory(&self) -> Directory {
        Directory { node: self.clone() }
    }
}

impl Directory {
    fn local(&self) -> &Arc<Local> {
        &self.node.shared.local
    }

    pub(crate) fn announce(
        &self,
        service: &str,
        at: SocketAddr,
        lease: Duration,
    ) -> Result<(), Full> {
        let mut workers = lock(&self.local().workers);
        let until = Instant::now() + lease;
        if let Some(of_name) = workers.get_mut(service) {
            of_name.insert(at, until);
            return Ok(());
        }
        workers.insert(service.into(), HashMap::from([(at, until)]));
        drop(workers);
        if let Ok(name) = service.parse() {
            self.provide(name);
        }
        Ok(())
    }

    fn provide(&self, name: ServiceName) {
        let (node, carried) = (self.node.clone(), self.local().carried.clone());
        tokio::spawn(async move {
            let Ok(mut service) = node.announce(&name).await else {
                return;
            };
            while let Some(request) = service.next().await {
                let name = name.clone();
                if carried.send(Carried::Call { name, request }).await.is_err() {
                    return;
                }
            }
        });
    }

    pub(crate) fn withdraw(&self, service: &str, at: SocketAddr) -> bool {
        let mut workers = lock(&self.local().workers);
        let of_name = workers.get_mut(service);
        of_name.is_some_and(|of_name| of_name.remove(&at).is_some())
    }

    pub(crate) async fn lookup(&self, service: &str, limit: usize) -> Found {
        let mut workers = self.own_workers(service);
        workers.truncate(limit);
        let name = ServiceName::from_wire(service);
        let peers = match name {
            Ok(name) => self.node.lookup(&name).await.is_ok(),
            Err(_) => false,
        };
        Found { workers, peers }
    }

    pub(crate) fn own_workers(&self, service: &str) -> Vec<SocketAddr> {
        let now = Instant::now();
        let workers = lock(&self.local().workers);
        let of_name = workers.get(service).into_iter().flatten();
        let live = of_name.filter(|(_, until)| **until > now);
        live.map(|(at, _)| *at).collect()
    }

    pub(crate) async fn put(&self, target: Target, value: Vec<u8>) -> Result<(), PutError> {
        lock(&self.local().values).insert(target, value);
        Ok(())
    }

    pub(crate) async fn get(&self, target: Target) -> Vec<Vec<u8>> {
        let values = lock(&self.local().values);
        values.get(&target).into_iter().cloned().collect()
    }

    /// Called once.
    pub(crate) fn carry(&self) -> mpsc::Receiver<Carried> {
        let receiver = lock(&self.local().receiver).take();
        receiver.unwrap_or_else(|| mpsc::channel(1).1)
    }
}
