//! The values that grapes keep for Grenache's users: those that are what they claim to be, for two
//! hours each.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use super::{Nanos, Prefix, nanos};
use crate::proto::bep44::{Refusal, Target, Value};

/// The values, of at most 1.2 KB each: 12 MB.
const MAX_VALUES: usize = 10_000;

/// How long a value is kept, as BEP 44 has it. Whoever wants it longer puts it again every hour.
const VALUE_LEASE: Duration = Duration::from_secs(2 * 3_600);

/// Expired values that one sweep drops.
const EXPIRED_PER_SWEEP: usize = 1_024;

/// Why a value is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotKept {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("too many values are kept")]
    Full,
}

/// A value that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) bytes: Vec<u8>,
    /// There may be a newer version of it elsewhere.
    pub(crate) is_mutable: bool,
}

#[derive(Debug)]
pub(crate) struct Values {
    epoch: Instant,
    values: HashMap<Target, Stored>,
    by_expiry: BTreeSet<(Nanos, Target)>,
    by_prefix: HashMap<Prefix, usize>,
}

#[derive(Debug)]
struct Stored {
    bytes: Box<[u8]>,
    /// Of a mutable one.
    sequence: Option<i64>,
    /// Where it came from first.
    prefix: Prefix,
    expires: Nanos,
}

