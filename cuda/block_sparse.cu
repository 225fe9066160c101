// block_sparse on the tensor cores: sdd y[block n] = (a * b) where block n lies; dsd y = s * d; dds as dsd of the transposed matrices
//
// Contract  src/ops/block_sparse/cuda/tiled.rs takes this form for bf16 and f16 where TMA reads the operands and y takes 16-byte stores; other
//           calls go to block_sparse_plain.cu. The index comes from a Topology.
// Work      a block per SM takes tile after tile: one block row (or column) x 256 columns, which for sdd are those of 2 blocks of 128 or 4 of 64, from
//           anywhere in the row. One warp of warpgroup 0 loads stages of 64 of k by TMA, boxes of 64 x 64; warpgroups 1 and 2 multiply: 64 rows
//           each of a block of 128, 128 columns each of a block of 64. What of k lies beyond a block's last row or column is cleared.
// Cost      sdd 2 * blocks * block^2 * K FLOP, dsd 2 * blocks * block^2 * N on the tensor cores. Per tile and stage 48 KB (40 KB for blocks of 64)
//           come from the L2 cache; from memory, each band of 16 block rows reads its columns once.
// Order     one chain of f32 additions per element over ascending k, 16 at a time, rounded once, without a split: an element's bits depend
//           on its row and its column alone, and not on where the blocks are stored.
#include "common/dtype.cuh"
#include "common/ring.cuh"
#include "common/tensor_tile.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/tma.cuh"

enum : int { COLS = TILED_COLS, BOX = 64, BOX_BYTES = BOX * PITCH, STAGES = 4 };
enum : uint32_t { BAND = 16 };                // places whose tiles take turns, so that they share columns in the L2 cache
enum : uint32_t { DEPTH_BITS = 255, LAST = 256 }; // of a note: how deep a stage is, and that it is the last of its tile
using Stages = Ring<STAGES, 1>;

// MN says of an operand that it lies with k outermost. B_BOXES are the columns of a tile.
template <typename T_, bool A_MN_, bool B_MN_, int BLOCK_> struct Form {
    using T = T_;
    enum : bool { A_MN = A_MN_, B_MN = B_MN_ };
    enum : int { BLOCK = BLOCK_, A_BOXES = BLOCK / BOX, B_BOXES = COLS / BOX, STAGE_BYTES = (A_BOXES + B_BOXES) * BOX_BYTES };
    enum : int { ACROSS = CONSUMERS / A_BOXES, BOXES = B_BOXES / ACROSS }; // consumers beside each other; the columns of one
    enum : int { SLABS_AT = STAGES * STAGE_BYTES, BARRIERS_AT = SLABS_AT + SLABS * SLAB_BYTES, NOTES_AT = BARRIERS_AT + Stages::BYTES };
    static_assert(NOTES_AT + 4 * STAGES <= BLOCK_TILED_SHARED_BYTES, "params.h");
};

// The rows of a place of the axis, some of its blocks, and some columns.
struct Tile {
    uint32_t begin, end; // blocks, in the order of the axis: for sdd those to write, else those to sum over
    uint32_t row, rows;
    uint32_t col; // dsd
};

// The tiles of one thread block, by turns. 32 bits: a result with more tiles would not fit any memory.
template <typename F> struct Walk {
    enum : uint32_t { EACH = COLS / F::BLOCK }; // blocks of a tile of sdd
    uint32_t index = blockIdx.x, first = 0;          // the next tile, and the first of the band
    uint32_t place = 0, places = 0, groups = 0;      // the band, and the most tiles that one of its places has

    __device__ __forceinline__ bool next(const BlockProductParams& p, Tile& tile) {
        for (;;) {
            if (index - first >= places * groups) {
                first += places * groups;
                place += places;
                if (place >= p.axis.places) return false;
                places = min(BAND, uint32_t(p.axis.places) - place);
                groups = p.is_sdd ? most_groups(p.axis.offsets + place) : uint32_t((p.n + COLS - 1) / COLS);
                continue;
            }
            const uint32_t i = place + (index - first) % places, group = (index - first) / places;
            index += gridDim.x;
            tile.begin = p.axis.offsets[i];
            tile.end = p.axis.offsets[i + 1];
            tile.row = p.axis.starts[i];
            tile.rows = p.axis.starts[i + 1] - tile.row;
            tile.col = group * COLS;
            if (p.is_sdd) {
                tile.begin = min(tile.begin + group * EACH, tile.end);
                tile.end = min(tile.begin + EACH, tile.end);
                if (tile.begin < tile.end) return true;
            } else if (tile.rows > 0) return true;
        }
    }
    __device__ __forceinline__ uint32_t most_groups(const uint32_t* offsets) const {
        uint32_t most = 0;
        for (uint32_t i = 0; i < places; i++) most = max(most, offsets[i + 1] - offsets[i]);
        return (most + EACH - 1) / EACH;
    }
};

