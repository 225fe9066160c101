//! A checkpoint's matrices in a GPU's memory: floats in the type of activations, quantised ones as they lie
//! in the files or in tiles. What lies in an order that no operation takes is made anew on the host first,
//! matrix by matrix.

use std::time::Instant;

use dropless::{Bf16, DType, F16, QuantizedRows, Stream, WeightRows};
use indicatif::ProgressBar;

use super::super::decoder::Matrix;
use super::buffers::{Buffers, Weight};
use super::footprint::footprint;
use super::pieces::float_pieces;
use super::quantized::{Quantized, Tiled, tiles_for};
use super::upload::{Uploaded, Uploader};
use super::{Checkpoint, Failure, Mapped, Progress, Spec, Tensors, not_weights, refuse};

/// One matrix, that of all experts.
enum Copied<A> {
    Floats(Buffers<A>),
    Quantized(Quantized),
    Tiled(Tiled),
}

/// The first matrices of a list, in its order.
struct Copies<A> {
    matrices: Vec<Copied<A>>,
    /// Products take inputs as they are.
    exact: bool,
}

/// How matrices are copied.
#[derive(Clone, Copy)]
pub struct Copying<'a> {
    pub checkpoint: &'a Checkpoint,
    pub activations: DType,
    pub exact: bool,
    pub threads: usize,
}

impl Copying<'_> {
    /// Copies of some matrices on the stream's device, and how long they took.
    pub fn upload(self, stream: &Stream, specs: &[Spec], progress: &Progress) -> Result<(Box<dyn Tensors>, Uploaded), Failure> {
        match self.activations {
            DType::F32 => self.upload_for::<f32>(stream, specs, progress),
            DType::Bf16 => self.upload_for::<Bf16>(stream, specs, progress),
            DType::F16 => self.upload_for::<F16>(stream, specs, progress),
            other => not_weights(other),
        }
    }

    fn upload_for<A: Weight>(self, stream: &Stream, specs: &[Spec], progress: &Progress) -> Result<(Box<dyn Tensors>, Uploaded), Failure> {
        let (copies, uploaded) = self.copies::<A>(stream, specs, progress)?;
        Ok((Box::new(copies), uploaded))
    }

    fn copies<A: Weight>(self, stream: &Stream, specs: &[Spec], progress: &Progress) -> Result<(Copies<A>, Uploaded), Failure> {
        let begin = Instant::now();
        let mut bytes = 0;
        for spec in specs {
            bytes += footprint(self.checkpoint, spec, A::DTYPE)?.copied();
        }
        let bar = progress.bytes("to the GPU", bytes);
        let mut uploader = Uploader::new(stream, self.threads)?;
        let mut matrices = Vec::with_capacity(specs.len());
        for spec in specs {
            let host = Mapped::new(self.checkpoint, std::slice::from_ref(spec), false, &Progress::new(false))?;
            matrices.push(Copied::<A>::new(stream, &mut uploader, spec, &host.parts(0, spec)?, &bar)?);
        }
        let threads = uploader.threads();
        drop(uploader); // waits for its streams, and gives their pinned memory back
        stream.synchronize()?;
        let repacked = matrices.iter().filter(|matrix| matches!(matrix, Copied::Tiled(_))).count();
        let uploaded = Uploaded { bytes, seconds: begin.elapsed().as_secs_f64(), threads, repacked };
        Ok((Copies { matrices, exact: self.exact }, uploaded))
    }
}

impl<A: Weight> Copied<A> {
    fn new(
        stream: &Stream,
        uploader: &mut Uploader,
        spec: &Spec,
        parts: &[WeightRows<'_>],
        bar: &ProgressBar,
    ) -> Result<Copied<A>, Failure> {
        let Some(host) = parts.iter().map(quantized).collect::<Option<Vec<_>>>() else {
            let mut floats = Buffers::zeros(stream, std::slice::from_ref(spec))?;
            let pieces = float_pieces(&mut floats.0[0], spec, parts)?;
            uploader.copy_in_order(stream, pieces, bar)?;
            return Ok(Copied::Floats(floats));
        };
        let mut copy = Quantized::new(stream, &host, spec)?;
        uploader.copy_in_order(stream, copy.pieces(&host, spec)?, bar)?;
        let views = copy.views()?;
        let w = Matrix::new(spec, &views).weights()?;
        match tiles_for(A::DTYPE, spec, &w) {
            // The copy in the order of the checkpoint is freed when the device has read it.
            Some(tiles) => Ok(Copied::Tiled(Tiled::repacked(stream, w, tiles, spec)?)),
            None => Ok(Copied::Quantized(copy)),
        }
    }

    fn parts(&self, spec: &Spec) -> Result<Vec<WeightRows<'_>>, Failure> {
        match self {
            Copied::Floats(matrix) => matrix.parts(0, spec),
            Copied::Quantized(matrix) => Ok(matrix.views()?),
            Copied::Tiled(matrix) => Ok(vec![matrix.view()?.into()]),
        }
    }
}

fn quantized<'a>(part: &WeightRows<'a>) -> Option<QuantizedRows<'a>> {
    if let WeightRows::Quantized(rows) = part { Some(*rows) } else { None }
}

impl<A: Weight> Tensors for Copies<A> {
    fn parts(&self, index: usize, spec: &Spec) -> Result<Vec<WeightRows<'_>>, Failure> {
        let Some(matrix) = self.matrices.get(index) else { return refuse(format!("tensor `{}` was not loaded", spec.name())) };
        Ok(super::with_exact_inputs(matrix.parts(spec)?, self.exact))
    }
}

#[cfg(test)]
mod tests {
    use dropless_kit::compare::same_bits;
    use dropless_kit::{device, goldens};

    use super::super::super::families;
    use super::*;

    /// One thread or several: the bytes of the files, those of the experts one behind the other.
    #[test]
    fn any_number_of_threads_copies_the_same_bits() {
        for model in ["dbrx/tiny-dbrx-f32-sharded", "mixtral/mixtral-tiny"] {
            let (folder, progress) = (goldens::path(model), Progress::new(false));
            let config = families::read_config(&folder.join("config.json")).unwrap();
            let checkpoint = Checkpoint::open(&folder, &config, &progress).unwrap();
            let specs: Vec<Spec> = config.family.specs(&config).collect();
            for threads in [1, 4] {
                let (driver, stream) = device::emulated();
                let copying = Copying { checkpoint: &checkpoint, activations: DType::F32, exact: false, threads };
                let (copies, uploaded) = copying.copies::<f32>(&stream, &specs, &progress).unwrap();
                assert_eq!((uploaded.bytes, uploaded.threads), (4 * config.parameters(), threads));
                for (index, spec) in specs.iter().enumerate() {
                    let parts = checkpoint.parts(index, spec).unwrap();
                    let want = parts.iter().map(f32::elements).collect::<Option<Vec<_>>>().unwrap().concat();
                    let Copied::Floats(matrix) = &copies.matrices[index] else { panic!("{} is f32", spec.name()) };
                    same_bits(&matrix.0[0].to_vec(&stream).unwrap(), &want);
                }
                assert_eq!(driver.reports(), [""; 0]);
            }
        }
    }
}
