//! What a capture leaves behind: results that are not there before their graph was launched, uses that count from the launch, and
//! sizes that a launch compares.
#![cfg(feature = "cuda")]

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use dropless::block_sparse::{Sparse, arrange, dsd};
use dropless::device::Graph;
use dropless::device::driver::DriverError;
use dropless::layout::KvShape;
use dropless::router::{Normalize, route};
use dropless::{
    Bf16, Buffer, Device, Error, ExpertRows, HeadLayout, KvCache, Op, RopeTable, RoutingBuffers, Stream, Topology, Workspace, attention,
    embedding, glu, permute, rope, sample,
};
use dropless_kit::device;
use dropless_kit::emulated::{Emulated, Options};
use dropless_kit::faulty::Faulty;
use dropless_kit::fill::normal;
use dropless_kit::recorder::{Call, Recorder};

fn silent(driver: &Emulated) {
    assert_eq!(driver.reports(), [""; 0]);
}

fn zeros(stream: &Stream, len: usize) -> Buffer<f32> {
    Buffer::zeros(stream, len).unwrap()
}

/// Launches a graph whose buffers the caller still has, on the only stream.
fn launch(graph: &Graph) -> Result<(), Error> {
    // SAFETY: as said; nothing else vouches for what it writes.
    unsafe { graph.launch() }
}

/// Ids below 8 by their type, while the device still holds 999.
#[test]
fn ids_of_a_capture_vouch_for_nothing() {
    let (driver, stream) = device::emulated();
    let (logits, table, mut y) = (zeros(&stream, 16), zeros(&stream, 64), zeros(&stream, 16));
    let mut out = Buffer::from_slice(&stream, &[999u32; 2]).unwrap();
    sample::argmax(&stream, logits.rows(2, 8).unwrap(), &mut Buffer::zeros(&stream, 2).unwrap()).unwrap(); // loads the kernel
    let mut ids = None;
    let graph = stream.capture(|| {
        ids = Some(sample::argmax(&stream, logits.rows(2, 8)?, &mut out)?);
        Ok(())
    });
    let graph = graph.unwrap();
    let mut lookup = || embedding::lookup(&stream, ids.unwrap(), table.rows(8, 8).unwrap(), &mut y.rows_mut(2, 8).unwrap());
    assert_eq!(lookup(), Err(Error::NotRun { op: Op::Embedding, arg: "ids" }));
    let text = "embedding: `ids` was to be written by work that has not run; launch its graph, or write it anew";
    assert_eq!(lookup().unwrap_err().to_string(), text);
    launch(&graph).unwrap();
    lookup().unwrap();
    silent(&driver);
}

/// A graph that draws tokens reads the sequences and steps of its launch.
#[test]
fn a_graph_draws_by_the_steps_of_its_launch() {
    use dropless::sample::{Draws, Options as Sampling, top_p};

    let (driver, stream) = device::emulated();
    let (options, values) = (Sampling::new(1.5).with_top_p(0.9), normal::<f32>(3, 2 * 40, 1.0));
    let logits = Buffer::from_slice(&stream, &values).unwrap();
    let (mut sequences, mut steps) = (Buffer::zeros(&stream, 2).unwrap(), Buffer::zeros(&stream, 2).unwrap());
    let mut out = Buffer::from_slice(&stream, &[999u32; 2]).unwrap();
    let draw = |out: &mut Buffer<u32>, sequences: &Buffer<u32>, steps: &Buffer<u32>| {
        let draws = Draws::new(sequences.rows(1, 2)?, steps.rows(1, 2)?)?;
        top_p(&stream, logits.rows(2, 40)?, options, draws, out).map(|_| ())
    };
    draw(&mut out, &sequences, &steps).unwrap(); // loads the kernel
    let graph = stream.capture(|| draw(&mut out, &sequences, &steps)).unwrap();
    let mut drawn = vec![];
    for step in 0..6 {
        sequences.copy_from_slice(&stream, &[5, 6]).unwrap();
        steps.copy_from_slice(&stream, &[step, step + 1]).unwrap();
        launch(&graph).unwrap();
        let ids = out.to_vec(&stream).unwrap();
        let mut again = Buffer::zeros(&stream, 2).unwrap();
        draw(&mut again, &sequences, &steps).unwrap();
        assert_eq!(again.to_vec(&stream).unwrap(), ids);
        drawn.push(ids);
    }
    drawn.dedup();
    assert!(drawn.len() > 3, "{drawn:?}");
    silent(&driver);
}

