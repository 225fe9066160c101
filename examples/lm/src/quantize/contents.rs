//! Which tensors each file of the result has, and where they lie: all of it follows from the headers of the
//! input.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::run::failure::{Failure, refuse, refuse_file};
use crate::run::header::{Tensor, TensorFile};
use crate::spec::{Part, Spec};
use crate::target::{GROUP, MX_GROUP, Reach, Stack, Stored, Target, projections};

/// Data begin at a multiple of this, and so does the first tensor.
const DATA_ALIGNMENT: usize = 64;

/// The matrices that are to be quantised, by the names of their tensors, and those that cannot be.
pub struct Chosen {
    quantized: BTreeMap<String, (Part, Stack)>,
    /// Projections whose number of inputs the format does not have.
    pub unfit: BTreeMap<String, Stack>,
}

/// What one file becomes.
pub struct Contents<'a> {
    pub file: &'a TensorFile,
    pub jobs: Vec<Job<'a>>,
    /// The header with its length in front.
    pub header: Vec<u8>,
    /// Of the whole file.
    pub bytes: u64,
}

/// What one tensor becomes.
pub struct Job<'a> {
    pub tensor: &'a Tensor,
    /// None: it stays as it is.
    pub quantized: Option<(Part, Stack)>,
    pub results: Vec<Placed>,
}

/// The same before it is known where tensors lie.
type Unplaced<'a> = (&'a Tensor, Option<(Part, Stack)>, Vec<Stored>);

/// A tensor of the result, and where in the file its bytes begin.
pub struct Placed {
    pub stored: Stored,
    pub begin: u64,
}

impl Chosen {
    /// Those of a model.
    pub fn new(config: &Config, target: Target, reach: Reach) -> Result<Chosen, Failure> {
        let mut chosen = Chosen { quantized: BTreeMap::new(), unfit: BTreeMap::new() };
        for l in 0..config.num_layers {
            let block = (config.family.describe)(config, l);
            projections(&block).into_iter().filter(|spec| reach.has(spec.part)).for_each(|spec| chosen.add(spec, target));
        }
        if chosen.quantized.is_empty() {
            return refuse(match chosen.unfit.first_key_value() {
                Some((name, Stack { k, .. })) => {
                    format!("nothing to quantise: MXFP4 needs a multiple of {MX_GROUP} inputs, `{name}` has {k}")
                }
                None => "nothing to quantise: the model has no experts; see --only projections".to_owned(),
            });
        }
        Ok(chosen)
    }

    fn add(&mut self, spec: &Spec, target: Target) {
        let stack = Stack::of(spec);
        for name in spec.names() {
            if target.takes(stack.k) {
                self.quantized.insert(name, (spec.part, stack));
            } else {
                self.unfit.insert(name, stack);
            }
        }
    }

