//! Times what runs on a GPU, after checking elements of each result: the grouped and block-sparse products
//! and the MoE layer at DBRX's shapes, or attention.
//!
//! ```text
//! cargo bench --bench gpu -- [--tokens 8192,1,64] [--what glu_nt,nn] [--emulated] [--out FILE]
//! cargo bench --bench gpu -- --attention [--what attention_decode] [--case "32 x 1"]... [--emulated] [--out FILE]
//! ```
//!
//! Weights are 6.3 GB of normal numbers, many times the L2 cache, so every call finds it cold. A figure is
//! the median of 7 batches of calls, each batch as long as 20 ms, timed on the host around a synchronised
//! stream; the layer is replayed as a graph. FLOP count the products alone, bytes the weights of the experts
//! in use. `--emulated` rehearses at small shapes without a GPU: its times mean nothing. One line of JSON per
//! figure, on standard output and in FILE, and the card's clocks and power at the start and at the end.
//! `gpu/attention.rs` says how attention is timed; its figures come with their shares of a product and a copy
//! of the same process.
//!
//! Each form's whole output is compared bit for bit with the first form's of the same product, and with what
//! the form's last timed call left: the elements that differ are counted in the record. A figure that fails
//! is a line with an `error` and costs no other. Exit codes: 0 fine, or no GPU and none required; 1 figures
//! are missing or results differ; 2 the arguments or the machine were refused.

#[path = "gpu/attention.rs"]
mod attention;
#[path = "gpu/ceilings.rs"]
mod ceilings;
#[path = "gpu/drawn.rs"]
mod drawn;
#[path = "gpu/layer.rs"]
mod layer;
#[path = "gpu/record.rs"]
mod record;

use std::fs::File;

use dropless::moe::Shape;
use dropless::{Device, Stream};
use dropless_kit::device;

use self::drawn::Table;
use self::record::{Failure, Meter, Record};

struct Options {
    attention: bool,
    tokens: Vec<usize>,
    /// The figures to measure; all if empty.
    what: Vec<String>,
    /// Parts of the names of attention's cases; all cases if empty.
    cases: Vec<String>,
    emulated: bool,
    out: Option<File>,
}

fn options() -> Result<Options, String> {
    let tokens = vec![8192, 2048, 1024, 512, 1, 8, 64, 4, 2, 16, 32, 128];
    let mut options = Options { attention: false, tokens, what: Vec::new(), cases: Vec::new(), emulated: false, out: None };
    let mut args = std::env::args().skip(1);
    let value = |args: &mut dyn Iterator<Item = String>, name: &str| args.next().ok_or(format!("{name} needs a value"));
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--bench" => {} // cargo's own
            "--attention" => options.attention = true,
            "--emulated" => options.emulated = true,
            "--tokens" => {
                let text = value(&mut args, "--tokens")?;
                options.tokens = text.split(',').map(|t| t.parse().map_err(|_| format!("--tokens {text}"))).collect::<Result<_, _>>()?;
            }
            "--what" => options.what = value(&mut args, "--what")?.split(',').map(String::from).collect(),
            "--case" => options.cases.push(value(&mut args, "--case")?),
            "--out" => {
                let path = value(&mut args, "--out")?;
                options.out = Some(File::create(&path).map_err(|error| format!("{path}: {error}"))?);
            }
            other => return Err(format!("{other} is no option: --attention, --tokens, --what, --case, --emulated, --out")),
        }
    }
    Ok(options)
}

/// The stream to time on; none where there is no GPU and none is required.
fn stream(emulated: bool) -> Result<Option<Stream>, Failure> {
    if emulated {
        return Ok(Some(device::emulated().1));
    }
    match Device::cuda(0).and_then(|device| device.stream()) {
        Ok(stream) => Ok(Some(stream)),
        Err(error) => {
            let required = ["DROPLESS_REQUIRE_GPU", "DROPLESS_HARDWARE_ONLY"];
            if required.iter().any(|name| std::env::var_os(name).is_some_and(|value| value == "1")) {
                return Err(format!("a GPU is required ({}), but: {error}", required.join(", ")).into());
            }
            println!("nothing measured: {error}");
            Ok(None)
        }
    }
}

/// True if every figure could be had, and everything agreed.
fn run() -> Result<bool, Failure> {
    let options = options()?;
    let emulated = options.emulated;
    let Some(stream) = stream(emulated)? else { return Ok(true) };
    let meter = Meter { stream: &stream, emulated };
    let mut record = Record::new(&stream, options.what, options.out);
    record.card("start");
    if options.attention {
        let n = if emulated { 128 } else { ceilings::N };
        let table = Table::new(&stream, if emulated { 768 } else { n }, 1.0)?;
        ceilings::measure(meter, &table, n, &mut record);
        attention::measure(meter, &table, &options.cases, &mut record)?;
    } else {
        let shape = if emulated { Shape::new(72, 136, 4, 2) } else { Shape::new(6144, 10752, 16, 4) };
        layer::measure(meter, shape, if emulated { &[3, 70] } else { &options.tokens }, &mut record)?;
    }
    record.card("end");
    if record.wrong() > 0 {
        eprintln!("{} figures are missing, or of results that differ", record.wrong());
    }
    Ok(record.wrong() == 0)
}

fn main() {
    match run() {
        Ok(fine) => std::process::exit(i32::from(!fine)),
        Err(failure) => {
            eprintln!("{failure}");
            std::process::exit(2);
        }
    }
}
