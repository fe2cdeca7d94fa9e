//! Asks a peer for its own signed record, to see which form of them it reads.
//!
//! js-libp2p, go-libp2p and py-libp2p send one in identify, in the standard form; Rust's libp2p sends none,
//! or one in the legacy form. libp2p's identify takes no notice of the standard form, so the message is
//! read here once more, and only of a peer of which the form must be known.

use std::collections::HashMap;
use std::io;

use futures::io::{AsyncRead, AsyncWrite};
use libp2p::request_response::{self, OutboundFailure, ProtocolSupport};
use libp2p::{PeerId, StreamProtocol, identify};
use prost::Message;

use crate::limits::FRAME_DEADLINE;
use crate::proto::frame::read_frame;
use crate::proto::rendezvous::{Form, SignedPeer};

/// The longest message of identify, in bytes: twice what libp2p takes.
const MAX_MESSAGE: usize = 16 * 1024;

/// The behaviour of the Swarm that asks.
pub(crate) type Behaviour = request_response::Behaviour<Codec>;

/// What it tells.
pub(crate) type Event = request_response::Event<(), Form>;

/// Asks and is never asked: identify answers.
pub(crate) fn behaviour() -> Behaviour {
    let config = request_response::Config::default().with_request_timeout(FRAME_DEADLINE);
    let protocols = [(identify::PROTOCOL_NAME, ProtocolSupport::Outbound)];
    Behaviour::with_codec(Codec, protocols, config)
}

/// The forms that peers read, as far as they had to be asked.
#[derive(Debug, Default)]
pub(crate) struct Forms(HashMap<PeerId, Reads>);

#[derive(Clone, Copy, Debug)]
enum Reads {
    Asked,
    /// It did not answer, perhaps because identify was under way: js-libp2p takes one such stream.
    WaitsForIdentify,
    AskedAgain,
    Known(Form),
}

impl Forms {
    /// The form that a peer reads, if that is known.
    pub(crate) fn of(&self, peer: &PeerId) -> Option<Form> {
        match self.0.get(peer)? {
            Reads::Known(form) => Some(*form),
            _ => None,
        }
    }

    /// It must be known which form a peer reads. Returns whether to ask it.
    pub(crate) fn want(&mut self, peer: PeerId) -> bool {
        let is_new = !self.0.contains_key(&peer);
        self.0.entry(peer).or_insert(Reads::Asked);
        is_new
    }

    /// A peer has answered or not; `identified` says whether identify is over. Returns whether to ask it
    /// again.
    pub(crate) fn on_answer(
        &mut self,
        peer: &PeerId,
        answer: Result<Form, &OutboundFailure>,
        identified: bool,
    ) -> bool {
        let Some(reads) = self.0.get_mut(peer) else {
            return false;
        };
        *reads = match (answer, *reads) {
            (Ok(form), _) => Reads::Known(form),
            // Of the libraries of libp2p Rust's alone can do without identify.
            (Err(OutboundFailure::UnsupportedProtocols), _) | (Err(_), Reads::AskedAgain) => {
                Reads::Known(Form::Legacy)
            }
            (Err(_), _) if identified => Reads::AskedAgain,
            (Err(_), _) => Reads::WaitsForIdentify,
        };
        matches!(reads, Reads::AskedAgain)
    }

    /// Identify is over. Returns whether to ask the peer again.
    pub(crate) fn on_identified(&mut self, peer: &PeerId) -> bool {
        match self.0.get_mut(peer) {
            Some(reads @ Reads::WaitsForIdentify) => {
                *reads = Reads::AskedAgain;
                true
            }
            _ => false,
        }
    }

    /// A peer has no connection any more.
    pub(crate) fn forget(&mut self, peer: &PeerId) {
        self.0.remove(peer);
    }
}

/// Reads identify's message; the question is that the stream is opened.
#[derive(Clone, Debug)]
pub(crate) struct Codec;

#[derive(Clone, PartialEq, prost::Message)]
struct Identify {
    #[prost(bytes = "vec", optional, tag = "8")]
    signed_record: Option<Vec<u8>>,
}

impl request_response::Codec for Codec {
    type Protocol = StreamProtocol;
    type Request = ();
    type Response = Form;

    async fn read_request<T>(&mut self, _: &StreamProtocol, _: &mut T) -> io::Result<()>
    where
        T: AsyncRead + Unpin + Send,
    {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Form>
    where
        T: AsyncRead + Unpin + Send,
    {
        let message = read_frame(io, MAX_MESSAGE).await?.unwrap_or_default();
        Ok(form(&message))
    }

    async fn write_request<T>(&mut self, _: &StreamProtocol, _: &mut T, (): ()) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        Ok(())
    }

    async fn write_response<T>(&mut self, _: &StreamProtocol, _: &mut T, _: Form) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// The form of the record in a message; whoever sends none that can be read is taken for Rust's libp2p.
fn form(message: &[u8]) -> Form {
    let record = Identify::decode(message)
        .ok()
        .and_then(|told| told.signed_record);
    let record = record.and_then(|record| SignedPeer::from_envelope(record).ok());
    record.map_or(Form::Legacy, |record| record.form())
}

#[cfg(test)]
mod tests {
    use libp2p::identity::Keypair;

    use super::*;

    #[test]
    fn who_does_not_answer_is_asked_once_more_after_identify() {
        let (peer, silent) = (PeerId::random(), OutboundFailure::Timeout);
        let mut forms = Forms::default();
        assert!(!forms.on_identified(&peer) && !forms.on_answer(&peer, Ok(Form::Legacy), true));
        assert!(forms.want(peer) && !forms.want(peer));
        assert!(!forms.on_answer(&peer, Err(&silent), false));
        assert!(forms.on_identified(&peer) && !forms.on_identified(&peer));
        assert_eq!(forms.of(&peer), None);
        assert!(!forms.on_answer(&peer, Err(&silent), true));
        assert_eq!(forms.of(&peer), Some(Form::Legacy));
        forms.forget(&peer);
        assert!(forms.want(peer));
        assert!(forms.on_answer(&peer, Err(&silent), true));
        assert!(!forms.on_answer(&peer, Ok(Form::Standard), true));
        assert_eq!(forms.of(&peer), Some(Form::Standard));
    }

    #[test]
    fn the_form_is_that_of_the_record_in_identify() {
        let key = Keypair::generate_ed25519();
        let told = |record| {
            Identify {
                signed_record: record,
            }
            .encode_to_vec()
        };
        for expected in [Form::Standard, Form::Legacy] {
            let record = SignedPeer::sign(&key, &[], expected).unwrap();
            let record = record.envelope().to_vec();
            assert_eq!(form(&told(Some(record))), expected);
        }
        for none in [told(None), told(Some(vec![1])), vec![], vec![0xff]] {
            assert_eq!(form(&none), Form::Legacy);
        }
    }
}
