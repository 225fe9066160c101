// embedding: y[t, :] = table[ids[t], :]
//
// Contract  src/ops/embedding.rs has checked shapes, dtypes and that every id is below V, embedding/cuda.rs that every row begins on 16 bytes.
// Work      grid-stride over rows of 16-byte vectors, the last of a row cut to its elements; any grid size is correct.
// Cost      memory bound: 2 * T * D * sizeof(T) + 4 * T bytes.
// Order     a copy, bit for bit.
#include "common/dtype.cuh"

template <typename T> __device__ void lookup(const EmbeddingParams& p) {
    constexpr int SIZE = Vec<T>::SIZE;
    const int64_t vectors = (p.d_model + SIZE - 1) / SIZE;
    const int64_t n = p.num_tokens * vectors;
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
        const int64_t token = i / vectors, col = i % vectors * SIZE, left = p.d_model - col;
        const T*      row = static_cast<const T*>(p.table) + int64_t(p.ids[token]) * p.table_stride;
        store_first(static_cast<T*>(p.y) + token * p.y_stride + col, left, load_first(row + col, left));
    }
}

extern "C" __global__ void __launch_bounds__(256) embedding_f32(const __grid_constant__ EmbeddingParams p) { lookup<float>(p); }
extern "C" __global__ void __launch_bounds__(256) embedding_bf16(const __grid_constant__ EmbeddingParams p) { lookup<bf16>(p); }
extern "C" __global__ void __launch_bounds__(256) embedding_f16(const __grid_constant__ EmbeddingParams p) { lookup<f16>(p); }
