//! Streams that an engine lends: on a driver that records what it was asked, and on the emulated GPU, where
//! their work is computed.
#![cfg(feature = "cuda")]

use std::ffi::c_void;
use std::ptr::{null_mut, without_provenance_mut};
use std::sync::Arc;

use dropless::device::driver::{Driver, DriverError, Handle};
use dropless::moe::{self, Experts, Plan, Shape, Shared, Weights};
use dropless::{
    Buffer, Device, Error, ExpertRows, ExpertWeights, Op, Place, Routing, RoutingBuffers, Rows, RowsMut, Stream, TokenIds, Workspace,
    embedding, glu, grouped_gemm, router,
};
use dropless_kit::compare::{relative_l2, same_bits};
use dropless_kit::device::{cpu, emulated, write};
use dropless_kit::faulty::Faulty;
use dropless_kit::fill::normal;
use dropless_kit::recorder::{Call, Recorder};

#[allow(dead_code)] // `main`
#[path = "../examples/raw_pointers.rs"]
mod raw_pointers;

const LEN: usize = 64;

/// A device, and a stream that its engine has made.
fn engine() -> (Arc<Recorder>, Device, Handle) {
    let driver = Arc::new(Recorder::default());
    let device = Device::with_driver(driver.clone(), 0).unwrap();
    let stream = driver.create_stream(0).unwrap();
    (driver, device, stream)
}

fn raw(stream: Handle) -> *mut c_void {
    without_provenance_mut(stream as usize)
}

/// The engine's stream, lent.
fn lent(device: &Device, stream: Handle) -> Stream {
    // SAFETY: tests destroy no stream, or say when, and launch what they have captured with its memory at
    // hand.
    unsafe { Stream::from_raw(device, raw(stream)).unwrap() }
}

fn refused(device: &Device, stream: Handle) -> String {
    // SAFETY: never used.
    unsafe { Stream::from_raw(device, raw(stream)) }.err().unwrap().to_string()
}

/// An operation that reads `x` and writes `y`.
fn glu_of(stream: &Stream, x: &Buffer<f32>, y: &mut Buffer<f32>) -> Result<(), Error> {
    glu::glu(stream, x.rows(1, LEN)?, x.rows(1, LEN)?, &mut y.rows_mut(1, LEN)?)
}

/// What it gives on a stream of ours.
fn want(own: &Stream, x: &[f32]) -> Vec<f32> {
    let mut y = Buffer::zeros(own, LEN).unwrap();
    glu_of(own, &Buffer::from_slice(own, x).unwrap(), &mut y).unwrap();
    y.to_vec(own).unwrap()
}

/// A stream is made ready on another one, once, and then nothing is asked of either.
#[test]
fn lending_asks_nothing_of_the_stream() {
    let (driver, device, stream) = engine();
    let before = driver.calls().len();
    drop(lent(&device, stream));
    let [Call::CreateStream { stream: own }, Call::Alloc { .. }, Call::AllocPinned { .. }, Call::Synchronize { stream: waited }, last] =
        &driver.calls()[before..]
    else {
        panic!("{:?}", &driver.calls()[before..])
    };
    assert!(own != &stream && waited == own && *last == Call::DestroyStream { stream: *own });
    let before = driver.calls().len();
    let [first, second] = [(); 2].map(|()| lent(&device, stream));
    assert_eq!([first.as_raw(), second.as_raw()], [Some(raw(stream)); 2]);
    assert_eq!(first.scratch(), second.scratch());
    drop((first, second));
    assert_eq!(driver.calls().len(), before);
    // Pinned memory goes with the device; the zeros stay, for graphs that nobody knows of.
    drop(device);
    assert_eq!(driver.calls()[before..], [Call::FreePinned]);
}

