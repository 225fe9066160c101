#!/usr/bin/env python3
"""Compiles kernels.py for sm_90a with Triton and writes ptx/*.ptx and manifest.txt. No GPU is needed.

    python3 -m venv venv && venv/bin/pip install triton==3.9.0
    venv/bin/python generate.py             write what differs
    venv/bin/python generate.py --check     compare with what is committed, write nothing

The manifest holds what Triton's own launcher would know of each image, a line each:

    kernel <name> entry <entry> warps <per block> ctas <per cluster> shared <dynamic bytes>
    param <name> pointer | i32 | f32
    param <name> map type <code> swizzle <code> box <outermost first>

The codes are those of the driver (CUtensorMapDataType, CUtensorMapSwizzle). A `map` stands for several
parameters of the entry: the map, its sizes (32 bits each) and its strides in elements (64 bits each),
outermost first. Behind the named parameters every entry takes two pointers to scratch memory, which no kernel
here uses.
"""

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

TRITON = "3.9.0"
HERE = Path(__file__).resolve().parent

# Both must be set before Triton is imported: no line information, and nothing from an earlier run.
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
os.environ["TRITON_ALWAYS_COMPILE"] = "1"

F32, F16, BF16, E4M3, E5M2 = "*fp32", "*fp16", "*bf16", "*fp8e4nv", "*fp8e5"
S8, I32, U32, I64 = "*i8", "*i32", "*u32", "*i64"
SIZE16 = "i32 of 16"  # a size that is a multiple of 16, so that rows can be copied 16 bytes at a time
TILE = dict(TRANS_A=False, TRANS_B=False, RELU_A=False, PARTS=1, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64)


def tensor(element, *box):
    return f"tensordesc<{element}[{','.join(map(str, box))}]>"


def matmul(element, out, warps=4, stages=3, size=SIZE16, **tile):
    types = [element, element, out, size, size, size]
    return "matmul", types, TILE | tile, dict(num_warps=warps, num_stages=stages)


def tensor_matmul(element, out, m, n, k, trans_a=False, trans_b=False, warps=4, stages=3, ctas=1):
    a = tensor(element, k, m) if trans_a else tensor(element, m, k)
    b = tensor(element, n, k) if trans_b else tensor(element, k, n)
    constants = dict(TRANS_A=trans_a, TRANS_B=trans_b, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k)
    options = dict(num_warps=warps, num_stages=stages, num_ctas=ctas)
    return "tensor_matmul", [a, b, tensor(out, m, n), "i32"], constants, options


def tensor_matmul_persistent(specialize):
    types = [tensor("bf16", 64, 64)] * 3 + ["i32"] * 3
    constants = dict(PROGRAMS=2, SPECIALIZE=specialize, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64)
    return "tensor_matmul_persistent", types, constants, {}


