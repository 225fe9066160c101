#!/usr/bin/env python3
"""Everything that wants a GPU, in one run: correctness, then times, then what PyTorch does there.

    benches/gpu.sh [FOLDER]              records go to FOLDER, benches/record/gpu/<date> by default
    benches/gpu.sh --rehearse [FOLDER]   every step on the emulator and on stand-ins, without a GPU
    benches/gpu.sh --only PART [FOLDER]  one part (tests, attention, products, model, serving, profiles) with
                                         the time of all

Every step is a process of its own with a time limit, so that neither a hang nor a lost device costs another
step; what fails is said, and the next step runs. The whole takes at most --seconds (420), and each part of it
its share (`PARTS`) and what the parts before have left: a step that would take longer is cut short or left
out, and the summary says so. After each step FOLDER holds all results so far: logs.tar.gz, dropless.jsonl
and torch.jsonl (the products and the layer, ours and PyTorch's), attention.jsonl and torch_attention.jsonl,
dbrx.jsonl (the model's steps), serving.jsonl and serving.svg (the chart of docs/serving.md), table.md,
summary.txt, ncu.ncu-rep, ncu_attention.ncu-rep.

DROPLESS_BIN names a folder of executables built elsewhere, for a machine without Rust: test/NAME, bench/gpu,
example/NAME, as benches/pack.sh packs them. Without it cargo builds them first, which does not count. Ends with 1
if anything failed.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import datetime
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time

import model_steps

ROOT = pathlib.Path(__file__).resolve().parent.parent
SUMMARY_LINES = 40
RESERVE = 10  # seconds kept for saving and for a process that must be killed
# The parts in their order, and their shares of the time in seconds out of 410.
PARTS = {"tests": 110, "attention": 70, "products": 75, "model": 60, "serving": 60, "profiles": 35}
REFUSED = 2  # the model example's exit code where it does not take what it is given


class Run:
    """The steps so far, their logs, and the time that is left."""

    def __init__(self, out, work, seconds, kill_after=5, only=None):
        self.out, self.logs, self.kill_after = out, work / "logs", kill_after
        self.parts = {only: PARTS[only]} if only else PARTS
        self.start, self.seconds = time.monotonic(), seconds
        self.steps, self.lock = [], threading.Lock()
        self.until, self.shared, self.times = seconds - RESERVE, 0, []
        self.patience = 1
        self.logs.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)

    def spent(self):
        return time.monotonic() - self.start

    def left(self):
        """Seconds until the part must be over."""
        return self.until - self.spent()

    @contextlib.contextmanager
    def part(self, name):
        """A part of the run. Its steps end when its share of the time is used up, and what was left before it."""
        self.shared += self.parts[name]
        self.until, begin = self.shared / sum(self.parts.values()) * (self.seconds - RESERVE), self.spent()
        has = self.until - begin
        print(f"{begin:5.0f} s  -- {name}: has {has:.0f} s, until {self.until:.0f} s", flush=True)
        try:
            yield
        except Exception as error:  # costs no other part
            self.note(name, f"FAILED ({error!r})", 0)
        self.times.append(f"{name} {self.spent() - begin:.0f} of {has:.0f} s")

    def note(self, name, verdict, took, telling="", details=()):
        with self.lock:
            self.steps.append((name, verdict, telling, list(details)))
            print(f"{self.spent():5.0f} s  {name}: {verdict} ({took:.0f} s) {telling}", flush=True)
            self.save()

    def step(self, name, command, limit=60, keep=(), judge=lambda log: None, refusable=False):
        """Runs a command within its limit and its part's; True if all is well. `keep` are files of its own
        that go to the folder. `judge` may say what is wrong with the log of a command that ended well. Where
        the command is `refusable`, a refusal is no failure: the step is skipped, and its last line says why.
        """
        left = self.left()
        limit *= self.patience
        limit, cut = min(limit, left), limit > left
        if limit < 1:
            self.note(name, "skipped", 0, "no time is left")
            return False
        log, begin = self.logs / f"{name}.log", time.monotonic()
        with open(log, "wb") as file:
            bounded = ["timeout", "-k", str(self.kill_after), f"{limit:.1f}", *map(str, command)]
            streams = dict(stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
            process = subprocess.Popen(bounded, cwd=ROOT, **streams)
            try:
                code = process.wait(limit + self.kill_after + 2)
            except subprocess.TimeoutExpired:  # not even killed: a call into the driver that does not return
                code = 137
        killed = f"FAILED (stopped after {limit:.0f} s{', its part is over' if cut else ''})"
        verdict = "ok" if code == 0 else killed if code in (124, 137, -signal.SIGKILL) else f"FAILED ({code})"
        wrong = judge(log) if code == 0 else None
        verdict = f"FAILED ({wrong})" if wrong else verdict
        verdict = "skipped" if refusable and code == REFUSED else verdict
        for path in filter(pathlib.Path.exists, keep):
            shutil.copy(path, self.out)
        self.note(name, verdict, time.monotonic() - begin, *telling(log, verdict.startswith("FAILED")))
        return verdict == "ok"

    def together(self, steps, workers):
        """Steps side by side: (name, command, limit)."""
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda step: self.step(*step), steps))

    def save(self):
        """The logs and the summary, as they are now."""
        (self.out / "summary.txt").write_text("\n".join(self.summary()) + "\n")
        part = self.logs.parent / "logs.tar.gz"
        with tarfile.open(part, "w:gz") as tar:
            tar.add(self.logs, "logs")
        shutil.copy(part, self.out)

    def failed(self):
        return [step for step in self.steps if step[1].startswith("FAILED")]

    def summary(self):
        """How many failed, the card, what is fine by name, and each step that is not, with why."""
        fine, lines = {}, []
        for name, verdict, text, details in self.steps:
            if verdict == "ok":
                group = name.split("-")[0]
                fine[group] = fine.get(group, 0) + 1
            if verdict != "ok" or (name in ("card", "xid") or name.endswith("-plan")) and text:
                lines.append(f"{name}: {verdict}: {' | '.join(details) or text}")
        names = ", ".join(group if count == 1 else f"{count} of {group}" for group, count in fine.items())
        verdict = f"{len(self.failed())} of {len(self.steps)} steps failed, {self.spent():.0f} s"
        return [
            verdict,
            f"ok: {names}",
            *filter(None, [f"time: {', '.join(self.times)}" if self.times else ""]),
            *lines,
        ]


def telling(log, failed):
    """The line of a log that says most, and after a failure the two lines that say why."""
    lines = [line.strip()[:160] for line in log.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith("note: run with")]
    having = lambda pattern: [i for i, line in enumerate(lines) if re.search(pattern, line)]
    best = [lines[i] for i in having(" on the GPU: ") or having("^test result")] or lines
    why = having(r"panicked at|[Ee]rror\b") if failed else []
    after = why[0] + ("panicked at" in lines[why[0]]) if why else -2
    return best[-1] if best else "", lines[after:][:2] if failed else []


def output_of(command):
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


class Executables:
    """Where tests, benches and examples are."""

    def __init__(self, rehearse):
        folder = os.environ.get("DROPLESS_BIN")
        self.folder = pathlib.Path(folder).resolve() if folder else None
        self.found = {}
        if self.folder:
            if not self("test", "params").is_file():
                sys.exit(
                    f"DROPLESS_BIN: {self.folder} holds no test/params; benches/pack.sh makes such a folder"
                )
            return
        # A rehearsal takes what `cargo test` has built anyway.
        commands = [["test", "--no-run"], ["test", "--bench", "gpu", "--no-run"]]
        if not rehearse:
            commands = [
                ["test", "--no-run"],
                ["bench", "--bench", "gpu", "--no-run"],
                ["build", "--release", "--examples"],
            ]
        packages = [str(ROOT / "Cargo.toml"), str(ROOT / "examples/lm/Cargo.toml")]
        for command in commands:
            for message in map(
                json.loads, output_of(["cargo", *command, "--message-format=json"]).splitlines()
            ):
                if message.get("executable") and message["manifest_path"] in packages:
                    target = message["target"]
                    self.found[target["kind"][0], target["name"]] = message["executable"]

    def __call__(self, kind, name):
        return self.folder / kind / name if self.folder else self.found[kind, name]

    def tests_of(self, run, name):
        """The names of a binary's tests; none, and a step that failed or was left out, where it cannot list them."""
        listed = run.step(f"list-{name}", [self("test", name), "--list"], 20)
        lines = (run.logs / f"list-{name}.log").read_text(errors="replace").splitlines() if listed else []
        return [line.removesuffix(": test") for line in lines if line.endswith(": test")]


