//! Views: borrowed matrices that know where their bytes live.
//!
//! `Rows` and `RowsMut` are what operations take. They are made from slices, from buffers, or, by an engine
//! that owns its memory, from raw addresses. Behind dispatch a CPU backend sees them as `HostRows` and
//! `HostRowsMut` (`view/host.rs`).
#![allow(unsafe_code)] // addresses that the caller vouches for

mod carver;
mod host;
mod tiling;

use std::marker::PhantomData;
use std::ops::Range;

pub(crate) use self::carver::Carver;
pub(crate) use self::host::{HostRows, HostRowsMut, RowOutputs, TileMut, for_each_row, rows_per_task};
pub(crate) use self::tiling::Tiling;
use crate::device::{Access, Buffer, Mark, Stream, Upload};
use crate::dtype::Element;
use crate::error::{Error, Op, Place, check_shape};
use crate::shape::checked_bytes;

/// A `[rows, cols]` matrix, row-major, borrowed for reading.
#[derive(Clone, Copy)]
pub struct Rows<'a, T> {
    first: *const T,
    rows: usize,
    cols: usize,
    stride: usize,
    place: Place,
    mark: Option<&'a Mark>,
    _borrow: PhantomData<&'a [T]>,
}

/// A `[rows, cols]` matrix, row-major, borrowed exclusively for writing.
pub struct RowsMut<'a, T> {
    first: *mut T,
    rows: usize,
    cols: usize,
    stride: usize,
    place: Place,
    mark: Option<&'a Mark>,
    _borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: a shared borrow of elements that are `Sync`; device addresses are numbers.
unsafe impl<T: Element> Send for Rows<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Element> Sync for Rows<'_, T> {}
// SAFETY: an exclusive borrow of elements that are `Send`; device addresses are numbers.
unsafe impl<T: Element> Send for RowsMut<'_, T> {}
// SAFETY: a shared reference to it allows reading only.
unsafe impl<T: Element> Sync for RowsMut<'_, T> {}

/// Elements from the first of the first row to the last of the last row. Sizes are bounded where there are no elements, too: no row
/// of any view begins beyond the address space.
fn span<T>(rows: usize, cols: usize, stride: usize) -> Result<usize, Error> {
    if rows > 1 && stride < cols {
        return Err(Error::Layout { op: Op::View, arg: "stride", need: "at least `cols` elements", got: stride });
    }
    checked_bytes(Op::View, "bytes", &[rows.max(1), stride.max(cols).max(1)], size_of::<T>())?;
    Ok(if rows == 0 || cols == 0 { 0 } else { (rows - 1) * stride + cols })
}

/// The address of memory that the caller vouches for. Nothing may lie at null, where no slice may: it is
/// elsewhere then.
fn vouched_for<T>(place: Place, address: u64, elements: usize) -> Result<usize, Error> {
    let op = Op::View;
    match (elements, address as usize, address as usize % align_of::<T>()) {
        (0, ..) if place == Place::Host => Ok(align_of::<T>()),
        (0, address, _) => Ok(address),
        (_, 0, _) => Err(Error::Value { op, arg: "address", need: "an address, not null", got: 0.0 }),
        (_, address, 0) => Ok(address),
        (_, _, got) => Err(Error::Layout { op, arg: "address", need: "the alignment of its elements", got }),
    }
}

/// `span`, which must fit in `len` elements.
pub(crate) fn check_span<T>(len: usize, rows: usize, cols: usize, stride: usize) -> Result<(), Error> {
    let need = span::<T>(rows, cols, stride)?;
    if need <= len { Ok(()) } else { Err(Error::Capacity { op: Op::View, what: "elements", need, have: len }) }
}

impl<'a, T: Element> Rows<'a, T> {
    /// A view of host memory, rows packed.
    ///
    /// # Errors
    ///
    /// [`Error::Capacity`] if the slice is shorter than `rows * cols`.
    pub fn from_slice(data: &'a [T], rows: usize, cols: usize) -> Result<Self, Error> {
        Self::from_slice_strided(data, rows, cols, cols)
    }