/// A routing of 2 tokens by its type, while the device still holds that of 50.
#[test]
fn a_routing_of_a_capture_vouches_for_nothing() {
    let (driver, stream) = device::emulated();
    let (logits, x, mut y) = (Buffer::from_slice(&stream, &normal::<f32>(1, 200, 1.0)).unwrap(), zeros(&stream, 16), zeros(&stream, 32));
    let mut buffers = RoutingBuffers::new(&stream, 50, 2, 4).unwrap();
    route(&stream, logits.rows(50, 4).unwrap(), Normalize::None, &mut buffers).unwrap();
    route(&stream, logits.rows(2, 4).unwrap(), Normalize::None, &mut buffers).unwrap();
    route(&stream, logits.rows(50, 4).unwrap(), Normalize::None, &mut buffers).unwrap();
    let mut routing = None;
    let graph = stream.capture(|| {
        routing = Some(route(&stream, logits.rows(2, 4)?, Normalize::None, &mut buffers)?);
        Ok(())
    });
    let graph = graph.unwrap();
    let routing = routing.unwrap();
    let mut gather = || permute::gather(&stream, x.rows(2, 8).unwrap(), &routing, &mut y.rows_mut(4, 8).unwrap());
    assert!(matches!(gather(), Err(Error::NotRun { op: Op::Permute, .. })));
    assert!(matches!(routing.offsets().to_vec(&stream), Err(Error::NotRun { .. })));
    launch(&graph).unwrap();
    gather().unwrap();
    silent(&driver);
}

/// A pattern of 3 rows by its type, while the device still holds that of 300.
#[test]
fn a_topology_of_a_capture_vouches_for_nothing() {
    let (driver, stream) = device::emulated();
    let mut topology = Topology::for_experts(&stream, 64, 300, &[8, 8]).unwrap();
    let [many, few] = [[0, 150, 300], [0, 1, 3]].map(|offsets: [u32; 3]| Buffer::from_slice(&stream, &offsets).unwrap());
    let arranged = |offsets: &Buffer<u32>, rows, topology: &mut Topology| {
        // SAFETY: the offsets begin with 0, do not decrease and end with `rows`.
        let rows = unsafe { ExpertRows::from_raw(offsets.rows(1, 3)?, rows, rows)? };
        arrange(&stream, rows, topology)
    };
    arranged(&many, 300, &mut topology).unwrap();
    let graph = stream.capture(|| arranged(&few, 3, &mut topology)).unwrap();
    let (blocks, w) = (zeros(&stream, topology.stored_rows() * 64), zeros(&stream, 16 * 8));
    let product = |topology: &Topology| {
        let [rows, _] = topology.dims();
        let s = Sparse::new(topology, blocks.rows(topology.stored_rows(), 64).unwrap());
        dsd(&stream, s, w.rows(16, 8).unwrap().into(), &mut zeros(&stream, rows * 8).rows_mut(rows, 8).unwrap())
    };
    assert_eq!(product(&topology), Err(Error::NotRun { op: Op::BlockSparse, arg: "topology" }));
    launch(&graph).unwrap();
    product(&topology).unwrap();
    arranged(&many, 300, &mut topology).unwrap();
    product(&topology).unwrap();
    silent(&driver);
}

