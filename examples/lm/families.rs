//! The families of models that run here, one row each: what its `config.json` says, which tensors it has,
//! what a step does.
//!
//! A new family is a file beside these with a row, and the row in [`FAMILIES`]. Nothing of it stands
//! elsewhere.

use std::path::Path;

use super::{config, decoder, run};

use self::config::Config;
use self::decoder::{Made, Spec};
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
    /// Every matrix of a model.
    pub specs: fn(&Config) -> Vec<Spec>,
    /// A model of weights that agree with `specs`.
    pub decoder: for<'w> fn(&Config, &'w Matrices<'w>) -> Made<'w>,
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
