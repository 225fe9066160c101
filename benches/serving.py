#!/usr/bin/env python3
"""Tokens per second for each user of one GPU, by the number of users: docs/serving.svg, docs/serving.md.

    python3 benches/serving.py                       writes both
    python3 benches/serving.py --check               ends with 1 if they, or examples/configs/README.md,
                                                     are not what the scripts write
    python3 benches/serving.py --record FILE.jsonl   draws measured points, from the lines that benches/gpu.sh
                                                     writes (serving.jsonl)

Without --record the newest benches/record/gpu/*/serving.jsonl is drawn, and where there is none a cost model,
whose formula and assumptions docs/serving.md states. Its efficiencies are those of the record in `MEASURED`.
"""

import argparse
import json
import math
import pathlib
import sys
import textwrap

import model_sizes
from model_sizes import ROOT, WORD, Sizes

SVG, PAGE = ROOT / "docs/serving.svg", ROOT / "docs/serving.md"
RECORDS = ROOT / "benches/record/gpu"
MEASURED = "2026-11-27"
USERS = [1, 2, 4, 8, 16, 32, 64]
PROMPT, GENERATE = 2000, 256  # tokens of a user, as in the article
CARD_BYTES, SPARE_BYTES = 80e9, 6 << 30  # of the card; for activations, the context and the allocator
# Not measured yet: the share of the copy bandwidth that attention reads keys and values with, and the share
# of the large product's rate that attention of a prompt reaches.
ATTENTION_BYTES, ATTENTION_FLOP = 0.80, 0.60
# A dense model of DBRX's size: LLaMA's layers with grouped heads, as LLaMA-2-70B has them.
DENSE = dict(
    model_type="llama",
    hidden_size=10240,
    intermediate_size=36352,
    num_hidden_layers=96,
    num_attention_heads=80,
    num_key_value_heads=8,
    vocab_size=100352,
)
# By name in a record: title, class of its line in the picture, sizes.
MODELS = {
    "mixtral-8x7b": ("Mixtral 8x7B", "b"),
    "dbrx": ("DBRX", "a"),
    "llama-2-70b": ("LLaMA-2-70B", "c"),
    "dense-132b": ("dense 132B", "d"),
}


def sizes_of(name):
    return Sizes(DENSE) if name == "dense-132b" else Sizes.read(model_sizes.CONFIGS / f"{name}.json")


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def fastest(lines, *whats):
    """Seconds of the fastest form, by tokens."""
    found = {}
    for line in lines:
        if line["what"] in whats and "us" in line:
            tokens, seconds = line["tokens"], line["us"] / 1e6
            found[tokens] = min(seconds, found.get(tokens, math.inf))
    return found


class Device:
    """What one H100 was measured to do: bandwidth, rate of a large product, and how near to the larger of the
    two limits the layer of DBRX and its products came, by rows for each weight."""

    def __init__(self, folder):
        ours, torch = lines_of(folder / "dropless.jsonl"), lines_of(folder / "torch.jsonl")
        self.name = torch[0]["device"]
        self.copy = max(line["gb_s"] for line in torch if line["what"] == "copy") * 1e9
        self.matmul = max(line["tflops"] for line in torch if line["what"] == "matmul") * 1e12
        dbrx = sizes_of("dbrx")
        self.rows_per_token = dbrx.top_k / dbrx.experts
        layers = [line for line in ours if line["what"] == "layer" and line["form"] == "graph"]
        least = {line["tokens"]: self._least(dbrx, line) for line in layers}
        layer = fastest(layers, "layer")
        gate_and_up, down = fastest(ours, "glu_nt", "glu_nt_of_sorted"), fastest(ours, "nn")
        products = {tokens: gate_and_up[tokens] + down[tokens] for tokens in layer}
        shares = lambda seconds: {
            tokens * self.rows_per_token: least[tokens] / seconds[tokens] for tokens in sorted(least)
        }
        self.layer, self.products = shares(layer), shares(products)
        self.small = {tokens * dbrx.top_k: seconds for tokens, seconds in fastest(ours, "gather").items()}

    def _least(self, dbrx, line):
        """Seconds that the layer takes at least: for the weights that its routing used, or the operations."""
        size = line["weight_gb_s"] * 1e9 * line["us"] / 1e6
        return self.limit(size, 2 * line["tokens"] * dbrx.top_k * dbrx.expert)

    def limit(self, size, flop):
        return max(size / self.copy, flop / self.matmul)

    def product(self, shares, rows, size, flop):
        """Seconds of products with weights of `size` bytes, each with so many rows."""
        return self.limit(size, flop) / between(shares, rows)

    def launches(self, count, rows):
        """Seconds of so many small kernels, as the record's gather of as many rows."""
        return count * between(self.small, rows)


