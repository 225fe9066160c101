//! Copies of a checkpoint's weights in a GPU's memory, made by several threads.
//!
//! Each thread has a stream of its own, whose copies pass through its own blocks of pinned memory. Matrices
//! are cut into pieces, which the threads take in turn; experts that lie apart become pieces of one buffer,
//! so that nothing is put together on the host.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use dropless::{Bf16, Buffer, DType, Error, F16, RowsMut, Stream};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::super::report::{bytes_text, seconds_text};
use super::buffers::{Buffers, Weight, stride};
use super::{Failure, Progress, Spec, Tensors, bytes_of, not_weights, refuse};

/// Threads that copy, at most: more of them do not make the bus faster.
const MAX_THREADS: usize = 8;
/// Bytes that a thread takes at a time: enough to copy without a pause, small enough to share a matrix.
/// Smaller under test, so that small models are cut, too.
const PIECE_BYTES: usize = if cfg!(test) { 1000 } else { 16 << 20 };

/// What was copied, and how long it took.
#[derive(Clone, Copy, Debug)]
pub struct Uploaded {
    pub bytes: u64,
    pub seconds: f64,
    pub threads: usize,
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
        json!({ "bytes": self.bytes, "s": self.seconds, "threads": self.threads, "gb_per_s": self.gb_per_s() })
    }

    /// `12.3 GiB in 0.50 s by 8 threads, 26.4 GB/s`.
    pub fn text(&self) -> String {
        let plural = if self.threads == 1 { "" } else { "s" };
        let rate = self.gb_per_s().map_or(String::new(), |rate| format!(", {rate:.3} GB/s"));
        format!("{} in {} by {} thread{plural}{rate}", bytes_text(self.bytes), seconds_text(self.seconds), self.threads)
    }
}

/// Copies of some matrices of type `dtype` that `tensors` have on the host, on the stream's device.
pub fn upload(
    stream: &Stream,
    tensors: &dyn Tensors,
    dtype: DType,
    specs: &[Spec],
    threads: usize,
    progress: &Progress,
) -> Result<(Box<dyn Tensors>, Uploaded), Failure> {
    fn of<W: Weight>(
        stream: &Stream,
        from: From<'_>,
        threads: usize,
        progress: &Progress,
    ) -> Result<(Box<dyn Tensors>, Uploaded), Failure> {
        let (buffers, uploaded) = uploaded::<W>(stream, from, threads, progress)?;
        Ok((Box::new(buffers), uploaded))
    }
    let from = From { tensors, specs };
    match dtype {
        DType::F32 => of::<f32>(stream, from, threads, progress),
        DType::Bf16 => of::<Bf16>(stream, from, threads, progress),
        DType::F16 => of::<F16>(stream, from, threads, progress),
        other => not_weights(other),
    }
}

/// Matrices on the host.
#[derive(Clone, Copy)]
pub struct From<'a> {
    pub tensors: &'a dyn Tensors,
    pub specs: &'a [Spec],
}

/// The same as buffers, and the time until all of it was there.
pub fn uploaded<W: Weight>(
    stream: &Stream,
    from: From<'_>,
    threads: usize,
    progress: &Progress,
) -> Result<(Buffers<W>, Uploaded), Failure> {
    let begin = Instant::now();
    let bytes = bytes_of(from.specs, W::DTYPE);
    let bar = progress.bytes("to the GPU", bytes);
    let mut buffers = Buffers::<W>::zeros(stream, from.specs)?;
    let mut uploader = Uploader::new(stream, threads)?;
    uploader.wait_for(stream)?;
    uploader.copy_while(pieces(&mut buffers, from)?, &bar, || Ok(()))?;
    uploader.be_waited_for_by(stream)?;
    let threads = uploader.streams.len();
    drop(uploader); // waits for its streams, and gives their pinned memory back
    stream.synchronize()?;
    Ok((buffers, Uploaded { bytes, seconds: begin.elapsed().as_secs_f64(), threads }))
}

