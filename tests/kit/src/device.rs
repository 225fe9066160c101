//! Every device a test runs on.

use std::cell::Cell;
use std::io::Write;
use std::sync::{Arc, Once};

use dropless::{Device, Element, Error, Stream};

use crate::emulated::{Emulated, Options, Schedule};

thread_local! {
    static EMULATING: Cell<bool> = const { Cell::new(false) };
    /// One device per thread, so that a test loads each image once.
    static EMULATED: (Arc<Emulated>, Stream) = emulated();
}

/// Calls `test` once per device: the CPU with one thread and with three, the emulated GPU in every schedule, the GPU where there is
/// one. `DROPLESS_REQUIRE_GPU=1` turns a missing GPU into a failure.
pub fn each_device(test: impl Fn(&Stream)) {
    for threads in [1, 3] {
        test(&cpu(threads));
    }
    each_gpu(test);
}

/// Calls `test` on the emulated GPU in every schedule, and on the GPU where there is one.
pub fn each_gpu(test: impl Fn(&Stream)) {
    each_schedule(&test);
    if let Some(stream) = hardware() {
        test(&stream);
    }
}

/// Calls `test` on the emulated GPU, once per schedule.
pub fn each_schedule(test: impl Fn(&Stream)) {
    struct Emulating;
    impl Drop for Emulating {
        fn drop(&mut self) {
            EMULATING.set(false);
        }
    }
    EMULATING.set(true);
    let _until_the_end = Emulating;
    EMULATED.with(|(driver, stream)| {
        for schedule in [Schedule::InOrder, Schedule::Reverse, Schedule::Random(1)] {
            driver.set_options(Options { schedule, ..Options::default() });
            test(stream);
            assert_eq!(driver.reports(), [""; 0], "{schedule:?}");
        }
    });
}

/// False where the emulator would be too slow: with every detector on it takes some million inner steps per second.
/// Everything else affords everything.
pub fn affords(operations: usize) -> bool {
    !EMULATING.get() || operations <= 50_000
}

/// True where the device runs kernels for these types side by side: the CPU mixes types, a GPU does not.
pub fn mixes<A: Element, W: Element>(stream: &Stream) -> bool {
    A::DTYPE == W::DTYPE || stream.place() == dropless::Place::Host
}

/// A stream on the CPU with that many threads.
pub fn cpu(threads: usize) -> Stream {
    Device::cpu_with_threads(threads).and_then(|device| device.stream()).expect("a CPU stream")
}

/// A stream on an emulated GPU, and its driver.
pub fn emulated() -> (Arc<Emulated>, Stream) {
    let driver = Arc::new(Emulated::new(Options::default()));
    let stream = Device::with_driver(driver.clone(), 0).and_then(|device| device.stream()).expect("an emulated stream");
    (driver, stream)
}

/// A stream on the GPU of this machine. Without one: a panic if `DROPLESS_REQUIRE_GPU` is 1, else a line on the terminal.
pub fn hardware() -> Option<Stream> {
    let required = std::env::var_os("DROPLESS_REQUIRE_GPU").is_some_and(|value| value == "1");
    match Device::cuda(0).and_then(|device| device.stream()) {
        Ok(stream) => Some(stream),
        Err(error) => {
            assert!(!required, "DROPLESS_REQUIRE_GPU=1, but: {error}");
            static ONCE: Once = Once::new();
            // Past the capture of the test harness, which shows nothing of a test that passes.
            ONCE.call_once(|| skipped(&error));
            None
        }
    }
}

fn skipped(error: &Error) {
    let _ = writeln!(std::io::stderr(), "NOT RUN ON HARDWARE, emulated only: {error}");
}
