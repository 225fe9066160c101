//! Parts of a workspace, as matrices.

use std::marker::PhantomData;

use super::RowsMut;
use crate::device::{Mark, Workspace};
use crate::dtype::Element;
use crate::error::{Error, Op, Place};
use crate::shape::{checked_bytes, round_up};

impl Workspace<'_> {
    /// Bytes that [`Carver::rows`] takes for a matrix.
    pub(crate) fn bytes_for<T: Element>(op: Op, rows: usize, cols: usize) -> Result<usize, Error> {
        Ok(round_up(checked_bytes(op, "workspace bytes", &[rows, cols], size_of::<T>())?, 256))
    }

    /// Starts handing out parts of the workspace; all parts are free again when their borrow ends.
    pub(crate) fn carve(&mut self, op: Op) -> Carver<'_> {
        Carver { op, next: self.address(), left_bytes: self.bytes(), place: self.place(), mark: self.mark() }
    }
}

/// Hands out disjoint parts of a workspace, each aligned to 256 bytes, in the order of the calls.
pub(crate) struct Carver<'a> {
    op: Op,
    next: *mut u8,
    left_bytes: usize,
    place: Place,
    mark: Option<&'a Mark>,
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
        Ok(RowsMut { first, rows, cols, stride: cols, place: self.place, mark: self.mark, _borrow: PhantomData })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    #[test]
    fn a_workspace_runs_out_with_numbers() {
        let stream = Device::cpu().stream().unwrap();
        let mut workspace = Workspace::new(&stream, 512).unwrap();
        let mut carver = workspace.carve(Op::Moe);
        carver.rows::<f32>(1, 3).unwrap();
        carver.rows::<f32>(4, 16).unwrap();
        assert_eq!(carver.rows::<f32>(1, 1).err().unwrap(), Error::Capacity { op: Op::Moe, what: "workspace bytes", need: 256, have: 0 });
    }

    /// Lent memory is handed out as a workspace's own is, wherever it begins.
    #[test]
    fn lent_memory_is_carved() {
        let mut memory = vec![7u8; 2 * 256 + 255 + 3];
        for begin in 0..3 {
            let mut workspace = Workspace::from_slice(&mut memory[begin..]);
            assert!((512..=512 + 3 + 255).contains(&workspace.bytes()));
            let mut carver = workspace.carve(Op::Moe);
            let mut parts = [(); 2].map(|()| carver.rows::<f32>(1, 64).unwrap());
            let [first, second] = [0, 1].map(|i| parts[i].host().row_mut(0).as_mut_ptr().addr());
            assert_eq!((first % 256, second - first), (0, 256));
            parts.iter_mut().for_each(|part| part.host().row_mut(0).fill(1.0));
        }
        assert_eq!(memory.iter().filter(|byte| **byte == 7).count(), memory.len() - 512);
        assert_eq!(Workspace::from_slice(&mut []).bytes(), 0);
    }

    #[test]
    fn lent_addresses_are_checked() {
        // SAFETY: never used.
        let lent = |address, bytes| unsafe { Workspace::from_raw(Place::Cuda(0), address, bytes) };
        let text = |address, bytes| lent(address, bytes).unwrap_err().to_string();
        let misfit = "workspace: `address` must have remainder 0 modulo 256 bytes, got 16";
        assert_eq!(text(0x7010, 512), misfit);
        assert_eq!(text(0, 1), "workspace: `address` must be an address, not null, got 0");
        assert!(matches!(lent(0x7000_0000_0000, isize::MAX as usize), Err(Error::TooLarge { .. })));
        let mut workspace = lent(0x7000_0000_0000, 512).unwrap();
        assert_eq!((workspace.place(), workspace.bytes()), (Place::Cuda(0), 512));
        let refused = workspace.carve(Op::Moe).rows::<f32>(1, 129).err().unwrap();
        assert_eq!(refused, Error::Capacity { op: Op::Moe, what: "workspace bytes", need: 768, have: 512 });
        assert_eq!(lent(0, 0).unwrap().bytes(), 0);
    }
}
