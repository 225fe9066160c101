//! Nothing but a place for tests. `tests/cudarc.rs` needs a GPU, and skips itself where there is none:
//!
//! ```text
//! cargo test --release --manifest-path interop/cudarc/Cargo.toml -- --nocapture
//! ```
//!
//! `stand_in/run.sh` runs what it can of them on a stand-in for the driver, which does work in the worst
//! order that events allow, and `check.sh` compiles them with every minor version of cudarc that the library
//! allows.
