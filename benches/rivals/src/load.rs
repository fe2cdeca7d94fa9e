//! What a client is asked to do, and what came of it.

use std::str::FromStr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, BufReader, stdin};
use tokio::task::JoinSet;

/// So many requests of so many bytes at once, for so long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) bytes: usize,
    pub(crate) in_flight: usize,
    pub(crate) time: Duration,
}

/// How long each request of a run took.
#[derive(Debug, Default)]
pub(crate) struct Latencies {
    /// In nanoseconds, in any order: a histogram for each caller would cost it its cache.
    nanos: Vec<u32>,
}

/// What came of a load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub(crate) requests: u64,
    pub(crate) took: Duration,
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
}

/// What sends requests.
pub(crate) trait Client: Send {
    /// Sends requests until the time is over, and returns once each has its reply.
    fn send(&mut self, load: Load) -> impl Future<Output = Latencies> + Send;
}

/// What sends one request at a time.
pub(crate) trait Caller: Send + 'static {
    /// Sends a payload and returns how long the reply is.
    fn call(&mut self) -> impl Future<Output = usize> + Send;
}

/// Lets every caller send one request after the other.
pub(crate) async fn send_with<C: Caller>(
    callers: impl IntoIterator<Item = C>,
    load: Load,
) -> (Latencies, Vec<C>) {
    let end = Instant::now() + load.time;
    let mut running = JoinSet::new();
    for mut caller in callers {
        running.spawn(async move {
            let mut latencies = Latencies::default();
            loop {
                let start = Instant::now();
                if start >= end {
                    return (latencies, caller);
                }
                assert_eq!(caller.call().await, load.bytes, "an echo is as long");
                latencies.record(start.elapsed());
            }
        });
    }
    let (mut all, mut callers) = (Latencies::default(), Vec::new());
    while let Some(ended) = running.join_next().await {
        let (latencies, caller) = ended.expect("a caller does not panic");
        all.nanos.extend(latencies.nanos);
        callers.push(caller);
    }
    (all, callers)
}

/// Does what the parent process asks for, line by line, and tells it what came of that.
pub(crate) async fn obey(mut client: impl Client) {
    println!("ready");
    let mut lines = BufReader::new(stdin()).lines();
    while let Some(line) = lines.next_line().await.expect("text") {
        let load: Load = line.parse().expect("a load");
        let start = Instant::now();
        let latencies = client.send(load).await;
        println!("{}", latencies.into_run(start.elapsed()).to_line());
    }
}

impl Load {
    /// As [`FromStr`] reads it; `grenache/echo.js` does too.
    pub(crate) fn to_line(self) -> String {
        let Self {
            bytes,
            in_flight,
            time,
        } = self;
        format!("{bytes} {in_flight} {}", time.as_millis())
    }
}

impl FromStr for Load {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, Self::Err> {
        let [bytes, in_flight, millis] = numbers(line)?;
        Ok(Self {
            bytes: bytes as usize,
            in_flight: in_flight as usize,
            time: Duration::from_millis(millis),
        })
    }
}

impl Latencies {
    pub(crate) fn record(&mut self, latency: Duration) {
        // Four seconds are as bad as more.
        self.nanos
            .push(u32::try_from(latency.as_nanos()).unwrap_or(u32::MAX));
    }

    fn into_run(mut self, took: Duration) -> Run {
        assert!(!self.nanos.is_empty(), "no request was answered");
        let requests = self.nanos.len() as u64;
        let mut at = |quantile: f64| {
            let last = self.nanos.len() - 1;
            let (_, nanos, _) = self
                .nanos
                .select_nth_unstable((last as f64 * quantile) as usize);
            Duration::from_nanos((*nanos).into())
        };
        let (p50, p99) = (at(0.5), at(0.99));
        Run {
            requests,
            took,
            p50,
            p99,
        }
    }
}

impl Run {
    fn to_line(self) -> String {
        let Self {
            requests,
            took,
            p50,
            p99,
        } = self;
        let [took, p50, p99] = [took, p50, p99].map(|time| time.as_nanos());
        format!("{requests} {took} {p50} {p99}")
    }
}

impl FromStr for Run {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, Self::Err> {
        let [requests, took, p50, p99] = numbers(line)?;
        let [took, p50, p99] = [took, p50, p99].map(Duration::from_nanos);
        Ok(Self {
            requests,
            took,
            p50,
            p99,
        })
    }
}

fn numbers<const N: usize>(line: &str) -> Result<[u64; N], String> {
    let numbers: Result<Vec<_>, _> = line.split_whitespace().map(u64::from_str).collect();
    numbers
        .ok()
        .and_then(|numbers| numbers.try_into().ok())
        .ok_or_else(|| format!("not {N} numbers: {line:?}"))
}
