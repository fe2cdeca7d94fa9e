//! What was aimed at, and whether this run meets it.

use std::fmt::{self, Display};

use crate::common::{Spread, Table};
use crate::contender::Contender::{self, *};
use crate::{Measured, ROWS, Rounds, Row};

/// A ratio of two contenders under one load, and what it should be.
struct Goal {
    what: &'static str,
    figure: fn(&Measured) -> f64,
    ours: Contender,
    theirs: Contender,
    row: Row,
    bound: Bound,
}

#[derive(Clone, Copy)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

/// The rates that are to reach a part of the bound of the same transport, by row.
const OF_CEILING: [(Row, f64); 3] = [(ROWS[1], 0.6), (ROWS[2], 0.6), (ROWS[3], 0.9)];

/// What others offer, encrypted where they can be, each beside Grapevine over the transport that it
/// uses.
const RIVALS: [(Contender, Contender); 4] = [
    (GrapevineTcp, TonicTls),
    (GrapevineTcp, AxumTls),
    (GrapevineTcp, Grenache),
    (GrapevineQuic, IrohStreams),
];

/// Prints each goal that these results can judge.
pub(crate) fn print(results: &[Rounds]) {
    let judged = |goal: Goal| Some((goal.measured(results)?, goal));
    let judged: Vec<_> = goals().into_iter().filter_map(judged).collect();
    if judged.is_empty() {
        return;
    }
    println!("\nGoals; ratios are taken within each round: median (min..max).");
    let table = Table::new(&["what", "payload", "in flight", "goal", "measured", "met"]);
    for (ratio, goal) in judged {
        table.row(&[
            format!("{}: {} / {}", goal.what, goal.ours.id(), goal.theirs.id()),
            goal.row.payload.into(),
            goal.row.in_flight.to_string(),
            goal.bound.to_string(),
            format!("{ratio:.2}"),
            match goal.bound.is_met(ratio.median) {
                true => "yes".into(),
                false => "no".into(),
            },
        ]);
    }
}

fn goals() -> Vec<Goal> {
    let rate = |ours, theirs, row, bound| Goal {
        what: "requests/s",
        figure: Measured::per_second,
        ours,
        theirs,
        row,
        bound: Bound::AtLeast(bound),
    };
    let mut goals = vec![Goal {
        what: "p50",
        figure: |measured| measured.run.p50.as_secs_f64(),
        ours: GrapevineTcp,
        theirs: KeptTcp,
        row: ROWS[0],
        bound: Bound::AtMost(1.3),
    }];
    for (ours, ceiling) in [(GrapevineTcp, KeptTcp), (GrapevineQuic, KeptQuic)] {
        goals.extend(OF_CEILING.map(|(row, bound)| rate(ours, ceiling, row, bound)));
    }
    for (ours, theirs) in RIVALS {
        goals.extend(ROWS.map(|row| rate(ours, theirs, row, 1.0)));
    }
    goals.push(rate(GrapevineTcp, Tonic, ROWS[1], 5.0));
    goals
}

impl Goal {
    fn measured(&self, results: &[Rounds]) -> Option<Spread> {
        let of = |contender| {
            let found = results
                .iter()
                .find(|rounds| rounds.contender == contender && rounds.row == self.row);
            Some(found?.runs.iter().map(self.figure))
        };
        let pairs = of(self.ours)?.zip(of(self.theirs)?);
        Some(Spread::of(pairs.map(|(ours, theirs)| ours / theirs)))
    }
}

impl Bound {
    fn is_met(self, ratio: f64) -> bool {
        match self {
            Self::AtLeast(bound) => ratio >= bound,
            Self::AtMost(bound) => ratio <= bound,
        }
    }
}

impl Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(bound) => write!(f, "at least {bound}"),
            Self::AtMost(bound) => write!(f, "at most {bound}"),
        }
    }
}
