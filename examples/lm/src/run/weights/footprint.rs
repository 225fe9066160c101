//! Bytes that matrices of a checkpoint take in a GPU's memory, from what its files say.

use dropless::{DType, ExpertWeights, WeightRows};

use super::super::checkpoint::{becomes_f32, bytes_of};
use super::super::stored::{Packed, Stored};
use super::quantized::{tile_bytes, tiles_for};
use super::{Checkpoint, Config, Failure, Spec};

/// What stays, and what is there besides while the device repacks a matrix: its copy in another order.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Footprint {
    pub stays: u64,
    pub passes: u64,
}

impl Footprint {
    /// Bytes that are copied from the host.
    pub fn copied(self) -> u64 {
        if self.passes > 0 { self.passes } else { self.stays }
    }

    /// With another matrix, which is copied before or after.
    pub fn and(self, other: Footprint) -> Footprint {
        Footprint { stays: self.stays.saturating_add(other.stays), passes: self.passes.max(other.passes) }
    }
}

/// Of all matrices of a model.
pub fn footprint_of(checkpoint: &Checkpoint, config: &Config, activations: DType) -> Result<Footprint, Failure> {
    let mut matrices = config.family.specs(config).map(|spec| footprint(checkpoint, &spec, activations));
    matrices.try_fold(Footprint::default(), |all, one| Ok(all.and(one?)))
}

/// Of one matrix, that of all experts, with activations of that type.
pub fn footprint(checkpoint: &Checkpoint, spec: &Spec, activations: DType) -> Result<Footprint, Failure> {
    let found = spec.names().map(|name| checkpoint.stored(spec, &name)).collect::<Result<Vec<_>, _>>()?;
    let (mut parts, mut packed) = (Vec::<WeightRows<'_>>::new(), Vec::<Packed<'_>>::new());
    for stored in &found {
        match stored {
            Stored::InPlace(some) => parts.extend(some),
            Stored::Packed(one) => packed.push(*one),
        }
    }
    let are_floats = parts.first().is_some_and(|part| !matches!(part, WeightRows::Quantized(_)));
    if are_floats || becomes_f32(spec, &found) {
        let [rows, cols] = spec.stacked_dims();
        return Ok(Footprint { stays: rows as u64 * cols as u64 * activations.size_bytes() as u64, passes: 0 });
    }
    let bytes = parts.iter().map(bytes_of).chain(packed.iter().map(Packed::bytes)).sum();
    let tiles: Option<u64> = match packed.first() {
        Some(_) => (activations == DType::Bf16).then(|| packed.iter().map(Packed::tile_bytes).sum()),
        None => tiles_of(spec, &parts, activations),
    };
    Ok(tiles.map_or(Footprint { stays: bytes, passes: 0 }, |tiles| Footprint { stays: tiles, passes: bytes }))
}

/// Bytes in tiles, where a matrix is repacked.
fn tiles_of(spec: &Spec, parts: &[WeightRows<'_>], activations: DType) -> Option<u64> {
    let w = if let [stacked] = parts { ExpertWeights::nk(*stacked, spec.matrices) } else { ExpertWeights::nk_each(parts) };
    Some(tile_bytes(&tiles_for(activations, spec, &w.ok()?)?))
}
