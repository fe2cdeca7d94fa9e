//! Draws the rates: bars on a logarithmic axis, a group for each row.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use crate::contender::Contender::{self, *};
use crate::{Measured, ROWS, Rounds, Row};

const WIDTH: f64 = 860.0;
/// Where the axis begins and ends; names stand to the left, rates to the right.
const LEFT: f64 = 330.0;
const RIGHT: f64 = 780.0;
const BAR: f64 = 13.0;
const STEP: f64 = 18.0;
/// Above and below the bars of a group: its title, and the numbers of the axis.
const TITLE: f64 = 34.0;
const AXIS: f64 = 26.0;
const TOP: f64 = 52.0;
/// The axis is from a thousand to ten million requests in a second.
const DECADES: std::ops::RangeInclusive<i32> = 3..=7;

/// Writes `assets/rpc.svg`.
pub(crate) fn draw(results: &[Rounds]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/rpc.svg");
    fs::write(&path, svg(results)).expect("the assets can be written");
    println!("\nDrawn into `assets/rpc.svg`.");
}

fn svg(results: &[Rounds]) -> String {
    let mut groups = String::new();
    let mut top = TOP;
    for row in ROWS {
        let rounds: Vec<_> = results.iter().filter(|some| some.row == row).collect();
        top = draw_group(&mut groups, top, row, &rounds);
    }
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" font-family="sans-serif" font-size="12">
<rect width="{WIDTH}" height="{top}" rx="8" fill="#ffffff"/>
<text x="20" y="26" font-size="15" font-weight="bold" fill="#222222">Echo requests per second over loopback, client and server as two processes</text>
<text x="20" y="44" fill="#777777">Grey: a bound, one stream without a call for each request. Blue: what others offer.</text>
{groups}</svg>
"##
    )
}

/// Draws the bars of a row, and returns where the next group begins.
fn draw_group(svg: &mut String, top: f64, row: Row, rounds: &[&Rounds]) -> f64 {
    let (first, axis) = (top + TITLE, top + TITLE + rounds.len() as f64 * STEP);
    let Row {
        payload, in_flight, ..
    } = row;
    let mut line = |text: std::fmt::Arguments<'_>| {
        svg.write_fmt(text).expect("a string takes all");
        svg.push('\n');
    };
    let title = format_args!("{payload}, {in_flight} in flight");
    line(format_args!(
        r##"<text x="20" y="{}" font-weight="bold" fill="#222222">{title}</text>"##,
        top + 22.0
    ));
    for decade in DECADES {
        let x = x(10f64.powi(decade));
        line(format_args!(
            r##"<path d="M{x:.1} {first}V{axis}" stroke="#dddddd"/><text x="{x:.1}" y="{}" text-anchor="middle" font-size="10" fill="#777777">{}</text>"##,
            axis + 12.0,
            thousands(10f64.powi(decade))
        ));
    }
    for (index, rounds) in rounds.iter().enumerate() {
        let rate = rounds.spread(Measured::per_second);
        let y = first + index as f64 * STEP;
        let baseline = y + BAR - 2.5;
        let (colour, weight) = look(rounds.contender);
        line(format_args!(
            r##"<text x="{}" y="{baseline}" text-anchor="end" font-weight="{weight}" fill="#222222">{}</text><rect x="{LEFT}" y="{y}" width="{:.1}" height="{BAR}" fill="{colour}"/><text x="{:.1}" y="{baseline}" font-weight="{weight}" fill="#222222">{}</text>"##,
            LEFT - 8.0,
            rounds.contender.title().replace('*', ""),
            x(rate.median) - LEFT,
            x(rate.median) + 6.0,
            thousands(rate.median)
        ));
    }
    axis + AXIS
}

fn look(contender: Contender) -> (&'static str, &'static str) {
    match contender {
        GrapevineTcp | GrapevineQuic => ("#7b2d8b", "bold"),
        KeptTcp | KeptQuic | KeptTls | BareTcp | IrohKept => ("#c9c9c9", "normal"),
        _ => ("#6f9bc8", "normal"),
    }
}

fn x(rate: f64) -> f64 {
    let (low, high) = (f64::from(*DECADES.start()), f64::from(*DECADES.end()));
    LEFT + (RIGHT - LEFT) * ((rate.log10() - low) / (high - low)).clamp(0.0, 1.0)
}

/// A number with commas between its thousands.
fn thousands(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
