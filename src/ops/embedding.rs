//! `embedding`: not here yet.
