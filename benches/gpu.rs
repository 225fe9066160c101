//! Times the grouped and block-sparse products and the MoE layer on the GPU at DBRX's shapes, after checking elements of each result.
//!
//! ```text
//! cargo bench --bench gpu -- [--tokens 8192,1,64] [--what glu_nt,nn] [--emulated] [--out FILE]
//! ```
//!
//! Weights are 6.3 GB of normal numbers, many times the L2 cache, so every call finds it cold. A figure is the median of 7 batches of
//! calls, each batch as long as 20 ms, timed on the host around a synchronised stream; the layer is replayed as a graph. FLOP count
//! the products alone, bytes the weights of the experts in use. `--emulated` rehearses at small shapes without a GPU: its times mean nothing.
//! One line of JSON per figure, on standard output and in FILE, and the card's clocks and power at the start and at the end.
//!
//! Each form's whole output is compared bit for bit with the first form's of the same product, and with what the form's last timed call
//! left: the elements that differ are counted in the record. A figure that fails is a line with an `error` and costs no other.
//! Exit codes: 0 fine, or no GPU and none required; 1 figures are missing or results differ; 2 the arguments or the machine were refused.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::process::Command;
use std::time::{Duration, Instant};

use dropless::activation::Glu;
use dropless::block_sparse::{self, Dense, Sparse};
use dropless::epilogue::{Bias, GluEpilogue};
use dropless::moe::{self, Experts, Plan, Shape, Weights};
use dropless::router;
use dropless::{
    Bf16, Buffer, Device, Error, ExpertWeights, Float, Routing, RoutingBuffers, Rows, Stream, TokenIds, Topology, Workspace, embedding,
    grouped_gemm, permute,
};
use dropless_kit::device;
use dropless_kit::fill::{Random, normal};

/// Rows that the weights are drawn from.
const TABLE_ROWS: usize = 4096;
/// Elements of each result that are computed again.
const CHECKED: usize = 8;

struct Options {
    tokens: Vec<usize>,
    /// The figures to measure; all if empty.
    what: Vec<String>,
    emulated: bool,
    out: Option<File>,
}

fn options() -> Result<Options, String> {
    let mut options =
        Options { tokens: vec![8192, 2048, 1024, 512, 1, 8, 64, 4, 2, 16, 32, 128], what: Vec::new(), emulated: false, out: None };
    let mut args = std::env::args().skip(1);
    let value = |args: &mut dyn Iterator<Item = String>, name: &str| args.next().ok_or(format!("{name} needs a value"));
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--bench" => {} // cargo's own
            "--emulated" => options.emulated = true,
            "--tokens" => {
                let text = value(&mut args, "--tokens")?;
                options.tokens = text.split(',').map(|t| t.parse().map_err(|_| format!("--tokens {text}"))).collect::<Result<_, _>>()?;
            }
            "--what" => options.what = value(&mut args, "--what")?.split(',').map(String::from).collect(),
            "--out" => {
                let path = value(&mut args, "--out")?;
                options.out = Some(File::create(&path).map_err(|error| format!("{path}: {error}"))?);
            }
            other => return Err(format!("{other} is no option: --tokens, --what, --emulated, --out")),
        }
    }
    Ok(options)
}

/// Rows of normal numbers, and the table they were drawn from.
struct Drawn {
    buffer: Buffer<Bf16>,
    ids: Vec<u32>,
}

impl Drawn {
    fn new(stream: &Stream, table: &Buffer<Bf16>, seed: u64, rows: usize, cols: usize) -> Result<Drawn, Error> {
        let mut random = Random::new(seed);
        let ids: Vec<u32> = (0..rows).map(|_| random.below(TABLE_ROWS) as u32).collect();
        let (mut buffer, mut on_device) = (Buffer::zeros(stream, rows * cols)?, Buffer::zeros(stream, rows)?);
        let tokens = TokenIds::from_host(stream, &ids, TABLE_ROWS, &mut on_device)?;
        embedding::lookup(stream, tokens, table.rows(TABLE_ROWS, cols)?, &mut buffer.rows_mut(rows, cols)?)?;
        Ok(Drawn { buffer, ids })
    }
}

/// The layer's matrices on the device and, by their rows, on the host.
struct Model {
    shape: Shape,
    table: Vec<Bf16>,
    router: Buffer<Bf16>,
    w1: Drawn,
    v1: Drawn,
    w2: Drawn,
}

