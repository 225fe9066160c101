//! What goes wrong below: each driver call fails once, and every time it is a typed error, with nothing left behind.

use std::sync::Arc;

use dropless::attention::{decode, decode_workspace_bytes, prefill};
use dropless::device::driver::{Driver, DriverError};
use dropless::layout::KvShape;
use dropless::moe::{self, Plan, Shape, Weights};
use dropless::router::Normalize;
use dropless::{
    Buffer, Device, Error, ExpertWeights, HeadLayout, KvCache, Op, RopeTable, RoutingBuffers, Stream, Workspace, embedding, norm, rope,
    sample,
};
use dropless_kit::compare::same_bits;
use dropless_kit::device;
use dropless_kit::emulated::{Emulated, Options};
use dropless_kit::faulty::Faulty;
use dropless_kit::fill::normal;
use dropless_kit::recorder::Recorder;

const D: usize = 16;
const TOKENS: usize = 3;
const VOCABULARY: usize = 8;
const SHAPE: Shape = Shape { d_model: D, d_ffn: 24, num_experts: 4, top_k: 2, normalize: Normalize::P(1.0) };

/// Buffers of a small model of one layer; every operation once.
struct Model {
    heads: HeadLayout,
    logits: Buffer<f32>,
    table: Buffer<f32>,
    weight: Buffer<f32>,
    qkv: Buffer<f32>,
    router: Buffer<f32>,
    experts: [Buffer<f32>; 3],
    rope: RopeTable,
    cache: KvCache<f32>,
    routing: RoutingBuffers,
    workspace: Workspace,
    ids: Buffer<u32>,
    x: Buffer<f32>,
    residual: Buffer<f32>,
    y: Buffer<f32>,
}

impl Model {
    fn new(stream: &Stream) -> Result<Model, Error> {
        let fill = |seed: u64, len: usize| Buffer::from_slice(stream, &normal::<f32>(seed, len, 0.5));
        let heads = HeadLayout::new(4, 2, 4)?;
        let plan = Plan::<f32>::new(SHAPE, TOKENS)?;
        let bytes = plan.workspace_bytes().max(decode_workspace_bytes(heads, TOKENS, TOKENS)?);
        Ok(Model {
            heads,
            logits: Buffer::zeros(stream, TOKENS * VOCABULARY)?,
            table: fill(1, VOCABULARY * D)?,
            weight: fill(2, D)?,
            qkv: fill(3, TOKENS * heads.qkv_cols())?,
            router: fill(4, 4 * D)?,
            experts: [fill(5, 4 * 24 * D)?, fill(6, 4 * 24 * D)?, fill(7, 4 * 24 * D)?],
            rope: RopeTable::new(stream, 1e4, 4, 8)?,
            cache: KvCache::new(stream, 1, KvShape::contiguous(heads, 1, 8))?,
            routing: RoutingBuffers::new(stream, TOKENS, 2, 4)?,
            workspace: Workspace::new(stream, bytes)?,
            ids: Buffer::zeros(stream, TOKENS)?,
            x: Buffer::zeros(stream, TOKENS * D)?,
            residual: Buffer::zeros(stream, TOKENS * D)?,
            y: Buffer::zeros(stream, TOKENS * D)?,
        })
    }

    /// One step on fixed inputs.
    fn step(&mut self, stream: &Stream) -> Result<(), Error> {
        self.cache.clear(stream, 0)?;
        self.cache.append(stream, &[TOKENS])?;
        self.logits.copy_from_slice(stream, &normal::<f32>(8, TOKENS * VOCABULARY, 1.0))?;
        self.operations(stream)
    }

