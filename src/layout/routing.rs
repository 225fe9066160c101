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
use crate::device::{Access, Stream, Upload, Workspace};
use crate::error::{Error, Op, Place};
use crate::shape::{MAX_ROWS, checked_product};
use crate::view::{Rows, RowsMut};

/// Experts that a router may choose from.
pub const MAX_EXPERTS: usize = 1024;

/// The id of an expert that is not here, and the row of a slot that has none.
pub const NOWHERE: u32 = u32::MAX;

/// Memory for the routing of up to `max_tokens` tokens, written by `router::route`: its own
/// ([`new`](RoutingBuffers::new)), or the caller's ([`within`](RoutingBuffers::within)).
#[derive(Debug)]
pub struct RoutingBuffers<'m> {
    max_tokens: usize,
    top_k: usize,
    num_experts: usize,
    memory: Workspace<'m>,
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

impl RoutingBuffers<'static> {
    /// # Errors
    ///
    /// As [`bytes`](RoutingBuffers::bytes); [`Error::OutOfMemory`]; [`Error::Unsupported`] within a
    /// [capture](Stream::capture).
    pub fn new(stream: &Stream, max_tokens: usize, top_k: usize, num_experts: usize) -> Result<RoutingBuffers<'static>, Error> {
        let bytes = RoutingBuffers::bytes(max_tokens, top_k, num_experts)?;
        RoutingBuffers::within(Workspace::uncommitted(stream, bytes)?, max_tokens, top_k, num_experts)
    }

    /// Bytes that these sizes take, for an engine's accounts and for [`within`](RoutingBuffers::within).
    ///
    /// # Errors
    ///
    /// [`Error::Value`] if `top_k` or `num_experts` is 0 (of experts that are elsewhere a token may choose
    /// more than there are here); [`Error::TooLarge`] beyond [`MAX_EXPERTS`] experts or 2^31 - 1 rows.
    pub fn bytes(max_tokens: usize, top_k: usize, num_experts: usize) -> Result<usize, Error> {
        checked_product(Op::Routing, "num_experts", &[num_experts], MAX_EXPERTS)?;
        for (arg, count) in [("num_experts", num_experts), ("top_k", top_k)] {
            if count == 0 {
                return Err(Error::Value { op: Op::Routing, arg, need: "at least 1", got: 0.0 });
            }
        }
        checked_product(Op::Routing, "top_k", &[top_k], MAX_ROWS)?; // of no tokens, too
        let slots = checked_product(Op::Routing, "max_tokens * top_k", &[max_tokens, top_k], MAX_ROWS)?;
        // All five arrays have elements of 32 bits.
        Ok(4 * Workspace::bytes_for::<u32>(Op::Routing, slots, 1)? + Workspace::bytes_for::<u32>(Op::Routing, num_experts + 1, 1)?)
    }
}

