//! A conversation: a name, its providers, messages and replies, until `exit` or the end of input.
//! Or a letter: piped lines that are all for one name.

use grapevine::{Provider, ServiceName};

use crate::common::output::Output;
use crate::common::{Failure, USAGE, short};
use crate::mail::{Mail, Partner};
use crate::patience::patiently;
use crate::prompt::{NoLine, Prompt};
use crate::{Cli, INTERRUPTED};

const RULES: &str = "empty line: another name; exit: leave";

/// How many providers are shown by their ids.
const SHOWN: usize = 5;

pub(crate) struct Dialogue {
    prompt: Prompt,
    mail: Mail,
    output: Output,
    /// The exit code: of a script, that of the first failure.
    code: u8,
}

/// What a person typed.
enum Line {
    Text(String),
    Empty,
    /// No text, and why.
    Wrong(Failure),
    Leave,
}

impl Dialogue {
    pub(crate) fn new(prompt: Prompt, mail: Mail, output: Output) -> Self {
        Self {
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
        let mut partner = Partner::of(providers);
        loop {
            let sent = match self.read("").await {
                Line::Text(text) => self.send(name, &text, &mut partner).await,
                Line::Wrong(failure) => Err(failure),
                Line::Empty => continue,
                Line::Leave => return,
            };
            if let Err(failure) = sent {
                return self.complain(&failure).await;
            }
        }
    }

    /// Asks for names and messages, beginning with a name that is given.
    async fn talk(&mut self, mut name: Option<ServiceName>) {
        self.output.note(RULES).await;
        loop {
            let next = match name.take() {
                Some(name) => Some(name),
                None => self.ask_name().await,
            };
            let Some(next) = next else { return };
            let end = match self.show_providers(&next).await {
                Some(providers) => {
                    self.prompt.remember(&next);
                    self.converse(&next, providers).await
                }
                None => self.skip().await,
            };
            if let Line::Leave = end {
                return;
            }
        }
    }

    /// The next name that can be one; `None` to leave.
    async fn ask_name(&mut self) -> Option<ServiceName> {
        loop {
            match self.ask("Name: ").await {
                Line::Leave => return None,
                Line::Empty => continue,
                Line::Wrong(failure) => self.complain(&failure).await,
                Line::Text(text) => match text.trim().parse::<ServiceName>() {
                    Ok(name) => return Some(name),
                    Err(error) => self.complain(&Failure::new(USAGE, error)).await,
                },
            }
            if let Line::Leave = self.skip().await {
                return None;
            }
        }
    }

    /// Leaves out what a script says after something that failed: it may make no sense without
    /// that, and is meant for nobody else. A person has seen the failure.
    async fn skip(&mut self) -> Line {
        if self.prompt.is_typed() {
            return Line::Empty;
        }
        loop {
            match self.ask("Message: ").await {
                Line::Text(_) | Line::Wrong(_) => {}
                end => return end,
            }
        }
    }

    /// Sends messages to one name, until the person wants another one or to leave.
    async fn converse(&mut self, name: &ServiceName, providers: usize) -> Line {
        let mut partner = Partner::of(providers);
        loop {
            let sent = match self.ask("Message: ").await {
                Line::Text(text) => self.send(name, &text, &mut partner).await,
                Line::Wrong(failure) => Err(failure),
                end => return end,
            };
            let Err(failure) = sent else { continue };
            self.complain(&failure).await;
            if !self.prompt.is_typed() {
                return self.skip().await;
            }
        }
    }

    /// The next line of a conversation.
    async fn ask(&mut self, question: &'static str) -> Line {
        match self.read(question).await {
            Line::Text(text) if text.trim() == "exit" => Line::Leave,
            line => line,
        }
    }

    async fn read(&mut self, question: &'static str) -> Line {
        match self.prompt.ask(question).await {
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
        match self.patiently(name, self.mail.node.lookup(name)).await {
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

    async fn send(
        &self,
        name: &ServiceName,
        text: &str,
        partner: &mut Partner,
    ) -> Result<(), Failure> {
        let sent = self.mail.send(name, text, partner);
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
