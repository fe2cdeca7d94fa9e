//! The way into the network: by the grapes that are given, or by one inside this program.

use grapevine::error::AnnounceError;
use grapevine::{Multiaddr, Node, Role};

use crate::Cli;
use crate::common::flags::all_interfaces;
use crate::common::{Failure, RUNTIME, note, shut_down};
use crate::talk::{Answer, attend};

/// The name of the echo peer inside this program.
const ECHO: &str = "echo";

/// This program's own node, and what else it runs.
pub(crate) struct Network {
    pub(crate) node: Node,
    /// A grape and a peer of ours, where no other grape answers.
    inside: Option<(Node, Node)>,
}

impl Network {
    /// Starts the node, and a network inside this program if there is none to join.
    pub(crate) async fn join(cli: &Cli) -> Result<Self, Failure> {
        let mut flags = cli.network.clone();
        let is_default = cli.default.fill(&mut flags);
        // Only who can be called needs to listen.
        let listen = match (&cli.name, cli.text()) {
            (Some(_), None) => all_interfaces(0),
            _ => Vec::new(),
        };
        let node = flags.builder(Role::Peer, listen.clone())?.spawn().await?;
        if !is_default || answers(&node).await {
            return Ok(Self { node, inside: None });
        }
        shut_down(&node).await;
        let (grape, echo) = start_inside().await?;
        let address = &cli.default.default_grape;
        let others = match (&cli.name, cli.text()) {
            (Some(name), None) => {
                format!("others cannot find {name} in it: start a grape first, or use --bootstrap")
            }
            _ => "--bootstrap joins others".into(),
        };
        note(&format!(
            "no grape at {address}: started one inside this program, with a peer named \"{ECHO}\"; \
             {others}"
        ));
        flags.bootstrap = grape.addresses();
        let node = flags.builder(Role::Peer, listen)?.spawn().await?;
        Ok(Self {
            node,
            inside: Some((grape, echo)),
        })
    }

    /// Withdraws all names and closes all nodes.
    pub(crate) async fn leave(&self) {
        shut_down(&self.node).await;
        if let Some((grape, echo)) = &self.inside {
            tokio::join!(shut_down(echo), shut_down(grape));
        }
    }

    /// Whether the grape is one that somebody else runs.
    pub(crate) fn is_shared(&self) -> bool {
        self.inside.is_none()
    }
}

/// Whether the only bootstrap grape is there: known as soon as the first dial ends.
async fn answers(node: &Node) -> bool {
    let mut status = node.status();
    let decided = status
        .wait_for(|status| {
            status.is_online()
                || status
                    .bootstrap
                    .iter()
                    .all(|grape| grape.last_failure.is_some())
        })
        .await;
    decided.is_ok_and(|status| status.is_online())
}

/// Real nodes over loopback, as between programs.
async fn start_inside() -> Result<(Node, Node), Failure> {
    let loopback: Multiaddr = "/ip4/127.0.0.1/tcp/0"
        .parse()
        .map_err(|error| Failure::new(RUNTIME, error))?;
    let grape = Node::builder(Role::Grape)
        .listen([loopback.clone()])
        .spawn()
        .await?;
    let echo = Node::builder(Role::Peer)
        .listen([loopback])
        .bootstrap(grape.addresses())
        .spawn()
        .await?;
    let name = ECHO.parse().map_err(|error| Failure::new(RUNTIME, error))?;
    let service = echo
        .announce(&name)
        .await
        .map_err(|error: AnnounceError| Failure::new(RUNTIME, error))?;
    tokio::spawn(service.serve(|request| attend(request, Answer::Echo, None)));
    Ok((grape, echo))
}