/// A copy to do.
pub struct Piece<'a, W> {
    to: RowsMut<'a, W>,
    from: &'a [W],
}

/// The copies of some matrices to the buffers that are theirs.
pub fn pieces<'a, W: Weight>(buffers: &'a mut Buffers<W>, from: From<'a>) -> Result<Vec<Piece<'a, W>>, Failure> {
    let mut pieces = Vec::new();
    for (index, (buffer, spec)) in buffers.0.iter_mut().zip(from.specs).enumerate() {
        let parts = from.tensors.parts(index, spec)?;
        let Some(parts) = parts.iter().map(W::elements).collect::<Option<Vec<_>>>() else {
            let (name, dtype) = (spec.name(), W::DTYPE.name());
            return refuse(format!("tensor `{name}` must be {dtype} and on the host"));
        };
        cut(buffer, spec.dims()[1], &parts, &mut pieces)?;
    }
    Ok(pieces)
}

/// Parts of `cols` columns whose rows are to lie one behind the other in a buffer, which they fill. Rows that
/// do not begin where the one before ends are pieces of their own.
fn cut<'a, W: Weight>(buffer: &'a mut Buffer<W>, cols: usize, parts: &[&'a [W]], pieces: &mut Vec<Piece<'a, W>>) -> Result<(), Failure> {
    let len = buffer.len();
    let (place, begin) = (buffer.place(), buffer.rows_mut(1, len)?.address());
    let gap = stride::<W>(place, cols) - cols;
    let piece = if gap == 0 { PIECE_BYTES / size_of::<W>() } else { cols };
    let mut at = 0;
    for from in parts.iter().flat_map(|part| part.chunks(piece)) {
        let address = begin + (at * size_of::<W>()) as u64;
        at += from.len() + gap;
        if at > len {
            return refuse(format!("{at} elements or more for a buffer of {len}"));
        }
        // SAFETY: elements of the buffer, which is borrowed as long as the piece; no other piece has them.
        // Who copies orders the copies behind the buffer's earlier uses, and later ones behind the copies, by
        // joining streams; where it comes to neither, the uploader is dropped before the buffer, and waits
        // for its streams.
        #[allow(unsafe_code)]
        let to = unsafe { RowsMut::from_raw(place, address, 1, from.len(), from.len())? };
        pieces.push(Piece { to, from });
    }
    Ok(())
}

/// Streams of one device, for a thread each.
pub struct Uploader {
    streams: Vec<Stream>,
}

/// The pieces that no thread has taken yet.
type Left<'a, W> = Mutex<std::vec::IntoIter<Piece<'a, W>>>;

impl Uploader {
    pub fn new(stream: &Stream, threads: usize) -> Result<Uploader, Failure> {
        let streams = (0..threads.clamp(1, MAX_THREADS)).map(|_| stream.device().stream());
        Ok(Uploader { streams: streams.collect::<Result<_, _>>()? })
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
    pub fn copy_while<W: Weight, R>(
        &mut self,
        pieces: Vec<Piece<'_, W>>,
        bar: &ProgressBar,
        work: impl FnOnce() -> Result<R, Failure>,
    ) -> Result<R, Failure> {
        let left: Left<'_, W> = Mutex::new(pieces.into_iter());
        let (worked, copied) = std::thread::scope(|scope| {
            // Where a thread cannot be started, the others do its share.
            let start = |own| std::thread::Builder::new().name("upload".into()).spawn_scoped(scope, || copy(own, &left, bar));
            let threads: Vec<_> = self.streams.iter_mut().filter_map(|own| start(own).ok()).collect();
            let worked = work();
            let ends = threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            // All are waited for before the first error is looked at.
            let ends: Vec<Result<(), Error>> = ends.collect();
            (worked, ends.into_iter().collect::<Result<(), Error>>())
        });
        copied?;
        if let Some(own) = self.streams.first_mut() {
            copy(own, &left, bar)?; // nothing, unless no thread could be started
        }
        worked
    }
}

/// Copies piece after piece until none is left; an error leaves none to the others.
fn copy<W: Weight>(stream: &mut Stream, left: &Left<'_, W>, bar: &ProgressBar) -> Result<(), Error> {
    let lock = || left.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let next = lock().next();
        let Some(Piece { mut to, from }) = next else { return Ok(()) };
        to.copy_from_slice(stream, from).inspect_err(|_| lock().by_ref().for_each(drop))?;
        bar.inc(size_of_val(from) as u64);
    }
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use dropless::Device;
    use dropless_kit::compare::same_bits;
    use dropless_kit::device;
    use dropless_kit::recorder::{Call, Recorder};

