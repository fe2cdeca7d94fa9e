//! Requests and replies in their shortest form, in which every node of ours writes them: read and
//! written without the library, which takes longer to set up than all the rest of a small request.
//!
//! What [`request`] and [`reply`] do not take is not wrong, only for the library to read.

use super::{MAX_PAYLOAD, MAX_SERVICE};

const UNSIGNED: u8 = 0 << 5;
const BYTES: u8 = 2 << 5;
const TEXT: u8 = 3 << 5;

/// A map of three, and its first key.
const REQUEST: &[u8] = b"\xa3\x62id";
const SERVICE: &[u8] = b"\x67service";
const PAYLOAD: &[u8] = b"\x67payload";

/// A map of two, and its first key.
const REPLY: &[u8] = b"\xa2\x62id";
const OK: &[u8] = b"\x62ok";

/// The bytes of a message beyond its texts and payload, at most.
const OVERHEAD: usize = 48;

pub(super) fn append_request(id: u64, service: &str, payload: &[u8], out: &mut Vec<u8>) {
    out.reserve(OVERHEAD + service.len() + payload.len());
    out.extend_from_slice(REQUEST);
    append_head(UNSIGNED, id, out);
    out.extend_from_slice(SERVICE);
    append_string(TEXT, service.as_bytes(), out);
    out.extend_from_slice(PAYLOAD);
    append_string(BYTES, payload, out);
}

pub(super) fn append_reply(id: u64, payload: &[u8], out: &mut Vec<u8>) {
    out.reserve(OVERHEAD + payload.len());
    out.extend_from_slice(REPLY);
    append_head(UNSIGNED, id, out);
    out.extend_from_slice(OK);
    append_string(BYTES, payload, out);
}

/// The id, the service and the payload of a request within the bounds, if it has this form.
pub(super) fn request(frame: &[u8]) -> Option<(u64, &str, &[u8])> {
    let mut rest = Rest(frame);
    rest.skip(REQUEST)?;
    let id = rest.number(UNSIGNED)?;
    rest.skip(SERVICE)?;
    let service = str::from_utf8(rest.string(TEXT, MAX_SERVICE)?).ok()?;
    rest.skip(PAYLOAD)?;
    let payload = rest.string(BYTES, MAX_PAYLOAD)?;
    rest.0.is_empty().then_some((id, service, payload))
}

/// The id and the payload of a reply that is no error, within the bounds, if it has this form.
pub(super) fn reply(frame: &[u8]) -> Option<(u64, &[u8])> {
    let mut rest = Rest(frame);
    rest.skip(REPLY)?;
    let id = rest.number(UNSIGNED)?;
    rest.skip(OK)?;
    let payload = rest.string(BYTES, MAX_PAYLOAD)?;
    rest.0.is_empty().then_some((id, payload))
}

/// A major type and its number, in the fewest bytes.
fn append_head(major: u8, number: u64, out: &mut Vec<u8>) {
    let bytes = number.to_be_bytes();
    match number {
        0..24 => out.push(major | bytes[7]),
        24..0x100 => out.extend_from_slice(&[major | 24, bytes[7]]),
        0x100..0x1_0000 => out.extend_from_slice(&[major | 25, bytes[6], bytes[7]]),
        0x1_0000..0x1_0000_0000 => {
            out.push(major | 26);
            out.extend_from_slice(&bytes[4..]);
        }
        _ => {
            out.push(major | 27);
            out.extend_from_slice(&bytes);
        }
    }
}

fn append_string(major: u8, string: &[u8], out: &mut Vec<u8>) {
    append_head(major, string.len() as u64, out);
    out.extend_from_slice(string);
}

/// What has not been read.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn skip(&mut self, bytes: &[u8]) -> Option<()> {
        self.0 = self.0.strip_prefix(bytes)?;
        Some(())
    }

    /// The number of a major type.
    fn number(&mut self, major: u8) -> Option<u64> {
        let (first, rest) = self.0.split_first()?;
        let len = match first.checked_sub(major)? {
            small @ 0..24 => {
                self.0 = rest;
                return Some(small.into());
            }
            24 => 1,
            25 => 2,
            26 => 4,
            27 => 8,
            _ => return None,
        };
        let (number, rest) = rest.split_at_checked(len)?;
        self.0 = rest;
        let mut bytes = [0; 8];
        bytes[8 - len..].copy_from_slice(number);
        Some(u64::from_be_bytes(bytes))
    }

    fn string(&mut self, major: u8, max: usize) -> Option<&'a [u8]> {
        let len = usize::try_from(self.number(major)?).ok()?;
        let (string, rest) = self.0.split_at_checked(len).filter(|_| len <= max)?;
        self.0 = rest;
        Some(string)
    }
}
