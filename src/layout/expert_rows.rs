//! Which rows belong to which expert.
#![allow(unsafe_code)] // the raw constructor

use crate::device::Access;
use crate::error::{Error, Op, Place, check_shape};
use crate::shape::{MAX_ROWS, checked_product};
use crate::view::Rows;

/// Which output rows belong to which expert, and which input row each is computed from.
///
/// Rows are in expert order: expert `e` owns the rows `offsets[e]..offsets[e + 1]`, of which there may be none. The last offset is R, or
/// less where some ids belong to no expert here: what is left of R then belongs to nobody, and products leave it as it is.
#[derive(Clone, Copy)]
pub struct ExpertRows<'a> {
    rows: usize,
    input_rows: usize,
    max_rows_per_expert: usize,
    class_rows: Option<usize>,
    num_experts: usize,
    offsets: Option<Rows<'a, u32>>,
    gather: Option<Gather<'a>>,
}

/// Output row `r` is computed from input row `row_to_slot[r] / top_k`.
#[derive(Clone, Copy)]
pub(crate) struct Gather<'a> {
    pub(crate) row_to_slot: Rows<'a, u32>,
    pub(crate) top_k: usize,
}

impl<'a> ExpertRows<'a> {
    /// One expert that owns all rows: what makes a grouped product a dense linear layer.
    ///
    /// # Errors
    ///
    /// [`Error::TooLarge`] beyond 2^31 - 1 rows.
    pub fn dense(rows: usize) -> Result<ExpertRows<'static>, Error> {
        checked_product(Op::ExpertRows, "rows", &[rows], MAX_ROWS)?;
        Ok(ExpertRows { rows, input_rows: rows, max_rows_per_expert: rows, class_rows: None, num_experts: 1, offsets: None, gather: None })
    }

    /// From `E + 1` offsets in host memory, for operations on the CPU.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] for fewer than two offsets; [`Error::Index`] if the first is not 0; [`Error::Decreases`] if one is less than its
    /// predecessor; [`Error::TooLarge`] beyond 2^31 - 1 rows.
    pub fn from_host(offsets: &'a [u32]) -> Result<ExpertRows<'a>, Error> {
        let (Some(&first), Some(&last), true) = (offsets.first(), offsets.last(), offsets.len() >= 2) else {
            return Err(Error::shape(Op::ExpertRows, "offsets", "[E + 1]", &[2], &[offsets.len()]));
        };
        if first != 0 {
            return Err(Error::Index { op: Op::ExpertRows, arg: "offsets", at: 0, got: u64::from(first), bound: 1 });
        }
        if let Some(at) = (1..offsets.len()).find(|&i| offsets[i] < offsets[i - 1]) {
            let (got, least) = (u64::from(offsets[at]), u64::from(offsets[at - 1]));
            return Err(Error::Decreases { op: Op::ExpertRows, arg: "offsets", at, got, least });
        }
        let rows = checked_product(Op::ExpertRows, "rows", &[last as usize], MAX_ROWS)?;
        let view = Rows::from_slice(offsets, 1, offsets.len())?;
        Ok(ExpertRows {
            rows,
            input_rows: rows,
            max_rows_per_expert: rows,
            class_rows: None,
            num_experts: offsets.len() - 1,
            offsets: Some(view),
            gather: None,
        })
    }

    /// From `E + 1` offsets wherever they lie, unchecked.
    ///
    /// `rows` is what the input and the output of a product have room for: experts may own fewer, and then the others are neither computed nor
    /// written. `max_rows_per_expert` chooses the kernels: the closer to what experts own, the faster; `rows` where nothing is known.
    ///
    /// # Safety
    ///
    /// `offsets` is `[1, E + 1]`; when the work that is given this value runs, it begins with 0, does not decrease, ends with at most
    /// `rows`, and no expert owns more than `max_rows_per_expert`.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the view is not one row of at least two; [`Error::TooLarge`] beyond 2^31 - 1 rows.
    pub unsafe fn from_raw(offsets: Rows<'a, u32>, rows: usize, max_rows_per_expert: usize) -> Result<ExpertRows<'a>, Error> {
        let num_experts = offsets.cols().saturating_sub(1).max(1);
        check_shape(Op::ExpertRows, "offsets", "[1, E + 1]", &[1, num_experts + 1], &offsets.dims())?;
        checked_product(Op::ExpertRows, "rows", &[rows], MAX_ROWS)?;
        let max_rows_per_expert = max_rows_per_expert.min(rows);
        Ok(ExpertRows { rows, input_rows: rows, max_rows_per_expert, class_rows: None, num_experts, offsets: Some(offsets), gather: None })
    }

    /// The same for a product that gathers: output row `r` is computed from input row `row_to_slot[r] / top_k`, of `num_tokens`.
    ///
    /// # Safety
    ///
    /// As [`from_raw`](Self::from_raw), and when the work runs, `row_to_slot[r] / top_k` is below `num_tokens` for every row that an expert owns.
    ///
    /// # Errors
    ///
    /// As [`from_raw`](Self::from_raw); [`Error::Shape`] if `row_to_slot` is not one row of `rows`; [`Error::Value`] if `top_k` is 0.
    pub unsafe fn gathered_raw(
        offsets: Rows<'a, u32>,
        row_to_slot: Rows<'a, u32>,
        top_k: usize,
        num_tokens: usize,
        max_rows_per_expert: usize,
    ) -> Result<ExpertRows<'a>, Error> {
        // SAFETY: the caller's duty.
        let rows = unsafe { ExpertRows::from_raw(offsets, row_to_slot.cols(), max_rows_per_expert)? };
        check_shape(Op::ExpertRows, "row_to_slot", "[1, R]", &[1, row_to_slot.cols()], &row_to_slot.dims())?;
        if top_k == 0 {
            return Err(Error::Value { op: Op::ExpertRows, arg: "top_k", need: "at least 1", got: 0.0 });
        }
        checked_product(Op::ExpertRows, "num_tokens", &[num_tokens], MAX_ROWS)?;
        Ok(ExpertRows { input_rows: num_tokens, gather: Some(Gather { row_to_slot, top_k }), ..rows })
    }

    /// From the parts of a routing of `num_tokens` tokens, which has established the invariants. No token chooses an expert twice.
    pub(crate) fn trusted(offsets: Rows<'a, u32>, rows: usize, num_tokens: usize, gather: Option<Gather<'a>>) -> ExpertRows<'a> {
        let input_rows = if gather.is_some() { num_tokens } else { rows };
        let num_experts = offsets.cols() - 1;
        ExpertRows { rows, input_rows, max_rows_per_expert: num_tokens, class_rows: None, num_experts, offsets: Some(offsets), gather }
    }

    /// R, the output rows that there is room for; experts own at most so many.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Rows of the input: R, or T where rows are gathered from tokens.
    pub fn input_rows(&self) -> usize {
        self.input_rows
    }

    /// Whether input rows are tokens', which several rows may be computed from.
    pub(crate) fn is_gathered(&self) -> bool {
        self.gather.is_some()
    }

    /// The most rows that any expert may own, as the host knows it: T where rows come from a routing, else R.
    pub fn max_rows_per_expert(&self) -> usize {
        self.max_rows_per_expert
    }

    /// The same rows in the class of calls in which an expert owns at most `max_rows`, whatever their number here. Products give a row the same
    /// bits in every call of one class; in the class of other calls than their own they are right, and slower.
    #[must_use]
    pub fn in_class(self, max_rows: usize) -> ExpertRows<'a> {
        ExpertRows { class_rows: Some(max_rows), ..self }
    }

    /// The class that was asked for.
    pub(crate) fn asked_class(&self) -> Option<usize> {
        self.class_rows
    }

    /// The most rows that an expert owns in the calls of this one's class.
    #[cfg(feature = "cuda")]
    pub(crate) fn class_rows(&self) -> usize {
        self.class_rows.unwrap_or(self.max_rows_per_expert)
    }

    /// E.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// The two parts that may live on a device, for admission at `place`; an absent part is at home everywhere.
    pub(crate) fn accesses(&self, place: Place) -> [(&'static str, Access<'a>); 2] {
        let absent = Access { place, mark: None, write: false, misfit: None };
        let offsets = self.offsets.map_or(absent, |offsets| offsets.access());
        [("offsets", offsets), ("row_to_slot", self.gather.map_or(absent, |gather| gather.row_to_slot.access()))]
    }

    /// The device addresses of `offsets` and `row_to_slot`, 0 where there is none, and the slots of a token.
    #[cfg(feature = "cuda")]
    pub(crate) fn addresses(&self) -> (u64, u64, usize) {
        let (row_to_slot, top_k) = self.gather.map_or((0, 1), |gather| (gather.row_to_slot.address(), gather.top_k));
        (self.offsets.map_or(0, |offsets| offsets.address()), row_to_slot, top_k)
    }

    /// The device address of the last offset, after which no row is an expert's; 0 where one expert owns all
    /// rows.
    #[cfg(feature = "cuda")]
    pub(crate) fn rows_end(&self) -> u64 {
        self.offsets.map_or(0, |offsets| offsets.address() + (self.num_experts * size_of::<u32>()) as u64)
    }

    /// The host's view of the offsets. Only CPU backends call this, after dispatch.
    pub(crate) fn with_offsets<R>(&self, f: impl FnOnce(&[u32]) -> R) -> R {
        match &self.offsets {
            Some(offsets) => f(offsets.host().row(0)),
            None => f(&[0, self.rows as u32]),
        }
    }

    /// The input row of output row `row`. Only CPU backends call this, after dispatch.
    pub(crate) fn input_row(&self, row: usize) -> usize {
        match &self.gather {
            Some(Gather { row_to_slot, top_k }) => row_to_slot.host().row(0)[row] as usize / top_k,
            None => row,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_checked_at_the_door() {
        let text = |offsets: &[u32]| ExpertRows::from_host(offsets).err().unwrap().to_string();
        assert_eq!(text(&[0, 5, 4]), "expert_rows: `offsets[2]` is 4, must be at least 5, as its predecessor");
        assert_eq!(text(&[1, 5]), "expert_rows: `offsets[0]` is 1, must be < 1");
        assert_eq!(text(&[0]), "expert_rows: `offsets` must be [E + 1] = [2], got [1]");
        assert_eq!(text(&[0, u32::MAX]), "expert_rows: rows is 4294967295, must be <= 2147483647");
        assert_eq!(ExpertRows::from_host(&[0, 0, 7]).unwrap().rows(), 7);
    }

    #[test]
    fn rows_of_experts_are_limited() {
        assert_eq!(ExpertRows::dense(MAX_ROWS).unwrap().rows(), MAX_ROWS);
        let text = "expert_rows: rows is 2147483648, must be <= 2147483647";
        assert_eq!(ExpertRows::dense(MAX_ROWS + 1).err().unwrap().to_string(), text);
        let offsets = [0u32; 6];
        let raw = |rows, cols, count| {
            // SAFETY: what is refused is not used.
            unsafe { ExpertRows::from_raw(Rows::from_slice(&offsets[..rows * cols], rows, cols).unwrap(), count, count) }
        };
        assert_eq!(raw(1, 6, MAX_ROWS).unwrap().num_experts(), 5);
        assert_eq!(raw(1, 6, MAX_ROWS + 1).err().unwrap().to_string(), text);
        assert_eq!(raw(1, 1, 0).err().unwrap().to_string(), "expert_rows: `offsets` must be [1, E + 1] = [1, 2], got [1, 1]");
        assert_eq!(raw(2, 3, 0).err().unwrap().to_string(), "expert_rows: `offsets` must be [1, E + 1] = [1, 3], got [2, 3]");
    }
}
