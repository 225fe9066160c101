//! Times the grouped products and the MoE layer on the GPU at DBRX's shapes, after checking elements of each result.
//!
//! ```text
//! cargo bench --bench gpu -- [--tokens 1,8,64,512,8192] [--emulated] [--out FILE]
//! ```
//!
//! Weights are 6.3 GB of normal numbers, many times the L2 cache, so every call finds it cold. A figure is the median of 7 batches of
//! calls, each batch as long as 20 ms, timed on the host around a synchronised stream; the layer is replayed as a graph. FLOP count
//! the products alone, bytes the weights of the experts in use. `--emulated` rehearses at small shapes without a GPU: its times mean nothing.
//! One line of JSON per figure, on standard output and in FILE.

use std::fs::File;
use std::io::Write;
use std::time::{Duration, Instant};

use dropless::grouped_gemm::tiles::{FORMS, with_form};
use dropless::moe::{self, Plan, Shape, Weights};
use dropless::router::Normalize;
use dropless::{
    Bf16, Buffer, Device, Error, ExpertWeights, Float, Routing, RoutingBuffers, Stream, TokenIds, Workspace, embedding, grouped_gemm,
    permute,
};
use dropless_kit::device;
use dropless_kit::fill::{Random, normal};

/// Rows that the weights are drawn from.
const TABLE_ROWS: usize = 4096;
/// Elements of each result that are computed again.
const CHECKED: usize = 8;

struct Options {
    tokens: Vec<usize>,
    emulated: bool,
    out: Option<File>,
}

fn options() -> Result<Options, String> {
    let mut options = Options { tokens: vec![1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192], emulated: false, out: None };
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
            "--out" => {
                let path = value(&mut args, "--out")?;
                options.out = Some(File::create(&path).map_err(|error| format!("{path}: {error}"))?);
            }
            other => return Err(format!("{other} is no option: --tokens, --emulated, --out")),
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

    fn weights(&self) -> Result<Weights<'_, Bf16>, Error> {
        let Shape { d_model, d_ffn, num_experts, .. } = self.shape;
        let [w1, v1, w2] = [&self.w1, &self.v1, &self.w2].map(|stack| stack.buffer.rows(num_experts * d_ffn, d_model));
        Ok(Weights {
            router: self.router.rows(num_experts, d_model)?,
            w1: ExpertWeights::nk(w1?, num_experts)?,
            v1: ExpertWeights::nk(v1?, num_experts)?,
            w2: ExpertWeights::kn(w2?, num_experts)?,
        })
    }
}

fn dot(a: impl Iterator<Item = f64>, b: impl Iterator<Item = f64>) -> f64 {
    a.zip(b).map(|(a, b)| a * b).sum()
}

fn wide(values: &[Bf16]) -> impl Iterator<Item = f64> + '_ {
    values.iter().map(|value| f64::from(value.to_f32()))
}

