//! Streams, slices and views of cudarc, on a GPU, against the CPU. Without a GPU these tests say so and pass:
//! that they do not panic there is what they show then.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DeviceRepr, ValidAsZeroBits, sys};
use dropless::{Buffer, Device, Error, ExpertWeights, Float, RoutingBuffers, Rows, RowsMut, Stream, Workspace, glu, moe};
use half::bf16;

/// Every element type of cudarc's slices that is tried.
trait Number: Float + DeviceRepr + ValidAsZeroBits {}
impl Number for f32 {}
impl Number for bf16 {}
impl Number for dropless::F16 {}

/// The GPU, and a context of cudarc on it; `None` where there is none.
fn gpu() -> Option<(Device, Arc<CudaContext>)> {
    match Device::cuda(0) {
        Ok(device) => Some((device, CudaContext::new(0).unwrap())),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// Numbers of both signs and sizes up to `size`, the same for the same seed.
fn noise<T: Float>(seed: u32, len: usize, size: f32) -> Vec<T> {
    let next = |i: usize| (i as u32 ^ seed.wrapping_mul(0x9e37_79b9)).wrapping_mul(2_654_435_761).rotate_left(15).wrapping_mul(0x85eb_ca6b);
    (0..len).map(|i| T::from_f32(((next(i) >> 8) as f32 / 8_388_608.0 - 1.0) * size)).collect()
}

fn upload<T: Number>(cuda: &Arc<CudaStream>, values: &[T]) -> CudaSlice<T> {
    let mut slice = cuda.alloc_zeros::<T>(values.len()).unwrap();
    cuda.memcpy_htod(values, &mut slice).unwrap();
    slice
}

fn download<T: Number>(cuda: &Arc<CudaStream>, slice: &CudaSlice<T>) -> Vec<T> {
    let mut values = vec![T::default(); slice.len()];
    cuda.memcpy_dtoh(slice, &mut values[..]).unwrap();
    cuda.synchronize().unwrap();
    values
}

/// The largest difference, of the largest number.
fn error<T: Float>(got: &[T], want: &[T]) -> f32 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().map(|want| want.to_f32().abs()).fold(0.0, f32::max);
    assert!(largest > 0.0, "nothing to compare with");
    let wrong = got.iter().zip(want).map(|(got, want)| (got.to_f32() - want.to_f32()).abs());
    wrong.fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a }) / largest
}

fn rows<T: Float>(values: &[T], rows: usize) -> Rows<'_, T> {
    Rows::from_slice(values, rows, values.len() / rows).unwrap()
}

/// Slices written on one stream of cudarc, used on another through this crate, read on the first: cudarc's
/// events give the order.
fn glu_of<T: Number>(tolerance: f32) {
    const ROWS: usize = 1000;
    const COLS: usize = 4096;
    let Some((device, context)) = gpu() else { return };
    let (first, second) = (context.new_stream().unwrap(), context.new_stream().unwrap());
    let (gate, up) = (noise::<T>(1, ROWS * COLS, 4.0), noise::<T>(2, ROWS * COLS, 4.0));
    let mut want = vec![T::default(); ROWS * COLS];
    let host = Device::cpu().stream().unwrap();
    glu::glu(&host, rows(&gate, ROWS), rows(&up, ROWS), &mut RowsMut::from_slice(&mut want, ROWS, COLS).unwrap()).unwrap();

    let (gate, up, mut y) = (upload(&first, &gate), upload(&first, &up), first.alloc_zeros::<T>(ROWS * COLS).unwrap());
    let stream = Stream::from_cudarc(&device, &second).unwrap();
    stream
        .cudarc_scope(&second, |scope| {
            let (gate, up) = (scope.rows(&gate, ROWS, COLS)?, scope.rows(&up, ROWS, COLS)?);
            glu::glu(&stream, gate, up, &mut scope.rows_mut(&mut y, ROWS, COLS)?)
        })
        .unwrap_or_else(|error: Error| panic!("{error}"));
    drop((gate, up)); // freed on the first stream, behind the work on the second
    let error = error(&download(&first, &y), &want);
    assert!(error <= tolerance, "{}: {error:e}", T::DTYPE.name());
}

#[test]
fn glu_runs_on_slices_of_cudarc() {
    glu_of::<f32>(2e-6);
}

