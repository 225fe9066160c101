//! Integer arithmetic, logic, shifts, bit fields and comparisons. Division by zero is left out: the ISA leaves its result open.

use super::super::elementwise::{Op, Ty, Value, binary, cases, image, ternary, unary};
use super::Family;

pub fn family() -> Family {
    let ops = ops();
    Family::table("integer", image("Integer arithmetic, logic, shifts, bit fields and comparisons.", &ops), cases("integer", &ops))
}

const NONZERO32: &[u64] = &[1, 2, 3, 7, 10, 31, 0x7FFF_FFFF, 0x8000_0000, 0x8000_0001, 0xFFFF_FF9C, 0xFFFF_FFFE, 12345];
const SIGNED_DIVIDEND32: &[u64] = &[0, 1, 2, 7, 100, 0x7FFF_FFFF, 0x8000_0001, 0xFFFF_FFFF, 0xFFFF_FF9C, 0x1234_5678];
const NONZERO64: &[u64] = &[1, 2, 3, 10, 0xFFFF_FFFF, 1 << 32, 1 << 63, u64::MAX - 1, 0x0123_4567_89AB_CDEF, u64::MAX - 999];
const SIGNED_DIVIDEND64: &[u64] = &[0, 1, 7, 1 << 40, (1 << 63) - 1, (1 << 63) + 1, u64::MAX, u64::MAX - 12345];
const COUNTS: &[u64] = &[0, 1, 4, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 0xFFFF_FFFF];

fn ops() -> Vec<Op> {
    let mut ops = sums();
    ops.extend(products());
    ops.extend(quotients());
    ops.extend(logic());
    ops.extend(shifts());
    ops.extend(fields());
    ops.extend(comparisons());
    ops
}

fn sums() -> Vec<Op> {
    vec![
        binary("add.u16", u16::wrapping_add),
        binary("add.s32", i32::wrapping_add),
        binary("add.u64", u64::wrapping_add),
        binary("add.sat.s32", i32::saturating_add),
        binary("sub.s16", i16::wrapping_sub),
        binary("sub.u32", u32::wrapping_sub),
        binary("sub.s64", i64::wrapping_sub),
        binary("sub.sat.s32", i32::saturating_sub),
        unary("neg.s16", i16::wrapping_neg),
        unary("neg.s32", i32::wrapping_neg),
        unary("neg.s64", i64::wrapping_neg),
        unary("abs.s16", i16::wrapping_abs),
        unary("abs.s32", i32::wrapping_abs),
        unary("abs.s64", i64::wrapping_abs),
        binary("min.s16", |a: i16, b: i16| a.min(b)),
        binary("min.u16", |a: u16, b: u16| a.min(b)),
        binary("min.s32", |a: i32, b: i32| a.min(b)),
        binary("min.u32", |a: u32, b: u32| a.min(b)),
        binary("min.s64", |a: i64, b: i64| a.min(b)),
        binary("max.u16", |a: u16, b: u16| a.max(b)),
        binary("max.s32", |a: i32, b: i32| a.max(b)),
        binary("max.u32", |a: u32, b: u32| a.max(b)),
        binary("max.u64", |a: u64, b: u64| a.max(b)),
        binary("max.s64", |a: i64, b: i64| a.max(b)),
        binary("min.s32.relu", |a: i32, b: i32| a.min(b).max(0)).body("min.relu.s32", "min.relu.s32 %d, %a, %b;"),
        binary("max.relu.s32", |a: i32, b: i32| a.max(b).max(0)),
        binary("min.s16x2", |a: u32, b: u32| per_half(a, b, |x, y| x.min(y))),
        binary("max.u16x2", |a: u32, b: u32| per_half_unsigned(a, b, |x, y| x.max(y))),
        binary("add.u16x2", |a: u32, b: u32| per_half_unsigned(a, b, u16::wrapping_add)),
        binary("add.s16x2", |a: u32, b: u32| per_half(a, b, i16::wrapping_add)),
        ternary("sad.u32", |a: u32, b: u32, c: u32| c.wrapping_add(a.abs_diff(b))),
        ternary("sad.s32", |a: i32, b: i32, c: u32| c.wrapping_add(a.abs_diff(b))),
        // A carry chain: the high word of a 64-bit sum and difference.
        ternary("add.cc", |a: u32, b: u32, c: u32| ((u64::from(a) + u64::from(b)) >> 32) as u32 + c)
            .values(&[NONZERO32, NONZERO32, &[0, 1, 5, 0x7FFF_FFFF]])
            .body("add.cc.u32 addc.u32", "add.cc.u32 %d, %a, %b;\naddc.u32 %d, %c, 0;"),
        ternary("sub.cc", |a: u32, b: u32, c: u32| c.wrapping_sub(u32::from(a < b)))
            .body("sub.cc.u32 subc.u32", "sub.cc.u32 %d, %a, %b;\nsubc.u32 %d, %c, 0;"),
        ternary("addc.cc", |a: u32, b: u32, c: u32| {
            let carry = u32::from(a.checked_add(b).is_none());
            let (sum, first) = c.overflowing_add(c);
            u32::from(first || sum.checked_add(carry).is_none())
        })
        .body("addc.cc.u32", "add.cc.u32 %d, %a, %b;\naddc.cc.u32 %d, %c, %c;\naddc.u32 %d, 0, 0;"),
        ternary("mad.cc", |a: u32, b: u32, c: u32| ((u64::from(a) * u64::from(b) + u64::from(c)) >> 32) as u32)
            .body("mad.lo.cc.u32 madc.hi.u32", "mad.lo.cc.u32 %d, %a, %b, %c;\nmadc.hi.u32 %d, %a, %b, 0;"),
    ]
}

