"""Steps of DBRX that benches/gpu.py times: which, with how many layers, and what a step must do at least."""

import json
import math
import pathlib
import shutil
import subprocess

DBRX = "benches/peers/dbrx.json"
SMALL = "tests/data/dbrx/tiny-dbrx-f32/config.json"
CHUNK = 8192  # tokens of a prefill step at most
SPARE_BYTES = 6 << 30  # for a step's activations, the context and the allocator
STEP_SECONDS = 4  # of a step's process, besides its start and its weights
WORD = 2  # bytes of a bf16


class Step:
    """A run of the example: prompts of one length, and tokens generated for each, of which the prompt gives one."""

    def __init__(self, name, batch, prompt, generate):
        self.name, self.batch, self.prompt, self.generate = name, batch, prompt, generate

    def options(self, layers):
        sizes = dict(
            layers=layers, batch=self.batch, random_tokens=self.prompt, generate=self.generate, chunk=CHUNK
        )
        named = [
            word for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", str(value))
        ]
        return ["--weights", "bf16", *named, "--json"]

    def decoded(self):
        """Tokens that decode steps give."""
        return self.batch * (self.generate - 1)

    def wrong(self, figures):
        """What is wrong with a run's figures, or nothing."""
        if figures is None:
            return "no line of figures"
        counts = [figures.get("prefill_tokens"), figures.get("decode_tokens")]
        if counts != [self.batch * self.prompt, self.decoded()]:
            return f"figures of {counts} tokens, should be of {[self.batch * self.prompt, self.decoded()]}"
        if figures.get("streamed"):
            return "some layers were streamed from the host"
        times = ["load_s", "prefill_s", *(["decode_s"] if self.decoded() else [])]
        absent = [name for name in times if not figures.get(name, 0) > 0]
        return f"no time in {', '.join(absent)}" if absent else None

    def line(self, config, layers, figures):
        """A line of the record: the step, its figures, and the least operations and bytes that it takes."""
        step = dict(what="dbrx", layers=layers, of_layers=config.layers, batch=self.batch, prompt=self.prompt)
        middle = self.prompt + self.generate // 2  # a sequence half-way through the decode steps
        least = dict(
            prefill_flop=config.prefill_flop(layers, self.batch, self.prompt),
            decode_bytes=config.decode_bytes(layers, self.batch, middle),
        )
        return {**step, **least, **figures}


PROBE = Step("probe", 1, 16, 2)
STEPS = [
    Step("decode-1", 1, 1024, 65),
    Step("decode-8", 8, 1024, 65),
    Step("prefill-2048", 1, 2048, 1),
    Step("prefill-8192", 1, 8192, 1),
    Step("decode-32", 32, 1024, 65),
    Step("decode-64", 64, 1024, 65),
]
REHEARSED = [Step("decode-2", 2, 5, 3), Step("prefill-9", 1, 9, 1)]


def figures(text):
    """The example's line of figures, which is the last that it prints."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                return None
    return None


class Config:
    """A configuration's sizes, and what follows from them."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        config = json.loads(self.path.read_text())
        ffn, attention = config["ffn_config"], config["attn_config"]
        self.d, self.layers, self.vocab = config["d_model"], config["n_layers"], config["vocab_size"]
        self.kv_cols = self.d // config["n_heads"] * attention["kv_n_heads"]
        self.experts, self.top_k = ffn["moe_num_experts"], ffn["moe_top_k"]
        self.expert = 3 * self.d * ffn["ffn_hidden_size"]
        self.attention = 2 * self.d * (self.d + self.kv_cols)  # q, k, v and out

    def weight_bytes(self, layers):
        layer = self.attention + self.experts * (self.expert + self.d)
        return WORD * (layers * layer + 2 * self.vocab * self.d)

    def kv_bytes(self, layers, tokens):
        return WORD * 2 * self.kv_cols * layers * tokens

    def prefill_flop(self, layers, batch, prompt):
        """Products of weights and rows, scores and sums of values; one row of logits for each prompt."""
        token = self.attention + self.top_k * self.expert + self.experts * self.d
        attended = 4 * self.d * prompt**2 / 2
        return batch * (layers * (2 * token * prompt + attended) + 2 * self.vocab * self.d)

    def decode_bytes(self, layers, batch, length):
        """Weights in use, where each token chooses its experts by chance, and keys and values, each once."""
        used = self.experts * (1 - (1 - self.top_k / self.experts) ** batch)
        layer = self.attention + self.experts * self.d + used * self.expert
        return WORD * (layers * layer + self.vocab * self.d) + self.kv_bytes(layers, batch * length)


class Plan:
    """How many layers: as many as fit the GPU, and the host if the probe made its weights there; fewer if loading
    them once for each step would take more time than there is."""

    def __init__(self, config, steps, probed, probe_s):
        self.config, self.steps = config, steps
        self.seconds_per_byte = probed["load_s"] / config.weight_bytes(1)
        self.start_s = max(0, probe_s - probed["load_s"])
        peak = probed.get("peak_anonymous_bytes")
        self.on_host = peak is None or peak >= config.weight_bytes(1) / 2

    def need(self, layers):
        tokens = max(step.batch * (step.prompt + step.generate) for step in self.steps)
        return self.config.weight_bytes(layers) + self.config.kv_bytes(layers, tokens) + SPARE_BYTES

    def seconds(self, layers):
        """Of all steps, each of which loads its weights; a fifth more than the probe says."""
        load = self.seconds_per_byte * self.config.weight_bytes(layers)
        return len(self.steps) * (1.2 * (self.start_s + load) + STEP_SECONDS)

    def layers(self, left):
        """The number, and why it is that."""
        gpu, host = free_gpu_bytes(), free_host_bytes() if self.on_host else math.inf
        most = lambda fits: max([n for n in range(1, self.config.layers + 1) if fits(n)], default=1)
        limits = [
            (most(lambda n: self.need(n) <= gpu), f"fit {gpu / 1e9:.0f} GB of the GPU"),
            (
                most(lambda n: self.config.weight_bytes(n) <= 0.8 * host),
                f"fit {host / 1e9:.0f} GB of the host",
            ),
            (most(lambda n: self.seconds(n) <= left), f"can be loaded in {left:.0f} s"),
        ]
        layers = min(limits)[0]
        return (
            layers,
            f"{layers} of {self.config.layers} layers: {', '.join(f'{n} {why}' for n, why in limits)}",
        )


def free_gpu_bytes():
    """By NVIDIA's tool; without it unlimited: the example refuses what does not fit."""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
        text = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=10).stdout
        try:
            return int(text.splitlines()[0]) << 20
        except (ValueError, IndexError):
            pass
    return math.inf


def free_host_bytes():
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return math.inf
