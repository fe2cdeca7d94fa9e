//! A conversation: a name, its providers, messages and replies, until `exit` or the end of input.
//! Or a letter: piped lines that are all for one name.

use std::fmt::Display;

use grapevine::error::LookupError;
use grapevine::{Provider, ServiceName};

use crate::common::output::Output;
use crate::common::{Failure, USAGE, short};
use crate::mail::{Change, Mail, Unsent};
use crate::network::Network;
use crate::patience::patiently;
use crate::prompt::{NoLine, Prompt};
use crate::{Cli, INTERRUPTED};

const RULES: &str = "empty line: another name; exit: leave";

/// Asks for a name. Whoever writes meanwhile is offered an answer in its place.
pub(crate) const NAME: &str = "Name: ";

/// Asks for a message to somebody.
pub(crate) fn question(name: &ServiceName) -> String {
    format!("{name}> ")
}

/// How many providers are shown by their ids.
const SHOWN: usize = 5;

pub(crate) struct Dialogue<'a> {
    network: &'a Network,
    prompt: Prompt,
    mail: Mail,
    output: Output,
    /// The exit code: of a script, that of the first failure.
    code: u8,
}

/// Whom further lines are for.
enum Addressee {
    Named(ServiceName),
    /// Somebody who has written, and perhaps the answer to it.
    Writer(ServiceName, Option<String>),
}

/// What a person typed.
enum Line {
    Text(String),
    Empty,
    /// No text, and why.
    Wrong(Failure),
    Leave,
}

impl<'a> Dialogue<'a> {
    pub(crate) fn new(network: &'a Network, prompt: Prompt, mail: Mail, output: Output) -> Self {
        Self {
            network,
            prompt,
            mail,
            output,
            code: 0,
        }
    }

    /// Talks until the person leaves, and returns the exit code.
    pub(crate) async fn hold(&mut self, cli: &Cli) -> u8 {
        if let Some(name) = &cli.name {
            self.prompt.remember(name);
        }
        match &cli.to {
            Some(to) if !self.prompt.is_typed() => self.deliver(to).await,
            to => self.talk(to.clone()).await,
        }
        self.code
    }

    /// Whether there was nobody and nothing to talk for: the input ended before its first line.
    pub(crate) fn had_no_input(&self) -> bool {
        self.prompt.had_no_input()
    }

    /// Sends each line to one name, until there is none any more or one fails: what follows may
    /// make no sense without it. No line is a command, because all of them may be data.
    async fn deliver(&mut self, name: &ServiceName) {
        let Some(providers) = self.show_providers(name).await else {
            return;
        };
        loop {
            let sent = match self.read("").await {
                Line::Text(text) => self.send(name, &text, providers).await,
                Line::Wrong(failure) => Err(failure.into()),
                Line::Empty => continue,
                Line::Leave => return,
            };
            if let Err(unsent) = sent {
                return self.complain(&unsent.into()).await;
            }
        }
    }

    /// Asks for names and messages, beginning with a name that is given.
    async fn talk(&mut self, name: Option<ServiceName>) {
        self.output.note(RULES).await;
        let mut next = name.map(Addressee::Named);
        loop {
            let addressee = match next.take() {
                Some(addressee) => addressee,
                None => match self.next_addressee().await {
                    Some(addressee) => addressee,
                    None => return,
                },
            };
            if let Line::Leave = self.address(addressee).await {
                return;
            }
        }
    }

    /// Talks to somebody until the person wants to talk to somebody else, or to leave.
    async fn address(&mut self, addressee: Addressee) -> Line {
        let (name, providers, answer) = match addressee {
            Addressee::Named(name) => match self.show_providers(&name).await {
                Some(providers) => (name, providers, None),
                None => return self.skip().await,
            },
            Addressee::Writer(name, answer) => (name, 1, answer),
        };
        self.prompt.remember(&name);
        self.mail.people.talk_to(&name);
        let end = self.converse(&name, providers, answer).await;
        self.mail.people.talk_to_nobody();
        end
    }

    /// Whom to talk to next: who has written meanwhile, or the next name that can be one. `None` to
    /// leave.
    async fn next_addressee(&mut self) -> Option<Addressee> {
        loop {
            if self.prompt.is_typed()
                && let Some(name) = self.mail.people.take_writer()
            {
                return Some(Addressee::Writer(name, None));
            }
            let line = self.ask(NAME).await;
            let offered = self.mail.people.take_offered();
            match line {
                Line::Leave => return None,
                // The question has become one for an answer.
                Line::Text(text) if self.prompt.asked() != NAME => {
                    if let Some(name) = offered.and_then(|writer| self.mail.people.answer(writer)) {
                        return Some(Addressee::Writer(name, Some(text)));
                    }
                    continue;
                }
                Line::Empty => continue,
                Line::Wrong(failure) => self.complain(&failure).await,
                Line::Text(text) => match text.trim().parse::<ServiceName>() {
                    Ok(name) => return Some(Addressee::Named(name)),
                    Err(error) => {
                        let failure = Failure::new(USAGE, self.no_name(&error));
                        self.complain(&failure).await;
                    }
                },
            }
            if let Line::Leave = self.skip().await {
                return None;
            }
        }
    }

    /// Why a name is asked for again, and what else it could have been meant for.
    fn no_name(&self, error: &impl Display) -> String {
        match self.mail.people.writer().filter(|_| self.prompt.is_typed()) {
            Some(writer) => format!("{error}; to answer {writer}, press Enter first"),
            None => error.to_string(),
        }
    }

