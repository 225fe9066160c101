//! Where the weights lie: in a mapped checkpoint, as seeded random numbers, or as copies of either on a GPU.

use std::collections::BTreeMap;

use dropless::{DType, WeightRows};

use super::checkpoint::Checkpoint;
use super::config::Config;
use super::decoder::{Matrix, Spec};
use super::failure::{Failure, refuse};
use super::progress::Progress;

mod buffers;
mod seeded;
mod streamed;
mod upload;

pub use self::seeded::seeded;
pub use self::streamed::{Source, layers};
pub use self::upload::{Uploaded, upload};

/// Matrices of a model, somewhere.
pub trait Tensors: Sync {
    /// The tensors of the matrix that is the `index`-th of the list, in the order of their names.
    fn parts(&self, index: usize, spec: &Spec) -> Result<Vec<WeightRows<'_>>, Failure>;
}

/// Views of all matrices of a model, by the first of their names.
pub struct Matrices<'a>(BTreeMap<String, Vec<WeightRows<'a>>>);

impl<'a> Matrices<'a> {
    /// Those of a list.
    pub fn new(tensors: &'a dyn Tensors, specs: &[Spec]) -> Result<Matrices<'a>, Failure> {
        let views = |(index, spec): (usize, &Spec)| Ok((spec.names[0].clone(), tensors.parts(index, spec)?));
        Ok(Matrices(specs.iter().enumerate().map(views).collect::<Result<_, Failure>>()?))
    }

    /// Some matrices.
    pub fn of<const N: usize>(&self, specs: [Spec; N]) -> Result<[Matrix<'_>; N], Failure> {
        let mut found = [Matrix(&[]); N];
        for (matrix, spec) in found.iter_mut().zip(&specs) {
            match self.0.get(&spec.names[0]) {
                Some(parts) => *matrix = Matrix(parts),
                None => return refuse(format!("tensor `{}` was not loaded", spec.names[0])),
            }
        }
        Ok(found)
    }
}

/// A checkpoint that was checked against the configuration: nothing is copied.
impl Tensors for Checkpoint {
    fn parts(&self, _: usize, spec: &Spec) -> Result<Vec<WeightRows<'_>>, Failure> {
        spec.names.iter().map(|name| self.rows(name, spec.dims())).collect()
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

fn not_weights<T>(dtype: DType) -> Result<T, Failure> {
    refuse(format!("weights of type {} are not supported", dtype.name()))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Every view of a checkpoint is the bytes of its tensor, where the file is mapped.
    #[test]
    fn a_checkpoint_is_used_where_it_lies() {
        for model in ["dbrx/tiny-dbrx-f32-sharded", "mixtral/mixtral-tiny"] {
            let folder = Path::new("tests/data").join(model);
            let config = super::super::families::read_config(&folder.join("config.json")).unwrap();
            let checkpoint = Checkpoint::open(&folder, &config, &Progress::new(false)).unwrap();
            let matrices = Matrices::new(&checkpoint, &config.family.specs(&config)).unwrap();
            let mut elements = 0;
            for spec in config.family.specs(&config) {
                let [Matrix(parts)] = matrices.of([spec.clone()]).unwrap();
                assert_eq!(parts.len(), spec.names.len());
                for (name, part) in spec.names.iter().zip(parts) {
                    let WeightRows::F32(rows) = part else { panic!("{name} is f32 in the file") };
                    let (view, bytes) = (rows.as_slice().unwrap(), checkpoint.bytes(name).unwrap());
                    assert_eq!(view.as_ptr().cast(), bytes.as_ptr(), "{name}");
                    assert_eq!(size_of_val(view), bytes.len(), "{name}");
                    elements += view.len() as u64;
                }
            }
            assert_eq!(elements, config.parameters(), "{model}");
        }
    }
}
