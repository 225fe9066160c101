//! `cp.async.bulk`, `cp.async.bulk.tensor`, `cp.reduce.async.bulk` and their groups.

use super::atomic::Fun;
use super::memory::{addresses, cache_hints, shared_addresses};
use super::moves::Space;
use super::ty::{RANK_SHIFT, SHARED_BASE, Src, Ty};
use super::{Exec, Flow, Mem, Op};
use crate::front::{Ctx, FrontError};
use crate::machine::tma::{BulkStore, Far, Pending};
use crate::machine::warp::{L64, Warp, lanes};
use crate::machine::{Machine, Trouble, trouble};
use crate::options::Detector;
use crate::report::Fault;
use crate::tensor_map::{Decoded, Swizzle};

#[derive(Debug)]
pub(crate) enum Bulk {
    /// Into shared memory, completing on an mbarrier.
    Load {
        dst: Mem,
        from: From,
        mbar: Mem,
        multicast: Option<Src>,
    },
    /// From shared to global memory, completing by group.
    Store {
        to: From,
        src: Mem,
        reduce: Option<(Fun, Ty)>,
    },
    Commit,
    Wait {
        n: u32,
        read: bool,
    },
}

/// The far side as the instruction names it.
#[derive(Debug)]
pub(crate) enum From {
    Tensor { map: Mem, coords: Vec<Src> },
    Linear { address: Mem, bytes: Src },
    Shared { address: Mem, bytes: Src },
}

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    let reduce = match ctx.name() {
        "cp" if ctx.has("bulk") && !ctx.has("prefetch") => ctx.take("reduce"),
        _ => return Ok(None),
    };
    if !ctx.take("async") || !ctx.take("bulk") {
        return ctx.unimplemented();
    }
    let bulk = if ctx.take("commit_group") {
        Bulk::Commit
    } else if ctx.take("wait_group") {
        let read = ctx.take("read");
        Bulk::Wait { n: ctx.imm_in(0..=1 << 20)? as u32, read }
    } else if ctx.take("tensor") {
        ctx.uses().async_proxy = true;
        tensor(ctx, reduce)?
    } else {
        ctx.uses().async_proxy = true;
        linear(ctx, reduce)?
    };
    Ok(Some(Op::Bulk(Box::new(bulk))))
}

fn reduction(ctx: &mut Ctx<'_, '_>) -> Result<Fun, FrontError> {
    let fun = super::atomic::fun(ctx)?;
    if matches!(fun, Fun::Exch | Fun::Cas) { ctx.unimplemented() } else { Ok(fun) }
}

fn tensor(ctx: &mut Ctx<'_, '_>, reduce: bool) -> Result<Bulk, FrontError> {
    let rank = ctx.one_of(&[("1d", 1), ("2d", 2), ("3d", 3), ("4d", 4), ("5d", 5)])?;
    let load = ctx.take("shared::cluster") || ctx.take("shared::cta") && ctx.has("mbarrier::complete_tx::bytes");
    if !ctx.take("global") {
        return ctx.unimplemented();
    }
    if !load {
        ctx.take("shared::cta");
    }
    let check =
        |ctx: &Ctx<'_, '_>, n: usize| if n == rank { Ok(()) } else { ctx.error(format!("{n} coordinates for a map of rank {rank}")) };
    if load {
        if !ctx.take("mbarrier::complete_tx::bytes") || reduce {
            return ctx.unimplemented();
        }
        ctx.take("tile");
        let multicast = ctx.take("multicast::cluster");
        let policy = cache_hints(ctx);
        let dst = ctx.mem()?;
        let (map, coords) = ctx.tensor_mem()?;
        check(ctx, coords.len())?;
        let mbar = ctx.mem()?;
        let multicast = if multicast { Some(ctx.src(16)?) } else { None };
        if policy {
            ctx.src(64)?;
        }
        return Ok(Bulk::Load { dst, from: From::Tensor { map, coords }, mbar, multicast });
    }
    if !ctx.take("bulk_group") {
        return ctx.unimplemented();
    }
    let fun = if reduce { Some(reduction(ctx)?) } else { None };
    ctx.take("tile");
    let policy = cache_hints(ctx);
    let (map, coords) = ctx.tensor_mem()?;
    check(ctx, coords.len())?;
    let src = ctx.mem()?;
    if policy {
        ctx.src(64)?;
    }
    // The element type comes from the map.
    Ok(Bulk::Store { to: From::Tensor { map, coords }, src, reduce: fun.map(|f| (f, Ty::B32)) })
}

