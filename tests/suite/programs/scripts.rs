//! Chat in scripts: texts from pipes and files, and what goes wrong with them.

use std::fs::File;
use std::process::Stdio;

use rustix::process::Signal;
use tokio::process::Command;

use super::{NOBODY, grape, peer};
use crate::process::{Program, Run, in_time, path, run, run_from, run_other};

/// Chat with a text as its standard input, by a grape of its own.
async fn chat_from(text: &[u8], arguments: &[&str]) -> Run {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("text");
    std::fs::write(&file, text).unwrap();
    let given = ["--default-grape", NOBODY, "--to", "echo"];
    run_from(
        File::open(&file).unwrap(),
        "chat",
        &[&given, arguments].concat(),
    )
    .await
}

/// Chat with a text, from a shell that does this with its streams.
async fn chat_in_shell(streams: &str) -> Run {
    let chat = path("chat");
    let mut command = Command::new("sh");
    // A shell that has nothing to do after it would become it.
    let script = format!(
        "{} --default-grape {NOBODY} --to echo hello {streams}; exit $?",
        chat.display()
    );
    command.args(["-c", &script]);
    run_other(command).await
}

#[tokio::test]
async fn a_dash_is_a_message_of_several_lines_that_are_piped_in() {
    in_time(async {
        let table: &[(&[u8], &str)] = &[
            (b"one\n\n  two\nexit\n", "Echo: one\n  \n    two\n  exit\n"),
            (b"no end", "Echo: no end\n"),
            (b"\xef\xbb\xbfwith a mark\r\n", "Echo: with a mark\n"),
        ];
        for (text, reply) in table {
            let chat = chat_from(text, &["-"]).await;
            assert_eq!((chat.code, &*chat.stdout), (Some(0), *reply), "{chat:?}");
        }
        let long = "x".repeat((64 << 10) + 1);
        let wrong: &[(&[u8], &str)] = &[
            (
                b"",
                "error: the message is empty: give a text, or \"-\" for what is piped in\n",
            ),
            (
                b" \n\n",
                "error: the message is empty: give a text, or \"-\" for what is piped in\n",
            ),
            (b"caf\xe9", "error: not UTF-8: convert the input first\n"),
            (
                long.as_bytes(),
                "error: more than 65536 bytes, the most that a message may have: split it\n",
            ),
        ];
        for (text, says) in wrong {
            chat_from(text, &["-"]).await.fails(2, says);
        }
        let folder = tempfile::tempdir().unwrap();
        let chat = run_from(
            File::open(folder.path()).unwrap(),
            "chat",
            &["--to", "x", "-"],
        )
        .await;
        chat.fails(
            1,
            "error: cannot read standard input: Is a directory (os error 21)\n",
        );
        // Whoever pipes may take long.
        let mut chat = Program::start("chat", &["--default-grape", NOBODY, "--to", "x", "-"]);
        chat.signal(Signal::TERM);
        assert_ne!(
            chat.end().await.code(),
            Some(0),
            "ended by the signal, early or late"
        );
    })
    .await;
}

#[tokio::test]
async fn a_message_without_a_text_is_not_sent() {
    in_time(async {
        let says = "error: the message is empty: give a text, or \"-\" for what is piped in\n";
        for text in ["", "  ", "\n"] {
            let chat = run("chat", &["--default-grape", NOBODY, "--to", "echo", text]).await;
            chat.fails(2, says);
        }
    })
    .await;
}

#[tokio::test]
async fn a_text_that_looks_like_a_flag_is_told_how_it_is_sent() {
    in_time(async {
        let says = "a text that begins with \"-\" is written behind --";
        let given = ["--default-grape", NOBODY, "--to", "echo"];
        for text in ["-5 degrees", "--hello", "--name calling"] {
            let chat = run("chat", &[&given[..], &[text]].concat()).await;
            assert_eq!((chat.code, &*chat.stdout), (Some(2), ""), "{chat:?}");
            assert!(chat.stderr.contains(says), "{chat:?}");
            let chat = run("chat", &[&given[..], &["--", text]].concat()).await;
            let reply = format!("Echo: {text}\n");
            assert_eq!((chat.code, chat.stdout), (Some(0), reply));
        }
        let peer = run("peer", &["-bob"]).await;
        let says = "a name that begins with \"-\" is written behind --";
        assert!(
            peer.code == Some(2) && peer.stderr.contains(says),
            "{peer:?}"
        );
        let chat = run("chat", &["--to", "echo", "--tiemout", "3", "hello"]).await;
        assert!(chat.stderr.contains("'--timeout'"), "{chat:?}");
    })
    .await;
}

