//! The messages of Grenache's RPC, the same over WebSocket and HTTP: `[rid, service, payload]`, and
//! `[rid, error, result]` for an answer. `rid` is the caller's own; it comes back as it was.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::proto::wire::MAX_PAYLOAD;

/// The longest message, in bytes: the longest payload, half of whose characters JSON escapes.
pub(super) const MAX_MESSAGE: usize = 2 * MAX_PAYLOAD;

/// What is said of a message that is longer.
pub(super) fn too_long() -> String {
    format!("ERR_REQUEST_SIZE: a request through this grape has at most {MAX_MESSAGE} bytes")
}

/// A call, as its caller sent it.
pub(super) struct Question<'a> {
    /// JSON of any kind.
    pub(super) rid: &'a str,
    pub(super) service: Cow<'a, str>,
    /// `None` is as good as `null`.
    pub(super) payload: Option<&'a RawValue>,
}

/// What a worker answered: a result, or an error for people.
pub(super) type Answer = Result<Box<RawValue>, String>;

/// Not a message of this RPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// What tells the calls to one worker apart: random, because a worker may keep a table of the calls
/// of all its callers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Rid(u128);

impl<'a> Question<'a> {
    /// Reads a message. Where HTTP streams the payload, `rid` and service stand in a header instead.
    pub(super) fn parse(message: &'a str, header: Option<&'a str>) -> Result<Self, Malformed> {
        let items = items(message)?;
        let names = match header {
            Some(header) => self::items(header)?,
            None => items.clone(),
        };
        let (Some(rid), Some(service)) = (names.first(), names.get(1)) else {
            return Err(Malformed);
        };
        Ok(Self {
            rid: rid.get(),
            service: text(service).ok_or(Malformed)?,
            payload: items.get(2).copied(),
        })
    }
}

/// Writes a call.
pub(super) fn question(rid: Rid, service: &str, payload: &str) -> Result<String, Malformed> {
    let service = serde_json::to_string(service).map_err(|_| Malformed)?;
    Ok(format!("[\"{rid}\",{service},{payload}]"))
}

/// Writes the answer to a call: `result` is JSON.
pub(super) fn answer(rid: &str, outcome: Result<String, String>) -> String {
    match outcome {
        Ok(result) => format!("[{rid},null,{result}]"),
        Err(error) => {
            let error = serde_json::to_string(&error).unwrap_or_default();
            format!("[{rid},{error},null]")
        }
    }
}

/// Reads the answer to a call, and which call it answers; `None` is none of ours.
pub(super) fn read_answer(message: &str) -> Result<(Option<Rid>, Answer), Malformed> {
    let items = items(message)?;
    let rid = items.first().ok_or(Malformed)?;
    let rid = text(rid).and_then(|rid| Rid::parse(&rid));
    let error = items.get(1).and_then(|error| error_text(error));
    let null = || RawValue::NULL.to_owned();
    let result = items
        .get(2)
        .map_or_else(null, |result| (*result).to_owned());
    Ok((rid, error.map_or(Ok(result), Err)))
}

/// Whose message it is that begins like this; `None` if that does not stand there.
pub(super) fn rid_in(beginning: &[u8]) -> Option<&str> {
    let items = beginning.trim_ascii_start().strip_prefix(b"[")?;
    let mut items = serde_json::Deserializer::from_slice(items).into_iter::<&RawValue>();
    Some(items.next()?.ok()?.get())
}

/// The same of an answer to a call of ours.
pub(super) fn own_rid_in(beginning: &[u8]) -> Option<Rid> {
    let rid = RawValue::from_string(rid_in(beginning)?.to_owned()).ok()?;
    Rid::parse(&text(&rid)?)
}

/// `None` where JavaScript sees no error.
fn error_text(error: &RawValue) -> Option<String> {
    match error.get() {
        "null" | "false" | "0" | "\"\"" => None,
        other => Some(text(error).map_or_else(|| other.into(), Cow::into_owned)),
    }
}

fn items(message: &str) -> Result<Vec<&RawValue>, Malformed> {
    serde_json::from_str(message).map_err(|_| Malformed)
}

