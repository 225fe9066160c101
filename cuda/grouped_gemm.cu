// grouped_gemm on the tensor cores: y[r, :] = x[input(r), :] * w[expert of r], w as [N, K] (nt) or [K, N] (nn); glu_nt: silu(x w^T) * (x v^T)
//
// Contract  src/ops/grouped_gemm/cuda/tiled.rs takes this form for bf16 and f16 where K and N are multiples of 8 and rows begin on 16 bytes; other
//           shapes go to grouped_gemm_plain.cu. Offsets and maps come from a Routing, or from a caller who vouches for them.
// Work      a block per SM takes tile after tile: 128 rows of one expert x 256 columns, or 128 columns of two products at once (glu_nt).
//           Warpgroup 0 loads stages of 64 of k: weights by TMA, rows by TMA or, where they are gathered, by cp.async, one row to eight threads.
//           Warpgroups 1 and 2 multiply 64 rows each. In the `x2` forms two blocks take adjacent row tiles and share the weights they load.
// Cost      2 * R * N * K FLOP (twice that for glu_nt) on the tensor cores. Per tile and stage x moves 16 KB and the weights 32 KB from the L2
//           cache (half of that in the `x2` forms); from memory, each band of 16 row tiles of an expert reads its weights once.
// Order     one chain of f32 additions per element over ascending k, 16 at a time, rounded once, without a split: a row's bits depend on
//           that row and the weights alone.
#include "common/activation.cuh"
#include "common/dtype.cuh"
#include "common/expert_tiles.cuh"
#include "common/gathered_rows.cuh"
#include "common/ring.cuh"
#include "common/tensor_tile.cuh"
#include "common/ptx/tma.cuh"

// A row of the tile table of src/ops/grouped_gemm/cuda/tiled.rs. COLS are output columns.
template <typename T_, typename O_, bool NN_, bool GLU_, int COLS_, int STAGES_, int CLUSTER_> struct Form {
    using T = T_;
    using O = O_;
    enum : bool { NN = NN_, GLU = GLU_ };
    enum : int { COLS = COLS_, PRODUCTS = GLU ? 2 : 1, STAGES = STAGES_, CLUSTER = CLUSTER_ };
    enum : int { X_BYTES = ROWS * PITCH, W_BYTES = COLS * PITCH, STAGE_BYTES = X_BYTES + PRODUCTS * W_BYTES };
    enum : int { SLABS_AT = STAGES * STAGE_BYTES, BARRIERS_AT = SLABS_AT + SLABS * SLAB_BYTES, SHARED_BYTES = BARRIERS_AT + Ring<STAGES, CLUSTER_>::BYTES };
    using Stages = Ring<STAGES, CLUSTER>;
    static_assert(PRODUCTS * COLS == TILED_COLS && SHARED_BYTES <= TILED_SHARED_BYTES, "params.h");
};

// The tiles of one cluster, by turns.
template <typename F> struct Walk {
    ExpertTiles tiles;
    uint32_t    index, rank;

    __device__ __forceinline__ Walk(const TiledProductParams& p)
        : tiles(p.offsets, p.rows, p.num_experts, F::CLUSTER * ROWS, uint32_t((p.n + F::COLS - 1) / F::COLS)), index(blockIdx.x / F::CLUSTER),
          rank(F::CLUSTER > 1 ? cluster_rank() : 0) {}

    // The next tile of this block. Its rows may lie behind the expert's last.
    __device__ __forceinline__ bool next(ExpertTile& tile) {
        if (!tiles.find(index, tile)) return false;
        tile.row += rank * ROWS;
        tile.col *= F::COLS;
        index += gridDim.x / F::CLUSTER;
        return true;
    }
};

// The weights of one stage: each block of the cluster loads its share, and all receive it.
template <typename F> __device__ __forceinline__ void load_weights(const TensorMap& w, uint32_t to, uint32_t k, const ExpertTile& tile, uint32_t rank, uint32_t full) {
    enum : uint32_t { BOX = F::NN ? 64 : F::COLS / F::CLUSTER, BOXES = F::COLS / F::CLUSTER / BOX, BOX_BYTES = BOX * PITCH };
#pragma unroll
    for (uint32_t i = 0; i < BOXES; i++) {
        const uint32_t at = to + (rank * BOXES + i) * BOX_BYTES, col = tile.col + (rank * BOXES + i) * BOX;
        const uint32_t x = F::NN ? col : k, y = F::NN ? k : col;
        if (F::CLUSTER > 1) tma_load_3d_multicast(at, w, x, y, tile.expert, full, (1 << F::CLUSTER) - 1);
        else tma_load_3d(at, w, x, y, tile.expert, full);
    }
}

// Warpgroup 0. Where rows are not gathered, one thread does it all.
template <typename F> __device__ __forceinline__ void produce(const TiledProductParams& p, uint32_t shared, typename F::Stages ring) {
    const bool gathered = p.row_to_slot;
    if (!gathered && threadIdx.x != 0) return;
    if (threadIdx.x == 0) {
        if (!gathered) prefetch_tensor_map(p.x_map);
        prefetch_tensor_map(p.w);
        if (F::GLU) prefetch_tensor_map(p.v);
    }
    Walk<F> walk(p);
    for (ExpertTile tile; walk.next(tile);) {
        GatheredRows<typename F::T, ROWS> rows;
        if (gathered) rows.find(p, tile);
        for (uint32_t k = 0; k < p.k; k += DEPTH) {
            const uint32_t x = shared + ring.stage * F::STAGE_BYTES, w = x + F::X_BYTES;
            ring.wait_empty();
            if (threadIdx.x == 0) {
                mbarrier_arrive_expect(ring.full(), F::PRODUCTS * F::W_BYTES + (gathered ? 0 : F::X_BYTES)); // boxes count in full
                load_weights<F>(p.w, w, k, tile, walk.rank, ring.full());
                if (F::GLU) load_weights<F>(p.v, w + F::W_BYTES, k, tile, walk.rank, ring.full());
                if (!gathered) tma_load_2d(x, p.x_map, k, tile.row, ring.full()); // other experts' rows, too: they are not stored
            }
            if (gathered) {
                rows.copy(p, x, k);
                cp_async_arrive(ring.full());
            }
            ring.advance();
        }
    }
    if (gathered) cp_async_wait_all(); // nobody leaves with copies and their arrivals on the way
}

