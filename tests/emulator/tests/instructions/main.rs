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
use std::fs;

/// Runs each case of a family in both fixed orders and one random one, and prints every disagreement before failing.
fn agree(family: Family) {
    let text = committed(&family);
    let schedules = [(Schedule::InOrder, TmaCompletion::Eager), (Schedule::Reverse, TmaCompletion::Lazy), (Schedule::Random(7), TmaCompletion::Random)];
    let mut failures = Vec::new();
    for case in &family.cases {
        for (schedule, tma) in schedules {
            let options = Options { schedule, tma, ..Options::default() };
            if let Err(why) = runner::run(case, &text, options) {
                failures.push(format!("{} ({schedule:?}, {tma:?}): {why}", case.name));
                break;
            }
        }
    }
    let count = family.cases.len();
    assert!(failures.is_empty(), "{} of {count} cases of `{}` fail:\n{}", failures.len(), family.name, failures.join("\n"));
    assert!(count > 0, "`{}` has no cases", family.name);
}

/// The committed image, which must be what the family's tables say.
fn committed(family: &Family) -> String {
    let path = runner::kernels().join("instructions").join(format!("{}.ptx", family.name));
    if std::env::var_os("WRITE_PTX").is_some() {
        fs::write(&path, &family.text).expect("kernels/instructions is writable");
    }
    let text = fs::read_to_string(&path).unwrap_or_default();
    assert!(text == family.text, "{} differs from its table; rewrite it with WRITE_PTX=1", path.display());
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
families!(convert, float, half, integer);
