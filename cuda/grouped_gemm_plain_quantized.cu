// grouped_gemm with quantised weights in the order of a checkpoint: nt and glu_nt of decoded weights.
//
// Contract  src/ops/grouped_gemm.rs has checked shapes, dtypes and order; offsets and maps come from a
//           Routing, or from a caller who vouches for them.
// Work      the plain form, for every format, shape and alignment: tiles as in grouped_gemm_plain.cu; a
//           thread decodes eight weights of an output at a time.
// Cost      2 * R * N * K FLOP (twice that for glu_nt) on the f32 pipes; x is read N / 32 times, w is read
//           and decoded R / 32 times, byte by byte, through the caches.
// Order     one chain of f32 additions over ascending k per element, rounded once: a row's bits depend on
//           that row and the weights alone.
#include "common/plain_product.cuh"
#include "common/quantized_rows.cuh"

template <bool GLU> struct Quantized {
    const PlainQuantizedParams& p;

    __device__ __forceinline__ void load(WeightTile* tiles, int64_t expert, int64_t k, int64_t col) const {
        constexpr int RUNS = TILE * TILE / RUN; // of a tile
#pragma unroll 1
        for (int i = threadIdx.x; i < (GLU ? 2 : 1) * RUNS; i += THREADS) {
            const QuantizedMatrixParams& m = GLU && i >= RUNS ? p.v : p.w;
            const int     n = i % TILE, step = i % RUNS / TILE * RUN; // a warp stores to all banks
            const int64_t count = p.product.k - k - step;
            float         run[RUN] = {};
            if (count > 0 && col + n < p.product.n) decode(m, expert, col + n, k + step, count, run);
#pragma unroll
            for (int j = 0; j < RUN; j++) tiles[i / RUNS][step + j][n] = run[j];
        }
    }
};

// The types of x and y are data, too, so that two entries serve them all.
struct Elements {
    uint32_t x_type, y_type;

    __device__ __forceinline__ float x(In at, int64_t i) const { return float_at(x_type, at, i); }
    __device__ __forceinline__ float bias(const BiasParams& p, int64_t expert, int64_t col) const {
        if (x_type == TYPE_F32) return bias_of<float>(p, expert, col);
        return x_type == TYPE_BF16 ? bias_of<bf16>(p, expert, col) : bias_of<f16>(p, expert, col);
    }
    __device__ __forceinline__ void store(Out at, int64_t i, float value) const {
        store_float(y_type, at, i, value);
    }
};

#define ENTRY(NAME, GLU, BLOCKS_PER_SM)                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)                               \
        grouped_gemm_##NAME##_quantized(const __grid_constant__ PlainQuantizedParams p) {              \
        product<GLU>(p.product, Elements{p.x_type, p.y_type}, Quantized<GLU>{p});                      \
    }
ENTRY(nt, false, 8)
ENTRY(glu_nt, true, 6) // two sums and a decoder take more registers
