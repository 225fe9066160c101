//! Oracle of `embedding`: not here yet.
