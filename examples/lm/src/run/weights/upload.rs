//! Copies to a GPU's memory by several threads.
//!
//! Each thread has a stream of its own, whose copies pass through its own blocks of pinned memory. Matrices
//! are cut into pieces, which the threads take in turn; experts that lie apart become pieces of one buffer,
//! so that no matrix is put together on the host.

use std::sync::{Mutex, PoisonError};

use dropless::Stream;
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::super::report::{bytes_text, seconds_text};
use super::Failure;
use super::pieces::Piece;

/// Threads that copy, at most: more of them do not make the bus faster.
const MAX_THREADS: usize = 8;

/// What was copied, and how long it took.
#[derive(Clone, Copy, Debug)]
pub struct Uploaded {
    pub bytes: u64,
    pub seconds: f64,
    pub threads: usize,
    /// Matrices that the device repacked.
    pub repacked: usize,
}

impl Uploaded {
    /// In units of 10^9 bytes a second; none where nothing was copied.
    pub fn gb_per_s(&self) -> Option<f64> {
        (self.bytes > 0 && self.seconds > 0.0).then(|| self.bytes as f64 / self.seconds / 1e9)
    }

    /// Minimum time of a step that copies `bytes` at this rate.
    pub fn expected_text(&self, bytes: u64) -> String {
        match self.gb_per_s() {
            Some(rate) => {
                format!(
                    "{} a step expected: {} at {rate:.3} GB/s, the rate of the upload",
                    seconds_text(bytes as f64 / rate / 1e9),
                    bytes_text(bytes)
                )
            }
            None => "expected time unknown, since no upload was long enough to be timed".into(),
        }
    }

    /// For the figures that are read by a program.
    pub fn json(&self) -> Value {
        let Uploaded { bytes, seconds, threads, repacked } = *self;
        json!({ "bytes": bytes, "s": seconds, "threads": threads, "gb_per_s": self.gb_per_s(), "repacked": repacked })
    }

    /// `12.3 GiB in 0.50 s by 8 threads, 26.4 GB/s; 72 matrices repacked`.
    pub fn text(&self) -> String {
        let plural = |count: usize, one: &str, more: &str| format!("{count} {}", if count == 1 { one } else { more });
        let threads = plural(self.threads, "thread", "threads");
        let rate = self.gb_per_s().map_or(String::new(), |rate| format!(", {rate:.3} GB/s"));
        let repacked = match self.repacked {
            0 => String::new(),
            count => format!("; {} repacked", plural(count, "matrix", "matrices")),
        };
        format!("{} in {} by {threads}{rate}{repacked}", bytes_text(self.bytes), seconds_text(self.seconds))
    }
}

/// Streams of one device, for a thread each.
pub struct Uploader {
    streams: Vec<Stream>,
}

/// The pieces that no thread has taken yet.
type Left<'a> = Mutex<std::vec::IntoIter<Piece<'a>>>;

impl Uploader {
    pub fn new(stream: &Stream, threads: usize) -> Result<Uploader, Failure> {
        let streams = (0..threads.clamp(1, MAX_THREADS)).map(|_| stream.device().stream());
        Ok(Uploader { streams: streams.collect::<Result<_, _>>()? })
    }

    pub fn threads(&self) -> usize {
        self.streams.len()
    }

    /// Copies `pieces` after what `stream` was given so far, and before what it is given later.
    pub fn copy_in_order(&mut self, stream: &Stream, pieces: Vec<Piece<'_>>, bar: &ProgressBar) -> Result<(), Failure> {
        self.wait_for(stream)?;
        self.copy_while(pieces, bar, || Ok(()))?;
        self.be_waited_for_by(stream)
    }

    /// Later copies wait for what `stream` was given so far.
    pub fn wait_for(&self, stream: &Stream) -> Result<(), Failure> {
        Ok(self.streams.iter().try_for_each(|own| own.join(stream))?)
    }

    /// What `stream` is given from now on waits for all copies.
    pub fn be_waited_for_by(&self, stream: &Stream) -> Result<(), Failure> {
        Ok(self.streams.iter().try_for_each(|own| stream.join(own))?)
    }