# Name of the image: kernel, types of its arguments, constants, options of the compiler.
KERNELS = {
    "axpy_f32": ("axpy", [F32, F32, F32, "fp32", "i32"], dict(BLOCK=512), {}),
    "gated_silu_bf16": ("gated_silu", [BF16, BF16, BF16, "i32"], dict(BLOCK=512), {}),
    "gelu_f16": ("gelu", [F16, F16], dict(BLOCK=512), {}),
    "cast_f32_e4m3": ("cast", [F32, E4M3], dict(BLOCK=512), {}),
    "cast_f32_e5m2": ("cast", [F32, E5M2], dict(BLOCK=512), {}),
    "cast_e4m3_f16": ("cast", [E4M3, F16], dict(BLOCK=256), {}),
    "cast_e4m3_bf16": ("cast", [E4M3, BF16], dict(BLOCK=256), {}),
    "integers": ("integers", [I32, I32, I32, I64], dict(BLOCK=256), {}),
    "philox": ("philox", [U32, "i32"], dict(BLOCK=128), {}),
    "row_sums_f32": ("row_sums", [F32, F32, "i32"], dict(BLOCK=256, ROWS=4), {}),
    "column_sums_f32": ("column_sums", [F32, F32], dict(BLOCK=32, ROWS=64), {}),
    "arg_max_f32": ("arg_max", [F32, F32, I32, "i32"], dict(BLOCK=512), {}),
    "folds_i32": ("folds", [I32, I32], dict(BLOCK=256), {}),
    "softmax_f32": ("softmax", [F32, F32, "i32"], dict(BLOCK=512), {}),
    "softmax_f32_clusters": ("softmax", [F32, F32, "i32"], dict(BLOCK=512), dict(num_ctas=2)),
    "layer_norm_bf16": ("layer_norm", [BF16, BF16, BF16, BF16, "i32", "fp32"], dict(BLOCK=512), {}),
    "running_sum_i32": ("running_sum", [I32, I32], dict(BLOCK=1024), {}),
    "sort_i32": ("sort", [I32, I32], dict(BLOCK=256), {}),
    "transpose_f16": ("transpose", [F16, F16], dict(ROWS=64, COLUMNS=32), {}),
    "gather_f32": ("gather", [F32, I32, F32], dict(ROWS=64, COLUMNS=16), {}),
    "histogram": ("histogram", [I32, I32, "i32"], dict(BINS=32, BLOCK=256), {}),
    "atomics": ("atomics", [I32, I32, F32, F16, I32, I32], dict(BLOCK=256), {}),
    "guarded_sum": ("guarded_sum", [I32, I32, I32], dict(BLOCK=128), {}),
    # Products of warps
    "mma_bf16": matmul(BF16, F32, warps=2, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, TRANS_B=True),
    "mma_f16_nn": matmul(F16, F16, warps=1, size="i32", BLOCK_M=16, BLOCK_N=32, BLOCK_K=32),
    "mma_tf32": matmul(F32, F32, warps=2, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32),
    "mma_e4m3": matmul(E4M3, F32, warps=2, BLOCK_M=32, BLOCK_N=32, BLOCK_K=64, TRANS_B=True),
    "mma_s8": matmul(S8, I32, warps=2, BLOCK_M=32, BLOCK_N=32, BLOCK_K=64, TRANS_B=True),
    # Products of warpgroups
    "matmul_nt_bf16": matmul(BF16, BF16, TRANS_B=True),
    "matmul_nn_bf16": matmul(BF16, F32, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32),
    "matmul_tn_f16": matmul(F16, F32, TRANS_A=True),
    "matmul_tt_f16": matmul(F16, F16, TRANS_A=True, TRANS_B=True, BLOCK_N=32),
    "matmul_nt_e4m3": matmul(E4M3, F32, TRANS_B=True, BLOCK_N=128, BLOCK_K=128),
    "matmul_nt_e5m2": matmul(E5M2, F32, TRANS_B=True),
    "matmul_nn_tf32": matmul(F32, F32, BLOCK_K=32),
    "matmul_nn_bf16_n8": matmul(BF16, F32, BLOCK_N=8),
    "matmul_nn_bf16_n16": matmul(BF16, F32, BLOCK_N=16),
    "matmul_nt_bf16_n256": matmul(BF16, F32, TRANS_B=True, BLOCK_M=128, BLOCK_N=256, warps=8, stages=2),
    "matmul_relu_bf16": matmul(BF16, F32, TRANS_B=True, RELU_A=True),
    "matmul_parts_f16": matmul(F16, F32, size="i32", PARTS=3, BLOCK_K=32),
    "matmul_int4_bf16": (
        "matmul_int4", [BF16, S8, F32, BF16, SIZE16, SIZE16],
        dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64), {},
    ),
    "moe_bf16": (
        "moe", [BF16, BF16, BF16, F32, I32, I32, "i32", SIZE16, SIZE16, "i32"],
        dict(SCALE=True, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64), {},
    ),
    "moe_e4m3": (
        "moe", [E4M3, E4M3, F32, F32, I32, I32, "i32", SIZE16, SIZE16, "i32"],
        dict(SCALE=False, BLOCK_M=16, BLOCK_N=64, BLOCK_K=64), {},
    ),
    "attention_f16": (
        "attention", [F16, F16, F16, F16, "i32", "fp32"],
        dict(CAUSAL=True, BLOCK_M=64, BLOCK_N=64, HEAD=64), dict(num_stages=2),
    ),
    "attention_bf16_full": (
        "attention", [BF16, BF16, BF16, BF16, "i32", "fp32"],
        dict(CAUSAL=False, BLOCK_M=128, BLOCK_N=32, HEAD=32), dict(num_warps=8),
    ),
    # Tensor descriptors
    "tensor_matmul_nt_f16": tensor_matmul("fp16", "fp16", 64, 64, 64, trans_b=True),
    "tensor_matmul_nn_bf16": tensor_matmul("bf16", "bf16", 128, 64, 64),
    "tensor_matmul_tn_bf16": tensor_matmul("bf16", "fp32", 64, 128, 32, trans_a=True),
    "tensor_matmul_nt_e4m3": tensor_matmul("fp8e4nv", "fp16", 64, 64, 128, trans_b=True),
    "tensor_matmul_nt_bf16_k32": tensor_matmul("bf16", "bf16", 64, 32, 32, trans_b=True),
    "tensor_matmul_nt_f16_k16": tensor_matmul("fp16", "fp16", 64, 64, 16, trans_b=True),
    "tensor_matmul_nt_bf16_clusters": tensor_matmul("bf16", "bf16", 128, 64, 64, trans_b=True, ctas=2),
    "tensor_matmul_persistent_bf16": tensor_matmul_persistent(specialize=False),
    "tensor_matmul_specialized_bf16": tensor_matmul_persistent(specialize=True),
    "tensor_attention_bf16": (
        "tensor_attention", [tensor("bf16", 64, 64)] * 4 + ["i32", "fp32"],
        dict(BLOCK_M=64, BLOCK_N=64), dict(num_stages=2),
    ),
    "tensor_copy_1d": ("tensor_copy_1d", [tensor("i32", 64)] * 2 + ["i32"], dict(BLOCK=64), {}),
    "tensor_copy_2d": (
        "tensor_copy_2d", [tensor("fp16", 16, 64)] * 2 + ["i32"] * 2,
        dict(BLOCK_0=16, BLOCK_1=64), {},
    ),
    "tensor_copy_3d": (
        "tensor_copy_3d", [tensor("i32", 1, 8, 16)] * 2 + ["i32"] * 2,
        dict(BLOCK_1=8, BLOCK_2=16), {},
    ),
    "tensor_copy_4d": (
        "tensor_copy_4d", [tensor("fp32", 2, 1, 8, 8), tensor("fp32", 1, 2, 8, 8)] + ["i32"] * 2,
        dict(BLOCK_2=8, BLOCK_3=8), {},
    ),
    "tensor_copy_5d": ("tensor_copy_5d", [tensor("i32", 2, 2, 2, 4, 8)] * 2 + ["i32"] * 2, {}, {}),
    "tensor_add_f32": (
        "tensor_add", [tensor("fp32", 1, 16, 32), tensor("fp32", 16, 32)],
        dict(BLOCK_0=16, BLOCK_1=32), {},
    ),
    "tensor_max_i32": (
        "tensor_max", [tensor("i32", 1, 8, 32), tensor("i32", 8, 32)],
        dict(BLOCK_0=8, BLOCK_1=32), {},
    ),
}


