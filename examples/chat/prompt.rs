//! Where a person's lines come from: a line editor on a terminal, plain lines otherwise.
//!
//! The editor blocks, so it runs on a thread of its own; a program that ends meanwhile puts the
//! terminal back in order.

use std::cell::Cell;
use std::fmt::Display;
use std::fs::OpenOptions;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use grapevine::ServiceName;
use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::DefaultHistory;
use rustyline::validate::Validator;
use rustyline::{CompletionType, Config, Context, Editor, ExternalPrinter, Helper};

use crate::common::output::Output;
use crate::common::stop::Stop;
use crate::common::{Failure, USAGE};
use crate::lines::Lines;

/// How many lines the editor remembers.
const HISTORY: usize = 1_000;

pub(crate) enum Prompt {
    Editor(Box<LineEditor>),
    Lines {
        lines: Lines,
        /// Somebody types them.
        asks: bool,
    },
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

pub(crate) struct LineEditor {
    /// Away while it waits for a line.
    editor: Option<Editor<Names, DefaultHistory>>,
    history: Option<PathBuf>,
    terminal: Terminal,
}

impl Prompt {
    /// Opens standard input, and the output that goes with it.
    pub(crate) fn new(history: Option<PathBuf>, stop: &Stop) -> Result<(Self, Output), Failure> {
        let asks = io::stdin().is_terminal();
        if asks
            && io::stdout().is_terminal()
            && let Some(opened) = LineEditor::open(history.as_deref(), stop)?
        {
            return Ok(opened);
        }
        let lines = Lines::of_stdin();
        Ok((Self::Lines { lines, asks }, Output::stdout(stop.clone())))
    }

    /// The next line.
    pub(crate) async fn ask(&mut self, question: &'static str) -> Result<String, NoLine> {
        match self {
            Self::Editor(editor) => editor.ask(question).await,
            Self::Lines { lines, asks } => {
                if *asks {
                    // Nobody to ask if it fails; the line may come all the same.
                    let _ = write!(io::stderr(), "{question}");
                }
                lines.next().await
            }
        }
    }

    /// Whether a person types the lines, who sees what comes of each before the next one.
    pub(crate) fn is_typed(&self) -> bool {
        match self {
            Self::Editor(_) => true,
            Self::Lines { asks, .. } => *asks,
        }
    }

    /// Whether the lines ended before the first, and nobody types them.
    pub(crate) fn had_no_input(&self) -> bool {
        match self {
            Self::Editor(_) => false,
            Self::Lines { lines, asks } => !*asks && !lines.have_begun(),
        }
    }

    /// Completes this name from now on.
    pub(crate) fn remember(&mut self, name: &ServiceName) {
        if let Self::Editor(editor) = self
            && let Some(names) = editor.editor.as_mut().and_then(Editor::helper_mut)
            && !names.known.iter().any(|known| known == name.as_ref())
        {
            names.known.push(name.to_string());
        }
    }
}

impl LineEditor {
    /// `None` if the terminal is one that lines cannot be edited on.
    fn open(history: Option<&Path>, stop: &Stop) -> Result<Option<(Prompt, Output)>, Failure> {
        let config = Config::builder()
            .completion_type(CompletionType::List)
            .auto_add_history(false)
            .max_history_size(HISTORY)
            .map(rustyline::config::Builder::build)
            .unwrap_or_default();
        let Ok(mut editor) = Editor::with_config(config) else {
            return Ok(None);
        };
        let Ok(mut printer) = editor.create_external_printer() else {
            return Ok(None);
        };
        editor.set_helper(Some(Names::default()));
        if let Some(path) = history {
            load(&mut editor, path)?;
        }
        let print = move |line| printer.print(line).map_err(io::Error::other);
        let prompt = Prompt::Editor(Box::new(Self {
            editor: Some(editor),
            history: history.map(Path::to_path_buf),
            terminal: Terminal::remember(),
        }));
        Ok(Some((prompt, Output::above(print, stop.clone()))))
    }

    async fn ask(&mut self, question: &'static str) -> Result<String, NoLine> {
        let mut editor = self.editor.take().ok_or(NoLine::End)?;
        if let Some(names) = editor.helper_mut() {
            names.asked = question.starts_with("Name");
        }
        let asked = tokio::task::spawn_blocking(move || {
            let line = read(&mut editor, question);
            (editor, line)
        });
        let (mut editor, line) = asked.await.map_err(|_| NoLine::End)?;
        if let Ok(line) = &line {
            self.keep(&mut editor, line);
        }
        self.editor = Some(editor);
        line.map_err(|error| match error {
            ReadlineError::Interrupted => NoLine::Interrupted,
            // Ctrl-D, or a terminal that is gone.
            _ => NoLine::End,
        })
    }

