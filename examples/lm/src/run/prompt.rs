//! Prompts: token ids from the command line, from a file or from text, checked against the vocabulary and the cache.

use std::path::Path;

use super::config::Config;
use super::failure::{Failure, refuse, refuse_file};
use super::input::{MAX_TEXT_BYTES, brief, read_stream};
use super::options::{Options, Prompt};
use super::random::Random;
use super::text::Tokenizer;

/// Where random prompts begin.
const SEED: u64 = 0x0070_726f_6d70_7400;

/// The prompt of every sequence: one for all, or random ones that differ.
pub enum Ids {
    Given(Vec<u32>),
    Random { count: usize, vocab: usize },
}

impl Ids {
    /// Tokens of one sequence.
    pub fn len(&self) -> usize {
        match self {
            Ids::Given(ids) => ids.len(),
            Ids::Random { count, .. } => *count,
        }
    }

    /// One sequence's tokens.
    pub fn of(&self, sequence: usize) -> Vec<u32> {
        match self {
            Ids::Given(ids) => ids.clone(),
            Ids::Random { count, vocab } => {
                let mut random = Random::at(SEED, sequence as u64 * *count as u64);
                (0..*count).map(|_| random.below(*vocab as u64) as u32).collect()
            }
        }
    }

    /// Refuses an empty prompt and ids outside the vocabulary.
    pub fn check(&self, config: &Config) -> Result<(), Failure> {
        let Ids::Given(ids) = self else { return Ok(()) };
        if ids.is_empty() {
            return refuse("the prompt is empty");
        }
        match ids.iter().position(|id| *id as usize >= config.vocab) {
            Some(at) => refuse(format!("token {at} of the prompt is {}, must be < vocab_size = {}", ids[at], config.vocab)),
            None => Ok(()),
        }
    }
}

/// Reads the prompt. `folder` is where tokenizer.json may be; `default_random` the length of a random prompt where none is named.
pub fn read(options: &Options, folder: Option<&Path>, config: &Config, default_random: Option<usize>) -> Result<Ids, Failure> {
    let random = |count| Ok(Ids::Random { count, vocab: config.vocab });
    let ids: Vec<u32> = match &options.prompt {
        Prompt::Text(text) => Tokenizer::open(folder, options.program)?.encode(text)?,
        Prompt::Tokens(list) if list.trim().is_empty() => Vec::new(),
        Prompt::Tokens(list) => {
            list.split(',').map(id).collect::<Result<_, _>>().or_else(|text: String| refuse(format!("--tokens: {text}")))?
        }
        Prompt::File(file) => {
            let text = read_stream(file, MAX_TEXT_BYTES)?;
            text.split_whitespace().map(id).collect::<Result<_, _>>().or_else(|text: String| refuse_file(file, text))?
        }
        Prompt::Random(count) => return random(*count),
        Prompt::Default => match default_random {
            Some(count) => return random(count),
            None => return refuse("no prompt; give --tokens 1,2,3, --tokens-file FILE, --random-tokens N or --prompt TEXT"),
        },
    };
    Ok(Ids::Given(ids))
}

/// Refuses what does not fit in the cache: the last generated token is not fed back, so it needs no room.
pub fn check_fits(prompt: usize, generate: usize, context: usize) -> Result<(), Failure> {
    if prompt > context {
        return refuse(format!("the prompt has {prompt} tokens, the KV cache holds {context} (--context)"));
    }
    match prompt + generate.saturating_sub(1) {
        need if need > context => refuse(format!(
            "a prompt of {prompt} tokens and {generate} generated ones need a KV cache of {need}, it holds {context} (--context)"
        )),
        _ => Ok(()),
    }
}

/// Refuses positions that the model was not made for.
pub fn check_length(prompt: usize, generate: usize, config: &Config) -> Result<(), Failure> {
    match prompt.saturating_add(generate.saturating_sub(1)) {
        need if need > config.max_positions => refuse(format!(
            "a prompt of {prompt} tokens and {generate} generated ones take {need} positions, the model has {} = {}",
            config.family.positions_field, config.max_positions
        )),
        _ => Ok(()),
    }
}

fn id(word: &str) -> Result<u32, String> {
    let word = word.trim();
    word.parse().map_err(|_| format!("`{}` is not a token id", brief(word)))
}