fn linear(ctx: &mut Ctx<'_, '_>, reduce: bool) -> Result<Bulk, FrontError> {
    let to_cluster = ctx.take("shared::cluster");
    let from_shared = ctx.take("shared::cta");
    let global = ctx.take("global");
    let mbarrier = ctx.take("mbarrier::complete_tx::bytes");
    let group = ctx.take("bulk_group");
    match (to_cluster || from_shared && mbarrier && global, global, from_shared, mbarrier, group) {
        // Into shared memory, from global memory or from this CTA's.
        (true, _, _, true, false) if !reduce => {
            let multicast = ctx.take("multicast::cluster");
            let policy = cache_hints(ctx);
            let (dst, address, bytes, mbar) = (ctx.mem()?, ctx.mem()?, ctx.src(32)?, ctx.mem()?);
            let multicast = if multicast { Some(ctx.src(16)?) } else { None };
            if policy {
                ctx.src(64)?;
            }
            let from = if global { From::Linear { address, bytes } } else { From::Shared { address, bytes } };
            Ok(Bulk::Load { dst, from, mbar, multicast })
        }
        (false, true, true, false, true) => {
            let reduce = if reduce {
                let fun = reduction(ctx)?;
                let noftz = ctx.take("noftz");
                let policy_ty = ctx.ty_of(&[Ty::F16, Ty::BF16, Ty::B32, Ty::U32, Ty::S32, Ty::B64, Ty::U64, Ty::S64, Ty::F32, Ty::F64])?;
                if noftz != (matches!(policy_ty, Ty::F16 | Ty::BF16) && fun == Fun::Add) {
                    return ctx.unimplemented();
                }
                Some((fun, policy_ty))
            } else {
                None
            };
            let policy = cache_hints(ctx);
            let (address, src, bytes) = (ctx.mem()?, ctx.mem()?, ctx.src(32)?);
            if policy {
                ctx.src(64)?;
            }
            Ok(Bulk::Store { to: From::Linear { address, bytes }, src, reduce })
        }
        _ => ctx.unimplemented(),
    }
}

/// The tensor map at each lane's address, which is in the parameters or in global memory.
fn map_at(m: &Machine<'_>, address: u64) -> Result<Decoded, Trouble> {
    let mut bytes = [0; 128];
    let not = |why: &str| trouble(Fault::Tma, format!("tensor map at {address:#x} {why}"));
    if !address.is_multiple_of(64) {
        return Err(not("is not aligned to 64 bytes"));
    }
    match Space::of(address) {
        (Space::Param, at) => match m.env.params.get(at as usize..at as usize + 128) {
            Some(part) => bytes.copy_from_slice(part),
            None => return Err(not("lies outside the kernel's parameters")),
        },
        (Space::Global, at) => m.env.global.read(at, &mut bytes).map_err(|_| not("lies outside every buffer"))?,
        (Space::Local, _) => return Err(not("is in local memory: the parameter lacks __grid_constant__")),
        _ => return Err(not("is in shared memory")),
    }
    Decoded::from_bytes(&bytes).ok_or_else(|| not("is not valid"))
}

/// A shared address that must be a multiple of `align`, with `bytes` behind it.
pub(super) fn place(m: &Machine<'_>, what: &str, address: u64, bytes: usize, align: u32) -> Result<(usize, usize), Trouble> {
    let found = m.split_shared(address).and_then(|(rank, low)| Some((rank, m.ctas[rank].shared.offset(low, bytes as u32)?)));
    let Some((rank, offset)) = found else {
        let low = address as u32 & ((1 << RANK_SHIFT) - 1);
        let size = m.ctas.first().map_or(0, |c| c.shared.data.len());
        let offset = i64::from(low) - i64::from(SHARED_BASE);
        return Err(trouble(
            Fault::OutOfBounds,
            format!("out-of-bounds {what} of {bytes} bytes at shared window of {size} bytes, offset {offset}"),
        ));
    };
    if !(offset as u32 + SHARED_BASE).is_multiple_of(align) {
        return Err(trouble(
            Fault::Misaligned,
            format!("misaligned {what}: {} must be aligned to {align} bytes", m.shared_name(rank, offset)),
        ));
    }
    Ok((rank, offset))
}

