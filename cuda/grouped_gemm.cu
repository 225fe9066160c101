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
#include "common/activation.cuh"
#include "common/dtype.cuh"
#include "common/gathered_rows.cuh"
#include "common/pair_tiles.cuh"
#include "common/ring.cuh"
#include "common/tensor_tile.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/tma.cuh"

enum : int { CLUSTER = TILED_CLUSTER, STAGES = 4 };
enum : int { X_BYTES = ROWS * PITCH, W_BYTES = TILED_COLS * PITCH, STAGE_BYTES = X_BYTES + W_BYTES };
// A warp stages 16 rows of results in shared memory, OUT_COLS columns at a time. The pitch of 16 bytes more avoids bank conflicts.
enum : int { OUT_COLS = 128, OUT_PITCH = 2 * OUT_COLS + 16, OUT_BYTES = 16 * OUT_PITCH };
// Slots for the counts of tiles. The loader is at most STAGES + 1 tiles ahead of the consumers, so a slot is read before it is used again.
enum : uint32_t { NUMBERS = 8 };
static_assert(NUMBERS > STAGES + 1, "a count would be overwritten before it is read");
enum : int {
    OUT_AT = STAGES * STAGE_BYTES,
    BARRIERS_AT = OUT_AT + 4 * CONSUMERS * OUT_BYTES,
    NUMBERS_AT = BARRIERS_AT + Ring<STAGES, CLUSTER>::BYTES, // a barrier for each, then the numbers
    SHARED_BYTES = NUMBERS_AT + 12 * NUMBERS
};
static_assert(SHARED_BYTES <= TILED_SHARED_BYTES, "params.h");
using Stages = Ring<STAGES, CLUSTER>;

// COLS are output columns of a tile.
template <typename T_, typename O_, bool NN_, bool GLU_> struct Form {
    using T = T_;
    using O = O_;
    enum : bool { NN = NN_, GLU = GLU_ };
    enum : int { COLS = GLU ? TILED_COLS / 2 : TILED_COLS };
};

// Of a tile.
__device__ __forceinline__ uint32_t stages_of(const TiledProductParams& p) { return (uint32_t(p.k) + DEPTH - 1) / DEPTH; }

// The tiles of a block, and how a pair comes by them. The first is numbered as the pair. Each further one is the next that no pair has taken:
// the thread that loads weights in block 0 counts it in global memory and sends the count to both blocks. So pairs that are done early take
// more. With BY_WARP lane 0 reads for the warp. The same lane later releases the tile's stages to block 0, whose loader sends the counts: so no
// count is overwritten before it was read.
template <typename F, bool BY_WARP> struct Tiles {
    const TiledProductParams& p;
    PairTiles<F::COLS>        tiles;
    const uint32_t            shared, rank, pairs;
    uint32_t                  turn = 0, number; // of the next tile that is read; and the last one that was

    __device__ __forceinline__ Tiles(const TiledProductParams& p, uint32_t shared)
        : p(p), tiles(p), shared(shared), rank(cluster_rank()), pairs(gridDim.x / CLUSTER), number(blockIdx.x / CLUSTER) {}

    // The next tile of this block. Part or all of it may lie beyond the expert's last row or the last column.
    __device__ __forceinline__ bool next(PairTile& tile) {
        if (turn > 0) {
            while (!mbarrier_try_wait(barrier(), (turn - 1) / NUMBERS % 2)) {}
            if (!BY_WARP || threadIdx.x % 32 == 0) number = pairs + load_shared_4(place());
            if (BY_WARP) number = __shfl_sync(~0u, number, 0);
        }
        turn++;
        return tiles.find(number, rank, tile);
    }

    // By the loading thread of each block, once per tile: `count` at its start, `send` once the atomic has had time to return. The count is sent
    // as it came, and readers add to it: a sum made here would wait for memory before the tile's first load. So would atomicAdd, since ptxas
    // joins the additions of a warp and shuffles the result. No launch has 2^31 tiles.
    __device__ __forceinline__ uint32_t count() const { return rank == 0 ? atomicInc(p.taken, 1u << 31) : 0; }
    __device__ __forceinline__ void send(uint32_t counted) const {
        mbarrier_arrive_expect(barrier(), sizeof counted);
        if (rank != 0) return;
        for (uint32_t to = 0; to < CLUSTER; to++) store_async_remote(place(), counted, barrier(), to);
    }
    // By the same thread, behind the last tile. There are as many counts as tiles, so the pair that holds the last number is the last to count:
    // it sets the counter to zero.
    __device__ __forceinline__ void finish() const {
        if (rank == 0 && number + 1 == pairs + tiles.first) atomicExch(p.taken, 0);
    }

private:
    __device__ __forceinline__ uint32_t slot() const { return (turn - 1) % NUMBERS; }
    __device__ __forceinline__ uint32_t barrier() const { return shared + NUMBERS_AT + 8 * slot(); }
    __device__ __forceinline__ uint32_t place() const { return shared + NUMBERS_AT + 8 * NUMBERS + 4 * slot(); }
};