/// An arrangement whose launch fails after a captured one: neither is what the device holds.
#[test]
fn a_failed_arrangement_vouches_for_nothing() {
    let recorder = Arc::new(Recorder::default());
    let arranged_twice = |failing| {
        let driver = Arc::new(Faulty::new(recorder.clone(), failing, DriverError::new(1)));
        let stream = Device::with_driver(driver.clone(), 0)?.stream()?;
        let mut topology = Topology::for_experts(&stream, 64, 300, &[8])?;
        let offsets = Buffer::from_slice(&stream, &[0u32, 3])?;
        // SAFETY: nothing runs here.
        let rows = |count| unsafe { ExpertRows::from_raw(offsets.rows(1, 2)?, count, count) };
        arrange(&stream, rows(300)?, &mut topology)?;
        drop(stream.capture(|| arrange(&stream, rows(3)?, &mut topology))?);
        let failed = arrange(&stream, rows(300)?, &mut topology);
        Ok::<_, Error>((driver.failed(), failed, topology.blocks(&stream)))
    };
    let of_last = (0..).map_while(|n| match arranged_twice(n) {
        Ok((None, ..)) => None,
        other => Some(other),
    });
    let mut tried = 0;
    for (failed, error, blocks) in of_last.flatten().filter(|(failed, error, _)| *failed == Some("launch") && error.is_err()) {
        assert!(matches!(error, Err(Error::Driver { .. })), "{failed:?}");
        assert_eq!(blocks, Err(Error::NotRun { op: Op::Buffer, arg: "self" }));
        tried += 1;
    }
    assert_eq!(tried, 1);
}

/// A device whose kernels are loaded, and two streams.
fn two_streams() -> (Arc<Recorder>, Stream, Stream) {
    let driver = Arc::new(Recorder::default());
    let device = Device::with_driver(driver.clone(), 0).unwrap();
    let (stream, other) = (device.stream().unwrap(), device.stream().unwrap());
    glu_of(&stream, &zeros(&stream, 8), &mut zeros(&stream, 8)).unwrap();
    (driver, stream, other)
}

/// An operation that reads `x` and writes `y`.
fn glu_of(stream: &Stream, x: &Buffer<f32>, y: &mut Buffer<f32>) -> Result<(), Error> {
    glu::glu(stream, x.rows(1, 8)?, x.rows(1, 8)?, &mut y.rows_mut(1, 8)?)
}

const GATE_IS_NOT_RUN: Error = Error::NotRun { op: Op::Glu, arg: "gate" };

/// What was to be written stays unreadable when the graph is dropped, and when the capture failed or its work panicked: until it is
/// written anew.
#[test]
fn what_never_ran_is_never_read() {
    let (_, stream, _) = two_streams();
    let [x, mut y, mut z] = [(); 3].map(|()| zeros(&stream, 8));
    for way in 0..3 {
        glu_of(&stream, &y, &mut z).unwrap();
        let work = |y: &mut Buffer<f32>| {
            glu_of(&stream, &x, y)?;
            match way {
                0 => Ok(()),
                1 => stream.synchronize(), // which a capture refuses
                _ => panic!("on purpose"),
            }
        };
        let captured = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| stream.capture(|| work(&mut y)).map(drop)));
        assert_eq!([captured.is_err(), matches!(captured, Ok(Err(_)))], [way == 2, way == 1]);
        assert_eq!(glu_of(&stream, &y, &mut z), Err(GATE_IS_NOT_RUN), "way {way}");
        y.copy_from_slice(&stream, &[1.0]).unwrap();
    }
    glu_of(&stream, &y, &mut z).unwrap();
}

/// Within its capture an operation reads what earlier ones write; another capture does not, before the first graph has run.
#[test]
fn a_capture_reads_what_it_writes() {
    let (_, stream, other) = two_streams();
    let [x, mut y, mut z] = [(); 3].map(|()| zeros(&stream, 8));
    let graph = stream.capture(|| {
        glu_of(&stream, &x, &mut y)?;
        glu_of(&stream, &y, &mut z)?;
        other.join(&stream).unwrap_err();
        Ok(())
    });
    let graph = graph.unwrap();
    assert_eq!(stream.capture(|| glu_of(&stream, &z, &mut y)).unwrap_err(), GATE_IS_NOT_RUN);
    // Nor is the graph launched by being recorded in another.
    assert!(matches!(stream.capture(|| launch(&graph)), Err(Error::Unsupported { .. })));
    assert_eq!(glu_of(&stream, &z, &mut zeros(&stream, 8)), Err(GATE_IS_NOT_RUN));
    launch(&graph).unwrap();
    stream.capture(|| glu_of(&stream, &z, &mut y)).unwrap();
}

