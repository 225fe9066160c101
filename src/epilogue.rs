//! What is done to the sums of a product before they are stored: a bias, then an activation or a gate.
//!
//! ```
//! use dropless::{Bf16, Rows};
//! use dropless::activation::Glu;
//! use dropless::epilogue::{Bias, GluEpilogue};
//!
//! // Biases of gate and up in turn, for four experts of two outputs, and the activation of gpt-oss.
//! let biases = [Bf16(0); 4 * 2 * 2];
//! let biases = Bias::interleaved(Rows::from_slice(&biases, 4, 4)?)?;
//! let epilogue = GluEpilogue::default().with_biases(biases).with_glu(Glu::GPT_OSS);
//! # let _ = epilogue;
//! # Ok::<(), dropless::Error>(())
//! ```

#[cfg(feature = "cuda")]
pub(crate) mod params;

use crate::activation::{Activation, Glu};
use crate::device::Access;
use crate::dtype::{DType, Float};
use crate::error::{Error, Op, check_shape};
use crate::weights::{WeightRows, with_rows};

/// One number for each output of each expert, added to its sum. The elements may lie in every second column.
#[derive(Clone, Copy)]
pub struct Bias<'a> {
    rows: WeightRows<'a>,
    first: usize,
    step: usize,
    n: usize,
}

impl<'a> Bias<'a> {
    /// `[E, N]`.
    pub fn new(rows: impl Into<WeightRows<'a>>) -> Bias<'a> {
        let rows = rows.into();
        Bias { rows, first: 0, step: 1, n: rows.cols() }
    }

    /// The biases of gate and up, where they are packed as `[E, 2F]`: the first F columns, and the others.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] if the number of columns is odd.
    pub fn halves(rows: impl Into<WeightRows<'a>>) -> Result<[Bias<'a>; 2], Error> {
        let rows = rows.into();
        let n = half(&rows)?;
        Ok([0, n].map(|first| Bias { rows, first, step: 1, n }))
    }

    /// The biases of gate and up, where they are stored in turn as `[E, 2F]`: the even columns, and the odd ones.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] if the number of columns is odd.
    pub fn interleaved(rows: impl Into<WeightRows<'a>>) -> Result<[Bias<'a>; 2], Error> {
        let rows = rows.into();
        let n = half(&rows)?;
        Ok([0, 1].map(|first| Bias { rows, first, step: 2, n }))
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.rows.dtype()
    }

    pub(crate) fn check(&self, op: Op, arg: &'static str, [num_experts, n]: [usize; 2]) -> Result<(), Error> {
        self.rows.check_floats(op, arg)?;
        check_shape(op, arg, "[E, N]", &[num_experts, n], &[self.rows.rows(), self.n])
    }

    pub(crate) fn access(&self) -> Access<'a> {
        self.rows.access()
    }

    /// Adds the expert's bias of the outputs `first..first + sums.len()`.
    pub(crate) fn add_to(&self, sums: &mut [f32], expert: usize, first: usize) {
        with_rows!(&self.rows, rows => {
            let bias = rows.host().row(expert);
            let bias = bias[self.first..].iter().step_by(self.step).skip(first);
            sums.iter_mut().zip(bias).for_each(|(sum, bias)| *sum += bias.to_f32());
        });
    }

    /// Address of the first expert's first element, elements from one expert to the next, and from one output to the next.
    #[cfg(feature = "cuda")]
    pub(crate) fn place_on_device(&self) -> (u64, usize, usize) {
        (self.rows.address() + (self.first * self.rows.dtype().size_bytes()) as u64, self.rows.stride(), self.step)
    }
}

fn half(rows: &WeightRows<'_>) -> Result<usize, Error> {
    if rows.cols().is_multiple_of(2) {
        return Ok(rows.cols() / 2);
    }
    Err(Error::Value { op: Op::ExpertWeights, arg: "bias", need: "of an even number of columns", got: rows.cols() as f64 })
}

/// Of one product: `y = activation(sum + bias)`.
#[derive(Clone, Copy, Default)]
#[non_exhaustive]
pub struct Epilogue<'a> {
    /// `[E, N]`; none adds nothing.
    pub bias: Option<Bias<'a>>,
    /// What the biased sum becomes.
    pub activation: Activation,
}

impl<'a> Epilogue<'a> {
    /// With a bias for each output of each expert.
    #[must_use]
    pub fn with_bias(self, bias: Bias<'a>) -> Epilogue<'a> {
        Epilogue { bias: Some(bias), ..self }
    }

    /// With an activation.
    #[must_use]
    pub fn with_activation(self, activation: Activation) -> Epilogue<'a> {
        Epilogue { activation, ..self }
    }
}

/// Of two products: `h = glu(gate sum + gate bias, up sum + up bias)`.
#[derive(Clone, Copy, Default)]
#[non_exhaustive]
pub struct GluEpilogue<'a> {
    /// `[E, N]`; none adds nothing.
    pub gate_bias: Option<Bias<'a>>,
    /// `[E, N]`; none adds nothing.
    pub up_bias: Option<Bias<'a>>,
    /// What gate and up become.
    pub glu: Glu,
}

impl<'a> GluEpilogue<'a> {
    /// With biases for gate and up.
    #[must_use]
    pub fn with_biases(self, [gate, up]: [Bias<'a>; 2]) -> GluEpilogue<'a> {
        GluEpilogue { gate_bias: Some(gate), up_bias: Some(up), ..self }
    }

    /// With another gate than SiLU.
    #[must_use]
    pub fn with_glu(self, glu: Glu) -> GluEpilogue<'a> {
        GluEpilogue { glu, ..self }
    }
}

/// What both forms come to in a backend: `P` biases, and what the biased sums become.
#[derive(Clone, Copy)]
pub(crate) struct Finish<'a, const P: usize> {
    pub(crate) biases: [Option<Bias<'a>>; P],
    pub(crate) formula: Formula,
}

/// One formula, for one sum or for two.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Formula {
    One(Activation),
    Two(Glu),
}

impl<'a> From<Epilogue<'a>> for Finish<'a, 1> {
    fn from(Epilogue { bias, activation }: Epilogue<'a>) -> Finish<'a, 1> {
        Finish { biases: [bias], formula: Formula::One(activation) }
    }
}

impl<'a> From<GluEpilogue<'a>> for Finish<'a, 2> {
    fn from(GluEpilogue { gate_bias, up_bias, glu }: GluEpilogue<'a>) -> Finish<'a, 2> {
        Finish { biases: [gate_bias, up_bias], formula: Formula::Two(glu) }
    }
}

impl<const P: usize> Finish<'_, P> {
    /// The kernels' own formula without a bias: sums as they are, or `silu(first) * second`.
    #[cfg(feature = "cuda")]
    pub(crate) fn is_plain(&self) -> bool {
        let own = matches!(self.formula, Formula::One(Activation::Identity) | Formula::Two(Glu::Silu));
        own && self.biases.iter().all(Option::is_none)
    }
}
