// Activations: by the special function units for kernels that hold accumulators in most of their registers, and for speed; precisely for others.
#pragma once
#include "dtype.cuh"

#define LOG2_E 1.44269504f

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

struct Fast {
    static __device__ __forceinline__ float exp(float x) { return exp2_approx(x * LOG2_E); }
    static __device__ __forceinline__ float over(float x, float y) { return x * reciprocal(y); }
};
struct Precise {
    static __device__ __forceinline__ float exp(float x) { return expf(x); }
    static __device__ __forceinline__ float over(float x, float y) { return x / y; }
};

// x / (1 + e^-x)
template <typename Math> __device__ __forceinline__ float silu(float x) { return Math::over(x, 1.0f + Math::exp(-x)); }

// x / 2 * (1 + erf(x / sqrt(2))) = max(x, 0) - |x| / 2 * erfc(|x| / sqrt(2)), which keeps the small values of large negative x.
// erfc(z) = e^(-z^2) * P(t), t = 1 / (1 + z / 2): a minimax fit of nine terms, within 2.4e-7 of every value (src/simd/activation.rs).
template <typename Math> __device__ __forceinline__ float gelu_erf(float x) {
    const float size = fabsf(x), t = Math::over(1.0f, 1.0f + 0.353553391f * size);
    float       sum = -0.0588909127f;
    sum = sum * t + 0.283702582f;
    sum = sum * t - 0.485384911f;
    sum = sum * t + 0.2759794f;
    sum = sum * t - 0.0251784418f;
    sum = sum * t + 0.202070117f;
    sum = sum * t + 0.24326095f;
    sum = sum * t + 0.282353491f;
    sum = sum * t + 0.282087684f;
    const float erfc = sum * t * Math::exp(-0.5f * x * x);
    return (x < 0.0f ? 0.0f : x) - 0.5f * size * erfc; // a NaN passes
}

// What EpilogueParams say of a sum. The branches are the same for all threads.
template <typename Math> __device__ __forceinline__ float activated(const EpilogueParams& p, float x) {
    if (p.activation == ACTIVATION_SIGMOID) {
        const float z = p.c3 == 0.0f ? p.c1 * x : (p.c1 + p.c3 * x * x) * x; // without c3 the square of a large x would be infinity times 0
        return Math::over(x, 1.0f + Math::exp(-z));
    }
    if (p.activation == ACTIVATION_ERF) return gelu_erf<Math>(x);
    if (p.activation == ACTIVATION_RELU_SQUARED) {
        const float positive = x < 0.0f ? 0.0f : x;
        return positive * positive;
    }
    return p.c1 * x; // a sum as it is has c1 = 1
}

// And of a gate and an up. A NaN passes.
template <typename Math> __device__ __forceinline__ float gated(const EpilogueParams& p, float gate, float up) {
    gate = gate > p.limit ? p.limit : gate;
    up = up > p.limit ? p.limit : up < -p.limit ? -p.limit : up;
    return activated<Math>(p, gate) * (up + p.added);
}

// Of one sum, or of two.
template <typename Math, bool GLU> __device__ __forceinline__ float finished(const EpilogueParams& p, float first, float second) {
    return GLU ? gated<Math>(p, first, second) : activated<Math>(p, first);
}

// The bias of an expert's output, for inputs of type T; 0 if there is none.
template <typename T> __device__ __forceinline__ float bias_of(const BiasParams& p, int64_t expert, int64_t col) {
    if (!p.at) return 0.0f;
    const int64_t at = expert * p.expert_stride + col * p.stride;
    return p.is_f32 ? static_cast<const float*>(p.at)[at] : to_f32(static_cast<const T*>(p.at)[at]);
}
