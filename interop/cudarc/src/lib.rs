//! Nothing but a place for tests: `tests/cudarc.rs` needs a GPU, and skips what it has none for; `check.sh` compiles it with every minor
//! version of cudarc that the library allows.