def steps(run, exe, rehearse):
    """All parts that were asked for, correctness before speed."""
    records = Records(run.logs.parent, run.logs)
    parts = dict(
        tests=tests, attention=attention, products=products, model=model, serving=serving, profiles=profiles
    )
    for name in run.parts:
        with run.part(name):
            parts[name](run, exe, rehearse, records)


class Records:
    """The files that figures go to."""

    def __init__(self, work, logs):
        self.ours, self.peers, self.again = (
            work / "dropless.jsonl",
            work / "torch.jsonl",
            logs / "again.jsonl",
        )
        self.attention, self.attention_peers = work / "attention.jsonl", work / "torch_attention.jsonl"
        self.attention_again = logs / "attention_again.jsonl"
        self.model, self.serving = work / "dbrx.jsonl", work / "serving.jsonl"

    def all(self):
        return [
            self.ours,
            self.peers,
            self.again,
            self.attention,
            self.attention_peers,
            self.attention_again,
            self.model,
            self.serving,
        ]


def tests(run, exe, rehearse, records):
    example = lambda name: exe("example", name)
    workers = 2 if rehearse else 6

    def test(name, *arguments):
        return [exe("test", name), "--test-threads=1", *arguments]

    if shutil.which("nvidia-smi"):
        fields = "name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
        query = f"nvidia-smi --query-gpu={fields} --format=csv,noheader"
        run.step("card", ["sh", "-c", f"nvidia-smi -q -d CLOCK,POWER,MEMORY; {query}"], 15)
    run.step("params", test("params", "every_field_arrives"), 30)

    families = [name for name in exe.tests_of(run, "instructions") if not name.startswith("a_")]
    each = [(f"instructions-{name}", test("instructions", "--exact", name), 30) for name in families]
    run.together([("doctor", doctor(exe, rehearse), 90), *each], workers)

    listed = [name for name in exe.tests_of(run, "ops") if "::" in name]
    tensor_cores_first = lambda name: (not re.search("tiles|moe|grouped|attention", name), name)
    modules = sorted({name.split("::")[0] for name in listed}, key=tensor_cores_first)
    pick = {module: next(name for name in listed if name.startswith(f"{module}::")) for module in modules}
    chosen = {module: ["--exact", pick[module]] if rehearse else [f"{module}::"] for module in modules}
    each = [(f"ops-{module}", test("ops", *arguments), 90) for module, arguments in chosen.items()]
    run.together(each, workers)

    run.step("hardware", test("hardware"), 60)
    run.step("dbrx", test("dbrx", "devices::what_a_gpu" if rehearse else "devices::"), 60)
    run.step("generate", [example("dbrx"), "--device", "cpu" if rehearse else "cuda:0"], 30)


