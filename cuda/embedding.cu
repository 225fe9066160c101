// embedding: y[t, :] = table[ids[t], :], or scale * table[ids[t], :]
//
// Contract  src/ops/embedding.rs has checked shapes, dtypes, that every id is below V and that every row
//           of floats begins on 16 bytes.
// Work      a block a row, grid-stride over rows; a thread takes 16-byte vectors, or eight elements where the
//           table is quantised, the last of a row cut to its elements.
// Cost      memory bound: 2 * T * D * sizeof(T) + 4 * T bytes, or less where the table is quantised.
// Order     elementwise: a copy, bit for bit, or a product in f32 that is rounded once.
#include "common/dtype.cuh"
#include "common/ptx/launch.cuh"
#include "common/quantized_rows.cuh"

template <typename T> __device__ void lookup(const EmbeddingParams& p) {
    await_previous_launch();
    constexpr int SIZE = Vec<T>::SIZE;
    for (int64_t token = blockIdx.x; token < p.num_tokens; token += gridDim.x) {
        const T* row = static_cast<const T*>(p.table) + int64_t(p.ids[token]) * p.table_stride;
        T*       y = static_cast<T*>(p.y) + token * p.y_stride;
        for (int64_t col = int64_t(threadIdx.x) * SIZE; col < p.d_model; col += blockDim.x * SIZE) {
            Vec<T> x = load_first(row + col, p.d_model - col);
            if (p.scale != 1.0f) {
#pragma unroll
                for (int j = 0; j < SIZE; j++) x.at[j] = from_f32<T>(p.scale * to_f32(x.at[j]));
            }
            store_first(y + col, p.d_model - col, x);
        }
    }
}

template <typename T> __device__ __forceinline__ void store_run(T* y, int64_t count, const float (&x)[RUN]) {
    Vec<T> v;
#pragma unroll
    for (int first = 0; first < RUN; first += v.SIZE) {
#pragma unroll
        for (int j = 0; j < v.SIZE; j++) v.at[j] = from_f32<T>(x[first + j]);
        store_first(y + first, count - first, v);
    }
}

extern "C" __global__ void __launch_bounds__(256)
    embedding_quantized(const __grid_constant__ QuantizedEmbeddingParams p) {
    await_previous_launch();
    const EmbeddingParams& e = p.embedding;
    for (int64_t token = blockIdx.x; token < e.num_tokens; token += gridDim.x) {
        for (int64_t col = int64_t(threadIdx.x) * RUN; col < e.d_model; col += blockDim.x * RUN) {
            const int64_t count = e.d_model - col, at = token * e.y_stride + col;
            float         x[RUN];
            decode(p.table, 0, e.ids[token], col, count, x);
#pragma unroll
            for (int j = 0; j < RUN; j++) x[j] = __fmul_rn(e.scale, x[j]);
            if (p.y_type == TYPE_F32)
                store_run(static_cast<float*>(e.y) + at, count, x);
            else if (p.y_type == TYPE_BF16)
                store_run(static_cast<bf16*>(e.y) + at, count, x);
            else
                store_run(static_cast<f16*>(e.y) + at, count, x);
        }
    }
}

#define ENTRY(T, NAME)                                 \
    extern "C" __global__ void __launch_bounds__(256)  \
        embedding_##NAME(const __grid_constant__ EmbeddingParams p) { \
        lookup<T>(p);                                  \
    }
ENTRY(float, f32)
ENTRY(bf16, bf16)
ENTRY(f16, f16)
