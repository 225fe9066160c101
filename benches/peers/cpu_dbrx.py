#!/usr/bin/env python3
"""Prefill and decode of a random DBRX on the CPU: this crate, Hugging Face transformers and the machine's ceilings, in turn.

    cargo build --release --example dbrx
    python3 benches/peers/cpu_dbrx.py --rounds 5 --out record.json          or, round by round, --rounds 1 --append

Shares: prefill by the FLOP of the matrix products over the sgemm ceiling, decode by the bytes of the weights that a token needs
over the read ceiling. Every figure is the median over the rounds of a ratio taken within one round.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
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


def last_json(command, env):
    out = subprocess.run(command, capture_output=True, text=True, env=env)
    if out.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{out.stderr}")
    return json.loads(out.stdout.strip().splitlines()[-1])


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

    config = json.loads(args.config.read_text())
    layer_flop, head_flop, decode_weights = costs(config)
    threads = str(args.threads)
    env = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
    def ours(weights, batch=1):
        # Batches decode behind a shorter prompt: their prefill is not what is asked.
        tokens = args.prompt_tokens if batch == 1 else args.batch_prompt_tokens
        command = [args.example, "--random", args.config, "--weights", weights, "--random-tokens", tokens, "--generate", args.decode_tokens]
        return last_json([*map(str, command), "--batch", str(batch), "--threads", threads, "--json"], env)

    earlier = json.loads(args.out.read_text()) if args.append and args.out.exists() else {}
    rounds = earlier.get("rounds", [])
    for number in range(args.rounds):
        row = {"ceilings": last_json([sys.executable, HERE / "ceilings.py"], env)}
        for weights in ("f32", "bf16"):
            row[weights] = ours(weights)
            for batch in filter(None, args.batches.split(",")):
                row[f"{weights} x{batch}"] = ours(weights, int(batch))
        if not args.no_peer:
            command = [sys.executable, HERE / "hf_dbrx.py", args.config, "--threads", threads, "--prompt-tokens", args.prompt_tokens, "--repeats", "2"]
            row["peer"] = last_json([*map(str, command), "--decode-tokens", "16"], env)
        rounds.append(row)
        print(f"round {number + 1} of {args.rounds}: {row['ceilings']}", file=sys.stderr)

    median = lambda f: statistics.median(f(row) for row in rounds)
    prefill = lambda run: run["prefill_tokens"] / run["prefill_s"]
    decode = lambda run: run["decode_tokens"] / run["decode_s"]
    flop = lambda row, name: (prefill(row[name]) * layer_flop + head_flop / row[name]["prefill_s"]) / 1e9
    table = {"sgemm_gflops": median(lambda r: r["ceilings"]["sgemm_gflops"]), "read_gb_per_s": median(lambda r: r["ceilings"]["read_gb_per_s"])}
    for weights, size in (("f32", 4), ("bf16", 2)):
        table[f"prefill {weights}"] = {
            "tokens_per_s": median(lambda r: prefill(r[weights])),
            "share_of_sgemm": median(lambda r: flop(r, weights) / r["ceilings"]["sgemm_gflops"]),
        }
        table[f"decode {weights}"] = {
            "tokens_per_s": median(lambda r: decode(r[weights])),
            "share_of_read": median(lambda r: decode(r[weights]) * decode_weights * size / 1e9 / r["ceilings"]["read_gb_per_s"]),
        }
        for batch in filter(None, args.batches.split(",")):
            name = f"{weights} x{batch}"
            table[f"decode {name}"] = {
                "tokens_per_s": median(lambda r: decode(r[name])),
                "share_of_sgemm": median(lambda r: decode(r[name]) * (layer_flop + head_flop) / 1e9 / r["ceilings"]["sgemm_gflops"]),
            }
    if not args.no_peer:
        table["peer"] = {"name": rounds[0]["peer"]["peer"]}
        for phase, rate in (("prefill", prefill), ("decode", decode)):
            table["peer"][f"{phase}_tokens_per_s"] = median(lambda r: r["peer"][f"{phase}_tokens_per_s"])
            for weights in ("f32", "bf16"):
                table[f"{phase} {weights}"]["times_peer"] = median(lambda r: rate(r[weights]) / r["peer"][f"{phase}_tokens_per_s"])
        # The peer computes the head for every token of a prompt, this crate for the last: the ratio at equal work.
        more = 1 + head_flop / layer_flop
        for weights in ("f32", "bf16"):
            table[f"prefill {weights}"]["times_peer_at_equal_work"] = table[f"prefill {weights}"]["times_peer"] / more
    print(json.dumps(table, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        machine = earlier.get("machine", {"processor": platform.processor() or platform.machine(), "threads": args.threads})
        args.out.write_text(json.dumps({**earlier, "machine": machine, "table": table, "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
