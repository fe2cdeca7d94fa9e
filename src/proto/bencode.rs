//! Bencode, the encoding that BEP 3 gives to integers, byte strings, lists and dictionaries.
//!
//! Invariant: one value has one encoding, and [`decode`](Bencode::decode) takes nothing else (no
//! leading zero, no `-0`, keys in ascending order, each once, nothing after the value). So the hash
//! or the signature of what was read is that of what was sent.

use std::collections::BTreeMap;

/// The deepest nesting that is read. JSON is read no deeper, so that what came in by one can go on
/// by the other; and it bounds the recursion.
const MAX_DEPTH: usize = 128;

/// One value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Bencode {
    Integer(i64),
    Bytes(Vec<u8>),
    List(Vec<Bencode>),
    Dictionary(BTreeMap<Vec<u8>, Bencode>),
}

/// Bytes that are not the encoding of one value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not bencoded: {0}")]
pub(crate) struct NotBencoded(&'static str);

impl Bencode {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.append(&mut out);
        out
    }

    /// Writes the encoding behind what is in `out`.
    pub(crate) fn append(&self, out: &mut Vec<u8>) {
        match self {
            Self::Integer(number) => out.extend_from_slice(format!("i{number}e").as_bytes()),
            Self::Bytes(bytes) => append_bytes(bytes, out),
            Self::List(items) => {
                out.push(b'l');
                for item in items {
                    item.append(out);
                }
                out.push(b'e');
            }
            Self::Dictionary(entries) => {
                out.push(b'd');
                for (key, value) in entries {
                    append_bytes(key, out);
                    value.append(out);
                }
                out.push(b'e');
            }
        }
    }

    /// Reads one value and nothing after it.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, NotBencoded> {
        let mut reader = Reader { rest: bytes };
        let value = reader.value(0)?;
        match reader.rest {
            [] => Ok(value),
            _ => Err(NotBencoded("bytes are left after the value")),
        }
    }
}

fn append_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(format!("{}:", bytes.len()).as_bytes());
    out.extend_from_slice(bytes);
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl Reader<'_> {
    fn value(&mut self, depth: usize) -> Result<Bencode, NotBencoded> {
        if depth > MAX_DEPTH {
            return Err(NotBencoded("nested too deeply"));
        }
        match self.rest.first() {
            Some(b'i') => {
                self.skip();
                self.number(b'e').map(Bencode::Integer)
            }
            Some(b'l') => {
                self.skip();
                let mut items = Vec::new();
                while !self.ends() {
                    items.push(self.value(depth + 1)?);
                }
                Ok(Bencode::List(items))
            }
            Some(b'd') => {
                self.skip();
                let mut entries = BTreeMap::new();
                while !self.ends() {
                    let key = self.bytes()?;
                    if entries
                        .last_key_value()
                        .is_some_and(|(last, _)| *last >= key)
                    {
                        return Err(NotBencoded("keys are not in order"));
                    }
                    entries.insert(key, self.value(depth + 1)?);
                }
                Ok(Bencode::Dictionary(entries))
            }
            Some(b'0'..=b'9') => self.bytes().map(Bencode::Bytes),
            _ => Err(NotBencoded("no value begins here")),
        }
    }

    fn bytes(&mut self) -> Result<Vec<u8>, NotBencoded> {
        let len = usize::try_from(self.number(b':')?);
        let split = len.ok().and_then(|len| self.rest.split_at_checked(len));
        let (bytes, rest) = split.ok_or(NotBencoded("a string is cut short"))?;
        self.rest = rest;
        Ok(bytes.to_vec())
    }

    /// The digits up to `end`, which must be as they would be written.
    fn number(&mut self, end: u8) -> Result<i64, NotBencoded> {
        const MALFORMED: NotBencoded = NotBencoded("a malformed number");
        let len = self.rest.iter().position(|byte| *byte == end);
        let (digits, rest) = self.rest.split_at(len.ok_or(MALFORMED)?);
        let digits = str::from_utf8(digits).map_err(|_| MALFORMED)?;
        let number: i64 = digits.parse().map_err(|_| MALFORMED)?;
        let is_canonical = matches!(
            digits.as_bytes(),
            [b'0'] | [b'1'..=b'9', ..] | [b'-', b'1'..=b'9', ..]
        );
        if !is_canonical {
            return Err(MALFORMED);
        }
        self.rest = &rest[1..];
        Ok(number)
    }

    /// Whether a list or a dictionary ends here; passes over its end.
    fn ends(&mut self) -> bool {
        let ends = self.rest.first() == Some(&b'e');
        if ends {
            self.skip();
        }
        ends
    }

    fn skip(&mut self) {
        self.rest = &self.rest[1..];
    }
}