impl Values {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            epoch: now,
            values: HashMap::new(),
            by_expiry: BTreeSet::new(),
            by_prefix: HashMap::new(),
        }
    }

    /// Keeps a value from a host of that prefix, or keeps it longer.
    pub(crate) fn insert(
        &mut self,
        value: &Value,
        prefix: Prefix,
        now: Instant,
    ) -> Result<(), NotKept> {
        self.sweep(now);
        let expires = nanos(now.saturating_duration_since(self.epoch) + VALUE_LEASE);
        let (target, bytes) = (value.target(), value.encode());
        let sequence = value.as_mutable().map(|mutable| mutable.sequence);
        if let Some(stored) = self.values.get_mut(&target) {
            if *stored.bytes != *bytes {
                if sequence <= stored.sequence {
                    return Err(Refusal::Stale.into());
                }
                stored.bytes = bytes.into();
                stored.sequence = sequence;
            }
            self.by_expiry.remove(&(stored.expires, target));
            stored.expires = expires;
        } else {
            self.take_place(prefix)?;
            let stored = Stored {
                bytes: bytes.into(),
                sequence,
                prefix,
                expires,
            };
            self.values.insert(target, stored);
        }
        self.by_expiry.insert((expires, target));
        Ok(())
    }

    /// The value that is kept for a target.
    pub(crate) fn get(&self, target: &[u8], now: Instant) -> Option<Kept> {
        let now = nanos(now.saturating_duration_since(self.epoch));
        let target = <&Target>::try_from(target).ok()?;
        let stored = self.values.get(target)?;
        (stored.expires > now).then(|| Kept {
            bytes: stored.bytes.to_vec(),
            is_mutable: stored.sequence.is_some(),
        })
    }

    /// How many values are held.
    pub(crate) fn len(&self) -> usize {
        self.values.len()
    }

    /// Drops values whose time is over, a thousand at most; the rest stays invisible.
    pub(crate) fn sweep(&mut self, now: Instant) {
        let now = nanos(now.saturating_duration_since(self.epoch));
        for _ in 0..EXPIRED_PER_SWEEP {
            match self.by_expiry.first() {
                Some(&(expires, target)) if expires <= now => {
                    self.by_expiry.pop_first();
                    if let Some(stored) = self.values.remove(&target) {
                        self.give_back(stored.prefix);
                    }
                }
                _ => return,
            }
        }
    }

    /// Counts one more value of a prefix. In a table that is half full there is room only for those
    /// that hold less than a fair share.
    fn take_place(&mut self, prefix: Prefix) -> Result<(), NotKept> {
        let prefixes = self.by_prefix.len().max(1);
        let held = self.by_prefix.get(&prefix).copied().unwrap_or(0);
        let is_crowded = self.values.len() >= MAX_VALUES / 2;
        if self.values.len() >= MAX_VALUES || is_crowded && held >= MAX_VALUES / (2 * prefixes) {
            return Err(NotKept::Full);
        }
        *self.by_prefix.entry(prefix).or_default() += 1;
        Ok(())
    }

    fn give_back(&mut self, prefix: Prefix) {
        if let Some(held) = self.by_prefix.get_mut(&prefix) {
            *held -= 1;
            if *held == 0 {
                self.by_prefix.remove(&prefix);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use libp2p::identity::ed25519;

    use super::*;
    use crate::proto::bencode::Bencode;

    fn network(n: u16) -> Prefix {
        let [a, b] = n.to_be_bytes();
        IpAddr::from([10, a, b, 1]).into()
    }

    fn text(text: &str) -> Value {
        Value::immutable(Bencode::Bytes(text.into())).unwrap()
    }

    fn signed(text: &str, sequence: i64) -> Value {
        let key = ed25519::SecretKey::try_from_bytes([7; 32]).unwrap();
        let key = ed25519::Keypair::from(key);
        let message = format!("3:seqi{sequence}e1:v{}:{text}", text.len());
        let mutable = crate::proto::bep44::Mutable {
            key: key.public().to_bytes(),
            signature: key.sign(message.as_bytes()).try_into().unwrap(),
            sequence,
            salt: Vec::new(),
        };
        Value::mutable(Bencode::Bytes(text.into()), mutable).unwrap()
    }

    #[test]
    fn a_value_is_kept_for_two_hours_from_when_it_was_put_last() {
        let start = Instant::now();
        let mut values = Values::new(start);
        let value = text("hello");
        values.insert(&value, network(1), start).unwrap();
        let later = start + VALUE_LEASE / 2;
        values.insert(&value, network(2), later).unwrap();
        let end = later + VALUE_LEASE;
        let before = end - Duration::from_nanos(1);
        let bytes = value.encode();
        let kept = values.get(&value.target(), before).unwrap();
        assert_eq!((kept.bytes, kept.is_mutable), (bytes, false));
        assert_eq!(values.get(&value.target(), end), None, "before the sweep");
        values.sweep(end);
        assert!(values.by_expiry.is_empty() && values.by_prefix.is_empty());
    }

    #[test]
    fn a_mutable_value_is_replaced_by_a_newer_one_only() {
        let now = Instant::now();
        let mut values = Values::new(now);
        let mut put = |value: &Value| values.insert(value, network(1), now);
        assert_eq!(put(&signed("first", 1)), Ok(()));
        assert_eq!(put(&signed("first", 1)), Ok(()), "the same again");
        assert_eq!(put(&signed("other", 1)), Err(Refusal::Stale.into()));
        assert_eq!(put(&signed("second", 5)), Ok(()));
        assert_eq!(put(&signed("third", 4)), Err(Refusal::Stale.into()));
        let kept = values.get(&signed("first", 1).target(), now).unwrap();
        assert_eq!(kept.bytes, signed("second", 5).encode());
        assert!(kept.is_mutable);
    }

    #[test]
    fn one_network_that_fills_the_table_leaves_room_for_others() {
        let now = Instant::now();
        let mut values = Values::new(now);
        let mut put = |n: usize, of| values.insert(&text(&n.to_string()), network(of), now);
        let flood = (0..MAX_VALUES).filter(|n| put(*n, 1).is_ok()).count();
        assert_eq!(flood, MAX_VALUES / 2);
        let others = (0..100).filter(|n| put(MAX_VALUES + n, 2).is_ok()).count();
        assert_eq!(others, 100);
        let many = (0..2 * MAX_VALUES).filter(|n| put(2 * MAX_VALUES + n, 3 + *n as u16).is_ok());
        let many = many.count();
        assert!(values.values.len() <= MAX_VALUES, "{many}");
        assert_eq!(values.by_expiry.len(), values.values.len());
    }
}
