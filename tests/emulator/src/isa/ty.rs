//! Type modifiers, and operands after lowering.

/// A type modifier of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::upper_case_acronyms)]
pub(crate) enum Ty {
    Pred,
    B8,
    B16,
    B32,
    B64,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    U16x2,
    S16x2,
    F16,
    F16x2,
    BF16,
    BF16x2,
    TF32,
    F32,
    F64,
    E4M3,
    E5M2,
    E4M3x2,
    E5M2x2,
}

impl Ty {
    pub fn parse(text: &str) -> Option<Ty> {
        use Ty::*;
        Some(match text {
            "pred" => Pred,
            "b8" => B8,
            "b16" => B16,
            "b32" => B32,
            "b64" => B64,
            "u8" => U8,
            "u16" => U16,
            "u32" => U32,
            "u64" => U64,
            "s8" => S8,
            "s16" => S16,
            "s32" => S32,
            "s64" => S64,
            "u16x2" => U16x2,
            "s16x2" => S16x2,
            "f16" => F16,
            "f16x2" => F16x2,
            "bf16" => BF16,
            "bf16x2" => BF16x2,
            "tf32" => TF32,
            "f32" => F32,
            "f64" => F64,
            "e4m3" => E4M3,
            "e5m2" => E5M2,
            "e4m3x2" => E4M3x2,
            "e5m2x2" => E5M2x2,
            _ => return None,
        })
    }

    /// Width in bits; a predicate counts as 1.
    pub fn bits(self) -> u8 {
        use Ty::*;
        match self {
            Pred => 1,
            B8 | U8 | S8 | E4M3 | E5M2 => 8,
            B16 | U16 | S16 | F16 | BF16 | E4M3x2 | E5M2x2 => 16,
            B32 | U32 | S32 | U16x2 | S16x2 | F16x2 | BF16x2 | TF32 | F32 => 32,
            B64 | U64 | S64 | F64 => 64,
        }
    }

    pub fn bytes(self) -> u32 {
        u32::from(self.bits() / 8)
    }

    pub fn signed(self) -> bool {
        matches!(self, Ty::S8 | Ty::S16 | Ty::S32 | Ty::S64 | Ty::S16x2)
    }

    /// `.bN`, `.uN` or `.sN`.
    pub fn integer(self) -> bool {
        use Ty::*;
        matches!(self, B8 | B16 | B32 | B64 | U8 | U16 | U32 | U64 | S8 | S16 | S32 | S64)
    }

    /// `.uN` or `.sN`.
    pub fn arithmetic_integer(self) -> bool {
        self.integer() && !matches!(self, Ty::B8 | Ty::B16 | Ty::B32 | Ty::B64)
    }
}

/// A register row to be written, relative to its frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reg {
    /// A row of up to 32 bits; narrower registers keep their upper bits zero.
    W(u32, u8),
    /// A 64-bit row.
    D(u32),
    /// `_`: the result is dropped.
    Sink,
}

/// A value to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Src {
    W(u32),
    D(u32),
    Imm(u64),
    Special(Special),
}

/// A predicate to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PSrc {
    Reg { slot: u32, negated: bool },
    Const(bool),
}

/// Values the machine supplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Special {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    Laneid,
    Warpid,
    Nwarpid,
    Smid,
    Nsmid,
    Gridid,
    LanemaskEq,
    LanemaskLe,
    LanemaskLt,
    LanemaskGe,
    LanemaskGt,
    Clock,
    ClusterId(u8),
    NclusterId(u8),
    ClusterCtaid(u8),
    ClusterNctaid(u8),
    ClusterCtarank,
    ClusterNctarank,
    IsExplicitCluster,
    DynamicSmemSize,
    TotalSmemSize,
    /// Shared address of a variable: window base of this CTA plus the offset.
    SharedVar(u32),
    /// Shared address of the dynamic part plus an offset.
    DynamicShared(i32),
    /// Address of a local variable: the running frame's base plus the offset.
    LocalVar(u32),
}

impl Special {
    pub fn parse(name: &str, part: Option<&str>) -> Option<Special> {
        use Special::*;
        let axis = match part {
            Some("x") => Some(0),
            Some("y") => Some(1),
            Some("z") => Some(2),
            _ => None,
        };
        Some(match (name, axis) {
            ("%tid", Some(a)) => Tid(a),
            ("%ntid", Some(a)) => Ntid(a),
            ("%ctaid", Some(a)) => Ctaid(a),
            ("%nctaid", Some(a)) => Nctaid(a),
            ("%clusterid", Some(a)) => ClusterId(a),
            ("%nclusterid", Some(a)) => NclusterId(a),
            ("%cluster_ctaid", Some(a)) => ClusterCtaid(a),
            ("%cluster_nctaid", Some(a)) => ClusterNctaid(a),
            (_, Some(_)) => return None,
            _ if part.is_some() => return None,
            ("%laneid", _) => Laneid,
            ("%warpid", _) => Warpid,
            ("%nwarpid", _) => Nwarpid,
            ("%smid", _) => Smid,
            ("%nsmid", _) => Nsmid,
            ("%gridid", _) => Gridid,
            ("%lanemask_eq", _) => LanemaskEq,
            ("%lanemask_le", _) => LanemaskLe,
            ("%lanemask_lt", _) => LanemaskLt,
            ("%lanemask_ge", _) => LanemaskGe,
            ("%lanemask_gt", _) => LanemaskGt,
            ("%clock" | "%clock64" | "%clock_hi" | "%globaltimer" | "%globaltimer_lo" | "%globaltimer_hi", _) => Clock,
            ("%cluster_ctarank", _) => ClusterCtarank,
            ("%cluster_nctarank", _) => ClusterNctarank,
            ("%is_explicit_cluster", _) => IsExplicitCluster,
            ("%dynamic_smem_size", _) => DynamicSmemSize,
            ("%total_smem_size", _) => TotalSmemSize,
            _ => return None,
        })
    }
}

/// Base of the generic window of shared memory; a shared address is added to it.
pub(crate) const SHARED_WINDOW: u64 = 0x0100_0000_0000;
/// Base of the generic window of local memory.
pub(crate) const LOCAL_WINDOW: u64 = 0x0200_0000_0000;
/// Base of the generic window of the kernel's parameters.
pub(crate) const PARAM_WINDOW: u64 = 0x0300_0000_0000;
/// Size of each window.
pub(crate) const WINDOW: u64 = 0x0100_0000_0000;
/// Base of global memory.
pub(crate) const GLOBAL_BASE: u64 = 0x7000_0000_0000;
/// First shared address of a CTA: the first KiB is the system's, so code that assumes 0 fails.
pub(crate) const SHARED_BASE: u32 = 0x400;
/// Bits of a shared address below the rank.
pub(crate) const RANK_SHIFT: u32 = 24;
