#!/usr/bin/env python3
"""Sets the records of one run side by side: microseconds, shares of the nearer ceiling, ratios to the peer.

    python3 benches/peers/gpu_table.py RECORD...

Records are those of benches/gpu.rs, of gpu_moe.py and gpu_attention.py, whose lines name a `torch`, and of
the models' steps (dbrx.jsonl and serving.jsonl of benches/gpu.py), in any order. A record that is missing,
as of a machine without PyTorch, leaves its columns empty. A figure that comes twice was measured again,
which gives the drift. Ceilings are the largest product and the fastest copy of all records. Figures that
could not be had, and results that differ, are listed below.
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
    return f"{value / ceiling:.0%}" if value and ceiling else "-"


def number(value, digits=0):
    return "-" if value is None else f"{value:.{digits}f}"


def key(r):
    return r["what"], r.get("form", ""), r.get("case", ""), r.get("tokens", 0)


def table(heads, rows):
    """Text on the left, numbers on the right; a head that ends with a colon is one of text."""
    if not rows:
        return
    print("| " + " | ".join(head.rstrip(":") for head in heads) + " |")
    print("|" + "|".join("---" if head.endswith(":") else "--:" for head in heads) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print()


class Run:
    """All lines of a run, sorted by what they are."""

    def __init__(self, lines):
        self.lines = lines
        figures = [r for r in lines if "us" in r]
        most = lambda what, rate: max(
            (r[rate] for r in figures if r["what"] == what and rate in r), default=0
        )
        self.matmul = most("matmul", "tflops")
        self.copy = max(most("copy", "gb_s"), most("copy", "weight_gb_s"))
        self.torch = [r for r in figures if "torch" in r]
        self.ours, self.again = {}, {}
        for r in figures:
            if "torch" not in r and r["what"] not in ("matmul", "copy"):
                (self.again if key(r) in self.ours else self.ours)[key(r)] = r

    def peers(self, r):
        """What the peer's forms take for the same, by form."""
        same = lambda p: (p["what"], p.get("case", ""), p["tokens"]) == (
            r["what"],
            r.get("case", ""),
            r["tokens"],
        )
        return {p["form"]: p["us"] for p in self.torch if same(p)}

    def drift(self, r):
        later = self.again.get(key(r))
        return f"{later['us'] / r['us'] - 1:+.1%}" if later else "-"

    def products(self):
        rows = []
        for r in sorted((r for r in self.ours.values() if "case" not in r), key=lambda r: r["tokens"]):
            peer = min(self.peers(r).values(), default=None)
            rates = [
                number(r["tflops"]),
                share(r["tflops"], self.matmul),
                number(r["weight_gb_s"]),
                share(r["weight_gb_s"], self.copy),
            ]
            beside = [number(peer), number(peer and peer / r["us"], 2), self.drift(r)]
            rows.append([r["tokens"], r["what"], r["form"], number(r["us"]), *rates, *beside])
        heads = "T, what:, form:, us, TFLOP/s, of matmul, weights GB/s, of copy, peer us, ratio, again"
        table(heads.split(", "), rows)

    def attention(self):
        rows = []
        for r in (r for r in self.ours.values() if "case" in r):
            peers = self.peers(r)
            flash, cudnn, fastest = (
                peers.get("SDPA flash"),
                peers.get("SDPA cuDNN"),
                min(peers.values(), default=None),
            )
            rates = [
                number(r["tflops"]),
                share(r["tflops"], self.matmul),
                number(r["gb_s"] or None),
                share(r["gb_s"], self.copy),
            ]
            beside = [
                number(flash, 1),
                number(cudnn, 1),
                number(fastest and fastest / r["us"], 2),
                self.drift(r),
            ]
            rows.append([r["what"], r["case"], r["form"], number(r["us"], 1), *rates, *beside])
        heads = "what:, heads x width; sequences x tokens:, form:, us, TFLOP/s, of matmul, K and V GB/s, of copy, flash us, cuDNN us"
        table([*heads.split(", "), "times the faster", "again"], rows)

    def model(self):
        """A floor is the time that the ceiling takes for a step's products, or for its bytes, and nothing else."""
        rows = []
        for r in (r for r in self.lines if r["what"] in ("dbrx", "serving") and "error" not in r):
            prefill = r["prefill_tokens"] / r["prefill_s"]
            floor_s = r["prefill_flop"] / (self.matmul * 1e12) if self.matmul else None
            cells = [
                r.get("model", "dbrx"),
                r["batch"],
                r["prompt"],
                f"{r['layers']} of {r['of_layers']}",
                number(prefill),
            ]
            cells.append(share(floor_s, r["prefill_s"]))
            if r["decode_tokens"]:
                step_s = r["decode_s"] * r["batch"] / r["decode_tokens"]
                floor_s = r["decode_bytes"] / (self.copy * 1e9) if self.copy else None
                cells += [number(r["batch"] / step_s, 1), number(step_s * 1e3, 3), share(floor_s, step_s)]
            else:
                cells += ["-"] * 3
            rows.append(cells)
        heads = (
            "model:, sequences, prompt, layers, prefill tokens/s, floor / time, decode tokens/s, ms a step"
        )
        heads += ", floor / time"
        table(heads.split(", "), rows)

    def rest(self):
        for r in self.lines:
            name = " ".join(
                filter(
                    None,
                    [
                        r["what"],
                        r.get("form"),
                        r.get("case"),
                        f"at T = {r['tokens']}" if "tokens" in r else "",
                    ],
                )
            )
            if "error" in r:
                print(f"Missing: {name}: {r['error']}\n")
            if "refused" in r:
                print(f"Refused by the peer: {name}: {r['refused']}\n")
            differ = {field: r[field] for field in r if field.startswith("differ") and r[field]}
            if differ:
                print(f"Differs: {name}: {differ}\n")


def main():
    run = Run([r for path in sys.argv[1:] for r in records(path)])
    for r in run.lines:
        if r["what"] == "card":
            print(f"{r['device']}, {r['at']}: {r['nvidia_smi'].splitlines()[-1]}\n")
    print("" if any("torch" in r for r in run.lines) else "No record of the peer.\n")
    print(f"Ceilings of the same run: {run.matmul:.0f} TFLOP/s (8192^3 bf16), {run.copy:.0f} GB/s (copy).\n")
    run.products()
    run.attention()
    run.model()
    run.rest()


if __name__ == "__main__":
    main()
