// grouped_gemm: y[r, :] = x[input(r), :] * w[expert of r], w as [N, K] (nt) or [K, N] (nn); glu: silu(x w^T) * (x v^T), or another epilogue
//
// Contract  src/ops/grouped_gemm.rs has checked shapes, dtypes and order; offsets and maps come from a Routing, or from a caller who vouches for them.
// Work      the plain form, for every shape and alignment: a block of 64 threads takes tiles of 32 rows of one expert x 32 columns, 4 x 4 a thread.
// Cost      2 * R * N * K FLOP (twice that for glu_nt) on the f32 pipes; x is read N / 32 times, w R / 32 times, through the caches.
// Order     one chain of f32 additions over ascending k per element, rounded once: a row's bits depend on that row and the weights alone.
#include "common/plain_product.cuh"

// Weights of floats, as they lie.
template <typename T, bool NN, bool GLU> struct Floats {
    const ProductParams& p;

    __device__ __forceinline__ void load(WeightTile* tiles, int64_t expert, int64_t k, int64_t col) const {
        load(tiles[0], static_cast<const T*>(p.w) + expert * p.w_expert, p.w_stride, k, col);
        if (GLU) load(tiles[1], static_cast<const T*>(p.v) + expert * p.v_expert, p.v_stride, k, col);
    }

  private:
    __device__ __forceinline__ void load(WeightTile& tile, const T* w, int64_t stride, int64_t first_k,
                                         int64_t first_col) const {
#pragma unroll 4
        for (int i = threadIdx.x; i < TILE * TILE; i += THREADS) {
            // Neighbours in memory to neighbouring threads.
            const int  col = NN ? i % TILE : i / TILE, step = NN ? i / TILE : i % TILE;
            const bool inside = first_k + step < p.k && first_col + col < p.n;
            const int64_t at = NN ? (first_k + step) * stride + first_col + col
                                  : (first_col + col) * stride + first_k + step;
            tile[step][col] = inside ? to_f32(w[at]) : 0.0f;
        }
    }
};

#define ENTRY(NAME, T, O, NN, GLU)                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, 8)                                           \
        grouped_gemm_##NAME(const __grid_constant__ ProductParams p) {                                 \
        product<GLU>(p, Typed<T, O>(), Floats<T, NN, GLU>{p});                                         \
    }
ENTRY(nt_f32, float, float, false, false)
ENTRY(nt_bf16, bf16, bf16, false, false)
ENTRY(nt_f16, f16, f16, false, false)
ENTRY(nt_bf16_to_f32, bf16, float, false, false)
ENTRY(nt_f16_to_f32, f16, float, false, false)
ENTRY(nn_f32, float, float, true, false)
ENTRY(nn_bf16, bf16, bf16, true, false)
ENTRY(nn_f16, f16, f16, true, false)
ENTRY(nn_bf16_to_f32, bf16, float, true, false)
ENTRY(nn_f16_to_f32, f16, float, true, false)
ENTRY(glu_nt_f32, float, float, false, true)
ENTRY(glu_nt_bf16, bf16, bf16, false, true)
ENTRY(glu_nt_f16, f16, f16, false, true)
ENTRY(glu_nn_f32, float, float, true, true)
ENTRY(glu_nn_bf16, bf16, bf16, true, true)
ENTRY(glu_nn_f16, f16, f16, true, true)
