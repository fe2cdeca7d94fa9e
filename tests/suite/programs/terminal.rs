//! Chat on a terminal: a pseudo-terminal, on which a test types and reads.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use expectrl::process::unix::WaitStatus;
use expectrl::session::OsSession;
use expectrl::{ControlCode, Eof, Expect, Regex, Session};
use futures::FutureExt;
use grapevine::Request;
use grapevine::chat::ChatMessage;
use rustix::process::{Pid, Signal, kill_process};
use rustix::termios::LocalModes;

use super::{grape, node, peer, send, service};
use crate::process::{Program, in_time, path};

/// As long as a test may wait for anything.
const DEADLINE: Duration = Duration::from_secs(60);

/// Ctrl-C, as a terminal sends it.
const CTRL_C: ControlCode = ControlCode::EndOfText;

/// Chat on a terminal of its own. Killed by its id when the test is over.
fn chat(arguments: &[&str]) -> OsSession {
    let mut command = Command::new(path("chat"));
    command
        .args(arguments)
        .env_remove("RUST_LOG")
        .env("NO_COLOR", "1")
        .env("TERM", "xterm");
    let mut session = Session::spawn(command).unwrap();
    session.set_expect_timeout(Some(DEADLINE));
    session
}

/// A chat by a grape, at its first question.
fn chat_by(grape: &Program, arguments: &[&str]) -> OsSession {
    let mut session = chat(&[&["--bootstrap", &grape.address], arguments].concat());
    see(&mut session, "empty line: another name; exit: leave");
    see(&mut session, "Name: ");
    session
}

#[track_caller]
fn see(session: &mut OsSession, text: &str) {
    if let Err(error) = session.expect(text) {
        panic!("no {text:?}: {error}");
    }
}

fn text_of(request: &Request) -> String {
    ChatMessage::decode(request.payload()).unwrap().text
}

/// Whether the terminal is as the programs of a shell expect it.
fn reads_lines(session: &OsSession) -> bool {
    let terminal = session.get_process().get_raw_handle().unwrap();
    let modes = rustix::termios::tcgetattr(terminal).unwrap().local_modes;
    modes.contains(LocalModes::ICANON)
}

#[track_caller]
fn ends(session: &mut OsSession) {
    ends_with(session, 0);
}

#[track_caller]
fn ends_with(session: &mut OsSession, expected: i32) {
    session.expect(Eof).unwrap();
    let status = session.get_process().wait().unwrap();
    let is_expected = matches!(status, WaitStatus::Exited(_, code) if code == expected);
    assert!(is_expected, "{status:?}, not {expected}");
}

