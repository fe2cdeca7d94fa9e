//! A peer and its addresses, signed by that peer.
//!
//! There are two forms of the envelope around them, and nobody but us reads both: the standard one of
//! libp2p's specification, which go, js and py write and read, and the legacy one of Rust's libp2p.

use std::sync::Arc;

use libp2p::{
    Multiaddr, PeerId,
    core::{
        PeerRecord, SignedEnvelope,
        peer_record::{self, FromEnvelopeError},
        signed_envelope::{self, ReadPayloadError},
    },
    identity::{Keypair, SigningError},
};

use crate::proto::addresses::plain;

/// A form of signed records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Domain `libp2p-peer-record`, payload type `03 01`.
    Standard,
    /// Domain `libp2p-routing-state`, payload type `/libp2p/routing-state-record`.
    Legacy,
}

/// A peer's signed record in the forms in which it has sent it; one at least.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Envelopes {
    standard: Option<Arc<[u8]>>,
    legacy: Option<Arc<[u8]>>,
}

/// A verified signed peer record: the holder of the peer's key has signed these addresses at some time.
///
/// Cheap to clone. It says nothing about when it was signed, nor about who passed it on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SignedPeer {
    peer: PeerId,
    form: Form,
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
        addresses: &[Multiaddr],
        form: Form,
    ) -> Result<Self, RecordError> {
        let peer = key.public().to_peer_id();
        let addresses = plain(&peer, addresses).take(Self::MAX_ADDRESSES).collect();
        let record = match form {
            Form::Standard => PeerRecord::new_interop(key, addresses)?,
            Form::Legacy => PeerRecord::new(key, addresses)?,
        };
        let envelope = record.to_signed_envelope().into_protobuf_encoding();
        Self::new(&record, form, envelope)
    }

    /// Reads and verifies what [`SignedPeer::envelope`] gave. Takes 50 to 80 µs.
    pub(crate) fn from_envelope(envelope: Vec<u8>) -> Result<Self, RecordError> {
        // Before any parsing: a record in memory takes many times its length on the wire.
        if envelope.len() > Self::MAX_LEN {
            return Err(RecordError::TooLarge(envelope.len()));
        }
        let signed = SignedEnvelope::from_protobuf_encoding(&envelope)?;
        let (record, form) = match PeerRecord::from_signed_envelope_interop(signed.clone()) {
            // Which is told before the signature is looked at.
            Err(FromEnvelopeError::BadPayload(ReadPayloadError::UnexpectedPayloadType {
                ..
            })) => (PeerRecord::from_signed_envelope(signed)?, Form::Legacy),
            standard => (standard?, Form::Standard),
        };
        Self::new(&record, form, envelope)
    }

    /// The record of `peer` that [`SignedPeer::from_envelope`] has verified before, to be passed on. Its
    /// addresses are not read again: there are none.
    pub(crate) fn from_verified(peer: PeerId, form: Form, envelope: Arc<[u8]>) -> Self {
        let addresses = Arc::default();
        Self {
            peer,
            form,
            addresses,
            envelope,
        }
    }

    fn new(record: &PeerRecord, form: Form, envelope: Vec<u8>) -> Result<Self, RecordError> {
        if envelope.len() > Self::MAX_LEN {
            return Err(RecordError::TooLarge(envelope.len()));
        }
        let peer = record.peer_id();
        let addresses = plain(&peer, record.addresses()).take(Self::MAX_ADDRESSES);
        Ok(Self {
            peer,
            form,
            addresses: addresses.collect(),
            envelope: envelope.into(),
        })
    }

    /// How it is signed.
    pub(crate) fn form(&self) -> Form {
        self.form
    }

    /// Who signed.
    pub(crate) fn peer(&self) -> PeerId {
        self.peer
    }

    /// Where the peer says it is, each address once and without its id; at most
    /// [`SignedPeer::MAX_ADDRESSES`], and not necessarily true.
    pub(crate) fn addresses(&self) -> &[Multiaddr] {
        &self.addresses
    }

    /// The bytes to pass on, with the signature.
    pub(crate) fn envelope(&self) -> &[u8] {
        &self.envelope
    }
}

