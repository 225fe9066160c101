"""Steps of models that benches/gpu.py times: which, with how many layers, and what a step must do at least.

DBRX has steps of its own. The chart of docs/serving.md has steps of three models at 1 to 64 users, a line
each in serving.jsonl, which benches/serving.py reads.
"""

import json
import math
import pathlib
import shutil
import subprocess

from model_sizes import CONFIGS, Sizes

DBRX = "examples/configs/dbrx.json"
SMALL = "tests/data/dbrx/tiny-dbrx-f32/config.json"
CHUNK = 8192  # tokens of a prefill step at most
SPARE_BYTES = 6 << 30  # for a step's activations, the context and the allocator
STEP_SECONDS = 4  # of a step's process, besides its start and its weights


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
        return {**step, **self.least(config, layers), **figures}

    def least(self, config, layers):
        middle = self.prompt + self.generate // 2  # a sequence half-way through the decode steps
        return dict(
            prefill_flop=config.prefill_flop(layers, self.batch, self.prompt),
            decode_bytes=config.decode_bytes(layers, self.batch, middle),
        )


class Serving(Step):
    """So many users of a model, each with a prompt as long as the article's."""

    def __init__(self, model, users, prompt, generate):
        super().__init__(f"{model}-{users}", users, prompt, generate)
        self.model = model

    def line(self, config, layers, figures):
        """The same, with what all layers would take at least, to which a chart scales the times."""
        whole = {f"all_{name}": value for name, value in self.least(config, config.layers).items()}
        about = dict(what="serving", model=self.model, card=card_name())
        return {**super().line(config, layers, figures), **about, **whole}


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

# Models of the chart, by their files in examples/configs; numbers of users, of which the chart needs the
# first three most: these must be done in time.
SERVED = ["dbrx", "llama-2-70b", "mixtral-8x7b"]
USERS, FIRST = [1, 64, 8, 2, 16, 4, 32], 3
SMALL_SIZES = dict(
    d_model=64,
    hidden_size=64,
    ffn_hidden_size=96,
    intermediate_size=96,
    n_heads=4,
    num_attention_heads=4,
    kv_n_heads=2,
    num_key_value_heads=2,
    n_layers=2,
    num_hidden_layers=2,
    vocab_size=256,
)


def serving_steps(model, rehearse):
    if rehearse:
        return [Serving(model, users, 5, 3) for users in (2,)]
    return [Serving(model, users, 2000, 17) for users in USERS]


def small(config):
    """A configuration with the same fields and small sizes."""
    inner = {name: small(value) if isinstance(value, dict) else value for name, value in config.items()}
    return {**inner, **{name: size for name, size in SMALL_SIZES.items() if name in inner}}


def write_small(model, folder):
    """The small configuration of a model, as a file."""
    path = folder / f"{model}.json"
    path.write_text(json.dumps(small(json.loads((CONFIGS / f"{model}.json").read_text()))))
    return path


def figures(text):
    """The example's line of figures, which is the last that it prints."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                return None
    return None


class Config(Sizes):
    """A configuration's sizes, and where it lies."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        super().__init__(json.loads(self.path.read_text()))


class Plan:
    """How many layers: as many as fit the GPU, and the host if the probe made its weights there; fewer if loading
    them once for each step would take more time than there is."""

    def __init__(self, config, steps, probed, probe_s, loads):
        self.config, self.steps, self.loads = config, steps, loads
        self.seconds_per_byte = probed["load_s"] / config.weight_bytes(1)
        self.start_s = max(0, probe_s - probed["load_s"])
        peak = probed.get("peak_anonymous_bytes")
        self.on_host = peak is None or peak >= config.weight_bytes(1) / 2

    def need(self, layers):
        tokens = max(step.batch * (step.prompt + step.generate) for step in self.steps)
        return self.config.weight_bytes(layers) + self.config.kv_bytes(layers, tokens) + SPARE_BYTES

    def seconds(self, layers):
        """Of so many steps, each of which loads its weights; a fifth more than the probe says."""
        load = self.seconds_per_byte * self.config.weight_bytes(layers)
        return self.loads * (1.2 * (self.start_s + load) + STEP_SECONDS)

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


def card_name():
    """By NVIDIA's tool, or nothing."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=10).stdout.splitlines()
    return lines[0].split(",")[0].strip() if lines else None


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
