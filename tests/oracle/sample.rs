//! Oracle of `sample`: not here yet.
