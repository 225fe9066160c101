//! CPU backend of `rope`. Callers have checked the shapes, the table and the positions.

use crate::device::Stream;
use crate::dtype::Float;
use crate::error::Error;
use crate::layout::{HeadLayout, KvLayerMut};
use crate::view::{Rows, RowsMut, for_each_row};

/// Tokens of one task: enough work to be worth handing to a thread.
const TOKENS_PER_TASK: usize = 4;

pub(super) fn clip_rotate_append<A: Float>(
    stream: &Stream,
    qkv: Rows<'_, A>,
    heads: HeadLayout,
    clip: Option<f32>,
    table: [Rows<'_, f32>; 2],
    cache: &mut KvLayerMut<'_, A>,
    q: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let (qkv, [cos, sin]) = (qkv.host(), table.map(|part| part.host()));
    let limit = clip.unwrap_or(f32::INFINITY); // which limits nothing
    for_each_row(stream, (q.host(), cache.host()), TOKENS_PER_TASK, |token, (q, slot)| {
        let (q_in, kv_in) = qkv.row(token).split_at(heads.q_cols());
        let (k_in, v_in) = kv_in.split_at(heads.kv_cols());
        let (cos, sin) = (cos.row(slot.position), sin.row(slot.position));
        rotate(q_in, q, heads.head_dim(), limit, cos, sin);
        rotate(k_in, slot.keys, heads.head_dim(), limit, cos, sin);
        limited(v_in, slot.values, limit);
    });
    Ok(())
}

/// Each head of `x`, limited and rotated. `cos` and `sin` have half as many elements as are rotated.
fn rotate<A: Float>(x: &[A], y: &mut [A], head_dim: usize, limit: f32, cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    for (x, y) in x.chunks_exact(head_dim).zip(y.chunks_exact_mut(head_dim)) {
        let ((x_pairs, x_rest), (y_pairs, y_rest)) = (x.split_at(2 * half), y.split_at_mut(2 * half));
        let ((x_first, x_second), (y_first, y_second)) = (x_pairs.split_at(half), y_pairs.split_at_mut(half));
        for (j, (cos, sin)) in cos.iter().zip(sin).enumerate() {
            let (first, second) = (x_first[j].to_f32().clamp(-limit, limit), x_second[j].to_f32().clamp(-limit, limit));
            y_first[j] = A::from_f32(first * cos - second * sin);
            y_second[j] = A::from_f32(second * cos + first * sin);
        }
        limited(x_rest, y_rest, limit);
    }
}

fn limited<A: Float>(x: &[A], y: &mut [A], limit: f32) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y = A::from_f32(x.to_f32().clamp(-limit, limit))); // NaN passes `clamp`
}