/// A stream that has the handle of one that is gone counts in zeros of its own: work of the first may still
/// be queued, and so may graphs.
#[test]
fn a_handle_may_come_back() {
    let (driver, device, stream) = engine();
    let first = lent(&device, stream);
    driver.replace_stream(stream);
    let second = lent(&device, stream);
    assert_eq!(first.as_raw(), second.as_raw());
    assert_ne!(first.scratch(), second.scratch());
    assert_eq!(second.scratch(), lent(&device, stream).scratch());
}

/// The default stream of all threads has two names; that of each thread is refused, and so is what is no
/// stream of this device.
#[test]
fn handles_are_checked() {
    let (driver, device, stream) = engine();
    let [null, legacy] = [0, 1].map(|handle| lent(&device, handle));
    assert_eq!((null.as_raw(), legacy.as_raw()), (Some(null_mut()), Some(null_mut())));
    assert_eq!(null.scratch(), legacy.scratch());
    assert_ne!(null.scratch(), lent(&device, stream).scratch());
    let text = "stream: capture on the default stream is not supported here; supported: a stream that was created";
    assert_eq!(null.capture(|| Ok(())).unwrap_err().to_string(), text);

    let before = driver.calls().len();
    let text = "stream: handle CU_STREAM_PER_THREAD is not supported here; supported: a stream that was created, CU_STREAM_LEGACY";
    assert_eq!(refused(&device, 2), text);
    let foreign = driver.foreign_stream();
    let text = "stream: `handle` belongs to another context than the primary one of cuda:0, in which all work runs";
    assert_eq!(refused(&device, foreign), text);
    // SAFETY: never used.
    let error = unsafe { Stream::from_raw(&device, raw(foreign)) }.err().unwrap();
    assert_eq!(error, Error::Context { op: Op::Stream, arg: "handle", place: Place::Cuda(0) });
    assert!(error.is_refusal() && !error.is_unsupported());
    let text = "stream: a raw stream of cpu is not supported here; supported: cuda";
    assert_eq!(refused(&Device::cpu(), stream), text);
    assert_eq!(driver.calls().len(), before);

    assert_eq!(cpu(1).as_raw(), None);
    let own = device.stream().unwrap();
    assert!(
        matches!(driver.calls().as_slice(), [.., Call::CreateStream { stream }, Call::Alloc { .. }] if own.as_raw() == Some(raw(*stream)))
    );
}

/// The default stream computes as any other.
#[test]
fn the_default_stream_computes() {
    let (driver, own) = emulated();
    let (stream, x) = (lent(own.device(), 0), normal::<f32>(1, LEN, 1.0));
    let (on_device, mut y) = (Buffer::from_slice(&stream, &x).unwrap(), Buffer::zeros(&stream, LEN).unwrap());
    glu_of(&stream, &on_device, &mut y).unwrap();
    same_bits(&y.to_vec(&stream).unwrap(), &want(&own, &x));
    assert_eq!(driver.reports(), [""; 0]);
}

/// Whatever is called, the context that was current on the thread is current again.
#[test]
fn the_current_context_stays() {
    const THEIRS: Handle = 77;
    let (driver, device, stream) = engine();
    driver.set_current(THEIRS);
    let stream = lent(&device, stream);
    let own = device.stream().unwrap();
    let mut y = Buffer::<f32>::zeros(&stream, LEN).unwrap();
    let x = Buffer::from_slice(&stream, &[1.0f32; LEN]).unwrap();
    glu_of(&stream, &x, &mut y).unwrap();
    own.join(&stream).unwrap();
    drop(own.capture(|| glu_of(&own, &x, &mut y)).unwrap());
    device.load_images().unwrap();
    y.copy_from_slice(&stream, &[2.0]).unwrap();
    y.to_vec(&stream).unwrap();
    stream.synchronize().unwrap();
    device.free_bytes().unwrap();
    refused(&device, driver.foreign_stream());
    drop((x, y, own, stream, device));
    assert_eq!(driver.current(), Some(THEIRS));
    // A thread that had none keeps the device's, as with CUDA's own runtime.
    let of_thread = std::thread::scope(|scope| {
        let opened = scope.spawn(|| {
            assert_eq!(driver.current(), None);
            Device::with_driver(driver.clone(), 0).unwrap().stream().unwrap().synchronize().unwrap();
            driver.current()
        });
        opened.join().unwrap()
    });
    assert!(of_thread.is_some_and(|context| context != THEIRS));
    // Nor is it lost with an error.
    let faulty = |n| Arc::new(Faulty::new(driver.clone(), n, DriverError::new(719)));
    for n in 0..60 {
        let _ = Device::with_driver(faulty(n), 0).and_then(|device| {
            let stream = device.stream()?;
            let (x, mut y) = (Buffer::zeros(&stream, LEN)?, Buffer::zeros(&stream, LEN)?);
            glu_of(&stream, &x, &mut y)
        });
        driver.set_current(THEIRS); // where it was the restoring that failed
    }
}

