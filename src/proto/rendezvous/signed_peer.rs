//! A peer and its addresses, signed by that peer.

use std::sync::Arc;

use libp2p::{
    Multiaddr, PeerId,
    core::{PeerRecord, SignedEnvelope, peer_record, signed_envelope},
    identity::{Keypair, SigningError},
};

/// A verified signed peer record: the holder of the peer's key has signed these addresses at some time.
///
/// Cheap to clone. It says nothing about when it was signed, nor about who passed it on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SignedPeer {
    peer: PeerId,
    addresses: Arc<[Multiaddr]>,
    envelope: Arc<[u8]>,
}

/// Why there is no [`SignedPeer`].
#[derive(Debug, thiserror::Error)]
pub(crate) enum RecordError {
    /// The envelope has more than [`SignedPeer::MAX_LEN`] bytes.
    #[error("signed peer record of {0} bytes")]
    TooLarge(usize),
    /// Not an envelope.
    #[error(transparent)]
    Envelope(#[from] signed_envelope::DecodingError),
    /// No peer record inside, or not signed by that peer.
    #[error(transparent)]
    Record(#[from] peer_record::FromEnvelopeError),
    /// The key cannot sign.
    #[error(transparent)]
    Signing(#[from] SigningError),
}

impl SignedPeer {
    /// Longest envelope in bytes. An Ed25519 peer's takes 182 and then what its addresses take, 10 to 100 each.
    pub(crate) const MAX_LEN: usize = 4 * 1024;

    /// Most addresses used of a record: nobody dials more, and a record could name two thousand.
    pub(crate) const MAX_ADDRESSES: usize = 16;

    /// Signs the first [`SignedPeer::MAX_ADDRESSES`] of `addresses`. Fails if they are so long that the envelope
    /// exceeds [`SignedPeer::MAX_LEN`].
    pub(crate) fn sign(
        key: &Keypair,
        addresses: impl IntoIterator<Item = Multiaddr>,
    ) -> Result<Self, RecordError> {
        let addresses = addresses.into_iter().take(Self::MAX_ADDRESSES).collect();
        let record = PeerRecord::new(key, addresses)?;
        let envelope = record.to_signed_envelope().into_protobuf_encoding();
        Self::new(&record, envelope)
    }

    /// Reads and verifies what [`SignedPeer::envelope`] gave. Takes 50 to 80 µs.
    pub(crate) fn from_envelope(envelope: Vec<u8>) -> Result<Self, RecordError> {
        // Before any parsing: a record in memory takes many times its length on the wire.
        if envelope.len() > Self::MAX_LEN {
            return Err(RecordError::TooLarge(envelope.len()));
        }
        let signed = SignedEnvelope::from_protobuf_encoding(&envelope)?;
        let record = PeerRecord::from_signed_envelope(signed)?;
        Self::new(&record, envelope)
    }

    /// The record of `peer` that [`SignedPeer::from_envelope`] has verified before, to be passed on. Its
    /// addresses are not read again: there are none.
    pub(crate) fn from_verified(peer: PeerId, envelope: Arc<[u8]>) -> Self {
        let addresses = Arc::default();
        Self {
            peer,
            addresses,
            envelope,
        }
    }

    fn new(record: &PeerRecord, envelope: Vec<u8>) -> Result<Self, RecordError> {
        if envelope.len() > Self::MAX_LEN {
            return Err(RecordError::TooLarge(envelope.len()));
        }
        let addresses = record.addresses().iter().take(Self::MAX_ADDRESSES);
        Ok(Self {
            peer: record.peer_id(),
            addresses: addresses.cloned().collect(),
            envelope: envelope.into(),
        })
    }

    /// Who signed.
    pub(crate) fn peer(&self) -> PeerId {
        self.peer
    }

    /// Where the peer says it is; at most [`SignedPeer::MAX_ADDRESSES`], and not necessarily true.
    pub(crate) fn addresses(&self) -> &[Multiaddr] {
        &self.addresses
    }

    /// The bytes to pass on, with the signature.
    pub(crate) fn envelope(&self) -> &[u8] {
        &self.envelope
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DOMAIN: &str = "libp2p-routing-state";
    const PAYLOAD_TYPE: &[u8] = b"/libp2p/routing-state-record";

    fn addresses(count: u16) -> Vec<Multiaddr> {
        let address = |port| format!("/ip4/127.0.0.1/tcp/{port}").parse().unwrap();
        (1..=count).map(address).collect()
    }

    fn envelope_around(key: &Keypair, payload: Vec<u8>) -> Vec<u8> {
        let envelope = SignedEnvelope::new(key, DOMAIN.into(), PAYLOAD_TYPE.to_vec(), payload);
        envelope.unwrap().into_protobuf_encoding()
    }

    #[test]
    fn signed_record_is_read_back() {
        let key = Keypair::generate_ed25519();
        let signed = SignedPeer::sign(&key, addresses(2)).unwrap();
        assert_eq!(signed.peer(), key.public().to_peer_id());
        assert_eq!(signed.addresses(), addresses(2));
        let read = SignedPeer::from_envelope(signed.envelope().to_vec()).unwrap();
        assert_eq!(read, signed);
    }

    #[test]
    fn surplus_addresses_are_neither_signed_nor_used() {
        let key = Keypair::generate_ed25519();
        let signed = SignedPeer::sign(&key, addresses(20)).unwrap();
        assert_eq!(signed.addresses(), addresses(16));

        let record = PeerRecord::new(&key, addresses(20)).unwrap();
        let envelope = record.into_signed_envelope().into_protobuf_encoding();
        let read = SignedPeer::from_envelope(envelope).unwrap();
        assert_eq!(read.addresses(), addresses(16));
    }

    #[test]
    fn too_long_record_is_neither_made_nor_read() {
        let key = Keypair::generate_ed25519();
        let long: Multiaddr = format!("/dns4/{}/tcp/1", "a".repeat(255)).parse().unwrap();
        let result = SignedPeer::sign(&key, vec![long; 16]);
        assert!(
            matches!(result, Err(RecordError::TooLarge(_))),
            "{result:?}"
        );

        let record = PeerRecord::new(&key, addresses(1000)).unwrap();
        let envelope = record.into_signed_envelope().into_protobuf_encoding();
        let result = SignedPeer::from_envelope(envelope);
        assert!(
            matches!(result, Err(RecordError::TooLarge(_))),
            "{result:?}"
        );
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let signed = SignedPeer::sign(&Keypair::generate_ed25519(), addresses(1)).unwrap();
        for at in 0..signed.envelope().len() {
            let mut envelope = signed.envelope().to_vec();
            envelope[at] ^= 1;
            assert!(SignedPeer::from_envelope(envelope).is_err(), "byte {at}");
        }
    }

    #[test]
    fn record_about_somebody_else_is_refused() {
        let (signer, other) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
        let mut payload = vec![0x0A, 38];
        payload.extend(other.public().to_peer_id().to_bytes());
        let result = SignedPeer::from_envelope(envelope_around(&signer, payload));
        assert!(matches!(result, Err(RecordError::Record(_))), "{result:?}");
    }

    proptest! {
        /// Behind a valid signature the parser is exposed: whoever attacks holds a key.
        #[test]
        fn any_signed_payload_is_read_without_panic(mut tail: Vec<u8>, own_id: bool) {
            let key = Keypair::generate_ed25519();
            if own_id {
                let id = key.public().to_peer_id().to_bytes();
                let addresses = tail.chunks(20).flat_map(|multiaddr| {
                    let info = [&[0x0A, multiaddr.len() as u8], multiaddr].concat();
                    [&[0x1A, info.len() as u8], info.as_slice()].concat()
                });
                tail = [&[0x0A, id.len() as u8], id.as_slice()].concat().into_iter().chain(addresses).collect();
            }
            let _ = SignedPeer::from_envelope(envelope_around(&key, tail));
        }
    }
}