fn products() -> Vec<Op> {
    vec![
        binary("mul.lo.s16", i16::wrapping_mul),
        binary("mul.hi.s16", |a: i16, b: i16| ((i32::from(a) * i32::from(b)) >> 16) as i16),
        binary("mul.hi.u16", |a: u16, b: u16| ((u32::from(a) * u32::from(b)) >> 16) as u16),
        binary("mul.wide.s16", |a: i16, b: i16| i32::from(a) * i32::from(b)),
        binary("mul.wide.u16", |a: u16, b: u16| u32::from(a) * u32::from(b)),
        binary("mul.lo.s32", i32::wrapping_mul),
        binary("mul.lo.u32", u32::wrapping_mul),
        binary("mul.hi.s32", |a: i32, b: i32| ((i64::from(a) * i64::from(b)) >> 32) as i32),
        binary("mul.hi.u32", |a: u32, b: u32| ((u64::from(a) * u64::from(b)) >> 32) as u32),
        binary("mul.wide.s32", |a: i32, b: i32| i64::from(a) * i64::from(b)),
        binary("mul.wide.u32", |a: u32, b: u32| u64::from(a) * u64::from(b)),
        binary("mul.lo.s64", i64::wrapping_mul),
        binary("mul.hi.s64", |a: i64, b: i64| ((i128::from(a) * i128::from(b)) >> 64) as i64),
        binary("mul.hi.u64", |a: u64, b: u64| ((u128::from(a) * u128::from(b)) >> 64) as u64),
        binary("mul24.lo.s32", |a: i32, b: i32| (i64::from(a << 8 >> 8) * i64::from(b << 8 >> 8)) as i32),
        binary("mul24.lo.u32", |a: u32, b: u32| (u64::from(a & 0xFF_FFFF) * u64::from(b & 0xFF_FFFF)) as u32),
        ternary("mad.lo.s32", |a: i32, b: i32, c: i32| a.wrapping_mul(b).wrapping_add(c)),
        ternary("mad.lo.u16", |a: u16, b: u16, c: u16| a.wrapping_mul(b).wrapping_add(c)),
        ternary("mad.hi.s32", |a: i32, b: i32, c: i32| (((i64::from(a) * i64::from(b)) >> 32) as i32).wrapping_add(c)),
        ternary("mad.hi.u32", |a: u32, b: u32, c: u32| (((u64::from(a) * u64::from(b)) >> 32) as u32).wrapping_add(c)),
        ternary("mad.wide.s32", |a: i32, b: i32, c: i64| (i64::from(a) * i64::from(b)).wrapping_add(c)),
        ternary("mad.wide.u32", |a: u32, b: u32, c: u64| (u64::from(a) * u64::from(b)).wrapping_add(c)),
        ternary("mad.wide.u16", |a: u16, b: u16, c: u32| (u32::from(a) * u32::from(b)).wrapping_add(c)),
        ternary("mad.lo.u64", |a: u64, b: u64, c: u64| a.wrapping_mul(b).wrapping_add(c)),
        ternary("mad.hi.u64", |a: u64, b: u64, c: u64| (((u128::from(a) * u128::from(b)) >> 64) as u64).wrapping_add(c)),
        ternary("dp4a.s32.s32", |a: u32, b: u32, c: i32| dot4(a, b, true, true, c)),
        ternary("dp4a.u32.u32", |a: u32, b: u32, c: i32| dot4(a, b, false, false, c)),
        ternary("dp4a.s32.u32", |a: u32, b: u32, c: i32| dot4(a, b, true, false, c)),
        ternary("dp4a.u32.s32", |a: u32, b: u32, c: i32| dot4(a, b, false, true, c)),
        ternary("dp2a.lo.s32.s32", |a: u32, b: u32, c: i32| {
            let halves = [a as i16, (a >> 16) as i16].map(i64::from);
            (i64::from(c) + halves[0] * i64::from(b as i8) + halves[1] * i64::from((b >> 8) as i8)) as i32
        }),
        ternary("dp2a.hi.u32.u32", |a: u32, b: u32, c: u32| {
            c.wrapping_add((a & 0xFFFF) * (b >> 16 & 0xFF)).wrapping_add((a >> 16) * (b >> 24))
        }),
    ]
}

