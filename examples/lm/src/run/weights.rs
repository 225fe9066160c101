//! Where the weights lie: in a mapped checkpoint, as seeded random numbers, or as copies of either on a GPU.

use std::collections::BTreeMap;

use dropless::{DType, WeightRows};

use super::checkpoint::Checkpoint;
use super::config::Config;
use super::decoder::Matrix;
use super::failure::{Failure, refuse};
use super::progress::Progress;
use super::spec::Spec;

mod buffers;
mod copies;
mod footprint;
mod mapped;
mod pieces;
mod quantized;
mod seeded;
mod streamed;
mod upload;
mod vectors;

pub use self::buffers::stride;
pub use self::copies::Copying;
pub use self::footprint::{Footprint, footprint, footprint_of};
pub use self::mapped::Mapped;
pub use self::seeded::seeded;
pub use self::streamed::{Source, layers};
pub use self::upload::Uploaded;
pub use self::vectors::vectors;

/// Matrices of a model, somewhere.
pub trait Tensors: Sync {
    /// The tensors of the matrix that is the `index`-th of the list, in the order of their names.
    fn parts(&self, index: usize, spec: &Spec) -> Result<Vec<WeightRows<'_>>, Failure>;
}

/// Views of matrices, by the name of their first tensor, and of the f32 vectors.
pub struct Matrices<'a> {
    views: BTreeMap<String, Vec<WeightRows<'a>>>,
    vectors: Option<&'a Matrices<'a>>,
}

impl<'a> Matrices<'a> {
    /// Those of a list.
    pub fn new(tensors: &'a dyn Tensors, specs: &[Spec]) -> Result<Matrices<'a>, Failure> {
        let view = |(index, spec): (usize, &Spec)| Ok((spec.name(), tensors.parts(index, spec)?));
        Ok(Matrices { views: specs.iter().enumerate().map(view).collect::<Result<_, Failure>>()?, vectors: None })
    }

    /// With vectors that lie elsewhere.
    pub fn beside(self, vectors: &'a Matrices<'a>) -> Matrices<'a> {
        Matrices { vectors: Some(vectors), ..self }
    }

    /// The vectors beside these matrices.
    pub fn vectors(&self) -> Option<&'a Matrices<'a>> {
        self.vectors
    }

    /// One of them.
    pub fn get(&self, spec: &Spec) -> Result<Matrix<'_>, Failure> {
        let name = spec.name();
        match (self.views.get(&name), self.vectors) {
            (Some(parts), _) => Ok(Matrix::new(spec, parts)),
            (None, Some(vectors)) => vectors.get(spec),
            (None, None) => refuse(format!("tensor `{name}` was not loaded")),
        }
    }
}

/// Bytes of some matrices of that type.
pub fn bytes_of(specs: &[Spec], dtype: DType) -> u64 {
    let elements = |spec: &Spec| spec.stacked_dims().iter().map(|size| *size as u64).product::<u64>();
    specs.iter().map(elements).sum::<u64>().saturating_mul(dtype.size_bytes() as u64)
}

impl<T: Tensors> Tensors for &T {
    fn parts(&self, index: usize, spec: &Spec) -> Result<Vec<WeightRows<'_>>, Failure> {
        (**self).parts(index, spec)
    }
}

/// The same matrices, whose products take inputs as they are if `exact`.
fn with_exact_inputs(parts: Vec<WeightRows<'_>>, exact: bool) -> Vec<WeightRows<'_>> {
    let of = |part| match part {
        WeightRows::Quantized(rows) if exact => rows.with_exact_inputs().into(),
        part => part,
    };
    parts.into_iter().map(of).collect()
}

fn not_weights<T>(dtype: DType) -> Result<T, Failure> {
    refuse(format!("weights of type {} are not supported", dtype.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every view of a checkpoint is the bytes of its tensor, where the file is mapped.
    #[test]
    fn a_checkpoint_is_used_where_it_lies() {
        for model in ["dbrx/tiny-dbrx-f32-sharded", "mixtral/mixtral-tiny"] {
            let folder = dropless_kit::goldens::path(model);
            let config = super::super::families::read_config(&folder.join("config.json")).unwrap();
            let checkpoint = Checkpoint::open(&folder, &config, &Progress::new(false)).unwrap();
            let specs: Vec<Spec> = config.family.specs(&config).collect();
            let matrices = Matrices::new(&checkpoint, &specs).unwrap();
            let mut elements = 0;
            for spec in &specs {
                let parts = matrices.get(spec).unwrap().parts;
                assert_eq!(parts.len(), spec.tensors);
                for (name, part) in spec.names().zip(parts) {
                    let WeightRows::F32(rows) = part else { panic!("{name} is f32 in the file") };
                    let (view, bytes) = (rows.as_slice().unwrap(), checkpoint.bytes(&name).unwrap());
                    assert_eq!(view.as_ptr().cast(), bytes.as_ptr(), "{name}");
                    assert_eq!(size_of_val(view), bytes.len(), "{name}");
                    elements += view.len() as u64;
                }
            }
            assert_eq!(elements, config.parameters(), "{model}");
        }
    }
}
