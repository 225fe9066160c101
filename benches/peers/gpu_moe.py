#!/usr/bin/env python3
"""Times what a PyTorch user has for the MoE layer, and the GPU's two ceilings: one line of JSON per figure, as benches/gpu.rs writes them.

    python3 benches/peers/gpu_moe.py [--tokens 8192,1,64] [--out FILE] [--rehearse]

DBRX's shapes, bf16, normal numbers, 6.3 GB of weights, so that the L2 cache is cold. The peer is torch._grouped_mm over rows already
sorted by expert: `glu_nt` is the product with w1 and v1 side by side, the activation not counted; `nn` the second product; `layer` all of
routing, sorting, both products, activation and weighted sum, in eager mode and replayed as a CUDA graph; nothing of it waits for the
GPU. Medians of 7 batches. A figure that fails is a line with an `error` and costs no other; then the exit code is 1.
`--rehearse` runs small shapes on the CPU, to see that the script works: its times mean nothing.
"""

import argparse
import json
import statistics
import sys
import time

import torch

D, F, E, K = 6144, 10752, 16, 4


def timed(call, device):
    """Median, least and greatest microseconds of a call."""
    sync = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def batch(calls):
        sync()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        sync()
        return (time.perf_counter() - start) / calls * 1e6

    batch(2)
    once = batch(1)
    calls = 1 if device == "cpu" else max(1, min(1000, int(20e3 / once) + 1))
    times = sorted(batch(calls) for _ in range(1 if device == "cpu" else 7))
    return statistics.median(times), times[0], times[-1]


class Record:
    def __init__(self, path, device):
        self.file = open(path, "w") if path else None
        self.device = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        self.failed = False

    def write(self, **fields):
        line = json.dumps(dict(device=self.device, torch=torch.__version__, **fields))
        print(line, flush=True)
        if self.file:
            print(line, file=self.file, flush=True)

    def figure(self, what, form, tokens, call, device, flop=0.0, bytes_moved=0.0, calls=1, **more):
        """Times what `call` makes: a function of its own, so that what fails while it is made is told, too. Where
        it holds several `calls`, the figure is of one of them. True if there is a figure; a peer that refuses
        (`Refused`) has not failed."""
        which = dict(what=what, form=form, tokens=tokens, **more)
        try:
            times = [us / calls for us in timed(call(), device)]
        except Refused as refusal:
            self.write(**which, refused=first_line(refusal))
            return False
        except Exception as error:
            self.failed = True
            self.write(**which, error=first_line(error))
            return False
        median = times[0]
        us = dict(zip(("us", "us_min", "us_max"), (round(time, 1) for time in times)))
        rates = dict(tflops=round(flop / median / 1e6, 6), gb_s=round(bytes_moved / median / 1e3, 6))
        self.write(**which, **us, **rates)
        return True


class Refused(Exception):
    """The peer does not serve a call, as a user would be told."""


def first_line(error):
    return str(error).splitlines()[0] if str(error) else repr(error)


def ceilings(record, device):
    n, copied = (8192, 1 << 31) if device == "cuda" else (512, 1 << 20)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    record.figure("matmul", f"{n}^3", n, lambda: lambda: a @ b, device, flop=2 * n**3)
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    record.figure("copy", f"{copied} bytes read and written", 0, lambda: lambda: target.copy_(source), device, bytes_moved=2 * copied)


def rows_of(ids):
    """How many rows each expert has. Unlike torch.bincount it does not wait for the GPU, so that a graph can hold it."""
    return (ids.flatten()[:, None] == torch.arange(E, device=ids.device)).sum(0)


def layer(x, router, w13, w2):
    """The layer as a user of torch._grouped_mm writes it: w13 [E, D, 2 F], w2 [E, F, D]."""
    tokens = x.shape[0]
    weights, ids = torch.topk(torch.softmax((x @ router.t()).float(), -1), K)
    weights = weights / weights.sum(-1, keepdim=True)
    order = torch.argsort(ids.flatten(), stable=True)
    ends = torch.cumsum(rows_of(ids), 0).to(torch.int32)
    h = torch._grouped_mm(x[order // K], w13, offs=ends)
    gate, up = h.chunk(2, -1)
    out = torch._grouped_mm(torch.nn.functional.silu(gate) * up, w2, offs=ends)
    y = torch.zeros(tokens * K, x.shape[1], device=x.device, dtype=x.dtype)
    y[order] = out
    return (y.view(tokens, K, -1) * weights.to(x.dtype).unsqueeze(-1)).sum(1)


def graph_of(call):
    """A replay of `call`, captured after a warm-up on a stream of its own, as PyTorch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(record, device, tokens, x, h, router, w13, w2):
    d, f = w2.shape[2], w2.shape[1]
    ids = torch.topk(x @ router.t(), K).indices.flatten()
    order, counts = torch.argsort(ids, stable=True), rows_of(ids)
    ends, rows = torch.cumsum(counts, 0).to(torch.int32), x[order // K]
    flop, weight_bytes = 2 * tokens * K * d * f, int((counts > 0).sum()) * d * f * 2

    def whole():
        return layer(x, router, w13, w2)

    grouped = "torch._grouped_mm"
    record.figure("glu_nt", grouped, tokens, lambda: lambda: torch._grouped_mm(rows, w13, offs=ends), device, 2 * flop, 2 * weight_bytes)
    record.figure("nn", grouped, tokens, lambda: lambda: torch._grouped_mm(h, w2, offs=ends), device, flop, weight_bytes)
    record.figure("layer", "torch, eager", tokens, lambda: whole, device, 3 * flop, 3 * weight_bytes)
    if device == "cuda":
        record.figure("layer", "torch, graph", tokens, lambda: graph_of(whole), device, 3 * flop, 3 * weight_bytes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="8192,2048,512,1,8,64,4,2,16,32,128")
    parser.add_argument("--out")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("no GPU that torch can use; --rehearse runs on the CPU")
    device, d, f = ("cpu", 64, 128) if options.rehearse else ("cuda", D, F)
    torch.manual_seed(1)
    record = Record(options.out, device)
    ceilings(record, device)
    scale = d**-0.5
    router = torch.randn(E, d, device=device, dtype=torch.bfloat16) * scale
    # As rows of w1 and v1 lie: [E, 2 F, D], used transposed.
    w13 = (torch.randn(E, 2 * f, d, device=device, dtype=torch.bfloat16) * scale).transpose(1, 2)
    w2 = torch.randn(E, f, d, device=device, dtype=torch.bfloat16) * scale
    # All inputs before the first capture: what fails within one may leave the generator unusable.
    batches = [min(tokens, 8) if options.rehearse else tokens for tokens in map(int, options.tokens.split(","))]
    most = max(batches)
    x = torch.randn(most, d, device=device, dtype=torch.bfloat16)
    h = torch.randn(most * K, f, device=device, dtype=torch.bfloat16)
    for tokens in batches:
        try:
            measure(record, device, tokens, x[:tokens], h[: tokens * K], router, w13, w2)
        except Exception as error:
            record.failed = True
            record.write(what="all", form="", tokens=tokens, error=repr(error))
    sys.exit(record.failed)


if __name__ == "__main__":
    main()
