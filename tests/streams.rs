//! The order of work on several streams of one device, on a driver that records what it was asked; and copies from the host, which
//! happen later than they are asked for.
#![cfg(feature = "cuda")]

use std::sync::Arc;

use dropless::device::driver::DriverError;
use dropless::layout::KvShape;
use dropless::{Bf16, Buffer, Device, Error, ExpertRows, ExpertWeights, HeadLayout, KvCache, Rows, Stream, glu, grouped_gemm};
use dropless_kit::emulated::{Emulated, Options};
use dropless_kit::faulty::Faulty;
use dropless_kit::recorder::{Call, Recorder};

fn two_streams() -> (Arc<Recorder>, Stream, Stream) {
    let driver = Arc::new(Recorder::default());
    let device = Device::with_driver(driver.clone(), 0).unwrap();
    (driver.clone(), device.stream().unwrap(), device.stream().unwrap())
}

fn writes(driver: &Recorder) -> usize {
    driver.calls().iter().filter(|call| matches!(call, Call::Write { .. })).count()
}

/// The arrays of a step go to the device together, or not at all.
#[test]
fn a_refused_append_writes_no_part_of_the_step() {
    let (driver, stream, other) = two_streams();
    let shape = KvShape::contiguous(HeadLayout::new(1, 1, 2).unwrap(), 2, 12).with_pages(4, 5, 3);
    let mut cache = KvCache::<f32>::new(&stream, 1, shape).unwrap();
    cache.append(&stream, &[1, 1]).unwrap();
    other.join(&stream).unwrap();
    cache.append(&other, &[1, 1]).unwrap(); // no new page: the block table is as the first stream left it
    let before = writes(&driver);
    assert!(matches!(cache.append(&stream, &[4, 0]), Err(Error::NotJoined { .. })));
    assert_eq!((writes(&driver), cache.len(0)), (before, 2));
    stream.join(&other).unwrap();
    cache.append(&stream, &[4, 0]).unwrap();
    assert_eq!((writes(&driver), cache.len(0)), (before + 3, 6));
}

/// A buffer made on `home`, last used on `other`.
fn used_elsewhere(home: &Stream, other: &Stream) -> Buffer<f32> {
    let mut buffer = Buffer::zeros(home, 8).unwrap();
    other.join(home).unwrap();
    buffer.copy_from_slice(other, &[1.0; 8]).unwrap();
    buffer
}

/// What dropping such a buffer asks of the driver.
fn calls_of_drop(prepare: impl FnOnce(&Recorder)) -> Vec<Call> {
    let (driver, home, other) = two_streams();
    let buffer = used_elsewhere(&home, &other);
    prepare(&driver);
    let before = driver.calls().len();
    drop(buffer);
    driver.calls()[before..].to_vec()
}

#[test]
fn a_buffer_is_freed_after_its_last_use_on_any_stream() {
    assert!(matches!(calls_of_drop(|_| ())[..], [Call::Wait, Call::Free { .. }]));
    // No memory for an event is no licence to free early: the host waits.
    assert!(matches!(calls_of_drop(|driver| driver.refuse_events(false))[..], [Call::Synchronize { .. }, Call::Free { .. }]));
    // Where nothing can wait, the memory is not given back.
    assert!(matches!(calls_of_drop(|driver| driver.refuse_events(true))[..], [Call::Synchronize { .. }]));
}

fn count(driver: &Recorder, which: impl Fn(&Call) -> bool) -> usize {
    driver.calls().iter().filter(|call| which(call)).count()
}

