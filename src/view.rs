//! Views: borrowed matrices that know where their bytes live.
//!
//! `Rows` and `RowsMut` are what operations take. They are made from slices, from buffers, or, by an engine that owns its
//! memory, from raw addresses. Behind dispatch a CPU backend sees them as `HostRows` and `HostRowsMut`, whose rows
//! are ordinary slices; a gap between rows (stride > columns) is never touched. Work is shared among threads by
//! rows or by tiles, and this file is where their disjointness is argued.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ops::Range;

use crate::device::{Access, Buffer, Mark, Stream, Workspace};
use crate::dtype::Element;
use crate::error::{Error, Op, Place};
use crate::shape::{checked_bytes, round_up};

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
            return Err(Error::Layout { op: Op::View, arg: "bytes", need: "the alignment of its elements", got: before.len() });
        }
        Self::from_slice(data, rows, cols)
    }

    /// A view of memory that this crate does not own: a host pointer or a device address.
    ///
    /// # Safety
    ///
    /// * The `(rows - 1) * stride + cols` elements at `address` lie in one allocation at `place`, aligned for `T`.
    /// * They are initialised, stay valid and are not written, until the work that is given this view completes.
    ///
    /// # Errors
    ///
    /// [`Error::Layout`] if `stride < cols`; [`Error::TooLarge`] beyond the address space.
    pub unsafe fn from_raw(place: Place, address: u64, rows: usize, cols: usize, stride: usize) -> Result<Self, Error> {
        let nothing = span::<T>(rows, cols, stride)? == 0 && place == Place::Host; // may lie at null, which no slice may
        let first = if nothing { std::ptr::dangling() } else { std::ptr::with_exposed_provenance(address as usize) };
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

    /// The address of the first element, a device's or the host's.
    pub(crate) fn address(&self) -> u64 {
        self.first.expose_provenance() as u64
    }

    /// Why the rows cannot be read in vectors of 16 bytes: what they would need, and what there is.
    fn misfit(&self) -> Option<(&'static str, usize)> {
        let (misfit, stride_bytes) = (self.first.addr() % 16, self.stride * size_of::<T>());
        if self.rows == 0 || self.cols == 0 {
            None
        } else if misfit != 0 {
            Some(("a first address that is a multiple of 16 bytes, remainder 0", misfit))
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
        assert_eq!(self.place, Place::Host, "a CPU backend was given device memory");
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

    /// A view of memory that this crate does not own: a host pointer or a device address.
    ///
    /// # Safety
    ///
    /// * The `(rows - 1) * stride + cols` elements at `address` lie in one allocation at `place`, aligned for `T`.
    /// * On the host they are initialised. They stay valid, and nobody else reads or writes them, until the work that is
    ///   given this view completes.
    ///
    /// # Errors
    ///
    /// [`Error::Layout`] if `stride < cols`; [`Error::TooLarge`] beyond the address space.
    pub unsafe fn from_raw(place: Place, address: u64, rows: usize, cols: usize, stride: usize) -> Result<Self, Error> {
        let nothing = span::<T>(rows, cols, stride)? == 0 && place == Place::Host; // may lie at null, which no slice may
        let first = if nothing { std::ptr::dangling_mut() } else { std::ptr::with_exposed_provenance_mut(address as usize) };
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

    /// The same view, borrowed for a shorter time.
    pub fn reborrow(&mut self) -> RowsMut<'_, T> {
        let RowsMut { first, rows, cols, stride, place, mark, .. } = *self;
        RowsMut { first, rows, cols, stride, place, mark, _borrow: PhantomData }
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

    /// The device address of the first element.
    #[cfg(feature = "cuda")]
    pub(crate) fn address(&self) -> u64 {
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
        assert_eq!(self.place, Place::Host, "a CPU backend was given device memory");
        HostRowsMut(self.reborrow())
    }
}

fn check_range(arg: &'static str, range: &Range<usize>, bound: usize) -> Result<(), Error> {
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

impl Workspace {
    /// Bytes that [`Carver::rows`] takes for a matrix.
    pub(crate) fn bytes_for<T: Element>(op: Op, rows: usize, cols: usize) -> Result<usize, Error> {
        Ok(round_up(checked_bytes(op, "workspace bytes", &[rows, cols], size_of::<T>())?, 256))
    }

    /// Starts handing out parts of the workspace; all parts are free again when their borrow ends.
    pub(crate) fn carve(&mut self, op: Op) -> Carver<'_> {
        Carver { op, next: self.words.address().cast(), left_bytes: self.bytes(), place: self.words.place(), mark: self.words.mark() }
    }
}

/// Hands out disjoint parts of a workspace, each aligned to 256 bytes, in the order of the calls.
pub(crate) struct Carver<'a> {
    op: Op,
    next: *mut u8,
    left_bytes: usize,
    place: Place,
    mark: &'a Mark,
}

impl<'a> Carver<'a> {
    /// The next `rows * cols` elements. Their contents are whatever was there.
    pub(crate) fn rows<T: Element>(&mut self, rows: usize, cols: usize) -> Result<RowsMut<'a, T>, Error> {
        let need = Workspace::bytes_for::<T>(self.op, rows, cols)?;
        // The last part needs no padding behind it.
        if rows * cols * size_of::<T>() > self.left_bytes {
            return Err(Error::Capacity { op: self.op, what: "workspace bytes", need, have: self.left_bytes });
        }
        let first = self.next.cast::<T>();
        let taken = need.min(self.left_bytes);
        self.next = self.next.wrapping_add(taken);
        self.left_bytes -= taken;
        Ok(RowsMut { first, rows, cols, stride: cols, place: self.place, mark: Some(self.mark), _borrow: PhantomData })
    }
}

/// A matrix in host memory, for reading.
#[derive(Clone, Copy)]
pub(crate) struct HostRows<'a, T>(Rows<'a, T>);