def between(points, x):
    """The value at x, on a straight line over a logarithmic axis; beyond the ends that of the end."""
    xs = sorted(points)
    if x <= xs[0] or x >= xs[-1]:
        return points[xs[0] if x <= xs[0] else xs[-1]]
    right = next(i for i, found in enumerate(xs) if found >= x)
    a, b = xs[right - 1], xs[right]
    part = math.log(x / a) / math.log(b / a)
    return points[a] + part * (points[b] - points[a])


class Cost:
    """The cost model of one model on one device."""

    def __init__(self, device, sizes):
        self.device, self.sizes = device, sizes

    def _network(self, tokens):
        """Of a layer: its experts, routing included, or its dense network with the norm before it."""
        d, s = self.device, self.sizes
        if not s.experts:
            size, flop = WORD * s.dense, 2 * tokens * s.dense
            return d.product(d.products, tokens, size, flop) + d.launches(2, tokens)
        used = s.used_experts(tokens)
        size, flop = WORD * (used * s.expert + s.router), 2 * tokens * (s.top_k * s.expert + s.router)
        return d.product(d.layer, tokens * s.top_k / s.experts, size, flop)

    def _projections(self, tokens):
        """Of a layer: queries, keys, values and output, and the launches outside the network: two norms, the
        rotation, two products and attention."""
        d, s = self.device, self.sizes
        size, flop = WORD * s.attention, 2 * tokens * s.attention
        return d.product(d.products, tokens, size, flop) + d.launches(6, tokens)

    def _head(self, tokens):
        d, s = self.device, self.sizes
        table = s.vocab * s.d
        return d.product(d.products, tokens, WORD * table, 2 * tokens * table) + d.launches(4, tokens)

    def step(self, users, length, layers):
        """Seconds of a decode step, each user with `length` tokens before it."""
        d, s = self.device, self.sizes
        read = WORD * s.kv_cols * users * length / (ATTENTION_BYTES * d.copy)
        score = 4 * s.q_cols * users * length / (ATTENTION_FLOP * d.matmul)
        each = self._projections(users) + max(read, score) + self._network(users)
        return layers * each + self._head(users)

    def prefill(self, prompt, layers):
        """Seconds of one prompt."""
        d, s = self.device, self.sizes
        score = 2 * s.q_cols * prompt**2 / (ATTENTION_FLOP * d.matmul)
        each = self._projections(prompt) + score + self._network(prompt)
        return layers * each + self._head(1)


class Point:
    """What one user gets where there are `users`: seconds of a decode step and of one user's prompt."""

    def __init__(self, users, step, prefill, generate=GENERATE):
        self.users, self.step_s, self.prefill_s = users, step, prefill
        self.decode = 1 / step
        self.whole = generate / (users * prefill + (generate - 1) * step)


def modelled(device, name, prompt, context, layers=None):
    sizes = sizes_of(name)
    cost, layers = Cost(device, sizes), sizes.layers if layers is None else layers
    prefill = cost.prefill(prompt, layers)
    return [Point(users, cost.step(users, context, layers), prefill) for users in USERS]


