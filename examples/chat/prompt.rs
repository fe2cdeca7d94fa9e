//! Where a person's lines come from: a line editor on a terminal, plain lines otherwise.

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::sync::Arc;

use grapevine::ServiceName;
#[cfg(unix)]
use rustix::termios::{QueueSelector, tcflush};

use crate::common::Failure;
use crate::common::output::heed;
use crate::common::stop::{Cause, Stop};
#[cfg(unix)]
use crate::editor::{Completes, Editor};
use crate::history::{History, HistoryFile};
use crate::lines::Lines;
use crate::question::OpenQuestion;

pub(crate) struct Prompt {
    input: Input,
    /// Where what is typed is kept.
    history: Option<HistoryFile>,
    asked: String,
}

enum Input {
    #[cfg(unix)]
    Editor(Arc<Editor>),
    /// On a terminal that lines cannot be edited on, or that not all of the output goes to.
    Typed {
        lines: Lines,
        question: OpenQuestion,
    },
    /// From a file or another program.
    Piped(Lines),
}

/// Why there is no line.
pub(crate) enum NoLine {
    /// There is one that cannot be a message, and why.
    Wrong(Failure),
    /// There is none any more.
    End,
    /// Ctrl-C on an empty line: the person wants to leave.
    Interrupted,
    /// It cannot be read, and why.
    Unreadable(Failure),
}

impl Prompt {
    /// Opens standard input.
    pub(crate) async fn open(
        history: Option<PathBuf>,
        stop: &Stop,
    ) -> Result<Result<Self, Failure>, Cause> {
        let opened = stop.or_blocking(move || match history {
            Some(path) => History::open(&path).map(|(known, file)| (known, Some(file))),
            None => Ok((History::default(), None)),
        });
        let (known, history) = match opened.await? {
            Ok(opened) => opened,
            Err(failure) => return Ok(Err(failure)),
        };
        Ok(Input::open(known, stop).map(|input| Self {
            input,
            history,
            asked: String::new(),
        }))
    }

    /// The next line.
    pub(crate) async fn ask(&mut self, question: &str) -> Result<String, NoLine> {
        let line = self.read(question).await?;
        if self.is_typed() {
            self.keep(&line).await;
        }
        Ok(line)
    }

    /// A line that is typed from now on: what was typed ahead was not meant for this question, and is
    /// dropped.
    pub(crate) async fn confirm(&mut self, question: &str) -> Result<String, NoLine> {
        if let Input::Typed { lines, .. } = &mut self.input {
            lines.drop_read();
        }
        #[cfg(unix)]
        let _ = tcflush(io::stdin(), QueueSelector::IFlush);
        self.read(question).await
    }

    async fn read(&mut self, question: &str) -> Result<String, NoLine> {
        self.asked = question.into();
        match &mut self.input {
            #[cfg(unix)]
            Input::Editor(editor) => {
                let completes = match question.starts_with("Name") {
                    true => Completes::Names,
                    false => Completes::Nothing,
                };
                let line = editor.ask(question, completes).await;
                self.asked = editor.asked();
                line
            }
            Input::Typed {
                lines,
                question: open,
            } => {
                open.ask(question);
                let line = lines.next().await;
                open.is_answered();
                line
            }
            Input::Piped(lines) => lines.next().await,
        }
    }

    /// The question that was asked last, as it was when it was answered.
    pub(crate) fn asked(&self) -> &str {
        &self.asked
    }

    /// Makes an open question another one, unless somebody has begun to answer it, or it cannot be
    /// told whether somebody has. Returns whether it did.
    pub(crate) fn ask_instead(&self) -> impl Fn(&str, &str) -> bool + Send + Sync + 'static {
        #[cfg(unix)]
        let editor = match &self.input {
            Input::Editor(editor) => Some(Arc::clone(editor)),
            _ => None,
        };
        move |before, now| {
            #[cfg(unix)]
            if let Some(editor) = &editor {
                return editor.ask_instead(before, now);
            }
            let _ = (before, now);
            false
        }
    }

    /// Whether a person types the lines, who sees what comes of each before the next one.
    pub(crate) fn is_typed(&self) -> bool {
        !matches!(self.input, Input::Piped(_))
    }

    /// Whether the lines ended before the first, and nobody types them.
    pub(crate) fn had_no_input(&self) -> bool {
        matches!(&self.input, Input::Piped(lines) if lines.count() == 0)
    }

    /// The number of the line that was read last, where nobody has seen it.
    pub(crate) fn line_number(&self) -> Option<u64> {
        match &self.input {
            Input::Piped(lines) if lines.count() > 0 => Some(lines.count()),
            _ => None,
        }
    }

    /// Completes this name from now on.
    pub(crate) fn remember(&mut self, name: &ServiceName) {
        #[cfg(unix)]
        if let Input::Editor(editor) = &self.input {
            editor.remember(name.as_ref());
        }
    }

    async fn keep(&mut self, line: &str) {
        let Some(mut history) = self.history.take() else {
            return;
        };
        let line = line.to_owned();
        let kept = tokio::task::spawn_blocking(move || {
            history.add(&line);
            history
        });
        self.history = kept.await.ok();
    }
}

impl Drop for Prompt {
    fn drop(&mut self) {
        #[cfg(unix)]
        if let Input::Editor(editor) = &self.input {
            editor.close();
        }
    }
}

impl Input {
    fn open(history: History, stop: &Stop) -> Result<Self, Failure> {
        if !io::stdin().is_terminal() {
            return Ok(Self::Piped(Lines::of_stdin()));
        }
        #[cfg(unix)]
        if io::stdout().is_terminal()
            && let Some(editor) = Editor::open(history)?
        {
            heed(editor.clone());
            let last = Arc::clone(&editor);
            stop.before_exit(move || last.close());
            return Ok(Self::Editor(editor));
        }
        let question = OpenQuestion::default();
        heed(Arc::new(question.clone()));
        #[cfg(unix)]
        question.attend_to_jobs()?;
        let lines = Lines::of_stdin();
        Ok(Self::Typed { lines, question })
    }
}
