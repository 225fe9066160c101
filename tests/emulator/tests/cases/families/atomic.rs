//! Atomic operations and reductions, on shared and global memory. 128 threads meet at one cell, whose final value does not
//! depend on their order; where the value returned matters, each thread has a cell of its own.

use super::super::elementwise::{Op, Ty, cases, image};
use super::Family;

pub fn family() -> Family {
    let mut ops = meeting();
    ops.extend(apart());
    ops.extend(vectors());
    Family::table("atomic", image("Atomic operations and reductions.", &ops), cases("atomic", &ops))
}

const THREADS: usize = 128;

/// What 128 threads leave in one cell.
struct Meeting {
    /// Operation and type, as in `atom.global.<op>`.
    op: &'static str,
    ty: Ty,
    start: u64,
    value: fn(u64) -> u64,
    end: fn(&[u64]) -> u64,
}

fn meeting() -> Vec<Op> {
    fn float(x: u64) -> u64 {
        u64::from(((x % 17) as f32 - 8.0).to_bits())
    }
    fn double(x: u64) -> u64 {
        ((x % 17) as f64 - 8.0).to_bits()
    }
    // 1.0 and 2.0 in f16 and bf16, low and high.
    let table = [
        Meeting { op: "add.u32", ty: Ty::B32, start: 5, value: |i| i * i, end: |x| x.iter().sum::<u64>() + 5 },
        Meeting { op: "add.s32", ty: Ty::B32, start: 0, value: |i| (i as i32 - 100) as u32 as u64, end: |x| x.iter().sum() },
        Meeting { op: "add.u64", ty: Ty::B64, start: 1 << 40, value: |i| i << 33, end: |x| x.iter().sum::<u64>() + (1 << 40) },
        Meeting {
            op: "add.f32",
            ty: Ty::F32,
            start: 0x3F80_0000,
            value: float,
            end: |x| u64::from((1.0 + x.iter().map(|&b| f32::from_bits(b as u32)).sum::<f32>()).to_bits()),
        },
        Meeting {
            op: "add.f64",
            ty: Ty::F64,
            start: 0,
            value: double,
            end: |x| x.iter().map(|&b| f64::from_bits(b)).sum::<f64>().to_bits(),
        },
        Meeting { op: "min.u32", ty: Ty::B32, start: 5000, value: |i| 77 + i * 13 % 128, end: |x| *x.iter().min().unwrap_or(&0) },
        Meeting { op: "max.u32", ty: Ty::B32, start: 5, value: |i| 77 + i * 13 % 128, end: |x| *x.iter().max().unwrap_or(&0) },
        Meeting { op: "min.s32", ty: Ty::B32, start: 5, value: |i| (i as i32 - 64) as u32 as u64, end: |_| -64i32 as u32 as u64 },
        Meeting { op: "max.s32", ty: Ty::B32, start: 0xFFFF_0000, value: |i| (i as i32 - 64) as u32 as u64, end: |_| 63 },
        Meeting { op: "min.s64", ty: Ty::B64, start: 5, value: |i| (i as i64 - 64) as u64, end: |_| -64i64 as u64 },
        Meeting { op: "max.u64", ty: Ty::B64, start: 5, value: |i| i << 40, end: |_| 127 << 40 },
        Meeting { op: "and.b32", ty: Ty::B32, start: 0xFFFF_FFFF, value: |i| !(1 << (i % 20)), end: |_| 0xFFF0_0000 },
        Meeting { op: "or.b32", ty: Ty::B32, start: 1 << 31, value: |i| 1 << (i % 20), end: |_| 0x800F_FFFF },
        Meeting { op: "xor.b32", ty: Ty::B32, start: 0, value: |i| i * 0x1111, end: |x| x.iter().fold(0, |a, b| a ^ b) },
        Meeting { op: "or.b64", ty: Ty::B64, start: 0, value: |i| 1 << (i % 64), end: |_| u64::MAX },
        Meeting { op: "inc.u32", ty: Ty::B32, start: 3, value: |_| 9, end: |_| (3 + 128) % 10 },
        // From 2 down: 2, 1, 0, 9, 8, .. with period ten.
        Meeting { op: "dec.u32", ty: Ty::B32, start: 2, value: |_| 9, end: |_| 2 + 130 - 128 },
    ];
    let mut ops = Vec::new();
    for Meeting { op, ty, start, value, end } in table {
        let threads = || (0..THREADS as u64).map(|i| [value(i) & mask(ty)]).collect::<Vec<_>>();
        let width = if ty == Ty::B64 || ty == Ty::F64 { 64 } else { 32 };
        let want = move |x: &[Vec<u64>], _: usize| end(&x.iter().map(|v| v[0]).collect::<Vec<_>>());
        let (class, bytes) = (if width == 64 { ".b64" } else { ".b32" }, width / 8);
        let load = match ty {
            Ty::F32 => "f32",
            Ty::F64 => "f64",
            Ty::B64 => "b64",
            _ => "b32",
        };
        let name = op.replace('.', "_");
        for atom in [true, false] {
            let register = match ty {
                Ty::F32 => ".f32",
                Ty::F64 => ".f64",
                _ => class,
            };
            let text = |space: &str, modifiers: &str, address: &str| {
                if atom {
                    format!(".reg {register} old;\natom{modifiers}.{space}.{op} old, [{address}], %a;")
                } else {
                    format!("red{modifiers}.{space}.{op} [{address}], %a;")
                }
            };
            let kind = if atom { "atom" } else { "red" };
            ops.push(
                Op::across(
                    &format!("{kind}.global.{op}"),
                    &format!(
                        ".reg .b64 at;\nmov.u64 at, {kind}_{name};\n{}\nbar.sync 0;\nld.relaxed.gpu.global.{load} %d, [at];",
                        text("global", "", "at")
                    ),
                    [ty],
                    ty,
                    threads(),
                    want,
                )
                .prelude(&format!(".global .align {bytes} {class} {kind}_{name} = {start:#x};")),
            );
            ops.push(Op::across(
                &format!("{kind}.shared.{op}"),
                &format!(
                    ".shared .align {bytes} {class} cell;\n.reg .b32 at;\n.reg {class} first;\n.reg .pred p;\nmov.u32 at, cell;\nsetp.eq.u32 p, %i, 0;\n\
                     mov{class} first, {start:#x};\n@p st.shared{class} [at], first;\nbar.sync 0;\n{}\nbar.sync 0;\nld.shared.{load} %d, [at];",
                    text("shared", ".relaxed.cta", "at")
                ),
                [ty],
                ty,
                threads(),
                want,
            ));
        }
    }
    // Packed halves: 128 times (1, 2) onto zero.
    for (ty, value, end) in [("f16x2", 0x4000_3C00u64, 0x5C00_5800u64), ("bf16x2", 0x4000_3F80, 0x4380_4300)] {
        ops.push(
            Op::across(
                &format!("atom.global.add.noftz.{ty}"),
                &format!(".reg .b32 old;\n.reg .b64 at;\nmov.u64 at, halves_{ty};\natom.global.add.noftz.{ty} old, [at], %a;\nbar.sync 0;\nld.relaxed.gpu.global.b32 %d, [at];"),
                [Ty::B32],
                Ty::B32,
                vec![[value]; THREADS],
                move |_, _| end,
            )
            .prelude(&format!(".global .align 4 .b32 halves_{ty} = 0;")),
        );
    }
    // A lock-free sum by compare and swap.
    ops.push(
        Op::across(
            "atom.global.cas.b32 loop",
            ".reg .b32 seen, next;\n.reg .b64 at;\n.reg .pred p;\nmov.u64 at, cas_cell;\nld.relaxed.gpu.global.u32 seen, [at];\n\
             again:\nadd.u32 next, seen, %a;\natom.global.cas.b32 %d, [at], seen, next;\nsetp.ne.u32 p, %d, seen;\nmov.u32 seen, %d;\n@p bra again;\n\
             bar.sync 0;\nld.relaxed.gpu.global.u32 %d, [at];",
            [Ty::B32],
            Ty::B32,
            (0..THREADS as u64).map(|i| [i + 1]).collect(),
            |x, _| x.iter().map(|v| v[0]).sum(),
        )
        .prelude(".global .align 4 .u32 cas_cell = 0;"),
    );
    ops
}

