// attention on the tensor cores, many queries at a time: out[t, h, :] = softmax(cap(q[t, h, :] . keys *
// scale)) . values
//
// Contract  src/ops/attention/cuda/tiled.rs takes this form for bf16 and f16, heads of 64, 128 or 256, a
//           positive scale, pages of a multiple of 8 tokens (or one a sequence) and rows on 16 bytes; other
//           calls go to attention_plain.cu. Pages come from a KvCache, or from a caller who vouches for them.
// Work      a block per SM takes tile after tile, always the heaviest that no block has taken
//           (common/prefill_tiles.cuh). A tile is 64 rows for each consumer warpgroup (three for heads of 64
//           without a cap, else two), all of one sequence and KV head. A row is a token and a query head, so
//           that the group's heads share the keys and values that are loaded. Warp 0 loads blocks of keys and
//           values by TMA, boxes of up to a block from one page each. Warps 1 and 2 load the queries. Warp 3
//           finds the next tile once every warp has taken the current one. Each consumer multiplies its 64
//           rows.
// Loop      blocks of keys from the last to the first. A consumer issues the scores of one block and the
//           product of weights and values of the block before; the softmax of the former runs beside the
//           latter. Consumers take turns in issuing, so that the softmax of one runs beside the products of
//           another. Weights go from accumulators to the next product through registers.
// Cost      4 * d FLOP per row and key on the tensor cores, one ex2 per row and key; per tile 4 * d bytes per
//           key from the L2 cache.
// Order     f32; blocks of keys begin at multiples of their length, descending; weights are rounded to the
//           type, their sums are not. A row's bits depend on its own sequence up to its position alone.
// NaN       zero times NaN or infinity is NaN, so a product would spread such a value to rows that do not see
//           it. Slots that no token of the step sees are therefore cleared before they are multiplied. Rows
//           that still result in NaN are computed again by attend_row.
#include "common/activation.cuh"
#include "common/attention_entries.cuh"
#include "common/attention_row.cuh"
#include "common/prefill_tiles.cuh"
#include "common/ring.cuh"
#include "common/warpgroup.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/tma.cuh"
#include "common/ptx/warp.cuh"
#include "common/ptx/wgmma.cuh"

enum : int { HALF = 64 };          // rows of a consumer
enum : int { QUERY_WARPS = 2 };    // that load queries
enum : int { FIRST_TURN = 1 };     // the named barrier of the first consumer's turn
enum : uint32_t { NO_TILE = ~0u }; // instead of a sequence
enum : int { TILE_WORDS = 8 };

