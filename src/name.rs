//! The name of a service or a person: what is announced, looked up and called.
//!
//! Invariants of every [`ServiceName`]: 1 to 255 bytes of UTF-8 in Unicode's normal form C; no control,
//! white-space, format or default-ignorable (zero-width) character; not in the reserved space `grapevine/`.
//! So two names that look the same because of an invisible or a differently composed character are the
//! same name or no name. Look-alikes of different scripts (Latin and Cyrillic `a`) are left to pinning.

use std::{borrow::Borrow, fmt, str::FromStr, sync::Arc};

use sha2::{Digest, Sha256};
use unicode_normalization::{UnicodeNormalization, is_nfc};

use crate::text::is_hidden;

/// The longest name: what one byte of length can say, and the limit of stock rendezvous servers.
const MAX_LEN: usize = 255;

/// The space of names that the protocol keeps for itself, such as `grapevine/serves`.
const RESERVED: &str = "grapevine/";

/// The multihash prefix: function sha2-256 (0x12), 32 bytes of digest (0x20).
pub(crate) const SHA2_256: [u8; 2] = [0x12, 0x20];

/// A key of Kademlia's: a sha2-256 multihash.
pub type Key = [u8; 34];

/// A valid name. Cheap to clone.
///
/// ```
/// use grapevine::name::ServiceName;
///
/// let name: ServiceName = "client1".parse()?;
/// assert_eq!(name.as_ref(), "client1");
/// assert!("two words".parse::<ServiceName>().is_err());
/// # Ok::<(), grapevine::name::NameError>(())
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName(Arc<str>);

impl ServiceName {
    /// Accepts a name as it came from another node, which must have normalised it already: silently
    /// repairing it would make two spellings of one name answer on different keys.
    ///
    /// # Errors
    /// [`NameError`] says what is wrong with it.
    pub fn from_wire(name: &str) -> Result<Self, NameError> {
        // The length first: nothing else is worth doing for a megabyte.
        check_len(name)?;
        check_characters(name)?;
        if !is_nfc(name) {
            return Err(NameError::NotNormalised);
        }
        check_reserved(name)?;
        Ok(Self(name.into()))
    }

    /// The text, without a copy.
    pub(crate) fn shared(&self) -> &Arc<str> {
        &self.0
    }

    /// The key under which Kademlia stores the name's providers: the sha2-256 multihash of its bytes.
    pub fn key(&self) -> Key {
        key(&self.digest())
    }

    /// The key without its prefix.
    pub(crate) fn digest(&self) -> [u8; 32] {
        digest(&self.0)
    }
}

/// The key of a name with that digest.
pub(crate) fn key(of: &[u8; 32]) -> Key {
    let mut key = [0; 34];
    let (prefix, digest) = key.split_at_mut(SHA2_256.len());
    prefix.copy_from_slice(&SHA2_256);
    digest.copy_from_slice(of);
    key
}

/// The sha2-256 digest of a name, which need not be one that this network accepts.
pub(crate) fn digest(name: &str) -> [u8; 32] {
    Sha256::digest(name.as_bytes()).into()
}

impl FromStr for ServiceName {
    type Err = NameError;

    /// Normalises what a person typed to form C, then checks it.
    fn from_str(name: &str) -> Result<Self, NameError> {
        // Composing never makes a forbidden character, so checking what was typed gives its own position.
        check_characters(name)?;
        let name: String = name.nfc().collect();
        check_len(&name)?;
        check_reserved(&name)?;
        Ok(Self(name.into()))
    }
}

impl TryFrom<&str> for ServiceName {
    type Error = NameError;

    fn try_from(name: &str) -> Result<Self, NameError> {
        name.parse()
    }
}

impl TryFrom<String> for ServiceName {
    type Error = NameError;

    fn try_from(name: String) -> Result<Self, NameError> {
        name.parse()
    }
}

/// Hashes and compares as its text does.
impl Borrow<str> for ServiceName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl AsRef<str> for ServiceName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServiceName({:?})", &*self.0)
    }
}

