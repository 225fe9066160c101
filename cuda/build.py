#!/usr/bin/env python3
"""Rebuilds ptx/ and its MANIFEST from cuda/*.cu. Needs nothing but Python and pip: no GPU, driver or CUDA toolkit.

    python3 cuda/build.py            writes ptx/ and tests/params/echo.sm_90a.ptx
    python3 cuda/build.py --check    compares with what is committed and writes nothing

Each file becomes PTX (with line information, whose file names are relative) and, assembled from it, the cubin that is loaded. The output
depends on the sources and the compilers alone; `toolchain.py` names their versions. Every committed PTX, the emulator's test kernels
included, is assembled by the oldest and the newest assembler. A kernel of ours fails the build if either of them says that it spills,
has a stack, or that wgmma is serialised (C75xx); if it uses local memory; or if a loop waits for the whole GPU's memory or flushes
the L1 cache.
"""

import argparse
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import sass
from toolchain import NVRTC_FLAGS, ROOT, Nvrtc, assemblers, disassemble, install, without_lines

MAX_ISA = (8, 4)
HEADER = """\
# The images of this folder; written by cuda/build.py, read by tests/manifest.rs.
# Per image: PTX ISA; hashes (FNV-1a, 64 bits) of its sources (cuda/<stem>.cu and all of cuda/common), of the PTX, and of the cubin, which
# the first of the assemblers made from that PTX.
# Per entry: bytes of parameters; then, where both assemblers agree one figure, else the first's / the second's: registers, stack bytes,
# spilled bytes and static shared bytes; and, counted in the machine code, tensor-core products (hgmma), waits for them (depbar), tensor
# copies by their rank (tma), accesses to local memory (local), and, within loops, barriers that wait for the whole GPU's memory and
# flushes of the L1 cache.
"""
# What must be nothing, by both assemblers.
NOTHING = ["stack", "spills", "local", "membar_in_loops", "flush_in_loops"]
# wgmma serialised, or registers not handed over.
SERIALISED = re.compile(r"\bC75\d\d\b.*")


def fnv(*texts):
    """FNV-1a over the texts, 64 bits: enough to notice a change, and three lines in any language."""
    value = 0xCBF29CE484222325
    for byte in b"".join(texts):
        value = ((value ^ byte) * 0x100000001B3) % 2**64
    return f"{value:016x}"


def reported(log):
    """Per entry, what an assembler says of it: registers, stack, spills, static shared memory."""
    figures = {}
    for entry in re.split(r"Compiling entry function '", log)[1:]:
        number = lambda pattern: int(found[1]) if (found := re.search(pattern, entry)) else 0
        figures[entry.split("'")[0]] = {
            "registers": number(r"Used (\d+) registers"),
            "stack": number(r"(\d+) bytes stack"),
            "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            "shared": number(r"(\d+) bytes smem"),
        }
    return figures


def figures(cubin, log):
    """Per entry, what the assembler says and what is counted in its code."""
    code = disassemble(cubin)
    return {entry: {**said, **sass.counts(code[entry])} for entry, said in reported(log).items()}


def image(source, common, nvrtc, tools):
    """The files of one source, their lines in the manifest, and what is wrong with them."""
    ptx = nvrtc.compile(source, source.read_bytes())
    isa = re.search(r"\.version (\S+)", ptx)[1]
    wrong = [] if tuple(map(int, isa.split("."))) <= MAX_ISA else [f"{source.name}: PTX ISA {isa}"]
    assembled = [tool.assemble(without_lines(ptx)) for tool in tools]
    for tool, (cubin, log) in zip(tools, assembled):
        wrong += [f"{source.name}, ptxas {tool.version}: {text}" for text in SERIALISED.findall(log)]
        wrong += [] if cubin else [f"{source.name}, ptxas {tool.version}: {log}"]
    if not all(cubin for cubin, _ in assembled):
        return {}, "", wrong
    name, cubin = f"{source.stem}.sm_90a", assembled[0][0]
    hashes = f"sources {fnv(source.read_bytes(), *common)} ptx {fnv(ptx.encode())} cubin {fnv(cubin)}"
    lines, by_tool = f"\nimage {name} isa {isa} {hashes}\n", [figures(*both) for both in assembled]
    for entry, param_bytes in re.findall(r"\.entry (\w+)\(\s*\.param [^\[]*\[(\d+)\]", ptx):
        both = [by[entry] for by in by_tool]
        lines += f"entry {entry} params {param_bytes}"
        for figure in both[0]:
            values = [str(of[figure]) for of in both]
            lines += f" {figure} {values[0] if len(set(values)) == 1 else '/'.join(values)}"
            if figure in NOTHING and set(values) != {"0"}:
                wrong.append(f"{entry}: {figure} {values} with ptxas {[tool.version for tool in tools]}")
        lines += "\n"
    return {f"ptx/{name}.ptx": ptx.encode(), f"ptx/{name}.cubin": cubin}, lines, wrong


