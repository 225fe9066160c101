//! Cosines and sines of rotary position embedding.
#![allow(unsafe_code)] // the raw constructor

mod scaling;

pub use self::scaling::RopeScaling;
use crate::device::{Buffer, Stream};
use crate::error::{Error, Op, Place, check_shape};
use crate::shape::checked_product;
use crate::view::Rows;

/// Cosines and sines for the positions below `max_positions` and the `rotary_dim / 2` pairs of a head.
///
/// ```
/// use dropless::{Device, RopeScaling, RopeTable};
/// let stream = Device::cpu().stream()?;
/// let plain = RopeTable::new(&stream, 5e5, 128, 4096)?;
/// let linear = RopeTable::scaled(&stream, 5e5, 128, 4096, &RopeScaling::Linear { factor: 4.0 })?;
/// assert_eq!((plain.rotary_dim(), linear.rotary_dim(), linear.max_positions()), (128, 128, 4096));
/// # Ok::<(), dropless::Error>(())
/// ```
#[derive(Debug)]
pub struct RopeTable {
    memory: Memory,
    rotary_dim: usize,
    max_positions: usize,
}

#[derive(Debug)]
enum Memory {
    Owned {
        cos: Buffer<f32>,
        sin: Buffer<f32>,
    },
    /// Of a caller that has promised what `from_raw` says.
    Foreign {
        place: Place,
        cos: u64,
        sin: u64,
        stride: usize,
    },
}

impl RopeTable {
    /// `cos(p * w_j)` and `sin(p * w_j)` with `w_j = theta^(-2j / rotary_dim)`.
    ///
    /// Frequencies and angles are computed in f32, as reference implementations do: at positions near 32k that is visible
    /// (about 1e-3), and agreeing with the model's training matters more than exact angles.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] if `rotary_dim` is 0 or odd, `theta` is not positive and finite, or so small that an
    /// angle is not finite; [`Error::TooLarge`];
    /// [`Error::OutOfMemory`].
    pub fn new(stream: &Stream, theta: f32, rotary_dim: usize, max_positions: usize) -> Result<RopeTable, Error> {
        Self::scaled(stream, theta, rotary_dim, max_positions, &RopeScaling::None)
    }

    /// [`new`](Self::new) with the frequencies of a [`RopeScaling`], and cosines and sines multiplied by its
    /// [`attention_factor`](RopeScaling::attention_factor).
    ///
    /// # Errors
    ///
    /// Those of [`RopeScaling::frequencies`] and of [`from_frequencies`](Self::from_frequencies);
    /// [`Error::TooLarge`].
    pub fn scaled(
        stream: &Stream,
        theta: f32,
        rotary_dim: usize,
        max_positions: usize,
        scaling: &RopeScaling<'_>,
    ) -> Result<RopeTable, Error> {
        table_len(max_positions, half_of(rotary_dim)?)?;
        let frequencies = scaling.frequencies(theta, rotary_dim)?;
        Self::from_frequencies(stream, &frequencies, max_positions, scaling.attention_factor())
    }

    /// `scale * cos(p * frequencies[j])` and `scale * sin(p * frequencies[j])`, in f32 like
    /// [`new`](Self::new), for frequencies that no [`RopeScaling`] gives. Hugging Face calls `scale`
    /// `attention_scaling`.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] if there is no frequency, or one of them, its angle at the last position, or `scale`
    /// is not finite; [`Error::TooLarge`]; [`Error::OutOfMemory`].
    pub fn from_frequencies(stream: &Stream, frequencies: &[f32], max_positions: usize, scale: f32) -> Result<RopeTable, Error> {
        let refuse = |arg, need, got| Err(Error::Value { op: Op::RopeTable, arg, need, got });
        if frequencies.is_empty() {
            return refuse("frequencies", "at least one", 0.0);
        }
        if let Some(wrong) = frequencies.iter().find(|frequency| !frequency.is_finite()) {
            return refuse("frequencies", "finite", f64::from(*wrong));
        }
        if !scale.is_finite() {
            return refuse("scale", "finite", f64::from(scale));
        }
        let last = max_positions.saturating_sub(1) as f32;
        if let Some(wrong) = frequencies.iter().find(|frequency| !(last * **frequency).is_finite()) {
            return refuse("frequencies", "so small that the last position's angle is finite", f64::from(*wrong));
        }
        let len = table_len(max_positions, frequencies.len())?;
        let angles = || (0..max_positions).flat_map(|p| frequencies.iter().map(move |w| p as f32 * w));
        let fill = |f: fn(f32) -> f32| Buffer::from_slice(stream, &collect(len, angles().map(|angle| f(angle) * scale))?);
        let memory = Memory::Owned { cos: fill(f32::cos)?, sin: fill(f32::sin)? };
        Ok(RopeTable { memory, rotary_dim: 2 * frequencies.len(), max_positions })
    }

