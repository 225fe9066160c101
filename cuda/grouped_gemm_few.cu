// grouped_gemm for few rows per expert, on the tensor cores with the operands swapped: y^T = w * x^T. Products as in grouped_gemm.cu.
//
// Contract  as grouped_gemm.cu. Right for any number of rows; meant for calls in which no expert can own more than TOKENS of them.
// Work      a block per SM takes tile after tile: 64 columns of y, of every product, for TOKENS rows of one expert. Warpgroup 0 streams stages of
//           16 KB of weights by TMA, and the rows by TMA or, where they are gathered, by cp.async; warpgroup 1 multiplies: the weights are the
//           64-row operand, the rows the narrow one. Experts without rows have no tiles.
// Cost      bound by memory: where TOKENS rows hold an expert's, each byte of its weights is loaded once, 2 * N * K (4 * N * K for glu_nt) bytes per
//           expert in use; the rows come from the L2 cache once per tile, 2 * TOKENS * K bytes. About 190 KB are in flight per SM.
// Order     one chain of f32 additions per element over ascending k, 16 at a time, rounded once, without a split.
#include "common/activation.cuh"
#include "common/dtype.cuh"
#include "common/expert_tiles.cuh"
#include "common/gathered_rows.cuh"
#include "common/ring.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/tma.cuh"
#include "common/ptx/wgmma.cuh"

enum : int { THREADS = FEW_THREADS, COLS = FEW_COLS, DEPTH = TILED_DEPTH };
enum : int { W_BYTES = COLS * PITCH }; // of one product's weights, DEPTH deep
static_assert(THREADS == 2 * WARPGROUP && PITCH == 2 * DEPTH, "params.h");

// TOKENS are rows of a tile. A stage is PANELS times DEPTH of k, so that it holds 16 KB of weights for one product as for two.
template <typename T_, typename O_, bool NN_, bool GLU_, int TOKENS_> struct Form {
    using T = T_;
    using O = O_;
    enum : bool { NN = NN_, GLU = GLU_ };
    enum : int { TOKENS = TOKENS_, PRODUCTS = GLU ? 2 : 1, PANELS = GLU ? 1 : 2 };
    enum : int { X_BYTES = TOKENS * PITCH, X_AT = PANELS * PRODUCTS * W_BYTES, STAGE_BYTES = X_AT + PANELS * X_BYTES };
    enum : int { STAGES = (FEW_SHARED_BYTES - 256) / STAGE_BYTES, BARRIERS_AT = STAGES * STAGE_BYTES };
    using Stages = Ring<STAGES, 1>;
    static_assert(BARRIERS_AT + Stages::BYTES <= FEW_SHARED_BYTES && STAGE_BYTES % 1024 == 0, "params.h");
};

__device__ __forceinline__ ExpertTiles tiles_of(const TiledProductParams& p, uint32_t tokens) {
    return ExpertTiles(p.offsets, p.rows, p.num_experts, tokens, uint32_t((p.n + COLS - 1) / COLS));
}

