//! mbarriers: arrivals, phases, parities, transaction counts, dropped and uncompleted arrivals.

use super::super::elementwise::{Op, Ty, cases, image};
use super::Family;

pub fn family() -> Family {
    let ops = ops();
    Family::table("mbarrier", image("mbarriers: arrivals, phases, parities and transaction counts.", &ops), cases("mbarrier", &ops))
}

fn values() -> Vec<[u64; 1]> {
    (0..128).map(|i| [i * 91 % 1000]).collect()
}

/// One barrier `bar` with `count`, made by thread 0; 128 words, of which `at` is this thread's. The parity is in `par`: ptxas crashes
/// over a register that is called as an entry of the module is.
fn begin(count: &str) -> String {
    format!(
        ".shared .align 8 .b64 cell;\n.shared .align 16 .b8 words[512];\n.reg .b32 bar, at, base, par;\n.reg .pred first, p;\n.reg .b64 state;\n\
         mov.u32 bar, cell;\nmov.u32 base, words;\nmad.lo.u32 at, %i, 4, base;\nsetp.eq.u32 first, %i, 0;\n@first mbarrier.init.shared::cta.b64 [bar], {count};\nbar.sync 0;\n"
    )
}

const WAIT: &str = "wait:\nmbarrier.try_wait.parity.shared::cta.b64 p, [bar], par;\n@!p bra wait;\n";

/// Each thread stores its value, the barrier orders, each reads the value of thread `127 - i`.
fn exchange(name: &str, count: &str, arrive_and_wait: &str) -> Op {
    let mirror = "sub.u32 %d, 127, %i;\nmad.lo.u32 %d, %d, 4, base;\nld.shared.u32 %d, [%d];";
    let body = format!("{}st.shared.u32 [at], %a;\n{arrive_and_wait}{mirror}", begin(count));
    Op::across(name, &body, [Ty::B32], Ty::B32, values(), |x, i| x[127 - i][0])
}

/// One thread's observations of a barrier of its own, the same in every thread.
fn alone(name: &str, count: u32, text: &str, want: u64) -> Op {
    let body = format!(
        ".shared .align 8 .b8 cells[256];\n.reg .b32 bar, e;\n.reg .pred p, q;\n.reg .b64 state, later;\nmov.u32 bar, cells;\nmad.lo.u32 bar, %i, 8, bar;\n\
         mbarrier.init.shared::cta.b64 [bar], {count};\nmov.u32 %d, 0;\n{text}"
    );
    Op::across(name, &body, [Ty::B32], Ty::B32, (0..32).map(|i| [i]).collect(), move |_, _| want)
}

/// Adds `weight` to the result if the phase with `parity` is complete.
fn test(parity: u32, weight: u32) -> String {
    format!("mbarrier.test_wait.parity.shared::cta.b64 p, [bar], {parity};\n@p add.u32 %d, %d, {weight};\n")
}

