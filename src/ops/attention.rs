//! `attention`: not here yet.
