// quantize: codes[r, k] = e4m3(x[input(r), k] / scales[k / 128, r]), and
// scales[b, r] = max |x[input(r), block b]| / 448
//
// Contract  src/ops/quantize.rs has checked shapes, dtypes and that rows of x and codes begin on 16 bytes;
//           maps come from a Routing.
// Work      a thread block a row, grid-stride over rows; 16 threads take 128 columns, 8 each, the last cut to
//           the columns that there are.
// Cost      memory bound: R * K * (sizeof(T) + 1) + R * K / 32 bytes, or less of x where a token's row stays
//           in the cache.
// Order     a maximum does not depend on order; divisions are rounded as IEEE asks. So the bits are those of
//           the CPU.
#include "common/dtype.cuh"
#include "common/reduce.cuh"
#include "common/ptx/launch.cuh"

enum : int { EACH = 8, LANES = QUANTIZE_COLS / EACH, AT_ONCE = QUANTIZE_THREADS / LANES };

// Two codes, the lower of `low`: nearest, ties to even; too large numbers become 448. A NaN is 0x7f.
__device__ __forceinline__ uint32_t e4m3_pair(float low, float high) {
    unsigned short pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

// The eight elements from `at` on. Those after the end of the row are zeros.
template <typename T>
__device__ __forceinline__ void load_eight(float (&x)[EACH], const T* at, int64_t left) {
#pragma unroll
    for (int i = 0; i < EACH; i += Vec<T>::SIZE) {
        const Vec<T> part = load_first(at + i, left - i);
#pragma unroll
        for (int j = 0; j < Vec<T>::SIZE; j++) x[i + j] = to_f32(part.at[j]);
    }
}

__device__ __forceinline__ void store_eight(unsigned char* at, int64_t left, const float (&x)[EACH],
                                            float scale) {
    uint32_t words[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float* of = x + 4 * i;
        words[i] = e4m3_pair(of[0] / scale, of[1] / scale) | e4m3_pair(of[2] / scale, of[3] / scale) << 16;
    }
    if (left >= EACH) {
        *reinterpret_cast<uint2*>(at) = make_uint2(words[0], words[1]);
        return;
    }
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (i < left) at[i] = static_cast<unsigned char>(words[i / 4] >> i % 4 * 8);
}

// The scale of the 16 threads' elements. Of zeros, and of numbers so small that their scale would be zero, it
// is 1.
__device__ __forceinline__ float scale_of(const float (&x)[EACH]) {
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < EACH; i++) most = fmaxf(most, fabsf(x[i])); // of a NaN the other one
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2)
        most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, step));
    const float scale = most / 448.0f;
    return scale == 0.0f ? 1.0f : scale;
}

template <typename T> __device__ void quantize(const QuantizeParams& p) {
    await_previous_launch();
    const int64_t rows = p.rows_end ? min(p.rows, int64_t(*p.rows_end)) : p.rows;
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const int64_t  input = p.row_to_slot ? int64_t(p.row_to_slot[row] / uint32_t(p.top_k)) : row;
        const T*       from = static_cast<const T*>(p.x) + input * p.x_stride;
        unsigned char* to = static_cast<unsigned char*>(p.codes) + row * p.codes_stride;
        // All threads take as many turns: they find the maximum together.
        for (int64_t first = 0; first < p.k; first += AT_ONCE * QUANTIZE_COLS) {
            const int64_t col = first + int64_t(threadIdx.x) * EACH;
            float         x[EACH];
            load_eight(x, from + col, p.k - col);
            const float scale = scale_of(x);
            if (col >= p.k) continue;
            if (threadIdx.x % LANES == 0) p.scales[col / QUANTIZE_COLS * p.scales_stride + row] = scale;
            store_eight(to + col, p.k - col, x, scale);
        }
    }
}

#define ENTRY(T, NAME)                                                                                      \
    extern "C" __global__ void __launch_bounds__(QUANTIZE_THREADS) quantize_##NAME##_to_e4m3(               \
        const __grid_constant__ QuantizeParams p) {                                                         \
        quantize<T>(p);                                                                                     \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
