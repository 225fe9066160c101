//! Every device a test runs on.

use dropless::{Device, Stream};

/// Calls `test` once per device: the CPU with one thread and with three.
pub fn each_device(test: impl Fn(&Stream)) {
    for threads in [1, 3] {
        test(&cpu(threads));
    }
}

/// A stream on the CPU with that many threads.
pub fn cpu(threads: usize) -> Stream {
    Device::cpu_with_threads(threads).and_then(|device| device.stream()).expect("a CPU stream")
}