    fn job<'a>(&self, file: &TensorFile, tensor: &'a Tensor, target: Target) -> Unplaced<'a> {
        let quantized = self.quantized.get(&tensor.name).copied();
        let results = match &quantized {
            Some((_, stack)) => target.tensors(&tensor.name, stack),
            None => vec![Stored {
                name: tensor.name.clone(),
                dtype: tensor.dtype.clone(),
                shape: tensor.shape.clone(),
                bytes: file.bytes(tensor).len(),
            }],
        };
        (tensor, quantized, results)
    }

    /// What each file becomes. No two tensors of the result have one name.
    pub fn contents<'a>(&self, files: &'a [TensorFile], target: Target) -> Result<Vec<Contents<'a>>, Failure> {
        let mut names = BTreeSet::new();
        let mut all = Vec::new();
        for file in files {
            let jobs: Vec<_> = file.tensors().iter().map(|tensor| self.job(file, tensor, target)).collect();
            for stored in jobs.iter().flat_map(|(_, _, results)| results) {
                if !names.insert(stored.name.clone()) {
                    return refuse_file(&file.path, format_args!("tensor `{}` is one that quantising another one gives", stored.name));
                }
            }
            all.push(Contents::place(file, jobs));
        }
        Ok(all)
    }

    /// The modules whose matrices stay as they are, for the configuration.
    fn kept_modules(&self, files: &[TensorFile]) -> Vec<String> {
        let tensors = files.iter().flat_map(TensorFile::tensors);
        let kept = tensors.filter(|tensor| tensor.shape.len() > 1 && !self.quantized.contains_key(&tensor.name));
        let modules: BTreeSet<&str> = kept.filter_map(|tensor| tensor.name.strip_suffix(".weight")).collect();
        modules.into_iter().map(str::to_owned).collect()
    }

    /// What `config.json` says of the format.
    pub fn config(&self, files: &[TensorFile], target: Target) -> Value {
        let kept = self.kept_modules(files);
        match target {
            Target::Fp8 => json!({
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [GROUP, GROUP],
                "modules_to_not_convert": kept,
            }),
            Target::Mxfp4 => json!({ "quant_method": "mxfp4", "modules_to_not_convert": kept }),
            Target::Int4 => json!({
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "kv_cache_scheme": null,
                "ignore": kept,
                "config_groups": { "group_0": {
                    "targets": ["Linear"],
                    "input_activations": null,
                    "output_activations": null,
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": true,
                        "strategy": "group",
                        "group_size": GROUP,
                        "dynamic": false,
                        "actorder": null,
                        "observer": "mse",
                    },
                } },
            }),
        }
    }
}

impl<'a> Contents<'a> {
    /// Tensors of wide elements come first, so that each begins at a multiple of its elements' size.
    fn place(file: &'a TensorFile, jobs: Vec<Unplaced<'a>>) -> Contents<'a> {
        let mut order: Vec<(usize, usize)> = Vec::new();
        for (job, (_, _, results)) in jobs.iter().enumerate() {
            order.extend((0..results.len()).map(|result| (job, result)));
        }
        order.sort_by_key(|(job, result)| std::cmp::Reverse(element_bytes(&jobs[*job].2[*result])));
        let mut entries = Map::new();
        entries.insert("__metadata__".into(), json!({ "format": "pt" }));
        let (mut begins, mut end) = (BTreeMap::new(), 0u64);
        for place in order {
            let Stored { name, dtype, shape, bytes } = &jobs[place.0].2[place.1];
            let begin = end;
            end += *bytes as u64;
            begins.insert(place, begin);
            entries.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [begin, end] }));
        }
        let mut text = Value::Object(entries).to_string();
        let data = (8 + text.len()).next_multiple_of(DATA_ALIGNMENT);
        text.push_str(&" ".repeat(data - 8 - text.len()));
        let header = [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
        let placed = |(job, (tensor, quantized, results)): (usize, Unplaced<'a>)| {
            let place = |(result, stored)| Placed { stored, begin: data as u64 + begins[&(job, result)] };
            Job { tensor, quantized, results: results.into_iter().enumerate().map(place).collect() }
        };
        Contents { file, jobs: jobs.into_iter().enumerate().map(placed).collect(), bytes: data as u64 + end, header }
    }

    /// The file's name.
    pub fn name(&self) -> &'a Path {
        self.file.path.file_name().map_or(Path::new(""), Path::new)
    }
}

/// Bytes of an element; 1 of an empty tensor.
fn element_bytes(stored: &Stored) -> usize {
    stored.bytes.checked_div(stored.shape.iter().product()).unwrap_or(1)
}

/// An index of the result's shards.
pub fn index(contents: &[Contents<'_>]) -> Value {
    let (mut map, mut total) = (Map::new(), 0u64);
    for file in contents {
        let shard = file.name().to_string_lossy();
        for placed in file.jobs.iter().flat_map(|job| &job.results) {
            map.insert(placed.stored.name.clone(), shard.clone().into());
            total += placed.stored.bytes as u64;
        }
    }
    json!({ "metadata": { "total_size": total }, "weight_map": map })
}