def test_kernel(path, tools):
    """What is wrong with a committed PTX that is run by tests alone: it must be assembled, without spills and with wgmma in flight.

    A stack is what some of them are there for (local memory, recursion, calls), and a planted bug may be just what serialises wgmma.
    """
    wrong = []
    for tool in tools:
        cubin, log = tool.assemble(path.read_text())
        name = f"{path.relative_to(ROOT)}, ptxas {tool.version}"
        if not cubin:
            wrong.append(f"{name}: {log}")
        elif ".bug_" not in path.name:
            wrong += [f"{name}: {text}" for text in SERIALISED.findall(log)]
            wrong += [f"{name}: {entry} spills" for entry, of in reported(log).items() if of["spills"]]
    return wrong


def echo(params):
    """Source of kernels that write back every field of the parameter structs, one kernel a struct: the size first, then the fields' bits."""
    body = re.findall(r"^struct (\w+) \{(.*?)^\};", params, re.M | re.S)
    structs = {name: re.findall(r"^ +(\w+) +(\w+)(?:\[(\d+)\])?;", fields, re.M) for name, fields in body}

    def leaves(struct, path):
        for kind, field, count in structs[struct]:
            if kind == "TensorMap":
                field, count = f"{field}.words", 16
            places = [f"{path}.{field}[{i}]" for i in range(int(count))] if count else [f"{path}.{field}"]
            for place in places:
                yield from leaves(kind, place) if kind in structs else [place]

    source = """#include "common/params.h"
template <typename P> struct Echo { P p; uint64_t* out; };
__device__ uint64_t bits(const void* p) { return (uint64_t)p; }
__device__ uint64_t bits(uint64_t x) { return x; }
__device__ uint64_t bits(int64_t x) { return x; }
__device__ uint64_t bits(uint32_t x) { return x; }
__device__ uint64_t bits(float x) { return __float_as_uint(x); }
"""
    for name in structs:
        fields = "".join(f"    *out++ = bits({leaf});\n" for leaf in leaves(name, "e.p"))
        source += f'extern "C" __global__ void echo_{name}(const __grid_constant__ Echo<{name}> e) {{\n'
        source += f"    uint64_t* out = e.out;\n    *out++ = sizeof({name});\n{fields}}}\n"
    return source


def echo_image(nvrtc):
    """The echo kernels' PTX, tied to the header that they are of."""
    params = (ROOT / "cuda/common/params.h").read_bytes()
    ptx = nvrtc.compile(ROOT / "echo.cu", echo(params.decode()).encode())
    return f"// of cuda/common/params.h {fnv(params)}; written by cuda/build.py, run by tests/params.rs\n{ptx}".encode()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is committed, write nothing")
    check = parser.parse_args().check

    install()
    nvrtc, tools = Nvrtc(), assemblers()
    common = [path.read_bytes() for path in sorted((ROOT / "cuda/common").rglob("*.*h"))]
    sources = sorted((ROOT / "cuda").glob("*.cu"))
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda source: image(source, common, nvrtc, tools), sources))
    files = {"tests/params/echo.sm_90a.ptx": echo_image(nvrtc)}
    versions = " ".join(tool.version for tool in tools)
    manifest = f"{HEADER}compiler NVRTC {nvrtc.version}\nflags {' '.join(NVRTC_FLAGS)}\nassemblers {versions}\n"
    wrong = []
    for written, lines, complaints in images:
        files |= written
        manifest += lines
        wrong += complaints
    files["ptx/MANIFEST"] = manifest.encode()

    for name, content in files.items():
        path = ROOT / name
        if check:
            wrong += [] if path.exists() and path.read_bytes() == content else [f"{name} is not what cuda/build.py writes"]
        else:
            path.write_bytes(content)
    # Those of triton/ need ISA 8.6, which the oldest assembler does not know; Triton has assembled them.
    emulated = ROOT / "tests/emulator/kernels"
    own = sorted(path for path in emulated.rglob("*.ptx") if path.relative_to(emulated).parts[0] != "triton")
    kernels = [ROOT / "tests/params/echo.sm_90a.ptx", *own]
    with ThreadPoolExecutor() as pool:
        wrong += [text for texts in pool.map(lambda path: test_kernel(path, tools), kernels) for text in texts]
    if wrong:
        sys.exit("\n".join(wrong))
    entries = manifest.count("\nentry ")
    print(f"{'checked' if check else 'written'}: {len(images)} images of {entries} entries, {len(kernels)} test kernels, ptxas {versions}")


if __name__ == "__main__":
    main()
