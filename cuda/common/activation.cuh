// silu without the branches of an exact division: for kernels that hold accumulators in most of their registers.
#pragma once

// Within 2^-23 of 1 / x.
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float silu(float x) { return x * reciprocal(1.0f + expf(-x)); }
