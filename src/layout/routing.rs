//! Where the router sent each token, and the permutation that follows from it.
//!
//! A token's choice number `s` is its slot `token * top_k + s`. Rows are the slots sorted by expert, stably: within an
//! expert, in slot order. `row_to_slot` and `slot_to_row` are inverse permutations of `0..R`, R = T * top_k.
//!
//! ```text
//! T = 3, k = 2        expert_ids  [2 0 | 0 1 | 2 1]      slots      0 1 2 3 4 5
//! rows by expert      e0: 1 2   e1: 3 5   e2: 0 4        offsets    0 2 4 6
//! row_to_slot         1 2 3 5 0 4                        slot_to_row 4 0 1 2 5 3
//! ```
//!
//! Where experts are spread over several devices, an id may belong to none of those that are here: it is [`NOWHERE`], its slot has no row
//! (`slot_to_row` is [`NOWHERE`], too), and there are fewer rows than slots. How many is known on the device alone, as the last offset.

use super::expert_rows::{ExpertRows, Gather};
use crate::device::{Access, Buffer, Stream, Upload};
use crate::error::{Error, Op, Place};
use crate::shape::{MAX_ROWS, checked_product};
use crate::view::{Rows, RowsMut};

/// Experts that a router may choose from.
pub const MAX_EXPERTS: usize = 1024;

/// The id of an expert that is not here, and the row of a slot that has none.
pub const NOWHERE: u32 = u32::MAX;

/// Memory for the routing of up to `max_tokens` tokens; owned by the caller, written by `router::route`.
#[derive(Debug)]
pub struct RoutingBuffers {
    max_tokens: usize,
    top_k: usize,
    num_experts: usize,
    expert_ids: Buffer<u32>,
    weights: Buffer<f32>,
    offsets: Buffer<u32>,
    row_to_slot: Buffer<u32>,
    slot_to_row: Buffer<u32>,
}

/// The parts of [`RoutingBuffers`] for one batch, to be written.
pub(crate) struct RoutingParts<'a> {
    pub(crate) expert_ids: RowsMut<'a, u32>,  // [T, k]
    pub(crate) weights: RowsMut<'a, f32>,     // [T, k]
    pub(crate) offsets: RowsMut<'a, u32>,     // [1, E + 1]
    pub(crate) row_to_slot: RowsMut<'a, u32>, // [1, R]
    pub(crate) slot_to_row: RowsMut<'a, u32>, // [1, R]
}

impl RoutingParts<'_> {
    pub(crate) fn accesses(&self) -> [(&'static str, Access<'_>); 5] {
        [
            ("expert_ids", self.expert_ids.access()),
            ("weights", self.weights.access()),
            ("offsets", self.offsets.access()),
            ("row_to_slot", self.row_to_slot.access()),
            ("slot_to_row", self.slot_to_row.access()),
        ]
    }
}

impl RoutingBuffers {
    /// # Errors
    ///
    /// [`Error::Value`] if `top_k` or `num_experts` is 0 (of experts that are elsewhere a token may choose more than there are here);
    /// [`Error::TooLarge`] beyond [`MAX_EXPERTS`] experts or 2^31 - 1
    /// rows; [`Error::OutOfMemory`].
    pub fn new(stream: &Stream, max_tokens: usize, top_k: usize, num_experts: usize) -> Result<RoutingBuffers, Error> {
        checked_product(Op::Routing, "num_experts", &[num_experts], MAX_EXPERTS)?;
        if num_experts == 0 {
            return Err(Error::Value { op: Op::Routing, arg: "num_experts", need: "at least 1", got: 0.0 });
        }
        if top_k == 0 {
            return Err(Error::Value { op: Op::Routing, arg: "top_k", need: "at least 1", got: 0.0 });
        }
        let slots = checked_product(Op::Routing, "max_tokens * top_k", &[max_tokens, top_k], MAX_ROWS)?;
        Ok(RoutingBuffers {
            max_tokens,
            top_k,
            num_experts,
            expert_ids: Buffer::zeros(stream, slots)?,
            weights: Buffer::zeros(stream, slots)?,
            offsets: Buffer::zeros(stream, num_experts + 1)?,
            row_to_slot: Buffer::zeros(stream, slots)?,
            slot_to_row: Buffer::zeros(stream, slots)?,
        })
    }