/// A block of pinned memory is used again once the copy from it has happened, and not before; with very much on its way the host waits.
#[test]
fn pinned_memory_is_used_again() {
    let (pinned, waits) = (|call: &Call| matches!(call, Call::AllocPinned { .. }), |call: &Call| matches!(call, Call::Synchronize { .. }));
    let (driver, stream, _other) = two_streams();
    let mut buffer = Buffer::<f32>::zeros(&stream, 1 << 20).unwrap();
    (0..100).for_each(|i| buffer.copy_from_slice(&stream, &[i as f32; 8]).unwrap());
    assert_eq!((count(&driver, pinned), count(&driver, waits)), (1, 0));
    driver.hold_events(true);
    (0..100).for_each(|i| buffer.copy_from_slice(&stream, &[i as f32; 8]).unwrap());
    assert_eq!((count(&driver, pinned), count(&driver, waits)), (101, 0));
    // 4 MiB a time, of which 32 may be on their way with what is there already.
    let much = vec![1.0f32; 1 << 20];
    (0..20).for_each(|_| buffer.copy_from_slice(&stream, &much).unwrap());
    let (blocks, waited) = (count(&driver, pinned) - 101, count(&driver, waits));
    assert!(blocks <= 16 && (1..=4).contains(&waited), "{blocks} blocks, waited {waited} times");
    // At the end of the stream everything is given back.
    drop((buffer, stream));
    let freed = |call: &Call| matches!(call, Call::FreePinned);
    assert_eq!(count(&driver, freed), count(&driver, pinned));
}

/// A long copy goes in pieces, and a short one behind it shares a block with others.
#[test]
fn copies_of_any_length_arrive() {
    let driver = Arc::new(Emulated::new(Options::default()));
    let stream = Device::with_driver(driver.clone(), 0).unwrap().stream().unwrap();
    let values: Vec<u32> = (0..9 << 18).collect(); // 9 MiB
    for len in [0, 1, 1023, 1024, 1025, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, values.len()] {
        let buffer = Buffer::from_slice(&stream, &values[..len]).unwrap();
        assert!(buffer.to_vec(&stream).unwrap() == values[..len], "{len}");
    }
    assert!(driver.reports().is_empty());
}

/// Sources are reused at once, here by later copies, while nothing was copied yet: the emulator copies as late as it may.
#[test]
fn later_copies_do_not_disturb_earlier_ones() {
    let driver = Arc::new(Emulated::new(Options::default()));
    let stream = Device::with_driver(driver.clone(), 0).unwrap().stream().unwrap();
    let mut buffers: Vec<_> = (0..50).map(|_| Buffer::<u32>::zeros(&stream, 3).unwrap()).collect();
    for (i, buffer) in (0..).zip(&mut buffers) {
        let values = vec![i, i + 1, i + 2];
        buffer.copy_from_slice(&stream, &values).unwrap();
    }
    for (i, buffer) in (0..).zip(&buffers) {
        assert_eq!(buffer.to_vec(&stream).unwrap(), [i, i + 1, i + 2]);
    }
    assert!(driver.reports().is_empty());
}

/// A stream that ends waits for its copies before their pinned memory is freed; if nothing can be waited for, it is not freed.
#[test]
fn a_stream_ends_with_copies_on_their_way() {
    // The emulator reports a copy that reads memory which is not pinned any more.
    let driver = Arc::new(Emulated::new(Options::default()));
    let faulty = Arc::new(Faulty::new(driver.clone(), usize::MAX, DriverError::new(1)));
    let stream = Device::with_driver(faulty.clone(), 0).unwrap().stream().unwrap();
    let mut buffer = Buffer::<u32>::zeros(&stream, 3).unwrap();
    buffer.copy_from_slice(&stream, &[1, 2, 3]).unwrap();
    drop(stream);
    drop(buffer);
    assert_eq!((faulty.live(), driver.reports()), (vec![], vec![]));

    let (driver, stream, _) = two_streams();
    driver.hold_events(true);
    Buffer::<u32>::from_slice(&stream, &[1, 2, 3]).unwrap();
    driver.refuse_events(true);
    drop(stream);
    assert_eq!(count(&driver, |call| matches!(call, Call::FreePinned)), 0);
}

