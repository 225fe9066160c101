//! CPU backend of `rope`. Callers have checked the shapes, the table and the positions.

use super::projected::Parts;
use super::qk_norm::Span;
use super::{Options, Pairing, QkNorm};
use crate::device::Stream;
use crate::dtype::Float;
use crate::error::{Error, Op};
use crate::layout::{HeadLayout, KvLayerMut};
use crate::shape::filled;
use crate::simd::{self, Kernel, Simd, moments, widen, with_scratch};
use crate::view::{Rows, RowsMut, for_each_row};
use crate::weights::{WeightRows, with_rows};

/// Tokens of one task: enough work to be worth handing to a thread.
const TOKENS_PER_TASK: usize = 4;

pub(super) fn clip_rotate_append<A: Float>(
    stream: &Stream,
    parts: &Parts<'_, A>,
    heads: HeadLayout,
    options: Options<'_>,
    table: [Rows<'_, f32>; 2],
    cache: &mut KvLayerMut<'_, A>,
    q: &mut RowsMut<'_, A>,
) -> Result<(), Error> {
    let ([cos, sin], d, group) = (table.map(|part| part.host()), heads.head_dim(), heads.group());
    let (rotated_at, rest_at, rotary_dim) = (parts.rotated_at, parts.rest_at, 2 * table[0].cols());
    let (queries, values) = (parts.queries.host(), parts.values.host());
    let (rotated_keys, rest_of_keys) = (parts.rotated_keys.host(), parts.rest_of_keys.host());
    let query = |token, head| Head {
        rotated: queries.head(token, head / group, head % group * d + rotated_at, rotary_dim),
        rest: queries.head(token, head / group, head % group * d + rest_at, d - rotary_dim),
    };
    let key = |token, head| Head {
        rotated: rotated_keys.head(token, head, 0, rotary_dim),
        rest: rest_of_keys.head(token, head, 0, d - rotary_dim),
    };
    let (pairing, limit) = (options.pairing, options.limit());
    let norms = options.qk_norm.as_ref().map(Norm::of_both).transpose()?;
    let [q_norm, k_norm] = norms.as_ref().map_or([None; 2], |norms| norms.each_ref().map(Some));
    for_each_row(stream, (q.host(), cache.host().slots()), TOKENS_PER_TASK, |token, (q, mut slot)| {
        let turn = Turn { rotated_at, rest_at, pairing, limit, cos: cos.row(slot.position), sin: sin.row(slot.position) };
        turn.heads(q_norm, heads.num_heads(), |head| query(token, head), |head, rotate| rotate(&mut q[head * d..][..d]));
        turn.heads(k_norm, heads.num_kv_heads(), |head| key(token, head), |head, rotate| slot.keys.head(head, rotate));
        for head in 0..heads.num_kv_heads() {
            let value = values.head(token, head, 0, heads.value_dim());
            slot.values.head(head, |y| simd::run(Limited { x: value, y, limit }));
        }
    });
    Ok(())
}

#[inline(always)]
fn limited(x: f32, limit: f32) -> f32 {
    x.clamp(-limit, limit) // NaN passes
}

/// A head before the rotation, in two pieces.
#[derive(Clone, Copy)]
struct Head<'a, A> {
    rotated: &'a [A],
    rest: &'a [A],
}

/// What turns the heads of one token. `cos` and `sin` have half as many elements as are rotated.
#[derive(Clone, Copy)]
struct Turn<'a> {
    rotated_at: usize,
    rest_at: usize,
    pairing: Pairing,
    limit: f32,
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Turn<'_> {
    /// Some heads. `write` is given a head's number and what fills it.
    fn heads<'a, A: Float>(
        &self,
        norm: Option<&Norm>,
        count: usize,
        head: impl Fn(usize) -> Head<'a, A>,
        mut write: impl FnMut(usize, &mut dyn FnMut(&mut [A])),
    ) {
        let Some(norm) = norm else {
            return (0..count).for_each(|i| write(i, &mut |y| self.rotate(head(i), y)));
        };
        let of_all = (norm.span == Span::AllHeads).then(|| norm.inverse((0..count).map(&head)));
        for i in 0..count {
            let head = head(i);
            let inverse = of_all.unwrap_or_else(|| norm.inverse([head]));
            let (rotary_dim, d) = (head.rotated.len(), head.rotated.len() + head.rest.len());
            let weight = norm.weight(i, d);
            with_scratch(d, |normal| {
                let (rotated, rest) = normal.split_at_mut(rotary_dim);
                simd::run(Scaled { x: head.rotated, inverse, weight: &weight[self.rotated_at..], y: rotated });
                simd::run(Scaled { x: head.rest, inverse, weight: &weight[self.rest_at..], y: rest });
                write(i, &mut |y| self.rotate(Head { rotated, rest }, y));
            });
        }
    }

    /// A head, limited and rotated.
    fn rotate<X: Float, A: Float>(&self, head: Head<'_, X>, y: &mut [A]) {
        simd::run(Rotated { turn: self, head, y });
    }
}

