//! What a node can do, as it tells itself in identify: the id of a protocol for each ability.
//!
//! Nothing else tells it. The agent is for people, and who serves Kademlia need be no grape.

use libp2p::StreamProtocol;

use crate::limits::{
    KAD_PROTOCOL, KEPT_PROTOCOL, NAMES_PROTOCOL, REGISTRY_PROTOCOL, RENDEZVOUS_PROTOCOL,
};

/// One thing that a node may be able to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Capability {
    /// It keeps records for Kademlia and is asked for them.
    Kademlia,
    /// It is a rendezvous point.
    Rendezvous,
    /// It serves many requests on one stream, and keeps that open.
    KeptStreams,
    /// It keeps names and is asked for them by the service of that name: it is a grape.
    Names,
    /// It is told of other grapes' workers and asked for its own.
    Registry,
}

/// How each capability is told.
static IDS: [(Capability, StreamProtocol); 5] = [
    (Capability::Kademlia, KAD_PROTOCOL),
    (Capability::Rendezvous, RENDEZVOUS_PROTOCOL),
    (Capability::KeptStreams, KEPT_PROTOCOL),
    (Capability::Names, NAMES_PROTOCOL),
    (Capability::Registry, REGISTRY_PROTOCOL),
];

/// All that one node can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Capabilities(u8);

impl Capabilities {
    /// What a node can do that tells these ids, of which unknown ones mean nothing.
    pub(crate) fn told(ids: &[StreamProtocol]) -> Self {
        let told = IDS.iter().filter(|(_, id)| ids.contains(id));
        Self(told.fold(0, |all, (capability, _)| all | bit(*capability)))
    }

    pub(crate) fn has(self, capability: Capability) -> bool {
        self.0 & bit(capability) != 0
    }

    /// Whether it keeps announcements in any of the ways there are, as a bootstrap node must.
    pub(crate) fn keeps_announcements(self) -> bool {
        self.has(Capability::Names)
            || self.has(Capability::Kademlia)
            || self.has(Capability::Rendezvous)
    }
}

fn bit(capability: Capability) -> u8 {
    1 << capability as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_capability_is_told_by_its_own_id_and_by_no_other() {
        for (told, id) in &IDS {
            let capabilities = Capabilities::told(std::slice::from_ref(id));
            for (capability, _) in &IDS {
                assert_eq!(capabilities.has(*capability), capability == told, "{id}");
            }
        }
        let all = IDS.each_ref().map(|(_, id)| id.clone());
        let capabilities = Capabilities::told(&all);
        assert!(IDS.iter().all(|(each, _)| capabilities.has(*each)));
    }

    #[test]
    fn ids_of_others_tell_nothing() {
        let others = [
            "/ipfs/kad/1.0.0",
            "/grapevine/rpc/1.0.0",
            "/grapevine/names/2.0.0",
        ];
        let others = others.map(StreamProtocol::new);
        assert_eq!(Capabilities::told(&others), Capabilities::default());
        assert!(!Capabilities::default().keeps_announcements());
    }
}
