//! The line that is being typed, and what each key makes of it, as in a shell. Without a terminal:
//! what is to be shown is asked for.

use std::mem;

use grapevine::proto::wire::MAX_PAYLOAD;
use rustyline::line_buffer::{ChangeListener, DeleteListener, Direction, LineBuffer, WordAction};
use rustyline::{At, Word};

use super::keys::Key;
use crate::history::History;

/// How many changes can be undone.
const UNDONE: usize = 100;

/// What a key leads to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Perhaps another line, cursor or question.
    Changed,
    /// The key has no meaning here.
    Nothing,
    /// It is the line.
    Entered(String),
    /// Ctrl-C on a line that was begun: it is given up.
    Abandoned,
    /// Ctrl-C on an empty one.
    Interrupted,
    /// Ctrl-D on an empty one.
    Ended,
    /// Ctrl-Z.
    Suspended,
    /// Ctrl-L.
    Cleared,
    /// The names that what was typed can become.
    Choices(Vec<String>),
}

pub(super) struct Line {
    text: LineBuffer,
    /// The entry of the history that is shown, and what was typed before it was.
    recalled: Option<(usize, String)>,
    search: Option<Search>,
    /// The next key is taken as it is.
    is_quoted: bool,
    killed: Killed,
    undo: Vec<(String, usize)>,
}

/// A search backwards through what was typed before.
struct Search {
    wanted: String,
    /// The entry that is shown.
    at: Option<usize>,
    before: (String, usize),
}

/// What was cut last, for Ctrl-Y.
#[derive(Default)]
struct Killed(String);

/// What the editor around the line knows.
pub(super) struct Beside<'a> {
    pub(super) history: &'a History,
    /// What Tab completes to.
    pub(super) names: &'a [String],
}

impl Line {
    pub(super) fn new() -> Self {
        Self {
            text: LineBuffer::with_capacity(MAX_PAYLOAD),
            recalled: None,
            search: None,
            is_quoted: false,
            killed: Killed::default(),
            undo: Vec::new(),
        }
    }

    pub(super) fn text(&self) -> &str {
        self.text.as_str()
    }

    /// How many bytes of the text are before the cursor.
    pub(super) fn cursor(&self) -> usize {
        self.text.pos()
    }

    /// Whether nobody has begun to type.
    pub(super) fn is_untouched(&self) -> bool {
        self.text.is_empty() && self.search.is_none() && !self.is_quoted
    }

    /// What stands in place of the question, while something else is asked.
    pub(super) fn question(&self) -> Option<String> {
        let search = self.search.as_ref()?;
        let failed = match search.at {
            None if !search.wanted.is_empty() => "failed ",
            _ => "",
        };
        Some(format!("({failed}reverse-i-search)`{}': ", search.wanted))
    }

    pub(super) fn press(&mut self, key: Key, beside: &Beside) -> Effect {
        if mem::take(&mut self.is_quoted) {
            return self.insert_quoted(&key);
        }
        if self.search.is_some()
            && let Some(effect) = self.search_on(&key, beside.history)
        {
            return effect;
        }
        match key {
            Key::Ctrl(c) => self.control(c, beside),
            Key::Alt(c) => self.alt(c, beside.history),
            Key::Char(c) => self.insert(c.encode_utf8(&mut [0; 4])),
            Key::Paste(pasted) => self.insert(&pasted),
            Key::Enter => Effect::Entered(self.take()),
            Key::Tab => self.complete(beside.names),
            Key::Backspace => self.edit(|text, _| text.backspace(1, &mut Unheard)),
            Key::AltBackspace => {
                self.edit(|text, killed| text.delete_prev_word(Word::Emacs, 1, killed))
            }
            Key::Delete => self.edit(|text, _| text.delete(1, &mut Unheard).is_some()),
            Key::Left => moved(self.text.move_backward(1)),
            Key::Right => moved(self.text.move_forward(1)),
            Key::WordLeft => moved(self.text.move_to_prev_word(Word::Emacs, 1)),
            Key::WordRight => moved(self.text.move_to_next_word(At::AfterEnd, Word::Emacs, 1)),
            Key::Home => moved(self.text.move_home()),
            Key::End => moved(self.text.move_end()),
            Key::Up => self.recall(Step::Back, beside.history),
            Key::Down => self.recall(Step::Forth, beside.history),
        }
    }