    /// A view of host memory whose rows begin `stride` elements apart.
    ///
    /// # Errors
    ///
    /// [`Error::Layout`] if `stride < cols`; [`Error::Capacity`] if the slice is too short; [`Error::TooLarge`] for sizes beyond
    /// the address space, of an empty matrix too.
    pub fn from_slice_strided(data: &'a [T], rows: usize, cols: usize, stride: usize) -> Result<Self, Error> {
        check_span::<T>(data.len(), rows, cols, stride)?;
        Ok(Rows { first: data.as_ptr(), rows, cols, stride, place: Place::Host, mark: None, _borrow: PhantomData })
    }

    /// A view of host bytes, as of a memory-mapped file, in the machine's byte order.
    ///
    /// # Errors
    ///
    /// [`Error::Layout`] if the bytes are not aligned for `T`; [`Error::Capacity`] if there are too few.
    pub fn from_bytes(bytes: &'a [u8], rows: usize, cols: usize) -> Result<Self, Error> {
        // SAFETY: every bit pattern is a value of an `Element`.
        let (before, data, _) = unsafe { bytes.align_to::<T>() };
        if !before.is_empty() {
            return Err(Error::Layout {
                op: Op::View,
                arg: "bytes",
                need: "the alignment of its elements",
                got: bytes.as_ptr().addr() % align_of::<T>(),
            });
        }
        Self::from_slice(data, rows, cols)
    }

    /// A view of memory that this crate does not own: a host pointer or a device address.
    ///
    /// # Safety
    ///
    /// * The `(rows - 1) * stride + cols` elements at `address` lie in one allocation at `place`; on a GPU in
    ///   memory that its primary context can reach, as all memory that the CUDA runtime, cudarc or candle
    ///   allocate.
    /// * They are initialised, stay valid and are not written, until the work that is given this view
    ///   completes, each launch of a graph that was captured with it included.
    /// * Work of the caller's that wrote them is ordered before, by being on the same stream or by an event.
    ///   A view of a [`Buffer`] is checked for that; this one is not.
    ///
    /// # Errors
    ///
    /// [`Error::Layout`] if `stride < cols`, or if `address` is not aligned for `T`; [`Error::Value`] for
    /// null, unless there are no elements; [`Error::TooLarge`] beyond the address space. Operations on a GPU
    /// want more, and say so: 16 bytes, of every row.
    ///
    /// ```
    /// use dropless::{Place, Rows};
    ///
    /// let theirs = vec![1.0f32, 2.0, -1.0, 3.0, 4.0];
    /// let address = theirs.as_ptr().expose_provenance() as u64;
    /// // SAFETY: two rows of two elements, three apart, in a vector that outlives the view.
    /// let view = unsafe { Rows::<f32>::from_raw(Place::Host, address, 2, 2, 3)? };
    /// assert_eq!(view.row_range(1..2)?.as_slice(), Some(&[3.0, 4.0][..]));
    /// # Ok::<(), dropless::Error>(())
    /// ```
    pub unsafe fn from_raw(place: Place, address: u64, rows: usize, cols: usize, stride: usize) -> Result<Self, Error> {
        let address = vouched_for::<T>(place, address, span::<T>(rows, cols, stride)?)?;
        let first = std::ptr::with_exposed_provenance(address);
        Ok(Rows { first, rows, cols, stride, place, mark: None, _borrow: PhantomData })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// `[rows, cols]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// Elements from one row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Where the elements live.
    pub fn place(&self) -> Place {
        self.place
    }

    /// The rows of `range`, as a view.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] if the range ends behind the last row.
    pub fn row_range(&self, range: Range<usize>) -> Result<Rows<'a, T>, Error> {
        check_range("row_range", &range, self.rows)?;
        let first = if range.is_empty() { self.first } else { self.first.wrapping_add(range.start * self.stride) };
        Ok(Rows { first, rows: range.len(), ..*self })
    }

