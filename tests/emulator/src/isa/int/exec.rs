//! What the integer instructions compute.

use super::{Carry, Count, Fun, Int, Prmt};
use crate::isa::ty::{Reg, Src, Ty};
use crate::isa::{Exec, Flow};
use crate::machine::warp::{L32, L64, Warp};

#[inline(always)]
fn each32(w: &mut Warp, d: Reg, mask: u32, f: impl Fn(usize) -> u32) -> Exec {
    let mut out: L32 = [0; 32];
    for (l, o) in out.iter_mut().enumerate() {
        *o = f(l);
    }
    w.put32(d, mask, &out);
    Ok(Flow::Next)
}

#[inline(always)]
fn each64(w: &mut Warp, d: Reg, mask: u32, f: impl Fn(usize) -> u64) -> Exec {
    let mut out: L64 = [0; 32];
    for (l, o) in out.iter_mut().enumerate() {
        *o = f(l);
    }
    w.put64(d, mask, &out);
    Ok(Flow::Next)
}

pub(crate) fn lop3_bits(table: u8, a: u32, b: u32, c: u32) -> u32 {
    let mut out = 0;
    for i in 0..8 {
        if table >> i & 1 != 0 {
            let pick = |v: u32, bit: u8| if i >> bit & 1 != 0 { v } else { !v };
            out |= pick(a, 2) & pick(b, 1) & pick(c, 0);
        }
    }
    out
}

pub(crate) fn prmt(mode: Prmt, a: u32, b: u32, c: u32) -> u32 {
    let bytes = u64::from(b) << 32 | u64::from(a);
    let byte = |i: u32| (bytes >> (8 * (i & 7)) & 0xff) as u32;
    let s = c & 3;
    let pick: [u32; 4] = match mode {
        Prmt::Index => {
            let mut out = 0;
            for i in 0..4 {
                let sel = c >> (4 * i);
                let v = byte(sel);
                let v = if sel & 8 != 0 { if v & 0x80 != 0 { 0xff } else { 0 } } else { v };
                out |= v << (8 * i);
            }
            return out;
        }
        Prmt::F4e => [s, s + 1, s + 2, s + 3],
        Prmt::B4e => [s, s.wrapping_sub(1), s.wrapping_sub(2), s.wrapping_sub(3)],
        Prmt::Rc8 => [s; 4],
        Prmt::Ecl => [s, s.max(1), s.max(2), 3],
        Prmt::Ecr => [0, s.min(1), s.min(2), s],
        Prmt::Rc16 => {
            let h = 2 * (s & 1);
            [h, h + 1, h, h + 1]
        }
    };
    (0..4).fold(0, |out, i| out | byte(pick[i as usize]) << (8 * i))
}

/// Position of the `offset`-th set bit of `mask` from `base`: upwards for positive offsets, downwards for negative ones.
fn fns(mask: u32, base: u32, offset: u32) -> u32 {
    let (offset, mut at) = (offset as i32, i64::from(base));
    let step = if offset < 0 { -1 } else { 1 };
    if offset == 0 {
        return if base < 32 && mask >> base & 1 != 0 { base } else { u32::MAX };
    }
    let mut left = offset.unsigned_abs();
    while (0..32).contains(&at) {
        left -= mask >> at & 1;
        if left == 0 {
            return at as u32;
        }
        at += step;
    }
    u32::MAX
}

fn dp4a(sa: bool, sb: bool, a: u32, b: u32, c: u32) -> u32 {
    let byte = |v: u32, i: u32, signed: bool| {
        let v = (v >> (8 * i)) as u8;
        if signed { i32::from(v as i8) } else { i32::from(v) }
    };
    (0..4).fold(c, |sum, i| sum.wrapping_add((byte(a, i, sa) * byte(b, i, sb)) as u32))
}

fn dp2a(sa: bool, sb: bool, high: bool, a: u32, b: u32, c: u32) -> u32 {
    (0..2).fold(c, |sum, i| {
        let x = (a >> (16 * i)) as u16;
        let x = if sa { i32::from(x as i16) } else { i32::from(x) };
        let y = (b >> (8 * (i + if high { 2 } else { 0 }))) as u8;
        let y = if sb { i32::from(y as i8) } else { i32::from(y) };
        sum.wrapping_add(x.wrapping_mul(y) as u32)
    })
}

