// Quantised weights in registers: bytes of shared memory to the left operand of a product.
//
// A thread takes one output (row g of its warp's eight) and 64 of k at a time: eight registers, two elements
// each; register 2 s holds k 16 s + 2 t and + 1, register 2 s + 1 those 8 further on. t is the thread's place
// among the four of its row.
#pragma once
#include "quantized_rows.cuh"
#include "ptx/warp.cuh"
#include "ptx/wgmma.cuh"

enum Format : int { INT4, MXFP4, E4M3 };

// (a & b) | c
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
// (a & mask) | (b & ~mask)
__device__ __forceinline__ uint32_t chosen(uint32_t mask, uint32_t a, uint32_t b) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(d) : "r"(mask), "r"(a), "r"(b));
    return d;
}
__device__ __forceinline__ uint32_t rotated(uint32_t x, uint32_t left) { return __funnelshift_l(x, x, left); }
// Of pairs.
__device__ __forceinline__ uint32_t multiplied(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
template <typename T> __device__ __forceinline__ uint32_t subtracted(uint32_t a, uint32_t b) {
    uint32_t d;
    if constexpr (bool(IsBf16<T>::VALUE))
        asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    else
        asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// The number 128 in bf16, or 1024 in f16, in whose lowest four bits a code counts as ones.
template <typename T> struct Counting {
    enum : uint32_t { BITS = bool(IsBf16<T>::VALUE) ? 0x43004300 : 0x64006400 };
};
// That number plus a zero point, twice.
template <typename T> __device__ __forceinline__ uint32_t zero_pair(uint32_t zero) {
    return Counting<T>::BITS | zero * 0x00010001;
}

// Eight integers, code minus zero point, exactly: 11 instructions. Element 2 j of the registers in nibble j,
// its neighbour in nibble j + 4.
template <typename T>
__device__ __forceinline__ void decode_int4(uint32_t codes, uint32_t zeros, uint32_t* to) {
#pragma unroll
    for (int j = 0; j < 4; j++)
        to[j] = subtracted<T>(and_or(codes >> 4 * j, 0x000f000f, Counting<T>::BITS), zeros);
}

// The sign and the three other bits of two codes, where bf16 has its sign, the two lowest bits of its
// exponent and the highest of its mantissa: the element times 2^-126, the subnormal one included.
enum : uint32_t { E2M1_BITS = 0x81c081c0 };
// Where the last pairs of the two words lie between the others.
enum : uint32_t { E2M1_FIRST_LEFT = 6, E2M1_SECOND_LEFT = 8, E2M1_OF_FIRST = 0x80c180c1, E2M1_LAST_LEFT = 6 };

// Sixteen elements times a factor for each half of them, exactly unless the result is subnormal: 24
// instructions.
__device__ __forceinline__ void decode_mxfp4(uint2 codes, uint32_t first_factor, uint32_t second_factor,
                                             uint32_t* to) {
    to[0] = multiplied(codes.x & E2M1_BITS, first_factor);
    to[1] = multiplied(rotated(codes.x, 4) & E2M1_BITS, first_factor);
    to[2] = multiplied(rotated(codes.x, 10) & E2M1_BITS, first_factor);
    to[4] = multiplied(codes.y & E2M1_BITS, second_factor);
    to[5] = multiplied(rotated(codes.y, 4) & E2M1_BITS, second_factor);
    to[6] = multiplied(rotated(codes.y, 10) & E2M1_BITS, second_factor);
    const uint32_t last =
        chosen(E2M1_OF_FIRST, rotated(codes.x, E2M1_FIRST_LEFT), rotated(codes.y, E2M1_SECOND_LEFT));
    to[3] = multiplied(last & E2M1_BITS, first_factor);
    to[7] = multiplied(rotated(last, E2M1_LAST_LEFT) & E2M1_BITS, second_factor);
}

// Two elements of e4m3, NaN included: f16 holds them all, and bf16 too.
template <typename T> __device__ __forceinline__ uint32_t decode_e4m3(unsigned short codes) {
    uint32_t pair;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(codes));
    if constexpr (bool(IsBf16<T>::VALUE))
        return pack<T>(to_f32(f16{static_cast<unsigned short>(pair)}),
                       to_f32(f16{static_cast<unsigned short>(pair >> 16)}));
    return pair;
}

// A scale as f32.
__device__ __forceinline__ float widened(uint32_t bits, uint32_t type) {
    if (type == TYPE_F16) return to_f32(f16{static_cast<unsigned short>(bits)});
    return __uint_as_float(type == TYPE_BF16 ? bits << 16 : bits);
}
