//! Tensor maps: the encoder, with the driver's refusals, and the decoder the copy engine uses.

use std::fmt;

/// Element type of a tensor map. The engine moves bytes, so only the width matters to it, except in reductions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum ElementType {
    U8,
    U16,
    U32,
    S32,
    U64,
    S64,
    F16,
    F32,
    F64,
    Bf16,
    F32Ftz,
    Tf32,
    Tf32Ftz,
}

impl ElementType {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::U16,
        Self::U32,
        Self::S32,
        Self::U64,
        Self::S64,
        Self::F16,
        Self::F32,
        Self::F64,
        Self::Bf16,
        Self::F32Ftz,
        Self::Tf32,
        Self::Tf32Ftz,
    ];

    /// Bytes of one element.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::U8 => 1,
            Self::U16 | Self::F16 | Self::Bf16 => 2,
            Self::U32 | Self::S32 | Self::F32 | Self::F32Ftz | Self::Tf32 | Self::Tf32Ftz => 4,
            Self::U64 | Self::S64 | Self::F64 => 8,
        }
    }

    /// The driver's numbering (`CUtensorMapDataType`): 0 to 12.
    pub fn from_driver(code: u32) -> Option<Self> {
        Self::ALL.get(code as usize).copied()
    }
}

/// Swizzle of the shared-memory side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[allow(missing_docs)]
pub enum Swizzle {
    #[default]
    None,
    B32,
    B64,
    B128,
}

impl Swizzle {
    /// Bytes of one swizzled row; 16 without swizzle.
    pub const fn span(self) -> u32 {
        match self {
            Self::None => 16,
            Self::B32 => 32,
            Self::B64 => 64,
            Self::B128 => 128,
        }
    }

    /// The address bits XORed into the 16-byte chunk number: a function of the absolute shared-memory address.
    pub const fn apply(self, address: u32) -> u32 {
        match self {
            Self::None => address,
            Self::B32 => address ^ ((address >> 7 & 1) << 4),
            Self::B64 => address ^ ((address >> 7 & 3) << 4),
            Self::B128 => address ^ ((address >> 7 & 7) << 4),
        }
    }

    /// The driver's numbering (`CUtensorMapSwizzle`): 0 to 3.
    pub const fn from_driver(code: u32) -> Option<Self> {
        match code {
            0 => Some(Self::None),
            1 => Some(Self::B32),
            2 => Some(Self::B64),
            3 => Some(Self::B128),
            _ => None,
        }
    }
}

impl fmt::Display for Swizzle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "no",
            Self::B32 => "32B",
            Self::B64 => "64B",
            Self::B128 => "128B",
        })
    }
}

/// Interleave of the global side. Only `None` is modelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[allow(missing_docs)]
pub enum Interleave {
    #[default]
    None,
    B16,
    B32,
}

/// L2 promotion: accepted, no effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[allow(missing_docs)]
pub enum L2Promotion {
    #[default]
    None,
    B64,
    B128,
    B256,
}

/// What a load puts where the box leaves the tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[allow(missing_docs)]
pub enum OobFill {
    #[default]
    Zeros,
    /// NaN, for floating-point element types only.
    NanRequestZeroFma,
}

/// The arguments of `cuTensorMapEncodeTiled`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMapDesc<'a> {
    /// Element type.
    pub element: ElementType,
    /// Device address of element 0.
    pub address: u64,
    /// Elements per dimension, innermost first; its length is the rank.
    pub dims: &'a [u64],
    /// Bytes between neighbours in dimensions 1.. (one fewer than `dims`).
    pub strides: &'a [u64],
    /// Elements of the box per dimension.
    pub box_dims: &'a [u32],
    /// Element strides per dimension; empty means all 1.
    pub element_strides: &'a [u32],
    /// Interleave.
    pub interleave: Interleave,
    /// Swizzle.
    pub swizzle: Swizzle,
    /// L2 promotion.
    pub l2_promotion: L2Promotion,
    /// Fill outside the tensor.
    pub oob_fill: OobFill,
}

/// 128 opaque bytes, to be copied into a kernel's parameters at an offset that is a multiple of 64.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C, align(128))]
pub struct TensorMap(pub [u8; 128]);

impl fmt::Debug for TensorMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Decoded::from_bytes(&self.0) {
            Some(map) => map.fmt(f),
            None => f.write_str("TensorMap(not a map)"),
        }
    }
}