fn mask(ty: Ty) -> u64 {
    if ty == Ty::B64 || ty == Ty::F64 { u64::MAX } else { 0xFFFF_FFFF }
}

/// One thread per cell: what an operation returns, and what it leaves.
fn apart() -> Vec<Op> {
    let mut ops = Vec::new();
    let table: [(&str, fn(u32, u32) -> u32); 6] = [
        ("exch.b32", |_, b| b),
        ("add.u32", u32::wrapping_add),
        ("inc.u32", |a, b| if a >= b { 0 } else { a + 1 }),
        ("dec.u32", |a, b| if a == 0 || a > b { b } else { a - 1 }),
        ("xor.b32", |a, b| a ^ b),
        ("max.s32", |a, b| (a as i32).max(b as i32) as u32),
    ];
    let threads = || (0..64u64).map(|i| [i * 3 % 7, i % 5]).collect::<Vec<_>>();
    let cell = ".shared .align 4 .b8 cells[256];\n.reg .b32 at;\nmov.u32 at, cells;\nmad.lo.u32 at, %i, 4, at;\nst.shared.u32 [at], %a;";
    for (op, after) in table {
        ops.push(Op::across(
            &format!("atom.shared.{op} returns"),
            &format!("{cell}\natom.shared.{op} %d, [at], %b;"),
            [Ty::B32; 2],
            Ty::B32,
            threads(),
            |x, i| x[i][0],
        ));
        ops.push(Op::across(
            &format!("atom.shared.{op} leaves"),
            &format!("{cell}\natom.acq_rel.cta.shared::cta.{op} %d, [at], %b;\nld.shared.u32 %d, [at];"),
            [Ty::B32; 2],
            Ty::B32,
            threads(),
            move |x, i| after(x[i][0] as u32, x[i][1] as u32).into(),
        ));
    }
    ops.push(Op::across(
        "atom.shared.cas.b32",
        &format!("{cell}\natom.shared.cas.b32 %d, [at], %b, 99;\nld.shared.u32 at, [at];\nmad.lo.u32 %d, at, 1000, %d;"),
        [Ty::B32; 2],
        Ty::B32,
        threads(),
        |x, i| (if x[i][0] == x[i][1] { 99 } else { x[i][0] }) * 1000 + x[i][0],
    ));
    ops.push(Op::across(
        "atom.shared.cas.b64",
        ".shared .align 8 .b8 cells[512];\n.reg .b32 at;\n.reg .b64 old;\nmov.u32 at, cells;\nmad.lo.u32 at, %i, 8, at;\nst.shared.b64 [at], %a;\n\
         atom.shared.cas.b64 old, [at], 5, %b;\nld.shared.b64 %d, [at];\nadd.u64 %d, %d, old;",
        [Ty::B64; 2],
        Ty::B64,
        (0..64u64).map(|i| [i % 8, i << 40]).collect(),
        |x, i| (if x[i][0] == 5 { x[i][1] } else { x[i][0] }).wrapping_add(x[i][0]),
    ));
    ops.push(Op::across(
        "atom.shared.cas.b16",
        ".shared .align 2 .b8 cells[128];\n.reg .b32 at;\n.reg .b16 old;\nmov.u32 at, cells;\nmad.lo.u32 at, %i, 2, at;\nst.shared.b16 [at], %a;\n\
         atom.shared.cas.b16 old, [at], 5, %b;\nld.shared.b16 %d, [at];\nadd.u16 %d, %d, old;",
        [Ty::B16; 2],
        Ty::B16,
        (0..64u64).map(|i| [i % 8, i * 500]).collect(),
        |x, i| (if x[i][0] == 5 { x[i][1] } else { x[i][0] }).wrapping_add(x[i][0]),
    ));
    ops.push(Op::across(
        "atom.shared.exch.b64",
        ".shared .align 8 .b8 cells[512];\n.reg .b32 at;\nmov.u32 at, cells;\nmad.lo.u32 at, %i, 8, at;\nst.shared.b64 [at], %a;\natom.shared.exch.b64 %d, [at], %b;",
        [Ty::B64; 2],
        Ty::B64,
        (0..64u64).map(|i| [i << 33 | 7, 3]).collect(),
        |x, i| x[i][0],
    ));
    // A generic address reaches the same cell.
    ops.push(Op::across(
        "atom.add.u32 generic",
        ".shared .align 4 .b8 cells[256];\n.reg .b64 at;\nmov.u64 at, cells;\ncvta.shared.u64 at, at;\nmad.wide.u32 at, %i, 4, at;\nst.u32 [at], %a;\natom.add.u32 %d, [at], %b;\nld.u32 %d, [at];",
        [Ty::B32; 2],
        Ty::B32,
        threads(),
        |x, i| x[i][0] + x[i][1],
    ));
    ops
}

