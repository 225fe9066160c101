//! Copies of a checkpoint with other weights: tensors left out, of another type, or rounded to 16 bits.

use dropless::{Bf16, F16, Float};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::fixture::{Folder, checkpoint};

const MODEL: &str = "model.safetensors";

/// A tensor: shape, type and bytes.
type Tensor = (Vec<usize>, Dtype, Vec<u8>);
/// What stays of one, or nothing.
pub type Edited = Option<Tensor>;

/// A file of tensors after an edit of each.
pub fn edited(file: &[u8], edit: impl Fn(&str, &TensorView<'_>) -> Edited) -> Vec<u8> {
    let tensors = SafeTensors::deserialize(file).unwrap();
    let edited = tensors.iter().filter_map(|(name, tensor)| Some((name, edit(name, &tensor)?)));
    let edited: Vec<(&str, Tensor)> = edited.collect();
    let views = edited.iter().map(|(name, (shape, dtype, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

/// A checkpoint's file of weights after an edit of type and bytes.
pub fn rewritten(name: &str, edit: impl Fn(&str, &[u8]) -> Option<(Dtype, Vec<u8>)>) -> Vec<u8> {
    let whole = std::fs::read(checkpoint(name).join(MODEL)).unwrap();
    edited(&whole, |name, tensor| edit(name, tensor.data()).map(|(dtype, bytes)| (tensor.shape().to_vec(), dtype, bytes)))
}

/// The checkpoint with other weights.
pub fn with_weights(name: &str, bytes: Vec<u8>) -> Folder {
    let folder = Folder::copy_of(name);
    folder.edit(MODEL, |old| *old = bytes);
    folder
}

/// A type of weights of 16 bits.
pub struct Narrow {
    pub dtype: Dtype,
    bits: fn(f32) -> u16,
    value: fn(u16) -> f32,
}

pub const NARROW: [Narrow; 2] = [
    Narrow { dtype: Dtype::BF16, bits: |value| Bf16::from_f32(value).0, value: |bits| Bf16(bits).to_f32() },
    Narrow { dtype: Dtype::F16, bits: |value| F16::from_f32(value).0, value: |bits| F16(bits).to_f32() },
];

impl Narrow {
    /// A checkpoint with every weight rounded: stored in this type, and the same numbers stored as f32.
    /// Tensors that are `kept` stay as they are in both.
    pub fn checkpoints(&self, name: &str, kept: impl Fn(&str) -> bool) -> [Folder; 2] {
        let bits = |value: &[u8; 4]| (self.bits)(f32::from_le_bytes(*value));
        let rounded = |bytes: &[u8]| -> Vec<u16> { bytes.as_chunks().0.iter().map(bits).collect() };
        let narrow = |tensor: &str, bytes: &[u8]| {
            let values = || rounded(bytes).into_iter().flat_map(u16::to_le_bytes).collect();
            Some(if kept(tensor) { (Dtype::F32, bytes.to_vec()) } else { (self.dtype, values()) })
        };
        let wide = |tensor: &str, bytes: &[u8]| {
            let values = || rounded(bytes).into_iter().flat_map(|bits| (self.value)(bits).to_le_bytes()).collect();
            Some((Dtype::F32, if kept(tensor) { bytes.to_vec() } else { values() }))
        };
        [with_weights(name, rewritten(name, narrow)), with_weights(name, rewritten(name, wide))]
    }
}
