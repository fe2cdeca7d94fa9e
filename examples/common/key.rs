//! The key that a program runs by.

use std::fs::File;
use std::path::Path;

use grapevine::Identity;

use super::Failure;

/// A node's key. While it lives, no other program on this machine runs by the same file: two nodes
/// with one id push each other's names out of the grapes.
#[derive(Debug)]
pub(crate) struct Key {
    pub(crate) identity: Identity,
    /// Locked as long as it is open. The system unlocks it when the program ends, however it does.
    _claimed: Option<File>,
}

impl Key {
    /// The key in a file, which is made when missing, or a fresh one that nobody keeps.
    pub(crate) fn load(path: Option<&Path>) -> Result<Self, Failure> {
        let Some(path) = path else {
            return Ok(Self {
                identity: Identity::generate(),
                _claimed: None,
            });
        };
        let identity = Identity::load_or_generate(path)?;
        let _claimed = claim(path)?;
        Ok(Self { identity, _claimed })
    }
}

/// Fails only if another program has claimed the file. Where files cannot be locked, as on some
/// network file systems, a program runs without.
#[cfg(unix)]
fn claim(path: &Path) -> Result<Option<File>, Failure> {
    use rustix::fs::{FlockOperation, flock};
    use rustix::io::Errno;

    // To read is enough, and a key may be read-only.
    let Ok(file) = File::open(path) else {
        return Ok(None);
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(Errno::WOULDBLOCK) => {
            let path = path.display();
            let line = format!(
                "--identity: {path} is used by another running program: stop that one, or give each \
                 a file of its own"
            );
            Err(Failure::new(super::USAGE, line))
        }
        Err(_) => Ok(None),
    }
}

/// On Windows nobody could even read a locked file.
#[cfg(not(unix))]
fn claim(_: &Path) -> Result<Option<File>, Failure> {
    Ok(None)
}
