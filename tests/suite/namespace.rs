//! A network of the test's own: machines that are Linux namespaces, joined by a switch.
//!
//! Needs `unshare` and `nsenter` of util-linux and `ip` of iproute2, and no privileges: the machines are
//! in a user namespace in which the test is root. They are gone when the test is, however it ends.

use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{LazyLock, Once};

use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::process::{Program, Run, path, run_other};

/// Set where these tests must not be skipped.
const REQUIRED: &str = "GRAPEVINE_REQUIRE_NAMESPACES";

/// Whether namespaces can be made here. Says once if not.
pub(crate) fn can_be_made() -> bool {
    static MISSING: LazyLock<Option<String>> = LazyLock::new(missing);
    static TOLD: Once = Once::new();
    let Some(missing) = &*MISSING else {
        return true;
    };
    assert!(std::env::var_os(REQUIRED).is_none(), "{missing}");
    // Past the test harness, which keeps to itself what a passing test prints.
    TOLD.call_once(|| {
        let skipped = "SKIPPED: the tests in networks of their own";
        let _ = writeln!(io::stderr(), "\n{skipped}: {missing}\n");
    });
    false
}

fn missing() -> Option<String> {
    let makes = "ip link add name net type bridge && ip link add name one type veth peer name two";
    let mut command = std::process::Command::new("unshare");
    command.args([
        "--user",
        "--map-root-user",
        "--net",
        "--mount",
        "sh",
        "-c",
        makes,
    ]);
    match command.output() {
        Err(error) => Some(format!("`unshare`: {error}")),
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().to_string()),
    }
}

/// A switch, and the machines on it.
pub(crate) struct Network {
    switch: Namespace,
    machines: usize,
}

impl Network {
    pub(crate) async fn new() -> Self {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--net", "--mount"]);
        let switch = Namespace::new(command, "").await;
        switch.ip("link add name net type bridge").await;
        switch.ip("link set net up").await;
        Self {
            switch,
            machines: 0,
        }
    }

    /// A machine with these addresses, each with the length of its prefix, on an interface `eth0`.
    pub(crate) async fn machine(&mut self, addresses: &[&str]) -> Machine {
        let etc = tempfile::tempdir().unwrap();
        fs::write(etc.path().join("nsswitch.conf"), "hosts: files dns\n").unwrap();
        let mut command = self.switch.enter();
        command.args(["unshare", "--net", "--mount"]);
        let mount = format!("mount --bind '{}' /etc", etc.path().display());
        let namespace = Namespace::new(command, &mount).await;
        self.machines += 1;
        let port = format!("port{}", self.machines);
        let pid = namespace.pid();
        self.switch
            .ip(&format!(
                "link add {port} type veth peer name eth0 netns {pid}"
            ))
            .await;
        self.switch
            .ip(&format!("link set {port} master net up"))
            .await;
        let machine = Machine { namespace, etc };
        machine.ip("link set lo up").await;
        // An address is used at once, and not only when nobody else is found to have it.
        let no_probes = "echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad";
        machine.namespace.succeeds("sh", &["-c", no_probes]).await;
        machine.ip("link set eth0 up").await;
        for address in addresses {
            machine.ip(&format!("address add {address} dev eth0")).await;
        }
        machine
    }
}

/// A machine of a [`Network`]. Its `/etc` is its own, and empty but for what the test puts there.
pub(crate) struct Machine {
    namespace: Namespace,
    etc: TempDir,
}

impl Machine {
    /// Runs `ip` with these words.
    pub(crate) async fn ip(&self, words: &str) {
        self.namespace.ip(words).await;
    }

    /// A file of its `/etc`.
    pub(crate) fn etc(&self, name: &str) -> PathBuf {
        self.etc.path().join(name)
    }

    /// Asks this name server from now on.
    pub(crate) fn asks(&self, server: &str) {
        fs::write(self.etc("resolv.conf"), format!("nameserver {server}\n")).unwrap();
    }

    /// Starts one of our programs.
    pub(crate) fn start(&self, name: &str, arguments: &[&str]) -> Program {
        Program::start_other(name, self.command(&path(name), arguments))
    }

    /// As [`start`](Self::start), with what it does in detail on stderr.
    pub(crate) fn start_telling(&self, name: &str, arguments: &[&str]) -> Program {
        let mut command = self.namespace.enter();
        command.args(["env", "RUST_LOG=grapevine=debug"]);
        command.arg(path(name)).args(arguments);
        Program::start_other(name, command)
    }

    /// Runs one of our programs to its end, without input.
    pub(crate) async fn run(&self, name: &str, arguments: &[&str]) -> Run {
        run_other(self.command(&path(name), arguments)).await
    }

