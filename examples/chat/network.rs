//! The way into the network: by the grapes that are given, or by the one on this machine, or by one
//! inside this program where that is of use.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use grapevine::error::AnnounceError;
use grapevine::multiaddr::Protocol;
use grapevine::{Multiaddr, Node, Role, ServiceName};
use tokio::net::TcpStream;
use tokio::sync::OnceCell;
use tokio::time::timeout;

use crate::Cli;
use crate::common::flags::{Flags, all_interfaces};
use crate::common::key::Key;
use crate::common::output::Output;
use crate::common::{Failure, RUNTIME, shut_down};
use crate::mail::UNREACHABLE;
use crate::patience::patiently;
use crate::talk::{Answer, attend};

/// The name of the echo peer inside this program.
const ECHO: &str = "echo";

/// How long the system may take to say whether a port of this machine is open.
const PROBE: Duration = Duration::from_secs(1);

/// How long a grape may take to say whether somebody announces the echo, before it is not asked for it.
const ASKED: Duration = Duration::from_secs(3);

/// This program's own node, and what else it runs.
pub(crate) struct Network {
    pub(crate) node: Node,
    /// A grape and a peer of ours, where no other grape answers.
    inside: Option<(Node, Node)>,
    /// The grape on this machine, where it was joined.
    default: Option<Multiaddr>,
    /// A peer of ours at that one.
    echo: OnceCell<Node>,
}

/// What to do if no grape is given and none answers on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Otherwise {
    /// Start one inside this program, for who tries the program out.
    StartInside,
    /// Start one inside this program, for the echo in it: also where the grape has none.
    EchoInside,
    /// Wait for it, as `peer` does: nobody is there to start it, and it may be on its way.
    Wait,
    /// Say so: whom the message is for cannot be found in a grape that others do not know.
    Fail,
}

impl Otherwise {
    pub(crate) fn of(cli: &Cli, is_typed: bool) -> Self {
        if is_typed {
            Self::StartInside
        } else if cli.to.as_ref().is_some_and(|to| to.as_ref() == ECHO) {
            Self::EchoInside
        } else if cli.name.is_some() && cli.to.is_none() {
            Self::Wait
        } else {
            Self::Fail
        }
    }
}

impl Network {
    /// Starts the node, and a network inside this program if there is none to join.
    pub(crate) async fn join(
        cli: &Cli,
        key: &Key,
        otherwise: Otherwise,
        output: &Output,
    ) -> Result<Self, Failure> {
        let mut flags = cli.network.clone();
        let is_default = cli.default.fill(&mut flags);
        // Only who can be called needs to listen.
        let listen = cli.announced().map_or_else(Vec::new, |_| all_interfaces(0));
        let builder = flags.builder(Role::Peer, key, listen.clone());
        let node = builder.spawn().await?;
        if !is_default {
            return Ok(Self::of(node));
        }
        let address = &cli.default.default_grape;
        let joined = |node| Self {
            default: Some(address.clone()),
            ..Self::of(node)
        };
        if otherwise == Otherwise::Wait {
            return Ok(joined(node));
        }
        let asked = async {
            match otherwise {
                Otherwise::EchoInside => has_echo(&node, cli.timeout).await,
                _ => answers(&node).await,
            }
        };
        if patiently(output, || format!("the grape at {address}"), asked).await {
            return Ok(joined(node));
        }
        let missing = Missing::of(&node, address).await;
        shut_down(&node).await;
        if otherwise == Otherwise::Fail {
            return Err(Failure::new(UNREACHABLE, missing.failure(address)));
        }
        let network = Self::inside(flags, key, listen).await?;
        output.note(&missing.note(address, cli.announced())).await;
        Ok(network)
    }

    /// Starts a network inside this program, and the node in it.
    async fn inside(mut flags: Flags, key: &Key, listen: Vec<Multiaddr>) -> Result<Self, Failure> {
        let (grape, echo) = start_inside().await?;
        flags.bootstrap = grape.addresses();
        let node = flags.builder(Role::Peer, key, listen).spawn().await?;
        Ok(Self {
            inside: Some((grape, echo)),
            ..Self::of(node)
        })
    }

    fn of(node: Node) -> Self {
        Self {
            node,
            inside: None,
            default: None,
            echo: OnceCell::new(),
        }
    }

    /// Announces the echo, for a person who asks for it at the grape on this machine and finds nobody.
    /// Returns whether it is there now and was not before.
    pub(crate) async fn offer_echo(&self, name: &ServiceName, output: &Output) -> bool {
        let Some(address) = self.default.clone().filter(|_| name.as_ref() == ECHO) else {
            return false;
        };
        if self.echo.initialized() {
            return false;
        }
        let started = timeout(ASKED, start_echo(vec![address])).await;
        let Ok(Ok(echo)) = started else { return false };
        let line =
            format!("nobody answers to {ECHO}: announced a peer of that name inside this program");
        output.note(&line).await;
        self.echo.set(echo).is_ok()
    }