/// Two streams capture at the same time, each for itself.
#[test]
fn captures_side_by_side() {
    let (_, stream, other) = two_streams();
    let [x, mut y, mut z] = [(); 3].map(|()| zeros(&stream, 8));
    other.join(&stream).unwrap();
    let mut inner = None;
    let outer = stream.capture(|| {
        inner = Some(other.capture(|| glu_of(&other, &x, &mut z))?);
        glu_of(&stream, &x, &mut y)
    });
    let (outer, inner) = (outer.unwrap(), inner.unwrap());
    launch(&inner).unwrap();
    let mut out = zeros(&other, 8);
    glu_of(&other, &z, &mut out).unwrap();
    assert_eq!(glu_of(&other, &y, &mut out), Err(GATE_IS_NOT_RUN));
    launch(&outer).unwrap();
    assert!(matches!(glu_of(&other, &y, &mut out), Err(Error::NotJoined { .. })));
}

/// A launch uses what its operations were given, each time: another stream has to join the graph's behind it.
#[test]
fn a_launch_is_a_use() {
    let (_, stream, other) = two_streams();
    let [mut x, mut y, mut z] = [(); 3].map(|()| zeros(&stream, 8));
    other.join(&stream).unwrap();
    let graph = stream.capture(|| glu_of(&stream, &x, &mut y)).unwrap();
    // Not launched, it stands in nobody's way.
    x.copy_from_slice(&other, &[1.0]).unwrap();
    stream.join(&other).unwrap();
    let not_joined = |result: Result<(), Error>| assert!(matches!(result, Err(Error::NotJoined { .. })), "{result:?}");
    for _ in 0..2 {
        launch(&graph).unwrap();
        not_joined(glu_of(&other, &y, &mut z));
        not_joined(x.copy_from_slice(&other, &[1.0]));
        glu_of(&stream, &y, &mut z).unwrap();
        other.join(&stream).unwrap();
        glu_of(&other, &y, &mut z).unwrap();
        stream.join(&other).unwrap();
    }
    // A write that is ordered behind a launch takes its place, until the next one.
    y.copy_from_slice(&other, &[2.0]).unwrap();
    stream.join(&other).unwrap();
    glu_of(&stream, &y, &mut z).unwrap();
    launch(&graph).unwrap();
    other.join(&stream).unwrap();
    y.copy_from_slice(&other, &[2.0]).unwrap();
    launch(&graph).unwrap();
    not_joined(glu_of(&other, &y, &mut z));
    // Whoever is ordered behind a write that is ordered behind the launch need not know of the launch.
    let third = stream.device().stream().unwrap();
    other.join(&stream).unwrap();
    y.copy_from_slice(&other, &[2.0]).unwrap();
    third.join(&other).unwrap();
    y.to_vec(&third).unwrap();
    stream.join(&third).unwrap();
    // A graph that is gone may still be at work.
    launch(&graph).unwrap();
    drop(graph);
    not_joined(glu_of(&other, &y, &mut z));
    other.join(&stream).unwrap();
    glu_of(&other, &y, &mut z).unwrap();
}

/// Graphs that come and go leave nothing in a buffer that all of them read, but the order behind the last launch.
#[test]
fn graphs_come_and_go() {
    let (_, stream, other) = two_streams();
    let [mut x, mut y] = [(); 2].map(|()| zeros(&stream, 8));
    for _ in 0..100 {
        let graph = stream.capture(|| glu_of(&stream, &x, &mut y)).unwrap();
        launch(&graph).unwrap();
    }
    assert!(matches!(x.copy_from_slice(&other, &[1.0]), Err(Error::NotJoined { .. })));
    other.join(&stream).unwrap();
    x.copy_from_slice(&other, &[1.0]).unwrap();
}