    /// The columns of `range`, as a view.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] if the range ends behind the last column.
    pub fn col_range(&self, range: Range<usize>) -> Result<Rows<'a, T>, Error> {
        check_range("col_range", &range, self.cols)?;
        let first = if self.rows == 0 || range.is_empty() { self.first } else { self.first.wrapping_add(range.start) };
        Ok(Rows { first, cols: range.len(), ..*self })
    }

    /// The elements as one slice, where they are packed in host memory.
    pub fn as_slice(&self) -> Option<&'a [T]> {
        let packed = self.place == Place::Host && (self.stride == self.cols || self.rows <= 1);
        // SAFETY: `span` elements are valid for reading as long as the borrow; packed, they are all elements.
        packed.then(|| unsafe { std::slice::from_raw_parts(self.first, self.rows * self.cols) })
    }

    /// The elements, packed, on the host; waits for the stream's work.
    ///
    /// # Errors
    ///
    /// [`Error::Place`], [`Error::NotJoined`]; [`Error::OutOfMemory`]; [`Error::DeviceLost`] if earlier work failed.
    pub fn to_vec(&self, stream: &Stream) -> Result<Vec<T>, Error> {
        stream.outside_capture(Op::View, "a copy to the host")?;
        stream.admit(Op::View, &[("self", self.access())])?;
        let len = self.rows * self.cols;
        let mut values = Vec::new();
        values.try_reserve_exact(len).map_err(|_| Error::OutOfMemory { op: Op::View, need_bytes: (len * size_of::<T>()) as u64 })?;
        match self.place {
            _ if len == 0 => {} // however many rows there are of nothing
            Place::Host => (0..self.rows).for_each(|row| values.extend_from_slice(self.host().row(row))),
            #[cfg(feature = "cuda")]
            Place::Cuda(_) => {
                values.resize(len, T::default());
                let (runs, run) = if self.stride == self.cols { (1, len) } else { (self.rows, self.cols) };
                for (at, values) in (0..runs).zip(values.chunks_exact_mut(run.max(1))) {
                    let address = self.address() + (at * self.stride * size_of::<T>()) as u64;
                    // SAFETY: rows of this view, which its constructor checked or was promised.
                    unsafe { stream.cuda().read(Op::View, address, values)? };
                }
            }
            #[cfg(not(feature = "cuda"))]
            Place::Cuda(_) => unreachable!("a CUDA view without the feature `cuda`"),
        }
        Ok(values)
    }

    /// The same elements, whose uses `mark` remembers.
    #[cfg(feature = "cudarc")]
    pub(crate) fn marked(self, mark: &'a Mark) -> Self {
        Rows { mark: Some(mark), ..self }
    }

    /// Where the first element lies.
    #[cfg(feature = "ndarray")]
    pub(crate) fn first(&self) -> *const T {
        self.first
    }

    /// The same elements as another Rust type of their [`DType`](crate::DType).
    pub(crate) fn cast<U: Element>(self) -> Rows<'a, U> {
        assert_eq!(T::DTYPE, U::DTYPE, "elements of another type");
        let Rows { first, rows, cols, stride, place, mark, .. } = self;
        Rows { first: first.cast(), rows, cols, stride, place, mark, _borrow: PhantomData }
    }

    /// Rows `first`, `first + step`, ..., `count` of them.
    pub(crate) fn every(&self, first: usize, step: usize, count: usize) -> Rows<'a, T> {
        assert!(step > 0 && (count == 0 || first + (count - 1) * step < self.rows), "rows beyond the last");
        let start = if count == 0 { self.first } else { self.first.wrapping_add(first * self.stride) };
        // Of a single row the distance to the next may be anything.
        Rows { first: start, rows: count, stride: if count > 1 { self.stride * step } else { self.stride }, ..*self }
    }

    /// The matrix of the same shape that begins `elements` further on, in the same memory.
    pub(crate) fn at(&self, elements: usize) -> Rows<'a, T> {
        Rows { first: self.first.wrapping_add(elements), ..*self }
    }

    /// Elements from one row to the next, as kernels and the driver are told. The stride of a single row says
    /// nothing; then it is a multiple of 16 bytes.
    #[cfg(feature = "cuda")]
    pub(crate) fn pitch(&self) -> usize {
        if self.rows > 1 { self.stride } else { self.cols.next_multiple_of(16 / size_of::<T>()) }
    }

    /// The address of the first element, a device's or the host's, as `from_raw` takes it: for an engine's own
    /// kernels. What those do with it is ordered by the caller alone.
    pub fn address(&self) -> u64 {
        self.first.expose_provenance() as u64
    }

    /// Why the rows cannot be read in vectors of 16 bytes: what they would need, and what there is.
    fn misfit(&self) -> Option<(&'static str, usize)> {
        let (misfit, stride_bytes) = (self.first.addr() % 16, self.stride * size_of::<T>());
        if self.rows == 0 || self.cols == 0 {
            None
        } else if misfit != 0 {
            Some(("a first address with remainder 0 modulo 16 bytes", misfit))
        } else if self.rows > 1 && !stride_bytes.is_multiple_of(16) {
            Some(("a row stride that is a multiple of 16 bytes", stride_bytes))
        } else {
            None
        }
    }

    /// The device address of the first element, if every row begins on 16 bytes.
    #[cfg(feature = "cuda")]
    pub(crate) fn vectors(&self, op: Op, arg: &'static str) -> Result<u64, Error> {
        self.misfit().map_or(Ok(self.address()), |(need, got)| Err(Error::Layout { op, arg, need, got }))
    }

    /// For operations whose kernels read whole vectors of 16 bytes.
    pub(crate) fn vector_access(&self) -> Access<'a> {
        Access { misfit: self.misfit(), ..self.access() }
    }

    pub(crate) fn access(&self) -> Access<'a> {
        Access { place: self.place, mark: self.mark, write: false, misfit: None }
    }

    /// As rows of host memory. Only CPU backends call this, after dispatch.
    pub(crate) fn host(&self) -> HostRows<'a, T> {
        assert!(self.place == Place::Host, "a CPU backend was given device memory");
        HostRows(*self)
    }
}

