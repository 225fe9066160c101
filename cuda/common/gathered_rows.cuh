// Rows gathered from tokens as a tile is loaded: by a warpgroup, with cp.async, eight threads to a row.
#pragma once
#include "dtype.cuh"
#include "ptx/tma.cuh"
#include "warpgroup.cuh"

// The input rows of a tile of ROWS that one thread copies 16 bytes of: thread / 8 + 16 i.
template <typename T, int ROWS> struct GatheredRows {
    enum : int { EACH = WARPGROUP / 8, COUNT = (ROWS + EACH - 1) / EACH };
    uint32_t token[COUNT];
    uint32_t inside; // bit i: row i is one of the expert's

    __device__ __forceinline__ void find(const TiledProductParams& p, uint32_t first, uint32_t end) {
        inside = 0;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const uint32_t row = first + threadIdx.x / 8 + EACH * i;
            token[i] = row < end ? p.row_to_slot[row] / uint32_t(p.top_k) : 0;
            inside |= uint32_t(row < end) << i;
        }
    }
    // 64 columns from first_k on, zeros behind the last of them and for rows of nobody, in the swizzle that TMA writes.
    __device__ __forceinline__ void copy(const TiledProductParams& p, uint32_t to, uint32_t first_k) const {
        const uint32_t chunk = threadIdx.x % 8, row = threadIdx.x / 8, k = first_k + 8 * chunk;
        const uint32_t copied = k < p.k ? inside : 0;
        const T* const from = static_cast<const T*>(p.x) + k;
        to += row * PITCH + (chunk ^ row % 8) * 16;
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (ROWS % EACH == 0 || row + EACH * i < ROWS)
                cp_async_16(to + EACH * i * PITCH, from + uint64_t(token[i]) * uint32_t(p.x_stride), copied >> i & 1 ? 16 : 0);
    }
};
