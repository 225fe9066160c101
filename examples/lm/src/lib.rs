//! Language models, most of them with experts: prompt in, next tokens out. The examples `lm`, `dbrx` and
//! `quantize`, and the tests that call them as functions.
//!
//! | file | holds |
//! |---|---|
//! | `families` | what a family of models is: its configuration, its tensors |
//! | `config`, `spec`, `block` | what a family says of a model: constants, tensors, layers as data |
//! | `target` | how matrices are quantised: formats, names and shapes of their tensors |
//! | `decoder` | the model that comes of it, and the equations of a step |
//! | `run` | what runs a model of any family |
//! | `quantize` | a checkpoint in, a quantised one out |

#![allow(missing_docs)] // only the examples and their tests use it, and most names of fields say it all

mod block;
pub mod config;
mod decoder;
pub mod families;
pub mod quantize;
pub mod run;
pub mod spec;
pub mod target;
