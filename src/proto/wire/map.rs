//! Reading maps strictly, one key at a time, into drafts.

use std::{borrow::Cow, fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor},
};

use super::{DecodeError, malformed};

/// A map that is being read. Its fields are `Option`s until all keys have been seen.
pub(super) trait Draft<'de>: Default {
    /// What the map is, for messages: "a request".
    const WHAT: &'static str;

    /// Takes the value of `key` out of `values`.
    fn take<A: MapAccess<'de>>(&mut self, key: &str, values: &mut A) -> Result<(), A::Error>;
}

/// Sets a field of a draft from the value of its key, once.
pub(super) fn set<'de, T, A>(
    field: &mut Option<T>,
    key: &'static str,
    values: &mut A,
) -> Result<(), A::Error>
where
    T: Deserialize<'de>,
    A: MapAccess<'de>,
{
    if field.is_some() {
        return Err(de::Error::duplicate_field(key));
    }
    *field = Some(values.next_value()?);
    Ok(())
}

pub(super) fn require<T>(field: Option<T>, key: &str, what: &str) -> Result<T, DecodeError> {
    field.ok_or_else(|| malformed(format!("{what} without \"{key}\"")))
}

pub(super) fn unknown_key<E: de::Error>(key: &str, what: &str) -> E {
    let key: String = key.chars().take(32).collect();
    E::custom(format_args!("{what} has no key {key:?}"))
}

/// Reads a map into a draft that outlives a failure.
pub(super) struct Fill<'a, D>(pub(super) &'a mut D);

impl<'de, D: Draft<'de>> DeserializeSeed<'de> for Fill<'_, D> {
    type Value = ();

    fn deserialize<T: Deserializer<'de>>(self, deserializer: T) -> Result<(), T::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, D: Draft<'de>> Visitor<'de> for Fill<'_, D> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, a map", D::WHAT)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(Text(key)) = map.next_key()? {
            self.0.take(&key, &mut map)?;
        }
        Ok(())
    }
}

/// A map within a map.
pub(super) struct Nested<D>(pub(super) D);

impl<'de, D: Draft<'de>> Deserialize<'de> for Nested<D> {
    fn deserialize<T: Deserializer<'de>>(deserializer: T) -> Result<Self, T::Error> {
        let mut draft = D::default();
        Fill(&mut draft).deserialize(deserializer)?;
        Ok(Self(draft))
    }
}

/// Text and nothing else, borrowed from the frame where it is in one piece there.
pub(super) struct Text<'de>(pub(super) Cow<'de, str>);

/// A byte string and nothing else, borrowed as [`Text`] is.
pub(super) struct Bytes<'de>(pub(super) Cow<'de, [u8]>);

/// A list of at most so many. One more is read, so that who sends it is told how many are allowed.
pub(super) struct List<T, const MAX: usize>(pub(super) Vec<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for List<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(Only::<Self>(PhantomData))
    }
}

impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Only<List<T, MAX>> {
    type Value = List<T, MAX>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {MAX}")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            if list.len() > MAX {
                return Err(de::Error::custom(format_args!("a list of more than {MAX}")));
            }
            list.push(item);
        }
        Ok(List(list))
    }
}

/// Text, or null or undefined for none.
pub(super) struct MaybeText<'de>(pub(super) Option<Cow<'de, str>>);

impl<'de> Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(Only::<Text<'_>>(PhantomData))
    }
}

impl<'de> Deserialize<'de> for Bytes<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_bytes(Only::<Bytes<'_>>(PhantomData))
    }
}

impl<'de> Deserialize<'de> for MaybeText<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Only::<MaybeText<'_>>(PhantomData))
    }
}

/// Visits one `T` and refuses all else.
struct Only<T>(PhantomData<T>);

impl<'de> Visitor<'de> for Only<Text<'de>> {
    type Value = Text<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text")
    }

    fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Text(Cow::Borrowed(text)))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Text(Cow::Owned(text.to_owned())))
    }
}

impl<'de> Visitor<'de> for Only<Bytes<'de>> {
    type Value = Bytes<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("bytes")
    }

    fn visit_borrowed_bytes<E: de::Error>(self, bytes: &'de [u8]) -> Result<Self::Value, E> {
        Ok(Bytes(Cow::Borrowed(bytes)))
    }

    fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Self::Value, E> {
        Ok(Bytes(Cow::Owned(bytes.to_owned())))
    }
}

impl<'de> Visitor<'de> for Only<MaybeText<'de>> {
    type Value = MaybeText<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text or null")
    }

    fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(MaybeText(Some(Cow::Borrowed(text))))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(MaybeText(Some(Cow::Owned(text.to_owned()))))
    }

    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(MaybeText(None))
    }
}