/// A field as `tensormap.replace` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    GlobalAddress,
    Rank,
    BoxDim(usize),
    GlobalDim(usize),
    GlobalStride(usize),
    ElementStride(usize),
    Element(ElementType),
    Interleave,
    Swizzle(Swizzle),
    Fill(OobFill),
}

impl Field {
    /// By the ISA's numbering of element types, which is not the driver's.
    pub fn element(code: u32) -> Option<Self> {
        use ElementType::*;
        let types = [U8, U16, U32, S32, U64, S64, F16, F32, F32Ftz, F64, Bf16, Tf32, Tf32Ftz];
        types.get(code as usize).copied().map(Self::Element)
    }

    pub fn interleave(code: u32) -> Option<Self> {
        (code == 0).then_some(Self::Interleave)
    }

    pub fn swizzle(code: u32) -> Option<Self> {
        Swizzle::from_driver(code).map(Self::Swizzle)
    }

    pub fn fill(code: u32) -> Option<Self> {
        match code {
            0 => Some(Self::Fill(OobFill::Zeros)),
            1 => Some(Self::Fill(OobFill::NanRequestZeroFma)),
            _ => None,
        }
    }
}

impl TensorMap {
    /// Replaces one field of a map, or of 128 bytes of zeros that are to become one.
    pub(crate) fn replace(&mut self, field: Field, value: u64) -> Result<(), TensorMapError> {
        let out = &mut self.0;
        if *out == [0; 128] {
            out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        }
        if out[0..4] != MAGIC.to_le_bytes() {
            return refuse("object", "must be a tensor map or zeros", u32::from_le_bytes([out[0], out[1], out[2], out[3]]).into());
        }
        match field {
            Field::GlobalAddress if value == 0 || !value.is_multiple_of(16) => {
                return refuse("global_address", "must be non-zero and a multiple of 16", value);
            }
            Field::GlobalAddress => out[8..16].copy_from_slice(&value.to_le_bytes()),
            Field::Rank if value >= 5 => return refuse("rank", "must be in 0..=4, one less than the number of dimensions", value),
            Field::Rank => out[4] = value as u8 + 1,
            Field::BoxDim(i) if value == 0 || value > 256 => return refuse(format!("box_dim {i}"), "must be in 1..=256", value),
            Field::BoxDim(i) => out[80 + 2 * i..82 + 2 * i].copy_from_slice(&(value as u16).to_le_bytes()),
            Field::GlobalDim(i) if value == 0 || value > 1 << 32 => return refuse(format!("global_dim {i}"), "must be in 1..=2^32", value),
            Field::GlobalDim(i) => out[16 + 4 * i..20 + 4 * i].copy_from_slice(&((value - 1) as u32).to_le_bytes()),
            Field::GlobalStride(i) if !value.is_multiple_of(16) || value >= 1 << 40 => {
                return refuse(format!("global_stride {i}"), "must be a multiple of 16 below 2^40", value);
            }
            Field::GlobalStride(i) => out[40 + 8 * i..48 + 8 * i].copy_from_slice(&value.to_le_bytes()),
            Field::ElementStride(i) if value != 1 => {
                return refuse(format!("element_stride {i}"), "other than 1 is not implemented", value);
            }
            Field::ElementStride(_) | Field::Interleave => {}
            Field::Element(element) => out[5] = element as u8,
            Field::Swizzle(swizzle) => out[6] = swizzle as u8,
            Field::Fill(fill) => out[7] = fill as u8,
        }
        Ok(())
    }
}

/// Why a tensor map was refused: the argument, what it must satisfy, what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMapError {
    /// The argument, e.g. `box_dims[0]`.
    pub arg: String,
    /// What must hold.
    pub rule: &'static str,
    /// The value given.
    pub got: u64,
}

impl fmt::Display for TensorMapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tensor map: `{}` {}, got {}", self.arg, self.rule, self.got)
    }
}

impl std::error::Error for TensorMapError {}

/// A tensor map as the copy engine sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Decoded {
    pub base: u64,
    pub rank: usize,
    pub dims: [u64; 5],
    /// Byte strides; `[0]` is the element size.
    pub strides: [u64; 5],
    pub box_dims: [u32; 5],
    pub element: ElementType,
    pub swizzle: Swizzle,
    pub nan_fill: bool,
}

const MAGIC: u32 = 0x7e4d_a901;

