//! The order of work on several streams of one device, on a driver that records what it was asked.
#![cfg(feature = "cuda")]

use std::sync::Arc;

use dropless::layout::KvShape;
use dropless::{Buffer, Device, Error, KvCache, Stream, glu};
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