fn ops() -> Vec<Op> {
    vec![
        exchange(
            "arrive and test_wait",
            "128",
            "mbarrier.arrive.shared::cta.b64 state, [bar];\nwait:\nmbarrier.test_wait.shared::cta.b64 p, [bar], state;\n@!p bra wait;\n",
        ),
        exchange(
            "arrive and try_wait",
            "128",
            "mbarrier.arrive.release.cta.shared::cta.b64 state, [bar];\nwait:\nmbarrier.try_wait.acquire.cta.shared::cta.b64 p, [bar], state;\n@!p bra wait;\n",
        ),
        exchange("parity", "128", &format!("mbarrier.arrive.shared::cta.b64 _, [bar];\nmov.u32 par, 0;\n{WAIT}")),
        exchange(
            "try_wait with a time limit",
            "128",
            "mbarrier.arrive.shared::cta.b64 state, [bar];\nwait:\nmbarrier.try_wait.shared::cta.b64 p, [bar], state, 1000;\n@!p bra wait;\n",
        ),
        exchange("arrive with a count", "256", &format!("mbarrier.arrive.shared::cta.b64 _, [bar], 2;\nmov.u32 par, 0;\n{WAIT}")),
        exchange("shared without cta", "128", &format!("mbarrier.arrive.shared.b64 state, [bar];\nmov.u32 par, 0;\n{WAIT}")),
        exchange(
            "generic address",
            "128",
            "cvt.u64.u32 state, bar;\ncvta.shared.u64 state, state;\n.reg .b64 token;\nmbarrier.arrive.b64 token, [state];\nwait:\nmbarrier.test_wait.b64 p, [state], token;\n@!p bra wait;\n",
        ),
        // 128 arrivals and 128 times four bytes: the phase needs both.
        exchange(
            "expect_tx and complete_tx",
            "128",
            &format!(
                "mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 4;\nmbarrier.complete_tx.relaxed.cta.shared::cta.b64 [bar], 4;\nmov.u32 par, 0;\n{WAIT}"
            ),
        ),
        // Five phases in a row: the parity of the wait alternates, and each round reads the round's own values.
        Op::across(
            "five phases",
            &format!(
                "{}.reg .b32 round, sum, e;\nmov.u32 round, 0;\nmov.u32 sum, 0;\n\
                 again:\nadd.u32 e, %a, round;\nst.shared.u32 [at], e;\nmbarrier.arrive.shared::cta.b64 _, [bar];\nand.b32 par, round, 1;\n{WAIT}\
                 xor.b32 e, %i, 64;\nmad.lo.u32 e, e, 4, base;\nld.shared.u32 e, [e];\nadd.u32 sum, sum, e;\nbar.sync 0;\nadd.u32 round, round, 1;\nsetp.lt.u32 p, round, 5;\n@p bra again;\nmov.u32 %d, sum;",
                begin("128")
            ),
            [Ty::B32],
            Ty::B32,
            values(),
            |x, i| 5 * x[i ^ 64][0] + 10,
        ),
        // Half of the threads leave after the first phase; the second completes without them.
        Op::across(
            "arrive_drop",
            &format!(
                "{}setp.lt.u32 p, %i, 64;\n@p bra stay;\nmbarrier.arrive_drop.shared::cta.b64 _, [bar];\nmov.u32 %d, 3;\nbra done;\n\
                 stay:\nmbarrier.arrive.shared::cta.b64 _, [bar];\nmov.u32 par, 0;\n{WAIT}st.shared.u32 [at], %a;\nmbarrier.arrive.shared::cta.b64 _, [bar];\n\
                 second:\nmbarrier.try_wait.parity.shared::cta.b64 p, [bar], 1;\n@!p bra second;\nxor.b32 %d, %i, 63;\nmad.lo.u32 %d, %d, 4, base;\nld.shared.u32 %d, [%d];\ndone:",
                begin("128")
            ),
            [Ty::B32],
            Ty::B32,
            values(),
            |x, i| if i < 64 { x[i ^ 63][0] } else { 3 },
        ),
        // A barrier starts in phase 0: the phase of parity 1 counts as complete, that of parity 0 does not.
        alone("fresh", 3, &(test(1, 1) + &test(0, 10)), 1),
        alone("one phase on", 1, &format!("mbarrier.arrive.shared::cta.b64 _, [bar];\n{}{}", test(0, 1), test(1, 10)), 1),
        alone(
            "two phases on",
            1,
            &format!("mbarrier.arrive.shared::cta.b64 _, [bar];\nmbarrier.arrive.shared::cta.b64 _, [bar];\n{}{}", test(0, 1), test(1, 10)),
            10,
        ),
        alone(
            "pending_count",
            5,
            "mbarrier.arrive.shared::cta.b64 state, [bar];\nmbarrier.arrive.shared::cta.b64 later, [bar], 2;\nmbarrier.pending_count.b64 %d, state;\nmbarrier.pending_count.b64 e, later;\nmad.lo.u32 %d, %d, 10, e;",
            54,
        ),
        alone(
            "noComplete",
            3,
            &format!(
                "mbarrier.arrive.noComplete.shared::cta.b64 state, [bar], 2;\n{}mbarrier.arrive.shared::cta.b64 _, [bar];\n{}",
                test(0, 10),
                test(0, 1)
            ),
            1,
        ),
        // Bytes may complete before they are expected; the phase still waits for its arrival.
        alone(
            "tx before expect",
            1,
            &format!(
                "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [bar], 64;\n{}mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 64;\n{}",
                test(0, 10),
                test(0, 1)
            ),
            1,
        ),
        alone(
            "expect_tx alone",
            1,
            &format!(
                "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [bar], 32;\nmbarrier.arrive.shared::cta.b64 _, [bar];\n{}mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [bar], 16;\n{}\
                 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [bar], 16;\n{}",
                test(0, 10),
                test(0, 10),
                test(0, 1)
            ),
            1,
        ),
        // An invalidated barrier is plain memory, and may become a barrier again.
        alone(
            "inval",
            1,
            &format!(
                "mbarrier.inval.shared::cta.b64 [bar];\nmov.u32 e, 40;\nst.shared.u32 [bar], e;\nld.shared.u32 %d, [bar];\nmbarrier.init.shared::cta.b64 [bar], 2;\nmbarrier.arrive.shared::cta.b64 _, [bar];\n\
                 mbarrier.arrive.shared::cta.b64 _, [bar];\n{}{}",
                test(0, 1),
                test(1, 10)
            ),
            41,
        ),
    ]
}