    /// Leaves out what a script says after something that failed: it may make no sense without
    /// that, and is meant for nobody else. A person has seen the failure.
    async fn skip(&mut self) -> Line {
        if self.prompt.is_typed() {
            return Line::Empty;
        }
        loop {
            match self.ask("").await {
                Line::Text(_) | Line::Wrong(_) => {}
                end => return end,
            }
        }
    }

    /// Sends messages to one name, the first of which may be there already, until the person wants
    /// another one or to leave.
    async fn converse(
        &mut self,
        name: &ServiceName,
        providers: usize,
        mut answer: Option<String>,
    ) -> Line {
        let question = question(name);
        loop {
            let line = match answer.take() {
                Some(text) => Line::Text(text),
                None => self.ask(&question).await,
            };
            let sent = match line {
                Line::Text(text) => match self.send(name, &text, providers).await {
                    Err(Unsent::Changed(change)) if self.prompt.is_typed() => {
                        match self.confirm(&change).await {
                            Line::Leave => return Line::Leave,
                            Line::Empty => answer = Some(text),
                            _ => {
                                self.mail.people.trust(name);
                                self.output.note("not sent").await;
                            }
                        }
                        continue;
                    }
                    sent => sent,
                },
                Line::Wrong(failure) => Err(failure.into()),
                end => return end,
            };
            let Err(unsent) = sent else { continue };
            self.complain(&unsent.into()).await;
            if !self.prompt.is_typed() {
                return self.skip().await;
            }
        }
    }

    /// Asks whether somebody else may have what was meant for the one who is gone: an empty line
    /// allows it.
    async fn confirm(&mut self, change: &Change) -> Line {
        self.output.note(&change.to_string()).await;
        let question = format!("Enter: send it to {}; no: do not> ", short(&change.now));
        let typed = self.prompt.confirm(&question).await;
        match self.line(typed).await {
            Line::Text(text) if text.trim() == "exit" => Line::Leave,
            Line::Empty => {
                self.mail.accept(change);
                Line::Empty
            }
            line => line,
        }
    }

    /// The next line of a conversation.
    async fn ask(&mut self, question: &str) -> Line {
        match self.read(question).await {
            Line::Text(text) if text.trim() == "exit" => Line::Leave,
            line => line,
        }
    }

    async fn read(&mut self, question: &str) -> Line {
        let line = self.prompt.ask(question).await;
        self.line(line).await
    }

    async fn line(&mut self, line: Result<String, NoLine>) -> Line {
        match line {
            Ok(line) if line.trim().is_empty() => Line::Empty,
            Ok(line) => Line::Text(line),
            Err(NoLine::Wrong(failure)) => Line::Wrong(failure),
            Err(NoLine::End) => Line::Leave,
            Err(NoLine::Interrupted) => {
                self.code = INTERRUPTED;
                Line::Leave
            }
            Err(NoLine::Unreadable(failure)) => {
                self.fail(&failure).await;
                Line::Leave
            }
        }
    }

    /// How many answer to the name; `None`: nobody.
    async fn show_providers(&mut self, name: &ServiceName) -> Option<usize> {
        match self.patiently(name, self.providers(name)).await {
            Ok(providers) => {
                self.output.note(&describe(name, &providers)).await;
                Some(providers.len())
            }
            Err(error) => {
                let failure = self.mail.failure(&error.into());
                self.complain(&failure).await;
                None
            }
        }
    }

    async fn providers(&self, name: &ServiceName) -> Result<Vec<Provider>, LookupError> {
        let found = self.mail.node.lookup(name).await;
        let is_missing = matches!(
            found,
            Err(LookupError::NotFound(_) | LookupError::Unreachable { .. })
        );
        if is_missing && self.prompt.is_typed() && self.network.offer_echo(name, &self.output).await
        {
            return self.mail.node.lookup(name).await;
        }
        found
    }

    async fn send(&self, name: &ServiceName, text: &str, providers: usize) -> Result<(), Unsent> {
        let sent = self.mail.send(name, text, providers);
        self.patiently(name, sent).await
    }

    async fn patiently<T>(&self, name: &ServiceName, work: impl Future<Output = T>) -> T {
        patiently(&self.output, || self.mail.awaited(name), work).await
    }

    async fn complain(&mut self, failure: &Failure) {
        // Nobody has seen the line of a script.
        let place = self.prompt.line_number();
        let place = place.map_or_else(String::new, |number| format!("line {number}: "));
        let message = format!("{place}{}", failure.message);
        self.fail(&Failure::new(failure.code, message)).await;
    }

    async fn fail(&mut self, failure: &Failure) {
        let line = format!("error: {}", failure.message);
        self.output.note(&line).await;
        if self.code == 0 && !self.prompt.is_typed() {
            self.code = failure.code;
        }
    }
}

fn describe(name: &ServiceName, providers: &[Provider]) -> String {
    let count = providers.len();
    let noun = if count == 1 { "provider" } else { "providers" };
    let ids: Vec<_> = providers
        .iter()
        .take(SHOWN)
        .map(|provider| short(&provider.peer))
        .collect();
    let more = if count > SHOWN { ", ..." } else { "" };
    format!("{name}: {count} {noun}: {}{more}", ids.join(", "))
}