impl Model {
    fn new(stream: &Stream, shape: Shape) -> Result<Model, Error> {
        let Shape { d_model, d_ffn, num_experts, .. } = shape;
        let table = normal::<Bf16>(1, TABLE_ROWS * d_model, (d_model as f64).sqrt().recip());
        let on_device = Buffer::from_slice(stream, &table)?;
        let stack = |seed| Drawn::new(stream, &on_device, seed, num_experts * d_ffn, d_model);
        let router = Buffer::from_slice(stream, &table[..num_experts * d_model])?;
        Ok(Model { shape, router, w1: stack(2)?, v1: stack(3)?, w2: stack(4)?, table })
    }

    /// Row `row` of a stack.
    fn row(&self, stack: &Drawn, row: usize) -> &[Bf16] {
        &self.table[stack.ids[row] as usize * self.shape.d_model..][..self.shape.d_model]
    }

    /// The stacks' rows: gate, up and down.
    fn stacks(&self) -> Result<[Rows<'_, Bf16>; 3], Error> {
        let Shape { d_model, d_ffn, num_experts, .. } = self.shape;
        let [w1, v1, w2] = [&self.w1, &self.v1, &self.w2].map(|stack| stack.buffer.rows(num_experts * d_ffn, d_model));
        Ok([w1?, v1?, w2?])
    }

    /// The same as the experts' matrices.
    fn matrices(&self) -> Result<[ExpertWeights<'_>; 3], Error> {
        let ([w1, v1, w2], num_experts) = (self.stacks()?, self.shape.num_experts);
        Ok([ExpertWeights::nk(w1, num_experts)?, ExpertWeights::nk(v1, num_experts)?, ExpertWeights::kn(w2, num_experts)?])
    }

    fn router(&self) -> Result<Rows<'_, Bf16>, Error> {
        self.router.rows(self.shape.num_experts, self.shape.d_model)
    }

    fn weights(&self) -> Result<Weights<'_>, Error> {
        let [w1, v1, w2] = self.matrices()?;
        Ok(Weights::new(self.router()?, Experts::gated(w1, v1, w2)))
    }
}

fn dot(a: impl Iterator<Item = f64>, b: impl Iterator<Item = f64>) -> f64 {
    a.zip(b).map(|(a, b)| a * b).sum()
}

fn wide(values: &[Bf16]) -> impl Iterator<Item = f64> + '_ {
    values.iter().map(|value| f64::from(value.to_f32()))
}

/// An element is right within bf16's rounding and that of a long f32 sum.
fn close(got: Bf16, want: f64) -> Result<(), Failure> {
    let got = f64::from(got.to_f32());
    let right = (got - want).abs() <= 2f64.powi(-8) * want.abs() + 1e-3;
    if right { Ok(()) } else { Err(format!("an element is {got}, should be {want}").into()) }
}

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

/// Why a figure could not be had: an error of the crate's, or a wrong element.
type Failure = Box<dyn std::error::Error>;

/// Where a figure goes, and what went wrong so far.
struct Record {
    out: Option<File>,
    device: String,
    /// The figures to measure; all if empty.
    what: Vec<String>,
    wrong: usize,
}

