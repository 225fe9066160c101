//! A mutation fuzzer for the front end: `cargo run --release -- [executions] [seed]` in this folder.
//!
//! Deterministic and without coverage feedback. Seeds are the images of `../kernels`, cut into header plus one function, so that an
//! execution takes microseconds. A case is a seed with a few mutations of bytes, tokens or lines; it is loaded, and every eighth case
//! that loads is also launched with a small step limit. A panic ends the run with the input written to `crash.ptx`.

use ptx_emulator::{Gpu, Launch, Options};
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::time::Instant;

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 11) as usize % n.max(1)
    }
}

/// Words that are put where others stood.
const WORDS: &[&str] = &[
    "%r1",
    "%rd1",
    "%p1",
    "%f1",
    "_",
    "{",
    "}",
    "(",
    ")",
    "[",
    "]",
    ";",
    ",",
    ":",
    "@",
    "|",
    "+-",
    "0x7fffffffffffffff",
    "-1",
    "4294967296",
    "0f7F800000",
    ".reg",
    ".param",
    ".shared",
    ".local",
    ".align",
    ".b8",
    ".b32",
    ".b64",
    ".pred",
    ".v4",
    ".f32",
    ".s64",
    "<4000000000>",
    "[99999999999]",
    "bra",
    "call",
    "ret",
    "exit",
    "mov.b64",
    "ld.global",
    "st.shared.v4.f32",
    "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16",
    "cp.async.bulk.tensor.5d",
    "mbarrier.init.shared.b64",
    ".entry",
    ".func",
    ".visible",
    ".version",
    ".target sm_90a",
    "\"",
    "/*",
    "//",
    "\u{e9}",
];

/// The parts an image can be cut into: its head, and each function.
fn parts(text: &str) -> (String, Vec<String>) {
    let starts: Vec<usize> = text.match_indices("\n.visible .entry").chain(text.match_indices("\n.func")).map(|(i, _)| i).collect();
    let Some(&first) = starts.iter().min() else { return (text.to_owned(), Vec::new()) };
    let mut starts = starts;
    starts.sort_unstable();
    starts.push(text.len());
    (text[..first].to_owned(), starts.windows(2).map(|w| text[w[0]..w[1]].to_owned()).collect())
}

fn seeds() -> Vec<Vec<u8>> {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels");
    let mut out = Vec::new();
    for folder in ["instructions", "ptx"] {
        let Ok(entries) = std::fs::read_dir(kernels.join(folder)) else { continue };
        let mut paths: Vec<_> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
        paths.sort();
        for path in paths {
            let Ok(text) = std::fs::read_to_string(path) else { continue };
            let (head, functions) = parts(&text);
            out.extend(functions.iter().filter(|f| f.len() < 6000).map(|f| format!("{head}{f}").into_bytes()));
        }
    }
    out
}

fn mutate(rng: &mut Rng, seed: &[u8], other: &[u8]) -> Vec<u8> {
    let mut v = seed.to_vec();
    for _ in 0..1 + rng.below(4) {
        let at = rng.below(v.len());
        match rng.below(8) {
            0 if !v.is_empty() => v[at] = rng.next() as u8,
            1 if !v.is_empty() => v[at] ^= 1 << rng.below(7),
            2 => v.truncate(at),
            3 => {
                let end = (at + 1 + rng.below(40)).min(v.len());
                v.drain(at..end);
            }
            4 => {
                let end = (at + 1 + rng.below(200)).min(v.len());
                let copy = v[at..end].to_vec();
                let to = rng.below(v.len() + 1);
                v.splice(to..to, copy);
            }
            5 => {
                let from = rng.below(other.len());
                let end = (from + 1 + rng.below(200)).min(other.len());
                v.splice(at..at, other[from..end].iter().copied());
            }
            _ => {
                // One token becomes another.
                let word = WORDS[rng.below(WORDS.len())];
                let stop = |b: &u8| b.is_ascii_whitespace() || b",;[]{}()".contains(b);
                let end = v[at..].iter().position(stop).map_or(v.len(), |n| at + n);
                v.splice(at..end, word.bytes());
            }
        }
    }
    v
}

fn execute(input: &[u8], launch: bool) -> bool {
    let mut gpu = Gpu::new(Options { step_limit: 2000, memory_limit: 1 << 32, ..Options::default() });
    let Ok(module) = gpu.load("fuzz.ptx", input) else { return false };
    if launch {
        for name in module.entries() {
            let Ok(kernel) = module.kernel(name) else { continue };
            let buffer = gpu.alloc(4096).expect("room");
            gpu.fill(buffer, 1, 4096).expect("inside");
            let mut params = vec![0; kernel.param_bytes()];
            for chunk in params.chunks_exact_mut(8) {
                chunk.copy_from_slice(&buffer.to_le_bytes());
            }
            let threads = kernel.max_threads().clamp(1, 64);
            let config = Launch { grid: [1, 1, 1], block: [threads, 1, 1], params: &params, ..Launch::default() };
            if let Err(report) = gpu.launch(&kernel, &config) {
                assert!(report.fault != ptx_emulator::Fault::Internal, "{report}");
            }
        }
    }
    true
}

fn main() {
    let mut args = std::env::args().skip(1);
    let executions: u64 = args.next().map_or(1_000_000, |n| n.parse().expect("a number of executions"));
    let mut rng = Rng(args.next().map_or(1, |n| n.parse::<u64>().expect("a seed")).max(1));
    let seeds = seeds();
    assert!(!seeds.is_empty(), "no images in ../kernels");
    let (start, mut loaded, mut launched) = (Instant::now(), 0u64, 0u64);
    for i in 0..executions {
        let (a, b) = (rng.below(seeds.len()), rng.below(seeds.len()));
        let input = mutate(&mut rng, &seeds[a], &seeds[b]);
        let launch = i % 8 == 0;
        match panic::catch_unwind(AssertUnwindSafe(|| execute(&input, launch))) {
            Ok(true) => {
                loaded += 1;
                launched += u64::from(launch);
            }
            Ok(false) => {}
            Err(_) => {
                std::fs::write("crash.ptx", &input).expect("crash.ptx is writable");
                eprintln!("panic at execution {i}; the input is in crash.ptx");
                std::process::exit(1);
            }
        }
        if (i + 1) % 100_000 == 0 {
            println!("{} executions, {loaded} loaded, {launched} launched, {:.0} s", i + 1, start.elapsed().as_secs_f64());
        }
    }
    println!(
        "{executions} executions of {} seeds: {loaded} loaded, {launched} launched, no panic, {:.0} s",
        seeds.len(),
        start.elapsed().as_secs_f64()
    );
}