def doctor(exe, rehearse):
    return [exe("example", "doctor"), *(["--emulated"] if rehearse else [])]


def peer(run, name, script, record, limit, rehearse):
    """A script that measures PyTorch, where there is one."""
    if not importlib.util.find_spec("torch"):
        return run.note(name, "skipped", 0, "this Python has no torch")
    command = [
        sys.executable,
        f"benches/peers/{script}",
        "--out",
        record,
        *(["--rehearse"] if rehearse else []),
    ]
    run.step(name, command, limit, keep=[record])


def some_attention(rehearse):
    """Cases that are measured again, and profiled."""
    names = ["1 x 40 of 40", "3 x 1 of 70"] if rehearse else ["1 x 4096 of 4096", "32 x 1 of 4096"]
    return ["--attention", *(word for name in names for word in ("--case", name))]


def attention(run, exe, rehearse, records):
    """Attention, ours and PyTorch's, case by case."""
    emulated = ["--emulated"] if rehearse else []
    command = [exe("bench", "gpu"), "--attention", "--out", records.attention, *emulated]
    run.step("attention", command, 60, keep=[records.attention])
    peer(run, "attention-peer", "gpu_attention.py", records.attention_peers, 60, rehearse)
    again = [exe("bench", "gpu"), *some_attention(rehearse), "--out", records.attention_again, *emulated]
    run.step("attention-again", again, 30)