fn quotients() -> Vec<Op> {
    vec![
        binary("div.u16", |a: u16, b: u16| a / b).values(&[&[0, 1, 99, 0x7FFF, 0x8000, 0xFFFF], &[1, 2, 3, 10, 255, 0x7FFF, 0xFFFF]]),
        binary("div.s16", |a: i16, b: i16| a / b).values(&[&[0, 1, 99, 0x7FFF, 0x8001, 0xFF9C], &[1, 2, 3, 10, 0xFFFF, 0xFFF9]]),
        binary("div.u32", |a: u32, b: u32| a / b).values(&[SIGNED_DIVIDEND32, NONZERO32]),
        binary("div.s32", |a: i32, b: i32| a / b).values(&[SIGNED_DIVIDEND32, NONZERO32]),
        binary("div.u64", |a: u64, b: u64| a / b).values(&[SIGNED_DIVIDEND64, NONZERO64]),
        binary("div.s64", |a: i64, b: i64| a / b).values(&[SIGNED_DIVIDEND64, NONZERO64]),
        binary("rem.u16", |a: u16, b: u16| a % b).values(&[&[0, 1, 99, 0x7FFF, 0x8000, 0xFFFF], &[1, 2, 3, 10, 255, 0x7FFF, 0xFFFF]]),
        binary("rem.u32", |a: u32, b: u32| a % b).values(&[SIGNED_DIVIDEND32, NONZERO32]),
        binary("rem.s32", |a: i32, b: i32| a % b).values(&[SIGNED_DIVIDEND32, NONZERO32]),
        binary("rem.u64", |a: u64, b: u64| a % b).values(&[SIGNED_DIVIDEND64, NONZERO64]),
        binary("rem.s64", |a: i64, b: i64| a % b).values(&[SIGNED_DIVIDEND64, NONZERO64]),
    ]
}

