//! Who a node is: an Ed25519 key pair, kept in a file between runs.
//!
//! The file holds libp2p's protobuf encoding of the private key and nothing else. Invariants: it appears
//! whole or not at all, only its owner may read it (mode 0600 on Unix), and an existing file is never
//! overwritten, so that of two processes that start at once both end with the same key.
//! Everything here blocks on the disk for a moment: call it before the node runs, not in its loop.

use std::{
    fmt,
    fs::{self, File},
    io::{self, ErrorKind, Read, Write},
    path::{Path, PathBuf},
};

use libp2p::{PeerId, identity::Keypair};

/// A key file has 68 bytes; anything much longer is some other file, and is not read into memory.
const MAX_FILE: u64 = 4096;

/// A node's key pair. Cheap enough to clone; `Debug` shows the peer id only.
///
/// ```
/// use grapevine::identity::Identity;
///
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("peer.key");
/// let first = Identity::load_or_generate(&path)?;
/// let again = Identity::load_or_generate(&path)?;
/// assert_eq!(first.peer_id(), again.peer_id());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Identity(Keypair);

impl Identity {
    /// A fresh identity from the system's randomness, kept nowhere.
    pub fn generate() -> Self {
        Self(Keypair::generate_ed25519())
    }

    /// Wraps a key pair that the caller keeps by other means.
    pub fn from_keypair(keypair: Keypair) -> Self {
        Self(keypair)
    }

    /// Reads the identity in `path`; where there is no such file, makes one with a fresh identity.
    ///
    /// The folder must exist. A new key is on the disk before this returns.
    ///
    /// # Errors
    /// As [`load`](Self::load), and [`IdentityError::Unwritable`] if no file can be made there.
    pub fn load_or_generate(path: impl AsRef<Path>) -> Result<Self, IdentityError> {
        let path = path.as_ref();
        match Self::load(path) {
            Err(IdentityError::Missing { .. }) => Self::create(path),
            outcome => outcome,
        }
    }

    /// Reads the identity in `path`.
    ///
    /// # Errors
    /// If the file cannot be read, is no key, or can be read by others than its owner; see
    /// [`IdentityError`].
    pub fn load(path: impl AsRef<Path>) -> Result<Self, IdentityError> {
        let path = path.as_ref();
        let (bytes, metadata) = read(path)?;
        let not_a_key = |reason: String| IdentityError::NotAKey {
            path: path.into(),
            reason,
        };
        if bytes.len() as u64 > MAX_FILE {
            return Err(not_a_key(format!("it is longer than {MAX_FILE} bytes")));
        }
        if bytes.is_empty() {
            return Err(not_a_key("it is empty".into()));
        }
        // libp2p's own words are about its cargo features.
        let keypair = Keypair::from_protobuf_encoding(&bytes)
            .map_err(|_| not_a_key("it holds no Ed25519 key in libp2p's encoding".into()))?;
        // Not before: who names some other file must not be told to change or delete that.
        refuse_if_shared(path, &metadata)?;
        Ok(Self(keypair))
    }

    /// The key pair, for libp2p.
    pub fn keypair(&self) -> &Keypair {
        &self.0
    }

    /// The public half's id: how other nodes know this one.
    pub fn peer_id(&self) -> PeerId {
        self.0.public().to_peer_id()
    }

    fn create(path: &Path) -> Result<Self, IdentityError> {
        let identity = Self::generate();
        let bytes = identity
            .0
            .to_protobuf_encoding()
            .map_err(|error| IdentityError::NotAKey {
                path: path.into(),
                reason: error.to_string(),
            })?;
        match write_new(path, &bytes) {
            Ok(()) => Ok(identity),
            // Another process was first: its key is the one.
            Err(ErrorKind::AlreadyExists) => Self::load(path),
            Err(kind) => Err(unwritable(path, kind)),
        }
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity").field(&self.peer_id()).finish()
    }
}

