//! `atom` and `red`, scalar, packed and vector.

use super::memory::{Order, addresses, cache_hints};
use super::moves::Space;
use super::ty::{Reg, Src, Ty};
use super::{Exec, Flow, Mem, Op};
use crate::front::{Ctx, FrontError};
use crate::machine::Machine;
use crate::machine::access::Update;
use crate::machine::warp::{L64, Warp};
use crate::num::{self, BF16, F16, Round};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fun {
    And,
    Or,
    Xor,
    Exch,
    Cas,
    Add,
    Inc,
    Dec,
    Min,
    Max,
}

#[derive(Debug)]
pub(crate) struct Atomic {
    space: Space,
    fun: Fun,
    ty: Ty,
    order: Order,
    /// Releases (`.release`, `.acq_rel`), acquires (`.acquire`, `.acq_rel`).
    release: bool,
    acquire: bool,
    /// One register per element; none for `red`.
    d: Vec<Reg>,
    mem: Mem,
    a: Vec<Src>,
    /// Swap value of `cas`.
    b: Option<Src>,
}

/// Takes the operation of an atomic or a reduction.
pub(crate) fn fun(ctx: &mut Ctx<'_, '_>) -> Result<Fun, FrontError> {
    ctx.one_of(&[
        ("and", Fun::And),
        ("or", Fun::Or),
        ("xor", Fun::Xor),
        ("exch", Fun::Exch),
        ("cas", Fun::Cas),
        ("add", Fun::Add),
        ("inc", Fun::Inc),
        ("dec", Fun::Dec),
        ("min", Fun::Min),
        ("max", Fun::Max),
    ])
}

pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Option<Op>, FrontError> {
    let returns = match ctx.name() {
        "atom" => true,
        "red" if !ctx.has("async") => false,
        _ => return Ok(None),
    };
    let (mut release, mut acquire) = (false, false);
    if ctx.take("acq_rel") {
        (release, acquire) = (true, true);
    } else if ctx.take("release") {
        release = true;
    } else if ctx.take("acquire") {
        acquire = true;
    } else {
        ctx.take("relaxed");
    }
    for scope in ["cta", "cluster", "gpu", "sys"] {
        ctx.take(scope);
    }
    let space = ctx.take_map(|m| Space::parse(m).filter(|s| matches!(s, Space::Global | Space::Shared))).unwrap_or(Space::Generic);
    let fun = fun(ctx)?;
    let noftz = ctx.take("noftz");
    let policy = cache_hints(ctx);
    let n = ctx.take_map(|m| match m {
        "v2" => Some(2),
        "v4" => Some(4),
        "v8" => Some(8),
        _ => None,
    });
    let n = n.unwrap_or(1);
    let ty = ctx.ty()?;
    let half = matches!(ty, Ty::F16 | Ty::BF16 | Ty::F16x2 | Ty::BF16x2);
    let known = match fun {
        Fun::And | Fun::Or | Fun::Xor => matches!(ty, Ty::B32 | Ty::B64),
        Fun::Exch => matches!(ty, Ty::B32 | Ty::B64),
        Fun::Cas => matches!(ty, Ty::B16 | Ty::B32 | Ty::B64),
        Fun::Inc | Fun::Dec => ty == Ty::U32,
        Fun::Add => matches!(ty, Ty::U32 | Ty::S32 | Ty::U64 | Ty::F32 | Ty::F64) || half && noftz,
        Fun::Min | Fun::Max => matches!(ty, Ty::U32 | Ty::S32 | Ty::U64 | Ty::S64) || half && n > 1 && noftz,
    };
    // Vectors exist in global memory, for f32 (2, 4), f16 and bf16 (2, 4, 8) and their pairs (2, 4).
    let vector_ok = n == 1
        || matches!(space, Space::Global | Space::Generic) && ty.bytes() * n as u32 <= 16 && (ty == Ty::F32 && fun == Fun::Add || half);
    if !known || !vector_ok || noftz && !half {
        return ctx.unimplemented();
    }
    let d = if returns { ctx.dst_vector(n, ty.bits())? } else { Vec::new() };
    let mem = ctx.mem()?;
    let a = ctx.src_vector(n, ty.bits())?;
    let b = if fun == Fun::Cas { Some(ctx.src(ty.bits())?) } else { None };
    if policy {
        ctx.src(64)?;
    }
    let order = if release || acquire { Order::Sync } else { Order::Strong };
    Ok(Some(Op::Atomic(Box::new(Atomic { space, fun, ty, order, release, acquire, d, mem, a, b }))))
}