fn logic() -> Vec<Op> {
    let mut ops = vec![
        binary("and.b16", |a: u16, b: u16| a & b),
        binary("and.b32", |a: u32, b: u32| a & b),
        binary("or.b32", |a: u32, b: u32| a | b),
        binary("or.b64", |a: u64, b: u64| a | b),
        binary("xor.b16", |a: u16, b: u16| a ^ b),
        binary("xor.b64", |a: u64, b: u64| a ^ b),
        unary("not.b16", |a: u16| !a),
        unary("not.b32", |a: u32| !a),
        unary("not.b64", |a: u64| !a),
        unary("cnot.b32", |a: u32| u32::from(a == 0)),
        binary("and.pred", |a: u32, b: u32| u32::from(a != 0 && b != 0 || a == 0 && b == 31) ^ u32::from(a == 7)).body(
            "predicate logic",
            ".reg .pred x, y, z;\n\
             setp.ne.u32 x, %a, 0;\nsetp.ne.u32 y, %b, 0;\nand.pred z, x, y;\n\
             setp.eq.u32 y, %b, 31;\nnot.pred x, x;\nand.pred y, x, y;\nor.pred z, z, y;\n\
             setp.eq.u32 x, %a, 7;\nxor.pred z, z, x;\nselp.u32 %d, 1, 0, z;",
        ),
    ];
    // immLut names the function: bit i of it is the result for a, b, c = the bits of i, a highest.
    const TABLES: [u8; 6] = [0x00, 0x96, 0xE8, 0xCA, 0x3C, 0xFF];
    for table in TABLES {
        ops.push(
            Op::new("lop3.b32", &[Ty::B32; 3], Ty::B32, move |x| {
                let bit = |i: u32| u64::from(table) >> (4 * (x[0] >> i & 1) + 2 * (x[1] >> i & 1) + (x[2] >> i & 1)) & 1;
                u32::want((0..32).map(|i| (bit(i) as u32) << i).sum())
            })
            .body(&format!("lop3.b32 0x{table:02X}"), &format!("lop3.b32 %d, %a, %b, %c, 0x{table:02X};")),
        );
    }
    ops
}

fn shifts() -> Vec<Op> {
    vec![
        binary("shl.b16", |a: u16, n: u32| if n < 16 { a << n } else { 0 }).values(&[&[1, 0xFFFF, 0x1234, 0x8001], COUNTS]),
        binary("shl.b32", |a: u32, n: u32| if n < 32 { a << n } else { 0 }).values(&[&[1, 0xFFFF_FFFF, 0x1234_5678], COUNTS]),
        binary("shl.b64", |a: u64, n: u32| if n < 64 { a << n } else { 0 }).values(&[&[1, u64::MAX, 0x0123_4567_89AB_CDEF], COUNTS]),
        binary("shr.u16", |a: u16, n: u32| if n < 16 { a >> n } else { 0 }).values(&[&[1, 0xFFFF, 0x1234, 0x8001], COUNTS]),
        binary("shr.s16", |a: i16, n: u32| a >> n.min(15)).values(&[&[1, 0xFFFF, 0x1234, 0x8001], COUNTS]),
        binary("shr.u32", |a: u32, n: u32| if n < 32 { a >> n } else { 0 }).values(&[&[1, 0xFFFF_FFFF, 0x8765_4321], COUNTS]),
        binary("shr.b32", |a: u32, n: u32| if n < 32 { a >> n } else { 0 }).values(&[&[1, 0xFFFF_FFFF, 0x8765_4321], COUNTS]),
        binary("shr.s32", |a: i32, n: u32| a >> n.min(31)).values(&[&[1, 0xFFFF_FFFF, 0x8765_4321], COUNTS]),
        binary("shr.u64", |a: u64, n: u32| if n < 64 { a >> n } else { 0 }).values(&[&[1, u64::MAX, 0xFEDC_BA98_7654_3210], COUNTS]),
        binary("shr.s64", |a: i64, n: u32| a >> n.min(63)).values(&[&[1, u64::MAX, 0xFEDC_BA98_7654_3210], COUNTS]),
        ternary("shf.l.clamp.b32", |a: u32, b: u32, n: u32| (pair(a, b) << n.min(32) >> 32) as u32).values(&[
            &[0x8000_0001, 0x1234_5678],
            &[0xF000_000F, 0x9ABC_DEF0],
            COUNTS,
        ]),
        ternary("shf.l.wrap.b32", |a: u32, b: u32, n: u32| (pair(a, b) << (n & 31) >> 32) as u32).values(&[
            &[0x8000_0001, 0x1234_5678],
            &[0xF000_000F, 0x9ABC_DEF0],
            COUNTS,
        ]),
        ternary("shf.r.clamp.b32", |a: u32, b: u32, n: u32| (pair(a, b) >> n.min(32)) as u32).values(&[
            &[0x8000_0001, 0x1234_5678],
            &[0xF000_000F, 0x9ABC_DEF0],
            COUNTS,
        ]),
        ternary("shf.r.wrap.b32", |a: u32, b: u32, n: u32| (pair(a, b) >> (n & 31)) as u32).values(&[
            &[0x8000_0001, 0x1234_5678],
            &[0xF000_000F, 0x9ABC_DEF0],
            COUNTS,
        ]),
    ]
}