/// Why a text is not a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// There is nothing in it.
    #[error("the name is empty: give at least one character")]
    Empty,
    /// It has more bytes of UTF-8 in normal form C than fit.
    #[error("the name is too long: {len} bytes of UTF-8, and at most {max} fit: shorten it")]
    TooLong {
        /// Bytes it has.
        len: usize,
        /// Bytes it may have.
        max: usize,
    },
    /// It has a space, a tab or other white space.
    #[error("the name has white space at byte {position}: make it one word, such as team-chat")]
    WhiteSpace {
        /// Where the first begins, in bytes from the start of the text as it was given.
        position: usize,
    },
    /// It has a control, format or zero-width character.
    #[error(
        "the name has a character that cannot be seen, U+{:04X} at byte {position}: leave it out",
        u32::from(*.character)
    )]
    Forbidden {
        /// The first such character.
        character: char,
        /// Where it begins, in bytes from the start of the text as it was given.
        position: usize,
    },
    /// It is in the space that the protocol keeps for itself.
    #[error("names that begin with \"grapevine/\" are reserved for the protocol: choose another")]
    Reserved,
    /// It came from another node in another normal form.
    #[error("the name is not in Unicode normal form C: normalise it before it is sent")]
    NotNormalised,
}

fn check_len(name: &str) -> Result<(), NameError> {
    match name.len() {
        0 => Err(NameError::Empty),
        1..=MAX_LEN => Ok(()),
        len => Err(NameError::TooLong { len, max: MAX_LEN }),
    }
}

fn check_characters(name: &str) -> Result<(), NameError> {
    let forbidden = |c: char| c.is_control() || c.is_whitespace() || is_hidden(c);
    match name.char_indices().find(|&(_, c)| forbidden(c)) {
        Some((position, character)) if character.is_whitespace() => {
            Err(NameError::WhiteSpace { position })
        }
        Some((position, character)) => Err(NameError::Forbidden {
            character,
            position,
        }),
        None => Ok(()),
    }
}