impl Envelopes {
    /// Takes the record in the other form too, in place of one that was there.
    pub(crate) fn and(mut self, other: &SignedPeer) -> Self {
        *self.place(other.form) = Some(Arc::clone(&other.envelope));
        self
    }

    /// The record in one of the forms.
    pub(crate) fn of(&self, form: Form) -> Option<&Arc<[u8]>> {
        match form {
            Form::Standard => self.standard.as_ref(),
            Form::Legacy => self.legacy.as_ref(),
        }
    }

    /// The bytes of the longer one.
    pub(crate) fn longest(&self) -> usize {
        let both = [&self.standard, &self.legacy].into_iter().flatten();
        both.map(|envelope| envelope.len()).max().unwrap_or(0)
    }

    /// The bytes of it, in all forms.
    pub(crate) fn len(&self) -> usize {
        let both = [&self.standard, &self.legacy].into_iter().flatten();
        both.map(|envelope| envelope.len()).sum()
    }

    /// Whether these are the bytes of a record, and of the same in the legacy form if that was sent.
    pub(crate) fn are(&self, record: &[u8], legacy: Option<&[u8]>) -> bool {
        let known = [&self.standard, &self.legacy].map(Option::as_deref);
        match legacy {
            Some(legacy) => known == [Some(record), Some(legacy)],
            None => known == [Some(record), None] || known == [None, Some(record)],
        }
    }

    fn place(&mut self, form: Form) -> &mut Option<Arc<[u8]>> {
        match form {
            Form::Standard => &mut self.standard,
            Form::Legacy => &mut self.legacy,
        }
    }
}

impl From<&SignedPeer> for Envelopes {
    fn from(record: &SignedPeer) -> Self {
        let none = Self {
            standard: None,
            legacy: None,
        };
        none.and(record)
    }
}