    /// Bytes of device memory that [`new`](Self::new) allocates for these sizes, for an engine's accounts.
    ///
    /// # Errors
    ///
    /// [`Error::TooLarge`] beyond the address space.
    pub fn bytes(max_tokens: usize, top_k: usize, num_experts: usize) -> Result<usize, Error> {
        let slots = checked_product(Op::Routing, "bytes", &[max_tokens, top_k, 4 * size_of::<u32>()], isize::MAX as usize)?;
        let offsets = checked_product(Op::Routing, "bytes", &[num_experts.saturating_add(1), size_of::<u32>()], isize::MAX as usize)?;
        checked_product(Op::Routing, "bytes", &[slots.saturating_add(offsets)], isize::MAX as usize)
    }

    /// The largest batch.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// k.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// E.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// The parts that hold `num_tokens` tokens.
    pub(crate) fn parts_mut(&mut self, op: Op, num_tokens: usize) -> Result<RoutingParts<'_>, Error> {
        if num_tokens > self.max_tokens {
            return Err(Error::Capacity { op, what: "tokens of routing buffers", need: num_tokens, have: self.max_tokens });
        }
        let slots = num_tokens * self.top_k;
        Ok(RoutingParts {
            expert_ids: self.expert_ids.rows_mut(num_tokens, self.top_k)?,
            weights: self.weights.rows_mut(num_tokens, self.top_k)?,
            offsets: self.offsets.rows_mut(1, self.num_experts + 1)?,
            row_to_slot: self.row_to_slot.rows_mut(1, slots)?,
            slot_to_row: self.slot_to_row.rows_mut(1, slots)?,
        })
    }

    /// What `parts_mut` was used to write.
    pub(crate) fn routing(&self, num_tokens: usize) -> Result<Routing<'_>, Error> {
        let slots = num_tokens * self.top_k;
        Ok(Routing {
            expert_ids: self.expert_ids.rows(num_tokens, self.top_k)?,
            weights: self.weights.rows(num_tokens, self.top_k)?,
            offsets: self.offsets.rows(1, self.num_experts + 1)?,
            row_to_slot: self.row_to_slot.rows(1, slots)?,
            slot_to_row: self.slot_to_row.rows(1, slots)?,
        })
    }
}

/// The routing of a batch: experts and weights per token, and the permutation into expert order.
///
/// Every id is below E, or [`NOWHERE`]; those of a token below E are distinct. `row_to_slot` and `slot_to_row` are inverse to each other on the
/// slots that have a row, of which there are as many as the last offset says; behind it `row_to_slot` is unspecified. `offsets` says where each
/// expert's rows begin. Made by `router::route`, by `router::index` of ids on a device, or by [`Routing::from_host`].
#[derive(Clone, Copy)]
pub struct Routing<'a> {
    expert_ids: Rows<'a, u32>,
    weights: Rows<'a, f32>,
    offsets: Rows<'a, u32>,
    row_to_slot: Rows<'a, u32>,
    slot_to_row: Rows<'a, u32>,
}

