// Floats ordered as integers.
#pragma once
#include "params.h"

// 0 is left for what is nothing.
enum : uint32_t { ORDER_OF_NAN = 1 };

// NaN below -inf, -0 = +0.
__device__ __forceinline__ uint32_t order_of(float value) {
    const uint32_t bits = __float_as_uint(value + 0.0f); // -0 becomes +0
    return value != value ? ORDER_OF_NAN : bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float value_of(uint32_t order) {
    return order == ORDER_OF_NAN ? __uint_as_float(0x7fffffffu)
                                 : __uint_as_float(order ^ (order >> 31 ? 0x80000000u : 0xffffffffu));
}

// Orders (value, index) pairs: the larger value wins, the lower index among equals. Never 0.
__device__ __forceinline__ uint64_t rank(float value, uint32_t index) {
    return static_cast<uint64_t>(order_of(value)) << 32 | ~index;
}
__device__ __forceinline__ uint32_t index_of(uint64_t rank) { return ~static_cast<uint32_t>(rank); }
