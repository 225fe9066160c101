//! cp.async with its groups and mbarrier arrivals, and bulk copies in every direction.

use super::super::elementwise::{Op, Ty, cases, image};
use super::super::scrambled;
use super::Family;

pub fn family() -> Family {
    let mut ops = small();
    ops.extend(bulk());
    Family::table("async_copy", image("cp.async and bulk copies.", &ops), cases("async_copy", &ops))
}

fn values() -> Vec<[u64; 1]> {
    scrambled(128, 31, 100_000).iter().map(|&x| [x as i64 as u64 & 0xFFFF_FFFF]).collect()
}

/// 512 bytes of shared memory at `base`; `at` is this thread's word, `from` its word of the input.
const BEGIN: &str = ".shared .align 128 .b8 words[512];\n.reg .b32 base, at;\n.reg .b64 from, input;\nmov.u32 base, words;\nmad.lo.u32 at, %i, 4, base;\nld.param.u64 input, [in0];\nmad.wide.u32 from, %i, 4, input;\n";

fn small() -> Vec<Op> {
    let op = |name: &str, text: &str, want: fn(&[Vec<u64>], usize) -> u64| {
        Op::across(name, &format!("{BEGIN}{text}"), [Ty::B32], Ty::B32, values(), want)
    };
    // Threads 0..32 copy the sixteen bytes of four threads.
    let sixteen = |form: &str| {
        format!(
            ".reg .pred p;\n.reg .b32 to;\nsetp.lt.u32 p, %i, 32;\n@!p bra copied;\nmad.lo.u32 to, %i, 16, base;\nmad.wide.u32 from, %i, 16, input;\n{form}\ncopied:\n\
             cp.async.commit_group;\ncp.async.wait_group 0;\nbar.sync 0;\nld.shared.u32 %d, [at];"
        )
    };
    vec![
        op("cp.async.ca 4", "cp.async.ca.shared.global [at], [from], 4;\ncp.async.wait_all;\nld.shared.u32 %d, [at];", |x, i| x[i][0]),
        op(
            "cp.async.ca 8",
            ".reg .pred p;\n.reg .b32 odd;\nand.b32 odd, %i, 1;\nsetp.eq.u32 p, odd, 0;\n@p cp.async.ca.shared::cta.global [at], [from], 8;\ncp.async.wait_all;\nbar.sync 0;\nld.shared.u32 %d, [at];",
            |x, i| x[i][0],
        ),
        op("cp.async.ca 16", &sixteen("cp.async.ca.shared.global [to], [from], 16;"), |x, i| x[i][0]),
        op("cp.async.cg 16", &sixteen("cp.async.cg.shared.global [to], [from], 16;"), |x, i| x[i][0]),
        op("cp.async.cg prefetch", &sixteen("cp.async.cg.shared.global.L2::128B [to], [from], 16;"), |x, i| x[i][0]),
        // Of every sixteen bytes only the first four come from memory; the rest is zero.
        op("cp.async.cg with a source size", &sixteen("cp.async.cg.shared.global [to], [from], 16, 4;"), |x, i| {
            if i % 4 == 0 { x[i][0] } else { 0 }
        }),
        op(
            "cp.async with a source size by register",
            ".reg .b32 size;\nand.b32 size, %i, 4;\ncp.async.ca.shared.global [at], [from], 4, size;\ncp.async.wait_all;\nld.shared.u32 %d, [at];",
            |x, i| if i & 4 != 0 { x[i][0] } else { 0 },
        ),
        // Three groups; waiting for all but the last one makes the first two readable.
        op(
            "cp.async.wait_group 1",
            ".shared .align 16 .b8 more[1024];\n.reg .b32 second, e;\nmov.u32 second, more;\nmad.lo.u32 second, %i, 4, second;\ncp.async.ca.shared.global [at], [from], 4;\ncp.async.commit_group;\n\
             cp.async.ca.shared.global [second], [from], 4, 0;\ncp.async.commit_group;\ncp.async.ca.shared.global [second+512], [from], 4;\ncp.async.commit_group;\n\
             cp.async.wait_group 1;\nld.shared.u32 %d, [at];\nld.shared.u32 e, [second];\nmad.lo.u32 %d, e, 7, %d;\ncp.async.wait_group 0;\nld.shared.u32 e, [second+512];\nadd.u32 %d, %d, e;",
            |x, i| 2 * x[i][0],
        ),
        // The arrival is made when the copies of the thread have landed: 128 of the barrier's own count.
        op(
            "cp.async.mbarrier.arrive.noinc",
            ".shared .align 8 .b64 cell;\n.reg .b32 bar;\n.reg .pred p;\nmov.u32 bar, cell;\nsetp.eq.u32 p, %i, 0;\n@p mbarrier.init.shared::cta.b64 [bar], 128;\nbar.sync 0;\n\
             cp.async.ca.shared.global [at], [from], 4;\ncp.async.mbarrier.arrive.noinc.shared::cta.b64 [bar];\nwait:\nmbarrier.try_wait.parity.shared::cta.b64 p, [bar], 0;\n@!p bra wait;\n\
             xor.b32 %d, %i, 127;\nmad.lo.u32 %d, %d, 4, base;\nld.shared.u32 %d, [%d];",
            |x, i| x[127 - i][0],
        ),
        // Without .noinc the arrival is on top of the count, which ordinary arrivals use up.
        op(
            "cp.async.mbarrier.arrive",
            ".shared .align 8 .b64 cell;\n.reg .b32 bar;\n.reg .pred p;\nmov.u32 bar, cell;\nsetp.eq.u32 p, %i, 0;\n@p mbarrier.init.shared::cta.b64 [bar], 128;\nbar.sync 0;\n\
             cp.async.ca.shared.global [at], [from], 4;\ncp.async.mbarrier.arrive.shared::cta.b64 [bar];\nmbarrier.arrive.shared::cta.b64 _, [bar];\n\
             wait:\nmbarrier.try_wait.parity.shared::cta.b64 p, [bar], 0;\n@!p bra wait;\nxor.b32 %d, %i, 127;\nmad.lo.u32 %d, %d, 4, base;\nld.shared.u32 %d, [%d];",
            |x, i| x[127 - i][0],
        ),
    ]
}