fn refuse<T>(arg: impl Into<String>, rule: &'static str, got: u64) -> Result<T, TensorMapError> {
    Err(TensorMapError { arg: arg.into(), rule, got })
}

impl TensorMapDesc<'_> {
    /// Checks every rule of the driver and packs the map.
    pub(crate) fn encode(&self) -> Result<TensorMap, TensorMapError> {
        let rank = self.dims.len();
        if !(1..=5).contains(&rank) {
            return refuse("dims", "must have 1 to 5 entries", rank as u64);
        }
        if self.strides.len() != rank - 1 {
            return refuse("strides", "must have one entry fewer than `dims`", self.strides.len() as u64);
        }
        if self.box_dims.len() != rank {
            return refuse("box_dims", "must have as many entries as `dims`", self.box_dims.len() as u64);
        }
        if self.interleave != Interleave::None {
            return refuse("interleave", "is not implemented", self.interleave as u64);
        }
        if self.address == 0 || !self.address.is_multiple_of(16) {
            return refuse("address", "must be non-zero and a multiple of 16", self.address);
        }
        for (i, &dim) in self.dims.iter().enumerate() {
            if dim == 0 || dim > 1 << 32 {
                return refuse(format!("dims[{i}]"), "must be in 1..=2^32", dim);
            }
        }
        for (i, &stride) in self.strides.iter().enumerate() {
            if stride % 16 != 0 || stride >= 1 << 40 {
                return refuse(format!("strides[{i}]"), "must be a multiple of 16 below 2^40", stride);
            }
        }
        for (i, &size) in self.box_dims.iter().enumerate() {
            if size == 0 || size > 256 {
                return refuse(format!("box_dims[{i}]"), "must be in 1..=256", size.into());
            }
        }
        if !self.element_strides.is_empty() {
            if self.element_strides.len() != rank {
                return refuse("element_strides", "must have as many entries as `dims`", self.element_strides.len() as u64);
            }
            for (i, &stride) in self.element_strides.iter().enumerate() {
                if stride == 0 || stride > 8 {
                    return refuse(format!("element_strides[{i}]"), "must be in 1..=8", stride.into());
                }
                if stride != 1 {
                    return refuse(format!("element_strides[{i}]"), "other than 1 is not implemented", stride.into());
                }
            }
        }
        let inner = u64::from(self.box_dims[0]) * self.element.bytes();
        if !inner.is_multiple_of(16) {
            return refuse("box_dims[0] in bytes", "must be a multiple of 16", inner);
        }
        if self.swizzle != Swizzle::None && inner > u64::from(self.swizzle.span()) {
            return refuse("box_dims[0] in bytes", "must be at most the swizzle span", inner);
        }
        let float = matches!(
            self.element,
            ElementType::F16
                | ElementType::F32
                | ElementType::F64
                | ElementType::Bf16
                | ElementType::F32Ftz
                | ElementType::Tf32
                | ElementType::Tf32Ftz
        );
        if self.oob_fill != OobFill::Zeros && !float {
            return refuse("oob_fill", "NaN needs a floating-point element type", self.element as u64);
        }
        let bytes: u64 = self.box_dims.iter().map(|&b| u64::from(b)).product::<u64>() * self.element.bytes();
        if bytes > 232_448 {
            return refuse("box_dims", "must fit shared memory (232448 bytes)", bytes);
        }
        Ok(self.pack())
    }

    fn pack(&self) -> TensorMap {
        let mut out = [0u8; 128];
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4] = self.dims.len() as u8;
        out[5] = self.element as u8;
        out[6] = self.swizzle as u8;
        out[7] = self.oob_fill as u8;
        out[8..16].copy_from_slice(&self.address.to_le_bytes());
        for (i, &dim) in self.dims.iter().enumerate() {
            out[16 + 4 * i..20 + 4 * i].copy_from_slice(&((dim - 1) as u32).to_le_bytes());
        }
        for (i, &stride) in self.strides.iter().enumerate() {
            out[40 + 8 * i..48 + 8 * i].copy_from_slice(&stride.to_le_bytes());
        }
        for (i, &size) in self.box_dims.iter().enumerate() {
            out[80 + 2 * i..82 + 2 * i].copy_from_slice(&(size as u16).to_le_bytes());
        }
        TensorMap(out)
    }
}