/// The vector reductions of sm_90: sixteen bytes at once, to global memory.
fn vectors() -> Vec<Op> {
    let vector = |name: &str, text: &str, ty: Ty, values: Vec<[u64; 1]>, want: fn(usize) -> u64| {
        let cell = format!("{}_cell", name.replace('.', "_"));
        Op::across(
            name,
            &format!(
                ".reg .b64 at;\nmov.u64 at, {cell};\n{text}\nbar.sync 0;\n.reg .b64 own;\nand.b32 %i, %i, 3;\nmad.wide.u32 own, %i, 4, at;\nmov.u32 %i, %tid.x;\nld.relaxed.gpu.global.{} %d, [own];",
                if ty == Ty::F32 { "f32" } else { "b32" }
            ),
            [ty],
            ty,
            values,
            move |_, i| want(i & 3),
        )
        .prelude(&format!(".global .align 16 .b8 {cell}[16];"))
    };
    let ones = || vec![[u64::from(1f32.to_bits())]; THREADS];
    vec![
        vector(
            "red.global.add.v4.f32",
            ".reg .f32 two, three, four;\nadd.f32 two, %a, %a;\nadd.f32 three, two, %a;\nadd.f32 four, two, two;\nred.global.v4.f32.add [at], {%a, two, three, four};",
            Ty::F32,
            ones(),
            |i| u64::from(((i + 1) as f32 * 128.0).to_bits()),
        ),
        vector(
            "red.global.add.v2.f32",
            ".reg .f32 two;\nadd.f32 two, %a, %a;\nred.global.v2.f32.add [at+8], {%a, two};\nred.global.v2.f32.add [at], {two, two};",
            Ty::F32,
            ones(),
            |i| u64::from(([2.0f32, 2.0, 1.0, 2.0][i] * 128.0).to_bits()),
        ),
        vector(
            "atom.global.add.v4.f32",
            ".reg .f32 a, b, c, e;\natom.global.v4.f32.add {a, b, c, e}, [at], {%a, %a, %a, %a};",
            Ty::F32,
            ones(),
            |_| u64::from(128f32.to_bits()),
        ),
        vector(
            "red.global.add.noftz.v4.bf16x2",
            "red.global.v4.bf16x2.add.noftz [at], {%a, %a, %a, %a};",
            Ty::B32,
            vec![[0x4000_3F80]; THREADS],
            |_| 0x4380_4300,
        ),
        vector(
            "red.global.add.noftz.v8.f16",
            ".reg .b16 lo, hi;\nmov.b32 {lo, hi}, %a;\nred.global.v8.f16.add.noftz [at], {lo, hi, lo, hi, lo, hi, lo, hi};",
            Ty::B32,
            vec![[0x4000_3C00]; THREADS],
            |_| 0x5C00_5800,
        ),
        vector(
            "red.global.max.noftz.v2.f16x2",
            "red.global.v2.f16x2.max.noftz [at], {%a, %a};\nred.global.v2.f16x2.max.noftz [at+8], {%a, %a};",
            Ty::B32,
            (0..THREADS as u64).map(|i| [0x4000_3C00 + (i % 5)]).collect(),
            |_| 0x4000_3C04,
        ),
    ]
}
