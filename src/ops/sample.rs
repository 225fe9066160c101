//! `sample`: not here yet.