/// A buffer that is dropped on another thread while a capture begins is freed before it or behind it.
#[test]
fn nothing_is_freed_on_a_stream_that_records() {
    let (driver, stream, _) = two_streams();
    let buffer = zeros(&stream, 8);
    let (send, dropper) = channel();
    driver.within("begin_capture", move || {
        let thread = std::thread::spawn(move || drop(buffer));
        std::thread::sleep(Duration::from_millis(50)); // time for it to come to the driver
        send.send(thread).unwrap();
    });
    let before = driver.calls().len();
    drop(stream.capture(|| Ok(())).unwrap());
    dropper.recv().unwrap().join().unwrap();
    let calls = driver.calls()[before..].to_vec();
    let at = |which: &dyn Fn(&Call) -> bool| calls.iter().position(which).unwrap();
    let [begin, end] = [at(&|call| *call == Call::BeginCapture), at(&|call| *call == Call::EndCapture)];
    let free = at(&|call| matches!(call, Call::Free { .. }));
    assert!(free < begin || free > end, "{calls:?}");
}

/// A step of `tokens` tokens through the operation that writes to the cache.
struct Rotated {
    heads: HeadLayout,
    qkv: Buffer<f32>,
    q: Buffer<f32>,
    table: RopeTable,
    cache: KvCache<f32>,
}

impl Rotated {
    fn new(stream: &Stream, positions: usize) -> Rotated {
        let heads = HeadLayout::new(1, 1, 4).unwrap();
        let shape = KvShape::contiguous(HeadLayout::new(1, 1, 4).unwrap(), 1, 8).with_pages(8, 16, 8);
        Rotated {
            heads,
            qkv: zeros(stream, 3 * 12),
            q: zeros(stream, 3 * 4),
            table: RopeTable::new(stream, 1e4, 4, positions).unwrap(),
            cache: KvCache::new(stream, 1, shape).unwrap(),
        }
    }

    fn step(&mut self, stream: &Stream, tokens: usize) -> Result<(), Error> {
        let Rotated { heads, qkv, q, table, cache } = self;
        let (qkv, mut q) = (qkv.rows(tokens, 12)?, q.rows_mut(tokens, 4)?);
        rope::clip_rotate_append(stream, qkv, *heads, rope::Options::default(), table, &mut cache.layer_mut(0)?, &mut q)
    }
}

/// A graph of one token serves every position of its table. The length at the capture does not matter.
#[test]
fn a_launch_beyond_the_table_is_refused() {
    let (driver, stream) = device::emulated();
    let mut rotated = Rotated::new(&stream, 4);
    rotated.cache.append(&stream, &[1]).unwrap();
    rotated.step(&stream, 1).unwrap();
    let graph = stream.capture(|| rotated.step(&stream, 1)).unwrap();
    for _ in 2..=4 {
        rotated.cache.append(&stream, &[1]).unwrap();
        launch(&graph).unwrap();
    }
    rotated.cache.append(&stream, &[1]).unwrap();
    let before = driver.launches().len();
    let error = launch(&graph).unwrap_err();
    assert_eq!(error.to_string(), "rope: needs 5 positions of `table`, has 4");
    assert_eq!(driver.launches().len(), before);
    silent(&driver);
}

/// A graph of three tokens is not launched for a step of one, whose two surplus tokens would be another sequence's.
#[test]
fn a_launch_for_another_step_is_refused() {
    let (driver, stream) = device::emulated();
    let mut rotated = Rotated::new(&stream, 64);
    rotated.cache.append(&stream, &[3]).unwrap();
    rotated.step(&stream, 3).unwrap();
    let graph = stream.capture(|| rotated.step(&stream, 3)).unwrap();
    launch(&graph).unwrap();
    rotated.cache.append(&stream, &[1]).unwrap();
    assert_eq!(launch(&graph).unwrap_err().to_string(), "rope: the graph was captured for 3 tokens in the step, there are 1 now");
    rotated.cache.clear(&stream, 0).unwrap();
    assert!(matches!(launch(&graph), Err(Error::Recorded { recorded: 3, now: 0, .. })), "no step is open");
    rotated.cache.append(&stream, &[3]).unwrap();
    launch(&graph).unwrap();
    silent(&driver);
}

