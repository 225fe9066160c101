#!/usr/bin/env python3
"""Hugging Face transformers on the CPU with a random DBRX in f32: prefill, then greedy-free decode of one sequence. One JSON line.

    python3 hf_dbrx.py mid-dbrx.json --threads 2

Weights are N(0, 0.02), norm weights 1. Works with transformers 4.57 to 5.23, which hold models/dbrx.
"""
import argparse
import json
import os
import statistics
import time

os.environ["HF_HUB_OFFLINE"] = "1"
parser = argparse.ArgumentParser()
parser.add_argument("config")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--prompt-tokens", type=int, default=512)
parser.add_argument("--decode-tokens", type=int, default=16)
parser.add_argument("--repeats", type=int, default=3)
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
prefill, decode = [], []
with torch.no_grad():
    for parameter in model.parameters():
        parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0, 0.02)
    for repeat in range(args.repeats + 1):  # the first warms up
        prompt = torch.randint(0, config.vocab_size, (1, args.prompt_tokens), generator=draw)
        steps = torch.randint(0, config.vocab_size, (args.decode_tokens, 1, 1), generator=draw)
        start = time.perf_counter()
        cache = model(prompt, use_cache=True).past_key_values
        middle = time.perf_counter()
        for step in steps:
            cache = model(step, past_key_values=cache, use_cache=True).past_key_values
        if repeat:
            prefill.append(args.prompt_tokens / (middle - start))
            decode.append(args.decode_tokens / (time.perf_counter() - middle))
print(json.dumps({
    "peer": f"transformers {transformers.__version__}, torch {torch.__version__}, f32",
    "prefill_tokens_per_s": statistics.median(prefill),
    "decode_tokens_per_s": statistics.median(decode),
}))