impl<'a, T: Element> HostRows<'a, T> {
    pub(crate) fn rows(&self) -> usize {
        self.0.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.0.cols
    }

    pub(crate) fn row(&self, row: usize) -> &'a [T] {
        assert!(row < self.0.rows, "row {row} of {}", self.0.rows);
        // SAFETY: the row lies within the span that the constructor checked or was promised; one without columns may begin anywhere.
        unsafe { std::slice::from_raw_parts(self.0.first.wrapping_add(row * self.0.stride), self.0.cols) }
    }

    /// `len` elements from the one on that lies `at` elements behind the first.
    ///
    /// # Safety
    ///
    /// They lie in rows of the matrix, not in a gap between two.
    pub(crate) unsafe fn run(&self, at: usize, len: usize) -> &'a [T] {
        // SAFETY: the caller's duty; the span was checked or promised at construction.
        unsafe { std::slice::from_raw_parts(self.0.first.wrapping_add(at), len) }
    }
}

/// A matrix in host memory, for writing.
pub(crate) struct HostRowsMut<'a, T>(RowsMut<'a, T>);

impl<'a, T: Element> HostRowsMut<'a, T> {
    #[cfg(test)]
    pub(crate) fn rows(&self) -> usize {
        self.0.rows
    }

    pub(crate) fn row_mut(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.0.rows, "row {row} of {}", self.0.rows);
        // SAFETY: inside the matrix, and `self` is borrowed exclusively.
        unsafe { self.row_unchecked(row, 0..self.0.cols) }
    }

    #[allow(clippy::mut_from_ref)] // disjointness is the caller's duty
    /// # Safety
    ///
    /// The range lies in the matrix, and no other slice of these elements is alive.
    unsafe fn row_unchecked(&self, row: usize, cols: Range<usize>) -> &'a mut [T] {
        // SAFETY: the caller's duty; the span was checked or promised at construction.
        unsafe { std::slice::from_raw_parts_mut(self.0.first.wrapping_add(row * self.0.stride + cols.start), cols.len()) }
    }

    #[allow(clippy::mut_from_ref)] // disjointness is the caller's duty
    /// `len` elements from the one on that lies `at` elements behind the first.
    ///
    /// # Safety
    ///
    /// They lie in rows of the matrix, not in a gap between two, and no other slice of them is alive.
    pub(crate) unsafe fn run(&self, at: usize, len: usize) -> &'a mut [T] {
        // SAFETY: the caller's duty; the span was checked or promised at construction.
        unsafe { std::slice::from_raw_parts_mut(self.0.first.wrapping_add(at), len) }
    }

    /// Calls `f` once for every tile of `tiling`, on whatever threads are free.
    pub(crate) fn for_each_tile(self, stream: &Stream, tiling: &Tiling<'_>, f: impl Fn(TileMut<'_, T>) + Sync) {
        assert!(tiling.fits(self.0.dims()), "a tiling of another matrix");
        stream.workers().run(tiling.len(), |i| {
            let Tile { group, rows, cols } = tiling.tile(i);
            // Different `i` give disjoint rectangles (see `Tiling`), and `run` calls each `i` once.
            f(TileMut { matrix: &self, group, rows, cols });
        });
    }
}

