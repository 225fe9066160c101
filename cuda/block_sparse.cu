// block_sparse on the tensor cores: sdd y[block n] = a * b where block n lies, b as [K, N] (nn) or [N, K] (nt); dsd y = s * d, d likewise
//
// Contract  src/ops/block_sparse/cuda.rs takes this form for bf16 and f16 where a and s are not transposed, rows begin on 16 bytes, N of dsd is
//           a multiple of 8 and the blocks of its s stand for whole columns; everything else goes to block_sparse_plain.cu.
// Work      a block per SM takes tile after tile: a block row x 256 columns, which for sdd are those of 2 blocks of 128 or 4 of 64, wherever
//           they lie. One thread of warpgroup 0 loads stages of 64 of k by TMA. Warpgroups 1 and 2 multiply 64 rows x 256 columns each, or
//           with blocks of 64 the same 64 rows x 128 columns each.
// Cost      sdd 2 * blocks * block^2 * K FLOP, dsd 2 * blocks * block^2 * N, on the tensor cores. Block rows run fastest, in bands of 16, so
//           that neighbours, which share columns where rows are sorted by expert, find them in the L2 cache.
// Order     one chain of f32 additions per element over ascending k, 16 at a time, rounded once, without a split: a row's bits depend on that row,
//           on the places of its blocks and on the other operand alone.
#include "common/dtype.cuh"
#include "common/ring.cuh"
#include "common/ptx/tma.cuh"
#include "common/ptx/warp.cuh"
#include "common/ptx/wgmma.cuh"

enum : int { WARPGROUP = 128, CONSUMERS = 2, THREADS = TILED_THREADS, STAGES = 4 };
enum : int { PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 224 }; // of 168 each at launch
enum : int { HALF = 64, COLS = TILED_COLS, DEPTH = TILED_DEPTH }; // rows of a consumer, columns of a tile, k of a stage
enum : int { PITCH = 128, PANEL_BYTES = DEPTH * PITCH };          // of a row in shared memory; of 64 columns that lie by k
enum : int { W_BYTES = COLS * PITCH, SLAB_BYTES = 16 * PITCH };
using Stages = Ring<STAGES, 1>;
static_assert(THREADS == (1 + CONSUMERS) * WARPGROUP && PITCH == 2 * DEPTH, "params.h");

template <typename T_, bool DSD_, bool NN_, int BLOCK_> struct Form {
    using T = T_;
    enum : bool { DSD = DSD_, NN = NN_ };
    enum : int { BLOCK = BLOCK_, BLOCKS = COLS / BLOCK };             // of a tile of sdd
    enum : int { MINE = BLOCK == 2 * HALF ? COLS : COLS / CONSUMERS }; // columns of a consumer
    enum : int { X_BYTES = BLOCK * PITCH, STAGE_BYTES = X_BYTES + W_BYTES };
    enum : int { SLABS_AT = STAGES * STAGE_BYTES, BARRIERS_AT = SLABS_AT + 4 * CONSUMERS * SLAB_BYTES };
    static_assert(BARRIERS_AT + Stages::BYTES <= TILED_SHARED_BYTES, "params.h");
};

// A block row, and of its blocks (sdd) or of the result's columns (dsd) the `group`-th 256 columns.
struct Tile {
    uint32_t place, group;
    uint32_t row, num_rows;      // dense rows
    uint32_t first, last, steps; // the blocks that are stored (sdd) or summed over (dsd); stages of k
};

// The tiles of one block, by turns.
template <typename F> struct Walk {
    enum : uint32_t { BAND = 16 };
    uint64_t index = blockIdx.x;

    __device__ __forceinline__ bool next(const TiledBlockParams& p, Tile& tile) {
        const uint64_t places = p.rows.places, groups = p.groups;
        for (; index < places * groups; index += gridDim.x) {
            const uint64_t band = index / (BAND * groups), rest = index - band * BAND * groups;
            const uint32_t band_places = uint32_t(min(uint64_t(BAND), places - band * BAND));
            tile.place = uint32_t(band * BAND + rest % band_places);
            tile.group = uint32_t(rest / band_places);
            tile.row = p.rows.starts[tile.place];
            tile.num_rows = p.rows.starts[tile.place + 1] - tile.row;
            tile.first = p.rows.offsets[tile.place] + (F::DSD ? 0 : tile.group * F::BLOCKS);
            tile.last = p.rows.offsets[tile.place + 1];
            if (F::DSD ? tile.num_rows == 0 : tile.first >= tile.last) continue;
            tile.steps = F::DSD ? (tile.last - tile.first) * (F::BLOCK / DEPTH) : uint32_t((p.k + DEPTH - 1) / DEPTH);
            index += gridDim.x;
            return true;
        }
        return false;
    }
};

// COUNT columns from `col` on, at 64 of k from `k` on.
template <typename F, int COUNT> __device__ __forceinline__ void load_columns(const TiledBlockParams& p, uint32_t to, uint32_t col, uint32_t k, uint32_t full) {
    if constexpr (bool(F::NN)) {
#pragma unroll
        for (int i = 0; i < COUNT / 64; i++) tma_load_2d(to + i * PANEL_BYTES, p.right, col + 64 * i, k, full);
    } else {
        tma_load_2d(to, p.right, k, col, full);
    }
}

