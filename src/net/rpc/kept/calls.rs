//! The requests that are open on one stream, each in a slot of its own.
//!
//! An id is the number of a slot and how often that was used, so that a reply finds its caller
//! without a search, and one to a request that was never made is told from one that comes late.
//!
//! A call that ends before its frame was taken to be written leaves the frame behind, and the frame
//! keeps the call's permit: what waits to be written is bounded by the permits, whoever goes away.

use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::limits::MAX_PIPELINED_TO_PEER;
use crate::net::rpc::Outcome;

/// The low bits of an id, which say which slot.
const SLOT_BITS: u32 = 10;

const _: () = assert!(MAX_PIPELINED_TO_PEER <= 1 << SLOT_BITS);

/// Who waits for an outcome.
pub(crate) type Caller = oneshot::Sender<Outcome>;

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
    /// The frames that their calls have left behind, and that are written next.
    left: usize,
    /// The permits to be given back.
    freed: usize,
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
    /// The turn that writes it; the last one there is, if that is not known yet.
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
        self.freed += std::mem::take(&mut self.left);
    }

    /// A request that is written later is being written in this turn; `false` if its call has ended,
    /// and the frame is dropped instead.
    pub(super) fn on_written(&mut self, id: u64) -> bool {
        let turn = self.turn;
        match self.call(id) {
            Some(call) => {
                call.turn = turn;
                true
            }
            None => {
                self.freed += 1;
                false
            }
        }
    }

    /// Ends the call that a reply is for. `None` if it has ended before.
    pub(super) fn answer(&mut self, id: u64) -> Result<Option<Caller>, NeverAsked> {
        let (at, uses) = split(id);
        let slot = self.slots.get(at).ok_or(NeverAsked)?;
        let is_known = uses > 0 && uses <= slot.uses;
        let call = slot.call.as_ref().filter(|_| slot.uses == uses);
        let waits_to_be_written = call.is_some_and(|call| call.turn >= self.turn);
        if !is_known || waits_to_be_written {
            return Err(NeverAsked);
        }
        Ok(self.end(id))
    }

    /// Ends a call. `None` if it has ended before.
    pub(super) fn end(&mut self, id: u64) -> Option<Caller> {
        let (at, uses) = split(id);
        let slot = self.slots.get_mut(at).filter(|slot| slot.uses == uses)?;
        let call = slot.call.take()?;
        Some(self.close(at, call))
    }

    /// Ends the calls that are due. Returns when the next one is due as well.
    pub(super) fn expire(&mut self, now: Instant) -> (Vec<Caller>, Option<Instant>) {
        let due = self.end_those(|call| call.deadline <= now);
        let open = self.slots.iter().filter_map(|slot| slot.call.as_ref());
        (due, open.map(|call| call.deadline).min())
    }

    /// Ends all calls, as the stream does that leaves so many frames untaken that are written later.
    /// Returns the callers of those that were not written, and of those that were.
    pub(super) fn end_all(&mut self, untaken: usize) -> (Vec<Caller>, Vec<Caller>) {
        let turn = self.turn;
        let unwritten = self.end_those(|call| call.turn >= turn);
        self.freed += untaken + std::mem::take(&mut self.left);
        (unwritten, self.end_those(|_| true))
    }

    /// How many are open.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// The permits to be given back since this was asked last.
    pub(super) fn freed(&mut self) -> usize {
        std::mem::take(&mut self.freed)
    }

    fn end_those(&mut self, which: impl Fn(&Call) -> bool) -> Vec<Caller> {
        let mut callers = Vec::new();
        for at in 0..self.slots.len() {
            if let Some(call) = self.slots[at].call.take_if(|call| which(call)) {
                callers.push(self.close(at, call));
            }
        }
        callers
    }

    fn close(&mut self, at: usize, call: Call) -> Caller {
        self.free.push(at);
        if call.turn < self.turn {
            self.freed += 1;
        } else if call.turn == self.turn {
            self.left += 1;
        }
        call.caller
    }

    fn call(&mut self, id: u64) -> Option<&mut Call> {
        let (at, uses) = split(id);
        let slot = self.slots.get_mut(at).filter(|slot| slot.uses == uses)?;
        slot.call.as_mut()
    }
}

/// The slot of an id, and its use.
fn split(id: u64) -> (usize, u64) {
    let mask = (1 << SLOT_BITS) - 1;
    ((id & mask) as usize, id >> SLOT_BITS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(calls: &mut Calls, written: Written) -> u64 {
        calls.enter(oneshot::channel().0, Instant::now(), written)
    }

    #[test]
    fn the_frame_of_a_call_that_ends_early_keeps_its_permit() {
        let mut calls = Calls::default();
        let [small, large, stays] = [Written::Next, Written::Later, Written::Next]
            .map(|written| enter(&mut calls, written));
        assert!(calls.end(small).is_some() && calls.end(large).is_some());
        assert_eq!((calls.len(), calls.freed()), (1, 0));
        calls.on_turn();
        assert_eq!(calls.freed(), 1, "the small frame was written");
        assert!(!calls.on_written(large));
        assert_eq!(calls.freed(), 1, "the large one was dropped");
        assert!(calls.end(stays).is_some());
        assert_eq!((calls.len(), calls.freed()), (0, 1));
    }

    #[test]
    fn a_reply_to_what_was_not_written_yet_is_made_up() {
        let mut calls = Calls::default();
        let small = enter(&mut calls, Written::Next);
        let large = enter(&mut calls, Written::Later);
        assert!(calls.answer(small).is_err() && calls.answer(large).is_err());
        calls.on_turn();
        assert!(matches!(calls.answer(small), Ok(Some(_))));
        assert!(matches!(calls.answer(small), Ok(None)), "again");
        assert!(calls.answer(large).is_err());
        assert!(calls.on_written(large));
        calls.on_turn();
        assert!(matches!(calls.answer(large), Ok(Some(_))));
        assert_eq!(calls.freed(), 2);
    }

    #[test]
    fn the_end_tells_what_was_written_from_what_was_not_and_frees_all() {
        let mut calls = Calls::default();
        enter(&mut calls, Written::Next);
        calls.on_turn();
        let ids = [Written::Next, Written::Later, Written::Later, Written::Next]
            .map(|written| enter(&mut calls, written));
        // A large and a small one are given up; both large frames wait.
        assert!(calls.end(ids[2]).is_some() && calls.end(ids[3]).is_some());
        let (unwritten, written) = calls.end_all(2);
        assert_eq!((unwritten.len(), written.len()), (2, 1));
        assert_eq!((calls.len(), calls.freed()), (0, 5));
    }
}
