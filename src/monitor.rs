//! What monitoring reads of a node, over HTTP: `GET /metrics`, in the text format of OpenMetrics that
//! Prometheus scrapes, and `GET /healthz`.
//!
//! A [`Monitor`] is an ordinary client of a [`Node`]: it reads [`Node::metrics`] when it is asked. It
//! tells whoever can connect how much the node does and keeps, and neither names nor peers.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use crate::error::ListenError;
use crate::http::{Listener, Serving, health};
use crate::node::Node;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A server of a node's metrics. Dropping it closes all its connections at once.
#[derive(Debug)]
pub struct Monitor {
    address: SocketAddr,
    serving: Serving,
}

impl Monitor {
    /// Starts to serve, and returns when clients can connect. Port 0 is any free one.
    ///
    /// Must be called within a Tokio runtime with I/O and time enabled. Cancel-safe: dropping the
    /// future frees the port.
    ///
    /// # Errors
    /// If the address cannot be listened on.
    pub async fn spawn(node: Node, address: SocketAddr) -> Result<Self, ListenError> {
        let listener = Listener::bind(address).await?;
        let address = listener.address();
        let mut serving = Serving::new();
        serving.serve(listener, routes(node));
        Ok(Self { address, serving })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes no more connections, answers what is under way for up to a second, and closes. Dropping
    /// the future closes at once.
    pub async fn shutdown(self) {
        self.serving.shutdown().await;
    }
}

fn routes(node: Node) -> Router {
    let mut registry = Registry::with_prefix("grapevine");
    let version = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
    registry.register("build", "The library", version);
    registry.register_collector(Box::new(Readings(node.clone())));
    Router::new()
        .route("/metrics", get(metrics))
        .with_state(Arc::new(registry))
        .route("/healthz", get(async move || health(&node)))
}

async fn metrics(State(registry): State<Arc<Registry>>) -> Response {
    let mut text = String::new();
    match text::encode(&mut text, &registry) {
        Ok(()) => ([(CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// A node's metrics, as they are when they are asked for.
#[derive(Debug)]
struct Readings(Node);

impl Collector for Readings {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let now = self.0.metrics();
        let status = self.0.status();
        let bootstraps = &status.borrow().bootstrap.clone();
        let connected = bootstraps.iter().filter(|grape| grape.connected.is_some());
        let gauges = [
            (
                "bootstrap_addresses",
                "Bootstrap addresses given",
                bootstraps.len() as u64,
            ),
            (
                "bootstrap_connected",
                "Those of them that are connected",
                connected.count() as u64,
            ),
            ("peers", "Peers connected, grapes and others", now.peers),
            ("grapes", "Other grapes known", now.grapes),
            (
                "announced_names",
                "Names that this node announces",
                now.announced,
            ),
            (
                "open_requests",
                "Requests of others that are open",
                now.open_requests,
            ),
            (
                "provider_records",
                "Provider records kept for others",
                now.stored,
            ),
            (
                "workers",
                "Grenache's workers kept, of all grapes",
                now.workers,
            ),
            ("values", "Values kept", now.values),
        ];
        let counters = [
            ("lookups", "Lookups begun", now.lookups),
            (
                "lookups_found",
                "Lookups that found a live provider",
                now.lookups_found,
            ),
            (
                "kademlia_requests",
                "Kademlia requests sent for lookups",
                now.kademlia_requests,
            ),
            (
                "names_requests",
                "Requests sent to registries of names",
                now.names_requests,
            ),
            (
                "requests_sent",
                "Requests sent to other nodes",
                now.requests_sent,
            ),
            (
                "requests_received",
                "Requests that went to a handler",
                now.requests_received,
            ),
            (
                "requests_refused",
                "Requests answered with an error instead",
                now.requests_refused,
            ),
            (
                "names_told",
                "Names announced or renewed here by others, and kept",
                now.names_told,
            ),
            (
                "names_sought",
                "Names looked up here by others",
                now.names_sought,
            ),
            ("records_refused", "Provider records refused", now.refused),
            (
                "records_evicted",
                "Provider records that made room for others",
                now.evicted,
            ),
            (
                "records_expired",
                "Provider records that were not renewed",
                now.expired,
            ),
        ];
        for (name, help, value) in gauges {
            encode(&mut encoder, name, help, &ConstGauge::new(value))?;
        }
        for (name, help, value) in counters {
            encode(&mut encoder, name, help, &ConstCounter::new(value))?;
        }
        Ok(())
    }
}

fn encode(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    metric: &impl EncodeMetric,
) -> fmt::Result {
    metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
}
