//! Lines of data on stdout.

use std::io::{self, ErrorKind};
use std::sync::{Arc, Mutex, PoisonError};

use grapevine::text::sanitise_line;
use tokio::io::AsyncWriteExt;

use super::stop::{Cause, Stop};
use super::{complain, note};

/// Where data goes. Cheap to clone. Nobody reading it any more is a wish to stop.
#[derive(Clone)]
pub(crate) struct Output {
    screen: Screen,
    stop: Stop,
}

/// Prints above the line that is being typed.
type Above = Box<dyn FnMut(String) -> io::Result<()> + Send>;

#[derive(Clone)]
enum Screen {
    Stdout(Arc<tokio::sync::Mutex<tokio::io::Stdout>>),
    #[allow(dead_code, reason = "only chat has a line editor")]
    Above(Arc<Mutex<Above>>),
}

impl Output {
    pub(crate) fn stdout(stop: Stop) -> Self {
        let stdout = tokio::io::stdout();
        let screen = Screen::Stdout(Arc::new(tokio::sync::Mutex::new(stdout)));
        Self { screen, stop }
    }

    /// Through a line editor, which keeps what is typed below.
    #[allow(dead_code, reason = "only chat has a line editor")]
    pub(crate) fn above(
        print: impl FnMut(String) -> io::Result<()> + Send + 'static,
        stop: Stop,
    ) -> Self {
        let screen = Screen::Above(Arc::new(Mutex::new(Box::new(print))));
        Self { screen, stop }
    }

    /// Writes a line, and returns when the system has taken it. A reader who is slow delays only
    /// who prints, never the node.
    pub(crate) async fn print(&self, line: impl Into<String>) {
        let mut line = line.into();
        line.push('\n');
        if let Err(error) = self.write(line).await {
            self.stop.ask(match error.kind() {
                ErrorKind::BrokenPipe => Cause::Unread,
                _ => {
                    complain(&format!("cannot write to standard output: {error}"));
                    Cause::Unwritable
                }
            });
        }
    }

    /// Tells a person something, beside the data.
    pub(crate) async fn note(&self, line: &str) {
        match &self.screen {
            Screen::Stdout(_) => note(line),
            Screen::Above(_) => self.print(sanitise_line(line)).await,
        }
    }

    async fn write(&self, line: String) -> io::Result<()> {
        match &self.screen {
            Screen::Stdout(stdout) => {
                let mut stdout = stdout.lock().await;
                stdout.write_all(line.as_bytes()).await?;
                stdout.flush().await
            }
            Screen::Above(print) => {
                let print = Arc::clone(print);
                let printed = tokio::task::spawn_blocking(move || {
                    let mut print = print.lock().unwrap_or_else(PoisonError::into_inner);
                    print(line)
                });
                printed.await.unwrap_or(Ok(()))
            }
        }
    }
}