impl From<&str> for Bencode {
    fn from(text: &str) -> Self {
        Self::Bytes(text.into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_value() -> impl Strategy<Value = Bencode> {
        let leaf = prop_oneof![
            any::<i64>().prop_map(Bencode::Integer),
            prop::collection::vec(any::<u8>(), 0..20).prop_map(Bencode::Bytes),
        ];
        leaf.prop_recursive(4, 32, 6, |inner| {
            let key = prop::collection::vec(any::<u8>(), 0..6);
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Bencode::List),
                prop::collection::btree_map(key, inner, 0..6).prop_map(Bencode::Dictionary),
            ]
        })
    }

    #[test]
    fn values_are_written_as_bep_3_says() {
        let entries = [
            ("spam", Bencode::from("eggs")),
            ("cow", Bencode::from("moo")),
        ];
        let entries = entries.map(|(key, value)| (key.into(), value));
        for (value, encoding) in [
            (Bencode::from("spam"), "4:spam"),
            (Bencode::from(""), "0:"),
            (Bencode::Integer(3), "i3e"),
            (Bencode::Integer(-3), "i-3e"),
            (Bencode::Integer(0), "i0e"),
            (
                Bencode::List(vec!["spam".into(), Bencode::Integer(1)]),
                "l4:spami1ee",
            ),
            (Bencode::List(Vec::new()), "le"),
            (
                Bencode::Dictionary(entries.into()),
                "d3:cow3:moo4:spam4:eggse",
            ),
        ] {
            assert_eq!(value.encode(), encoding.as_bytes());
            assert_eq!(Bencode::decode(encoding.as_bytes()), Ok(value));
        }
    }

    #[test]
    fn what_is_not_the_one_encoding_is_refused() {
        for bytes in [
            "",
            "e",
            "x",
            "i",
            "ie",
            "i-e",
            "i-0e",
            "i01e",
            "i+1e",
            "i 1e",
            "i1",
            "i9223372036854775808e",
            "5:spam",
            "04:spam",
            "-1:a",
            "1",
            ":",
            "4spam",
            "99999999999999999999:a",
            "l",
            "li1e",
            "d",
            "d1:a",
            "d1:ae",
            "di1ei2ee",
            "d1:bi1e1:ai2ee",
            "d1:ai1e1:ai2ee",
            "i1ei2e",
            "lee",
        ] {
            assert!(Bencode::decode(bytes.as_bytes()).is_err(), "{bytes}");
        }
    }

    #[test]
    fn nesting_is_bounded() {
        let nested = |depth: usize| ["l".repeat(depth), "e".repeat(depth)].concat();
        assert!(Bencode::decode(nested(MAX_DEPTH + 1).as_bytes()).is_ok());
        assert!(Bencode::decode(nested(MAX_DEPTH + 2).as_bytes()).is_err());
        assert!(Bencode::decode("l".repeat(1_000_000).as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn a_value_is_read_back(value in any_value()) {
            prop_assert_eq!(Bencode::decode(&value.encode()), Ok(value));
        }

        #[test]
        fn what_is_read_has_that_encoding(bytes in "[-0-9:deil ]{0,12}") {
            if let Ok(value) = Bencode::decode(bytes.as_bytes()) {
                prop_assert_eq!(value.encode(), bytes.as_bytes());
            }
        }
    }
}
