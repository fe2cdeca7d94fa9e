//! What the bytes that a terminal sends mean: a state machine, which takes them one at a time and
//! wants no clock. A lone Escape is the first half of Alt with the next key, as in Emacs.

use grapevine::proto::wire::MAX_PAYLOAD;

/// How a terminal begins what is pasted, and ends it.
const PASTE_BEGINS: &[u8] = b"200";
const PASTE_ENDS: &[u8] = b"\x1b[201~";

/// Longer than any key's sequence.
const MAX_SEQUENCE: usize = 32;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Key {
    Char(char),
    /// With the letter, lower case, or sign.
    Ctrl(char),
    Alt(char),
    Enter,
    Tab,
    Backspace,
    AltBackspace,
    Delete,
    Left,
    Right,
    WordLeft,
    WordRight,
    Up,
    Down,
    Home,
    End,
    /// As much of it as a message may have; lines end in `\n`.
    Paste(String),
}

/// Between two bytes.
#[derive(Debug, Default)]
pub(super) enum Keys {
    #[default]
    Ground,
    /// So much of a character.
    Utf8(Vec<u8>),
    Escape,
    /// What followed `ESC [`.
    Control(Vec<u8>),
    /// `ESC O`
    Shift,
    /// `ESC [ [`, as the console of Linux sends its function keys.
    Function,
    Paste(Vec<u8>),
}

impl Keys {
    /// Takes the next byte. Returns the key that ends with it.
    pub(super) fn take(&mut self, byte: u8) -> Option<Key> {
        match std::mem::take(self) {
            Self::Ground => self.first(byte),
            Self::Utf8(begun) => self.character(begun, byte),
            Self::Escape => self.escaped(byte),
            Self::Control(sequence) => self.control(sequence, byte),
            // The keypad has an Enter of its own.
            Self::Shift if byte == b'M' => Some(Key::Enter),
            Self::Shift => cursor_key(byte),
            Self::Function => None,
            Self::Paste(pasted) => self.paste(pasted, byte),
        }
    }

    /// Whether a key has begun and not ended.
    #[cfg(test)]
    fn is_amid(&self) -> bool {
        !matches!(self, Self::Ground)
    }

    fn first(&mut self, byte: u8) -> Option<Key> {
        match byte {
            0x1b => {
                *self = Self::Escape;
                None
            }
            // Enter, and what it is while the terminal translates it.
            b'\r' | b'\n' => Some(Key::Enter),
            b'\t' => Some(Key::Tab),
            0x7f | 0x08 => Some(Key::Backspace),
            0x01..=0x1a => Some(Key::Ctrl((byte - 1 + b'a').into())),
            0 | 0x1c..=0x1f => Some(Key::Ctrl((byte + b'@').into())),
            0x20..=0x7e => Some(Key::Char(byte.into())),
            _ => self.character(Vec::new(), byte),
        }
    }

    fn character(&mut self, mut begun: Vec<u8>, byte: u8) -> Option<Key> {
        let continues = byte & 0xc0 == 0x80;
        if continues == begun.is_empty() {
            // What was begun is no character. What follows may be one.
            return if begun.is_empty() {
                None
            } else {
                self.first(byte)
            };
        }
        begun.push(byte);
        match std::str::from_utf8(&begun) {
            Ok(text) => text.chars().next().map(Key::Char),
            Err(error) if error.error_len().is_none() => {
                *self = Self::Utf8(begun);
                None
            }
            Err(_) => None,
        }
    }

    fn escaped(&mut self, byte: u8) -> Option<Key> {
        match byte {
            b'[' => *self = Self::Control(Vec::new()),
            b'O' => *self = Self::Shift,
            0x1b => *self = Self::Escape,
            _ => {
                return match self.first(byte)? {
                    Key::Char(c) => Some(Key::Alt(c)),
                    Key::Backspace => Some(Key::AltBackspace),
                    key => Some(key),
                };
            }
        }
        None
    }

    fn control(&mut self, mut sequence: Vec<u8>, byte: u8) -> Option<Key> {
        match byte {
            b'[' if sequence.is_empty() => *self = Self::Function,
            b'~' if sequence == PASTE_BEGINS => *self = Self::Paste(Vec::new()),
            0x40..=0x7e => return control_key(&sequence, byte),
            // A key that interrupts a sequence is a key.
            0x00..=0x1f => return self.first(byte),
            _ => {
                if sequence.len() < MAX_SEQUENCE {
                    sequence.push(byte);
                }
                *self = Self::Control(sequence);
            }
        }
        None
    }

    fn paste(&mut self, mut pasted: Vec<u8>, byte: u8) -> Option<Key> {
        pasted.push(byte);
        if let Some(text) = pasted.strip_suffix(PASTE_ENDS) {
            let text = &text[..text.len().min(MAX_PAYLOAD)];
            let text = String::from_utf8_lossy(text);
            return Some(Key::Paste(text.replace("\r\n", "\n").replace('\r', "\n")));
        }
        if pasted.len() > MAX_PAYLOAD + 2 * PASTE_ENDS.len() {
            // The end of it is still to be seen, and what is before that is not wanted.
            let end = pasted.len() - PASTE_ENDS.len();
            pasted.drain(MAX_PAYLOAD..end);
        }
        *self = Self::Paste(pasted);
        None
    }
}

