//! From the network to Grenache's workers: what other nodes ask this grape on behalf of the workers
//! that announced here.
//!
//! A request goes to one worker of its name: of two drawn at random the less busy one. If that cannot
//! be reached or has its hands full, the next one has it; what may have run is never sent twice. All
//! requests that wait here are open requests of the node, which bounds their number and bytes.

mod http;
mod questions;
mod socket;
mod tls;
mod worker;

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use lru::LruCache;
use rand::seq::IndexedRandom;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::payload::{self, Form};
use super::rpc::{Answer, MAX_MESSAGE};
use crate::http::DRAIN;
use crate::name::ServiceName;
use crate::node::{Carried, Directory, Request, ServesQuestion};
use crate::proto::wire::{EncodeError, ErrorCode, RemoteError};
use questions::Questions;
use worker::{Failed, Worker};

/// The workers that are remembered, each with a connection at most at rest; the least recently used
/// one is forgotten first.
const MAX_KNOWN: NonZeroUsize = NonZeroUsize::new(1_024).unwrap();

/// The workers of a name that are asked whether they are there: one that is suffices.
const MAX_PROBED: usize = 8;

/// The workers announced here. Cheap to clone.
#[derive(Clone)]
pub(super) struct Workers {
    directory: Directory,
    known: Arc<Mutex<LruCache<SocketAddr, Arc<Worker>>>>,
    http: http::Client,
    deadline: Duration,
}

impl Workers {
    pub(super) fn new(directory: Directory, deadline: Duration) -> Self {
        Self {
            directory,
            known: Arc::new(Mutex::new(LruCache::new(MAX_KNOWN))),
            http: http::client(),
            deadline,
        }
    }

    /// Answers what other nodes ask, until `stop` changes or its sender is dropped. Dropping the
    /// future drops the requests that are open.
    pub(super) async fn serve(
        self,
        mut carried: mpsc::Receiver<Carried>,
        mut stop: watch::Receiver<()>,
    ) {
        let mut tasks = JoinSet::new();
        let mut questions = Questions::default();
        let mut probes = FuturesUnordered::new();
        loop {
            let carried = tokio::select! {
                _ = stop.changed() => break,
                carried = carried.recv() => carried,
                Some((name, serves)) = probes.next() => {
                    answer(questions.take(&name), serves);
                    continue;
                }
            };
            while tasks.try_join_next().is_some() {}
            // The node is shut down.
            let Some(carried) = carried else { break };
            let workers = self.clone();
            match carried {
                Carried::Call(name, inbound) => {
                    tasks.spawn(async move { workers.call(&name, inbound.into()).await });
                }
                Carried::Withdraw(withdrawal) => {
                    tasks.spawn(async move {
                        workers.directory.withdraw_for_other(withdrawal).await;
                    });
                }
                Carried::Asks(name, question) => {
                    if !questions.add(&name, question) {
                        continue;
                    }
                    let (verdict, serves) = oneshot::channel();
                    let probed = name.clone();
                    tasks.spawn(async move {
                        // Fails only if nobody waits any more.
                        let _ = verdict.send(workers.serves(&probed).await);
                    });
                    probes.push(async move { (name, serves.await.unwrap_or(false)) });
                }
            }
        }
        let drained = async {
            while let Some((name, serves)) = probes.next().await {
                answer(questions.take(&name), serves);
            }
            while tasks.join_next().await.is_some() {}
        };
        // What is left after it is dropped, which answers it with an error.
        let _ = timeout(DRAIN, drained).await;
    }

    /// Whether a worker of the name is there.
    async fn serves(&self, name: &ServiceName) -> bool {
        let workers = self.of(name);
        let probed = workers.sample(&mut rand::rng(), MAX_PROBED);
        let mut verdicts: FuturesUnordered<_> = probed.map(|worker| worker.is_there()).collect();
        while let Some(is_there) = verdicts.next().await {
            if is_there {
                return true;
            }
        }
        false
    }

    async fn call(&self, name: &ServiceName, request: Request) {
        let (question, form) = match payload::question(request.payload()) {
            Ok(question) => question,
            Err(error) => return request.unread(&error),
        };
        let attempts = self.attempts(name, &question);
        let Ok(outcome) = timeout(self.deadline, attempts).await else {
            let seconds = self.deadline.as_secs_f32();
            return request.fail(format!("the worker has not answered within {seconds} s"));
        };
        match outcome {
            Ok(answer) => pass_on(request, &form, answer),
            Err(error) => request.answer(Err(error)),
        }
    }

    /// Tries one worker after the other.
    async fn attempts(&self, name: &ServiceName, question: &str) -> Result<Answer, RemoteError> {
        let mut left = self.of(name);
        let (mut is_busy, mut missed) = (false, String::new());
        while let Some(worker) = take(&mut left) {
            match worker.call(name.as_ref(), question).await {
                Ok(answer) => return Ok(answer),
                Err(Failed::Busy) => is_busy = true,
                Err(Failed::NotSent(reason)) => {
                    tracing::debug!(%name, worker = %worker.address(), reason, "not reached");
                    missed = format!("its worker at {}: {reason}", worker.address());
                }
                Err(Failed::Broken(reason)) => {
                    return Err(RemoteError::new(ErrorCode::HandlerFailed, reason));
                }
                Err(Failed::TooLarge) => {
                    let reason = format!("the worker's answer has more than {MAX_MESSAGE} bytes");
                    return Err(RemoteError::new(ErrorCode::TooLarge, reason));
                }
            }
        }
        // Neither has run: callers go on to the next provider.
        Err(match is_busy {
            true => RemoteError::new(ErrorCode::Busy, "its workers are busy"),
            false => RemoteError::new(ErrorCode::UnknownService, missed),
        })
    }

    fn of(&self, name: &ServiceName) -> Vec<Arc<Worker>> {
        let addresses = self.directory.own_workers(name.as_ref());
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let worker = |at| {
            let new = || Arc::new(Worker::new(at, self.http.clone()));
            Arc::clone(known.get_or_insert(at, new))
        };
        addresses.into_iter().map(worker).collect()
    }
}

fn answer(questions: Vec<ServesQuestion>, serves: bool) {
    for question in questions {
        question.answer(serves);
    }
}

/// Takes a worker out: one that is not known to be down if there is one, and of two of those the
/// less busy.
fn take(left: &mut Vec<Arc<Worker>>) -> Option<Arc<Worker>> {
    let all = 0..left.len();
    let up: Vec<usize> = all
        .clone()
        .filter(|&index| !left[index].is_down())
        .collect();
    let from = if up.is_empty() { all.collect() } else { up };
    let two = from.sample(&mut rand::rng(), 2).copied();
    let index = two.min_by_key(|&index| left[index].open_calls())?;
    Some(left.swap_remove(index))
}

fn pass_on(request: Request, form: &Form, answer: Answer) {
    match answer {
        Ok(result) => match form.answer(&result) {
            Ok(payload) => request.reply(payload),
            Err(error @ EncodeError::TooLarge { .. }) => request.too_large(error.to_string()),
            Err(error) => request.fail(error.to_string()),
        },
        Err(message) => request.fail(message),
    }
}