/// Why an identity could not be loaded or made. Each message is one line and says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// There is no such file.
    #[error("no key file at {}: check the path", path.display())]
    Missing {
        /// The file asked for.
        path: PathBuf,
    },
    /// The folder that should hold the file does not exist.
    #[error(
        "cannot keep a key at {}: the folder {} does not exist: create it first",
        path.display(),
        folder.display()
    )]
    NoFolder {
        /// The file asked for.
        path: PathBuf,
        /// The folder it would be in.
        folder: PathBuf,
    },
    /// The path is a folder, a pipe or a device.
    #[error("{} is not a file: give the path of a key file", path.display())]
    NotAFile {
        /// What was asked for.
        path: PathBuf,
    },
    /// The file is there and cannot be read.
    #[error("cannot read the key file {}: {kind}: check who owns it and its folder", path.display())]
    Unreadable {
        /// The file asked for.
        path: PathBuf,
        /// What the system said.
        kind: ErrorKind,
    },
    /// A new file cannot be made there.
    #[error("cannot write a key file in {}: {kind}: choose a folder you can write to", folder.display())]
    Unwritable {
        /// The folder it would be in.
        folder: PathBuf,
        /// What the system said.
        kind: ErrorKind,
    },
    /// Others than its owner may read the file, so its key may be known to them.
    #[error(
        "others can read the key file {path} (mode {mode:04o}): run `chmod 600 '{path}'`, \
         or delete it to get a new key if somebody may have read it",
        path = path.display()
    )]
    TooOpen {
        /// The file asked for.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file holds something else.
    #[error(
        "{} is not a key file ({reason}): restore it from a backup, or move it away to get a new key",
        path.display()
    )]
    NotAKey {
        /// The file asked for.
        path: PathBuf,
        /// What is wrong with its bytes.
        reason: String,
    },
}

/// The file's bytes, at most one more than [`MAX_FILE`], and what the system knows about it.
fn read(path: &Path) -> Result<(Vec<u8>, fs::Metadata), IdentityError> {
    let failed = |error: io::Error| unreadable(path, error.kind());
    // Before opening: to open a pipe waits for its writer.
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(IdentityError::NotAFile { path: path.into() });
    }
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    Ok((bytes, metadata))
}

#[cfg(unix)]
fn refuse_if_shared(path: &Path, metadata: &fs::Metadata) -> Result<(), IdentityError> {
    use std::os::unix::fs::PermissionsExt;

    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(IdentityError::TooOpen {
            path: path.into(),
            mode,
        });
    }
    Ok(())
}

/// Elsewhere a new file gets the rights of its folder, which a user's own folder keeps to the user.
#[cfg(not(unix))]
fn refuse_if_shared(_: &Path, _: &fs::Metadata) -> Result<(), IdentityError> {
    Ok(())
}

/// Makes `path` with `bytes`, whole and durable, or fails and leaves no trace.
fn write_new(path: &Path, bytes: &[u8]) -> Result<(), ErrorKind> {
    let folder = folder_of(path);
    // Temporary files are made with mode 0600.
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(|error| error.kind())?;
    let written = file
        .write_all(bytes)
        .and_then(|()| file.as_file().sync_all());
    written.map_err(|error| error.kind())?;
    file.persist_noclobber(path)
        .map_err(|error| error.error.kind())?;
    sync_folder(folder);
    Ok(())
}

/// The new file's entry in its folder should survive a power cut as well. Best effort: some network file
/// systems refuse it, and the key is in place all the same.
#[cfg(unix)]
fn sync_folder(folder: &Path) {
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
}

#[cfg(not(unix))]
fn sync_folder(_: &Path) {}

fn unreadable(path: &Path, kind: ErrorKind) -> IdentityError {
    let folder = folder_of(path);
    match kind {
        ErrorKind::NotFound if folder.is_dir() => IdentityError::Missing { path: path.into() },
        ErrorKind::NotFound => IdentityError::NoFolder {
            path: path.into(),
            folder: folder.into(),
        },
        kind => IdentityError::Unreadable {
            path: path.into(),
            kind,
        },
    }
}

