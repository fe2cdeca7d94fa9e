//! Who is whom in a conversation: the ids behind the names that are talked to, and who has written.
//!
//! Nobody owns a name, so that one means whoever answered to it first, for as long as this program runs.
//! Only who is answered is remembered: strangers may write under any number of names.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use grapevine::{PeerId, ServiceName};

use crate::dialogue::{NAME, question};

/// Cheap to clone; all clones know the same people.
#[derive(Clone)]
pub(crate) struct People(Arc<Shared>);

struct Shared {
    /// The name that this program itself announces.
    own: Option<ServiceName>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    partners: HashMap<ServiceName, Partner>,
    /// Whom the next line is for.
    current: Option<ServiceName>,
    /// Who has written last and is not talked to.
    writer: Option<Writer>,
    /// Who has written and was not offered an answer, until a person is told how to give one.
    unoffered: Option<ServiceName>,
    /// Whom the question that is open offers to answer.
    offered: Option<Writer>,
    offer: Option<Offer>,
}

/// Who is meant by a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Partner {
    pub(crate) peer: PeerId,
    /// The last message to them had no answer in time, or they were busy.
    pub(crate) is_doubtful: bool,
}

/// Somebody who can be answered: the name is a claim, the id is proved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Writer {
    pub(crate) name: ServiceName,
    pub(crate) peer: PeerId,
}

/// Makes a question that is open another one, if nobody has begun to type. Returns whether it did.
type Offer = Box<dyn Fn(&str, &str) -> bool + Send>;

impl People {
    pub(crate) fn new(own: Option<ServiceName>) -> Self {
        Self(Arc::new(Shared {
            own,
            state: Mutex::default(),
        }))
    }

    /// Whoever writes while nobody is talked to is offered an answer by this.
    pub(crate) fn offer_by(&self, offer: impl Fn(&str, &str) -> bool + Send + 'static) {
        self.lock().offer = Some(Box::new(offer));
    }

    pub(crate) fn partner(&self, name: &ServiceName) -> Option<Partner> {
        self.lock().partners.get(name).copied()
    }

    /// From now on a name means this peer. Returns whom it meant before.
    pub(crate) fn establish(&self, name: &ServiceName, peer: PeerId) -> Option<PeerId> {
        let partner = Partner {
            peer,
            is_doubtful: false,
        };
        let before = self.lock().partners.insert(name.clone(), partner);
        before.map(|partner| partner.peer)
    }

    /// The partner of this name has not answered.
    pub(crate) fn doubt(&self, name: &ServiceName) {
        if let Some(partner) = self.lock().partners.get_mut(name) {
            partner.is_doubtful = true;
        }
    }

    /// The partner of this name is asked again, although the last message had no answer.
    pub(crate) fn trust(&self, name: &ServiceName) {
        self.lock().trust(name, None);
    }

    /// Further lines are for this name: for who has written under it, if it meant nobody before.
    pub(crate) fn talk_to(&self, name: &ServiceName) {
        let mut state = self.lock();
        state.current = Some(name.clone());
        if let Some(writer) = state.writer.take_if(|writer| writer.name == *name) {
            state.answer(writer);
        }
    }

    /// Further lines are for nobody yet.
    pub(crate) fn talk_to_nobody(&self) {
        self.lock().current = None;
    }

    /// Who has written beside a conversation: a person is to be told how to answer, once.
    pub(crate) fn take_unoffered(&self) -> Option<ServiceName> {
        self.lock().unoffered.take()
    }

    /// Somebody has written under a name. Returns what a person should know of that.
    pub(crate) fn on_arrival(&self, from: &str, peer: PeerId) -> Option<String> {
        let name: ServiceName = from.parse().ok()?;
        let mut state = self.lock();
        if self.0.own.as_ref().is_some_and(|own| is_like(own, &name)) {
            return Some("not you".into());
        }
        let mut partners = state.partners.iter();
        if let Some((known, _)) =
            partners.find(|(known, partner)| is_like(known, &name) && partner.peer != peer)
        {
            return Some(format!("not the {known} you talk to"));
        }
        state.trust(&name, Some(peer));
        if state.current.as_ref() != Some(&name) {
            state.on_writer(Writer { name, peer });
        }
        None
    }

    /// Who has written last and is not answered.
    pub(crate) fn writer(&self) -> Option<ServiceName> {
        let state = self.lock();
        state.writer.as_ref().map(|writer| writer.name.clone())
    }

    /// Who has written and is to be answered: from now on the name means them.
    pub(crate) fn take_writer(&self) -> Option<ServiceName> {
        let mut state = self.lock();
        let writer = state.writer.take()?;
        state.answer(writer)
    }

    /// Whom the question that was just answered has offered to answer.
    pub(crate) fn take_offered(&self) -> Option<Writer> {
        let mut state = self.lock();
        let offered = state.offered.take()?;
        if state.writer.as_ref() == Some(&offered) {
            state.writer = None;
        }
        Some(offered)
    }

    /// From now on the name means who has written under it. `None` if it means somebody else already.
    pub(crate) fn answer(&self, writer: Writer) -> Option<ServiceName> {
        self.lock().answer(writer)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Somebody who is heard from, or whom nobody else is to replace, may be asked again.
    fn trust(&mut self, name: &ServiceName, peer: Option<PeerId>) {
        let is_meant = |partner: &&mut Partner| peer.is_none_or(|peer| partner.peer == peer);
        if let Some(partner) = self.partners.get_mut(name).filter(is_meant) {
            partner.is_doubtful = false;
        }
    }

    fn on_writer(&mut self, writer: Writer) {
        let is_offered = match &self.offer {
            Some(offer) if self.current.is_none() => offer(NAME, &question(&writer.name)),
            _ => false,
        };
        let is_known = self.writer.as_ref() == Some(&writer);
        if is_offered {
            self.offered = Some(writer.clone());
        } else if self.offer.is_some() && !is_known {
            self.unoffered = Some(writer.name.clone());
        }
        self.writer = Some(writer);
    }

    fn answer(&mut self, Writer { name, peer }: Writer) -> Option<ServiceName> {
        let new = Partner {
            peer,
            is_doubtful: false,
        };
        let partner = self.partners.entry(name.clone()).or_insert(new);
        (partner.peer == peer).then_some(name)
    }
}

/// Whether a person could take one name for the other.
fn is_like(one: &ServiceName, other: &ServiceName) -> bool {
    one.as_ref().to_lowercase() == other.as_ref().to_lowercase()
}