    /// Tables that were computed elsewhere, `[max_positions, rotary_dim / 2]` each, copied to the stream's device.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] if `rotary_dim` is 0 or odd; [`Error::Shape`] if `cos` does not consist of whole rows or `sin` is not as
    /// long; [`Error::OutOfMemory`].
    pub fn from_tables(stream: &Stream, cos: &[f32], sin: &[f32], rotary_dim: usize) -> Result<RopeTable, Error> {
        let half = half_of(rotary_dim)?;
        let max_positions = cos.len() / half;
        check_shape(Op::RopeTable, "cos", "[max_positions * rotary_dim / 2]", &[max_positions * half], &[cos.len()])?;
        check_shape(Op::RopeTable, "sin", "[max_positions * rotary_dim / 2]", &[cos.len()], &[sin.len()])?;
        let memory = Memory::Owned { cos: Buffer::from_slice(stream, cos)?, sin: Buffer::from_slice(stream, sin)? };
        Ok(RopeTable { memory, rotary_dim, max_positions })
    }

    /// Tables in memory that this crate does not own: the addresses of the first cosine and the first sine, rows of `rotary_dim / 2`
    /// elements of `f32` that begin `stride` elements apart. vLLM's `cos_sin_cache` `[max_positions, rotary_dim]` in f32 has its sines
    /// `rotary_dim / 2` elements behind its cosines and a stride of `rotary_dim`.
    ///
    /// # Safety
    ///
    /// Those elements lie in one allocation at `place`, aligned for `f32` and initialised. They stay valid and are not written, until the
    /// work that is given this table completes.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] if `rotary_dim` is 0 or odd; [`Error::Layout`] if rows overlap; [`Error::TooLarge`].
    pub unsafe fn from_raw(
        place: Place,
        [cos, sin]: [u64; 2],
        rotary_dim: usize,
        max_positions: usize,
        stride: usize,
    ) -> Result<RopeTable, Error> {
        half_of(rotary_dim)?;
        let table = RopeTable { memory: Memory::Foreign { place, cos, sin, stride }, rotary_dim, max_positions };
        table.cos().and(table.sin())?;
        Ok(table)
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
        match &self.memory {
            Memory::Owned { cos, .. } => cos.rows(self.max_positions, self.rotary_dim / 2),
            Memory::Foreign { place, cos, stride, .. } => self.foreign(*place, *cos, *stride),
        }
    }

    /// `[max_positions, rotary_dim / 2]`.
    pub(crate) fn sin(&self) -> Result<Rows<'_, f32>, Error> {
        match &self.memory {
            Memory::Owned { sin, .. } => sin.rows(self.max_positions, self.rotary_dim / 2),
            Memory::Foreign { place, sin, stride, .. } => self.foreign(*place, *sin, *stride),
        }
    }

    fn foreign(&self, place: Place, address: u64, stride: usize) -> Result<Rows<'_, f32>, Error> {
        // SAFETY: promised to `from_raw`.
        unsafe { Rows::from_raw(place, address, self.max_positions, self.rotary_dim / 2, stride) }
    }
}

