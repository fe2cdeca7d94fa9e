//! Values of Grenache's users: puts them to the closest grapes and gets them from there, by
//! Kademlia's own messages.

use std::collections::HashMap;

use libp2p::kad::{self, GetRecordOk, QueryId, QueryResult, Quorum, Record, RecordKey};
use tokio::sync::oneshot;

use super::discovery::Kademlia;
use crate::proto::bep44::Target;

/// The different values that one query collects: as many as grapes are asked.
const MAX_FOUND: usize = 20;

/// Puts and gets that are under way.
#[derive(Debug, Default)]
pub(crate) struct Values {
    putting: HashMap<QueryId, oneshot::Sender<bool>>,
    getting: HashMap<QueryId, Getting>,
}

#[derive(Debug)]
struct Getting {
    found: Vec<Vec<u8>>,
    done: oneshot::Sender<Vec<Vec<u8>>>,
}

impl Values {
    /// Keeps a value and sends it to the closest grapes; answers whether this grape keeps it, once
    /// the others have it.
    pub(crate) fn put(
        &mut self,
        kad: &mut Kademlia,
        target: Target,
        value: Vec<u8>,
        done: oneshot::Sender<bool>,
    ) {
        let record = Record::new(RecordKey::new(&target), value);
        match kad.put_record(record, Quorum::One) {
            Ok(id) => {
                self.putting.insert(id, done);
            }
            Err(_) => {
                // Who asked may be gone.
                let _ = done.send(false);
            }
        }
    }

    /// Asks the closest grapes for a value; answers with all different ones, of which any may be
    /// forged.
    pub(crate) fn get(
        &mut self,
        kad: &mut Kademlia,
        target: Target,
        done: oneshot::Sender<Vec<Vec<u8>>>,
    ) {
        let id = kad.get_record(RecordKey::new(&target));
        let found = Vec::new();
        self.getting.insert(id, Getting { found, done });
    }

    /// Handles what Kademlia tells; gives back what is not about values.
    pub(crate) fn on_event(&mut self, event: kad::Event) -> Option<kad::Event> {
        let kad::Event::OutboundQueryProgressed {
            id, result, step, ..
        } = &event
        else {
            return Some(event);
        };
        match result {
            QueryResult::PutRecord(_) => {
                if let Some(done) = self.putting.remove(id) {
                    // This grape keeps it, and no other may be there. Who asked may be gone.
                    let _ = done.send(true);
                }
            }
            QueryResult::GetRecord(result) => {
                if let (Ok(GetRecordOk::FoundRecord(found)), Some(getting)) =
                    (result, self.getting.get_mut(id))
                {
                    getting.add(&found.record.value);
                }
                if step.last
                    && let Some(getting) = self.getting.remove(id)
                {
                    // As above.
                    let _ = getting.done.send(getting.found);
                }
            }
            _ => return Some(event),
        }
        None
    }
}

impl Getting {
    fn add(&mut self, value: &Vec<u8>) {
        if self.found.len() < MAX_FOUND && !self.found.contains(value) {
            self.found.push(value.clone());
        }
    }
}
