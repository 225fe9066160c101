//! Clusters: distributed shared memory, remote arrivals and atomics, copies between CTAs, cluster barriers and registers;
//! and setmaxnreg.

use super::super::elementwise::{Op, Ty, cases, image};
use super::Family;

pub fn family() -> Family {
    let ops = ops();
    Family::table(
        "cluster",
        image("Clusters: distributed shared memory, remote arrivals, cluster barriers and registers.", &ops),
        cases("cluster", &ops),
    )
}

const PER_CTA: usize = 64;

fn values(ctas: usize) -> Vec<[u64; 1]> {
    (0..ctas * PER_CTA).map(|i| [(i * 53 % 997) as u64]).collect()
}

/// Shared words; `at` is this thread's word, `rank` this CTA's, `next` the rank after it.
const BEGIN: &str = ".shared .align 128 .b8 words[256];\n.shared .align 8 .b64 cell;\n.reg .b32 at, base, bar, far, rank, next, count, tid;\n.reg .pred p, first;\n\
                     mov.u32 base, words;\nmov.u32 bar, cell;\nmov.u32 tid, %tid.x;\nsetp.eq.u32 first, tid, 0;\nmad.lo.u32 at, tid, 4, base;\nmov.u32 rank, %cluster_ctarank;\nmov.u32 count, %cluster_nctarank;\n\
                     add.u32 next, rank, 1;\nrem.u32 next, next, count;\n";
const SYNC: &str = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n";
const WAIT: &str = "wait:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [bar], 0;\n@!p bra wait;\n";

