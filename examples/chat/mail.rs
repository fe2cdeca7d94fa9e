//! Sends a message and shows what is answered; says with which exit code a failure ends the program.

use std::pin::pin;
use std::time::{Duration, Instant};

use futures::StreamExt;
use grapevine::chat::{ChatMessage, ChatReply, sanitise};
use grapevine::error::{LookupError, RequestError};
use grapevine::{Node, PeerId, Reply, RequestOptions, ServiceName};

use crate::Cli;
use crate::common::output::Output;
use crate::common::{Failure, RUNTIME, USAGE, short};

const NOT_FOUND: u8 = 3;
pub(crate) const UNREACHABLE: u8 = 4;
pub(crate) const TIMED_OUT: u8 = 5;
const REFUSED: u8 = 7;

/// How messages are sent.
pub(crate) struct Mail {
    pub(crate) node: Node,
    output: Output,
    /// Who signs them.
    from: Option<ServiceName>,
    /// The name that this program itself announces.
    own: Option<ServiceName>,
    to_all: bool,
    timeout: Duration,
}

/// Who has answered to a name: further messages go to the same one while they can be reached, because
/// several may announce it.
#[derive(Debug, Default)]
pub(crate) struct Partner {
    peer: Option<PeerId>,
    /// A person is told who it is.
    is_news: bool,
}

impl Partner {
    /// Nobody yet, of so many who announce the name.
    pub(crate) fn of(count: usize) -> Self {
        Self {
            peer: None,
            is_news: count > 1,
        }
    }
}

impl Mail {
    /// Each message may take as long as `timeout`.
    pub(crate) fn new(cli: &Cli, node: Node, output: Output, timeout: Duration) -> Self {
        Self {
            node,
            output,
            from: cli.name.clone(),
            own: cli.announced().cloned(),
            to_all: cli.all,
            timeout,
        }
    }

    /// Sends a text to a name and prints the reply, or every provider's reply. It is a success if
    /// all that were asked have answered; otherwise the first failure counts.
    pub(crate) async fn send(
        &self,
        to: &ServiceName,
        text: &str,
        partner: &mut Partner,
    ) -> Result<(), Failure> {
        let payload = self.payload(text)?;
        if self.to_all {
            return self.send_to_all(to, payload).await;
        }
        let reply = self.send_to_one(to, payload, partner.peer).await;
        if let Err(RequestError::TimedOut(_) | RequestError::Busy(_)) = &reply {
            // Another one may have the next message.
            *partner = Partner::of(2);
        }
        let reply = reply.map_err(|error| self.failure(&error))?;
        let before = partner.peer.replace(reply.provider);
        let has_changed = before.is_some_and(|before| before != reply.provider);
        if has_changed || before.is_none() && partner.is_news {
            let line = format!("{to} is {} now", short(&reply.provider));
            self.output.note(&line).await;
        }
        self.show(reply).await
    }

    /// Sends a message to who has answered before, and to another one if they are gone.
    async fn send_to_one(
        &self,
        to: &ServiceName,
        payload: Vec<u8>,
        partner: Option<PeerId>,
    ) -> Result<Reply, RequestError> {
        let mut options = self.options();
        if let Some(partner) = partner {
            let end = Instant::now() + options.deadline;
            let (again, once) = (payload.clone(), options.clone());
            let reply = self.node.request_to(partner, to, again, once).await;
            let is_gone = |error: &RequestError| {
                matches!(
                    error,
                    RequestError::Lookup(_) | RequestError::Unreachable { .. }
                )
            };
            // What is left of the time.
            options.deadline = end.saturating_duration_since(Instant::now());
            if !reply.as_ref().is_err_and(is_gone) || options.deadline.is_zero() {
                return reply;
            }
        }
        self.node.request_with(to, payload, options).await
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

    async fn send_to_all(&self, to: &ServiceName, payload: Vec<u8>) -> Result<(), Failure> {
        let replies = self.node.broadcast_with(to, payload, self.options());
        let mut replies = pin!(replies);
        let (mut asked, mut failures) = (0, Vec::new());
        while let Some(reply) = replies.next().await {
            asked += 1;
            if let Err(failure) = self.show_one_of_many(reply).await {
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
    async fn show_one_of_many(&self, reply: Result<Reply, RequestError>) -> Result<(), Failure> {
        let reply = reply.map_err(|error| self.failure(&error))?;
        if text_of(&reply)?.is_some() {
            let line = format!("{} answers:", short(&reply.provider));
            self.output.note(&line).await;
        }
        self.show(reply).await
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

    fn options(&self) -> RequestOptions {
        RequestOptions {
            deadline: self.timeout,
            ..RequestOptions::default()
        }
    }

    /// A chat message, from nobody in particular where no name is given.
    fn payload(&self, text: &str) -> Result<Vec<u8>, Failure> {
        let from = self.from.as_ref().map_or("", |from| from.as_ref());
        ChatMessage::new(from, text)
            .encode()
            .map_err(|error| Failure::new(USAGE, error))
    }

    async fn show(&self, reply: Reply) -> Result<(), Failure> {
        match text_of(&reply)? {
            Some(text) => self.output.print(sanitise(&text)).await,
            None => {
                let line = format!("delivered to {}", short(&reply.provider));
                self.output.note(&line).await;
            }
        }
        Ok(())
    }
}

/// What a reply says; `None` for a receipt without an answer.
fn text_of(reply: &Reply) -> Result<Option<String>, Failure> {
    // A receipt is a CBOR map, which begins as no text can.
    if let Some(0xa0..=0xbf) = reply.payload.first() {
        return ChatReply::decode(&reply.payload)
            .map(|receipt| receipt.reply)
            .map_err(|error| unreadable(reply, error));
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
    Failure::new(code, format!("{error}{}", remedy(error)))
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
