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

/// Runs each case of a family in both fixed orders and one random one, and prints every disagreement before failing.
fn agree(family: Family) {
    let text = committed(&family);
    let schedules =
        [(Schedule::InOrder, TmaCompletion::Eager), (Schedule::Reverse, TmaCompletion::Lazy), (Schedule::Random(7), TmaCompletion::Random)];
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
families!(
    async_copy, atomic, barrier, cluster, control, convert, float, half, integer, matrix, mbarrier, memory, rare, tensor, warp, wgmma
);