fn ops() -> Vec<Op> {
    let mut ops = Vec::new();
    for ctas in [2usize, 4, 8] {
        let op = |name: &str, text: String, want: fn(&[Vec<u64>], usize, usize) -> u64| {
            Op::across(&format!("{name} {ctas}"), &format!("{BEGIN}{text}"), [Ty::B32], Ty::B32, values(ctas), move |x, i| {
                want(x, i, x.len() / PER_CTA)
            })
            .cluster(ctas as u32)
        };
        // The element of the same thread in the CTA before (or after) this one.
        fn before(x: &[Vec<u64>], i: usize) -> u64 {
            x[(i + x.len() - PER_CTA) % x.len()][0]
        }
        fn after(x: &[Vec<u64>], i: usize) -> u64 {
            x[(i + PER_CTA) % x.len()][0]
        }
        ops.extend([
            op("ld.shared::cluster", format!("st.shared.u32 [at], %a;\n{SYNC}mapa.shared::cluster.u32 far, at, next;\nld.shared::cluster.u32 %d, [far];\n{SYNC}"), |x, i, _| after(x, i)),
            op("st.shared::cluster", format!("{SYNC}mapa.shared::cluster.u32 far, at, next;\nst.shared::cluster.u32 [far], %a;\n{SYNC}ld.shared.u32 %d, [at];"), |x, i, _| before(x, i)),
            op(
                "mapa generic",
                format!(".reg .b64 any, there;\nst.shared.u32 [at], %a;\n{SYNC}cvt.u64.u32 any, at;\ncvta.shared.u64 any, any;\nmapa.u64 there, any, next;\nld.u32 %d, [there];\ngetctarank.u64 far, there;\nsetp.ne.u32 p, far, next;\n@p mov.u32 %d, 0;\n{SYNC}"),
                |x, i, _| after(x, i),
            ),
            op(
                "atom.shared::cluster",
                format!("mov.u32 far, 0;\nst.shared.u32 [at], far;\n{SYNC}mapa.shared::cluster.u32 far, base, 0;\nred.relaxed.cluster.shared::cluster.add.u32 [far], %a;\n{SYNC}ld.shared::cluster.u32 %d, [far];\n{SYNC}"),
                |x, _, _| x.iter().map(|v| v[0]).sum(),
            ),
            // Each thread of each CTA arrives at the next CTA's barrier, after writing its word there.
            op(
                "remote mbarrier arrive",
                format!(
                    "@first mbarrier.init.shared::cta.b64 [bar], {PER_CTA};\n@first fence.mbarrier_init.release.cluster;\n{SYNC}mapa.shared::cluster.u32 far, at, next;\nst.shared::cluster.u32 [far], %a;\n\
                     mapa.shared::cluster.u32 far, bar, next;\nmbarrier.arrive.release.cluster.shared::cluster.b64 _, [far];\n{WAIT}ld.shared.u32 %d, [at];\n{SYNC}"
                ),
                |x, i, _| before(x, i),
            ),
            // The same without scope and semantics, which stands for a release within the CTA: nothing is
            // read that it would have to order.
            op(
                "plain remote mbarrier arrive",
                format!(
                    "@first mbarrier.init.shared::cta.b64 [bar], {PER_CTA};\n@first fence.mbarrier_init.release.cluster;\n{SYNC}mapa.shared::cluster.u32 far, bar, next;\n\
                     mbarrier.arrive.shared::cluster.b64 _, [far];\n{WAIT}add.u32 %d, %a, 1;\n{SYNC}"
                ),
                |x, i, _| x[i][0] + 1,
            ),
            // Barriers made, published by a relaxed arrival, and used by the neighbour.
            op(
                "relaxed arrive behind an init",
                format!(
                    "@first mbarrier.init.shared::cta.b64 [bar], {PER_CTA};\n@first fence.mbarrier_init.release.cluster;\nbarrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;\n\
                     mapa.shared::cluster.u32 far, at, next;\nst.shared::cluster.u32 [far], %a;\nmapa.shared::cluster.u32 far, bar, next;\nmbarrier.arrive.release.cluster.shared::cluster.b64 _, [far];\n{WAIT}ld.shared.u32 %d, [at];\n{SYNC}"
                ),
                |x, i, _| before(x, i),
            ),
            op(
                "cp.async.bulk to a peer",
                format!(
                    "@first mbarrier.init.shared::cta.b64 [bar], 1;\n@first fence.mbarrier_init.release.cluster;\n.shared .align 128 .b8 landed[256];\n.reg .b32 to, there;\nmov.u32 to, landed;\nst.shared.u32 [at], %a;\n\
                     fence.proxy.async.shared::cta;\n{SYNC}@!first bra sent;\nmbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 256;\nmapa.shared::cluster.u32 there, to, next;\nmapa.shared::cluster.u32 far, bar, next;\n\
                     cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [there], [base], 256, [far];\nsent:\n{WAIT}mad.lo.u32 to, tid, 4, to;\nld.shared.u32 %d, [to];\n{SYNC}"
                ),
                |x, i, _| before(x, i),
            ),
            op("cluster registers", ".reg .b32 e;\nmov.u32 %d, %cluster_ctaid.x;\nmov.u32 e, %cluster_nctaid.x;\nmad.lo.u32 %d, %d, 16, e;\nmad.lo.u32 %d, %d, 16, rank;\nmad.lo.u32 %d, %d, 16, count;\nmov.u32 e, %clusterid.x;\nmad.lo.u32 %d, %d, 16, e;\nmov.u32 e, %nclusterid.x;\nmad.lo.u32 %d, %d, 16, e;".to_string(), |_, i, ctas| {
                let rank = (i / PER_CTA) as u64;
                let digits = [rank, ctas as u64, rank, ctas as u64, 0, 1];
                digits.iter().fold(0, |sum, digit| 16 * sum + digit)
            }),
            // Three rounds: arrive, do something of one's own, wait.
            op(
                "barrier.cluster rounds",
                format!(
                    ".reg .b32 round, sum;\nmov.u32 sum, 0;\nmov.u32 round, 0;\nagain:\nadd.u32 far, %a, round;\nst.shared.u32 [at], far;\nbarrier.cluster.arrive.release;\nadd.u32 round, round, 1;\nbarrier.cluster.wait.acquire;\n\
                     mapa.shared::cluster.u32 far, at, next;\nld.shared::cluster.u32 far, [far];\nadd.u32 sum, sum, far;\n{SYNC}setp.lt.u32 p, round, 3;\n@p bra again;\nmov.u32 %d, sum;"
                ),
                |x, i, _| 3 * after(x, i) + 3,
            ),
        ]);
    }
    ops.push(
        Op::across(
            "setmaxnreg",
            ".reg .pred p;\nsetp.lt.u32 p, %i, 128;\n@p bra low;\nsetmaxnreg.inc.sync.aligned.u32 152;\nadd.u32 %d, %a, 2;\nbra done;\nlow:\nsetmaxnreg.dec.sync.aligned.u32 40;\nadd.u32 %d, %a, 1;\ndone:",
            [Ty::B32],
            Ty::B32,
            (0..256).map(|i| [i * 3]).collect(),
            |x, i| x[i][0] + if i < 128 { 1 } else { 2 },
        )
        .directives(".maxntid 256, 1, 1\n.minnctapersm 1"),
    );
    ops
}
