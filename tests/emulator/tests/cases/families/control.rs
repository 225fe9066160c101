//! Control flow: predication, divergence, loops, branch tables, calls, exits.

use super::super::elementwise::{Op, Ty, cases, image};
use super::Family;

pub fn family() -> Family {
    let mut ops = branches();
    ops.extend(calls());
    ops.extend(moves());
    Family::table("control", image("Control flow: predication, divergence, loops, branch tables, calls.", &ops), cases("control", &ops))
}

fn values() -> Vec<[u64; 1]> {
    (0..96).map(|i| [i * 29 % 40]).collect()
}

fn own(name: &str, body: &str, want: fn(u64) -> u64) -> Op {
    Op::across(name, body, [Ty::B32], Ty::B32, values(), move |x, i| want(x[i][0]))
}

fn branches() -> Vec<Op> {
    vec![
        own("predicated", ".reg .pred p;\nsetp.lt.u32 p, %a, 20;\nmov.u32 %d, 0;\n@p add.u32 %d, %a, 100;\n@!p sub.u32 %d, %a, 20;", |a| {
            if a < 20 { a + 100 } else { a - 20 }
        }),
        own(
            "nested branches",
            ".reg .pred p;\nsetp.lt.u32 p, %a, 20;\n@p bra small;\nmov.u32 %d, 3;\nsetp.lt.u32 p, %a, 30;\n@p bra done;\nmov.u32 %d, 4;\nbra done;\n\
             small:\nmov.u32 %d, 1;\nsetp.lt.u32 p, %a, 10;\n@p bra done;\nmov.u32 %d, 2;\ndone:\nmad.lo.u32 %d, %d, 1000, %a;",
            |a| (a / 10 + 1) * 1000 + a,
        ),
        // Each lane goes round its own number of times; the Collatz steps of a + 1.
        own(
            "loop of its own length",
            ".reg .pred p, q;\n.reg .b32 n, half;\nadd.u32 n, %a, 1;\nmov.u32 %d, 0;\n\
             again:\nsetp.eq.u32 p, n, 1;\n@p bra done;\nadd.u32 %d, %d, 1;\nand.b32 half, n, 1;\nsetp.eq.u32 q, half, 0;\n@q bra even;\n\
             mad.lo.u32 n, n, 3, 1;\nbra again;\neven:\nshr.u32 n, n, 1;\nbra again;\ndone:",
            |a| {
                let (mut n, mut steps) = (a + 1, 0);
                while n != 1 {
                    n = if n % 2 == 0 { n / 2 } else { 3 * n + 1 };
                    steps += 1;
                }
                steps
            },
        ),
        own(
            "nested loops",
            ".reg .pred p;\n.reg .b32 i, j;\nmov.u32 %d, 0;\nmov.u32 i, 0;\nouter:\nsetp.ge.u32 p, i, %a;\n@p bra done;\nmov.u32 j, 0;\n\
             inner:\nsetp.gt.u32 p, j, i;\n@p bra next;\nadd.u32 %d, %d, j;\nadd.u32 j, j, 1;\nbra.uni inner;\nnext:\nadd.u32 i, i, 1;\nbra outer;\ndone:",
            |a| (0..a).map(|i| i * (i + 1) / 2).sum(),
        ),
        own(
            "brx.idx",
            ".reg .b32 index;\nrem.u32 index, %a, 4;\ntable: .branchtargets zero, one, two, three;\nbrx.idx index, table;\n\
             zero:\nmov.u32 %d, 10;\nbra done;\none:\nmov.u32 %d, 11;\nbra done;\ntwo:\nmov.u32 %d, 12;\nbra done;\nthree:\nmov.u32 %d, 13;\ndone:",
            |a| 10 + a % 4,
        ),
        own(
            "label in an inner scope",
            "mov.u32 %d, %a;\n{\n.reg .pred p;\n.reg .b32 %d1;\nmov.u32 %d1, 3;\nagain:\nadd.u32 %d, %d, 1;\nsub.u32 %d1, %d1, 1;\nsetp.ne.u32 p, %d1, 0;\n@p bra again;\n}\n{\n.reg .pred p;\nsetp.gt.u32 p, %d, 20;\n@p bra again;\nadd.u32 %d, %d, 100;\nagain:\n}",
            |a| {
                if a + 3 > 20 { a + 3 } else { a + 103 }
            },
        ),
        // Lanes that leave early must not hold up those that vote among themselves.
        Op::across(
            "exit under a predicate",
            ".reg .pred p;\n.reg .b64 to;\nld.param.u64 to, [out];\nmad.wide.u32 to, %i, 4, to;\nmov.u32 %d, 77;\nst.global.b32 [to], %d;\n\
             setp.gt.u32 p, %a, 30;\n@p exit;\nmov.u32 %d, 5;",
            [Ty::B32],
            Ty::B32,
            values(),
            |x, i| if x[i][0] > 30 { 77 } else { 5 },
        ),
        Op::across(
            "ret under a predicate",
            ".reg .pred p;\n.reg .b64 to;\nld.param.u64 to, [out];\nmad.wide.u32 to, %i, 4, to;\nmov.u32 %d, 78;\nst.global.b32 [to], %d;\n\
             setp.le.u32 p, %a, 30;\n@p bra stay;\nret;\nstay:\nmov.u32 %d, 6;",
            [Ty::B32],
            Ty::B32,
            values(),
            |x, i| if x[i][0] > 30 { 78 } else { 6 },
        ),
        // A lane spins until a later lane of its own warp stores the flag: no order between the lanes may starve the other.
        Op::across(
            "spin on a lane of the same warp",
            ".shared .align 4 .b8 flags[384];\n.reg .pred p;\n.reg .b32 at, seen;\nmov.u32 at, flags;\nmad.lo.u32 at, %i, 4, at;\nmov.u32 seen, 0;\nst.relaxed.cta.shared.u32 [at], seen;\n\
             bar.warp.sync -1;\nand.b32 seen, %i, 1;\nsetp.eq.u32 p, seen, 1;\n@p bra setter;\n\
             again:\nld.acquire.cta.shared.u32 seen, [at+4];\nsetp.eq.u32 p, seen, 0;\n@p bra again;\nbra done;\n\
             setter:\nadd.u32 seen, %a, 1;\nst.release.cta.shared.u32 [at], seen;\ndone:\nmov.u32 %d, seen;",
            [Ty::B32],
            Ty::B32,
            values(),
            |x, i| x[i | 1][0] + 1,
        ),
    ]
}