/// Limits and rotates a head. Slices are as long as their loops, so that the compiler makes vectors of these.
struct Rotated<'r, 't, X, A> {
    turn: &'r Turn<'t>,
    head: Head<'r, X>,
    y: &'r mut [A],
}

impl<X: Float, A: Float> Kernel for Rotated<'_, '_, X, A> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (Turn { rotated_at, rest_at, pairing, limit, cos, sin }, x) = (*self.turn, self.head.rotated);
        let half = cos.len();
        let (sin, y) = (&sin[..half], &mut self.y[rotated_at..][..2 * half]);
        let value = |x: X| limited(x.to_f32(), limit);
        let turned = |a: f32, b: f32, cos: f32, sin: f32| (A::from_f32(a * cos - b * sin), A::from_f32(b * cos + a * sin));
        match pairing {
            Pairing::Half => {
                let ((x_a, x_b), (y_a, y_b)) = ((&x[..half], &x[half..][..half]), y.split_at_mut(half));
                let y_b = &mut y_b[..half];
                for j in 0..half {
                    (y_a[j], y_b[j]) = turned(value(x_a[j]), value(x_b[j]), cos[j], sin[j]);
                }
            }
            Pairing::Interleaved => {
                let (x, y) = (&x.as_chunks::<2>().0[..half], &mut y.as_chunks_mut::<2>().0[..half]);
                for j in 0..half {
                    (y[j][0], y[j][1]) = turned(value(x[j][0]), value(x[j][1]), cos[j], sin[j]);
                }
            }
        }
        Limited { x: self.head.rest, y: &mut self.y[rest_at..][..self.head.rest.len()], limit }.run(simd);
    }
}

/// Limits elements.
struct Limited<'r, X, A> {
    x: &'r [X],
    y: &'r mut [A],
    limit: f32,
}

impl<X: Float, A: Float> Kernel for Limited<'_, X, A> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        self.y.iter_mut().zip(self.x).for_each(|(y, x)| *y = A::from_f32(limited(x.to_f32(), self.limit)));
    }
}

/// Normalises elements, whose mean square is known.
struct Scaled<'r, X> {
    x: &'r [X],
    inverse: f32,
    weight: &'r [f32],
    y: &'r mut [f32],
}

impl<X: Float> Kernel for Scaled<'_, X> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let elements = self.y.iter_mut().zip(self.x).zip(self.weight);
        elements.for_each(|((y, x), weight)| *y = x.to_f32() * self.inverse * weight);
    }
}

/// The norm of queries, or of keys, with its weights in f32.
struct Norm {
    weights: Vec<f32>,
    eps: f32,
    span: Span,
}

impl Norm {
    /// Of queries and of keys.
    fn of_both(norm: &QkNorm<'_>) -> Result<[Norm; 2], Error> {
        Ok([Norm::new(norm, norm.q)?, Norm::new(norm, norm.k)?])
    }

    fn new(norm: &QkNorm<'_>, rows: WeightRows<'_>) -> Result<Norm, Error> {
        let mut weights = filled(Op::Rope, rows.cols(), 0.0)?;
        with_rows!(rows, rows => widen(&mut weights, rows.host().row(0)));
        Ok(Norm { weights, eps: norm.eps, span: norm.span })
    }

    /// One over the root of the mean square of some heads, whose sums are added up in f64.
    fn inverse<'a, A: Float>(&self, heads: impl IntoIterator<Item = Head<'a, A>>) -> f32 {
        let (mut squares, mut count) = (0f64, 0);
        for Head { rotated, rest } in heads {
            squares += f64::from(sum_of_squares(rotated)) + f64::from(sum_of_squares(rest));
            count += rotated.len() + rest.len();
        }
        1.0 / ((squares / count as f64) as f32 + self.eps).sqrt()
    }

    /// The weights of a head of `d` elements.
    fn weight(&self, head: usize, d: usize) -> &[f32] {
        match self.span {
            Span::Head => &self.weights,
            Span::AllHeads => &self.weights[head * d..][..d],
        }
    }
}

/// The sum of squares, in the order of the norms.
fn sum_of_squares<A: Float>(x: &[A]) -> f32 {
    moments(x.len(), 0.0, |at, block| widen(block, &x[at..at + block.len()])).1
}