template <typename T_, int DIM_, bool CAPPED_> struct Form {
    using T = T_;
    enum : bool { CAPPED = CAPPED_ };
    enum : int { DIM = DIM_, PANELS = DIM / 64, KEYS = DIM == 256 ? 64 : 128, STAGES = DIM == 64 ? 8 : 4 };
    // Three consumers have 160 registers each. A cap needs more, and has two.
    enum : int {
        CONSUMERS = DIM == 64 && !CAPPED ? 3 : 2,
        ROWS = CONSUMERS * HALF,
        THREADS = (1 + CONSUMERS) * WARPGROUP
    };
    enum : int {
        PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 40,
        CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 232
    };
    // Panels are 64 columns wide. A warp's slab holds a panel of its 16 rows on their way out, or what
    // attend_row needs.
    enum : int { QUERY_PANEL = ROWS * PITCH, BLOCK_PANEL = KEYS * PITCH, BLOCK_BYTES = PANELS * BLOCK_PANEL };
    enum : int {
        ROW_BYTES = 8 * DIM + 32 * 12,
        SLAB_BYTES = ROW_BYTES > 16 * PITCH ? ROW_BYTES : 16 * PITCH
    };
    using Blocks = Ring<STAGES, 1>;
    using Once = Ring<1, 1>;
    enum : int {
        BLOCKS_AT = PANELS * QUERY_PANEL, // behind the queries
        SLABS_AT = BLOCKS_AT + STAGES * BLOCK_BYTES,
        TILE_AT = SLABS_AT + 4 * CONSUMERS * SLAB_BYTES,
        BARRIERS_AT = TILE_AT + TILE_WORDS * 4,
        BYTES = BARRIERS_AT + Blocks::BYTES + 2 * Once::BYTES + 8
    };
    static_assert(BYTES <= PREFILL_SHARED_BYTES && SLAB_BYTES % 16 == 0, "params.h");
    static_assert(ROWS == (CONSUMERS == 3 ? PREFILL_ROWS_64 : PREFILL_ROWS), "params.h");
    static_assert(THREADS == (CONSUMERS == 3 ? PREFILL_THREADS_64 : PREFILL_THREADS), "params.h");

    const TiledAttentionParams& p;
    uint32_t                    shared;
    Once                        queries, tiles;
    Blocks                      blocks; // of keys and of values, in the order of their use
    // A barrier for values of which some are cleared before consumers see them, and how often it was used.
    uint32_t landed, landings = 0;

    __device__ __forceinline__ Form(const TiledAttentionParams& p, uint32_t shared)
        : p(p), shared(shared), queries{shared + BARRIERS_AT}, tiles{queries.barriers + Once::BYTES},
          blocks{tiles.barriers + Once::BYTES}, landed(blocks.barriers + Blocks::BYTES) {}

    __device__ __forceinline__ void init() const {
        queries.init(QUERY_WARPS * 32, 4 * CONSUMERS);
        blocks.init(1, 4 * CONSUMERS);
        tiles.init(1, 1 + QUERY_WARPS + 4 * CONSUMERS);
        mbarrier_init(landed, 1);
    }

    // By the warp that finds tiles.
    __device__ __forceinline__ void hand_out(const PrefillTile& tile) {
        tiles.wait_empty();
        __syncwarp(); // lane 0 begins another phase
        if (lane() == 0) {
            const uint32_t words[] = {tile.sequence, tile.kv_head, tile.row,
                                      tile.rows,     tile.token,   tile.history};
#pragma unroll
            for (int i = 0; i < 6; i++) store_shared_4(shared + TILE_AT + 4 * i, words[i]);
            mbarrier_arrive(tiles.full());
        }
        tiles.advance();
    }
    // By every other warp. False behind the last tile.
    __device__ __forceinline__ bool take(PrefillTile& tile) {
        tiles.wait_full();
        const uint4 a = load_shared_16(shared + TILE_AT);
        tile = {
            a.x, a.y, a.z, a.w, load_shared_4(shared + TILE_AT + 16), load_shared_4(shared + TILE_AT + 20)};
        __syncwarp();
        tiles.release();
        tiles.advance();
        return tile.sequence != NO_TILE;
    }

    // No position is beyond 2^30.
    __device__ __forceinline__ int window() const { return int(min(p.attention.window, int64_t(1) << 30)); }
    __device__ __forceinline__ int oldest(int position) const { return max(0, position + 1 - window()); }
};

// The blocks of keys that a tile's rows see.
struct BlockRange {
    int first, last;
};
template <typename F> __device__ __forceinline__ BlockRange blocks_of(const F& f, const PrefillTile& tile) {
    const uint32_t group = uint32_t(f.p.attention.group), last_row = min(tile.row + F::ROWS, tile.rows) - 1;
    return {f.oldest(int(tile.history + tile.row / group)) / F::KEYS,
            int(tile.history + last_row / group) / F::KEYS};
}

// Zeros in some rows of a block. By a warp.
template <typename F> __device__ __forceinline__ void clear_rows(uint32_t block, int begin, int end) {
    for (int i = begin * 8 + lane(); i < end * 8; i += 32)
        for (int panel = 0; panel < F::PANELS; panel++)
            clear_shared_16(block + panel * F::BLOCK_PANEL + i * 16);
}