/// A step whose arrays arrive in part is no step: no operation computes with it.
#[test]
fn half_a_step_is_none() {
    let mut bad = vec![];
    for n in 0.. {
        let emulated = Arc::new(Emulated::new(Options::default()));
        let driver = Arc::new(Faulty::new(emulated.clone(), n, DriverError::new(1)));
        let run = || -> Result<_, Error> {
            let stream = Device::with_driver(driver.clone(), 0)?.stream()?;
            let heads = HeadLayout::new(1, 1, 4)?;
            let shape = KvShape::contiguous(HeadLayout::new(1, 1, 4).unwrap(), 1, 8);
            let mut cache = KvCache::<f32>::new(&stream, 1, shape)?;
            let (qkv, mut q, table) = (zeros(&stream, 12), zeros(&stream, 4), RopeTable::new(&stream, 1e4, 4, 1)?);
            cache.append(&stream, &[1])?; // one token, a table of one position
            let failed = cache.append(&stream, &[7]);
            let step = rope::clip_rotate_append(
                &stream,
                qkv.rows(1, 12)?,
                heads,
                rope::Options::default(),
                &table,
                &mut cache.layer_mut(0)?,
                &mut q.rows_mut(1, 4)?,
            );
            Ok((failed, step, cache.len(0)))
        };
        let out = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        let Some(call) = driver.failed() else { break };
        if !emulated.reports().is_empty() {
            bad.push((n, call, format!("{out:?}"), emulated.reports()));
        }
    }
    assert!(bad.is_empty(), "{bad:#?}");
}

/// Graphs of two batch sizes are captured over the same buffers before either is launched.
#[test]
fn two_graphs_over_the_same_buffers() {
    let (_, stream, _) = two_streams();
    let [x, mut y, mut z] = [(); 3].map(|()| zeros(&stream, 8));
    let mut step = || {
        stream.capture(|| {
            glu_of(&stream, &x, &mut y)?;
            glu_of(&stream, &y, &mut z)
        })
    };
    let _first = step().unwrap();
    step().unwrap();
}

/// What a failed capture was to write may be written by another one.
#[test]
fn a_capture_after_a_failed_one() {
    let (_, stream, _) = two_streams();
    let [x, mut y, mut z] = [(); 3].map(|()| zeros(&stream, 8));
    stream
        .capture(|| {
            glu_of(&stream, &x, &mut y)?;
            stream.synchronize()
        })
        .unwrap_err();
    let graph = stream.capture(|| glu_of(&stream, &x, &mut y)).unwrap();
    launch(&graph).unwrap();
    glu_of(&stream, &y, &mut z).unwrap();
}

/// A capture that succeeds while a panic unwinds the thread is like any other.
#[test]
fn a_capture_while_unwinding() {
    let (_, stream, other) = two_streams();
    let [x, mut y] = [(); 2].map(|()| zeros(&stream, 8));
    let mut kept = None;
    struct OnDrop<F: FnMut()>(F);
    impl<F: FnMut()> Drop for OnDrop<F> {
        fn drop(&mut self) {
            (self.0)()
        }
    }
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _capture = OnDrop(|| kept = Some(stream.capture(|| glu_of(&stream, &x, &mut y)).unwrap()));
        panic!("on purpose");
    }));
    let graph = kept.unwrap();
    launch(&graph).unwrap();
    glu_of(&stream, &y, &mut zeros(&stream, 8)).unwrap(); // remembers a use, forgets the graph
    other.join(&stream).unwrap();
    launch(&graph).unwrap(); // again, behind what `other` has waited for
    let mut z = zeros(&other, 8);
    assert!(matches!(glu_of(&other, &y, &mut z), Err(Error::NotJoined { .. })));
}