    use super::super::super::families;
    use super::super::Checkpoint;
    use super::*;

    /// One thread or several: the bytes of the files, those of the experts one behind the other.
    #[test]
    fn any_number_of_threads_copies_the_same_bits() {
        for model in ["dbrx/tiny-dbrx-f32-sharded", "mixtral/mixtral-tiny"] {
            let (folder, progress) = (Path::new("tests/data").join(model), Progress::new(false));
            let config = families::read_config(&folder.join("config.json")).unwrap();
            let checkpoint = Checkpoint::open(&folder, &config, &progress).unwrap();
            let specs: Vec<Spec> = config.family.specs(&config).collect();
            for threads in [1, 4] {
                let (driver, stream) = device::emulated();
                let from = From { tensors: &checkpoint, specs: &specs };
                let (buffers, uploaded) = uploaded::<f32>(&stream, from, threads, &progress).unwrap();
                assert_eq!((uploaded.bytes, uploaded.threads), (4 * config.parameters(), threads));
                for (index, spec) in specs.iter().enumerate() {
                    let parts = checkpoint.parts(index, spec).unwrap();
                    let want = parts.iter().map(f32::elements).collect::<Option<Vec<_>>>().unwrap().concat();
                    same_bits(&buffers.0[index].to_vec(&stream).unwrap(), &want);
                }
                assert_eq!(driver.reports(), [""; 0]);
            }
        }
    }

    /// Every stream waits for what came before, and is waited for.
    #[test]
    fn copies_have_their_place_in_the_order() {
        const STREAMS: usize = 3;
        let driver = Arc::new(Recorder::default());
        let stream = Device::with_driver(driver.clone(), 0).unwrap().stream().unwrap();
        let (mut buffer, values) = (Buffer::<f32>::zeros(&stream, 5000).unwrap(), [1.0; 2500]);
        let mut uploader = Uploader::new(&stream, STREAMS).unwrap();
        let (begin, mut during) = (driver.calls().len(), Vec::new());
        let mut pieces = Vec::new();
        cut(&mut buffer, 2500, &[&values, &values], &mut pieces).unwrap();
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
    fn more_than_a_buffer_holds_is_refused() {
        let stream = device::cpu(1);
        let (mut buffer, values) = (Buffer::<f32>::zeros(&stream, 500).unwrap(), [1.0; 501]);
        assert!(cut(&mut buffer, 501, &[&values], &mut Vec::new()).is_err());
    }

    #[test]
    fn rates_are_said_where_they_are_known() {
        let uploaded = Uploaded { bytes: 3 << 30, seconds: 0.25, threads: 8 };
        assert_eq!(uploaded.text(), "3.00 GiB in 250 ms by 8 threads, 12.885 GB/s");
        assert_eq!(uploaded.expected_text(6 << 30), "500 ms a step expected: 6.00 GiB at 12.885 GB/s, the rate of the upload");
        let none = Uploaded { seconds: 0.0, threads: 1, ..uploaded };
        assert_eq!(none.text(), "3.00 GiB in 0.00 us by 1 thread");
        assert_eq!(none.expected_text(1), "expected time unknown, since no upload was long enough to be timed");
    }
}