// Warpgroup 0. Where rows are not gathered, one thread does it all.
template <typename F> __device__ __forceinline__ void produce(const TiledProductParams& p, uint32_t shared, typename F::Stages ring) {
    const bool gathered = p.row_to_slot;
    if (!gathered && threadIdx.x != 0) return;
    ExpertTiles tiles = tiles_of(p, F::TOKENS);
    ExpertTile  tile;
    for (uint32_t index = blockIdx.x; tiles.find(index, tile); index += gridDim.x) {
        GatheredRows<typename F::T, F::TOKENS> rows;
        if (gathered) rows.find(p, tile.row, tile.end);
        for (uint32_t first_k = 0; first_k < p.k; first_k += F::PANELS * DEPTH) {
            const uint32_t stage = shared + ring.stage * F::STAGE_BYTES, full = ring.full(), col = tile.col * COLS;
            ring.wait_empty();
            if (threadIdx.x == 0) mbarrier_arrive_expect(full, F::X_AT + (gathered ? 0 : F::PANELS * F::X_BYTES)); // boxes count in full
#pragma unroll
            for (uint32_t panel = 0; panel < F::PANELS; panel++) {
                const uint32_t k = first_k + panel * DEPTH, w = stage + panel * F::PRODUCTS * W_BYTES, x = stage + F::X_AT + panel * F::X_BYTES;
                if (threadIdx.x == 0) {
                    tma_load_3d_once(w, p.w, F::NN ? col : k, F::NN ? k : col, tile.expert, full);
                    if (F::GLU) tma_load_3d_once(w + W_BYTES, p.v, k, col, tile.expert, full);
                    if (!gathered) tma_load_2d(x, p.x_map, k, tile.row, full); // other experts' rows, too: they are not stored
                }
                if (gathered) rows.copy(p, x, k);
            }
            if (gathered) cp_async_arrive(full);
            ring.advance();
        }
    }
    if (gathered) cp_async_wait_all(); // no copy arrives after its thread has left
}

// All of k for one tile.
template <typename F>
__device__ __forceinline__ void multiply(const TiledProductParams& p, uint32_t shared, typename F::Stages& ring, float (&sum)[F::PRODUCTS][F::TOKENS / 2]) {
    bool accumulate = false;
    for (uint32_t k = 0; k < p.k; k += F::PANELS * DEPTH) {
        const uint32_t stage = shared + ring.stage * F::STAGE_BYTES;
        ring.wait_full();
        if (p.row_to_slot) fence_proxy_async();
#pragma unroll
        for (int i = 0; i < F::PRODUCTS; i++) pin(sum[i]);
        wgmma_fence();
#pragma unroll
        for (uint32_t step = 0; step < F::PANELS * DEPTH / 16; step++) {
            const uint32_t panel = step / (DEPTH / 16), within = step % (DEPTH / 16);
            const uint32_t x = k_major(stage + F::X_AT + panel * F::X_BYTES) + within * K_MAJOR_STEP;
#pragma unroll
            for (int i = 0; i < F::PRODUCTS; i++) {
                const uint32_t at = stage + (panel * F::PRODUCTS + i) * W_BYTES;
                const uint32_t w = F::NN ? mn_major(at, DEPTH) + within * MN_MAJOR_STEP : k_major(at) + within * K_MAJOR_STEP;
                wgmma<typename F::T, F::NN, false>(sum[i], w, x, accumulate);
            }
            accumulate = true;
        }
        wgmma_commit();
#pragma unroll
        for (int i = 0; i < F::PRODUCTS; i++) pin(sum[i]);
        wgmma_wait<0>();
        ring.release();
        ring.advance();
    }
#pragma unroll
    for (int i = 0; i < F::PRODUCTS; i++) pin(sum[i]);
}

// With biases, or another activation. The sums move down by four after each four that are stored, so that the code for them stands here once.
template <typename F>
__device__ __forceinline__ void store_general(const TiledProductParams& p, const ExpertTile& tile, float (&sum)[F::PRODUCTS][F::TOKENS / 2]) {
    using T = typename F::T;
    const uint32_t lane = threadIdx.x % 32, first_col = tile.col * COLS + 16 * (threadIdx.x / 32 % 4) + lane / 4;
    float          bias[2][2] = {}; // of two columns
    for (int i = 0; i < 2; i++) {
        const uint32_t col = first_col + 8 * i;
        if (col >= p.n) continue;
        bias[0][i] = bias_of<T>(p.epilogue.first_bias, tile.expert, col);
        if (F::GLU) bias[1][i] = bias_of<T>(p.epilogue.second_bias, tile.expert, col);
    }
#pragma unroll 1
    for (uint32_t first_row = tile.row + lane % 4 * 2; first_row < tile.row + F::TOKENS; first_row += 8) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t col = first_col + i / 2 * 8, row = first_row + i % 2;
            const float    first = sum[0][i] + bias[0][i / 2], second = F::GLU ? sum[F::PRODUCTS - 1][i] + bias[1][i / 2] : 0.0f;
            const float    value = finished<Fast, F::GLU>(p.epilogue, first, second);
            if (row < tile.end && col < p.n) static_cast<typename F::O*>(p.y)[row * p.y_stride + col] = from_f32<typename F::O>(value);
        }
