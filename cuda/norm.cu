// norm: y[t, :] = (x[t, :] - mean) / sqrt(variance + eps) * weight, or x[t, :] / sqrt(mean square + eps) * weight; `add` forms first add x to the residual
//
// Contract  src/ops/norm.rs has checked shapes, dtypes, that every row begins on 16 bytes and fits the registers of one block.
// Work      one block a row, grid-stride over rows; the row stays in registers between the passes over it.
// Cost      memory bound: 2 * T * D * sizeof(T) bytes, 4 * T * D * sizeof(T) for the `add` forms.
// Order     sums in f32, over a thread's elements, then warps, then the block: the number of threads follows from D alone.
#include "common/dtype.cuh"
#include "common/reduce.cuh"
#include "common/ptx/launch.cuh"

enum Kind { LAYER, RMS };

enum : int { ELEMS_PER_THREAD = NORM_ELEMS_PER_THREAD };

template <typename T, Kind KIND, bool ADD> __device__ void norm(const NormParams& p) {
    await_previous_launch();
    constexpr int    SIZE = Vec<T>::SIZE, VECTORS = ELEMS_PER_THREAD / SIZE;
    __shared__ float scratch[32][2];

    for (int64_t token = blockIdx.x; token < p.num_tokens; token += gridDim.x) {
        const T* in = static_cast<const T*>(p.x) + token * p.x_stride;
        T*       residual = static_cast<T*>(p.residual) + token * p.residual_stride;
        T*       y = static_cast<T*>(p.y) + token * p.y_stride;
        Vec<T>   x[VECTORS];

        // The row, rounded where it is a sum; zeros behind its end add nothing to the first sum.
        float sum = 0.0f, squares = 0.0f;
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            const int64_t col = int64_t(v * blockDim.x + threadIdx.x) * SIZE, left = p.d_model - col;
            if (left <= 0) continue;
            x[v] = load_first(in + col, left);
            if (ADD) {
                const Vec<T> old = load_first(static_cast<const T*>(residual) + col, left);
#pragma unroll
                for (int j = 0; j < SIZE; j++) x[v].at[j] = from_f32<T>(to_f32(old.at[j]) + to_f32(x[v].at[j]));
                store_first(residual + col, left, x[v]);
            }
#pragma unroll
            for (int j = 0; j < SIZE; j++) {
                const float value = to_f32(x[v].at[j]);
                sum += value;
                squares += value * value;
            }
        }
        block_sum(sum, squares, scratch);

        // The variance of deviations from the mean, and what rounding left in the mean.
        const float n = float(p.d_model), mean = KIND == LAYER ? sum / n : 0.0f;
        float       rest = 0.0f, mean_square = squares / n;
        if (KIND == LAYER) {
            sum = squares = 0.0f;
#pragma unroll
            for (int v = 0; v < VECTORS; v++) {
                const int64_t left = p.d_model - int64_t(v * blockDim.x + threadIdx.x) * SIZE;
#pragma unroll
                for (int j = 0; j < SIZE; j++) {
                    if (j >= left) continue;
                    const float deviation = to_f32(x[v].at[j]) - mean;
                    sum += deviation;
                    squares += deviation * deviation;
                }
            }
            block_sum(sum, squares, scratch);
            rest = sum / n;
            mean_square = squares / n - rest * rest;
            if (mean_square < 0.0f) mean_square = 0.0f; // not fmaxf, which would hide a NaN
        }
        const float inverse = 1.0f / sqrtf(mean_square + p.eps);

#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            const int64_t col = int64_t(v * blockDim.x + threadIdx.x) * SIZE, left = p.d_model - col;
            if (left <= 0) continue;
            const Vec<T> weight = load_first(static_cast<const T*>(p.weight) + col, left);
            Vec<T>       out;
#pragma unroll
            for (int j = 0; j < SIZE; j++) out.at[j] = from_f32<T>((to_f32(x[v].at[j]) - mean - rest) * inverse * to_f32(weight.at[j]));
            store_first(y + col, left, out);
        }
    }
}

#define ENTRIES(T, NAME)                                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(NORM_MAX_THREADS) norm_layer_##NAME(const __grid_constant__ NormParams p) { norm<T, LAYER, false>(p); }             \
    extern "C" __global__ void __launch_bounds__(NORM_MAX_THREADS) norm_add_layer_##NAME(const __grid_constant__ NormParams p) { norm<T, LAYER, true>(p); }          \
    extern "C" __global__ void __launch_bounds__(NORM_MAX_THREADS) norm_rms_##NAME(const __grid_constant__ NormParams p) { norm<T, RMS, false>(p); }                 \
    extern "C" __global__ void __launch_bounds__(NORM_MAX_THREADS) norm_add_rms_##NAME(const __grid_constant__ NormParams p) { norm<T, RMS, true>(p); }
ENTRIES(float, f32)
ENTRIES(bf16, bf16)
ENTRIES(f16, f16)
