//! The line editor of a conversation on a terminal: questions, the line that is typed, and what is
//! written above it meanwhile.
//!
//! One lock guards all that is drawn, so that whoever writes to the terminal returns when it is there.
//! Keys are read one by one, by one thread, and only while a question is open: what is typed ahead
//! stays in the terminal until it is asked for, or the program that comes next reads it. While no
//! question is open Ctrl-C and Ctrl-Z are signals, as for any program. The terminal is given back
//! before the program is stopped, and taken again when it goes on.

mod keys;
mod line;
mod screen;
mod terminal;

use std::io::{self, IsTerminal, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::fs::fstat;
use rustix::process::{Signal, getpid, kill_current_process_group, kill_process};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::common::output::{Stream, Typing};
use crate::common::stop::ignores;
use crate::history::History;
use crate::prompt::NoLine;
use keys::Keys;
use line::{Beside, Effect, Line};
use screen::Screen;
use terminal::{Terminal, has_shell, is_ours, soon, try_write_out, write_out};

/// Cheap to share: all is behind one lock.
pub(crate) struct Editor {
    state: Mutex<State>,
    /// There is a question, or the program goes on, or ends.
    news: Condvar,
    terminal: Terminal,
    /// Where stderr goes.
    stderr: Stderr,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stderr {
    ThisTerminal,
    Elsewhere,
}

type Answer = Result<String, NoLine>;

struct State {
    phase: Phase,
    question: String,
    line: Line,
    keys: Keys,
    screen: Screen,
    history: History,
    /// What Tab completes to.
    names: Vec<String>,
    completes: Completes,
    /// Who asks, while somebody does.
    asker: Option<oneshot::Sender<Answer>>,
    /// What was answered when nobody wanted it any more.
    unclaimed: Option<Answer>,
    /// What is drawn is older than the line: more keys were there.
    is_outdated: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Runs,
    /// It is about to be stopped by the shell, or is.
    IsStopped,
    /// The terminal is as it was.
    IsOver,
}

/// What Tab is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Completes {
    Names,
    Nothing,
}

impl Editor {
    /// Begins to read keys, and to look after the terminal. `None` if it is one that lines cannot be
    /// edited on.
    pub(crate) fn open(history: History) -> io::Result<Option<Arc<Self>>> {
        if is_dumb() || !Terminal::is_usable() {
            return Ok(None);
        }
        let editor = Arc::new(Self {
            state: Mutex::new(State::new(history)),
            news: Condvar::new(),
            terminal: Terminal::new(),
            stderr: Stderr::find(),
        });
        editor.terminal.take(terminal::Keys::Signals);
        let jobs = Jobs::listen()?;
        tokio::spawn(jobs.attend(Arc::clone(&editor)));
        let reader = Arc::clone(&editor);
        std::thread::Builder::new()
            .name("keys".into())
            .spawn(move || {
                // Without this thread nothing is read, and a raw terminal has no keys to leave by.
                if catch_unwind(AssertUnwindSafe(|| reader.read())).is_err() {
                    reader.end();
                }
            })?;
        Ok(Some(editor))
    }

    /// Asks, and waits for the answer. Cancel-safe: an answer that nobody waits for is the next one's.
    pub(crate) async fn ask(self: &Arc<Self>, question: &str, completes: Completes) -> Answer {
        let (asker, answer) = oneshot::channel();
        let (editor, question) = (Arc::clone(self), question.to_owned());
        let begun = tokio::task::spawn_blocking(move || editor.begin(question, completes, asker));
        // The thread is gone, or the program ends.
        begun.await.map_err(|_| NoLine::End)?;
        answer.await.unwrap_or(Err(NoLine::End))
    }

    /// Makes an open question another one, unless somebody has begun to answer it. Returns whether it
    /// did.
    pub(crate) fn ask_instead(&self, before: &str, now: &str) -> bool {
        let mut state = self.lock();
        let is_untouched = state.asker.is_some()
            && state.question == before
            && state.line.is_untouched()
            && !Terminal::has_more();
        if is_untouched {
            state.question = now.into();
            state.completes = Completes::Nothing;
            if state.phase == Phase::Runs && is_ours() {
                write_out(&state.draw());
            }
        }
        is_untouched
    }

    /// The question that was asked last, as it was when it was answered.
    pub(crate) fn asked(&self) -> String {
        self.lock().question.clone()
    }

    /// Completes this name from now on.
    pub(crate) fn remember(&self, name: &str) {
        let names = &mut self.lock().names;
        if !names.iter().any(|known| known == name) {
            names.push(name.into());
        }
    }

    /// Makes the terminal as it was. What is written from now on stands below.
    pub(crate) fn close(&self) {
        if let Some(mut state) = soon(&self.state) {
            if state.phase == Phase::Runs && is_ours() {
                write_out(&state.screen.leave(Terminal::size()));
            }
            state.phase = Phase::IsOver;
        }
        self.terminal.give_back();
        self.news.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, question: String, completes: Completes, asker: oneshot::Sender<Answer>) {
        let mut state = self.lock();
        if let Some(answer) = state.unclaimed.take() {
            state.answer(answer, Some(asker));
            return;
        }
        state.question = question;
        state.completes = completes;
        state.asker = Some(asker);
        if state.phase == Phase::Runs && self.terminal.take(terminal::Keys::Keys) {
            write_out(&state.draw());
        }
        self.news.notify_all();
    }

    /// Reads keys for as long as the program runs.
    fn read(&self) {
        while self.is_asked() {
            match Terminal::next_byte() {
                Some(byte) => self.take(byte),
                None => return self.end(),
            }
        }
    }

    /// Waits for a question. Returns whether there will be one.
    fn is_asked(&self) -> bool {
        let idle = |state: &mut State| match state.phase {
            Phase::Runs => state.asker.is_none(),
            Phase::IsStopped => true,
            Phase::IsOver => false,
        };
        let state = self.news.wait_while(self.lock(), idle);
        let state = state.unwrap_or_else(PoisonError::into_inner);
        state.phase != Phase::IsOver
    }

    fn take(&self, byte: u8) {
        let mut state = self.lock();
        if state.phase == Phase::IsOver {
            return;
        }
        if let Some(key) = state.keys.take(byte) {
            self.on_key(&mut state, key);
        }
        // What comes at once need not be drawn one by one.
        if state.is_outdated && !Terminal::has_more() {
            write_out(&state.draw());
        }
    }

    fn on_key(&self, state: &mut State, key: keys::Key) {
        match state.press(key) {
            Effect::Changed => state.is_outdated = true,
            Effect::Nothing => write_out("\x07"),
            Effect::Entered(line) => {
                state.history.add(&line);
                // Whatever of it was drawn before.
                let drawing = state.draw_whole(&line);
                self.answer(state, Ok(line), &drawing);
            }
            Effect::Interrupted => self.answer(state, Err(NoLine::Interrupted), ""),
            Effect::Ended => self.answer(state, Err(NoLine::End), ""),
            Effect::Abandoned => {
                let left = state.screen.leave(Terminal::size());
                write_out(&format!("{left}{}", state.draw()));
            }
            Effect::Cleared => {
                state.screen.erase(Terminal::size());
                write_out(&format!("\x1b[H\x1b[2J{}", state.draw()));
            }
            Effect::Choices(names) => {
                let shown = state.above(&format!("{}\n", names.join("  ")));
                write_out(&shown);
            }
            Effect::Suspended => self.ask_to_be_stopped(state),
        }
    }

    /// The question is over. Until the next one, Ctrl-C is a signal.
    fn answer(&self, state: &mut State, answer: Answer, drawing: &str) {
        let left = state.screen.leave(Terminal::size());
        write_out(&format!("{drawing}{left}"));
        self.terminal.take(terminal::Keys::Signals);
        let asker = state.asker.take();
        state.answer(answer, asker);
    }

    /// There are no keys any more: the terminal is gone.
    fn end(&self) {
        let mut state = self.lock();
        let asker = state.asker.take();
        state.answer(Err(NoLine::End), asker);
    }

    /// Stops this program, and what else runs with it, as the terminal would.
    fn ask_to_be_stopped(&self, state: &mut State) {
        let can_go_on = has_shell() && !ignores(Signal::TSTP.as_raw());
        if can_go_on && kill_current_process_group(Signal::TSTP).is_ok() {
            // No more keys until then.
            state.phase = Phase::IsStopped;
        } else {
            write_out("\x07");
        }
    }

    /// Gives the terminal back before the program is stopped.
    fn on_stop(&self) {
        let mut state = self.lock();
        if state.phase == Phase::IsOver {
            return;
        }
        state.phase = Phase::IsStopped;
        if is_ours() {
            write_out(&state.screen.leave(Terminal::size()));
        }
        self.terminal.give_back();
    }

    /// Takes the terminal again when the program goes on. In the background the next key that is
    /// wanted stops it, as it stops every program.
    fn on_continue(&self) {
        let mut state = self.lock();
        if state.phase == Phase::IsOver {
            return;
        }
        state.phase = Phase::Runs;
        let keys = match state.asker {
            Some(_) => terminal::Keys::Keys,
            None => terminal::Keys::Signals,
        };
        if self.terminal.take(keys) {
            write_out(&state.draw());
        }
        self.news.notify_all();
    }

    fn on_resize(&self) {
        let mut state = self.lock();
        if state.phase == Phase::Runs && is_ours() {
            write_out(&state.draw());
        }
    }
}

impl Typing for Editor {
    fn write_beside(&self, text: &str, stream: Stream) -> io::Result<()> {
        if stream == Stream::Stderr && self.stderr == Stderr::Elsewhere {
            return io::stderr().write_all(text.as_bytes());
        }
        let mut state = self.lock();
        let shown = match state.phase {
            Phase::Runs if is_ours() => state.above(text),
            _ => text.to_owned(),
        };
        try_write_out(&shown)
    }
}

impl State {
    fn new(history: History) -> Self {
        Self {
            phase: Phase::Runs,
            question: String::new(),
            line: Line::new(),
            keys: Keys::default(),
            screen: Screen::new(),
            history,
            names: Vec::new(),
            completes: Completes::Nothing,
            asker: None,
            unclaimed: None,
            is_outdated: false,
        }
    }

    fn press(&mut self, key: keys::Key) -> Effect {
        let names = match self.completes {
            Completes::Names => &self.names[..],
            Completes::Nothing => &[],
        };
        let beside = Beside {
            history: &self.history,
            names,
        };
        self.line.press(key, &beside)
    }

    /// The question and the line as they are now; nothing while there is none.
    fn draw(&mut self) -> String {
        self.is_outdated = false;
        if self.asker.is_none() {
            return String::new();
        }
        let question = self.line.question();
        let question = question.as_deref().unwrap_or(&self.question);
        let (text, cursor) = (self.line.text(), self.line.cursor());
        self.screen.draw(question, text, cursor, Terminal::size())
    }

    fn draw_whole(&mut self, line: &str) -> String {
        self.is_outdated = false;
        self.screen
            .draw(&self.question, line, line.len(), Terminal::size())
    }

    /// Writes a text above the line.
    fn above(&mut self, text: &str) -> String {
        let erased = self.screen.erase(Terminal::size());
        format!("{erased}{text}{}", self.draw())
    }

    fn answer(&mut self, answer: Answer, asker: Option<oneshot::Sender<Answer>>) {
        let unclaimed = match asker {
            Some(asker) => asker.send(answer).err(),
            None => Some(answer),
        };
        if unclaimed.is_some() {
            self.unclaimed = unclaimed;
        }
    }
}

impl Stderr {
    fn find() -> Self {
        let stdout = fstat(io::stdout()).map(|stat| stat.st_rdev);
        let stderr = fstat(io::stderr()).map(|stat| stat.st_rdev);
        if io::stderr().is_terminal() && stdout == stderr {
            Self::ThisTerminal
        } else {
            Self::Elsewhere
        }
    }
}

/// A terminal that cannot move its cursor.
fn is_dumb() -> bool {
    let term = std::env::var_os("TERM").unwrap_or_default();
    ["", "dumb", "cons25", "emacs"]
        .iter()
        .any(|dumb| term == *dumb)
}

/// The signals by which a shell, or the terminal, tells the program what becomes of it.
struct Jobs {
    /// None where they are to be survived.
    stop: Option<tokio::signal::unix::Signal>,
    go_on: tokio::signal::unix::Signal,
    resize: tokio::signal::unix::Signal,
}

impl Jobs {
    fn listen() -> io::Result<Self> {
        let on = |wanted: Signal| signal(SignalKind::from_raw(wanted.as_raw()));
        Ok(Self {
            stop: match ignores(Signal::TSTP.as_raw()) {
                true => None,
                false => Some(on(Signal::TSTP)?),
            },
            go_on: on(Signal::CONT)?,
            resize: on(Signal::WINCH)?,
        })
    }

    async fn attend(mut self, editor: Arc<Editor>) {
        loop {
            tokio::select! {
                biased;
                Some(_) = async { self.stop.as_mut()?.recv().await } => {
                    // Without a shell nobody would let it go on.
                    if has_shell() {
                        editor.on_stop();
                        // Unlike the signal that asked for it, this one cannot be missed.
                        let _ = kill_process(getpid(), Signal::STOP);
                    }
                }
                _ = self.go_on.recv() => editor.on_continue(),
                _ = self.resize.recv() => editor.on_resize(),
            }
        }
    }
}
