#!/usr/bin/env python3
"""Writes a checkpoint of seeded random weights for a DBRX config.json: what memory and disk figures are measured with.

    python3 make_checkpoint.py mid-dbrx.json /tmp/mid-dbrx --dtype bf16        needs numpy

bf16 is f32 with its lower half cut off. Tensors are written one after the other; no more than one is held in memory.
"""
import argparse
import json
from pathlib import Path

import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("config", type=Path)
parser.add_argument("folder", type=Path)
parser.add_argument("--dtype", choices=["f32", "bf16"], default="bf16")
parser.add_argument("--layers", type=int)
args = parser.parse_args()

config = json.loads(args.config.read_text())
if args.layers:
    config["n_layers"] = args.layers
d, vocab, ffn, attn = config["d_model"], config["vocab_size"], config["ffn_config"], config["attn_config"]
experts, kv = ffn["moe_num_experts"], attn["kv_n_heads"] * d // config["n_heads"]
stacked = [experts * ffn["ffn_hidden_size"], d]
shapes = {"transformer.wte.weight": [vocab, d]}
for i in range(config["n_layers"]):
    block, norm = f"transformer.blocks.{i}.", f"transformer.blocks.{i}.norm_attn_norm."
    shapes |= {norm + "norm_1.weight": [d], norm + "attn.Wqkv.weight": [d + 2 * kv, d], norm + "attn.out_proj.weight": [d, d]}
    shapes |= {norm + "norm_2.weight": [d], block + "ffn.router.layer.weight": [experts, d]}
    shapes |= {block + f"ffn.experts.mlp.{name}": stacked for name in ("w1", "v1", "w2")}
shapes |= {"transformer.norm_f.weight": [d], "lm_head.weight": [vocab, d]}

size, end, header = {"f32": 4, "bf16": 2}[args.dtype], 0, {}
for name, shape in shapes.items():
    begin, end = end, end + int(np.prod(shape)) * size
    header[name] = {"dtype": args.dtype.upper(), "shape": shape, "data_offsets": [begin, end]}
text = json.dumps(header).encode()
text += b" " * (-len(text) % 64)

args.folder.mkdir(parents=True, exist_ok=True)
(args.folder / "config.json").write_text(json.dumps(config, indent=2))
random = np.random.default_rng(1)
with open(args.folder / "model.safetensors", "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for shape in shapes.values():
        values = np.ones(shape, np.float32) if len(shape) == 1 else random.standard_normal(shape, np.float32) * np.float32(0.02)
        (values if args.dtype == "f32" else (values.view(np.uint32) >> 16).astype(np.uint16)).tofile(file)
print(f"{args.folder}: {8 + len(text) + end} bytes, {sum(int(np.prod(s)) for s in shapes.values())} parameters")
