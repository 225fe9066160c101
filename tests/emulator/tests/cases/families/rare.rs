//! Valid for sm_90a, and seldom seen: what neither compiler writes unless asked to.

use super::super::Case;
use super::super::elementwise::{Op, Ty, cases, image, unary};
use super::super::number::F16;
use super::Family;

pub fn family() -> Family {
    let ops = ops();
    Family::table("rare", image("Instructions that compilers seldom write.", &ops), cases("rare", &ops))
}

/// Each instruction in an image of its own, for a machine that knows some of them and not others.
pub fn singles() -> Vec<(String, Case)> {
    let ops = ops();
    cases("rare", &ops).into_iter().zip(&ops).map(|(case, op)| (image(&case.name, std::slice::from_ref(op)), case)).collect()
}

fn ops() -> Vec<Op> {
    let values = |count: u64| (0..count).map(|i| [i * 29 % 40]).collect::<Vec<[u64; 1]>>();
    vec![
        unary("fns", |a: u32| (0..32).find(|i| a >> i & 1 == 1).unwrap_or(u32::MAX)).body("fns.b32", "fns.b32 %d, %a, 0, 1;"),
        Op::across(
            "set.lt.f16x2.f16x2",
            "set.lt.f16x2.f16x2 %d, %a, %b;",
            [Ty::B32; 2],
            Ty::B32,
            (0..64).map(|i| [0x3C00_4000 + i * 0x123, 0x4000_3C00 + i * 0x0321_0100]).collect(),
            |x, i| {
                let half = |shift: u32| if F16.value(x[i][0] >> shift & 0xFFFF) < F16.value(x[i][1] >> shift & 0xFFFF) { 0x3C00 } else { 0 };
                half(0) | half(16) << 16
            },
        ),
        // Lane 4r + t holds the elements 2t and 2t + 1 of row r; afterwards those of column r.
        Op::across(
            "movmatrix.trans",
            ".reg .b32 lane;\nand.b32 lane, %i, 31;\nmad.lo.u32 lane, lane, 0x20002, 0x10000;\nmovmatrix.sync.aligned.m8n8.trans.b16 %d, lane;",
            [Ty::B32],
            Ty::B32,
            values(64),
            |_, i| {
                let (column, t) = ((i % 32 / 4) as u64, (i % 4) as u64);
                (16 * t + column) | (16 * t + 8 + column) << 16
            },
        ),
        Op::across("call with registers", "call.uni (%d), triple_and_one, (%a);", [Ty::B32], Ty::B32, values(64), |x, i| 3 * x[i][0] + 1)
            .prelude(".func (.reg .b32 result) triple_and_one(.reg .b32 x)\n{\n\tmad.lo.u32 result, x, 3, 1;\n\tret;\n}"),
        Op::across(
            "indirect call",
            ".reg .pred p;\n.reg .b64 which, other;\nshape: .callprototype (.param .b32 _) _ (.param .b32 _);\nmov.u64 which, add_seven;\nmov.u64 other, times_two;\n\
             setp.gt.u32 p, %a, 15;\nselp.b64 which, which, other, p;\n{\n.param .b32 x;\n.param .b32 back;\nst.param.b32 [x], %a;\ncall (back), which, (x), shape;\nld.param.b32 %d, [back];\n}",
            [Ty::B32],
            Ty::B32,
            values(64),
            |x, i| if x[i][0] > 15 { x[i][0] + 7 } else { x[i][0] * 2 },
        )
        .prelude(
            ".func (.param .b32 result) add_seven(.param .b32 x)\n{\n\t.reg .b32 a;\n\tld.param.b32 a, [x];\n\tadd.u32 a, a, 7;\n\tst.param.b32 [result], a;\n\tret;\n}\n\
             .func (.param .b32 result) times_two(.param .b32 x)\n{\n\t.reg .b32 a;\n\tld.param.b32 a, [x];\n\tshl.b32 a, a, 1;\n\tst.param.b32 [result], a;\n\tret;\n}",
        ),
        Op::across(
            "%is_explicit_cluster",
            ".reg .pred p;\nmov.pred p, %is_explicit_cluster;\nselp.u32 %d, 1, 0, p;",
            [Ty::B32],
            Ty::B32,
            values(128),
            |_, _| 1,
        )
        .cluster(2),
        Op::across(
            "prefetches of bulk copies",
            ".reg .b64 at;\nld.param.u64 at, [in0];\ncp.async.bulk.prefetch.L2.global [at], 256;\nfence.proxy.alias;\nmov.u32 %d, %a;",
            [Ty::B32],
            Ty::B32,
            values(64),
            |x, i| x[i][0],
        ),
        Op::across(
            "st.async",
            ".shared .align 128 .b8 words[256];\n.shared .align 8 .b64 cell;\n.reg .b32 at, bar, far, there, next, tid;\n.reg .pred p, first;\nmov.u32 at, words;\nmov.u32 bar, cell;\nmov.u32 tid, %tid.x;\n\
             setp.eq.u32 first, tid, 0;\nmad.lo.u32 at, tid, 4, at;\nmov.u32 next, %cluster_ctarank;\nxor.b32 next, next, 1;\n@first mbarrier.init.shared::cta.b64 [bar], 1;\n@first fence.mbarrier_init.release.cluster;\n\
             @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 256;\nbarrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n\
             mapa.shared::cluster.u32 far, at, next;\nmapa.shared::cluster.u32 there, bar, next;\nst.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [far], %a, [there];\n\
             wait:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [bar], 0;\n@!p bra wait;\nld.shared.u32 %d, [at];\nbarrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;",
            [Ty::B32],
            Ty::B32,
            values(128),
            |x, i| x[i ^ 64][0],
        )
        .cluster(2),
    ]
}