    /// Withdraws all names and closes all nodes.
    pub(crate) async fn leave(&self) {
        if let Some(echo) = self.echo.get() {
            shut_down(echo).await;
        }
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

/// What is not there.
#[derive(Clone, Copy)]
enum Missing {
    Grape,
    /// Something listens in its place, or it hangs.
    Answer,
    /// There is a grape.
    Echo,
}

impl Missing {
    async fn of(node: &Node, address: &Multiaddr) -> Self {
        if node.status().borrow().is_online() {
            Self::Echo
        } else if is_vacant(address).await {
            Self::Grape
        } else {
            Self::Answer
        }
    }

    fn what(self) -> &'static str {
        match self {
            Self::Grape => "no grape at",
            Self::Answer => "no answer from the grape at",
            Self::Echo => "nobody answers to \"echo\" at the grape at",
        }
    }

    fn remedy(self) -> &'static str {
        match self {
            Self::Grape => "start one with \"grape\"",
            Self::Answer => "restart it",
            Self::Echo => "start \"peer echo\"",
        }
    }

    fn failure(self, address: &Multiaddr) -> String {
        format!(
            "{} {address}: {}, or use --bootstrap",
            self.what(),
            self.remedy()
        )
    }

    fn note(self, address: &Multiaddr, announced: Option<&ServiceName>) -> String {
        let others = match announced {
            Some(name) => format!(
                "others cannot find {name} in it: {} first, or use --bootstrap",
                self.remedy()
            ),
            None => "--bootstrap joins others".into(),
        };
        let what = self.what();
        let started = match self {
            Self::Echo => "a grape",
            Self::Grape | Self::Answer => "one",
        };
        format!(
            "{what} {address}: started {started} inside this program, with a peer named \"{ECHO}\"; \
             {others}"
        )
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

/// Whether somebody can be reached who announces the echo at the only bootstrap grape. What stands
/// in the way may take its time, and all of it must leave some.
async fn has_echo(node: &Node, time: Duration) -> bool {
    let asked = async {
        let Ok(name) = ECHO.parse() else { return false };
        answers(node).await && node.lookup(&name).await.is_ok()
    };
    timeout(ASKED.min(time / 2), asked).await.unwrap_or(false)
}

/// Whether nothing at all listens at an address, which is another thing than a grape that hangs.
async fn is_vacant(address: &Multiaddr) -> bool {
    let Some(address) = tcp_address(address) else {
        return false;
    };
    let probe = timeout(PROBE, TcpStream::connect(address)).await;
    matches!(probe, Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused)
}

fn tcp_address(address: &Multiaddr) -> Option<SocketAddr> {
    let mut parts = address.iter();
    let ip: IpAddr = match parts.next()? {
        Protocol::Ip4(ip) => ip.into(),
        Protocol::Ip6(ip) => ip.into(),
        _ => return None,
    };
    match parts.next()? {
        Protocol::Tcp(port) => Some((ip, port).into()),
        _ => None,
    }
}

/// Real nodes over loopback, as between programs.
async fn start_inside() -> Result<(Node, Node), Failure> {
    let grape = Node::builder(Role::Grape)
        .listen([loopback()?])
        .spawn()
        .await?;
    let echo = start_echo(grape.addresses()).await?;
    Ok((grape, echo))
}

/// Announces the echo by these grapes.
async fn start_echo(grapes: Vec<Multiaddr>) -> Result<Node, Failure> {
    let echo = Node::builder(Role::Peer)
        .listen([loopback()?])
        .bootstrap(grapes)
        .spawn()
        .await?;
    if !answers(&echo).await {
        let line = "a grape on this machine cannot be reached: bring its loopback interface up, or \
                    use --bootstrap";
        return Err(Failure::new(UNREACHABLE, line));
    }
    let name = ECHO.parse().map_err(|error| Failure::new(RUNTIME, error))?;
    let service = echo
        .announce(&name)
        .await
        .map_err(|error: AnnounceError| Failure::new(RUNTIME, error))?;
    tokio::spawn(service.serve(|request| attend(request, Answer::Echo, None, |_, _| None)));
    Ok(echo)
}

fn loopback() -> Result<Multiaddr, Failure> {
    "/ip4/127.0.0.1/tcp/0"
        .parse()
        .map_err(|error| Failure::new(RUNTIME, error))
}