    fn control(&mut self, c: char, beside: &Beside) -> Effect {
        match c {
            'a' => moved(self.text.move_home()),
            'b' => moved(self.text.move_backward(1)),
            'c' if self.text.is_empty() => Effect::Interrupted,
            'c' => {
                self.take();
                Effect::Abandoned
            }
            'd' if self.text.is_empty() => Effect::Ended,
            'd' => self.edit(|text, _| text.delete(1, &mut Unheard).is_some()),
            'e' => moved(self.text.move_end()),
            'f' => moved(self.text.move_forward(1)),
            'k' => self.edit(|text, killed| text.kill_line(killed)),
            'l' => Effect::Cleared,
            'n' => self.recall(Step::Forth, beside.history),
            'p' => self.recall(Step::Back, beside.history),
            'q' | 'v' => {
                self.is_quoted = true;
                Effect::Changed
            }
            'r' => {
                self.search = Some(Search {
                    wanted: String::new(),
                    at: None,
                    before: (self.text().into(), self.cursor()),
                });
                Effect::Changed
            }
            't' => self.edit(|text, _| text.transpose_chars(&mut Unheard)),
            'u' => self.edit(|text, killed| text.discard_line(killed)),
            'w' => self.edit(|text, killed| text.delete_prev_word(Word::Big, 1, killed)),
            'y' => {
                let killed = self.killed.0.clone();
                self.insert(&killed)
            }
            'z' => Effect::Suspended,
            '_' => self.undo(),
            _ => Effect::Nothing,
        }
    }

    fn alt(&mut self, c: char, history: &History) -> Effect {
        match c {
            'b' => moved(self.text.move_to_prev_word(Word::Emacs, 1)),
            'f' => moved(self.text.move_to_next_word(At::AfterEnd, Word::Emacs, 1)),
            'd' => self.edit(|text, killed| text.delete_word(At::AfterEnd, Word::Emacs, 1, killed)),
            'c' => self.edit(|text, _| text.edit_word(WordAction::Capitalize, &mut Unheard)),
            'l' => self.edit(|text, _| text.edit_word(WordAction::Lowercase, &mut Unheard)),
            'u' => self.edit(|text, _| text.edit_word(WordAction::Uppercase, &mut Unheard)),
            '<' => self.recall(Step::First, history),
            '>' => self.recall(Step::Last, history),
            _ => Effect::Nothing,
        }
    }

    fn insert(&mut self, text: &str) -> Effect {
        self.edit(|line, _| line.yank(text, 1, &mut Unheard).is_some())
    }

    fn insert_quoted(&mut self, key: &Key) -> Effect {
        match key {
            Key::Char(c) => self.insert(c.encode_utf8(&mut [0; 4])),
            Key::Ctrl(c) => {
                let control = u8::try_from(c.to_ascii_uppercase()).map(|c| c & 0x1f);
                self.insert(&char::from(control.unwrap_or_default()).to_string())
            }
            Key::Enter => self.insert("\n"),
            Key::Tab => self.insert("\t"),
            _ => Effect::Nothing,
        }
    }

    /// Changes the text, so that it can be undone.
    fn edit(&mut self, change: impl FnOnce(&mut LineBuffer, &mut Killed) -> bool) -> Effect {
        let before = (self.text().to_owned(), self.cursor());
        let has_changed = change(&mut self.text, &mut self.killed);
        if !has_changed {
            return Effect::Nothing;
        }
        if self.undo.len() == UNDONE {
            self.undo.remove(0);
        }
        self.undo.push(before);
        Effect::Changed
    }

    fn undo(&mut self) -> Effect {
        let Some((text, cursor)) = self.undo.pop() else {
            return Effect::Nothing;
        };
        self.replace(&text, cursor);
        Effect::Changed
    }

    fn replace(&mut self, text: &str, cursor: usize) {
        self.text.update(text, cursor, &mut Unheard);
    }

