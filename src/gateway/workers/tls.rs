//! Finds out why a worker closes each connection: one with Grenache's `secure` speaks TLS, and says
//! nothing at all to who does not.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::worker::CONNECT_DEADLINE;

/// The head of the record and of a `ClientHello` of TLS 1.2 in it, before 32 bytes that are random.
const HELLO: [u8; 11] = [0x16, 3, 1, 0, 45, 1, 0, 0, 41, 3, 3];

/// No session, one cipher suite, no compression.
const HELLO_END: [u8; 7] = [0, 0, 2, 0xc0, 0x2f, 1, 0];

/// What the records begin with in which a server says hello, or why it does not.
const HANDSHAKE: u8 = 0x16;
const ALERT: u8 = 0x15;

/// Whether who listens at an address speaks TLS.
pub(super) async fn is_spoken_at(at: SocketAddr) -> bool {
    let asked = async {
        let mut stream = TcpStream::connect(at).await.ok()?;
        let hello = [&HELLO[..], &rand::random::<[u8; 32]>(), &HELLO_END].concat();
        stream.write_all(&hello).await.ok()?;
        let mut record = [0; 2];
        stream.read_exact(&mut record).await.ok()?;
        Some(matches!(record, [HANDSHAKE | ALERT, 3]))
    };
    timeout(CONNECT_DEADLINE, asked).await.ok().flatten() == Some(true)
}
