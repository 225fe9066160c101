//! What only shows where copies, streams and kernels run beside the host: long copies, joins, pinned memory
//! used again, graphs, frees, streams that an engine lends. Each test runs on the emulated GPU, which proves
//! the test, and on the GPU where there is one, which is what it is for.
#![cfg(feature = "cuda")]

use std::ptr::without_provenance_mut;
use std::sync::Arc;

use dropless::device::driver::hardware::Hardware;
use dropless::device::driver::{Driver, Handle};
use dropless::moe::{self, Experts, Plan, Shape, Weights};
use dropless::{Bf16, Buffer, Device, Error, ExpertWeights, Float, Place, RoutingBuffers, Stream, TokenIds, Workspace, embedding, glu};
use dropless_kit::compare::same_bits;
use dropless_kit::device;
use dropless_kit::emulated::{Emulated, Options};
use dropless_kit::fill::normal;

/// The emulated GPU, and the GPU where there is one.
fn each(test: impl Fn(&Device)) {
    if !device::hardware_only() {
        let (driver, stream) = device::emulated();
        test(stream.device());
        assert_eq!(driver.reports(), [""; 0]);
    }
    if let Some(stream) = device::hardware() {
        test(stream.device());
    }
}

#[test]
fn a_device_has_a_name() {
    assert_eq!(Device::cpu().name(), "cpu");
    assert_eq!(device::emulated().1.device().name(), "PTX emulator");
    if let Some(stream) = device::hardware() {
        assert!(stream.device().name().starts_with("NVIDIA"), "{}", stream.device().name());
    }
}

/// More than may be on its way at once, so that pinned memory is waited for and used again; the source is gone before it has arrived.
#[test]
fn a_long_copy_goes_up_and_back() {
    each(|device| {
        let stream = device.stream().unwrap();
        let values = |seed: u32| (0..10u32 << 20).map(|i| (i ^ seed).wrapping_mul(0x9e37_79b9)).collect::<Vec<_>>();
        let buffers = [1, 2].map(|seed| Buffer::from_slice(&stream, &values(seed)).unwrap());
        for (buffer, seed) in buffers.iter().zip([1, 2]) {
            assert!(buffer.to_vec(&stream).unwrap() == values(seed), "the values of seed {seed}");
        }
    });
}

/// One host array and one device buffer carry the ids of every step, while none of the steps is waited for.
#[test]
fn copies_in_flight_keep_their_values() {
    const VOCABULARY: usize = 1000;
    each(|device| {
        let stream = device.stream().unwrap();
        let table = Buffer::from_slice(&stream, &(0..4 * VOCABULARY as u32).map(|i| i as f32).collect::<Vec<_>>()).unwrap();
        let mut on_device = Buffer::zeros(&stream, 3).unwrap();
        let mut ids = [0u32; 3];
        let outputs: Vec<_> = (0..300u32)
            .map(|step| {
                ids = [0, 1, 2].map(|i| (step * 37 + i) % VOCABULARY as u32);
                let ids = TokenIds::from_host(&stream, &ids, VOCABULARY, &mut on_device).unwrap();
                let mut y = Buffer::<f32>::zeros(&stream, 3 * 4).unwrap();
                let table = table.rows(VOCABULARY, 4).unwrap();
                embedding::lookup(&stream, ids, table, &mut y.rows_mut(3, 4).unwrap()).unwrap();
                y
            })
            .collect();
        for (step, y) in (0..).zip(outputs) {
            let row = |i: u32| (step * 37 + i) % VOCABULARY as u32 * 4;
            let want: Vec<f32> = (0..3).flat_map(|i| (row(i)..row(i) + 4).map(|value| value as f32)).collect();
            assert_eq!(y.to_vec(&stream).unwrap(), want, "step {step}");
        }
    });
}

const COLS: usize = 64;

