//! What `peer` and `chat` share: whom they join by, how they announce, and how they answer.

use std::io::{self, IsTerminal};
use std::pin::pin;
use std::time::Duration;

use grapevine::chat::{ChatMessage, Incoming, echo_reply, sanitise_line};
use grapevine::error::AnnounceError;
use grapevine::proto::wire::MAX_TEXT;
use grapevine::{Multiaddr, Node, PeerId, Request, Service, ServiceName, Status};
use tokio::time::sleep;

use crate::common::flags::{Flags, dial_address};
use crate::common::output::Output;
use crate::common::{no_color, short};

/// The grape to join by when no other is given.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct DefaultGrape {
    /// This machine's, on the default port. Hidden: tests must not meet a grape that runs there.
    #[arg(
        long,
        hide = true,
        value_name = "MULTIADDR",
        default_value = "/ip4/127.0.0.1/tcp/20001",
        value_parser = dial_address
    )]
    pub(crate) default_grape: Multiaddr,
}

impl DefaultGrape {
    /// Makes it the bootstrap grape if no other is given; returns whether it did.
    pub(crate) fn fill(&self, flags: &mut Flags) -> bool {
        let is_needed = flags.bootstrap.is_empty();
        if is_needed {
            flags.bootstrap.push(self.default_grape.clone());
        }
        is_needed
    }
}

/// How long the grapes that are connected may leave a name untaken before a person hears of it.
const PATIENCE: Duration = Duration::from_secs(3);

/// Announces a name, however long that takes, and tells when no grape takes it.
pub(crate) async fn announce(
    node: &Node,
    name: &ServiceName,
    output: &Output,
) -> Result<Service, AnnounceError> {
    let mut announced = pin!(node.announce(name));
    let mut status = node.status();
    // Why no grape can be reached is told elsewhere.
    let untaken = async {
        // Fails when the node is shut down, which ends the announcement too.
        let _ = status.wait_for(Status::is_online).await;
        sleep(PATIENCE).await;
    };
    tokio::select! {
        biased;
        service = &mut announced => return service,
        () = untaken => {}
    }
    if status.borrow().is_online() {
        let line =
            format!("no grape has taken {name} yet: it may be full; join by another one, or wait");
        output.note(&line).await;
    }
    announced.await
}

/// How chat messages are answered. Plain text always gets its echo, as the protocol says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// With an echo: nobody reads them.
    Echo,
    /// With a receipt: somebody reads them and writes back in their own time.
    #[allow(dead_code, reason = "peer is nobody")]
    Receipt,
}

/// Shows what came in, and answers it.
pub(crate) async fn attend(request: Request, answer: Answer, output: Option<Output>) {
    let peer = request.peer();
    let (message, text) = match Incoming::parse(request.payload()) {
        Ok(Incoming::Echo(text)) => (None, text.to_owned()),
        Ok(Incoming::Chat(message)) => (Some(message.clone()), message.text),
        Err(error) => return request.unread(&error),
    };
    if let Some(output) = output {
        let from = message.as_ref().map_or("", |message| &message.from);
        // What nobody can read is not delivered.
        if output.try_print(line(from, peer, &text)).await.is_err() {
            return request.refuse("the message cannot be shown");
        }
    }
    match message {
        None => request.reply(echo_reply(&text)),
        Some(message) => receipt(request, &message, answer),
    }
}

fn receipt(request: Request, message: &ChatMessage, answer: Answer) {
    let reply = (answer == Answer::Echo).then(|| echo_reply(&message.text));
    // An echo is longer than its message, which may be as long as a message can be.
    let reply = reply.filter(|reply| reply.len() <= MAX_TEXT);
    match message.receipt(reply).encode() {
        Ok(payload) => request.reply(payload),
        Err(error) => request.too_large(error.to_string()),
    }
}

/// A message on one line, whatever its sender put into it. What it says of its sender is a claim.
fn line(from: &str, peer: PeerId, text: &str) -> String {
    let sender = match from.trim() {
        "" => short(&peer),
        from => sanitise_line(from).into_owned(),
    };
    format!("{}: {}", strong(&sender), sanitise_line(text))
}

/// Makes a word stand out on a terminal.
fn strong(word: &str) -> String {
    if io::stdout().is_terminal() && !no_color() {
        format!("\x1b[1m{word}\x1b[0m")
    } else {
        word.into()
    }
}
