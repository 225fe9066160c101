// permute: gather y[r, :] = x[row_to_slot[r] / k, :]; combine y[t, :] = sum over slots s of weights[t, s] * x[slot_to_row[t, s], :] (+ sigmoid(gate[t]) * base[t, :])
//
// Contract  src/ops/permute.rs has checked shapes, dtypes and that every row begins on 16 bytes; the maps come from a Routing.
// Work      a block a row, grid-stride over rows; a thread takes 16-byte vectors, the last of a row cut to its elements.
// Cost      memory bound: gather 2 * R * D * sizeof(T) + 4 * R bytes, combine (R + T) * D * sizeof(T) + 8 * R bytes.
// Order     gather copies bit for bit; combine sums in f32 in slot order and rounds once, so a token's bits depend on its own rows alone.
#include "common/dtype.cuh"
#include "common/ptx/launch.cuh"

template <typename T> __device__ void gather(const GatherParams& p) {
    await_previous_launch();
    constexpr int SIZE = Vec<T>::SIZE;
    const int64_t rows = min(p.rows, int64_t(*p.rows_end));
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const T* x = static_cast<const T*>(p.x) + int64_t(p.row_to_slot[row] / uint32_t(p.top_k)) * p.x_stride;
        T*       y = static_cast<T*>(p.y) + row * p.y_stride;
        for (int64_t col = int64_t(threadIdx.x) * SIZE; col < p.d_model; col += blockDim.x * SIZE)
            store_first(y + col, p.d_model - col, load_first(x + col, p.d_model - col));
    }
}

template <typename T> __device__ void combine(const CombineParams& p) {
    await_previous_launch();
    constexpr int SIZE = Vec<T>::SIZE;
    for (int64_t token = blockIdx.x; token < p.num_tokens; token += gridDim.x) {
        for (int64_t col = int64_t(threadIdx.x) * SIZE; col < p.d_model; col += blockDim.x * SIZE) {
            float sum[SIZE] = {};
            for (int64_t slot = token * p.top_k; slot < (token + 1) * p.top_k; slot++) {
                const uint32_t at = p.slot_to_row[slot];
                if (at == NOWHERE) continue;
                const T*     row = static_cast<const T*>(p.x) + int64_t(at) * p.x_stride;
                const float  weight = p.weights[slot];
                const Vec<T> x = load_first(row + col, p.d_model - col);
#pragma unroll
                for (int j = 0; j < SIZE; j++) sum[j] += weight * to_f32(x.at[j]);
            }
            if (p.base) {
                const float  factor = p.gate ? 1.0f / (1.0f + expf(-p.gate[token * p.gate_stride])) : 1.0f;
                const Vec<T> base = load_first(static_cast<const T*>(p.base) + token * p.base_stride + col, p.d_model - col);
#pragma unroll
                for (int j = 0; j < SIZE; j++) sum[j] += factor * to_f32(base.at[j]);
            }
            Vec<T> y;
#pragma unroll
            for (int j = 0; j < SIZE; j++) y.at[j] = from_f32<T>(sum[j]);
            store_first(static_cast<T*>(p.y) + token * p.y_stride + col, p.d_model - col, y);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) permute_gather_f32(const __grid_constant__ GatherParams p) { gather<float>(p); }
extern "C" __global__ void __launch_bounds__(256) permute_gather_bf16(const __grid_constant__ GatherParams p) { gather<bf16>(p); }
extern "C" __global__ void __launch_bounds__(256) permute_gather_f16(const __grid_constant__ GatherParams p) { gather<f16>(p); }

extern "C" __global__ void __launch_bounds__(256) permute_combine_f32(const __grid_constant__ CombineParams p) { combine<float>(p); }
extern "C" __global__ void __launch_bounds__(256) permute_combine_bf16(const __grid_constant__ CombineParams p) { combine<bf16>(p); }
extern "C" __global__ void __launch_bounds__(256) permute_combine_f16(const __grid_constant__ CombineParams p) { combine<f16>(p); }