def fitting(sizes):
    """How many layers fit the card, with the keys and values of the most users."""
    tokens = USERS[-1] * (PROMPT + GENERATE)
    need = lambda n: sizes.weight_bytes(n) + sizes.kv_bytes(n, tokens) + SPARE_BYTES
    return max((n for n in range(1, sizes.layers + 1) if need(n) <= CARD_BYTES), default=0)


class Record:
    """Measured steps. A line has the layers that ran; its times are scaled to all layers by the bytes of a
    decode step and the operations of a prompt that the line states for both."""

    def __init__(self, path):
        self.path = path
        self.lines = [
            line for line in lines_of(path) if line.get("what") == "serving" and "error" not in line
        ]
        if not self.lines:
            sys.exit(f'{path}: no line with "what": "serving"')
        last = self.lines[-1]
        self.device, self.prompt = str(last.get("card") or last.get("device")), last["prompt"]
        self.context = self.prompt + int(last["decode_tokens"] / last["batch"] + 1) // 2

    def of(self, name, scaled=True):
        """A model's points, of each number of users the last that was measured."""
        points = {}
        for line in (line for line in self.lines if line["model"] == name):
            step = line["decode_s"] / (line["decode_tokens"] / line["batch"])
            prefill = line["prefill_s"] / line["batch"]
            if scaled:
                step *= line["all_decode_bytes"] / line["decode_bytes"]
                prefill *= line["all_prefill_flop"] / line["prefill_flop"]
            points[line["batch"]] = Point(line["batch"], step, prefill)
        return [points[users] for users in sorted(points)]

    def name(self):
        inside = self.path.is_relative_to(ROOT)
        return self.path.relative_to(ROOT) if inside else self.path.name

    def layers(self, name):
        return next(line["layers"] for line in reversed(self.lines) if line["model"] == name)


class Chart:
    """Everything that the picture and the page show."""

    def __init__(self, record=None):
        self.device, self.record = Device(RECORDS / MEASURED), record
        self.prompt = record.prompt if record else PROMPT
        self.context = record.context if record else PROMPT + GENERATE // 2
        self.points, self.measured = {}, {}
        for name in MODELS:
            found = record.of(name) if record else []
            self.measured[name] = bool(found)
            self.points[name] = found or self.modelled(name)

    def modelled(self, name, layers=None):
        return modelled(self.device, name, self.prompt, self.context, layers)

    def kind(self):
        return "measured" if self.record else "model, not a measurement"

    def subtitle(self):
        if not self.record:
            return f"one {self.device.name}, bf16, as fast as if all layers fitted it"
        absent = [MODELS[name][0] for name in MODELS if not self.measured[name]]
        rest = f"; dashed, by a cost model: {', '.join(absent)}" if absent else ""
        return f"one {self.record.device}, bf16, scaled to all layers{rest}"

    def at(self, name, users):
        return next((point for point in self.points[name] if point.users == users), None)


# The picture: two panels with logarithmic axes.

WIDTH, HEIGHT = 960, 500
LEFT, TOP, PANEL, TALL, GAP = 62, 128, 400, 300, 70
STYLE = """
  .paper { fill: #ffffff } .grid { stroke: #e4e7ec } .axis { stroke: #667085 }
  text { fill: #1d2939; font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }
  .title { font-size: 18px; font-weight: 600 } .panel { font-weight: 600 } .faint { fill: #667085 }
  polyline { fill: none; stroke-width: 2.5 } polyline.modelled { stroke-dasharray: 6 4 }
  polyline.a { stroke: #d92d20 } .mark.a { fill: #d92d20 }
  polyline.b { stroke: #1570ef } .mark.b { fill: #1570ef }
  polyline.c { stroke: #067647 } .mark.c { fill: #067647 }
  polyline.d { stroke: #7a5af8 } .mark.d { fill: #7a5af8 }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117 } .grid { stroke: #2a313c } .axis { stroke: #98a2b3 }
    text { fill: #e4e7ec } .faint { fill: #98a2b3 }
    polyline.a { stroke: #ff7a70 } .mark.a { fill: #ff7a70 }
    polyline.b { stroke: #6cb2ff } .mark.b { fill: #6cb2ff }
    polyline.c { stroke: #4ade9a } .mark.c { fill: #4ade9a }
    polyline.d { stroke: #b8a4ff } .mark.d { fill: #b8a4ff }
  }
"""
TICKS = [1, 2, 5, 10, 20, 50, 100, 200, 500]