// One thread of warpgroup 0. Rows and columns behind those of a block come along: they are not stored.
template <typename F> __device__ __forceinline__ void produce(const TiledBlockParams& p, uint32_t shared, Stages ring) {
    if (threadIdx.x != 0) return;
    prefetch_tensor_map(p.left);
    prefetch_tensor_map(p.right);
    Walk<F> walk;
    for (Tile tile; walk.next(p, tile);) {
        uint32_t cols[F::BLOCKS];
#pragma unroll
        for (uint32_t i = 0; i < F::BLOCKS; i++) // behind the last block that one again
            if (!F::DSD) cols[i] = p.rows.other_starts[p.rows.other_ids[min(tile.first + i, tile.last - 1)]];
        for (uint32_t step = 0; step < tile.steps; step++) {
            const uint32_t x = shared + ring.stage * F::STAGE_BYTES, w = x + F::X_BYTES;
            ring.wait_empty();
            mbarrier_arrive_expect(ring.full(), F::STAGE_BYTES); // boxes count in full
            if (F::DSD) {
                const uint32_t n = tile.first + step / (F::BLOCK / DEPTH), k = step % (F::BLOCK / DEPTH) * DEPTH;
                tma_load_2d(x, p.left, k, n * F::BLOCK, ring.full());
                load_columns<F, COLS>(p, w, tile.group * COLS, p.rows.other_starts[p.rows.other_ids[n]] + k, ring.full());
            } else {
                tma_load_2d(x, p.left, step * DEPTH, tile.row, ring.full());
#pragma unroll
                for (int i = 0; i < F::BLOCKS; i++) load_columns<F, F::BLOCK>(p, w + i * F::BLOCK * PITCH, cols[i], step * DEPTH, ring.full());
            }
            ring.advance();
        }
    }
}

// A consumer's products over all of k. The batch of a stage is in flight while the next stage is awaited.
template <typename F> __device__ __forceinline__ void multiply(uint32_t steps, uint32_t shared, Stages& ring, float (&sum)[F::MINE / 2]) {
    const uint32_t consumer = threadIdx.x / WARPGROUP - 1;
    const uint32_t rows_at = F::BLOCK == 2 * HALF ? consumer * HALF * PITCH : 0, cols_at = F::X_BYTES + (F::MINE == COLS ? 0 : consumer * F::MINE * PITCH);
    bool           accumulate = false;
    for (uint32_t step = 0; step < steps; step++) {
        const uint32_t tile = shared + ring.stage * F::STAGE_BYTES;
        const uint64_t x = k_major(tile + rows_at), w = F::NN ? mn_major(tile + cols_at, DEPTH) : k_major(tile + cols_at);
        ring.wait_full();
        pin(sum);
        wgmma_fence();
#pragma unroll
        for (uint32_t i = 0; i < DEPTH / 16; i++) {
            wgmma<typename F::T, false, F::NN>(sum, x + i * K_MAJOR_STEP, w + i * (F::NN ? MN_MAJOR_STEP : K_MAJOR_STEP), accumulate);
            accumulate = true;
        }
        wgmma_commit();
        pin(sum);
        wgmma_wait<1>();
        if (step > 0) ring.release_previous();
        ring.advance();
    }
    wgmma_wait<0>();
    pin(sum);
    ring.release_previous();
}

// Hands back the stages of a tile of which this consumer has nothing.
__device__ __forceinline__ void skip(uint32_t steps, Stages& ring) {
    for (uint32_t step = 0; step < steps; step++) {
        ring.wait_full();
        ring.advance();
        ring.release_previous();
    }
}

// 64 columns of a warp's 16 rows leave through shared memory, so that eight threads write 128 bytes of a row. Of these `rows` and `cols`
// are real; the others are stored as zeros (sdd) or not at all (dsd).
template <typename F> __device__ __forceinline__ void store(typename F::T* y, int64_t stride, uint32_t slab, int rows, int cols, const float* sum) {
    using T = typename F::T;
    const uint32_t lane = threadIdx.x % 32, into = slab + lane % 16 * PITCH, chunk = lane / 16;
#pragma unroll
    for (int i = 0; i < 4; i++) { // 16 columns
        float s[8];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int row = lane / 4 + 8 * (j / 2 % 2), col = 16 * i + 8 * (j / 4) + 2 * (lane % 4) + j % 2;
            s[j] = F::DSD || (row < rows && col < cols) ? sum[8 * i + j] : 0.0f;
        }
        stmatrix_x4(into + ((2 * i + chunk) ^ lane % 8) * 16, pack<T>(s[0], s[1]), pack<T>(s[2], s[3]), pack<T>(s[4], s[5]), pack<T>(s[6], s[7]));
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int   r = 4 * i + lane / 8, c = lane % 8;
        const uint4 values = load_shared_16(slab + r * PITCH + (c ^ r % 8) * 16);
        if (!F::DSD || (r < rows && 8 * c < cols)) *reinterpret_cast<uint4*>(y + r * stride + 8 * c) = values;
    }
    __syncwarp(); // before the next columns overwrite these
}

