//! HTTP to a grape over one connection that is kept, as Grenache's clients speak it.
//!
//! Small enough to drive a grape harder than a grape can answer: the benchmark shares it.

use std::io::{Error, ErrorKind, Result};
use std::net::SocketAddr;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Longer than any head of an answer.
const MAX_HEADERS: usize = 32;

/// A connection to the API of a grape. One request at a time.
pub(crate) struct Connection {
    stream: TcpStream,
    received: Vec<u8>,
}

/// What a grape answers.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer<'a> {
    pub(crate) status: u16,
    pub(crate) body: &'a [u8],
}

/// A request as it goes over the wire, for [`Connection::exchange`].
pub(crate) fn request(verb: &str, data: &Value) -> Vec<u8> {
    let body = json!({ "rid": "0", "data": data }).to_string();
    let length = body.len();
    format!("POST /{verb} HTTP/1.1\r\nHost: grape\r\nContent-Length: {length}\r\n\r\n{body}").into()
}

impl Connection {
    pub(crate) async fn open(api: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(api).await?;
        stream.set_nodelay(true)?;
        let received = Vec::new();
        Ok(Self { stream, received })
    }

    /// Sends a whole request and reads the whole answer.
    pub(crate) async fn exchange(&mut self, request: &[u8]) -> Result<Answer<'_>> {
        self.stream.write_all(request).await?;
        self.received.clear();
        loop {
            if self.stream.read_buf(&mut self.received).await? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            if let Some((status, head, length)) = head(&self.received)?
                && self.received.len() >= head + length
            {
                let body = &self.received[head..head + length];
                return Ok(Answer { status, body });
            }
        }
    }

    /// Announces a service; the address is that of this connection.
    pub(crate) async fn announce(&mut self, name: &str, port: u16) {
        let request = request("announce", &json!([name, port]));
        let answer = self.exchange(&request).await.unwrap();
        let grapes: u32 = serde_json::from_slice(answer.body).expect("how many grapes took it");
        assert_ne!(grapes, 0, "{name}:{port}");
    }

    /// The providers of a name.
    pub(crate) async fn lookup(&mut self, name: &str) -> Vec<String> {
        let request = request("lookup", &json!(name));
        let answer = self.exchange(&request).await.unwrap();
        serde_json::from_slice(answer.body).unwrap()
    }
}

/// The status, and the lengths of head and body, once the whole head is there.
fn head(received: &[u8]) -> Result<Option<(u16, usize, usize)>> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let parsed = response.parse(received).map_err(Error::other)?;
    let (httparse::Status::Complete(head), Some(status)) = (parsed, response.code) else {
        return Ok(None);
    };
    let length = response
        .headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("content-length"))
        .and_then(|header| str::from_utf8(header.value).ok()?.parse().ok())
        .ok_or_else(|| Error::new(ErrorKind::InvalidData, "no length is told"))?;
    Ok(Some((status, head, length)))
}
