#!/usr/bin/env python3
"""What follows from a model's config.json: parameters by kind, bytes and operations of a step.

python3 benches/model_sizes.py            the table of examples/configs/README.md
python3 benches/model_sizes.py --check    ends with 1 if that file does not hold this table, or if a total is
                                          neither within 2 % of what the publisher says nor rounds to it
"""

import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "examples/configs"
WORD = 2  # bytes of a bf16
NEAR = 0.02  # of a published total

# By file: the model's name, and total and active parameters in billions as its publisher writes them.
PUBLISHED = {
    "dbrx": ("DBRX Base", "132", "36"),
    "deepseek-v3": ("DeepSeek-V3", "671", "37"),
    "dolly-v2-3b": ("Dolly 2.0 3B", "2.8", "-"),
    "dolly-v2-7b": ("Dolly 2.0 7B", "6.9", "-"),
    "dolly-v2-12b": ("Dolly 2.0 12B", "12", "-"),
    "glm-4.5": ("GLM-4.5", "355", "32"),
    "glm-4.5-air": ("GLM-4.5-Air", "106", "12"),
    "gpt-oss-20b": ("gpt-oss-20b", "20.9", "3.6"),
    "gpt-oss-120b": ("gpt-oss-120b", "116.8", "5.1"),
    "granite-3.0-1b-a400m": ("Granite 3.0 1B A400M", "1.3", "0.4"),
    "granite-3.0-3b-a800m": ("Granite 3.0 3B A800M", "3.3", "0.8"),
    "grok-1": ("Grok-1", "314", "86"),
    "kimi-k2": ("Kimi K2", "1040", "32"),
    "llama-2-7b": ("LLaMA 2 7B", "7", "-"),
    "llama-2-70b": ("LLaMA 2 70B", "70", "-"),
    "llama-3.1-8b": ("LLaMA 3.1 8B", "8", "-"),
    "llama-3.1-70b": ("LLaMA 3.1 70B", "70", "-"),
    "minimax-m2": ("MiniMax-M2", "230", "10"),
    "mixtral-8x7b": ("Mixtral 8x7B", "46.7", "12.9"),
    "mixtral-8x22b": ("Mixtral 8x22B", "141", "39"),
    "olmoe-1b-7b": ("OLMoE-1B-7B-0924", "6.9", "1.3"),
    "phi-3.5-moe": ("Phi-3.5-MoE", "42", "6.6"),
    "pythia-160m": ("Pythia 160M", "0.162322944", "-"),
    "pythia-12b": ("Pythia 12B", "11.84607232", "-"),
    "qwen1.5-moe-a2.7b": ("Qwen1.5-MoE-A2.7B", "14.3", "2.7"),
    "qwen2-57b-a14b": ("Qwen2-57B-A14B", "57.4", "14"),
    "qwen3-8b": ("Qwen3-8B", "8.2", "-"),
    "qwen3-30b-a3b": ("Qwen3-30B-A3B", "30.5", "3.3"),
    "qwen3-235b-a22b": ("Qwen3-235B-A22B", "235", "22"),
}


