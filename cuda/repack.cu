// repack: 4-bit weights from checkpoint order to the tiles that grouped_gemm_quantized.cu multiplies.
//
// Contract  src/ops/repack.rs has checked shapes, places and order; K is a multiple of 8, groups of 32, or
//           one group is all of K.
// Work      codes: a thread writes eight bytes, 16 elements of one output. int4 scales: a thread one scale
// and its
//           zero point. mxfp4 scales: a thread all those of one output, after the largest of them.
// Cost      each byte is read once and written once.
// Order     nothing is added up.
#include "common/quantized_weights.cuh"
#include "common/ptx/launch.cuh"

enum : uint32_t { ROWS = WEIGHT_PANEL_ROWS };

__device__ __forceinline__ int64_t panels_of(const RepackParams& p) { return (p.n + ROWS - 1) / ROWS; }
__device__ __forceinline__ int64_t steps_of(const RepackParams& p) {
    return (p.k + WEIGHT_PANEL_DEPTH - 1) / WEIGHT_PANEL_DEPTH;
}

// The words of 16 elements: pair i, of which a byte holds two codes, is register i of `decode_int4` and
// `decode_mxfp4`.
struct Int4Words {
    static __device__ __forceinline__ uint2 of(const uint32_t (&bytes)[8]) {
        uint2 words = {};
#pragma unroll
        for (int i = 0; i < 8; i++)
            (i < 4 ? words.x : words.y) |= ((bytes[i] & 15) | bytes[i] >> 4 << 16) << 4 * (i % 4);
        return words;
    }
};
struct Mxfp4Words {
    // A pair with its bits where the product wants them.
    static __device__ __forceinline__ uint32_t pair(uint32_t byte) {
        const uint32_t both = (byte & 15) | byte >> 4 << 16;
        return (both & 0x00070007) << 6 | (both & 0x00080008) << 12;
    }
    static __device__ __forceinline__ uint2 of(const uint32_t (&bytes)[8]) {
        const uint32_t last = pair(bytes[3]) | rotated(pair(bytes[7]), 32 - E2M1_LAST_LEFT);
        return {pair(bytes[0]) | rotated(pair(bytes[1]), 32 - 4) | rotated(pair(bytes[2]), 32 - 10) |
                    rotated(last & E2M1_OF_FIRST, 32 - E2M1_FIRST_LEFT),
                pair(bytes[4]) | rotated(pair(bytes[5]), 32 - 4) | rotated(pair(bytes[6]), 32 - 10) |
                    rotated(last & ~E2M1_OF_FIRST, 32 - E2M1_SECOND_LEFT)};
    }
};

// Codes; a block of threads takes 32 outputs and 64 of k, as a warpgroup of the product does.
template <typename Words> __device__ void repack_codes(const RepackParams& p) {
    await_previous_launch();
    const int64_t panels = panels_of(p), steps = steps_of(p), row_bytes = (p.k + 1) / 2;
    for (int64_t block = blockIdx.x; block < p.num_experts * panels * steps; block += gridDim.x) {
        const int64_t step = block % steps, panel = block / steps, expert = panel / panels,
                      n = panel % panels * ROWS + threadIdx.x / 4;
        uint32_t bytes[8] = {};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int64_t at = step * (WEIGHT_PANEL_DEPTH / 2) + 4 * i + threadIdx.x % 4;
            if (n < p.n && at < row_bytes)
                bytes[i] = *bytes_at(p.from.codes, expert * p.from.expert_codes + n * p.from.row_codes + at);
        }
        unsigned char* const to =
            static_cast<unsigned char*>(p.codes) + panel * p.row_codes + step * WEIGHT_PANEL_BYTES;
        reinterpret_cast<uint2*>(to)[threadIdx.x] = Words::of(bytes);
    }
}

// A thread for each output of each group, in the order in which they are written.
extern "C" __global__ void __launch_bounds__(REPACK_THREADS, 8)
    repack_int4_scales(const __grid_constant__ RepackParams p) {
    await_previous_launch();
    const int64_t panels = panels_of(p);
    for (int64_t i = blockIdx.x * int64_t(REPACK_THREADS) + threadIdx.x;
         i < p.num_experts * panels * p.all_groups * ROWS; i += gridDim.x * int64_t(REPACK_THREADS)) {
        const int64_t row = i % ROWS, group = i / ROWS % p.all_groups, panel = i / ROWS / p.all_groups,
                      expert = panel / panels, n = panel % panels * ROWS + row;
        const bool                 is_inside = n < p.n && group < p.groups;
        const int64_t              to = group * ROWS + row;
        const unsigned char* const from = scales_of(p.from, expert, n);
        unsigned char* const       scales = static_cast<unsigned char*>(p.scales) + panel * p.row_scales;
        if (p.from.scale_type == TYPE_F32)
            reinterpret_cast<uint32_t*>(scales)[to] =
                is_inside ? reinterpret_cast<const uint32_t*>(from)[group] : 0;
        else
            reinterpret_cast<unsigned short*>(scales)[to] =
                is_inside ? reinterpret_cast<const unsigned short*>(from)[group] : 0;
        if (p.zeros)
            static_cast<unsigned char*>(p.zeros)[panel * p.row_zeros + to] =
                is_inside ? zero_point(p.from, expert, n, group) : 0;
    }
}

// A thread for each output: its factor, 2^(largest - 127), and of each exponent the bits of 2^(126 + exponent
// - largest) in bf16, without its mantissa. 255 is no number, and then all of the output is none.
extern "C" __global__ void __launch_bounds__(REPACK_THREADS, 8)
    repack_mxfp4_scales(const __grid_constant__ RepackParams p) {
    await_previous_launch();
    const int64_t panels = panels_of(p);
    for (int64_t i = blockIdx.x * int64_t(REPACK_THREADS) + threadIdx.x; i < p.num_experts * panels * ROWS;
         i += gridDim.x * int64_t(REPACK_THREADS)) {
        const int64_t row = i % ROWS, panel = i / ROWS, expert = panel / panels,
                      n = panel % panels * ROWS + row, groups = n < p.n ? p.groups : 0;
        const unsigned char* const from = scales_of(p.from, expert, n);
        unsigned char* const to = static_cast<unsigned char*>(p.scales) + panel * p.row_scales;
        uint32_t             largest = 0;
        for (int64_t group = 0; group < groups; group++) largest = max(largest, uint32_t(from[group]));
        reinterpret_cast<float*>(to)[row] = e8m0(largest);
        for (int64_t group = 0; group < 2 * steps_of(p); group++) {
            const int exponent = group < groups ? int(from[group]) - int(largest) + 253 : 0;
            to[4 * ROWS + group / 2 * 2 * ROWS + row * 2 + group % 2] =
                static_cast<unsigned char>(max(exponent, 0));
        }
    }
}

extern "C" __global__ void __launch_bounds__(REPACK_THREADS, 8)
    repack_int4(const __grid_constant__ RepackParams p) {
    repack_codes<Int4Words>(p);
}
extern "C" __global__ void __launch_bounds__(REPACK_THREADS, 8)
    repack_mxfp4(const __grid_constant__ RepackParams p) {
    repack_codes<Mxfp4Words>(p);
}
