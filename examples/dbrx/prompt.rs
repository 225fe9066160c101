//! Prompts: token ids from the command line, from a file or from text, checked against the vocabulary and the cache.

use std::path::Path;

use super::config::Config;
use super::failure::{Failure, io_text, refuse, refuse_file};
use super::options::Prompt;
use super::random::Random;
use super::text::Tokenizer;

/// One prompt for each of `batch` sequences: the same for all, unless it is random. `folder` is where tokenizer.json may be;
/// `default_random` the length of a random prompt where none is named.
pub fn read(
    prompt: &Prompt,
    folder: Option<&Path>,
    config: &Config,
    batch: usize,
    default_random: Option<usize>,
) -> Result<Vec<Vec<u32>>, Failure> {
    let random = |count: usize| {
        let tokens = |sequence: usize| {
            let mut random = Random::at(0x0070_726f_6d70_7400, (sequence * count) as u64);
            (0..count).map(|_| random.below(config.vocab as u64) as u32).collect()
        };
        Ok((0..batch).map(tokens).collect())
    };
    let ids: Vec<u32> = match prompt {
        Prompt::Text(text) => Tokenizer::open(folder)?.encode(text)?,
        Prompt::Tokens(list) if list.trim().is_empty() => Vec::new(),
        Prompt::Tokens(list) => {
            list.split(',').map(id).collect::<Result<_, _>>().or_else(|text: String| refuse(format!("--tokens: {text}")))?
        }
        Prompt::File(file) => {
            let text = std::fs::read_to_string(file).or_else(|error| refuse_file(file, io_text(&error)))?;
            text.split_whitespace().map(id).collect::<Result<_, _>>().or_else(|text: String| refuse_file(file, text))?
        }
        Prompt::Random(count) => return random(*count),
        Prompt::Default => match default_random {
            Some(count) => return random(count),
            None => return refuse("no prompt; give --tokens 1,2,3, --tokens-file FILE, --random-tokens N or --prompt TEXT"),
        },
    };
    Ok(vec![ids; batch])
}

/// Refuses an empty prompt and ids outside the vocabulary.
pub fn check_ids(ids: &[u32], config: &Config) -> Result<(), Failure> {
    if ids.is_empty() {
        return refuse("the prompt is empty");
    }
    match ids.iter().position(|id| *id as usize >= config.vocab) {
        Some(at) => refuse(format!("token {at} of the prompt is {}, must be < vocab_size = {}", ids[at], config.vocab)),
        None => Ok(()),
    }
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

fn id(word: &str) -> Result<u32, String> {
    let word = word.trim();
    word.parse().map_err(|_| format!("`{word}` is not a token id"))
}