/// The driver launches a graph for one thread at a time.
#[test]
fn two_threads_launch_one_graph() {
    let (driver, stream, _) = two_streams();
    let [x, mut y] = [(); 2].map(|()| zeros(&stream, 8));
    let graph = stream.capture(|| glu_of(&stream, &x, &mut y)).unwrap();
    let ((entered, is_in), (done, wait)) = (channel(), channel());
    let (tell, overlapped) = channel();
    driver.within("launch_graph", move || {
        entered.send(()).unwrap();
        tell.send(wait.recv_timeout(Duration::from_millis(500)).is_ok()).unwrap();
    });
    std::thread::scope(|scope| {
        scope.spawn(|| launch(&graph).unwrap());
        is_in.recv().unwrap();
        launch(&graph).unwrap();
        let _ = done.send(());
    });
    assert!(!overlapped.recv().unwrap(), "two launches at once");
}

/// A launch is not recorded in a capture that another thread begins meanwhile.
#[test]
fn a_launch_while_a_capture_begins() {
    let (driver, stream, _) = two_streams();
    let [x, mut y, mut z] = [(); 3].map(|()| zeros(&stream, 8));
    let graph = stream.capture(|| glu_of(&stream, &x, &mut y)).unwrap();
    let ((entered, is_in), (begun, wait)) = (channel(), channel());
    let (tell, captured) = channel();
    driver.within("launch_graph", move || {
        // passed the check, not in the driver yet
        entered.send(()).unwrap();
        tell.send(wait.recv_timeout(Duration::from_millis(500)).is_ok()).unwrap();
    });
    let second = std::thread::scope(|scope| {
        let launcher = scope.spawn(|| launch(&graph));
        is_in.recv().unwrap();
        stream
            .capture(|| {
                let _ = begun.send(());
                launcher.join().unwrap()
            })
            .map(drop)
    });
    assert!(!captured.recv().unwrap() || second.is_err() || glu_of(&stream, &y, &mut z).is_err(), "recorded, and taken for launched");
}

/// An event of a buffer that is dropped is not recorded in a capture that another thread begins meanwhile.
#[test]
fn a_drop_while_a_capture_begins() {
    let (driver, stream, other) = two_streams();
    let mut buffer = zeros(&other, 8);
    stream.join(&other).unwrap();
    buffer.copy_from_slice(&stream, &[1.0]).unwrap();
    let ((entered, is_in), (begun, wait)) = (channel(), channel());
    let (tell, captured) = channel();
    driver.within("record", move || {
        // other waits for stream: past the check, the event not recorded yet
        entered.send(()).unwrap();
        tell.send(wait.recv_timeout(Duration::from_millis(500)).is_ok()).unwrap();
    });
    std::thread::scope(|scope| {
        let dropper = scope.spawn(move || drop(buffer));
        is_in.recv().unwrap();
        stream
            .capture(|| {
                let _ = begun.send(());
                dropper.join().unwrap();
                Ok(())
            })
            .map(drop)
            .unwrap();
    });
    assert!(!captured.recv().unwrap(), "recorded in the capture");
}

/// An operation of two launches whose second one fails has not been refused.
#[test]
fn a_refusal_has_launched_nothing() {
    for n in 0.. {
        let recorder = Arc::new(Recorder::default());
        let driver = Arc::new(Faulty::new(recorder.clone(), n, DriverError::new(701)));
        let run = || {
            let stream = Device::with_driver(driver.clone(), 0)?.stream()?;
            let (logits, mut buffers) = (Buffer::<f32>::zeros(&stream, 200 * 4)?, RoutingBuffers::new(&stream, 200, 2, 4)?);
            route(&stream, logits.rows(200, 4)?, Normalize::None, &mut buffers).map(drop)
        };
        let result: Result<(), Error> = run();
        if driver.failed().is_none() {
            break;
        }
        let refused = result.is_err_and(|error| error.is_refusal());
        assert!(!refused || recorder.launches().is_empty(), "{:?} after {} launches", driver.failed(), recorder.launches().len());
    }
}

/// A step of one new token on a cache of bf16: rotate, append, attend.
struct DecodeStep {
    cache: KvCache<Bf16>,
    table: RopeTable,
    qkv: Buffer<Bf16>,
    q: Buffer<Bf16>,
    out: Buffer<Bf16>,
    workspace: Workspace<'static>,
}