impl<'a> Routing<'a> {
    /// A routing that was decided on the host: `ids` and `weights` are `[T, k]`, k and E those of `buffers`; the id [`NOWHERE`] is of an expert
    /// that is not here. One that lies on a device becomes a routing there: `router::index`.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the slices are not whole tokens or differ in length; [`Error::Index`] for an id that is neither below
    /// E nor [`NOWHERE`]; [`Error::Duplicate`] for an expert named twice by one token; [`Error::Capacity`]. Nothing is written.
    pub fn from_host(stream: &Stream, ids: &[u32], weights: &[f32], buffers: &'a mut RoutingBuffers) -> Result<Routing<'a>, Error> {
        let (top_k, num_experts) = (buffers.top_k, buffers.num_experts);
        let num_tokens = ids.len() / top_k;
        if ids.len() != num_tokens * top_k {
            return Err(Error::shape(Op::Routing, "ids", "[T, k]", &[num_tokens, top_k], &[num_tokens, ids.len() - num_tokens * top_k]));
        }
        if weights.len() != ids.len() {
            return Err(Error::shape(Op::Routing, "weights", "[T * k]", &[ids.len()], &[weights.len()]));
        }
        if let Some(at) = ids.iter().position(|&id| id as usize >= num_experts && id != NOWHERE) {
            return Err(Error::Index { op: Op::Routing, arg: "ids", at, got: u64::from(ids[at]), bound: num_experts as u64 });
        }
        for (token, chosen) in ids.chunks_exact(top_k).enumerate() {
            let again = chosen.iter().enumerate().find(|&(s, id)| *id != NOWHERE && chosen[..s].contains(id));
            if let Some((_, &id)) = again {
                return Err(Error::Duplicate { op: Op::Routing, arg: "ids", token, id });
            }
        }
        buffers.parts_mut(Op::Routing, num_tokens)?; // which checks the capacity
        let (mut offsets, mut row_to_slot, mut slot_to_row) = (vec![0; num_experts + 1], vec![0; ids.len()], vec![0; ids.len()]);
        index_slots(ids, &mut offsets, &mut row_to_slot, &mut slot_to_row);
        let uploads = [
            ("expert_ids", buffers.expert_ids.upload(ids)?),
            ("weights", buffers.weights.upload(weights)?),
            ("offsets", buffers.offsets.upload(&offsets)?),
            ("row_to_slot", buffers.row_to_slot.upload(&row_to_slot)?),
            ("slot_to_row", buffers.slot_to_row.upload(&slot_to_row)?),
        ];
        Upload::queue(stream, Op::Routing, &uploads)?;
        buffers.routing(num_tokens)
    }

    /// T.
    pub fn num_tokens(&self) -> usize {
        self.expert_ids.rows()
    }

    /// k.
    pub fn top_k(&self) -> usize {
        self.expert_ids.cols()
    }

    /// E.
    pub fn num_experts(&self) -> usize {
        self.offsets.cols() - 1
    }

    /// R = T * k, which is the most rows there can be: the last of the [`offsets`](Self::offsets) says how many there are.
    pub fn rows(&self) -> usize {
        self.row_to_slot.cols()
    }

    /// Where the routing lives.
    pub fn place(&self) -> Place {
        self.expert_ids.place()
    }

    /// `[T, k]`: the chosen experts, best first where a router chose them. With the weights they are all it takes to replay the routing.
    pub fn expert_ids(&self) -> Rows<'a, u32> {
        self.expert_ids
    }

    /// `[T, k]`: their weights.
    pub fn weights(&self) -> Rows<'a, f32> {
        self.weights
    }

    /// `[1, E + 1]`: expert `e` owns the rows `offsets[e]..offsets[e + 1]`.
    pub fn offsets(&self) -> Rows<'a, u32> {
        self.offsets
    }

    /// `[1, R]`: the slot `token * k + choice` of each row that there is.
    pub fn row_to_slot(&self) -> Rows<'a, u32> {
        self.row_to_slot
    }

    /// `[1, T * k]`: the row of each slot; [`NOWHERE`] if it has none.
    pub fn slot_to_row(&self) -> Rows<'a, u32> {
        self.slot_to_row
    }

    /// All of its views, for admission.
    pub(crate) fn accesses(&self) -> [Access<'a>; 5] {
        let [ids, offsets, row_to_slot, slot_to_row] =
            [self.expert_ids, self.offsets, self.row_to_slot, self.slot_to_row].map(|view| view.access());
        [ids, self.weights.access(), offsets, row_to_slot, slot_to_row]
    }

    /// For a product whose input rows are already in expert order, as after `permute::gather`.
    pub fn expert_rows(&self) -> ExpertRows<'a> {
        ExpertRows::trusted(self.offsets, self.rows(), self.num_tokens(), None)
    }

    /// For a product whose input rows are the tokens: it gathers as it reads.
    pub fn gathered_rows(&self) -> ExpertRows<'a> {
        let gather = Gather { row_to_slot: self.row_to_slot, top_k: self.top_k() };
        ExpertRows::trusted(self.offsets, self.rows(), self.num_tokens(), Some(gather))
    }
}

