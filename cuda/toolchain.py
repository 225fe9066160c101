"""The compilers that make and judge the images, from Python packages of fixed versions: no GPU, driver or toolkit is needed.

NVRTC 12.4 turns sources into PTX, whose ISA 8.4 loads on drivers from R550 on. Two assemblers turn PTX into machine code: the oldest
that is promised, whose code ships, and the newest, which is what the driver's own compiler is likely to do.
"""

import ctypes
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "target/cuda-tools"
PACKAGES = [
    "nvidia-cuda-nvrtc-cu12==12.4.127",
    "nvidia-cuda-nvcc-cu12==12.4.131",
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-cuobjdump==13.2.86",
    "nvidia-cuda-nvdisasm==13.2.86",
]
NVRTC_FLAGS = ["--gpu-architecture=compute_90a", "--std=c++17", "--generate-line-info"]


def install():
    """Installs the packages in target/cuda-tools, unless they are there."""
    ready, wanted = FOLDER / "ready", "\n".join(PACKAGES)
    if ready.exists() and ready.read_text() == wanted:
        return
    # Without their dependencies: the rest of a toolkit, which nothing here runs.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", FOLDER, *PACKAGES]
    subprocess.run(pip, check=True)
    for folder in ("nvidia/cuda_nvcc/bin", "nvidia/cu13/bin"):
        for program in (FOLDER / folder).iterdir():
            program.chmod(program.stat().st_mode | 0o111)
    ready.write_text(wanted)


class Nvrtc:
    """libnvrtc, as far as it is needed to turn a source text into PTX."""

    def __init__(self):
        self.lib = ctypes.CDLL(FOLDER / "nvidia/cuda_nvrtc/lib/libnvrtc.so.12")
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
        code = self.lib.nvrtcCreateProgram(ctypes.byref(program), text, str(source).encode(), 0, None, None)
        self.check(code, source.name)
        flags = [flag.encode() for flag in [*NVRTC_FLAGS, f"--include-path={ROOT / 'cuda'}"]]
        code = self.lib.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
        if log := self.text(program, self.lib.nvrtcGetProgramLogSize, self.lib.nvrtcGetProgramLog).strip():
            print(log, file=sys.stderr)
        self.check(code, source.name)
        ptx = self.text(program, self.lib.nvrtcGetPTXSize, self.lib.nvrtcGetPTX)
        self.lib.nvrtcDestroyProgram(ctypes.byref(program))
        ptx = ptx[ptx.index(".version") :].rstrip() + "\n"  # without the compiler's banner
        ptx = re.sub(r"(?m)^\s*// (begin|end) inline asm\n", "", ptx)
        return re.sub(rf'(?m)^(\s*\.file\s+\d+ )"{re.escape(str(ROOT))}/', r'\1"', ptx)


class Ptxas:
    """An assembler of one version."""

    def __init__(self, program):
        self.program = FOLDER / program
        version = subprocess.run([self.program, "--version"], capture_output=True, text=True, check=True).stdout
        self.version = re.search(r"V(\d+\.\d+\.\d+)", version)[1]

    def assemble(self, ptx):
        """The machine code of a PTX text, empty where it is refused, and what the assembler said."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "image.ptx").write_text(ptx)
            run = subprocess.run(
                [self.program, "-v", "--gpu-name=sm_90a", "-o", "image.cubin", "image.ptx"],
                capture_output=True, text=True, cwd=folder,
            )  # fmt: skip
            if run.returncode:
                return b"", f"exit code {run.returncode}\n{run.stderr}"
            return Path(folder, "image.cubin").read_bytes(), run.stderr


def assemblers():
    """The oldest and the newest that are promised."""
    return [Ptxas("nvidia/cuda_nvcc/bin/ptxas"), Ptxas("nvidia/cu13/bin/ptxas")]


def disassemble(cubin):
    """The machine code of each entry, as text."""
    tools = FOLDER / "nvidia/cu13/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        environment = {**os.environ, "PATH": f"{tools}:{os.environ.get('PATH', '')}"}  # cuobjdump starts nvdisasm
        command = [tools / "cuobjdump", "--dump-sass", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return {text.split("\n")[0].strip(): text for text in sass.split("Function : ")[1:]}


def without_lines(ptx):
    """PTX without its line information, which would triple the size of the cubin that ships."""
    ptx = re.sub(r"(?m)^\s*\.(loc|file)\b.*\n", "", ptx)
    return re.sub(r"(?ms)^\s*\.section\s+\.debug_str.*?^\s*\}\n", "", ptx)