impl DecodeStep {
    const HEADS: (usize, usize, usize) = (2, 1, 64);

    /// Of a sequence of `len` tokens with room for `capacity`, and a workspace for sequences of `served`.
    fn new(stream: &Stream, len: usize, capacity: usize, served: usize) -> DecodeStep {
        let (h, kv, d) = Self::HEADS;
        let heads = HeadLayout::new(h, kv, d).unwrap();
        let bf16 = |seed, len| Buffer::from_slice(stream, &normal::<Bf16>(seed, len, 1.0)).unwrap();
        let mut step = DecodeStep {
            cache: KvCache::new(stream, 1, KvShape::contiguous(heads, 1, capacity)).unwrap(),
            table: RopeTable::new(stream, 1e4, d, capacity).unwrap(),
            qkv: bf16(7, len * heads.qkv_cols()),
            q: bf16(8, len * heads.q_cols()),
            out: bf16(9, heads.q_cols()),
            workspace: Workspace::new(stream, attention::decode_workspace_bytes(heads, 1, served).unwrap()).unwrap(),
        };
        step.cache.append(stream, &[len]).unwrap();
        step.rotate(stream, len).unwrap();
        step
    }

    fn rotate(&mut self, stream: &Stream, tokens: usize) -> Result<(), Error> {
        let (h, kv, d) = Self::HEADS;
        let (heads, qkv) = (HeadLayout::new(h, kv, d)?, self.qkv.rows(tokens, (h + 2 * kv) * d)?);
        let q = &mut self.q.rows_mut(tokens, h * d)?;
        rope::clip_rotate_append(stream, qkv, heads, rope::Options::default(), &self.table, &mut self.cache.layer_mut(0)?, q)
    }

    fn attend(&mut self, stream: &Stream) -> Result<(), Error> {
        let (h, kv, d) = Self::HEADS;
        self.rotate(stream, 1)?;
        let options = attention::Options::new(HeadLayout::new(h, kv, d)?);
        let (q, out) = (self.q.rows(1, h * d)?, &mut self.out.rows_mut(1, h * d)?);
        attention::decode(stream, q, options, &self.cache.layer(0)?, &mut self.workspace, out)
    }

    fn bits(&self, stream: &Stream) -> Vec<u16> {
        self.out.to_vec(stream).unwrap().into_iter().map(|x| x.0).collect()
    }
}

/// A graph that was captured while the sequence had one part of keys serves it when it has two, as long as
/// the workspace has room for their results; then it refuses.
#[test]
fn a_graph_of_decode_serves_longer_sequences() {
    let (driver, stream) = device::emulated();
    let [mut direct, mut replayed] = [(); 2].map(|()| DecodeStep::new(&stream, 254, 800, 512));
    direct.cache.append(&stream, &[1]).unwrap();
    direct.attend(&stream).unwrap();
    replayed.cache.append(&stream, &[1]).unwrap();
    let graph = stream.capture(|| replayed.attend(&stream)).unwrap();
    launch(&graph).unwrap();
    assert_eq!(replayed.bits(&stream), direct.bits(&stream));
    for new in [1, 1, 1, 100, 154] {
        // Several tokens are appended outside the graph; each is attended to as the last one.
        for step in [&mut direct, &mut replayed] {
            if new > 1 {
                step.cache.append(&stream, &[new - 1]).unwrap();
                step.rotate(&stream, new - 1).unwrap();
            }
            step.cache.append(&stream, &[1]).unwrap();
        }
        direct.attend(&stream).unwrap();
        launch(&graph).unwrap();
        assert_eq!(replayed.bits(&stream), direct.bits(&stream), "{} tokens", replayed.cache.len(0));
    }
    assert_eq!(replayed.cache.len(0), 512);
    replayed.cache.append(&stream, &[1]).unwrap();
    let need = Error::Capacity { op: Op::Attention, what: "tokens of one sequence", need: 513, have: 512 };
    assert_eq!(launch(&graph), Err(need));
    silent(&driver);
}
