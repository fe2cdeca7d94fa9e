//! A connection that is cut when its client does not take what is written to it.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep};

/// How long a client may take for what has been written before it is flushed, an answer most often: as
/// long as to send a head. Of the longest answers these are 70 KB a second. It counts from when the
/// system takes no more, and not from the last byte that moved: who takes one now and then would hold an
/// answer for ever.
const WRITE_DEADLINE: Duration = Duration::from_secs(30);

/// A connection. What is read from it has no deadline here.
pub(super) struct Patient {
    stream: TcpStream,
    /// Runs out while something waits to be taken.
    patience: Option<Pin<Box<Sleep>>>,
}

impl Patient {
    pub(super) fn new(stream: TcpStream) -> Self {
        let patience = None;
        Self { stream, patience }
    }

    /// What has come of a write, unless the client has had its time.
    fn in_time<T>(
        &mut self,
        written: Poll<io::Result<T>>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            return written;
        }
        let start = || Box::pin(sleep(WRITE_DEADLINE));
        let patience = self.patience.get_or_insert_with(start);
        if patience.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        // Or the system would offer it what it holds for minutes more. Fails only if it is closed.
        let _ = self.stream.set_zero_linger();
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Patient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Patient {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.in_time(written, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.in_time(written, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        if flushed.is_ready() {
            // Who writes flushes once everything is written.
            self.patience = None;
        }
        self.in_time(flushed, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.in_time(shut, cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::time::Instant;

    use super::*;

    /// More than the system holds of a connection.
    const MUCH: usize = 32 << 20;

    async fn pair() -> (Patient, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap());
        let (client, accepted) = tokio::join!(client, listener.accept());
        (Patient::new(accepted.unwrap().0), client.unwrap())
    }

    // A paused clock stands while anything happens, and else runs to the next deadline.

    #[tokio::test(start_paused = true)]
    async fn who_takes_nothing_is_cut_off() {
        let (mut server, _client) = pair().await;
        let begun = Instant::now();
        let error = server.write_all(&vec![0; MUCH]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(begun.elapsed().as_secs(), WRITE_DEADLINE.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn who_takes_a_little_now_and_then_is_cut_off_too() {
        let (mut server, mut client) = pair().await;
        let slow = tokio::spawn(async move {
            let mut little = vec![0; 64 << 10];
            loop {
                sleep(Duration::from_secs(1)).await;
                client.read_exact(&mut little).await?;
            }
            #[expect(unreachable_code, reason = "gives the loop its type")]
            io::Result::Ok(())
        });
        let error = server.write_all(&vec![0; MUCH]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(server);
        slow.await.unwrap().unwrap_err();
    }

    #[tokio::test]
    async fn who_takes_an_answer_has_as_long_for_the_next_one() {
        let (mut server, mut client) = pair().await;
        let mut answer = vec![0; MUCH];
        let serves = async {
            server.write_all(&vec![0; MUCH]).await.unwrap();
            assert!(server.patience.is_some(), "it has waited");
            server.flush().await.unwrap();
        };
        let (_, read) = tokio::join!(serves, client.read_exact(&mut answer));
        read.unwrap();
        assert!(server.patience.is_none());
    }
}
