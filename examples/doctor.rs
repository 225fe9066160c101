//! What this machine has for dropless, and whether every kernel computes what the CPU computes.
//!
//! ```text
//! cargo run --release --example doctor                 the GPU of this machine
//! cargo run --release --example doctor -- --emulated   the PTX emulator, anywhere
//! ```
//!
//! Always prints a whole report. Exit codes: 0 fine, 1 something is wrong, 2 the arguments were refused.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::Arc;

use dropless::activation::Glu;
use dropless::attention::{self, decode, decode_workspace_bytes, prefill};
use dropless::block_sparse::{Dense, Sparse, arrange, dds, dsd, sdd};
use dropless::device::driver::{Driver, hardware::Hardware};
use dropless::epilogue::{Epilogue, GluEpilogue};
use dropless::layout::KvShape;
use dropless::rope::{Projected, QkNorm};
use dropless::router::{Choice, Here, Normalize, Score, count, index, logits, route};
use dropless::{
    Bf16, Buffer, DType, Device, Error, ExpertWeights, F16, Float, Format, HeadLayout, KvCache, Place, QuantizedRows, RopeTable, Routing,
    RoutingBuffers, Stream, Tiles, TokenIds, Topology, Workspace, embedding, glu, grouped_gemm, norm, permute, quantize, random, repack,
    rope, sample,
};
use dropless_kit::compare::relative_l2;
use dropless_kit::emulated::{Emulated, Options};
use dropless_kit::fill::{Random, blocks, normal, to_f64};
use dropless_kit::guard::{Bits, Guarded, POISONS};

const MANIFEST: &str = include_str!("../ptx/MANIFEST");
const TOKENS: usize = 5;
const D: usize = 64;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    run(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).into()
}

/// Does what the command line says, and gives the exit code.
pub(crate) fn run(arguments: &[&str]) -> u8 {
    let emulated = match arguments {
        [] => false,
        ["--emulated"] => true,
        _ => {
            eprintln!("usage: doctor [--emulated]");
            return 2;
        }
    };
    println!("dropless {}", env!("CARGO_PKG_VERSION"));
    println!("cpu      {} threads", Device::cpu().threads());
    images();
    let emulator = emulated.then(|| Arc::new(Emulated::new(Options::default())));
    let found: Result<Arc<dyn Driver>, Error> = match &emulator {
        Some(emulator) => Ok(emulator.clone()),
        None => Hardware::shared().map(|driver| driver as Arc<dyn Driver>),
    };
    let fine = match found.and_then(|driver| describe(&*driver).and(Device::with_driver(driver, 0))) {
        Ok(device) => {
            let agree = kernels(&device);
            loaded(&device);
            agree & emulator.is_none_or(|emulator| all_were_launched(&emulator))
        }
        Err(error) => {
            println!("gpu      none: {error}");
            println!("works    everything on the CPU (Device::cpu()), and the kernels themselves with --emulated");
            false
        }
    };
    println!("{}", if fine { "all is well" } else { "something is missing or wrong" });
    u8::from(!fine)
}

/// What ships, and the least that a driver must read.
fn images() {
    let words = |line: &'static str| line.split(' ').collect::<Vec<_>>();
    let images: Vec<_> = MANIFEST.lines().filter(|line| line.starts_with("image ")).map(words).collect();
    let entries = MANIFEST.lines().filter(|line| line.starts_with("entry ")).count();
    let isa = images[0][3];
    println!("images   {}, {entries} kernels for sm_90a, as cubin and PTX ISA {isa}; drivers from R550 (CUDA 12.4)", images.len());
}

/// Which of the two forms of each image the driver took.
fn loaded(device: &Device) {
    let (cubin, ptx): (Vec<_>, Vec<_>) = device.loaded_images().into_iter().partition(|file| file.ends_with(".cubin"));
    let compiled = if ptx.is_empty() { String::new() } else { format!(" ({})", ptx.join(", ")) };
    println!("loaded   {} images as they ship (cubin), {} compiled by the driver (PTX){compiled}", cubin.len(), ptx.len());
}

/// Whether this program knows every kernel there is; an emulator has counted.
fn all_were_launched(emulator: &Emulated) -> bool {
    let launched: BTreeSet<String> = emulator.launches().into_iter().map(|(entry, _)| entry).collect();
    let entries = MANIFEST.lines().filter_map(|line| line.strip_prefix("entry ")?.split(' ').next());
    let missing: Vec<&str> = entries.filter(|entry| !launched.contains(*entry)).collect();
    println!(
        "launched {} kernels, {} not{}",
        launched.len(),
        missing.len(),
        missing.iter().fold(String::new(), |text, entry| text + " " + entry)
    );
    missing.is_empty()
}

