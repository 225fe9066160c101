// Element types, their conversions and vectors, without any header of the toolkit.
#pragma once
#include "params.h"

struct bf16 {
    unsigned short bits;
};
struct f16 {
    unsigned short bits;
};

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ __forceinline__ float to_f32(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// Nearest, ties to even.
template <typename T> __device__ __forceinline__ T from_f32(float x);
template <> __device__ __forceinline__ float from_f32<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_f32<bf16>(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <> __device__ __forceinline__ f16 from_f32<f16>(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// Element i of floats whose type is known at launch. The branches are the same for all threads.
__device__ __forceinline__ float float_at(uint32_t type, In at, int64_t i) {
    if (type == TYPE_F32) return static_cast<const float*>(at)[i];
    if (type == TYPE_BF16) return to_f32(static_cast<const bf16*>(at)[i]);
    return to_f32(static_cast<const f16*>(at)[i]);
}
__device__ __forceinline__ void store_float(uint32_t type, Out at, int64_t i, float x) {
    if (type == TYPE_F32)
        static_cast<float*>(at)[i] = x;
    else if (type == TYPE_BF16)
        static_cast<bf16*>(at)[i] = from_f32<bf16>(x);
    else
        static_cast<f16*>(at)[i] = from_f32<f16>(x);
}

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000); }

// N elements, 16 bytes of them unless said otherwise: one load or store.
template <typename T, int N = 16 / sizeof(T)> struct alignas(N * sizeof(T)) Vec {
    enum : int { SIZE = N };
    T at[N];
};

template <int N, typename T> __device__ __forceinline__ Vec<T, N> load_n(const T* at) { return *reinterpret_cast<const Vec<T, N>*>(at); }
template <typename T, int N> __device__ __forceinline__ void store(T* at, const Vec<T, N>& v) { *reinterpret_cast<Vec<T, N>*>(at) = v; }

// The first `n` elements of 16 bytes, zeros behind them; all of them in one load.
template <typename T> __device__ __forceinline__ Vec<T> load_first(const T* at, int64_t n) {
    if (n >= Vec<T>::SIZE) return load_n<Vec<T>::SIZE>(at);
    Vec<T> v;
#pragma unroll
    for (int j = 0; j < Vec<T>::SIZE; j++) v.at[j] = j < n ? at[j] : from_f32<T>(0.0f);
    return v;
}

template <typename T> __device__ __forceinline__ void store_first(T* at, int64_t n, const Vec<T>& v) {
    if (n >= Vec<T>::SIZE) return store(at, v);
#pragma unroll
    for (int j = 0; j < Vec<T>::SIZE; j++)
        if (j < n) at[j] = v.at[j];
}