/// A tile should begin where the pattern of its swizzle does, or a wgmma descriptor needs a base offset. TMA
/// takes it anywhere: it swizzles by address.
fn check_pattern(m: &Machine<'_>, what: &str, rank: usize, offset: usize, far: &Far) -> Result<(), Trouble> {
    let Far::Tensor { map, .. } = far else { return Ok(()) };
    let pattern = match map.swizzle {
        Swizzle::None => 128,
        Swizzle::B32 => 256,
        Swizzle::B64 => 512,
        Swizzle::B128 => 1024,
    };
    if m.has(Detector::Swizzle) && !(offset as u32 + SHARED_BASE).is_multiple_of(pattern) {
        let (name, swizzle) = (m.shared_name(rank, offset), map.swizzle);
        let text = format!("misaligned {what}: {name} should be aligned to {pattern} bytes, the pattern of {swizzle} swizzle");
        return Err(trouble(Fault::Misaligned, text));
    }
    Ok(())
}

/// What the hardware wants of the shared address of a tile.
const TILE_ALIGNMENT: u32 = 128;

struct Side {
    far: Far,
    bytes: usize,
    align: u32,
}

/// Evaluated operands of the far side.
struct Operands {
    address: L64,
    bytes: [u32; 32],
    coords: Vec<[u32; 32]>,
    tensor: bool,
    shared: bool,
}

impl Operands {
    fn new(w: &Warp, from: &From) -> Self {
        match from {
            From::Tensor { map, coords } => Operands {
                address: addresses(w, map),
                bytes: [0; 32],
                coords: coords.iter().map(|c| w.get32(*c)).collect(),
                tensor: true,
                shared: false,
            },
            From::Linear { address, bytes } | From::Shared { address, bytes } => Operands {
                address: addresses(w, address),
                bytes: w.get32(*bytes),
                coords: Vec::new(),
                tensor: false,
                shared: matches!(from, From::Shared { .. }),
            },
        }
    }

    fn side(&self, m: &Machine<'_>, lane: usize) -> Result<Side, Trouble> {
        if self.tensor {
            let map = map_at(m, self.address[lane])?;
            if map.rank != self.coords.len() {
                let text = format!("instruction of rank {}, tensor map of rank {}", self.coords.len(), map.rank);
                return Err(trouble(Fault::Tma, text));
            }
            let mut coords = [0; 5];
            for (to, from) in coords.iter_mut().zip(&self.coords) {
                *to = from[lane] as i32;
            }
            let start = i64::from(coords[0]) * map.element.bytes() as i64;
            if start % 16 != 0 {
                let text = format!("tensor copy begins {start} bytes into a row of the tensor, must be a multiple of 16");
                return Err(trouble(Fault::Tma, text));
            }
            let bytes = map.box_bytes() as usize;
            return Ok(Side { far: Far::Tensor { map: Box::new(map), coords }, bytes, align: TILE_ALIGNMENT });
        }
        let bytes = self.bytes[lane] as usize;
        if bytes == 0 || !bytes.is_multiple_of(16) {
            return Err(trouble(Fault::Tma, format!("bulk copy of {bytes} bytes, must be a positive multiple of 16")));
        }
        let address = self.address[lane];
        if !address.is_multiple_of(16) {
            return Err(trouble(Fault::Misaligned, format!("misaligned bulk copy: address {address:#x} must be a multiple of 16")));
        }
        if self.shared {
            if m.ctas.len() == 1 {
                return Err(trouble(Fault::Tma, "bulk copy from shared to shared memory in a launch without clusters"));
            }
            let (rank, offset) = place(m, "bulk copy", address & 0xffff_ffff, bytes, 16)?;
            return Ok(Side { far: Far::Shared { rank, offset }, bytes, align: 16 });
        }
        Ok(Side { far: Far::Linear { address }, bytes, align: 16 })
    }
}