def mark(kind, x, y):
    """A point of a line; each line has its own shape."""
    if kind == "a":
        return f'<circle class="mark a" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    if kind == "b":
        return f'<rect class="mark b" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    shape = [(0, -5.5), (5, 4), (-5, 4)] if kind == "c" else [(0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)]
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in shape)
    return f'<polygon class="mark {kind}" points="{path}"/>'


def label(x, y, text, kind="", anchor="start"):
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


class Panel:
    """One of the two coordinate systems, at the left edge `left`, from `low` to `high`."""

    def __init__(self, left, low, high):
        self.left, self.low, self.high = left, low, high

    def x(self, users):
        return self.left + PANEL * math.log(users) / math.log(USERS[-1])

    def y(self, value):
        return TOP + TALL * (1 - math.log(value / self.low) / math.log(self.high / self.low))

    def frame(self, title):
        right, bottom = self.left + PANEL, TOP + TALL
        out = [label(self.left, TOP - 16, title, "panel")]
        for value in (value for value in TICKS if self.low <= value <= self.high):
            y = self.y(value)
            out.append(f'<line class="grid" x1="{self.left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
            out.append(label(self.left - 8, y + 4.5, str(value), "faint", "end"))
        for users in USERS:
            x = self.x(users)
            out.append(f'<line class="axis" x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 5}"/>')
            out.append(label(x, bottom + 21, str(users), "faint", "middle"))
        out.append(f'<line class="axis" x1="{self.left}" y1="{bottom}" x2="{right}" y2="{bottom}"/>')
        return out

    def line(self, kind, points, dashed):
        at = [(self.x(users), self.y(value)) for users, value in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        style = f"{kind} modelled" if dashed else kind
        return [f'<polyline class="{style}" points="{path}"/>', *(mark(kind, x, y) for x, y in at)]


def legend(chart):
    out, x = [], LEFT
    for name, (title, kind) in MODELS.items():
        dashed = " modelled" if chart.record and not chart.measured[name] else ""
        out.append(f'<polyline class="{kind}{dashed}" points="{x},80 {x + 34},80"/>')
        out += [mark(kind, x + 17, 80), label(x + 42, 84.5, title)]
        x += 170
    return out


def svg(chart):
    decode = {name: [(p.users, p.decode) for p in points] for name, points in chart.points.items()}
    whole = {name: [(p.users, p.whole) for p in points] for name, points in chart.points.items()}
    values = [value for lines in (decode, whole) for points in lines.values() for _, value in points]
    low, high = min(values) / 1.2, max(values) * 1.2
    out = [
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>',
        label(LEFT, 34, f"Tokens per second for each user of one GPU ({chart.kind()})", "title"),
        label(LEFT, 56, chart.subtitle(), "faint"),
        *legend(chart),
    ]
    panels = [
        (LEFT, f"decode alone, at {chart.context} tokens of context", decode),
        (LEFT + PANEL + GAP, f"with prompts: {chart.prompt} tokens in, {GENERATE} out", whole),
    ]
    for left, title, lines in panels:
        panel = Panel(left, low, high)
        out += panel.frame(title)
        for name, (_, kind) in reversed(MODELS.items()):
            out += panel.line(kind, lines[name], chart.record and not chart.measured[name])
        out.append(label(left + PANEL / 2, TOP + TALL + 46, "users at once", "", "middle"))
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{aria(chart)}">'
    body = "\n".join(out)
    return f"{head}\n<style>{STYLE}</style>\n{body}\n</svg>\n"


def aria(chart):
    ends = lambda points: f"{points[0].decode:.0f} to {points[-1].decode:.0f}"
    each = ", ".join(f"{MODELS[name][0]} {ends(points)}" for name, points in chart.points.items())
    return f"Decode, tokens per second for each user, {USERS[0]} to {USERS[-1]} users: {each}"


# The page.


def table(heads, rows):
    """Text in the first column, numbers in the others."""
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *rows]
    return "\n".join(
        f"| {' | '.join(line)} |" if line[1] != "--:" else f"|{'|'.join(line)}|" for line in lines
    )


def number(value):
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}"