def compile_kernel(kernel, types, constants, options):
    """The image's PTX and its lines of the manifest, all but the first word."""
    import kernels
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
    from triton.compiler import ASTSource

    function = getattr(kernels, kernel)
    arguments = [name for name in function.arg_names if name not in constants]
    if len(arguments) != len(types):
        sys.exit(f"{kernel}: {len(types)} types for the arguments {arguments}")
    aligned = [name for name, kind in zip(arguments, types) if kind[0] == "*" or kind == SIZE16]
    types = ["i32" if kind == SIZE16 else kind for kind in types]
    signature = {name: "constexpr" for name in function.arg_names} | dict(zip(arguments, types))
    hints = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(function, signature, constants, hints)
    # ISA 8.6 is the oldest that knows bulk copies to .shared::cta.
    options = dict(num_warps=4, num_stages=3, enable_fp_fusion=True, ptx_version=86) | options
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    meta = compiled.metadata
    if meta.global_scratch_size or meta.profile_scratch_size:
        sys.exit(f"{kernel}: needs scratch memory, which the test does not provide")
    lines = [f"entry {meta.name} warps {meta.num_warps} ctas {meta.num_ctas} shared {meta.shared}"]
    maps = iter(meta.tensordesc_meta or [])
    for name, kind in zip(arguments, types):
        if kind.startswith("tensordesc"):
            layout = next(maps)
            element = TMA_DTYPE_DEVICE_TO_HOST[layout["elem_type"]]
            box = " ".join(map(str, layout["block_size"]))
            lines.append(f"param {name} map type {element} swizzle {layout['swizzle']} box {box}")
        else:
            lines.append(f"param {name} {'pointer' if kind[0] == '*' else {'fp32': 'f32'}.get(kind, kind)}")
    return compiled.asm["ptx"], lines


def tidy(ptx):
    """Without the compiler's banner and debug sections, which hold paths; one newline at the end."""
    ptx = ptx[ptx.index(".version") :]
    ptx = re.sub(r"^\s*\.section\b.*?^\s*\}\s*$\n?", "", ptx, flags=re.S | re.M)
    ptx = re.sub(r"^\s*\.(file|loc)\b.*\n", "", ptx, flags=re.M)
    # Comments name registers and blocks of the compiler; labels and instructions stand without them.
    ptx = re.sub(r"[ \t]*//.*$", "", ptx, flags=re.M)
    ptx = re.sub(r"[ \t]+$", "", ptx, flags=re.M)
    ptx = re.sub(r"\n{2,}", "\n", ptx)
    return ptx.strip() + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if a file differs; write nothing")
    args = parser.parse_args()
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
    sys.path.insert(0, str(HERE))
    import triton

    if triton.__version__ != TRITON:
        sys.exit(f"this is Triton {triton.__version__}, the committed images are of {TRITON}")

    files = {}
    manifest = [f"# Written by generate.py with Triton {TRITON}."]
    for name, spec in KERNELS.items():
        ptx, lines = compile_kernel(*spec)
        files[HERE / "ptx" / f"{name}.ptx"] = tidy(ptx)
        manifest += ["", f"kernel {name} {lines[0]}", *lines[1:]]
    files[HERE / "manifest.txt"] = "\n".join(manifest) + "\n"

    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    left_over = [path for path in sorted((HERE / "ptx").glob("*.ptx")) if path not in files]
    if not args.check:
        for path in stale:
            path.parent.mkdir(exist_ok=True)
            path.write_text(files[path])
        for path in left_over:
            path.unlink()
    changed = [path.name for path in stale + left_over]
    print("differs:" if args.check else "written:", " ".join(changed) or "nothing")
    if args.check and changed:
        sys.exit(1)


if __name__ == "__main__":
    main()
