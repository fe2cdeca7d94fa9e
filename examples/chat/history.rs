//! What was typed before, in memory and, where one asks for it, in a file.
//!
//! The file begins with a line that tells it from every other: a file that does not is somebody's
//! text, and is left as it is. It is read up to a bound, appended to a line at a time, and replaced
//! whole by a shorter one when it gets long. Several programs may keep theirs in one file.

use std::collections::VecDeque;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
#[cfg(unix)]
use std::{thread, time::Duration};

use tempfile::NamedTempFile;

use crate::common::{Failure, USAGE};

/// How many lines are remembered.
const MAX_ENTRIES: usize = 1_000;

/// A longer line is not remembered: nobody looks for one.
const MAX_ENTRY: usize = 16 * 1024;

/// The first line of a file.
const HEADER: &[u8] = b"#grapevine-chat-history-1\n";

/// A file that is longer is made shorter.
const LONG_FILE: u64 = 1024 * 1024;

/// How often, and how far apart, a program tries to have a file for itself: another one
/// needs it as long as it takes to write a line.
#[cfg(unix)]
const TRIES: usize = 50;
#[cfg(unix)]
const BETWEEN_TRIES: Duration = Duration::from_millis(10);

/// More than that is not read. A line more than [`LONG_FILE`] is the most that is written.
const MAX_FILE: u64 = 2 * LONG_FILE;

#[derive(Debug, Default)]
pub(crate) struct History {
    entries: VecDeque<String>,
}

/// Where what is typed is kept for the next time.
#[derive(Debug)]
pub(crate) struct HistoryFile {
    path: PathBuf,
    last: Option<String>,
}

