//! What the tests and benches of dropless share: devices to run on, inputs, guarded outputs, comparison, goldens.
//!
//! | module | holds |
//! |---|---|
//! | [`device`] | every device a test runs on |
//! | [`emulated`] | the PTX emulator as a driver |
//! | [`faulty`] | a driver that lets one call fail, and knows what was not released |
//! | [`fill`] | seeded inputs: uniform, normal, small integers |
//! | [`guard`] | inputs and outputs between canaries, poisoned twice |
//! | [`compare`] | element-wise bounds, exact bits, relative L2; none of them passes on zeros |
//! | [`goldens`] | other implementations' results |
//! | [`oracle`] | what each operation should give, in f64 |
//! | [`pages`] | a step over a key-value cache with scattered pages |
//! | [`recorder`] | a driver that only records what it was asked |
//! | [`mod@bench`] | verify, then time; FLOP and bytes by formula |
//!
//! | variable | what it does |
//! |---|---|
//! | `DROPLESS_REQUIRE_GPU=1` | a missing GPU is a failure |
//! | `DROPLESS_HARDWARE_ONLY=1` | the same, and nothing runs on the CPU or the emulated GPU for its own sake: for the minutes on a GPU |
//! | `DROPLESS_CPU_ONLY=1` | no GPU, neither emulated nor real |
//! | `DROPLESS_SCHEDULE=random:7,lazy` | the emulated GPU runs in this schedule alone: what a failing test prints |
//! | `DROPLESS_SEEDS=100` | so many random schedules instead of one |
//! | `DROPLESS_GOLDENS=DIR` | larger sets of other implementations' results |

pub mod bench;
pub mod compare;
pub mod device;
pub mod emulated;
pub mod faulty;
pub mod fill;
pub mod goldens;
pub mod guard;
pub mod oracle;
pub mod pages;
pub mod recorder;
