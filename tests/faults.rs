//! What goes wrong below: each driver call fails once, and every time it is a typed error, with nothing left behind.

#![cfg(feature = "cuda")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use dropless::attention::{self, decode, decode_workspace_bytes, prefill};
use dropless::device::driver::{Driver, DriverError, ImageError};
use dropless::layout::KvShape;
use dropless::moe::{self, Experts, Plan, Shape, Weights};
use dropless::router::logits;
use dropless::{
    Bf16, Buffer, Device, Error, ExpertRows, ExpertWeights, HeadLayout, KvCache, Op, Place, RopeTable, Routing, RoutingBuffers, Rows,
    RowsMut, Stream, TokenIds, Workspace, embedding, grouped_gemm, norm, rope, sample,
};
use dropless_kit::compare::{relative_l2, same_bits};
use dropless_kit::device;
use dropless_kit::emulated::{Emulated, Options};
use dropless_kit::faulty::Faulty;
use dropless_kit::fill::{normal, to_f64};
use dropless_kit::goldens::root;
use dropless_kit::recorder::{Call, Recorder};

const D: usize = 16;
const TOKENS: usize = 3;
const VOCABULARY: usize = 8;
const SHAPE: Shape = Shape::new(D, 24, 4, 2);

/// A transformer layer behind an embedding, small; every operation at least once.
struct Model {
    heads: HeadLayout,
    logits: Buffer<f32>,
    table: Buffer<f32>,
    weight: Buffer<f32>,
    w_qkv: Buffer<f32>,
    w_out: Buffer<f32>,
    qkv: Buffer<f32>,
    router: Buffer<f32>,
    experts: [Buffer<f32>; 3],
    rope: RopeTable,
    cache: KvCache<f32>,
    routing: RoutingBuffers<'static>,
    workspace: Workspace<'static>,
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
            w_qkv: fill(3, heads.qkv_cols() * D)?,
            w_out: fill(9, D * heads.q_cols())?,
            qkv: Buffer::zeros(stream, TOKENS * heads.qkv_cols())?,
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
        let (all, qkv_cols) = (ExpertRows::dense(TOKENS)?, heads.qkv_cols());
        let w_qkv = ExpertWeights::nk(self.w_qkv.rows(qkv_cols, D)?, 1)?;
        grouped_gemm::nt(stream, self.y.rows(TOKENS, D)?, w_qkv, all, &mut self.qkv.rows_mut(TOKENS, qkv_cols)?)?;
        let qkv = self.qkv.rows(TOKENS, qkv_cols)?;
        let clip = rope::Options::default().with_clip(Some(8.0));
        rope::clip_rotate_append(stream, qkv, heads, clip, &self.rope, &mut cache.layer_mut(0)?, &mut self.x.rows_mut(TOKENS, D)?)?;
        let options = attention::Options::new(heads); // a scale of 0.5
        prefill(stream, self.x.rows(TOKENS, D)?, options, &cache.layer(0)?, &mut self.y.rows_mut(TOKENS, D)?)?;
        decode(stream, self.x.rows(TOKENS, D)?, options, &cache.layer(0)?, &mut self.workspace, &mut self.y.rows_mut(TOKENS, D)?)?;
        let w_out = ExpertWeights::nk(self.w_out.rows(D, heads.q_cols())?, 1)?;
        grouped_gemm::nt(stream, self.y.rows(TOKENS, D)?, w_out, all, &mut self.x.rows_mut(TOKENS, D)?)?;
        norm::add_layer_norm(
            stream,
            self.x.rows(TOKENS, D)?,
            &mut self.residual.rows_mut(TOKENS, D)?,
            weight,
            1e-5,
            &mut self.y.rows_mut(TOKENS, D)?,
        )?;
        let [w1, v1, w2] = self.experts.each_ref().map(|w| w.rows(4 * 24, D));
        let weights = Weights::new(
            self.router.rows(4, D)?,
            Experts::gated(ExpertWeights::nk(w1?, 4)?, ExpertWeights::nk(v1?, 4)?, ExpertWeights::kn(w2?, 4)?),
        );
        let (y, x) = (self.y.rows(TOKENS, D)?, &mut self.x.rows_mut(TOKENS, D)?);
        moe::forward(stream, &plan, y, &weights, &mut self.routing, &mut self.workspace, x).map(|_| ())
    }
}

