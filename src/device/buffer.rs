//! Owned memory on a device.
#![allow(unsafe_code)] // host memory seen as a slice of elements

use std::marker::PhantomData;
#[cfg(feature = "cuda")]
use std::sync::Arc;

use super::cpu::HostMemory;
use super::mark::{Access, Mark};
use super::{Backend, Stream};
use crate::dtype::Element;
use crate::error::{Error, Op, Place, check_shape};
use crate::shape::checked_bytes;

/// Owned, zero-initialised memory on a device. It is freed in stream order: after all work that was queued on it.
///
/// On a GPU it remembers which streams used it, and an operation on another one is refused until that stream has
/// [joined](Stream::join) the earlier ones.
pub struct Buffer<T> {
    memory: Memory,
    len: usize,
    mark: Mark,
    _elements: PhantomData<T>,
}

enum Memory {
    Host(HostMemory),
    #[cfg(feature = "cuda")]
    Cuda {
        memory: super::cuda::CudaMemory,
        home: Arc<super::stream::Timeline>,
    },
}

impl<T: Element> Buffer<T> {
    /// `len` zeros on the stream's device. On the CPU, pages are committed when first written, or by [`commit`](Buffer::commit).
    ///
    /// # Errors
    ///
    /// [`Error::TooLarge`], [`Error::OutOfMemory`]; [`Error::Unsupported`] within a [capture](Stream::capture).
    pub fn zeros(stream: &Stream, len: usize) -> Result<Buffer<T>, Error> {
        stream.outside_capture(Op::Buffer, "a new buffer")?;
        let bytes = checked_bytes(Op::Buffer, "bytes", &[len], size_of::<T>())?;
        let memory = match &stream.device().0 {
            Backend::Cpu(_) => Memory::Host(HostMemory::zeroed(bytes)?),
            #[cfg(feature = "cuda")]
            Backend::Cuda(_) => {
                Memory::Cuda { memory: super::cuda::CudaMemory::zeroed(stream.cuda(), bytes)?, home: stream.timeline.clone() }
            }
        };
        let buffer = Buffer { memory, len, mark: Mark::of(stream.device()), _elements: PhantomData };
        stream.admit(Op::Buffer, &[("self", buffer.access(true))])?;
        Ok(buffer)
    }

    /// Has the system provide all memory now, rather than page by page to the operation that first writes there: that costs more than
    /// the writes. On a GPU memory is there from the beginning, and this does nothing.
    pub fn commit(&mut self) {
        match &mut self.memory {
            Memory::Host(host) => host.commit(),
            #[cfg(feature = "cuda")]
            Memory::Cuda { .. } => {}
        }
    }

    /// A buffer with a copy of `values`.
    ///
    /// # Errors
    ///
    /// As [`Buffer::zeros`].
    pub fn from_slice(stream: &Stream, values: &[T]) -> Result<Buffer<T>, Error> {
        let mut buffer = Buffer::zeros(stream, values.len())?;
        buffer.copy_from_slice(stream, values)?;
        Ok(buffer)
    }

    /// Overwrites the first `values.len()` elements, in the stream's order. `values` may be reused at once.
    ///
    /// On a GPU the values pass through pinned memory, and the host waits for no earlier work, unless tens of megabytes are on their
    /// way already.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if `values` is longer than the buffer; [`Error::Place`], [`Error::NotJoined`]; [`Error::OutOfMemory`];
    /// [`Error::Unsupported`] within a [capture](Stream::capture).
    pub fn copy_from_slice(&mut self, stream: &Stream, values: &[T]) -> Result<(), Error> {
        Upload::queue(stream, Op::Buffer, &[("self", self.upload(values)?)])
    }

    /// A copy of `values` to the first elements, to be [queued](Upload::queue).
    pub(crate) fn upload<'a>(&'a mut self, values: &'a [T]) -> Result<Upload<'a>, Error> {
        if values.len() > self.len {
            return Err(Error::shape(Op::Buffer, "values", "[<= len]", &[self.len], &[values.len()]));
        }
        // SAFETY: there are as many elements, which are borrowed exclusively.
        Ok(unsafe { Upload::new(self.access(true), self.address(), values) })
    }

    /// Copies the first `values.len()` elements to the host, waiting for the stream's work.
    ///
    /// # Errors
    ///
    /// As [`Buffer::copy_from_slice`]; [`Error::DeviceLost`] if earlier work failed.
    pub fn copy_to_slice(&self, stream: &Stream, values: &mut [T]) -> Result<(), Error> {
        stream.outside_capture(Op::Buffer, "a copy to the host")?;
        if values.len() > self.len {
            return Err(Error::shape(Op::Buffer, "values", "[<= len]", &[self.len], &[values.len()]));
        }
        stream.admit(Op::Buffer, &[("self", self.access(false))])?;
        match &self.memory {
            // SAFETY: `self.len` elements were allocated and initialised, and nobody writes while `self` is borrowed.
            Memory::Host(host) => unsafe { values.as_mut_ptr().copy_from_nonoverlapping(host.as_ptr().cast::<T>(), values.len()) },
            #[cfg(feature = "cuda")]
            Memory::Cuda { memory, .. } => memory.read(stream.cuda(), values)?,
        }
        Ok(())
    }