/// Outputs that are written row by row: a matrix, or a tuple of matrices with the same number of rows.
pub(crate) trait RowOutputs: Sync {
    /// One row of each.
    type Row;
    /// Rows that all members have.
    fn num_rows(&self) -> usize;
    /// # Safety
    /// `row < num_rows()`, and each row is alive at most once.
    unsafe fn row(&self, row: usize) -> Self::Row;
}

impl<'a, T: Element> RowOutputs for HostRowsMut<'a, T> {
    type Row = &'a mut [T];
    fn num_rows(&self) -> usize {
        if self.0.cols == 0 { 0 } else { self.0.rows } // of nothing there may be more rows than one can count
    }
    unsafe fn row(&self, row: usize) -> &'a mut [T] {
        // SAFETY: the caller's duty.
        unsafe { self.row_unchecked(row, 0..self.0.cols) }
    }
}

impl<A: RowOutputs, B: RowOutputs> RowOutputs for (A, B) {
    type Row = (A::Row, B::Row);
    fn num_rows(&self) -> usize {
        self.0.num_rows().min(self.1.num_rows())
    }
    unsafe fn row(&self, row: usize) -> Self::Row {
        // SAFETY: the caller's duty.
        unsafe { (self.0.row(row), self.1.row(row)) }
    }
}

/// Rows of `cols` elements that make a task worth handing to a thread, where an element costs a few operations.
pub(crate) fn rows_per_task(cols: usize) -> usize {
    const TASK_ELEMS: usize = 1 << 16; // tens of microseconds, several times what waking a thread costs
    (TASK_ELEMS / cols.max(1)).max(1)
}

/// Calls `f(row, outputs at that row)` once for every row, on whatever threads are free; a task is `rows_per_task` rows.
pub(crate) fn for_each_row<O: RowOutputs>(stream: &Stream, outputs: O, rows_per_task: usize, f: impl Fn(usize, O::Row) + Sync) {
    let rows = outputs.num_rows();
    stream.workers().run(rows.div_ceil(rows_per_task), |task| {
        for row in task * rows_per_task..rows.min((task + 1) * rows_per_task) {
            // SAFETY: tasks cover disjoint rows, and `run` calls each task once.
            f(row, unsafe { outputs.row(row) });
        }
    });
}

/// A rectangle of a matrix, exclusively held by one task.
pub(crate) struct TileMut<'a, T> {
    matrix: &'a HostRowsMut<'a, T>,
    /// The group of rows it belongs to.
    pub(crate) group: usize,
    /// Its rows and columns in the matrix.
    pub(crate) rows: Range<usize>,
    pub(crate) cols: Range<usize>,
}

impl<T: Element> TileMut<'_, T> {
    /// Row `row` of the tile (counted from its first), cut to its columns.
    pub(crate) fn row_mut(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows.len(), "row {row} of a tile of {}", self.rows.len());
        // SAFETY: the tile lies in the matrix and is this task's alone; `self` is borrowed exclusively.
        unsafe { self.matrix.row_unchecked(self.rows.start + row, self.cols.clone()) }
    }
}

/// A matrix cut into disjoint tiles, none of which crosses from one group of rows to the next; or likewise with columns.
///
/// Tiles are numbered group by group; within a group, rows vary fastest, so that neighbours share columns. In what follows and for
/// groups of columns, read column for row and row for column.
pub(crate) struct Tiling<'a> {
    /// Where each group begins, and the last one ends; non-decreasing.
    offsets: &'a [u32],
    cols: usize,
    row_block: usize,
    col_block: usize,
    of_columns: bool,
}

/// One tile's place.
pub(crate) struct Tile {
    pub(crate) group: usize,
    pub(crate) rows: Range<usize>,
    pub(crate) cols: Range<usize>,
}