/// Opens the device, runs a step, captures and launches it, joins another stream and lets it read, and drops everything.
fn scenario(driver: Arc<dyn Driver>) -> Result<(), Error> {
    let device = Device::with_driver(driver, 0)?;
    let (stream, other) = (device.stream()?, device.stream()?);
    let mut model = Model::new(&stream)?;
    model.step(&stream)?;
    let graph = stream.capture(|| model.operations(&stream))?;
    // SAFETY: the model still has every buffer that was recorded, and nothing else vouches for them.
    unsafe { graph.launch()? };
    other.join(&stream)?;
    model.y.to_vec(&other)?;
    stream.synchronize()
}

#[test]
fn every_call_may_fail() {
    for code in [DriverError::OUT_OF_MEMORY, DriverError::new(719)] {
        let (mut failing, mut reported) = (0, BTreeMap::<&str, u32>::new());
        loop {
            let driver = Arc::new(Faulty::new(Arc::new(Recorder::default()), failing, code));
            let result = scenario(driver.clone());
            let Some(call) = driver.failed() else {
                result.unwrap();
                break;
            };
            // While buffers and streams are dropped nobody can be told; a failed wait there is made good by waiting on the host, and so is
            // a lack of pinned memory for a copy.
            let dropping = ["free", "destroy_stream", "destroy_event", "destroy_graph", "make_current", "create_event", "record", "wait"];
            let dropping = [&dropping[..], &["is_done", "synchronize"]].concat();
            let made_good = code == DriverError::OUT_OF_MEMORY && call == "alloc_pinned";
            match result {
                Ok(()) => {
                    assert!(made_good || call == "free_pinned" || dropping.contains(&call), "call {failing}, {call}: the failure was lost")
                }
                Err(error) => {
                    *reported.entry(call).or_default() += 1;
                    let typed = matches!(error, Error::OutOfMemory { .. } | Error::DeviceLost { .. } | Error::Image { .. });
                    assert!(typed, "call {failing}, {call}: {error}");
                    assert_eq!(error.is_fatal(), matches!(error, Error::DeviceLost { .. }));
                }
            }
            // On a lost device nothing can wait for the other stream, so the one buffer it used is not given back.
            let (live, lost) = (driver.live(), code != DriverError::OUT_OF_MEMORY);
            let only_that = lost && live.len() == 1 && live[0].0 == "memory";
            assert!(live.is_empty() || only_that, "call {failing}, {call}: not given back: {live:?}");
            failing += 1;
        }
        let calls = ["device_count", "attributes", "make_current", "create_stream", "alloc", "fill", "copy_to_device", "copy_to_host"];
        let calls = calls.into_iter().chain((code != DriverError::OUT_OF_MEMORY).then_some("alloc_pinned")).chain(["is_done"]);
        let calls = calls.chain(["begin_capture", "end_capture", "launch_graph"]);
        for call in calls.chain(["load_image", "function", "launch", "create_event", "record", "wait", "synchronize"]) {
            assert!(reported.contains_key(call), "{call} never failed aloud: {reported:?}");
        }
        assert!(failing > 150, "only {failing} calls");
    }
}

/// A step of a model queues its work and returns: nothing waits for the device, is allocated, or is read back.
#[test]
fn a_step_does_not_wait() {
    let recorder = Arc::new(Recorder::default());
    let stream = Device::with_driver(recorder.clone(), 0).unwrap().stream().unwrap();
    let mut model = Model::new(&stream).unwrap();
    model.step(&stream).unwrap();
    let before = recorder.calls().len();
    for _ in 0..100 {
        model.step(&stream).unwrap();
    }
    let calls = recorder.calls()[before..].to_vec();
    let other = calls.iter().find(|call| !matches!(call, Call::Launch { .. } | Call::Write { .. }));
    assert_eq!(other, None);
    // Two arrays of the cache when it is cleared, three when a step begins, the logits.
    assert_eq!(calls.iter().filter(|call| matches!(call, Call::Write { .. })).count(), 100 * 7);
}