#[test]
fn glu_runs_on_slices_of_16_bits() {
    glu_of::<bf16>(8e-3);
    glu_of::<dropless::F16>(1e-3);
}

const SHAPE: moe::Shape = moe::Shape::new(256, 512, 8, 2);

/// Router `[E, D]`, then gate, up and down, `[E, F, D]` each: one after the other in one slice, as an
/// engine's arena has them.
fn split<'a, T: Float>(all: Rows<'a, T>) -> Result<moe::Weights<'a>, Error> {
    let moe::Shape { d_ffn, num_experts: e, .. } = SHAPE;
    let part = |at: usize| all.row_range(e + at * e * d_ffn..e + (at + 1) * e * d_ffn);
    let experts = moe::Experts::gated(ExpertWeights::nk(part(0)?, e)?, ExpertWeights::nk(part(1)?, e)?, ExpertWeights::kn(part(2)?, e)?);
    Ok(moe::Weights::new(all.row_range(0..e)?, experts))
}

/// The layer on `stream`; gives the experts that were chosen.
fn layer<T: Float>(stream: &Stream, x: Rows<'_, T>, weights: Rows<'_, T>, y: &mut RowsMut<'_, T>) -> Result<Vec<u32>, Error> {
    let plan = moe::Plan::<T>::new(SHAPE, x.rows())?;
    let mut workspace = Workspace::new(stream, plan.workspace_bytes())?;
    let mut buffers = RoutingBuffers::new(stream, x.rows(), SHAPE.top_k, SHAPE.num_experts)?;
    let routing = moe::forward(stream, &plan, x, &split(weights)?, &mut buffers, &mut workspace, y)?;
    routing.expert_ids().to_vec(stream)
}

/// A layer whose tokens, weights and results are cudarc's. With an even number of tokens everything is on the
/// default stream.
fn layer_of<T: Number>(num_tokens: usize, tolerance: f32) {
    let Some((device, context)) = gpu() else { return };
    let moe::Shape { d_model, d_ffn, num_experts, .. } = SHAPE;
    let cuda = if num_tokens.is_multiple_of(2) { context.default_stream() } else { context.new_stream().unwrap() };
    let weight_rows = num_experts + 3 * num_experts * d_ffn;
    let (x, weights) = (noise::<T>(3, num_tokens * d_model, 1.7), noise::<T>(4, weight_rows * d_model, 0.1));
    let mut want = vec![T::default(); x.len()];
    let host = Device::cpu().stream().unwrap();
    let mut target = RowsMut::from_slice(&mut want, num_tokens, d_model).unwrap();
    let chosen = layer(&host, rows(&x, num_tokens), rows(&weights, weight_rows), &mut target).unwrap();

    let (x, weights) = (upload(&cuda, &x), upload(&cuda, &weights));
    let mut y = cuda.alloc_zeros::<T>(want.len()).unwrap();
    let stream = Stream::from_cudarc(&device, &cuda).unwrap();
    let ids = stream.cudarc_scope(&cuda, |scope| {
        let (x, weights) = (scope.rows(&x, num_tokens, d_model)?, scope.rows(&weights, weight_rows, d_model)?);
        layer(&stream, x, weights, &mut scope.rows_mut(&mut y, num_tokens, d_model)?)
    });
    let ids = ids.unwrap_or_else(|error: Error| panic!("{error}"));
    assert_eq!(ids, chosen, "T = {num_tokens}, {}", T::DTYPE.name());
    let error = error(&download(&cuda, &y), &want);
    assert!(error <= tolerance, "T = {num_tokens}, {}: {error:e}", T::DTYPE.name());
}

#[test]
fn a_layer_runs_on_slices_of_cudarc() {
    for num_tokens in [1, 8, 65, 200] {
        layer_of::<f32>(num_tokens, 2e-5);
        layer_of::<bf16>(num_tokens, 2e-2);
    }
}

