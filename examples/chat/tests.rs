//! Runs the tests beside the code of `chat`. An example that is a test itself is built as nothing else.
#![allow(
    dead_code,
    reason = "only what has tests, and what that uses, is part of it"
)]

#[path = "../common/mod.rs"]
mod common;
#[cfg(unix)]
mod editor;
mod history;
mod lines;
mod prompt;
mod question;
