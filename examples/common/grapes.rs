//! News of the bootstrap grapes, for a person: connected, lost, not to be reached and why.

use std::time::{Duration, Instant};

use grapevine::error::DialFailure;
use grapevine::{BootstrapStatus, Node, PeerId};

use super::output::Output;
use super::short;

/// How long a grape may fail before a person hears of it: one that starts at the same time, or is
/// restarted, is there within this. And how long a connection must last after trouble to be news:
/// a grape that turns this node away closes each at once.
const PATIENCE: Duration = Duration::from_secs(1);

/// What a person has heard about one bootstrap address.
struct News {
    connected: Option<PeerId>,
    /// When the connection was first seen to stand.
    stands: Option<Instant>,
    /// When waiting for the grape began.
    since: Instant,
    told: Option<Trouble>,
}

/// A kind of trouble. Each is told once, however often the address is dialled again.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    Lost,
    Waiting,
    Unreachable,
    Refused,
}

/// Tells the news until the node is shut down.
pub(crate) async fn tell(node: Node, output: Output) {
    let mut status = node.status();
    let start = Instant::now();
    let mut known: Vec<News> = Vec::new();
    let mut elsewhere = false;
    loop {
        let (entries, is_elsewhere) = {
            let status = status.borrow_and_update();
            (status.bootstrap.clone(), status.elsewhere)
        };
        if is_elsewhere && !elsewhere {
            output.note(&used_elsewhere(&node.peer_id())).await;
        }
        elsewhere = is_elsewhere;
        known.resize_with(entries.len(), || News::new(start));
        let now = Instant::now();
        for (news, entry) in known.iter_mut().zip(&entries) {
            if let Some(line) = news.update(entry, now) {
                output.note(&line).await;
            }
        }
        let due = known.iter().filter_map(|news| news.due(now)).min();
        tokio::select! {
            changed = status.changed() => if changed.is_err() { return },
            () = until(due) => {}
        }
    }
}

fn used_elsewhere(id: &PeerId) -> String {
    format!(
        "the identity {} is used by another program too, and messages reach either of the two: give each \
         an identity file of its own",
        short(id)
    )
}

async fn until(due: Option<Instant>) {
    match due {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

impl News {
    fn new(since: Instant) -> Self {
        Self {
            connected: None,
            stands: None,
            since,
            told: None,
        }
    }

    /// When what is not told yet becomes news.
    fn due(&self, now: Instant) -> Option<Instant> {
        let due = self.stands.unwrap_or(self.since) + PATIENCE;
        (self.connected.is_none() && due > now).then_some(due)
    }

    fn update(&mut self, entry: &BootstrapStatus, now: Instant) -> Option<String> {
        let address = &entry.address;
        if let Some(peer) = entry.connected {
            let stands = *self.stands.get_or_insert(now);
            if self.told.is_some() && now < stands + PATIENCE {
                return None;
            }
            self.told = None;
            let is_new = self.connected.replace(peer) != Some(peer);
            return is_new.then(|| format!("connected to the grape {} at {address}", short(&peer)));
        }
        self.stands = None;
        if let Some(peer) = self.connected.take() {
            self.since = now;
            self.told = Some(Trouble::Lost);
            return Some(format!(
                "lost the grape {} at {address}; trying to reach it again",
                short(&peer)
            ));
        }
        let trouble = Trouble::from(entry);
        let is_known = self.told == Some(trouble);
        if is_known || now < self.since + PATIENCE {
            return None;
        }
        self.told = Some(trouble);
        let line = match &entry.last_failure {
            None => format!("waiting for the grape at {address}: no answer yet"),
            Some(failure) if trouble == Trouble::Refused => {
                format!("cannot join by {address}: {failure}")
            }
            Some(failure) => format!("waiting for the grape at {address}: {failure}"),
        };
        Some(line)
    }
}

impl From<&BootstrapStatus> for Trouble {
    fn from(entry: &BootstrapStatus) -> Self {
        match entry.last_failure {
            None => Self::Waiting,
            Some(
                DialFailure::WrongPeer { .. } | DialFailure::NotAGrape | DialFailure::OwnAddress,
            ) => Self::Refused,
            Some(_) => Self::Unreachable,
        }
    }
}
