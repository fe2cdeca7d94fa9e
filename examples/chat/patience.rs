//! Tells a person what they wait for, once that takes long.

use std::pin::pin;
use std::time::Duration;

use tokio::time::timeout;

use crate::common::output::Output;

/// How long nothing happens before a person is told what they wait for. A peer that was killed can
/// take a whole time-out to be found dead.
const PATIENCE: Duration = Duration::from_secs(2);

/// What `work` leads to. There is no prompt meanwhile, and nothing else to see.
pub(crate) async fn patiently<T>(
    output: &Output,
    awaited: impl FnOnce() -> String,
    work: impl Future<Output = T>,
) -> T {
    let mut work = pin!(work);
    if let Ok(done) = timeout(PATIENCE, &mut work).await {
        return done;
    }
    let line = format!("no answer from {} yet; Ctrl-C: leave", awaited());
    output.note(&line).await;
    work.await
}
