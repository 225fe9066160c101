//! The weight and the bias of a norm, and what of them is checked.

use crate::device::Access;
use crate::error::{Error, Op, check_shape};
use crate::view::Rows;
use crate::weights::WeightRows;

/// The factor of each column, and what is added to it: `y = normalised * weight + bias`.
///
/// A weight alone converts: `norm::rms_norm(&stream, x, weight, eps, y)` takes [`Rows`] and [`WeightRows`].
///
/// ```
/// use dropless::{Device, Rows, RowsMut, norm};
///
/// let stream = Device::cpu().stream()?;
/// let (x, weight, bias, mut y) = ([1.0f32, 3.0], [2.0f32, 2.0], [0.5f32, 0.25], [0.0f32; 2]);
/// let [x, weight, bias] = [&x, &weight, &bias].map(|row| Rows::from_slice(row, 1, 2));
/// let weights = norm::Weights::from(weight?).with_bias(bias?);
/// norm::layer_norm(&stream, x?, weights, 0.0, &mut RowsMut::from_slice(&mut y, 1, 2)?)?;
/// assert_eq!(y, [-1.5, 2.25]);
/// # Ok::<(), dropless::Error>(())
/// ```
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Weights<'a> {
    /// `[1, D]`, the factor of each column.
    pub weight: WeightRows<'a>,
    /// `[1, D]`, added after the factor; none adds nothing. On a GPU of the type of `weight`.
    pub bias: Option<WeightRows<'a>>,
}

impl<'a> From<WeightRows<'a>> for Weights<'a> {
    fn from(weight: WeightRows<'a>) -> Weights<'a> {
        Weights { weight, bias: None }
    }
}

impl<'a, T: crate::Float> From<Rows<'a, T>> for Weights<'a> {
    fn from(weight: Rows<'a, T>) -> Weights<'a> {
        WeightRows::from(weight).into()
    }
}

impl<'a> Weights<'a> {
    /// With a bias, `[1, D]`.
    #[must_use]
    pub fn with_bias(self, bias: impl Into<WeightRows<'a>>) -> Weights<'a> {
        Weights { bias: Some(bias.into()), ..self }
    }

    /// The weight, and the bias where there is one, by their names.
    pub(super) fn rows(&self, names: Names) -> impl Iterator<Item = (&'static str, WeightRows<'a>)> + use<'a> {
        [(names.weight, Some(self.weight)), (names.bias, self.bias)].into_iter().filter_map(|(arg, rows)| Some((arg, rows?)))
    }

    pub(super) fn check(&self, names: Names, cols: usize) -> Result<(), Error> {
        self.rows(names).try_for_each(|(arg, rows)| {
            rows.check_floats(Op::Norm, arg)?;
            check_shape(Op::Norm, arg, "[1, D]", &[1, cols], &rows.dims())
        })
    }

    pub(super) fn accesses(&self, names: Names) -> impl Iterator<Item = (&'static str, Access<'a>)> + use<'a> {
        self.rows(names).map(|(arg, rows)| (arg, rows.vector_access()))
    }
}

/// What the rows of [`Weights`] are called in messages.
#[derive(Clone, Copy)]
pub(super) struct Names {
    weight: &'static str,
    bias: &'static str,
}

/// Of the norm itself.
pub(super) const OWN: Names = Names { weight: "weight", bias: "bias" };
/// Of the norm of what is added.
pub(super) const POST: Names = Names { weight: "post_weight", bias: "post_bias" };
