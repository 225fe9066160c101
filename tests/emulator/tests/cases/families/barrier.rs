//! Block barriers: sync, arrive, counts, register ids, reductions; and the warp barrier.

use super::super::elementwise::{Op, Ty, cases, image};
use super::Family;

pub fn family() -> Family {
    let ops = ops();
    Family::table("barrier", image("Block barriers, their reductions, and the warp barrier.", &ops), cases("barrier", &ops))
}

fn values(threads: u64) -> Vec<[u64; 1]> {
    (0..threads).map(|i| [i * 37 % 101]).collect()
}

/// Each thread writes its value to a shared word, something orders, each reads the word of thread `127 - i` or so.
fn exchange(order: &str, partner: &str) -> String {
    format!(
        ".shared .align 4 .b8 words[512];\n.reg .b32 at, base;\nmov.u32 base, words;\n\
         mad.lo.u32 at, %i, 4, base;\nst.shared.u32 [at], %a;\n{order}\n\
         {partner}\nmad.lo.u32 at, %d, 4, base;\nld.shared.u32 %d, [at];"
    )
}

fn ops() -> Vec<Op> {
    let mirror = "sub.u32 %d, 127, %i;";
    let whole = |name: &str, order: &str| Op::across(name, &exchange(order, mirror), [Ty::B32], Ty::B32, values(128), |x, i| x[127 - i][0]);
    let reduced = |name: &str, text: &str, want: fn(usize) -> u64| {
        let body = format!(".reg .pred p, q;\nsetp.lt.u32 p, %a, 50;\n{text}");
        Op::across(name, &body, [Ty::B32], Ty::B32, values(128), move |x, _| want(x.iter().filter(|v| v[0] < 50).count()))
    };
    vec![
        whole("bar.sync", "bar.sync 0;"),
        whole("bar.sync with a count", "bar.sync 3, 128;"),
        whole("barrier.sync", "barrier.sync 5;"),
        whole("barrier.sync.aligned", "barrier.sync.aligned 15, 128;"),
        whole(
            "bar.sync by register",
            ".reg .b32 id, count;\nand.b32 id, %i, 0;\nadd.u32 id, id, 4;\nmov.u32 count, %ntid.x;\nbar.sync id, count;",
        ),
        whole("barrier.arrive and sync", "barrier.arrive 6, 256;\nbarrier.sync 6, 256;\nbar.sync 0;"),
        whole("barrier.cluster of one", "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;"),
        // The second half waits for the first, which only arrives.
        Op::across(
            "bar.arrive",
            ".shared .align 4 .b8 words[512];\n.reg .b32 at;\n.reg .pred p;\nmov.u32 at, words;\nmad.lo.u32 at, %i, 4, at;\nsetp.lt.u32 p, %i, 64;\n\
             mov.u32 %d, 1;\n@!p bra second;\nst.shared.u32 [at], %a;\nbar.arrive 2, 128;\nbra done;\nsecond:\nbar.sync 2, 128;\nld.shared.u32 %d, [at+-256];\ndone:",
            [Ty::B32],
            Ty::B32,
            values(128),
            |x, i| if i < 64 { 1 } else { x[i - 64][0] },
        ),
        // Each half of the block has a barrier of its own.
        Op::across(
            "two barriers at once",
            &exchange(
                ".reg .pred p;\nsetp.lt.u32 p, %i, 64;\n@!p bra second;\nbar.sync 1, 64;\nbra met;\nsecond:\nbar.sync 2, 64;\nmet:",
                "xor.b32 %d, %i, 63;",
            ),
            [Ty::B32],
            Ty::B32,
            values(128),
            |x, i| x[i ^ 63][0],
        ),
        whole(
            "barrier.cluster relaxed",
            "fence.acq_rel.cluster;\nbarrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;\nfence.acq_rel.cluster;",
        ),
        // Each half of a warp meets on its own.
        Op::across(
            "bar.warp.sync in halves",
            &exchange(
                ".reg .pred p;\n.reg .b32 side;\nand.b32 side, %i, 16;\nsetp.eq.u32 p, side, 0;\n@p bra low;\nbar.warp.sync 0xFFFF0000;\nbra met;\nlow:\nbar.warp.sync 0x0000FFFF;\nmet:",
                "xor.b32 %d, %i, 15;",
            ),
            [Ty::B32],
            Ty::B32,
            values(128),
            |x, i| x[i ^ 15][0],
        ),
        Op::across("bar.warp.sync", &exchange("bar.warp.sync -1;", "xor.b32 %d, %i, 31;"), [Ty::B32], Ty::B32, values(128), |x, i| {
            x[i ^ 31][0]
        }),
        reduced("bar.red.popc.u32", "bar.red.popc.u32 %d, 0, p;", |count| count as u64),
        reduced("barrier.red.popc.u32", "barrier.red.popc.u32 %d, 7, 128, !p;", |count| 128 - count as u64),
        reduced("bar.red.and.pred", "bar.red.and.pred q, 1, p;\nselp.u32 %d, 1, 0, q;", |count| u64::from(count == 128)),
        reduced("bar.red.or.pred", "bar.red.or.pred q, 1, 128, p;\nselp.u32 %d, 1, 0, q;", |count| u64::from(count > 0)),
        reduced("bar.red.and.pred agreed", "setp.lt.u32 p, %a, 500;\nbar.red.and.pred q, 0, p;\nselp.u32 %d, 1, 0, q;", |_| 1),
        // Two reductions in a row: the second must not see the first.
        reduced(
            "bar.red twice",
            ".reg .b32 e;\nbar.red.popc.u32 %d, 0, p;\nsetp.eq.u32 q, %i, 3;\nbar.red.popc.u32 e, 0, q;\nmad.lo.u32 %d, e, 1000, %d;",
            |count| 1000 + count as u64,
        ),
    ]
}