/// Memory of the engine's, `LEN` elements of value `value`.
fn memory(driver: &dyn Driver, values: &[f32]) -> u64 {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let address = driver.alloc(0, bytes.len()).unwrap();
    write(driver, 0, address, &bytes).unwrap();
    address
}

fn rows<'a>(address: u64) -> Rows<'a, f32> {
    // SAFETY: of `memory`, which is never freed.
    unsafe { Rows::from_raw(Place::Cuda(0), address, 1, LEN, LEN).unwrap() }
}

fn rows_mut<'a>(address: u64) -> RowsMut<'a, f32> {
    // SAFETY: as above; used by one operation at a time.
    unsafe { RowsMut::from_raw(Place::Cuda(0), address, 1, LEN, LEN).unwrap() }
}

/// A step of several launches is in an engine's graph as a whole, or is refused without a trace, whichever
/// kernels are loaded.
#[test]
fn a_layer_is_captured_whole_or_not_at_all() {
    const UNTOUCHED: u32 = 0x5a5a_5a5a;
    let (d, f, e, tokens) = (8, 8, 2, 3);
    let (w, x) = (normal::<f32>(1, 2 * e * d * f, 0.3), normal::<f32>(2, tokens * d, 1.0));
    for loaded in 0..4 {
        let (driver, own) = emulated();
        let stream = driver.create_stream(0).unwrap();
        let lent = lent(own.device(), stream);
        let (w, x) = (Buffer::from_slice(&own, &w).unwrap(), Buffer::from_slice(&own, &x).unwrap());
        let (rows, router) = (|rows| w.rows(rows, d).unwrap(), w.rows(e, d).unwrap());
        let ([gate, up, down], one) = ([ExpertWeights::nk(rows(e * f), e).unwrap(); 3], ExpertWeights::nk(rows(f), 1).unwrap());
        let shared = Shared::gated(one, one, one).with_gate(rows(1));
        let weights = Weights::new(router, Experts::gated(gate, up, down).with_shared(shared));
        let plan = Plan::<f32>::new(Shape::new(d, f, e, 1).with_shared(f), tokens).unwrap();
        let words = plan.workspace_bytes() / 4;
        let mut buffers = [(); 2].map(|()| RoutingBuffers::new(&own, tokens, 1, e).unwrap());
        let [buffers, given] = &mut buffers;
        let routing = Routing::from_host(&own, &[0, 1, 0], &[1.0; 3], given).unwrap();
        let (mut y, mut scores) = (Buffer::<f32>::zeros(&own, tokens * d).unwrap(), Buffer::<f32>::zeros(&own, tokens * f).unwrap());
        let x = x.rows(tokens, d).unwrap();
        // Some of the images that the steps need.
        match loaded {
            0 => {}
            1 => router::logits(&own, x, router, &mut scores.rows_mut(tokens, e).unwrap()).unwrap(),
            2 => grouped_gemm::nt(&own, x, one, ExpertRows::dense(tokens).unwrap(), &mut scores.rows_mut(tokens, f).unwrap()).unwrap(),
            _ => own.device().load_images().unwrap(),
        }
        for step in 0..3 {
            let memory = Buffer::from_slice(&own, &vec![UNTOUCHED; words]).unwrap();
            lent.join(&own).unwrap();
            // SAFETY: nobody else uses the memory, which lives on until the graph has run.
            let workspace = &mut unsafe { Workspace::from_raw(own.place(), memory.rows(1, words).unwrap().address(), 4 * words).unwrap() };
            driver.begin_capture(stream).unwrap();
            let y = &mut y.rows_mut(tokens, d).unwrap();
            let result = match step {
                0 => moe::forward(&lent, &plan, x, &weights, buffers, workspace, y).map(drop),
                1 => moe::forward_routed(&lent, &plan, x, &weights.experts, &routing, workspace, y),
                _ => moe::shared(&lent, &plan, x, &weights.experts, workspace).map(drop),
            };
            let graph = driver.end_capture(stream).unwrap();
            driver.launch_graph(graph, stream).unwrap();
            own.join(&lent).unwrap();
            let touched = memory.to_vec(&own).unwrap().iter().any(|word| *word != UNTOUCHED);
            assert_eq!(touched, loaded == 3, "step {step} with images {loaded}");
            match result {
                Ok(()) => assert_eq!(loaded, 3),
                Err(error) => assert!(error.is_unsupported(), "{error}"),
            }
        }
    }
}

