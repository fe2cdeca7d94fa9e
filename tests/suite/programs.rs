//! The programs as processes: what a person sees, the exit codes, signals, lost grapes and peers.

mod delivery;
mod scripts;
mod terminal;

use std::net::{SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use grapevine::limits::{Bounds, Limits};
use grapevine::{Identity, Multiaddr, Node, Role, Service};
use rustix::process::Signal;
use tokio::process::Command;

use crate::http;
use crate::process::{Program, Run, in_time, key_file, path, run, run_from, run_into};

/// Nobody listens there: the port takes privileges.
const NOBODY: &str = "/ip4/127.0.0.1/tcp/1";

/// A grape on any free port of this machine.
async fn grape(arguments: &[&str]) -> Program {
    grape_at("/ip4/127.0.0.1/tcp/0", arguments).await
}

async fn grape_at(listen: &str, arguments: &[&str]) -> Program {
    let mut grape = Program::start("grape", &[&["--listen", listen], arguments].concat());
    let heading = grape.line().await;
    let is_heading = heading.starts_with("Grape 12D3KooW") && heading.ends_with(" listens on:");
    assert!(is_heading, "{heading}");
    grape.address = grape.line().await;
    assert!(grape.address.contains("/p2p/12D3KooW"), "{}", grape.address);
    grape
}

/// A peer that has announced its name at a grape.
async fn peer(name: &str, grape: &Program) -> Program {
    let mut peer = peer_by(name, &grape.address);
    assert_eq!(peer.line().await, format!("announced {name}"));
    peer
}

fn peer_by(name: &str, bootstrap: &str) -> Program {
    let listen = "/ip4/127.0.0.1/tcp/0";
    Program::start(
        "peer",
        &[name, "--listen", listen, "--bootstrap", bootstrap],
    )
}

/// One message by a grape.
async fn send(grape: &Program, name: &str, text: &str) -> Run {
    run("chat", &["--bootstrap", &grape.address, "--to", name, text]).await
}

/// A message that was shown, behind the time when it came.
#[track_caller]
fn message(line: &str) -> String {
    let (time, message) = line.split_once(' ').unwrap();
    let is_time = time.len() == "2026-11-27T21:04:05+00:00".len() && time.contains('T');
    assert!(is_time, "{line}");
    message.into()
}

/// An id as the programs show it.
fn short(id: &str) -> String {
    format!("12D3..{}", &id[id.len() - 8..])
}

/// What `chat` says of a name that nobody announces.
fn nobody(name: &str) -> String {
    format!(
        "error: nobody announces {name}: check the name; its peer must be running, and use a grape of \
         the same network\n"
    )
}

/// A conversation by a grape, through pipes.
fn conversation(bootstrap: &str) -> Program {
    Program::start("chat", &["--bootstrap", bootstrap])
}

/// An address on a port that is free now: two grapes that name each other need to know theirs.
fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!(
        "/ip4/127.0.0.1/tcp/{}",
        listener.local_addr().unwrap().port()
    )
}

/// Accepts connections and never says a word. Returns its address.
fn mute() -> (tokio::net::TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    (listener, format!("/ip4/127.0.0.1/tcp/{port}"))
}

/// A node in this process, so that a test decides when and how it answers.
async fn node(grape: &Program) -> Node {
    let listen: Multiaddr = "/ip4/127.0.0.1/tcp/0".parse().unwrap();
    let bootstrap: Multiaddr = grape.address.parse().unwrap();
    let node = Node::builder(Role::Peer)
        .listen([listen])
        .bootstrap([bootstrap]);
    node.spawn().await.unwrap()
}

async fn service(node: &Node, name: &str) -> Service {
    node.announce(&name.parse().unwrap()).await.unwrap()
}

#[tokio::test]
async fn one_message_works_with_nothing_else_running() {
    in_time(async {
        for more in [&[][..], &["--name", "ann"], &["--all"], &["--timeout", "5"]] {
            let given = ["--default-grape", NOBODY, "--to", "echo", "hello"];
            let chat = run("chat", &[&given, more].concat()).await;
            assert_eq!(chat.stdout, "Echo: hello\n", "{chat:?}");
            assert_eq!(chat.code, Some(0));
            let lines = if more == ["--all"] { 2 } else { 1 };
            assert_eq!(chat.stderr.lines().count(), lines, "{chat:?}");
            assert!(
                chat.stderr
                    .starts_with("no grape at /ip4/127.0.0.1/tcp/1: started one inside")
            );
        }
    })
    .await;
}

/// The first command of the README, where this stands in for the grape on this machine.
async fn first_command(grape: &str) -> Run {
    run("chat", &["--default-grape", grape, "--to", "echo", "hello"]).await
}

#[tokio::test]
async fn the_first_command_has_its_echo_whatever_runs() {
    in_time(async {
        let bare = grape(&[]).await;
        let stranger = Identity::generate().peer_id().to_string();
        let closed = grape(&["--allow", &stranger]).await;
        let stopped = grape(&[]).await;
        stopped.signal(Signal::STOP);
        let deserted = grape(&[]).await;
        let mut killed = peer("echo", &deserted).await;
        killed.signal(Signal::KILL);
        killed.end().await;
        let (_listener, mute) = mute();
        let table = [
            (&bare.address, "nobody answers to \"echo\" at the grape at"),
            (&closed.address, "no answer from the grape at"),
            (&stopped.address, "no answer from the grape at"),
            (
                &deserted.address,
                "nobody answers to \"echo\" at the grape at",
            ),
            (&mute, "no answer from the grape at"),
        ];
        for (address, says) in table {
            let chat = first_command(address).await;
            assert_eq!(
                (chat.code, &*chat.stdout),
                (Some(0), "Echo: hello\n"),
                "{chat:?}"
            );
            assert!(
                chat.stderr.contains(&format!("{says} {address}")),
                "{chat:?}"
            );
        }
        stopped.signal(Signal::CONT);
        // One does not stand in another's way.
        let many = (0..8).map(|_| first_command(&bare.address));
        for chat in futures::future::join_all(many).await {
            assert_eq!(
                (chat.code, &*chat.stdout),
                (Some(0), "Echo: hello\n"),
                "{chat:?}"
            );
        }
        // Whoever has the name answers to it.
        let mut owner = peer("echo", &bare).await;
        let chat = first_command(&bare.address).await;
        assert_eq!(
            (chat.code, &*chat.stdout, &*chat.stderr),
            (Some(0), "Echo: hello\n", "")
        );
        assert!(owner.line().await.ends_with(": hello"));
        // Where a grape is named, so is who is meant.
        let other = grape(&[]).await;
        send(&other, "echo", "hello")
            .await
            .fails(3, &nobody("echo"));
    })
    .await;
}

#[tokio::test]
async fn without_a_grape_nobody_but_echo_can_be_written_to() {
    in_time(async {
        let says = "error: no grape at /ip4/127.0.0.1/tcp/1: start one with \"grape\", or use \
                    --bootstrap\n";
        for given in [&["--to", "client1", "hello"][..], &["--to", "client1"], &[]] {
            let given = [&["--default-grape", NOBODY], given].concat();
            run("chat", &given).await.fails(4, says);
        }
        let (_listener, address) = mute();
        let given = ["--default-grape", &address, "--to", "client1", "hello"];
        let chat = run("chat", &given).await;
        let says = format!(
            "error: no answer from the grape at {address}: restart it, or use --bootstrap\n"
        );
        assert_eq!((chat.code, &*chat.stdout), (Some(4), ""), "{chat:?}");
        assert!(chat.stderr.ends_with(&says), "{chat:?}");
    })
    .await;
}

