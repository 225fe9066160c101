//! Cosines and sines of rotary position embedding, computed once.

use crate::device::{Buffer, Stream};
use crate::error::{Error, Op};
use crate::shape::checked_product;
use crate::view::Rows;

/// `cos(p * w_j)` and `sin(p * w_j)` for `p < max_positions`, `j < rotary_dim / 2`, with `w_j = theta^(-2j / rotary_dim)`.
///
/// Frequencies and angles are computed in f32, as reference implementations do: at positions near 32k that is visible
/// (about 1e-3), and agreeing with the model's training matters more than exact angles.
#[derive(Debug)]
pub struct RopeTable {
    cos: Buffer<f32>,
    sin: Buffer<f32>,
    rotary_dim: usize,
    max_positions: usize,
}

impl RopeTable {
    /// # Errors
    ///
    /// [`Error::Value`] if `rotary_dim` is 0 or odd, or `theta` is not positive and finite; [`Error::OutOfMemory`].
    pub fn new(stream: &Stream, theta: f32, rotary_dim: usize, max_positions: usize) -> Result<RopeTable, Error> {
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            return Err(Error::Value { op: Op::RopeTable, arg: "rotary_dim", need: "even and at least 2", got: rotary_dim as f64 });
        }
        if !(theta > 0.0 && theta.is_finite()) {
            return Err(Error::Value { op: Op::RopeTable, arg: "theta", need: "positive and finite", got: f64::from(theta) });
        }
        let half = rotary_dim / 2;
        let len = checked_product(Op::RopeTable, "elements", &[max_positions, half], isize::MAX as usize / 8)?;
        let frequencies = collect(half, (0..half).map(|j| 1.0 / theta.powf((2 * j) as f32 / rotary_dim as f32)))?;
        let angles = || (0..max_positions).flat_map(|p| frequencies.iter().map(move |w| p as f32 * w));
        let fill = |f: fn(f32) -> f32| Buffer::from_slice(stream, &collect(len, angles().map(f))?);
        Ok(RopeTable { cos: fill(f32::cos)?, sin: fill(f32::sin)?, rotary_dim, max_positions })
    }

    /// Leading elements of a head that are rotated.
    pub fn rotary_dim(&self) -> usize {
        self.rotary_dim
    }

    /// Positions covered.
    pub fn max_positions(&self) -> usize {
        self.max_positions
    }

    /// `[max_positions, rotary_dim / 2]`.
    pub(crate) fn cos(&self) -> Result<Rows<'_, f32>, Error> {
        self.cos.rows(self.max_positions, self.rotary_dim / 2)
    }

    /// `[max_positions, rotary_dim / 2]`.
    pub(crate) fn sin(&self) -> Result<Rows<'_, f32>, Error> {
        self.sin.rows(self.max_positions, self.rotary_dim / 2)
    }
}

/// All `len` values, if there is memory for them.
fn collect(len: usize, values: impl Iterator<Item = f32>) -> Result<Vec<f32>, Error> {
    let mut collected = Vec::new();
    let out_of_memory = |_| Error::OutOfMemory { op: Op::RopeTable, need_bytes: (len as u64).saturating_mul(4) };
    collected.try_reserve_exact(len).map_err(out_of_memory)?;
    collected.extend(values);
    Ok(collected)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    #[test]
    fn position_zero_is_the_identity() {
        let stream = Device::cpu().stream().unwrap();
        let table = RopeTable::new(&stream, 5e5, 8, 3).unwrap();
        assert_eq!(table.cos().unwrap().host().row(0), [1.0; 4]);
        assert_eq!(table.sin().unwrap().host().row(0), [0.0; 4]);
        assert!((table.sin().unwrap().host().row(2)[0] - 2.0f32.sin()).abs() < 1e-6);
    }

    #[test]
    fn nonsense_is_refused() {
        let stream = Device::cpu().stream().unwrap();
        for (theta, dim) in [(1e4, 0), (1e4, 7), (0.0, 8), (-1.0, 8), (f32::NAN, 8), (f32::INFINITY, 8)] {
            assert!(matches!(RopeTable::new(&stream, theta, dim, 4), Err(Error::Value { .. })), "{theta} {dim}");
        }
    }

    #[test]
    fn more_columns_than_memory_are_refused() {
        let stream = Device::cpu().stream().unwrap();
        for (dim, positions) in [(usize::MAX - 1, 0), (usize::MAX - 1, 1), (1 << 63, 0), (1 << 63, 1)] {
            let refused = RopeTable::new(&stream, 1e4, dim, positions).unwrap_err();
            assert!(matches!(refused, Error::OutOfMemory { .. } | Error::TooLarge { .. }), "{dim} {positions}: {refused}");
        }
    }
}
