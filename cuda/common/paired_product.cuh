// What the products of many rows share: the tiles that a pair of blocks takes, weights loaded for both of its
// blocks, and results on their way out. cuda/grouped_gemm.cu multiplies 16-bit operands,
// cuda/grouped_gemm_fp8.cu e4m3.
#pragma once
#include "activation.cuh"
#include "pair_tiles.cuh"
#include "ring.cuh"
#include "tensor_tile.cuh"
#include "ptx/tma.cuh"

enum : int { CLUSTER = TILED_CLUSTER, STAGES = 4 };
// A stage: rows of 128 bytes, as many as a tile has rows and columns.
enum : int { X_BYTES = ROWS * PITCH, W_BYTES = TILED_COLS * PITCH, STAGE_BYTES = X_BYTES + W_BYTES };
using Stages = Ring<STAGES, CLUSTER>;
// Slots for the counts of tiles. The loader is at most STAGES + 1 tiles ahead of the consumers, so a slot is
// read before it is used again.
enum : uint32_t { NUMBERS = 8, NUMBERS_BYTES = 12 * NUMBERS }; // a barrier for each, then the numbers
static_assert(NUMBERS > STAGES + 1, "a count would be overwritten before it is read");

// T is the type of biases that are not f32, O that of outputs. A warp stages 16 rows of results in shared
// memory, OUT_COLS columns at a time; the pitch of 16 bytes more avoids bank conflicts. COLS are output
// columns of a tile.
template <typename T_, typename O_, bool NN_, bool GLU_, int OUT_COLS_> struct Form {
    using T = T_;
    using O = O_;
    enum : bool { NN = NN_, GLU = GLU_ };
    enum : int { OUT_COLS = OUT_COLS_, OUT_PITCH = 2 * OUT_COLS + 16, OUT_BYTES = 16 * OUT_PITCH };
    enum : int { COLS = GLU ? TILED_COLS / 2 : TILED_COLS };
};

// The tiles of a block, and how a pair comes by them. The first is numbered as the pair. Each further one is
// the next that no pair has taken: the thread that loads weights in block 0 counts it in global memory and
// sends the count to both blocks. So pairs that are done early take more. With BY_WARP lane 0 reads for the
// warp. The same lane later releases the tile's stages to block 0, whose loader sends the counts, or fills
// what they are released after: so no count is overwritten before it was read.
template <typename F, bool BY_WARP> struct Tiles {
    const TiledProductParams& p;
    PairTiles<F::COLS>        tiles;
    const uint32_t            slots, rank, pairs; // slots: NUMBERS_BYTES of shared memory
    uint32_t                  turn = 0, number;   // of the next tile that is read; and the last one that was

    __device__ __forceinline__ Tiles(const TiledProductParams& p, uint32_t slots)
        : p(p), tiles(p), slots(slots), rank(cluster_rank()), pairs(gridDim.x / CLUSTER),
          number(blockIdx.x / CLUSTER) {}

    // By one thread; a fence and a barrier must follow.
    static __device__ __forceinline__ void init(uint32_t slots) {
        for (uint32_t i = 0; i < NUMBERS; i++) mbarrier_init(slots + 8 * i, 1);
    }

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

    // By the loading thread of each block, once per tile: `count` at its start, `send` once the atomic has
    // had time to return. The count is sent as it came, and readers add to it: a sum made here would wait for
    // memory before the tile's first load. So would atomicAdd, since ptxas joins the additions of a warp and
    // shuffles the result. No launch has 2^31 tiles.
    __device__ __forceinline__ uint32_t count() const { return rank == 0 ? atomicInc(p.taken, 1u << 31) : 0; }
    __device__ __forceinline__ void send(uint32_t counted) const {
        mbarrier_arrive_expect(barrier(), sizeof counted);
        if (rank != 0) return;
        for (uint32_t to = 0; to < CLUSTER; to++) store_async_remote(place(), counted, barrier(), to);
    }
    // By the same thread, after the last tile. There are as many counts as tiles, so the pair that holds the
    // last number is the last to count: it sets the counter to zero.
    __device__ __forceinline__ void finish() const {
        if (rank == 0 && number + 1 == pairs + tiles.first) atomicExch(p.taken, 0);
    }

private:
    __device__ __forceinline__ uint32_t slot() const { return (turn - 1) % NUMBERS; }
    __device__ __forceinline__ uint32_t barrier() const { return slots + 8 * slot(); }
    __device__ __forceinline__ uint32_t place() const { return slots + 8 * NUMBERS + 4 * slot(); }
};

