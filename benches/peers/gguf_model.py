#!/usr/bin/env python3
"""Writes a random Qwen3-MoE as GGUF, once per weight type, so that this crate and llama.cpp can run the
same file.

    pip install numpy gguf
    python3 benches/peers/gguf_model.py FOLDER [--types Q8_0,Q4_0,Q4_K] [--layers 6] [--seed 1]
    python3 benches/peers/gguf_model.py FOLDER --width 4096 --hidden 1536 --heads 64 --experts 16 --top 8 \\
        --layers 3

FOLDER/qwen3moe-WIDTH-TYPE.gguf has every matrix of the layers and the output head in that type; embeddings
are F16, norms and the router F32, as llama.cpp keeps them. The numbers come from the seed and the tensor's
name alone: files of different types hold the same weights, up to rounding. The default has layers as wide as
those of Qwen3-30B-A3B: 0.97 G parameters, of which a token uses 178 M, more than caches hold. The second
command's are as wide as those of Qwen3-235B-A22B: 1.1 G, of which a token uses 671 M. Types: those that the
gguf package quantises (Q8_0, Q4_0, Q5_0, MXFP4 and others; F16 and BF16 too), and Q4_K. The relative error of
the weights is printed, as a check of the file.
"""

import argparse
import zlib
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type


def quantize_q4_k(values):
    """Rows in blocks of 256: eight sub-blocks of 32 from least to greatest value, scales and minima in 6
    bits. llama.cpp searches for better scales; what a multiplication costs does not depend on them."""
    blocks = values.reshape(-1, 8, 32)
    least = np.minimum(blocks.min(axis=2), 0.0)
    scale, minimum = (blocks.max(axis=2) - least) / 15, -least
    d, dmin = (np.float16(x.max(axis=1, keepdims=True) / 63) for x in (scale, minimum))
    d32, dmin32 = np.float32(d), np.float32(dmin)
    six_bits = lambda x, unit: np.clip(np.rint(x / np.where(unit == 0, 1, unit)), 0, 63).astype(np.uint8)
    sc, m = six_bits(scale, d32), six_bits(minimum, dmin32)
    step = (d32 * sc)[..., None]
    q = np.rint((blocks + (dmin32 * m)[..., None]) / np.where(step == 0, 1, step))
    q = np.clip(q, 0, 15).astype(np.uint8)
    # Bytes 0 to 3: scales 0 to 3; 4 to 7: minima 0 to 3; both with two high bits of scales and minima 4 to
    # 7, whose low bits follow.
    low, high = slice(0, 4), slice(4, 8)
    packed = [
        sc[:, low] | sc[:, high] >> 4 << 6,
        m[:, low] | m[:, high] >> 4 << 6,
        sc[:, high] & 15 | m[:, high] << 4,
    ]
    codes = q[:, 0::2] | q[:, 1::2] << 4
    rows = [d.view(np.uint8), dmin.view(np.uint8), *packed, codes.reshape(len(q), 128)]
    return np.concatenate(rows, axis=1).reshape(*values.shape[:-1], -1)


def quantize(values, kind):
    return quantize_q4_k(values) if kind == Type.Q4_K else gguf.quants.quantize(values, kind)


class Model:
    """The tensors' names and shapes, outermost dimension first, in the order of the file."""

    def __init__(self, args):
        self.args = args
        d, q, kv = args.width, args.heads * args.head_dim, args.kv_heads * args.head_dim
        up, down = (args.experts, args.hidden, d), (args.experts, d, args.hidden)
        matrices = {"attn_q": (q, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, q)}
        matrices |= {"ffn_gate_exps": up, "ffn_up_exps": up, "ffn_down_exps": down}
        plain = {"attn_norm": (d,), "ffn_norm": (d,), "attn_q_norm": (args.head_dim,)}
        plain |= {"attn_k_norm": (args.head_dim,), "ffn_gate_inp": (args.experts, d)}
        self.tensors = {"token_embd.weight": (args.vocab, d), "output_norm.weight": (d,)}
        self.tensors["output.weight"] = (args.vocab, d)
        for layer in range(args.layers):
            for name, shape in (matrices | plain).items():
                self.tensors[f"blk.{layer}.{name}.weight"] = shape

    def kind(self, name, kind):
        """The type of a tensor in the file whose matrices are `kind`."""
        if name.startswith("token_embd"):
            return Type.F16
        return Type.F32 if "norm" in name or "ffn_gate_inp" in name else kind

    def values(self, name):
        """The tensor in f32, a matrix at a time: norms are ones, rows of a matrix have length about 1."""
        shape = self.tensors[name]
        if len(shape) == 1:
            yield np.ones(shape, np.float32)
            return
        random = np.random.default_rng([self.args.seed, zlib.crc32(name.encode())])
        for _ in range(shape[0] if len(shape) == 3 else 1):
            yield random.standard_normal(shape[-2:], dtype=np.float32) / np.float32(shape[-1] ** 0.5)

    def metadata(self, writer):
        args = self.args
        writer.add_quantization_version(2)
        writer.add_block_count(args.layers)
        writer.add_context_length(4096)
        writer.add_embedding_length(args.width)
        writer.add_feed_forward_length(args.hidden)
        writer.add_head_count(args.heads)
        writer.add_head_count_kv(args.kv_heads)
        writer.add_key_length(args.head_dim)
        writer.add_value_length(args.head_dim)
        writer.add_rope_freq_base(1e6)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_expert_count(args.experts)
        writer.add_expert_used_count(args.top)
        writer.add_expert_feed_forward_length(args.hidden)
        writer.add_vocab_size(args.vocab)
        # Loaders require a tokenizer; this one only has a word for each id.
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([f"t{token}" for token in range(args.vocab)])
        writer.add_token_types([gguf.TokenType.NORMAL] * args.vocab)
        writer.add_token_merges(["t 0"])

    def write(self, path, kind):
        writer = gguf.GGUFWriter(path, "qwen3moe")
        self.metadata(writer)
        byte_shape = lambda name: gguf.quant_shape_to_byte_shape(self.tensors[name], self.kind(name, kind))
        for name, shape in self.tensors.items():
            size = int(np.prod(byte_shape(name)))
            writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=self.kind(name, kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        square, error = 0.0, 0.0
        for name in self.tensors:
            matrices = []
            for number, values in enumerate(self.values(name)):
                matrices.append(quantize(values, self.kind(name, kind)).view(np.uint8))
                if number == 0 and self.kind(name, kind) == kind:
                    square += float(np.square(values).sum())
                    error += float(np.square(gguf.quants.dequantize(matrices[0], kind) - values).sum())
            writer.write_tensor_data(np.stack(matrices).reshape(byte_shape(name)))
        writer.close()
        return (error / square) ** 0.5


def main():
    parser = argparse.ArgumentParser(description="random Qwen3-MoE files for side-by-side runs")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--types", default="Q8_0,Q4_0,Q4_K")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=768, help="width inside an expert")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top", type=int, default=4, help="experts per token")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    kinds = [Type[name] for name in args.types.split(",")]
    for width in (args.width, args.hidden, args.heads * args.head_dim):
        for kind in kinds:
            if width % gguf.GGML_QUANT_SIZES[kind][0]:
                parser.error(f"rows of {width} values are not whole blocks of {kind.name}")
    args.folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        path = args.folder / f"qwen3moe-{args.width}-{kind.name}.gguf"
        error = Model(args).write(path, kind)
        size = path.stat().st_size / 1e6
        print(f"{path}: {size:.0f} MB, relative error of the weights {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