impl History {
    /// What is in a file, which is made when missing. Blocks, for long where the disk is far away.
    pub(crate) fn open(path: &Path) -> Result<(Self, HistoryFile), Failure> {
        let cannot = |why: Unusable| Failure::new(USAGE, why.describe(path));
        let mut file = open(path).map_err(cannot)?;
        let mut history = Self::default();
        for entry in read(&mut file).map_err(cannot)? {
            history.add(&entry);
        }
        // A file of that name may be a link to the one that is to be replaced one day.
        let path = fs::canonicalize(path).map_err(|error| cannot(error.into()))?;
        let last = history.entries.back().cloned();
        Ok((history, HistoryFile { path, last }))
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// By its number, from the oldest.
    pub(crate) fn entry(&self, number: usize) -> Option<&str> {
        self.entries.get(number).map(String::as_str)
    }

    /// The last entry before that number that has a text in it, and where.
    pub(crate) fn last_with(&self, text: &str, before: usize) -> Option<(usize, usize)> {
        if text.is_empty() {
            return None;
        }
        let before = before.min(self.len());
        let mut entries = self.entries.range(..before).enumerate().rev();
        entries.find_map(|(number, entry)| Some((number, entry.find(text)?)))
    }

    /// Remembers a line, but for one that nobody would look for.
    pub(crate) fn add(&mut self, line: &str) {
        let last = self.entries.back().map(String::as_str);
        if !is_worth_keeping(line, last) {
            return;
        }
        if self.entries.len() == MAX_ENTRIES {
            self.entries.pop_front();
        }
        self.entries.push_back(line.into());
    }
}

impl HistoryFile {
    /// Keeps a line. Blocks, for long where the disk is far away.
    pub(crate) fn add(&mut self, line: &str) {
        if is_worth_keeping(line, self.last.as_deref()) {
            // It could be written at the start; a conversation does not end for it.
            let _ = append(&self.path, line);
            self.last = Some(line.into());
        }
    }
}

fn is_worth_keeping(line: &str, last: Option<&str>) -> bool {
    !line.trim().is_empty() && line.len() <= MAX_ENTRY && last != Some(line)
}

/// Why a file cannot hold a history.
#[derive(Debug)]
enum Unusable {
    NotAFile,
    NotOurs,
    TooLong,
    Unreachable(io::Error),
}

impl From<io::Error> for Unusable {
    fn from(error: io::Error) -> Self {
        Self::Unreachable(error)
    }
}

impl Unusable {
    fn describe(&self, path: &Path) -> String {
        let path = path.display();
        match self {
            Self::NotAFile => format!(
                "--history: {path} is not a file: give the path of a new file, or of one that chat \
                 has made"
            ),
            Self::NotOurs => format!(
                "--history: {path} is no history of chat, and is left as it is: give the path of a \
                 new file, or of one that chat has made"
            ),
            Self::TooLong => format!(
                "--history: {path} is longer than {MAX_FILE} bytes, which chat does not make it: \
                 move it away"
            ),
            Self::Unreachable(error) => {
                format!("--history: cannot use {path}: {error}: give a file that you can write to")
            }
        }
    }
}

/// Opens a file, or makes one, to read and to append.
fn open(path: &Path) -> Result<File, Unusable> {
    // Before it is opened: to open a device may do something already.
    match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => return Err(Unusable::NotAFile),
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    let file = for_owner_alone()
        .read(true)
        .append(true)
        .create(true)
        .open(path)?;
    // What is opened may be another file by now.
    if !file.metadata()?.is_file() {
        return Err(Unusable::NotAFile);
    }
    Ok(file)
}

/// Opens nothing that makes it wait.
#[cfg(unix)]
fn for_owner_alone() -> OpenOptions {
    use std::os::unix::fs::OpenOptionsExt;

    use rustix::fs::OFlags;

    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let mut options = OpenOptions::new();
    options.mode(0o600).custom_flags(flags.bits().cast_signed());
    options
}

#[cfg(not(unix))]
fn for_owner_alone() -> OpenOptions {
    OpenOptions::new()
}

/// The entries of a file; of an empty one, none.
fn read(file: &mut File) -> Result<Vec<String>, Unusable> {
    file.seek(SeekFrom::Start(0))?;
    let mut begin = Vec::new();
    file.take(HEADER.len() as u64).read_to_end(&mut begin)?;
    if begin.is_empty() {
        return Ok(Vec::new());
    }
    if begin != HEADER {
        return Err(Unusable::NotOurs);
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut bytes)?;
    if bytes.len() as u64 == MAX_FILE {
        return Err(Unusable::TooLong);
    }
    let mut lines: Vec<_> = bytes.split(|byte| *byte == b'\n').collect();
    // Empty, or a line that was not written to its end.
    lines.pop();
    let entries = lines
        .into_iter()
        .filter_map(|line| std::str::from_utf8(line).ok());
    Ok(entries.map(unescape).collect())
}

/// Adds a line to a file that is still ours.
fn append(path: &Path, entry: &str) -> Result<(), Unusable> {
    let mut file = lock(path)?;
    let length = file.metadata()?.len();
    if length >= LONG_FILE {
        return replace(path, &mut file, entry);
    }
    let mut line = Vec::new();
    if length == 0 {
        line.extend(HEADER);
    } else {
        let mut begin = Vec::new();
        file.seek(SeekFrom::Start(0))?;
        (&file).take(HEADER.len() as u64).read_to_end(&mut begin)?;
        if begin != HEADER {
            return Err(Unusable::NotOurs);
        }
        let mut last = [0];
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
        if last != *b"\n" {
            // The line before was not written to its end.
            line.push(b'\n');
        }
    }
    line.extend(escape(entry).bytes());
    line.push(b'\n');
    // In one piece, so that no other program's line gets into it.
    Ok(file.write_all(&line)?)
}

/// Opens a file for one program at a time.
fn lock(path: &Path) -> Result<File, Unusable> {
    loop {
        let file = open(path)?;
        claim(&file)?;
        // Another program may have replaced it meanwhile.
        match fs::metadata(path) {
            Ok(now) if is_same(&now, &file.metadata()?) => return Ok(file),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Waits for its turn at a file, but not for one who keeps it.
#[cfg(unix)]
fn claim(file: &File) -> io::Result<()> {
    use rustix::fs::{FlockOperation, flock};
    use rustix::io::Errno;

    for _ in 0..TRIES {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => thread::sleep(BETWEEN_TRIES),
            // Where files cannot be locked, as on some network file systems, each line is still whole.
            _ => return Ok(()),
        }
    }
    Err(ErrorKind::WouldBlock.into())
}

#[cfg(not(unix))]
fn claim(_: &File) -> io::Result<()> {
    Ok(())
}

#[cfg(unix)]
fn is_same(one: &Metadata, other: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;

    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

#[cfg(not(unix))]
fn is_same(_: &Metadata, _: &Metadata) -> bool {
    true
}

/// Puts a new file in the place of one that has got long: the last lines of it, and one more. It is
/// there whole, or the old one is.
fn replace(path: &Path, file: &mut File, entry: &str) -> Result<(), Unusable> {
    let mut entries = read(file)?;
    entries.push(entry.into());
    let mut kept = 0;
    let mut size = 0;
    for entry in entries.iter().rev().take(MAX_ENTRIES) {
        size += entry.len() as u64;
        if size > LONG_FILE / 2 {
            break;
        }
        kept += 1;
    }
    let folder = path.parent().unwrap_or(Path::new("."));
    // Made with mode 0600.
    let mut shorter = NamedTempFile::new_in(folder)?;
    let mut text = HEADER.to_vec();
    for entry in entries.iter().skip(entries.len() - kept) {
        text.extend(escape(entry).bytes());
        text.push(b'\n');
    }
    shorter.write_all(&text)?;
    shorter.as_file().sync_all()?;
    shorter.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// One line, whatever was typed.
fn escape(entry: &str) -> String {
    entry.replace('\\', "\\\\").replace('\n', "\\n")
}

fn unescape(line: &str) -> String {
    let mut entry = String::with_capacity(line.len());
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => entry.extend(chars.next().map(|c| if c == 'n' { '\n' } else { c })),
            c => entry.push(c),
        }
    }
    entry
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;

    fn entries(history: &History) -> Vec<&str> {
        history.entries.iter().map(String::as_str).collect()
    }

    fn file(folder: &TempDir) -> PathBuf {
        folder.path().join("history")
    }

    #[test]
    fn a_line_that_was_not_written_to_its_end_spoils_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(&folder);
        fs::write(&path, [HEADER, b"one\ntwo\nhal"].concat()).unwrap();
        let (history, mut kept) = History::open(&path).unwrap();
        assert_eq!(entries(&history), ["one", "two"]);
        kept.add("three");
        let (history, _) = History::open(&path).unwrap();
        assert_eq!(entries(&history), ["one", "two", "hal", "three"]);
    }

    #[test]
    fn a_file_that_gets_long_is_replaced_by_the_last_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(&folder);
        let link = folder.path().join("link");
        #[cfg(unix)]
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let (_, mut kept) = History::open(&link).unwrap();
        let lines: Vec<_> = (0..100)
            .map(|n| format!("{n} {}", "x".repeat(MAX_ENTRY - 4)))
            .collect();
        for line in &lines {
            kept.add(line);
            assert!(fs::metadata(&path).unwrap().len() < MAX_FILE);
        }
        assert!(link.is_symlink(), "a link stays one");
        let (history, _) = History::open(&link).unwrap();
        let last: Vec<_> = lines.iter().rev().take(30).rev().collect();
        let known = entries(&history);
        assert!(
            known.len() < 100 && known[known.len() - 30..] == last,
            "{}",
            known.len()
        );
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            2,
            "nothing is left behind"
        );
    }

    #[test]
    fn many_keep_their_lines_in_one_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(&folder);
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let path = &path;
                scope.spawn(move || {
                    let (_, mut kept) = History::open(path).unwrap();
                    for line in 0..50 {
                        kept.add(&format!("{writer} {line}"));
                    }
                });
            }
        });
        let (history, _) = History::open(&path).unwrap();
        for writer in 0..4 {
            let start = format!("{writer} ");
            let lines: Vec<_> = entries(&history)
                .into_iter()
                .filter(|line| line.starts_with(&start))
                .collect();
            let expected: Vec<_> = (0..50).map(|line| format!("{writer} {line}")).collect();
            assert_eq!(lines, expected);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn what_was_typed_is_there_the_next_time(lines in prop::collection::vec("(\\PC|[\\\\\n\t])*", 0..8)) {
            let folder = tempfile::tempdir().unwrap();
            let (mut history, mut kept) = History::open(&file(&folder)).unwrap();
            for line in &lines {
                history.add(line);
                kept.add(line);
            }
            let (again, _) = History::open(&file(&folder)).unwrap();
            prop_assert_eq!(again.entries, history.entries);
        }
    }
}
