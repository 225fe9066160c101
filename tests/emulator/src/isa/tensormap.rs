//! `tensormap.*`: tensor maps changed on the device, and their copy from shared to global memory.

use super::memory::addresses;
use super::moves::Space;
use super::ty::{Src, Ty};
use super::{Exec, Flow, Mem, Op};
use crate::front::{Ctx, FrontError};
use crate::machine::access::{Bytes, Load, Store};
use crate::machine::run::aligned;
use crate::machine::warp::{L64, Warp, lanes};
use crate::machine::{Machine, Trouble, trouble};
use crate::report::Fault;
use crate::tensor_map::{Field, TensorMap};

#[derive(Debug)]
pub(crate) enum Tensormap {
    Replace {
        space: Space,
        mem: Mem,
        field: Field,
        value: Src,
    },
    /// `tensormap.cp_fenceproxy`: the warp copies a map and releases it.
    Publish {
        to: Mem,
        from: Mem,
    },
}

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    if ctx.name() != "tensormap" {
        return Ok(None);
    }
    let tensormap = if ctx.take("cp_fenceproxy") {
        for part in ["global", "shared::cta", "tensormap::generic", "release", "sync", "aligned"] {
            if !ctx.take(part) {
                return ctx.unimplemented();
            }
        }
        super::memory::scope(ctx)?;
        let (to, from) = (ctx.mem()?, ctx.mem()?);
        ctx.imm_in(128..=128)?;
        Tensormap::Publish { to, from }
    } else {
        replace(ctx)?
    };
    Ok(Some(Op::Tensormap(Box::new(tensormap))))
}

fn replace(ctx: &mut Ctx<'_, '_>) -> Result<Tensormap, FrontError> {
    if !ctx.take("replace") || !ctx.take("tile") {
        return ctx.unimplemented();
    }
    /// Whether the operand is a value, an ordinal and a value, or an immediate.
    enum Kind {
        Value(Field),
        Ordinal(fn(usize) -> Field, i64),
        Code(fn(u32) -> Option<Field>),
    }
    let kind = ctx.take_map(|m| {
        Some(match m {
            "global_address" => Kind::Value(Field::GlobalAddress),
            "rank" => Kind::Value(Field::Rank),
            "box_dim" => Kind::Ordinal(Field::BoxDim, 4),
            "global_dim" => Kind::Ordinal(Field::GlobalDim, 4),
            // That of the innermost dimension is the element.
            "global_stride" => Kind::Ordinal(Field::GlobalStride, 3),
            "element_stride" => Kind::Ordinal(Field::ElementStride, 4),
            "elemtype" => Kind::Code(Field::element),
            "interleave_layout" => Kind::Code(Field::interleave),
            "swizzle_mode" => Kind::Code(Field::swizzle),
            "fill_mode" => Kind::Code(Field::fill),
            _ => return None,
        })
    });
    let Some(kind) = kind else { return ctx.unimplemented() };
    let space = if ctx.take("global") {
        Space::Global
    } else if ctx.take("shared::cta") {
        Space::Shared
    } else {
        Space::Generic
    };
    if !ctx.take("b1024") {
        return ctx.unimplemented();
    }
    let wide = matches!(kind, Kind::Value(Field::GlobalAddress)) || ctx.has("b64");
    ctx.ty_of(&[if wide { Ty::B64 } else { Ty::B32 }])?;
    let bits = if wide { 64 } else { 32 };
    let mem = ctx.mem()?;
    let (field, value) = match kind {
        Kind::Value(field) => (field, ctx.src(bits)?),
        Kind::Ordinal(field, last) => (field(ctx.imm_in(0..=last)? as usize), ctx.src(bits)?),
        Kind::Code(field) => {
            let code = ctx.imm()?;
            match u32::try_from(code).ok().and_then(field) {
                Some(field) => (field, Src::Imm(0)),
                None => return ctx.error(format!("unimplemented: {} with {code}", ctx.inst.opcode())),
            }
        }
    };
    if matches!(field, Field::GlobalStride(_) | Field::GlobalAddress) != wide {
        return ctx.unimplemented();
    }
    Ok(Tensormap::Replace { space, mem, field, value })
}

/// The eight pieces of sixteen bytes of a map, each at the place of its lane.
fn pieces(mut at: L64) -> L64 {
    at.iter_mut().enumerate().for_each(|(piece, at)| *at = at.wrapping_add(16 * piece as u64));
    at
}

pub(crate) fn exec(m: &mut Machine<'_>, w: &mut Warp, inst: &Tensormap, mask: u32) -> Exec {
    match inst {
        Tensormap::Replace { space, mem, field, value } => {
            let (at, value) = (addresses(w, mem), w.get64(*value));
            for lane in lanes(mask) {
                let mut one = || -> Result<(), Trouble> {
                    // A weak read and write of the whole object.
                    let mut map = TensorMap([0; 128]);
                    let mut bytes: Bytes = [0; 32];
                    for (piece, part) in map.0.chunks_exact_mut(16).enumerate() {
                        let at = [at[lane].wrapping_add(16 * piece as u64); 32];
                        m.access(w, *space, &at, 1 << lane, 16, false, &mut Load(&mut bytes))?;
                        part.copy_from_slice(&bytes[lane].to_le_bytes());
                    }
                    map.replace(*field, value[lane]).map_err(|e| trouble(Fault::Tma, e.to_string()))?;
                    for (piece, part) in map.0.chunks_exact(16).enumerate() {
                        let at = [at[lane].wrapping_add(16 * piece as u64); 32];
                        bytes[lane] = u128::from_le_bytes(std::array::from_fn(|i| part[i]));
                        m.access(w, *space, &at, 1 << lane, 16, false, &mut Store(&bytes))?;
                    }
                    Ok(())
                };
                one().map_err(|t| t.at_lane(lane))?;
            }
        }
        Tensormap::Publish { to, from } => {
            if let Some(state) = aligned(w, mask, false)? {
                return Ok(Flow::Wait(state));
            }
            let (to, from) = (pieces(addresses(w, to)), pieces(addresses(w, from)));
            let mut bytes: Bytes = [0; 32];
            m.access(w, Space::Shared, &from, 0xff, 16, false, &mut Load(&mut bytes))?;
            m.access(w, Space::Generic, &to, 0xff, 16, false, &mut Store(&bytes))?;
            m.fence(w, mask);
        }
    }
    Ok(Flow::Next)
}
