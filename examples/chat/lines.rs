//! Lines of standard input where nobody edits them. None is kept that is longer than a message may
//! be, so that input without an end of line does not fill the memory.

use std::io;

use grapevine::proto::wire::MAX_TEXT;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Stdin};

use crate::common::{Failure, RUNTIME, USAGE};
use crate::prompt::NoLine;

/// The mark that editors of some systems put before UTF-8. It is no part of the text.
const MARK: &str = "\u{feff}";

/// As many bytes as a message may have, and what may be around it.
const MAX_LINE: usize = MARK.len() + MAX_TEXT + b"\r\n".len();

pub(crate) struct Lines {
    input: BufReader<Stdin>,
    /// What comes next is the rest of a line that was too long.
    is_amid_long_line: bool,
    count: u64,
}

impl Lines {
    pub(crate) fn of_stdin() -> Self {
        Self {
            input: BufReader::new(tokio::io::stdin()),
            is_amid_long_line: false,
            count: 0,
        }
    }

    /// How many there were, an error in the place of one among them.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// Drops what was read and is not asked for yet.
    pub(crate) fn drop_read(&mut self) {
        let read = self.input.buffer().len();
        self.input.consume(read);
    }

    pub(crate) async fn next(&mut self) -> Result<String, NoLine> {
        let read = self.read().await;
        if !matches!(read, Ok(None)) {
            self.count += 1;
        }
        match read {
            Ok(Some(line)) if self.count == 1 => text_of(without_mark(line)),
            Ok(Some(line)) => text_of(line),
            Ok(None) => Err(NoLine::End),
            Err(error) => Err(unreadable(&error)),
        }
    }

    /// All of it as one message, its last end of line aside.
    pub(crate) async fn all(&mut self) -> Result<String, NoLine> {
        let mut bytes = Vec::new();
        let mut input = (&mut self.input).take(MAX_LINE as u64);
        if let Err(error) = input.read_to_end(&mut bytes).await {
            return Err(unreadable(&error));
        }
        if bytes.pop_if(|last| *last == b'\n').is_some() {
            bytes.pop_if(|last| *last == b'\r');
        }
        text_of(without_mark(bytes))
    }

    /// The next line, or of a longer one as much as shows that it is.
    async fn read(&mut self) -> io::Result<Option<Vec<u8>>> {
        if self.is_amid_long_line {
            self.skip().await?;
        }
        let mut line = Vec::new();
        let mut input = (&mut self.input).take(MAX_LINE as u64);
        input.read_until(b'\n', &mut line).await?;
        if line.is_empty() {
            return Ok(None);
        }
        if line.pop_if(|last| *last == b'\n').is_some() {
            line.pop_if(|last| *last == b'\r');
        } else {
            // It is the last one, or longer.
            self.is_amid_long_line = line.len() == MAX_LINE;
        }
        Ok(Some(line))
    }

    /// Reads on behind the end of the line.
    async fn skip(&mut self) -> io::Result<()> {
        loop {
            let read = self.input.fill_buf().await?;
            let end = read.iter().position(|byte| *byte == b'\n');
            let count = end.map_or(read.len(), |end| end + 1);
            let is_over = end.is_some() || read.is_empty();
            self.input.consume(count);
            if is_over {
                self.is_amid_long_line = false;
                return Ok(());
            }
        }
    }
}

fn unreadable(error: &io::Error) -> NoLine {
    let line = format!("cannot read standard input: {error}");
    NoLine::Unreadable(Failure::new(RUNTIME, line))
}

fn without_mark(line: Vec<u8>) -> Vec<u8> {
    match line.strip_prefix(MARK.as_bytes()) {
        Some(text) => text.to_vec(),
        None => line,
    }
}

fn text_of(line: Vec<u8>) -> Result<String, NoLine> {
    let wrong = |what: String| NoLine::Wrong(Failure::new(USAGE, what));
    if line.len() > MAX_TEXT {
        let what =
            format!("more than {MAX_TEXT} bytes, the most that a message may have: split it");
        return Err(wrong(what));
    }
    String::from_utf8(line).map_err(|_| wrong("not UTF-8: convert the input first".into()))
}
