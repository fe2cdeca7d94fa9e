//! Runs a program as a process. It is killed, by its id, when the test is over.

use std::fmt::Write;
use std::fs::File;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

/// No test takes longer than this, however busy the machine.
const DEADLINE: Duration = Duration::from_secs(90);

/// A program that is asked to end is gone within this.
const END: Duration = Duration::from_secs(3);

pub(crate) async fn in_time<T>(scenario: impl Future<Output = T>) -> T {
    timeout(DEADLINE, scenario).await.expect("the test hangs")
}

/// A program that runs.
pub(crate) struct Program {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Option<Lines<BufReader<ChildStdout>>>,
    stderr: Lines<BufReader<ChildStderr>>,
    /// What it has said on stderr so far, for the messages of failed tests.
    said: String,
    /// Where it can be dialled, if it has told.
    pub(crate) address: String,
}

/// What a program has done.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// The program's file. Cargo builds the examples before it runs the tests.
pub(crate) fn path(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test
        .parent()
        .and_then(|deps| deps.parent())
        .unwrap()
        .join("examples")
        .join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    assert!(
        path.is_file(),
        "{} is missing: build it with `cargo build --examples`",
        path.display()
    );
    path
}

/// Where a key may be kept.
pub(crate) fn key_file(folder: &TempDir) -> String {
    folder.path().join("key").to_str().unwrap().into()
}

fn command(name: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(path(name));
    command.args(arguments);
    piped(command)
}

fn piped(mut command: Command) -> Command {
    command
        .env_remove("RUST_LOG")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// Runs a program to its end, without input.
pub(crate) async fn run(name: &str, arguments: &[&str]) -> Run {
    finish(command(name, arguments), Stdio::null()).await
}

/// As [`run`], with a file as its standard input.
pub(crate) async fn run_from(file: File, name: &str, arguments: &[&str]) -> Run {
    finish(command(name, arguments), file.into()).await
}

/// As [`run`], with its standard output into a file.
pub(crate) async fn run_into(file: File, name: &str, arguments: &[&str]) -> Run {
    let mut command = command(name, arguments);
    command.stdout(file);
    finish(command, Stdio::null()).await
}

/// Runs a program that is none of ours to its end, without input.
pub(crate) async fn run_other(command: Command) -> Run {
    finish(piped(command), Stdio::null()).await
}

async fn finish(mut command: Command, stdin: Stdio) -> Run {
    let child = command.stdin(stdin).spawn().unwrap();
    let output = child.wait_with_output().await.unwrap();
    Run {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

impl Run {
    /// Fails the test unless the program failed in this way.
    #[track_caller]
    pub(crate) fn fails(&self, code: i32, stderr: &str) {
        let done = (self.code, &*self.stdout, &*self.stderr);
        assert_eq!(done, (Some(code), "", stderr));
    }

    /// Whether there is nothing in it that only a programmer understands.
    pub(crate) fn is_fit_for_people(&self) -> bool {
        let alien = ["panicked", "RUST_BACKTRACE", "Error(", "Err(", "Some("];
        !alien.iter().any(|word| self.stderr.contains(word))
    }
}

impl Program {
    pub(crate) fn start(name: &str, arguments: &[&str]) -> Self {
        Self::spawn(name, command(name, arguments), Stdio::piped())
    }

    /// With a file as its standard input.
    pub(crate) fn start_from(file: File, name: &str, arguments: &[&str]) -> Self {
        Self::spawn(name, command(name, arguments), file.into())
    }

    /// With its standard output into a file.
    pub(crate) fn start_into(file: File, name: &str, arguments: &[&str]) -> Self {
        let mut command = command(name, arguments);
        command.stdout(file);
        Self::spawn(name, command, Stdio::piped())
    }

    /// Starts a program that is none of ours.
    pub(crate) fn start_other(name: &str, command: Command) -> Self {
        Self::spawn(name, piped(command), Stdio::piped())
    }

    fn spawn(name: &str, mut command: Command, stdin: Stdio) -> Self {
        let mut child = command.stdin(stdin).spawn().unwrap();
        Self {
            name: name.into(),
            stdin: child.stdin.take(),
            stdout: child.stdout.take().map(|out| BufReader::new(out).lines()),
            stderr: BufReader::new(child.stderr.take().unwrap()).lines(),
            child,
            said: String::new(),
            address: String::new(),
        }
    }

    /// The next line on stdout.
    pub(crate) async fn line(&mut self) -> String {
        let stdout = self.stdout.as_mut().unwrap();
        let Some(line) = stdout.next_line().await.unwrap() else {
            let rest = self.rest().await;
            panic!("{} has ended: {rest}", self.name);
        };
        line
    }

    /// What is left on stdout when the program has ended.
    pub(crate) async fn output(&mut self) -> String {
        let mut rest = String::new();
        let stdout = self.stdout.take().unwrap();
        stdout.into_inner().read_to_string(&mut rest).await.unwrap();
        rest
    }

    /// Waits for a line on stderr that begins like this.
    pub(crate) async fn says(&mut self, start: &str) {
        self.says_of(start, "").await;
    }

    /// Waits for a line on stderr that begins like this and has that in it.
    pub(crate) async fn says_of(&mut self, start: &str, part: &str) {
        while let Some(line) = self.stderr.next_line().await.unwrap() {
            writeln!(self.said, "{line}").unwrap();
            if line.starts_with(start) && line.contains(part) {
                return;
            }
        }
        let said = &self.said;
        panic!("{} has not said {start:?} {part:?} but: {said}", self.name);
    }

    /// Waits for two lines on stderr that begin like these, whichever comes first.
    pub(crate) async fn says_both(&mut self, one: &str, other: &str) {
        let mut awaited = vec![one, other];
        while let Some(line) = self.stderr.next_line().await.unwrap() {
            writeln!(self.said, "{line}").unwrap();
            awaited.retain(|start| !line.starts_with(start));
            if awaited.is_empty() {
                return;
            }
        }
        panic!("{} has not said {awaited:?} but: {}", self.name, self.said);
    }

    pub(crate) async fn types(&mut self, line: impl AsRef<[u8]>) {
        let stdin = self.stdin.as_mut().unwrap();
        stdin.write_all(line.as_ref()).await.unwrap();
        stdin.write_all(b"\n").await.unwrap();
    }

    pub(crate) fn closes_input(&mut self) {
        self.stdin = None;
    }

    pub(crate) fn closes_output(&mut self) {
        self.stdout = None;
    }

    /// Waits for the first byte of a line, and takes no more.
    pub(crate) async fn begins_to_print(&mut self) {
        let mut stdout = self.stdout.take().unwrap().into_inner();
        stdout.read_u8().await.unwrap();
        self.stdout = Some(stdout.lines());
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id().expect("it runs")
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.id().try_into().unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    pub(crate) async fn end(&mut self) -> ExitStatus {
        self.child.wait().await.unwrap()
    }

    /// Sends a signal; the program keeps its promise to end soon, with this code.
    pub(crate) async fn ends_on(&mut self, signal: Signal, code: i32) {
        self.signal(signal);
        let asked = Instant::now();
        let status = self.end().await;
        let took = asked.elapsed();
        let rest = self.rest().await;
        assert_eq!(
            status.code(),
            Some(code),
            "{} on {signal:?}: {rest}",
            self.name
        );
        assert!(took < END, "{} took {took:?}", self.name);
    }

    async fn rest(&mut self) -> String {
        while let Ok(Some(line)) = self.stderr.next_line().await {
            writeln!(self.said, "{line}").unwrap();
        }
        std::mem::take(&mut self.said)
    }
}
