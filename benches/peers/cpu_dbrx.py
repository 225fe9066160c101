#!/usr/bin/env python3
"""Prefill and decode of a random DBRX on the CPU: this crate, Hugging Face transformers and the machine's ceilings, in turn.

    cargo build --release --example dbrx
    python3 benches/peers/cpu_dbrx.py --rounds 5 --out record.json          or, round by round, --rounds 1 --append

A machine's speed drifts within seconds, so the ceilings are taken right before and right after every run of this crate, as means
over about as long as it runs, and the peer, which is kept waiting, right after that. Shares: prefill by the FLOP of the matrix
products over the mean of both sgemm rates, decode by the bytes of the weights that a token needs over the mean of both read
rates. The peer has the better of two repeats. Every figure is the median over the rounds of a ratio taken within one round.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def costs(config):
    """(FLOP of the products per token, head excluded; FLOP of the head per token; weights a decoded token reads)."""
    d, layers, vocab = config["d_model"], config["n_layers"], config["vocab_size"]
    ffn, attn = config["ffn_config"], config["attn_config"]
    kv = attn["kv_n_heads"] * d // config["n_heads"]
    dense = d * (d + 2 * kv) + d * d + d * ffn["moe_num_experts"]
    experts = 3 * d * ffn["ffn_hidden_size"] * ffn["moe_top_k"]
    return 2 * layers * (dense + experts), 2 * d * vocab, layers * (dense + experts) + d * vocab


class Peer:
    """Hugging Face transformers in a process of its own, which waits between repeats."""

    def __init__(self, args):
        command = [sys.executable, HERE / "hf_dbrx.py", args.config, "--serve", "--threads", args.threads, "--prompt-tokens", args.prompt_tokens]
        self.process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def repeat(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def run(args, weights, batch):
    """One run of this crate."""
    # Batches decode behind a shorter prompt: their prefill is not what is asked.
    tokens = args.prompt_tokens if batch == 1 else args.batch_prompt_tokens
    command = [args.example, "--random", args.config, "--weights", weights, "--random-tokens", tokens, "--generate", args.decode_tokens]
    command += ["--batch", batch, "--threads", args.threads, "--json"]
    out = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if out.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{out.stderr}")
    return json.loads(out.stdout.strip().splitlines()[-1])


def round_of(args, batches, ceilings, peer):
    """Every run, with the means of the ceilings around it and the peer's repeat behind it."""
    def around():
        rates = {"read_gb_per_s": ceilings.read(24), "sgemm_gflops": ceilings.sgemm(4)}
        time.sleep(0.2)  # OpenBLAS's threads go on waiting busily for a while
        return rates

    row, before = {}, around()
    for batch in (1, *batches):
        for weights in ("f32", "bf16"):
            ours = run(args, weights, batch)
            after = around()
            ours["ceilings"] = {name: (before[name] + after[name]) / 2 for name in after}
            if peer and batch == 1:
                ours["peer"] = peer.repeat()
                after = around()
            row[weights if batch == 1 else f"{weights} x{batch}"], before = ours, after
    return row


def tabulate(rounds, batches, config):
    layer_flop, head_flop, decode_weights = costs(config)
    prefill = lambda run: run["prefill_tokens"] / run["prefill_s"]
    decode = lambda run: run["decode_tokens"] / run["decode_s"]
    ceilings = lambda name: [run["ceilings"][name] for row in rounds for run in row.values()]
    table = {name: statistics.median(ceilings(name)) for name in ("sgemm_gflops", "read_gb_per_s")}
    for weights, size in (("f32", 4), ("bf16", 2)):
        over = lambda f, name=weights: statistics.median(f(row[name]) for row in rounds)
        sgemm = lambda run, rate: rate / 1e9 / run["ceilings"]["sgemm_gflops"]
        table[f"prefill {weights}"] = {
            "tokens_per_s": over(prefill),
            "share_of_sgemm": over(lambda run: sgemm(run, prefill(run) * layer_flop + head_flop / run["prefill_s"])),
        }
        table[f"decode {weights}"] = {
            "tokens_per_s": over(decode),
            "share_of_read": over(lambda run: decode(run) * decode_weights * size / 1e9 / run["ceilings"]["read_gb_per_s"]),
        }
        for batch in batches:
            table[f"decode {weights} x{batch}"] = {
                "tokens_per_s": over(decode, f"{weights} x{batch}"),
                "share_of_sgemm": over(lambda run: sgemm(run, decode(run) * (layer_flop + head_flop)), f"{weights} x{batch}"),
            }
        if "peer" in rounds[0][weights]:
            for phase, rate in (("prefill", prefill), ("decode", decode)):
                table[f"{phase} {weights}"]["peer_tokens_per_s"] = over(lambda run: run["peer"][f"{phase}_tokens_per_s"])
                table[f"{phase} {weights}"]["times_peer"] = over(lambda run: rate(run) / run["peer"][f"{phase}_tokens_per_s"])
            # The peer computes the head for every token of a prompt, this crate for the last: the ratio at equal work.
            equal = table[f"prefill {weights}"]["times_peer"] / (1 + head_flop / layer_flop)
            table[f"prefill {weights}"]["times_peer_at_equal_work"] = equal
            table["peer"] = rounds[0][weights]["peer"]["peer"]
    return table


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default=HERE / "mid-dbrx.json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--batch-prompt-tokens", type=int, default=32)
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--batches", default="8,32", help="further decode batches, f32 and bf16")
    parser.add_argument("--example", type=Path, default=Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release/examples/dbrx")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--append", action="store_true", help="to the rounds that --out holds, made with the same options")
    args = parser.parse_args()

    # Before numpy is loaded, which counts threads once.
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(args.threads)
    from ceilings import Ceilings

    batches = [int(batch) for batch in filter(None, args.batches.split(","))]
    earlier = json.loads(args.out.read_text()) if args.append and args.out.exists() else {}
    rounds = earlier.get("rounds", [])
    ceilings, peer = Ceilings(), None if args.no_peer else Peer(args)
    if peer:
        peer.repeat()
    for number in range(args.rounds):
        rounds.append(round_of(args, batches, ceilings, peer))
        print(f"round {number + 1} of {args.rounds}: {rounds[-1]['f32']['ceilings']}", file=sys.stderr)

    table = tabulate(rounds, batches, json.loads(args.config.read_text()))
    print(json.dumps(table, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        machine = earlier.get("machine", {"processor": platform.processor() or platform.machine(), "threads": args.threads})
        args.out.write_text(json.dumps({**earlier, "machine": machine, "table": table, "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
