//! The values that BEP 44 puts into a DHT: immutable ones, found by their own hash, and mutable ones,
//! found by the key that signs them.
//!
//! Invariant: a [`Value`] is within its limits, and the signature of a mutable one is its key's over
//! this content, sequence number and salt. Who stores a value must compare its [`target`](Value::target)
//! with the one that it is to be stored under, and a mutable one with what is there
//! ([`supersedes`](Value::supersedes)).

use std::collections::BTreeMap;

use libp2p::identity::ed25519;
use sha1::{Digest, Sha1};

use super::bencode::{Bencode, NotBencoded};

/// A value's content must have fewer bytes than this: those of a byte string, those of the encoding
/// of anything else. This is how Grenache counts strings, of which 999 bytes so fit as they always did.
pub(crate) const MAX_CONTENT: usize = 1_000;

/// The longest salt, in bytes.
pub(crate) const MAX_SALT: usize = 64;

/// The longest [`Value::encode`]: a string of 999 bytes and its length, key, signature, number, salt,
/// and 35 bytes for the names and lengths of the fields.
pub(crate) const MAX_ENCODED: usize = 4 + 999 + 32 + 64 + 20 + MAX_SALT + 35;

/// Where a value is stored and found.
pub(crate) type Target = [u8; 20];

/// A value that is what it claims to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Value {
    content: Bencode,
    mutable: Option<Mutable>,
}

/// What a mutable value has beyond its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mutable {
    pub(crate) key: [u8; 32],
    pub(crate) signature: [u8; 64],
    /// A value with a higher number replaces this one.
    pub(crate) sequence: i64,
    /// Lets one key have several values; empty is none.
    pub(crate) salt: Vec<u8>,
}

/// Why a value is not stored, with the number that BEP 44 gives to the reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("205 message (v field) too big")]
    TooLarge,
    #[error("206 invalid signature")]
    InvalidSignature,
    #[error("207 salt (salt field) too big")]
    SaltTooLong,
    #[error("301 CAS mismatch, re-read and try again")]
    CasMismatch,
    #[error("302 sequence number less than current")]
    Stale,
}

/// Why bytes are not an encoded value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DecodeError {
    #[error(transparent)]
    NotBencoded(#[from] NotBencoded),
    #[error("not a dictionary with the fields of a value")]
    NotAValue,
    #[error(transparent)]
    Refused(#[from] Refusal),
}

impl Value {
    pub(crate) fn immutable(content: Bencode) -> Result<Self, Refusal> {
        check_content(&content)?;
        Ok(Self {
            content,
            mutable: None,
        })
    }

    /// Verifies the signature, which takes some 50 µs.
    pub(crate) fn mutable(content: Bencode, mutable: Mutable) -> Result<Self, Refusal> {
        check_content(&content)?;
        if mutable.salt.len() > MAX_SALT {
            return Err(Refusal::SaltTooLong);
        }
        let signed = signed_bytes(&content, &mutable);
        let key = ed25519::PublicKey::try_from_bytes(&mutable.key);
        if !key.is_ok_and(|key| key.verify(&signed, &mutable.signature)) {
            return Err(Refusal::InvalidSignature);
        }
        Ok(Self {
            content,
            mutable: Some(mutable),
        })
    }

    pub(crate) fn content(&self) -> &Bencode {
        &self.content
    }

    /// The signed part; `None` of an immutable value.
    pub(crate) fn as_mutable(&self) -> Option<&Mutable> {
        self.mutable.as_ref()
    }

    /// SHA-1 of the encoded content, or of the key and the salt.
    pub(crate) fn target(&self) -> Target {
        let hash = match &self.mutable {
            None => Sha1::digest(self.content.encode()),
            Some(mutable) => Sha1::new()
                .chain_update(mutable.key)
                .chain_update(&mutable.salt)
                .finalize(),
        };
        hash.into()
    }

    /// Whether this value may replace `old`, which has the same target. `cas` is the number that the
    /// writer expects the old one to have.
    ///
    /// An immutable value never differs from the one that it would replace. A mutable one with the
    /// same number is refused, even the same value again: whoever wants to store that for longer
    /// compares the two first.
    pub(crate) fn supersedes(&self, old: &Self, cas: Option<i64>) -> Result<(), Refusal> {
        let (Some(new), Some(old)) = (&self.mutable, &old.mutable) else {
            return Ok(());
        };
        if cas.is_some_and(|expected| expected != old.sequence) {
            return Err(Refusal::CasMismatch);
        }
        if new.sequence <= old.sequence {
            return Err(Refusal::Stale);
        }
        Ok(())
    }

    /// The bytes to store and to pass on, at most [`MAX_ENCODED`]: a bencoded dictionary with the
    /// fields that a BEP 44 put message has.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut fields = BTreeMap::from([(b"v".to_vec(), self.content.clone())]);
        if let Some(mutable) = &self.mutable {
            fields.insert(b"k".to_vec(), Bencode::Bytes(mutable.key.to_vec()));
            fields.insert(b"seq".to_vec(), Bencode::Integer(mutable.sequence));
            fields.insert(b"sig".to_vec(), Bencode::Bytes(mutable.signature.to_vec()));
            if !mutable.salt.is_empty() {
                fields.insert(b"salt".to_vec(), Bencode::Bytes(mutable.salt.clone()));
            }
        }
        Bencode::Dictionary(fields).encode()
    }

    /// Reads and verifies what [`encode`](Self::encode) gave.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        if bytes.len() > MAX_ENCODED {
            return Err(Refusal::TooLarge.into());
        }
        let Bencode::Dictionary(mut fields) = Bencode::decode(bytes)? else {
            return Err(DecodeError::NotAValue);
        };
        let content = fields.remove(&b"v"[..]).ok_or(DecodeError::NotAValue)?;
        if fields.is_empty() {
            return Ok(Self::immutable(content)?);
        }
        let mutable = take_mutable(fields).ok_or(DecodeError::NotAValue)?;
        Ok(Self::mutable(content, mutable)?)
    }
}