#[tokio::test]
async fn the_line_that_failed_is_told_by_its_number() {
    in_time(async {
        let grape = grape(&[]).await;
        let _client1 = peer("client1", &grape).await;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("letter");
        std::fs::write(&file, b"\xef\xbb\xbfone\n\ncaf\xe9\nfour\n").unwrap();
        let letter = ["--bootstrap", &grape.address, "--to", "client1"];
        let chat = run_from(File::open(&file).unwrap(), "chat", &letter).await;
        assert_eq!(
            (chat.code, &*chat.stdout),
            (Some(2), "Echo: one\n"),
            "{chat:?}"
        );
        let says = "error: line 3: not UTF-8: convert the input first\n";
        assert!(chat.stderr.ends_with(says), "{chat:?}");
        std::fs::write(&file, b"client1\r\nhello\r\n\r\nnobody\r\nlost").unwrap();
        let script = ["--bootstrap", &grape.address];
        let chat = run_from(File::open(&file).unwrap(), "chat", &script).await;
        assert_eq!(
            (chat.code, &*chat.stdout),
            (Some(3), "Echo: hello\n"),
            "{chat:?}"
        );
        assert!(
            chat.stderr
                .contains("error: line 4: nobody announces nobody"),
            "{chat:?}"
        );
    })
    .await;
}

/// What a closed stream becomes is told apart by Linux's /proc.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_reply_that_nobody_can_get_is_a_failure() {
    in_time(async {
        let chat = chat_in_shell(">&-").await;
        let says = "error: standard output is closed, so that replies would be lost: leave it open, or \
                    write > /dev/null\n";
        chat.fails(1, says);
        for streams in ["> /dev/null", "<&- > /dev/null", "> /dev/null 2>&-"] {
            let chat = chat_in_shell(streams).await;
            assert_eq!((chat.code, &*chat.stdout), (Some(0), ""), "{streams} {chat:?}");
        }
        let chat = chat_in_shell("<&- 2>&-").await;
        assert_eq!((chat.code, &*chat.stdout), (Some(0), "Echo: hello\n"), "{chat:?}");
        // Programs that want no output open it in another way than shells.
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let mut command = Command::new(path("chat"));
        command.args(["--default-grape", NOBODY, "--to", "echo", "hello"]);
        let mut child = command.stdin(Stdio::null()).stdout(null).spawn().unwrap();
        assert_eq!(child.wait().await.unwrap().code(), Some(0));
    })
    .await;
}

#[cfg(unix)]
#[tokio::test]
async fn who_stops_reading_replies_is_not_told_that_all_is_well() {
    in_time(async {
        let chat = path("chat");
        let chat = format!("{} --default-grape {NOBODY} --to echo", chat.display());
        for (script, what) in [
            (
                format!("{{ {chat} hello; echo $? >&2; }} | true"),
                "the reply is lost",
            ),
            (
                format!("seq 1000 | {{ {chat}; echo $? >&2; }} | head -1"),
                "what follows was not sent",
            ),
        ] {
            let mut command = Command::new("sh");
            command.args(["-c", &script]);
            let run = run_other(command).await;
            let says = format!("error: nobody reads standard output any more: {what}\n1\n");
            assert!(run.stderr.ends_with(&says), "{run:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_file_that_never_ends_keeps_no_program_from_ending() {
    in_time(async {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo").to_str().unwrap().to_owned();
        let made = std::process::Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap();
        assert!(made.success());
        for file in [
            &fifo,
            "/dev/zero",
            "/dev/full",
            "/dev/stdin",
            &*folder.path().to_string_lossy(),
        ] {
            for (program, arguments) in [
                ("grape", &[][..]),
                ("peer", &["x"]),
                ("chat", &["--to", "x", "y"]),
            ] {
                let run = run(program, &[&["--identity", file], arguments].concat()).await;
                let says = format!(
                    "error: --identity: {file} is not a file: give the path of a key file\n"
                );
                run.fails(2, &says);
            }
        }
        // A line without an end is left out, and a signal is heard meanwhile.
        let grape = grape(&[]).await;
        let zero = File::open("/dev/zero").unwrap();
        let chat = run_from(zero, "chat", &["--bootstrap", &grape.address, "--to", "x"]).await;
        assert_eq!(chat.code, Some(3), "{chat:?}");
        let zero = File::open("/dev/zero").unwrap();
        let mut endless = Program::start_from(zero, "chat", &["--bootstrap", &grape.address]);
        endless.says("error: line 1: more than 65536 bytes").await;
        endless.ends_on(Signal::TERM, 130).await;
    })
    .await;
}
