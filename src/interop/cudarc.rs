//! cudarc's streams, slices and views as ours, and our buffers as views of cudarc's: one stream for both, and
//! the events by which cudarc orders its streams recorded as cudarc records them.
//!
//! cudarc stays out of the driver layer: a missing library or symbol panics there, and its types change with
//! the CUDA version that was chosen for the build. What is used of it here is its safe tier, which is the
//! same from 0.16 to 0.19.
//!
//! What orders a slice's uses is a guard of cudarc's, which has to live until the work that uses the slice is
//! queued, and then has to go: without it cudarc may free the memory under that work. Since safe code can
//! leak a value, guards belong to a scope, which holds them where nobody can take them, as
//! `std::thread::scope` holds its threads.
#![allow(unsafe_code)] // addresses become views, and views addresses

use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::Arc;

use ::cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr, DriverError, SyncOnDrop,
    ValidAsZeroBits,
};

use crate::device::driver::hardware::Hardware;
use crate::device::{Buffer, Device, Mark, Stream};
use crate::dtype::{Bf16, Element, F16};
use crate::error::{Error, Op, Place};
use crate::view::{Rows, RowsMut, check_span};

// SAFETY: transparent around a `u16`: zeros are a value.
unsafe impl ValidAsZeroBits for Bf16 {}
// SAFETY: as above.
unsafe impl ValidAsZeroBits for F16 {}
// SAFETY: transparent around a `u16`, which a device may hold and a kernel may be given.
unsafe impl DeviceRepr for Bf16 {}
// SAFETY: as above.
unsafe impl DeviceRepr for F16 {}

impl Stream {
    /// cudarc's stream, used as it is: operations are queued there, in order with cudarc's own work. It lives
    /// as long as anything here needs it. With [`cudarc_scope`](Stream::cudarc_scope) cudarc's slices become
    /// views.
    ///
    /// There is one such `Stream` at a time, since two threads with one each would not know of each other.
    /// While cudarc captures the stream into a graph of its own, operations are refused: nobody would see to
    /// it that memory is there when that graph is launched. For that, and for a stream that somebody else
    /// adopts too, there is the unsafe [`Stream::from_raw_with_owner`].
    ///
    /// # Errors
    ///
    /// [`Error::Place`] if `device` is not the GPU of `cuda`; [`Error::Mismatch`] for another [`Device`] than
    /// one from [`Device::cuda`], and for a stream of which there is such a `Stream`; [`Error::Unsupported`]
    /// for one that is per thread; [`Error::Context`] for one of another context than the device's primary
    /// one; [`Error::OutOfMemory`]; what the driver reports.
    pub fn from_cudarc(device: &Device, cuda: &Arc<CudaStream>) -> Result<Stream, Error> {
        let place = Place::Cuda(cuda.context().ordinal() as u32);
        if device.place() != place {
            return Err(Error::Place { op: Op::Stream, arg: "device", want: place, got: device.place() });
        }
        if device.driver_id() != Arc::as_ptr(&Hardware::shared()?).addr() {
            return Err(Error::mismatch(Op::Stream, "device", "one from Device::cuda", "one of another driver"));
        }
        cuda.context().bind_to_thread().map_err(report)?; // the default stream's handle does not say which context it is of
        // SAFETY: cudarc's value keeps the stream alive.
        unsafe { Stream::alone(device, cuda.cu_stream().cast(), cuda.clone()) }
    }