/// On a stream that an engine lends, from the first step on: no operation waits, allocates, reads back or
/// makes anything, and all of it is on that stream.
#[test]
fn a_step_on_a_lent_stream_only_adds_to_it() {
    let recorder = Arc::new(Recorder::default());
    let device = Device::with_driver(recorder.clone(), 0).unwrap();
    device.load_images().unwrap();
    let engine = recorder.create_stream(0).unwrap();
    // SAFETY: nothing runs here, and nothing is destroyed.
    let stream = unsafe { Stream::from_raw(&device, std::ptr::without_provenance_mut(engine as usize)).unwrap() };
    let mut model = Model::new(&stream).unwrap();
    let before = recorder.calls().len();
    model.step(&stream).unwrap();
    let calls = recorder.calls()[before..].to_vec();
    assert!(calls.iter().all(|call| match call {
        Call::Launch { stream, .. } => *stream == engine,
        call => matches!(call, Call::Write { .. }),
    }));
    assert!(calls.len() > 15, "{}", calls.len());
    drop((model, stream, device));
    let of_engine = |call: &&Call| matches!(call, Call::Synchronize { stream } | Call::DestroyStream { stream } if *stream == engine);
    assert_eq!(recorder.calls().iter().find(of_engine), None);
}

/// After a refused allocation the device goes on; after an error of the context every later call repeats it.
#[test]
fn one_error_passes_another_stays() {
    let open = |failing, code| {
        let driver = Arc::new(Faulty::new(Arc::new(Recorder::default()), failing, code));
        Device::with_driver(driver, 0).unwrap().stream().unwrap()
    };
    let calls_so_far = (0..).filter(|n| scenario_fails_in_alloc(*n)).nth(1).unwrap(); // the first is the stream's scratch
    let stream = open(calls_so_far, DriverError::OUT_OF_MEMORY);
    let text = Buffer::<f32>::zeros(&stream, 25).unwrap_err().to_string();
    assert_eq!(text, "out of memory: buffer needs 100 bytes");
    Buffer::<f32>::zeros(&stream, 25).unwrap();

    let stream = open(calls_so_far, DriverError::new(719));
    let DriverError { name, call, code } = DriverError::new(719);
    let lost = Error::DeviceLost { first_op: Op::Buffer, call, code, name };
    assert_eq!(Buffer::<f32>::zeros(&stream, 25).unwrap_err(), lost);
    assert_eq!(Buffer::<f32>::zeros(&stream, 25).unwrap_err(), lost);
    assert_eq!(stream.synchronize().unwrap_err(), lost);
    assert_eq!(
        lost.to_string(),
        "device lost in buffer: the driver gave CUDA 719 (of a stand-in); this process cannot use the device again"
    );
}

