//! Oracle of `permute`: not here yet.