// One consumer's products over all of k. The batch of a stage is in flight while the next stage is awaited.
template <typename F>
__device__ __forceinline__ void multiply(const TiledProductParams& p, uint32_t shared, typename F::Stages& ring, float (&sum)[F::PRODUCTS][F::COLS / 2]) {
    const uint32_t consumer = threadIdx.x / WARPGROUP - 1;
    for (uint32_t k = 0; k < p.k; k += DEPTH) {
        const uint32_t stage = shared + ring.stage * F::STAGE_BYTES;
        ring.wait_full();
        if (p.row_to_slot) fence_proxy_async();
        multiply_stage<typename F::T, false, F::NN, F::W_BYTES>(sum, stage + consumer * HALF * PITCH, stage + F::X_BYTES, k > 0);
        wgmma_wait<1>();
        if (k > 0) ring.release_previous();
        ring.advance();
    }
    wgmma_wait<0>();
    pin_all(sum);
    ring.release_previous();
}

// Hands back the stages of a tile of which this consumer has no row.
template <typename F> __device__ __forceinline__ void skip(const TiledProductParams& p, typename F::Stages& ring) {
    for (uint32_t k = 0; k < p.k; k += DEPTH) {
        ring.wait_full();
        ring.advance();
        ring.release_previous();
    }
}

// Warpgroups 1 and 2.
template <typename F> __device__ __forceinline__ void consume(const TiledProductParams& p, uint32_t shared, typename F::Stages ring) {
    const uint32_t warp = consumer_warp();
    Walk<F> walk(p);
    for (ExpertTile tile; walk.next(tile);) {
        const uint32_t row = tile.row + warp * 16;
        if (tile.row + warp / 4 * HALF >= tile.end) {
            skip<F>(p, ring);
            continue;
        }
        // The first product of a tile overwrites these zeros. Without them ptxas 12.4 serialises every wgmma (C7515).
        float sum[F::PRODUCTS][F::COLS / 2] = {};
        multiply<F>(p, shared, ring, sum);
        if (F::GLU)
#pragma unroll
            for (int i = 0; i < F::COLS / 2; i++) sum[0][i] = silu(sum[0][i]) * sum[F::PRODUCTS - 1][i];
        const int rows = int(tile.end - row);
#pragma unroll
        for (uint32_t i = 0; i < F::COLS; i += 64) {
            const uint32_t       col = tile.col + i;
            typename F::O* const y = static_cast<typename F::O*>(p.y) + row * p.y_stride + col;
            if constexpr (sizeof(typename F::O) == 2) store_rows(y, p.y_stride, rows, int(p.n - col), shared + F::SLABS_AT + warp * SLAB_BYTES, sum[0] + i / 2);
            else store_floats(y, p.y_stride, rows, int(p.n - col), sum[0] + i / 2);
        }
    }
}

template <typename F> __device__ __forceinline__ void product(const TiledProductParams& p) {
    extern __shared__ __align__(1024) unsigned char dynamic[];
    const uint32_t            shared = shared_address(dynamic);
    const typename F::Stages  ring{shared + F::BARRIERS_AT};
    if (threadIdx.x == 0) {
        ring.init(p.row_to_slot ? 1 + WARPGROUP : 1, CONSUMERS * WARPGROUP / 32 * F::CLUSTER);
        fence_mbarrier_init();
    }
    if (F::CLUSTER > 1) cluster_sync();
    else __syncthreads();
    if (is_producer()) {
        registers_dec<PRODUCER_REGISTERS>();
        produce<F>(p, shared, ring);
    } else {
        registers_inc<CONSUMER_REGISTERS>();
        consume<F>(p, shared, ring);
    }
    __syncwarp();
    if (F::CLUSTER > 1) cluster_sync(); // others still arrive at this block's barriers
}

// By columns of all products; `x2`: two blocks share their weights.
#define ENTRY(NAME, T, O, NN, GLU, COLS, STAGES, CLUSTER)                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) grouped_gemm_##NAME(const __grid_constant__ TiledProductParams p) { \
        product<Form<T, O, NN, GLU, COLS, STAGES, CLUSTER>>(p);                                                                  \
    }
#define ENTRIES(NAME, T, O, NN, GLU, COLS)        \
    ENTRY(NAME##_256, T, O, NN, GLU, COLS, 4, 1) \
    ENTRY(NAME##_256x2, T, O, NN, GLU, COLS, 4, 2)
ENTRIES(nt_bf16, bf16, bf16, false, false, 256)
ENTRIES(nt_f16, f16, f16, false, false, 256)
ENTRIES(nt_bf16_to_f32, bf16, float, false, false, 256)
ENTRIES(nt_f16_to_f32, f16, float, false, false, 256)
ENTRIES(nn_bf16, bf16, bf16, true, false, 256)
ENTRIES(nn_f16, f16, f16, true, false, 256)
ENTRIES(nn_bf16_to_f32, bf16, float, true, false, 256)
ENTRIES(nn_f16_to_f32, f16, float, true, false, 256)
ENTRIES(glu_nt_bf16, bf16, bf16, false, true, 128)
ENTRIES(glu_nt_f16, f16, f16, false, true, 128)
