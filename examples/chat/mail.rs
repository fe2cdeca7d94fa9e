//! Sends a message and shows what is answered; says with which exit code a failure ends the program.
//!
//! A name means whoever has answered to it. When they are gone and another provider stands in their
//! place, nothing is sent before that is said and allowed.

use std::fmt;
use std::io::{self, IsTerminal};
use std::pin::pin;
use std::time::{Duration, Instant};

use futures::StreamExt;
use grapevine::chat::{ChatMessage, ChatReply, sanitise_block};
use grapevine::error::{LookupError, RequestError};
use grapevine::{Node, PeerId, Reply, RequestOptions, ServiceName};
use tokio::time::timeout;

use crate::Cli;
use crate::common::output::Output;
use crate::common::{Failure, RUNTIME, USAGE, short};
use crate::people::{Partner, People};
use crate::talk::said;

const NOT_FOUND: u8 = 3;
pub(crate) const UNREACHABLE: u8 = 4;
pub(crate) const TIMED_OUT: u8 = 5;
const CHANGED: u8 = 6;
const REFUSED: u8 = 7;

/// A message's own, which comes back in its receipt.
type Id = [u8; 16];

/// How messages are sent.
pub(crate) struct Mail {
    pub(crate) node: Node,
    pub(crate) people: People,
    output: Output,
    form: Form,
    /// Who signs them.
    from: Option<ServiceName>,
    /// The name that this program itself announces.
    own: Option<ServiceName>,
    audience: Audience,
    timeout: Duration,
}

/// How replies are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// To a person, with the time and who says it.
    Conversation,
    /// As they are, for a program that reads them.
    Data,
}

/// Whom messages to a name are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Audience {
    /// Whoever has answered to it before.
    Partner,
    /// As well whoever stands in their place.
    AnyOne,
    /// All who announce it.
    All,
}

/// Why a message was not sent, or not answered.
#[derive(Debug)]
pub(crate) enum Unsent {
    Failed(Failure),
    Changed(Change),
}

/// Who has answered to a name is gone, or silent, and somebody else would get what is meant for them.
#[derive(Debug)]
pub(crate) struct Change {
    to: ServiceName,
    before: Partner,
    pub(crate) now: PeerId,
}

impl Form {
    /// Of the replies where nobody types.
    pub(crate) fn of_stdout() -> Self {
        match io::stdout().is_terminal() {
            true => Self::Conversation,
            false => Self::Data,
        }
    }
}

impl From<Failure> for Unsent {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<Unsent> for Failure {
    fn from(unsent: Unsent) -> Self {
        match unsent {
            Unsent::Failed(failure) => failure,
            Unsent::Changed(change) => change.into(),
        }
    }
}

impl From<Change> for Failure {
    fn from(change: Change) -> Self {
        let line = format!("{change}; --any sends to them");
        Self::new(CHANGED, line)
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (to, before, now) = (&self.to, short(&self.before.peer), short(&self.now));
        let state = match self.before.is_doubtful {
            true => "has not answered",
            false => "is gone",
        };
        write!(
            f,
            "the {to} you talked to, {before}, {state}, and {now} answers to the name now"
        )
    }
}

impl Mail {
    /// Each message may take as long as `timeout`.
    pub(crate) fn new(
        cli: &Cli,
        node: Node,
        output: Output,
        form: Form,
        timeout: Duration,
    ) -> Self {
        let own = cli.announced().cloned();
        Self {
            node,
            people: People::new(own.clone()),
            output,
            form,
            from: cli.name.clone(),
            own,
            audience: match (cli.all, cli.any) {
                (true, _) => Audience::All,
                (false, true) => Audience::AnyOne,
                (false, false) => Audience::Partner,
            },
            timeout,
        }
    }

    /// Sends a text to a name and prints the reply, or every provider's reply. It is a success if
    /// all that were named have answered; otherwise the first failure counts. `providers` is how many
    /// announce the name, as far as it was asked.
    pub(crate) async fn send(
        &self,
        to: &ServiceName,
        text: &str,
        providers: usize,
    ) -> Result<(), Unsent> {
        let (id, payload) = self.payload(text)?;
        if self.audience == Audience::All {
            return Ok(self.send_to_all(to, id, payload).await?);
        }
        let reply = self.send_to_one(to, payload).await?;
        let before = self.people.establish(to, reply.provider);
        if before.is_none() && providers > 1 {
            let line = format!("{to} is {} now", short(&reply.provider));
            self.output.note(&line).await;
        }
        Ok(self.show(to, id, reply).await?)
    }

