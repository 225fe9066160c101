//! Language models with experts: prompt in, next tokens out.
//!
//! | file | holds |
//! |---|---|
//! | `families` | what a family of models is: its configuration, its tensors' names, its step |
//! | `config`, `decoder` | what a family and a run know of each other |
//! | `run` | what runs a model of any family |

mod config;
mod decoder;
mod families;
pub mod run;