// Warp 0. Lane 0 loads; for dsd all lanes find blocks, 32 at once, since each takes three reads that wait for one another.
template <typename F> struct Producer {
    const BlockProductParams& p;
    const uint32_t            shared;
    Stages                    ring;

    template <bool MN> __device__ __forceinline__ void load_box(const TensorMap& map, uint32_t to, uint32_t mn, uint32_t k) const {
        tma_load_2d(to, map, MN ? mn : k, MN ? k : mn, ring.full());
    }
    // a from (a_mn, a_k) on, 64 columns of b from each of (b_mn, b_k) on.
    __device__ __forceinline__ void load_stage(uint32_t a_mn, uint32_t a_k, const uint32_t (&b_mn)[F::B_BOXES], uint32_t b_k, uint32_t note) {
        const uint32_t stage = shared + ring.stage * F::STAGE_BYTES;
        if (threadIdx.x == 0) {
            ring.wait_empty();
            store_shared_4(shared + F::NOTES_AT + 4 * ring.stage, note);
            mbarrier_arrive_expect(ring.full(), F::STAGE_BYTES); // boxes count in full
#pragma unroll
            for (uint32_t i = 0; i < F::A_BOXES; i++) load_box<F::A_MN>(p.a, stage + i * BOX_BYTES, a_mn + i * BOX, a_k);
#pragma unroll
            for (uint32_t i = 0; i < F::B_BOXES; i++) load_box<F::B_MN>(p.b, stage + (F::A_BOXES + i) * BOX_BYTES, b_mn[i], b_k);
        }
        ring.advance();
    }
    // Rows and columns of other blocks, too, where this one has fewer: what becomes of them is not stored. k ends where the matrices end.
    __device__ __forceinline__ void load_dense(const Tile& tile) {
        uint32_t cols[F::B_BOXES];
#pragma unroll
        for (uint32_t i = 0; i < F::B_BOXES; i++) {
            const uint32_t n = min(tile.begin + i / F::A_BOXES, tile.end - 1); // again where there are no more
            cols[i] = p.axis.other_starts[p.axis.other_ids[n]] + i % F::A_BOXES * BOX;
        }
        for (uint32_t k = 0; k < p.k; k += DEPTH) load_stage(tile.row, k, cols, k, DEPTH | (k + DEPTH >= p.k ? LAST : 0));
    }
    __device__ __forceinline__ void load_sparse(const Tile& tile) {
        uint32_t cols[F::B_BOXES];
#pragma unroll
        for (uint32_t i = 0; i < F::B_BOXES; i++) cols[i] = tile.col + i * BOX;
        for (uint32_t first = tile.begin; first < tile.end; first += 32) {
            const uint32_t at = min(first + threadIdx.x, tile.end - 1), stored = p.axis.order ? p.axis.order[at] : at;
            const uint32_t other = p.axis.other_ids[stored], start = p.axis.other_starts[other], extent = p.axis.other_starts[other + 1] - start;
            for (uint32_t i = 0; i < min(32u, tile.end - first); i++) {
                const uint32_t row = __shfl_sync(~0u, stored, i) * F::BLOCK, first_k = __shfl_sync(~0u, start, i), depth = __shfl_sync(~0u, extent, i);
                for (uint32_t k = 0; k < depth; k += DEPTH) {
                    const bool last = first + i + 1 == tile.end && k + DEPTH >= depth;
                    load_stage(F::A_MN ? 0 : row, F::A_MN ? row + k : k, cols, first_k + k, min(depth - k, uint32_t(DEPTH)) | (last ? LAST : 0));
                }
            }
        }
    }
    __device__ __forceinline__ void run() {
        if (threadIdx.x >= 32) return;
        if (threadIdx.x == 0) {
            prefetch_tensor_map(p.a);
            prefetch_tensor_map(p.b);
        }
        Walk<F> walk;
        for (Tile tile; walk.next(p, tile);) {
            if (p.is_sdd) load_dense(tile);
            else load_sparse(tile);
        }
    }
};

