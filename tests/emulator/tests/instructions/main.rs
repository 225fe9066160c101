//! Every instruction family against values worked out from the PTX ISA, on the emulator.
//!
//! The cases themselves are data (`tests/cases`), which a GPU can run unchanged. After changing a table, rewrite the
//! committed images with `WRITE_PTX=1 cargo test -p ptx-emulator --test instructions`.

#[path = "../cases/mod.rs"]
mod cases;
#[path = "../runner/mod.rs"]
mod runner;

use cases::families::{self, Family};
use ptx_emulator::Fault::{DataRace, Deadlock, MissingProxyFence, UnwrittenRegister, WgmmaFence, WgmmaRegister};
use ptx_emulator::{Detector, Detectors, Options, Schedule, TmaCompletion};
use runner::{Failure, Session};
use std::fs;

/// Runs each case of a family in both fixed orders and `EMULATOR_SEEDS` random ones (three by default), and prints every
/// disagreement before failing.
fn agree(family: Family) {
    let text = committed(&family);
    let seeds = runner::seeds(3);
    let mut schedules = vec![(Schedule::InOrder, TmaCompletion::Eager), (Schedule::Reverse, TmaCompletion::Lazy)];
    schedules.extend((7..7 + seeds).map(|seed| (Schedule::Random(seed), TmaCompletion::Random)));
    // Variables of the module keep what a launch leaves in them, so such an image is loaded anew for each case.
    let fresh = text.contains("\n.global");
    let mut failures = Vec::new();
    for (schedule, tma) in schedules {
        let options = Options { schedule, tma, step_limit: 5_000_000, ..Options::default() };
        let mut session = None;
        for case in &family.cases {
            if fresh || session.is_none() {
                session = Some(Session::new(case.image, &text, options.clone()).unwrap_or_else(|e| panic!("{e}")));
            }
            if let Err(why) = session.as_mut().expect("made above").run(case) {
                failures.push(format!("{} ({schedule:?}, {tma:?}): {why}", case.name));
            }
        }
    }
    let count = family.cases.len();
    assert!(failures.is_empty(), "{} disagreements in {count} cases of `{}`:\n{}", failures.len(), family.name, failures.join("\n"));
    assert!(count > 0, "`{}` has no cases", family.name);
}

/// The committed image, which must be what the family's tables say.
fn committed(family: &Family) -> String {
    let path = runner::kernels().join("instructions").join(format!("{}.ptx", family.name));
    if let (Some(table), Some(_)) = (&family.text, std::env::var_os("WRITE_PTX")) {
        fs::write(&path, table).expect("kernels/instructions is writable");
    }
    let text = fs::read_to_string(&path).unwrap_or_default();
    let as_written = family.text.as_ref().is_none_or(|table| *table == text);
    assert!(as_written, "{} differs from its table; rewrite it with WRITE_PTX=1", path.display());
    text
}

macro_rules! families {
    ($($name:ident),* $(,)?) => {$(
        #[test]
        fn $name() {
            agree(families::$name::family());
        }
    )*};
}
families!(async_copy, atomic, barrier, cluster, control, convert, float, half, integer, matrix, mbarrier, memory, tensor, warp, wgmma);