/// The backend's own needs are checked before admission: a refused call has not used its arguments.
#[test]
fn a_call_refused_by_the_backend_leaves_no_trace() {
    let (_, stream, other) = two_streams();
    let [gate, up, mut y] = [(); 3].map(|()| Buffer::<f32>::zeros(&stream, 10).unwrap());
    other.join(&stream).unwrap();
    let error = glu::glu(&stream, gate.rows(2, 5).unwrap(), up.rows(2, 5).unwrap(), &mut y.rows_mut(2, 5).unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "glu: `gate` must have a row stride that is a multiple of 16 bytes, got 20");
    let w = Buffer::<Bf16>::zeros(&stream, 10).unwrap();
    other.join(&stream).unwrap();
    let (w, rows) = (ExpertWeights::nk(w.rows(5, 2).unwrap(), 1).unwrap(), ExpertRows::dense(1).unwrap());
    let error = grouped_gemm::nt(&stream, gate.rows(1, 2).unwrap(), w, rows, &mut y.rows_mut(1, 5).unwrap()).unwrap_err();
    let text = "grouped_gemm: a kernel for f32 x bf16 -> f32 is not supported here; supported: ";
    assert!(error.to_string().starts_with(text), "{error}");
    glu::glu(&other, gate.rows(1, 8).unwrap(), up.rows(1, 8).unwrap(), &mut y.rows_mut(1, 8).unwrap()).unwrap();
}

/// A lost device is what every later call reports, one that would load an image included.
#[test]
fn a_lost_device_is_reported_before_anything_is_loaded() {
    let (driver, stream, _) = two_streams();
    let [gate, up, mut y] = [(); 3].map(|()| Buffer::<f32>::zeros(&stream, 8).unwrap());
    driver.refuse_events(true);
    assert!(stream.synchronize().unwrap_err().is_fatal());
    let before = driver.calls().len();
    let error = glu::glu(&stream, gate.rows(1, 8).unwrap(), up.rows(1, 8).unwrap(), &mut y.rows_mut(1, 8).unwrap()).unwrap_err();
    assert!(error.is_fatal(), "{error}");
    assert_eq!(driver.calls().len(), before);
}

/// A copy is as long as the buffer at most.
#[test]
fn copies_are_no_longer_than_the_buffer() {
    let (_, emulated) = dropless_kit::device::emulated();
    for stream in [dropless_kit::device::cpu(1), emulated] {
        let mut buffer = Buffer::from_slice(&stream, &[1u32, 2, 3]).unwrap();
        let mut out = [7u32; 4];
        let text = |result: Result<(), Error>| result.unwrap_err().to_string();
        assert_eq!(text(buffer.copy_from_slice(&stream, &[9; 4])), "buffer: `values` must be [<= len] = [3], got [4]");
        assert_eq!(text(buffer.copy_to_slice(&stream, &mut out)), "buffer: `values` must be [<= len] = [3], got [4]");
        assert_eq!((buffer.to_vec(&stream).unwrap(), out), (vec![1, 2, 3], [7; 4]));
        buffer.copy_from_slice(&stream, &[9; 3]).unwrap();
        buffer.copy_to_slice(&stream, &mut out[..3]).unwrap();
        assert_eq!(out, [9, 9, 9, 7]);
    }
}

/// Every pair of uses on two streams: a read waits for a write, a write for both, two reads for nothing.
#[test]
fn uses_on_two_streams_are_ordered() {
    let not_joined = |result: Result<(), Error>| assert!(matches!(result, Err(Error::NotJoined { .. })), "{result:?}");
    let (_, stream, other) = two_streams();
    let mut buffer = Buffer::<f32>::zeros(&stream, 8).unwrap();
    let mut out = [0.0; 8];
    other.join(&stream).unwrap();
    // Two reads, then a write that waits for the other stream's.
    buffer.copy_to_slice(&stream, &mut out).unwrap();
    buffer.copy_to_slice(&other, &mut out).unwrap();
    not_joined(buffer.copy_from_slice(&other, &out));
    not_joined(buffer.copy_from_slice(&stream, &out));
    // A join reaches as far as the stream had come, and no further.
    stream.join(&other).unwrap();
    buffer.copy_to_slice(&other, &mut out).unwrap();
    not_joined(buffer.copy_from_slice(&stream, &out));
    stream.join(&other).unwrap();
    buffer.copy_from_slice(&stream, &out).unwrap();
    // A read waits for the write, and its stream's own read behind the write does not make it forgotten.
    not_joined(buffer.copy_to_slice(&other, &mut out));
    buffer.copy_to_slice(&stream, &mut out).unwrap();
    not_joined(buffer.copy_to_slice(&other, &mut out));
    other.join(&stream).unwrap();
    buffer.copy_to_slice(&other, &mut out).unwrap();
}