fn check_reserved(name: &str) -> Result<(), NameError> {
    if name.starts_with(RESERVED) {
        return Err(NameError::Reserved);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(name: &str) -> Result<ServiceName, NameError> {
        name.parse()
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The digests are those of `printf client1 | sha256sum` and `printf café | sha256sum`.
    #[test]
    fn a_key_is_the_sha2_256_multihash_of_the_name() {
        for (name, key) in [
            (
                "client1",
                "12201917e33407c28366c8e3b975b17e7374589312676b90229adb4ce6e58552e223",
            ),
            (
                "cafe\u{301}",
                "1220850f7dc43910ff890f8879c0ed26fe697c93a067ad93a7d50f466a7028a9bf4e",
            ),
        ] {
            assert_eq!(parse(name).map(|name| hex(&name.key())), Ok(key.into()));
        }
    }

    #[test]
    fn two_spellings_of_a_name_are_one_name() {
        let composed = parse("caf\u{e9}").expect("a name");
        assert_eq!(parse("cafe\u{301}"), Ok(composed.clone()));
        assert_eq!(composed.to_string(), "caf\u{e9}");
        assert_eq!(format!("{composed:?}"), "ServiceName(\"café\")");
        assert_eq!(ServiceName::from_wire("caf\u{e9}"), Ok(composed));
        assert_eq!(
            ServiceName::from_wire("cafe\u{301}"),
            Err(NameError::NotNormalised)
        );
    }

    #[test]
    fn a_name_has_one_to_255_bytes() {
        assert_eq!(parse(""), Err(NameError::Empty));
        assert!(parse("a").is_ok());
        assert!(parse(&"a".repeat(255)).is_ok());
        let too_long = Err(NameError::TooLong { len: 256, max: 255 });
        assert_eq!(parse(&"é".repeat(128)), too_long);
        assert_eq!(ServiceName::from_wire(&"é".repeat(128)), too_long);
    }

    #[test]
    fn the_length_is_that_of_the_normalised_name() {
        // 300 bytes as typed, 200 composed.
        assert!(parse(&"e\u{301}".repeat(100)).is_ok());
        // U+0958 is excluded from composition: 3 bytes as typed, 6 normalised.
        let max = MAX_LEN;
        assert_eq!(
            parse(&"\u{958}".repeat(50)),
            Err(NameError::TooLong { len: 300, max })
        );
    }

    #[test]
    fn what_cannot_be_seen_is_refused_with_its_place() {
        for (name, character, position) in [
            ("\u{1b}[31m", '\u{1b}', 0),
            ("a\0b c", '\0', 1),
            ("ab\u{202e}c", '\u{202e}', 2),
            ("ab\u{200b}c", '\u{200b}', 2),
            ("ab\u{200d}c", '\u{200d}', 2),
            ("\u{feff}a", '\u{feff}', 0),
            ("a\u{ad}", '\u{ad}', 1),
            ("a\u{fe0f}", '\u{fe0f}', 1),
            ("a\u{e0041}", '\u{e0041}', 1),
        ] {
            let expected = Err(NameError::Forbidden {
                character,
                position,
            });
            assert_eq!(parse(name), expected);
            assert_eq!(ServiceName::from_wire(name), expected);
        }
    }

    #[test]
    fn white_space_is_refused_with_its_place() {
        for (name, position) in [
            ("two words", 3),
            ("é\n", 2),
            ("a\u{85}", 1),
            ("a\u{a0}b", 1),
            ("a\u{3000}b", 1),
            ("\u{2001}", 0),
        ] {
            let expected = Err(NameError::WhiteSpace { position });
            assert_eq!(parse(name), expected);
            assert_eq!(ServiceName::from_wire(name), expected);
        }
    }

    #[test]
    fn the_protocols_own_names_are_refused() {
        for name in ["grapevine/", "grapevine/serves", "grapevine/x"] {
            assert_eq!(parse(name), Err(NameError::Reserved));
            assert_eq!(ServiceName::from_wire(name), Err(NameError::Reserved));
        }
        for name in ["grapevine", "grapevines/x", "my/grapevine/", "a/b"] {
            assert!(parse(name).is_ok(), "{name}");
        }
    }

    #[test]
    fn messages_say_what_is_wrong_and_what_to_do() {
        let message = |name: &str| parse(name).map_err(|error| error.to_string());
        assert_eq!(
            message("a\u{200b}"),
            Err(
                "the name has a character that cannot be seen, U+200B at byte 1: leave it out"
                    .into()
            )
        );
        assert_eq!(
            message("two words"),
            Err("the name has white space at byte 3: make it one word, such as team-chat".into())
        );
        assert_eq!(
            message(&"x".repeat(256)),
            Err("the name is too long: 256 bytes of UTF-8, and at most 255 fit: shorten it".into())
        );
    }

    #[test]
    fn no_single_character_turns_into_a_forbidden_one() {
        for c in ('\0'..=char::MAX).filter(|c| check_characters(c.encode_utf8(&mut [0; 4])).is_ok())
        {
            let composed: String = c.nfc().collect();
            assert_eq!(check_characters(&composed), Ok(()), "{c:?}");
        }
    }

    proptest! {
        #[test]
        fn a_name_that_was_parsed_is_a_name_on_the_wire(text in any::<String>()) {
            if let Ok(name) = parse(&text) {
                prop_assert_eq!(ServiceName::from_wire(name.as_ref()), Ok(name.clone()));
                prop_assert_eq!(parse(name.as_ref()), Ok(name));
            }
        }

        #[test]
        fn visible_text_is_a_name(text in "[a-z0-9äöüß日本_./:@-]{1,40}") {
            prop_assume!(!text.starts_with(RESERVED));
            prop_assert_eq!(parse(&text).map(|name| name.to_string()), Ok(text));
        }
    }
}