// Loads a block of keys or values. No token of the step sees positions before `from`, or from `to` on. A box
// that holds only such positions is not loaded, since its page may not exist. What is not loaded is cleared:
// of keys whole boxes, because other scores are hidden later; of values every such position.
template <typename F> __device__ __forceinline__ void load_block(F& f, const PrefillTile& tile,
                                                                 bool is_values, int block, int from,
                                                                 int to) {
    const PageParams& pages = f.p.attention.pages;
    const int         first = block * F::KEYS, box_keys = int(f.p.box_keys), box = int(lane()) * box_keys,
                      key = first + box;
    const bool        is_loaded = box < F::KEYS && key < to && key + box_keys > from,
                      is_edge = first < from || first + F::KEYS > to;
    const uint32_t    page_tokens = uint32_t(pages.page_tokens);
    const uint32_t    page =
        is_loaded ? pages.block_table[tile.sequence * pages.table_stride + uint32_t(key) / page_tokens] : 0;
    const uint32_t   boxes = __ballot_sync(FULL_WARP, is_loaded),
                     at = f.shared + F::BLOCKS_AT + f.blocks.stage * F::BLOCK_BYTES;
    const uint32_t   barrier = is_values && is_edge ? f.landed : f.blocks.full();
    const TensorMap& map = is_values ? f.p.value_map : f.p.key_map;
    f.blocks.wait_empty();
    if (!is_values && is_edge) {
        const int begin = __ffs(boxes) - 1;
        clear_rows<F>(at, 0, begin * box_keys);
        clear_rows<F>(at, (begin + __popc(boxes)) * box_keys, F::KEYS);
        fence_proxy_async();
        __syncwarp();
    }
    if (lane() == 0) mbarrier_arrive_expect(barrier, __popc(boxes) * box_keys * F::DIM * 2);
    __syncwarp();
    if (is_loaded)
#pragma unroll
        for (int panel = 0; panel < F::PANELS; panel++)
            tma_load_4d(at + panel * F::BLOCK_PANEL + box * PITCH, map, panel * 64,
                        uint32_t(key) % page_tokens, tile.kv_head, page, barrier);
    if (is_values && is_edge) {
        while (!mbarrier_try_wait(f.landed, f.landings % 2)) {}
        f.landings++;
        clear_rows<F>(at, 0, from - first);
        clear_rows<F>(at, max(0, to - first), F::KEYS);
        fence_proxy_async();
        __syncwarp();
        if (lane() == 0) mbarrier_arrive(f.blocks.full());
    }
    __syncwarp();
    f.blocks.advance();
}

// Warp 0.
template <typename F> __device__ __forceinline__ void load_blocks(F f) {
    for (PrefillTile tile; f.take(tile);) {
        const BlockRange blocks = blocks_of(f, tile);
        const int        from = f.oldest(int(tile.history)),
                         to = int(tile.history + tile.rows / uint32_t(f.p.attention.group));
        for (int block = blocks.last; block >= blocks.first - 1;
             block--) // its keys, and the values of the one before
#pragma unroll 1
            for (int ahead = 0; ahead < 2; ahead++)
                if (blocks.first <= block + ahead && block + ahead <= blocks.last)
                    load_block(f, tile, ahead == 1, block + ahead, from, to);
    }
}

// Warp 3. A block's first tile has the block's number. Each further one is the next that no block has taken,
// counted in global memory. There are as many counts as tiles, so the block that gets the last number is the
// last to count: it sets the counter to zero.
template <typename F> __device__ __forceinline__ void find_tiles(F f) {
    PrefillTiles<F::ROWS, F::KEYS> finder(f.p.attention);
    uint32_t                       number = blockIdx.x;
    for (PrefillTile tile; finder.next(number, tile);) {
        f.hand_out(tile);
        f.tiles.wait_empty();
        number = gridDim.x + __shfl_sync(FULL_WARP, lane() == 0 ? atomicInc(f.p.taken, 1u << 31) : 0, 0);
    }
    f.hand_out({NO_TILE});
    if (lane() == 0 && number + 1 == gridDim.x + finder.first) atomicExch(f.p.taken, 0);
}

// Warps 1 and 2. Eight threads copy 128 bytes of a row; rows behind the sequence's last are zeros.
template <typename F> __device__ __forceinline__ void load_queries(F f) {
    using T = typename F::T;
    const AttentionParams& p = f.p.attention;
    const uint32_t         thread = threadIdx.x - 32, chunk = thread % 8, first = thread / 8,
                           group = uint32_t(p.group);
    enum : int { EACH = QUERY_WARPS * 32 / 8 }; // rows at a time
    for (PrefillTile tile; f.take(tile);) {
        f.queries.wait_empty();
#pragma unroll 1
        for (uint32_t row = first; row < F::ROWS; row += EACH) {
            const uint32_t at = tile.row + row, token = tile.token + at / group,
                           head = tile.kv_head * group + at % group;
            const bool     is_there = at < tile.rows;
            const T*       from =
                static_cast<const T*>(p.q) + (is_there ? token * p.q_stride + head * F::DIM + chunk * 8 : 0);
            const uint32_t to = f.shared + row * PITCH + (chunk ^ row % 8) * 16;
#pragma unroll
            for (int panel = 0; panel < F::PANELS; panel++)
                cp_async_16(to + panel * F::QUERY_PANEL, from + panel * 64, is_there ? 16 : 0);
        }
        cp_async_arrive(f.queries.full());
        f.queries.advance();
    }
    cp_async_wait_all(); // a thread must not exit before its copies and their arrivals are done
}

