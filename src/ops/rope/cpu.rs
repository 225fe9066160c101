//! CPU backend of `rope`. Callers have checked the shapes, the table and the positions.

use super::{Options, Pairing};
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
    options: Options,
    table: [Rows<'_, f32>; 2],
    cache: &mut KvLayerMut<'_, A>,
    q: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let (qkv, [cos, sin], d) = (qkv.host(), table.map(|part| part.host()), heads.head_dim());
    let limit = options.limit();
    for_each_row(stream, (q.host(), cache.host().slots()), TOKENS_PER_TASK, |token, (q, mut slot)| {
        let (q_in, kv_in) = qkv.row(token).split_at(heads.q_cols());
        let (k_in, v_in) = kv_in.split_at(heads.kv_cols());
        let (cos, sin) = (cos.row(slot.position), sin.row(slot.position));
        q_in.chunks_exact(d).zip(q.chunks_exact_mut(d)).for_each(|(x, y)| rotate(x, y, options, cos, sin));
        for (head, (k, v)) in k_in.chunks_exact(d).zip(v_in.chunks_exact(d)).enumerate() {
            slot.keys.head(head, |y| rotate(k, y, options, cos, sin));
            slot.values.head(head, |y| limited(v, y, limit));
        }
    });
    Ok(())
}

/// A head, limited and rotated. `cos` and `sin` have half as many elements as are rotated.
fn rotate<A: Float>(x: &[A], y: &mut [A], options: Options, cos: &[f32], sin: &[f32]) {
    let (half, limit) = (cos.len(), options.limit());
    let ((x_pairs, x_rest), (y_pairs, y_rest)) = (x.split_at(2 * half), y.split_at_mut(2 * half));
    let pair = |first: A, second: A, cos: f32, sin: f32| {
        let (first, second) = (first.to_f32().clamp(-limit, limit), second.to_f32().clamp(-limit, limit));
        (A::from_f32(first * cos - second * sin), A::from_f32(second * cos + first * sin))
    };
    match options.pairing {
        Pairing::Half => {
            let ((x_first, x_second), (y_first, y_second)) = (x_pairs.split_at(half), y_pairs.split_at_mut(half));
            for (j, (cos, sin)) in cos.iter().zip(sin).enumerate() {
                (y_first[j], y_second[j]) = pair(x_first[j], x_second[j], *cos, *sin);
            }
        }
        Pairing::Interleaved => {
            let pairs = x_pairs.as_chunks::<2>().0.iter().zip(y_pairs.as_chunks_mut::<2>().0);
            for ((x, y), (cos, sin)) in pairs.zip(cos.iter().zip(sin)) {
                (y[0], y[1]) = pair(x[0], x[1], *cos, *sin);
            }
        }
    }
    limited(x_rest, y_rest, limit);
}

fn limited<A: Float>(x: &[A], y: &mut [A], limit: f32) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y = A::from_f32(x.to_f32().clamp(-limit, limit))); // NaN passes `clamp`
}