/// Work on two streams in turn, each of which uses what the other wrote, is what it is on one; without the join it is refused.
#[test]
fn a_join_orders_two_streams() {
    const ROWS: usize = 50;
    let glu_of = |stream: &Stream, gate: &Buffer<f32>, up: &Buffer<f32>, y: &mut Buffer<f32>| {
        glu::glu(stream, gate.rows(ROWS, COLS)?, up.rows(ROWS, COLS)?, &mut y.rows_mut(ROWS, COLS)?)
    };
    each(|device| {
        let chain = |first: &Stream, second: &Stream| {
            let mut outputs = Vec::new();
            let [mut x, mut h] = [(); 2].map(|()| Buffer::<f32>::zeros(first, ROWS * COLS).unwrap());
            for round in 0..20 {
                first.join(second).unwrap();
                x.copy_from_slice(first, &normal::<f32>(round, ROWS * COLS, 1.0)).unwrap();
                glu_of(first, &x, &x, &mut h).unwrap();
                let mut y = Buffer::zeros(first, ROWS * COLS).unwrap();
                second.join(first).unwrap();
                glu_of(second, &x, &h, &mut y).unwrap();
                outputs.push(y);
            }
            outputs.iter().flat_map(|y| y.to_vec(second).unwrap()).collect::<Vec<_>>()
        };
        let (first, second) = (device.stream().unwrap(), device.stream().unwrap());
        let want = chain(&first, &first);
        same_bits(&chain(&first, &second), &want);

        let x = Buffer::from_slice(&first, &normal::<f32>(1, ROWS * COLS, 1.0)).unwrap();
        let mut y = Buffer::zeros(&first, ROWS * COLS).unwrap();
        let refused = glu_of(&second, &x, &x, &mut y);
        assert!(matches!(refused, Err(Error::NotJoined { .. })), "{refused:?}");
        assert!(matches!(x.to_vec(&second), Err(Error::NotJoined { .. })));
        second.join(&first).unwrap();
        glu_of(&second, &x, &x, &mut y).unwrap();
    });
}

const SHAPE: Shape = Shape::new(72, 40, 8, 2);

/// A MoE layer with everything it needs on a device.
struct Layer {
    tokens: usize,
    plan: Plan<Bf16>,
    router: Buffer<Bf16>,
    experts: [Buffer<Bf16>; 3],
    routing: RoutingBuffers<'static>,
    workspace: Workspace<'static>,
    x: Buffer<Bf16>,
    y: Buffer<Bf16>,
}

impl Layer {
    fn new(stream: &Stream, tokens: usize) -> Layer {
        let Shape { d_model, d_ffn, num_experts, top_k, .. } = SHAPE;
        let fill = |seed, rows| Buffer::from_slice(stream, &normal::<Bf16>(seed, rows * d_model, 0.1)).unwrap();
        let plan = Plan::new(SHAPE, tokens).unwrap();
        let workspace = Workspace::new(stream, plan.workspace_bytes()).unwrap();
        Layer {
            tokens,
            plan,
            router: fill(1, num_experts),
            experts: [2, 3, 4].map(|seed| fill(seed, num_experts * d_ffn)),
            routing: RoutingBuffers::new(stream, tokens, top_k, num_experts).unwrap(),
            workspace,
            x: Buffer::zeros(stream, tokens * d_model).unwrap(),
            y: Buffer::zeros(stream, tokens * d_model).unwrap(),
        }
    }

    fn forward(&mut self, stream: &Stream) -> Result<(), Error> {
        let Shape { d_model, d_ffn, num_experts, .. } = SHAPE;
        let [w1, v1, w2] = self.experts.each_ref().map(|w| w.rows(num_experts * d_ffn, d_model));
        let weights = Weights::new(
            self.router.rows(num_experts, d_model)?,
            Experts::gated(
                ExpertWeights::nk(w1?, num_experts)?,
                ExpertWeights::nk(v1?, num_experts)?,
                ExpertWeights::kn(w2?, num_experts)?,
            ),
        );
        let (x, mut y) = (self.x.rows(self.tokens, d_model)?, self.y.rows_mut(self.tokens, d_model)?);
        moe::forward(stream, &self.plan, x, &weights, &mut self.routing, &mut self.workspace, &mut y).map(|_| ())
    }