impl<'a, T: Element> RowsMut<'a, T> {
    /// A view of host memory, rows packed.
    ///
    /// # Errors
    ///
    /// [`Error::Capacity`] if the slice is shorter than `rows * cols`.
    pub fn from_slice(data: &'a mut [T], rows: usize, cols: usize) -> Result<Self, Error> {
        Self::from_slice_strided(data, rows, cols, cols)
    }

    /// A view of host memory whose rows begin `stride` elements apart. The gaps are never written.
    ///
    /// # Errors
    ///
    /// [`Error::Layout`] if `stride < cols`; [`Error::Capacity`] if the slice is too short; [`Error::TooLarge`] for sizes beyond
    /// the address space, of an empty matrix too.
    pub fn from_slice_strided(data: &'a mut [T], rows: usize, cols: usize, stride: usize) -> Result<Self, Error> {
        check_span::<T>(data.len(), rows, cols, stride)?;
        Ok(RowsMut { first: data.as_mut_ptr(), rows, cols, stride, place: Place::Host, mark: None, _borrow: PhantomData })
    }

    /// A view of host bytes, in the machine's byte order.
    ///
    /// # Errors
    ///
    /// [`Error::Layout`] if the bytes are not aligned for `T`; [`Error::Capacity`] if there are too few.
    ///
    /// ```
    /// use dropless::{Bf16, Device, Float, Rows, RowsMut, glu};
    ///
    /// let (x, mut bytes) = ([Bf16::from_f32(1.0); 8], vec![0u8; 16]);
    /// let x = Rows::from_slice(&x, 1, 8)?;
    /// let mut y = RowsMut::<Bf16>::from_bytes(&mut bytes, 1, 8)?;
    /// glu::glu(&Device::cpu().stream()?, x, x, &mut y)?;
    /// assert_eq!(u16::from_ne_bytes([bytes[0], bytes[1]]), 0x3f3b); // 0.7305
    /// # Ok::<(), dropless::Error>(())
    /// ```
    pub fn from_bytes(bytes: &'a mut [u8], rows: usize, cols: usize) -> Result<Self, Error> {
        let misfit = bytes.as_ptr().addr() % align_of::<T>();
        // SAFETY: every bit pattern is a value of an `Element`, and the bytes of one are bytes.
        let (before, data, _) = unsafe { bytes.align_to_mut::<T>() };
        if !before.is_empty() {
            return Err(Error::Layout { op: Op::View, arg: "bytes", need: "the alignment of its elements", got: misfit });
        }
        Self::from_slice(data, rows, cols)
    }

