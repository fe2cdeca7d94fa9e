//! The requests that are open on one stream, each in a slot of its own.
//!
//! An id is the number of a slot and how often that was used, so that a reply finds its caller
//! without a search, and one to a request that was never made is told from one that comes late.

use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::net::rpc::Outcome;

/// The low bits of an id, which say which slot: more slots than a stream has requests open.
const SLOT_BITS: u32 = 10;

/// Who waits for an outcome.
pub(super) type Caller = oneshot::Sender<Outcome>;

/// When a request is written to the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Written {
    /// When those that wait are taken next.
    Next,
    /// When that is [told](Calls::on_written).
    Later,
}

#[derive(Debug, Default)]
pub(super) struct Calls {
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// How often what waits was taken.
    turn: u64,
}

#[derive(Debug, Default)]
struct Slot {
    /// How often it was used.
    uses: u64,
    call: Option<Call>,
}

#[derive(Debug)]
struct Call {
    deadline: Instant,
    /// The turn that writes it.
    turn: u64,
    caller: Caller,
}

/// A reply to a request that was never made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a reply to a request that was never made")]
pub(super) struct NeverAsked;

impl Calls {
    /// Opens a call; returns the id of the request.
    pub(super) fn enter(&mut self, caller: Caller, deadline: Instant, written: Written) -> u64 {
        let at = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        let slot = &mut self.slots[at];
        slot.uses += 1;
        slot.call = Some(Call {
            deadline,
            turn: match written {
                Written::Next => self.turn,
                Written::Later => u64::MAX,
            },
            caller,
        });
        slot.uses << SLOT_BITS | at as u64
    }

    /// What waits is being written.
    pub(super) fn on_turn(&mut self) {
        self.turn += 1;
    }

    /// A request that is written later is being written now; `false` if its caller has given it up.
    pub(super) fn on_written(&mut self, id: u64) -> bool {
        let (at, uses) = split(id);
        let slot = self.slots.get_mut(at).filter(|slot| slot.uses == uses);
        let Some(call) = slot.and_then(|slot| slot.call.as_mut()) else {
            return false;
        };
        call.turn = self.turn;
        true
    }

    /// Ends the call that a reply is for. `None` if it has ended before.
    pub(super) fn answer(&mut self, id: u64) -> Result<Option<Caller>, NeverAsked> {
        let (at, uses) = split(id);
        let slot = self.slots.get(at).ok_or(NeverAsked)?;
        if uses == 0 || uses > slot.uses {
            return Err(NeverAsked);
        }
        Ok(self.end(id))
    }

    /// Ends a call. `None` if it has ended before.
    pub(super) fn end(&mut self, id: u64) -> Option<Caller> {
        let (at, uses) = split(id);
        let slot = self.slots.get_mut(at).filter(|slot| slot.uses == uses)?;
        let call = slot.call.take()?;
        self.free.push(at);
        Some(call.caller)
    }

    /// Ends the calls that are due. Returns when the next one is due as well.
    pub(super) fn expire(&mut self, now: Instant) -> (Vec<Caller>, Option<Instant>) {
        let due = self.extract(|call| call.deadline <= now);
        let next = self.slots.iter().filter_map(|slot| slot.call.as_ref());
        (due, next.map(|call| call.deadline).min())
    }

    /// Ends all calls that were not written.
    pub(super) fn end_unwritten(&mut self) -> Vec<Caller> {
        let now = self.turn;
        self.extract(|call| call.turn >= now)
    }

    /// Ends all calls.
    pub(super) fn end_all(&mut self) -> Vec<Caller> {
        self.extract(|_| true)
    }

    /// How many are open.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn extract(&mut self, which: impl Fn(&Call) -> bool) -> Vec<Caller> {
        let mut callers = Vec::new();
        for (at, slot) in self.slots.iter_mut().enumerate() {
            if let Some(call) = slot.call.take_if(|call| which(call)) {
                self.free.push(at);
                callers.push(call.caller);
            }
        }
        callers
    }
}

/// The slot of an id, and its use.
fn split(id: u64) -> (usize, u64) {
    let mask = (1 << SLOT_BITS) - 1;
    ((id & mask) as usize, id >> SLOT_BITS)
}