// The 256 rows of the operand, in boxes. For glu_nt 128 are of w and 128 of v, and paired blocks load alternate boxes for both; of one product
// each loads its half. Blocks that are not paired load all of their own.
template <typename F>
__device__ __forceinline__ void load_weights(const TiledProductParams& p, uint32_t to, uint32_t k, const PairTile& tile, uint32_t rank, uint32_t full) {
    enum : uint32_t { COLS = TILED_COLS / CLUSTER, BOX = F::NN ? 64 : F::GLU ? COLS / 2 : COLS, BOXES = COLS / BOX };
#pragma unroll
    for (uint32_t i = 0; i < CLUSTER * BOXES; i++) {
        const uint32_t at = to + i * BOX * PITCH, col = tile.col + i * BOX % F::COLS;
        const TensorMap& w = F::GLU && i * BOX >= F::COLS ? p.v : p.w;
        const uint32_t   x = F::NN ? col : k, y = F::NN ? k : col;
        const bool mine = F::GLU ? i % CLUSTER == rank : i / BOXES == rank;
        if (!tile.is_paired) tma_load_3d(at, w, x, y, tile.expert, full);
        else if (mine) tma_load_3d_multicast(at, w, x, y, tile.expert, full, (1 << CLUSTER) - 1);
    }
}

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
    Tiles<F, false> tiles(p, shared);
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
    if (gathered) cp_async_wait_all(); // nobody leaves with copies and their arrivals on the way
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

// Releases the stages of a tile in which this consumer has no rows or columns.
__device__ __forceinline__ void skip(uint32_t stages, Stages& ring) {
    for (uint32_t left = stages; left > 0; left--) {
        ring.wait_full();
        __syncwarp(); // lanes release for their warp
        ring.release();
        ring.advance();
    }
}

// Stores OUT_COLS columns of a warp's 16 rows, but at most `rows` and `cols` of them. Staging lets 16 threads write 256 bytes of one row. `to` and
// all rows begin on 16 bytes, and `cols` is a multiple of 8. Nothing waits for the stores: the next tile's products run meanwhile.
template <typename T>
__device__ __forceinline__ void store_wide_rows(T* to, int64_t stride, int rows, int cols, uint32_t slab, const float* sum) {
    enum : int { LANES = OUT_COLS / 8, EACH = 32 / LANES }; // of a row; rows at a time
    const int      lane = threadIdx.x % 32, row = lane / LANES, col = lane % LANES * 8;
    const uint32_t into = slab + lane % 16 * OUT_PITCH + lane / 16 * 16, from = slab + row * OUT_PITCH + col * 2;
#pragma unroll
    for (int i = 0; i < OUT_COLS / 16; i++) {
        const float* s = sum + 8 * i;
        stmatrix_x4(into + 32 * i, pack<T>(s[0], s[1]), pack<T>(s[2], s[3]), pack<T>(s[4], s[5]), pack<T>(s[6], s[7]));
    }
    __syncwarp();
    const int left = col < cols ? rows - row : 0;
    to += row * stride + col;
#pragma unroll
    for (int i = 0; i < 16; i += EACH, to += EACH * stride) {
        const uint4 values = load_shared_16(from + i * OUT_PITCH);
        if (i < left) store_global_16(to, values);
    }
    __syncwarp(); // before the next columns overwrite these
}

// Eight results on 16 bytes.
__device__ __forceinline__ void store_eight(float* to, const float (&values)[8]) {
    *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
    *reinterpret_cast<float4*>(to + 4) = make_float4(values[4], values[5], values[6], values[7]);
}
template <typename T> __device__ __forceinline__ void store_eight(T* to, const float (&values)[8]) {
    const uint4 packed = {pack<T>(values[0], values[1]), pack<T>(values[2], values[3]), pack<T>(values[4], values[5]), pack<T>(values[6], values[7])};
    store_global_16(to, packed);
}

