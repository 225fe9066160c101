//! A routing that was decided elsewhere, from ids and weights that lie on the stream's device. Contract and CPU backend.

use crate::device::Stream;
use crate::error::{Error, Op, check_shape};
use crate::layout::{NOWHERE, Routing, RoutingBuffers, RoutingParts, index_slots};
use crate::view::Rows;

/// Which ids are of experts that are here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Here {
    /// The first expert's id: those from it on are here, E of them, and numbered from 0.
    pub first_expert: u32,
}

impl Here {
    /// The experts from this one on, as many as the buffers have.
    pub fn from(first_expert: u32) -> Here {
        Here { first_expert }
    }
}

/// Turns ids and weights that were chosen elsewhere into a routing, without the host: sorts the tokens by expert.
///
/// | argument  | shape          | meaning                                                                       |
/// |-----------|----------------|-------------------------------------------------------------------------------|
/// | `ids`     | `[T, k]` u32   | the experts of each token, in the order in which their rows are added up        |
/// | `weights` | `[T, k]` f32   | their weights                                                                 |
/// | `here`    |                | which ids are of the E experts of `buffers`; by default `0..E`                  |
/// | `buffers` | k, E, `>= T`   | receive copies of both, and the maps                                          |
///
/// Any id is taken. One that is not here (-1 of an engine's `i32`, an expert of another device) has no row:
/// nothing is computed for it, and [`permute::combine`](crate::permute::combine) leaves it out. So the sums
/// of all devices add up to the layer; a shared expert is added by one of them. If a token names an expert
/// again, the first counts, and the others have no row. The ids that the routing shows are numbered as the
/// experts here are, [`NOWHERE`] for all others.
///
/// A routing is replayed bit for bit from its [`expert_ids`](Routing::expert_ids) and [`weights`](Routing::weights). One launch on a GPU.
///
/// ```
/// use dropless::layout::NOWHERE;
/// use dropless::router::{self, Here};
/// use dropless::{Device, RoutingBuffers, Rows};
///
/// let stream = Device::cpu().stream()?;
/// // Two experts are here, those that elsewhere are numbered 2 and 3.
/// let mut buffers = RoutingBuffers::new(&stream, 2, 2, 2)?;
/// let (ids, weights) = ([3, 0, 1, 2], [0.75f32, 0.25, 0.5, 0.5]);
/// let (ids, weights) = (Rows::from_slice(&ids, 2, 2)?, Rows::from_slice(&weights, 2, 2)?);
/// let routing = router::index(&stream, ids, weights, Here::from(2), &mut buffers)?;
/// assert_eq!(routing.expert_ids().as_slice(), Some(&[1, NOWHERE, NOWHERE, 0][..]));
/// assert_eq!(routing.offsets().as_slice(), Some(&[0, 1, 2][..]));
/// # Ok::<(), dropless::Error>(())
/// ```
///
/// # Errors
///
/// [`Error::Shape`] if `ids` or `weights` are not `[T, k]`; [`Error::TooLarge`] if the last expert's id would
/// be [`NOWHERE`] or beyond; [`Error::Capacity`] if the buffers hold fewer than T tokens; [`Error::Place`],
/// [`Error::NotJoined`]. Nothing is written.
pub fn index<'a>(
    stream: &Stream,
    ids: Rows<'_, u32>,
    weights: Rows<'_, f32>,
    here: Here,
    buffers: &'a mut RoutingBuffers<'_>,
) -> Result<Routing<'a>, Error> {
    let want = [ids.rows(), buffers.top_k()];
    check_shape(Op::Router, "ids", "[T, k]", &want, &ids.dims())?;
    check_shape(Op::Router, "weights", "[T, k]", &want, &weights.dims())?;
    let (end, limit) = (u128::from(here.first_expert) + buffers.num_experts() as u128, u128::from(NOWHERE));
    if end > limit {
        return Err(Error::TooLarge { op: Op::Router, what: "first_expert + num_experts", got: end, limit });
    }
    let num_tokens = ids.rows();
    let parts = buffers.parts_mut(Op::Router, num_tokens)?;
    let run = dispatch!(stream, on_cpu, super::cuda::given::given);
    let [out_ids, out_weights, offsets, row_to_slot, slot_to_row] = parts.accesses();
    let given = [("ids", ids.access()), ("weights", weights.access())];
    stream.admit(Op::Router, &[given[0], given[1], out_ids, out_weights, offsets, row_to_slot, slot_to_row])?;
    run(stream, ids, weights, here, parts)?;
    buffers.routing(num_tokens)
}

fn on_cpu(_: &Stream, ids: Rows<'_, u32>, weights: Rows<'_, f32>, here: Here, parts: RoutingParts<'_>) -> Result<(), Error> {
    let RoutingParts { mut expert_ids, weights: mut out_weights, mut offsets, mut row_to_slot, mut slot_to_row } = parts;
    let (given, given_weights, num_experts) = (ids.host(), weights.host(), offsets.cols() - 1);
    let (mut out_ids, mut out) = (expert_ids.host(), out_weights.host());
    for token in 0..ids.rows() {
        let given = given.row(token);
        for (choice, id) in given.iter().enumerate() {
            let local = id.wrapping_sub(here.first_expert); // beyond E below the first
            let is_here = (local as usize) < num_experts && !given[..choice].contains(id);
            out_ids.row_mut(token)[choice] = if is_here { local } else { NOWHERE };
        }
        out.row_mut(token).copy_from_slice(given_weights.row(token));
    }
    let ids = expert_ids.as_rows();
    let ids = ids.as_slice().unwrap_or_else(|| unreachable!("routing buffers are packed"));
    index_slots(ids, offsets.host().row_mut(0), row_to_slot.host().row_mut(0), slot_to_row.host().row_mut(0));
    Ok(())
}
