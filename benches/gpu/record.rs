//! How a call is timed, and where its figure goes.

use std::fs::File;
use std::io::Write;
use std::process::Command;
use std::time::{Duration, Instant};

use dropless::{Bf16, Buffer, Error, Stream};

/// Elements of each result that are computed again.
pub const CHECKED: usize = 8;

/// Elements that differ in any bit.
fn differing(got: &[Bf16], want: &[Bf16]) -> usize {
    got.iter().zip(want).filter(|(got, want)| got.0 != want.0).count() + got.len().abs_diff(want.len())
}

/// The median, least and greatest microseconds of a call, over 7 batches.
fn time(stream: &Stream, emulated: bool, mut call: impl FnMut() -> Result<(), Error>) -> Result<[f64; 3], Error> {
    let mut batch = |calls: u32| -> Result<Duration, Error> {
        stream.synchronize()?;
        let start = Instant::now();
        (0..calls).try_for_each(|_| call())?;
        stream.synchronize()?;
        Ok(start.elapsed())
    };
    let once = batch(1)?.min(batch(1)?);
    let calls = if emulated { 1 } else { (20e-3 / once.as_secs_f64()).ceil().clamp(1.0, 1000.0) as u32 };
    let batches = if emulated { 1 } else { 7 };
    let mut times = (0..batches).map(|_| Ok(batch(calls)?.as_secs_f64() * 1e6 / f64::from(calls))).collect::<Result<Vec<_>, Error>>()?;
    times.sort_by(f64::total_cmp);
    Ok([times[times.len() / 2], times[0], times[times.len() - 1]])
}

/// Times calls on a stream.
#[derive(Clone, Copy)]
pub struct Meter<'a> {
    pub stream: &'a Stream,
    pub emulated: bool,
}

impl Meter<'_> {
    /// Calls, lets `check` judge the result, then times; an output that is written in full is poisoned in
    /// between. What the last timed call left is compared with the first call's result. `first` is the first
    /// form's output, and is this one's if there was none.
    pub fn measure(
        &self,
        output: &mut Buffer<Bf16>,
        written_in_full: bool,
        first: &mut Option<Vec<Bf16>>,
        mut call: impl FnMut(&mut Buffer<Bf16>) -> Result<(), Error>,
        check: impl FnOnce(&[Bf16]) -> Result<(), Failure>,
    ) -> Result<Figure, Failure> {
        let Meter { stream, emulated } = *self;
        call(output)?;
        let once = output.to_vec(stream)?;
        check(&once)?;
        if written_in_full {
            output.copy_from_slice(stream, &vec![Bf16(u16::MAX); once.len()])?;
        }
        let us = time(stream, emulated, || call(output))?;
        let from_first_run = differing(&output.to_vec(stream)?, &once);
        let from_first_form = differing(&once, first.get_or_insert_with(|| once.clone()));
        Ok(Figure { us, differ: Some(Differ { from_first_form, from_first_run }) })
    }
}

/// Why a figure could not be had: an error of the crate's, or a wrong element.
pub type Failure = Box<dyn std::error::Error>;

/// Where a figure goes, and what went wrong so far.
pub struct Record {
    out: Option<File>,
    device: String,
    /// The figures to measure; all if empty.
    what: Vec<String>,
    /// TFLOP/s and GB/s that this process has measured as the most that the card does; 0 where it has not.
    ceilings: [f64; 2],
    wrong: usize,
}

impl Record {
    /// Nothing is wrong yet.
    pub fn new(stream: &Stream, what: Vec<String>, out: Option<File>) -> Record {
        Record { out, device: stream.device().name().to_owned(), what, ceilings: [0.0; 2], wrong: 0 }
    }

    /// Figures that are missing, and figures of results that differ.
    pub fn wrong(&self) -> usize {
        self.wrong
    }

