//! What came out, as a table of `docs/interop.md`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

use super::driver::Library;

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/interop.md");

/// Set to write what came out into the page.
const WRITES: &str = "GRAPEVINE_WRITE_INTEROP";

const CALLERS: [&str; 5] = ["Grapevine", "js", "go", "py", "litep2p"];

/// How a name is served: who serves it, and in which way it is announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Way {
    Ours,
    Stock(Library, &'static str),
}

impl Way {
    fn describe(self) -> String {
        match self {
            Self::Ours => "Grapevine's `peer`".into(),
            Self::Stock(library, "names") => format!("{}, by a message on names", library.name()),
            Self::Stock(library, "kademlia") => format!("{}, by Kademlia", library.name()),
            Self::Stock(library, road) => format!("{}, by {road}", library.name()),
        }
    }
}

/// The note on why a call is not tried: it was, and what came out is the library's own doing.
pub(super) fn known(
    caller: &str,
    way: Way,
    transport: &str,
    grapes: usize,
) -> Option<&'static str> {
    let Way::Stock(server, road) = way else {
        return None;
    };
    if transport == "quic" && server == Library::Go && caller == "Grapevine" {
        return Some("1");
    }
    let told_both = road == "kademlia" && server != Library::Go;
    (grapes == 2 && caller == "go" && !told_both).then_some("2")
}

/// What came out of calling a name.
enum Cell {
    Tried(bool),
    /// Not tried, for the reason in that note.
    Known(&'static str),
}

pub(super) struct Table {
    transport: &'static str,
    grapes: usize,
    cells: BTreeMap<Way, BTreeMap<&'static str, Cell>>,
    /// What did not work and why, for whoever reads the failed test.
    failures: String,
}

impl Table {
    pub(super) fn new(transport: &'static str, grapes: usize) -> Self {
        Self {
            transport,
            grapes,
            cells: BTreeMap::new(),
            failures: String::new(),
        }
    }

    /// A library cannot announce itself in this way.
    pub(super) fn cannot(&mut self, way: Way, reason: &str) {
        writeln!(self.failures, "{}: {reason}", way.describe()).unwrap();
        self.cells.insert(way, BTreeMap::new());
    }

    pub(super) fn called(&mut self, caller: &'static str, way: Way, outcome: Result<(), String>) {
        if let Err(reason) = &outcome {
            let server = way.describe();
            writeln!(self.failures, "{caller} calls {server}: {reason}").unwrap();
        }
        let note = known(caller, way, self.transport, self.grapes);
        let row = self.cells.entry(way).or_default();
        row.insert(
            caller,
            note.map_or(Cell::Tried(outcome.is_ok()), Cell::Known),
        );
    }

    /// Fails unless the page says the same.
    pub(super) fn compare(&self) {
        let (heading, rendered) = (self.heading(), self.render());
        let page = fs::read_to_string(PAGE).unwrap_or_default();
        if page.contains(&rendered) {
            return;
        }
        if env::var_os(WRITES).is_some() {
            return fs::write(Path::new(PAGE), replaced(&page, &heading, &rendered)).unwrap();
        }
        let failures = &self.failures;
        panic!("docs/interop.md says otherwise than\n\n{rendered}\n{failures}");
    }

    fn heading(&self) -> String {
        let transport = self.transport.to_uppercase();
        match self.grapes {
            1 => format!("## {transport}, one grape"),
            _ => format!("## {transport}, two grapes"),
        }
    }

    fn render(&self) -> String {
        let mut text = format!("{}\n\n| serves ↓ calls → |", self.heading());
        for caller in CALLERS {
            write!(text, " {caller} |").unwrap();
        }
        text.push_str("\n| --- |");
        text.push_str(&" --- |".repeat(CALLERS.len()));
        text.push('\n');
        for (way, row) in &self.cells {
            write!(text, "| {} |", way.describe()).unwrap();
            for caller in CALLERS {
                match row.get(caller) {
                    Some(Cell::Tried(true)) => text.push_str(" yes |"),
                    Some(Cell::Known(note)) => write!(text, " no ({note}) |").unwrap(),
                    _ => text.push_str(" no |"),
                }
            }
            text.push('\n');
        }
        text
    }
}

/// The page with the section of that heading replaced, or added at its end.
fn replaced(page: &str, heading: &str, section: &str) -> String {
    let Some(begin) = page.find(&format!("{heading}\n")) else {
        return format!("{}\n\n{section}", page.trim_end());
    };
    let after = &page[begin + heading.len()..];
    let end = after.find("\n## ").map(|at| begin + heading.len() + at + 1);
    let rest = end.map_or("", |end| &page[end..]);
    let gap = if rest.is_empty() { "" } else { "\n" };
    format!("{}{section}{gap}{rest}", &page[..begin])
}
