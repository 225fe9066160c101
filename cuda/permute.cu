// permute: gather y[r, :] = x[row_to_slot[r] / k, :]; combine y[t, :] = sum over slots s of weights[t, s] * x[slot_to_row[t, s], :]
//
// Contract  src/ops/permute.rs has checked shapes and dtypes, permute/cuda.rs that every row begins on 16 bytes; the maps come from a Routing.
// Work      grid-stride over rows of 16-byte vectors, the last of a row cut to its elements; any grid size is correct.
// Cost      memory bound: gather 2 * R * D * sizeof(T) + 4 * R bytes, combine (R + T) * D * sizeof(T) + 8 * R bytes.
// Order     gather copies bit for bit; combine sums in f32 in slot order and rounds once, so a token's bits depend on its own rows alone.
#include "common/dtype.cuh"

template <typename T> __device__ void gather(const GatherParams& p) {
    constexpr int SIZE = Vec<T>::SIZE;
    const int64_t vectors = (p.d_model + SIZE - 1) / SIZE;
    const int64_t n = p.rows * vectors;
    const uint32_t top_k = uint32_t(p.top_k);
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
        const int64_t row = i / vectors, col = i % vectors * SIZE, left = p.d_model - col;
        const T*      x = static_cast<const T*>(p.x) + int64_t(p.row_to_slot[row] / top_k) * p.x_stride;
        store_first(static_cast<T*>(p.y) + row * p.y_stride + col, left, load_first(x + col, left));
    }
}

template <typename T> __device__ void combine(const CombineParams& p) {
    constexpr int SIZE = Vec<T>::SIZE;
    const int64_t vectors = (p.d_model + SIZE - 1) / SIZE;
    const int64_t n = p.num_tokens * vectors;
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
        const int64_t token = i / vectors, col = i % vectors * SIZE, left = p.d_model - col;
        float         sum[SIZE] = {};
        for (int64_t slot = token * p.top_k; slot < (token + 1) * p.top_k; slot++) {
            const T*     row = static_cast<const T*>(p.x) + int64_t(p.slot_to_row[slot]) * p.x_stride;
            const float  weight = p.weights[slot];
            const Vec<T> x = load_first(row + col, left);
#pragma unroll
            for (int j = 0; j < SIZE; j++) sum[j] += weight * to_f32(x.at[j]);
        }
        Vec<T> y;
#pragma unroll
        for (int j = 0; j < SIZE; j++) y.at[j] = from_f32<T>(sum[j]);
        store_first(static_cast<T*>(p.y) + token * p.y_stride + col, left, y);
    }
}

extern "C" __global__ void __launch_bounds__(256) permute_gather_f32(const __grid_constant__ GatherParams p) { gather<float>(p); }
extern "C" __global__ void __launch_bounds__(256) permute_gather_bf16(const __grid_constant__ GatherParams p) { gather<bf16>(p); }
extern "C" __global__ void __launch_bounds__(256) permute_gather_f16(const __grid_constant__ GatherParams p) { gather<f16>(p); }

extern "C" __global__ void __launch_bounds__(256) permute_combine_f32(const __grid_constant__ CombineParams p) { combine<float>(p); }
extern "C" __global__ void __launch_bounds__(256) permute_combine_bf16(const __grid_constant__ CombineParams p) { combine<bf16>(p); }
extern "C" __global__ void __launch_bounds__(256) permute_combine_f16(const __grid_constant__ CombineParams p) { combine<f16>(p); }
