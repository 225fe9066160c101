#!/usr/bin/env python3
"""Hugging Face transformers on the CPU with a random DBRX in f32: prefill, then greedy-free decode of one sequence. One JSON line.

    python3 hf_dbrx.py mid-dbrx.json --threads 2        or --serve: the better of two repeats for every line of input

Weights are N(0, 0.02), norm weights 1. Works with transformers 4.57 to 5.23, which hold models/dbrx.
"""
import argparse
import json
import os
import statistics
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"
parser = argparse.ArgumentParser()
parser.add_argument("config")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--prompt-tokens", type=int, default=512)
parser.add_argument("--decode-tokens", type=int, default=16)
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--serve", action="store_true")
args = parser.parse_args()

import torch  # noqa: E402  (after the environment is set)
import transformers  # noqa: E402

torch.set_num_threads(args.threads)
config = transformers.DbrxConfig(**json.load(open(args.config)))
if transformers.__version__.startswith("5"):  # this version does not read attn_config.rope_theta by itself
    config.rope_parameters = {"rope_theta": float(config.attn_config.rope_theta), "rope_type": "default"}
model = transformers.DbrxForCausalLM(config).eval()
torch.manual_seed(1234)
draw = torch.Generator().manual_seed(5)


def repeat():
    """Tokens per second of a prefill and of the decode behind it."""
    prompt = torch.randint(0, config.vocab_size, (1, args.prompt_tokens), generator=draw)
    steps = torch.randint(0, config.vocab_size, (args.decode_tokens, 1, 1), generator=draw)
    start = time.perf_counter()
    cache = model(prompt, use_cache=True).past_key_values
    middle = time.perf_counter()
    for step in steps:
        cache = model(step, past_key_values=cache, use_cache=True).past_key_values
    return args.prompt_tokens / (middle - start), args.decode_tokens / (time.perf_counter() - middle)


def report(choose, repeats):
    prefill, decode = zip(*(repeat() for _ in range(repeats)))
    peer = f"transformers {transformers.__version__}, torch {torch.__version__}, f32"
    rates = {"prefill_tokens_per_s": choose(prefill), "decode_tokens_per_s": choose(decode)}
    print(json.dumps({"peer": peer, **rates}), flush=True)


with torch.no_grad():
    for parameter in model.parameters():
        parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0, 0.02)
    repeat()  # the first warms up
    if args.serve:
        for _ in sys.stdin:
            report(max, 2)  # one may find cold what the wait has cooled
    else:
        report(statistics.median, args.repeats)