/// What the key signs: the fields as they stand in a bencoded dictionary, without its ends.
fn signed_bytes(content: &Bencode, mutable: &Mutable) -> Vec<u8> {
    let mut signed = Vec::with_capacity(MAX_ENCODED);
    if !mutable.salt.is_empty() {
        signed.extend_from_slice(b"4:salt");
        Bencode::Bytes(mutable.salt.clone()).append(&mut signed);
    }
    signed.extend_from_slice(b"3:seq");
    Bencode::Integer(mutable.sequence).append(&mut signed);
    signed.extend_from_slice(b"1:v");
    content.append(&mut signed);
    signed
}

fn check_content(content: &Bencode) -> Result<(), Refusal> {
    let len = match content {
        Bencode::Bytes(bytes) => bytes.len(),
        other => other.encode().len(),
    };
    match len < MAX_CONTENT {
        true => Ok(()),
        false => Err(Refusal::TooLarge),
    }
}

/// The fields beside the content; `None` if one is missing, of another kind, or one too many.
fn take_mutable(mut fields: BTreeMap<Vec<u8>, Bencode>) -> Option<Mutable> {
    let Bencode::Integer(sequence) = fields.remove(&b"seq"[..])? else {
        return None;
    };
    let mutable = Mutable {
        key: take_bytes(&mut fields, b"k")?.try_into().ok()?,
        signature: take_bytes(&mut fields, b"sig")?.try_into().ok()?,
        sequence,
        salt: match fields.contains_key(&b"salt"[..]) {
            // Written for none it would be a second encoding of the same value.
            true => Some(take_bytes(&mut fields, b"salt")?).filter(|salt| !salt.is_empty())?,
            false => Vec::new(),
        },
    };
    fields.is_empty().then_some(mutable)
}

