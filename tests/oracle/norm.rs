//! Oracle of `norm`: not here yet.
