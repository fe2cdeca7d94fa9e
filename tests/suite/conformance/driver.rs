//! The drivers of `tests/interop`: whether they are installed, and what one is asked.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Once};

use serde::Deserialize;
use tokio::process::Command;

use crate::process::Program;

/// Set where these tests must not be skipped.
const REQUIRED: &str = "GRAPEVINE_REQUIRE_INTEROP";

/// Another implementation of libp2p.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Library {
    Js,
    Go,
    Py,
    Litep2p,
}

/// A process that does what it is told by its input.
pub(crate) struct Driver {
    pub(crate) library: Library,
    program: Program,
}

/// What a verb has come to.
#[derive(Debug, Deserialize)]
pub(crate) struct Answer {
    pub(crate) exit: i32,
    pub(crate) lines: Vec<String>,
}

/// Whether all libraries are installed. Says once which one is not.
pub(super) fn are_here() -> bool {
    static MISSING: LazyLock<Option<String>> = LazyLock::new(missing);
    static TOLD: Once = Once::new();
    let Some(missing) = &*MISSING else {
        return true;
    };
    assert!(std::env::var_os(REQUIRED).is_none(), "{missing}");
    // Past the test harness, which keeps to itself what a passing test prints.
    TOLD.call_once(|| {
        let skipped = "SKIPPED: the tests with stock libp2p of js, go, py and litep2p";
        let _ = writeln!(io::stderr(), "\n{skipped}: {missing}\n");
    });
    false
}

fn missing() -> Option<String> {
    let lacks = |library: &Library| !library.program().is_file();
    let library = Library::ALL.into_iter().find(lacks)?;
    let name = library.name();
    Some(format!("{name} is not there: run tests/interop/install"))
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("interop")
}

impl Library {
    pub(super) const ALL: [Self; 4] = [Self::Js, Self::Go, Self::Py, Self::Litep2p];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Js => "js",
            Self::Go => "go",
            Self::Py => "py",
            Self::Litep2p => "litep2p",
        }
    }

    /// What must be there.
    fn program(self) -> PathBuf {
        match self {
            Self::Js => folder().join("js/node_modules/.bin/node"),
            Self::Go => folder().join("go/venv/bin/python"),
            Self::Py => folder().join("py/venv/bin/python"),
            Self::Litep2p => {
                let test = std::env::current_exe().unwrap();
                let folder = test.parent().and_then(|deps| deps.parent()).unwrap();
                folder.join("grapevine-interop-litep2p")
            }
        }
    }

    fn command(self) -> Command {
        let mut command = Command::new(self.program());
        match self {
            Self::Js => command.arg(folder().join("js/driver.js")),
            Self::Go => command.arg(folder().join("go/driver.py")),
            Self::Py => command.arg(folder().join("py/driver.py")),
            Self::Litep2p => &mut command,
        };
        command
    }
}

impl Driver {
    /// Starts a driver, and returns when it is connected to the grape.
    pub(crate) async fn start(library: Library, transport: &str, grape: &str) -> Self {
        let mut command = library.command();
        command.args(["--transport", transport, "--bootstrap", grape]);
        let mut program = Program::start_other(library.name(), command);
        let ready = program.line().await;
        assert!(ready.starts_with("{\"ready\""), "{ready}");
        Self { library, program }
    }

    /// Runs a verb.
    pub(crate) async fn ask(&mut self, verb: &[&str]) -> Answer {
        let asked = serde_json::json!({ "id": 1, "args": verb });
        self.program.types(asked.to_string()).await;
        serde_json::from_str(&self.program.line().await).unwrap()
    }
}

/// Runs a library's check of the test vectors.
pub(super) async fn check_vectors(library: Library) {
    let mut command = library.command();
    command.args([
        "vectors",
        concat!(env!("CARGO_MANIFEST_DIR"), "/vectors.json"),
    ]);
    let run = crate::process::run_other(command).await;
    assert_eq!(run.code, Some(0), "{}: {}", library.name(), run.stderr);
    let checked: usize = run.stdout.trim().parse().unwrap();
    assert!(checked > 0, "{} has checked nothing", library.name());
}