    /// Sets the input, and the output to NaN.
    fn prepare(&mut self, stream: &Stream, seed: u64) {
        let len = self.tokens * SHAPE.d_model;
        self.x.copy_from_slice(stream, &normal::<Bf16>(seed, len, 1.0)).unwrap();
        self.y.copy_from_slice(stream, &vec![Bf16::from_f32(f32::NAN); len]).unwrap();
    }

    /// What the layer computes when it is called.
    fn eager(&mut self, stream: &Stream, seed: u64) -> Vec<Bf16> {
        self.prepare(stream, seed);
        self.forward(stream).unwrap();
        self.y.to_vec(stream).unwrap()
    }
}

/// One graph, launched with inputs of other routings, gives the bits that calling the layer gives; launches may follow each other unwaited.
#[test]
fn one_graph_serves_every_routing() {
    each(|device| {
        let stream = device.stream().unwrap();
        for tokens in [8, 40, 129] {
            let mut layer = Layer::new(&stream, tokens);
            let wants = [11, 12, 13].map(|seed| (seed, layer.eager(&stream, seed)));
            assert!(wants[0].1 != wants[1].1 && wants[1].1 != wants[2].1);
            let graph = stream.capture(|| layer.forward(&stream)).unwrap();
            for (seed, want) in wants.iter().chain(&wants[..1]) {
                layer.prepare(&stream, *seed);
                for _ in 0..2 {
                    // SAFETY: the layer has every buffer that was recorded.
                    unsafe { graph.launch().unwrap() };
                }
                same_bits(&layer.y.to_vec(&stream).unwrap(), want);
            }
        }
    });
}

/// Memory dropped while work that uses it is queued, or within a capture, is not given to anyone before that work is done.
#[test]
fn memory_is_freed_behind_its_use() {
    const ROWS: usize = 1000;
    each(|device| {
        let (stream, other) = (device.stream().unwrap(), device.stream().unwrap());
        let values = normal::<f32>(1, ROWS * COLS, 1.0);
        let poison = || Buffer::from_slice(&stream, &vec![f32::NAN; ROWS * COLS]).unwrap();
        let step = |on: &Stream| {
            let x = Buffer::from_slice(&stream, &values).unwrap();
            let mut y = Buffer::<f32>::zeros(&stream, ROWS * COLS).unwrap();
            on.join(&stream).unwrap();
            glu::glu(on, x.rows(ROWS, COLS).unwrap(), x.rows(ROWS, COLS).unwrap(), &mut y.rows_mut(ROWS, COLS).unwrap()).unwrap();
            y // and `x` is dropped
        };
        let want = step(&stream).to_vec(&stream).unwrap();
        for on in [&stream, &other] {
            for _ in 0..10 {
                let y = step(on);
                let _in_its_place = poison();
                same_bits(&y.to_vec(on).unwrap(), &want);
            }
        }

        let mut layer = Layer::new(&stream, 8);
        let want = layer.eager(&stream, 11);
        let unrelated = poison();
        let graph = stream.capture(|| {
            drop(unrelated);
            layer.forward(&stream)
        });
        let graph = graph.unwrap();
        let in_its_place = poison();
        layer.prepare(&stream, 11);
        // SAFETY: the layer has every buffer that was recorded.
        unsafe { graph.launch().unwrap() };
        let Layer { y, x, experts, .. } = layer;
        drop((graph, x, experts, in_its_place)); // behind the launch
        let _in_their_place = [poison(), poison()];
        same_bits(&y.to_vec(&stream).unwrap(), &want);
    });
}

/// An engine with a device, and the driver by which it makes streams and graphs of its own.
fn each_engine(test: impl Fn(Arc<dyn Driver>)) {
    if !device::hardware_only() {
        let driver = Arc::new(Emulated::new(Options::default()));
        test(driver.clone());
        assert_eq!(driver.reports(), [""; 0]);
    }
    if device::hardware().is_some() {
        let driver = Hardware::shared().unwrap();
        driver.make_current(0).unwrap();
        test(driver);
    }
}

/// The engine's stream, lent.
fn lent(device: &Device, stream: Handle) -> Stream {
    // SAFETY: the tests destroy no stream of theirs before the last buffer, and launch what they have
    // captured with its memory at hand, behind everything earlier.
    unsafe { Stream::from_raw(device, without_provenance_mut(stream as usize)).unwrap() }
}