    /// Sends a message to who has answered before, and to another one only if that is allowed.
    async fn send_to_one(&self, to: &ServiceName, payload: Vec<u8>) -> Result<Reply, Unsent> {
        let end = Instant::now() + self.timeout;
        let Some(partner) = self.people.partner(to) else {
            let reply = self.node.request_with(to, payload, options(end)).await;
            return reply.map_err(|error| self.failure(&error).into());
        };
        let mut gone = None;
        if !partner.is_doubtful {
            match self
                .send_to_peer(partner.peer, to, payload.clone(), end)
                .await
            {
                Err(error) if is_gone(&error) && Instant::now() < end => gone = Some(error),
                answered => return answered.map_err(|error| self.failure(&error).into()),
            }
        }
        match (self.successor(to, partner.peer, end).await, gone) {
            (Some(now), _) => {
                let to = to.clone();
                let change = Change {
                    to,
                    before: partner,
                    now,
                };
                self.send_to_successor(change, payload, end).await
            }
            (None, Some(error)) => Err(self.failure(&error).into()),
            (None, None) => {
                let reply = self.send_to_peer(partner.peer, to, payload, end).await;
                reply.map_err(|error| self.failure(&error).into())
            }
        }
    }

    async fn send_to_successor(
        &self,
        change: Change,
        payload: Vec<u8>,
        end: Instant,
    ) -> Result<Reply, Unsent> {
        if self.audience == Audience::Partner {
            return Err(Unsent::Changed(change));
        }
        self.output.note(&change.to_string()).await;
        self.accept(&change);
        let reply = self
            .send_to_peer(change.now, &change.to, payload, end)
            .await;
        reply.map_err(|error| self.failure(&error).into())
    }

    /// From now on the name means who stands in the other's place.
    pub(crate) fn accept(&self, change: &Change) {
        self.people.establish(&change.to, change.now);
    }

    async fn send_to_peer(
        &self,
        peer: PeerId,
        to: &ServiceName,
        payload: Vec<u8>,
        end: Instant,
    ) -> Result<Reply, RequestError> {
        let reply = self.node.request_to(peer, to, payload, options(end)).await;
        if let Err(
            RequestError::TimedOut(_)
            | RequestError::Lookup(LookupError::TimedOut(_))
            | RequestError::Busy(_),
        ) = &reply
        {
            self.people.doubt(to);
        }
        reply
    }

    /// Another one who announces the name.
    async fn successor(&self, to: &ServiceName, partner: PeerId, end: Instant) -> Option<PeerId> {
        let time = end.saturating_duration_since(Instant::now());
        let providers = timeout(time, self.node.lookup(to)).await.ok()?.ok()?;
        let mut others = providers.iter().map(|provider| provider.peer);
        others.find(|other| *other != partner)
    }

    /// Who keeps a message to this name waiting.
    pub(crate) fn awaited(&self, to: &ServiceName) -> String {
        let status = self.node.status();
        let status = status.borrow();
        if status.is_online() {
            return to.to_string();
        }
        let grapes = status
            .bootstrap
            .iter()
            .map(|grape| grape.address.to_string());
        let grapes: Vec<_> = grapes.collect();
        format!("the grape at {}", grapes.join(", "))
    }

    async fn send_to_all(&self, to: &ServiceName, id: Id, payload: Vec<u8>) -> Result<(), Failure> {
        let options = options(Instant::now() + self.timeout);
        let replies = self.node.broadcast_with(to, payload, options);
        let mut replies = pin!(replies);
        let (mut asked, mut failures) = (0, Vec::new());
        while let Some(reply) = replies.next().await {
            asked += 1;
            if let Err(failure) = self.show_one_of_many(to, id, reply).await {
                failures.push(failure);
            }
        }
        let Some(first) = failures.first() else {
            return Ok(());
        };
        if asked == 1 {
            // Or nobody was, because the lookup failed.
            return Err(failures.remove(0));
        }
        for failure in &failures {
            self.complain(failure).await;
        }
        let count = failures.len();
        let summary = format!("{count} of {asked} providers of {to} failed");
        Err(Failure::new(first.code, summary))
    }

    /// Says who has answered: equal replies do not.
    async fn show_one_of_many(
        &self,
        to: &ServiceName,
        id: Id,
        reply: Result<Reply, RequestError>,
    ) -> Result<(), Failure> {
        let reply = reply.map_err(|error| self.failure(&error))?;
        if self.form == Form::Data && text_of(&reply, id)?.is_some() {
            let line = format!("{} answers:", short(&reply.provider));
            self.output.note(&line).await;
        }
        self.show(to, id, reply).await
    }