/// Where some kernel that a layer does not need is not loaded, its steps are gone through, and each is
/// launched once.
#[test]
fn a_layer_is_captured_once() {
    let (driver, device, stream) = engine();
    let (lent, (d, tokens)) = (lent(&device, stream), (8, 3));
    let (w, x) = (Buffer::<f32>::zeros(&lent, d * d).unwrap(), Buffer::<f32>::zeros(&lent, tokens * d).unwrap());
    let matrix = ExpertWeights::nk(w.rows(d, d).unwrap(), 1).unwrap();
    let experts = Experts::gated(matrix, matrix, matrix);
    let shared = Shared::gated(matrix, matrix, matrix);
    let gate = w.rows(1, d).unwrap();
    let mut buffers = RoutingBuffers::new(&lent, tokens, 1, 1).unwrap();
    let mut y = Buffer::<f32>::zeros(&lent, tokens * d).unwrap();
    // Logits, choice, two halves, sum; two halves of a shared expert; its gate.
    for (experts, count) in [(experts, 5), (experts.with_shared(shared), 7), (experts.with_shared(shared.with_gate(gate)), 8)] {
        let shape = Shape::new(d, d, 1, 1).with_shared(if count == 5 { 0 } else { d });
        let plan = Plan::<f32>::new(shape, tokens).unwrap();
        let mut workspace = Workspace::new(&lent, plan.workspace_bytes()).unwrap();
        let launches = [false, true].map(|captured| {
            if captured {
                driver.begin_capture(stream).unwrap();
            }
            let (before, y) = (driver.launches().len(), &mut y.rows_mut(tokens, d).unwrap());
            let (x, weights) = (x.rows(tokens, d).unwrap(), Weights::new(gate, experts));
            moe::forward(&lent, &plan, x, &weights, &mut buffers, &mut workspace, y).unwrap();
            driver.launches().len() - before
        });
        driver.end_capture(stream).unwrap();
        assert_eq!(launches, [count; 2]);
    }
}