fn fields() -> Vec<Op> {
    const POSITIONS: &[u64] = &[0, 1, 4, 15, 30, 31, 32, 255, 0x104];
    const LENGTHS: &[u64] = &[0, 1, 5, 16, 31, 32, 33, 255, 0x108];
    // The ISA bounds both by 255. An H100 takes the low eight bits for words, and all bits for double words.
    const POSITIONS_64: &[u64] = POSITIONS.split_at(8).0;
    const LENGTHS_64: &[u64] = LENGTHS.split_at(8).0;
    let mut ops = vec![
        unary("popc.b32", |a: u32| a.count_ones()),
        unary("popc.b64", |a: u64| a.count_ones()),
        unary("clz.b32", |a: u32| a.leading_zeros()),
        unary("clz.b64", |a: u64| a.leading_zeros()),
        unary("brev.b32", u32::reverse_bits),
        unary("brev.b64", u64::reverse_bits),
        unary("bfind.u32", |a: u32| a.checked_ilog2().unwrap_or(u32::MAX)),
        unary("bfind.s32", |a: i32| (if a < 0 { !a } else { a } as u32).checked_ilog2().unwrap_or(u32::MAX)),
        unary("bfind.shiftamt.u32", |a: u32| a.checked_ilog2().map_or(u32::MAX, |bit| 31 - bit)),
        unary("bfind.u64", |a: u64| a.checked_ilog2().unwrap_or(u32::MAX)),
        ternary("bfe.u32", |a: u32, at: u32, len: u32| extract(u64::from(a), 32, at, len, false) as u32).values(&[
            &[0x89AB_CDEF, 0x7654_3210],
            POSITIONS,
            LENGTHS,
        ]),
        ternary("bfe.s32", |a: u32, at: u32, len: u32| extract(u64::from(a), 32, at, len, true) as u32).values(&[
            &[0x89AB_CDEF, 0x7654_3210],
            POSITIONS,
            LENGTHS,
        ]),
        ternary("bfe.u64", |a: u64, at: u32, len: u32| extract(a, 64, at, len, false)).values(&[
            &[0xFEDC_BA98_7654_3210],
            POSITIONS_64,
            LENGTHS_64,
        ]),
        ternary("bfe.s64", |a: u64, at: u32, len: u32| extract(a, 64, at, len, true)).values(&[
            &[0xFEDC_BA98_7654_3210],
            POSITIONS_64,
            LENGTHS_64,
        ]),
        ternary("bfi.b32", |a: u32, b: u32, at: u32| insert(u64::from(a), u64::from(b), 32, at, 7) as u32)
            .values(&[&[0x89AB_CDEF, 0], &[0xFFFF_FFFF, 0x1234_5678], POSITIONS])
            .body("bfi.b32 length 7", "bfi.b32 %d, %a, %b, %c, 7;"),
        ternary("bfi.b32", |a: u32, b: u32, len: u32| insert(u64::from(a), u64::from(b), 32, 9, len) as u32)
            .values(&[&[0x89AB_CDEF, 0], &[0xFFFF_FFFF, 0x1234_5678], LENGTHS])
            .body("bfi.b32 position 9", "bfi.b32 %d, %a, %b, 9, %c;"),
        ternary("bfi.b64", |a: u64, b: u64, at: u32| insert(a, b, 64, at, 20))
            .values(&[&[0xFEDC_BA98_7654_3210], &[0, u64::MAX], POSITIONS_64])
            .body("bfi.b64 length 20", "bfi.b64 %d, %a, %b, %c, 20;"),
        ternary("prmt.b32", permute).values(&[
            &[0x8765_4321, 0x00FF_7F80],
            &[0xFEDC_BA98],
            &[0x3210, 0x7654, 0x0000, 0x5410, 0xFB73, 0x89AB, 0x4321, 0xFFFF_8888],
        ]),
    ];
    // The modes of prmt take one selector, of which two bits count.
    let modes: [(&str, fn(u32) -> u32); 6] = [
        ("f4e", |n| [0x3210, 0x4321, 0x5432, 0x6543][n as usize]),
        ("b4e", |n| [0x5670, 0x6701, 0x7012, 0x0123][n as usize]),
        ("rc8", |n| n * 0x1111),
        ("ecl", |n| [0x3210, 0x3211, 0x3222, 0x3333][n as usize]),
        ("ecr", |n| [0x0000, 0x1110, 0x2210, 0x3210][n as usize]),
        ("rc16", |n| [0x1010, 0x3232, 0x1010, 0x3232][n as usize]),
    ];
    for (mode, selector) in modes {
        ops.push(
            Op::new(&format!("prmt.b32.{mode}"), &[Ty::B32; 3], Ty::B32, move |x| {
                permute(x[0] as u32, x[1] as u32, selector(x[2] as u32 & 3)).want()
            })
            .values(&[&[0x8765_4321], &[0xFEDC_BA98], &[0, 1, 2, 3, 7]]),
        );
    }
    ops
}