// The 256 rows of the operand, in boxes. For glu_nt 128 are of w and 128 of v, and paired blocks load
// alternate boxes for both; of one product each loads its half. Blocks that are not paired load all of their
// own.
template <typename F>
__device__ __forceinline__ void load_weights(const TiledProductParams& p, uint32_t to, uint32_t k,
                                             const PairTile& tile, uint32_t rank, uint32_t full) {
    enum : uint32_t { COLS = TILED_COLS / CLUSTER };
    enum : uint32_t { BOX = F::NN ? 64 : F::GLU ? COLS / 2 : COLS, BOXES = COLS / BOX };
#pragma unroll
    for (uint32_t i = 0; i < CLUSTER * BOXES; i++) {
        const uint32_t   at = to + i * BOX * PITCH, col = tile.col + i * BOX % F::COLS;
        const TensorMap& w = F::GLU && i * BOX >= F::COLS ? p.v : p.w;
        const uint32_t   x = F::NN ? col : k, y = F::NN ? k : col;
        const bool       mine = F::GLU ? i % CLUSTER == rank : i / BOXES == rank;
        if (!tile.is_paired) tma_load_3d(at, w, x, y, tile.expert, full);
        else if (mine) tma_load_3d_multicast(at, w, x, y, tile.expert, full, (1 << CLUSTER) - 1);
    }
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

// Stores OUT_COLS columns of a warp's 16 rows, but at most `rows` and `cols` of them. Staging lets
// neighbouring threads write a whole row. `to` and all rows begin on 16 bytes, and `cols` is a multiple of 8.
// Nothing waits for the stores: the next tile's products run meanwhile.
template <typename F>
__device__ __forceinline__ void store_wide_rows(typename F::O* to, int64_t stride, int rows, int cols,
                                                uint32_t slab, const float* sum) {
    using T = typename F::O;
    enum : int { LANES = F::OUT_COLS / 8, EACH = 32 / LANES }; // of a row; rows at a time
    const int      lane = threadIdx.x % 32, row = lane / LANES, col = lane % LANES * 8;
    const uint32_t into = slab + lane % 16 * F::OUT_PITCH + lane / 16 * 16;
    const uint32_t from = slab + row * F::OUT_PITCH + col * 2;
#pragma unroll
    for (int i = 0; i < F::OUT_COLS / 16; i++) {
        const float* s = sum + 8 * i;
        const uint32_t low[] = {pack<T>(s[0], s[1]), pack<T>(s[2], s[3])};
        const uint32_t high[] = {pack<T>(s[4], s[5]), pack<T>(s[6], s[7])};
        stmatrix_x4(into + 32 * i, low[0], low[1], high[0], high[1]);
    }
    __syncwarp();
    const int left = col < cols ? rows - row : 0;
    to += row * stride + col;
#pragma unroll
    for (int i = 0; i < 16; i += EACH, to += EACH * stride) {
        const uint4 values = load_shared_16(from + i * F::OUT_PITCH);
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
    const uint4 packed = {pack<T>(values[0], values[1]), pack<T>(values[2], values[3]),
                          pack<T>(values[4], values[5]), pack<T>(values[6], values[7])};
    store_global_16(to, packed);
}

// Factors of sums, by product, expert and column, for `store_general`; where there are none:
struct Unscaled {
    __device__ __forceinline__ float of(int, uint32_t, uint32_t) const { return 1.0f; }
};

// Stores a warp's 16 rows with factors, biases, or another activation. Sums go through the warp's slab as
// f32, OUT_COLS / 2 columns at a time (for glu half as many of each product), so that the code for one of
// them stands here once and not for each register.
template <typename F, typename Factors>
__device__ __forceinline__ void store_general(const TiledProductParams& p, const Factors& factors,
                                              uint32_t slab, const PairTile& tile, uint32_t row,
                                              const float (&sum)[TILED_COLS / 2]) {
    using T = typename F::T;
    enum : int { STEP = F::GLU ? F::OUT_COLS / 4 : F::OUT_COLS / 2, STEPS = F::COLS / STEP };
    enum : int { GROUPS = F::OUT_COLS / 16 };
    enum : int { LANES = STEP / 8, EACH = 32 / LANES }; // of a row; rows at a time
    const uint32_t lane = threadIdx.x % 32, skip = lane % LANES * 8;
    const uint32_t into = slab + lane / 4 * F::OUT_PITCH + lane % 4 * 8;
    const uint32_t rows = min(16u, tile.end > row ? tile.end - row : 0u);
#pragma unroll 1
    for (int step = 0; step < STEPS; step++) {
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            if (i != step) continue; // registers have no index
#pragma unroll
            for (int j = 0; j < GROUPS; j++) {
                const bool   second = F::GLU && j >= GROUPS / 2;
                const float* s = sum + STEP / 2 * i + (second ? F::COLS / 2 + 4 * (j - GROUPS / 2) : 4 * j);
                store_shared_8(into + 32 * j, s[0], s[1]);
                store_shared_8(into + 32 * j + 8 * F::OUT_PITCH, s[2], s[3]);
            }
        }
        __syncwarp();
        const uint32_t col = tile.col + step * STEP + skip;
        if (col < p.n) {
            float first_bias[8], second_bias[8], first_factor[8], second_factor[8];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                first_factor[j] = factors.of(0, tile.expert, col + j);
                second_factor[j] = F::GLU ? factors.of(1, tile.expert, col + j) : 0.0f;
                first_bias[j] = bias_of<T>(p.epilogue.first_bias, tile.expert, col + j);
                second_bias[j] = F::GLU ? bias_of<T>(p.epilogue.second_bias, tile.expert, col + j) : 0.0f;
            }
#pragma unroll 1
            for (uint32_t r = lane / LANES; r < rows; r += EACH) {
                const uint32_t from = slab + r * F::OUT_PITCH + skip * 4;
                float          values[8];
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    const float first = load_shared_float(from + 4 * j) * first_factor[j] + first_bias[j];
                    const float of_second = F::GLU ? load_shared_float(from + 4 * (STEP + j)) : 0.0f;
                    const float second = F::GLU ? of_second * second_factor[j] + second_bias[j] : 0.0f;
                    values[j] = finished<Fast, F::GLU>(p.epilogue, first, second);
                }
                store_eight(static_cast<typename F::O*>(p.y) + (row + r) * p.y_stride + col, values);
            }
        }
        __syncwarp(); // before the next columns overwrite these
    }
}

