//! Token ids that index a vocabulary.
#![allow(unsafe_code)] // ids that the caller vouches for

use crate::device::{Buffer, Stream};
use crate::error::{Error, Op, check_shape};
use crate::view::Rows;

/// Token ids on a device, each below [`TokenIds::bound`].
#[derive(Clone, Copy)]
pub struct TokenIds<'a> {
    ids: Rows<'a, u32>,
    bound: usize,
}

impl<'a> TokenIds<'a> {
    /// Checks `ids` against `bound` (the vocabulary) and copies them to the front of `buffer`.
    ///
    /// # Errors
    ///
    /// [`Error::Index`] naming the first id that is too large; [`Error::Shape`] if the buffer is too small.
    /// Nothing is written.
    pub fn from_host(stream: &Stream, ids: &[u32], bound: usize, buffer: &'a mut Buffer<u32>) -> Result<TokenIds<'a>, Error> {
        if let Some(at) = ids.iter().position(|&id| id as usize >= bound) {
            return Err(Error::Index { op: Op::TokenIds, arg: "ids", at, got: u64::from(ids[at]), bound: bound as u64 });
        }
        buffer.check_len(Op::TokenIds, "buffer", "[>= ids]", ids.len())?;
        buffer.copy_from_slice(stream, ids)?;
        Ok(TokenIds { ids: buffer.rows(1, ids.len())?, bound })
    }

    /// Ids that lie wherever an engine has put them, on a device included: nobody looks at them.
    ///
    /// # Safety
    ///
    /// Every id is below `bound` when the work that is given them runs, at each launch of a graph that was
    /// captured with them, too.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] unless `ids` has one row.
    ///
    /// ```
    /// use dropless::{Device, Rows, RowsMut, TokenIds, embedding};
    ///
    /// let (ids, table, mut y) = ([2u32, 0], [0.0f32, 1.0, 2.0], [0.0f32; 2]);
    /// // SAFETY: 2 and 0 are below 3.
    /// let ids = unsafe { TokenIds::from_raw(Rows::from_slice(&ids, 1, 2)?, 3)? };
    /// let table = Rows::from_slice(&table, 3, 1)?;
    /// embedding::lookup(&Device::cpu().stream()?, ids, table, &mut RowsMut::from_slice(&mut y, 2, 1)?)?;
    /// assert_eq!(y, [2.0, 0.0]);
    /// # Ok::<(), dropless::Error>(())
    /// ```
    pub unsafe fn from_raw(ids: Rows<'a, u32>, bound: usize) -> Result<TokenIds<'a>, Error> {
        check_shape(Op::TokenIds, "ids", "[1, T]", &[1, ids.cols()], &ids.dims())?;
        Ok(TokenIds { ids, bound })
    }

    /// Ids that an operation of this crate has written below `bound`.
    pub(crate) fn trusted(ids: Rows<'a, u32>, bound: usize) -> TokenIds<'a> {
        TokenIds { ids, bound }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.ids.cols()
    }

    /// True without tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Every id is below this.
    pub fn bound(&self) -> usize {
        self.bound
    }

    /// The ids, `[1, T]`.
    pub fn ids(&self) -> Rows<'a, u32> {
        self.ids
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    #[test]
    fn foreign_token_ids_are_checked() {
        let stream = Device::cpu().stream().unwrap();
        let mut buffer = Buffer::from_slice(&stream, &[9u32, 9, 9]).unwrap();
        let refused = TokenIds::from_host(&stream, &[1, 16], 16, &mut buffer).err().unwrap();
        assert_eq!(refused.to_string(), "token_ids: `ids[1]` is 16, must be < 16");
        assert!(TokenIds::from_host(&stream, &[1; 4], 16, &mut buffer).is_err());
        assert_eq!(buffer.as_slice().unwrap(), [9, 9, 9]);
        assert_eq!(TokenIds::from_host(&stream, &[1, 15], 16, &mut buffer).unwrap().len(), 2);
    }

    #[test]
    fn ids_of_an_engine_lie_in_one_row() {
        let data = [1u32, 2, 3, 4];
        let ids = |rows, cols| Rows::from_slice(&data, rows, cols).unwrap();
        // SAFETY: all below 5.
        let [row, column] = [(1, 4), (4, 1)].map(|(rows, cols)| unsafe { TokenIds::from_raw(ids(rows, cols), 5) });
        assert_eq!(row.map(|row| (row.len(), row.bound())), Ok((4, 5)));
        assert_eq!(column.err().unwrap().to_string(), "token_ids: `ids` must be [1, T] = [1, 1], got [4, 1]");
    }
}
