//! Which providers a grape is asking whether they live, before it forgets them.
//!
//! A provider that announced itself once, by Kademlia or rendezvous, and renews that after an hour or
//! more is asked over the connection that stands, or by a dial to an address at the host that it has
//! come from: nobody can make a grape dial a third. It lives if it answers at all; of a name that it says
//! not to serve its record is dropped. So many are asked at once that a crowd is dealt with and that
//! those of one network, which may keep a grape waiting, leave room for others.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use libp2p::swarm::ConnectionId;
use libp2p::{Multiaddr, PeerId};

use crate::name::ServiceName;
use crate::store::{Due, Prefix};

/// The providers that are asked at once, and those of them that are dialled.
const MAX_ASKED: usize = 256;
const MAX_DIALLED: usize = 64;

/// Those of one network that are dialled at once: it takes eight networks whose hosts keep a grape waiting
/// to take all the room.
const MAX_DIALLED_OF_PREFIX: usize = MAX_DIALLED / 8;

/// How many at most are begun in a turn, and how soon after one turn the next comes if there are more.
/// 500 a second, a fortieth of a core over connections that stand.
pub(super) const PER_TURN: usize = 50;
const NEXT_TURN: Duration = Duration::from_millis(100);

/// How often it is looked who is due: often enough for the shortest lease.
const LOOK: Duration = Duration::from_millis(250);

/// What a provider has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Lives,
    /// It does not serve the name that it was asked of, and lives.
    Disowns,
    Silent,
}

/// How a check goes on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Begun {
    /// The provider is to be asked.
    Ask(Vec<ServiceName>),
    /// It is to be dialled; tell by [`Checks::on_dialling`].
    Dial(Vec<Multiaddr>),
    /// There is no room or no way now; it will be due again.
    Nothing,
}

/// A check that is over.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Over {
    pub(crate) lives: bool,
    /// The provider can be dialled for the next one.
    pub(crate) is_dialable: bool,
    /// The connection that was made for this one.
    pub(crate) dialled: Option<ConnectionId>,
}

/// The checks under way.
#[derive(Debug)]
pub(crate) struct Checks {
    checks: HashMap<PeerId, Check>,
    dialled: HashMap<ConnectionId, PeerId>,
    dialled_of: HashMap<Prefix, usize>,
    next: Instant,
}

#[derive(Debug)]
struct Check {
    due: Due,
    /// The questions without an answer.
    open: usize,
    lives: bool,
    dialled: Option<ConnectionId>,
}

