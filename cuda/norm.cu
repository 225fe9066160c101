// norm: y[t, :] = (x[t, :] - mean) / sqrt(variance + eps) * weight + bias, or the same with a mean of 0 and
// the mean square for the variance
//
// `add` forms first add x to the residual. `general` forms serve every option: a bias, and an addend that is
// scale * (x + also) or scale * norm(x + also; post). The others have no bias and need fewer registers.
//
// Contract  src/ops/norm.rs has checked shapes, dtypes, that every row begins on 16 bytes and fits the
//           registers of one block.
// Work      one block a row, grid-stride over rows; the row stays in registers between the passes over it.
// Cost      memory bound: 2 * T * D * sizeof(T) bytes, 4 * T * D * sizeof(T) where x is added to a residual,
//           5 * T * D * sizeof(T) with `also`.
// Order     sums in f32, over a thread's elements, then warps, then the block: the number of threads follows
//           from D alone.
#include "common/dtype.cuh"
#include "common/reduce.cuh"
#include "common/ptx/launch.cuh"

enum Kind { LAYER, RMS };
enum Form { ALONE, ADD, GENERAL };

enum : int { ELEMS_PER_THREAD = NORM_ELEMS_PER_THREAD };

// A thread's part of a row of elements T, as elements E. Its vector v begins at column first<T>(v).
template <typename T> struct Part {
    enum : int { SIZE = Vec<T>::SIZE, VECTORS = ELEMS_PER_THREAD / SIZE };
};
template <typename T, typename E> using Row = Vec<E, Part<T>::SIZE>[Part<T>::VECTORS];
template <typename T> __device__ __forceinline__ int64_t first(int v) {
    return int64_t(v * blockDim.x + threadIdx.x) * Part<T>::SIZE;
}

// A row is normalised to (x - mean - rest) * inverse: `rest` is what rounding left in the mean.
struct Statistics {
    float mean, rest, inverse;
};