fn describe(driver: &dyn Driver) -> Result<(), Error> {
    let lost = |error: dropless::device::driver::DriverError| Error::DeviceLost {
        first_op: dropless::Op::Device,
        call: error.call,
        code: error.code,
        name: error.name,
    };
    let version = driver.version().map_err(lost)?;
    let count = driver.device_count().map_err(lost)?;
    println!("driver   CUDA {}.{}, {count} device(s)", version / 1000, version % 1000 / 10);
    if count == 0 {
        return Err(Error::NoDevice { ordinal: 0, count });
    }
    let about = driver.attributes(0).map_err(lost)?;
    let (free, total) = driver.memory_info(0).map_err(lost)?;
    let (major, minor) = about.compute_capability;
    println!("device   {}, sm_{major}{minor}, {} multiprocessors, {} of {} MiB free", about.name, about.sm_count, free >> 20, total >> 20);
    Ok(())
}

/// Every kernel once, against the CPU.
fn kernels(device: &Device) -> bool {
    let stream = match device.stream() {
        Ok(stream) => stream,
        Err(error) => {
            println!("stream   {error}");
            return false;
        }
    };
    println!("{:38} {:>12} {:>12}", "kernel", "relative L2", "allowed");
    let mut report = Report { stream, cpu: Device::cpu().stream().ok(), fine: true };
    of_type::<f32>(&mut report, "f32", 5e-6);
    products::<f32>(&mut report, "f32", 5e-6);
    of_type::<Bf16>(&mut report, "bf16", 2f64.powi(-7));
    products::<Bf16>(&mut report, "bf16", 2f64.powi(-7));
    of_type::<F16>(&mut report, "f16", 2f64.powi(-10));
    products::<F16>(&mut report, "f16", 2f64.powi(-10));
    for (name, format) in [
        ("int4", Quantized::Int4(128)),
        ("int4_64", Quantized::Int4(64)),
        ("int4_32", Quantized::Int4(32)),
        ("mxfp4", Quantized::Mxfp4),
        ("e4m3", Quantized::E4m3),
    ] {
        for (form, class) in [("few8", 8), ("few32", 32), ("few64", 64), ("many128", usize::MAX)] {
            quantized_products(&mut report, &format!("{name}_{form}"), format, class);
        }
    }
    let sigmoid = Choice::default().with_score(Score::Sigmoid).with_scale(2.5);
    let mixer = Choice::from(Normalize::None).with_score(Score::SparseMixer { jitter: 0.2 });
    for (name, tokens, experts, choice) in [
        ("router_route", TOKENS, 16, Choice::default()),
        ("router_choose, router_index", 200, 16, Choice::default()),
        ("router_route_any", TOKENS, 16, sigmoid),
        ("router_choose_any", 200, 16, sigmoid),
        ("router_choose_wide", TOKENS, 300, Choice::default()),
        ("router_route_any (sparse mixer)", TOKENS, 16, mixer),
    ] {
        report.check(name, 1e-6, |stream| {
            let logits = Guarded::with(stream, &normal::<f32>(1, tokens * experts, 1.0), tokens, experts, 0);
            let mut buffers = RoutingBuffers::new(stream, tokens, 4, experts)?;
            routed_as_numbers(stream, &route(stream, logits.view(), choice, &mut buffers)?)
        });
    }
    report.check("router_given", 0.0, |stream| {
        let ids = Guarded::with(stream, &[3u32, 0, 7, u32::MAX, 4, 4], 3, 2, 0);
        let weights = Guarded::with(stream, &[0.5f32; 6], 3, 2, 0);
        let mut buffers = RoutingBuffers::new(stream, 3, 2, 5)?;
        let routing = index(stream, ids.view(), weights.view(), Here::from(3), &mut buffers)?;
        let mut all = vec![];
        for map in [routing.expert_ids(), routing.offsets(), routing.slot_to_row()] {
            all.extend(map.to_vec(stream)?.into_iter().map(f64::from));
        }
        Ok(all)
    });
    report.check("router_count", 0.0, |stream| {
        let mut buffers = RoutingBuffers::new(stream, 3, 2, 5)?;
        let routing = Routing::from_host(stream, &[3, 0, 4, 3, 0, 1], &[0.5; 6], &mut buffers)?;
        let mut counts = Buffer::from_slice(stream, &[7u32; 5])?;
        count(stream, &routing, &mut counts.rows_mut(1, 5)?)?;
        Ok(counts.to_vec(stream)?.into_iter().map(f64::from).collect())
    });
    report.check("sample_argmax", 0.0, |stream| {
        let logits = Guarded::with(stream, &normal::<f32>(2, TOKENS * 1000, 1.0), TOKENS, 1000, 0);
        let mut out = Buffer::zeros(stream, TOKENS)?;
        Ok(sample::argmax(stream, logits.view(), &mut out)?.ids().to_vec(stream)?.into_iter().map(f64::from).collect())
    });
    report.check("sample_top_p", 0.0, |stream| {
        let logits = Guarded::with(stream, &normal::<f32>(2, TOKENS * 1000, 1.0), TOKENS, 1000, 0);
        let numbers = Guarded::with(stream, &(0..TOKENS as u32).collect::<Vec<_>>(), 1, TOKENS, 0);
        let draws = sample::Draws::new(numbers.view(), numbers.view())?;
        let options = sample::Options::new(0.8).with_top_p(0.9).with_seed(5);
        let mut out = Buffer::zeros(stream, TOKENS)?;
        let ids = sample::top_p(stream, logits.view(), options, draws, &mut out)?;
        Ok(ids.ids().to_vec(stream)?.into_iter().map(f64::from).collect())
    });
    report.fine
}

