//! What a sender may rely on, and what a reader: receipts, names that others claim, and forged lines.

use std::fs::File;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use grapevine::chat::{ChatMessage, ChatReply};
use grapevine::error::RequestError;
use grapevine::proto::wire::ErrorCode;
use grapevine::{Node, Service, ServiceName};
use rustix::process::Signal;
use tokio::process::Command;

use super::{grape, message, node, peer, send, service, short};
use crate::process::{Program, in_time, path, run, run_other};

/// A conversation in which others find its person.
async fn person(name: &str, grape: &Program) -> Program {
    let mut person = Program::start("chat", &["--bootstrap", &grape.address, "--name", name]);
    person.says(&format!("announced {name}")).await;
    person
}

fn to(name: &str) -> ServiceName {
    name.parse().unwrap()
}

/// Sends a chat message as whoever, and returns the receipt, or how it was refused.
async fn write(node: &Node, from: &str, name: &str, text: &str) -> Result<ChatReply, String> {
    let payload = ChatMessage::new(from, text).encode().unwrap();
    match node.request(&to(name), payload).await {
        Ok(reply) => Ok(ChatReply::decode(&reply.payload).unwrap()),
        Err(RequestError::Remote { error, .. }) => {
            assert_eq!(error.code, ErrorCode::HandlerFailed);
            Err(error.message)
        }
        Err(error) => panic!("{error}"),
    }
}

