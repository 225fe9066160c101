//! Every instruction family against values worked out from the PTX ISA, on the emulator.
//!
//! The cases themselves are data (`tests/cases`), which a GPU can run unchanged. After changing a table, rewrite the
//! committed images with `WRITE_PTX=1 cargo test -p ptx-emulator --test instructions`.

#[path = "../cases/mod.rs"]
mod cases;
#[path = "../runner/mod.rs"]
mod runner;

use cases::families::{self, Family};
use ptx_emulator::{Options, Schedule, TmaCompletion};
use runner::Session;
use std::fs;

/// Runs each case of a family in both fixed orders and `EMULATOR_SEEDS` random ones (one by default), and prints every
/// disagreement before failing.
fn agree(family: Family) {
    let text = committed(&family);
    let seeds = std::env::var("EMULATOR_SEEDS").map_or(1, |n| n.parse().expect("EMULATOR_SEEDS is a number"));
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

/// What the emulator does not model yet. It must refuse it by name when the image is loaded, never approximate it.
const REFUSED: [&str; 8] = [
    "set.lt.f16x2.f16x2",
    "fns.b32",
    "movmatrix.trans",
    "call with registers",
    "indirect call",
    "%is_explicit_cluster",
    "st.async",
    "prefetches of bulk copies",
];

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
    (expected.sort_unstable(), refused.sort_unstable());
    assert_eq!(refused, expected, "the list of what is refused has changed");
}
