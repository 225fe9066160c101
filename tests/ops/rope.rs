//! `rope`: not here yet.