#[tokio::test]
async fn who_wants_to_be_found_without_a_terminal_waits_for_the_grape() {
    in_time(async {
        let listen = free_address();
        let mut ann = Program::start("chat", &["--default-grape", &listen, "--name", "ann"]);
        ann.says(&format!(
            "waiting for the grape at {listen}: nobody listens there"
        ))
        .await;
        let grape = grape_at(&listen, &[]).await;
        ann.says("announced ann").await;
        assert_eq!(send(&grape, "ann", "hello").await.code, Some(0));
    })
    .await;
}

#[tokio::test]
async fn a_grape_that_is_found_is_used_as_it_is() {
    in_time(async {
        let grape = grape(&[]).await;
        let given = [
            "--default-grape",
            &grape.address,
            "--to",
            "client1",
            "hello",
        ];
        let chat = run("chat", &given).await;
        chat.fails(3, &nobody("client1"));
        let _peer = peer("client1", &grape).await;
        assert_eq!(run("chat", &given).await.stdout, "Echo: hello\n");
    })
    .await;
}

#[tokio::test]
async fn peers_of_either_grape_are_reached_by_either_grape() {
    in_time(async {
        for swapped in [false, true] {
            let (one, two) = (free_address(), free_address());
            let (first, second) = if swapped { (&two, &one) } else { (&one, &two) };
            let mut grapes = [
                grape_at(first, &["--bootstrap", second]).await,
                grape_at(second, &["--bootstrap", first]).await,
            ];
            for grape in &mut grapes {
                grape.says("connected to the grape 12D3..").await;
            }
            let mut client1 = peer("client1", &grapes[0]).await;
            let mut client2 = peer("client2", &grapes[1]).await;
            for grape in &grapes {
                for (name, peer) in [("client1", &mut client1), ("client2", &mut client2)] {
                    let chat = send(grape, name, "hello").await;
                    assert_eq!(
                        (chat.code, &*chat.stdout),
                        (Some(0), "Echo: hello\n"),
                        "{chat:?}"
                    );
                    let printed = message(&peer.line().await);
                    assert!(printed.starts_with("12D3..") && printed.ends_with(": hello"));
                }
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_conversation_through_pipes_has_replies_alone_on_stdout() {
    in_time(async {
        let grape = grape(&[]).await;
        let _client1 = peer("client1", &grape).await;
        let _client2 = peer("client2", &grape).await;
        let mut chat = conversation(&grape.address);
        chat.says("empty line: another name; exit: leave").await;
        chat.types("client1").await;
        chat.says("client1: 1 provider: 12D3..").await;
        for line in ["hello", "again", "", "client2", "and you"] {
            chat.types(line).await;
        }
        for reply in ["Echo: hello", "Echo: again", "Echo: and you"] {
            assert_eq!(chat.line().await, reply);
        }
        chat.types("exit").await;
        assert_eq!(chat.end().await.code(), Some(0));
        let mut chat = conversation(&grape.address);
        chat.closes_input();
        assert_eq!(chat.end().await.code(), Some(0));
    })
    .await;
}

#[tokio::test]
async fn a_script_sends_nobody_else_what_was_meant_for_a_name_that_failed() {
    in_time(async {
        let grape = grape(&[]).await;
        let _client1 = peer("client1", &grape).await;
        let mut chat = conversation(&grape.address);
        let failing = ["nobody", "client1", "lost", "", "two words", "lost", ""];
        for line in failing.into_iter().chain(["client1", "hello"]) {
            chat.types(line).await;
        }
        chat.says("error: line 1: nobody announces nobody").await;
        chat.says("error: line 5: the name has white space at byte 3")
            .await;
        assert_eq!(chat.line().await, "Echo: hello");
        chat.closes_input();
        assert_eq!(chat.end().await.code(), Some(3), "of the first failure");
        assert_eq!(chat.output().await, "");
        let mut chat = conversation(&grape.address);
        for line in ["two words", "lost", "exit", "client1", "late"] {
            chat.types(line).await;
        }
        assert_eq!(chat.end().await.code(), Some(2));
        assert_eq!(chat.output().await, "");
    })
    .await;
}

#[tokio::test]
async fn a_script_is_not_read_on_behind_a_message_that_failed() {
    in_time(async {
        let grape = grape(&[]).await;
        let _client1 = peer("client1", &grape).await;
        let odd = node(&grape).await;
        let refusing = service(&odd, "refusing").await;
        tokio::spawn(refusing.serve(|request| async move { request.fail("not today") }));
        let too_long = vec![b'x'; (64 << 10) + 1];
        let table: [(&[u8], &[u8], i32, &str); 3] = [
            (b"refusing", b"hello", 7, "line 2: 12D3Koo"),
            (
                b"client1",
                b"caf\xe9",
                2,
                "line 2: not UTF-8: convert the input first",
            ),
            (b"client1", &too_long, 2, "line 2: more than 65536 bytes"),
        ];
        for (name, fails, code, says) in table {
            let mut chat = conversation(&grape.address);
            let more: [&[u8]; 6] = [
                b"lost",
                b"caf\xe9",
                b"",
                b"client1\r",
                b"hello\r",
                b"nobody",
            ];
            for line in [name, fails].into_iter().chain(more) {
                chat.types(line).await;
            }
            chat.closes_input();
            chat.says_of("error: ", says).await;
            assert_eq!(chat.end().await.code(), Some(code), "of the first failure");
            assert_eq!(chat.output().await, "Echo: hello\nEcho: nobody\n");
        }
        let mut chat = conversation(&grape.address);
        for line in [
            &b"caf\xe9"[..],
            b"client1",
            b"lost",
            b"",
            b"client1",
            b"hello",
        ] {
            chat.types(line).await;
        }
        chat.closes_input();
        assert_eq!(chat.end().await.code(), Some(2));
        assert_eq!(chat.output().await, "Echo: hello\n");
    })
    .await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn input_without_an_end_of_line_does_not_fill_the_memory() {
    in_time(async {
        let grape = grape(&[]).await;
        let _client1 = peer("client1", &grape).await;
        let mut chat = conversation(&grape.address);
        chat.types("client1").await;
        // More than the program may take in all.
        for line in [
            "x".repeat(256 << 20),
            "".into(),
            "client1".into(),
            "hello".into(),
        ] {
            chat.types(line).await;
        }
        assert_eq!(chat.line().await, "Echo: hello");
        let status = std::fs::read_to_string(format!("/proc/{}/status", chat.id())).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let peak: u64 = peak
            .unwrap()
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .unwrap();
        assert!(peak < 128 << 10, "{peak} kB");
        chat.closes_input();
        assert_eq!(chat.end().await.code(), Some(2));
    })
    .await;
}

#[tokio::test]
async fn a_letter_goes_to_one_name_whatever_is_in_it() {
    in_time(async {
        let grape = grape(&[]).await;
        let _client1 = peer("client1", &grape).await;
        let _client2 = peer("client2", &grape).await;
        let to_client1 = ["--bootstrap", &grape.address, "--to", "client1"];
        let mut chat = Program::start("chat", &to_client1);
        for line in ["Dear client1", "", "  ", "client2", "exit", "yours"] {
            chat.types(line).await;
        }
        chat.closes_input();
        assert_eq!(
            chat.output().await,
            "Echo: Dear client1\nEcho: client2\nEcho: exit\nEcho: yours\n"
        );
        assert_eq!(chat.end().await.code(), Some(0));
        let mut chat = Program::start("chat", &to_client1);
        for line in [&b"hello"[..], b"caf\xe9", b"", b"lost"] {
            chat.types(line).await;
        }
        assert_eq!(chat.output().await, "Echo: hello\n");
        assert_eq!(chat.end().await.code(), Some(2), "at the line that failed");
    })
    .await;
}

#[tokio::test]
async fn a_message_shows_its_sender_and_nothing_that_a_terminal_obeys() {
    in_time(async {
        let grape = grape(&[]).await;
        let mut peer = peer("client1", &grape).await;
        let by = ["--bootstrap", &grape.address, "--to", "client1"];
        let signed = run(
            "chat",
            &[&by[..], &["--name", "ann", "hi \x1b[2J\nyou"]].concat(),
        )
        .await;
        assert_eq!(signed.stdout, "Echo: hi \u{fffd}[2J\n  you\n");
        let first = message(&peer.line().await);
        assert!(first.starts_with("ann (12D3.."), "{first}");
        assert!(first.ends_with("): hi \u{fffd}[2J"), "{first}");
        assert_eq!(peer.line().await, "  you");
    })
    .await;
}

#[tokio::test]
async fn people_see_each_others_messages() {
    in_time(async {
        let grape = grape(&[]).await;
        let mut ann = Program::start("chat", &["--bootstrap", &grape.address, "--name", "ann"]);
        ann.says("announced ann").await;
        let bob = [
            "--bootstrap",
            &grape.address,
            "--to",
            "ann",
            "--name",
            "bob",
            "hello",
        ];
        let chat = run("chat", &bob).await;
        assert_eq!((chat.code, &*chat.stdout), (Some(0), ""), "{chat:?}");
        assert!(chat.stderr.starts_with("delivered to 12D3.."), "{chat:?}");
        let printed = message(&ann.line().await);
        assert!(printed.starts_with("bob (12D3..") && printed.ends_with("): hello"));
        // Nor does a person echo what nobody in particular writes, in whatever form.
        let chat = send(&grape, "ann", "hello").await;
        assert_eq!((chat.code, &*chat.stdout), (Some(0), ""), "{chat:?}");
        let printed = message(&ann.line().await);
        assert!(printed.starts_with("12D3..") && printed.ends_with(": hello"));
        let other = node(&grape).await;
        let reply = other
            .request(&"ann".parse().unwrap(), "hello")
            .await
            .unwrap();
        assert_eq!(reply.text(), Ok(""));
        // As long as a message may be, and so without room for its echo.
        let mut client1 = peer("client1", &grape).await;
        let long = "x".repeat(64 << 10);
        let (chat, printed) = tokio::join!(send(&grape, "client1", &long), client1.line());
        assert!(printed.ends_with(&long));
        assert_eq!(chat.code, Some(0), "{chat:?}");
        assert!(chat.stderr.starts_with("delivered to 12D3.."), "{chat:?}");
    })
    .await;
}

#[tokio::test]
async fn who_has_a_name_and_no_input_receives_until_a_signal() {
    in_time(async {
        let mut grape = grape(&[]).await;
        let by = ["--bootstrap", &grape.address, "--name", "ann"];
        for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
            let mut ann = Program::start("chat", &by);
            ann.closes_input();
            ann.says_both("no input: receiving until a signal", "announced ann")
                .await;
            send(&grape, "ann", "hello").await;
            assert!(ann.line().await.ends_with(": hello"));
            ann.ends_on(signal, 0).await;
        }
        // With a script, or somebody to write to, it has done what it was for.
        let _client1 = peer("client1", &grape).await;
        let mut ann = Program::start("chat", &by);
        ann.types("client1").await;
        ann.closes_input();
        assert_eq!(ann.end().await.code(), Some(0));
        let chat = run("chat", &[&by[..], &["--to", "client1"]].concat()).await;
        assert_eq!(chat.code, Some(0), "{chat:?}");
        assert!(!chat.stderr.contains("error"), "{chat:?}");
        // Where it can never be announced, there is nothing to wait for.
        let own = free_address();
        let own = ["--listen", &own, "--bootstrap", &own, "--name", "ann"];
        let chat = run("chat", &own).await;
        assert_eq!(chat.code, Some(4), "{chat:?}");
        grape.ends_on(Signal::TERM, 0).await;
    })
    .await;
}

#[tokio::test]
async fn who_writes_to_themselves_is_told_so() {
    in_time(async {
        let grape = grape(&[]).await;
        let by = ["--bootstrap", &grape.address, "--name", "ann"];
        let mut ann = Program::start("chat", &by);
        ann.says("announced ann").await;
        ann.types("ann").await;
        ann.says("error: line 1: only you announce ann").await;
        // Another of that name is somebody to talk to.
        let _other = peer("ann", &grape).await;
        for line in ["", "ann", "hello"] {
            ann.types(line).await;
        }
        ann.closes_input();
        assert_eq!(ann.output().await, "Echo: hello\n");
        assert_eq!(ann.end().await.code(), Some(3));
    })
    .await;
}

#[tokio::test]
async fn input_that_cannot_be_read_is_a_failure() {
    in_time(async {
        let grape = grape(&[]).await;
        let _client1 = peer("client1", &grape).await;
        for more in [&["--to", "client1"][..], &["--name", "ann"], &[]] {
            let folder = std::fs::File::open("/").unwrap();
            let given = [&["--bootstrap", &grape.address], more].concat();
            let chat = run_from(folder, "chat", &given).await;
            assert_eq!((chat.code, &*chat.stdout), (Some(1), ""), "{chat:?}");
            let says = "error: cannot read standard input: Is a directory";
            assert!(chat.stderr.contains(says), "{chat:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn all_providers_of_a_name_can_be_asked() {
    in_time(async {
        let grape = grape(&[]).await;
        let _one = peer("client1", &grape).await;
        let _other = peer("client1", &grape).await;
        let by = ["--bootstrap", &grape.address, "--to", "client1"];
        let all = [&by[..], &["--all", "hello"]].concat();
        let chat = run("chat", &all).await;
        assert_eq!(chat.code, Some(0), "{chat:?}");
        assert_eq!(chat.stdout, "Echo: hello\nEcho: hello\n", "{chat:?}");
        let who: Vec<_> = chat.stderr.lines().collect();
        let says_who = |line: &str| line.starts_with("12D3..") && line.ends_with(" answers:");
        assert!(who.len() == 2 && who[0] != who[1], "{chat:?}");
        assert!(who.iter().all(|line| says_who(line)), "{chat:?}");
        let mut chat = conversation(&grape.address);
        chat.types("client1").await;
        chat.says("client1: 2 providers: 12D3..").await;
    })
    .await;
}

#[tokio::test]
async fn a_provider_that_fails_to_answer_is_not_left_out_in_silence() {
    in_time(async {
        let grape = grape(&[]).await;
        let _one = peer("client1", &grape).await;
        let odd = node(&grape).await;
        let refusing = service(&odd, "client1").await;
        tokio::spawn(refusing.serve(|request| async move { request.fail("not today") }));
        let by = ["--bootstrap", &grape.address, "--to", "client1"];
        let chat = run("chat", &[&by[..], &["--all", "hello"]].concat()).await;
        assert_eq!((chat.code, &*chat.stdout), (Some(7), "Echo: hello\n"));
        let id = odd.peer_id();
        let says = format!(
            " answers:\nerror: {id} answered: handler-failed: not today\n\
             error: 1 of 2 providers of client1 failed\n"
        );
        assert!(chat.stderr.ends_with(&says), "{chat:?}");
    })
    .await;
}

/// A peer's process stands still, as one that is swapped out or behind a bad line: its connections
/// open and nothing answers.
#[tokio::test]
async fn all_providers_that_are_named_are_waited_for() {
    in_time(async {
        let grape = grape(&[]).await;
        let _one = peer("client1", &grape).await;
        let slow = peer("client1", &grape).await;
        let all = ["--to", "client1", "--all", "--timeout", "30", "hello"];
        slow.signal(Signal::STOP);
        let by = ["--bootstrap", &grape.address];
        let mut chat = Program::start("chat", &[&by[..], &all].concat());
        assert_eq!(chat.line().await, "Echo: hello");
        // Longer than a lookup waits for who wants some.
        chat.says("no answer from client1 yet").await;
        slow.signal(Signal::CONT);
        assert_eq!(chat.output().await, "Echo: hello\n");
        assert_eq!(chat.end().await.code(), Some(0));
    })
    .await;
}

#[tokio::test]
async fn a_provider_that_is_named_and_not_reached_is_reported_as_a_failure() {
    in_time(async {
        let grape = grape(&[]).await;
        let _one = peer("client1", &grape).await;
        let mut gone = peer("client1", &grape).await;
        let all = ["--to", "client1", "--all", "--timeout", "2", "hello"];
        let by = ["--bootstrap", &grape.address];
        for signal in [Signal::STOP, Signal::KILL] {
            gone.signal(signal);
            if signal == Signal::KILL {
                gone.end().await;
            }
            let chat = run("chat", &[&by[..], &all].concat()).await;
            let done = (chat.code, &*chat.stdout);
            assert_eq!(done, (Some(4), "Echo: hello\n"), "{signal:?}: {chat:?}");
            let says = "is named for client1, and does not answer: it may have just stopped; \
                        --timeout waits longer\nerror: 1 of 2 providers of client1 failed\n";
            assert!(chat.stderr.ends_with(says), "{signal:?}: {chat:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn the_id_of_a_grape_is_learned_or_checked() {
    in_time(async {
        let grape = grape(&[]).await;
        let (bare, id) = grape.address.split_once("/p2p/").unwrap();
        for right in [bare, &grape.address] {
            let mut peer = peer_by("client1", right);
            assert_eq!(peer.line().await, "announced client1");
        }
        let other = Identity::generate().peer_id().to_string();
        let wrong = format!("{bare}/p2p/{other}");
        let refused = format!(
            "{wrong}: expected the node {other}, but {id} answers there; correct the /p2p/ part\n"
        );
        run("peer", &["client1", "--bootstrap", &wrong])
            .await
            .fails(1, &format!("error: no grape to announce at: {refused}"));
        run("chat", &["--bootstrap", &wrong, "--to", "client1", "hello"])
            .await
            .fails(4, &format!("error: no grape to ask: {refused}"));
        let mut second = grape_at("/ip4/127.0.0.1/tcp/0", &["--bootstrap", &wrong]).await;
        second
            .says(&format!("cannot join by {}", refused.trim()))
            .await;
        let own = free_address();
        let refused = format!(
            "{own}: this is the node's own address, or another node has a copy of its key\n"
        );
        run("peer", &["client1", "--listen", &own, "--bootstrap", &own])
            .await
            .fails(1, &format!("error: no grape to announce at: {refused}"));
    })
    .await;
}

#[tokio::test]
async fn a_restarted_grape_keeps_its_id_and_gets_its_names_back() {
    in_time(async {
        let folder = tempfile::tempdir().unwrap();
        let key = key_file(&folder);
        let more = ["--identity", &*key, "--lease", "3"];
        let mut first = grape(&more).await;
        let mut peer = peer("client1", &first).await;
        peer.says("connected to the grape").await;
        let address = first.address.clone();
        first.signal(Signal::KILL);
        first.end().await;
        peer.says("lost the grape").await;
        let (listen, _) = address.split_once("/p2p/").unwrap();
        let second = grape_at(listen, &more).await;
        assert_eq!(second.address, address);
        peer.says("connected to the grape").await;
        while send(&second, "client1", "hello").await.code != Some(0) {}
    })
    .await;
}

#[tokio::test]
async fn two_programs_with_copies_of_one_key_say_so() {
    in_time(async {
        let grape = grape(&[]).await;
        let folders = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let keys = folders.each_ref().map(key_file);
        Identity::load_or_generate(&keys[0]).unwrap();
        std::fs::copy(&keys[0], &keys[1]).unwrap();
        let by = |key| ["--bootstrap", &grape.address, "--identity", key];
        let mut peer = Program::start("peer", &[&["client1"], &by(&keys[0])[..]].concat());
        let mut chat = Program::start("chat", &[&["--name", "ann"], &by(&keys[1])[..]].concat());
        for program in [&mut peer, &mut chat] {
            program
                .says_of("the identity ", "is used by another program too")
                .await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_key_file_is_used_by_one_running_program() {
    use std::os::unix::fs::PermissionsExt;

    in_time(async {
        let folder = tempfile::tempdir().unwrap();
        let key = key_file(&folder);
        let with_key = ["--identity", &*key];
        let taken = format!(
            "error: --identity: {key} is used by another running program: stop that one, or give each \
             a file of its own\n"
        );
        for mode in [0o600, 0o400] {
            let mut grape = grape(&with_key).await;
            for (program, more) in [
                ("grape", &["--listen", "/ip4/127.0.0.1/tcp/0"][..]),
                ("peer", &["client1"]),
                ("chat", &["--name", "ann"]),
                ("chat", &["--to", "client1", "hello"]),
            ] {
                let given = [&with_key[..], more].concat();
                run(program, &given).await.fails(2, &taken);
            }
            grape.signal(Signal::KILL);
            grape.end().await;
            // It is free again, and may be read-only.
            std::fs::set_permissions(&key, PermissionsExt::from_mode(mode)).unwrap();
            let echo = ["--default-grape", NOBODY, "--to", "echo", "hello"];
            let chat = run("chat", &[&with_key[..], &echo].concat()).await;
            assert_eq!(chat.stdout, "Echo: hello\n", "{chat:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_peer_waits_for_its_grape_and_says_so() {
    in_time(async {
        let listen = free_address();
        let mut peer = peer_by("client1", &listen);
        let waiting = format!("waiting for the grape at {listen}: nobody listens there");
        peer.says(&waiting).await;
        let grape = grape_at(&listen, &[]).await;
        assert_eq!(peer.line().await, "announced client1");
        assert_eq!(
            send(&grape, "client1", "hello").await.stdout,
            "Echo: hello\n"
        );
    })
    .await;
}

#[tokio::test]
async fn a_peer_says_that_its_grape_takes_no_name() {
    in_time(async {
        let full = Limits {
            store: Bounds {
                records: 0,
                ..Bounds::default()
            },
            ..Limits::default()
        };
        let listen: Multiaddr = "/ip4/127.0.0.1/tcp/0".parse().unwrap();
        let grape = Node::builder(Role::Grape).limits(full).listen([listen]);
        let grape = grape.spawn().await.unwrap();
        let mut peer = peer_by("client1", &grape.addresses()[0].to_string());
        peer.says("connected to the grape").await;
        peer.says("no grape has taken client1 yet").await;
        peer.ends_on(Signal::INT, 0).await;
    })
    .await;
}

#[tokio::test]
async fn a_killed_peer_is_never_reached_and_forgotten_within_its_lease() {
    in_time(async {
        let lease = Duration::from_secs(3);
        let grape = grape(&["--lease", "3"]).await;
        let mut peer = peer("client1", &grape).await;
        peer.signal(Signal::KILL);
        peer.end().await;
        let killed = Instant::now();
        loop {
            let asked = killed.elapsed();
            let chat = send(&grape, "client1", "hello").await;
            assert_eq!(chat.stdout, "");
            if chat.code == Some(3) {
                break;
            }
            assert_eq!(chat.code, Some(4), "{chat:?}");
            assert!(asked < lease, "still announced after {asked:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_killed_peer_is_told_from_one_that_does_not_answer_also_over_quic() {
    in_time(async {
        let grape = grape(&[]).await;
        let tcp = "/ip4/127.0.0.1/tcp/0";
        let quic = "/ip4/127.0.0.1/udp/0/quic-v1";
        let listen = ["--listen", tcp, "--listen", quic];
        let bootstrap = ["--bootstrap", &grape.address];
        let given = [&["client1"][..], &listen, &bootstrap].concat();
        let mut peer = Program::start("peer", &given);
        assert_eq!(peer.line().await, "announced client1");
        peer.signal(Signal::KILL);
        peer.end().await;
        let chat = send(&grape, "client1", "hello").await;
        // QUIC does not refuse, so that the person has been told of the wait before.
        let says = "error: client1 is announced by 1 peer, but none can be reached: it may have just \
                    stopped, or a firewall is in the way\n";
        assert_eq!((chat.code, &*chat.stdout), (Some(4), ""), "{chat:?}");
        assert!(chat.stderr.ends_with(says), "{chat:?}");
    })
    .await;
}

#[tokio::test]
async fn a_program_started_to_outlive_its_terminal_does() {
    in_time(async {
        let listen = ["--listen", "/ip4/127.0.0.1/tcp/0"];
        let mut nohup = Command::new("nohup");
        nohup.arg(path("grape")).args(listen);
        let mut grape = Program::start_other("grape", nohup);
        assert!(grape.line().await.starts_with("Grape 12D3KooW"));
        grape.address = grape.line().await;
        grape.signal(Signal::HUP);
        let _peer = peer("client1", &grape).await;
        grape.ends_on(Signal::TERM, 0).await;
    })
    .await;
}

#[tokio::test]
async fn a_message_may_be_several_words() {
    in_time(async {
        let grape = grape(&[]).await;
        let _peer = peer("client1", &grape).await;
        let given = ["--bootstrap", &grape.address, "--to", "client1"];
        let chat = run("chat", &[&given[..], &["hello", "world"]].concat()).await;
        assert_eq!(chat.stdout, "Echo: hello world\n");
    })
    .await;
}

#[tokio::test]
async fn a_stopped_peer_takes_its_name_back_at_once() {
    in_time(async {
        let grape = grape(&[]).await;
        for signal in [Signal::TERM, Signal::INT] {
            let mut peer = peer("client1", &grape).await;
            peer.signal(signal);
            assert_eq!(peer.end().await.code(), Some(0));
            let stopped = Instant::now();
            loop {
                let asked = stopped.elapsed();
                if send(&grape, "client1", "hello").await.code == Some(3) {
                    break;
                }
                assert!(asked < Duration::from_secs(2), "after {asked:?}");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn names_outlive_the_grape_they_were_announced_at() {
    in_time(async {
        let folder = tempfile::tempdir().unwrap();
        let key = key_file(&folder);
        let id = Identity::load_or_generate(&key).unwrap().peer_id();
        // Whom the first one does not talk to can have an answer from the second one only.
        let mut one = grape(&["--lease", "3", "--block", &id.to_string()]).await;
        let more = ["--lease", "3", "--bootstrap", &one.address];
        let mut two = grape(&more).await;
        two.says("connected to the grape").await;
        let _peer = peer("client1", &one).await;
        let by = ["--bootstrap", &two.address, "--identity", &key];
        let send = async || run("chat", &[&by[..], &["--to", "client1", "hello"]].concat()).await;
        while send().await.code != Some(0) {}
        one.signal(Signal::KILL);
        one.end().await;
        let chat = send().await;
        assert_eq!(chat.stdout, "Echo: hello\n", "{chat:?}");
    })
    .await;
}

#[tokio::test]
async fn grapes_are_started_as_those_of_grenache() {
    in_time(async {
        let port = |address: String| address.rsplit('/').next().unwrap().to_owned();
        let ports = [port(free_address()), port(free_address())];
        let bootstrap = ports.each_ref().map(|port| format!("127.0.0.1:{port}"));
        let start = |own: usize, more: &[&str]| {
            let other = &bootstrap[1 - own];
            let flags = ["--dp", &ports[own], "--aph", "0", "-b", "127.0.0.1"];
            Program::start("grape", &[&flags[..], &["--bn", other], more].concat())
        };
        // As the programs that stand on Grenache start them, and with all that it takes.
        let mut named_twice = Program::start(
            "grape",
            &[
                "grape",
                "--dht_port",
                &ports[0],
                "--api_port=0",
                "--bind",
                "127.0.0.1",
                "--bootstrap",
                &bootstrap.join(", "),
            ],
        );
        let mut tuned = start(
            1,
            &[
                "--dc",
                "32",
                "--dht_maxTables",
                "5000",
                "--dht_peer_maxAge",
                "60000",
                "--check_maxPayloadSize",
                "4096",
            ],
        );
        tuned
            .says("without a meaning here: --dc, --dht_maxTables")
            .await;
        for (grape, port) in [(&mut named_twice, &ports[0]), (&mut tuned, &ports[1])] {
            grape.line().await;
            for kind in [format!("tcp/{port}"), format!("udp/{port}/quic-v1")] {
                let address = grape.line().await;
                let start = format!("/ip4/127.0.0.1/{kind}/p2p/");
                assert!(address.starts_with(&start), "{address}");
                grape.address = address;
            }
            let api = grape.line().await;
            assert!(api.starts_with("Grenache API: http://127.0.0.1:"), "{api}");
            let carrier = grape.line().await;
            let start = "Grenache callers reach other peers at: 127.0.0.1:";
            assert!(carrier.starts_with(start), "{carrier}");
            grape.says("connected to the grape").await;
        }
        let _peer = peer("client1", &named_twice).await;
        let sent = send(&tuned, "client1", "hello").await;
        assert_eq!(sent.stdout, "Echo: hello\n");
        for grape in [&mut named_twice, &mut tuned] {
            grape.ends_on(Signal::TERM, 0).await;
        }
    })
    .await;
}

#[tokio::test]
async fn one_address_with_a_port_listens_over_tcp_and_quic() {
    in_time(async {
        let mut grape = Program::start("grape", &["--listen", "127.0.0.1:0"]);
        grape.line().await;
        for (transport, end) in [("tcp", ""), ("udp", "/quic-v1")] {
            let address = grape.line().await;
            let start = format!("/ip4/127.0.0.1/{transport}/");
            let is_right = address.starts_with(&start) && address.contains(&format!("{end}/p2p/"));
            assert!(is_right, "{address}");
            grape.address = address;
            assert_eq!(send(&grape, "client1", "hello").await.code, Some(3));
        }
    })
    .await;
}

#[tokio::test]
async fn a_grape_prints_no_address_that_nobody_can_dial() {
    in_time(async {
        let any = ["-b", "0.0.0.0", "--metrics", "0.0.0.0:0"];
        let given = [&["--dp", "0", "--aph", "0"], &any[..]].concat();
        let mut grape = Program::start("grape", &given);
        let mut line = grape.line().await;
        for start in [
            "Grenache API: HTTP on port ",
            "Grenache callers reach other peers at: port ",
            "Metrics: /metrics over HTTP on port ",
        ] {
            while !line.starts_with(start) {
                line = grape.line().await;
            }
            assert!(line.ends_with(" of this machine"), "{line}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_port_that_nothing_will_listen_on_is_not_taken_in_silence() {
    in_time(async {
        let mut grape = grape(&["--carrier-port", "30002"]).await;
        grape
            .says("without a meaning here: --carrier-port; it goes with --aph")
            .await;
    })
    .await;
}

#[tokio::test]
async fn a_grape_tells_prometheus_what_it_does_and_keeps() {
    in_time(async {
        let mut grape = grape(&["--metrics", "127.0.0.1:0"]).await;
        let line = grape.line().await;
        let at = line.strip_prefix("Metrics: http://");
        let at = at.and_then(|at| at.strip_suffix("/metrics"));
        let at: SocketAddr = at.expect("where the metrics are").parse().unwrap();
        let mut peer = peer("client1", &grape).await;
        assert_eq!(
            send(&grape, "client1", "hello").await.stdout,
            "Echo: hello\n"
        );

        let metrics = http::send(at, "GET", "/metrics", "", b"").await;
        let text = metrics.text();
        assert_eq!(metrics.status, 200, "{text}");
        let is_there = |wanted: &str| text.lines().any(|line| line == wanted);
        let version = env!("CARGO_PKG_VERSION");
        for wanted in [
            format!("grapevine_build_info{{version=\"{version}\"}} 1").as_str(),
            "# TYPE grapevine_provider_records gauge",
            "grapevine_provider_records 1",
            "# TYPE grapevine_names_told counter",
            "grapevine_names_told_total 1",
            "grapevine_names_sought_total 1",
            "grapevine_records_refused_total 0",
            "# EOF",
        ] {
            assert!(is_there(wanted), "{wanted} in:\n{text}");
        }
        for (method, path, status) in [
            ("GET", "/healthz", 200),
            ("GET", "/", 404),
            ("POST", "/metrics", 405),
        ] {
            let answer = http::send(at, method, path, "", b"").await;
            assert_eq!(answer.status, status, "{method} {path}");
        }
        peer.ends_on(Signal::TERM, 0).await;
        grape.ends_on(Signal::TERM, 0).await;
    })
    .await;
}

#[tokio::test]
async fn a_signal_while_joining_ends_every_program() {
    in_time(async {
        for signal in [Signal::INT, Signal::TERM] {
            let interrupted: [(&str, &[&str], i32); 5] = [
                (
                    "grape",
                    &["--listen", "/ip4/127.0.0.1/tcp/0", "--bootstrap"],
                    0,
                ),
                ("peer", &["client1", "--bootstrap"], 0),
                ("chat", &["--default-grape"], 130),
                (
                    "chat",
                    &["--to", "client1", "hello", "--default-grape"],
                    130,
                ),
                ("chat", &["--to", "client1", "hello", "--bootstrap"], 130),
            ];
            for (name, arguments, code) in interrupted {
                let (listener, address) = mute();
                let mut program = Program::start(name, &[arguments, &[&address]].concat());
                let _dialled = listener.accept().await.unwrap();
                program.ends_on(signal, code).await;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_signal_while_idle_ends_every_program() {
    in_time(async {
        for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
            let mut grape = grape(&[]).await;
            let mut peer = peer("client1", &grape).await;
            let mut chat = conversation(&grape.address);
            chat.says("connected to the grape").await;
            chat.ends_on(signal, 130).await;
            for program in [&mut peer, &mut grape] {
                program.ends_on(signal, 0).await;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_signal_while_an_answer_is_awaited_ends_chat() {
    in_time(async {
        let mut grape = grape(&[]).await;
        let silent = node(&grape).await;
        let mut service = service(&silent, "silent").await;
        for signal in [Signal::INT, Signal::TERM] {
            let by = ["--bootstrap", &grape.address, "--to", "silent", "hello"];
            let mut once = Program::start("chat", &by);
            let _request = service.next().await.unwrap();
            once.ends_on(signal, 130).await;
            let mut chat = conversation(&grape.address);
            chat.types("silent").await;
            chat.types("hello").await;
            let _request = service.next().await.unwrap();
            chat.ends_on(signal, 130).await;
        }
        let by = ["--bootstrap", &grape.address, "--to", "silent", "hello"];
        let _once = Program::start("chat", &by);
        let _request = service.next().await.unwrap();
        grape.ends_on(Signal::TERM, 0).await;
    })
    .await;
}

#[tokio::test]
async fn a_person_is_told_that_an_answer_is_late() {
    in_time(async {
        let grape = grape(&[]).await;
        let slow = node(&grape).await;
        let mut service = service(&slow, "slow").await;
        let by = ["--bootstrap", &grape.address, "--to", "slow", "hello"];
        let mut once = Program::start("chat", &by);
        let request = service.next().await.unwrap();
        once.says("no answer from slow yet; Ctrl-C: leave").await;
        request.reply("at last");
        assert_eq!(once.line().await, "at last");
        let mut chat = conversation(&grape.address);
        chat.types("slow").await;
        chat.types("hello").await;
        let request = service.next().await.unwrap();
        chat.says("no answer from slow yet; Ctrl-C: leave").await;
        request.reply("at last");
        assert_eq!(chat.line().await, "at last");
    })
    .await;
}

#[tokio::test]
async fn one_message_takes_no_longer_than_it_may_also_where_the_grape_hangs() {
    in_time(async {
        let (_listener, address) = mute();
        for (flag, to) in [
            ("--default-grape", "client1"),
            ("--bootstrap", "echo"),
            ("--bootstrap", "client1"),
        ] {
            let waiting = format!("no answer from the grape at {address} yet; Ctrl-C: leave");
            let given = [flag, &address, "--to", to, "--timeout", "3", "hello"];
            let chat = run("chat", &given).await;
            assert_eq!((chat.code, &*chat.stdout), (Some(5), ""), "{chat:?}");
            let mut lines = chat.stderr.lines();
            assert_eq!(lines.next(), Some(&*waiting));
            let reason = lines.next().unwrap_or_default();
            assert!(reason.starts_with("error: "), "{chat:?}");
            assert!(reason.ends_with("; --timeout waits longer"), "{chat:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_signal_while_a_message_is_being_printed_ends_peer() {
    in_time(async {
        let grape = grape(&[]).await;
        let sender = node(&grape).await;
        for signal in [Signal::INT, Signal::TERM] {
            let mut peer = peer("client1", &grape).await;
            // Longer than a pipe holds, so that printing it takes until it is read: never.
            let long = "x".repeat(1 << 19);
            let name = "client1".parse().unwrap();
            let call = tokio::spawn({
                let sender = sender.clone();
                async move { sender.request(&name, long).await }
            });
            peer.begins_to_print().await;
            peer.ends_on(signal, 0).await;
            assert!(call.await.unwrap().is_err());
        }
    })
    .await;
}

#[tokio::test]
async fn a_peer_whose_messages_nobody_reads_ends_in_peace() {
    in_time(async {
        let grape = grape(&[]).await;
        let mut peer = peer("client1", &grape).await;
        peer.closes_output();
        let chat = send(&grape, "client1", "hello").await;
        assert_eq!(peer.end().await.code(), Some(0));
        assert_eq!((chat.code, &*chat.stdout), (Some(7), ""), "{chat:?}");
        let reason = "handler-failed: the message cannot be shown: ";
        assert!(chat.stderr.contains(reason), "{chat:?}");
    })
    .await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_reply_that_cannot_be_written_is_a_failure() {
    in_time(async {
        let full = std::fs::File::options().write(true).open("/dev/full");
        let given = ["--default-grape", NOBODY, "--to", "echo", "hello"];
        let chat = run_into(full.unwrap(), "chat", &given).await;
        assert_eq!(chat.code, Some(1), "{chat:?}");
        let reason = "error: cannot write to standard output: No space left on device";
        assert!(chat.stderr.contains(reason), "{chat:?}");
    })
    .await;
}

#[tokio::test]
async fn the_exit_code_says_what_went_wrong() {
    in_time(async {
        let grape = grape(&[]).await;
        let odd = node(&grape).await;
        let mut silent = service(&odd, "silent").await;
        tokio::spawn(async move {
            let mut held = Vec::new();
            while let Some(request) = silent.next().await {
                held.push(request);
            }
        });
        let refusing = service(&odd, "refusing").await;
        tokio::spawn(refusing.serve(|request| async move { request.fail("not\ntoday") }));
        let id = odd.peer_id();
        let table = [
            (
                "silent",
                5,
                "error: no reply from silent in time; the request may have run; --timeout waits longer\n"
                    .into(),
            ),
            (
                "refusing",
                7,
                format!("error: {id} answered: handler-failed: not today\n"),
            ),
            ("nobody", 3, nobody("nobody")),
        ];
        for (name, code, stderr) in table {
            let by = [
                "--bootstrap",
                &grape.address,
                "--timeout",
                "1",
                "--to",
                name,
                "hello",
            ];
            run("chat", &by).await.fails(code, &stderr);
            let chat = run("chat", &[&by[..], &["--all"]].concat()).await;
            chat.fails(code, &stderr);
        }
        run("chat", &["--bootstrap", NOBODY, "--to", "client1", "hello"])
            .await
            .fails(
                4,
                "error: no grape to ask: /ip4/127.0.0.1/tcp/1: nobody listens there: start a grape, or \
                 correct the address\n",
            );
        // A top-level domain that no resolver asks anybody about.
        let unknown = "/dns/grape.invalid/tcp/20001";
        run("chat", &["--bootstrap", unknown, "--to", "client1", "hi"])
            .await
            .fails(
                4,
                "error: no grape to ask: /dns/grape.invalid/tcp/20001: DNS knows no such host; \
                 correct its name or give its IP address\n",
            );
    })
    .await;
}

#[tokio::test]
async fn a_grape_keeps_out_whom_it_is_told_to() {
    in_time(async {
        let folder = tempfile::tempdir().unwrap();
        let key = key_file(&folder);
        let id = Identity::load_or_generate(&key)
            .unwrap()
            .peer_id()
            .to_string();
        for (refuses, flag) in [(true, "--block"), (false, "--allow")] {
            let grape = grape(&[flag, &id]).await;
            let by = ["--bootstrap", &grape.address];
            let (known, other) = (
                run(
                    "chat",
                    &[&by[..], &["--identity", &key, "--to", "x", "y"]].concat(),
                )
                .await,
                run("chat", &[&by[..], &["--to", "x", "y"]].concat()).await,
            );
            let (out, within) = if refuses {
                (known, other)
            } else {
                (other, known)
            };
            assert_eq!(within.code, Some(3), "{within:?}");
            assert_eq!(out.code, Some(4), "{out:?}");
        }
        let grape = grape(&["--block", &id]).await;
        let by = ["--bootstrap", &grape.address, "--identity", &key];
        let mut peer = Program::start("peer", &[&["client1"], &by[..]].concat());
        let reason = "it closes the connection at once; it may not let this node in";
        peer.says(&format!(
            "waiting for the grape at {}: {reason}",
            grape.address
        ))
        .await;
        peer.ends_on(Signal::TERM, 0).await;
        assert_eq!(peer.output().await, "", "nothing is announced");
    })
    .await;
}

#[tokio::test]
async fn wrong_usage_is_one_line_that_says_what_to_do() {
    in_time(async {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let (text, missing) = (path("text"), path("no/folder/key"));
        std::fs::write(&text, "not a key").unwrap();
        let folder_itself = path("");
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let taken = format!("/ip4/127.0.0.1/tcp/{port}");
        let (taken_port, free) = (port.to_string(), "/ip4/127.0.0.1/tcp/0");
        let long = "x".repeat(256);
        let table: &[(&str, &[&str], i32, &str)] = &[
            (
                "grape",
                &["--listen", "foo"],
                2,
                "\"foo\" is not an address to listen on: write it like /ip4/",
            ),
            (
                "grape",
                &["--listen", "/ip4/0.0.0.0"],
                2,
                "write it like /ip4/0.0.0.0/tcp/20001",
            ),
            (
                "grape",
                &["--listen", "/ip4/0.0.0.0/udp/1"],
                2,
                "is not an address to listen on: put /quic-v1 behind /udp/1",
            ),
            (
                "grape",
                &["--listen", "/ip4/0.0.0.0/tcp/65536"],
                2,
                "\"65536\" is not a port: give a whole number up to 65535",
            ),
            (
                "grape",
                &["--listen", "/ip4/0.0.0.256/tcp/1"],
                2,
                "\"0.0.0.256\" is no IPv4 address",
            ),
            (
                "grape",
                &["--listen", "localhost:20001"],
                2,
                "or 0.0.0.0:20001 for both",
            ),
            (
                "grape",
                &["--bootstrap", "127.0.0.1:70000"],
                2,
                "\"70000\" is not a port",
            ),
            (
                "grape",
                &["--bootstrap", "/ip4/127.0.0.1/tcp/20001/"],
                2,
                "is not the address of a grape: leave out the / at its end",
            ),
            (
                "grape",
                &["--bootstrap", "/ip4/127.0.0.1/tcp/20001/p2p/12D3Koo"],
                2,
                "what follows /p2p/ is no whole id: copy all of it",
            ),
            (
                "peer",
                &["x", "--bootstrap", "/ip4/0.0.0.0/tcp/20001"],
                2,
                "\"/ip4/0.0.0.0/tcp/20001\" is for listening; give the machine's own address",
            ),
            (
                "peer",
                &["x", "--bootstrap", "[::]:20001"],
                2,
                "is for listening; give the machine's own address",
            ),
            (
                "chat",
                &["--bootstrap", "127.0.0.1:0"],
                2,
                "port 0 in \"127.0.0.1:0\" is for listening; give the port that is listened on",
            ),
            (
                "peer",
                &["x", "--external", "/ip4/0.0.0.0/udp/1/quic-v1"],
                2,
                "is for listening; give the machine's own address",
            ),
            ("grape", &["--dp", "abc"], 2, "\"abc\" is not a port"),
            ("grape", &["--aph=-1"], 2, "\"-1\" is not a port"),
            (
                "grape",
                &["--check_maxPayloadSize", "much"],
                2,
                "\"much\" is not a number of bytes",
            ),
            (
                "grape",
                &["client1"],
                2,
                "a grape takes no name; \"peer client1\" announces one",
            ),
            (
                "grape",
                &["--bootstrap", "localhost"],
                2,
                "such as /ip4/127.0.0.1/tcp/20001",
            ),
            (
                "grape",
                &["--external", ""],
                2,
                "write it like /ip4/203.0.113.7/tcp/20001",
            ),
            (
                "grape",
                &["--lease", "2"],
                2,
                "\"2\" is not a whole number of seconds from 3 to 90",
            ),
            (
                "grape",
                &["--lease", "soon"],
                2,
                "\"soon\" is not a whole number of seconds",
            ),
            ("grape", &["--allow", "ann"], 2, "\"ann\" is not an id"),
            ("grape", &["--block", ""], 2, "\"\" is not an id"),
            ("grape", &["--identity", &text], 2, "is not a key file"),
            ("grape", &["--identity", &folder_itself], 2, "is not a file"),
            ("grape", &["--identity", &missing], 2, "create it first"),
            (
                "grape",
                &["--listen", &taken],
                1,
                "another program uses this port",
            ),
            (
                "grape",
                &["--listen", "/ip4/192.0.2.99/tcp/0"],
                1,
                "this machine has no such address",
            ),
            (
                "grape",
                &["--listen", free, "--aph", &taken_port],
                1,
                "another program uses this port",
            ),
            (
                "grape",
                &[
                    "--listen",
                    free,
                    "--metrics",
                    &format!("127.0.0.1:{taken_port}"),
                ],
                1,
                "another program uses this port",
            ),
            (
                "grape",
                &["--metrics", "9100"],
                2,
                "is not an IP address and a port, such as 127.0.0.1:9100",
            ),
            (
                "grape",
                &["--bn", "127.0.0.1:1,nonsense"],
                2,
                "is not the address of a grape",
            ),
            (
                "grape",
                &["--dpa", "0", "--bn", ""],
                2,
                "is not a number of milliseconds",
            ),
            (
                "peer",
                &["x", "--bootstrap", "/p2p/foo"],
                2,
                "is not the address of a grape",
            ),
            (
                "peer",
                &[""],
                2,
                "the name is empty: give at least one character",
            ),
            (
                "peer",
                &["two words"],
                2,
                "white space at byte 3: make it one word",
            ),
            ("peer", &["bell\x07"], 2, "U+0007 at byte 4"),
            ("peer", &["grapevine/serves"], 2, "choose another"),
            ("peer", &[&long], 2, "the name is too long: 256 bytes"),
            (
                "peer",
                &["x", "--listen", &taken],
                1,
                "another program uses this port",
            ),
            ("chat", &["--to", "", "hello"], 2, "the name is empty"),
            (
                "chat",
                &["--to", "x", "--timeout", "301", "y"],
                2,
                "from 1 to 300",
            ),
            (
                "chat",
                &["--to", "x", "--identity", &text, "y"],
                2,
                "is not a key file",
            ),
        ];
        for (program, arguments, code, says) in table {
            let run = run(program, arguments).await;
            let what = format!("{program} {arguments:?}: {run:?}");
            assert_eq!(run.code, Some(*code), "{what}");
            assert!(
                run.stdout.is_empty() && run.stderr.starts_with("error: "),
                "{what}"
            );
            assert!(
                run.stderr.contains(says) && run.stderr.ends_with('\n'),
                "{what}"
            );
            assert_eq!(run.stderr.lines().count(), 1, "{what}");
            assert!(run.is_fit_for_people(), "{what}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_wrong_command_line_shows_the_usage() {
    in_time(async {
        let table: &[(&str, &[&str])] = &[
            ("grape", &["--nonsense"]),
            ("grape", &["--dp", "0", "--listen", "/ip4/127.0.0.1/tcp/0"]),
            ("peer", &[]),
            ("chat", &["text without a name"]),
            ("chat", &["--to"]),
        ];
        for (program, arguments) in table {
            let run = run(program, arguments).await;
            assert_eq!(run.code, Some(2), "{program} {arguments:?}: {run:?}");
            assert!(
                run.stdout.is_empty() && run.stderr.contains("--help"),
                "{run:?}"
            );
            assert!(run.is_fit_for_people(), "{run:?}");
        }
        for program in ["grape", "peer", "chat"] {
            let help = run(program, &["--help"]).await;
            assert_eq!(help.code, Some(0));
            assert!(help.stdout.contains("Examples:") && help.stdout.contains("Exit codes:"));
            let version = run(program, &["--version"]).await;
            let expected = format!("{program} {}\n", env!("CARGO_PKG_VERSION"));
            assert_eq!((version.code, version.stdout), (Some(0), expected));
        }
    })
    .await;
}

#[tokio::test]
async fn a_conversation_stays_with_who_has_answered_while_they_are_there() {
    in_time(async {
        let grape = grape(&[]).await;
        let anns = [node(&grape).await, node(&grape).await];
        for ann in &anns {
            let (service, id) = (service(ann, "ann").await, ann.peer_id().to_string());
            tokio::spawn(service.serve(move |request| {
                let id = id.clone();
                async move { request.reply(id) }
            }));
        }
        let mut chat = conversation(&grape.address);
        chat.types("ann").await;
        chat.types("first").await;
        let first = chat.line().await;
        for n in 0..20 {
            chat.types(format!("further {n}")).await;
            assert_eq!(chat.line().await, first);
        }
        let (one, other) = match anns[0].peer_id().to_string() == first {
            true => (&anns[0], &anns[1]),
            false => (&anns[1], &anns[0]),
        };
        // Who stands in another's place gets nothing that was meant for them, unless that is allowed.
        let mut allowing = loop {
            let mut chat = Program::start("chat", &["--bootstrap", &grape.address, "--any"]);
            chat.types("ann").await;
            chat.types("first").await;
            if chat.line().await == first {
                break chat;
            }
        };
        one.shutdown().await;
        let other = other.peer_id().to_string();
        let says = format!(
            "the ann you talked to, {}, is gone, and {} answers to the name now",
            short(&first),
            short(&other)
        );
        // An answer that comes later than the end of the connections.
        let _client1 = peer("client1", &grape).await;
        for program in [&mut chat, &mut allowing] {
            for line in ["", "client1", "hello", "", "ann"] {
                program.types(line).await;
            }
            assert_eq!(program.line().await, "Echo: hello");
        }
        chat.types("for the first").await;
        let says_what = format!("{says}; --any sends to them");
        chat.says_of("error: line ", &says_what).await;
        chat.closes_input();
        assert_eq!(chat.end().await.code(), Some(6));
        assert_eq!(chat.output().await, "");
        for n in 0..5 {
            allowing.types(format!("last {n}")).await;
            if n == 0 {
                allowing.says(&says).await;
            }
            assert_eq!(allowing.line().await, other);
        }
    })
    .await;
}