def per_user(chart, value):
    users = sorted({point.users for points in chart.points.values() for point in points})
    rows = []
    for name, (title, _) in MODELS.items():
        found = [chart.at(name, count) for count in users]
        rows.append([title, *(number(value(point)) if point else "-" for point in found)])
    ratio = [(chart.at("dbrx", count), chart.at("llama-2-70b", count)) for count in users]
    cells = [f"{value(ours) / value(theirs):.2f}" if ours and theirs else "-" for ours, theirs in ratio]
    return table(["users", *map(str, users)], [*rows, ["**DBRX / LLaMA-2-70B**", *cells]])


def depth(chart):
    """The layers that fit the card, or that ran, and what they and all layers give."""
    heads = ["model", "layers", "in bf16", "fit" if not chart.record else "ran or fit"]
    heads += [f"those: {users}" for users in (1, 8, 64)] + [f"all: {users}" for users in (1, 8, 64)]
    rows = []
    for name, (title, _) in MODELS.items():
        sizes, measured = sizes_of(name), chart.measured[name]
        layers = chart.record.layers(name) if measured else fitting(sizes)
        some = chart.record.of(name, False) if measured else chart.modelled(name, layers)
        by_users = {point.users: number(point.decode) for point in some}
        whole = {point.users: number(point.decode) for point in chart.points[name]}
        size = f"{sizes.weight_bytes(sizes.layers) / 1e9:.0f} GB"
        cells = [by_users.get(users, "-") for users in (1, 8, 64)] + [
            whole.get(users, "-") for users in (1, 8, 64)
        ]
        rows.append([title, str(sizes.layers), size, str(layers), *cells])
    return table(heads, rows)


def shares(device):
    rows = [
        [name, *(f"{found[rows]:.0%}" for rows in sorted(found))]
        for name, found in (("MoE layer of DBRX", device.layer), ("its products", device.products))
    ]
    return table(["rows for each weight", *(f"{rows:g}" for rows in sorted(device.layer))], rows)


def ratios(chart, value, other):
    """DBRX's speed over another model's, by users."""
    both = [(point.users, point, chart.at(other, point.users)) for point in chart.points["dbrx"]]
    return {users: value(ours) / value(theirs) for users, ours, theirs in both if theirs}


def crossing(chart, value):
    """In words: the ratios to LLaMA-2-70B at the ends, and where DBRX is the faster one."""
    found = ratios(chart, value, "llama-2-70b")
    if not found:
        return "is not known"
    first, last = min(found), max(found)
    ahead = [str(users) for users in found if found[users] > 1]
    where = "at no number of users" if not ahead else f"at {', '.join(ahead)} users"
    where = "everywhere" if len(ahead) == len(found) else where
    return f"is {found[first]:.2f} at {first} and {found[last]:.2f} at {last}; DBRX is ahead {where}"