    /// A view of memory that this crate does not own: a host pointer or a device address.
    ///
    /// # Safety
    ///
    /// * The `(rows - 1) * stride + cols` elements at `address` lie in one allocation at `place`; on a GPU in
    ///   memory that its primary context can reach. On the host they are initialised.
    /// * They stay valid, and nobody else reads or writes them, until the work that is given this view
    ///   completes, each launch of a graph that was captured with it included. The gaps between rows may be
    ///   used meanwhile.
    /// * Work of the caller's that used them is ordered before, by being on the same stream or by an event.
    ///
    /// # Errors
    ///
    /// As [`Rows::from_raw`].
    pub unsafe fn from_raw(place: Place, address: u64, rows: usize, cols: usize, stride: usize) -> Result<Self, Error> {
        let address = vouched_for::<T>(place, address, span::<T>(rows, cols, stride)?)?;
        let first = std::ptr::with_exposed_provenance_mut(address);
        Ok(RowsMut { first, rows, cols, stride, place, mark: None, _borrow: PhantomData })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// `[rows, cols]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// Elements from one row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Where the elements live.
    pub fn place(&self) -> Place {
        self.place
    }

    /// The same elements, whose uses `mark` remembers.
    #[cfg(feature = "cudarc")]
    pub(crate) fn marked(self, mark: &'a Mark) -> Self {
        RowsMut { mark: Some(mark), ..self }
    }

    /// The same elements, for reading.
    pub fn as_rows(&self) -> Rows<'_, T> {
        let RowsMut { first, rows, cols, stride, place, mark, .. } = *self;
        Rows { first, rows, cols, stride, place, mark, _borrow: PhantomData }
    }

    /// Overwrites all elements with `values`, row after row, in the stream's order. `values` may be reused at
    /// once; see [`Buffer::copy_from_slice`].
    ///
    /// # Errors
    ///
    /// [`Error::Layout`] if there are gaps between the rows; [`Error::Shape`] unless there are as many values
    /// as elements; [`Error::Place`], [`Error::NotJoined`]; [`Error::OutOfMemory`]; [`Error::Unsupported`]
    /// within a [capture](Stream::capture).
    ///
    /// ```
    /// use dropless::{Buffer, Device};
    ///
    /// let stream = Device::cpu().stream()?;
    /// let mut buffer = Buffer::<f32>::zeros(&stream, 6)?;
    /// buffer.rows_mut(3, 2)?.row_range(1..2)?.copy_from_slice(&stream, &[1.0, 2.0])?;
    /// assert_eq!(buffer.to_vec(&stream)?, [0.0, 0.0, 1.0, 2.0, 0.0, 0.0]);
    /// # Ok::<(), dropless::Error>(())
    /// ```
    pub fn copy_from_slice(&mut self, stream: &Stream, values: &[T]) -> Result<(), Error> {
        if self.rows > 1 && self.stride != self.cols {
            return Err(Error::Layout { op: Op::View, arg: "self", need: "no gaps between its rows", got: self.stride });
        }
        Upload::queue(stream, Op::View, &[("self", self.reborrow().upload(values)?)])
    }

