//! Scratch memory lent to operations, so that none of them allocates.
#![allow(unsafe_code)] // memory that the caller vouches for

use std::marker::PhantomData;

use super::cpu::ALIGN_BYTES;
use super::mark::{Access, Mark};
use super::{Buffer, Stream};
use crate::error::{Error, Op, Place};

/// Scratch for operations that need some: sized once from a plan, used by one stream at a time. Its memory is
/// its own ([`new`](Workspace::new)) or the caller's ([`from_slice`](Workspace::from_slice),
/// [`from_raw`](Workspace::from_raw)).
///
/// What an operation leaves in it is undefined.
///
/// ```
/// use dropless::{Device, Place, Workspace};
///
/// let stream = Device::cpu().stream()?;
/// let own = Workspace::new(&stream, 4096)?;
/// let mut arena = vec![0u8; 4096 + 255];
/// let lent = Workspace::from_slice(&mut arena);
/// assert!(own.bytes() == 4096 && lent.bytes() >= 4096 && lent.place() == Place::Host);
/// # Ok::<(), dropless::Error>(())
/// ```
#[derive(Debug)]
pub struct Workspace<'a>(Memory<'a>);

#[derive(Debug)]
enum Memory<'a> {
    Own(Buffer<u32>),
    Lent { place: Place, first: *mut u8, bytes: usize, _borrow: PhantomData<&'a mut [u8]> },
}

// SAFETY: bytes that are owned or exclusively borrowed; device addresses are numbers.
unsafe impl Send for Workspace<'_> {}
// SAFETY: a shared reference to it tells its place and size.
unsafe impl Sync for Workspace<'_> {}

impl Workspace<'static> {
    /// A workspace of at least `bytes`, aligned to 256, all of it [committed](Buffer::commit): on a CPU ask
    /// for no more than fits in memory. On a GPU it comes from the default memory pool, in the order of
    /// `stream`.
    ///
    /// # Errors
    ///
    /// [`Error::TooLarge`], [`Error::OutOfMemory`]; [`Error::Unsupported`] within a
    /// [capture](Stream::capture).
    pub fn new(stream: &Stream, bytes: usize) -> Result<Workspace<'static>, Error> {
        let Workspace(mut memory) = Workspace::uncommitted(stream, bytes)?;
        if let Memory::Own(words) = &mut memory {
            words.commit();
        }
        Ok(Workspace(memory))
    }

    /// The same of memory that a CPU provides when it is written.
    pub(crate) fn uncommitted(stream: &Stream, bytes: usize) -> Result<Workspace<'static>, Error> {
        Ok(Workspace(Memory::Own(Buffer::zeros(stream, bytes.div_ceil(size_of::<u32>()))?)))
    }
}

impl<'a> Workspace<'a> {
    /// Host memory of the caller's, from the first address in it that is a multiple of 256: give 255 bytes
    /// more than are needed.
    pub fn from_slice(memory: &'a mut [u8]) -> Workspace<'a> {
        // Under an interpreter `align_offset` may decline to answer; then nothing is left.
        let skip = memory.as_ptr().align_offset(ALIGN_BYTES).min(memory.len());
        let memory = &mut memory[skip..];
        let (first, bytes) = (memory.as_mut_ptr(), memory.len());
        Workspace(Memory::Lent { place: Place::Host, first, bytes, _borrow: PhantomData })
    }

    /// Memory of the caller's: a host pointer or a device address.
    ///
    /// # Safety
    ///
    /// * The `bytes` at `address` lie in one allocation at `place`; on a GPU of its primary context. On the
    ///   host they are initialised.
    /// * They stay valid, and nobody else reads or writes them, until the work that is given this workspace
    ///   completes. Each launch of a graph that was captured with it is such work.
    /// * Operations on several streams use it in an order that the caller has seen to.
    ///
    /// # Errors
    ///
    /// [`Error::Layout`] unless `address` is a multiple of 256, as device allocations are; [`Error::Value`]
    /// for null, unless `bytes` is 0; [`Error::TooLarge`] if the end is beyond the address space.
    ///
    /// ```
    /// use dropless::{Place, Workspace};
    ///
    /// #[repr(align(256))]
    /// struct Arena([u8; 4096]);
    /// let mut arena = Box::new(Arena([0; 4096]));
    /// let address = arena.0.as_mut_ptr().expose_provenance() as u64;
    /// // SAFETY: nobody else uses the arena while the workspace is there.
    /// let workspace = unsafe { Workspace::from_raw(Place::Host, address, 4096)? };
    /// assert_eq!(workspace.bytes(), 4096);
    /// # Ok::<(), dropless::Error>(())
    /// ```
    pub unsafe fn from_raw(place: Place, address: u64, bytes: usize) -> Result<Workspace<'a>, Error> {
        let op = Op::Workspace;
        let misfit = address as usize % ALIGN_BYTES;
        if misfit != 0 {
            let need = "remainder 0 modulo 256 bytes";
            return Err(Error::Layout { op, arg: "address", need, got: misfit });
        }
        if address == 0 && bytes > 0 {
            return Err(Error::Value { op, arg: "address", need: "an address, not null", got: 0.0 });
        }
        let (end, limit) = (u128::from(address) + bytes as u128, isize::MAX as u128);
        if end > limit {
            return Err(Error::TooLarge { op, what: "end address", got: end, limit });
        }
        let first = match address {
            0 => std::ptr::without_provenance_mut(ALIGN_BYTES), // of nothing
            _ => std::ptr::with_exposed_provenance_mut(address as usize),
        };
        Ok(Workspace(Memory::Lent { place, first, bytes, _borrow: PhantomData }))
    }

    /// Of that many bytes, what parts of a workspace can be carved from: whole steps of the alignment.
    pub(crate) fn usable_bytes(bytes: usize) -> usize {
        bytes / ALIGN_BYTES * ALIGN_BYTES
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        match &self.0 {
            Memory::Own(words) => words.len() * size_of::<u32>(),
            Memory::Lent { bytes, .. } => *bytes,
        }
    }

    /// Where it lies.
    pub fn place(&self) -> Place {
        match &self.0 {
            Memory::Own(words) => words.place(),
            Memory::Lent { place, .. } => *place,
        }
    }

    /// The address of its first byte, of whichever kind the place has.
    pub(crate) fn address(&self) -> *mut u8 {
        match &self.0 {
            Memory::Own(words) => words.address().cast(),
            Memory::Lent { first, .. } => *first,
        }
    }

    pub(crate) fn mark(&self) -> Option<&Mark> {
        match &self.0 {
            Memory::Own(words) => Some(words.mark()),
            Memory::Lent { .. } => None,
        }
    }

    /// Its use by an operation.
    pub(crate) fn access(&self) -> Access<'_> {
        Access { place: self.place(), mark: self.mark(), write: true, misfit: None }
    }
}