impl<'a> Tiling<'a> {
    /// `offsets` as in `ExpertRows`: group `g` owns the rows `offsets[g]..offsets[g + 1]`. A tile has at most `row_block` rows and
    /// `col_block` columns.
    pub(crate) fn new(offsets: &'a [u32], cols: usize, row_block: usize, col_block: usize) -> Tiling<'a> {
        assert!(row_block > 0 && col_block > 0 && !offsets.is_empty());
        assert!(offsets.is_sorted(), "offsets decrease"); // what makes the tiles disjoint
        Tiling { offsets, cols, row_block, col_block, of_columns: false }
    }

    /// As `new`, for groups of columns.
    pub(crate) fn of_columns(offsets: &'a [u32], rows: usize, col_block: usize, row_block: usize) -> Tiling<'a> {
        Tiling { of_columns: true, ..Tiling::new(offsets, rows, col_block, row_block) }
    }

    /// Whether its tiles lie in a matrix of that size.
    fn fits(&self, [rows, cols]: [usize; 2]) -> bool {
        let [rows, cols] = if self.of_columns { [cols, rows] } else { [rows, cols] };
        self.rows() <= rows && self.cols <= cols
    }

    fn rows(&self) -> usize {
        self.offsets[self.offsets.len() - 1] as usize
    }

    fn group(&self, group: usize) -> Range<usize> {
        self.offsets[group] as usize..self.offsets[group + 1] as usize
    }

    fn tiles_in(&self, group: usize) -> usize {
        self.group(group).len().div_ceil(self.row_block) * self.cols.div_ceil(self.col_block)
    }

    /// Number of tiles.
    pub(crate) fn len(&self) -> usize {
        (0..self.offsets.len() - 1).map(|group| self.tiles_in(group)).sum()
    }

    /// Tile `index < len()`.
    pub(crate) fn tile(&self, mut index: usize) -> Tile {
        let mut group = 0;
        while index >= self.tiles_in(group) {
            index -= self.tiles_in(group);
            group += 1;
        }
        let all = self.group(group);
        // Rows are cut evenly: a block of one row would cost almost as much as a full one.
        let row_blocks = all.len().div_ceil(self.row_block);
        let cut = |i: usize| all.start + all.len() * i / row_blocks;
        let (row, col) = (index % row_blocks, index / row_blocks * self.col_block);
        let (rows, cols) = (cut(row)..cut(row + 1), col..self.cols.min(col + self.col_block));
        if self.of_columns { Tile { group, rows: cols, cols: rows } } else { Tile { group, rows, cols } }
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

    #[test]
    fn misaligned_bytes_are_refused() {
        let words = [0u32; 4];
        // SAFETY: the bytes of an array.
        let bytes = unsafe { std::slice::from_raw_parts(words.as_ptr().cast::<u8>(), 16) };
        assert!(Rows::<f32>::from_bytes(bytes, 1, 4).is_ok());
        assert!(matches!(Rows::<f32>::from_bytes(&bytes[1..], 1, 3), Err(Error::Layout { .. })));
    }

    #[test]
    fn tiles_cover_every_element_once() {
        let device = Device::cpu_with_threads(3).unwrap();
        let stream = device.stream().unwrap();
        for (offsets, cols) in [(vec![0u32, 5, 5, 18], 7), (vec![0, 0, 0], 4), (vec![0, 1], 1), (vec![0, 3, 9], 0)] {
            let rows = *offsets.last().unwrap() as usize;
            let mut counts = vec![0u32; rows * (cols + 2)];
            let mut view = RowsMut::from_slice_strided(&mut counts, rows, cols, cols + 2).unwrap();
            let tiling = Tiling::new(&offsets, cols, 4, 3);
            view.host().for_each_tile(&stream, &tiling, |mut tile| {
                assert!(offsets[tile.group] as usize <= tile.rows.start && tile.rows.end <= offsets[tile.group + 1] as usize);
                (0..tile.rows.len()).for_each(|row| tile.row_mut(row).iter_mut().for_each(|count| *count += 1));
            });
            let expect = |i: usize| u32::from(i % (cols + 2) < cols);
            assert!(counts.iter().enumerate().all(|(i, &count)| count == expect(i)), "{offsets:?} x {cols}");

            let mut counts = vec![0u32; rows * cols];
            let tiling = Tiling::of_columns(&offsets, cols, 4, 3);
            RowsMut::from_slice(&mut counts, cols, rows).unwrap().host().for_each_tile(&stream, &tiling, |mut tile| {
                assert!(offsets[tile.group] as usize <= tile.cols.start && tile.cols.end <= offsets[tile.group + 1] as usize);
                (0..tile.rows.len()).for_each(|row| tile.row_mut(row).iter_mut().for_each(|count| *count += 1));
            });
            assert!(counts.iter().all(|count| *count == 1), "{cols} x {offsets:?}");
        }
    }

    #[test]
    fn a_workspace_runs_out_with_numbers() {
        let stream = Device::cpu().stream().unwrap();
        let mut workspace = Workspace::new(&stream, 512).unwrap();
        let mut carver = workspace.carve(Op::Moe);
        carver.rows::<f32>(1, 3).unwrap();
        carver.rows::<f32>(4, 16).unwrap();
        assert_eq!(carver.rows::<f32>(1, 1).err().unwrap(), Error::Capacity { op: Op::Moe, what: "workspace bytes", need: 256, have: 0 });
    }
}