    /// A copy of `values` to the elements, which have no gaps between them, to be [queued](Upload::queue).
    pub(crate) fn upload(self, values: &'a [T]) -> Result<Upload<'a>, Error> {
        debug_assert!(self.rows <= 1 || self.stride == self.cols);
        check_shape(Op::View, "values", "[rows * cols]", &[self.rows * self.cols], &[values.len()])?;
        // SAFETY: there are as many elements, which are borrowed exclusively.
        Ok(unsafe { Upload::new(self.access(), self.first, values) })
    }

    /// The same elements, for reading, as long as the memory is lent.
    pub(crate) fn into_rows(self) -> Rows<'a, T> {
        let RowsMut { first, rows, cols, stride, place, mark, .. } = self;
        Rows { first, rows, cols, stride, place, mark, _borrow: PhantomData }
    }

    /// The same view, borrowed for a shorter time.
    pub fn reborrow(&mut self) -> RowsMut<'_, T> {
        let RowsMut { first, rows, cols, stride, place, mark, .. } = *self;
        RowsMut { first, rows, cols, stride, place, mark, _borrow: PhantomData }
    }

    /// The same elements as one row, where nothing lies between the rows.
    pub(crate) fn joined(self) -> RowsMut<'a, T> {
        let len = self.rows * self.cols; // of a packed matrix within the address space
        if self.rows > 1 && self.stride == self.cols { RowsMut { rows: 1, cols: len, stride: len, ..self } } else { self }
    }

    /// The rows of `range`, as a view.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] if the range ends behind the last row.
    pub fn row_range(self, range: Range<usize>) -> Result<RowsMut<'a, T>, Error> {
        check_range("row_range", &range, self.rows)?;
        let first = if range.is_empty() { self.first } else { self.first.wrapping_add(range.start * self.stride) };
        Ok(RowsMut { first, rows: range.len(), ..self })
    }

    /// The columns of `range`, as a view.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] if the range ends behind the last column.
    pub fn col_range(self, range: Range<usize>) -> Result<RowsMut<'a, T>, Error> {
        check_range("col_range", &range, self.cols)?;
        let first = if self.rows == 0 || range.is_empty() { self.first } else { self.first.wrapping_add(range.start) };
        Ok(RowsMut { first, cols: range.len(), ..self })
    }

    /// The address of the first element, a device's or the host's, as `from_raw` takes it: for an engine's own
    /// kernels. What those do with it is ordered by the caller alone.
    pub fn address(&self) -> u64 {
        self.first.expose_provenance() as u64
    }

    /// The device address of the first element, if every row begins on 16 bytes.
    #[cfg(feature = "cuda")]
    pub(crate) fn vectors(&self, op: Op, arg: &'static str) -> Result<u64, Error> {
        self.as_rows().vectors(op, arg)
    }

    pub(crate) fn access(&self) -> Access<'a> {
        Access { place: self.place, mark: self.mark, write: true, misfit: None }
    }

    /// For operations whose kernels write whole vectors of 16 bytes.
    pub(crate) fn vector_access(&self) -> Access<'a> {
        Access { misfit: self.as_rows().misfit(), ..self.access() }
    }

    /// As rows of host memory. Only CPU backends call this, after dispatch.
    pub(crate) fn host(&mut self) -> HostRowsMut<'_, T> {
        assert!(self.place == Place::Host, "a CPU backend was given device memory");
        HostRowsMut(self.reborrow())
    }
}

