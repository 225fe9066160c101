//! The families of models that run here, one row each: what its `config.json` says, which tensors it has,
//! what a step does.
//!
//! A new family is a file beside these with a row, and the row in [`FAMILIES`]. Nothing of it stands
//! elsewhere.

use std::path::Path;

use super::{config, decoder, run};

use self::config::Config;
use self::decoder::{Layers, Made, MadeLayer, Spec};
use self::fields::Fields;
use self::run::failure::{Failure, refuse_file};
use self::run::input::brief;
use self::run::weights::Matrices;

mod dbrx;
mod fields;
mod mixtral;

/// All of them.
const FAMILIES: [&Family; 2] = [&dbrx::FAMILY, &mixtral::FAMILY];

/// One family.
#[derive(Debug)]
pub struct Family {
    /// What a report calls it.
    pub title: &'static str,
    /// Its `model_type` in `config.json`.
    model_type: &'static str,
    /// Its name among `architectures` there.
    architecture: &'static str,
    /// The field that says how many positions the model was made for.
    pub positions_field: &'static str,
    config: fn(&Fields<'_>) -> Result<Config, Failure>,
    /// The matrices that are of no layer.
    pub outside: fn(&Config) -> Vec<Spec>,
    /// Those of one layer, in every layer of the same shapes.
    pub of_layer: fn(&Config, usize) -> Vec<Spec>,
    /// A model of weights that agree with `outside`, and of layers.
    pub decoder: for<'w> fn(&Config, &'w Matrices<'w>, Box<dyn Layers + 'w>) -> Made<'w>,
    /// A layer of weights that agree with `of_layer`.
    pub layer: for<'w> fn(&Config, usize, &'w Matrices<'w>) -> MadeLayer<'w>,
}

impl Family {
    /// Every matrix of a model: those of no layer, then those of each layer.
    pub fn specs(&self, config: &Config) -> Vec<Spec> {
        self.first_specs(config, config.num_layers)
    }

    /// The same without those of the layers from `layers` on.
    pub fn first_specs(&self, config: &Config, layers: usize) -> Vec<Spec> {
        (self.outside)(config).into_iter().chain((0..layers).flat_map(|l| (self.of_layer)(config, l))).collect()
    }
}

/// Reads and checks a configuration of any family.
pub fn read_config(file: &Path) -> Result<Config, Failure> {
    let fields = Fields::read(file)?;
    let config = (family(&fields)?.config)(&fields)?;
    match config.elements() {
        Some(_) => Ok(config),
        None => refuse_file(file, "the model's parameters are more than 2^60, which no machine holds"),
    }
}

/// The family that the file names: by the first of its `architectures`, or by `model_type` where it has none.
fn family(fields: &Fields<'_>) -> Result<&'static Family, Failure> {
    let architecture = fields.get("architectures").and_then(|list| list.get(0));
    let (field, name, of): (_, _, fn(&Family) -> &str) = match architecture {
        Some(name) => ("architectures", Some(name), |family| family.architecture),
        None => ("model_type", fields.get("model_type"), |family| family.model_type),
    };
    let known = || FAMILIES.map(of).join(" or ");
    let Some(name) = name else {
        return fields.refuse(field, format_args!("is missing, must be {}", known()));
    };
    match FAMILIES.into_iter().find(|family| name.as_str() == Some(of(family))) {
        Some(family) => Ok(family),
        None => fields.refuse(field, format_args!("must be {}, got {}", known(), brief(name))),
    }
}
