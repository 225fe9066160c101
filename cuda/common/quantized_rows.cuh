// Quantised weights in the order of a checkpoint, as the f32 that src/simd/decode.rs gives, bit for bit.
//
// Eight neighbours of an output are decoded together: `scale * x + offset`, each operation rounded by itself.
// An offset of -0 changes no number. Blocks begin at any byte.
#pragma once
#include "dtype.cuh"

enum : int { RUN = 8 };

struct Run {
    float x[RUN];
    float scale, offset = -0.0f;
};

__device__ __forceinline__ const unsigned char* bytes_at(In at, int64_t offset) {
    return static_cast<const unsigned char*>(at) + offset;
}

// 2^(exponent - 127); NaN for 255.
__device__ __forceinline__ float e8m0(uint32_t exponent) {
    return __uint_as_float(exponent == 255 ? 0x7fc00000 : exponent == 0 ? 0x00400000 : exponent << 23);
}

// Exponent and mantissa of a short float stand where f32 has the lowest bits of its exponent and the highest
// of its mantissa. The factor is 2 to the difference of the biases, and exact.
__device__ __forceinline__ float e2m1(uint32_t code) {
    const float x = __uint_as_float((code & 8) << 28 | (code & 7) << 22);
    return __fmul_rn(x, __uint_as_float((127 + 126) << 23));
}
__device__ __forceinline__ float e4m3(uint32_t code) {
    const float x = __uint_as_float((code & 0x80) << 24 | (code & 0x7f) << 20);
    return (code & 0x7f) == 0x7f ? __uint_as_float(0x7fc00000)
                                 : __fmul_rn(x, __uint_as_float((127 + 120) << 23));
}

// The scales of an output, where they lie apart.
__device__ __forceinline__ const unsigned char* scales_of(const QuantizedMatrixParams& m, int64_t expert,
                                                          int64_t n) {
    const int64_t row = m.block_rows == 1 ? n * m.step : (m.first + n * m.step) / m.block_rows;
    return bytes_at(m.scales, expert * m.expert_scales + row * m.row_scales);
}
__device__ __forceinline__ uint32_t zero_point(const QuantizedMatrixParams& m, int64_t expert, int64_t n,
                                               int64_t group) {
    if (!m.zeros) return 8;
    const int64_t  place = m.first + n * m.step, row = place / 8;
    const uint32_t nibble = place % 8;
    const unsigned char* const word =
        bytes_at(m.zeros, expert * m.expert_zeros + row * m.row_zeros + group * 4);
    return word[nibble / 2] >> nibble % 2 * 4 & 15;
}

__device__ __forceinline__ float half_at(const unsigned char* at) {
    return to_f32(f16{static_cast<unsigned short>(at[0] | at[1] << 8)});
}

// `count` elements are there; any of them may begin another group.
__device__ __forceinline__ void decode_e4m3(const QuantizedMatrixParams& m, const unsigned char* codes,
                                            const unsigned char* scales, int64_t k, int64_t count, Run& run) {
    int64_t group = k / m.group, next = (group + 1) * m.group - k;
    float   scale = float_at(m.scale_type, scales, group);
    run.scale = 1.0f;
#pragma unroll
    for (int i = 0; i < RUN; i++) {
        run.x[i] = 0.0f;
        if (i >= count) continue;
        if (i == next) {
            next += m.group;
            scale = float_at(m.scale_type, scales, ++group);
        }
        run.x[i] = __fmul_rn(e4m3(codes[k + i]), scale);
    }
}

// Element 2 i in the low bits of byte i, 2 i + 1 in the high ones. Eight share a scale.
__device__ __forceinline__ void decode_pairs(const QuantizedMatrixParams& m, const unsigned char* codes,
                                             const unsigned char* scales, int64_t expert, int64_t n,
                                             int64_t k, Run& run) {
    const bool    is_mxfp4 = m.format == FORMAT_MXFP4;
    const int64_t group = k / m.group;
    const float   zero = is_mxfp4 ? 0.0f : float(zero_point(m, expert, n, group));
    run.scale = is_mxfp4 ? e8m0(scales[group]) : float_at(m.scale_type, scales, group);
#pragma unroll
    for (int i = 0; i < RUN; i++) {
        const uint32_t code = codes[k / 2 + i / 2] >> i % 2 * 4 & 15;
        run.x[i] = is_mxfp4 ? e2m1(code) : float(code) - zero;
    }
}