// What a warp has of a tile, `row` being its first: finished and stored. For glu the first half of the sums
// is of the gate, the second of the up.
template <typename F, typename Factors>
__device__ __forceinline__ void store_tile(const TiledProductParams& p, const Factors& factors, uint32_t slab,
                                           const PairTile& tile, uint32_t row, float (&sum)[TILED_COLS / 2]) {
    if (p.epilogue.is_general) {
        store_general<F>(p, factors, slab, tile, row, sum);
        return;
    }
    if (F::GLU)
#pragma unroll
        for (int i = 0; i < F::COLS / 2; i++) sum[i] = silu<Fast>(sum[i]) * sum[F::COLS / 2 + i];
    constexpr bool IS_F32 = sizeof(typename F::O) == 4;
    const int      rows = int(tile.end - row);
#pragma unroll
    for (uint32_t i = 0; i < F::COLS; i += IS_F32 ? 64 : int(F::OUT_COLS)) {
        const uint32_t       col = tile.col + i;
        typename F::O* const y = static_cast<typename F::O*>(p.y) + row * p.y_stride + col;
        if constexpr (IS_F32) store_floats(y, p.y_stride, rows, int(p.n - col), sum + i / 2);
        else store_wide_rows<F>(y, p.y_stride, rows, int(p.n - col), slab, sum + i / 2);
    }
}
