//! The order of work on several streams of one device, on a driver that records what it was asked; and copies from the host, which
//! happen later than they are asked for.
#![cfg(feature = "cuda")]

use std::sync::Arc;

use dropless::device::driver::DriverError;
use dropless::layout::KvShape;
use dropless::{Bf16, Buffer, Device, Error, ExpertRows, ExpertWeights, KvCache, Stream, glu, grouped_gemm};
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
    let shape = KvShape { num_kv_heads: 1, head_dim: 2, page_tokens: 4, num_pages: 5, max_pages: 3, num_sequences: 2 };
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
    let (driver, stream, _) = two_streams();
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
    assert_eq!(error.to_string(), "grouped_gemm: weights of type bf16 is not supported here; supported: f32");
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

#[test]
fn devices_are_shared_and_streams_are_sent() {
    fn shared<T: Send + Sync>() {}
    fn sent<T: Send>() {}
    shared::<Device>();
    sent::<dropless::Stream>();
}
