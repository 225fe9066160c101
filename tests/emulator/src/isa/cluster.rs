//! Addresses across the CTAs of a cluster: `mapa`, `getctarank`.

use super::moves::Space;
use super::ty::{RANK_SHIFT, Reg, SHARED_WINDOW, Src, Ty};
use super::{Exec, Flow, Op};
use crate::front::{Ctx, FrontError};
use crate::machine::warp::{L64, Warp, lanes};
use crate::machine::{Machine, trouble};
use crate::report::Fault;

#[derive(Debug)]
pub(crate) enum Cluster {
    Mapa { generic: bool, d: Reg, a: Src, rank: Src },
    Rank { generic: bool, d: Reg, a: Src },
}

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    let mapa = match ctx.name() {
        "mapa" => true,
        "getctarank" => false,
        _ => return Ok(None),
    };
    let generic = !ctx.take("shared::cluster");
    let ty = ctx.ty_of(&[Ty::U32, Ty::U64])?;
    let op = if mapa {
        let (d, a) = (ctx.dst(ty.bits())?, ctx.src(ty.bits())?);
        Cluster::Mapa { generic, d, a, rank: ctx.src(32)? }
    } else {
        Cluster::Rank { generic, d: ctx.dst(32)?, a: ctx.src(ty.bits())? }
    };
    Ok(Some(Op::Cluster(op)))
}

pub(crate) fn exec(m: &mut Machine<'_>, w: &mut Warp, inst: &Cluster, mask: u32) -> Exec {
    let (Cluster::Mapa { generic, d, a, .. } | Cluster::Rank { generic, d, a }) = *inst;
    let mut at = w.get64(a);
    if generic {
        for lane in lanes(mask) {
            match Space::of(at[lane]) {
                (Space::Shared, inner) => at[lane] = inner,
                _ => return Err(trouble(Fault::BadOperand, format!("address {:#x} is not in shared memory", at[lane])).at_lane(lane)),
            }
        }
    }
    let mut out: L64 = [0; 32];
    match inst {
        Cluster::Mapa { rank, .. } => {
            let rank = w.get32(*rank);
            for lane in lanes(mask) {
                if rank[lane] as usize >= m.ctas.len() {
                    let text = format!("mapa: CTA rank is {}, the cluster has {}", rank[lane], m.ctas.len());
                    return Err(trouble(Fault::BadOperand, text).at_lane(lane));
                }
                let inner = at[lane] & ((1 << RANK_SHIFT) - 1) | u64::from(rank[lane]) << RANK_SHIFT;
                out[lane] = if generic { SHARED_WINDOW + inner } else { inner };
            }
        }
        Cluster::Rank { .. } => {
            for lane in lanes(mask) {
                out[lane] = at[lane] >> RANK_SHIFT & 0xff;
            }
        }
    }
    w.put64(d, mask, &out);
    Ok(Flow::Next)
}