fn fun_32(w: &mut Warp, fun: Fun, signed: bool, d: Reg, mask: u32, a: Src, b: Src, c: Src) -> Exec {
    let (x, y) = (w.get32(a), w.get32(b));
    // Each arm is a loop of its own, so that the simple ones become vector code.
    macro_rules! two {
        ($f:expr) => {
            each32(w, d, mask, |l| $f(x[l], y[l]))
        };
    }
    macro_rules! three {
        ($f:expr) => {{
            let z = w.get32(c);
            each32(w, d, mask, |l| $f(x[l], y[l], z[l]))
        }};
    }
    let s24 = |v: u32| i64::from((v << 8) as i32 >> 8);
    let u24 = |v: u32| i64::from(v & 0xff_ffff);
    let mul24 = move |a: u32, b: u32| if signed { s24(a) * s24(b) } else { u24(a) * u24(b) };
    let mulhi = move |a: u32, b: u32| {
        if signed { ((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32 } else { ((u64::from(a) * u64::from(b)) >> 32) as u32 }
    };
    match fun {
        Fun::Add => two!(u32::wrapping_add),
        Fun::AddSat => two!(|a: u32, b: u32| (a as i32).saturating_add(b as i32) as u32),
        Fun::Sub => two!(u32::wrapping_sub),
        Fun::SubSat => two!(|a: u32, b: u32| (a as i32).saturating_sub(b as i32) as u32),
        Fun::MulLo => two!(u32::wrapping_mul),
        Fun::MulHi => two!(mulhi),
        Fun::MadLo => three!(|a: u32, b: u32, c: u32| a.wrapping_mul(b).wrapping_add(c)),
        Fun::MadHi => three!(|a: u32, b: u32, c: u32| mulhi(a, b).wrapping_add(c)),
        Fun::MadHiSat => three!(|a: u32, b: u32, c: u32| (mulhi(a, b) as i32).saturating_add(c as i32) as u32),
        Fun::Mul24 => two!(|a, b| mul24(a, b) as u32),
        Fun::Mul24Hi => two!(|a, b| (mul24(a, b) >> 16) as u32),
        Fun::Mad24 => three!(|a, b, c: u32| (mul24(a, b) as u32).wrapping_add(c)),
        Fun::Mad24Hi => three!(|a, b, c: u32| ((mul24(a, b) >> 16) as u32).wrapping_add(c)),
        // Division by zero is unspecified in PTX; the hardware gives all ones, and the dividend as remainder.
        Fun::Div if signed => two!(|a: u32, b: u32| if b == 0 { u32::MAX } else { (a as i32).wrapping_div(b as i32) as u32 }),
        Fun::Div => two!(|a: u32, b: u32| a.checked_div(b).unwrap_or(u32::MAX)),
        Fun::Rem if signed => two!(|a: u32, b: u32| if b == 0 { a } else { (a as i32).wrapping_rem(b as i32) as u32 }),
        Fun::Rem => two!(|a: u32, b: u32| a.checked_rem(b).unwrap_or(a)),
        Fun::Abs => each32(w, d, mask, |l| (x[l] as i32).wrapping_abs() as u32),
        Fun::Neg => each32(w, d, mask, |l| x[l].wrapping_neg()),
        Fun::Min if signed => two!(|a: u32, b: u32| (a as i32).min(b as i32) as u32),
        Fun::Max if signed => two!(|a: u32, b: u32| (a as i32).max(b as i32) as u32),
        Fun::Min => two!(u32::min),
        Fun::Max => two!(u32::max),
        Fun::MinRelu => two!(|a: u32, b: u32| (a as i32).min(b as i32).max(0) as u32),
        Fun::MaxRelu => two!(|a: u32, b: u32| (a as i32).max(b as i32).max(0) as u32),
        Fun::And => two!(|a, b| a & b),
        Fun::Or => two!(|a, b| a | b),
        Fun::Xor => two!(|a, b| a ^ b),
        Fun::Not => each32(w, d, mask, |l| !x[l]),
        Fun::Cnot => each32(w, d, mask, |l| u32::from(x[l] == 0)),
        Fun::Shl => two!(|a: u32, b: u32| if b > 31 { 0 } else { a << b }),
        Fun::Shr if signed => two!(|a: u32, b: u32| (a as i32 >> b.min(31)) as u32),
        Fun::Shr => two!(|a: u32, b: u32| if b > 31 { 0 } else { a >> b }),
        Fun::Sad if signed => three!(|a: u32, b: u32, c: u32| c.wrapping_add((a as i32).abs_diff(b as i32))),
        Fun::Sad => three!(|a: u32, b: u32, c: u32| c.wrapping_add(a.abs_diff(b))),
        Fun::Lop3(0x96) => three!(|a, b, c| a ^ b ^ c),
        Fun::Lop3(table) => three!(|a, b, c| lop3_bits(table, a, b, c)),
        Fun::ShfL(wrap) => three!(|a: u32, b: u32, c: u32| {
            let n = if wrap { c & 31 } else { c.min(32) };
            ((u64::from(b) << 32 | u64::from(a)) << n >> 32) as u32
        }),
        Fun::ShfR(wrap) => three!(|a: u32, b: u32, c: u32| {
            let n = if wrap { c & 31 } else { c.min(32) };
            ((u64::from(b) << 32 | u64::from(a)) >> n) as u32
        }),
        Fun::Brev => each32(w, d, mask, |l| x[l].reverse_bits()),
        Fun::Fns => three!(fns),
        Fun::Prmt(mode) => three!(|a, b, c| prmt(mode, a, b, c)),
        Fun::Szext(wrap) => two!(|a: u32, b: u32| {
            let n = if wrap { b & 31 } else { b.min(32) };
            match n {
                0 => 0,
                32 => a,
                n if signed => ((a << (32 - n)) as i32 >> (32 - n)) as u32,
                n => a & ((1 << n) - 1),
            }
        }),
        Fun::Bmsk(wrap) => two!(|a: u32, b: u32| {
            let (pos, len) = if wrap { (a & 31, b & 31) } else { (a.min(32), b.min(32)) };
            let ones = if len >= 32 { u64::from(u32::MAX) } else { (1u64 << len) - 1 };
            (ones << pos) as u32
        }),
        Fun::Dp4a(sa, sb) => three!(|a, b, c| dp4a(sa, sb, a, b, c)),
        Fun::Dp2a(sa, sb, high) => three!(|a, b, c| dp2a(sa, sb, high, a, b, c)),
    }
}

fn fun_64(w: &mut Warp, fun: Fun, signed: bool, d: Reg, mask: u32, a: Src, b: Src, c: Src) -> Exec {
    let (x, y) = (w.get64(a), w.get64(b));
    macro_rules! two {
        ($f:expr) => {
            each64(w, d, mask, |l| $f(x[l], y[l]))
        };
    }
    macro_rules! three {
        ($f:expr) => {{
            let z = w.get64(c);
            each64(w, d, mask, |l| $f(x[l], y[l], z[l]))
        }};
    }
    let mulhi = move |a: u64, b: u64| {
        if signed { ((i128::from(a as i64) * i128::from(b as i64)) >> 64) as u64 } else { ((u128::from(a) * u128::from(b)) >> 64) as u64 }
    };
    match fun {
        Fun::Add => two!(u64::wrapping_add),
        Fun::Sub => two!(u64::wrapping_sub),
        Fun::MulLo => two!(u64::wrapping_mul),
        Fun::MulHi => two!(mulhi),
        Fun::MadLo => three!(|a: u64, b: u64, c: u64| a.wrapping_mul(b).wrapping_add(c)),
        Fun::MadHi => three!(|a: u64, b: u64, c: u64| mulhi(a, b).wrapping_add(c)),
        Fun::Div if signed => two!(|a: u64, b: u64| if b == 0 { u64::MAX } else { (a as i64).wrapping_div(b as i64) as u64 }),
        Fun::Div => two!(|a: u64, b: u64| a.checked_div(b).unwrap_or(u64::MAX)),
        Fun::Rem if signed => two!(|a: u64, b: u64| if b == 0 { a } else { (a as i64).wrapping_rem(b as i64) as u64 }),
        Fun::Rem => two!(|a: u64, b: u64| a.checked_rem(b).unwrap_or(a)),
        Fun::Abs => each64(w, d, mask, |l| (x[l] as i64).wrapping_abs() as u64),
        Fun::Neg => each64(w, d, mask, |l| x[l].wrapping_neg()),
        Fun::Min if signed => two!(|a: u64, b: u64| (a as i64).min(b as i64) as u64),
        Fun::Max if signed => two!(|a: u64, b: u64| (a as i64).max(b as i64) as u64),
        Fun::Min => two!(u64::min),
        Fun::Max => two!(u64::max),
        Fun::And => two!(|a, b| a & b),
        Fun::Or => two!(|a, b| a | b),
        Fun::Xor => two!(|a, b| a ^ b),
        Fun::Not => each64(w, d, mask, |l| !x[l]),
        Fun::Cnot => each64(w, d, mask, |l| u64::from(x[l] == 0)),
        // The amount is a 32-bit value.
        Fun::Shl => two!(|a: u64, b: u64| if b as u32 > 63 { 0 } else { a << b as u32 }),
        Fun::Shr if signed => two!(|a: u64, b: u64| (a as i64 >> (b as u32).min(63)) as u64),
        Fun::Shr => two!(|a: u64, b: u64| if b as u32 > 63 { 0 } else { a >> b as u32 }),
        Fun::Sad if signed => three!(|a: u64, b: u64, c: u64| c.wrapping_add((a as i64).abs_diff(b as i64))),
        Fun::Sad => three!(|a: u64, b: u64, c: u64| c.wrapping_add(a.abs_diff(b))),
        Fun::Brev => each64(w, d, mask, |l| x[l].reverse_bits()),
        _ => unreachable!("no 64-bit form is lowered"),
    }
}

fn fun_16(w: &mut Warp, fun: Fun, signed: bool, d: Reg, mask: u32, a: Src, b: Src, c: Src) -> Exec {
    let widen = |v: u32| if signed { i32::from(v as u16 as i16) } else { i32::from(v as u16) };
    let (x, z) = (w.get32(a).map(widen), w.get32(c).map(widen));
    // A shift amount is a full 32-bit value.
    let y = if matches!(fun, Fun::Shl | Fun::Shr) { w.get32(b).map(|v| v.min(31) as i32) } else { w.get32(b).map(widen) };
    each32(w, d, mask, |l| {
        let (a, b, c) = (x[l], y[l], z[l]);
        let product = i64::from(a) * i64::from(b);
        (match fun {
            Fun::Add => a.wrapping_add(b),
            Fun::Sub => a.wrapping_sub(b),
            Fun::MulLo => product as i32,
            Fun::MulHi => (product >> 16) as i32,
            Fun::MadLo => (product as i32).wrapping_add(c),
            Fun::MadHi => ((product >> 16) as i32).wrapping_add(c),
            Fun::Div => a.checked_div(b).unwrap_or(-1),
            Fun::Rem => a.checked_rem(b).unwrap_or(a),
            Fun::Abs => a.abs(),
            Fun::Neg => -a,
            Fun::Min => a.min(b),
            Fun::Max => a.max(b),
            Fun::And => a & b,
            Fun::Or => a | b,
            Fun::Xor => a ^ b,
            Fun::Not => !a,
            Fun::Cnot => i32::from(a & 0xffff == 0),
            Fun::Shl => ((a as u32) << b) as i32,
            Fun::Shr => a >> b,
            Fun::Sad => c.wrapping_add((a - b).abs()),
            _ => unreachable!("no 16-bit form is lowered"),
        }) as u32
            & 0xffff
    })
}

pub(crate) fn exec(w: &mut Warp, inst: &Int, mask: u32) -> Exec {
    match *inst {
        Int::Fun { fun, ty, d, a, b, c } => match ty.bits() {
            32 => fun_32(w, fun, ty.signed(), d, mask, a, b, c),
            64 => fun_64(w, fun, ty.signed(), d, mask, a, b, c),
            _ => fun_16(w, fun, ty.signed(), d, mask, a, b, c),
        },
        Int::Wide { ty, d, a, b, c } => {
            let (x, y) = (w.get32(a), w.get32(b));
            let z = c.map_or([0; 32], |c| w.get64(c));
            match ty {
                Ty::S32 => each64(w, d, mask, |l| (i64::from(x[l] as i32) * i64::from(y[l] as i32)).wrapping_add(z[l] as i64) as u64),
                Ty::U32 => each64(w, d, mask, |l| (u64::from(x[l]) * u64::from(y[l])).wrapping_add(z[l])),
                Ty::S16 => {
                    each32(w, d, mask, |l| (i32::from(x[l] as u16 as i16) * i32::from(y[l] as u16 as i16)).wrapping_add(z[l] as i32) as u32)
                }
                _ => each32(w, d, mask, |l| (u32::from(x[l] as u16) * u32::from(y[l] as u16)).wrapping_add(z[l] as u32)),
            }
        }
        Int::Count { what, bits, d, a } => {
            let x = w.get64(a);
            let narrow = bits == 32;
            each32(w, d, mask, |l| {
                let v = if narrow { u64::from(x[l] as u32) } else { x[l] };
                match what {
                    Count::Popc => v.count_ones(),
                    Count::Clz => v.leading_zeros() - if narrow { 32 } else { 0 },
                    Count::Bfind(signed, shift) => {
                        let sign = if narrow { v as u32 >> 31 } else { (v >> 63) as u32 };
                        let v = if signed && sign != 0 { !v & if narrow { u64::from(u32::MAX) } else { u64::MAX } } else { v };
                        if v == 0 {
                            return u32::MAX;
                        }
                        let top = 63 - v.leading_zeros();
                        if shift { u32::from(bits) - 1 - top } else { top }
                    }
                }
            })
        }
        Int::BitField { insert, ty, d, a, b, pos, len } => {
            let (x, y, p, n) = (w.get64(a), w.get64(b), w.get32(pos), w.get32(len));
            let bits = u32::from(ty.bits());
            each64(w, d, mask, |l| {
                let (p, n) = (p[l] & 0xff, n[l] & 0xff);
                if insert { bfi(bits, x[l], y[l], p, n) } else { bfe(bits, ty.signed(), x[l], p, n) }
            })
        }
        Int::Carry { kind, ty, d, a, b, c, carry_in, carry_out } => {
            let (x, y, z) = (w.get64(a), w.get64(b), w.get64(c));
            let bits = u32::from(ty.bits());
            let limit = (1u128 << bits) - 1;
            let flag = w.carry;
            let mut out = flag;
            let mut values: L64 = [0; 32];
            for l in 0..32 {
                let (x, y, z) = (u128::from(x[l]) & limit, u128::from(y[l]) & limit, u128::from(z[l]) & limit);
                let cin = u128::from(carry_in && flag >> l & 1 != 0);
                let (v, carry) = match kind {
                    Carry::Add => (x + y + cin, x + y + cin > limit),
                    // The flag is a borrow.
                    Carry::Sub => (x.wrapping_sub(y).wrapping_sub(cin), x < y + cin),
                    Carry::MadLo | Carry::MadHi => {
                        let product = if ty.signed() {
                            let sign = |v: u128| (v << (128 - bits)) as i128 >> (128 - bits);
                            sign(x).wrapping_mul(sign(y)) as u128
                        } else {
                            x.wrapping_mul(y)
                        };
                        let part = if kind == Carry::MadLo { product & limit } else { product >> bits & limit };
                        (part + z + cin, part + z + cin > limit)
                    }
                };
                values[l] = (v & limit) as u64;
                out = out & !(1 << l) | u32::from(carry) << l;
            }
            if carry_out {
                w.carry = w.carry & !mask | out & mask;
            }
            w.put64(d, mask, &values);
            Ok(Flow::Next)
        }
        Int::Lop3Pred { table, or, d, p, a, b, c, q } => {
            let (x, y, z, q) = (w.get32(a), w.get32(b), w.get32(c), w.pred(q));
            let out: L32 = std::array::from_fn(|l| lop3_bits(table, x[l], y[l], z[l]));
            let nonzero = (0..32).fold(0, |m, l| m | u32::from(out[l] != 0) << l);
            w.put32(d, mask, &out);
            w.set_pred(p, mask, if or { nonzero | q } else { nonzero & q });
            Ok(Flow::Next)
        }
    }
}

fn bfi(bits: u32, a: u64, b: u64, pos: u32, len: u32) -> u64 {
    if pos >= bits || len == 0 {
        return b;
    }
    let len = len.min(bits - pos);
    let ones = if len >= 64 { u64::MAX } else { (1 << len) - 1 };
    b & !(ones << pos) | (a & ones) << pos
}

fn bfe(bits: u32, signed: bool, a: u64, pos: u32, len: u32) -> u64 {
    if len == 0 {
        return 0;
    }
    let a = if bits == 32 { u64::from(a as u32) } else { a };
    let top = (pos + len - 1).min(bits - 1);
    let sign = signed && a >> top & 1 != 0;
    let mut out = if pos >= bits { 0 } else { a >> pos };
    if len < bits {
        out &= (1 << len) - 1;
    }
    if sign {
        // Bits above the field, and above what the source had, copy the sign.
        let have = len.min(bits.saturating_sub(pos));
        if have < 64 {
            out |= u64::MAX << have;
        }
    }
    if bits == 32 { u64::from(out as u32) } else { out }
}
