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
//! | [`pages`] | a step over a key-value cache with scattered pages |
//! | [`recorder`] | a driver that only records what it was asked |
//! | [`mod@bench`] | verify, then time; FLOP and bytes by formula |

pub mod bench;
pub mod compare;
pub mod device;
pub mod emulated;
pub mod faulty;
pub mod fill;
pub mod goldens;
pub mod guard;
pub mod pages;
pub mod recorder;