def products(run, exe, rehearse, records):
    """The products and the layer, ours and PyTorch's, and some of ours again."""
    bench, emulated = exe("bench", "gpu"), ["--emulated"] if rehearse else []
    run.step("bench", [bench, "--out", records.ours, *emulated], 100, keep=[records.ours])
    peer(run, "peer", "gpu_moe.py", records.peers, 80, rehearse)
    run.step("again", [bench, "--tokens", "8192,8,1", "--out", records.again, *emulated], 40)


class Timed:
    """Steps of a model with random weights, in as many layers as fit: their commands, and their lines."""

    def __init__(self, run, exe, rehearse, config, steps, record):
        self.run, self.exe, self.config, self.steps, self.record = run, exe, config, steps, record
        self.device = "emulated" if rehearse else "cuda:0"

    def one(self, name, step, layers, limit):
        """Runs a step and keeps its line; gives its figures, or none."""
        run, log = self.run, self.run.logs / f"{name}.log"
        command = [self.exe("example", "dbrx"), "--device", self.device, "--random", self.config.path]
        judge = lambda log: step.wrong(model_steps.figures(log.read_text(errors="replace")))
        fine = run.step(name, [*command, *step.options(layers)], limit, judge=judge)
        figures = model_steps.figures(log.read_text(errors="replace")) if fine else None
        if figures and step is not model_steps.PROBE:
            with self.record.open("a") as file:
                file.write(f"{json.dumps(step.line(self.config, layers, figures))}\n")
            shutil.copy(self.record, run.out)
        return figures

    def plan(self, name, left, loads):
        """How many layers to run, so that so many steps are done in time, or none where not even one does."""
        begin = time.monotonic()
        probed = self.one(f"{name}-probe", model_steps.PROBE, 1, 40)
        if not probed:
            self.run.note(f"{name}-plan", "skipped", 0, "not even one layer runs")
            return None
        spent = time.monotonic() - begin
        plan = model_steps.Plan(self.config, self.steps, probed, spent, loads)
        layers, why = plan.layers(left - spent)
        self.run.note(f"{name}-plan", "ok", 0, why)
        return layers


def cannot_emulate(exe, rehearse):
    return rehearse and "emulated" not in output_of([exe("example", "dbrx"), "--help"])


def model(run, exe, rehearse, records):
    """Steps of DBRX."""
    if cannot_emulate(exe, rehearse):
        return run.note("model-plan", "skipped", 0, "this tree's dbrx has no --device emulated")
    steps = model_steps.REHEARSED if rehearse else model_steps.STEPS
    config = model_steps.Config(ROOT / (model_steps.SMALL if rehearse else model_steps.DBRX))
    timed = Timed(run, exe, rehearse, config, steps, records.model)
    layers = timed.plan("model", run.left(), len(steps))
    for step in steps if layers else []:
        timed.one(f"model-{step.name}", step, layers, 60)


def serving(run, exe, rehearse, records):
    """Steps of the chart's models by numbers of users; a model that the example refuses is left out."""
    if cannot_emulate(exe, rehearse):
        return run.note("serving-plan", "skipped", 0, "this tree's dbrx has no --device emulated")
    work, served = run.logs.parent, []
    for name in model_steps.SERVED:
        small = model_steps.write_small(name, work)
        once = ["--layers", "1", "--random-tokens", "1", "--generate", "1"]
        command = [exe("example", "dbrx"), "--device", "cpu", "--random", small, *once]
        if run.step(f"serving-{name}-config", command, 20, refusable=True):
            config = model_steps.Config(small if rehearse else model_steps.CONFIGS / f"{name}.json")
            steps = model_steps.serving_steps(name, rehearse)
            served.append((name, Timed(run, exe, rehearse, config, steps, records.serving)))
    layers = {}
    for at, (name, timed) in enumerate(served):
        share = run.left() / (len(served) - at)
        layers[name] = timed.plan(f"serving-{name}", share, model_steps.FIRST)
    for number in range(len(model_steps.serving_steps("", rehearse))):
        for name, timed in served:
            if layers[name]:
                step = timed.steps[number]
                timed.one(f"serving-{step.name}", step, layers[name], 60)
    if records.serving.exists():
        picture = work / "serving.svg"
        command = [sys.executable, "benches/serving.py", "--record", records.serving, "--picture", picture]
        run.step("serving-chart", command, 10, keep=[picture])


