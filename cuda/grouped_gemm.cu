// grouped_gemm on the tensor cores: y[r, :] = x[input(r), :] * w[expert of r], w as [N, K] (nt) or [K, N] (nn); glu_nt: silu(x w^T) * (x v^T)
//
// Contract  src/ops/grouped_gemm/cuda/tiled.rs takes this form for bf16 and f16 where K and N are multiples of 8 and rows begin on 16 bytes; other
//           shapes go to grouped_gemm_plain.cu. Offsets and maps come from a Routing, or from a caller who vouches for them.
// Work      a block per SM; two blocks are a pair, which takes tile after tile, always the next that no pair has taken. A block's tile is 128
//           rows of one expert by 256 columns; for glu_nt by 128 columns of each product, whose weights lie side by side as one operand of
//           256. The two tiles of a pair have the same columns, and each block loads half of the weights for both; or, where few rows are
//           left of an expert, the same rows, and each block loads its own weights (common/pair_tiles.cuh).
//           Warpgroup 0 loads stages of 64 of k: weights by TMA, rows by TMA or, where they are gathered, by cp.async, one row to eight
//           threads. Warpgroups 1 and 2 multiply 64 rows each, and store.
// Cost      2 * R * N * K FLOP (twice that for glu_nt) on the tensor cores. Per tile and stage x moves 16 KB and the weights 16 KB (32 KB where
//           rows are shared) from the L2 cache; from memory, each band of 16 pairs of an expert reads its weights once.
// Order     one chain of f32 additions per element over ascending k, 16 at a time, rounded once, without a split: a row's bits depend on
//           that row and the weights alone, and not on which block took its tile.
#include "common/dtype.cuh"
#include "common/gathered_rows.cuh"
#include "common/paired_product.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/tma.cuh"

enum : int { OUT_COLS = 128 };
template <typename T, typename O, bool NN, bool GLU> using Product = Form<T, O, NN, GLU, OUT_COLS>;
enum : int {
    OUT_AT = STAGES * STAGE_BYTES,
    OUT_BYTES = Form<bf16, bf16, false, false, OUT_COLS>::OUT_BYTES,
    BARRIERS_AT = OUT_AT + 4 * CONSUMERS * OUT_BYTES,
    NUMBERS_AT = BARRIERS_AT + Stages::BYTES,
    SHARED_BYTES = NUMBERS_AT + NUMBERS_BYTES
};
static_assert(SHARED_BYTES <= TILED_SHARED_BYTES, "params.h");

// Of a tile.
__device__ __forceinline__ uint32_t stages_of(const TiledProductParams& p) { return (uint32_t(p.k) + DEPTH - 1) / DEPTH; }

// Warpgroup 0. Where rows are not gathered, one thread does it all.
template <typename F> __device__ __forceinline__ void produce(const TiledProductParams& p, uint32_t shared, Stages ring) {
    const bool gathered = p.row_to_slot, is_loader = threadIdx.x == 0;
    if (!gathered && !is_loader) return;
    if (is_loader) {
        if (!gathered) prefetch_tensor_map(p.x_map);
        prefetch_tensor_map(p.w);
        if (F::GLU) prefetch_tensor_map(p.v);
    }
    const uint32_t stages = stages_of(p);
    Tiles<F, false> tiles(p, shared + NUMBERS_AT);
    for (PairTile tile; tiles.next(tile);) {
        GatheredRows<typename F::T, ROWS> rows;
        if (gathered) rows.find(p, tile.row, tile.end);
        const uint32_t counted = is_loader ? tiles.count() : 0;
        for (uint32_t i = 0; i < stages; i++) {
            const uint32_t x = shared + ring.stage * STAGE_BYTES, w = x + X_BYTES, k = i * DEPTH;
            ring.wait_empty();
            if (is_loader) {
                mbarrier_arrive_expect(ring.full(), W_BYTES + (gathered ? 0 : X_BYTES)); // boxes count in full
                load_weights<F>(p, w, k, tile, tiles.rank, ring.full());
                if (!gathered) tma_load_2d(x, p.x_map, k, tile.row, ring.full()); // other experts' rows, too: they are not stored
                // Late enough for the count to be there, early enough for nobody to wait.
                if (i == min(uint32_t(STAGES), stages - 1)) tiles.send(counted);
            }
            if (gathered) {
                rows.copy(p, x, k);
                cp_async_arrive(ring.full());
            }
            ring.advance();
        }
    }
    if (is_loader) tiles.finish();
    if (gathered) cp_async_wait_all(); // no copy arrives after its thread has left
}