const BULK_WAIT: &str = "wait:\nmbarrier.try_wait.parity.shared::cta.b64 done, [bar], 0;\n@!done bra wait;\n";

fn bulk() -> Vec<Op> {
    let begin = format!(
        "{BEGIN}.shared .align 8 .b64 cell;\n.reg .b32 bar;\n.reg .pred first, done;\nmov.u32 bar, cell;\nsetp.eq.u32 first, %i, 0;\n@first mbarrier.init.shared::cta.b64 [bar], 1;\n@first fence.mbarrier_init.release.cluster;\nbar.sync 0;\n"
    );
    let op = |name: &str, text: &str, want: fn(&[Vec<u64>], usize) -> u64| {
        Op::across(name, &format!("{begin}{text}"), [Ty::B32], Ty::B32, values(), want)
    };
    // Each thread writes its word of the staging buffer, one thread sends it off to the output.
    let store = |send: &str| {
        format!(
            ".reg .b64 to;\nld.param.u64 to, [out];\nadd.u32 %d, %a, 1;\nst.shared.u32 [at], %d;\nfence.proxy.async.shared::cta;\nbar.sync 0;\n@!first bra sent;\n{send}\ncp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\n\
             sent:\nbar.sync 0;\nfence.proxy.async;\nmad.wide.u32 to, %i, 4, to;\nld.global.u32 %d, [to];"
        )
    };
    let reduce = |form: &str| {
        // The staging words go onto a copy of the inputs that the threads wrote to the output.
        format!(
            ".reg .b64 to, own;\nld.param.u64 to, [out];\nmad.wide.u32 own, %i, 4, to;\nst.global.b32 [own], %a;\nst.shared.b32 [at], %a;\nfence.proxy.async;\nbar.sync 0;\n@!first bra sent;\n\
             cp.reduce.async.bulk.global.shared::cta.bulk_group.{form} [to], [base], 512;\ncp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\nsent:\nbar.sync 0;\nfence.proxy.async;\nld.global.b32 %d, [own];"
        )
    };
    let small = || (0..128u64).map(|i| [u64::from((i as f32 - 60.0).to_bits())]).collect::<Vec<_>>();
    let mut ops = vec![
        op(
            "cp.async.bulk to shared",
            &format!(
                "@first mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 512;\n@first cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [base], [input], 512, [bar];\n{BULK_WAIT}ld.shared.u32 %d, [at];"
            ),
            |x, i| x[i][0],
        ),
        op(
            "cp.async.bulk in pieces",
            &format!(
                ".reg .b32 e;\n@!first bra issued;\nmbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 512;\ncp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [base], [input+256], 256, [bar];\n\
                 add.u32 e, base, 256;\ncp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [e], [input], 240, [bar];\nadd.u32 e, base, 496;\n\
                 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [e], [input], 16, [bar];\nissued:\n{BULK_WAIT}ld.shared.u32 %d, [at];"
            ),
            |x, i| {
                x[if i < 64 {
                    i + 64
                } else if i < 124 {
                    i - 64
                } else {
                    i - 124
                }][0]
            },
        ),
        op("cp.async.bulk to global", &store("cp.async.bulk.global.shared::cta.bulk_group [to], [base], 512;"), |x, i| {
            (x[i][0] + 1) & 0xFFFF_FFFF
        }),
        op(
            "cp.async.bulk.wait_group.read",
            &store(
                "cp.async.bulk.global.shared::cta.bulk_group [to], [base], 256;\ncp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;\ncp.async.bulk.global.shared::cta.bulk_group [to+256], [base+256], 256;",
            ),
            |x, i| (x[i][0] + 1) & 0xFFFF_FFFF,
        ),
        op("cp.reduce.async.bulk.add.u32", &reduce("add.u32"), |x, i| 2 * x[i][0]),
        op("cp.reduce.async.bulk.xor.b32", &reduce("xor.b32"), |_, _| 0),
        op("cp.reduce.async.bulk.min.s32", &reduce("min.s32"), |x, i| x[i][0]),
    ];
    let float = |form: &str, want: fn(f32) -> f32| {
        Op::across(
            &format!("cp.reduce.async.bulk.{form}"),
            &format!("{begin}{}", reduce(form)),
            [Ty::F32],
            Ty::F32,
            small(),
            move |x, i| u64::from(want(f32::from_bits(x[i][0] as u32)).to_bits()),
        )
    };
    ops.push(float("add.f32", |x| x + x));
    ops
}