// What a thread holds of its two rows, lane / 4 of the warp's 16 and the one eight below.
struct RowPair {
    int   position[2];        // the last key that the rows see
    float largest[2], sum[2]; // the largest score so far; the sum of this thread's weights
};

// Scores of a block, as one batch that is left in flight.
template <typename F>
__device__ __forceinline__ void multiply_keys(float (&score)[F::KEYS / 2], uint32_t queries, uint32_t keys) {
    pin(score);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < F::DIM / 16; step++) {
        const int panel = step / 4, within = step % 4 * K_MAJOR_STEP;
        wgmma<typename F::T, false, false>(score, queries + (panel * F::QUERY_PANEL >> 4) + within,
                                           keys + (panel * F::BLOCK_PANEL >> 4) + within, step > 0);
    }
    wgmma_commit();
    pin(score);
}

// Weights times values, likewise.
template <typename F> __device__ __forceinline__ void multiply_values(float (&out)[F::DIM / 2],
                                                                      const uint32_t (&weights)[F::KEYS / 4],
                                                                      uint32_t values) {
    pin(out);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < F::KEYS / 16; step++)
        wgmma_from_registers<typename F::T, true>(out, weights + 4 * step, values + step * MN_MAJOR_STEP,
                                                  true);
    wgmma_commit();
    pin(out);
}

// Hides what the rows do not see of a block.
template <typename F> __device__ __forceinline__ void hide(float (&score)[F::KEYS / 2], const RowPair& rows,
                                                           int first_key, int window) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
        const int last = rows.position[row] - first_key - 2 * int(lane() % 4), first = last + 1 - window;
#pragma unroll
        for (int i = 2 * row; i < F::KEYS / 2; i += 4)
#pragma unroll
            for (int j = 0; j < 2; j++)
                if (2 * i - 4 * row + j > last || 2 * i - 4 * row + j < first) score[i + j] = -infinity();
    }
}

// Scores become weights, 2^(score * factor - largest). `rescale` is the factor for earlier weights under the
// new maximum.
template <typename F> __device__ __forceinline__ void soften(float (&score)[F::KEYS / 2], RowPair& rows,
                                                             float (&rescale)[2], float            factor) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float largest = rows.largest[row];
#pragma unroll
        for (int i = 2 * row; i < F::KEYS / 2; i += 4)
            largest = fmaxf(largest, fmaxf(score[i], score[i + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, 2));
        // As long as nothing is seen there is no weight, not NaN.
        const float shift = largest == -infinity() ? 0.0f : __fmul_rn(largest, factor);
        // The last shift as it was rounded then, so that nothing is rescaled where the maximum has not grown.
        rescale[row] = exp2_approx(__fmul_rn(rows.largest[row], factor) - shift);
        float sum = 0.0f;
#pragma unroll
        for (int i = 2 * row; i < F::KEYS / 2; i += 4) {
            score[i] = exp2_approx(score[i] * factor - shift);
            score[i + 1] = exp2_approx(score[i + 1] * factor - shift);
            sum += score[i] + score[i + 1];
        }
        rows.sum[row] = rows.sum[row] * rescale[row] + sum;
        rows.largest[row] = largest;
    }
}

// tanh(score * scale / cap) / 2, by tanh(x) = 1 - 2 / (1 + e^2x); the rest of the cap is in `factor`.
template <typename F> __device__ __forceinline__ void cap_scores(float (&score)[F::KEYS / 2], float inner) {
#pragma unroll
    for (int i = 0; i < F::KEYS / 2; i++) score[i] = 0.5f - reciprocal(1.0f + exp2_approx(score[i] * inner));
}

template <typename F> __device__ __forceinline__ void pack_weights(uint32_t (&weights)[F::KEYS / 4],
                                                                   const float (&weight)[F::KEYS / 2]) {
#pragma unroll
    for (int i = 0; i < F::KEYS / 4; i++) weights[i] = pack<typename F::T>(weight[2 * i], weight[2 * i + 1]);
}