    fn keep(&self, editor: &mut Editor<Names, DefaultHistory>, line: &str) {
        let is_new = editor.add_history_entry(line).unwrap_or(false);
        if is_new && let Some(path) = &self.history {
            // It was readable at the start; a conversation does not end for it.
            let _ = editor.append_history(path);
        }
    }
}

impl Drop for LineEditor {
    fn drop(&mut self) {
        if self.editor.is_none() {
            self.terminal.restore();
        }
    }
}

/// The next line. Ctrl-C on one that is begun is for another one, as in a shell.
fn read(editor: &mut Editor<Names, DefaultHistory>, question: &str) -> rustyline::Result<String> {
    loop {
        if let Some(names) = editor.helper() {
            names.is_begun.set(false);
        }
        let line = editor.readline(question);
        let is_begun = editor.helper().is_some_and(|names| names.is_begun.get());
        match line {
            Err(ReadlineError::Interrupted) if is_begun => {}
            line => return line,
        }
    }
}

fn load(editor: &mut Editor<Names, DefaultHistory>, path: &Path) -> Result<(), Failure> {
    match editor.load_history(path) {
        Ok(()) => {}
        Err(ReadlineError::Io(error)) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(no_history(path, &error)),
    }
    // Now, not after the first line is typed, is the time to hear that it cannot be written. The
    // editor opens it only when it has something to write.
    match private().append(true).create(true).open(path) {
        Ok(_) => Ok(()),
        Err(error) => Err(no_history(path, &error)),
    }
}

/// For a file that its owner alone may read.
#[cfg(unix)]
fn private() -> OpenOptions {
    use std::os::unix::fs::OpenOptionsExt;

    let mut options = OpenOptions::new();
    options.mode(0o600);
    options
}

#[cfg(not(unix))]
fn private() -> OpenOptions {
    OpenOptions::new()
}

fn no_history(path: &Path, error: &impl Display) -> Failure {
    Failure::new(
        USAGE,
        format!(
            "--history: cannot use {}: {error}: give a text file that you can write to",
            path.display()
        ),
    )
}

/// The names that can be completed.
#[derive(Default)]
struct Names {
    known: Vec<String>,
    /// A name is asked for, not a message.
    asked: bool,
    /// There is something in the line that is being typed.
    is_begun: Cell<bool>,
}

impl Completer for Names {
    type Candidate = String;

    fn complete(
        &self,
        line: &str,
        at: usize,
        _: &Context<'_>,
    ) -> rustyline::Result<(usize, Vec<String>)> {
        let typed = line.get(..at).unwrap_or(line);
        let known = self.known.iter().filter(|name| name.starts_with(typed));
        let names = if self.asked {
            known.cloned().collect()
        } else {
            Vec::new()
        };
        Ok((0, names))
    }
}

impl Hinter for Names {
    type Hint = String;

    /// Gives none, but is asked whenever the line changes: Ctrl-C itself does not tell what was there.
    fn hint(&self, line: &str, _: usize, _: &Context<'_>) -> Option<String> {
        self.is_begun.set(!line.is_empty());
        None
    }
}

impl Highlighter for Names {}
impl Validator for Names {}
impl Helper for Names {}

/// The terminal's settings before the editor changed them.
#[cfg(unix)]
struct Terminal(Option<rustix::termios::Termios>);

#[cfg(unix)]
impl Terminal {
    fn remember() -> Self {
        Self(rustix::termios::tcgetattr(io::stdin()).ok())
    }

    fn restore(&self) {
        if let Some(settings) = &self.0 {
            let now = rustix::termios::OptionalActions::Now;
            let _ = rustix::termios::tcsetattr(io::stdin(), now, settings);
            // Ends bracketed paste, and the line that was being typed.
            let _ = io::stdout().write_all(b"\x1b[?2004l\n");
        }
    }
}

#[cfg(not(unix))]
struct Terminal;

#[cfg(not(unix))]
impl Terminal {
    fn remember() -> Self {
        Self
    }

    fn restore(&self) {}
}