impl<'m> RoutingBuffers<'m> {
    /// In a [`Workspace`] of at least [`bytes`](RoutingBuffers::bytes), so that an engine gives the memory.
    ///
    /// # Errors
    ///
    /// As [`bytes`](RoutingBuffers::bytes); [`Error::Capacity`] for a smaller workspace.
    ///
    /// ```
    /// use dropless::{RoutingBuffers, Workspace};
    ///
    /// let (max_tokens, top_k, num_experts) = (256, 4, 16);
    /// let mut arena = vec![0u8; RoutingBuffers::bytes(max_tokens, top_k, num_experts)? + 255];
    /// let buffers = RoutingBuffers::within(Workspace::from_slice(&mut arena), max_tokens, top_k, num_experts)?;
    /// # assert_eq!(buffers.max_tokens(), 256);
    /// # Ok::<(), dropless::Error>(())
    /// ```
    pub fn within(memory: Workspace<'m>, max_tokens: usize, top_k: usize, num_experts: usize) -> Result<RoutingBuffers<'m>, Error> {
        let (need, have) = (RoutingBuffers::bytes(max_tokens, top_k, num_experts)?, memory.bytes());
        if have < need {
            return Err(Error::Capacity { op: Op::Routing, what: "workspace bytes", need, have });
        }
        Ok(RoutingBuffers { max_tokens, top_k, num_experts, memory })
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
        let (slots, mut memory) = (num_tokens * self.top_k, self.memory.carve(op));
        Ok(RoutingParts {
            expert_ids: memory.rows(num_tokens, self.top_k)?,
            weights: memory.rows(num_tokens, self.top_k)?,
            offsets: memory.rows(1, self.num_experts + 1)?,
            row_to_slot: memory.rows(1, slots)?,
            slot_to_row: memory.rows(1, slots)?,
        })
    }

    /// What `parts_mut` was used to write.
    pub(crate) fn routing(&mut self, num_tokens: usize) -> Result<Routing<'_>, Error> {
        let RoutingParts { expert_ids, weights, offsets, row_to_slot, slot_to_row } = self.parts_mut(Op::Routing, num_tokens)?;
        Ok(Routing {
            expert_ids: expert_ids.into_rows(),
            weights: weights.into_rows(),
            offsets: offsets.into_rows(),
            row_to_slot: row_to_slot.into_rows(),
            slot_to_row: slot_to_row.into_rows(),
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
    /// [`Error::Value`] if the ids are not those of whole tokens; [`Error::Shape`] if there are not as many
    /// weights; [`Error::Index`] for an id that is neither below E nor [`NOWHERE`]; [`Error::Duplicate`] for
    /// an expert named twice by one token; [`Error::Capacity`]. Nothing is written.
    pub fn from_host(stream: &Stream, ids: &[u32], weights: &[f32], buffers: &'a mut RoutingBuffers<'_>) -> Result<Routing<'a>, Error> {
        let (top_k, num_experts) = (buffers.top_k, buffers.num_experts);
        let num_tokens = ids.len() / top_k;
        if ids.len() != num_tokens * top_k {
            let need = "a multiple of top_k";
            return Err(Error::Value { op: Op::Routing, arg: "ids.len()", need, got: ids.len() as f64 });
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
        let parts = buffers.parts_mut(Op::Routing, num_tokens)?;
        let (mut offsets, mut row_to_slot, mut slot_to_row) = (vec![0; num_experts + 1], vec![0; ids.len()], vec![0; ids.len()]);
        index_slots(ids, &mut offsets, &mut row_to_slot, &mut slot_to_row);
        let uploads = [
            ("expert_ids", parts.expert_ids.upload(ids)?),
            ("weights", parts.weights.upload(weights)?),
            ("offsets", parts.offsets.upload(&offsets)?),
            ("row_to_slot", parts.row_to_slot.upload(&row_to_slot)?),
            ("slot_to_row", parts.slot_to_row.upload(&slot_to_row)?),
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
        assert_eq!(text(&[0, 1, 2], &[0.5; 3]), "routing: `ids.len()` must be a multiple of top_k, got 3");
        assert_eq!(buffers.routing(2).unwrap().offsets().as_slice().unwrap(), [0; 4]);
    }

    #[test]
    fn the_callers_memory_is_enough_or_refused() {
        let need = RoutingBuffers::bytes(100, 2, 5).unwrap();
        assert_eq!(need, 4 * 1024 + 256);
        let mut arena = vec![7u8; need + 255];
        let text = |have| RoutingBuffers::within(Workspace::from_slice(&mut vec![0u8; have]), 100, 2, 5).unwrap_err().to_string();
        assert!(text(need - 1).starts_with("routing: needs 4352 workspace bytes, has "));
        let (stream, ids) = (Device::cpu().stream().unwrap(), [3, 1].repeat(100));
        let mut buffers = RoutingBuffers::within(Workspace::from_slice(&mut arena), 100, 2, 5).unwrap();
        let routing = Routing::from_host(&stream, &ids, &[0.5; 200], &mut buffers).unwrap();
        assert_eq!(routing.offsets().as_slice().unwrap(), [0, 0, 100, 100, 200, 200]);
        assert!(RoutingBuffers::bytes(usize::MAX, 2, 5).is_err() && RoutingBuffers::bytes(1, 1, usize::MAX).is_err());
    }

    #[test]
    fn impossible_choices_are_refused() {
        let stream = Device::cpu().stream().unwrap();
        for (tokens, k, experts) in [(1, 0, 4), (1, 1, 1025), (1 << 31, 1, 4), (0, 1 << 31, 4), (1, 1, 0), (1, 0, 0)] {
            assert!(RoutingBuffers::new(&stream, tokens, k, experts).is_err(), "{tokens} {k} {experts}");
        }
    }
}
