// silu by the special function units: for kernels that hold accumulators in most of their registers, and for speed.
#pragma once

// Both within 2^-22 of the exact value; subnormal numbers are zero.
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// x / (1 + e^-x)
__device__ __forceinline__ float silu(float x) { return x * reciprocal(1.0f + exp2_approx(x * -1.44269504f)); }
