//! Writes the gRPC service in Rust, so that no `protoc` is needed.

use tonic_build::manual::{Builder, Method, Service};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let message = "crate::grpc::Message";
    let echo = Method::builder()
        .name("echo")
        .route_name("Echo")
        .input_type(message)
        .output_type(message)
        .codec_path("tonic_prost::ProstCodec")
        .build();
    let service = Service::builder()
        .name("Echo")
        .package("rivals")
        .method(echo)
        .build();
    Builder::new().compile(&[service]);
}
