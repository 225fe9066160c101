#!/usr/bin/env python3
"""Times attention as a PyTorch user has it, at the cases of benches/gpu/attention_cases.txt.

    python3 benches/peers/gpu_attention.py [--what attention_decode] [--case "32 x 1 of 4096"] [--out FILE] [--rehearse]

The peer is torch.nn.functional.scaled_dot_product_attention with its FlashAttention and its cuDNN back end,
each alone, on tensors [B, tokens, heads, d] as a projection leaves them, KV heads not repeated (enable_gqa).
Figures are made as in gpu_moe.py, a line of JSON each: medians of 7 batches, here of CUDA graphs of several
calls. Those of a decode step take turns with caches that are more together than the L2 cache holds, as in
benches/gpu.rs. The GPU's two ceilings are measured first, in the same process.

Before it is timed, the first and the last token of each result are compared with a softmax in f32: a step's
last query sees the last key. A back end that does not serve a case is a line with `refused`, and costs
nothing; a case that none serves, and a result that is wrong, is a line with an `error`, and the exit code is
1. `--rehearse` runs small cases on the CPU, with the back ends that PyTorch has there: its times mean nothing.
"""

import argparse
import math
import pathlib
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from gpu_moe import Record, Refused, ceilings, first_line, graph_of

CASES = pathlib.Path(__file__).resolve().parent.parent / "gpu" / "attention_cases.txt"
COLD_BYTES, CALLS = 256 << 20, 8  # as in benches/gpu/attention.rs
BACK_ENDS = {
    "cuda": {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION},
    "cpu": {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA math": SDPBackend.MATH},
}


class Case:
    """A line of the file; its name is the one that benches/gpu.rs gives it."""

    def __init__(self, line):
        self.place, function, *numbers = line.split()
        self.heads, self.kv_heads, self.d, self.batch, self.history, self.new = map(int, numbers)
        if function not in ("prefill", "decode"):
            raise ValueError(f"{CASES}: {line}")
        self.what, self.decodes = f"attention_{function}", function == "decode"
        self.length = self.history + self.new
        shape = f"{self.heads}/{self.kv_heads} x {self.d}"
        self.name = f"{shape}, {self.batch} x {self.new} of {self.length}"

    def flop(self):
        diagonal = self.new * (self.new + self.decodes) / 2
        return 4 * self.d * self.heads * self.batch * (self.new * self.history + diagonal)

    def kv_bytes(self):
        return 2 * 2 * self.d * self.kv_heads * self.batch * self.length


def cases(place):
    lines = (line for line in CASES.read_text().splitlines() if line and not line.startswith("#"))
    return [case for case in map(Case, lines) if case.place == place]


def seen(back_end, queries, keys, device):
    """What says that a step's last token sees all keys: a word, or for other than FlashAttention a mask."""
    if queries == 1:
        return {}
    if queries == keys:
        return dict(is_causal=True)
    if back_end == SDPBackend.FLASH_ATTENTION:
        return dict(attn_mask=causal_lower_right(queries, keys))
    return dict(attn_mask=torch.ones(queries, keys, device=device, dtype=torch.bool).tril(keys - queries))


def attend(q, k, v, mask):
    return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **mask)


def check(case, out, q, k, v):
    """The first and the last token of the last sequence. Weights are rounded to bf16, and so is the result, each
    by at most 2^-9 of what it is; twice that is allowed for each, which leaves room for sums in f32."""
    group = case.heads // case.kv_heads
    for token in {0, case.new - 1}:
        seen = case.history + token + 1
        keys, values = (part[-1, :, :seen].float().repeat_interleave(group, 0) for part in (k, v))
        scores = torch.einsum("hd,hkd->hk", q[-1, :, token].float(), keys) / math.sqrt(case.d)
        weights = scores.softmax(-1)[:, None]
        want, sizes = (weights @ values)[:, 0], (weights @ values.abs())[:, 0]
        far = ((out[-1, :, token].float() - want).abs() - 2**-8 * (want.abs() + sizes)).max().item()
        if not far <= 0:
            raise ValueError(f"token {token} is off by {far:e} more than rounding explains")


def inputs(case, device):
    """A query, and as many caches as are cold in turn."""
    caches = min(64, -(-COLD_BYTES // case.kv_bytes())) if case.decodes else 1
    caches = min(caches, 2) if device == "cpu" else caches

    def random(heads, tokens):
        return torch.randn(case.batch, tokens, heads, case.d, device=device, dtype=torch.bfloat16).transpose(
            1, 2
        )

    q = random(case.heads, case.new)
    return q, [[random(case.kv_heads, case.length) for _ in "kv"] for _ in range(caches)]


def measure(record, case, device):
    q, caches = inputs(case, device)
    calls = -(-CALLS // len(caches)) * len(caches) if device == "cuda" else len(caches)
    moved = case.kv_bytes() if case.decodes else 0

    def prepared(back_end):
        mask = seen(back_end, case.new, case.length, device)
        try:
            with sdpa_kernel(back_end):
                out = attend(q, *caches[0], mask)
        except (RuntimeError, NotImplementedError) as error:
            raise Refused(first_line(error)) from error
        check(case, out, q, *caches[0])

        def all_calls():
            with sdpa_kernel(back_end):
                for i in range(calls):
                    attend(q, *caches[i % len(caches)], mask)

        return graph_of(all_calls) if device == "cuda" else all_calls

    served = []
    for form, back_end in BACK_ENDS[device].items():
        at = dict(flop=case.flop(), bytes_moved=moved, calls=calls, case=case.name)
        made = lambda back_end=back_end: prepared(back_end)
        served.append(record.figure(case.what, form, case.batch * case.new, made, device, **at))
    if not any(served):
        raise RuntimeError("no back end serves this case")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what")
    parser.add_argument("--case", default="")
    parser.add_argument("--out")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("no GPU that torch can use; --rehearse runs on the CPU")
    device, place = ("cpu", "rehearsal") if options.rehearse else ("cuda", "gpu")
    torch.manual_seed(1)
    record = Record(options.out, device)
    ceilings(record, device)
    for case in cases(place):
        if options.what not in (None, case.what) or options.case not in case.name:
            continue
        try:
            measure(record, case, device)
        except Exception as error:
            record.failed = True
            record.write(
                what=case.what, form="", case=case.name, tokens=case.batch * case.new, error=first_line(error)
            )
    sys.exit(record.failed)


if __name__ == "__main__":
    main()