/// Sorts slots by expert, stably. Ids that are not below E have no row; `offsets` has E + 1 elements, the maps one per slot.
pub(crate) fn index_slots(ids: &[u32], offsets: &mut [u32], row_to_slot: &mut [u32], slot_to_row: &mut [u32]) {
    let num_experts = offsets.len() - 1;
    // Count expert `e` at `e + 1`, so that the running sum leaves each expert's first row at `e`.
    offsets.fill(0);
    let here = |id: u32| (id as usize) < num_experts;
    ids.iter().filter(|id| here(**id)).for_each(|&id| offsets[id as usize + 1] += 1);
    (1..=num_experts).for_each(|e| offsets[e] += offsets[e - 1]);
    let mut next = [0u32; MAX_EXPERTS];
    next[..num_experts].copy_from_slice(&offsets[..num_experts]);
    slot_to_row.fill(NOWHERE);
    for (slot, &id) in ids.iter().enumerate().filter(|(_, id)| here(**id)) {
        let row = next[id as usize];
        next[id as usize] += 1;
        row_to_slot[row as usize] = slot as u32;
        slot_to_row[slot] = row;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    #[test]
    fn the_picture_in_the_header() {
        let stream = Device::cpu().stream().unwrap();
        let mut buffers = RoutingBuffers::new(&stream, 4, 2, 3).unwrap();
        let routing = Routing::from_host(&stream, &[2, 0, 0, 1, 2, 1], &[0.5; 6], &mut buffers).unwrap();
        assert_eq!(routing.offsets().as_slice().unwrap(), [0, 2, 4, 6]);
        assert_eq!(routing.row_to_slot().as_slice().unwrap(), [1, 2, 3, 5, 0, 4]);
        assert_eq!(routing.slot_to_row().as_slice().unwrap(), [4, 0, 1, 2, 5, 3]);
    }

    #[test]
    fn foreign_routings_are_checked() {
        let stream = Device::cpu().stream().unwrap();
        let mut buffers = RoutingBuffers::new(&stream, 2, 2, 3).unwrap();
        let mut text = |ids: &[u32], weights: &[f32]| Routing::from_host(&stream, ids, weights, &mut buffers).err().unwrap().to_string();
        assert_eq!(text(&[0, 1, 2, 3], &[0.5; 4]), "routing: `ids[3]` is 3, must be < 3");
        assert_eq!(text(&[0, 1, 2, 2], &[0.5; 4]), "routing: `ids` names expert 2 twice for token 1");
        assert_eq!(text(&[0, 1], &[0.5; 4]), "routing: `weights` must be [T * k] = [2], got [4]");
        assert_eq!(text(&[0, 1, 0, 1, 0, 1], &[0.5; 6]), "routing: needs 3 tokens of routing buffers, has 2");
        assert!(text(&[0, 1, 2], &[0.5; 3]).starts_with("routing: `ids` must be [T, k]"));
        assert_eq!(buffers.offsets.as_slice().unwrap(), [0; 4]);
    }

    #[test]
    fn bytes_are_those_of_the_buffers() {
        let stream = Device::cpu().stream().unwrap();
        let RoutingBuffers { expert_ids, weights, offsets, row_to_slot, slot_to_row, .. } = RoutingBuffers::new(&stream, 7, 2, 5).unwrap();
        let elements = expert_ids.len() + weights.len() + offsets.len() + row_to_slot.len() + slot_to_row.len();
        assert_eq!(RoutingBuffers::bytes(7, 2, 5).unwrap(), 4 * elements);
        assert!(RoutingBuffers::bytes(usize::MAX, 2, 5).is_err() && RoutingBuffers::bytes(1, 1, usize::MAX).is_err());
    }

    #[test]
    fn impossible_choices_are_refused() {
        let stream = Device::cpu().stream().unwrap();
        for (tokens, k, experts) in [(1, 0, 4), (1, 1, 1025), (1 << 31, 1, 4), (1, 1, 0), (1, 0, 0)] {
            assert!(RoutingBuffers::new(&stream, tokens, k, experts).is_err(), "{tokens} {k} {experts}");
        }
    }
}