// f32 elements through shared memory, 32 columns at a time: a row or, where y is turned, a column in one piece.
__device__ __forceinline__ void store_floats_by(float* to, int64_t stride, bool turned, int rows, int cols, uint32_t slab, const float* sum) {
    const int     lane = threadIdx.x % 32, first_r = turned ? lane % 16 : 0, first_c = turned ? lane / 16 : lane;
    const int64_t step = turned ? 2 * stride : stride;
#pragma unroll
    for (int first = 0; first < BOX; first += 32) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int r = lane / 4 + i % 2 * 8, c = i / 2 * 8 + lane % 4 * 2;
            store_shared_8(slab + r * PITCH + (c ^ r % 8 * 4) * 4, sum[first / 2 + 2 * i], sum[first / 2 + 2 * i + 1]);
        }
        __syncwarp();
        float* y = to + (turned ? first_r + (first + first_c) * stride : first + first_c);
#pragma unroll 4
        for (int i = 0; i < 16; i++, y += step) {
            const int r = turned ? first_r : i, c = turned ? first_c + 2 * i : first_c;
            if (r < rows && first + c < cols) *y = load_shared_float(slab + r * PITCH + (c ^ r % 8 * 4) * 4);
        }
        __syncwarp(); // before the next columns overwrite these
    }
}

// Clears boxes from k = `depth` on, so that what lies there adds nothing, not even a NaN. All consumers take part.
template <bool MN> __device__ __forceinline__ void clear(uint32_t boxes, uint32_t count, uint32_t depth) {
    const uint32_t thread = threadIdx.x - WARPGROUP;
    if (MN) { // a row of each box for each k
        const uint32_t rest = (DEPTH - depth) * 8; // 16-byte pieces
        for (uint32_t i = thread; i < count * rest; i += CONSUMERS * WARPGROUP) clear_shared_16(boxes + i / rest * BOX_BYTES + depth * PITCH + i % rest * 16);
    } else {
        for (uint32_t row = thread; row < count * BOX; row += CONSUMERS * WARPGROUP)
            for (uint32_t k = depth; k < DEPTH; k++) clear_shared_2(boxes + row * PITCH + (k / 8 ^ row % 8) * 16 + k % 8 * 2);
    }
}