impl Record {
    /// A line of JSON: the card and what the caller says of it, both on standard output and in the file.
    fn line(&mut self, fields: &str) {
        let line = format!(r#"{{"device":{},{fields}}}"#, quoted(&self.device));
        println!("{line}");
        if let Some(out) = &mut self.out {
            writeln!(out, "{line}").expect("the record can be written");
        }
    }

    /// Clocks, power and what holds the clocks down, from NVIDIA's tool where there is one.
    fn card(&mut self, at: &str) {
        let asked = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active";
        let output = Command::new("nvidia-smi").args([asked, "--format=csv"]).output();
        if let Ok(output) = output {
            let text = String::from_utf8_lossy(&output.stdout);
            self.line(&format!(r#""what":"card","at":"{at}","nvidia_smi":{}"#, quoted(text.trim())));
        }
    }

    /// Writes the figure that `measured` gives, or why there is none: nothing else is lost with it.
    fn figure(&mut self, at: &At, measured: impl FnOnce() -> Result<Figure, Failure>) {
        let At { what, form, tokens, flop, bytes } = *at;
        if !self.what.is_empty() && !self.what.iter().any(|wanted| wanted == what) {
            return;
        }
        let which = format!(r#""what":"{what}","form":"{form}","tokens":{tokens}"#);
        match measured() {
            Ok(Figure { us: [median, least, greatest], differ }) => {
                let rates = format!(r#""tflops":{:.1},"weight_gb_s":{:.1}"#, flop / median / 1e6, bytes / median / 1e3);
                let differences = differ.map_or(String::new(), |Differ { from_first_form, from_first_run }| {
                    format!(r#","differ_from_first_form":{from_first_form},"differ_from_first_run":{from_first_run}"#)
                });
                self.wrong += usize::from(differ.is_some_and(|differ| differ != Differ::default()));
                self.line(&format!(r#"{which},"us":{median:.1},"us_min":{least:.1},"us_max":{greatest:.1},{rates}{differences}"#));
            }
            Err(failure) => {
                self.wrong += 1;
                self.line(&format!(r#"{which},"error":{}"#, quoted(&failure.to_string())));
            }
        }
    }
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// What a figure is of, and what it counts.
#[derive(Clone, Copy)]
struct At {
    what: &'static str,
    form: &'static str,
    tokens: usize,
    flop: f64,
    bytes: f64,
}

/// The median, least and greatest microseconds of a call, and in how many elements its results differ.
struct Figure {
    us: [f64; 3],
    differ: Option<Differ>,
}

/// Elements that differ in any bit from what the first form computed, and from what the same form computed before it was timed.
#[derive(Clone, Copy, Default, PartialEq)]
struct Differ {
    from_first_form: usize,
    from_first_run: usize,
}

/// What every measurement needs.
#[derive(Clone, Copy)]
struct Bench<'a> {
    stream: &'a Stream,
    model: &'a Model,
    emulated: bool,
}

impl Bench<'_> {
    /// Calls, lets `check` judge the result, then times; an output that is written in full is poisoned in between. What the last timed
    /// call left is compared with the first call's result. `first` is the first form's output, and is this one's if there was none.
    fn measure(
        &self,
        output: &mut Buffer<Bf16>,
        written_in_full: bool,
        first: &mut Option<Vec<Bf16>>,
        mut call: impl FnMut(&mut Buffer<Bf16>) -> Result<(), Error>,
        check: impl FnOnce(&[Bf16]) -> Result<(), Failure>,
    ) -> Result<Figure, Failure> {
        let Bench { stream, emulated, .. } = *self;
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

    /// The same products over blocks, one weight at a time: `sdd` is `nt` of the sorted rows, whose time stands beside it, `dsd` is `nn`.
    fn sparse(&self, record: &mut Record, tokens: usize, routing: &Routing<'_>, sorted: &Buffer<Bf16>) -> Result<(), Failure> {
        let Bench { stream, model, .. } = *self;
        let Shape { d_model, d_ffn, num_experts, .. } = model.shape;
        let rows = routing.rows();
        let (flop, bytes) = ((2 * rows * d_model * d_ffn) as f64, (num_experts * d_model * d_ffn * 2) as f64);
        let ([w1, ..], x) = (model.matrices()?, sorted.rows(rows, d_model)?);
        let [w1_rows, _, w2_rows] = model.stacks()?;
        let mut h = Buffer::<Bf16>::zeros(stream, rows * d_ffn)?;
        let nt = At { what: "nt", form: "", tokens, flop, bytes };
        record.figure(&nt, || {
            let call = |h: &mut Buffer<Bf16>| grouped_gemm::nt(stream, x, w1, routing.expert_rows(), &mut h.rows_mut(rows, d_ffn)?);
            self.measure(&mut h, true, &mut None, call, |_| Ok(()))
        });
        drop(h);
        let mut first = None;
        for (block, form) in [(64, "64"), (128, "128")] {
            let mut topology = Topology::for_experts(stream, block, rows, &vec![d_ffn; num_experts])?;
            block_sparse::arrange(stream, routing.expert_rows(), &mut topology)?;
            let (w1, w2) = (Dense::from(w1_rows).t(), Dense::from(w2_rows));
            let stored = topology.stored_rows();
            let mut blocks = Buffer::<Bf16>::zeros(stream, stored * block)?;
            record.figure(&At { what: "sdd", form, ..nt }, || {
                let call =
                    |blocks: &mut Buffer<Bf16>| block_sparse::sdd(stream, x.into(), w1, &topology, &mut blocks.rows_mut(stored, block)?);
                self.measure(&mut blocks, false, &mut None, call, |_| Ok(()))
            });
            let mut y = Buffer::<Bf16>::zeros(stream, rows * d_model)?;
            let s = Sparse::new(&topology, blocks.rows(stored, block)?);
            record.figure(&At { what: "dsd", form, ..nt }, || {
                let call = |y: &mut Buffer<Bf16>| block_sparse::dsd(stream, s, w2, &mut y.rows_mut(rows, d_model)?);
                self.measure(&mut y, true, &mut first, call, |_| Ok(()))
            });
        }
        Ok(())
    }

    /// Everything for one number of tokens. An error is one that leaves nothing to measure.
    fn of(&self, record: &mut Record, tokens: usize) -> Result<(), Failure> {
        let Bench { stream, model, emulated } = *self;
        let Shape { d_model, d_ffn, num_experts, top_k, .. } = model.shape;
        let rows = tokens * top_k;
        let x_host = normal::<Bf16>(5, tokens * d_model, 1.0);
        let x = Buffer::from_slice(stream, &x_host)?;
        let x = || x.rows(tokens, d_model);
        let weights = model.weights()?;
        let [w1, v1, w2] = model.matrices()?;
        let plan = Plan::<Bf16>::new(model.shape, tokens)?;
        let mut workspace = Workspace::new(stream, plan.workspace_bytes())?;
        let mut y = Buffer::<Bf16>::zeros(stream, tokens * d_model)?;
        let mut buffers = RoutingBuffers::new(stream, tokens, top_k, num_experts)?;
        let mut layer_buffers = RoutingBuffers::new(stream, tokens, top_k, num_experts)?;

        let mut logits = Buffer::<f32>::zeros(stream, tokens * num_experts)?;
        router::logits(stream, x()?, model.router()?, &mut logits.rows_mut(tokens, num_experts)?)?;
        let routing = router::route(stream, logits.rows(tokens, num_experts)?, weights.choice, &mut buffers)?;
        let (ids, slots) = (routing.expert_ids().to_vec(stream)?, routing.row_to_slot().to_vec(stream)?);
        let offsets = routing.offsets().to_vec(stream)?;
        let owner = |row: usize| offsets.partition_point(|offset| *offset as usize <= row) - 1;
        let used = ids.iter().collect::<BTreeSet<_>>().len();
        let (flop, bytes) = ((2 * rows * d_model * d_ffn) as f64, (used * d_model * d_ffn * 2) as f64); // of one product
        let at = |what, form, products: f64| At { what, form, tokens, flop: products * flop, bytes: products * bytes };

        // What the gather inside `glu_nt` saves: the rows sorted beforehand, and the time that takes.
        let mut sorted = Buffer::<Bf16>::zeros(stream, rows * d_model)?;
        let (mut glus, mut products) = (None, None); // the first form's
        let mut h = Buffer::<Bf16>::zeros(stream, rows * d_ffn)?;
        record.figure(&At { what: "gather", form: "", tokens, flop: 0.0, bytes: (4 * rows * d_model) as f64 }, || {
            let call = |sorted: &mut Buffer<Bf16>| permute::gather(stream, x()?, &routing, &mut sorted.rows_mut(rows, d_model)?);
            self.measure(&mut sorted, true, &mut None, call, |_| Ok(()))
        });
        record.figure(&at("glu_nt_of_sorted", "", 2.0), || {
            let call = |h: &mut Buffer<Bf16>| {
                let (x, mut h) = (sorted.rows(rows, d_model)?, h.rows_mut(rows, d_ffn)?);
                grouped_gemm::glu_nt(stream, x, w1, v1, routing.expert_rows(), &mut h)
            };
            self.measure(&mut h, true, &mut glus, call, |_| Ok(()))
        });
        if tokens > 64
            && let Err(failure) = self.sparse(record, tokens, &routing, &sorted)
        {
            record.figure(&at("sparse", "", 0.0), || Err(failure));
        }
        drop(sorted);

        let mut out = Buffer::<Bf16>::zeros(stream, rows * d_model)?;
        for (form, class) in grouped_gemm::forms() {
            // Forms for few rows up to 64 tokens, those for many beyond; both at 64, where they may be
            // compared, and at 1, for what a plan in one class costs.
            let many = class == usize::MAX;
            if many != (tokens > 64) && ![1, 64].contains(&tokens) && !emulated {
                continue;
            }
            let mut random = Random::new(6);
            record.figure(&at("glu_nt", form, 2.0), || {
                let call = |h: &mut Buffer<Bf16>| {
                    let mut h = h.rows_mut(rows, d_ffn)?;
                    grouped_gemm::glu_nt(stream, x()?, w1, v1, routing.gathered_rows().in_class(class), &mut h)
                };
                self.measure(&mut h, true, &mut glus, call, |h| {
                    (0..CHECKED).try_for_each(|_| {
                        let (row, col) = (random.below(rows), random.below(d_ffn));
                        let x = &x_host[slots[row] as usize / top_k * d_model..][..d_model];
                        let [gate, up] = [&model.w1, &model.v1].map(|w| dot(wide(x), wide(model.row(w, owner(row) * d_ffn + col))));
                        close(h[row * d_ffn + col], gate / (1.0 + (-gate).exp()) * up)
                    })
                })
            });
            // All forms multiply the same rows, whatever this one has left.
            let h_host = glus.get_or_insert_with(|| normal(7, rows * d_ffn, 1.0));
            record.figure(&at("nn", form, 1.0), || {
                h.copy_from_slice(stream, h_host)?;
                let call = |out: &mut Buffer<Bf16>| {
                    let (h, mut out) = (h.rows(rows, d_ffn)?, out.rows_mut(rows, d_model)?);
                    grouped_gemm::nn(stream, h, w2, routing.expert_rows().in_class(class), &mut out)
                };
                self.measure(&mut out, true, &mut products, call, |out| {
                    (0..CHECKED).try_for_each(|_| {
                        let (row, col) = (random.below(rows), random.below(d_model));
                        let column = (0..d_ffn).map(|f| f64::from(model.row(&model.w2, owner(row) * d_ffn + f)[col].to_f32()));
                        close(out[row * d_model + col], dot(wide(&h_host[row * d_ffn..][..d_ffn]), column))
                    })
                })
            });
        }
        // With biases and the clamped gate of gpt-oss, which go through shared memory once more.
        record.figure(&at("glu_gpt_oss", "", 2.0), || {
            let bias = Buffer::<Bf16>::from_slice(stream, &normal(8, num_experts * d_ffn, 0.1))?;
            let bias = || bias.rows(num_experts, d_ffn).map(Bias::new);
            let epilogue = GluEpilogue::default().with_glu(Glu::GPT_OSS).with_biases([bias()?, bias()?]);
            let call = |h: &mut Buffer<Bf16>| {
                grouped_gemm::glu(stream, x()?, w1, v1, routing.gathered_rows(), &epilogue, &mut h.rows_mut(rows, d_ffn)?)
            };
            self.measure(&mut h, true, &mut None, call, |_| Ok(()))
        });
        drop((h, out));

        // As a graph, whose launches must give what the call gives; and with kernels that start before the one in front is done.
        let mut called = None;
        for (form, dependent) in [("graph", false), ("graph, dependent", true)] {
            record.figure(&at("layer", form, 3.0), || {
                let mut forward = |y: &mut Buffer<Bf16>| {
                    let y = &mut y.rows_mut(tokens, d_model)?;
                    moe::forward(stream, &plan, x()?, &weights, &mut layer_buffers, &mut workspace, y).map(|_| ())
                };
                forward(&mut y)?;
                called.get_or_insert(y.to_vec(stream)?);
                stream.set_dependent_launch(dependent);
                let graph = stream.capture(|| forward(&mut y));
                stream.set_dependent_launch(false);
                let graph = graph?;
                // SAFETY: every buffer that was recorded lives until the end of this function, behind which nothing is in flight.
                let figure = self.measure(&mut y, true, &mut called, |_| unsafe { graph.launch() }, |_| Ok(()))?;
                stream.synchronize()?;
                Ok(figure)
            });
        }
        Ok(stream.synchronize()?)
    }
}

/// True if every figure could be had, and everything agreed.
fn run() -> Result<bool, Failure> {
    let options = options()?;
    let (stream, shape, tokens) = if options.emulated {
        let shape = Shape::new(72, 136, 4, 2);
        (device::emulated().1, shape, vec![3, 70])
    } else {
        match Device::cuda(0).and_then(|device| device.stream()) {
            Ok(stream) => {
                let shape = Shape::new(6144, 10752, 16, 4);
                (stream, shape, options.tokens)
            }
            Err(error) => {
                let required = ["DROPLESS_REQUIRE_GPU", "DROPLESS_HARDWARE_ONLY"];
                if required.iter().any(|name| std::env::var_os(name).is_some_and(|value| value == "1")) {
                    return Err(format!("a GPU is required ({}), but: {error}", required.join(", ")).into());
                }
                println!("nothing measured: {error}");
                return Ok(true);
            }
        }
    };
    let mut record = Record { out: options.out, device: stream.device().name().to_owned(), what: options.what, wrong: 0 };
    record.card("start");
    let model = Model::new(&stream, shape)?;
    let bench = Bench { stream: &stream, model: &model, emulated: options.emulated };
    for tokens in tokens {
        if let Err(failure) = bench.of(&mut record, tokens) {
            record.figure(&At { what: "all", form: "", tokens, flop: 0.0, bytes: 0.0 }, || Err(failure));
        }
    }
    record.card("end");
    if record.wrong > 0 {
        eprintln!("{} figures are missing, or of results that differ", record.wrong);
    }
    Ok(record.wrong == 0)
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