    /// How a request that fails ends the program.
    pub(crate) fn failure(&self, error: &RequestError) -> Failure {
        match error {
            RequestError::Lookup(LookupError::NotFound(name))
                if self.own.as_ref() == Some(name) =>
            {
                // A lookup finds others.
                let line =
                    format!("only you announce {name}: nobody else would get a message to it");
                Failure::new(NOT_FOUND, line)
            }
            _ => failure(error),
        }
    }

    async fn complain(&self, failure: &Failure) {
        self.output
            .note(&format!("error: {}", failure.message))
            .await;
    }

    /// A chat message, from nobody in particular where no name is given.
    fn payload(&self, text: &str) -> Result<(Id, Vec<u8>), Failure> {
        let from = self.from.as_ref().map_or("", |from| from.as_ref());
        let message = ChatMessage::new(from, text);
        let payload = message.encode();
        let payload = payload.map_err(|error| Failure::new(USAGE, error))?;
        Ok((message.id, payload))
    }

    async fn show(&self, to: &ServiceName, id: Id, reply: Reply) -> Result<(), Failure> {
        let peer = reply.provider;
        match (text_of(&reply, id)?, self.form) {
            (Some(text), Form::Conversation) => {
                self.output
                    .print(said(to.as_ref(), peer, None, &text))
                    .await;
            }
            (Some(text), Form::Data) => self.output.print(as_data(&text)).await,
            (None, _) => {
                let line = format!("delivered to {}", short(&peer));
                self.output.note(&line).await;
            }
        }
        Ok(())
    }
}

fn options(end: Instant) -> RequestOptions {
    RequestOptions {
        deadline: end.saturating_duration_since(Instant::now()),
        ..RequestOptions::default()
    }
}

/// Whether nothing was sent, because there is nobody to send it to.
fn is_gone(error: &RequestError) -> bool {
    matches!(
        error,
        RequestError::Lookup(_) | RequestError::Unreachable { .. }
    )
}

/// A reply where it stands alone. Messages that arrive begin with the time, and may stand beside it.
fn as_data(text: &str) -> String {
    let text = sanitise_block(text);
    let is_like_a_message =
        text.starts_with(|c: char| c.is_ascii_digit()) && text.contains("12D3..");
    match is_like_a_message {
        true => format!("  {text}"),
        false => text,
    }
}

/// What a reply says; `None` for a receipt without an answer.
fn text_of(reply: &Reply, id: Id) -> Result<Option<String>, Failure> {
    if reply.payload.is_empty() {
        return Ok(None);
    }
    // A receipt is a CBOR map, which begins as no text can.
    if let Some(0xa0..=0xbf) = reply.payload.first() {
        let receipt =
            ChatReply::decode(&reply.payload).map_err(|error| unreadable(reply, error))?;
        if receipt.id != id {
            return Err(unreadable(reply, "it is the receipt of another message"));
        }
        return Ok(receipt.reply);
    }
    let text = reply.text().map_err(|error| unreadable(reply, error))?;
    Ok(Some(text.into()))
}

fn unreadable(reply: &Reply, error: impl std::fmt::Display) -> Failure {
    let provider = short(&reply.provider);
    Failure::new(
        REFUSED,
        format!("cannot read what {provider} answered: {error}"),
    )
}

fn failure(error: &RequestError) -> Failure {
    let code = match error {
        RequestError::Lookup(LookupError::NotFound(_)) => NOT_FOUND,
        RequestError::Lookup(LookupError::TimedOut(_)) | RequestError::TimedOut(_) => TIMED_OUT,
        RequestError::Lookup(LookupError::Unreachable { .. } | LookupError::NoGrape(_))
        | RequestError::Unreachable { .. }
        | RequestError::Unreached { .. }
        | RequestError::Interrupted { .. } => UNREACHABLE,
        RequestError::Busy(_) | RequestError::Remote { .. } => REFUSED,
        RequestError::TooLarge { .. } => USAGE,
        _ => RUNTIME,
    };
    // A stranger's part of it does not get to the margin of a terminal by filling a row with nothing.
    let line = format!("{error}{}", remedy(error));
    Failure::new(code, line.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// What can be done about it, where the error does not say.
fn remedy(error: &RequestError) -> &'static str {
    match error {
        RequestError::Lookup(LookupError::NotFound(_)) => {
            ": check the name; its peer must be running, and use a grape of the same network"
        }
        RequestError::Lookup(LookupError::Unreachable { .. }) => {
            ": it may have just stopped, or a firewall is in the way"
        }
        RequestError::TimedOut(_) | RequestError::Lookup(LookupError::TimedOut(_)) => {
            "; --timeout waits longer"
        }
        RequestError::Unreached { .. } => ": it may have just stopped; --timeout waits longer",
        RequestError::Busy(_) => "; try again in a moment",
        _ => "",
    }
}