/// An engine that captures its stream finds the operations in its graph, and nothing else: what lending needs
/// is made outside. What a graph cannot hold is refused, and the capture goes on.
#[test]
fn an_engine_captures() {
    let (driver, own) = emulated();
    let stream = driver.create_stream(0).unwrap();
    let (x, poison) = (normal::<f32>(1, LEN, 1.0), [f32::NAN; LEN]);
    let (from, to) = (memory(&*driver, &x), memory(&*driver, &poison));
    driver.begin_capture(stream).unwrap();
    let lent = lent(own.device(), stream);
    let glu_of_theirs = || glu::glu(&lent, rows(from), rows(from), &mut rows_mut(to));
    let mut texts = Vec::new();
    let mut refused = |result: Result<(), Error>| texts.push(result.unwrap_err().to_string());
    refused(glu_of_theirs());
    own.device().load_images().unwrap();
    glu_of_theirs().unwrap();
    refused(lent.join(&own));
    refused(own.join(&lent));
    refused(lent.synchronize());
    refused(lent.capture(|| Ok(())).map(drop));
    refused(Buffer::<f32>::zeros(&lent, 1).map(drop));
    refused(rows(from).to_vec(&lent).map(drop));
    let of = |what| format!("{what} is not supported here; supported: operations that ran before");
    let want_texts = [
        "glu: within a capture loading a kernel",
        "stream: within a capture a join",
        "stream: within a capture a join",
        "stream: within a capture waiting for the stream",
        "stream: within a capture another capture",
        "buffer: within a capture a new buffer",
        "view: within a capture a copy to the host",
    ];
    assert_eq!(texts, want_texts.map(of));
    // Work of other streams goes on meanwhile.
    let wants = [2, 3].map(|seed| (seed, want(&own, &normal::<f32>(seed, LEN, 1.0))));
    let graph = driver.end_capture(stream).unwrap();
    assert!(rows(to).to_vec(&lent).unwrap().iter().all(|y| y.is_nan()), "recorded, not run");
    for (seed, want) in &wants {
        let x = normal::<f32>(*seed, LEN, 1.0);
        let bytes: Vec<u8> = x.iter().flat_map(|value| value.to_le_bytes()).collect();
        write(&*driver, stream, from, &bytes).unwrap();
        driver.launch_graph(graph, stream).unwrap();
        same_bits(&rows(to).to_vec(&lent).unwrap(), want);
    }
    assert_eq!(driver.reports(), [""; 0]);
}

/// Buffers that are dropped while an engine captures their stream are freed outside, and so are graphs
/// launched.
#[test]
fn memory_is_freed_outside_of_an_engines_capture() {
    let (driver, device, engine) = engine();
    let stream = lent(&device, engine);
    let [x, mut y, z] = [(); 3].map(|()| Buffer::<f32>::zeros(&stream, LEN).unwrap());
    glu_of(&stream, &x, &mut y).unwrap();
    let graph = stream.capture(|| glu_of(&stream, &x, &mut y)).unwrap();
    let freed = || driver.calls().into_iter().filter(|call| matches!(call, Call::Free { .. })).collect::<Vec<_>>();
    driver.begin_capture(engine).unwrap();
    drop(z);
    // SAFETY: everything recorded is there; refused, since it would be recorded and not run.
    let launched = unsafe { graph.launch() };
    let text = "stream: within a capture a graph is not supported here; supported: operations that ran before";
    assert_eq!(launched.unwrap_err().to_string(), text);
    assert_eq!(freed(), []);
    driver.end_capture(engine).unwrap();
    let another = Buffer::<f32>::zeros(&stream, LEN).unwrap();
    assert!(matches!(freed()[..], [Call::Free { stream, .. }] if stream == engine));
    driver.begin_capture(engine).unwrap();
    drop((another, x, y, graph));
    driver.end_capture(engine).unwrap();
    assert_eq!(freed().len(), 1);
    drop(stream);
    assert_eq!(freed().len(), 4);
    assert!(freed().iter().all(|call| matches!(call, Call::Free { stream, .. } if *stream == engine)));
}

