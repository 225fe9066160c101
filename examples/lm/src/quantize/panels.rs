//! One matrix of the input, 128 of its outputs at a time: read as floats, encoded, compared.

use std::ops::Range;
use std::sync::Mutex;

use dropless::{Bf16, F16, Float};

use super::encode::{Errors, MAX_WEIGHT, encode};
use crate::run::failure::{Failure, refuse_file};
use crate::run::header::{Tensor, TensorFile};
use crate::target::{GROUP, Stack, Target};

/// A tensor whose matrices are to be encoded.
pub struct Source<'a> {
    pub file: &'a TensorFile,
    pub tensor: &'a Tensor,
    pub stack: Stack,
}

/// Codes and scales of one matrix.
#[derive(Default)]
pub struct Encoded {
    pub codes: Vec<u8>,
    pub scales: Vec<u8>,
}

/// 128 outputs of a matrix: where their codes and scales go, and what became of them.
struct Panel<'a> {
    rows: Range<usize>,
    codes: &'a mut [u8],
    scales: &'a mut [u8],
    result: &'a mut Result<Errors, Failure>,
}

impl Source<'_> {
    /// Encodes matrix `number` into buffers that are made as large as they must be.
    pub fn encode(&self, number: usize, target: Target, threads: usize, into: &mut Encoded) -> Result<Errors, Failure> {
        let Stack { n, k, .. } = self.stack;
        into.codes.resize(n * target.row_bytes(k), 0);
        into.scales.resize(target.scale_bytes(n, k), 0);
        let mut results: Vec<_> = (0..n.div_ceil(GROUP)).map(|_| Ok(Errors::default())).collect();
        let codes = into.codes.chunks_mut(GROUP * target.row_bytes(k));
        let scales = into.scales.chunks_mut(target.scale_bytes(GROUP, k));
        let panels = results.iter_mut().zip(codes).zip(scales).enumerate().map(|(panel, ((result, codes), scales))| {
            let rows = panel * GROUP..n.min((panel + 1) * GROUP);
            Panel { rows, codes, scales, result }
        });
        let threads = threads.min(n.div_ceil(GROUP));
        let panels = Mutex::new(panels);
        let work = || {
            let mut values = Vec::new();
            while let Some(panel) = next(&panels) {
                *panel.result = self.panel(number, panel.rows, target, &mut values, panel.codes, panel.scales);
            }
        };
        std::thread::scope(|scope| {
            // Where a thread cannot be started, the others do its share.
            (1..threads).for_each(|_| drop(std::thread::Builder::new().spawn_scoped(scope, work)));
            work();
        });
        // In their order, so that the sum is the same for any number of threads.
        results.into_iter().try_fold(Errors::default(), |all, result| Ok(all.and(result?)))
    }

    fn panel(
        &self,
        number: usize,
        rows: Range<usize>,
        target: Target,
        values: &mut Vec<f32>,
        codes: &mut [u8],
        scales: &mut [u8],
    ) -> Result<Errors, Failure> {
        let first = rows.start;
        self.read(number, rows, values);
        if let Some(at) = values.iter().position(|value| value.is_nan() || value.abs() > MAX_WEIGHT) {
            let (row, col) = (first + at / self.stack.k, at % self.stack.k);
            return self.refuse(number, [row, col], values[at]);
        }
        Ok(encode(target, values, self.stack.k, codes, scales)?)
    }

    /// Outputs `rows` of a matrix, whose inputs then lie next to each other.
    fn read(&self, number: usize, rows: Range<usize>, values: &mut Vec<f32>) {
        let (bytes, stack) = (self.file.bytes(self.tensor), self.stack);
        match self.tensor.dtype.as_str() {
            "BF16" => read(bytes, stack, number, rows, values, |bytes| Bf16(u16::from_le_bytes(bytes)).to_f32()),
            "F16" => read(bytes, stack, number, rows, values, |bytes| F16(u16::from_le_bytes(bytes)).to_f32()),
            _ => read(bytes, stack, number, rows, values, f32::from_le_bytes),
        }
    }

    /// Says where in the tensor of the file the weight of output `row` and input `col` is.
    fn refuse<T>(&self, number: usize, [row, col]: [usize; 2], weight: f32) -> Result<T, Failure> {
        let Stack { n, k, transposed, .. } = self.stack;
        let mut left = number * n * k + if transposed { col * n + row } else { row * k + col };
        let mut place: Vec<usize> = self.tensor.shape.iter().rev().map(|size| (left % size, left /= size).0).collect();
        place.reverse();
        let (name, file) = (&self.tensor.name, &self.file.path);
        refuse_file(file, format_args!("tensor `{name}` is {weight:e} at {place:?}; weights must be finite, and at most {MAX_WEIGHT:e}"))
    }
}

/// The lock is held for this call alone.
fn next<'a>(panels: &Mutex<impl Iterator<Item = Panel<'a>>>) -> Option<Panel<'a>> {
    panels.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next()
}

fn read<const BYTES: usize>(
    bytes: &[u8],
    stack: Stack,
    number: usize,
    rows: Range<usize>,
    values: &mut Vec<f32>,
    widen: impl Fn([u8; BYTES]) -> f32,
) {
    let Stack { n, k, transposed, .. } = stack;
    let matrix = &bytes.as_chunks::<BYTES>().0[number * n * k..(number + 1) * n * k];
    if !transposed {
        values.clear();
        values.extend(matrix[rows.start * k..rows.end * k].iter().map(|bytes| widen(*bytes)));
        return;
    }
    values.resize(rows.len() * k, 0.0);
    for (input, outputs) in matrix.chunks_exact(n).enumerate() {
        for (row, bytes) in outputs[rows.clone()].iter().enumerate() {
            values[row * k + input] = widen(*bytes);
        }
    }
}