// Warpgroups 1 and 2.
template <typename F> struct Consumer {
    const BlockProductParams& p;
    const uint32_t            shared;
    Stages                    ring;
    const uint32_t            warp = consumer_warp();
    const uint32_t            down = warp / 4 / F::ACROSS * BOX, across = warp / 4 % F::ACROSS * F::BOXES * BOX; // its first row and column of a tile

    // Waits for the next stage, and gives its note.
    __device__ __forceinline__ uint32_t await() const {
        ring.wait_full();
        uint32_t note = 0;
        if (threadIdx.x % 32 == 0) note = load_shared_4(shared + F::NOTES_AT + 4 * ring.stage); // the lane that will hand the stage back
        return __shfl_sync(~0u, note, 0);
    }
    // Clears what the note says is not to be read. By all consumers.
    __device__ __forceinline__ void clear_rest(uint32_t note) const {
        const uint32_t depth = note & DEPTH_BITS, stage = shared + ring.stage * F::STAGE_BYTES;
        if (depth == DEPTH) return;
        clear<F::A_MN>(stage, F::A_BOXES, depth);
        clear<F::B_MN>(stage + F::A_BOXES * BOX_BYTES, F::B_BOXES, depth);
        fence_proxy_async();
        barrier_among<1, CONSUMERS * WARPGROUP>();
    }

    // All of k. The other consumer's products keep the tensor cores busy while this one waits for its own.
    __device__ __forceinline__ void multiply(float (&sum)[F::BOXES * BOX / 2]) {
        const uint32_t a_at = shared + down * PITCH, b_at = shared + F::A_BOXES * BOX_BYTES + across * PITCH;
        const uint32_t a = F::A_MN ? mn_major(a_at, DEPTH) : k_major(a_at), b = F::B_MN ? mn_major(b_at, DEPTH) : k_major(b_at);
        bool accumulate = false;
        const auto stage = [&] {
            const uint32_t at = ring.stage * (F::STAGE_BYTES >> 4);
            multiply_stage<typename F::T, F::A_MN, F::B_MN>(sum, a + at, b + at, accumulate);
            wgmma_wait<0>();
            ring.release();
            ring.advance();
            accumulate = true;
        };
        for (bool last = false; !last;) {
            uint32_t note = await();
            for (; note == DEPTH; note = await()) stage(); // full stages but the last, without the clearing
            clear_rest(note);
            stage();
            last = note & LAST;
        }
        pin(sum);
    }

    // Hands back the stages of a tile of which this consumer has nothing.
    __device__ __forceinline__ void skip() {
        for (bool last = false; !last;) {
            const uint32_t note = await();
            clear_rest(note);
            ring.release();
            ring.advance();
            last = note & LAST;
        }
    }

    // 64 columns of the warp's 16 rows, as far as there are that many.
    __device__ __forceinline__ void store(int64_t at, int rows, int cols, const float* sum) const {
        using T = typename F::T;
        const uint32_t slab = shared + F::SLABS_AT + warp * SLAB_BYTES;
        T* const       y = static_cast<T*>(p.y) + at;
        if (p.is_f32) store_floats_by(static_cast<float*>(p.y) + at, p.y_stride, p.is_turned, rows, cols, slab, sum);
        else if (p.is_turned) store_rows_turned(y, p.y_stride, rows, cols, slab, sum);
        else store_rows(y, p.y_stride, rows, cols, slab, sum);
    }
    // Zeros where a stored block goes on beyond its rows and columns.
    __device__ __forceinline__ void store_zeros(int64_t at, int rows, int cols) const {
        __syncwarp(); // others have just stored there
#pragma unroll 1
        for (int i = threadIdx.x % 32; i < 16 * BOX; i += 32) {
            const int64_t to = at + i / BOX * p.y_stride + i % BOX;
            if (i / BOX < rows && i % BOX < cols) continue;
            if (p.is_f32) static_cast<float*>(p.y)[to] = 0.0f;
            else static_cast<typename F::T*>(p.y)[to].bits = 0;
        }
    }
    // From 64 columns on; then the next ones.
    template <int FROM> __device__ __forceinline__ void store_from(const Tile& tile, const float* sum) const {
        const uint32_t row = down + warp % 4 * 16, col = across + FROM * BOX, n = tile.begin + col / F::BLOCK;
        const int64_t  y_row = p.is_sdd ? int64_t(n) * F::BLOCK + row : tile.row + row, y_col = p.is_sdd ? col % F::BLOCK : tile.col + col;
        const int64_t  at = p.is_turned ? y_col * p.y_stride + y_row : y_row * p.y_stride + y_col;
        const int      rows = int(tile.rows - row);
        if (!p.is_sdd || n < tile.end) store(at, p.is_sdd ? 16 : rows, p.is_sdd ? BOX : int(p.n - y_col), sum + FROM * BOX / 2);
        if (p.is_sdd && n < tile.end) {
            const uint32_t other = p.axis.other_ids[n];
            const int      cols = int(p.axis.other_starts[other + 1] - p.axis.other_starts[other] - col % F::BLOCK);
            if (rows < 16 || cols < BOX) store_zeros(at, rows, cols);
        }
        if constexpr (FROM + 1 < F::BOXES) store_from<FROM + 1>(tile, sum);
    }

    __device__ __forceinline__ void run() {
        Walk<F> walk;
        for (Tile tile; walk.next(p, tile);) {
            float sum[F::BOXES * BOX / 2] = {};
            const bool columns = p.is_sdd ? tile.begin + across / F::BLOCK < tile.end : tile.col + across < p.n;
            if (tile.begin == tile.end) {} // a place without blocks has zeros
            else if (down < tile.rows && columns) multiply(sum);
            else skip();
            store_from<0>(tile, sum);
        }
    }
};

template <typename F> __device__ __forceinline__ void product(const BlockProductParams& p) {
    extern __shared__ __align__(1024) unsigned char dynamic[];
    const uint32_t shared = shared_address(dynamic);
    const Stages   ring{shared + F::BARRIERS_AT};
    if (threadIdx.x == 0) {
        ring.init(1, CONSUMERS * WARPGROUP / 32);
        fence_mbarrier_init();
    }
    await_previous_launch();
    __syncthreads();
    if (is_producer()) {
        registers_dec<PRODUCER_REGISTERS>();
        Producer<F>{p, shared, ring}.run();
    } else {
        registers_inc<CONSUMER_REGISTERS>();
        Consumer<F>{p, shared, ring}.run();
    }
    __syncwarp();
}

// By a and b as they lie, n or t for transposed, and the block.
#define ENTRY(NAME, T, A_MN, B_MN, BLOCK)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) block_sparse_##NAME##_##T##_##BLOCK(const __grid_constant__ BlockProductParams p) { \
        product<Form<T, A_MN, B_MN, BLOCK>>(p);                                                                                            \
    }
#define ENTRIES(T, BLOCK)            \
    ENTRY(nn, T, false, true, BLOCK) \
    ENTRY(nt, T, false, false, BLOCK) \
    ENTRY(tn, T, true, true, BLOCK)  \
    ENTRY(tt, T, true, false, BLOCK)
ENTRIES(bf16, 64)
ENTRIES(bf16, 128)
ENTRIES(f16, 64)
ENTRIES(f16, 128)
