//! A lookup of which every provider is wanted, not just some.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::{Instant, timeout_at};

use super::{Closed, Node};
use crate::error::LookupError;
use crate::limits::MAX_CANDIDATES;
use crate::name::ServiceName;
use crate::net::{Command, Sought, Waiter};

/// How long the node may take to say, after the deadline, whom it has not reached by then.
const GRACE: Duration = Duration::from_millis(250);

/// More than one lookup can find live.
const ROOM: usize = 4 * MAX_CANDIDATES;

pub(super) struct Seeking {
    node: Node,
    name: ServiceName,
    until: Instant,
    /// What is found, once the lookup has begun.
    found: Option<(OwnedSemaphorePermit, mpsc::Receiver<Sought>)>,
}

impl Seeking {
    /// Of a name, until then at the latest. Begins when it is first asked for what comes next.
    pub(super) fn new(node: &Node, name: &ServiceName, until: Instant) -> Self {
        Self {
            node: node.clone(),
            name: name.clone(),
            until,
            found: None,
        }
    }

    /// What comes next; nothing after [`Sought::Over`]. Cancel-safe.
    pub(super) async fn next(&mut self) -> Sought {
        let late = self.until + GRACE;
        match timeout_at(late, self.advance()).await {
            Ok(Ok(sought)) => sought,
            Ok(Err(Closed)) => Sought::Over(Err(LookupError::Closed)),
            Err(_) => Sought::Over(Err(LookupError::TimedOut(self.name.clone()))),
        }
    }

    async fn advance(&mut self) -> Result<Sought, Closed> {
        if self.found.is_none() {
            let lookups = Arc::clone(&self.node.shared.lookups);
            let permit = lookups.acquire_owned().await.map_err(|_| Closed)?;
            let (told, found) = mpsc::channel(ROOM);
            let until = self.until.into_std();
            let waiter = Waiter::Every { until, told };
            let command = Command::Lookup(self.name.clone(), waiter);
            self.node.send(command).await?;
            self.found = Some((permit, found));
        }
        let (_, found) = self.found.as_mut().ok_or(Closed)?;
        found.recv().await.ok_or(Closed)
    }
}