    /// All elements, on the host.
    ///
    /// # Errors
    ///
    /// As [`Buffer::copy_to_slice`].
    pub fn to_vec(&self, stream: &Stream) -> Result<Vec<T>, Error> {
        let mut values = vec![T::default(); self.len];
        self.copy_to_slice(stream, &mut values)?;
        Ok(values)
    }

    /// The elements in place, where the buffer lives in host memory.
    pub fn as_slice(&self) -> Option<&[T]> {
        match &self.memory {
            // SAFETY: `self.len` elements were allocated and initialised; the borrow of `self` keeps writers out.
            Memory::Host(host) => Some(unsafe { std::slice::from_raw_parts(host.as_ptr().cast(), self.len) }),
            #[cfg(feature = "cuda")]
            Memory::Cuda { .. } => None,
        }
    }

    /// The elements in place, for writing, where the buffer lives in host memory.
    pub fn as_mut_slice(&mut self) -> Option<&mut [T]> {
        match &self.memory {
            // SAFETY: as in `as_slice`, and `self` is borrowed exclusively.
            Memory::Host(host) => Some(unsafe { std::slice::from_raw_parts_mut(host.as_ptr().cast(), self.len) }),
            #[cfg(feature = "cuda")]
            Memory::Cuda { .. } => None,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for a buffer without elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the elements live.
    pub fn place(&self) -> Place {
        match &self.memory {
            Memory::Host(_) => Place::Host,
            #[cfg(feature = "cuda")]
            Memory::Cuda { memory, .. } => memory.place(),
        }
    }

    /// The address of the first element, of whichever kind the place has.
    pub(crate) fn address(&self) -> *mut T {
        match &self.memory {
            Memory::Host(host) => host.as_ptr().cast(),
            #[cfg(feature = "cuda")]
            Memory::Cuda { memory, .. } => memory.address() as usize as *mut T,
        }
    }

    pub(crate) fn mark(&self) -> &Mark {
        &self.mark
    }

    pub(crate) fn access(&self, write: bool) -> Access<'_> {
        Access { place: self.place(), mark: Some(&self.mark), write, misfit: None }
    }

    /// Refuses a buffer with fewer than `need` elements.
    pub(crate) fn check_len(&self, op: Op, arg: &'static str, want: &'static str, need: usize) -> Result<(), Error> {
        if self.len >= need { Ok(()) } else { check_shape(op, arg, want, &[need], &[self.len]) }
    }
}

/// A copy from the host to elements that it borrows.
pub(crate) struct Upload<'a> {
    access: Access<'a>,
    target: *mut u8,
    bytes: &'a [u8],
}

impl<'a> Upload<'a> {
    /// # Safety
    ///
    /// `access` is of the memory at `target`, which has as many elements as there are values, borrowed
    /// exclusively for `'a`.
    pub(crate) unsafe fn new<T: Element>(access: Access<'a>, target: *mut T, values: &'a [T]) -> Upload<'a> {
        // SAFETY: elements are numbers without padding, so all of their bytes are initialised.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) };
        Upload { access, target: target.cast(), bytes }
    }

    pub(crate) fn access(&self) -> Access<'a> {
        self.access
    }

    /// Queues some copies, all or none.
    pub(crate) fn queue(stream: &Stream, op: Op, uploads: &[(&'static str, Upload<'_>)]) -> Result<(), Error> {
        Upload::queue_or(stream, op, uploads, || ())
    }

    /// [`queue`](Upload::queue), which calls `torn` where the driver may have taken some of the copies and not the others.
    pub(crate) fn queue_or(stream: &Stream, op: Op, uploads: &[(&'static str, Upload<'_>)], torn: impl FnOnce()) -> Result<(), Error> {
        stream.outside_capture(op, "a copy from the host")?;
        let accesses: Vec<_> = uploads.iter().map(|(arg, upload)| (*arg, upload.access)).collect();
        stream.admit(op, &accesses)?;
        match stream.place() {
            Place::Host => uploads.iter().for_each(|(_, Upload { target, bytes, .. })| {
                // SAFETY: the target has as many bytes, and is borrowed exclusively.
                unsafe { target.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) }
            }),
            #[cfg(feature = "cuda")]
            Place::Cuda(_) => {
                let copies: Vec<_> = uploads.iter().map(|(_, upload)| (upload.target.addr() as u64, upload.bytes)).collect();
                // SAFETY: as above; buffers are freed in stream order.
                unsafe { stream.cuda().write(op, &copies).inspect_err(|_| torn())? };
            }
            #[cfg(not(feature = "cuda"))]
            Place::Cuda(_) => {
                let _ = torn;
                unreachable!("a CUDA stream without the feature `cuda`")
            }
        }
        Ok(())
    }
}

#[cfg(feature = "cuda")]
impl<T> Drop for Buffer<T> {
    fn drop(&mut self) {
        // Leaked where nothing could wait, rather than freed under work that may still run.
        if let Memory::Cuda { memory, home } = &mut self.memory
            && self.mark.settle(home)
            && let Some(stream) = &home.cuda
        {
            memory.free(stream);
        }
    }
}

impl<T: Element> std::fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer<{}>({} elements on {})", T::DTYPE.name(), self.len, self.place())
    }
}