    /// A line of JSON: the card and what the caller says of it, both on standard output and in the file.
    fn line(&mut self, fields: &str) {
        let line = format!(r#"{{"device":{},{fields}}}"#, quoted(&self.device));
        println!("{line}");
        if let Some(out) = &mut self.out {
            writeln!(out, "{line}").expect("the record can be written");
        }
    }

    /// Clocks, power and what holds the clocks down, from NVIDIA's tool where there is one.
    pub fn card(&mut self, at: &str) {
        let asked = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active";
        let output = Command::new("nvidia-smi").args([asked, "--format=csv"]).output();
        if let Ok(output) = output {
            let text = String::from_utf8_lossy(&output.stdout);
            self.line(&format!(r#""what":"card","at":"{at}","nvidia_smi":{}"#, quoted(text.trim())));
        }
    }

    /// Measures the most that the card does; what comes behind is told as a share of it.
    pub fn ceiling(&mut self, at: &At<'_>, measured: impl FnOnce() -> Result<Figure, Failure>) {
        let what = std::mem::take(&mut self.what); // ceilings are measured in any case
        if let Some(us) = self.figure(at, measured) {
            let [tflops, gb_s] = at.rates(us);
            self.ceilings = [self.ceilings[0].max(tflops), self.ceilings[1].max(gb_s)];
        }
        self.what = what;
    }

    /// Writes the figure that `measured` gives, or why there is none: nothing else is lost with it. Gives the
    /// median.
    pub fn figure(&mut self, at: &At<'_>, measured: impl FnOnce() -> Result<Figure, Failure>) -> Option<f64> {
        let At { what, form, case, tokens, .. } = *at;
        if !self.what.is_empty() && !self.what.iter().any(|wanted| wanted == what) {
            return None;
        }
        let case = if case.is_empty() { String::new() } else { format!(r#""case":"{case}","#) };
        let which = format!(r#""what":"{what}","form":"{form}",{case}"tokens":{tokens}"#);
        match measured() {
            Ok(Figure { us: [median, least, greatest], differ }) => {
                let rates = self.rates(at, median);
                let differences = differ.map_or(String::new(), |Differ { from_first_form, from_first_run }| {
                    format!(r#","differ_from_first_form":{from_first_form},"differ_from_first_run":{from_first_run}"#)
                });
                self.wrong += usize::from(differ.is_some_and(|differ| differ != Differ::default()));
                self.line(&format!(r#"{which},"us":{median:.1},"us_min":{least:.1},"us_max":{greatest:.1},{rates}{differences}"#));
                Some(median)
            }
            Err(failure) => {
                self.wrong += 1;
                self.line(&format!(r#"{which},"error":{}"#, quoted(&failure.to_string())));
                None
            }
        }
    }

    /// Rates, by the names they have in the record, and their shares of the ceilings where this process knows
    /// them.
    fn rates(&self, at: &At<'_>, us: f64) -> String {
        let [tflops, gb_s] = at.rates(us);
        let name = if at.case.is_empty() { "weight_gb_s" } else { "gb_s" };
        let mut text = format!(r#""tflops":{tflops:.1},"{name}":{gb_s:.1}"#);
        for (name, rate, ceiling) in [("of_matmul", tflops, self.ceilings[0]), ("of_copy", gb_s, self.ceilings[1])] {
            if rate > 0.0 && ceiling > 0.0 {
                text += &format!(r#","{name}":{:.3}"#, rate / ceiling);
            }
        }
        text
    }
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// What a figure is of, and what it counts.
#[derive(Clone, Copy, Default)]
pub struct At<'a> {
    pub what: &'a str,
    pub form: &'a str,
    /// Besides the tokens; empty where they say it all.
    pub case: &'a str,
    pub tokens: usize,
    pub flop: f64,
    /// Weights in use, or keys and values; what is read and written for a ceiling.
    pub bytes: f64,
}

impl At<'_> {
    /// TFLOP/s and GB/s of a call that takes so many microseconds.
    fn rates(&self, us: f64) -> [f64; 2] {
        [self.flop / us / 1e6, self.bytes / us / 1e3]
    }
}

/// The median, least and greatest microseconds of a call, and in how many elements its results differ.
pub struct Figure {
    pub us: [f64; 3],
    pub differ: Option<Differ>,
}

/// Elements that differ in any bit from what the first form computed, and from what the same form computed
/// before it was timed.
#[derive(Clone, Copy, Default, PartialEq)]
pub struct Differ {
    from_first_form: usize,
    from_first_run: usize,
}