    /// Starts a name server for these hosts. What they are is what the file says at each question.
    pub(crate) async fn serves_names(&self, hosts: &Path) -> Program {
        let this = std::env::current_exe().unwrap();
        let test = ["--exact", "--ignored", "--nocapture", SERVER];
        let mut command = self.command(&this, &test);
        command.env(HOSTS, hosts);
        let mut server = Program::start_other("the name server", command);
        server.says(READY).await;
        server
    }

    fn command(&self, program: &Path, arguments: &[&str]) -> Command {
        let mut command = self.namespace.enter();
        command.arg(program).args(arguments);
        command
    }
}

/// A process that keeps a namespace, until this end of its standard input is closed.
struct Namespace {
    keeper: Child,
}

impl Namespace {
    /// The command makes the namespace and runs what follows in it.
    async fn new(mut command: Command, first: &str) -> Self {
        let keep = format!("set -e\n{first}\necho ready\nexec cat");
        let mut keeper = command
            .args(["sh", "-c", &keep])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let stdout = keeper.stdout.take().unwrap();
        let ready = BufReader::new(stdout).lines().next_line().await.unwrap();
        assert_eq!(ready.as_deref(), Some("ready"), "no namespace");
        Self { keeper }
    }

    fn pid(&self) -> String {
        self.keeper.id().expect("it runs").to_string()
    }

    /// A command in the namespace, to which its program is added.
    fn enter(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.pid()]).args([
            "--user",
            "--net",
            "--mount",
            "--preserve-credentials",
            "--",
        ]);
        command
    }

    async fn ip(&self, words: &str) {
        let words: Vec<_> = words.split(' ').collect();
        self.succeeds("ip", &words).await;
    }

    async fn succeeds(&self, program: &str, arguments: &[&str]) {
        let mut command = self.enter();
        command.arg(program).args(arguments);
        let run = run_other(command).await;
        assert_eq!(run.code, Some(0), "{program} {arguments:?}: {}", run.stderr);
    }
}

/// The test below, its file of hosts, and what it says once it listens.
const SERVER: &str = "namespace::answers_for_the_hosts_of_a_file";
const HOSTS: &str = "GRAPEVINE_TEST_HOSTS";
const READY: &str = "the name server listens";

/// The name server of a [`Machine`]: a namespace is entered by a process of its own.
#[test]
#[ignore = "other tests start it as a program"]
fn answers_for_the_hosts_of_a_file() {
    let Some(hosts) = std::env::var_os(HOSTS) else {
        return;
    };
    let socket = std::net::UdpSocket::bind("0.0.0.0:53").unwrap();
    eprintln!("{READY}");
    let mut message = [0; 512];
    loop {
        let (length, from) = socket.recv_from(&mut message).unwrap();
        let hosts = fs::read_to_string(&hosts).unwrap();
        let answer = answer(&message[..length], &hosts);
        // Who asked may be gone.
        let _ = socket.send_to(&answer, from);
    }
}

/// Answers one question; each line of `hosts` is an address and a name, which is good for an hour.
fn answer(question: &[u8], hosts: &str) -> Vec<u8> {
    let (mut name, mut rest) = (String::new(), &question[12..]);
    while let Some((&length @ 1.., after)) = rest.split_first() {
        let (label, after) = after.split_at(length.into());
        name += &String::from_utf8_lossy(label).to_lowercase();
        name.push('.');
        rest = after;
    }
    let end = question.len() - rest.len() + 5;
    let asks_for = rest[2];
    let entry = |line: &str| {
        let (address, host) = line.split_once(' ')?;
        (format!("{host}.") == name).then(|| address.parse::<IpAddr>().unwrap())
    };
    let known: Vec<_> = hosts.lines().filter_map(entry).collect();
    let asked = known
        .iter()
        .filter_map(|address| match (asks_for, address) {
            (1, IpAddr::V4(ip)) => Some(ip.octets().to_vec()),
            (28, IpAddr::V6(ip)) => Some(ip.octets().to_vec()),
            _ => None,
        });
    let asked: Vec<_> = asked.collect();
    let mut answer = question[..end].to_vec();
    answer[2] = 0x84;
    answer[3] = if known.is_empty() { 3 } else { 0 };
    answer[6..12].copy_from_slice(&[0, u8::try_from(asked.len()).unwrap(), 0, 0, 0, 0]);
    for address in asked {
        answer.extend([0xc0, 12, 0, asks_for, 0, 1, 0, 0, 0x0e, 0x10, 0]);
        answer.push(u8::try_from(address.len()).unwrap());
        answer.extend(address);
    }
    answer
}