impl Checks {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            checks: HashMap::new(),
            dialled: HashMap::new(),
            dialled_of: HashMap::new(),
            next: now + LOOK,
        }
    }

    /// When to look who is due.
    pub(crate) fn next_turn(&self) -> Instant {
        self.next
    }

    /// So many were due in this turn.
    pub(crate) fn on_turn(&mut self, due: usize, now: Instant) {
        let pause = match due < PER_TURN {
            true => LOOK,
            false => NEXT_TURN,
        };
        self.next = now + pause;
    }

    /// Whether one more can be asked.
    pub(crate) fn has_room(&self) -> bool {
        self.checks.len() < MAX_ASKED
    }

    /// A provider is due, which is connected or not.
    pub(crate) fn begin(&mut self, due: Due, is_connected: bool) -> Begun {
        if self.checks.contains_key(&due.peer) {
            return Begun::Nothing;
        }
        if is_connected {
            let names = due.names.clone();
            self.insert(due);
            return Begun::Ask(names);
        }
        let of_prefix = self.dialled_of.get(&due.prefix).copied().unwrap_or(0);
        let has_room = self.dialled.len() < MAX_DIALLED && of_prefix < MAX_DIALLED_OF_PREFIX;
        match has_room && !due.own.is_empty() {
            true => Begun::Dial(due.own),
            false => Begun::Nothing,
        }
    }

    /// A provider that is due is being dialled.
    pub(crate) fn on_dialling(&mut self, due: Due, connection: ConnectionId) {
        self.dialled.insert(connection, due.peer);
        *self.dialled_of.entry(due.prefix).or_default() += 1;
        self.insert(due);
    }

    /// A dial has ended, of whomever. If it was one of these and led to a connection, its peer is to be
    /// asked.
    pub(crate) fn on_dialled(
        &mut self,
        connection: ConnectionId,
        is_connected: bool,
    ) -> Option<(PeerId, Vec<ServiceName>)> {
        let peer = self.dialled.remove(&connection)?;
        let check = self.checks.get_mut(&peer)?;
        let prefix = check.due.prefix;
        if let Some(dialled) = self.dialled_of.get_mut(&prefix) {
            *dialled -= 1;
            if *dialled == 0 {
                self.dialled_of.remove(&prefix);
            }
        }
        if !is_connected {
            self.checks.remove(&peer);
            return None;
        }
        check.dialled = Some(connection);
        Some((peer, check.due.names.clone()))
    }

    /// A provider has answered a question, or has not. Returns how the check has ended, with the last.
    pub(crate) fn on_verdict(&mut self, peer: &PeerId, verdict: Verdict) -> Option<Over> {
        let check = self.checks.get_mut(peer)?;
        check.lives |= verdict != Verdict::Silent;
        check.open = check.open.saturating_sub(1);
        if check.open > 0 {
            return None;
        }
        let check = self.checks.remove(peer)?;
        Some(Over {
            lives: check.lives,
            is_dialable: !check.due.own.is_empty(),
            dialled: check.dialled,
        })
    }

    fn insert(&mut self, due: Due) {
        let check = Check {
            open: due.names.len().max(1),
            lives: false,
            dialled: None,
            due,
        };
        self.checks.insert(check.due.peer, check);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn due(network: u8, names: usize) -> Due {
        Due {
            peer: PeerId::random(),
            prefix: Prefix::V4([10, 0, network]),
            own: vec!["/ip4/10.0.0.1/tcp/1".parse().unwrap()],
            names: (0..names)
                .map(|n| format!("name{n}").parse().unwrap())
                .collect(),
        }
    }

    /// Begins a check as the driver does; says whether it is under way.
    fn dial(checks: &mut Checks, due: Due, connection: usize) -> bool {
        match checks.begin(due.clone(), false) {
            Begun::Dial(own) => {
                assert_eq!(own, due.own);
                checks.on_dialling(due, ConnectionId::new_unchecked(connection));
                true
            }
            Begun::Nothing => false,
            Begun::Ask(_) => panic!("it is not connected"),
        }
    }

    #[test]
    fn a_network_that_keeps_a_grape_waiting_leaves_room_for_others() {
        let mut checks = Checks::new(Instant::now());
        let mut connection = 0;
        let mut dialled = |checks: &mut Checks, network| {
            connection += 1;
            dial(checks, due(network, 0), connection)
        };
        let of_first = (0..100).filter(|_| dialled(&mut checks, 1)).count();
        assert_eq!(of_first, MAX_DIALLED_OF_PREFIX);
        let mut others = 2..=u8::MAX;
        let of_others = others.by_ref().map(|network| {
            let of_one = (0..100).filter(|_| dialled(&mut checks, network));
            of_one.count()
        });
        let of_others: usize = of_others.take_while(|of_one| *of_one > 0).sum();
        assert_eq!(of_first + of_others, MAX_DIALLED);
        assert_eq!(
            others.start(),
            &(2 + 8),
            "as many networks take all there is"
        );
        // Who is connected needs no dial.
        let near = due(1, 0);
        assert_eq!(checks.begin(near, true), Begun::Ask(vec![]));
        // A dial that fails makes room, and the provider may be due again.
        assert!(!dialled(&mut checks, 1));
        assert_eq!(
            checks.on_dialled(ConnectionId::new_unchecked(1), false),
            None
        );
        assert!(dialled(&mut checks, 1));
        assert_eq!(
            checks.on_dialled(ConnectionId::new_unchecked(1), true),
            None
        );
    }

    #[test]
    fn a_provider_lives_if_it_answers_any_of_the_questions() {
        use Verdict::{Disowns, Lives, Silent};
        for (verdicts, lives) in [
            (&[Lives] as &[_], true),
            (&[Silent], false),
            (&[Disowns, Silent], true),
            (&[Silent, Silent, Lives], true),
            (&[Silent, Silent], false),
        ] {
            let mut checks = Checks::new(Instant::now());
            let due = due(1, verdicts.len());
            let (peer, connection) = (due.peer, ConnectionId::new_unchecked(7));
            assert!(dial(&mut checks, due.clone(), 7));
            assert_eq!(
                checks.begin(due, true),
                Begun::Nothing,
                "it is being dialled"
            );
            let (asked, names) = checks.on_dialled(connection, true).unwrap();
            assert_eq!((asked, names.len()), (peer, verdicts.len()));
            let (last, others) = verdicts.split_last().unwrap();
            for verdict in others {
                assert_eq!(checks.on_verdict(&peer, *verdict), None);
            }
            let over = checks.on_verdict(&peer, *last).unwrap();
            assert_eq!((over.lives, over.dialled), (lives, Some(connection)));
            assert_eq!(checks.on_verdict(&peer, Lives), None, "nothing is asked");
        }
    }
}