// Stores a warp's 16 rows, the first of them row `first` of the sequence. Staging lets eight threads write
// 128 bytes of one row.
template <typename F> __device__ __forceinline__ void store_rows(const F& f, const PrefillTile& tile,
                                                                 uint32_t first, uint32_t slab,
                                                                 const float (&out)[F::DIM / 2]) {
    using T = typename F::T;
    const AttentionParams& p = f.p.attention;
    const uint32_t         group = uint32_t(p.group), into = slab + lane() % 16 * PITCH, chunk = lane() / 16,
                           column = lane() % 8;
    T*                     to[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t at = first + 4 * i + lane() / 8;
        to[i] = static_cast<T*>(p.out) + (tile.token + at / group) * p.out_stride +
                (tile.kv_head * group + at % group) * F::DIM + 8 * column;
    }
#pragma unroll
    for (int panel = 0; panel < F::PANELS; panel++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* s = out + 32 * panel + 8 * i; // 16 columns
            stmatrix_x4(into + ((2 * i + chunk) ^ lane() % 8) * 16, pack<T>(s[0], s[1]), pack<T>(s[2], s[3]),
                        pack<T>(s[4], s[5]), pack<T>(s[6], s[7]));
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t row = 4 * i + lane() / 8;
            const uint4    values = load_shared_16(slab + row * PITCH + (column ^ row % 8) * 16);
            if (first + row < tile.rows) store_global_16(to[i] + 64 * panel, values);
        }
        __syncwarp(); // before the next panel overwrites this
    }
}

// Divides by the sums of weights and stores. Rows with a NaN are computed again, since it may be the NaN of a
// value that they do not see.
template <typename F> __device__ __forceinline__ void finish(const F& f, const PrefillTile& tile,
                                                             uint32_t warp, RowPair& rows,
                                                             float (&out)[F::DIM / 2]) {
    const AttentionParams& p = f.p.attention;
    const uint32_t         group = uint32_t(p.group), first = tile.row + warp * 16,
                           slab = f.shared + F::SLABS_AT + warp * F::SLAB_BYTES;
    uint32_t               strange[2]; // a bit for each lane whose part of the row has a NaN
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float sum = rows.sum[row];
        sum += __shfl_xor_sync(FULL_WARP, sum, 1);
        sum += __shfl_xor_sync(FULL_WARP, sum, 2);
        if (p.sinks) { // a score without a value
            const uint32_t at = first + lane() / 4 + 8 * row;
            const float    shift = rows.largest[row] == -infinity() ? 0.0f : rows.largest[row] * f.p.factor;
            sum += exp2_approx(p.sinks[tile.kv_head * group + at % group] * LOG2_E - shift);
        }
        const float share = 1.0f / sum;
        bool        is_strange = false;
#pragma unroll
        for (int i = 2 * row; i < F::DIM / 2; i += 4) {
            out[i] *= share;
            out[i + 1] *= share;
            is_strange |= out[i] != out[i] || out[i + 1] != out[i + 1];
        }
        strange[row] = __ballot_sync(FULL_WARP, is_strange);
    }
    store_rows(f, tile, first, slab, out);
    if ((strange[0] | strange[1]) == 0) return;
    unsigned char* const memory = static_cast<unsigned char*>(__cvta_shared_to_generic(slab));
    float* const         query = reinterpret_cast<float*>(memory);
    const RowScratch     scratch = {query, query + F::DIM, reinterpret_cast<int64_t*>(memory + 8 * F::DIM),
                                    reinterpret_cast<float*>(memory + 8 * F::DIM + 256)};
#pragma unroll 1
    for (uint32_t row = 0; row < 16; row++) {
        const uint32_t at = first + row, lanes = (row < 8 ? strange[0] : strange[1]) >> row % 8 * 4 & 15;
        if (lanes && at < tile.rows)
            attend_row<typename F::T>(p, tile.token + at / group, tile.kv_head * group + at % group, scratch);
    }
    __syncwarp();
}

