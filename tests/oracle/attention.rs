//! Oracle of `attention`: not here yet.