pub(crate) fn exec(m: &mut Machine<'_>, w: &mut Warp, inst: &Bulk, mask: u32) -> Exec {
    match inst {
        Bulk::Load { dst, from, mbar, multicast } => {
            let operands = Operands::new(w, from);
            let (dst, mbar) = (shared_addresses(w, dst, false, mask)?, shared_addresses(w, mbar, false, mask)?);
            let multicast = multicast.map(|s| w.get32(s));
            for lane in m.order(mask) {
                let mut issue = || {
                    let side = operands.side(m, lane)?;
                    let (rank, offset) = place(m, "bulk load", dst[lane], side.bytes, side.align)?;
                    check_pattern(m, "bulk load", rank, offset, &side.far)?;
                    let (bar_rank, bar) = m.mbar_offset(mbar[lane])?;
                    m.mbar(bar_rank, bar)?;
                    let (ranks, bar_rank) = match &multicast {
                        None => (vec![rank], Some(bar_rank)),
                        Some(masks) => {
                            let ctas = masks[lane] as u16;
                            if ctas == 0 || (ctas as u32) >> m.ctas.len() != 0 {
                                let text = format!("multicast mask {ctas:#06x} names CTAs outside the cluster of {}", m.ctas.len());
                                return Err(trouble(Fault::Tma, text));
                            }
                            ((0..m.ctas.len()).filter(|r| ctas >> r & 1 != 0).collect(), None)
                        }
                    };
                    let known = m.clocks.snapshot(w.thread0 as usize + lane, 1);
                    let thread = w.index * 32 + lane as u32;
                    let (from, bytes) = (side.far, side.bytes);
                    m.issue_load(Pending {
                        from,
                        bytes,
                        ranks,
                        offset,
                        mbar: bar,
                        mbar_rank: bar_rank,
                        known,
                        site: m.site,
                        cta: w.cta,
                        thread,
                    })
                };
                issue().map_err(|t| t.at_lane(lane))?;
            }
            Ok(Flow::Yield)
        }
        Bulk::Store { to, src, reduce } => {
            let operands = Operands::new(w, to);
            let src = shared_addresses(w, src, false, mask)?;
            for lane in lanes(mask) {
                let mut issue = || {
                    let side = operands.side(m, lane)?;
                    let (rank, offset) = place(m, "bulk store", src[lane], side.bytes, side.align)?;
                    if let Far::Tensor { coords, .. } = &side.far
                        && let Some(coordinate) = coords.iter().find(|&&coordinate| coordinate < 0)
                    {
                        return Err(trouble(Fault::Tma, format!("tensor store at coordinate {coordinate}, must not be negative")));
                    }
                    check_pattern(m, "bulk store", rank, offset, &side.far)?;
                    let known = m.clocks.snapshot(w.thread0 as usize + lane, 1);
                    let before = m.clocks.mark();
                    let reduce = match (&side.far, *reduce) {
                        (Far::Tensor { map, .. }, Some((fun, _))) => Some((fun, element_ty(map)?)),
                        (_, reduce) => reduce,
                    };
                    Ok(BulkStore { to: side.far, bytes: side.bytes, rank, offset, reduce, known, before, site: m.site, data: None })
                };
                let op = issue().map_err(|t: Trouble| t.at_lane(lane))?;
                w.bulk.lane(lane).open.push(op);
            }
            Ok(Flow::Next)
        }
        Bulk::Commit => {
            for lane in lanes(mask) {
                let bulk = w.bulk.lane(lane);
                let open = std::mem::take(&mut bulk.open);
                bulk.groups.push_back(open);
            }
            Ok(Flow::Next)
        }
        Bulk::Wait { n, read } => {
            for lane in lanes(mask) {
                m.bulk_wait(w, lane, *n as usize, *read).map_err(|t| t.at_lane(lane))?;
            }
            Ok(Flow::Yield)
        }
    }
}

/// What a reduction does with a map's elements.
fn element_ty(map: &Decoded) -> Result<Ty, Trouble> {
    use crate::tensor_map::ElementType as E;
    Ok(match map.element {
        E::U32 => Ty::U32,
        E::S32 => Ty::S32,
        E::U64 => Ty::U64,
        E::S64 => Ty::S64,
        E::F16 => Ty::F16,
        E::Bf16 => Ty::BF16,
        E::F32 | E::F32Ftz => Ty::F32,
        E::F64 => Ty::F64,
        E::U8 | E::U16 | E::Tf32 | E::Tf32Ftz => return Err(trouble(Fault::Tma, "bulk reduction of an element type that has none")),
    })
}