struct Report {
    stream: Stream,
    cpu: Option<Stream>,
    fine: bool,
}

impl Report {
    /// Runs the same on both devices and prints how far they are apart.
    fn check(&mut self, name: &str, allowed: f64, run: impl Fn(&Stream) -> Result<Vec<f64>, Error>) {
        let Some(cpu) = &self.cpu else { return self.fine = false };
        let line = match (run(&self.stream), run(cpu)) {
            (Ok(got), Ok(want)) => {
                let error = relative_l2(&got, &want);
                let passed = error <= allowed;
                self.fine &= passed;
                format!("{error:>12.2e} {allowed:>12.2e}{}", if passed { "" } else { "   WRONG" })
            }
            (Err(error), _) | (_, Err(error)) => {
                self.fine = false;
                format!("{error}")
            }
        };
        println!("{name:38} {line}");
    }
}

/// Calls `run` with the routing of five tokens to two of three experts, of which one has no rows.
fn routed(stream: &Stream, run: &dyn Fn(&Routing<'_>) -> Result<Vec<f64>, Error>) -> Result<Vec<f64>, Error> {
    let mut buffers = RoutingBuffers::new(stream, TOKENS, 2, 3)?;
    run(&Routing::from_host(stream, &[2, 0, 0, 2, 2, 0, 0, 2, 2, 0], &[0.5; 2 * TOKENS], &mut buffers)?)
}

/// Ids, weights and maps.
fn routed_as_numbers(stream: &Stream, routing: &Routing<'_>) -> Result<Vec<f64>, Error> {
    let mut all: Vec<f64> = routing.weights().to_vec(stream)?.into_iter().map(f64::from).collect();
    for map in [routing.expert_ids(), routing.offsets(), routing.row_to_slot(), routing.slot_to_row()] {
        all.extend(map.to_vec(stream)?.into_iter().map(f64::from));
    }
    Ok(all)
}

/// The products: on the tensor cores in each form there is, and plain, as widths of no whole 16 bytes are computed.
fn products<T: Float + Bits>(report: &mut Report, dtype: &str, allowed: f64) {
    if dtype != "f32" {
        for (form, class) in grouped_gemm::forms() {
            products_of::<T>(report, &format!("{dtype}_{form}"), allowed, 40, class);
        }
    }
    products_of::<T>(report, dtype, allowed, 36, usize::MAX);
    // The tensor core cuts each product at 2^-13 of the largest partial sum of 128.
    report.check(&format!("grouped_gemm_{{nt, glu_nt}}_e4m3_to_{dtype}"), allowed.max(2f64.powi(-8)), fp8_products::<T>);
    report.check(&format!("embedding, grouped_gemm_{{nt, glu_nt}}_quantized, {dtype}"), allowed, plain_quantized::<T>);
}

fn products_of<T: Float + Bits>(report: &mut Report, suffix: &str, allowed: f64, d_ffn: usize, class: usize) {
    let input = |stream: &Stream, seed: u64, rows: usize, cols: usize, size: f64| {
        Guarded::with(stream, &normal::<T>(seed, rows * cols, size), rows, cols, 0)
    };
    let output = |stream: &Stream, cols: usize| Guarded::<T>::new(stream, 2 * TOKENS, cols, 0, POISONS[0]);
    report.check(&format!("grouped_gemm_glu_nt_{suffix}"), allowed, |stream| {
        routed(stream, &|routing| {
            let (x, mut h) = (input(stream, 11, TOKENS, D, 1.0), output(stream, d_ffn));
            let [w1, v1] = [12, 13].map(|seed| input(stream, seed, 3 * d_ffn, D, 0.1));
            let [w1, v1] = [ExpertWeights::nk(w1.view(), 3)?, ExpertWeights::nk(v1.view(), 3)?];
            grouped_gemm::glu_nt(stream, x.view(), w1, v1, routing.gathered_rows().in_class(class), &mut h.view_mut())?;
            Ok(to_f64(&h.take(stream)))
        })
    });
    report.check(&format!("grouped_gemm_nt_{suffix}"), allowed, |stream| {
        routed(stream, &|routing| {
            let (x, w, mut y) = (input(stream, 14, 2 * TOKENS, D, 1.0), input(stream, 15, 3 * d_ffn, D, 0.1), output(stream, d_ffn));
            grouped_gemm::nt(stream, x.view(), ExpertWeights::nk(w.view(), 3)?, routing.expert_rows().in_class(class), &mut y.view_mut())?;
            Ok(to_f64(&y.take(stream)))
        })
    });
    report.check(&format!("grouped_gemm_nn_{suffix}"), allowed, |stream| {
        routed(stream, &|routing| {
            let (x, w, mut y) = (input(stream, 16, 2 * TOKENS, d_ffn, 1.0), input(stream, 17, 3 * d_ffn, D, 0.1), output(stream, D));
            grouped_gemm::nn(stream, x.view(), ExpertWeights::kn(w.view(), 3)?, routing.expert_rows().in_class(class), &mut y.view_mut())?;
            Ok(to_f64(&y.take(stream)))
        })
    });
    if !d_ffn.is_multiple_of(8) {
        report.check(&format!("grouped_gemm_glu_nn_{suffix}"), allowed, |stream| {
            routed(stream, &|routing| {
                let (x, mut h) = (input(stream, 11, TOKENS, D, 1.0), output(stream, d_ffn));
                let [gate, up] = [12, 13].map(|seed| input(stream, seed, 3 * D, d_ffn, 0.1));
                let [gate, up] = [ExpertWeights::kn(gate.view(), 3)?, ExpertWeights::kn(up.view(), 3)?];
                let epilogue = GluEpilogue::default().with_glu(Glu::GPT_OSS);
                grouped_gemm::glu(stream, x.view(), gate, up, routing.gathered_rows(), &epilogue, &mut h.view_mut())?;
                Ok(to_f64(&h.take(stream)))
            })
        });
    }
    if suffix == "f32" {
        return;
    }
    report.check(&format!("grouped_gemm_{{nt, nn}}_to_f32, {suffix}"), allowed, |stream| {
        routed(stream, &|routing| {
            let [mut y, mut z] = [d_ffn, D].map(|cols| Guarded::<f32>::new(stream, 2 * TOKENS, cols, 0, POISONS[0]));
            let (x, w) = (input(stream, 14, 2 * TOKENS, D, 1.0), input(stream, 15, 3 * d_ffn, D, 0.1));
            grouped_gemm::nt(stream, x.view(), ExpertWeights::nk(w.view(), 3)?, routing.expert_rows().in_class(class), &mut y.view_mut())?;
            let (x, w) = (input(stream, 16, 2 * TOKENS, d_ffn, 1.0), input(stream, 17, 3 * d_ffn, D, 0.1));
            grouped_gemm::nn(stream, x.view(), ExpertWeights::kn(w.view(), 3)?, routing.expert_rows().in_class(class), &mut z.view_mut())?;
            Ok([to_f64(&y.take(stream)), to_f64(&z.take(stream))].concat())
        })
    });
}

/// Rows and weights of e4m3, their scales between 1/2 and 1.
fn fp8_products<T: Float + Bits>(stream: &Stream) -> Result<Vec<f64>, Error> {
    const K: usize = 144;
    const N: usize = 40;
    routed(stream, &|routing| {
        let codes = |seed: u64, rows: usize| {
            // Of both signs, up to 3.75.
            let bytes: Vec<u8> = normal::<f32>(seed, rows * K, 1.0).iter().map(|x| ((x * 20.0) as i8 as u8 & 0x87) | 0x30).collect();
            Guarded::with(stream, &bytes, rows, K, 0)
        };
        let scales = |seed: u64, rows: usize, cols: usize| {
            let scales: Vec<f32> = normal::<f32>(seed, rows * cols, 0.1).iter().map(|x| 0.75 + x.clamp(-0.25, 0.25)).collect();
            Guarded::with(stream, &scales, rows, cols, 0)
        };
        let (x, x_scales, w, v) = (codes(30, 2 * TOKENS), scales(31, 2, 2 * TOKENS), codes(32, 3 * N), codes(33, 3 * N));
        let [w_scales, v_scales] = [34, 35].map(|seed| scales(seed, 3, 2));
        let x = quantize::QuantizedInputs::new(x.view(), x_scales.view())?;
        let w = ExpertWeights::nk(QuantizedRows::e4m3(w.view(), w_scales.view(), [N, 128])?, 3)?;
        let v = ExpertWeights::nk(QuantizedRows::e4m3(v.view(), v_scales.view(), [N, 128])?, 3)?;
        let [mut y, mut h] = [(); 2].map(|()| Guarded::<T>::new(stream, 2 * TOKENS, N, 0, POISONS[0]));
        grouped_gemm::linear_quantized(stream, x, w, routing.expert_rows(), &Epilogue::default(), &mut y.view_mut())?;
        grouped_gemm::glu_quantized(stream, x, w, v, routing.expert_rows(), &GluEpilogue::default(), &mut h.view_mut())?;
        Ok([to_f64(&y.take(stream)), to_f64(&h.take(stream))].concat())
    })
}

/// A table and products with weights of Q4_K, where they lie.
fn plain_quantized<T: Float + Bits>(stream: &Stream) -> Result<Vec<f64>, Error> {
    const K: usize = 256;
    const N: usize = 33;
    routed(stream, &|routing| {
        let codes = Buffer::from_slice(stream, &blocks(&mut Random::new(36), Format::Q4K, 3 * N))?;
        let weights = QuantizedRows::gguf(Format::Q4K, codes.rows(3 * N, Format::Q4K.block_bytes())?, K)?.with_exact_inputs();
        let (w, x) = (ExpertWeights::nk(weights, 3)?, Guarded::with(stream, &normal::<T>(37, TOKENS * K, 0.1), TOKENS, K, 0));
        let [mut y, mut h] = [(); 2].map(|()| Guarded::<T>::new(stream, 2 * TOKENS, N, 0, POISONS[0]));
        let mut row = Guarded::<T>::new(stream, 1, K, 0, POISONS[0]);
        let mut ids = Buffer::zeros(stream, 1)?;
        embedding::lookup(stream, TokenIds::from_host(stream, &[98], 99, &mut ids)?, weights, &mut row.view_mut())?;
        grouped_gemm::nt(stream, x.view(), w, routing.gathered_rows(), &mut y.view_mut())?;
        grouped_gemm::glu_nt(stream, x.view(), w, w, routing.gathered_rows(), &mut h.view_mut())?;
        Ok([to_f64(&row.take(stream)), to_f64(&y.take(stream)), to_f64(&h.take(stream))].concat())
    })
}

/// How weights are stored; of int4 how much of k shares a scale.
#[derive(Clone, Copy)]
enum Quantized {
    Int4(usize),
    Mxfp4,
    E4m3,
}

/// Products of bf16 with quantised weights, on a GPU in the order that it takes; nt into both types.
fn quantized_products(report: &mut Report, suffix: &str, format: Quantized, class: usize) {
    let input = |stream: &Stream, rows: usize| Guarded::with(stream, &normal::<Bf16>(11, rows * 2 * D, 1.0), rows, 2 * D, 0);
    report.check(&format!("grouped_gemm_glu_nt_bf16_{suffix}"), 2f64.powi(-7), |stream| {
        routed(stream, &|routing| {
            let (x, mut h) = (input(stream, TOKENS), Guarded::<Bf16>::new(stream, 2 * TOKENS, 40, 0, POISONS[0]));
            with_quantized(stream, format, 12, |gate| {
                with_quantized(stream, format, 13, |up| {
                    grouped_gemm::glu_nt(stream, x.view(), gate, up, routing.gathered_rows().in_class(class), &mut h.view_mut())
                })
            })?;
            Ok(to_f64(&h.take(stream)))
        })
    });
    report.check(&format!("grouped_gemm_nt_bf16_{suffix}"), 2f64.powi(-7), |stream| {
        routed(stream, &|routing| {
            let (x, rows) = (input(stream, 2 * TOKENS), routing.expert_rows().in_class(class));
            let mut y = Guarded::<Bf16>::new(stream, 2 * TOKENS, 40, 0, POISONS[0]);
            let mut z = Guarded::<f32>::new(stream, 2 * TOKENS, 40, 0, POISONS[0]);
            with_quantized(stream, format, 14, |w| {
                grouped_gemm::nt(stream, x.view(), w, rows, &mut y.view_mut())?;
                grouped_gemm::nt(stream, x.view(), w, rows, &mut z.view_mut())
            })?;
            Ok([to_f64(&y.take(stream)), to_f64(&z.take(stream))].concat())
        })
    });
}

/// Three experts of 40 outputs and 128 inputs: in checkpoint order for the CPU, which takes inputs as they
/// are, and in tiles for a GPU.
fn with_quantized(
    stream: &Stream,
    format: Quantized,
    seed: u64,
    work: impl FnOnce(ExpertWeights<'_>) -> Result<(), Error>,
) -> Result<(), Error> {
    let (rows, k, mut random) = (3 * 40, 2 * D, Random::new(seed));
    let mut bytes = |count: usize, mask: u8| (0..count).map(|_| random.bits() as u8 & mask).collect::<Vec<_>>();
    let row_bytes = if matches!(format, Quantized::E4m3) { k } else { k / 2 };
    // The mask excludes the codes of e4m3 that are no numbers.
    let codes = Buffer::from_slice(stream, &bytes(rows * row_bytes, if row_bytes == k { 0xbf } else { 0xff }))?;
    let (codes, group) = (codes.rows(rows, row_bytes)?, if let Quantized::Int4(group) = format { group } else { 32 });
    let scales = Buffer::from_slice(stream, &normal::<Bf16>(seed, rows * k / group, 0.1))?;
    let exponents = Buffer::from_slice(stream, &bytes(rows * k / 32, 3).iter().map(|byte| 120 + byte).collect::<Vec<_>>())?;
    let zeros = Buffer::from_slice(stream, &bytes(rows / 8 * 4 * k / group, 0xff))?;
    let weights = match format {
        Quantized::Int4(group) => {
            let weights = QuantizedRows::int4(codes, scales.rows(rows, k / group)?, k, group)?;
            weights.with_zeros(zeros.rows(rows / 8, 4 * k / group)?)?
        }
        Quantized::Mxfp4 => QuantizedRows::mxfp4(codes, exponents.rows(rows, k / 32)?)?,
        Quantized::E4m3 => {
            // One scale for each output.
            let scales = Buffer::from_slice(stream, &normal::<f32>(seed, rows, 0.1))?;
            return work(ExpertWeights::nk(QuantizedRows::e4m3(codes, scales.rows(rows, 1)?, [1, k])?.with_exact_inputs(), 3)?);
        }
    };
    let weights = ExpertWeights::nk(weights.with_exact_inputs(), 3)?;
    if stream.place() == Place::Host {
        return work(weights);
    }
    let tiles = Tiles::of(&weights)?;
    let buffer = |[rows, bytes]: [usize; 2]| Buffer::<u8>::zeros(stream, rows * bytes);
    let ([panels, code_bytes], [_, scale_bytes]) = (tiles.codes(), tiles.scales());
    let [_, zero_bytes] = tiles.zeros().unwrap_or([0, 0]);
    let (mut codes, mut scales, mut zeros) = (buffer(tiles.codes())?, buffer(tiles.scales())?, buffer([panels, zero_bytes])?);
    let mut zero_rows = if zero_bytes > 0 { Some(zeros.rows_mut(panels, zero_bytes)?) } else { None };
    let (mut code_rows, mut scale_rows) = (codes.rows_mut(panels, code_bytes)?, scales.rows_mut(panels, scale_bytes)?);
    repack::repack(stream, weights, &mut code_rows, &mut scale_rows, zero_rows.as_mut())?;
    let zeros = if zero_bytes > 0 { Some(zeros.rows(panels, zero_bytes)?) } else { None };
    let all = QuantizedRows::tiles(tiles, codes.rows(panels, code_bytes)?, scales.rows(panels, scale_bytes)?, zeros)?;
    work(ExpertWeights::nk(all, 3)?)
}

/// Sparse products that no tensor core serves: of rows that begin anywhere, and of a width that no vector divides.
fn odd_sparse_products<T: Float + Bits, O: Float + Bits>(stream: &Stream) -> Result<Vec<f64>, Error> {
    let topology = Topology::from_blocks(stream, 64, [D, 2 * D], &[[0, 1]])?;
    let matrix = |seed, rows, cols| Guarded::with(stream, &normal::<T>(seed, rows * cols, 0.3), rows, cols, 0);
    let (x, w, blocks, d) = (matrix(19, D, 25), matrix(20, 24, 2 * D), matrix(21, D, D), matrix(22, 2 * D, 20));
    let [mut s, mut y] = [D, 20].map(|cols| Guarded::<O>::new(stream, D, cols, 0, POISONS[0]));
    sdd(stream, x.view().col_range(1..25)?.into(), w.view().into(), &topology, &mut s.view_mut())?;
    dsd(stream, Sparse::new(&topology, blocks.view()), d.view().into(), &mut y.view_mut())?;
    Ok([to_f64(&s.take(stream)), to_f64(&y.take(stream))].concat())
}

/// The kernels that exist once per element type.
fn of_type<T: Float + Bits>(report: &mut Report, dtype: &str, allowed: f64) {
    let input = |stream: &Stream, seed: u64, rows: usize, cols: usize, size: f64| {
        Guarded::with(stream, &normal::<T>(seed, rows * cols, size), rows, cols, 0)
    };
    let output = |stream: &Stream, rows: usize, cols: usize| Guarded::<T>::new(stream, rows, cols, 0, POISONS[0]);
    let mut check = |name: &str, run: &dyn Fn(&Stream) -> Result<Vec<f64>, Error>| report.check(&format!("{name}_{dtype}"), allowed, run);

    check("embedding", &|stream| {
        let (table, mut y, mut ids) = (input(stream, 1, 9, D, 1.0), output(stream, TOKENS, D), Buffer::zeros(stream, TOKENS)?);
        let ids = TokenIds::from_host(stream, &[0, 8, 3, 3, 7], 9, &mut ids)?;
        embedding::lookup(stream, ids, table.view(), &mut y.view_mut())?;
        Ok(to_f64(&y.take(stream)))
    });
    check("embedding, scaled", &|stream| {
        let (table, mut y, mut ids) = (input(stream, 1, 9, D, 1.0), output(stream, TOKENS, D), Buffer::zeros(stream, TOKENS)?);
        let ids = TokenIds::from_host(stream, &[0, 8, 3, 3, 7], 9, &mut ids)?;
        embedding::lookup_scaled(stream, ids, table.view(), 12.0, &mut y.view_mut())?;
        Ok(to_f64(&y.take(stream)))
    });
    for (name, layer) in [("norm_layer", true), ("norm_rms", false)] {
        check(name, &|stream| {
            let (x, weight, mut y) = (input(stream, 2, TOKENS, D, 1.0), input(stream, 3, 1, D, 1.0), output(stream, TOKENS, D));
            let norm = if layer { norm::layer_norm } else { norm::rms_norm };
            norm(stream, x.view(), weight.view(), 1e-5, &mut y.view_mut())?;
            Ok(to_f64(&y.take(stream)))
        });
    }
    for (name, layer) in [("norm_add_layer", true), ("norm_add_rms", false)] {
        check(name, &|stream| {
            let (x, weight, mut y) = (input(stream, 2, TOKENS, D, 1.0), input(stream, 3, 1, D, 1.0), output(stream, TOKENS, D));
            let mut residual = input(stream, 4, TOKENS, D, 1.0);
            let add_norm = if layer { norm::add_layer_norm } else { norm::add_rms_norm };
            add_norm(stream, x.view(), &mut residual.view_mut(), weight.view(), 1e-5, &mut y.view_mut())?;
            Ok([to_f64(&y.take(stream)), to_f64(&residual.take(stream))].concat())
        });
    }
    for (name, layer) in [("norm_general_layer", true), ("norm_general_rms", false)] {
        check(name, &|stream| {
            let (x, also, mut y) = (input(stream, 2, TOKENS, D, 1.0), input(stream, 25, TOKENS, D, 1.0), output(stream, TOKENS, D));
            let rows = [3, 26, 27, 28].map(|seed| input(stream, seed, 1, D, 1.0));
            let [weights, post] = [[0, 1], [2, 3]].map(|[w, b]| norm::Weights::from(rows[w].view()).with_bias(rows[b].view()));
            let addend = norm::Addend::from(x.view()).with_also(also.view()).with_scale(0.5).with_post_norm(post);
            let mut residual = input(stream, 4, TOKENS, D, 1.0);
            let add_norm = if layer { norm::add_layer_norm } else { norm::add_rms_norm };
            add_norm(stream, addend, &mut residual.view_mut(), weights, 1e-5, &mut y.view_mut())?;
            Ok([to_f64(&y.take(stream)), to_f64(&residual.take(stream))].concat())
        });
    }
    check("glu", &|stream| {
        let (gate, up, mut y) = (input(stream, 5, TOKENS, D, 1.0), input(stream, 6, TOKENS, D, 1.0), output(stream, TOKENS, D));
        glu::glu(stream, gate.view(), up.view(), &mut y.view_mut())?;
        Ok(to_f64(&y.take(stream)))
    });
    check("glu_in_turn", &|stream| {
        let (gate_up, mut y) = (input(stream, 5, TOKENS, 2 * D, 1.0), output(stream, TOKENS, D));
        glu::gated_interleaved(stream, Glu::GPT_OSS, gate_up.view(), &mut y.view_mut())?;
        Ok(to_f64(&y.take(stream)))
    });
    check("random_uniform", &|stream| {
        let mut y = output(stream, TOKENS, D);
        random::uniform(stream, 9, 1.0, 3, &mut y.view_mut())?;
        Ok(to_f64(&y.take(stream)))
    });
    check("router_logits", &|stream| {
        let (x, weight) = (input(stream, 7, TOKENS, D, 1.0), input(stream, 8, 16, D, 1.0));
        let mut y = Guarded::<f32>::new(stream, TOKENS, 16, 0, POISONS[0]);
        logits(stream, x.view(), weight.view(), &mut y.view_mut())?;
        Ok(to_f64(&y.take(stream)))
    });
    check("permute_gather", &|stream| {
        routed(stream, &|routing| {
            let (x, mut y) = (input(stream, 9, TOKENS, D, 1.0), output(stream, 2 * TOKENS, D));
            permute::gather(stream, x.view(), routing, &mut y.view_mut())?;
            Ok(to_f64(&y.take(stream)))
        })
    });
    check("permute_combine", &|stream| {
        routed(stream, &|routing| {
            let (x, mut y) = (input(stream, 10, 2 * TOKENS, D, 1.0), output(stream, TOKENS, D));
            permute::combine(stream, x.view(), routing, &mut y.view_mut())?;
            Ok(to_f64(&y.take(stream)))
        })
    });
    check("quantize", &|stream| {
        routed(stream, &|routing| {
            let x = input(stream, 29, TOKENS, 150, 1.0);
            let mut codes = Guarded::<u8>::new(stream, 2 * TOKENS, 150, 0, POISONS[0]);
            let mut scales = Guarded::<f32>::new(stream, 2, 2 * TOKENS, 0, POISONS[0]);
            quantize::gather_e4m3(stream, x.view(), routing, &mut codes.view_mut(), &mut scales.view_mut())?;
            Ok(codes.take(stream).into_iter().map(f64::from).chain(to_f64(&scales.take(stream))).collect())
        })
    });
    if dtype != "f32" {
        check("block_sparse_{sdd, dsd}", &odd_sparse_products::<T, T>);
        check("block_sparse_{sdd, dsd}_to_f32", &odd_sparse_products::<T, f32>);
        for block in [64, 128] {
            check(&format!("block_sparse_{{nn, nt, tn, tt}}_{block}"), &|stream| {
                let topology = Topology::from_blocks(stream, block, [block, block], &[[0, 0]])?;
                let (a, b) = (input(stream, 23, block, block, 1.0), input(stream, 24, block, block, 0.1));
                let mut all = Vec::new();
                for [first, second] in [[false, false], [false, true], [true, false], [true, true]] {
                    let [a, b] = [(&a, first), (&b, second)].map(|(x, turn)| {
                        let x = Dense::from(x.view());
                        if turn { x.t() } else { x }
                    });
                    let mut y = output(stream, block, block);
                    sdd(stream, a, b, &topology, &mut y.view_mut())?;
                    all.extend(to_f64(&y.take(stream)));
                }
                Ok(all)
            });
        }
    }
    check("block_sparse_arrange, sdd, dsd", &|stream| {
        routed(stream, &|routing| {
            let mut topology = Topology::for_experts(stream, 64, 2 * TOKENS, &[40, 64, 70])?;
            arrange(stream, routing.expert_rows(), &mut topology)?;
            let blocks = topology.blocks(stream)?;
            let (x, w) = (input(stream, 14, 2 * TOKENS, D, 1.0), input(stream, 15, 174, D, 0.1));
            let [mut s, mut y, mut z] = [(topology.stored_rows(), 64), (2 * TOKENS, D), (D, 174)].map(|(r, c)| output(stream, r, c));
            sdd(stream, x.view().into(), Dense::from(w.view()).t(), &topology, &mut s.view_mut())?;
            dsd(stream, Sparse::new(&topology, s.view()), w.view().into(), &mut y.view_mut())?;
            dds(stream, Dense::from(x.view()).t(), Sparse::new(&topology, s.view()), &mut z.view_mut())?;
            let stored = &to_f64(&s.take(stream))[..blocks.len() * 64 * 64];
            let ids = blocks.iter().flatten().map(|id| f64::from(*id)).collect();
            Ok([ids, stored.to_vec(), to_f64(&y.take(stream)), to_f64(&z.take(stream))].concat())
        })
    });
    for (name, head_dim) in [("rope_norm", 16), ("rope_norm_single", 6)] {
        check(&format!("{name}, attention"), &|stream| {
            let heads = HeadLayout::new(4, 2, head_dim)?;
            let of_head = [25, 26].map(|seed| input(stream, seed, 1, head_dim, 1.0));
            let of_all = [(27, heads.q_cols()), (28, heads.kv_cols())].map(|(seed, cols)| input(stream, seed, 1, cols, 1.0));
            let norms = [
                QkNorm::per_head(of_head[0].view(), of_head[1].view(), 1e-5),
                QkNorm::full_width(of_all[0].view(), of_all[1].view(), 1e-5),
            ];
            let qkv = input(stream, 18, TOKENS, heads.qkv_cols(), 1.0);
            let mut all = Vec::new();
            for norm in norms {
                let options = rope::Options::default().with_qk_norm(norm);
                all.extend(attended(stream, heads, head_dim, qkv.view().into(), options, None)?);
            }
            Ok(all)
        });
    }
    check("rope, attention of latent heads", &|stream| {
        let heads = HeadLayout::new(2, 2, 24)?.with_value_dim(16)?;
        let (q, kv) = (input(stream, 18, TOKENS, heads.q_cols(), 1.0), input(stream, 19, TOKENS, 2 * (16 + 16), 1.0));
        let k_rope = input(stream, 20, TOKENS, 8, 1.0);
        let latent = Projected::Latent { q: q.view(), kv: kv.view(), k_rope: k_rope.view() };
        attended(stream, heads, 8, latent, rope::Options::default(), None)
    });
    // Heads of 64, 128 and 256 attend on the tensor cores in 16-bit types.
    let tiled = if T::DTYPE == DType::F32 { &[][..] } else { &[64, 128, 256] };
    let plain = [(16, None, "rope, attention".to_owned()), (6, None, "rope_single, attention".to_owned())];
    let tiled = tiled.iter().flat_map(|head_dim| {
        let name = format!("attention_{{prefill, decode}}_{head_dim}");
        [(*head_dim, None, name.clone()), (*head_dim, Some(2.0), name + "_capped")]
    });
    for (head_dim, softcap, name) in plain.into_iter().chain(tiled) {
        check(&name, &|stream| {
            let heads = HeadLayout::new(4, 2, head_dim)?;
            let qkv = input(stream, 18, TOKENS, heads.qkv_cols(), 1.0);
            let clip = rope::Options::default().with_clip(Some(1.5));
            attended(stream, heads, head_dim, qkv.view().into(), clip, softcap)
        });
    }
}

/// Rotated queries, and what both entries of attention make of them, of two sequences.
fn attended<T: Float + Bits>(
    stream: &Stream,
    heads: HeadLayout,
    rotary_dim: usize,
    qkv: Projected<'_, T>,
    options: rope::Options<'_>,
    softcap: Option<f32>,
) -> Result<Vec<f64>, Error> {
    let table = RopeTable::new(stream, 1e4, rotary_dim, 8)?;
    let mut cache = KvCache::<T>::new(stream, 1, KvShape::contiguous(heads, 2, 4))?;
    cache.append(stream, &[2, 3])?;
    let output = |cols| Guarded::<T>::new(stream, TOKENS, cols, 0, POISONS[0]);
    let [mut q, mut out, mut again] = [heads.q_cols(), heads.context_cols(), heads.context_cols()].map(output);
    rope::clip_rotate_append(stream, qkv, heads, options, &table, &mut cache.layer_mut(0)?, &mut q.view_mut())?;
    let options = attention::Options::new(heads).with_scale(0.25);
    let options = softcap.map_or(options, |cap| options.with_softcap(cap));
    prefill(stream, q.view(), options, &cache.layer(0)?, &mut out.view_mut())?;
    let mut workspace = Workspace::new(stream, decode_workspace_bytes(heads, TOKENS, 4)?)?;
    decode(stream, q.view(), options, &cache.layer(0)?, &mut workspace, &mut again.view_mut())?;
    Ok([q, out, again].iter().flat_map(|values| to_f64(&values.take(stream))).collect())
}