def profiles(run, exe, rehearse, records):
    """Profiles of some launches, a check of every access, and the table."""
    bench, emulated, work = exe("bench", "gpu"), ["--emulated"] if rehearse else [], run.logs.parent
    table = run.out / "table.md"
    make = 'table=$1; shift; "$@" >"$table"'
    command = ["sh", "-c", make, "-", table, sys.executable, "benches/peers/gpu_table.py", *records.all()]
    run.step("table", command, 10, judge=lambda _: None if table.stat().st_size else "it is empty")

    def profile(name, kernels, arguments, limit):
        to = work / f"{name}.ncu-rep"
        once = [
            "--filter-mode",
            "per-launch-config",
            "--launch-count",
            "1",
            "--kernel-name",
            f"regex:{kernels}",
        ]
        ncu = ["ncu", "--clock-control", "none", "--set", "full", *once, "-f", "-o", to.with_suffix("")]
        run.step(name.replace("_", "-"), [*ncu, bench, *arguments, *emulated], limit, keep=[to])
        run.step(f"{name.replace('_', '-')}-details", ["ncu", "--import", to, "--page", "details"], 20)

    if shutil.which("ncu"):
        profile("ncu_attention", "attention_prefill|attention_decode", some_attention(rehearse), 40)
        kernels = "glu_nt_bf16_256x2|nn_bf16_256x2|glu_nt_bf16_few8"
        profile("ncu", kernels, ["--tokens", "8192,8", "--what", "gather,glu_nt_of_sorted,nn"], 60)
    if shutil.which("compute-sanitizer"):
        sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
        run.step("sanitizer", [*sanitizer, *doctor(exe, rehearse)], 90)
    run.step(
        "xid", ["sh", "-c", "dmesg 2>/dev/null | grep -i xid | tail -5; true"], 5
    )  # in the summary, if there is any


ALL = set(
    "card params list doctor instructions ops hardware dbrx generate attention bench peer again model serving"
    " ncu sanitizer xid table".split()
)
STAND_INS = {
    "nvidia-smi": 'case "$*" in *memory.free*) echo 80000 ;; *) echo a stand-in, 0, 0 MHz, 0 MHz, 0 W, 0 ;; esac',
    "ncu": 'while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2.ncu-rep"; shift; done',
    "compute-sanitizer": "echo a stand-in",
}


def rehearse(run, exe, stand_ins):
    """The steps, and what must hold for the machinery around them. Gives what does not."""
    for name, text in STAND_INS.items():
        (stand_ins / name).write_text(f"#!/bin/sh\n{text}\n")
        (stand_ins / name).chmod(0o755)
    os.environ["PATH"] = f"{stand_ins}:{os.environ['PATH']}"
    begin = run.spent()
    run.step("planted-hang", ["sh", "-c", "trap '' TERM; sleep 60 & wait; sleep 60"], 1)
    hung = run.spent() - begin
    run.step("planted-failure", ["sh", "-c", "echo error: on purpose; exit 3"])
    run.until, until = 0, run.until
    run.step("planted-late", ["true"])
    run.until = until
    run.step("planted-wrong", ["true"], judge=lambda log: "nothing in it")
    planted = [verdict for _, verdict, *_ in run.steps]
    # What follows is judged alone.
    run.steps, run.patience = [], 3  # the machine may have other work
    steps(run, exe, True)
    run.save()
    promised = [
        "logs.tar.gz",
        "dropless.jsonl",
        "attention.jsonl",
        "table.md",
        "summary.txt",
        "ncu.ncu-rep",
        "ncu_attention.ncu-rep",
    ]
    promised += ["torch.jsonl", "torch_attention.jsonl"] if importlib.util.find_spec("torch") else []
    fine = [step[0] for step in run.steps if step[1] == "ok"]
    promised += ["dbrx.jsonl"] if "model-plan" in fine else []
    promised += ["serving.jsonl", "serving.svg"] if "serving-dbrx-plan" in fine else []
    present = sorted(path.name for path in run.out.iterdir())
    empty = [
        name for name in present if not name.endswith(".ncu-rep") and not (run.out / name).stat().st_size
    ]
    missing = sorted(ALL - {name.split("-")[0] for name, *_ in run.steps})
    incomplete = incomplete_attention(run.out)
    expected = {
        f"the planted steps: {planted}": planted
        == ["FAILED (stopped after 1 s)", "FAILED (3)", "skipped", "FAILED (nothing in it)"],
        f"the step that hangs took {hung:.0f} s": hung < 10,
        f"the folder holds {present}, should hold {sorted(promised)}": present == sorted(promised),
        f"empty files: {empty}": not empty,
        f"no step of {missing}": not missing,
        f"the time shared out is {run.shared} s": run.shared == sum(run.parts.values()),
        f"figures of attention that are missing: {incomplete}": not incomplete,
    }
    return [text for text, holds in expected.items() if not holds]


