//! Tokens that are drawn: by their seed, from the likeliest that have a share together, on every device.

use crate::fixture::{Ran, checkpoint, run};

/// The tokens that a run of `model` prints with these arguments.
#[track_caller]
fn tokens(ran: impl Fn(&[&str]) -> Ran, model: &str, args: &[&str]) -> Vec<u32> {
    let folder = checkpoint(model);
    let ran = ran(&[&["--model", folder.to_str().unwrap(), "--tokens", "5,99,120", "--generate", "12"], args].concat());
    assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{}", ran.out);
    let (_, tokens) = ran.out.split_once("Next tokens\n").expect(&ran.out);
    tokens.lines().next().unwrap().split_whitespace().map(|id| id.parse().unwrap()).collect()
}

const TINY: &str = "tiny-dbrx-f32";

#[test]
fn a_seed_decides_what_is_drawn() {
    let drawn = |args: &[&str]| tokens(|args| run(args), TINY, args);
    let of = |seed: &str| drawn(&["--temperature", "2", "--seed", seed]);
    let greedy = drawn(&[]);
    assert_eq!(of("1"), of("1"));
    assert!(of("1") != of("2") && of("1") != greedy && of("2") != greedy);
    assert_eq!(of("0"), drawn(&["--temperature", "2"]));
    // Of the smallest share there is one token: the likeliest.
    assert_eq!(drawn(&["--temperature", "2", "--top-p", "1e-6"]), greedy);
    assert_eq!(drawn(&["--top-p", "1"]), drawn(&["--temperature", "1"]));
    // What runs beside a sequence changes nothing of what it draws.
    let threads = ["--temperature", "2", "--seed", "1", "--threads", "3", "--chunk", "2"];
    assert_eq!(drawn(&threads), of("1"));
}

#[test]
fn temperatures_and_shares_that_are_none() {
    for (args, want) in [
        (["--temperature", "0"], "must be a positive number"),
        (["--temperature", "-1"], "must be a positive number"),
        (["--temperature", "nan"], "must be a positive number"),
        (["--temperature", "inf"], "must be a positive number"),
        (["--top-p", "0"], "must be above 0, and at most 1"),
        (["--top-p", "1.01"], "must be above 0, and at most 1"),
        (["--seed", "-1"], "invalid digit"),
    ] {
        let ran = run(&args);
        assert!(ran.code == 2 && ran.err.contains(want), "{args:?}: {}", ran.err);
    }
    let ran = run(&["--check", "x", "--temperature", "1"]);
    assert!(ran.code == 2 && ran.err.contains("cannot be used with"), "{}", ran.err);
}

mod devices {
    use dropless_kit::device;

    use super::*;
    use crate::fixture::{Folder, run_on};

    /// A graph draws what its launches one by one draw, which is how a run that shows its layers decodes; and
    /// what the CPU draws, whose logits differ by roundings.
    #[test]
    fn a_graph_draws_as_its_launches_do() {
        let (driver, stream) = device::emulated();
        let args = ["--temperature", "2", "--top-p", "0.9", "--seed", "7", "--layers", "1"];
        let graph = tokens(|args| run_on(stream.device(), args), TINY, &args);
        let folder = Folder::new();
        let dump = folder.file("dump.safetensors");
        let shown = [&args[..], &["--dump", dump.to_str().unwrap(), "--dump-layers"]].concat();
        assert_eq!(tokens(|args| run_on(stream.device(), args), TINY, &shown), graph);
        assert_eq!(tokens(|args| run(args), TINY, &args), graph);
        assert!(driver.reports().is_empty());
    }
}