/// Scratch in memory of the engine's, which it keeps to the end.
fn scratch(driver: &dyn Driver, bytes: usize) -> Workspace<'static> {
    let address = driver.alloc(0, bytes).unwrap();
    driver.synchronize(0).unwrap();
    // SAFETY: as many bytes, of which nobody else knows, and which are never freed.
    unsafe { Workspace::from_raw(Place::Cuda(0), address, bytes).unwrap() }
}

/// On a stream that an engine lends, and on the default stream, a layer gives the bits that it gives on a
/// stream of ours.
#[test]
fn a_lent_stream_computes_the_same() {
    each_engine(|driver| {
        let device = Device::with_driver(driver.clone(), 0).unwrap();
        let created = driver.create_stream(0).unwrap();
        for tokens in [8, 40, 129] {
            let own = device.stream().unwrap();
            let want = Layer::new(&own, tokens).eager(&own, 11);
            for stream in [created, 0, created] {
                let stream = lent(&device, stream);
                let mut layer = Layer::new(&stream, tokens);
                same_bits(&layer.eager(&stream, 11), &want);
                layer.workspace = scratch(&*driver, layer.plan.workspace_bytes());
                same_bits(&layer.eager(&stream, 11), &want);
            }
        }
        driver.destroy_stream(created).unwrap();
    });
}

/// An engine captures a layer on its stream, which it lends while it captures, and launches the graph there
/// and elsewhere. Every kernel is first used within the capture. Beside it, on the same thread, streams and
/// images are made, and copies go up and back.
#[test]
fn an_engine_captures_a_layer() {
    each_engine(|driver| {
        for tokens in [8, 129] {
            let device = Device::with_driver(driver.clone(), 0).unwrap(); // on which no kernel was used
            device.load_images().unwrap();
            let [stream, other] = [(); 2].map(|()| driver.create_stream(0).unwrap());
            let mut layer = {
                let own = device.stream().unwrap();
                let mut layer = Layer::new(&own, tokens);
                layer.prepare(&own, 11);
                layer
            }; // the stream is gone, so that nobody has to join it
            driver.begin_capture(stream).unwrap();
            let engines = lent(&device, stream);
            layer.forward(&engines).unwrap();
            assert!(matches!(Buffer::<f32>::zeros(&engines, 1), Err(Error::Unsupported { .. })));
            let beside = Device::with_driver(driver.clone(), 0).unwrap();
            let own = beside.stream().unwrap();
            let wants = [12, 13].map(|seed| (seed, Layer::new(&own, tokens).eager(&own, seed)));
            let graph = driver.end_capture(stream).unwrap();
            for (seed, want) in &wants {
                for on in [stream, stream, other] {
                    layer.prepare(&engines, *seed);
                    engines.synchronize().unwrap();
                    driver.launch_graph(graph, on).unwrap();
                    driver.launch_graph(graph, on).unwrap();
                    driver.synchronize(on).unwrap();
                    same_bits(&layer.y.to_vec(&engines).unwrap(), want);
                }
            }
            driver.destroy_graph(graph).unwrap();
            drop((layer, engines));
            [stream, other].iter().for_each(|stream| driver.destroy_stream(*stream).unwrap());
        }
    });
}

/// Two threads of an engine, each with a stream of its own: neither counts in the zeros of the other.
#[test]
fn two_threads_lend_two_streams() {
    each_engine(|driver| {
        let device = Device::with_driver(driver.clone(), 0).unwrap();
        let own = device.stream().unwrap();
        let wants = [11, 12].map(|seed| Layer::new(&own, 129).eager(&own, seed));
        std::thread::scope(|scope| {
            for (seed, want) in (11..).zip(&wants) {
                let (driver, device) = (&driver, &device);
                scope.spawn(move || {
                    driver.make_current(0).unwrap();
                    let created = driver.create_stream(0).unwrap();
                    for _ in 0..10 {
                        let stream = lent(device, created);
                        same_bits(&Layer::new(&stream, 129).eager(&stream, seed), want);
                    }
                    driver.destroy_stream(created).unwrap();
                });
            }
        });
    });
}