/// What a lent stream has used is in order with the others, also after it was given back and lent again; the
/// host waits for none of it.
#[test]
fn uses_outlive_the_loan() {
    let (driver, device, engine) = engine();
    let own = device.stream().unwrap();
    let x = Buffer::<f32>::zeros(&own, LEN).unwrap();
    let mut y = Buffer::<f32>::zeros(&own, LEN).unwrap();
    let stream = lent(&device, engine);
    assert!(matches!(glu_of(&stream, &x, &mut y), Err(Error::NotJoined { .. })));
    stream.join(&own).unwrap();
    glu_of(&stream, &x, &mut y).unwrap();
    drop(stream);
    assert!(matches!(y.to_vec(&own), Err(Error::NotJoined { .. })));
    let again = lent(&device, engine);
    y.to_vec(&again).unwrap();
    own.join(&again).unwrap();
    y.to_vec(&own).unwrap();
    glu_of(&again, &x, &mut y).unwrap_err();
    again.join(&own).unwrap();
    glu_of(&again, &x, &mut y).unwrap();
    drop(again);
    // A buffer is freed on its own stream, behind the other, without the host.
    let before = driver.calls().len();
    drop(y);
    assert!(matches!(driver.calls()[before..], [Call::Wait, Call::Free { .. }]));
    // Where no event can be had, the host does not wait: the memory is not given back.
    driver.refuse_events(false);
    drop(x);
    assert_eq!(driver.calls().len(), before + 2);
    let theirs = |call: &Call| matches!(call, Call::Synchronize { stream } | Call::DestroyStream { stream } if *stream == engine);
    assert!(!driver.calls().iter().any(theirs));
}

/// Whoever reads on ever new streams leaves nothing behind on the one that joins them.
#[test]
fn owners_are_kept_as_long_as_they_are_needed() {
    let (_driver, device, engine) = engine();
    let owner = Arc::new(());
    let kept = || Arc::strong_count(&owner) > 1;
    // SAFETY: this driver destroys nothing.
    let lend = || unsafe { Stream::from_raw_with_owner(&device, raw(engine), owner.clone()).unwrap() };
    drop(lend());
    assert!(!kept());
    let own = device.stream().unwrap();
    let stream = lend();
    let mut made = Buffer::<f32>::zeros(&stream, LEN).unwrap();
    drop(stream);
    assert!(kept(), "a buffer was made there");
    let stream = lend();
    assert_eq!(Arc::strong_count(&owner), 2, "one is enough");
    own.join(&stream).unwrap();
    let used = Buffer::<f32>::zeros(&own, LEN).unwrap();
    stream.join(&own).unwrap();
    glu_of(&stream, &used, &mut made).unwrap();
    let graph = stream.capture(|| glu_of(&stream, &used, &mut made)).unwrap();
    drop((stream, made));
    assert!(kept(), "a graph was captured there");
    drop(graph);
    assert!(kept(), "a buffer was used there");
    drop(used);
    assert!(!kept());
}

/// Ids that an engine's own kernel has put on the device.
#[test]
fn ids_of_an_engine() {
    let (driver, own) = emulated();
    let stream = lent(own.device(), driver.create_stream(0).unwrap());
    let (table, ids) = (memory(&*driver, &normal::<f32>(2, LEN, 1.0)), memory(&*driver, &[3, 1].map(f32::from_bits)));
    let mut y = Buffer::<f32>::zeros(&stream, 2 * 16).unwrap();
    // SAFETY: a table of four rows, of which two are asked for.
    let (table, ids) = unsafe {
        let ids = Rows::from_raw(Place::Cuda(0), ids, 1, 2, 2).unwrap();
        (Rows::<f32>::from_raw(Place::Cuda(0), table, 4, 16, 16).unwrap(), TokenIds::from_raw(ids, 4).unwrap())
    };
    embedding::lookup(&stream, ids, table, &mut y.rows_mut(2, 16).unwrap()).unwrap();
    let [third, first] = [3, 1].map(|row| table.row_range(row..row + 1).unwrap().to_vec(&stream).unwrap());
    assert_eq!(y.to_vec(&stream).unwrap(), [third, first].concat());
    assert_eq!(driver.reports(), [""; 0]);
}

/// The example computes the same wherever it runs.
#[test]
fn raw_pointers_serve_on_every_device() {
    let (driver, own) = emulated();
    let [cpu, gpu] = [cpu(1).device(), own.device()].map(|device| raw_pointers::layer(device).unwrap());
    let [cpu, gpu] = [cpu, gpu].map(|y| y.into_iter().map(f64::from).collect::<Vec<_>>());
    assert!(relative_l2(&gpu, &cpu) < 1e-6 && cpu.iter().all(|y| *y != 0.0));
    assert_eq!(driver.reports(), [""; 0]);
}