// The other warpgroups.
template <typename F> __device__ __forceinline__ void consume(F f) {
    const AttentionParams& p = f.p.attention;
    const uint32_t warp = __shfl_sync(FULL_WARP, threadIdx.x / 32, 0) - WARPGROUP / 32, consumer = warp / 4,
                   group = uint32_t(p.group);
    const uint32_t turn = FIRST_TURN + consumer, next_turn = FIRST_TURN + (consumer + 1) % F::CONSUMERS;
    const uint32_t queries = k_major(f.shared + consumer * HALF * PITCH);
    const uint32_t keys = k_major(f.shared + F::BLOCKS_AT),
                   values = mn_major(f.shared + F::BLOCKS_AT, F::KEYS);
    if (consumer == F::CONSUMERS - 1) barrier_arrive(FIRST_TURN, 2 * WARPGROUP);
    for (PrefillTile tile; f.take(tile);) {
        const BlockRange blocks = blocks_of(f, tile);
        RowPair          rows;
#pragma unroll
        for (int row = 0; row < 2; row++) {
            rows.position[row] =
                int(tile.history + min(tile.row + warp * 16 + lane() / 4 + 8 * row, tile.rows - 1) / group);
            rows.largest[row] = -infinity();
            rows.sum[row] = 0.0f;
        }
        const auto weigh = [&](float (&score)[F::KEYS / 2], float (&rescale)[2], int block) {
            if constexpr (bool(F::CAPPED)) cap_scores<F>(score, f.p.inner);
            const int  first_key = block * F::KEYS;
            const bool sees_all =
                first_key + F::KEYS - 1 <= rows.position[0] && first_key + f.window() > rows.position[1];
            if (!__all_sync(FULL_WARP, sees_all)) hide<F>(score, rows, first_key, f.window());
            soften<F>(score, rows, rescale, f.p.factor);
        };

        // Zeros that the first products overwrite or add to. Without them ptxas 12.4 serialises every wgmma
        // (C7515).
        float    score[F::KEYS / 2] = {}, out[F::DIM / 2] = {}, rescale[2];
        uint32_t weights[F::KEYS / 4];
        f.queries.wait_full();
        fence_proxy_async(); // cp.async has written them
        f.blocks.wait_full();
        multiply_keys<F>(score, queries, keys + f.blocks.stage * (F::BLOCK_BYTES >> 4));
        wgmma_wait<0>();
        pin(score);
        f.blocks.release();
        f.blocks.advance();
        weigh(score, rescale, blocks.last);
        pack_weights<F>(weights, score);
        for (int block = blocks.last - 1; block >= blocks.first; block--) {
            const typename F::Blocks of_keys = f.blocks;
            of_keys.wait_full();
            f.blocks.advance();
            barrier_wait(turn, 2 * WARPGROUP);
            multiply_keys<F>(score, queries, keys + of_keys.stage * (F::BLOCK_BYTES >> 4));
            f.blocks.wait_full();
            multiply_values<F>(out, weights, values + f.blocks.stage * (F::BLOCK_BYTES >> 4));
            barrier_arrive(next_turn, 2 * WARPGROUP);
            wgmma_wait<1>();
            pin(score);
            of_keys.release();
            weigh(score, rescale, block);
            wgmma_wait<0>();
            pin(out);
            f.blocks.release();
            f.blocks.advance();
#pragma unroll
            for (int i = 0; i < F::DIM / 2; i++) out[i] *= rescale[i / 2 % 2];
            pack_weights<F>(weights, score);
        }
        f.queries.release();
        f.queries.advance();
        f.blocks.wait_full();
        multiply_values<F>(out, weights, values + f.blocks.stage * (F::BLOCK_BYTES >> 4));
        wgmma_wait<0>();
        pin(out);
        f.blocks.release();
        f.blocks.advance();
        finish(f, tile, warp, rows, out);
    }
    if (consumer == 0) barrier_wait(FIRST_TURN, 2 * WARPGROUP); // the last arrival at it
}

template <typename F> __device__ __forceinline__ void attention(const TiledAttentionParams& p) {
    extern __shared__ __align__(1024) unsigned char dynamic[];
    const F                                         f(p, shared_address(dynamic));
    if (threadIdx.x == 0) {
        prefetch_tensor_map(p.key_map);
        prefetch_tensor_map(p.value_map);
        f.init();
        fence_mbarrier_init();
    }
    await_previous_launch();
    __syncthreads();
    const uint32_t warp = __shfl_sync(FULL_WARP, threadIdx.x / 32, 0);
    if (warp < WARPGROUP / 32) {
        registers_dec<F::PRODUCER_REGISTERS>();
        if (warp == 0)
            load_blocks<F>(f);
        else if (warp <= QUERY_WARPS)
            load_queries<F>(f);
        else
            find_tiles<F>(f);
    } else {
        registers_inc<F::CONSUMER_REGISTERS>();
        consume<F>(f);
    }
}

#define ENTRY(NAME, T, DIM, CAPPED)                                                \
    extern "C" __global__ void __launch_bounds__(Form<T, DIM, CAPPED>::THREADS, 1) \
        attention_prefill_##NAME(const __grid_constant__ TiledAttentionParams p) { \
        attention<Form<T, DIM, CAPPED>>(p);                                        \
    }
ATTENTION_ENTRIES