// Stores a warp's 16 rows with biases, or another activation. Sums go through the warp's slab as f32, 64 columns at a time (for glu 32 of each
// product), so that the code for one of them stands here once and not for each register.
template <typename F>
__device__ __forceinline__ void store_general(const TiledProductParams& p, uint32_t slab, const PairTile& tile, uint32_t row, const float (&sum)[TILED_COLS / 2]) {
    using T = typename F::T;
    enum : int { STEP = F::GLU ? 32 : 64, STEPS = F::COLS / STEP, SLAB_PITCH = 64 * 4 + 16 };
    enum : int { LANES = STEP / 8, EACH = 32 / LANES }; // of a row; rows at a time
    static_assert(16 * SLAB_PITCH <= OUT_BYTES, "rows of f32 beyond the slab");
    const uint32_t lane = threadIdx.x % 32, into = slab + lane / 4 * SLAB_PITCH + lane % 4 * 8, skip = lane % LANES * 8;
    const uint32_t rows = min(16u, tile.end > row ? tile.end - row : 0u);
#pragma unroll 1
    for (int step = 0; step < STEPS; step++) {
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            if (i != step) continue; // registers have no index
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float* s = sum + (F::GLU && j >= 4 ? F::COLS / 2 + STEP / 2 * i + 4 * (j - 4) : STEP / 2 * i + 4 * j);
                store_shared_8(into + 32 * j, s[0], s[1]);
                store_shared_8(into + 32 * j + 8 * SLAB_PITCH, s[2], s[3]);
            }
        }
        __syncwarp();
        const uint32_t col = tile.col + step * STEP + skip;
        if (col < p.n) {
            float first_bias[8], second_bias[8];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                first_bias[j] = bias_of<T>(p.epilogue.first_bias, tile.expert, col + j);
                second_bias[j] = F::GLU ? bias_of<T>(p.epilogue.second_bias, tile.expert, col + j) : 0.0f;
            }
#pragma unroll 1
            for (uint32_t r = lane / LANES; r < rows; r += EACH) {
                const uint32_t from = slab + r * SLAB_PITCH + skip * 4;
                float          values[8];
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const float first = load_shared_float(from + 4 * j) + first_bias[j];
                    const float second = F::GLU ? load_shared_float(from + 4 * (STEP + j)) + second_bias[j] : 0.0f;
                    values[j] = finished<Fast, F::GLU>(p.epilogue, first, second);
                }
                store_eight(static_cast<typename F::O*>(p.y) + (row + r) * p.y_stride + col, values);
            }
        }
        __syncwarp(); // before the next columns overwrite these
    }
}

// Warpgroups 1 and 2.
template <typename F> __device__ __forceinline__ void consume(const TiledProductParams& p, uint32_t shared, Stages ring) {
    const uint32_t warp = consumer_warp(), down = warp / 4 * HALF;
    const uint32_t a = k_major(shared + down * PITCH), b = F::NN ? mn_major(shared + X_BYTES, DEPTH) : k_major(shared + X_BYTES);
    const uint32_t stages = stages_of(p);
    Tiles<F, true> tiles(p, shared);
    for (PairTile tile; tiles.next(tile);) {
        if (tile.row + down >= tile.end || tile.col >= p.n) {
            skip(stages, ring);
            continue;
        }
        // The first product of a tile overwrites these zeros. Without them ptxas 12.4 serialises every wgmma (C7515).
        float sum[TILED_COLS / 2] = {};
        if (p.row_to_slot) multiply<F, true>(stages, a, b, ring, sum);
        else multiply<F, false>(stages, a, b, ring, sum);
        if (p.epilogue.is_general) {
            store_general<F>(p, shared + OUT_AT + warp * OUT_BYTES, tile, tile.row + warp * 16, sum);
            continue;
        }
        if (F::GLU)
#pragma unroll
            for (int i = 0; i < F::COLS / 2; i++) sum[i] = silu<Fast>(sum[i]) * sum[F::COLS / 2 + i];
        const uint32_t row = tile.row + warp * 16;
        const int      rows = int(tile.end - row);
        constexpr int  STEP = sizeof(typename F::O) == 2 ? OUT_COLS : 64;
#pragma unroll
        for (uint32_t i = 0; i < F::COLS; i += STEP) {
            const uint32_t       col = tile.col + i;
            typename F::O* const y = static_cast<typename F::O*>(p.y) + row * p.y_stride + col;
            if constexpr (sizeof(typename F::O) == 2) store_wide_rows(y, p.y_stride, rows, int(p.n - col), shared + OUT_AT + warp * OUT_BYTES, sum + i / 2);
            else store_floats(y, p.y_stride, rows, int(p.n - col), sum + i / 2);
        }
    }
}

template <typename F> __device__ __forceinline__ void product(const TiledProductParams& p) {
    extern __shared__ __align__(1024) unsigned char dynamic[];
    const uint32_t shared = shared_address(dynamic);
    const Stages   ring{shared + BARRIERS_AT};
    if (threadIdx.x == 0) {
        ring.init(p.row_to_slot ? 1 + WARPGROUP : 1, CONSUMERS * WARPGROUP / 32 * CLUSTER);
        for (uint32_t i = 0; i < NUMBERS; i++) mbarrier_init(shared + NUMBERS_AT + 8 * i, 1);
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
        product<Form<T, O, NN, GLU>>(p);                                                                                       \
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
