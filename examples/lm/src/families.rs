//! The families of models that run here, one row each: what its `config.json` says, which tensors it has, how
//! a layer uses them.
//!
//! A new family is a file beside these with a row, and the row in `FAMILIES`. Nothing of it stands
//! elsewhere. `docs/families.md` has the steps.

use std::convert::Infallible;
use std::path::Path;

use super::{block, config, run, spec};

use self::block::{Block, Outside};
use self::config::Config;
use self::fields::Fields;
use self::run::failure::{Failure, refuse_file};
use self::run::input::brief;
use self::spec::Spec;

mod common;
mod dbrx;
mod deepseek;
mod fields;
mod gguf;
mod glm;
mod gpt_neox;
mod gpt_oss;
mod granite;
mod grok;
mod llama;
mod minimax;
mod mixtral;
mod olmoe;
mod phimoe;
mod quantization;
mod qwen2;
mod qwen3;

pub use self::gguf::read_gguf;
pub use self::quantization::{Quantization, Scheme, stem};

/// All of them.
const FAMILIES: [&Family; 16] = [
    &dbrx::FAMILY,
    &deepseek::FAMILY,
    &glm::FAMILY,
    &gpt_neox::FAMILY,
    &gpt_oss::FAMILY,
    &granite::FAMILY,
    &grok::FAMILY,
    &llama::FAMILY,
    &llama::MISTRAL,
    &minimax::FAMILY,
    &mixtral::FAMILY,
    &olmoe::FAMILY,
    &phimoe::FAMILY,
    &qwen2::FAMILY,
    &qwen3::FAMILY,
    &qwen3::DENSE,
];

/// One family.
#[derive(Debug)]
pub struct Family {
    /// Name in reports.
    pub title: &'static str,
    /// Its names among `model_type` in `config.json`.
    model_types: &'static [&'static str],
    /// Its names among `architectures` there.
    architectures: &'static [&'static str],
    /// The field that says how many positions the model was made for.
    pub positions_field: &'static str,
    config: fn(&Fields<'_>) -> Result<Config, Failure>,
    /// What is of no layer.
    pub describe_outside: fn(&Config) -> Outside<Spec>,
    /// One layer.
    pub describe: fn(&Config, usize) -> Block<Spec>,
}

impl Family {
    /// Every matrix that is of no layer.
    pub fn outside(&self, config: &Config) -> Vec<Spec> {
        let mut specs = Vec::new();
        let Ok(_) = (self.describe_outside)(config).map(&mut |spec| {
            specs.push(spec.clone());
            Ok::<_, Infallible>(())
        });
        specs
    }

    /// Every matrix of a layer.
    pub fn of_layer(&self, config: &Config, l: usize) -> Vec<Spec> {
        let mut specs = Vec::new();
        let Ok(_) = (self.describe)(config, l).map(&mut |spec| {
            specs.push(spec.clone());
            Ok::<_, Infallible>(())
        });
        specs
    }

    /// Every matrix of a model: those of no layer, then those of each layer.
    pub fn specs<'a>(&'a self, config: &'a Config) -> impl Iterator<Item = Spec> + 'a {
        self.first_specs(config, config.num_layers)
    }

    /// The same without those of the layers from `layers` on.
    pub fn first_specs<'a>(&'a self, config: &'a Config, layers: usize) -> impl Iterator<Item = Spec> + 'a {
        self.outside(config).into_iter().chain((0..layers).flat_map(|l| self.of_layer(config, l)))
    }
}

/// Reads and checks a configuration of any family.
pub fn read_config(file: &Path) -> Result<Config, Failure> {
    let fields = Fields::read(file)?;
    let family = family(&fields)?;
    common::check(&fields, family)?;
    let config = Config { quantization: Quantization::read(&fields)?, ..(family.config)(&fields)? };
    match config.elements() {
        Some(_) => Ok(config),
        None => refuse_file(file, "the model's parameters are more than 2^60, which no machine holds"),
    }
}

/// The family that the file names: by the first of its `architectures`, or by `model_type` where it has none.
fn family(fields: &Fields<'_>) -> Result<&'static Family, Failure> {
    let architecture = fields.get("architectures").and_then(|list| list.get(0));
    let (field, name, of): (_, _, fn(&Family) -> &[&'static str]) = match architecture {
        Some(name) => ("architectures", Some(name), |family| family.architectures),
        None => ("model_type", fields.get("model_type"), |family| family.model_types),
    };
    let known = || FAMILIES.into_iter().flat_map(of).copied().collect::<Vec<_>>().join(", ");
    let Some(name) = name else {
        return fields.refuse(field, format_args!("is missing, must be one of {}", known()));
    };
    match FAMILIES.into_iter().find(|family| name.as_str().is_some_and(|name| of(family).contains(&name))) {
        Some(family) => Ok(family),
        None => fields.refuse(field, format_args!("must be one of {}, got {}", known(), brief(name))),
    }
}