/// Elements are right within bf16's rounding and that of a long f32 sum.
fn close(what: &str, got: Bf16, want: f64) {
    let got = f64::from(got.to_f32());
    assert!((got - want).abs() <= 2f64.powi(-8) * want.abs() + 1e-3, "{what}: {got}, should be {want}");
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

struct Record {
    out: Option<File>,
    device: String,
}

impl Record {
    fn line(&mut self, what: &str, form: &str, tokens: usize, [median, least, greatest]: [f64; 3], flop: f64, bytes: f64) {
        let line = format!(
            r#"{{"device":"{}","what":"{what}","form":"{form}","tokens":{tokens},"us":{median:.1},"us_min":{least:.1},"us_max":{greatest:.1},"tflops":{:.1},"weight_gb_s":{:.1}}}"#,
            self.device,
            flop / median / 1e6,
            bytes / median / 1e3
        );
        println!("{line}");
        if let Some(out) = &mut self.out {
            writeln!(out, "{line}").expect("the record can be written");
        }
    }
}

/// Everything for one number of tokens.
fn measure(stream: &Stream, model: &Model, emulated: bool, record: &mut Record, tokens: usize) -> Result<(), Error> {
    let Shape { d_model, d_ffn, num_experts, top_k, .. } = model.shape;
    let rows = tokens * top_k;
    let x_host = normal::<Bf16>(5, tokens * d_model, 1.0);
    let x = Buffer::from_slice(stream, &x_host)?;
    let mut y = Buffer::<Bf16>::zeros(stream, tokens * d_model)?;
    let weights = model.weights()?;
    let plan = Plan::<Bf16>::new(model.shape, tokens)?;
    let mut workspace = Workspace::new(stream, plan.workspace_bytes())?;
    let mut buffers = RoutingBuffers::new(stream, tokens, top_k, num_experts)?;
    let mut layer = |buffers: &mut RoutingBuffers| -> Result<(Vec<u32>, Vec<f32>), Error> {
        let mut y = y.rows_mut(tokens, d_model)?;
        let routing = moe::forward(stream, &plan, x.rows(tokens, d_model)?, &weights, buffers, &mut workspace, &mut y)?;
        Ok((routing.expert_ids().to_vec(stream)?, routing.weights().to_vec(stream)?))
    };
    let (ids, route_weights) = layer(&mut buffers)?;
    let used = ids.iter().collect::<std::collections::BTreeSet<_>>().len();
    let (flop, bytes) = ((2 * rows * d_model * d_ffn) as f64, (used * d_model * d_ffn * 2) as f64); // of one product

    let routing = Routing::from_host(stream, &ids, &route_weights, &mut buffers)?;
    let (offsets, slots) = (routing.offsets().to_vec(stream)?, routing.row_to_slot().to_vec(stream)?);
    let owner = |row: usize| offsets.partition_point(|offset| *offset as usize <= row) - 1;
    let mut h = Buffer::<Bf16>::zeros(stream, rows * d_ffn)?;
    let mut out = Buffer::<Bf16>::zeros(stream, rows * d_model)?;
    // What the gather inside `glu_nt` saves: the rows sorted beforehand, and the time that takes.
    let mut sorted = Buffer::<Bf16>::zeros(stream, rows * d_model)?;
    let mut gather = || permute::gather(stream, x.rows(tokens, d_model)?, &routing, &mut sorted.rows_mut(rows, d_model)?);
    let spent = time(stream, emulated, &mut gather)?;
    record.line("gather", "", tokens, spent, 0.0, (4 * rows * d_model) as f64);
    let mut glu_of_sorted = || {
        let mut h = h.rows_mut(rows, d_ffn)?;
        grouped_gemm::glu_nt(stream, sorted.rows(rows, d_model)?, weights.w1, weights.v1, routing.expert_rows(), &mut h)
    };
    let spent = time(stream, emulated, &mut glu_of_sorted)?;
    record.line("glu_nt_of_sorted", "", tokens, spent, 2.0 * flop, 2.0 * bytes);
    for (form, about) in FORMS.iter().enumerate() {
        let many = about.name.starts_with("256");
        if many != (tokens > 64) && !emulated {
            continue;
        }
        let mut glu = || {
            let mut h = h.rows_mut(rows, d_ffn)?;
            with_form(form, || {
                grouped_gemm::glu_nt(stream, x.rows(tokens, d_model)?, weights.w1, weights.v1, routing.gathered_rows(), &mut h)
            })
        };
        glu()?;
        let spent = time(stream, emulated, &mut glu)?;
        record.line("glu_nt", about.name, tokens, spent, 2.0 * flop, 2.0 * bytes);
        let h_host = h.to_vec(stream)?;
        let mut random = Random::new(6);
        for _ in 0..CHECKED {
            let (row, col) = (random.below(rows), random.below(d_ffn));
            let x = &x_host[slots[row] as usize / top_k * d_model..][..d_model];
            let [gate, up] = [&model.w1, &model.v1].map(|stack| dot(wide(x), wide(model.row(stack, owner(row) * d_ffn + col))));
            close("glu_nt", h_host[row * d_ffn + col], gate / (1.0 + (-gate).exp()) * up);
        }
        let mut down = || {
            let mut out = out.rows_mut(rows, d_model)?;
            with_form(form, || grouped_gemm::nn(stream, h.rows(rows, d_ffn)?, weights.w2, routing.expert_rows(), &mut out))
        };
        down()?;
        let spent = time(stream, emulated, &mut down)?;
        record.line("nn", about.name, tokens, spent, flop, bytes);
        let out_host = out.to_vec(stream)?;
        for _ in 0..CHECKED {
            let (row, col) = (random.below(rows), random.below(d_model));
            let column = (0..d_ffn).map(|f| f64::from(model.row(&model.w2, owner(row) * d_ffn + f)[col].to_f32()));
            close("nn", out_host[row * d_model + col], dot(wide(&h_host[row * d_ffn..][..d_ffn]), column));
        }
    }

    let mut forward = || -> Result<(), Error> {
        let mut y = y.rows_mut(tokens, d_model)?;
        moe::forward(stream, &plan, x.rows(tokens, d_model)?, &weights, &mut buffers, &mut workspace, &mut y).map(|_| ())
    };
    let graph = stream.capture(&mut forward)?;
    // SAFETY: every buffer that was recorded lives until the end of this function, behind which nothing is in flight.
    let spent = time(stream, emulated, || unsafe { graph.launch() })?;
    record.line("layer", "graph", tokens, spent, 3.0 * flop, 3.0 * bytes);
    stream.synchronize()
}

fn run() -> Result<(), String> {
    let options = options()?;
    let text = |error: Error| error.to_string();
    let (stream, shape, tokens) = if options.emulated {
        let shape = Shape { d_model: 72, d_ffn: 136, num_experts: 4, top_k: 2, normalize: Normalize::P(1.0) };
        (device::emulated().1, shape, vec![3, 70])
    } else {
        match Device::cuda(0).and_then(|device| device.stream()) {
            Ok(stream) => {
                let shape = Shape { d_model: 6144, d_ffn: 10752, num_experts: 16, top_k: 4, normalize: Normalize::P(1.0) };
                (stream, shape, options.tokens)
            }
            Err(error) => {
                if std::env::var_os("DROPLESS_REQUIRE_GPU").is_some_and(|value| value == "1") {
                    return Err(format!("DROPLESS_REQUIRE_GPU=1, but: {error}"));
                }
                println!("nothing measured: {error}");
                return Ok(());
            }
        }
    };
    let mut record = Record { out: options.out, device: if options.emulated { "emulator".into() } else { "gpu".into() } };
    let model = Model::new(&stream, shape).map_err(text)?;
    tokens.into_iter().try_for_each(|tokens| measure(&stream, &model, options.emulated, &mut record, tokens)).map_err(text)
}

fn main() {
    if let Err(error) = run() {
        eprintln!("{error}");
        std::process::exit(2);
    }
}
