//! The programs that Grapevine began as, unchanged: a chat on Grenache's packages.
//!
//! They are not part of this repository. `GRAPEVINE_SEED` names a folder with a clone of
//! `ismaelpamplona/grapevine-p2p-chat` in which `npm install` and `npm install --no-save jest` have run.
//! Their ports are fixed, so that they run in a network of their own.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Once;

use tokio::process::Command;

use crate::process::{Program, Run, in_time, path, run_other};

/// The first grape of the seed's README, and the second.
const GRAPES: [[&str; 6]; 2] = [
    ["--dp", "20001", "--aph", "30001", "--bn", "127.0.0.1:20002"],
    ["--dp", "20002", "--aph", "40001", "--bn", "127.0.0.1:20001"],
];

/// The seed's folder, if it is given. Says once if it is not.
fn seed() -> Option<PathBuf> {
    static TOLD: Once = Once::new();
    let folder = std::env::var_os("GRAPEVINE_SEED").map(PathBuf::from);
    if folder.is_none() {
        // Past the test harness, which keeps to itself what a passing test prints.
        TOLD.call_once(|| {
            let skipped = "SKIPPED: the tests with the seed's own programs";
            let _ = writeln!(
                io::stderr(),
                "\n{skipped}: GRAPEVINE_SEED names no folder\n"
            );
        });
    }
    folder
}

/// A network of its own, with nothing but a loopback interface. It ends with this.
struct Space {
    holder: Program,
    seed: PathBuf,
}

impl Space {
    async fn new(seed: PathBuf) -> Self {
        let mut command = Command::new("unshare");
        let script = "ip link set lo up && echo ready && exec cat";
        command.args(["--map-root-user", "--net", "sh", "-c", script]);
        let mut holder = Program::start_other("unshare", command);
        assert_eq!(holder.line().await, "ready");
        Self { holder, seed }
    }

    fn command(&self, program: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--preserve-credentials", "--user", "--net", "--target"])
            .arg(self.holder.id().to_string())
            .arg(program)
            .args(arguments)
            .current_dir(&self.seed);
        command
    }

    fn start(&self, name: &str, arguments: &[&str]) -> Program {
        Program::start_other(name, self.command(&path(name), arguments))
    }

    fn start_node(&self, arguments: &[&str]) -> Program {
        Program::start_other("node", self.command("node".as_ref(), arguments))
    }

    async fn chat(&self, arguments: &[&str]) -> Run {
        run_other(self.command(&path("chat"), arguments)).await
    }

    /// As [`chat`](Self::chat), as soon as somebody has announced the name.
    async fn chat_once_announced(&self, arguments: &[&str]) -> Run {
        loop {
            let run = self.chat(arguments).await;
            if run.code != Some(3) {
                return run;
            }
        }
    }
}

/// Sends a message by the seed's client.
async fn send(client: &mut Program, name: &str, text: &str) {
    client.types(name).await;
    while !client
        .line()
        .await
        .contains("Available peers: [ '127.0.0.1:")
    {}
    client.types(text).await;
    let delivered = format!("Message successfully delivered to {name}!");
    while !client.line().await.contains(&delivered) {}
}

#[tokio::test]
async fn the_seeds_own_programs_and_ours_reach_each_other() {
    let Some(seed) = seed() else { return };
    in_time(async {
        let space = Space::new(seed).await;
        let mut grapes = GRAPES.map(|flags| space.start("grape", &flags));
        for grape in &mut grapes {
            grape.says("connected to the grape").await;
        }
        let mut client1 = space.start_node(&["src/server.js", "client1", "1337"]);
        let mut client2 = space.start_node(&["src/server.js", "client2", "1338"]);
        let unsigned = ["--bootstrap", "127.0.0.1:20002", "--to", "client1", "hello"];
        let signed = ["--name", "ann", "--to", "client2", "hello"];
        for (server, name, arguments) in [
            (&mut client1, "client1", &unsigned[..]),
            (&mut client2, "client2", &signed[..]),
        ] {
            let run = space.chat_once_announced(arguments).await;
            let done = (run.code, &*run.stdout);
            assert_eq!(done, (Some(0), "Echo: hello\n"), "{run:?}");
            let received = format!("Received message from {name}: hello");
            assert_eq!(server.line().await, received);
        }

        let mut peer = space.start("peer", &["client3", "--bootstrap", "127.0.0.1:20002"]);
        assert_eq!(peer.line().await, "announced client3");
        let mut ann = space.start("chat", &["--name", "ann"]);
        ann.says("announced ann").await;
        let mut client = space.start_node(&["src/client.js"]);
        for (receiver, name) in [
            (&mut client1, "client1"),
            (&mut peer, "client3"),
            (&mut ann, "ann"),
        ] {
            send(&mut client, name, "from the seed").await;
            assert!(receiver.line().await.ends_with(": from the seed"), "{name}");
        }
        client.types("exit").await;
        assert_eq!(client.end().await.code(), Some(0));
    })
    .await;
}

#[tokio::test]
async fn the_seeds_own_test_passes_on_our_grapes() {
    let Some(seed) = seed() else { return };
    in_time(async {
        // It leaves its grapes behind, which end with its own processes.
        let mut command = Command::new("unshare");
        let script = "ip link set lo up && exec node_modules/.bin/jest --forceExit \"$1\"";
        command
            .args([
                "--map-root-user",
                "--net",
                "--pid",
                "--fork",
                "--kill-child",
            ])
            .args(["sh", "-c", script, "sh", "tests/grape.integration.test.js"])
            .current_dir(seed)
            .stdin(Stdio::null());
        let grape = path("grape");
        let paths = std::env::var_os("PATH").unwrap();
        let paths = std::iter::once(grape.parent().unwrap().to_owned())
            .chain(std::env::split_paths(&paths));
        command.env("PATH", std::env::join_paths(paths).unwrap());
        let run = run_other(command).await;
        assert_eq!(run.code, Some(0), "{run:?}");
        assert!(
            run.stderr.contains("Tests:       1 passed, 1 total"),
            "{run:?}"
        );
    })
    .await;
}
