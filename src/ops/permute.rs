//! `permute`: not here yet.