fn comparisons() -> Vec<Op> {
    let mut ops = Vec::new();
    let signed: [(&str, fn(&i64, &i64) -> bool); 6] =
        [("eq", i64::eq), ("ne", i64::ne), ("lt", i64::lt), ("le", i64::le), ("gt", i64::gt), ("ge", i64::ge)];
    for (name, holds) in signed {
        for (ty, bits, code) in [("s16", 16, Ty::B16), ("s32", 32, Ty::B32), ("s64", 64, Ty::B64)] {
            ops.push(compare(&format!("setp.{name}.{ty}"), code, move |a, b| holds(&sign_extend(a, bits), &sign_extend(b, bits))));
        }
    }
    let unsigned: [(&str, fn(&u64, &u64) -> bool); 6] =
        [("lt", u64::lt), ("le", u64::le), ("gt", u64::gt), ("ge", u64::ge), ("lo", u64::lt), ("hs", u64::ge)];
    for (name, holds) in unsigned {
        for (ty, code) in [("u16", Ty::B16), ("u32", Ty::B32), ("u64", Ty::B64)] {
            ops.push(compare(&format!("setp.{name}.{ty}"), code, move |a, b| holds(&a, &b)));
        }
    }
    ops.extend([
        binary("setp.lt.and.s32", |a: i32, b: i32| u32::from(a < b && a != 0) + 2 * u32::from(a >= b && a != 0)).body(
            "setp.lt.and.s32 two results",
            ".reg .pred p, q, r;\nsetp.ne.s32 r, %a, 0;\nsetp.lt.and.s32 p|q, %a, %b, r;\n.reg .b32 e;\nselp.u32 %d, 1, 0, p;\nselp.u32 e, 2, 0, q;\nadd.u32 %d, %d, e;",
        ),
        binary("setp.or", |a: u32, b: u32| u32::from(a > b || a != 3)).body(
            "setp.gt.or.u32 negated",
            ".reg .pred p, r;\nsetp.eq.u32 r, %a, 3;\nsetp.gt.or.u32 p, %a, %b, !r;\nselp.u32 %d, 1, 0, p;",
        ),
        binary("setp.xor", |a: u32, b: u32| u32::from((a <= b) ^ (b == 1))).body(
            "setp.le.xor.u32",
            ".reg .pred p, r;\nsetp.eq.u32 r, %b, 1;\nsetp.le.xor.u32 p, %a, %b, r;\nselp.u32 %d, 1, 0, p;",
        ),
        binary("set.lt.u32.s32", |a: i32, b: i32| if a < b { u32::MAX } else { 0 }),
        binary("set.ge.f32.u32", |a: u32, b: u32| if a >= b { 1.0f32 } else { 0.0 }),
        ternary("selp.b16", |a: u16, b: u16, c: u32| if c > 5 { a } else { b }).body("selp.b16", ".reg .pred p;\nsetp.gt.u32 p, %c, 5;\nselp.b16 %d, %a, %b, p;"),
        ternary("selp.b64", |a: u64, b: u64, c: u32| if c > 5 { a } else { b }).body("selp.b64", ".reg .pred p;\nsetp.gt.u32 p, %c, 5;\nselp.b64 %d, %a, %b, p;"),
        ternary("slct.u32.s32", |a: u32, b: u32, c: i32| if c >= 0 { a } else { b }),
        ternary("slct.f32.f32", |a: f32, b: f32, c: f32| if c >= 0.0 { a } else { b }),
        ternary("slct.u64.f32", |a: u64, b: u64, c: f32| if c >= 0.0 { a } else { b }),
    ]);
    ops
}