/// Devices of one number, but of two drivers or of none, do not mix.
#[test]
fn streams_and_buffers_stay_with_their_driver() {
    let (driver, stream, _other) = two_streams();
    let (_, stranger, _) = two_streams();
    let same = Device::with_driver(driver, 0).unwrap().stream().unwrap();
    let mut buffer = Buffer::<f32>::zeros(&stream, 8).unwrap();
    let text = "stream: `other` must be of the stream's driver, got one of another driver";
    assert_eq!(stranger.join(&stream).unwrap_err().to_string(), text);
    let text = "buffer: `self` must be of the stream's driver, got one of another driver";
    assert_eq!(buffer.copy_from_slice(&stranger, &[1.0]).unwrap_err().to_string(), text);
    // The same GPU, opened twice.
    same.join(&stream).unwrap();
    buffer.copy_from_slice(&same, &[1.0]).unwrap();
    let cpu = dropless_kit::device::cpu(1);
    assert!(matches!(cpu.join(&stream), Err(Error::Place { .. })) && matches!(stream.join(&cpu), Err(Error::Place { .. })));
}

/// Whoever read weights once does not live as long as they do.
#[test]
fn streams_end_before_what_they_have_read() {
    let driver = Arc::new(Recorder::default());
    let faulty = Arc::new(Faulty::new(driver.clone(), usize::MAX, DriverError::new(1)));
    let device = Device::with_driver(faulty.clone(), 0).unwrap();
    let home = device.stream().unwrap();
    let mut weights = Buffer::from_slice(&home, &[1.0f32; 8]).unwrap();
    let before = faulty.live().len();
    for _ in 0..100 {
        let stream = device.stream().unwrap();
        stream.join(&home).unwrap();
        let mut own = Buffer::<f32>::zeros(&stream, 8).unwrap();
        own.copy_from_slice(&stream, &[2.0; 8]).unwrap();
        weights.to_vec(&stream).unwrap();
    }
    assert_eq!(faulty.live().len(), before);
    // They were waited for: what comes behind need not join them.
    weights.copy_from_slice(&home, &[3.0]).unwrap();
    // Every other use is still known.
    let stream = device.stream().unwrap();
    stream.join(&home).unwrap();
    weights.to_vec(&stream).unwrap();
    assert!(matches!(weights.copy_from_slice(&home, &[3.0]), Err(Error::NotJoined { .. })));
    let waits = |driver: &Recorder| count(driver, |call| matches!(call, Call::Synchronize { .. }));
    let waited = waits(&driver);
    drop(stream);
    assert_eq!(waits(&driver), waited + 1);
    weights.copy_from_slice(&home, &[3.0]).unwrap();
}

/// A stream that is gone has done its work, whatever of it is left: its buffers go on, on any stream.
#[test]
fn buffers_outlive_their_stream() {
    let (driver, stream, other) = two_streams();
    let mut buffer = Buffer::from_slice(&stream, &[1.0f32; 8]).unwrap();
    assert!(matches!(buffer.to_vec(&other), Err(Error::NotJoined { .. })));
    let waits = |driver: &Recorder| count(driver, |call| matches!(call, Call::Synchronize { .. }));
    let before = waits(&driver);
    drop(stream);
    assert_eq!(waits(&driver), before + 1);
    buffer.to_vec(&other).unwrap();
    buffer.copy_from_slice(&other, &[2.0]).unwrap();

    // One that could not be waited for stays in the way, and its buffers are not freed under it.
    let (driver, stream, other) = two_streams();
    let mut buffer = Buffer::from_slice(&other, &[1.0f32; 8]).unwrap();
    stream.join(&other).unwrap();
    buffer.copy_from_slice(&stream, &[2.0]).unwrap();
    driver.refuse_events(true);
    drop(stream);
    let freed = |driver: &Recorder| count(driver, |call| matches!(call, Call::Free { .. }));
    let before = freed(&driver);
    assert!(matches!(buffer.to_vec(&other), Err(Error::NotJoined { .. })));
    drop(buffer);
    assert_eq!(freed(&driver), before);
}

