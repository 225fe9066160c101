//! `norm`: not here yet.
