//! `moe`: not here yet.
