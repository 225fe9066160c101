//! Oracle of `router`: not here yet.