#pragma unroll
        for (int product = 0; product < F::PRODUCTS; product++)
#pragma unroll
            for (int i = 0; i + 4 < F::TOKENS / 2; i++) sum[product][i] = sum[product][i + 4];
    }
}

// Warpgroup 1. An accumulator's row is a column of y, its column a row of y.
template <typename F> __device__ __forceinline__ void consume(const TiledProductParams& p, uint32_t shared, typename F::Stages ring) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    ExpertTiles tiles = tiles_of(p, F::TOKENS);
    ExpertTile  tile;
    for (uint32_t index = blockIdx.x; tiles.find(index, tile); index += gridDim.x) {
        // The first product of a tile overwrites these zeros. Without them ptxas 12.4 serialises every wgmma (C7515).
        float sum[F::PRODUCTS][F::TOKENS / 2] = {};
        multiply<F>(p, shared, ring, sum);
        if (p.epilogue.is_general) {
            store_general<F>(p, tile, sum);
            continue;
        }
#pragma unroll
        for (int i = 0; i < F::TOKENS / 2; i++) {
            const uint32_t col = tile.col * COLS + 16 * warp + lane / 4 + i / 2 % 2 * 8, row = tile.row + i / 4 * 8 + lane % 4 * 2 + i % 2;
            const float value = F::GLU ? silu<Fast>(sum[0][i]) * sum[F::PRODUCTS - 1][i] : sum[0][i];
            if (row < tile.end && col < p.n) static_cast<typename F::O*>(p.y)[row * p.y_stride + col] = from_f32<typename F::O>(value);
        }
    }
}

template <typename F> __device__ __forceinline__ void product(const TiledProductParams& p) {
    extern __shared__ __align__(1024) unsigned char dynamic[];
    const uint32_t           shared = shared_address(dynamic);
    const typename F::Stages ring{shared + F::BARRIERS_AT};
    if (threadIdx.x == 0) {
        ring.init(p.row_to_slot ? 1 + WARPGROUP : 1, WARPGROUP / 32);
        fence_mbarrier_init();
    }
    await_previous_launch();
    __syncthreads();
    if (__shfl_sync(~0u, threadIdx.x / WARPGROUP, 0) == 0) produce<F>(p, shared, ring);
    else consume<F>(p, shared, ring);
}

// By the rows of a tile.
#define ENTRY(NAME, T, O, NN, GLU, TOKENS)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) grouped_gemm_##NAME##_few##TOKENS(const __grid_constant__ TiledProductParams p) { \
        product<Form<T, O, NN, GLU, TOKENS>>(p);                                                                                          \
    }
#define ENTRIES(NAME, T, O, NN, GLU) \
    ENTRY(NAME, T, O, NN, GLU, 8)    \
    ENTRY(NAME, T, O, NN, GLU, 32)   \
    ENTRY(NAME, T, O, NN, GLU, 64)
ENTRIES(nt_bf16, bf16, bf16, false, false)
ENTRIES(nt_f16, f16, f16, false, false)
ENTRIES(nt_bf16_to_f32, bf16, float, false, false)
ENTRIES(nt_f16_to_f32, f16, float, false, false)
ENTRIES(nn_bf16, bf16, bf16, true, false)
ENTRIES(nn_f16, f16, f16, true, false)
ENTRIES(nn_bf16_to_f32, bf16, float, true, false)
ENTRIES(nn_f16_to_f32, f16, float, true, false)
ENTRIES(glu_nt_bf16, bf16, bf16, false, true)
ENTRIES(glu_nt_f16, f16, f16, false, true)
