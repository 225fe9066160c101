//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use clap::{Arg, Command, value_parser};

use crate::target::{Reach, Target};

/// What was asked for.
#[derive(Clone, Debug)]
pub struct Options {
    pub model: PathBuf,
    pub target: Target,
    pub reach: Reach,
    pub out: PathBuf,
    /// None: as many as the machine has.
    pub threads: Option<usize>,
}

const AFTER_HELP: &str = "\
Embeddings, lm_head, norms, routers and biases stay as they are.
Exit codes: 0 fine, 2 the input or the environment was refused; then there is no new folder.";

fn command() -> Command {
    let path = |name: &'static str| Arg::new(name).long(name).value_name("DIR").value_parser(value_parser!(PathBuf)).required(true);
    let word = |name: &'static str, value: &'static str| {
        let words: Vec<_> = value.split('|').collect();
        Arg::new(name).long(name).value_name(value).value_parser(words).hide_possible_values(true)
    };
    let threads = RangedU64ValueParser::<usize>::new().range(1..=1024);
    Command::new("quantize")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Converts a checkpoint to FP8 blocks, MXFP4 or INT4 in groups of 128, in safetensors with the names that engines read")
        .after_help(AFTER_HELP)
        .args([
            path("model").help("config.json with model.safetensors, or with shards and their index; of f32, bf16 or f16"),
            word("to", "fp8|mxfp4|int4").required(true).help("The format of quantised matrices"),
            path("out").help("A folder that does not exist yet"),
            word("only", "experts|projections")
                .help("Which matrices: those of routed experts, or every projection [default: experts for mxfp4, else projections]"),
            Arg::new("threads").long("threads").value_name("N").value_parser(threads).help("Worker threads [default: all]"),
        ])
}

/// Reads the command line. An error is clap's own: it has a text, a stream to print it on and an exit code.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Options, clap::Error> {
    let mut matches = command().try_get_matches_from(args)?;
    let mut path = |name: &str| matches.remove_one::<PathBuf>(name).unwrap_or_default();
    let (model, out) = (path("model"), path("out"));
    let word = |name: &str| matches.get_one::<String>(name).map(String::as_str);
    let target = Target::ALL.into_iter().find(|target| Some(target.name()) == word("to")).unwrap_or(Target::Fp8);
    let reach = match word("only") {
        Some("experts") => Reach::Experts,
        Some(_) => Reach::Projections,
        None => usual_reach(target),
    };
    Ok(Options { model, target, reach, out, threads: matches.get_one("threads").copied() })
}

/// What checkpoints of a format quantise.
fn usual_reach(target: Target) -> Reach {
    match target {
        Target::Mxfp4 => Reach::Experts,
        Target::Fp8 | Target::Int4 => Reach::Projections,
    }
}