    /// What a graph may hold: no copy from or to the host.
    fn operations(&mut self, stream: &Stream) -> Result<(), Error> {
        let plan = Plan::<f32>::new(SHAPE, TOKENS)?;
        let Model { heads, ref mut cache, .. } = *self;
        let ids = sample::argmax(stream, self.logits.rows(TOKENS, VOCABULARY)?, &mut self.ids)?;
        embedding::lookup(stream, ids, self.table.rows(VOCABULARY, D)?, &mut self.x.rows_mut(TOKENS, D)?)?;
        let weight = self.weight.rows(1, D)?;
        norm::add_layer_norm(
            stream,
            self.x.rows(TOKENS, D)?,
            &mut self.residual.rows_mut(TOKENS, D)?,
            weight,
            1e-5,
            &mut self.y.rows_mut(TOKENS, D)?,
        )?;
        let qkv = self.qkv.rows(TOKENS, heads.qkv_cols())?;
        rope::clip_rotate_append(stream, qkv, heads, Some(8.0), &self.rope, &mut cache.layer_mut(0)?, &mut self.x.rows_mut(TOKENS, D)?)?;
        prefill(stream, self.x.rows(TOKENS, D)?, heads, 0.5, &cache.layer(0)?, &mut self.y.rows_mut(TOKENS, D)?)?;
        decode(stream, self.x.rows(TOKENS, D)?, heads, 0.5, &cache.layer(0)?, &mut self.workspace, &mut self.y.rows_mut(TOKENS, D)?)?;
        let [w1, v1, w2] = self.experts.each_ref().map(|w| w.rows(4 * 24, D));
        let weights = Weights {
            router: self.router.rows(4, D)?,
            w1: ExpertWeights::nk(w1?, 4)?,
            v1: ExpertWeights::nk(v1?, 4)?,
            w2: ExpertWeights::kn(w2?, 4)?,
        };
        let (y, x) = (self.y.rows(TOKENS, D)?, &mut self.x.rows_mut(TOKENS, D)?);
        moe::forward(stream, &plan, y, &weights, &mut self.routing, &mut self.workspace, x).map(|_| ())
    }
}

/// Opens the device, runs a step, joins another stream and lets it read, and drops everything.
fn scenario(driver: Arc<dyn Driver>) -> Result<(), Error> {
    let device = Device::with_driver(driver, 0)?;
    let (stream, other) = (device.stream()?, device.stream()?);
    let mut model = Model::new(&stream)?;
    model.step(&stream)?;
    other.join(&stream)?;
    model.y.to_vec(&other)?;
    stream.synchronize()
}

#[test]
fn every_call_may_fail() {
    for code in [DriverError::OUT_OF_MEMORY, DriverError(719)] {
        let (mut failing, mut by_call) = (0, std::collections::BTreeMap::<&str, u32>::new());
        loop {
            let driver = Arc::new(Faulty::new(Arc::new(Recorder::default()), failing, code));
            let result = scenario(driver.clone());
            let Some(call) = driver.failed() else {
                result.unwrap();
                break;
            };
            *by_call.entry(call).or_default() += 1;
            // A call that gives something back has nobody to tell.
            let silent = matches!(call, "free" | "destroy_stream" | "destroy_event" | "make_current");
            match result {
                Ok(()) => assert!(silent, "call {failing}, {call}: the failure was lost"),
                Err(error) => {
                    let typed = matches!(error, Error::OutOfMemory { .. } | Error::DeviceLost { .. } | Error::Image { .. });
                    assert!(typed, "call {failing}, {call}: {error}");
                    assert_eq!(error.is_fatal(), matches!(error, Error::DeviceLost { .. }));
                }
            }
            assert_eq!(driver.live(), [], "call {failing}, {call}: not given back");
            failing += 1;
        }
        let reached: Vec<&str> = by_call.keys().copied().collect();
        for call in ["alloc", "fill", "copy_to_device", "copy_to_host", "launch", "load_image", "function", "create_stream", "wait", "free"]
        {
            assert!(reached.contains(&call), "{call} was never reached: {by_call:?}");
        }
        assert!(failing > 150, "only {failing} calls");
    }
}

/// After a refused allocation the device goes on; after an error of the context every later call repeats it.
#[test]
fn one_error_passes_another_stays() {
    let open = |failing, code| {
        let driver = Arc::new(Faulty::new(Arc::new(Recorder::default()), failing, code));
        Device::with_driver(driver, 0).unwrap().stream().unwrap()
    };
    let calls_so_far = (0..).find(|n| scenario_fails_in_alloc(*n)).unwrap();
    let stream = open(calls_so_far, DriverError::OUT_OF_MEMORY);
    let text = Buffer::<f32>::zeros(&stream, 25).unwrap_err().to_string();
    assert_eq!(text, "out of memory: buffer needs 100 bytes");
    Buffer::<f32>::zeros(&stream, 25).unwrap();

    let stream = open(calls_so_far, DriverError(719));
    let lost = Error::DeviceLost { code: 719, first_op: Op::Buffer };
    assert_eq!(Buffer::<f32>::zeros(&stream, 25).unwrap_err(), lost);
    assert_eq!(Buffer::<f32>::zeros(&stream, 25).unwrap_err(), lost);
    assert_eq!(stream.synchronize().unwrap_err(), lost);
    assert_eq!(lost.to_string(), "device lost in buffer (CUDA 719); this process cannot use the device again");
}

