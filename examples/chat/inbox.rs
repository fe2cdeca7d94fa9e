//! What others send: a name of one's own, and the messages that arrive for it.

use grapevine::error::AnnounceError;
use grapevine::{Node, ServiceName};

use crate::common::RUNTIME;
use crate::common::output::Output;
use crate::mail::UNREACHABLE;
use crate::people::People;
use crate::talk::{Answer, Display, announce, attend};

/// Announces the person's own name and shows the messages that arrive, until the node is shut down.
/// Returns the exit code of a program that does nothing else.
pub(crate) async fn receive(node: Node, name: ServiceName, people: People, output: Output) -> u8 {
    let service = match announce(&node, &name, &output).await {
        Ok(service) => service,
        // The person has left before.
        Err(AnnounceError::Closed) => return 0,
        Err(error) => {
            output.note(&format!("error: {error}")).await;
            return match error {
                AnnounceError::NoGrape(_) => UNREACHABLE,
                _ => RUNTIME,
            };
        }
    };
    output.note(&format!("announced {name}")).await;
    let display = Display::new(output.clone());
    let show = async |request, people: People, display, output: Output| {
        let remark = |from: &str, peer| people.on_arrival(from, peer);
        attend(request, Answer::Receipt, Some(display), remark).await;
        if let Some(writer) = people.take_unoffered() {
            output.note(&format!("empty line: answer {writer}")).await;
        }
    };
    service
        .serve(|request| show(request, people.clone(), display.clone(), output.clone()))
        .await;
    0
}