def against_dense(chart):
    found = [
        ratio
        for value in (lambda point: point.decode, lambda point: point.whole)
        for ratio in ratios(chart, value, "dense-132b").values()
    ]
    return f"{min(found):.1f} to {max(found):.1f}" if found else "unknown"


def page(chart):
    text = PAGE_TEXT.format(
        kind=chart.kind().capitalize(),
        subtitle=chart.subtitle(),
        decode=per_user(chart, lambda point: point.decode),
        whole=per_user(chart, lambda point: point.whole),
        decode_ratio=crossing(chart, lambda point: point.decode),
        whole_ratio=crossing(chart, lambda point: point.whole),
        depth=depth(chart),
        shares=shares(chart.device),
        device=chart.device.name,
        copy=f"{chart.device.copy / 1e12:.2f}",
        matmul=f"{chart.device.matmul / 1e12:.0f}",
        record=f"benches/record/gpu/{MEASURED}",
        prompt=chart.prompt,
        generate=GENERATE,
        middle=chart.context,
        kv=f"{ATTENTION_BYTES:.0%}",
        score=f"{ATTENTION_FLOP:.0%}",
        small=f"{chart.device.small[min(chart.device.small)] * 1e6:.1f}",
        source=source(chart),
        dense=dense_text(),
        card=f"{CARD_BYTES / 1e9:.0f}",
        spare=f"{SPARE_BYTES / 2**30:.0f}",
        generate_1=GENERATE - 1,
        dense_ratio=against_dense(chart),
    )
    return wrapped(text)


def source(chart):
    if not chart.record:
        return (
            "No step of a whole model has been timed on hardware yet. The figures below follow from the "
            "sizes of the models and from what single layers were measured to take, by the formula below."
        )
    return (
        f"The record is `{chart.record.name()}`. As many layers ran as fit the card; the times are "
        "scaled to all layers by the bytes of a decode step and by the operations of a prompt."
    )


def dense_text():
    d, f, n = DENSE["hidden_size"], DENSE["intermediate_size"], DENSE["num_hidden_layers"]
    return f"{n} layers of width {d}, {f} inside, {sizes_of('dense-132b').total() / 1e9:.1f} B parameters"