    /// Calls `work` with a [`Scope`], which makes views of cudarc's slices, and lends buffers to cudarc, for
    /// as long as `work` runs.
    ///
    /// `cuda` is the stream of cudarc that this one was made from. Behind `work` its events are recorded, as
    /// if cudarc had queued what was queued here: whatever cudarc does with the slices then, on whichever of
    /// its streams, comes after. Nothing waits for the GPU.
    ///
    /// Make the views before a [capture](Stream::capture), not within: cudarc's events cannot be a part of
    /// it.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if this is not the stream `cuda`; [`Error::Unsupported`] while it is captured; the
    /// error of `work`.
    ///
    /// ```no_run
    /// use cudarc::driver::CudaContext;
    /// use dropless::{Device, Stream, glu};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let cuda = CudaContext::new(0)?.new_stream()?;
    /// let (gate, up, mut y) = (cuda.alloc_zeros::<f32>(8)?, cuda.alloc_zeros::<f32>(8)?, cuda.alloc_zeros::<f32>(8)?);
    ///
    /// let stream = Stream::from_cudarc(&Device::cuda(0)?, &cuda)?;
    /// stream.cudarc_scope(&cuda, |scope| {
    ///     let (gate, up, mut y) = (scope.rows(&gate, 2, 4)?, scope.rows(&up, 2, 4)?, scope.rows_mut(&mut y, 2, 4)?);
    ///     glu::glu(&stream, gate, up, &mut y)
    /// })?;
    /// let mut host = [1.0; 8];
    /// cuda.memcpy_dtoh(&y, &mut host)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// A view lives no longer than the scope:
    ///
    /// ```compile_fail
    /// # use {std::sync::Arc, cudarc::driver::{CudaSlice, CudaStream}, dropless::{Error, Stream}};
    /// fn kept(stream: &Stream, cuda: &Arc<CudaStream>, slice: &CudaSlice<f32>) -> Result<(), Error> {
    ///     let rows = stream.cudarc_scope(cuda, |scope| scope.rows(slice, 2, 4))?;
    ///     Ok(())
    /// }
    /// ```
    pub fn cudarc_scope<'env, R, E: From<Error>>(
        &'env self,
        cuda: &'env Arc<CudaStream>,
        work: impl for<'scope> FnOnce(&'scope Scope<'scope, 'env>) -> Result<R, E>,
    ) -> Result<R, E> {
        if self.as_raw() != Some(cuda.cu_stream().cast()) || self.place() != Place::Cuda(cuda.context().ordinal() as u32) {
            return Err(Error::mismatch(Op::Stream, "cuda", "the stream that this one was made from", "another").into());
        }
        self.outside_capture(Op::Stream, "a cudarc scope")?;
        let loans = Loans { stream: self, of: RefCell::default() };
        let scope = Scope { stream: self, cuda, loans: &loans, _scope: PhantomData, _env: PhantomData };
        work(&scope)
    }
}

/// Makes views of cudarc's memory, and lends ours to cudarc, until it ends. See [`Stream::cudarc_scope`].
pub struct Scope<'scope, 'env: 'scope> {
    stream: &'env Stream,
    cuda: &'env Arc<CudaStream>,
    loans: &'scope Loans<'env>,
    _scope: PhantomData<&'scope mut &'scope ()>, // invariant: the closure can neither prolong nor shorten it
    _env: PhantomData<&'env mut &'env ()>,
}

/// What the scope has to end. It is dropped when no view is left, after a panic, too.
struct Loans<'env> {
    stream: &'env Stream,
    of: RefCell<Vec<Box<dyn Loan + 'env>>>,
}

impl Drop for Loans<'_> {
    fn drop(&mut self) {
        self.of.get_mut().drain(..).for_each(|loan| loan.end(self.stream));
    }
}

/// Memory of the one side that the other uses until the scope ends.
trait Loan {
    /// Orders what comes behind the scope after what was queued in it.
    fn end(self: Box<Self>, stream: &Stream);
}

/// cudarc's memory. The mark came from a box, and the scope's views point to it.
struct Borrowed<'env> {
    mark: *mut Mark,
    guard: SyncOnDrop<'env>,
    cuda: &'env CudaStream,
}

impl Loan for Borrowed<'_> {
    fn end(self: Box<Self>, stream: &Stream) {
        // SAFETY: made by `Box::into_raw`, taken back once; no view is left.
        let mark = unsafe { Box::from_raw(self.mark) };
        // Uses on streams that had joined this one. Where not even an event can be had, the host waits for
        // all that there is.
        if !stream.settle(&mark) {
            self.cuda.context().record_err(self.cuda.context().synchronize());
        }
        drop(self.guard); // records cudarc's event
    }
}

