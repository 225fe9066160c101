#!/usr/bin/env python3
"""Sets the records of benches/gpu.rs and gpu_moe.py side by side: microseconds, share of the nearer ceiling, ratio to the peer.

    python3 benches/peers/gpu_table.py dropless.jsonl torch.jsonl

A record that is missing, as of a machine without PyTorch, leaves its columns empty.
"""

import json
import sys


def records(path):
    try:
        with open(path) as file:
            return [json.loads(line) for line in file]
    except FileNotFoundError:
        return []


def share(value, ceiling):
    return f"{value / ceiling:.0%}" if ceiling else "-"


def main():
    ours, torch = map(records, sys.argv[1:3])
    matmul = max((r["tflops"] for r in torch if r["what"] == "matmul"), default=0)
    copy = max((r["gb_s"] for r in torch if r["what"] == "copy"), default=0)
    print(f"Ceilings of the same run: {matmul:.0f} TFLOP/s (8192^3 bf16), {copy:.0f} GB/s (copy).\n" if torch else "No record of the peer.\n")
    print("| T | what | form | us | TFLOP/s | of matmul | weights GB/s | of copy | peer us | ratio |")
    print("|--:|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for r in ours:
        peers = [p["us"] for p in torch if (p["what"], p["tokens"]) == (r["what"], r["tokens"])]
        peer = min(peers) if peers else None
        beside = f"{peer:.0f} | {peer / r['us']:.2f}" if peer else "- | -"
        print(f"| {r['tokens']} | {r['what']} | {r['form']} | {r['us']:.0f} | {r['tflops']:.0f} | {share(r['tflops'], matmul)} | {r['weight_gb_s']:.0f} | {share(r['weight_gb_s'], copy)} | {beside} |")


if __name__ == "__main__":
    main()