class Sizes:
    """A model's numbers of elements. A layer has `attention` and `norms`; the first `dense_layers` have a
    network of `dense` besides, the others a `router`, `experts` of `expert`, of which a token uses `top_k`,
    and `shared`."""

    def __init__(self, config):
        get = lambda *names: next((config[name] for name in names if config.get(name) is not None), None)
        self.model_type = get("model_type")
        self.d, self.layers = get("d_model", "hidden_size"), get("n_layers", "num_hidden_layers")
        self.vocab, heads = config["vocab_size"], get("n_heads", "num_attention_heads")
        attention, ffn = config.get("attn_config") or {}, config.get("ffn_config") or {}
        kv_heads = attention.get("kv_n_heads") or get("num_key_value_heads") or heads
        head_dim = get("head_dim") or self.d // heads
        self.q_cols, self.kv_cols = heads * head_dim, 2 * kv_heads * head_dim
        self.attention = self.d * (2 * self.q_cols + self.kv_cols)  # queries, output; keys and values
        self.norms, self.final_norm = 2 * self.d, self.d
        self.experts = ffn.get("moe_num_experts") or get(
            "num_local_experts", "num_experts", "n_routed_experts"
        )
        self.top_k = ffn.get("moe_top_k") or get("num_experts_per_tok")
        self.dense_layers = self.layers if self.experts is None else get("first_k_dense_replace") or 0
        width = ffn.get("ffn_hidden_size") or get("moe_intermediate_size", "intermediate_size")
        self.dense = 3 * self.d * (get("intermediate_size") or 0)
        self.expert = 3 * self.d * width
        self.experts, self.top_k = self.experts or 0, self.top_k or 0
        self.router = self.d * self.experts
        self.shared = self.expert * (get("n_shared_experts") or 0)
        self.embedding = self.vocab * self.d
        self.head_bias = 0
        self.tied = bool(config.get("tie_word_embeddings"))
        of_family = getattr(self, f"_{self.model_type.replace('-', '')}", None)
        if of_family:
            of_family(config, heads, kv_heads, head_dim)

    @classmethod
    def read(cls, path):
        return cls(json.loads(pathlib.Path(path).read_text()))

    # What a family has besides: biases, norms of queries and keys, another attention.

    def _gpt_neox(self, config, heads, kv_heads, head_dim):
        self.attention += 3 * self.q_cols + self.d
        self.dense = 2 * self.d * config["intermediate_size"] + config["intermediate_size"] + self.d
        self.norms, self.final_norm = 4 * self.d, 2 * self.d

    def _grok1(self, config, heads, kv_heads, head_dim):
        self.norms = 4 * self.d

    def _qwen3_moe(self, config, heads, kv_heads, head_dim):
        self.attention += 2 * head_dim

    _qwen3 = _qwen3_moe

    def _qwen2_moe(self, config, heads, kv_heads, head_dim):
        self.attention += self.q_cols + self.kv_cols
        self.shared = 3 * self.d * config["shared_expert_intermediate_size"] + self.d

    def _olmoe(self, config, heads, kv_heads, head_dim):
        self.attention += self.q_cols + self.kv_cols // 2

    def _minimax_m2(self, config, heads, kv_heads, head_dim):
        self.attention += self.q_cols + self.kv_cols // 2
        self.router += self.experts

    def _gpt_oss(self, config, heads, kv_heads, head_dim):
        self.attention += self.q_cols + self.kv_cols + self.d + heads
        self.expert += 2 * config["intermediate_size"] + self.d
        self.router += self.experts

    def _phimoe(self, config, heads, kv_heads, head_dim):
        self.attention += self.q_cols + self.kv_cols + self.d
        self.norms, self.final_norm, self.head_bias = 4 * self.d, 2 * self.d, self.vocab

    def _glm4_moe(self, config, heads, kv_heads, head_dim):
        self.attention += self.q_cols + self.kv_cols + (2 * head_dim if config["use_qk_norm"] else 0)
        self.router += self.experts

    def _deepseek_v3(self, config, heads, kv_heads, head_dim):
        q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
        nope, rope, v = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
        queries = self.d * q_rank + q_rank + q_rank * heads * (nope + rope)
        keys = self.d * (kv_rank + rope) + kv_rank + kv_rank * heads * (nope + v)
        self.attention = queries + keys + heads * v * self.d
        self.router += self.experts
        self.q_cols, self.kv_cols = heads * (nope + rope), kv_rank + rope  # what the cache holds of a token

    _kimi_k2 = _deepseek_v3

    def moe_layers(self, layers=None):
        return max(0, (self.layers if layers is None else layers) - self.dense_layers)

    def _all(self, experts, embedding, layers=None):
        """Elements, with so many experts of a layer."""
        layers = self.layers if layers is None else layers
        moe = self.moe_layers(layers)
        each = layers * (self.attention + self.norms) + (layers - moe) * self.dense
        routed = moe * (self.router + self.shared + experts * self.expert)
        return each + routed + self.final_norm + embedding + self.vocab * self.d + self.head_bias

    def total(self, layers=None):
        return self._all(self.experts, 0 if self.tied else self.embedding, layers)

    def active(self):
        """Those that a token uses, the embedding's table included."""
        return self._all(self.top_k, 0 if self.tied else self.embedding)

    def used_experts(self, tokens):
        """How many different experts of a layer so many tokens use, where each chooses by chance."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** tokens) if self.experts else 0

    def weight_bytes(self, layers):
        return WORD * self.total(layers)

    def kv_bytes(self, layers, tokens):
        return WORD * self.kv_cols * layers * tokens

    def prefill_flop(self, layers, batch, prompt):
        """Products of weights and rows, scores and sums of values; one row of logits for each prompt."""
        outside = self.embedding + self.vocab * self.d + self.head_bias + self.final_norm
        token = self._all(self.top_k, self.embedding, layers) - outside - layers * self.norms
        attended = 4 * self.q_cols * prompt**2 / 2
        return batch * (2 * token * prompt + layers * attended + 2 * self.vocab * self.d)

    def decode_bytes(self, layers, batch, length):
        """Weights in use, where each token chooses its experts by chance, and keys and values, each once."""
        used = self._all(self.used_experts(batch), 0, layers)
        return WORD * used + self.kv_bytes(layers, batch * length)


def billions(count):
    return f"{count / 1e9:.4g}"


def agrees(count, published):
    """Within 2 %, or the same at the digits that the publisher gives."""
    digits = len(published.partition(".")[2])
    near = abs(count / 1e9 / float(published) - 1) <= NEAR
    return near or round(count / 1e9, digits) == float(published)


def rows():
    """A row for each file: its text, and what is wrong with it, if anything."""
    for path in sorted(CONFIGS.glob("*.json")):
        if path.stem not in PUBLISHED:
            yield f"| `{path.name}` |", f"{path.name}: no published total in benches/model_sizes.py"
            continue
        (title, total, active), sizes = PUBLISHED[path.stem], Sizes.read(path)
        off = f"{sizes.total() / 1e9 / float(total) - 1:+.1%}"
        counts = map(billions, [sizes.total(), sizes.active(), sizes.embedding])
        cells = [f"`{path.name}`", title, *counts, f"{float(total):.4g}", off, active]
        wrong = None if agrees(sizes.total(), total) else f"{path.name}: {off} from the published total"
        yield f"| {' | '.join(cells)} |", wrong


def table():
    heads = "file | model | total | active | embedding | published total | difference | published active"
    lines = [f"| {heads} |", "|---|---|--:|--:|--:|--:|--:|--:|", *(text for text, _ in rows())]
    return "\n".join(lines) + "\n"


def faults():
    readme = CONFIGS / "README.md"
    there = readme.exists() and table() in readme.read_text()
    stale = [] if there else [f"{readme.relative_to(ROOT)} does not hold the table of benches/model_sizes.py"]
    absent = [f"{name}.json is not there" for name in PUBLISHED if not (CONFIGS / f"{name}.json").exists()]
    return stale + absent + [wrong for _, wrong in rows() if wrong]


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit("\n".join(faults()) or 0)
    print(table(), end="")