// The same without sums.
template <typename F> __device__ __forceinline__ void store_zeros(typename F::T* y, int64_t stride, int rows, int cols) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int r = 4 * i + lane / 8, c = lane % 8;
        if (!F::DSD || (r < rows && 8 * c < cols)) *reinterpret_cast<uint4*>(y + r * stride + 8 * c) = make_uint4(0, 0, 0, 0);
    }
}

// Calls `put(y, rows, cols, i)` for each 64 columns of this warp's rows: where they go, how many are real, and which of its columns they are.
template <typename F, typename Put> __device__ __forceinline__ void each_columns(const TiledBlockParams& p, const Tile& tile, uint32_t warp, Put put) {
    using T = typename F::T;
    const uint32_t row = (F::BLOCK == 2 * HALF ? warp : warp % 4) * 16, first_col = F::MINE == COLS ? 0 : warp / 4 * F::MINE;
    const int      rows = int(tile.num_rows) - int(row);
    T* const       y = static_cast<T*>(p.y);
#pragma unroll
    for (int i = 0; i < F::MINE / 64; i++) {
        const uint32_t col = first_col + 64 * i;
        if (F::DSD) {
            const int64_t at = int64_t(tile.group) * COLS + col;
            if (at < p.n) put(y + (int64_t(tile.row) + row) * p.y_stride + at, rows, int(min(p.n - at, int64_t(64))), i);
        } else {
            const uint32_t n = tile.first + col / F::BLOCK, within = col % F::BLOCK;
            if (n >= tile.last) break;
            const uint32_t id = p.rows.other_ids[n], width = p.rows.other_starts[id + 1] - p.rows.other_starts[id];
            put(y + (int64_t(n) * F::BLOCK + row) * p.y_stride + within, rows, int(width) - int(within), i);
        }
    }
}

// Warpgroups 1 and 2.
template <typename F> __device__ __forceinline__ void consume(const TiledBlockParams& p, uint32_t shared, Stages ring) {
    const uint32_t warp = __shfl_sync(~0u, threadIdx.x / 32, 0) - WARPGROUP / 32; // uniform, and the compiler knows it
    const uint32_t slab = shared + F::SLABS_AT + warp * SLAB_BYTES;
    Walk<F>        walk;
    for (Tile tile; walk.next(p, tile);) {
        const bool no_rows = F::BLOCK == 2 * HALF && warp / 4 * HALF >= tile.num_rows;
        const bool no_cols = !F::DSD && F::MINE != COLS && tile.first + warp / 4 * F::MINE / F::BLOCK >= tile.last;
        if (no_rows || no_cols || tile.steps == 0) {
            skip(tile.steps, ring);
            each_columns<F>(p, tile, warp, [&](typename F::T* y, int rows, int cols, int) { store_zeros<F>(y, p.y_stride, rows, cols); });
            continue;
        }
        float sum[F::MINE / 2];
        multiply<F>(tile.steps, shared, ring, sum);
        each_columns<F>(p, tile, warp, [&](typename F::T* y, int rows, int cols, int i) { store<F>(y, p.y_stride, slab, rows, cols, sum + 32 * i); });
    }
}

template <typename F> __device__ __forceinline__ void product(const TiledBlockParams& p) {
    extern __shared__ __align__(1024) unsigned char dynamic[];
    const uint32_t            shared = shared_address(dynamic);
    const Stages              ring{shared + F::BARRIERS_AT};
    if (threadIdx.x == 0) {
        ring.init(1, CONSUMERS * WARPGROUP / 32);
        fence_mbarrier_init();
    }
    __syncthreads();
    if (__shfl_sync(~0u, threadIdx.x / WARPGROUP, 0) == 0) {
        registers_dec<PRODUCER_REGISTERS>();
        produce<F>(p, shared, ring);
    } else {
        registers_inc<CONSUMER_REGISTERS>();
        consume<F>(p, shared, ring);
    }
}

#define ENTRY(NAME, T, DSD, NN, BLOCK)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) block_sparse_##NAME##_##BLOCK(const __grid_constant__ TiledBlockParams p) { \
        product<Form<T, DSD, NN, BLOCK>>(p);                                                                                     \
    }
#define ENTRIES(NAME, T, DSD, NN) ENTRY(NAME, T, DSD, NN, 64) ENTRY(NAME, T, DSD, NN, 128)
ENTRIES(sdd_nt_bf16, bf16, false, false)
ENTRIES(sdd_nn_bf16, bf16, false, true)
ENTRIES(dsd_nt_bf16, bf16, true, false)
ENTRIES(dsd_nn_bf16, bf16, true, true)
ENTRIES(sdd_nt_f16, f16, false, false)
ENTRIES(sdd_nn_f16, f16, false, true)
ENTRIES(dsd_nt_f16, f16, true, false)
ENTRIES(dsd_nn_f16, f16, true, true)