fn unwritable(path: &Path, kind: ErrorKind) -> IdentityError {
    IdentityError::Unwritable {
        folder: folder_of(path).into(),
        kind,
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        Some(_) => Path::new("."),
        None => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().expect("a temporary folder")
    }

    fn message(outcome: Result<Identity, IdentityError>) -> String {
        outcome.expect_err("no identity").to_string()
    }

    #[cfg(unix)]
    fn set_mode(path: &Path, mode: u32) {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
    }

    /// A file as its owner alone may read it, with any content.
    fn private_file(path: &Path, content: &[u8]) {
        let mut file = tempfile::NamedTempFile::new_in(folder_of(path)).expect("a file");
        file.write_all(content).expect("written");
        file.persist(path).expect("named");
    }

    #[test]
    fn an_identity_outlives_the_process() {
        let folder = folder();
        let path = folder.path().join("peer.key");
        let made = Identity::load_or_generate(&path).expect("made");
        assert_eq!(
            Identity::load(&path).expect("read").peer_id(),
            made.peer_id()
        );
        let left: Vec<_> = fs::read_dir(folder.path()).expect("listed").collect();
        assert_eq!(left.len(), 1, "nothing but the key is left: {left:?}");
    }

    #[test]
    fn the_file_is_the_protobuf_encoding_that_other_implementations_read() {
        let folder = folder();
        let path = folder.path().join("peer.key");
        let identity = Identity::load_or_generate(&path).expect("made");
        let bytes = fs::read(&path).expect("read");
        // Field 1: key type 1 (Ed25519); field 2: 64 bytes, the private and the public key.
        assert_eq!(bytes[..4], [0x08, 0x01, 0x12, 0x40]);
        assert_eq!(bytes.len(), 68);
        let public = identity
            .keypair()
            .public()
            .try_into_ed25519()
            .expect("Ed25519");
        assert_eq!(bytes[36..], public.to_bytes());
    }

    #[test]
    fn processes_that_start_at_once_end_with_the_same_key() {
        let folder = folder();
        let path = folder.path().join("peer.key");
        let peers: Vec<PeerId> = thread::scope(|scope| {
            let runs: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| Identity::load_or_generate(&path)))
                .collect();
            let ends = runs.into_iter().map(|run| run.join().expect("no panic"));
            ends.map(|identity| identity.expect("an identity").peer_id())
                .collect()
        });
        assert!(peers.iter().all(|peer| *peer == peers[0]), "{peers:?}");
    }

    #[cfg(unix)]
    #[test]
    fn only_its_owner_may_read_the_file() {
        use std::os::unix::fs::PermissionsExt;

        let folder = folder();
        let path = folder.path().join("peer.key");
        let made = Identity::load_or_generate(&path).expect("made");
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);

        for mode in [0o640, 0o604, 0o644] {
            set_mode(&path, mode);
            let refused = Identity::load_or_generate(&path).expect_err("too open");
            let expected = path.clone();
            assert_eq!(
                refused,
                IdentityError::TooOpen {
                    path: expected,
                    mode
                }
            );
            assert!(refused.to_string().contains("chmod 600 '"), "{refused}");
        }
        set_mode(&path, 0o400);
        assert_eq!(
            Identity::load(&path).expect("read").peer_id(),
            made.peer_id()
        );
    }

    #[test]
    fn what_is_not_a_key_is_refused_and_kept() {
        let folder = folder();
        let key = Identity::generate()
            .0
            .to_protobuf_encoding()
            .expect("a key");
        let mut swapped = key.clone();
        swapped[40] ^= 1;
        for content in [&b""[..], b"hello", &key[..67], &swapped, &[0; 5000]] {
            let path = folder.path().join("peer.key");
            private_file(&path, content);
            let refused = message(Identity::load_or_generate(&path));
            assert!(refused.contains("is not a key file (it "), "{refused}");
            assert!(!refused.contains('\n'), "{refused}");
            assert_eq!(fs::read(&path).expect("kept"), content);
        }
    }

    #[test]
    fn a_missing_folder_is_named_and_not_made() {
        let folder = folder();
        let path = folder.path().join("no/peer.key");
        assert_eq!(
            message(Identity::load_or_generate(&path)),
            format!(
                "cannot keep a key at {}: the folder {} does not exist: create it first",
                path.display(),
                folder.path().join("no").display()
            )
        );
        assert!(!folder.path().join("no").exists());
    }

    #[test]
    fn a_missing_file_is_not_made_by_load() {
        let folder = folder();
        let path = folder.path().join("peer.key");
        let missing = IdentityError::Missing { path: path.clone() };
        assert_eq!(Identity::load(&path).expect_err("missing"), missing);
        assert!(!path.exists());
    }

    #[test]
    fn a_folder_is_not_a_key_file() {
        let folder = folder();
        assert_eq!(
            message(Identity::load_or_generate(folder.path())),
            format!(
                "{} is not a file: give the path of a key file",
                folder.path().display()
            )
        );
    }

    #[cfg(unix)]
    #[test]
    fn a_link_to_nowhere_ends_with_an_error() {
        let folder = folder();
        let path = folder.path().join("peer.key");
        std::os::unix::fs::symlink(folder.path().join("gone"), &path).expect("linked");
        assert!(message(Identity::load_or_generate(&path)).starts_with("no key file at "));
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_without_write_permission_is_named() {
        let folder = folder();
        set_mode(folder.path(), 0o500);
        let path = folder.path().join("peer.key");
        let made = Identity::load_or_generate(&path);
        // Permissions do not bind the superuser, who is let in.
        let is_bound = File::create(folder.path().join("probe")).is_err();
        assert_eq!(made.is_err(), is_bound);
        if is_bound {
            let refused = message(made);
            assert!(
                refused.starts_with("cannot write a key file in "),
                "{refused}"
            );
        }
    }

    #[test]
    fn debug_shows_the_peer_id_only() {
        let identity = Identity::generate();
        let shown = format!("{identity:?}");
        assert!(shown.contains(&identity.peer_id().to_base58()));
        assert!(shown.len() < 100, "{shown}");
    }
}
