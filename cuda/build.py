#!/usr/bin/env python3
"""Rebuilds ptx/ and its MANIFEST from cuda/*.cu with NVRTC 12.4, whose PTX (ISA 8.4) loads on drivers from R550 on.

    pip install nvidia-cuda-nvrtc-cu12==12.4.127
    NVRTC_12_4=path/to/libnvrtc.so.12 python3 cuda/build.py

`ptxas` on PATH (any version from 12.4 on) assembles each image for the MANIFEST's figures: registers, stack, spills and static
shared memory of every entry. A kernel with a stack frame or a spill fails the build. Images carry line info; file names in
it are relative to the repository, so that the output depends on the sources and the compiler alone.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["--gpu-architecture=compute_90a", "--std=c++17", "--generate-line-info"]
MAX_ISA = (8, 4)
HEADER = """\
# The images of this folder; written by cuda/build.py, read by tests/manifest.rs.
# Per image: PTX ISA, hash of its sources (cuda/<stem>.cu and all of cuda/common), hash of the image; hashes are FNV-1a, 64 bits.
# Per entry: bytes of parameters; registers, stack bytes, spilled bytes and static shared bytes as ptxas counts them; and, counted in the
# machine code, tensor-core products (hgmma), waits for them (depbar) and tensor copies by their rank (tma).
"""


class Nvrtc:
    """libnvrtc, as far as it is needed to turn a source text into PTX."""

    def __init__(self, library):
        self.lib = ctypes.CDLL(library)
        self.lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.check(self.lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
        self.version = f"{major.value}.{minor.value}"

    def check(self, code, what):
        if code:
            sys.exit(f"{what}: {self.lib.nvrtcGetErrorString(code).decode()}")

    def text(self, program, get_size, get):
        size = ctypes.c_size_t()
        get_size(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        get(program, buffer)
        return buffer.value.decode()

    def compile(self, source, text):
        """The PTX of one file's text; the compiler's messages go to stderr and a failure ends the run."""
        program = ctypes.c_void_p()
        self.check(self.lib.nvrtcCreateProgram(ctypes.byref(program), text, str(source).encode(), 0, None, None), source.name)
        flags = [flag.encode() for flag in [*FLAGS, f"--include-path={ROOT / 'cuda'}"]]
        code = self.lib.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
        if log := self.text(program, self.lib.nvrtcGetProgramLogSize, self.lib.nvrtcGetProgramLog).strip():
            print(log, file=sys.stderr)
        self.check(code, source.name)
        ptx = self.text(program, self.lib.nvrtcGetPTXSize, self.lib.nvrtcGetPTX)
        self.lib.nvrtcDestroyProgram(ctypes.byref(program))
        ptx = ptx[ptx.index(".version") :].rstrip() + "\n"  # without the compiler's banner
        ptx = re.sub(r"(?m)^\s*// (begin|end) inline asm\n", "", ptx)
        return re.sub(rf'(?m)^(\s*\.file\s+\d+ )"{re.escape(str(ROOT))}/', r'\1"', ptx)


def fnv(*texts):
    """FNV-1a over the texts, 64 bits: enough to notice a change, and three lines in any language."""
    value = 0xCBF29CE484222325
    for byte in b"".join(texts):
        value = ((value ^ byte) * 0x100000001B3) % 2**64
    return f"{value:016x}"


def assembled(ptxas, cuobjdump, ptx):
    """Per entry: registers, stack, spills, shared bytes, products, waits, tensor copies; nothing without ptxas and cuobjdump."""
    if not (ptxas and cuobjdump):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        source, code = Path(folder, "image.ptx"), Path(folder, "image.cubin")
        source.write_text(ptx)
        run = subprocess.run([ptxas, "-v", "--gpu-name=sm_90a", "-o", code, source], capture_output=True, text=True)
        # C7500 to C7519: wgmma serialised, or registers not handed over.
        if run.returncode or re.search(r"\bC75[01]\d\b", run.stderr):
            sys.exit(run.stderr)
        sass = subprocess.run([cuobjdump, "--dump-sass", code], capture_output=True, text=True, check=True).stdout
    code = {text.split("\n")[0].strip(): text for text in sass.split("Function : ")[1:]}
    figures = {}
    for entry in re.split(r"Compiling entry function '", run.stderr)[1:]:
        number = lambda pattern: int(found[1]) if (found := re.search(pattern, entry)) else 0
        name, text = entry.split("'")[0], code[entry.split("'")[0]]
        stack, spills = number(r"(\d+) bytes stack"), number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
        count = lambda pattern: len(re.findall(pattern, text))
        copies = sorted(re.findall(r"\bUTMALDG\.(\dD(?:\.MULTICAST)?)", text))
        figures[name] = (number(r"Used (\d+) registers"), stack, spills, number(r"(\d+) bytes smem"), count(r"\b[HQ]GMMA\."), count(r"WARPGROUP\.DEPBAR"), ",".join(copies).lower() or 0)
    return figures


def echo(params):
    """Source of kernels that write back every field of the parameter structs, one kernel a struct: the size first, then the fields' bits."""
    structs = {name: re.findall(r"^ +(\w+) +(\w+)(?:\[(\d+)\])?;", body, re.M) for name, body in re.findall(r"^struct (\w+) \{(.*?)^\};", params, re.M | re.S)}

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


def main():
    nvrtc, tools = Nvrtc(os.environ.get("NVRTC_12_4", "libnvrtc.so.12")), [shutil.which(tool) for tool in ("ptxas", "cuobjdump")]
    common = [path.read_bytes() for path in sorted((ROOT / "cuda/common").rglob("*.*h"))]
    manifest, bad = HEADER + f"compiler NVRTC {nvrtc.version}\nflags {' '.join(FLAGS)}\n", []
    for source in sorted((ROOT / "cuda").glob("*.cu")):
        ptx = nvrtc.compile(source, source.read_bytes())
        isa = re.search(r"\.version (\S+)", ptx)[1]
        if tuple(map(int, isa.split("."))) > MAX_ISA:
            sys.exit(f"this NVRTC emits PTX ISA {isa}; use NVRTC 12.4")
        target = ROOT / "ptx" / f"{source.stem}.sm_90a.ptx"
        target.write_text(ptx)
        manifest += f"\nimage {target.name} isa {isa} sources {fnv(source.read_bytes(), *common)} image {fnv(ptx.encode())}\n"
        figures = assembled(*tools, ptx)
        for entry, bytes_of_params in re.findall(r"\.entry (\w+)\(\s*\.param [^\[]*\[(\d+)\]", ptx):
            registers, stack, spills, shared, hgmma, depbar, tma = figures.get(entry, ("-",) * 7)
            manifest += f"entry {entry} params {bytes_of_params} registers {registers} stack {stack} spills {spills} shared {shared} hgmma {hgmma} depbar {depbar} tma {tma}\n"
            if stack not in (0, "-") or spills not in (0, "-"):
                bad.append(f"{entry}: {stack} bytes of stack, {spills} bytes spilled")
        print(target.relative_to(ROOT))
    (ROOT / "ptx/MANIFEST").write_text(manifest)
    params, target = (ROOT / "cuda/common/params.h").read_bytes(), ROOT / "tests/params/echo.sm_90a.ptx"
    ptx = nvrtc.compile(ROOT / "echo.cu", echo(params.decode()).encode())
    target.write_text(f"// of cuda/common/params.h {fnv(params)}; written by cuda/build.py, run by tests/params.rs\n{ptx}")
    print(target.relative_to(ROOT))
    if bad:
        sys.exit("\n".join(bad))


if __name__ == "__main__":
    main()