/// Whether the call number `n` of opening a device, a stream and a buffer is the allocation.
fn scenario_fails_in_alloc(n: usize) -> bool {
    let driver = Arc::new(Faulty::new(Arc::new(Recorder::default()), n, DriverError(719)));
    let _ = Device::with_driver(driver.clone(), 0).and_then(|device| device.stream()).and_then(|stream| Buffer::<f32>::zeros(&stream, 25));
    driver.failed() == Some("alloc")
}

#[test]
fn the_wrong_device_is_refused() {
    let text = |driver: Recorder, ordinal| Device::with_driver(Arc::new(driver), ordinal).unwrap_err().to_string();
    assert_eq!(text(Recorder::with_capability(8, 0), 0), "the GPU is sm_80; these kernels need sm_90a (H100, H200)");
    assert_eq!(text(Recorder::with_capability(10, 0), 0), "the GPU is sm_100; these kernels need sm_90a (H100, H200)");
    assert_eq!(text(Recorder::default(), 3), "no CUDA device 3; this machine has 1");
}

/// An image that the driver refuses: an error that names file and entry; nothing is launched and the device goes on.
#[test]
fn a_refused_image_names_itself() {
    let recorder = Arc::new(Recorder::default());
    let failing = (0..).find(|n| {
        let driver = Arc::new(Faulty::new(recorder.clone(), *n, DriverError(222)));
        let _ = argmax_once(driver.clone());
        driver.failed() == Some("load_image")
    });
    let before = recorder.launches().len();
    let error = argmax_once(Arc::new(Faulty::new(recorder.clone(), failing.unwrap(), DriverError(222)))).unwrap_err();
    assert_eq!(error.to_string(), "the driver refused ptx/sample.sm_90a.ptx at entry `sample_argmax` (CUDA 222)");
    assert!(error.is_refusal() && recorder.launches().len() == before);
}

fn argmax_once(driver: Arc<dyn Driver>) -> Result<(), Error> {
    let stream = Device::with_driver(driver, 0)?.stream()?;
    let (logits, mut ids) = (Buffer::<f32>::zeros(&stream, 8)?, Buffer::zeros(&stream, 2)?);
    sample::argmax(&stream, logits.rows(2, 4)?, &mut ids).map(|_| ())
}

/// The device's memory runs out at the n-th allocation: every earlier one is given back.
#[test]
fn a_full_device_refuses_with_numbers() {
    let driver = Arc::new(Emulated::new(Options { memory_limit: 4096, ..Options::default() }));
    let stream = Device::with_driver(driver.clone(), 0).unwrap().stream().unwrap();
    for _ in 0..3 {
        let kept: Vec<_> = (0..3).map(|_| Buffer::<f32>::zeros(&stream, 256).unwrap()).collect();
        assert_eq!(Buffer::<f32>::zeros(&stream, 1024).unwrap_err(), Error::OutOfMemory { op: Op::Buffer, need_bytes: 4096 });
        drop(kept);
    }
    assert!(driver.reports().is_empty());
}

/// A step captured as a graph and launched again computes what it computed at once: no operation talks to the host.
#[test]
fn a_step_is_capturable() {
    let (driver, stream) = device::emulated();
    let mut model = Model::new(&stream).unwrap();
    model.step(&stream).unwrap();
    let (want_x, want_y) = (model.x.to_vec(&stream).unwrap(), model.y.to_vec(&stream).unwrap());
    assert!(want_x.iter().any(|x| *x != 0.0));

    let graph = stream.capture(|| model.operations(&stream)).unwrap();
    for buffer in [&mut model.x, &mut model.y] {
        buffer.copy_from_slice(&stream, &[f32::NAN; TOKENS * D]).unwrap();
    }
    model.residual.copy_from_slice(&stream, &[0.0; TOKENS * D]).unwrap();
    // SAFETY: the model still has every buffer that was recorded.
    unsafe { graph.launch().unwrap() };
    same_bits(&model.x.to_vec(&stream).unwrap(), &want_x);
    same_bits(&model.y.to_vec(&stream).unwrap(), &want_y);
    assert!(driver.reports().is_empty());
    assert!(device::cpu(1).capture(|| Ok(())).is_err());
}