    /// The whole line; the next one begins.
    fn take(&mut self) -> String {
        let line = self.text().to_owned();
        *self = Self {
            killed: mem::take(&mut self.killed),
            ..Self::new()
        };
        line
    }

    /// Shows another line of those that were typed before.
    fn recall(&mut self, step: Step, history: &History) -> Effect {
        let end = history.len();
        let at = self.recalled.as_ref().map_or(end, |(at, _)| *at);
        let to = match step {
            Step::Back => at.checked_sub(1),
            Step::Forth => Some(at + 1),
            Step::First => Some(0),
            Step::Last => Some(end),
        };
        let Some(to) = to.filter(|to| *to <= end && *to != at) else {
            return Effect::Nothing;
        };
        let typed = match self.recalled.take() {
            Some((_, typed)) => typed,
            None => self.text().to_owned(),
        };
        let shown = history.entry(to).unwrap_or(&typed).to_owned();
        self.replace(&shown, shown.len());
        if to < end {
            self.recalled = Some((to, typed));
        }
        Effect::Changed
    }

    /// What a key does while a search goes on. `None`: it ends the search, and means what it does.
    fn search_on(&mut self, key: &Key, history: &History) -> Option<Effect> {
        let search = self.search.as_mut()?;
        let before = match key {
            Key::Char(c) => {
                search.wanted.push(*c);
                search.at.map_or(history.len(), |at| at + 1)
            }
            Key::Backspace => {
                search.wanted.pop();
                history.len()
            }
            Key::Ctrl('r') => search.at.unwrap_or(history.len()),
            Key::Ctrl('g' | 'c') => {
                let (text, cursor) = mem::take(&mut search.before);
                self.search = None;
                self.replace(&text, cursor);
                return Some(Effect::Changed);
            }
            _ => {
                self.search = None;
                return None;
            }
        };
        let found = history.last_with(&search.wanted, before);
        if let Some((at, cursor)) = found {
            search.at = Some(at);
            let shown = history.entry(at).unwrap_or_default().to_owned();
            self.replace(&shown, cursor);
        } else if !matches!(key, Key::Ctrl('r')) {
            search.at = None;
        }
        Some(Effect::Changed)
    }

    fn complete(&mut self, names: &[String]) -> Effect {
        let typed = &self.text()[..self.cursor()];
        let fit: Vec<_> = names
            .iter()
            .filter(|name| name.starts_with(typed))
            .collect();
        let Some(first) = fit.first() else {
            return Effect::Nothing;
        };
        let common = fit
            .iter()
            .fold(first.as_str(), |common, name| shared(common, name));
        let rest = common[typed.len()..].to_owned();
        if rest.is_empty() && fit.len() > 1 {
            return Effect::Choices(fit.into_iter().cloned().collect());
        }
        self.insert(&rest)
    }
}

/// Where to go among the lines that were typed before.
#[derive(Clone, Copy)]
enum Step {
    Back,
    Forth,
    First,
    Last,
}

fn moved(has_moved: bool) -> Effect {
    match has_moved {
        true => Effect::Changed,
        false => Effect::Nothing,
    }
}

/// What two names begin with.
fn shared<'a>(one: &'a str, other: &str) -> &'a str {
    let pairs = one.char_indices().zip(other.chars());
    let end = pairs
        .take_while(|((_, a), b)| a == b)
        .last()
        .map_or(0, |((at, c), _)| at + c.len_utf8());
    &one[..end]
}

/// For changes that nobody needs to hear of.
struct Unheard;

impl DeleteListener for Unheard {
    fn delete(&mut self, _: usize, _: &str, _: Direction) {}
}

impl ChangeListener for Unheard {
    fn insert_char(&mut self, _: usize, _: char) {}
    fn insert_str(&mut self, _: usize, _: &str) {}
    fn replace(&mut self, _: usize, _: &str, _: &str) {}
}

