#!/usr/bin/env python3
"""This crate and llama.cpp on the same GGUF files, in turn: tokens per second of a prompt of 512 and of
decoding after it, beside the machine's ceilings.

    cargo build --release --example lm
    pip install numpy gguf; python3 benches/peers/gguf_model.py /tmp/models
    LLAMA_BENCH=.../llama-bench python3 benches/peers/llama_cpp.py /tmp/models/*.gguf --rounds 3 [--out FILE]

Needs llama.cpp's own `llama-bench`, in PATH or named by LLAMA_BENCH, and gcc for the ceilings. Without one
of them the last line says what is missing, and the exit code is 0. In llama.cpp's source, for this machine:

    cmake -S . -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON
    cmake --build build --target llama-bench

llama.cpp runs as it does by default, with weights repacked at load, and without: which one is faster depends
on type and phase. This crate is compared with the default, and with the faster one of each round. The
ceilings are taken right before and right after each run. Shares: decode by the bytes of the weights that a
token needs over the mean of both read rates (the KV cache, a few percent more, is not counted); prefill by
the FLOP of the matrix products over the mean of both f32 rates, which integer products may pass. Figures are
medians over the rounds; a ratio or a share is taken within one round. The load average is recorded as well:
llama.cpp's threads wait for one another hundreds of times per token. Where other programs run, its figures
fall much further than the ceilings do, and mean nothing.
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
REPACKED = "llama.cpp"
PROGRAMS = ("dropless", REPACKED, "llama.cpp --repack 0")


def processor():
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def find():
    """llama-bench, or why there is none."""
    named = os.environ.get("LLAMA_BENCH")
    path = shutil.which(named or "llama-bench")
    if path:
        return path, None
    if named:
        return None, f"LLAMA_BENCH names no program: {named}"
    return None, "no llama-bench in PATH, and LLAMA_BENCH names none"


def missing():
    """What this machine lacks, as a sentence; None if it lacks nothing."""
    for module in ("numpy", "gguf"):
        if not importlib.util.find_spec(module):
            return f"this Python has no {module}"
    return find()[1] or (None if shutil.which("gcc") else "no gcc for the ceilings")


def costs(model):
    """What a token needs: bytes of the weights that decoding reads, FLOP of the products of the layers and
    of the head."""
    import gguf

    reader = gguf.GGUFReader(model)
    field = lambda name: reader.fields[name].contents()
    family = field("general.architecture")
    active = field(f"{family}.expert_used_count") / field(f"{family}.expert_count")
    cost = {"file_bytes": Path(model).stat().st_size, "bytes_per_token": 0, "layer_flop": 0, "head_flop": 0}
    for tensor in reader.tensors:
        if len(tensor.shape) < 2 or tensor.name.startswith("token_embd"):
            continue
        share = active if len(tensor.shape) == 3 else 1
        cost["bytes_per_token"] += round(share * int(tensor.n_bytes))
        part = "head_flop" if tensor.name.startswith("output") else "layer_flop"
        cost[part] += round(2 * share * int(tensor.n_elements))
    return cost


def bench(model, threads, repack, options):
    """One test of llama-bench, in a process of its own."""
    settings = {
        "-m": model,
        "-t": threads,
        "--repack": int(repack),
        "-ngl": 0,
        "-r": 1,
        "-o": "json",
        **options,
    }
    command = [find()[0], *(str(word) for setting in settings.items() for word in setting)]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        sys.exit(f"{' '.join(command)}\n{out.stderr}")
    return json.loads(out.stdout)[0]


def measure(model, threads, repack, prompt, decode):
    """Tokens per second of llama.cpp in both phases: of a prompt, and of decoding after as many tokens."""
    prefill = bench(model, threads, repack, {"-p": prompt, "-n": 0})
    decoding = bench(model, threads, repack, {"-p": 0, "-n": decode, "-d": prompt})
    return {
        "peer": f"llama.cpp {prefill['build_commit']}",
        "prefill_tokens_per_s": prefill["avg_ts"],
        "decode_tokens_per_s": decoding["avg_ts"],
    }


def ours(args, model):
    """One run of this crate."""
    tokens = ",".join(str(1 + token % 1000) for token in range(args.prompt_tokens))
    command = [args.example, "--model", model, "--tokens", tokens, "--generate", args.decode_tokens]
    command = list(map(str, [*command, "--threads", args.threads, "--json"]))
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        sys.exit(f"{' '.join(command)}\n{out.stderr}")
    run = json.loads(out.stdout.strip().splitlines()[-1])
    rate = lambda phase: run[f"{phase}_tokens"] / run[f"{phase}_s"]
    return {"prefill_tokens_per_s": rate("prefill"), "decode_tokens_per_s": rate("decode")}


def one_round(args, ceilings):
    """A row for every model and every program, with the means of the ceilings around it."""

    def around():
        rates = {"read_gb_per_s": ceilings.read(12), "sgemm_gflops": ceilings.sgemm(3)}
        time.sleep(0.2)  # OpenBLAS's threads go on waiting busily for a while
        return rates | {"load": os.getloadavg()[0]}

    rows, before = [], around()
    for model in args.models:
        for program in PROGRAMS:
            if program == "dropless":
                row = ours(args, model)
            else:
                repack = program == REPACKED
                row = measure(model, args.threads, repack, args.prompt_tokens, args.decode_tokens)
            after = around()
            row["ceilings"] = {name: (before[name] + after[name]) / 2 for name in after}
            rows.append({"model": model.name, "program": program, **row})
            before = after
    return rows


def tabulate(rounds, cost, prompt):
    """One entry per row of a round: medians over the rounds."""
    entries = []
    for number, first in enumerate(rounds[0]):
        runs, need = [rows[number] for rows in rounds], cost[first["model"]]
        over = lambda f: float(f"{statistics.median(map(f, runs)):.4g}")
        gigabytes = lambda run: run["decode_tokens_per_s"] * need["bytes_per_token"] / 1e9
        flop = need["layer_flop"] + need["head_flop"] / prompt
        gigaflops = lambda run: run["prefill_tokens_per_s"] * flop / 1e9
        entries.append({"model": first["model"], "program": first["program"], **need})
        entries[-1] |= {
            "prefill_tokens_per_s": over(lambda run: run["prefill_tokens_per_s"]),
            "prefill_gflops": over(gigaflops),
            "prefill_over_sgemm": over(lambda run: gigaflops(run) / run["ceilings"]["sgemm_gflops"]),
            "decode_tokens_per_s": over(lambda run: run["decode_tokens_per_s"]),
            "decode_gb_per_s": over(gigabytes),
            "decode_share_of_read": over(lambda run: gigabytes(run) / run["ceilings"]["read_gb_per_s"]),
            "read_gb_per_s": over(lambda run: run["ceilings"]["read_gb_per_s"]),
            "sgemm_gflops": over(lambda run: run["ceilings"]["sgemm_gflops"]),
            "load": over(lambda run: run["ceilings"]["load"]),
        }
        if first["program"] == "dropless":
            for phase in ("prefill", "decode"):
                entries[-1] |= ratios(rounds, first["model"], phase)
    return entries


def ratios(rounds, model, phase):
    """This crate's rate over llama.cpp's by default, and over its faster one: medians over the rounds."""
    by_default, over_faster = [], []
    for rows in rounds:
        rates = {row["program"]: row[f"{phase}_tokens_per_s"] for row in rows if row["model"] == model}
        ours = rates.pop("dropless")
        by_default.append(ours / rates[REPACKED])
        over_faster.append(ours / max(rates.values()))
    median = lambda values: float(f"{statistics.median(values):.4g}")
    return {f"{phase}_times_peer": median(by_default), f"{phase}_times_faster_peer": median(over_faster)}


def main():
    parser = argparse.ArgumentParser(description="this crate and llama.cpp on GGUF files")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--decode-tokens", type=int, default=32)
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    parser.add_argument("--example", type=Path, default=target / "release/examples/lm", help="of this crate")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    lacking = missing()
    if lacking:
        print(f"skipped: {lacking}")
        return
    # Before numpy is loaded, which counts threads once.
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(args.threads)
    from ceilings import Ceilings

    cost = {model.name: costs(model) for model in args.models}
    ceilings, rounds = Ceilings(), []
    for number in range(args.rounds):
        rounds.append(one_round(args, ceilings))
        loads = ", ".join(f"{row['ceilings']['load']:.1f}" for row in rounds[-1])
        print(f"round {number + 1} of {args.rounds}: load {loads}", file=sys.stderr)
    peer = next(row["peer"] for row in rounds[0] if "peer" in row)
    record = {"peer": peer, "processor": processor(), "threads": args.threads}
    record |= {"prompt_tokens": args.prompt_tokens, "decode_tokens": args.decode_tokens}
    record["table"] = tabulate(rounds, cost, args.prompt_tokens)
    print(json.dumps(record, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**record, "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