#[cfg(test)]
impl From<&[u8]> for Envelopes {
    fn from(standard: &[u8]) -> Self {
        Self {
            standard: Some(standard.into()),
            legacy: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Domain and payload type of each form, as others write them.
    const FORMS: [(Form, &str, &[u8]); 2] = [
        (Form::Standard, "libp2p-peer-record", b"\x03\x01"),
        (
            Form::Legacy,
            "libp2p-routing-state",
            b"/libp2p/routing-state-record",
        ),
    ];

    fn addresses(count: u16) -> Vec<Multiaddr> {
        let address = |port| format!("/ip4/127.0.0.1/tcp/{port}").parse().unwrap();
        (1..=count).map(address).collect()
    }

    fn envelope_around(key: &Keypair, domain: &str, kind: &[u8], payload: Vec<u8>) -> Vec<u8> {
        let envelope = SignedEnvelope::new(key, domain.into(), kind.to_vec(), payload);
        envelope.unwrap().into_protobuf_encoding()
    }

    fn sign(key: &Keypair, count: u16) -> SignedPeer {
        SignedPeer::sign(key, &addresses(count), Form::Standard).unwrap()
    }

    #[test]
    fn signed_record_is_read_back() {
        let key = Keypair::generate_ed25519();
        for (form, ..) in FORMS {
            let signed = SignedPeer::sign(&key, &addresses(2), form).unwrap();
            assert_eq!(signed.peer(), key.public().to_peer_id());
            assert_eq!(signed.addresses(), addresses(2));
            assert_eq!(signed.form(), form);
            let read = SignedPeer::from_envelope(signed.envelope().to_vec()).unwrap();
            assert_eq!(read, signed);
        }
    }

    #[test]
    fn payload_signed_for_one_form_is_not_taken_in_the_other() {
        let key = Keypair::generate_ed25519();
        let payload = PeerRecord::new_interop(&key, addresses(1)).unwrap();
        let payload = payload.to_signed_envelope();
        let (payload, _) = payload
            .payload_and_signing_key(FORMS[0].1.into(), FORMS[0].2)
            .unwrap();
        for (form, domain, _) in FORMS {
            for (other, _, kind) in FORMS {
                let envelope = envelope_around(&key, domain, kind, payload.to_vec());
                let read = SignedPeer::from_envelope(envelope);
                assert_eq!(read.is_ok(), form == other, "{domain} {kind:x?}");
            }
        }
    }

    #[test]
    fn addresses_are_read_once_and_without_an_id() {
        let key = Keypair::generate_ed25519();
        let peer = key.public().to_peer_id();
        let with_id = addresses(1).remove(0).with_p2p(peer).unwrap();
        let both = vec![with_id, addresses(1).remove(0)];
        let record = PeerRecord::new_interop(&key, both.clone()).unwrap();
        let envelope = record.into_signed_envelope().into_protobuf_encoding();
        let read = SignedPeer::from_envelope(envelope).unwrap();
        assert_eq!(read.addresses(), addresses(1));
        let signed = SignedPeer::sign(&key, &both, Form::Standard).unwrap();
        assert_eq!(signed.addresses(), addresses(1));
    }

    #[test]
    fn envelopes_are_known_by_their_bytes() {
        let key = Keypair::generate_ed25519();
        let [standard, legacy] =
            FORMS.map(|(form, ..)| SignedPeer::sign(&key, &addresses(1), form).unwrap());
        let (s, l) = (standard.envelope(), legacy.envelope());
        let both = Envelopes::from(&standard).and(&legacy);
        assert!(both.are(s, Some(l)));
        assert!(!both.are(s, None) && !both.are(l, None) && !both.are(l, Some(s)));
        assert_eq!(both.len(), s.len() + l.len());
        for one in [&standard, &legacy] {
            let known = Envelopes::from(one);
            assert!(known.are(one.envelope(), None) && !known.are(s, Some(l)));
            let held = FORMS.map(|(form, ..)| known.of(form).is_some());
            assert_eq!(held, FORMS.map(|(form, ..)| form == one.form()));
        }
    }

    #[test]
    fn surplus_addresses_are_neither_signed_nor_used() {
        let key = Keypair::generate_ed25519();
        let signed = sign(&key, 20);
        assert_eq!(signed.addresses(), addresses(16));

        let record = PeerRecord::new(&key, addresses(20)).unwrap();
        let envelope = record.into_signed_envelope().into_protobuf_encoding();
        let read = SignedPeer::from_envelope(envelope).unwrap();
        assert_eq!(read.addresses(), addresses(16));
    }

    #[test]
    fn too_long_record_is_neither_made_nor_read() {
        let key = Keypair::generate_ed25519();
        let long = |port| {
            format!("/dns4/{}/tcp/{port}", "a".repeat(255))
                .parse()
                .unwrap()
        };
        let long: Vec<_> = (1..=16).map(long).collect();
        let result = SignedPeer::sign(&key, &long, Form::Standard);
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
        let signed = sign(&Keypair::generate_ed25519(), 1);
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
        for (_, domain, kind) in FORMS {
            let envelope = envelope_around(&signer, domain, kind, payload.clone());
            let result = SignedPeer::from_envelope(envelope);
            assert!(matches!(result, Err(RecordError::Record(_))), "{result:?}");
        }
    }

    proptest! {
        /// Behind a valid signature the parser is exposed: whoever attacks holds a key.
        #[test]
        fn any_signed_payload_is_read_without_panic(mut tail: Vec<u8>, own_id: bool, legacy: bool) {
            let key = Keypair::generate_ed25519();
            if own_id {
                let id = key.public().to_peer_id().to_bytes();
                let addresses = tail.chunks(20).flat_map(|multiaddr| {
                    let info = [&[0x0A, multiaddr.len() as u8], multiaddr].concat();
                    [&[0x1A, info.len() as u8], info.as_slice()].concat()
                });
                tail = [&[0x0A, id.len() as u8], id.as_slice()].concat().into_iter().chain(addresses).collect();
            }
            let (_, domain, kind) = FORMS[usize::from(legacy)];
            let _ = SignedPeer::from_envelope(envelope_around(&key, domain, kind, tail));
        }
    }
}
