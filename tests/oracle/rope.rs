//! Oracle of `rope`: not here yet.