fn control_key(sequence: &[u8], end: u8) -> Option<Key> {
    let mut parts = sequence.split(|byte| *byte == b';');
    let number = parts.next().unwrap_or_default();
    // Its bits are Shift, Alt and Ctrl, above 1.
    let modifier = parts.next().and_then(|text| std::str::from_utf8(text).ok());
    let modifier = modifier.and_then(|text| text.parse::<u8>().ok());
    let is_word = modifier.is_some_and(|bits| bits.saturating_sub(1) & 0b110 != 0);
    match (end, number) {
        (b'C', _) if is_word => Some(Key::WordRight),
        (b'D', _) if is_word => Some(Key::WordLeft),
        (b'~', b"1" | b"7") => Some(Key::Home),
        (b'~', b"4" | b"8") => Some(Key::End),
        (b'~', b"3") => Some(Key::Delete),
        (b'~', _) => None,
        _ => cursor_key(end),
    }
}

fn cursor_key(byte: u8) -> Option<Key> {
    match byte {
        b'A' => Some(Key::Up),
        b'B' => Some(Key::Down),
        b'C' => Some(Key::Right),
        b'D' => Some(Key::Left),
        b'F' => Some(Key::End),
        b'H' => Some(Key::Home),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn keys(bytes: &[u8]) -> Vec<Key> {
        let mut keys = Keys::default();
        bytes.iter().filter_map(|byte| keys.take(*byte)).collect()
    }

    #[test]
    fn bytes_of_a_terminal_are_the_keys_that_were_pressed() {
        let table: &[(&[u8], &[Key])] = &[
            (b"aZ ", &[Key::Char('a'), Key::Char('Z'), Key::Char(' ')]),
            (
                "é€😀".as_bytes(),
                &[Key::Char('é'), Key::Char('€'), Key::Char('😀')],
            ),
            (b"\r\n\t", &[Key::Enter, Key::Enter, Key::Tab]),
            (b"\x7f\x08", &[Key::Backspace, Key::Backspace]),
            (
                b"\x01\x1a\x1f\0",
                &[
                    Key::Ctrl('a'),
                    Key::Ctrl('z'),
                    Key::Ctrl('_'),
                    Key::Ctrl('@'),
                ],
            ),
            (b"\x1bb\x1b\x7f", &[Key::Alt('b'), Key::AltBackspace]),
            (
                b"\x1b[A\x1bOB\x1b[C\x1b[D",
                &[Key::Up, Key::Down, Key::Right, Key::Left],
            ),
            (
                b"\x1b[H\x1bOF\x1b[1~\x1b[4~\x1b[3~",
                &[Key::Home, Key::End, Key::Home, Key::End, Key::Delete],
            ),
            (
                b"\x1b[1;5C\x1b[1;3D\x1b[1;2C",
                &[Key::WordRight, Key::WordLeft, Key::Right],
            ),
            (
                b"\x1b[[Aa\x1b[15~b\x1b[<0;1;1Mc\x1bOM",
                &[Key::Char('a'), Key::Char('b'), Key::Char('c'), Key::Enter],
            ),
            // Not UTF-8, and what follows it.
            (b"\xff\xc3a\x80\xe2\x82b", &[Key::Char('a'), Key::Char('b')]),
            (
                b"\x1b[200~one\r\ntwo\x1b[A\x1b[201~x",
                &[Key::Paste("one\ntwo\x1b[A".into()), Key::Char('x')],
            ),
            // A sequence that is not finished does not take what is pressed next.
            (b"\x1b[12\x03x", &[Key::Ctrl('c'), Key::Char('x')]),
        ];
        for (bytes, expected) in table {
            assert_eq!(
                keys(bytes),
                *expected,
                "{:?}",
                bytes.escape_ascii().to_string()
            );
        }
    }

    #[test]
    fn a_paste_is_kept_up_to_the_length_of_a_message_and_its_end_is_seen() {
        let mut bytes = b"\x1b[200~".to_vec();
        bytes.resize(MAX_PAYLOAD + 1_000, b'x');
        bytes.extend(b"\x1b[201~y");
        let keys = keys(&bytes);
        let [Key::Paste(pasted), Key::Char('y')] = &keys[..] else {
            panic!("{} keys", keys.len());
        };
        assert!(pasted.len() <= MAX_PAYLOAD && pasted.bytes().all(|byte| byte == b'x'));
    }

    proptest! {
        #[test]
        fn text_is_taken_as_it_is_typed(text in "[^\\p{Cc}]{0,40}") {
            let typed: Vec<_> = text.chars().map(Key::Char).collect();
            prop_assert_eq!(keys(text.as_bytes()), typed);
        }

        #[test]
        fn no_bytes_keep_lines_from_being_taken(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let mut keys = Keys::default();
            for byte in bytes {
                keys.take(byte);
            }
            // The longest way back to the ground.
            for byte in *b"\x1b[201~\r" {
                keys.take(byte);
            }
            prop_assert!(!keys.is_amid());
            prop_assert_eq!(keys.take(b'\r'), Some(Key::Enter));
        }
    }
}