// Elements k to k + 8 of the blocks of 32 of which byte i holds elements i and i + 16: a header, then sixteen
// bytes. The header has a scale, perhaps an offset, and perhaps the fifth bit of each element.
__device__ __forceinline__ void decode_halves(uint32_t format, const unsigned char* codes, int64_t k,
                                              Run& run) {
    const bool is_mxfp4 = format == FORMAT_GGUF_MXFP4,
               has_offset = format == FORMAT_Q4_1 || format == FORMAT_Q5_1,
               has_fifth = format == FORMAT_Q5_0 || format == FORMAT_Q5_1;
    const uint32_t fifths_at = is_mxfp4 ? 1 : has_offset ? 4 : 2, header = fifths_at + (has_fifth ? 4 : 0),
                   at = k % 32, left = at / 16 * 4;
    const unsigned char* const block = codes + k / 32 * (header + 16);
    const uint32_t             fifths = has_fifth ? block[fifths_at + at / 8] : 0;
    const int                  zero = has_offset ? 0 : has_fifth ? 16 : 8;
    run.scale = is_mxfp4 ? e8m0(block[0]) : half_at(block);
    if (has_offset) run.offset = half_at(block + 2);
#pragma unroll
    for (int i = 0; i < RUN; i++) {
        const uint32_t code = block[header + at % 16 + i] >> left & 15;
        // Of MXFP4 no zero has a sign here.
        run.x[i] = is_mxfp4 ? __fadd_rn(e2m1(code), 0.0f) : float(int(code | (fifths >> i & 1) << 4) - zero);
    }
}

// Blocks of 256 in parts of 32, each with a factor and an offset of six bits: four parts have theirs in the
// low bits of bytes, the others in what is left.
__device__ __forceinline__ void decode_k(bool has_fifth, const unsigned char* codes, int64_t k, Run& run) {
    const unsigned char* const block = codes + k / 256 * (has_fifth ? 176 : 144);
    const uint32_t             at = k % 256, part = at / 32, left = part % 2 * 4;
    const unsigned char* const six = block + 4 + part % 4;
    const uint32_t             low = six[0], middle = six[4], high = six[8];
    const uint32_t             factor = part < 4 ? low & 63 : (high & 15) | low >> 6 << 4,
                   offset = part < 4 ? middle & 63 : high >> 4 | middle >> 6 << 4;
    run.scale = __fmul_rn(half_at(block), float(factor));
    run.offset = -__fmul_rn(half_at(block + 2), float(offset));
    const unsigned char *const fifths = block + 16 + at % 32,
                        *const nibbles = block + (has_fifth ? 48 : 16) + part / 2 * 32 + at % 32;
#pragma unroll
    for (int i = 0; i < RUN; i++) {
        const uint32_t fifth = has_fifth ? fifths[i] >> part & 1 : 0;
        run.x[i] = float((nibbles[i] >> left & 15) | fifth << 4);
    }
}

// Blocks of 256: four low bits, two high ones, a signed factor for sixteen.
__device__ __forceinline__ void decode_q6_k(const unsigned char* codes, int64_t k, Run& run) {
    const unsigned char* const block = codes + k / 256 * 210;
    const uint32_t             at = k % 256, half = at / 128, part = at / 32 % 4;
    const unsigned char *const low = block + half * 64 + part % 2 * 32 + at % 32,
                        *const high = block + 128 + half * 32 + at % 32;
    run.scale = __fmul_rn(half_at(block + 208), float(static_cast<signed char>(block[192 + at / 16])));
#pragma unroll
    for (int i = 0; i < RUN; i++)
        run.x[i] = float(int((low[i] >> part / 2 * 4 & 15) | (high[i] >> part * 2 & 3) << 4) - 32);
}

__device__ __forceinline__ void decode_q8_0(const unsigned char* codes, int64_t k, Run& run) {
    const unsigned char* const block = codes + k / 32 * 34;
    run.scale = half_at(block);
#pragma unroll
    for (int i = 0; i < RUN; i++) run.x[i] = float(static_cast<signed char>(block[2 + k % 32 + i]));
}

// Elements k to k + 8 of an output, zeros after the first `count`, of which there is one. k is a multiple of
// 8. The branches are the same for all threads.
__device__ __forceinline__ void decode(const QuantizedMatrixParams& m, int64_t expert, int64_t n, int64_t k,
                                       int64_t count, float (&to)[RUN]) {
    const unsigned char* const codes = bytes_at(m.codes, expert * m.expert_codes + n * m.row_codes);
    Run                        run;
    switch (m.format) {
    case FORMAT_E4M3: decode_e4m3(m, codes, scales_of(m, expert, n), k, count, run); break;
    case FORMAT_MXFP4:
    case FORMAT_INT4: decode_pairs(m, codes, scales_of(m, expert, n), expert, n, k, run); break;
    case FORMAT_Q8_0: decode_q8_0(codes, k, run); break;
    case FORMAT_Q4_K:
    case FORMAT_Q5_K: decode_k(m.format == FORMAT_Q5_K, codes, k, run); break;
    case FORMAT_Q6_K: decode_q6_k(codes, k, run); break;
    default: decode_halves(m.format, codes, k, run);
    }
#pragma unroll
    for (int i = 0; i < RUN; i++)
        to[i] = i < count ? __fadd_rn(__fmul_rn(run.scale, run.x[i]), run.offset) : 0.0f;
}