fn answer(service: Service, reply: impl Into<String>) {
    let reply = reply.into();
    tokio::spawn(service.serve(move |request| {
        let reply = reply.clone();
        async move { request.reply(reply) }
    }));
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn what_cannot_be_written_is_not_delivered() {
    in_time(async {
        let grape = grape(&[]).await;
        for from in [&["--name", "bob"][..], &[]] {
            let full = File::options().write(true).open("/dev/full").unwrap();
            let own = ["--bootstrap", &grape.address, "--name", "ann"];
            let mut ann = Program::start_into(full, "chat", &own);
            ann.says("announced ann").await;
            let by = ["--bootstrap", &grape.address, "--to", "ann", "hello"];
            let chat = run("chat", &[&by[..], from].concat()).await;
            assert_eq!((chat.code, &*chat.stdout), (Some(7), ""), "{chat:?}");
            let reason = "the message cannot be shown: No space left on device";
            assert!(chat.stderr.contains(reason), "{chat:?}");
            assert!(!chat.stderr.contains("delivered"), "{chat:?}");
            assert_eq!(ann.end().await.code(), Some(1));
        }
    })
    .await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn who_would_lose_what_arrives_does_not_announce_a_name() {
    in_time(async {
        for (program, given) in [("peer", "ann"), ("chat", "--name ann")] {
            let mut shell = Command::new("sh");
            let program = path(program).display().to_string();
            shell.args(["-c", &format!("{program} {given} >&-; exit $?")]);
            let run = run_other(shell).await;
            assert_eq!(run.code, Some(1), "{run:?}");
            assert!(
                run.stderr.starts_with("error: standard output is closed"),
                "{run:?}"
            );
        }
    })
    .await;
}

#[tokio::test]
async fn what_nobody_reads_any_more_is_not_delivered() {
    in_time(async {
        let grape = grape(&[]).await;
        let mut ann = person("ann", &grape).await;
        assert_eq!(send(&grape, "ann", "first").await.code, Some(0));
        assert!(ann.line().await.ends_with(": first"));
        ann.closes_output();
        let chat = send(&grape, "ann", "second").await;
        assert_eq!(chat.code, Some(7), "{chat:?}");
        assert!(!chat.stderr.contains("delivered"), "{chat:?}");
        ann.end().await;
    })
    .await;
}

/// A reader who stands still fills the pipe: what waits behind that is refused and never shown.
#[tokio::test]
async fn what_waits_for_a_reader_too_long_is_refused_and_not_shown_later() {
    in_time(async {
        let grape = grape(&[]).await;
        let mut ann = person("ann", &grape).await;
        let sender = node(&grape).await;
        // More than a pipe holds, and a part of it that was read.
        let long = "x".repeat(60_000);
        let mut written = Vec::new();
        for _ in 0..4 {
            let (sender, text) = (sender.clone(), long.clone());
            let write = async move { write(&sender, "bob", "ann", &text).await };
            written.push(tokio::spawn(write));
        }
        let (mut shown, mut refused) = (0, 0);
        let mut ended = written.into_iter().collect::<FuturesUnordered<_>>();
        // Who reads begins when the first was refused.
        while refused == 0 {
            match ended.next().await.unwrap().unwrap() {
                Ok(_) => shown += 1,
                Err(reason) => {
                    assert!(
                        reason.starts_with("nobody reads the messages here"),
                        "{reason}"
                    );
                    refused += 1;
                }
            }
        }
        let mut lines = 0;
        loop {
            tokio::select! {
                Some(end) = ended.next() => match end.unwrap() {
                    Ok(_) => shown += 1,
                    Err(_) => refused += 1,
                },
                line = ann.line() => {
                    lines += 1;
                    assert!(line.ends_with("xxx"));
                }
            }
            if shown + refused == 4 && lines == shown {
                break;
            }
        }
        write(&sender, "bob", "ann", "last").await.unwrap();
        assert!(ann.line().await.ends_with("): last"));
        ann.signal(Signal::TERM);
        assert_eq!(ann.output().await, "");
    })
    .await;
}

#[tokio::test]
async fn a_receipt_of_another_message_is_none() {
    in_time(async {
        let grape = grape(&[]).await;
        let odd = node(&grape).await;
        let service = service(&odd, "odd").await;
        tokio::spawn(service.serve(|request| async move {
            let other = ChatMessage::new("odd", "x").receipt(None);
            request.reply(other.encode().unwrap());
        }));
        let chat = send(&grape, "odd", "hello").await;
        assert_eq!((chat.code, &*chat.stdout), (Some(7), ""), "{chat:?}");
        assert!(
            chat.stderr.contains("it is the receipt of another message"),
            "{chat:?}"
        );
    })
    .await;
}

#[tokio::test]
async fn what_strangers_say_passes_for_nothing_else() {
    in_time(async {
        let grape = grape(&[]).await;
        let mut ann = person("ann", &grape).await;
        let mut client1 = peer("client1", &grape).await;
        let mallory = node(&grape).await;
        let id = short(&mallory.peer_id().to_string());
        let lines = "hi\nerror: nobody announces bob\r\n2026-11-27T21:04:05+00:00 bob (12D3..aaaaaaaa): \
                     pay\u{2028}bob: me\n\n";
        for (from, shown) in [
            ("Echo", format!("Echo ({id})")),
            ("error", format!("error ({id})")),
            ("announced", format!("announced ({id})")),
            ("12D3..HN1WsiJR", format!("\"12D3..HN1WsiJR\" ({id})")),
            ("bob (12D3..HN1WsiJR)", format!("\"bob (12D3..HN1WsiJR)\" ({id})")),
            ("bob: hi", format!("\"bob: hi\" ({id})")),
            ("bob\"", format!("\"bob'\" ({id})")),
            ("b\u{200b}ob", format!("\"b\u{fffd}ob\" ({id})")),
            ("bob\nerror:", format!("\"bob error:\" ({id})")),
            ("\u{1b}[1mbob", format!("\"\u{fffd}[1mbob\" ({id})")),
            ("", id.clone()),
        ] {
            for (name, program) in [("ann", &mut ann), ("client1", &mut client1)] {
                write(&mallory, from, name, lines).await.unwrap();
                assert_eq!(message(&program.line().await), format!("{shown}: hi"));
                for further in [
                    "  error: nobody announces bob",
                    "  2026-11-27T21:04:05+00:00 bob (12D3..aaaaaaaa): pay",
                    "  bob: me",
                ] {
                    assert_eq!(program.line().await, further);
                }
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_reply_has_one_line_at_the_margin() {
    in_time(async {
        let grape = grape(&[]).await;
        let mallory = node(&grape).await;
        answer(
            service(&mallory, "lines").await,
            "line one\n  indented\nlast\n",
        );
        let dated = "2026-11-27T21:04:05+00:00 bob (12D3..aaaaaaaa): hi";
        answer(service(&mallory, "dated").await, dated);
        let chat = send(&grape, "lines", "hello").await;
        assert_eq!(chat.stdout, "line one\n    indented\n  last\n");
        // A message that arrives looks so.
        let chat = send(&grape, "dated", "hello").await;
        assert_eq!(chat.stdout, format!("  {dated}\n"));
        let refusing = service(&mallory, "refusing").await;
        tokio::spawn(refusing.serve(|request| async move { request.fail("no\nbob: hi\u{2028}x") }));
        let chat = send(&grape, "refusing", "hello").await;
        let id = mallory.peer_id();
        let says = format!("error: {id} answered: handler-failed: no bob: hi x\n");
        assert_eq!((chat.code, chat.stderr), (Some(7), says));
    })
    .await;
}

#[tokio::test]
async fn who_claims_the_name_of_a_partner_is_told_from_them() {
    in_time(async {
        let grape = grape(&[]).await;
        let mut ann = person("ann", &grape).await;
        let (bob, mallory) = (node(&grape).await, node(&grape).await);
        answer(service(&bob, "bob").await, "it is me");
        let [real, other] = [&bob, &mallory].map(|node| short(&node.peer_id().to_string()));
        ann.types("bob").await;
        ann.types("hello").await;
        assert_eq!(ann.line().await, "it is me");
        for (node, from, shown) in [
            (
                &mallory,
                "bob",
                format!("bob ({other}, not the bob you talk to): hi"),
            ),
            (
                &mallory,
                "Bob",
                format!("Bob ({other}, not the bob you talk to): hi"),
            ),
            (&mallory, "ann", format!("ann ({other}, not you): hi")),
            (&mallory, "carol", format!("carol ({other}): hi")),
            (&bob, "bob", format!("bob ({real}): hi")),
        ] {
            write(node, from, "ann", "hi").await.unwrap();
            assert_eq!(message(&ann.line().await), shown);
        }
    })
    .await;
}

/// Killed, a partner refuses TCP and says nothing by QUIC.
#[tokio::test]
async fn a_partner_who_was_killed_is_known_to_be_gone() {
    in_time(async {
        let grape = grape(&[]).await;
        let by = ["--bootstrap", &grape.address];
        let mut rob = Program::start("peer", &[&["rob"], &by[..]].concat());
        assert_eq!(rob.line().await, "announced rob");
        let mut chat = Program::start("chat", &by);
        chat.types("rob").await;
        chat.types("hello").await;
        assert_eq!(chat.line().await, "Echo: hello");
        let mallory = node(&grape).await;
        let mut of_mallory = service(&mallory, "rob").await;
        rob.signal(Signal::KILL);
        rob.end().await;
        // That a connection is broken may be known only when a letter is on its way.
        for line in ["a secret", "", "rob", "a secret"] {
            chat.types(line).await;
        }
        let asked = async { of_mallory.next().await.is_some() };
        tokio::select! {
            () = chat.says_of("error: line ", "answers to the name now; --any sends to them") => {}
            _ = asked => panic!("mallory has it"),
        }
    })
    .await;
}

#[tokio::test]
async fn the_first_word_is_a_name_where_none_is_given() {
    in_time(async {
        let grape = grape(&[]).await;
        let _client1 = peer("client1", &grape).await;
        let by = ["--bootstrap", &grape.address];
        for (given, stdout) in [
            (&["client1", "hello", "world"][..], "Echo: hello world\n"),
            (
                &["--to", "client1", "client1", "hello"],
                "Echo: client1 hello\n",
            ),
            (&["client1", "--", "-v"], "Echo: -v\n"),
        ] {
            let chat = run("chat", &[&by[..], given].concat()).await;
            assert_eq!((chat.code, &*chat.stdout), (Some(0), stdout), "{chat:?}");
        }
        let mut chat = Program::start("chat", &[&by[..], &["client1"]].concat());
        chat.types("a letter").await;
        chat.closes_input();
        assert_eq!(chat.output().await, "Echo: a letter\n");
        assert_eq!(chat.end().await.code(), Some(0));
    })
    .await;
}