/// The text of a JSON string.
pub(super) fn text(json: &RawValue) -> Option<Cow<'_, str>> {
    #[derive(Deserialize)]
    struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

    let text: Option<Text<'_>> = serde_json::from_str(json.get()).ok();
    text.map(|Text(text)| text)
}

impl Rid {
    pub(super) fn random() -> Self {
        Self(rand::random())
    }

    fn parse(text: &str) -> Option<Self> {
        u128::from_str_radix(text, 16).ok().map(Self)
    }
}

impl fmt::Display for Rid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_read() {
        for (message, header, expected) in [
            (
                r#"["r","s",{"a":1}]"#,
                None,
                Some((r#""r""#, "s", Some(r#"{"a":1}"#))),
            ),
            (r#"[7,"s",null]"#, None, Some(("7", "s", Some("null")))),
            (r#"["r","\u0073"]"#, None, Some((r#""r""#, "s", None))),
            (r#"["r","s",1,2]"#, None, Some((r#""r""#, "s", Some("1")))),
            (
                r#"["UUID","x",1]"#,
                Some(r#"["r","s"]"#),
                Some((r#""r""#, "s", Some("1"))),
            ),
            (r#"["r","s",1]"#, Some(r#"["r"]"#), None),
            (r#"["r","s",1]"#, Some("r"), None),
            (r#"["r",5,1]"#, None, None),
            (r#"["r"]"#, None, None),
            ("[]", None, None),
            (r#"{"rid":1}"#, None, None),
            ("", None, None),
            (r#"["r","s",1"#, None, None),
        ] {
            let read = Question::parse(message, header).ok();
            let read = read.as_ref().map(|question| {
                let payload = question.payload.map(RawValue::get);
                (question.rid, &*question.service, payload)
            });
            assert_eq!(read, expected, "{message} {header:?}");
        }
    }

    #[test]
    fn whose_a_message_is_stands_in_its_beginning() {
        for (beginning, rid) in [
            (&br#"["r","s",{"a"#[..], Some(r#""r""#)),
            (b" [ 7 , \"s\",\xff", Some("7")),
            (br#"["a \"b\"","s"#, Some(r#""a \"b\"""#)),
            (br#"["r"#, None),
            (b"\"r\",", None),
            (b"[", None),
            (b"", None),
        ] {
            assert_eq!(rid_in(beginning), rid);
        }
        let rid = Rid::random();
        let beginning = format!("[\"{rid}\",null,\"xxx");
        assert_eq!(own_rid_in(beginning.as_bytes()), Some(rid));
        assert_eq!(own_rid_in(br#"["r",null,"xxx"#), None);
    }

    #[test]
    fn answers_are_written() {
        assert_eq!(answer("\"r\"", Ok("{}".into())), r#"["r",null,{}]"#);
        assert_eq!(answer("7", Err("a \"b\"".into())), r#"[7,"a \"b\"",null]"#);
    }

    #[test]
    fn answers_are_read() {
        let rid = Rid::random();
        for (rest, expected) in [
            (r#"null,{"a":1}"#, Ok(r#"{"a":1}"#)),
            ("null,null", Ok("null")),
            ("null", Ok("null")),
            (r#""","x""#, Ok(r#""x""#)),
            (
                r#""something went wrong",null"#,
                Err("something went wrong"),
            ),
            (r#""e","data""#, Err("e")),
            (r#"{"code":1},null"#, Err(r#"{"code":1}"#)),
        ] {
            let (answered, answer) = read_answer(&format!("[\"{rid}\",{rest}]")).unwrap();
            assert_eq!(answered, Some(rid));
            let answer = answer.as_ref().map(|result| result.get());
            assert_eq!(answer.map_err(|error| &**error), expected, "{rest}");
        }
        for foreign in [
            r#"["r",null,1]"#,
            "[7,null,1]",
            "[null,\"ERR_HEADER_PARSE_GR\",null]",
        ] {
            assert!(matches!(read_answer(foreign), Ok((None, _))), "{foreign}");
        }
        for malformed in ["", "{}", "[]", "5", "Upgrade Required"] {
            assert!(read_answer(malformed).is_err(), "{malformed}");
        }
    }
}