/// A buffer of ours, as the slice that cudarc sees. The slice came from a box, and the scope's views point to
/// it.
struct Lent<'env, T> {
    slice: *mut CudaSlice<T>,
    mark: &'env Mark,
    write: bool,
}

impl<T> Loan for Lent<'_, T> {
    fn end(self: Box<Self>, stream: &Stream) {
        // SAFETY: made by `Box::into_raw`, taken back once; no view is left.
        let slice = unsafe { Box::from_raw(self.slice) };
        slice.leak(); // has its stream, this one, wait for what cudarc did on others; the memory stays the buffer's
        stream.mark(self.mark, self.write);
    }
}

mod sealed {
    pub trait Sealed {}
}

/// Memory of cudarc that can be read: [`CudaSlice`], [`CudaView`], [`CudaViewMut`]. Sealed.
pub trait Source<T>: DevicePtr<T> + sealed::Sealed {}
/// Memory of cudarc that can be written: [`CudaSlice`], [`CudaViewMut`]. Sealed.
pub trait Target<T>: DevicePtrMut<T> + sealed::Sealed {}

impl<T> sealed::Sealed for CudaSlice<T> {}
impl<T> sealed::Sealed for CudaView<'_, T> {}
impl<T> sealed::Sealed for CudaViewMut<'_, T> {}
impl<T> Source<T> for CudaSlice<T> {}
impl<T> Source<T> for CudaView<'_, T> {}
impl<T> Source<T> for CudaViewMut<'_, T> {}
impl<T> Target<T> for CudaSlice<T> {}
impl<T> Target<T> for CudaViewMut<'_, T> {}