/// Two threads, each with a stream of its engine.
#[test]
fn two_threads_have_two_streams() {
    let (driver, own) = emulated();
    std::thread::scope(|scope| {
        for seed in [1, 2] {
            let (driver, device) = (driver.clone(), own.device().clone());
            scope.spawn(move || {
                let engine = driver.create_stream(0).unwrap();
                let own = device.stream().unwrap();
                for round in 0..20 {
                    let stream = lent(&device, engine);
                    let x = normal::<f32>(100 * seed + round, LEN, 1.0);
                    let (on_device, mut y) = (Buffer::from_slice(&stream, &x).unwrap(), Buffer::zeros(&stream, LEN).unwrap());
                    glu_of(&stream, &on_device, &mut y).unwrap();
                    same_bits(&y.to_vec(&stream).unwrap(), &want(&own, &x));
                }
            });
        }
    });
    assert_eq!(driver.reports(), [""; 0]);
}

/// Two threads lend one stream at once: it is made ready once.
#[test]
fn a_stream_is_made_ready_once() {
    let (driver, device, engine) = engine();
    let streams = std::thread::scope(|scope| {
        let lending = [(); 4].map(|()| scope.spawn(|| lent(&device, engine)));
        lending.map(|lending| lending.join().unwrap())
    });
    assert!(streams.iter().all(|stream| stream.scratch() == streams[0].scratch()));
    assert_eq!(driver.calls().iter().filter(|call| matches!(call, Call::CreateStream { .. })).count(), 2, "the engine's, and one");
}

/// Each call fails once: every error is typed, and nothing is left but the zeros of the stream that was lent.
#[test]
fn every_call_may_fail() {
    for code in [DriverError::OUT_OF_MEMORY, DriverError::new(719)] {
        let mut failed = Vec::new();
        for n in 0.. {
            let recorder = Arc::new(Recorder::default());
            let engine = recorder.create_stream(0).unwrap();
            let faulty = Arc::new(Faulty::new(recorder.clone(), n, code));
            let scenario = || -> Result<(), Error> {
                let device = Device::with_driver(faulty.clone(), 0)?;
                // SAFETY: nothing runs here.
                let stream = unsafe { Stream::from_raw(&device, raw(engine))? };
                let (x, mut y) = (Buffer::from_slice(&stream, &[1.0f32; LEN])?, Buffer::zeros(&stream, LEN)?);
                glu_of(&stream, &x, &mut y)?;
                recorder.begin_capture(engine).unwrap();
                drop(x);
                recorder.end_capture(engine).unwrap();
                y.to_vec(&stream).map(drop)
            };
            let result = scenario();
            let Some(call) = faulty.failed() else {
                result.unwrap();
                assert!(matches!(faulty.live()[..], [("memory", _)]), "{:?}", faulty.live());
                break;
            };
            if let Err(error) = result {
                failed.push(call);
                assert!(matches!(error, Error::OutOfMemory { .. } | Error::DeviceLost { .. } | Error::Image { .. }), "{call}: {error}");
            }
            // On a lost device nobody knows whether the engine captures, so that its stream's memory is not
            // given back. Nor is pinned memory of which it is not known whether a copy still reads it.
            let (lost, unknown) = (code != DriverError::OUT_OF_MEMORY, call == "is_done");
            let (memory, others): (Vec<_>, Vec<_>) = faulty.live().into_iter().partition(|live| live.0 == "memory");
            assert!((others.is_empty() || unknown) && (lost || memory.len() <= 2), "call {n}, {call}: {:?}", faulty.live());
        }
        for call in ["is_of_primary", "create_stream", "alloc", "fill", "alloc_pinned", "synchronize", "is_capturing", "launch"] {
            assert!(failed.contains(&call), "{call} never failed aloud: {failed:?}");
        }
    }
}