fn take_bytes(fields: &mut BTreeMap<Vec<u8>, Bencode>, name: &[u8]) -> Option<Vec<u8>> {
    match fields.remove(name) {
        Some(Bencode::Bytes(bytes)) => Some(bytes),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEY: &str = "8a88e3dd7409f195fd52db2d3cba5d72ca6709bf1d94121bf3748801b40f6f5c";

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn unhex<const N: usize>(digits: &str) -> [u8; N] {
        let byte = |at: usize| u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).unwrap();
        assert_eq!(digits.len(), 2 * N);
        std::array::from_fn(byte)
    }

    fn captured(v: &str, sequence: i64, salt: &str, signature: &str) -> Result<Value, Refusal> {
        let mutable = Mutable {
            key: unhex(KEY),
            signature: unhex(signature),
            sequence,
            salt: salt.into(),
        };
        Value::mutable(v.into(), mutable)
    }

    fn signed(key: &ed25519::Keypair, content: Bencode, sequence: i64, salt: &[u8]) -> Value {
        let mut mutable = Mutable {
            key: key.public().to_bytes(),
            signature: [0; 64],
            sequence,
            salt: salt.to_vec(),
        };
        let signature = key.sign(&signed_bytes(&content, &mutable));
        mutable.signature = signature.try_into().unwrap();
        Value::mutable(content, mutable).unwrap()
    }

    #[test]
    fn immutable_values_are_found_where_grenache_finds_them() {
        let entry = |key: &str, value| (key.into(), value);
        let dictionary = [entry("b", Bencode::Integer(1)), entry("a", "x".into())];
        for (content, target) in [
            (
                Bencode::from("hello world"),
                "6d33adc2b6b2c14c3036feefb7fedbca1a880527",
            ),
            (
                Bencode::from(""),
                "b44b82a4bc6c35f6ad5e9fceefef9509c17fba74",
            ),
            (
                Bencode::from("hééllo"),
                "f60b6a9f482eb1cf3940c214d9708b7b917ac1d8",
            ),
            (
                Bencode::from(&*"a".repeat(999)),
                "a1ef0f1ac1d1462a8b0f169ed61f145a3b9723d4",
            ),
            (
                Bencode::Integer(5),
                "fd512d5838b7f0c9fa46debf0d0f0d0d28ea81a1",
            ),
            (
                Bencode::Integer(-5),
                "0cdfe65b1c998a633384e0eaba6bf7b76bb3f57d",
            ),
            (
                Bencode::List(Vec::new()),
                "593b743b207e10ff55ec63e71a46c07909d0880a",
            ),
            (
                Bencode::Dictionary(dictionary.into()),
                "ff1fc5948c6876cde2c2a60a32628dce1909350d",
            ),
        ] {
            let value = Value::immutable(content).unwrap();
            assert_eq!(hex(&value.target()), target);
        }
    }

    #[test]
    fn mutable_values_are_verified_and_found_as_captured() {
        for (v, sequence, salt, signature, target) in [
            (
                "first",
                1,
                "",
                "5e2c3fc427f6f13f717b2ebab39ffb7a25bd03c7c79921e6320d63352853a6983c49e6ecedfbaaf83dd21972be0eaeb6842b689ff4a67f1a32a225367dc93701",
                "9ad19e0f16eef714cb90c6f195dbce66e94580f9",
            ),
            (
                "second",
                2,
                "salty",
                "dce5d8f44665043b688ceae43d9a863020a63f1c373026f31a9bcf637767fd284a4c3d44adea1fe595927057fd3da5c852581354e0daa3681aa7eb1eddcff708",
                "e5c995f0bf95d6413d8567f828cdaa2b2ba7cf2c",
            ),
            (
                "casok",
                5,
                "",
                "9208d45faf940ac830a9979b050915f2a30768eec35b7d53a9bc01ca220d58193e91757d723c1a20c6d7a553ec73766f644980957a43d1ccb892db083d1ce303",
                "9ad19e0f16eef714cb90c6f195dbce66e94580f9",
            ),
        ] {
            let value = captured(v, sequence, salt, signature).unwrap();
            assert_eq!(hex(&value.target()), target);
            assert_eq!(Value::decode(&value.encode()), Ok(value));
        }
    }

    #[test]
    fn a_signature_is_for_one_content_number_salt_and_key() {
        let signature = "5e2c3fc427f6f13f717b2ebab39ffb7a25bd03c7c79921e6320d63352853a6983c49e6ecedfbaaf83dd21972be0eaeb6842b689ff4a67f1a32a225367dc93701";
        let zeros = "0".repeat(128);
        for (v, sequence, salt, signature) in [
            ("forged", 1, "", signature),
            ("first", 2, "", signature),
            ("first", 1, "salty", signature),
            ("first", 1, "", &zeros),
        ] {
            let refused = captured(v, sequence, salt, signature);
            assert_eq!(
                refused,
                Err(Refusal::InvalidSignature),
                "{v} {sequence} {salt}"
            );
        }
        let other_key = Mutable {
            key: [0xff; 32],
            signature: unhex(signature),
            sequence: 1,
            salt: Vec::new(),
        };
        let refused = Value::mutable("first".into(), other_key);
        assert_eq!(refused, Err(Refusal::InvalidSignature));
    }

    #[test]
    fn sizes_are_bounded() {
        let text = |len: usize| Bencode::from(&*"a".repeat(len));
        assert!(Value::immutable(text(999)).is_ok());
        assert_eq!(Value::immutable(text(1_000)), Err(Refusal::TooLarge));
        // 1,004 bytes of string, but the rule for all else is the length of its encoding.
        let list = |len: usize| Bencode::List(vec![text(len)]);
        assert!(Value::immutable(list(993)).is_ok());
        assert_eq!(Value::immutable(list(994)), Err(Refusal::TooLarge));

        let key = ed25519::Keypair::generate();
        let largest = signed(&key, text(999), i64::MIN, &[b's'; MAX_SALT]);
        assert_eq!(largest.encode().len(), MAX_ENCODED);
        let mut too_salty = largest.as_mutable().unwrap().clone();
        too_salty.salt.push(b's');
        assert_eq!(
            Value::mutable(text(1), too_salty),
            Err(Refusal::SaltTooLong)
        );
    }

    #[test]
    fn only_a_higher_number_supersedes_and_only_the_expected_one() {
        let key = ed25519::Keypair::generate();
        let old = signed(&key, "old".into(), 5, b"");
        for (sequence, cas, verdict) in [
            (6, None, Ok(())),
            (6, Some(5), Ok(())),
            (5, None, Err(Refusal::Stale)),
            (4, None, Err(Refusal::Stale)),
            (4, Some(5), Err(Refusal::Stale)),
            (6, Some(4), Err(Refusal::CasMismatch)),
            (4, Some(4), Err(Refusal::CasMismatch)),
        ] {
            let new = signed(&key, "new".into(), sequence, b"");
            assert_eq!(new.supersedes(&old, cas), verdict, "{sequence} {cas:?}");
        }
        let immutable = Value::immutable("v".into()).unwrap();
        assert_eq!(immutable.supersedes(&immutable, None), Ok(()));
    }

    #[test]
    fn what_is_stored_is_checked_when_it_is_read() {
        let key = ed25519::Keypair::generate();
        let good = signed(&key, "v".into(), 1, b"s").encode();
        let cut = |from: &[u8], what: &str, with: &str| {
            let text = String::from_utf8_lossy(from);
            assert!(text.contains(what), "{what}");
            let at = from
                .windows(what.len())
                .position(|part| part == what.as_bytes())
                .unwrap();
            [&from[..at], with.as_bytes(), &from[at + what.len()..]].concat()
        };
        for bytes in [
            b"1:v".to_vec(),
            b"de".to_vec(),
            b"d1:k1:a1:v1:ve".to_vec(),
            b"d1:v1:v1:wi1ee".to_vec(),
            cut(&good, "3:seqi1e", ""),
            cut(&good, "3:seqi1e", "3:seqi2e"),
            cut(&good, "3:seqi1e", "3:seq1:1"),
            cut(&good, "4:salt1:s", ""),
            cut(&good, "4:salt1:s", "4:salt0:"),
            cut(&good, "4:salt1:s", "4:salti1e"),
            cut(&good, "1:v1:v", "1:v1:w"),
            cut(&good, "1:v1:v", "1:v1:v1:wi1e"),
            [&good[..], b"e"].concat(),
            vec![b'd'; MAX_ENCODED + 1],
        ] {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            assert!(Value::decode(&bytes).is_err(), "{text}");
        }
        assert!(Value::decode(&good).is_ok());
    }

    proptest! {
        #[test]
        fn a_mutable_value_is_read_back(
            v in prop::collection::vec(any::<u8>(), 0..MAX_CONTENT),
            sequence in any::<i64>(),
            salt in prop::collection::vec(any::<u8>(), 0..=MAX_SALT),
        ) {
            let key = ed25519::Keypair::generate();
            let value = signed(&key, Bencode::Bytes(v), sequence, &salt);
            let bytes = value.encode();
            prop_assert!(bytes.len() <= MAX_ENCODED);
            prop_assert_eq!(Value::decode(&bytes), Ok(value));
        }

        #[test]
        fn decoding_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Value::decode(&bytes);
        }
    }
}