/// A stream has zeros to count in, of its own.
/// Kernels may be started before the one in front of them is done, on the streams that ask for it.
#[test]
fn dependent_launch_is_off_until_it_is_asked_for() {
    let (driver, stream, other) = two_streams();
    let launch = |stream: &Stream| {
        let x = Buffer::<f32>::zeros(stream, 8).unwrap();
        let mut y = Buffer::<f32>::zeros(stream, 8).unwrap();
        glu::glu(stream, x.rows(2, 4).unwrap(), x.rows(2, 4).unwrap(), &mut y.rows_mut(2, 4).unwrap()).unwrap();
    };
    launch(&stream);
    stream.set_dependent_launch(true);
    launch(&stream);
    launch(&other);
    stream.set_dependent_launch(false);
    launch(&stream);
    let is_programmatic = |call| matches!(call, Call::Launch { is_programmatic: true, .. });
    assert_eq!(driver.launches().into_iter().map(is_programmatic).collect::<Vec<_>>(), [false, true, false, false]);
    Device::cpu().stream().unwrap().set_dependent_launch(true); // of no meaning there
}

#[test]
fn streams_have_scratch() {
    let (driver, stream) = dropless_kit::device::emulated();
    let other = stream.device().stream().unwrap();
    let [(here, bytes), (there, _)] = [&stream, &other].map(|stream| stream.scratch().unwrap());
    assert!(here != there && bytes >= 1024 && dropless_kit::device::cpu(1).scratch().is_none());
    // SAFETY: as many bytes as the stream has there.
    let scratch = unsafe { Rows::<u32>::from_raw(stream.place(), here, 1, bytes / 4, bytes / 4).unwrap() };
    assert!(scratch.to_vec(&stream).unwrap().iter().all(|word| *word == 0));
    assert!(driver.reports().is_empty());
}

/// No event behind a copy: its block may not be used again before the stream was waited for, and where that is the device's error, it
/// is the copy's.
#[test]
fn a_copy_whose_event_fails_is_waited_for() {
    for (code, fails) in [(DriverError::OUT_OF_MEMORY, false), (DriverError::new(719), true)] {
        let driver = Arc::new(Recorder::default());
        let record = (0..).find(|n| {
            let faulty = Arc::new(Faulty::new(driver.clone(), *n, code));
            let _ = copied(&faulty);
            faulty.failed() == Some("record")
        });
        let before = count(&driver, |call| matches!(call, Call::Synchronize { .. }));
        let faulty = Arc::new(Faulty::new(driver.clone(), record.unwrap(), code));
        let result = copied(&faulty);
        assert_eq!(result.is_err_and(|error| error.is_fatal()), fails);
        // For the copy, and at the end of the stream.
        assert_eq!(count(&driver, |call| matches!(call, Call::Synchronize { .. })) - before, 2);
    }
}

fn copied(driver: &Arc<Faulty>) -> Result<(), Error> {
    let stream = Device::with_driver(driver.clone(), 0)?.stream()?;
    Buffer::<u32>::zeros(&stream, 3)?.copy_from_slice(&stream, &[1, 2, 3])
}

/// Rows of a device that do not lie side by side.
#[test]
fn strided_views_of_a_device_are_read_row_by_row() {
    let (_, stream) = dropless_kit::device::emulated();
    let mut buffer = Buffer::from_slice(&stream, &(0..24).collect::<Vec<u32>>()).unwrap();
    let view = buffer.rows(4, 6).unwrap().col_range(1..3).unwrap();
    assert_eq!(view.to_vec(&stream).unwrap(), [1, 2, 7, 8, 13, 14, 19, 20]);
    let view = buffer.rows_mut(4, 6).unwrap().col_range(1..3).unwrap().row_range(1..3).unwrap();
    assert_eq!(view.as_rows().to_vec(&stream).unwrap(), [7, 8, 13, 14]);
}

#[test]
fn devices_are_shared_and_streams_are_sent() {
    fn shared<T: Send + Sync>() {}
    fn sent<T: Send>() {}
    shared::<Device>();
    sent::<dropless::Stream>();
}
