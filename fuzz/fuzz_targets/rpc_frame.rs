//! A stranger's frame as a request and as a reply, and as what grapes are told and answer on names:
//! `cargo +nightly fuzz run rpc_frame`.
//!
//! Decoding must not panic, and what it yields must encode to something that decodes to the same.
#![no_main]

use grapevine::proto::wire::{NamesReply, NamesRequest, Reply, Request, salvage_id};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|frame: &[u8]| {
    let id = salvage_id(frame);
    if let Ok(request) = Request::decode(frame) {
        assert_eq!(id, Some(request.id));
        let again = request
            .as_ref()
            .encode()
            .expect("a request that was decoded fits");
        assert_eq!(Request::decode(&again), Ok(request));
    }
    if let Ok(reply) = Reply::decode(frame) {
        let again = reply
            .as_ref()
            .encode()
            .expect("a reply that was decoded fits");
        assert_eq!(Reply::decode(&again), Ok(reply));
    }
    if let Ok(request) = NamesRequest::decode(frame) {
        let again = request.encode().expect("a request that was decoded fits");
        assert_eq!(NamesRequest::decode(&again), Ok(request));
    }
    if let Ok(reply) = NamesReply::decode(frame) {
        let again = reply.encode().expect("a reply that was decoded fits");
        assert_eq!(NamesReply::decode(&again), Ok(reply));
    }
});