/// Views into the middle of slices, rows with gaps between them, one slice for two results.
#[test]
fn views_of_cudarc_are_parts() {
    const COLS: usize = 8;
    let Some((device, context)) = gpu() else { return };
    let cuda = context.new_stream().unwrap();
    let input = upload(&cuda, &noise::<f32>(5, 100, 1.0));
    let mut y = upload(&cuda, &[9.0f32; 64]);
    let stream = Stream::from_cudarc(&device, &cuda).unwrap();
    let (gate, up) = (input.slice(4..44), input.slice(44..));
    let (mut low, mut high) = y.split_at_mut(32);
    let run = stream.cudarc_scope(&cuda, |scope| -> Result<(), Error> {
        let (gate, up) = (scope.rows_strided(&gate, 2, COLS, 12)?, scope.rows(&up, 2, COLS)?);
        glu::glu(&stream, gate, up, &mut scope.rows_mut_strided(&mut low, 2, COLS, 16)?)?;
        glu::glu(&stream, gate, up, &mut scope.rows_mut(&mut high, 2, COLS)?)
    });
    run.unwrap();
    let (y, silu) = (download(&cuda, &y), |x: f32| x / (1.0 + (-x).exp()));
    let input = noise::<f32>(5, 100, 1.0);
    for (row, col) in (0..2).flat_map(|row| (0..COLS).map(move |col| (row, col))) {
        let want = silu(input[4 + row * 12 + col]) * input[44 + row * COLS + col];
        for got in [y[row * 16 + col], y[32 + row * COLS + col]] {
            assert!((got - want).abs() < 1e-6, "[{row}, {col}]: {got}, not {want}");
        }
    }
    assert_eq!(y[COLS..16], [9.0; COLS], "the gap between two rows");
}

/// Buffers of this crate, filled and read by cudarc, on its own streams.
#[test]
fn buffers_are_lent_to_cudarc() {
    const LEN: usize = 1 << 22;
    let Some((device, context)) = gpu() else { return };
    let (cuda, other) = (context.new_stream().unwrap(), context.new_stream().unwrap());
    let stream = Stream::from_cudarc(&device, &cuda).unwrap();
    let values = noise::<f32>(6, LEN, 1.0);
    let source = upload(&other, &values);
    let mut buffer = Buffer::<f32>::from_slice(&stream, &vec![7.0; LEN]).unwrap();
    let filled = stream.cudarc_scope(&cuda, |scope| -> Result<(), Error> {
        let mut view = scope.lend_mut(&mut buffer)?;
        other.memcpy_dtod(&source, &mut view).unwrap();
        Ok(())
    });
    filled.unwrap();
    assert!(buffer.to_vec(&stream).unwrap() == values, "written by cudarc on another stream");

    // SAFETY: every element is written before it is read.
    let mut target = unsafe { other.alloc::<f32>(LEN) }.unwrap();
    let read = stream.cudarc_scope(&cuda, |scope| -> Result<(), Error> {
        let rows = buffer.rows(1, LEN)?;
        glu::glu(&stream, rows, rows, &mut scope.rows_mut(&mut target, 1, LEN)?)
    });
    read.unwrap();
    let squares: Vec<f32> = values.iter().map(|x| x * x / (1.0 + (-x).exp())).collect();
    assert!(error(&download(&other, &target), &squares) < 2e-6, "read by cudarc on another stream");
    let mut y = Buffer::<f32>::zeros(&stream, LEN).unwrap();
    let rows = buffer.rows(1, LEN).unwrap();
    glu::glu(&stream, rows, rows, &mut y.rows_mut(1, LEN).unwrap()).unwrap();
    let mut copied = |wait: bool| {
        let read = stream.cudarc_scope(&cuda, |scope| -> Result<(), Error> {
            other.memcpy_dtod(&scope.lend(&y)?, &mut target).unwrap();
            if wait {
                other.synchronize().unwrap();
            }
            Ok(())
        });
        read.unwrap();
        if !wait {
            y.copy_from_slice(&stream, &vec![0.0; LEN]).unwrap();
        }
        error(&download(&other, &target), &squares)
    };
    assert!(copied(true) < 2e-6, "read by cudarc after it was computed here");
    assert!(copied(false) < 2e-6, "read by cudarc before it was overwritten here");
}

