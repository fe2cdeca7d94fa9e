//! The terminal's own settings: keys one by one while a line is typed, and as they were before when
//! the program is stopped or ends.
//!
//! A terminal belongs to one job of the shell at a time. Whoever touches it while it is another's is
//! stopped by the system, so nothing here does.

use std::io::{self, Write, stdin, stdout};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::sleep;
use std::time::Duration;

use rustix::io::{Errno, ioctl_fionread, read};
use rustix::process::{getpgrp, getppid, getsid};
use rustix::termios::{
    ControlModes, InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr,
    tcgetpgrp, tcgetwinsize, tcsetattr,
};

use super::screen::Size;

const PASTE_IS_MARKED: &str = "\x1b[?2004h";
const PASTE_IS_NOT_MARKED: &str = "\x1b[?2004l";

/// A moment, in which a terminal takes what is drawn.
const TRIES: usize = 50;
const BETWEEN_TRIES: Duration = Duration::from_millis(5);

/// The terminal on standard input and output.
pub(super) struct Terminal {
    /// Its settings before they were changed, while they are.
    before: Mutex<Option<Termios>>,
}

/// What Ctrl-C and Ctrl-Z are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keys {
    /// Keys as any other, for a line that is typed.
    Keys,
    /// Signals: nobody reads keys.
    Signals,
}

impl Terminal {
    pub(super) fn new() -> Self {
        Self {
            before: Mutex::new(None),
        }
    }

    /// Whether it can be set up for keys.
    pub(super) fn is_usable() -> bool {
        tcgetattr(stdin()).is_ok() && tcgetattr(stdout()).is_ok()
    }

    /// Gives keys one by one, without showing them. Returns whether the terminal is this job's.
    pub(super) fn take(&self, keys: Keys) -> bool {
        if !is_ours() {
            return false;
        }
        let Ok(now) = tcgetattr(stdin()) else {
            return false;
        };
        let mut before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
        // A shell sets it up anew when it gets it back, and its user may have changed it.
        if now.local_modes.contains(LocalModes::ICANON) {
            write_out(PASTE_IS_MARKED);
            *before = Some(now.clone());
        }
        tcsetattr(stdin(), OptionalActions::Now, &by_keys(now, keys)).is_ok()
    }

    /// Makes it as it was.
    pub(super) fn give_back(&self) {
        let Some(mut before) = soon(&self.before) else {
            return;
        };
        if is_ours()
            && let Some(settings) = before.take()
        {
            let _ = tcsetattr(stdin(), OptionalActions::Now, &settings);
            write_out(PASTE_IS_NOT_MARKED);
        }
    }

    pub(super) fn size() -> Size {
        match tcgetwinsize(stdout()) {
            Ok(size) => Size::new(size.ws_col, size.ws_row),
            Err(_) => Size::new(0, 0),
        }
    }

    /// Waits for the next byte. `None` if there is none any more.
    pub(super) fn next_byte() -> Option<u8> {
        let mut byte = [0];
        loop {
            match read(stdin(), &mut byte) {
                Ok(1) => return Some(byte[0]),
                Err(Errno::INTR) => {}
                // Closed, or taken away from the program.
                _ => return None,
            }
        }
    }

    /// Whether there is more to read, without waiting for it.
    pub(super) fn has_more() -> bool {
        ioctl_fionread(stdin()).is_ok_and(|count| count > 0)
    }
}

/// What a lock guards, when it is free within a moment. Whoever holds it for longer waits for the
/// terminal, and may be the reason why the program must end.
pub(super) fn soon<T>(lock: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    for _ in 0..TRIES {
        match lock.try_lock() {
            Ok(guard) => return Some(guard),
            Err(TryLockError::Poisoned(guard)) => return Some(guard.into_inner()),
            Err(TryLockError::WouldBlock) => sleep(BETWEEN_TRIES),
        }
    }
    None
}

/// Whether this job has the terminal.
pub(super) fn is_ours() -> bool {
    tcgetpgrp(stdin()).is_ok_and(|job| job == getpgrp())
}

/// Whether there is a shell that can let the program go on once it is stopped.
pub(super) fn has_shell() -> bool {
    let Ok(session) = getsid(None) else {
        return false;
    };
    getppid().is_some_and(|parent| getsid(Some(parent)).is_ok_and(|other| other == session))
}

pub(super) fn write_out(text: &str) {
    // A terminal that is gone is noticed where it is read.
    let _ = try_write_out(text);
}

pub(super) fn try_write_out(text: &str) -> io::Result<()> {
    let mut stdout = stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

fn by_keys(mut settings: Termios, keys: Keys) -> Termios {
    // Enter stays a newline: what is left unread is for a program that takes it as one.
    settings.input_modes -=
        InputModes::BRKINT | InputModes::INPCK | InputModes::ISTRIP | InputModes::IXON;
    settings.control_modes |= ControlModes::CS8;
    settings.local_modes -=
        LocalModes::ECHO | LocalModes::ECHONL | LocalModes::ICANON | LocalModes::IEXTEN;
    settings
        .local_modes
        .set(LocalModes::ISIG, keys == Keys::Signals);
    settings.special_codes[SpecialCodeIndex::VMIN] = 1;
    settings.special_codes[SpecialCodeIndex::VTIME] = 0;
    // Ctrl-\ would leave the terminal as it is now.
    settings.special_codes[SpecialCodeIndex::VQUIT] = 0;
    settings
}
