//! What `peer` and `chat` share: whom they join by, how they announce, and how they answer.

use std::io::{self, IsTerminal};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use grapevine::chat::{ChatMessage, Incoming, echo_reply, quote, sanitise_block};
use grapevine::error::AnnounceError;
use grapevine::proto::wire::MAX_TEXT;
use grapevine::{Multiaddr, Node, PeerId, Request, Service, ServiceName, Status};
use jiff::ZonedDateTime;
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

use crate::common::flags::{Flags, dial_address};
use crate::common::output::Output;
use crate::common::{no_color, short, wrapped};

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

/// How long a message may wait until those before it are shown. Where nobody takes them it is refused,
/// and never shown: its sender can send it again.
const TURN: Duration = Duration::from_secs(3);

/// Where messages are shown, one at a time. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Display {
    output: Output,
    turn: Arc<Mutex<()>>,
}

impl Display {
    pub(crate) fn new(output: Output) -> Self {
        let turn = Arc::default();
        Self { output, turn }
    }

    /// Shows a message; an error says why it is not shown.
    async fn show(&self, message: impl FnOnce() -> String) -> Result<(), String> {
        let Ok(_turn) = timeout(TURN, self.turn.lock()).await else {
            return Err("nobody reads the messages here at the moment; send it later".into());
        };
        let shown = self.output.try_print(message()).await;
        shown.map_err(|error| format!("the message cannot be shown: {error}"))
    }
}

/// Shows what came in, and answers it if it was shown: what is answered has been read, or can be.
/// `remark` is asked what is to be said of who wrote under a name.
pub(crate) async fn attend(
    request: Request,
    answer: Answer,
    display: Option<Display>,
    remark: impl FnOnce(&str, PeerId) -> Option<String>,
) {
    let peer = request.peer();
    let (message, text) = match Incoming::parse(request.payload()) {
        Ok(Incoming::Echo(text)) => (None, text.to_owned()),
        Ok(Incoming::Chat(message)) => (Some(message.clone()), message.text),
        Err(error) => return request.unread(&error),
    };
    if let Some(display) = display {
        let from = message.as_ref().map_or("", |message| message.from.trim());
        let line = || said(from, peer, remark(from, peer).as_deref(), &text);
        if let Err(reason) = display.show(line).await {
            return request.fail(reason);
        }
    }
    match message {
        // Nobody in particular wrote, and a person is no echo.
        None if answer == Answer::Receipt => request.reply(""),
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

/// What somebody says: when it came, the name that they go by, the id that is proved, what is to be
/// said of them, and the text. None of it but the text can have another line, and its lines are
/// indented, so that nobody's words pass for somebody else's.
pub(crate) fn said(from: &str, peer: PeerId, remark: Option<&str>, text: &str) -> String {
    let (id, remark) = (
        short(&peer),
        remark.map_or_else(String::new, |remark| format!(", {remark}")),
    );
    let sender = match from {
        "" => strong(&id),
        from => format!("{} ({id}{remark})", strong(&claimed(from))),
    };
    let said = format!("{} {sender}: {}", time(), sanitise_block(text));
    match io::stdout().is_terminal() {
        true => wrapped(&said),
        false => said,
    }
}

/// A name that somebody goes by. What is none, or could be taken for more than one, is quoted.
fn claimed(from: &str) -> String {
    let is_odd = |c: char| matches!(c, '"' | '(' | ')' | ':' | ',');
    let is_plain = from
        .parse::<ServiceName>()
        .is_ok_and(|name| name.as_ref() == from);
    match is_plain && !from.contains(is_odd) && !from.starts_with("12D3") {
        true => from.into(),
        false => quote(from),
    }
}

/// The time of day on a terminal, and the whole time where it is kept.
fn time() -> String {
    let form = match io::stdout().is_terminal() {
        true => "%H:%M",
        false => "%Y-%m-%dT%H:%M:%S%:z",
    };
    ZonedDateTime::now().strftime(form).to_string()
}

/// Makes a word stand out on a terminal.
fn strong(word: &str) -> String {
    if io::stdout().is_terminal() && !no_color() {
        format!("\x1b[1m{word}\x1b[0m")
    } else {
        word.into()
    }
}
