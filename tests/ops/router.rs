//! `router`: not here yet.