/// The new value of a location that held `old`.
pub(crate) fn apply(fun: Fun, ty: Ty, old: u64, a: u64, b: u64) -> u64 {
    let f32s = |v: u64| f32::from_bits(v as u32);
    let half = |f: fn(f64, f64) -> f64, old: u64, a: u64| -> u64 {
        let format = if matches!(ty, Ty::BF16 | Ty::BF16x2) { BF16 } else { F16 };
        let one = |o: u64, a: u64| {
            u64::from(format.encode(f(format.decode(o as u32 & 0xffff), format.decode(a as u32 & 0xffff)), Round::Rn, false))
        };
        if ty.bits() == 32 { one(old, a) | one(old >> 16, a >> 16) << 16 } else { one(old, a) }
    };
    match fun {
        Fun::And => old & a,
        Fun::Or => old | a,
        Fun::Xor => old ^ a,
        Fun::Exch => a,
        Fun::Cas => {
            let ones = if ty.bits() == 64 { u64::MAX } else { (1 << ty.bits()) - 1 };
            if old & ones == a & ones { b } else { old }
        }
        Fun::Inc => {
            if old as u32 >= a as u32 {
                0
            } else {
                old + 1
            }
        }
        Fun::Dec => {
            if old as u32 == 0 || old as u32 > a as u32 {
                a
            } else {
                old - 1
            }
        }
        Fun::Add => match ty {
            Ty::F32 => (f32s(old) + f32s(a)).to_bits().into(),
            Ty::F64 => (f64::from_bits(old) + f64::from_bits(a)).to_bits(),
            Ty::F16 | Ty::BF16 | Ty::F16x2 | Ty::BF16x2 => half(num::add_odd, old, a),
            _ => old.wrapping_add(a),
        },
        Fun::Min | Fun::Max => {
            let max = fun == Fun::Max;
            let pick = |less: bool| if less != max { a } else { old };
            match ty {
                Ty::S32 => pick((a as i32) < old as i32),
                Ty::U32 => pick((a as u32) < old as u32),
                Ty::S64 => pick((a as i64) < old as i64),
                Ty::F16 | Ty::BF16 | Ty::F16x2 | Ty::BF16x2 => half(if max { f64::max } else { f64::min }, old, a),
                _ => pick(a < old),
            }
        }
    }
}

pub(crate) fn exec(m: &mut Machine<'_>, w: &mut Warp, i: &Atomic, mask: u32) -> Exec {
    let at = addresses(w, &i.mem);
    let a: Vec<L64> = i.a.iter().map(|a| w.get64(*a)).collect();
    let b = i.b.map_or([0; 32], |b| w.get64(b));
    let bits = u32::from(i.ty.bits());
    let ones = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
    let mut old: Vec<L64> = vec![[0; 32]; i.a.len()];
    m.strong_write(w, i.space, &at, mask, true, i.release);
    let n = i.ty.bytes() * i.a.len() as u32;
    let mut update = Update(|lane: usize, bytes: u128| {
        let mut new = 0u128;
        for (e, old) in old.iter_mut().enumerate() {
            let was = (bytes >> (e as u32 * bits)) as u64 & ones;
            old[lane] = was;
            let value = apply(i.fun, i.ty, was, a[e][lane] & ones, b[lane] & ones) & ones;
            new |= u128::from(value) << (e as u32 * bits);
        }
        Ok(new)
    });
    m.access(w, i.space, &at, mask, n, true, &mut update)?;
    m.strong_read(w, i.space, &at, mask, i.acquire);
    for (d, old) in i.d.iter().zip(&old) {
        w.put64(*d, mask, old);
    }
    debug_assert!(i.order != Order::Weak);
    Ok(Flow::Yield)
}
