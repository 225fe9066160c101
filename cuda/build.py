#!/usr/bin/env python3
"""Rebuilds ptx/ from cuda/*.cu with NVRTC 12.4, whose PTX (ISA 8.4) loads on drivers from R550 on.

    pip install nvidia-cuda-nvrtc-cu12==12.4.127
    NVRTC_12_4=path/to/libnvrtc.so.12 python3 cuda/build.py

Images carry line info; file names in it are relative to the repository, so that the output depends on the sources alone.
"""
import ctypes
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ["--gpu-architecture=compute_90a", "--std=c++17", "--generate-line-info", "--device-as-default-execution-space", f"--include-path={ROOT / 'cuda'}"]


def check(nvrtc, code, what):
    if code:
        raise SystemExit(f"{what}: {nvrtc.nvrtcGetErrorString(code).decode()}")


def compile_ptx(nvrtc, source):
    """The PTX text of one file; compiler messages go to stderr and a failure ends the run."""
    program = ctypes.c_void_p()
    text = source.read_text().encode()
    check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, str(source).encode(), 0, None, None), source.name)
    options = (ctypes.c_char_p * len(OPTIONS))(*(option.encode() for option in OPTIONS))
    code = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), options)

    def fetch(size, get):
        length = ctypes.c_size_t()
        size(program, ctypes.byref(length))
        buffer = ctypes.create_string_buffer(length.value)
        get(program, buffer)
        return buffer.value.decode()

    log = fetch(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
    if log.strip():
        print(log, file=sys.stderr)
    check(nvrtc, code, source.name)
    ptx = fetch(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return re.sub(rf'(?m)^(\s*\.file\s+\d+ )"{re.escape(str(ROOT))}/', r'\1"', ptx)


def main():
    nvrtc = ctypes.CDLL(os.environ.get("NVRTC_12_4", "libnvrtc.so.12"))
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    for source in sorted((ROOT / "cuda").glob("*.cu")):
        target = ROOT / "ptx" / f"{source.stem}.sm_90a.ptx"
        target.write_text(compile_ptx(nvrtc, source))
        print(target.relative_to(ROOT))


if __name__ == "__main__":
    main()