impl DeleteListener for Killed {
    fn delete(&mut self, _: usize, cut: &str, _: Direction) {
        self.0 = cut.into();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn history(entries: &[&str]) -> History {
        let mut history = History::default();
        for entry in entries {
            history.add(entry);
        }
        history
    }

    /// Presses keys, and returns the line with a bar for the cursor.
    fn line(keys: &[Key], history: &History, names: &[String]) -> String {
        let mut line = Line::new();
        for key in keys {
            line.press(key.clone(), &Beside { history, names });
        }
        let (before, after) = line.text().split_at(line.cursor());
        format!("{before}|{after}")
    }

    fn typed(text: &str) -> Vec<Key> {
        text.chars().map(Key::Char).collect()
    }

    #[test]
    fn keys_edit_the_line_as_in_a_shell() {
        let history = history(&["one", "two words", "three"]);
        let names = ["client1".to_owned(), "client2".into(), "carol".into()];
        let table: &[(&str, &[Key], &str)] = &[
            ("ab", &[Key::Left, Key::Char('x')], "ax|b"),
            ("ab", &[Key::Home, Key::Delete], "|b"),
            ("añ😀", &[Key::Backspace, Key::Left], "a|ñ"),
            ("two words", &[Key::Ctrl('w')], "two |"),
            (
                "two words",
                &[Key::WordLeft, Key::Ctrl('k'), Key::Home, Key::Ctrl('y')],
                "words|two ",
            ),
            ("two words", &[Key::Ctrl('u')], "|"),
            ("two words", &[Key::Ctrl('u'), Key::Ctrl('_')], "two words|"),
            ("mine", &[Key::Up], "three|"),
            ("mine", &[Key::Up, Key::Up, Key::Down, Key::Down], "mine|"),
            ("mine", &[Key::Down], "mine|"),
            ("", &[Key::Alt('<')], "one|"),
            ("mine", &[Key::Ctrl('r'), Key::Char('o')], "tw|o words"),
            (
                "mine",
                &[Key::Ctrl('r'), Key::Char('o'), Key::Ctrl('r')],
                "|one",
            ),
            (
                "mine",
                &[Key::Ctrl('r'), Key::Char('o'), Key::Ctrl('g')],
                "mine|",
            ),
            (
                "mine",
                &[Key::Ctrl('r'), Key::Char('w'), Key::End],
                "two words|",
            ),
            ("cl", &[Key::Tab], "client|"),
            ("ca", &[Key::Tab], "carol|"),
            ("x", &[Key::Tab], "x|"),
            ("a", &[Key::Ctrl('v'), Key::Ctrl('c')], "a\u{3}|"),
            ("a", &[Key::Paste("b\nc".into())], "ab\nc|"),
            (
                "a",
                &[Key::Paste("b\nc".into()), Key::Home, Key::Char('x')],
                "ab\nx|c",
            ),
        ];
        for (before, keys, expected) in table {
            let keys = [&typed(before), *keys].concat();
            assert_eq!(
                line(&keys, &history, &names),
                *expected,
                "{before} {keys:?}"
            );
        }
    }

    #[test]
    fn what_ends_a_line_depends_on_whether_it_is_begun() {
        let history = history(&[]);
        let beside = Beside {
            history: &history,
            names: &[],
        };
        let table = [
            ("", Key::Ctrl('c'), Effect::Interrupted),
            ("a", Key::Ctrl('c'), Effect::Abandoned),
            ("", Key::Ctrl('d'), Effect::Ended),
            ("a", Key::Ctrl('d'), Effect::Nothing),
            ("", Key::Enter, Effect::Entered(String::new())),
            ("a", Key::Enter, Effect::Entered("a".into())),
            ("a", Key::Ctrl('z'), Effect::Suspended),
        ];
        for (before, key, expected) in table {
            let mut line = Line::new();
            for key in typed(before) {
                line.press(key, &beside);
            }
            assert_eq!(
                line.press(key.clone(), &beside),
                expected,
                "{before} {key:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn typed_text_is_the_line(text in "[^\\p{Cc}]{0,40}") {
            let history = history(&[]);
            let beside = Beside { history: &history, names: &[] };
            let mut line = Line::new();
            for key in typed(&text) {
                line.press(key, &beside);
            }
            prop_assert_eq!(line.press(Key::Enter, &beside), Effect::Entered(text));
            prop_assert_eq!(line.text(), "");
        }
    }
}
