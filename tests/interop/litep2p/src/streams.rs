//! A protocol of litep2p's that gives out the streams of its id as they are.

use std::collections::HashMap;

use litep2p::codec::ProtocolCodec;
use litep2p::protocol::{Direction, TransportEvent, TransportService, UserProtocol};
use litep2p::substream::Substream;
use litep2p::types::SubstreamId;
use litep2p::{PeerId, ProtocolName};
use tokio::sync::{mpsc, oneshot};

pub type Opened = oneshot::Sender<Result<Substream, String>>;

pub struct Streams {
    name: &'static str,
    wanted: mpsc::Receiver<(PeerId, Opened)>,
    inbound: mpsc::Sender<Substream>,
}

/// Opens streams.
#[derive(Clone)]
pub struct Opener(mpsc::Sender<(PeerId, Opened)>);

impl Streams {
    pub fn new(name: &'static str) -> (Self, Opener, mpsc::Receiver<Substream>) {
        let (opener, wanted) = mpsc::channel(64);
        let (inbound, streams) = mpsc::channel(64);
        let protocol = Self {
            name,
            wanted,
            inbound,
        };
        (protocol, Opener(opener), streams)
    }
}

impl Opener {
    pub async fn open(&self, peer: PeerId) -> Result<Substream, String> {
        let (opened, stream) = oneshot::channel();
        let sent = self.0.send((peer, opened)).await;
        sent.map_err(|_| "the protocol has ended".to_owned())?;
        stream
            .await
            .map_err(|_| "the protocol has ended".to_owned())?
    }
}

#[async_trait::async_trait]
impl UserProtocol for Streams {
    fn protocol(&self) -> ProtocolName {
        ProtocolName::from(self.name)
    }

    fn codec(&self) -> ProtocolCodec {
        ProtocolCodec::Unspecified
    }

    async fn run(mut self: Box<Self>, mut service: TransportService) -> litep2p::Result<()> {
        use futures::StreamExt;

        let mut pending: HashMap<SubstreamId, Opened> = HashMap::new();
        loop {
            tokio::select! {
                wanted = self.wanted.recv() => {
                    let Some((peer, opened)) = wanted else { return Ok(()) };
                    match service.open_substream(peer) {
                        Ok(id) => drop(pending.insert(id, opened)),
                        Err(error) => drop(opened.send(Err(format!("{error:?}")))),
                    }
                }
                event = service.next() => match event {
                    Some(TransportEvent::SubstreamOpened { direction, substream, .. }) => match direction {
                        Direction::Inbound => drop(self.inbound.send(substream).await),
                        Direction::Outbound(id) => if let Some(opened) = pending.remove(&id) {
                            drop(opened.send(Ok(substream)));
                        }
                    },
                    Some(TransportEvent::SubstreamOpenFailure { substream, error }) => {
                        if let Some(opened) = pending.remove(&substream) {
                            drop(opened.send(Err(format!("{error:?}"))));
                        }
                    }
                    Some(_) => {}
                    None => return Ok(()),
                },
            }
        }
    }
}
