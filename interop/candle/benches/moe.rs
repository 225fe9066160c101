//! One layer by this block and by candle's loop over the experts, in turns: medians and minima of wall time,
//! and their ratios.
//!
//! Results are compared before anything is timed. `cargo bench` prints a table for the README, and with the
//! feature `cuda` another one for a GPU, where each call ends with waiting for it; `cargo bench -- 300`
//! spends 300 milliseconds on each of the cells instead of 3000.

#[path = "../tests/common/mod.rs"]
mod common;

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result, Tensor};
use common::{Loop, Weights, noise};
use dropless_candle::{Experts, Moe, Runtime};

const TOP_K: usize = 2;

fn main() -> Result<()> {
    let budget = Duration::from_millis(std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(3000));
    // Of each, a layer that takes some milliseconds: on a GPU a quarter of Mixtral 8x7B's.
    table(&Device::Cpu, [8, 1024, 1792], budget)?;
    match gpu() {
        Some(gpu) => table(&gpu, [8, 4096, 3584], budget),
        None => Ok(()),
    }
}

#[cfg(feature = "cuda")]
fn gpu() -> Option<Device> {
    Device::new_cuda(0).inspect_err(|error| eprintln!("skipped: {error}")).ok()
}

#[cfg(not(feature = "cuda"))]
fn gpu() -> Option<Device> {
    None
}

/// E, D, F are the layer's sizes.
fn table(device: &Device, shape: [usize; 3], budget: Duration) -> Result<()> {
    let (ours, theirs) = (dropless::Device::cpu().threads(), candle_core::utils::get_num_threads());
    println!("\n{:?}: E, D, F = {shape:?}, k = {TOP_K}; threads of the CPU: dropless {ours}, candle {theirs}\n", device.location());
    println!("| type | T | candle's loop | packed | separate | loop / packed, medians | minima | loop in f32 / packed | minima | error |");
    println!("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|");
    let runtime = Runtime::new(device)?;
    for dtype in [DType::F32, DType::BF16] {
        let weights = Weights::random(shape, dtype)?.each(|weight| weight.to_device(device))?;
        let Weights { router, gate, up, down } = &weights;
        let packed = Experts::Packed { gate_up: weights.gate_up()?, down: down.clone() };
        let separate = Experts::Separate { gate: gate.clone(), up: up.clone(), down: down.clone() };
        let block = |experts| Moe::new(&runtime, router.clone(), experts, TOP_K);
        let (packed, separate) = (block(packed)?, block(separate)?);
        let theirs = Loop::new(&weights, TOP_K)?;
        let widened = Loop::new(&weights.to_dtype(DType::F32)?, TOP_K)?;
        for num_tokens in [1, 8, 64, 512] {
            let x = noise(99, &[num_tokens, shape[1]], dtype)?.to_device(device)?;
            let wide = x.to_dtype(DType::F32)?;
            let want = widened.forward(&wide)?;
            let error = [packed.forward(&x)?, separate.forward(&x)?].iter().map(|y| error(y, &want)).collect::<Result<Vec<_>>>()?;
            let error = error.into_iter().fold(0.0, f32::max);
            assert!(error < if dtype == DType::F32 { 1e-5 } else { 2e-2 }, "{dtype:?}, T = {num_tokens}: {error:e}");

            let done = |y: Tensor| device.synchronize().map(|()| y);
            let mut contestants: [Box<dyn FnMut() -> Result<Tensor>>; 4] = [
                Box::new(|| done(theirs.forward(&x)?)),
                Box::new(|| done(packed.forward(&x)?)),
                Box::new(|| done(separate.forward(&x)?)),
                Box::new(|| done(widened.forward(&wide)?)),
            ];
            let [a, b, c, wide] = rounds(&mut contestants, budget)?;
            let name = if dtype == DType::F32 { "f32" } else { "bf16" };
            print!("| {name} | {num_tokens} | {:.3} | {:.3} | {:.3} | ", a.median, b.median, c.median);
            print!("{:.2} | {:.2} | ", a.median / b.median, a.minimum / b.minimum);
            println!("{:.2} | {:.2} | {error:.0e} |", wide.median / b.median, wide.minimum / b.minimum);
        }
    }
    Ok(())
}

/// Milliseconds of one call.
struct Times {
    median: f64,
    minimum: f64,
}

/// Calls all of them in turns, beginning with another one each time, until the time is spent, at least seven
/// times.
fn rounds<const N: usize>(contestants: &mut [Box<dyn FnMut() -> Result<Tensor> + '_>; N], budget: Duration) -> Result<[Times; N]> {
    let (mut times, start) = (std::array::from_fn::<Vec<f64>, N, _>(|_| Vec::new()), Instant::now());
    while times[0].len() < 7 || start.elapsed() < budget {
        let round = times[0].len();
        for i in (0..N).map(|i| (round + i) % N) {
            let begin = Instant::now();
            std::hint::black_box(contestants[i]()?);
            times[i].push(begin.elapsed().as_secs_f64() * 1e3);
        }
    }
    Ok(times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        Times { median: times[times.len() / 2], minimum: times[0] }
    }))
}

/// The largest difference, of the largest number.
fn error(got: &Tensor, want: &Tensor) -> Result<f32> {
    let largest = |x: &Tensor| x.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
    Ok(largest(&(got.to_dtype(DType::F32)? - want)?)? / largest(want)?)
}