// One consumer's products over all of k. It waits for each stage's products and releases the stage at once, so that more stages are on their
// way; meanwhile the other consumer's products run.
template <typename F, bool GATHERED>
__device__ __forceinline__ void multiply(uint32_t stages, uint32_t a, uint32_t b, Stages& ring, float (&sum)[TILED_COLS / 2]) {
    bool accumulate = false;
    for (uint32_t left = stages; left > 0; left--) {
        const uint32_t stage = ring.stage * (STAGE_BYTES >> 4);
        ring.wait_full();
        if (GATHERED) fence_proxy_async();
        multiply_stage<typename F::T, false, F::NN>(sum, a + stage, b + stage, accumulate);
        wgmma_wait<0>();
        ring.release();
        ring.advance();
        accumulate = true;
    }
    pin(sum);
}

// Warpgroups 1 and 2.
template <typename F> __device__ __forceinline__ void consume(const TiledProductParams& p, uint32_t shared, Stages ring) {
    const uint32_t warp = consumer_warp(), down = warp / 4 * HALF;
    const uint32_t a = k_major(shared + down * PITCH), b = F::NN ? mn_major(shared + X_BYTES, DEPTH) : k_major(shared + X_BYTES);
    const uint32_t stages = stages_of(p);
    Tiles<F, true> tiles(p, shared + NUMBERS_AT);
    for (PairTile tile; tiles.next(tile);) {
        if (tile.row + down >= tile.end || tile.col >= p.n) {
            skip(stages, ring);
            continue;
        }
        // The first product of a tile overwrites these zeros. Without them ptxas 12.4 serialises every wgmma (C7515).
        float sum[TILED_COLS / 2] = {};
        if (p.row_to_slot) multiply<F, true>(stages, a, b, ring, sum);
        else multiply<F, false>(stages, a, b, ring, sum);
        store_tile<F>(p, Unscaled(), shared + OUT_AT + warp * OUT_BYTES, tile, tile.row + warp * 16, sum);
    }
}

template <typename F> __device__ __forceinline__ void product(const TiledProductParams& p) {
    extern __shared__ __align__(1024) unsigned char dynamic[];
    const uint32_t shared = shared_address(dynamic);
    const Stages   ring{shared + BARRIERS_AT};
    if (threadIdx.x == 0) {
        ring.init(p.row_to_slot ? 1 + WARPGROUP : 1, CONSUMERS * WARPGROUP / 32 * CLUSTER);
        Tiles<F, true>::init(shared + NUMBERS_AT);
        fence_mbarrier_init();
    }
    await_previous_launch();
    cluster_sync();
    if (is_producer()) {
        registers_dec<PRODUCER_REGISTERS>();
        produce<F>(p, shared, ring);
    } else {
        registers_inc<CONSUMER_REGISTERS>();
        consume<F>(p, shared, ring);
    }
    __syncwarp();
    cluster_sync(); // others still arrive at this block's barriers
}

#define ENTRY(NAME, T, O, NN, GLU)                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) grouped_gemm_##NAME##_256x2(const __grid_constant__ TiledProductParams p) { \
        product<Product<T, O, NN, GLU>>(p);                                                                                       \
    }
ENTRY(nt_bf16, bf16, bf16, false, false)
ENTRY(nt_f16, f16, f16, false, false)
ENTRY(nt_bf16_to_f32, bf16, float, false, false)
ENTRY(nt_f16_to_f32, f16, float, false, false)
ENTRY(nn_bf16, bf16, bf16, true, false)
ENTRY(nn_f16, f16, f16, true, false)
ENTRY(nn_bf16_to_f32, bf16, float, true, false)
ENTRY(nn_f16_to_f32, f16, float, true, false)
ENTRY(glu_nt_bf16, bf16, bf16, false, true)
ENTRY(glu_nt_f16, f16, f16, false, true)