impl<'scope, 'env> Scope<'scope, 'env> {
    /// The first `rows * cols` elements of a slice or view of cudarc as a matrix.
    ///
    /// # Errors
    ///
    /// [`Error::Capacity`] if there are fewer; [`Error::TooLarge`] beyond the address space;
    /// [`Error::Mismatch`] for memory of another `CudaContext` than the stream's; [`Error::Unsupported`]
    /// within a capture; [`Error::Driver`] for what cudarc's calls have reported since it was last asked.
    pub fn rows<T: Element, S: Source<T>>(&'scope self, slice: &'env S, rows: usize, cols: usize) -> Result<Rows<'scope, T>, Error> {
        self.rows_strided(slice, rows, cols, cols)
    }

    /// The same, of rows that begin `stride` elements apart.
    ///
    /// # Errors
    ///
    /// As [`rows`](Scope::rows); [`Error::Layout`] if `stride < cols`.
    pub fn rows_strided<T: Element, S: Source<T>>(
        &'scope self,
        slice: &'env S,
        rows: usize,
        cols: usize,
        stride: usize,
    ) -> Result<Rows<'scope, T>, Error> {
        self.check(slice.stream().context())?;
        check_span::<T>(slice.len(), rows, cols, stride)?;
        let (address, guard) = slice.device_ptr(self.cuda);
        let mark = self.borrowed(guard)?;
        // SAFETY: cudarc's memory, as long as checked, borrowed until the scope ends, which orders what
        // follows after the uses it knows of.
        unsafe { Rows::from_raw(self.stream.place(), address, rows, cols, stride) }.map(|view| view.marked(mark))
    }

    /// The first `rows * cols` elements of a slice or view of cudarc as a matrix, for writing.
    ///
    /// # Errors
    ///
    /// As [`rows`](Scope::rows).
    pub fn rows_mut<T: Element, S: Target<T>>(
        &'scope self,
        slice: &'env mut S,
        rows: usize,
        cols: usize,
    ) -> Result<RowsMut<'scope, T>, Error> {
        self.rows_mut_strided(slice, rows, cols, cols)
    }

    /// The same, of rows that begin `stride` elements apart. The gaps are never written.
    ///
    /// # Errors
    ///
    /// As [`rows_strided`](Scope::rows_strided).
    pub fn rows_mut_strided<T: Element, S: Target<T>>(
        &'scope self,
        slice: &'env mut S,
        rows: usize,
        cols: usize,
        stride: usize,
    ) -> Result<RowsMut<'scope, T>, Error> {
        self.check(slice.stream().context())?;
        check_span::<T>(slice.len(), rows, cols, stride)?;
        let (address, guard) = slice.device_ptr_mut(self.cuda);
        let mark = self.borrowed(guard)?;
        // SAFETY: as for reading, and exclusively.
        unsafe { RowsMut::from_raw(self.stream.place(), address, rows, cols, stride) }.map(|view| view.marked(mark))
    }

    /// A buffer as a view of cudarc, for reading.
    ///
    /// # Errors
    ///
    /// [`Error::Place`], [`Error::NotJoined`]; [`Error::Unsupported`] within a capture; [`Error::Driver`] for
    /// what cudarc's calls have reported since it was last asked.
    pub fn lend<T: Element>(&'scope self, buffer: &'env Buffer<T>) -> Result<CudaView<'scope, T>, Error> {
        // SAFETY: it lives until the scope ends, and was made for this call.
        let slice: &'scope CudaSlice<T> = unsafe { &*self.lent(buffer, false)? };
        Ok(slice.as_view())
    }

    /// A buffer as a view of cudarc, for writing.
    ///
    /// # Errors
    ///
    /// As [`lend`](Scope::lend).
    pub fn lend_mut<T: Element>(&'scope self, buffer: &'env mut Buffer<T>) -> Result<CudaViewMut<'scope, T>, Error> {
        // SAFETY: as for reading.
        let slice: &'scope mut CudaSlice<T> = unsafe { &mut *self.lent(buffer, true)? };
        Ok(slice.as_view_mut())
    }

    /// Refuses memory whose events would not be kept with those of the stream, and a capture, which can hold
    /// no event of cudarc's.
    fn check(&self, context: &Arc<CudaContext>) -> Result<(), Error> {
        self.stream.outside_capture(Op::View, "a view of cudarc's memory")?;
        if Arc::ptr_eq(context, self.cuda.context()) {
            return Ok(());
        }
        Err(Error::mismatch(Op::View, "slice", "of the stream's CudaContext", "one of another"))
    }

    /// Keeps a guard until the scope ends. Gives the mark of its memory, which counts as written here just
    /// now: cudarc had this stream wait for its last use, and no other.
    fn borrowed(&'scope self, guard: SyncOnDrop<'env>) -> Result<&'scope Mark, Error> {
        let mark = Box::into_raw(Box::new(Mark::of(self.stream.device())));
        self.loans.of.borrow_mut().push(Box::new(Borrowed { mark, guard, cuda: self.cuda }));
        // SAFETY: it lives until the scope ends.
        let mark = unsafe { &*mark };
        self.stream.mark(mark, true);
        self.reported().map(|()| mark)
    }

    /// A buffer as a slice that is not freed: behind the scope it is ours again, ordered after what cudarc
    /// did with it.
    fn lent<T: Element>(&'scope self, buffer: &'env Buffer<T>, write: bool) -> Result<*mut CudaSlice<T>, Error> {
        self.stream.outside_capture(Op::Buffer, "a loan to cudarc")?;
        let events = self.cuda.context().new_event(None); // as cudarc makes two below, and panics where it cannot
        events.map_err(report)?;
        self.stream.admit(Op::Buffer, &[("buffer", buffer.access(write))])?;
        // SAFETY: the buffer's memory, borrowed as long as the scope, all elements initialised. The slice is
        // never dropped.
        let mut slice = unsafe { self.cuda.upgrade_device_ptr::<T>(buffer.address().addr() as u64, buffer.len()) };
        drop(slice.device_ptr_mut(self.cuda).1); // an event behind what was queued here, for which cudarc's other streams wait
        let slice = Box::into_raw(Box::new(slice));
        self.loans.of.borrow_mut().push(Box::new(Lent { slice, mark: buffer.mark(), write }));
        self.reported().map(|()| slice)
    }

    /// What went wrong in calls of cudarc that give no result.
    fn reported(&self) -> Result<(), Error> {
        self.cuda.context().check_err().map_err(report)
    }
}

fn report(error: DriverError) -> Error {
    Error::Driver { op: Op::View, call: "cudarc", code: error.0 as i32, name: "as cudarc reports it" }
}