pub(crate) fn check_range(arg: &'static str, range: &Range<usize>, bound: usize) -> Result<(), Error> {
    if range.start <= range.end && range.end <= bound {
        return Ok(());
    }
    Err(Error::Index { op: Op::View, arg, at: range.start, got: range.end as u64, bound: bound as u64 + 1 })
}

impl<T: Element> Buffer<T> {
    /// The first `rows * cols` elements as a matrix.
    ///
    /// # Errors
    ///
    /// [`Error::Capacity`] if the buffer has fewer.
    pub fn rows(&self, rows: usize, cols: usize) -> Result<Rows<'_, T>, Error> {
        check_span::<T>(self.len(), rows, cols, cols)?;
        let (first, place, mark) = (self.address().cast_const(), self.place(), Some(self.mark()));
        Ok(Rows { first, rows, cols, stride: cols, place, mark, _borrow: PhantomData })
    }

    /// The first `rows * cols` elements as a matrix, for writing.
    ///
    /// # Errors
    ///
    /// [`Error::Capacity`] if the buffer has fewer.
    pub fn rows_mut(&mut self, rows: usize, cols: usize) -> Result<RowsMut<'_, T>, Error> {
        check_span::<T>(self.len(), rows, cols, cols)?;
        let (first, place, mark) = (self.address(), self.place(), Some(self.mark()));
        Ok(RowsMut { first, rows, cols, stride: cols, place, mark, _borrow: PhantomData })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    #[test]
    fn views_refuse_what_does_not_fit() {
        let data = [0.0f32; 11];
        assert!(Rows::from_slice(&data, 3, 4).is_err());
        assert!(Rows::from_slice_strided(&data, 3, 3, 4).is_ok()); // the last row needs no gap behind it
        assert!(Rows::from_slice_strided(&data, 2, 4, 3).is_err());
        assert!(Rows::from_slice(&data, usize::MAX, usize::MAX).is_err());
        assert!(Rows::from_slice(&data, 0, 4).is_ok());
        let view = Rows::from_slice(&data, 2, 5).unwrap();
        assert!(view.row_range(1..3).is_err());
        assert_eq!(view.row_range(2..2).unwrap().rows(), 0);
    }

    /// A part of strided rows begins at a row of the whole.
    #[test]
    fn parts_keep_the_stride() {
        let stream = Device::cpu().stream().unwrap();
        let mut data = [0u32, 1, 2, 3, 4, 5, 6, 7, 8, 9];
        let view = Rows::from_slice_strided(&data, 3, 2, 4).unwrap();
        assert_eq!(view.row_range(1..3).unwrap().to_vec(&stream).unwrap(), [4, 5, 8, 9]);
        let view = RowsMut::from_slice_strided(&mut data, 3, 2, 4).unwrap();
        assert_eq!(view.row_range(1..3).unwrap().as_rows().to_vec(&stream).unwrap(), [4, 5, 8, 9]);
    }

    #[test]
    fn values_fill_a_view_without_gaps() {
        let (stream, mut data) = (Device::cpu().stream().unwrap(), [9u32; 8]);
        let mut view = RowsMut::from_slice_strided(&mut data, 2, 3, 4).unwrap();
        assert!(matches!(view.copy_from_slice(&stream, &[1; 6]), Err(Error::Layout { got: 4, .. })));
        let mut row = view.row_range(1..2).unwrap();
        assert!(matches!(row.copy_from_slice(&stream, &[1; 4]), Err(Error::Shape { .. })));
        row.copy_from_slice(&stream, &[1, 2, 3]).unwrap();
        assert_eq!(data, [9, 9, 9, 9, 1, 2, 3, 9]);
    }

    #[test]
    fn views_of_nothing_stay_within_the_address_space() {
        let (none, stream) = ([0.0f32; 0], Device::cpu().stream().unwrap());
        assert!(matches!(Rows::from_slice(&none, usize::MAX, 0), Err(Error::TooLarge { .. })));
        assert!(matches!(Rows::from_slice(&none, 0, usize::MAX), Err(Error::TooLarge { .. })));
        assert!(matches!(Rows::from_slice_strided(&none, 1 << 31, 0, 1 << 31), Err(Error::TooLarge { .. })));
        assert!(matches!(Rows::from_slice_strided(&[0.0f32], 1, 1, 1 << 62), Err(Error::TooLarge { .. })));
        let view = Rows::from_slice_strided(&none, 5, 0, 1 << 20).unwrap();
        assert!(view.host().row(4).is_empty());
        assert_eq!(view.row_range(3..5).unwrap().as_slice(), None);
        assert!(view.row_range(4..5).unwrap().as_slice().unwrap().is_empty());
        // As many rows of nothing as there are: visited, they would take years.
        let all = isize::MAX as usize / size_of::<f32>();
        let mut view = RowsMut::from_slice(&mut [], all, 0).unwrap();
        for_each_row(&stream, view.host(), 1, |_, _: &mut [f32]| unreachable!("a row without elements"));
    }

    #[test]
    fn an_empty_foreign_matrix_may_lie_at_null() {
        // SAFETY: no elements.
        let (x, mut y) = unsafe {
            let x = Rows::<f32>::from_raw(Place::Host, 0, 3, 0, 0).unwrap();
            (x, RowsMut::<f32>::from_raw(Place::Host, 0, 0, 3, 3).unwrap())
        };
        assert!(x.as_slice().unwrap().is_empty() && x.host().row(2).is_empty());
        assert!(y.as_rows().as_slice().unwrap().is_empty());
        assert_eq!(y.host().rows(), 0);
    }

    /// What can be seen of an address is looked at, of each type and place.
    #[test]
    fn foreign_addresses_are_checked() {
        // SAFETY: never read.
        let text = |place, address| unsafe {
            let [x, y] = [Rows::<f32>::from_raw(place, address, 1, 2, 2).err(), RowsMut::<f32>::from_raw(place, address, 1, 2, 2).err()];
            assert_eq!(x, y);
            x.map(|error| error.to_string())
        };
        for place in [Place::Host, Place::Cuda(0)] {
            assert_eq!(text(place, 0).unwrap(), "view: `address` must be an address, not null, got 0");
            let misfit = "view: `address` must have the alignment of its elements, got 2";
            assert_eq!(text(place, 0x7002).unwrap(), misfit);
            assert_eq!(text(place, 0x7004), None);
        }
    }

    #[test]
    fn misaligned_bytes_are_refused() {
        let mut words = [0u32; 4];
        {
            // SAFETY: the bytes of an array.
            let bytes = unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<u8>(), 16) };
            RowsMut::<f32>::from_bytes(bytes, 2, 2).unwrap().host().row_mut(1).fill(1.5);
            assert!(matches!(RowsMut::<f32>::from_bytes(&mut bytes[1..], 1, 3), Err(Error::Layout { got: 1, .. })));
            assert!(matches!(RowsMut::<f32>::from_bytes(&mut bytes[3..4], 1, 1), Err(Error::Layout { got: 3, .. })));
            assert!(matches!(RowsMut::<f32>::from_bytes(&mut bytes[..8], 1, 3), Err(Error::Capacity { need: 3, have: 2, .. })));
        }
        assert_eq!(words, [0, 0, 1.5f32.to_bits(), 1.5f32.to_bits()]);
        // SAFETY: the bytes of an array.
        let bytes = unsafe { std::slice::from_raw_parts(words.as_ptr().cast::<u8>(), 16) };
        assert!(Rows::<f32>::from_bytes(bytes, 1, 4).is_ok());
        assert!(matches!(Rows::<f32>::from_bytes(&bytes[1..], 1, 3), Err(Error::Layout { .. })));
    }
}