#[test]
fn what_would_not_be_in_order_is_refused() {
    let Some((device, context)) = gpu() else { return };
    let text = |error: Option<Error>| error.unwrap().to_string();
    let cuda = context.new_stream().unwrap();
    let slice = upload(&cuda, &[1.0f32; 16]);
    let mut y = upload(&cuda, &[0.0f32; 16]);
    let stream = Stream::from_cudarc(&device, &cuda).unwrap();
    let second = Stream::from_cudarc(&device, &cuda).err();
    assert_eq!(text(second), "stream: `cuda` must be a stream without a `Stream` of its own, got one that has it");
    let on_cpu = Stream::from_cudarc(&Device::cpu(), &cuda).err();
    assert_eq!(text(on_cpu), "stream: `device` lives on cpu, the stream runs on cuda:0");

    let others = CudaContext::new(0).unwrap().default_stream();
    let strange = upload(&others, &[1.0f32; 16]);
    let own = device.stream().unwrap();
    let used_there = Buffer::<f32>::zeros(&own, 16).unwrap();
    let refused = stream.cudarc_scope(&cuda, |scope| -> Result<(), Error> {
        let short = text(scope.rows(&slice, 3, 8).err());
        assert_eq!(short, "view: needs 24 elements, has 16");
        let another = text(scope.rows(&strange, 2, 8).err());
        assert_eq!(another, "view: `slice` must be of the stream's CudaContext, got one of another");
        let unordered = scope.lend(&used_there).err();
        assert!(matches!(unordered, Some(Error::NotJoined { arg: "buffer", .. })), "{unordered:?}");
        let (x, mut y) = (scope.rows(&slice, 2, 8)?, scope.rows_mut(&mut y, 2, 8)?);
        let unordered = glu::glu(&own, x, x, &mut y).err();
        assert!(matches!(unordered, Some(Error::NotJoined { arg: "gate", .. })), "{unordered:?}");
        own.join(&stream)?;
        glu::glu(&own, x, x, &mut y)
    });
    refused.unwrap();
    assert!((download(&cuda, &y)[15] - 0.731_058_6).abs() < 1e-6, "computed on a stream of our own, read by cudarc behind it");
    let mut lent = Buffer::<f32>::zeros(&stream, 16).unwrap();
    let joined = stream.cudarc_scope(&cuda, |scope| scope.lend_mut(&mut lent).and_then(|_| own.join(&stream)));
    joined.unwrap();
    let early = lent.to_vec(&own).err();
    assert!(matches!(early, Some(Error::NotJoined { .. })), "joined before cudarc gave the buffer back: {early:?}");
    let wrong = stream.cudarc_scope(&others, |_| Ok::<(), Error>(())).err();
    assert!(text(wrong).contains("`cuda` must be the stream that this one was made from, got another"));

    drop(stream);
    let stream = Stream::from_cudarc(&device, &cuda).expect("the first is gone");
    assert!(stream.cudarc_scope(&cuda, |scope| scope.rows(&slice, 2, 8).map(|_| ())).is_ok());
}

/// What cudarc captures is not ours to write: its graph is launched by safe code, whatever has become of the
/// memory.
#[test]
fn captures_of_cudarc_are_refused() {
    let Some((device, context)) = gpu() else { return };
    let cuda = context.new_stream().unwrap();
    let stream = Stream::from_cudarc(&device, &cuda).unwrap();
    let mut buffers = [0, 1].map(|_| Buffer::<f32>::zeros(&stream, 64).unwrap());
    let mut glu = || {
        let [x, y] = &mut buffers;
        let x = x.rows(1, 64)?;
        glu::glu(&stream, x, x, &mut y.rows_mut(1, 64)?)
    };
    glu().unwrap();
    cuda.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    let (refused, scope) = (glu(), stream.cudarc_scope(&cuda, |_| Ok::<(), Error>(())));
    let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    cuda.end_capture(flags).expect("the capture went on");
    assert!(refused.unwrap_err().to_string().starts_with("glu: work within a capture by the stream's owner"));
    assert!(scope.unwrap_err().to_string().starts_with("stream: within a capture"));
    glu().unwrap();
}

/// A buffer is freed on its stream, which cudarc's last value but ours no longer keeps.
#[test]
fn a_stream_outlives_the_values_of_cudarc() {
    let Some((device, context)) = gpu() else { return };
    let cuda = context.new_stream().unwrap();
    let stream = Stream::from_cudarc(&device, &cuda).unwrap();
    let alive = Arc::downgrade(&cuda);
    drop((cuda, context));
    let buffer = Buffer::<f32>::from_slice(&stream, &[1.0; 64]).unwrap();
    drop(stream);
    assert!(alive.upgrade().is_some());
    let stream = Stream::from_cudarc(&device, &alive.upgrade().unwrap()).unwrap();
    assert_eq!(buffer.to_vec(&stream).unwrap(), [1.0; 64], "the same stream, of which there was no other meanwhile");
    drop((buffer, stream));
    assert!(alive.upgrade().is_none());
}