/// The terminal blocks, the programs beside it do not: two threads at least.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conversation_asks_shows_and_goes_on() {
    in_time(async {
        let grape = grape(&[]).await;
        let (_one, _two) = (peer("client1", &grape).await, peer("client2", &grape).await);
        let mut chat = chat_by(&grape, &[]);
        chat.send_line("client3").unwrap();
        see(&mut chat, "error: nobody announces client3");
        see(&mut chat, "Name: ");
        chat.send_line("client1").unwrap();
        see(&mut chat, "client1: 1 provider: 12D3..");
        see(&mut chat, "client1> ");
        chat.send_line("hello").unwrap();
        see(&mut chat, "Echo: hello");
        see(&mut chat, "client1> ");
        chat.send_line("").unwrap();
        see(&mut chat, "Name: ");
        chat.send_line("client2").unwrap();
        see(&mut chat, "client2> ");
        chat.send_line("and you").unwrap();
        see(&mut chat, "Echo: and you");
        chat.send_line("").unwrap();
        see(&mut chat, "Name: ");
        chat.send("client1\x15cl\t\t").unwrap();
        see(&mut chat, "client1");
        see(&mut chat, "client2");
        chat.send("\x15exit\r").unwrap();
        ends(&mut chat);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_arrives_leaves_the_line_being_typed_whole() {
    in_time(async {
        let grape = grape(&[]).await;
        let _client1 = peer("client1", &grape).await;
        let mut ann = chat(&["--bootstrap", &grape.address, "--name", "ann"]);
        // Whichever of the two comes first, the question is there again behind the news.
        see(&mut ann, "announced ann");
        see(&mut ann, "Name: ");
        ann.send("clie").unwrap();
        see(&mut ann, "clie");
        assert_eq!(send(&grape, "ann", "hi there").await.code, Some(0));
        see(&mut ann, "12D3..");
        see(&mut ann, ": hi there");
        see(&mut ann, "Name: clie");
        ann.send("nt1\r").unwrap();
        see(&mut ann, "client1: 1 provider: ");
        see(&mut ann, "client1> ");
        ann.send(CTRL_C).unwrap();
        ends_with(&mut ann, 130);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_of_the_command_line_is_talked_to_first() {
    in_time(async {
        let mut chat = chat(&["--default-grape", super::NOBODY, "--to", "echo"]);
        see(&mut chat, "started one inside this program");
        see(&mut chat, "echo: 1 provider: ");
        see(&mut chat, "echo> ");
        chat.send_line("hello").unwrap();
        see(&mut chat, "Echo: hello");
        see(&mut chat, "echo> ");
        chat.send(ControlCode::EndOfTransmission).unwrap();
        ends(&mut chat);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_person_finds_the_echo_where_a_grape_runs_that_has_none() {
    in_time(async {
        let grape = grape(&[]).await;
        let _client1 = peer("client1", &grape).await;
        let mut chat = chat(&["--default-grape", &grape.address]);
        see(&mut chat, "Name: ");
        chat.send("echo\rhello\r\rclient1\rand you\r").unwrap();
        see(
            &mut chat,
            "nobody answers to echo: announced a peer of that name inside",
        );
        see(&mut chat, "Echo: hello\r\n");
        see(&mut chat, "Echo: and you\r\n");
        // Others have it while that lasts.
        assert_eq!(send(&grape, "echo", "hi").await.stdout, "Echo: hi\n");
        see(&mut chat, "client1> ");
        chat.send("\x04").unwrap();
        ends(&mut chat);
        send(&grape, "echo", "hi")
            .await
            .fails(3, &super::nobody("echo"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_person_whom_nobody_can_find_is_told_so() {
    in_time(async {
        let mut chat = chat(&["--default-grape", super::NOBODY, "--name", "ann"]);
        see(
            &mut chat,
            "no grape at /ip4/127.0.0.1/tcp/1: started one inside this program, with a peer named \
             \"echo\"; others cannot find ann in it: start one with \"grape\" first, or use --bootstrap",
        );
        see(&mut chat, "Name: ");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_at_the_prompt_leaves_the_terminal_in_order() {
    in_time(async {
        let grape = grape(&[]).await;
        for signal in [Signal::TERM, Signal::INT] {
            let mut chat = chat_by(&grape, &[]);
            assert!(!reads_lines(&chat), "the editor reads keys");
            let pid = chat.get_process().pid().as_raw();
            kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
            see(&mut chat, "\x1b[?2004l");
            assert!(reads_lines(&chat), "what is typed next is taken key by key");
            ends_with(&mut chat, 130);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ctrl_c_clears_a_line_that_is_begun_and_leaves_an_empty_one() {
    in_time(async {
        let grape = grape(&[]).await;
        let silent = node(&grape).await;
        let mut service = service(&silent, "silent").await;
        let mut chat = chat(&["--bootstrap", &grape.address]);
        // The last news, which could draw the question again.
        see(&mut chat, "connected to the grape 12D3..");
        see(&mut chat, "Name: ");
        for _ in 0..2 {
            chat.send("nobody").unwrap();
            see(&mut chat, "nobody");
            chat.send(CTRL_C).unwrap();
            see(&mut chat, "Name: ");
        }
        chat.send_line("silent").unwrap();
        see(&mut chat, "silent: 1 provider: ");
        see(&mut chat, "silent> ");
        chat.send("half a mess").unwrap();
        see(&mut chat, "half a mess");
        chat.send(CTRL_C).unwrap();
        see(&mut chat, "silent> ");
        chat.send_line("whole").unwrap();
        let request = service.next().await.unwrap();
        assert_eq!(text_of(&request), "whole");
        request.reply("yes");
        see(&mut chat, "yes");
        see(&mut chat, "silent> ");
        // Typed and taken back: an empty line.
        chat.send("z\x7f").unwrap();
        chat.send(CTRL_C).unwrap();
        ends_with(&mut chat, 130);
        let mut chat = chat_by(&grape, &[]);
        chat.send_line("silent").unwrap();
        see(&mut chat, "silent> ");
        chat.send_line("hello").unwrap();
        let _request = service.next().await.unwrap();
        chat.send(CTRL_C).unwrap();
        ends_with(&mut chat, 130);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_typed_is_kept_where_one_asks_for_it() {
    in_time(async {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("history");
        let grape = grape(&[]).await;
        let _client1 = peer("client1", &grape).await;
        let keep = ["--history", file.to_str().unwrap()];
        let mut chat = chat_by(&grape, &keep);
        chat.send_line("client1").unwrap();
        see(&mut chat, "client1> ");
        chat.send(CTRL_C).unwrap();
        ends_with(&mut chat, 130);
        let mode = std::fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "for its owner alone");
        let mut chat = chat_by(&grape, &keep);
        chat.send("\x1b[A\r").unwrap();
        see(&mut chat, "client1: 1 provider: ");
        chat.send(CTRL_C).unwrap();
        ends_with(&mut chat, 130);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_history_that_cannot_be_kept_is_a_failure_at_the_start() {
    in_time(async {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let (notes, long, fifo) = (file("notes"), file("long"), file("fifo"));
        let text = "a line of somebody's notes\n".repeat(3_000);
        std::fs::write(&notes, &text).unwrap();
        // Nobody has made it but chat, and not that long: nine gigabytes without a byte on the disk.
        std::fs::write(&long, "#grapevine-chat-history-1\n").unwrap();
        let opened = std::fs::File::options().write(true).open(&long).unwrap();
        opened.set_len(9 << 30).unwrap();
        let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
        assert!(made.success());
        let table = [
            (file(""), "is not a file: give the path of a new file, or"),
            (fifo, "is not a file: give the path of a new file, or"),
            (
                "/dev/full".into(),
                "is not a file: give the path of a new file, or",
            ),
            (
                "/dev/zero".into(),
                "is not a file: give the path of a new file, or",
            ),
            (file("no/history"), "give a file that you can write to"),
            // No file can be made in it, whoever asks.
            ("/proc/history".into(), "give a file that you can write to"),
            // Without an end, though it says that it is a file.
            ("/proc/cpuinfo".into(), "is left as it is"),
            (
                notes.clone(),
                "is no history of chat, and is left as it is: give",
            ),
            (
                long,
                "is longer than 2097152 bytes, which chat does not make it: move",
            ),
        ];
        for (file, says) in &table {
            let mut chat = chat(&["--default-grape", super::NOBODY, "--history", file]);
            see(&mut chat, "error: --history: ");
            see(&mut chat, says);
            ends_with(&mut chat, 2);
        }
        assert_eq!(std::fs::read_to_string(&notes).unwrap(), text);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_line_that_is_sent_at_once_is_a_line() {
    in_time(async {
        let mut chat = chat(&["--default-grape", super::NOBODY, "--to", "echo"]);
        see(&mut chat, "echo> ");
        // As a paste without marks, a script of `expect`, and what is typed ahead reach a terminal.
        chat.send("one\rtwo\nthree\r").unwrap();
        for line in ["one", "two", "three"] {
            see(&mut chat, &format!("Echo: {line}\r\n"));
        }
        let lines: Vec<_> = (0..300).map(|number| format!("line {number}")).collect();
        chat.send(format!("{}\r", lines.join("\r"))).unwrap();
        for line in &lines {
            see(&mut chat, &format!("Echo: {line}\r\n"));
        }
        // What was begun is given up, what comes behind that is not.
        chat.send("half\x03whole\r").unwrap();
        see(&mut chat, "Echo: whole\r\n");
        // A marked paste is one message, though it has lines.
        chat.send("\x1b[200~first\rsecond\x1b[201~ and\rlast\r")
            .unwrap();
        see(&mut chat, "Echo: first\r\n");
        see(&mut chat, "second and\r\n");
        see(&mut chat, "Echo: last\r\n");
        chat.send("\x04").unwrap();
        ends(&mut chat);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_typed_ahead_waits_for_its_question() {
    in_time(async {
        let grape = grape(&[]).await;
        let silent = node(&grape).await;
        let mut service = service(&silent, "silent").await;
        let mut chat = chat_by(&grape, &[]);
        chat.send("silent\rfirst\r").unwrap();
        let first = service.next().await.unwrap();
        assert_eq!(text_of(&first), "first");
        chat.send("second\rthi").unwrap();
        first.reply("one");
        let second = service.next().await.unwrap();
        assert_eq!(text_of(&second), "second");
        second.reply("two");
        see(&mut chat, "silent> thi");
        chat.send("rd\r").unwrap();
        let third = service.next().await.unwrap();
        assert_eq!(text_of(&third), "third");
        // Nobody reads keys now: a signal.
        chat.send(CTRL_C).unwrap();
        ends_with(&mut chat, 130);
    })
    .await;
}

/// A shell on a terminal of its own. Killed by its id when the test is over.
fn shell() -> OsSession {
    let mut command = Command::new("sh");
    command
        .arg("-i")
        .env_remove("RUST_LOG")
        .env_remove("ENV")
        .env("NO_COLOR", "1")
        .env("PS1", "sh$ ")
        .env("TERM", "xterm");
    let mut session = Session::spawn(command).unwrap();
    session.set_expect_timeout(Some(DEADLINE));
    see(&mut session, "sh$ ");
    session
}

/// The command for a shell that starts chat.
fn command(arguments: &str) -> String {
    format!(
        "{} --default-grape {} {arguments}",
        path("chat").display(),
        super::NOBODY
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chat_that_was_stopped_goes_on_as_it_was() {
    in_time(async {
        let mut shell = shell();
        shell.send_line(command("--to echo")).unwrap();
        see(&mut shell, "echo> ");
        for number in 0..50 {
            let typed = format!("line {number}");
            shell.send(&typed).unwrap();
            see(&mut shell, &typed);
            shell.send("\x1a").unwrap();
            see(&mut shell, "topped");
            see(&mut shell, "sh$ ");
            assert!(reads_lines(&shell), "the shell's user sees nothing");
            shell.send_line("fg").unwrap();
            see(&mut shell, &format!("echo> {typed}"));
            assert!(!reads_lines(&shell), "the editor reads no keys");
            shell.send("!\r").unwrap();
            let shown = shell.expect(format!("Echo: {typed}!\r\n")).unwrap();
            let shown = String::from_utf8_lossy(shown.before());
            assert_eq!(shown.matches('\n').count(), 1, "echoed twice: {shown:?}");
            see(&mut shell, "echo> ");
        }
        shell.send("\x04").unwrap();
        see(&mut shell, "sh$ ");
        assert!(reads_lines(&shell), "the shell's user sees nothing");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chat_that_is_stopped_while_it_waits_or_by_others_goes_on_too() {
    in_time(async {
        let grape = grape(&[]).await;
        let node = node(&grape).await;
        let mut service = service(&node, "client1").await;
        let mut shell = shell();
        let chat = format!(
            "{} --bootstrap {} --to client1",
            path("chat").display(),
            grape.address
        );
        shell.send_line(chat).unwrap();
        see(&mut shell, "client1> ");
        for _ in 0..10 {
            // Nobody reads keys: a signal of the terminal.
            shell.send("hello\r").unwrap();
            let request = service.next().await.unwrap();
            shell.send("\x1a").unwrap();
            see(&mut shell, "sh$ ");
            assert!(reads_lines(&shell), "the shell's user sees nothing");
            shell.send_line("fg").unwrap();
            see(&mut shell, "chat");
            request.reply("welcome");
            see(&mut shell, "welcome\r\n");
            see(&mut shell, "client1> ");
            assert!(!reads_lines(&shell), "the editor reads no keys");
        }
        shell.send_line("exit").unwrap();
        see(&mut shell, "sh$ ");
        // What the shell starts in the foreground tells who it is.
        let told = format!(
            "sh -c 'echo pid $$.; exec {} --bootstrap {} --to client1'",
            path("chat").display(),
            grape.address
        );
        shell.send_line(told).unwrap();
        let pid = shell.expect(Regex("pid ([0-9]+)\\.\r\n")).unwrap();
        let pid = String::from_utf8_lossy(pid.get(1).unwrap())
            .parse()
            .unwrap();
        see(&mut shell, "client1> ");
        for signal in [Signal::TSTP, Signal::STOP].repeat(5) {
            shell.send("half").unwrap();
            see(&mut shell, "half");
            kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
            see(&mut shell, "sh$ ");
            shell.send_line("fg").unwrap();
            see(&mut shell, "client1> half");
            assert!(!reads_lines(&shell), "the editor reads no keys");
            shell.send("\x15").unwrap();
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chat_that_was_stopped_asks_again_where_lines_are_not_edited() {
    in_time(async {
        let mut shell = shell();
        let chat = command("--to echo");
        shell.send_line(format!("TERM=dumb {chat}")).unwrap();
        see(&mut shell, "echo> ");
        for _ in 0..5 {
            shell.send("\x1a").unwrap();
            see(&mut shell, "sh$ ");
            shell.send_line("fg").unwrap();
            see(&mut shell, "echo> ");
        }
        shell.send_line("hello").unwrap();
        see(&mut shell, "Echo: hello\r\n");
    })
    .await;
}

// What a job does is read from Linux's /proc.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_chat_in_the_background_comes_back_whole() {
    in_time(async {
        let mut shell = shell();
        // From the start, it wants a key that it cannot have there.
        shell
            .send_line(format!("{} &", command("--to echo")))
            .unwrap();
        see(&mut shell, "echo: 1 provider");
        let stopped = "while ! grep -q 'State:.T' /proc/$!/status; do :; done; echo it $((1 + 1))";
        shell.send_line(stopped).unwrap();
        see(&mut shell, "it 2\r\n");
        shell.send_line("fg").unwrap();
        see(&mut shell, "echo> ");
        shell.send("half a line").unwrap();
        see(&mut shell, "half a line");
        // Another way back.
        shell.send("\x1a").unwrap();
        see(&mut shell, "sh$ ");
        shell.send_line(format!("bg; {stopped}")).unwrap();
        see(&mut shell, "it 2\r\n");
        assert!(reads_lines(&shell), "the shell's user sees nothing");
        shell.send_line("fg").unwrap();
        see(&mut shell, "echo> half a line");
        shell.send("!\r").unwrap();
        see(&mut shell, "Echo: half a line!\r\n");
        see(&mut shell, "echo> ");
        // It ends while it is stopped, and touches a terminal that is not its own no more.
        shell.send("\x1a").unwrap();
        see(&mut shell, "sh$ ");
        shell.send_line("kill %1; bg; wait; echo gone").unwrap();
        see(&mut shell, "\ngone\r\n");
        assert!(reads_lines(&shell), "the shell's user sees nothing");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_typed_behind_the_end_is_the_shells() {
    in_time(async {
        let mut shell = shell();
        shell.send_line(command("--to echo")).unwrap();
        see(&mut shell, "echo> ");
        shell.send("hello\rexit\recho and $((40 + 2))\r").unwrap();
        see(&mut shell, "Echo: hello\r\n");
        see(&mut shell, "and 42\r\n");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_leaves_the_terminal_in_order_too() {
    in_time(async {
        let mut chat = chat(&["--default-grape", super::NOBODY, "--to", "echo"]);
        see(&mut chat, "echo> ");
        let pid = Pid::from_raw(chat.get_process().pid().as_raw()).unwrap();
        kill_process(pid, Signal::TERM).unwrap();
        kill_process(pid, Signal::INT).unwrap();
        see(&mut chat, "\x1b[?2004l");
        assert!(reads_lines(&chat), "what is typed next is taken key by key");
        ends_with(&mut chat, 130);
    })
    .await;
}

/// Chat in a shell that does this with its streams, on a terminal of its own that is this good.
fn chat_in_shell(arguments: &str, streams: &str, term: &str) -> OsSession {
    let mut command = Command::new("sh");
    let chat = path("chat");
    command
        .args(["-c", &format!("{} {arguments} {streams}", chat.display())])
        .env_remove("RUST_LOG")
        .env("NO_COLOR", "1")
        .env("TERM", term);
    let mut session = Session::spawn(command).unwrap();
    session.set_expect_timeout(Some(DEADLINE));
    session
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_arrives_never_stands_behind_a_question() {
    in_time(async {
        let grape = grape(&[]).await;
        let arguments = format!("--bootstrap {} --name ann", grape.address);
        let ways = [
            ("", "xterm"),
            ("", "dumb"),
            ("", ""),
            ("| cat", "xterm"),
            ("2>&1 | cat", "dumb"),
            ("2> /dev/null", "dumb"),
        ];
        for (streams, term) in ways {
            let mut chat = chat_in_shell(&arguments, streams, term);
            see(&mut chat, "Name: ");
            // Until the name is announced nobody can write to it.
            while send(&grape, "ann", "hi there").await.code != Some(0) {}
            let before = chat.expect(": hi there").unwrap();
            let before = String::from_utf8_lossy(before.before()).into_owned();
            let line = before.rsplit(['\n', '\r']).next().unwrap();
            let is_alone = !line.contains("Name:");
            assert!(is_alone, "{streams} {term}: {before:?}");
            see(&mut chat, "Name: ");
            chat.send("exit\r").unwrap();
            chat.expect(Eof).unwrap();
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_leaves_the_line_being_typed_whole() {
    in_time(async {
        let grape = grape(&[]).await;
        let mut command = Command::new(path("chat"));
        command
            .args(["--bootstrap", &grape.address])
            .env("RUST_LOG", "grapevine=trace,libp2p_swarm=trace")
            .env("NO_COLOR", "1")
            .env("TERM", "xterm");
        let mut chat = Session::spawn(command).unwrap();
        chat.set_expect_timeout(Some(DEADLINE));
        see(&mut chat, "Name: ");
        chat.send("nobody").unwrap();
        see(&mut chat, "Name: nobody");
        // Every line that is logged stands at the margin, and the question below the last one.
        chat.send("\r").unwrap();
        let shown = chat.expect("error: nobody announces nobody").unwrap();
        let shown = String::from_utf8_lossy(shown.before()).into_owned();
        let logged: Vec<_> = shown
            .lines()
            .filter(|line| line.contains("TRACE"))
            .collect();
        assert!(!logged.is_empty(), "{shown:?}");
        for line in logged {
            let text = line.rsplit(['\r', '\x1b']).next().unwrap();
            assert!(!text.contains("Name: "), "{line:?}");
        }
        see(&mut chat, "Name: ");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn notes_and_errors_of_a_conversation_go_where_stderr_does() {
    in_time(async {
        let grape = grape(&[]).await;
        let folder = tempfile::tempdir().unwrap();
        let errors = folder.path().join("err");
        let arguments = format!("--bootstrap {} --name ann", grape.address);
        let streams = format!("2> {}", errors.display());
        let mut chat = chat_in_shell(&arguments, &streams, "xterm");
        see(&mut chat, "Name: ");
        chat.send("nobody\r").unwrap();
        see(&mut chat, "Name: nobody");
        see(&mut chat, "Name: ");
        chat.send("exit\r").unwrap();
        let shown = chat.expect(Eof).unwrap();
        let shown = String::from_utf8_lossy(shown.before()).into_owned();
        assert!(!shown.contains("error"), "{shown:?}");
        let told = std::fs::read_to_string(&errors).unwrap();
        for says in ["announced ann\n", "\nerror: nobody announces nobody"] {
            assert!(told.contains(says), "{told:?}");
        }
    })
    .await;
}

/// A conversation in which others find its person, at its first question.
async fn person(name: &str, grape: &Program) -> OsSession {
    let mut session = chat(&["--bootstrap", &grape.address, "--name", name]);
    see(&mut session, &format!("announced {name}"));
    see(&mut session, "Name: ");
    session
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_writes_can_be_answered() {
    in_time(async {
        let grape = grape(&[]).await;
        let _client1 = peer("client1", &grape).await;
        let (mut ann, mut bob) = (person("ann", &grape).await, person("bob", &grape).await);
        ann.send_line("bob").unwrap();
        see(&mut ann, "bob> ");
        ann.send_line("how are you?").unwrap();
        // The question becomes one for an answer, and the answer goes to who has written.
        see(&mut bob, "ann (12D3..");
        see(&mut bob, "): how are you?");
        see(&mut bob, "ann> ");
        bob.send_line("fine, and you?").unwrap();
        see(&mut bob, "delivered to 12D3..");
        see(&mut bob, "ann> ");
        see(&mut ann, "bob (12D3..");
        see(&mut ann, "): fine, and you?");
        see(&mut ann, "bob> ");
        // The line goes to whom the prompt names, whoever writes meanwhile.
        bob.send_line("").unwrap();
        see(&mut bob, "Name: ");
        bob.send_line("client1").unwrap();
        see(&mut bob, "client1> ");
        ann.send_line("still there?").unwrap();
        see(&mut bob, "): still there?");
        see(&mut bob, "empty line: answer ann");
        see(&mut bob, "client1> ");
        bob.send_line("for client1").unwrap();
        see(&mut bob, "client1 (12D3..");
        see(&mut bob, "): Echo: for client1");
        // An empty line leads to who has written, and another one to names.
        bob.send_line("").unwrap();
        see(&mut bob, "ann> ");
        bob.send_line("").unwrap();
        see(&mut bob, "Name: ");
        // A name that is begun stays one.
        bob.send("clie").unwrap();
        see(&mut bob, "clie");
        ann.send_line("hello?").unwrap();
        see(&mut bob, "): hello?");
        see(&mut bob, "Name: clie");
        bob.send_line("nt1").unwrap();
        see(&mut bob, "client1> ");
        bob.send_line("exit").unwrap();
        ends(&mut bob);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_meant_for_somebody_waits_before_another_gets_it() {
    in_time(async {
        let grape = grape(&[]).await;
        let [rob, mallory] = [node(&grape).await, node(&grape).await];
        let mut of_rob = service(&rob, "rob").await;
        let mut ann = person("ann", &grape).await;
        ann.send_line("rob").unwrap();
        see(&mut ann, "rob> ");
        ann.send_line("it is me").unwrap();
        of_rob.next().await.unwrap().reply("hello");
        see(&mut ann, "): hello");
        let mut of_mallory = service(&mallory, "rob").await;
        rob.shutdown().await;
        let id = super::short(&mallory.peer_id().to_string());
        // An Enter that was pressed before the question allows nothing.
        for (typed, answer, says) in [
            ("a secret\r", "no", "not sent"),
            ("a secret\r\r\r", "no", "not sent"),
            ("a secret\r", "", ""),
        ] {
            loop {
                ann.send(typed).unwrap();
                let seen = Regex("the rob you talked to, 12D3|error: the connection to 12D3");
                let found = ann.expect(seen).unwrap();
                // That the connection is closed may be known only now.
                if !found.get(0).unwrap().starts_with(b"error") {
                    break;
                }
            }
            see(&mut ann, &format!("{id} answers to the name now"));
            see(&mut ann, &format!("Enter: send it to {id}; no: do not> "));
            let asked = of_mallory.next().now_or_never();
            assert!(asked.is_none(), "before it was allowed");
            ann.send_line(answer).unwrap();
            see(&mut ann, says);
        }
        let request = of_mallory.next().await.unwrap();
        let message = ChatMessage::decode(request.payload()).unwrap();
        assert_eq!(message.text, "a secret");
        request.reply("thanks");
        see(&mut ann, &format!("rob ({id}): thanks"));
        see(&mut ann, "rob> ");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_row_of_a_message_begins_at_the_margin() {
    in_time(async {
        let grape = grape(&[]).await;
        let mut ann = person("ann", &grape).await;
        ann.get_process_mut().set_window_size(60, 20).unwrap();
        let forged = "error: nobody announces bob";
        for filler in [" ".repeat(200), "x".repeat(200), "x ".repeat(100)] {
            let mallory = send(&grape, "ann", &format!("hi{filler}{forged}")).await;
            assert_eq!(mallory.code, Some(0));
            let found = ann.expect("nobody announces bob").unwrap();
            let shown = String::from_utf8_lossy(found.before()).into_owned();
            let rows = shown.split("12D3..").last().unwrap().split("\r\n");
            let mut rows = rows.skip(1).peekable();
            assert!(rows.peek().is_some(), "{shown:?}");
            assert!(
                rows.all(|row| row.starts_with("  ") && row.len() <= 60),
                "{shown:?}"
            );
            see(&mut ann, "Name: ");
        }
    })
    .await;
}

/// What waits unseen is not delivered, and what is delivered was seen.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_arrives_while_a_key_is_awaited_is_shown_at_once() {
    in_time(async {
        let grape = grape(&[]).await;
        let mut ann = person("ann", &grape).await;
        for (key, undo) in [
            ("\x12", "\x07"),
            ("\x16", "a\x7f"),
            ("x\x16", "a\x7f\x7f"),
            ("\x1b", "b"),
            ("\t\t", ""),
        ] {
            ann.send(key).unwrap();
            let sent = send(&grape, "ann", "hello").await;
            assert_eq!(sent.code, Some(0), "{sent:?}");
            see(&mut ann, ": hello\r\n");
            ann.send(undo).unwrap();
        }
    })
    .await;
}