/// Pairs of so many elements.
fn half_of(rotary_dim: usize) -> Result<usize, Error> {
    if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
        return Err(Error::Value { op: Op::RopeTable, arg: "rotary_dim", need: "even and at least 2", got: rotary_dim as f64 });
    }
    Ok(rotary_dim / 2)
}

fn table_len(max_positions: usize, half: usize) -> Result<usize, Error> {
    checked_product(Op::RopeTable, "elements", &[max_positions, half], isize::MAX as usize / 8)
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
    fn frequencies_and_tables_give_the_same() {
        let stream = Device::cpu().stream().unwrap();
        let table = RopeTable::new(&stream, 5e5, 8, 3).unwrap();
        let frequencies: Vec<f32> = (0..4).map(|j| 1.0 / 5e5f32.powf((2 * j) as f32 / 8.0)).collect();
        let elements = |table: &RopeTable| [table.cos(), table.sin()].map(|part| part.unwrap().to_vec(&stream).unwrap());
        let [cos, sin] = elements(&table);
        assert_eq!(elements(&RopeTable::from_frequencies(&stream, &frequencies, 3, 1.0).unwrap()), [&cos[..], &sin]);
        let twice = RopeTable::from_frequencies(&stream, &frequencies, 3, 2.0).unwrap();
        assert_eq!(elements(&twice), [&cos, &sin].map(|part| part.iter().map(|x| 2.0 * x).collect::<Vec<_>>()));
        let copied = RopeTable::from_tables(&stream, &cos, &sin, 8).unwrap();
        assert_eq!((elements(&copied), copied.max_positions()), ([cos.clone(), sin.clone()], 3));
        // As vLLM has them: a position's cosines, then its sines.
        let both: Vec<f32> = cos.chunks(4).zip(sin.chunks(4)).flat_map(|(cos, sin)| [cos, sin].concat()).collect();
        let addresses = [&both[0], &both[4]].map(|first| std::ptr::from_ref(first).expose_provenance() as u64);
        // SAFETY: the rows of `both`, which outlives the table.
        let foreign = unsafe { RopeTable::from_raw(Place::Host, addresses, 8, 3, 8) }.unwrap();
        assert_eq!(elements(&foreign), [cos, sin]);
    }

    #[test]
    fn tables_that_do_not_fit_are_refused() {
        let stream = Device::cpu().stream().unwrap();
        let text = |table: Result<RopeTable, Error>| table.unwrap_err().to_string();
        let frequencies = |frequencies: &[f32], scale| text(RopeTable::from_frequencies(&stream, frequencies, 4, scale));
        assert_eq!(frequencies(&[], 1.0), "rope_table: `frequencies` must be at least one, got 0");
        assert_eq!(frequencies(&[1.0, f32::NAN], 1.0), "rope_table: `frequencies` must be finite, got NaN");
        assert_eq!(frequencies(&[1.0], f32::INFINITY), "rope_table: `scale` must be finite, got inf");
        let tables = |cos: &[f32], sin: &[f32], rotary_dim| text(RopeTable::from_tables(&stream, cos, sin, rotary_dim));
        assert_eq!(tables(&[0.0; 5], &[0.0; 5], 4), "rope_table: `cos` must be [max_positions * rotary_dim / 2] = [4], got [5]");
        assert_eq!(tables(&[0.0; 4], &[0.0; 6], 4), "rope_table: `sin` must be [max_positions * rotary_dim / 2] = [4], got [6]");
        assert_eq!(tables(&[0.0; 4], &[0.0; 4], 3), "rope_table: `rotary_dim` must be even and at least 2, got 3");
        // SAFETY: refused.
        let raw = |rotary_dim, stride| text(unsafe { RopeTable::from_raw(Place::Host, [64; 2], rotary_dim, 3, stride) });
        assert_eq!(raw(7, 8), "rope_table: `rotary_dim` must be even and at least 2, got 7");
        assert_eq!(raw(8, 3), "view: `stride` must have at least `cols` elements, got 3");
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