def incomplete_attention(out):
    """Cases of the file that have no figure or, where the peer has a record, none of the peer's beside it."""
    lines = (ROOT / "benches/gpu/attention_cases.txt").read_text().splitlines()
    numbers = [line.split()[1:] for line in lines if line.startswith("rehearsal ")]
    name = (
        lambda h, kv, d, batch, history, new: f"{h}/{kv} x {d}, {batch} x {new} of {int(history) + int(new)}"
    )
    wanted = {(f"attention_{function}", name(*rest)) for function, *rest in numbers}
    missing = []
    for record in filter(pathlib.Path.exists, [out / "attention.jsonl", out / "torch_attention.jsonl"]):
        figures = [figure for figure in map(json.loads, record.read_text().splitlines()) if "us" in figure]
        missing += sorted(wanted - {(figure["what"], figure.get("case")) for figure in figures})
    if (out / "torch_attention.jsonl").exists():
        rows = [
            line.split(" | ")
            for line in (out / "table.md").read_text().splitlines()
            if line.startswith("| attention_")
        ]
        missing += [row[:3] for row in rows if row[-2] == "-"]
    return missing


def driver_is_there():
    try:
        return bool(ctypes.CDLL("libcuda.so.1"))
    except OSError:
        return False


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--rehearse", action="store_true", help="go through every step here, without a GPU")
    parser.add_argument("--only", choices=PARTS, metavar="PART", help="this part alone, with the time of all")
    parser.add_argument(
        "--seconds", type=int, default=420, help="the time that all steps share (%(default)s)"
    )
    options = parser.parse_args()
    if options.rehearse and options.only:
        parser.error("a rehearsal goes through all parts, without --only")
    if not options.rehearse and not driver_is_there():
        sys.exit(
            "no CUDA driver (libcuda.so.1) on this machine: nothing is built or run; --rehearse needs none"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is saved
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        dated = ROOT / "benches/record/gpu" / datetime.date.today().isoformat()
        out = (options.folder or (work / "out" if options.rehearse else dated)).resolve()
        if options.rehearse:
            variables = {"DROPLESS_SCHEDULE": "in_order,eager"}
        else:
            cache = {"CUDA_CACHE_PATH": "/tmp/dropless-cuda-cache", "CUDA_CACHE_MAXSIZE": str(4 << 30)}
            variables = {"DROPLESS_HARDWARE_ONLY": "1", **cache}
        os.environ.update(variables, RUST_BACKTRACE="0")
        exe = Executables(options.rehearse)
        run, wrong = Run(out, work, options.seconds, 1 if options.rehearse else 5, options.only), []
        try:
            if options.rehearse:
                (work / "stand-ins").mkdir()
                wrong = rehearse(run, exe, work / "stand-ins")
            else:
                steps(run, exe, False)
        finally:
            run.save()
            lines = run.summary() + wrong
            if len(lines) > SUMMARY_LINES:
                lines[SUMMARY_LINES - 1 :] = ["the rest is in summary.txt"]
            print("\n".join(lines))
    sys.exit(bool(run.failed() or wrong))


if __name__ == "__main__":
    main()
