//! Oracle of `moe`: not here yet.
