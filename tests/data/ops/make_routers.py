"""Writes routers.safetensors: what routers of model families read and give.

    python3 tests/data/ops/make_routers.py GOLDENS

GOLDENS holds families/<family> and other/mixtral-tiny, each with model.safetensors (names of the published
checkpoints) and goldens.safetensors (intermediates of Hugging Face transformers in float64; of Grok-1, which
it does not have, those of a PyTorch form of the published code). Of each family the file has, of both prompts
and the last layer:

    <family>.x        [T, D]  input of the router, rounded to float32
    <family>.weight   [E, D]  float32
    <family>.bias     [E]     of gpt_oss added to the logits, of others to the scores that choose
    <family>.ids      [T, k]  int64, best first
    <family>.weights  [T, k]  float64; of mixtral float32
"""

import json
import pathlib
import struct
import sys

# Where the router lies in a layer, and its bias.
GATE = "mlp.gate.weight"
SPARSE = "block_sparse_moe.gate.weight"
CORRECTION = "mlp.gate.e_score_correction_bias"
FAMILIES = {
    "qwen3_moe": (GATE, None),
    "qwen3_moe_nonorm": (GATE, None),
    "qwen2_moe": (GATE, None),
    "olmoe": (GATE, None),
    "granitemoe": ("block_sparse_moe.router.layer.weight", None),
    "gpt_oss": ("mlp.router.weight", "mlp.router.bias"),
    "deepseek_v3": (GATE, CORRECTION),
    "glm4_moe": (GATE, CORRECTION),
    "minimax_m2": (SPARSE, "block_sparse_moe.e_score_correction_bias"),
    "phimoe": (SPARSE, None),
    "grok1": ("moe_block.gate.weight", None),
    "mixtral": (SPARSE, None),
}


def read(path):
    """All tensors of a file, each as its type, shape and bytes."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    span = lambda entry: slice(8 + size + entry["data_offsets"][0], 8 + size + entry["data_offsets"][1])
    return {name: (entry["dtype"], entry["shape"], data[span(entry)]) for name, entry in header.items()}


def write(path, tensors):
    header, data = {}, b""
    for name, (dtype, shape, tensor) in sorted(tensors.items(), key=lambda item: (item[1][0] != "F64", item[0])):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(tensor)]}
        data += tensor
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def joined(tensors):
    """Tensors of the same columns, one below the other."""
    (dtype,) = {tensor[0] for tensor in tensors}
    rows = sum(tensor[1][0] for tensor in tensors)
    return dtype, [rows, *tensors[0][1][1:]], b"".join(tensor[2] for tensor in tensors)


def family(folder, weight, bias):
    model, goldens = read(folder / "model.safetensors"), read(folder / "goldens.safetensors")
    layer = max(int(name.split(".")[1][1:]) for name in goldens if name.endswith("expert_indices"))
    golden = lambda part: joined([goldens[f"p{prompt}.L{layer}.{part}"] for prompt in range(2)])
    (name,) = [name for name in model if name.endswith(f"layers.{layer}.{weight}")]
    tensors = {"x": golden("norm_2"), "weight": model[name]}
    tensors |= {"ids": golden("expert_indices"), "weights": golden("router_weights")}
    if bias:
        tensors["bias"] = model[name[: -len(weight)] + bias]
    assert {tensors[part][0] for part in tensors.keys() - {"ids", "weights"}} == {"F32"}
    return tensors


def main():
    goldens = pathlib.Path(sys.argv[1])
    everything = {}
    for name, (weight, bias) in FAMILIES.items():
        folder = goldens / ("other/mixtral-tiny" if name == "mixtral" else f"families/{name}")
        everything |= {f"{name}.{part}": tensor for part, tensor in family(folder, weight, bias).items()}
    write(pathlib.Path(__file__).with_name("routers.safetensors"), everything)


main()
