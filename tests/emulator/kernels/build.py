#!/usr/bin/env python3
"""Compiles the kernels of this folder to ptx/: every clean kernel and, for each `Bug n` it plants, the variant -DBUG_n.

    NVRTC=/path/to/libnvrtc.so.12 python3 build.py
    python3 build.py --nvrtc libnvrtc.so.12 --check     compare with what is committed, write nothing

NVRTC 12.4 is wanted, because it emits PTX ISA 8.4. The output depends on the sources alone: file names in the line
information are relative, and the compiler's banner is dropped.
"""

import argparse
import ctypes
import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PTX_ISA = "8.4"


class Nvrtc:
    """The four calls of libnvrtc that turn a source text into PTX."""

    def __init__(self, library):
        self.lib = ctypes.CDLL(library)

    def check(self, code, program=None):
        if code == 0:
            return
        log = ""
        if program:
            size = ctypes.c_size_t()
            self.lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            text = ctypes.create_string_buffer(size.value)
            self.lib.nvrtcGetProgramLog(program, text)
            log = text.value.decode()
        sys.exit(f"nvrtc error {code}\n{log}")

    def compile(self, name, source, defines):
        program = ctypes.c_void_p()
        self.check(self.lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None))
        options = ["--gpu-architecture=compute_90a", "--std=c++17", "--generate-line-info", f"--include-path={HERE}"]
        options += [f"-D{define}" for define in defines]
        array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        self.check(self.lib.nvrtcCompileProgram(program, len(options), array), program)
        size = ctypes.c_size_t()
        self.check(self.lib.nvrtcGetPTXSize(program, ctypes.byref(size)))
        text = ctypes.create_string_buffer(size.value)
        self.check(self.lib.nvrtcGetPTX(program, text))
        self.lib.nvrtcDestroyProgram(ctypes.byref(program))
        return text.value.decode()


def tidy(ptx):
    """Relative file names, no compiler banner, one newline at the end."""
    ptx = ptx[ptx.index(".version") :]
    ptx = re.sub(r'(\.file\s+\d+\s+)"[^"]*?([^/"]+)"', r'\1"\2"', ptx)
    version = re.search(r"\.version (\S+)", ptx).group(1)
    if version != PTX_ISA:
        sys.exit(f"this NVRTC emits PTX ISA {version}, the committed images are {PTX_ISA}: use NVRTC 12.4")
    return ptx.rstrip() + "\n"


def variants(source):
    """(suffix, defines) of the clean kernel and of each BUG_n the source asks for."""
    numbers = sorted({int(n) for n in re.findall(r"\bBUG_(\d+)\b", source)})
    return [("", [])] + [(f".bug_{n}", [f"BUG_{n}"]) for n in numbers]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nvrtc", default=os.environ.get("NVRTC", "libnvrtc.so.12"), help="the library (environment: NVRTC)")
    parser.add_argument("--check", action="store_true", help="fail if a committed file differs; write nothing")
    parser.add_argument("kernels", nargs="*", help="stems; all of them if none is given")
    args = parser.parse_args()

    nvrtc = Nvrtc(args.nvrtc)
    stale = []
    for path in sorted(HERE.glob("*.cu")):
        if args.kernels and path.stem not in args.kernels:
            continue
        source = path.read_text()
        for suffix, defines in variants(source):
            target = HERE / "ptx" / f"{path.stem}{suffix}.ptx"
            ptx = tidy(nvrtc.compile(path.name, source, defines))
            if target.exists() and target.read_text() == ptx:
                continue
            stale.append(target.name)
            if not args.check:
                target.parent.mkdir(exist_ok=True)
                target.write_text(ptx)
    print("differs:" if args.check else "written:", " ".join(stale) or "nothing")
    if args.check and stale:
        sys.exit(1)


if __name__ == "__main__":
    main()
