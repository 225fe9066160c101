#!/usr/bin/env python3
"""Sets the records of benches/gpu.rs and gpu_moe.py side by side: microseconds, share of the nearer ceiling, ratio to the peer.

    python3 benches/peers/gpu_table.py dropless.jsonl torch.jsonl [again.jsonl]

A record that is missing, as of a machine without PyTorch, leaves its columns empty. `again` is a second run of the first, for drift.
Figures that could not be had, and results that differ, are listed below.
"""

import json
import sys


def records(path):
    try:
        with open(path) as file:
            return [json.loads(line) for line in file]
    except OSError:
        return []


def share(value, ceiling):
    return f"{value / ceiling:.0%}" if ceiling else "-"


def main():
    ours, torch, again = map(records, (sys.argv[1:] + ["", ""])[:3])
    figures = [r for r in ours if "us" in r]
    matmul = max((r["tflops"] for r in torch if r["what"] == "matmul" and "us" in r), default=0)
    copy = max((r["gb_s"] for r in torch if r["what"] == "copy" and "us" in r), default=0)
    for r in ours + again:
        if r["what"] == "card":
            print(f"{r['device']}, {r['at']}: {r['nvidia_smi'].splitlines()[-1]}\n")
    print(f"Ceilings of the same run: {matmul:.0f} TFLOP/s (8192^3 bf16), {copy:.0f} GB/s (copy).\n" if torch else "No record of the peer.\n")
    print("| T | what | form | us | TFLOP/s | of matmul | weights GB/s | of copy | peer us | ratio | again |")
    print("|--:|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for r in sorted(figures, key=lambda r: r["tokens"]):
        peers = [p["us"] for p in torch if (p["what"], p["tokens"]) == (r["what"], r["tokens"]) and "us" in p]
        peer = min(peers) if peers else None
        beside = f"{peer:.0f} | {peer / r['us']:.2f}" if peer else "- | -"
        later = [a["us"] / r["us"] - 1 for a in again if "us" in a and all(a[key] == r[key] for key in ("what", "form", "tokens"))]
        rates = f"{r['tflops']:.0f} | {share(r['tflops'], matmul)} | {r['weight_gb_s']:.0f} | {share(r['weight_gb_s'], copy)}"
        drift = f"{later[0]:+.1%}" if later else "-"
        print(f"| {r['tokens']} | {r['what']} | {r['form']} | {r['us']:.0f} | {rates} | {beside} | {drift} |")
    for r in ours + again + torch:
        name = f"{r['what']} {r.get('form', '')} at T = {r.get('tokens', '-')}"
        if "error" in r:
            print(f"\nMissing: {name}: {r['error']}")
        differ = {key: r[key] for key in r if key.startswith("differ") and r[key]}
        if differ:
            print(f"\nDiffers: {name}: {differ}")


if __name__ == "__main__":
    main()