    /// Queues the copies of `pieces`, and calls `work` meanwhile on this thread.
    pub fn copy_while<R>(
        &mut self,
        pieces: Vec<Piece<'_>>,
        bar: &ProgressBar,
        work: impl FnOnce() -> Result<R, Failure>,
    ) -> Result<R, Failure> {
        let left: Left<'_> = Mutex::new(pieces.into_iter());
        let (worked, copied) = std::thread::scope(|scope| {
            // Where a thread cannot be started, the others do its share.
            let start = |own| std::thread::Builder::new().name("upload".into()).spawn_scoped(scope, || copy(own, &left, bar));
            let threads: Vec<_> = self.streams.iter_mut().filter_map(|own| start(own).ok()).collect();
            let worked = work();
            let ends = threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            // All are waited for before the first error is looked at.
            let ends: Vec<Result<(), Failure>> = ends.collect();
            (worked, ends.into_iter().collect::<Result<(), Failure>>())
        });
        copied?;
        if let Some(own) = self.streams.first_mut() {
            copy(own, &left, bar)?; // nothing, unless no thread could be started
        }
        worked
    }
}

/// Copies piece after piece until none is left; an error leaves none to the others.
fn copy(stream: &mut Stream, left: &Left<'_>, bar: &ProgressBar) -> Result<(), Failure> {
    let lock = || left.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let next = lock().next();
        let Some(piece) = next else { return Ok(()) };
        let bytes = piece.bytes;
        piece.copy(stream).inspect_err(|_| lock().by_ref().for_each(drop))?;
        bar.inc(bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use dropless::{Buffer, Device};
    use dropless_kit::recorder::{Call, Recorder};

    use super::super::super::spec::{Part, Spec};
    use super::super::pieces::Filling;
    use super::*;

    /// Every stream waits for what came before, and is waited for.
    #[test]
    fn copies_have_their_place_in_the_order() {
        const STREAMS: usize = 3;
        let driver = Arc::new(Recorder::default());
        let stream = Device::with_driver(driver.clone(), 0).unwrap().stream().unwrap();
        let (mut buffer, values) = (Buffer::<f32>::zeros(&stream, 5000).unwrap(), [1.0; 2500]);
        let mut uploader = Uploader::new(&stream, STREAMS).unwrap();
        let (begin, mut during) = (driver.calls().len(), Vec::new());
        let spec = Spec::linear(Part::Dense, "w", [2, 2500]);
        let mut filling = Filling::new(&mut buffer, &spec, [2500, 2500]).unwrap();
        [&values, &values].into_iter().try_for_each(|values| filling.same(values)).unwrap();
        let pieces = filling.pieces();
        uploader.wait_for(&stream).unwrap();
        let work = || {
            during = driver.calls();
            Ok(())
        };
        uploader.copy_while(pieces, &ProgressBar::hidden(), work).unwrap();
        uploader.be_waited_for_by(&stream).unwrap();
        let calls = driver.calls().split_off(begin);
        let places =
            |wanted: fn(&Call) -> bool| calls.iter().enumerate().filter(|(_, call)| wanted(call)).map(|(at, _)| at).collect::<Vec<_>>();
        let (waits, writes) = (places(|call| *call == Call::Wait), places(|call| matches!(call, Call::Write { .. })));
        assert_eq!((waits.len(), writes.len()), (2 * STREAMS, 20));
        assert!(waits[STREAMS - 1] < writes[0] && writes[19] < waits[STREAMS], "{waits:?} {writes:?}");
        assert_eq!(during[begin..].iter().filter(|call| **call == Call::Wait).count(), STREAMS);
    }

    #[test]
    fn rates_are_said_where_they_are_known() {
        let uploaded = Uploaded { bytes: 3 << 30, seconds: 0.25, threads: 8, repacked: 0 };
        assert_eq!(uploaded.text(), "3.00 GiB in 250 ms by 8 threads, 12.885 GB/s");
        let tiled = Uploaded { repacked: 72, ..uploaded };
        assert_eq!(tiled.text(), "3.00 GiB in 250 ms by 8 threads, 12.885 GB/s; 72 matrices repacked");
        assert_eq!(uploaded.expected_text(6 << 30), "500 ms a step expected: 6.00 GiB at 12.885 GB/s, the rate of the upload");
        let none = Uploaded { seconds: 0.0, threads: 1, ..uploaded };
        assert_eq!(none.text(), "3.00 GiB in 0.00 us by 1 thread");
        assert_eq!(none.expected_text(1), "expected time unknown, since no upload was long enough to be timed");
    }
}