impl Decoded {
    /// `None` if these bytes are no valid map.
    pub fn from_bytes(bytes: &[u8; 128]) -> Option<Self> {
        let u32_at = |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        let u64_at = |i: usize| u64::from(u32_at(i)) | u64::from(u32_at(i + 4)) << 32;
        let rank = usize::from(bytes[4]);
        if u32_at(0) != MAGIC || !(1..=5).contains(&rank) {
            return None;
        }
        let element = ElementType::from_driver(bytes[5].into())?;
        let mut map = Decoded {
            base: u64_at(8),
            rank,
            dims: [1; 5],
            strides: [0; 5],
            box_dims: [1; 5],
            element,
            swizzle: Swizzle::from_driver(bytes[6].into())?,
            nan_fill: bytes[7] == 1,
        };
        map.strides[0] = element.bytes();
        for i in 0..rank {
            map.dims[i] = u64::from(u32_at(16 + 4 * i)) + 1;
            map.box_dims[i] = u32::from(u16::from_le_bytes([bytes[80 + 2 * i], bytes[81 + 2 * i]]));
            if i > 0 {
                map.strides[i] = u64_at(40 + 8 * (i - 1));
            }
            if map.box_dims[i] == 0 || map.box_dims[i] > 256 || map.strides[i] >= 1 << 40 {
                return None;
            }
        }
        let inner = u64::from(map.box_dims[0]) * element.bytes();
        let swizzled = map.swizzle == Swizzle::None || inner <= u64::from(map.swizzle.span());
        (map.box_bytes() <= 232_448 && inner.is_multiple_of(16) && swizzled && map.base.is_multiple_of(16)).then_some(map)
    }

    /// Bytes of the full box, which is also what an mbarrier is told.
    pub fn box_bytes(&self) -> u64 {
        self.box_dims.iter().map(|&b| u64::from(b)).product::<u64>() * self.element.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn desc<'a>(dims: &'a [u64], strides: &'a [u64], box_dims: &'a [u32]) -> TensorMapDesc<'a> {
        TensorMapDesc {
            element: ElementType::Bf16,
            address: 0x1000,
            dims,
            strides,
            box_dims,
            element_strides: &[],
            interleave: Interleave::None,
            swizzle: Swizzle::B128,
            l2_promotion: L2Promotion::None,
            oob_fill: OobFill::Zeros,
        }
    }

    #[test]
    fn round_trip() {
        let map = desc(&[64, 1 << 32], &[128], &[64, 256]).encode().unwrap();
        let decoded = Decoded::from_bytes(&map.0).unwrap();
        assert_eq!(decoded.dims, [64, 1 << 32, 1, 1, 1]);
        assert_eq!(decoded.strides[..2], [2, 128]);
        assert_eq!(decoded.box_bytes(), 64 * 256 * 2);
        assert_eq!(decoded.swizzle, Swizzle::B128);
        assert!(Decoded::from_bytes(&[0; 128]).is_none());
    }

    #[test]
    fn refusals_name_the_argument_and_the_value() {
        let text = |d: TensorMapDesc<'_>| d.encode().unwrap_err().to_string();
        let good = desc(&[64, 8], &[128], &[64, 8]);
        assert_eq!(
            text(desc(&[128, 8], &[256], &[128, 8])),
            "tensor map: `box_dims[0] in bytes` must be at most the swizzle span, got 256"
        );
        assert_eq!(text(desc(&[64, 8], &[120], &[64, 8])), "tensor map: `strides[0]` must be a multiple of 16 below 2^40, got 120");
        assert_eq!(text(desc(&[64, 8], &[128], &[64, 257])), "tensor map: `box_dims[1]` must be in 1..=256, got 257");
        assert_eq!(text(desc(&[64, 8], &[128], &[60, 8])), "tensor map: `box_dims[0] in bytes` must be a multiple of 16, got 120");
        assert_eq!(text(desc(&[], &[], &[])), "tensor map: `dims` must have 1 to 5 entries, got 0");
        assert_eq!(text(desc(&[64, 0], &[128], &[64, 8])), "tensor map: `dims[1]` must be in 1..=2^32, got 0");
        assert_eq!(
            text(TensorMapDesc { address: 0x1008, ..good.clone() }),
            "tensor map: `address` must be non-zero and a multiple of 16, got 4104"
        );
        assert_eq!(
            text(TensorMapDesc { element_strides: &[1, 9], ..good.clone() }),
            "tensor map: `element_strides[1]` must be in 1..=8, got 9"
        );
        assert!(good.encode().is_ok());
    }
}
