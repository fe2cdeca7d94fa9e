//! What the benchmarks share: the machine, figures and their spread, Markdown tables, and the
//! processes that a benchmark starts from its own program.

#![allow(dead_code, reason = "each benchmark uses a part")]
#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::fmt::{self, Display};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use grapevine::Multiaddr;
use hdrhistogram::Histogram;
use rustix::process::{Resource, getrlimit, setrlimit};

/// The first argument of a process that a benchmark starts from its own program.
const PART: &str = "part";

/// Ticks of the processor times in `/proc/<pid>/stat` in a second; fixed by Linux's ABI.
const TICKS: f64 = 100.0;

/// The arguments of a benchmark, without those that `cargo bench` adds.
pub(crate) fn arguments() -> Vec<String> {
    std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect()
}

/// The part that this process plays, with its arguments, if a benchmark has started it.
pub(crate) fn part(arguments: &[String]) -> Option<(&str, &[String])> {
    match arguments {
        [first, part, rest @ ..] if first == PART => Some((part, rest)),
        _ => None,
    }
}

/// Lets this process open as many files as the system allows it.
pub(crate) fn raise_open_files() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        println!("The limit of open files stays as it is: {error}.");
    }
}

/// Prints what is measured, how to repeat it and on what machine it was done.
pub(crate) fn print_heading(title: &str, name: &str, arguments: &[String]) {
    let rest = match arguments {
        [] => String::new(),
        some => format!(" -- {}", some.join(" ")),
    };
    println!("\n## {title}\n");
    println!("* Command: `cargo bench{} --bench {name}{rest}`", profile());
    println!("* Machine: {}", machine());
}

/// The profile that this program was built with, as a flag of cargo; nothing for the default one.
fn profile() -> String {
    let own = std::env::current_exe().unwrap_or_default();
    let folder = own.ancestors().nth(2).and_then(|folder| folder.file_name());
    match folder.and_then(|name| name.to_str()) {
        Some(name) if name != "release" => format!(" --profile {name}"),
        _ => String::new(),
    }
}

pub(crate) fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown processor", |(_, model)| model);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{cores} cores, {model}, Linux {}", kernel.trim())
}

/// A figure over several runs, shown as `median (min..max)`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    pub(crate) fn of(figures: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<_> = figures.into_iter().collect();
        assert!(!sorted.is_empty(), "nothing was measured");
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            1 => sorted[middle],
            _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
        };
        Self {
            median,
            min: sorted[0],
            max: sorted[sorted.len() - 1],
        }
    }
}

impl Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = f.precision().unwrap_or(0);
        let Self { median, min, max } = self;
        write!(f, "{median:.digits$} ({min:.digits$}..{max:.digits$})")
    }
}

/// Prints a Markdown table row by row, so that a long benchmark shows what it has.
pub(crate) struct Table;

impl Table {
    pub(crate) fn new(columns: &[&str]) -> Self {
        println!("\n| {} |", columns.join(" | "));
        println!("|{}", " --- |".repeat(columns.len()));
        Self
    }

    pub(crate) fn row(&self, cells: &[String]) {
        println!("| {} |", cells.join(" | "));
    }
}

/// Latencies in microseconds, to 0.1 % and at most a minute.
pub(crate) fn latencies() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 3).expect("the bounds are in order")
}

pub(crate) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// A latency of a histogram in milliseconds.
pub(crate) fn millis_at(latencies: &Histogram<u64>, quantile: f64) -> f64 {
    latencies.value_at_quantile(quantile) as f64 / 1_000.0
}

/// A process that ends with this value.
pub(crate) struct Process {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Process {
    /// Starts this program again in another part.
    pub(crate) fn part(part: &str, arguments: &[&str]) -> Self {
        Self::start(&mut Self::command(part, arguments))
    }

    /// What starts this program again in another part.
    pub(crate) fn command(part: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(own_path());
        command.arg(PART).arg(part).args(arguments);
        command
    }

    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let output = child.stdout.take().expect("its output is piped");
        Self {
            child,
            output: BufReader::new(output),
        }
    }

    /// The next line that it prints; empty when it has closed its output.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("it prints text");
        line.trim_end().to_owned()
    }

    /// Writes it a line.
    pub(crate) fn send(&mut self, line: &str) {
        let input = self.child.stdin.as_mut().expect("its input is piped");
        writeln!(input, "{line}").expect("it reads");
    }

    /// The addresses that it prints, up to an empty line.
    pub(crate) fn addresses(&mut self) -> Vec<Multiaddr> {
        let mut addresses = Vec::new();
        loop {
            let line = self.line();
            if line.is_empty() {
                assert!(!addresses.is_empty(), "it listens nowhere");
                return addresses;
            }
            addresses.push(line.parse().expect("it prints an address"));
        }
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) {
        let status = self.child.wait().expect("it can be waited for");
        assert!(status.success(), "it failed: {status}");
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where this program is.
pub(crate) fn own_path() -> PathBuf {
    std::env::current_exe().expect("Linux knows where it is")
}

/// Prints the addresses that a part listens on, for [`Process::addresses`].
pub(crate) fn tell(addresses: &[Multiaddr]) {
    for address in addresses {
        println!("{address}");
    }
    println!();
}

/// Blocks until the process that started this one has gone, or wants it to go.
pub(crate) fn until_released() {
    let mut rest = Vec::new();
    // An error means as much as the end.
    let _ = std::io::stdin().read_to_end(&mut rest);
}

/// The processor time that a process has used, in seconds, to 10 ms.
pub(crate) fn cpu_seconds(process: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).expect("it runs");
    // The second field is the program's name, which may contain anything.
    let (_, fields) = stat.rsplit_once(')').expect("the name is in brackets");
    let ticks = |index: usize| -> f64 {
        let field = fields.split_whitespace().nth(index);
        field.and_then(|field| field.parse().ok()).expect("a time")
    };
    (ticks(11) + ticks(12)) / TICKS
}

/// The memory that a process has in use, in bytes.
pub(crate) fn resident(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).expect("it runs");
    let kilobytes: Option<u64> = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok());
    kilobytes.expect("its memory is told in kB") * 1024
}
