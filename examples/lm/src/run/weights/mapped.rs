//! A checkpoint's weights on the CPU: used where they lie, except those that no operation takes as they are.
//!
//! | what | becomes | bytes |
//! |---|---|---|
//! | GPTQ and AWQ, which lie input after input | INT4 in the library's order, exactly | as many as in the file |
//! | GPTQ whose inputs are ordered by activations | f32, exactly: inputs that share a scale do not lie next to each other | 8 times the codes |
//! | quantised routers and gates of shared experts | f32, as the format says | few |

use std::collections::BTreeMap;

use dropless::quantized::Int4;
use dropless::{DType, Error, Rows, WeightRows};

use super::super::checkpoint::is_made;
use super::super::parallel::in_parallel;
use super::super::spec::Kind;
use super::super::stored::{Packed, Stored};
use super::{Checkpoint, Failure, Progress, Spec, Tensors, refuse, with_exact_inputs};

/// A checkpoint, and what was made of some of its tensors.
pub struct Mapped<'a> {
    checkpoint: &'a Checkpoint,
    made: BTreeMap<String, Made>,
    /// Products take inputs as they are.
    exact: bool,
}

/// One tensor, made anew.
enum Made {
    Int4(Int4),
    F32 { values: Vec<f32>, dims: [usize; 2] },
}

impl<'a> Mapped<'a> {
    /// Makes what has to be made for a list of matrices.
    pub fn new(checkpoint: &'a Checkpoint, specs: &[Spec], exact: bool, progress: &Progress) -> Result<Mapped<'a>, Failure> {
        let mut waiting = Vec::new();
        for spec in specs {
            let mut of_spec = Vec::new();
            for name in spec.names() {
                match checkpoint.stored(spec, &name)? {
                    Stored::Packed(packed) => of_spec.push((name, Waiting::Packed(packed))),
                    Stored::InPlace(parts) => {
                        if parts.iter().any(|part| is_made(spec, part.dtype())) {
                            of_spec.push((name, Waiting::Floats(parts)));
                        }
                    }
                }
            }
            // All experts of a layer are of one type.
            let floats = |waiting: &Waiting<'_>| match waiting {
                Waiting::Packed(packed) => packed.loaded() == DType::F32,
                Waiting::Floats(_) => true,
            };
            let becomes_f32 = spec.kind == Kind::Floats || of_spec.iter().any(|(_, waiting)| floats(waiting));
            waiting.extend(of_spec.into_iter().map(|(name, waiting)| (name, waiting, becomes_f32)));
        }
        let bar = progress.count("repacking", waiting.len() as u64, !waiting.is_empty());
        let make = |(name, waiting, becomes_f32): &(String, Waiting<'_>, bool)| {
            let made = waiting.make(*becomes_f32);
            bar.inc(1);
            (name.clone(), made)
        };
        let mut made = BTreeMap::new();
        for (name, one) in in_parallel(&waiting, make) {
            let one = one.or_else(|error| refuse(format!("tensor `{name}` cannot be loaded: {error}")))?;
            made.insert(name, one);
        }
        Ok(Mapped { checkpoint, made, exact })
    }
}

/// What one tensor is made of.
enum Waiting<'a> {
    Packed(Packed<'a>),
    Floats(Vec<WeightRows<'a>>),
}

impl Waiting<'_> {
    fn make(&self, becomes_f32: bool) -> Result<Made, Error> {
        let floats = |dims, values| Made::F32 { values, dims };
        Ok(match self {
            Waiting::Packed(Packed::Gptq(gptq)) if becomes_f32 => floats(gptq.dims(), gptq.to_f32()?),
            Waiting::Packed(Packed::Awq(awq)) if becomes_f32 => floats(awq.dims(), awq.to_f32()?),
            Waiting::Packed(Packed::Gptq(gptq)) => Made::Int4(gptq.to_int4()?),
            Waiting::Packed(Packed::Awq(awq)) => Made::Int4(awq.to_int4()?),
            Waiting::Floats(parts) => {
                let (mut values, mut dims) = (Vec::new(), [0, 0]);
                for part in parts {
                    if let WeightRows::Quantized(rows) = part {
                        values.extend(rows.to_f32()?);
                    }
                    dims = [dims[0] + part.rows(), part.cols()];
                }
                floats(dims, values)
            }
        })
    }
}

impl Tensors for Mapped<'_> {
    fn parts(&self, _: usize, spec: &Spec) -> Result<Vec<WeightRows<'_>>, Failure> {
        let mut parts = Vec::new();
        for name in spec.names() {
            match self.made.get(&name) {
                Some(Made::Int4(int4)) => parts.push(int4.rows()?.into()),
                Some(Made::F32 { values, dims: [rows, cols] }) => parts.push(Rows::from_slice(values, *rows, *cols)?.into()),
                None => parts.extend(in_place(self.checkpoint, spec, &name)?),
            }
        }
        Ok(with_exact_inputs(parts, self.exact))
    }
}

/// A tensor that is used where it lies.
fn in_place<'a>(checkpoint: &'a Checkpoint, spec: &Spec, name: &str) -> Result<Vec<WeightRows<'a>>, Failure> {
    match checkpoint.stored(spec, name)? {
        Stored::InPlace(parts) => Ok(parts),
        Stored::Packed(_) => refuse(format!("tensor `{name}` was not repacked")),
    }
}

/// A checkpoint that was checked against the configuration: nothing is copied.
impl Tensors for Checkpoint {
    fn parts(&self, _: usize, spec: &Spec) -> Result<Vec<WeightRows<'_>>, Failure> {
        let parts = spec.names().map(|name| in_place(self, spec, &name)).collect::<Result<Vec<_>, _>>()?;
        Ok(parts.into_iter().flatten().collect())
    }
}