/// Whether the call number `n` of opening a device, a stream and a buffer is the allocation.
fn scenario_fails_in_alloc(n: usize) -> bool {
    let driver = Arc::new(Faulty::new(Arc::new(Recorder::default()), n, DriverError::new(719)));
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

/// A GPU of another architecture is refused before anything is made there, in a way that an engine can tell
/// from a failure: it keeps its own kernels.
#[test]
fn an_engine_keeps_its_fallback() {
    for (major, minor) in [(7, 5), (8, 0), (8, 9), (10, 0), (12, 0)] {
        let recorder = Arc::new(Recorder::with_capability(major, minor));
        let error = Device::with_driver(recorder.clone(), 0).unwrap_err();
        assert_eq!(error, Error::Arch { have: (major, minor), need: (9, 0) });
        assert!(error.is_unsupported() && error.is_refusal() && !error.is_fatal());
        assert_eq!((recorder.calls(), recorder.current()), (vec![], None), "nothing made, no context");
    }
    let unsupported = [
        Error::NoDriver { searched: &[] },
        Error::NoDevice { ordinal: 0, count: 0 },
        Error::OldDriver { have: 11080, need: 12040 },
        Error::DriverFunction { name: "cuLaunchKernelEx" },
    ];
    assert!(unsupported.iter().all(Error::is_unsupported));
    let others = [
        Error::OutOfMemory { op: Op::Buffer, need_bytes: 1 },
        Error::DeviceLost { first_op: Op::Glu, call: "", code: 719, name: "" },
        Error::Value { op: Op::Router, arg: "p", need: "positive", got: -1.0 },
        Error::DriverStart { code: 802, name: "" },
    ];
    assert!(!others.iter().any(Error::is_unsupported));
    let stream = device::emulated().1;
    let (x, w) = (Buffer::<f32>::zeros(&stream, 8).unwrap(), Buffer::<Bf16>::zeros(&stream, 8).unwrap());
    let mut y = Buffer::<f32>::zeros(&stream, 8).unwrap();
    let refused = norm::rms_norm(&stream, x.rows(1, 8).unwrap(), w.rows(1, 8).unwrap(), 1e-5, &mut y.rows_mut(1, 8).unwrap());
    assert!(refused.unwrap_err().is_unsupported(), "types side by side, which the kernels do not serve");
}

/// Machine code that the driver refuses is compiled from its PTX; where that is refused too, the error carries the driver's code and
/// what its compiler said. Nothing is launched then, and the device goes on.
#[test]
fn a_refused_image_names_itself() {
    let recorder = Arc::new(Recorder::default());
    let open = || Device::with_driver(recorder.clone(), 0).unwrap();
    let refused = |code, log: &str| Some(ImageError { error: DriverError { name: "NAME", ..DriverError::new(code) }, log: log.to_owned() });
    let device = open();
    argmax_on(&device.stream().unwrap()).unwrap();
    assert_eq!(device.loaded_images(), ["ptx/sample.sm_90a.cubin"]);

    recorder.refuse_images(refused(209, ""), None);
    let device = open();
    argmax_on(&device.stream().unwrap()).unwrap();
    assert_eq!(device.loaded_images(), ["ptx/sample.sm_90a.ptx"]);

    recorder.refuse_images(refused(209, ""), refused(222, "ptxas application ptx input, line 1; fatal"));
    let device = open();
    let (stream, before) = (device.stream().unwrap(), recorder.launches().len());
    let error = argmax_on(&stream).unwrap_err();
    let text = "the driver refused ptx/sample.sm_90a.ptx at entry `sample_argmax`: CUDA 222 (NAME); ptxas application \
                ptx input, line 1; fatal";
    assert_eq!(error.to_string(), text);
    assert!(error.is_refusal() && recorder.launches().len() == before && device.loaded_images().is_empty());
    assert_eq!(
        device.load_images().unwrap_err().to_string(),
        "the driver refused ptx/attention_decode.sm_90a.ptx: CUDA 222 (NAME); ptxas application ptx input, line 1; fatal"
    );
    recorder.refuse_images(None, None);
    argmax_on(&stream).unwrap();
    device.load_images().unwrap();
    let stems: BTreeSet<_> = dropless::ops::kernels().iter().map(|kernel| kernel.stem()).collect();
    assert_eq!(device.loaded_images().len(), stems.len());
    let before = recorder.calls().len();
    device.load_images().unwrap(); // each is loaded once
    assert_eq!(recorder.calls().len(), before);
}

/// A call that the driver refuses for its arguments says which call it was, and the device goes on.
#[test]
fn a_refused_call_loses_no_device() {
    for code in [1, 400, 701] {
        let recorder = Arc::new(Recorder::default());
        let launch = (0..).find(|n| {
            let driver = Arc::new(Faulty::new(recorder.clone(), *n, DriverError::new(code)));
            let _ = argmax_once(driver.clone());
            driver.failed() == Some("launch")
        });
        let call = DriverError { name: "NAME", call: "cuLaunchKernelEx", ..DriverError::new(code) };
        let driver = Arc::new(Faulty::new(recorder.clone(), launch.unwrap(), call));
        let stream = Device::with_driver(driver, 0).unwrap().stream().unwrap();
        let error = argmax_on(&stream).unwrap_err();
        assert_eq!(error.to_string(), format!("sample: cuLaunchKernelEx gave CUDA {code} (NAME)"));
        assert!(!error.is_refusal() && !error.is_fatal());
        argmax_on(&stream).unwrap();
    }
}

/// An error of the context that is first noticed while an image is loaded is the device's, and stays; want of memory is neither's fault.
#[test]
fn a_device_lost_while_loading_is_lost() {
    let fail = |at: &str, code| {
        let recorder = Arc::new(Recorder::default());
        let nth = (0..).find(|n| {
            let driver = Arc::new(Faulty::new(recorder.clone(), *n, DriverError::new(code)));
            let _ = argmax_once(driver.clone());
            driver.failed() == Some(at)
        });
        let before = recorder.launches().len();
        let stream = Device::with_driver(Arc::new(Faulty::new(recorder.clone(), nth.unwrap(), DriverError::new(code))), 0)
            .unwrap()
            .stream()
            .unwrap();
        let errors = [(); 2].map(|()| argmax_on(&stream));
        (errors, recorder.launches().len() - before)
    };
    for at in ["load_image", "function"] {
        for code in [4, 214, 700, 719, 999] {
            let DriverError { name, call, .. } = DriverError::new(code);
            let lost = || Err(Error::DeviceLost { first_op: Op::Sample, call, code, name });
            assert_eq!(fail(at, code), ([lost(), lost()], 0), "{at} {code}");
        }
        for code in [200, 209, 218, 222, 500] {
            let ([first, second], launches) = fail(at, code);
            if at == "load_image" {
                assert_eq!((first, second, launches), (Ok(()), Ok(()), 2), "{at} {code}: the PTX is loaded instead");
                continue;
            }
            assert!(matches!(first, Err(Error::Image { entry: "sample_argmax", .. })), "{first:?}");
            assert_eq!((second, launches), (Ok(()), 1), "{at} {code}: the device goes on");
        }
        let ([first, second], _) = fail(at, 2);
        assert!(matches!(first, Err(Error::OutOfMemory { op: Op::Sample, need_bytes: 1000.. })), "{first:?}");
        assert_eq!(second, Ok(()));
    }
}

/// Images that are none: each is refused as the image's fault.
#[test]
fn corrupt_images_are_refused() {
    let whole = std::fs::read_to_string(root().join("ptx/sample.sm_90a.ptx")).unwrap();
    let driver = Emulated::new(Options::default());
    let half = &whole[..whole.len() / 2];
    for text in [
        "",
        "not PTX",
        half,
        &whole.replace("sm_90a", "sm_100a"),
        &whole.replace(".version 8.4", ".version 99.0"),
        &whole.replace("ld.", "ldd."),
    ] {
        let refused = driver.load_image(0, &[text.as_bytes(), b"\0"].concat()).unwrap_err();
        assert!(refused.error.is_of_image(), "{}", refused.error);
    }
    assert!(driver.load_image(0, whole.as_bytes()).is_err(), "without its NUL");
    driver.load_image(0, &[whole.as_bytes(), b"\0"].concat()).unwrap();
}

fn argmax_once(driver: Arc<dyn Driver>) -> Result<(), Error> {
    argmax_on(&Device::with_driver(driver, 0)?.stream()?)
}

fn argmax_on(stream: &Stream) -> Result<(), Error> {
    let (logits, mut ids) = (Buffer::<f32>::zeros(stream, 8)?, Buffer::zeros(stream, 2)?);
    sample::argmax(stream, logits.rows(2, 4)?, &mut ids).map(|_| ())
}

/// What the CPU serves and a GPU does not: types side by side, rows off 16 bytes, rows too long. Nothing is launched.
#[test]
fn limits_of_the_kernels_are_refusals() {
    let recorder = Arc::new(Recorder::default());
    let stream = Device::with_driver(recorder.clone(), 0).unwrap().stream().unwrap();
    let single = Buffer::<f32>::zeros(&stream, 1 << 15).unwrap();
    let half = Buffer::<Bf16>::zeros(&stream, 1 << 15).unwrap();
    let mut out = Buffer::<f32>::zeros(&stream, 1 << 15).unwrap();
    let mut id = Buffer::zeros(&stream, 2).unwrap();
    let ids = TokenIds::from_host(&stream, &[1, 2], 4, &mut id).unwrap();
    let (x, odd) = (|rows, cols| single.rows(rows, cols).unwrap(), |rows| single.rows(rows, 7).unwrap());
    let narrow = |rows, cols| half.rows(rows, cols).unwrap();
    let mut texts = Vec::new();
    let mut refused = |result: Result<(), Error>| texts.push(result.unwrap_err().to_string());

    refused(embedding::lookup(&stream, ids, narrow(4, 8), &mut out.rows_mut(2, 8).unwrap()));
    refused(embedding::lookup(&stream, ids, odd(4), &mut out.rows_mut(2, 7).unwrap()));
    refused(norm::layer_norm(&stream, x(2, 8), narrow(1, 8), 1e-5, &mut out.rows_mut(2, 8).unwrap()));
    refused(norm::rms_norm(&stream, odd(2), x(1, 7), 1e-5, &mut out.rows_mut(2, 7).unwrap()));
    refused(norm::rms_norm(&stream, x(1, 16385), x(1, 16385), 1e-5, &mut out.rows_mut(1, 16385).unwrap()));
    refused(logits(&stream, x(2, 8), narrow(3, 8), &mut out.rows_mut(2, 3).unwrap()));
    refused(logits(&stream, odd(2), odd(3), &mut out.rows_mut(2, 3).unwrap()));
    refused(sample::argmax(&stream, odd(2), &mut Buffer::zeros(&stream, 2).unwrap()).map(|_| ()));
    let (dense, w) = (ExpertRows::dense(2).unwrap(), ExpertWeights::nk(narrow(3, 8), 1).unwrap());
    refused(grouped_gemm::nt(&stream, x(2, 8), w, dense, &mut out.rows_mut(2, 3).unwrap()));
    let mut small = Buffer::<Bf16>::zeros(&stream, 6).unwrap();
    let w = ExpertWeights::nk(x(3, 8), 1).unwrap();
    refused(grouped_gemm::nt(&stream, x(2, 8), w, dense, &mut small.rows_mut(2, 3).unwrap()));
    let heads = HeadLayout::new(1, 1, 1281).unwrap();
    let mut cache = KvCache::<f32>::new(&stream, 1, KvShape::contiguous(heads, 1, 1)).unwrap();
    cache.append(&stream, &[1]).unwrap();
    let wide = attention::Options::new(heads);
    refused(prefill(&stream, x(1, 1281), wide, &cache.layer(0).unwrap(), &mut out.rows_mut(1, 1281).unwrap()));

    let want = [
        "embedding: a kernel for f32 x bf16 -> f32 is not supported here; supported: f32 x f32 -> f32, ",
        "embedding: `table` must have a row stride that is a multiple of 16 bytes, got 28",
        "norm: a kernel for f32 x bf16 -> f32 is not supported here; supported: f32 x f32 -> f32, ",
        "norm: `x` must have a row stride that is a multiple of 16 bytes, got 28",
        "norm: D beyond 16384 is not supported here; supported: up to 16384",
        "router: a kernel for f32 x bf16 -> f32 is not supported here; supported: ",
        "router: `x` must have a row stride that is a multiple of 16 bytes, got 28",
        "sample: `logits` must have a row stride that is a multiple of 16 bytes, got 28",
        "grouped_gemm: a kernel for f32 x bf16 -> f32 is not supported here; supported: ",
        "grouped_gemm: a kernel for f32 x f32 -> bf16 is not supported here; supported: ",
        "attention: head_dim + value_dim beyond 2560 is not supported here; supported: up to 2560",
    ];
    // Where kernels are listed, the list is theirs.
    let said = |(text, want): (&String, &&str)| text == want || want.contains("a kernel for") && text.starts_with(want);
    assert!(texts.len() == want.len() && texts.iter().zip(&want).all(said), "{texts:#?}");
    assert_eq!(recorder.launches(), []);
}

/// Memory that is not ours, off the 16 bytes that the kernels read at once: refused with the numbers, and so is memory of another place.
#[test]
fn misaligned_addresses_are_refused() {
    let recorder = Arc::new(Recorder::default());
    let stream = Device::with_driver(recorder.clone(), 0).unwrap().stream().unwrap();
    let text = |place, address, stride| {
        // SAFETY: a driver that only records reads and writes nothing.
        let (x, mut y) = unsafe {
            let x = Rows::<f32>::from_raw(place, address, 2, 4, stride).unwrap();
            (x, RowsMut::<f32>::from_raw(Place::Cuda(0), 0x7000, 2, 4, 4).unwrap())
        };
        norm::rms_norm(&stream, x, x.row_range(0..1).unwrap(), 1e-5, &mut y).unwrap_err().to_string()
    };
    let first = "norm: `x` must have a first address with remainder 0 modulo 16 bytes, got 4";
    assert_eq!(text(Place::Cuda(0), 0x7004, 4), first);
    assert_eq!(text(Place::Cuda(0), 0x7000, 5), "norm: `x` must have a row stride that is a multiple of 16 bytes, got 20");
    assert_eq!(text(Place::Cuda(1), 0x7000, 4), "norm: `x` lives on cuda:1, the stream runs on cuda:0");
    assert_eq!(recorder.launches(), []);
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

/// The layer on the emulated GPU and on the CPU are the same function.
#[test]
fn devices_agree_on_a_layer() {
    let run = |stream: &Stream| {
        let mut model = Model::new(stream).unwrap();
        model.step(stream).unwrap();
        let [x, residual] = [&model.x, &model.residual].map(|values| to_f64(&values.to_vec(stream).unwrap()));
        [x, residual].concat()
    };
    let want = run(&device::cpu(1));
    device::each_schedule(|stream| {
        let error = relative_l2(&run(stream), &want);
        assert!(error <= 5e-6, "relative L2 {error:e}");
    });
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

/// What a graph cannot hold is refused by name before the driver hears of it, and the device goes on. Memory that is dropped
/// meanwhile is freed behind the capture.
#[test]
fn a_capture_refuses_what_a_graph_cannot_hold() {
    let recorder = Arc::new(Recorder::default());
    let device = Device::with_driver(recorder.clone(), 0).unwrap();
    let (stream, other) = (device.stream().unwrap(), device.stream().unwrap());
    let mut model = Model::new(&stream).unwrap();
    let dropped = Buffer::<f32>::zeros(&stream, 4).unwrap();
    let (mut texts, before) = (Vec::new(), recorder.calls().len());
    let graph = stream.capture(|| {
        let mut refused = |result: Result<(), Error>| texts.push(result.unwrap_err().to_string());
        refused(model.cache.append(&stream, &[1]));
        refused(model.logits.copy_from_slice(&stream, &[1.0]));
        refused(TokenIds::from_host(&stream, &[1], 2, &mut model.ids).map(|_| ()));
        refused(Routing::from_host(&stream, &[0, 1], &[0.5; 2], &mut model.routing).map(|_| ()));
        refused(model.logits.to_vec(&stream).map(|_| ()));
        refused(model.logits.rows(1, 4)?.to_vec(&stream).map(|_| ()));
        refused(Buffer::<f32>::zeros(&stream, 4).map(|_| ()));
        refused(stream.join(&other));
        refused(other.join(&stream));
        refused(stream.synchronize());
        refused(stream.capture(|| Ok(())).map(|_| ()));
        refused(model.operations(&stream));
        assert_eq!(recorder.calls().len(), before + 1, "nothing but the beginning of the capture");
        drop(dropped);
        Ok(())
    });
    let of = |op: &str, what: &str| format!("{op}: within a capture {what} is not supported here; supported: operations that ran before");
    let want = [
        of("kv_cache", "a copy from the host"),
        of("buffer", "a copy from the host"),
        of("buffer", "a copy from the host"),
        of("routing", "a copy from the host"),
        of("buffer", "a copy to the host"),
        of("view", "a copy to the host"),
        of("buffer", "a new buffer"),
        of("stream", "a join"),
        of("stream", "a join"),
        of("stream", "waiting for the stream"),
        of("stream", "another capture"),
        of("sample", "loading a kernel"),
    ];
    assert_eq!(texts, want);
    assert!(matches!(recorder.calls()[before..], [Call::BeginCapture, Call::EndCapture, Call::Free { .. }]));
    assert_eq!(model.cache.len(0), 0);
    drop(graph.unwrap());
    // A refused call has left no trace, and work that panics leaves no capture.
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| stream.capture(|| panic!("on purpose")))).is_err());
    other.join(&stream).unwrap();
    model.step(&stream).unwrap();
}