PAGE_TEXT = """\
<!-- Written by benches/serving.py; edit that. -->
# Serving: DBRX beside dense models and Mixtral

![Tokens per second for each user of one GPU against the number of users](serving.svg)

*{kind}: {subtitle}.* {source}

The article that introduced DBRX showed this chart for a node of GPUs: prompts of about {prompt} tokens,
{generate} tokens out, 16 bits, the speed that each user sees. Here it is for one GPU.

## What it says

Decode alone: tokens per second for each user, at {middle} tokens of context.

{decode}

With prompts: each of the users brings {prompt} tokens and gets {generate}; all wait while
prompts are computed.

{whole}

In decode alone the ratio of DBRX to LLaMA-2-70B {decode_ratio}. With prompts it {whole_ratio}.

The reason: a decode step takes as long as it takes to read the weights in use. One token uses 4 of DBRX's
16 experts in a layer, half the bytes of LLaMA-2-70B. A few tokens already use nearly all of them, and all
of DBRX is twice the bytes. A prompt is bound by operations instead, where DBRX has half of LLaMA-2-70B's at
any number of users. So DBRX gains where users are few, or where prompts are long beside the answers. Over
the dense model of its own size the ratio is {dense_ratio}.

## One card

A card of {card} GB holds only a part of each of these models. Decode, for each user, at 1, 8 and 64 users: of
the layers that fit beside the keys and values of 64 users and {spare} GiB for everything else, and of all
layers if they fitted:

{depth}

On a node of 8 cards each does about an eighth of the work of a step, and the exchange between them comes on
top. It is not part of this.

## Formula

A step of B users takes `layers x (projections + attention + network) + head`. Each part takes

```text
max(bytes / copy bandwidth, FLOP / rate of a large product) / efficiency + launches
```

| part | bytes | FLOP |
|---|---|---|
| projections | weights of q, k, v, output | 2 x rows x weights |
| attention | keys and values of all users | 4 x B x context x query columns |
| experts | weights of `E (1 - (1 - k/E)^rows)` experts | 2 x rows x k x weights of an expert |
| dense network | its weights | 2 x rows x weights |
| head | its weights | 2 x B x weights |

Where each token chooses k of a layer's E experts by chance, `E (1 - (1 - k/E)^rows)` of them are used. `rows`
is B in a decode step and {prompt} for a prompt. A user's tokens per second are `1 / step`, and with prompts
`{generate} / (B x prompt + {generate_1} x step)`.

Measured, on an {device} ([{record}](../{record}), see its [README](../benches/record/gpu/README.md)):

* copy bandwidth {copy} TB/s, rate of a large product {matmul} TFLOP/s (both by PyTorch, in the same run);
* the efficiency of the MoE layer of DBRX, routing and all its launches included, and of its products alone,
  as shares of the limit above (more than all of it where reading is faster than copying):

{shares}

* a launch of a small kernel: {small} us at one token, more with more rows (the record's `gather`).

Assumed, since no record has it:

* Mixtral's layers reach the efficiency of DBRX's, and products with one weight that of the experts'
  products, both at the same number of rows for each weight; between the measured numbers it is taken on a
  logarithmic axis;
* attention reads keys and values at {kv} of the copy bandwidth, and computes prompts at {score} of the
  large product's rate;
* a layer has two norms, a rotation, two products and attention besides its network, each counted as one
  small launch; four launches lie outside the layers;
* routing is by chance, without a preferred expert; the card's clock does not fall;
* the dense model has {dense}: LLaMA's layers with 8 heads of keys and values.

## Drawing it from a measurement

On a machine with a Hopper GPU:

```
benches/gpu.sh FOLDER                                      # writes FOLDER/serving.jsonl, among others
benches/gpu.sh --only serving FOLDER                       # that part alone
python3 benches/serving.py --record FOLDER/serving.jsonl   # draws it
python3 benches/serving.py --check                         # compares this page and the picture
```

A `serving.jsonl` in a folder of `benches/record/gpu` is drawn without `--record`, the newest first. Models
that a record lacks stay modelled, and dashed.
"""


def wrapped(text):
    """The same with prose in lines of at most 108 columns."""
    out, prose, code = [], [], False

    def flush():
        if prose:
            lead = "  " if prose[0].startswith("* ") else ""
            out.extend(textwrap.wrap(" ".join(prose), 108, subsequent_indent=lead, **KEEP_WORDS))
            prose.clear()

    for line in text.split("\n"):
        code ^= line.startswith("```")
        if code or not line.strip() or line.startswith(("|", "#", "<", "```", "!")):
            flush()
            out.append(line)
        else:
            if line.startswith("* "):
                flush()
            prose.append(line.strip())
    flush()
    return "\n".join(out)


KEEP_WORDS = dict(break_long_words=False, break_on_hyphens=False)


def newest_record():
    found = sorted(RECORDS.glob("*/serving.jsonl"))
    return found[-1] if found else None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=pathlib.Path, metavar="FILE.jsonl")
    parser.add_argument("--check", action="store_true")
    parser.add_argument(
        "--picture", type=pathlib.Path, metavar="FILE.svg", help="writes the picture alone, there"
    )
    options = parser.parse_args()
    record = options.record.resolve() if options.record else newest_record()
    chart = Chart(Record(record) if record else None)
    files = {options.picture: svg(chart)} if options.picture else {SVG: svg(chart), PAGE: page(chart)}
    if not options.check:
        for path, text in files.items():
            path.write_text(text)
        return
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    wrong = [f"{path.relative_to(ROOT)} is not what benches/serving.py writes" for path in stale]
    wrong += model_sizes.faults()
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