/// The same kernels with what orders them taken out: the cases pass because of it, not by luck.
#[test]
fn without_its_order_each_kernel_is_reported() {
    let table = [
        (families::barrier::family(), "bar.sync", "bar.sync 0;", DataRace),
        (families::barrier::family(), "bar.warp.sync", "bar.warp.sync -1;", DataRace),
        (families::barrier::family(), "bar.arrive", "bar.sync 2, 128;", DataRace),
        (families::barrier::family(), "barrier.cluster relaxed", "fence.acq_rel.cluster;", DataRace),
        (families::mbarrier::family(), "arrive and test_wait", "@!p bra wait;", DataRace),
        (families::mbarrier::family(), "arrive and try_wait", "@!p bra wait;", DataRace),
        (families::mbarrier::family(), "five phases", "bar.sync 0;\n\tadd.u32 round", DataRace),
        (families::mbarrier::family(), "expect_tx and complete_tx", "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [bar], 4;", Deadlock),
        (families::async_copy::family(), "cp.async.cg 16", "bar.sync 0;", DataRace),
        (families::async_copy::family(), "cp.async.ca 4", "cp.async.wait_all;", DataRace),
        (families::async_copy::family(), "cp.async.wait_group 1", "cp.async.wait_group 1;", DataRace),
        (families::async_copy::family(), "cp.async.bulk to global", "fence.proxy.async.shared::cta;", MissingProxyFence),
        (families::async_copy::family(), "cp.async.bulk to shared", "@!done bra wait;", DataRace),
        (
            families::cluster::family(),
            "ld.shared::cluster 2",
            "barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;\n\tmapa",
            DataRace,
        ),
        (
            families::wgmma::family(),
            "wgmma_ss_n8_bf16_bf16 A B128 B B128 step 0 scale-d true",
            "fence.proxy.async.shared::cta;",
            MissingProxyFence,
        ),
        (families::wgmma::family(), "wgmma_ss_n8_bf16_bf16 A B128 B B128 step 0 scale-d true", "wgmma.fence.sync.aligned;", WgmmaFence),
        (
            families::wgmma::family(),
            "wgmma_ss_n8_bf16_bf16 A B128 B B128 step 0 scale-d true",
            "wgmma.wait_group.sync.aligned 0;",
            WgmmaRegister,
        ),
    ];
    for (family, name, order, fault) in table {
        let case = family.cases.iter().find(|case| case.name == name).unwrap_or_else(|| panic!("`{}` has no case `{name}`", family.name));
        let text = committed(&family);
        let start = text.find(&format!(".entry {}(", case.entry)).expect("the image has the entry");
        let end = text[start..].find(".visible").map_or(text.len(), |length| start + length);
        // What follows the ordering instruction on the same pattern stays.
        let kept = order.rfind('\t').map_or("", |tab| &order[tab..]);
        let without = text[start..end].replacen(order, kept, 1);
        assert!(without.len() < end - start, "{name} has no `{order}`");
        let text = format!("{}{without}{}", &text[..start], &text[end..]);
        // What is read too early is often unwritten as well; here the race is wanted.
        let detectors = Detectors::all().without(Detector::Uninitialised);
        let options = Options { step_limit: 100_000, detectors, ..Options::default() };
        match runner::launch(case, &text, options) {
            Err(Failure::Report(report)) => assert_eq!(report.fault, fault, "{name} without `{order}`: {report}"),
            other => panic!("{name} without `{order}`: {other:?}"),
        }
    }
}

/// A product reads its accumulators with scale-d alone; so only then must something have written them.
#[test]
fn accumulators_nobody_wrote() {
    let family = families::wgmma::family();
    let text = committed(&family);
    for (scale_d, step) in [(true, 0), (false, 1)] {
        let name = format!("wgmma_ss_n8_bf16_bf16 A B128 B B128 step {step} scale-d {scale_d}");
        let case = family.cases.iter().find(|case| case.name == name).expect("the family has the case");
        let without = text.replace("\tld.global.v4.f32 {d0, d1, d2, d3}, [own+0];\n", "");
        assert_ne!(without, text);
        match runner::launch(case, &without, Options::default()) {
            Ok(outputs) => assert!(!scale_d && runner::disagreement(case, &outputs).is_none(), "{name}"),
            Err(Failure::Report(report)) => assert!(scale_d && report.fault == UnwrittenRegister, "{name}: {report}"),
            Err(other) => panic!("{name}: {other}"),
        }
    }
}

/// What the emulator does not model yet. It must refuse it by name when the image is loaded, never approximate it.
const REFUSED: [&str; 3] = ["call with registers", "indirect call", "%is_explicit_cluster"];

/// An instruction of this family is refused or right.
#[test]
fn rare() {
    committed(&families::rare::family());
    let mut refused = Vec::new();
    for (text, case) in families::rare::singles() {
        match Session::new(case.image, &text, Options::default()) {
            Err(_) => refused.push(case.name),
            Ok(mut session) => session.run(&case).unwrap_or_else(|why| panic!("{}: {why}", case.name)),
        }
    }
    let mut expected = REFUSED.to_vec();
    expected.sort_unstable();
    refused.sort_unstable();
    assert_eq!(refused, expected, "the list of what is refused has changed");
}