// From the row and the block's sums over it. Zeros behind its end have added nothing to those.
template <typename T, Kind KIND, typename E>
__device__ __forceinline__ Statistics statistics(
    const NormParams& p, const Row<T, E>& x, float sum, float squares, float (*scratch)[2]) {
    const float n = float(p.d_model), mean = KIND == LAYER ? sum / n : 0.0f;
    float       rest = 0.0f, mean_square = squares / n;
    if (KIND == LAYER) { // the variance of deviations from the mean
        sum = squares = 0.0f;
#pragma unroll
        for (int v = 0; v < Part<T>::VECTORS; v++) {
            const int64_t left = p.d_model - first<T>(v);
#pragma unroll
            for (int j = 0; j < Part<T>::SIZE; j++) {
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
    return {mean, rest, 1.0f / sqrtf(mean_square + p.eps)};
}

// Of a vector at column `col`: normalised, times the weight, and the bias where there is one.
template <typename T, bool BIASED, typename E>
__device__ __forceinline__ Vec<float, Part<T>::SIZE> normalized(
    const Statistics& s, const Vec<E, Part<T>::SIZE>& x, In weights, In biases, int64_t col, int64_t left) {
    const Vec<T>              weight = load_first(static_cast<const T*>(weights) + col, left);
    Vec<float, Part<T>::SIZE> y;
#pragma unroll
    for (int j = 0; j < Part<T>::SIZE; j++)
        y.at[j] = (to_f32(x.at[j]) - s.mean - s.rest) * s.inverse * to_f32(weight.at[j]);
    if (BIASED && biases) {
        const Vec<T> bias = load_first(static_cast<const T*>(biases) + col, left);
#pragma unroll
        for (int j = 0; j < Part<T>::SIZE; j++) y.at[j] += to_f32(bias.at[j]);
    }
    return y;
}

// What is added to a row of the residual, without the scale: x + also, in f32, or the norm of that. The
// residual's row is loaded at the same time, so that nothing waits for it after the sums over the block.
template <typename T, Kind KIND>
__device__ __forceinline__ void load_addend(
    const NormParams& p, int64_t token, Row<T, T>& old, Row<T, float>& added, float (*scratch)[2]) {
    const T* in = static_cast<const T*>(p.x) + token * p.x_stride;
    const T* also = static_cast<const T*>(p.also) + token * p.also_stride;
    const T* residual = static_cast<const T*>(p.residual) + token * p.residual_stride;
    float    sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int v = 0; v < Part<T>::VECTORS; v++) {
        const int64_t col = first<T>(v), left = p.d_model - col;
        if (left <= 0) continue;
        const Vec<T> x = load_first(in + col, left);
        if (p.residual) old[v] = load_first(residual + col, left);
#pragma unroll
        for (int j = 0; j < Part<T>::SIZE; j++) added[v].at[j] = to_f32(x.at[j]);
        if (p.also) {
            const Vec<T> more = load_first(also + col, left);
#pragma unroll
            for (int j = 0; j < Part<T>::SIZE; j++) added[v].at[j] += to_f32(more.at[j]);
        }
#pragma unroll
        for (int j = 0; j < Part<T>::SIZE; j++) {
            sum += added[v].at[j];
            squares += added[v].at[j] * added[v].at[j];
        }
    }
    if (!p.post_weight) return;
    block_sum(sum, squares, scratch);
    const Statistics s = statistics<T, KIND, float>(p, added, sum, squares, scratch);
#pragma unroll
    for (int v = 0; v < Part<T>::VECTORS; v++) {
        const int64_t col = first<T>(v), left = p.d_model - col;
        if (left <= 0) continue;
        added[v] = normalized<T, true, float>(s, added[v], p.post_weight, p.post_bias, col, left);
        // The mean times 1 / deviation may be infinite, and that times a weight of 0 NaN.
#pragma unroll
        for (int j = 0; j < Part<T>::SIZE; j++)
            if (j >= left) added[v].at[j] = 0.0f;
    }
}

template <typename T, Kind KIND, Form FORM> __device__ void norm(const NormParams& p) {
    await_previous_launch();
    constexpr int    SIZE = Part<T>::SIZE, VECTORS = Part<T>::VECTORS;
    __shared__ float scratch[32][2];

    for (int64_t token = blockIdx.x; token < p.num_tokens; token += gridDim.x) {
        const T*      in = static_cast<const T*>(p.x) + token * p.x_stride;
        T*            residual = static_cast<T*>(p.residual) + token * p.residual_stride;
        T*            y = static_cast<T*>(p.y) + token * p.y_stride;
        Row<T, T>     x;
        Row<T, float> added;
        if (FORM == GENERAL) load_addend<T, KIND>(p, token, x, added, scratch);

        // The row, rounded where it is a sum; zeros behind its end add nothing to the first sum.
        float sum = 0.0f, squares = 0.0f;
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            const int64_t col = first<T>(v), left = p.d_model - col;
            if (left <= 0) continue;
            if (FORM != GENERAL) x[v] = load_first(in + col, left);
            if (FORM == ADD) {
                const Vec<T> old = load_first(static_cast<const T*>(residual) + col, left);
#pragma unroll
                for (int j = 0; j < SIZE; j++)
                    x[v].at[j] = from_f32<T>(to_f32(old.at[j]) + to_f32(x[v].at[j]));
                store_first(residual + col, left, x[v]);
            }
            if (FORM == GENERAL) {
#pragma unroll
                for (int j = 0; j < SIZE; j++) {
                    const float value = added[v].at[j];
                    x[v].at[j] = from_f32<T>(p.residual ? to_f32(x[v].at[j]) + p.scale * value : value);
                }
                if (p.residual) store_first(residual + col, left, x[v]);
            }
#pragma unroll
            for (int j = 0; j < SIZE; j++) {
                const float value = to_f32(x[v].at[j]);
                sum += value;
                squares += value * value;
            }
        }
        block_sum(sum, squares, scratch);
        const Statistics s = statistics<T, KIND, T>(p, x, sum, squares, scratch);

#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            const int64_t col = first<T>(v), left = p.d_model - col;
            if (left <= 0) continue;
            constexpr bool         BIASED = FORM == GENERAL;
            const Vec<float, SIZE> values = normalized<T, BIASED, T>(s, x[v], p.weight, p.bias, col, left);
            Vec<T>                 out;
#pragma unroll
            for (int j = 0; j < SIZE; j++) out.at[j] = from_f32<T>(values.at[j]);
            store_first(y + col, left, out);
        }
    }
}

#define ENTRY(NAME, ...)                                           \
    extern "C" __global__ void __launch_bounds__(NORM_MAX_THREADS) \
        NAME(const __grid_constant__ NormParams p) {               \
        norm<__VA_ARGS__>(p);                                      \
    }
#define ENTRIES(T, NAME)                                \
    ENTRY(norm_layer_##NAME, T, LAYER, ALONE)           \
    ENTRY(norm_add_layer_##NAME, T, LAYER, ADD)         \
    ENTRY(norm_general_layer_##NAME, T, LAYER, GENERAL) \
    ENTRY(norm_rms_##NAME, T, RMS, ALONE)               \
    ENTRY(norm_add_rms_##NAME, T, RMS, ADD)             \
    ENTRY(norm_general_rms_##NAME, T, RMS, GENERAL)
ENTRIES(float, f32)
ENTRIES(bf16, bf16)
ENTRIES(f16, f16)