fn compare(name: &str, ty: Ty, holds: impl Fn(u64, u64) -> bool + Send + Sync + 'static) -> Op {
    Op::new(name, &[ty; 2], Ty::B32, move |x| u32::from(holds(x[0], x[1])).want())
        .body(name, &format!(".reg .pred p;\n{name} p, %a, %b;\nselp.u32 %d, 1, 0, p;"))
}

fn sign_extend(bits: u64, width: u32) -> i64 {
    (bits << (64 - width)) as i64 >> (64 - width)
}

/// b above a, as shf reads them.
fn pair(a: u32, b: u32) -> u64 {
    u64::from(b) << 32 | u64::from(a)
}

fn per_half(a: u32, b: u32, f: fn(i16, i16) -> i16) -> u32 {
    u32::from(f(a as i16, b as i16) as u16) | u32::from(f((a >> 16) as i16, (b >> 16) as i16) as u16) << 16
}

fn per_half_unsigned(a: u32, b: u32, f: fn(u16, u16) -> u16) -> u32 {
    u32::from(f(a as u16, b as u16)) | u32::from(f((a >> 16) as u16, (b >> 16) as u16)) << 16
}

fn dot4(a: u32, b: u32, a_signed: bool, b_signed: bool, c: i32) -> i32 {
    let byte =
        |word: u32, i: u32, signed: bool| if signed { i64::from((word >> (8 * i)) as i8) } else { i64::from((word >> (8 * i)) as u8) };
    (0..4).fold(i64::from(c), |sum, i| sum + byte(a, i, a_signed) * byte(b, i, b_signed)) as i32
}

/// bfe: position and length are the low eight bits of their operands; what lies past the top bit is zero or sign.
fn extract(a: u64, width: u32, at: u32, len: u32, signed: bool) -> u64 {
    let (at, len) = (at & 0xFF, len & 0xFF);
    let sign = if !signed || len == 0 { 0 } else { a >> (at + len - 1).min(width - 1) & 1 };
    let mut field = 0;
    for i in 0..width {
        let bit = if i < len && at + i < width { a >> (at + i) & 1 } else { sign };
        field |= bit << i;
    }
    field
}

/// bfi: the low bits of a over b.
fn insert(a: u64, b: u64, width: u32, at: u32, len: u32) -> u64 {
    let (at, len) = (at & 0xFF, len & 0xFF);
    (0..len).filter(|i| at + i < width).fold(b, |word, i| word & !(1 << (at + i)) | (a >> i & 1) << (at + i))
}

fn permute(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = pair(a, b).to_le_bytes();
    (0..4).fold(0, |word, i| {
        let nibble = selector >> (4 * i) & 0xF;
        let byte = bytes[nibble as usize & 7];
        // Bit 3 of a selector replicates the sign of the byte.
        let byte = if nibble & 8 == 0 {
            byte
        } else if byte & 0x80 != 0 {
            0xFF
        } else {
            0
        };
        word | u32::from(byte) << (8 * i)
    })
}
