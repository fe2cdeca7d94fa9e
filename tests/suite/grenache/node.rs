//! Node and the programs of `tests/grenache`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Once};

use serde_json::Value;
use tokio::process::Command;

use super::grapes::Grape;
use crate::process::{Program, run_other};

/// Set where these tests must not be skipped.
const REQUIRED: &str = "GRAPEVINE_REQUIRE_NODE";

/// The oldest that the programs run on.
const MIN_VERSION: u32 = 20;

/// The ways in which Grenache's services are called.
pub(super) const TRANSPORTS: [&str; 2] = ["ws", "http"];

/// Whether there is a Node with Grenache's packages. Says once if there is not.
pub(super) fn is_here() -> bool {
    static MISSING: LazyLock<Option<&str>> = LazyLock::new(missing);
    static TOLD: Once = Once::new();
    let Some(missing) = *MISSING else {
        return true;
    };
    assert!(std::env::var_os(REQUIRED).is_none(), "{missing}");
    // Past the test harness, which keeps to itself what a passing test prints.
    TOLD.call_once(|| {
        let skipped = "SKIPPED: the tests with services of Grenache on Node";
        let _ = writeln!(io::stderr(), "\n{skipped}: {missing}\n");
    });
    false
}

fn missing() -> Option<&'static str> {
    match version() {
        None => Some("there is no `node` on the path"),
        Some(version) if version < MIN_VERSION => Some("`node` is older than 20"),
        // npm writes it last.
        Some(_) if !script("node_modules/.package-lock.json").is_file() => {
            Some("install them with `npm ci --prefix tests/grenache`")
        }
        Some(_) => None,
    }
}

fn version() -> Option<u32> {
    let output = std::process::Command::new("node").arg("--version").output();
    let version = String::from_utf8(output.ok()?.stdout).ok()?;
    let (major, _) = version.trim().strip_prefix('v')?.split_once('.')?;
    major.parse().ok()
}

pub(super) fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("grenache")
        .join(name)
}

pub(super) fn command(name: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("node");
    command.arg(script(name)).args(arguments);
    command
}

pub(super) fn start(name: &str, arguments: &[&str]) -> Program {
    Program::start_other(name, command(name, arguments))
}

/// A service that runs.
pub(super) struct Server {
    pub(super) program: Program,
    pub(super) port: u64,
}

/// What the payloads of a service or a client are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// A string.
    Text,
    /// The object of a chat message.
    Chat,
}

impl Form {
    fn flag(self) -> &'static [&'static str] {
        match self {
            Self::Text => &[],
            Self::Chat => &["--chat"],
        }
    }
}

/// Starts a service, and returns when its grape has taken its name.
pub(super) async fn server(name: &str, grape: &Grape, transport: &str, form: Form) -> Server {
    let flags = [name, "0", &grape.url(), transport];
    let mut program = start("server.js", &[&flags, form.flag()].concat());
    let announced: Value = serde_json::from_str(&program.line().await).unwrap();
    assert_eq!(announced["announced"], name);
    let port = announced["port"].as_u64().unwrap();
    Server { program, port }
}

/// What became of each of these payloads, sent one after the other.
pub(super) async fn call(
    name: &str,
    grape: &Grape,
    transport: &str,
    payloads: &[&str],
) -> Vec<Value> {
    call_in(Form::Text, name, grape, transport, payloads).await
}

/// As [`call`], with payloads of this form.
pub(super) async fn call_in(
    form: Form,
    name: &str,
    grape: &Grape,
    transport: &str,
    payloads: &[&str],
) -> Vec<Value> {
    let given = [name, &grape.url(), transport, "--timeout", "1000"];
    let given = [&given, form.flag(), payloads].concat();
    let run = run_other(command("client.js", &given)).await;
    let lines = run.stdout.lines();
    let outcomes: Vec<_> = lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(!outcomes.is_empty(), "{run:?}");
    outcomes
}

/// A link of Grenache to a grape.
pub(super) struct Link(Program);

impl Link {
    pub(super) fn to(grape: &Grape) -> Self {
        Self(start("link.js", &[&grape.url()]))
    }

    /// What became of one verb.
    pub(super) async fn does(&mut self, verb: &str, argument: &Value) -> Value {
        self.0.types(&format!("{verb} {argument}")).await;
        serde_json::from_str(&self.0.line().await).unwrap()
    }
}