/// A call of a function from a word to a word.
fn call(function: &str) -> String {
    format!(
        "{{\n.param .b32 x;\n.param .b32 back;\nst.param.b32 [x], %a;\ncall.uni (back), {function}, (x);\nld.param.b32 %d, [back];\n}}\n"
    )
}

fn calls() -> Vec<Op> {
    vec![
        own(
            "call with params",
            "{\n.param .b32 x;\n.param .align 8 .b8 pair[16];\n.param .b64 back;\n.reg .b64 long;\nst.param.b32 [x+0], %a;\nmov.b64 long, 5;\nst.param.b64 [pair+0], long;\nmov.b64 long, 7;\nst.param.b64 [pair+8], long;\n\
             call.uni (back), weighted, (x, pair);\nld.param.b64 long, [back+0];\ncvt.u32.u64 %d, long;\n}",
            |a| a * 5 + 7,
        )
        .prelude(
            ".func (.param .b64 result) weighted(.param .b32 x, .param .align 8 .b8 pair[16])\n{\n\t.reg .b32 a;\n\t.reg .b64 long, factor, term;\n\
             \tld.param.b32 a, [x];\n\tld.param.b64 factor, [pair];\n\tld.param.b64 term, [pair+8];\n\tcvt.u64.u32 long, a;\n\tmad.lo.u64 long, long, factor, term;\n\
             \tst.param.b64 [result], long;\n\tret;\n}",
        ),
        // Only some lanes call; the callee branches and has local memory of its own.
        own(
            "call under divergence",
            &format!(".reg .pred p;\nsetp.gt.u32 p, %a, 12;\nmov.u32 %d, %a;\n@!p bra done;\n{}done:", call("digits")),
            |a| if a > 12 { a / 10 + a % 10 } else { a },
        )
        .prelude(
            ".func (.param .b32 result) digits(.param .b32 number)\n{\n\t.local .align 4 .b8 frame[8];\n\t.reg .b32 x, y, z;\n\t.reg .b64 base;\n\tmov.u64 base, frame;\n\tld.param.b32 x, [number];\n\
             \tdiv.u32 y, x, 10;\n\trem.u32 z, x, 10;\n\tst.local.u32 [base], y;\n\tst.local.u32 [base+4], z;\n\tld.local.u32 y, [base];\n\tld.local.u32 z, [base+4];\n\
             \tadd.u32 y, y, z;\n\tst.param.b32 [result], y;\n\tret;\n}",
        ),
        own("recursion", &call("sum_to"), |a| a * (a + 1) / 2).prelude(
            ".func (.param .b32 result) sum_to(.param .b32 number)\n{\n\t.reg .pred p;\n\t.reg .b32 n, m, r;\n\tld.param.b32 n, [number];\n\tmov.u32 r, 0;\n\tsetp.eq.u32 p, n, 0;\n\t@p bra done;\n\
             \tsub.u32 m, n, 1;\n\t{\n\t.param .b32 x;\n\t.param .b32 back;\n\tst.param.b32 [x], m;\n\tcall (back), sum_to, (x);\n\tld.param.b32 r, [back];\n\t}\n\
             \tadd.u32 r, r, n;\ndone:\n\tst.param.b32 [result], r;\n\tret;\n}",
        ),
    ]
}

fn moves() -> Vec<Op> {
    vec![
        own("mov packing", ".reg .b16 lo, hi;\nmov.b32 {lo, hi}, %a;\nadd.u16 hi, lo, 1;\nmov.b32 %d, {hi, lo};", |a| (a + 1) | (a << 16)),
        own(
            "mov 64",
            ".reg .b64 wide;\n.reg .b32 lo, hi;\nmov.b64 wide, {%a, 9};\nshl.b64 wide, wide, 4;\nmov.b64 {lo, hi}, wide;\nadd.u32 %d, lo, hi;",
            |a| a * 16 + 144,
        ),
        own("mov float bits", ".reg .f32 f;\ncvt.rn.f32.u32 f, %a;\nmov.b32 %d, f;", |a| u64::from((a as f32).to_bits())),
        own(
            "literals",
            ".reg .f32 f;\n.reg .f64 g;\nmov.f32 f, 0f3F800000;\nmov.f64 g, 0d4008000000000000;\ncvt.rn.f32.f64 f, g;\ncvt.rzi.u32.f32 %d, f;\nadd.u32 %d, %d, 0x10;\nadd.u32 %d, %d, 010;\nadd.u32 %d, %d, 0b11;\nadd.u32 %d, %d, -1;\nadd.u32 %d, %d, %a;",
            |a| a + 3 + 16 + 8 + 3 - 1,
        ),
        own("register vectors", ".reg .b32 r<4>;\nmov.u32 r0, %a;\nmov.u32 r3, 5;\nadd.u32 r1, r0, r3;\nadd.u32 %d, r1, r1;", |a| {
            2 * a + 10
        }),
    ]
}
