//! Draws the question and the line below what was written before, and draws them again. It writes to
//! nothing: it makes the characters that do so.
//!
//! Wrapping is the terminal's own, so that a line can be marked and copied whole.

use std::fmt::Write;

use rustyline::GraphemeClusterMode;
use unicode_segmentation::UnicodeSegmentation;

/// Moves to the first column and clears all from there to the end of the screen.
const CLEAR: &str = "\r\x1b[J";

/// Of a terminal that does not tell its size.
const COLUMNS: usize = 80;

/// The bytes of a grapheme that is drawn as one: the longest emoji take some 40.
const LONGEST: usize = 256;

/// How large the terminal is, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) columns: usize,
    /// `usize::MAX` where nobody knows.
    pub(super) rows: usize,
}

impl Size {
    /// Zero is for unknown, as in the system's own answer.
    pub(super) fn new(columns: u16, rows: u16) -> Self {
        let or = |given: u16, otherwise| match given {
            0 => otherwise,
            given => given.into(),
        };
        Self {
            columns: or(columns, COLUMNS),
            rows: or(rows, usize::MAX),
        }
    }
}

pub(super) struct Screen {
    widths: GraphemeClusterMode,
    /// What is drawn, if anything is.
    drawn: Option<Drawn>,
}

#[derive(Clone)]
struct Drawn {
    question: String,
    text: String,
    cursor: usize,
}

/// Text in rows of a terminal.
struct Rows {
    rows: Vec<String>,
    /// The row and column of the cursor.
    cursor: (usize, usize),
}

impl Screen {
    pub(super) fn new() -> Self {
        Self {
            widths: GraphemeClusterMode::from_env(),
            drawn: None,
        }
    }

    /// Draws a question and a line, in place of what is drawn.
    pub(super) fn draw(&mut self, question: &str, text: &str, cursor: usize, size: Size) -> String {
        let mut drawing = self.erase(size);
        let drawn = Drawn {
            question: question.into(),
            text: text.into(),
            cursor,
        };
        let rows = self.rows(&drawn, size);
        let (row, column) = rows.cursor;
        drawing.push_str(&rows.rows.concat());
        up(&mut drawing, rows.rows.len() - 1 - row);
        drawing.push('\r');
        if column > 0 {
            let _ = write!(drawing, "\x1b[{column}C");
        }
        self.drawn = Some(drawn);
        drawing
    }

    /// Takes away what is drawn: what is written next stands in its place.
    pub(super) fn erase(&mut self, size: Size) -> String {
        let Some(drawn) = self.drawn.take() else {
            return String::new();
        };
        let mut erasing = String::new();
        up(&mut erasing, self.rows(&drawn, size).cursor.0);
        erasing.push_str(CLEAR);
        erasing
    }

    /// Leaves what is drawn where it is: what is written next stands below it.
    pub(super) fn leave(&mut self, size: Size) -> String {
        let Some(drawn) = self.drawn.take() else {
            return String::new();
        };
        let rows = self.rows(&drawn, size);
        let mut leaving = String::new();
        let down = rows.rows.len() - 1 - rows.cursor.0;
        if down > 0 {
            let _ = write!(leaving, "\x1b[{down}B");
        }
        leaving.push_str("\r\n");
        leaving
    }

    /// How something is laid out, of what is larger than the terminal the part around the cursor.
    fn rows(&self, drawn: &Drawn, size: Size) -> Rows {
        let mut layout = Layout::new(self.widths, size.columns);
        layout.write(&drawn.question);
        let (before, after) = drawn.text.split_at(drawn.cursor);
        layout.write(before);
        layout.wrap_if_full();
        let mut cursor = (layout.rows.len() - 1, layout.column);
        layout.write(after);
        layout.wrap_if_full();
        let mut rows = layout.rows;
        if rows.len() > size.rows {
            let start = (cursor.0 + 1).saturating_sub(size.rows);
            rows.truncate(start + size.rows);
            rows.drain(..start);
            cursor.0 -= start;
            // The terminal would go to a row that is not shown.
            if let Some(last) = rows.last_mut() {
                last.truncate(last.trim_end_matches("\r\n").len());
            }
        }
        Rows { rows, cursor }
    }
}

fn up(drawing: &mut String, rows: usize) {
    if rows > 0 {
        let _ = write!(drawing, "\x1b[{rows}A");
    }
}

struct Layout {
    widths: GraphemeClusterMode,
    columns: usize,
    rows: Vec<String>,
    /// Of the cursor, behind the last character of the last row.
    column: usize,
}

impl Layout {
    fn new(widths: GraphemeClusterMode, columns: usize) -> Self {
        Self {
            widths,
            columns,
            rows: vec![String::new()],
            column: 0,
        }
    }

    fn write(&mut self, text: &str) {
        for shown in text.graphemes(true) {
            match shown {
                "\n" | "\r\n" => self.end_row(),
                "\t" => self.put("  ", 2),
                _ if shown.chars().any(char::is_control) => {
                    for c in shown.chars() {
                        self.put_control(c);
                    }
                }
                // A grapheme may be as long as a text, and its width more than what one is counted by.
                _ if shown.len() > LONGEST => {
                    for c in shown.chars() {
                        let c = c.to_string();
                        self.put(&c, self.widths.width(&c).into());
                    }
                }
                _ => self.put(shown, self.widths.width(shown).into()),
            }
        }
    }

    /// As `^C`.
    fn put_control(&mut self, c: char) {
        let letter = u8::try_from(c).map_or('?', |byte| char::from((byte ^ 0x40) & 0x7f));
        self.put(&format!("^{letter}"), 2);
    }

    fn put(&mut self, shown: &str, width: usize) {
        if self.column + width > self.columns {
            self.rows.push(String::new());
            self.column = 0;
        }
        if let Some(row) = self.rows.last_mut() {
            row.push_str(shown);
        }
        self.column += width;
    }

    fn end_row(&mut self) {
        if let Some(row) = self.rows.last_mut() {
            row.push_str("\r\n");
        }
        self.rows.push(String::new());
        self.column = 0;
    }

    /// A terminal goes to the next row only when there is something to write to it.
    fn wrap_if_full(&mut self) {
        if self.column == self.columns {
            self.end_row();
        }
    }
}
