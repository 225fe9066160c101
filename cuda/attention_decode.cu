// attention, few query tokens for each sequence, on the tensor cores with the operands swapped: keys and
// values are the long operand.
//
// Contract  src/ops/attention.rs and tiled.rs have checked shapes, strides and alignment; the pages come from
//           a KvCache, or from a caller who vouches for them; nothing is re-checked here. The words at
//           `taken` are zero before and after.
// Work      a block per SM takes its share of all items (common/decode_items.cuh): 256 keys of a sequence and
//           KV head, for up to ROWS rows, which are the query heads of the group of the step's tokens. Warp 4
//           loads stages of 64 keys, then of their values, by TMA; warps 0 to 3 multiply. Each part leaves
//           sums, maximum and sum of exponentials for each row; the block that completes a sequence and KV
//           head merges them.
// Cost      bound by memory: each key and value that a row sees is loaded once, in boxes, 4 * d bytes, by
//           each group of ROWS rows. About 176 KB are in flight per SM. Per part and row 4 * d + 8 bytes of
//           partial results, written and read, mostly in the L2 cache.
// Order     a part's products along d, or along its keys, 16 at a time, ascending; parts merged in ascending
//           order. Where parts begin, and so a row's bits, depends on positions alone: not on blocks, nor on
//           other rows.
//
//     S = K * Q^T            [64 keys, rows], for each 64 keys of the part: K from shared memory as it lies
//     m = max of k * S       k = scale * log2 e
//     P = 2^(k * S - m)      rounded to the type, back to shared memory turned, as [rows, keys]
//     O = V^T * P^T          [d, rows]: V from shared memory as it lies
#include "common/activation.cuh"
#include "common/attention_entries.cuh"
#include "common/attention_row.cuh"
#include "common/decode_items.cuh"
#include "common/dtype.cuh"
#include "common/ring.cuh"
#include "common/warpgroup.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/tma.cuh"
#include "common/ptx/warp.cuh"
#include "common/ptx/wgmma.cuh"

enum : int { THREADS = DECODE_THREADS, PRODUCER = WARPGROUP / 32 }; // the warp
enum : int { FEW = 8, MANY = 32 };                                  // rows that are multiplied at a time
enum : int { PANEL_BYTES = BLOCK_KEYS * PITCH }; // 64 elements of the head, of the keys of a stage
enum : int { SMALL_BYTES = 3072 };               // what is not an operand
static_assert(THREADS == WARPGROUP + 32, "params.h");

// A sequence and KV head whose parts are done, or some of them.
struct Head {
    uint32_t first_token, tokens, length, kv_head;
    uint32_t done, items; // items that this block has done, and all
    uint32_t counter;     // the word where blocks add them up
};

template <int ROWS> struct Small {
    float    largest[4][MANY], sums[4][MANY]; // by warp and row: over the keys that the warp has of each 64
    int64_t  partial_at[ROWS];                // by row: where its partial result of part 0 begins
    uint32_t position[ROWS];
    Head     open[2];    // the heads of which other blocks have items, too
    uint32_t opened;     // the number of those
    uint32_t is_last[2]; // whether this block has done the last item of each
};

template <typename T_, int D_, bool CAPPED_> struct Form {
    using T = T_;
    enum : bool { CAPPED = CAPPED_ };
    enum : int { D = D_, PANELS = D / 64, ROWS = D == 256 ? DECODE_ROWS_256 : DECODE_ROWS };
    enum : int { STAGE_BYTES = PANELS * PANEL_BYTES, Q_PANEL = ROWS * PITCH, Q_BYTES = PANELS * Q_PANEL };
    enum : int { P_BYTES = PART_BLOCKS * MANY * PITCH };
    enum : int { STAGES = (DECODE_SHARED_BYTES - SMALL_BYTES - Q_BYTES - P_BYTES) / STAGE_BYTES };
    enum : int {
        Q_AT = STAGES * STAGE_BYTES,
        P_AT = Q_AT + Q_BYTES,
        SMALL_AT = P_AT + P_BYTES,
        BARRIERS_AT = SMALL_AT + sizeof(Small<ROWS>)
    };
    using Stages = Ring<STAGES, 1>;
    using Items = DecodeItems<ROWS>;
    static_assert(BARRIERS_AT % 8 == 0 && BARRIERS_AT + Stages::BYTES <= DECODE_SHARED_BYTES, "params.h");
    // Several chunks of rows read a part's keys, then its values, one behind the other.
    static_assert(STAGES >= (ROWS > MANY ? 2 : 1) * PART_BLOCKS, "a part must fit");
};

// What the consumers' functions share.
template <typename F> struct Block {
    const TiledAttentionParams& p;
    uint32_t                    shared;
    unsigned char*              dynamic;
    // Floats of a token's partial result of one part and KV head, and from one part to the next.
    uint32_t head_stride;
    int64_t  part_stride;

    __device__ __forceinline__ Block(const TiledAttentionParams& p, uint32_t shared, unsigned char* dynamic,
                                     uint32_t group, uint32_t kv_heads)
        : p(p), shared(shared), dynamic(dynamic), head_stride(group * (F::D + 2)),
          part_stride(int64_t(kv_heads) * head_stride) {}

    __device__ __forceinline__ Small<F::ROWS>& small() const {
        return *reinterpret_cast<Small<F::ROWS>*>(dynamic + F::SMALL_AT);
    }
    __device__ __forceinline__ uint32_t stage(const typename F::Stages& ring) const {
        return shared + ring.stage * F::STAGE_BYTES;
    }
    __device__ __forceinline__ int64_t partial_at(int64_t token, uint32_t part, uint32_t kv_head) const {
        return (token * p.max_parts + part) * part_stride + int64_t(kv_head) * head_stride;
    }
    // What a score is multiplied by so that its exponential is a power of 2.
    __device__ __forceinline__ float exponent_scale() const { return p.factor; }
};

__device__ __forceinline__ void consumers_meet() { barrier_among<1, WARPGROUP>(); }

// The boxes of a part's keys, then of its values, that hold what some row sees. A lane looks up the page of
// the box that eight of the part's keys lie in, and later issues a box of a stage, if there are that many.
template <typename F> __device__ __forceinline__ void produce(const TiledAttentionParams& p, uint32_t shared,
                                                              typename F::Items& items,
                                                              typename F::Stages ring) {
    const uint32_t box_keys = uint32_t(p.box_keys), box = lane() / F::PANELS, panel = lane() % F::PANELS;
    const uint32_t to = panel * PANEL_BYTES + box * box_keys * PITCH;
    for (; items.found(); items.advance()) {
        const DecodeItem item = items.item();
        if (item.is_empty()) continue;
        const uint32_t first = 8 * lane() / box_keys * box_keys;
        const bool     is_seen = first < item.end && first + box_keys > item.begin;
        Slot           slot = {0, 0};
        if (is_seen) slot = slot_of(p.attention.pages, items.sequence, item.part * PART_KEYS + first);
        const uint32_t own_page = uint32_t(slot.page), own_token = uint32_t(slot.token);
#pragma unroll
        for (int values = 0; values < 2; values++) {
            for (uint32_t block = item.first_block(); block < item.end_block(); block++) {
                const uint32_t from = (block * BLOCK_KEYS + box * box_keys) / 8 % 32;
                const uint32_t page = __shfl_sync(FULL_WARP, own_page, from),
                               token = __shfl_sync(FULL_WARP, own_token, from);
                const bool     loads = __shfl_sync(FULL_WARP, is_seen, from) && box * box_keys < BLOCK_KEYS;
                const uint32_t bytes = __popc(__ballot_sync(FULL_WARP, loads)) * box_keys * PITCH;
                ring.wait_empty();
                if (lane() == 0) mbarrier_arrive_expect(ring.full(), bytes);
                __syncwarp();
                if (loads)
                    tma_load_4d(shared + ring.stage * F::STAGE_BYTES + to, values ? p.value_map : p.key_map,
                                panel * 64, token, item.kv_head, page, ring.full());
                __syncwarp();
                ring.advance();
            }
        }
    }
}

// The rows of an item, and where they belong. Those up to a multiple of what is multiplied at a time are
// zeros.
template <typename F> __device__ __forceinline__ void load_rows(const Block<F>&          block,
                                                                const typename F::Items& items,
                                                                const DecodeItem&        item) {
    using T = typename F::T;
    const AttentionParams& p = block.p.attention;
    const uint32_t         group = items.group,
                           filled = item.rows <= FEW ? FEW : (item.rows + MANY - 1) / MANY * MANY;
    consumers_meet(); // the rows before are no longer read
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < filled * (F::D / 8); i += WARPGROUP) {
        const uint32_t r = i / (F::D / 8), chunk = i % (F::D / 8),
                       row = item.first_row + (r < item.rows ? r : 0);
        const int64_t token = items.step.first_token + row / group, head = item.kv_head * group + row % group;
        const uint32_t to =
            block.shared + F::Q_AT + chunk / 8 * F::Q_PANEL + r * PITCH + (chunk % 8 ^ r % 8) * 16;
        cp_async_16(to, static_cast<const T*>(p.q) + token * p.q_stride + head * F::D + chunk * 8,
                    r < item.rows ? 16 : 0);
    }
    if (threadIdx.x < filled) {
        const uint32_t row = item.first_row + min(threadIdx.x, item.rows - 1), token = row / group;
        block.small().position[threadIdx.x] = items.step.position(token);
        block.small().partial_at[threadIdx.x] =
            block.partial_at(items.step.first_token + token, 0, item.kv_head) + row % group * F::D;
    }
    cp_async_wait_all();
    fence_proxy_async();
    consumers_meet();
}

// Clears the keys and values in a part's stages that no row sees, because 0 times what a page or shared
// memory happens to hold there might be NaN. The part's first stage is the ring's current one. A fence and a
// barrier must follow.
template <typename F> __device__ __forceinline__ void clear_edges(const Block<F>&    block,
                                                                  const DecodeItem&  item,
                                                                  typename F::Stages ring) {
    for (uint32_t b = item.first_block(); b < item.end_block(); b++, ring.advance()) {
        const int begin = int(item.begin) - int(b * BLOCK_KEYS), end = int(item.end) - int(b * BLOCK_KEYS);
        if (begin <= 0 && end >= int(BLOCK_KEYS)) continue;
        ring.wait_full();
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < F::STAGE_BYTES / 16; i += WARPGROUP) {
            const int key = i / 8 % BLOCK_KEYS;
            if (key < begin || key >= end) clear_shared_16(block.stage(ring) + i * 16);
        }
    }
}

// S of a part, for N rows from `first_row` of the item on. Blocks of keys that no row sees are not there;
// another one's scores stand in for theirs, to be masked.
template <typename F, int N>
__device__ __forceinline__ void multiply_keys(const Block<F>& block, const DecodeItem& item,
                                              uint32_t first_row, bool is_last, typename F::Stages& ring,
                                              float (&s)[PART_BLOCKS][N / 2]) {
    const uint32_t     q = k_major(block.shared + F::Q_AT + first_row * PITCH);
    typename F::Stages read = ring; // the first stage whose products may be under way
    ring.wait_full();
#pragma unroll
    for (uint32_t b = 0; b < PART_BLOCKS; b++) {
        const bool is_next = item.first_block() < b && b < item.end_block();
        if (is_next) {
            ring.advance();
            ring.wait_full();
        }
        const uint32_t keys = k_major(block.stage(ring));
        pin(s[b]);
        wgmma_fence();
#pragma unroll
        for (uint32_t panel = 0; panel < F::PANELS; panel++)
#pragma unroll
            for (uint32_t step = 0; step < 4; step++)
                wgmma<typename F::T, false, false>(
                    s[b], keys + (panel * PANEL_BYTES >> 4) + step * K_MAJOR_STEP,
                    q + (panel * F::Q_PANEL >> 4) + step * K_MAJOR_STEP, panel + step > 0);
        wgmma_commit();
        pin(s[b]);
        if (b > 0) wgmma_wait<1>();
        if (is_next && is_last) read.release();
        if (is_next) read.advance();
    }
    wgmma_wait<0>();
#pragma unroll
    for (uint32_t b = 0; b < PART_BLOCKS; b++) pin(s[b]);
    if (is_last) read.release();
    ring.advance();
}

// Reduces over the eight lanes that hold the same columns. Each step exchanges values between pairs of lanes
// and halves the columns of a lane, as long as it has several. At the end v[0] holds the column that
// `folded_row` names. The order of additions does not depend on the number of columns.
template <int C, typename Both> __device__ __forceinline__ void fold(float (&v)[C], Both both) {
    int left = C;
#pragma unroll
    for (int step = 16; step >= 4; step /= 2) {
        if (left == 1) {
            v[0] = both(v[0], __shfl_xor_sync(FULL_WARP, v[0], step));
            continue;
        }
        left /= 2;
        const bool is_upper = lane() & step;
#pragma unroll
        for (int i = 0; i < left; i++) {
            const float given = is_upper ? v[i] : v[i + left], kept = is_upper ? v[i + left] : v[i];
            v[i] = both(kept, __shfl_xor_sync(FULL_WARP, given, step));
        }
    }
}

// The row, of N, of a thread's column c of N / 4; and of the column that `fold` leaves it with.
__device__ __forceinline__ uint32_t row_of(uint32_t c) { return c / 2 * 8 + lane() % 4 * 2 + c % 2; }
template <int C> __device__ __forceinline__ uint32_t folded_row() {
    return row_of(C == 8 ? lane() / 16 * 4 + lane() / 8 % 2 * 2 + lane() / 4 % 2 : lane() / 16);
}
template <int C> __device__ __forceinline__ bool is_folded_here() { return C == 8 || lane() % 16 < 4; }

// S becomes P, in shared memory, and in `small` the sums of its exponentials. Gives the maximum of row
// threadIdx.x, if there is one. The caller must fence and meet before P is read.
template <typename F, int N>
__device__ __forceinline__ float soften(const Block<F>& block, const DecodeItem& item, uint32_t first_row,
                                        uint32_t window, float (&s)[PART_BLOCKS][N / 2]) {
    enum : int { C = N / 4 };
    Small<F::ROWS>& small = block.small();
    const float     k = block.exponent_scale();
    // tanh(scale * S / cap) / 2 = 1 / 2 - 1 / (1 + e^(2 scale S / cap)); the rest of the cap is in k.
    if (F::CAPPED) {
#pragma unroll
        for (uint32_t b = 0; b < PART_BLOCKS; b++)
#pragma unroll
            for (int i = 0; i < N / 2; i++)
                s[b][i] = 0.5f - reciprocal(1.0f + exp2_approx(block.p.inner * s[b][i]));
    }
    if (item.is_masked) {
        const int own = 16 * warp() + lane() / 4, first_key = int(item.part * PART_KEYS) + own;
#pragma unroll
        for (uint32_t c = 0; c < C; c++) {
            const int position = int(small.position[first_row + row_of(c)]) - first_key;
#pragma unroll
            for (uint32_t i = 0; i < 2 * PART_BLOCKS;
                 i++) { // keys at position are seen, and window - 1 before
                const int key = i / 2 * BLOCK_KEYS + i % 2 * 8;
                if (key > position || key + int(window) <= position)
                    s[i / 2][c / 2 * 4 + i % 2 * 2 + c % 2] = -infinity();
            }
        }
    }

    float largest[C], sum[C];
#pragma unroll
    for (uint32_t c = 0; c < C; c++) {
        largest[c] = s[0][c / 2 * 4 + c % 2];
#pragma unroll
        for (uint32_t i = 1; i < 2 * PART_BLOCKS; i++)
            largest[c] = fmaxf(largest[c], s[i / 2][c / 2 * 4 + i % 2 * 2 + c % 2]);
    }
    fold(largest, [](float a, float b) { return fmaxf(a, b); });
    if (is_folded_here<C>()) small.largest[warp()][folded_row<C>()] = largest[0];
    consumers_meet();
    const auto largest_of = [&](uint32_t row) {
        return fmaxf(fmaxf(small.largest[0][row], small.largest[1][row]),
                     fmaxf(small.largest[2][row], small.largest[3][row])) *
               k;
    };
#pragma unroll
    for (uint32_t c = 0; c < C; c++) {
        const float scaled = largest_of(row_of(c)),
                    shift = scaled == -infinity() ? 0.0f : scaled; // no score above -inf: no weight, not NaN
        sum[c] = 0.0f;
#pragma unroll
        for (uint32_t i = 0; i < 2 * PART_BLOCKS; i++) {
            float& score = s[i / 2][c / 2 * 4 + i % 2 * 2 + c % 2];
            score = exp2_approx(fmaf(score, k, -shift));
            sum[c] += score;
        }
    }
    fold(sum, [](float a, float b) { return a + b; });
    if (is_folded_here<C>()) small.sums[warp()][folded_row<C>()] = sum[0];

    // Two matrices of 8 x 8, of 16 keys, for each eight rows; two of these pairs at a time. A panel has the
    // 64 keys of a block.
    const uint32_t to = block.shared + F::P_AT + lane() % 8 * PITCH +
                        ((2 * warp() + lane() / 8 % 2) ^ lane() % 8) * 16,
                   pair = lane() / 16;
#pragma unroll
    for (uint32_t i = 0; i < PART_BLOCKS * N / 16; i++) {
        const uint32_t b = N == 8 ? 2 * i : i / (N / 16), eight = N == 8 ? 0 : i % (N / 16) * 2;
        const float*   x = &s[b][4 * eight];
        const float*   y = N == 8 ? &s[b + 1][0] : x + 4;
        const uint32_t at = N == 8 ? (b + pair) * N * PITCH : b * N * PITCH + (eight + pair) * 8 * PITCH;
        stmatrix_x4_turned(to + at, pack<typename F::T>(x[0], x[1]), pack<typename F::T>(x[2], x[3]),
                           pack<typename F::T>(y[0], y[1]), pack<typename F::T>(y[2], y[3]));
    }
    return threadIdx.x < N ? largest_of(threadIdx.x) : 0.0f;
}

// O of a part, for N rows.
template <typename F, int N>
__device__ __forceinline__ void multiply_values(const Block<F>& block, const DecodeItem& item, bool is_last,
                                                typename F::Stages& ring, float (&o)[F::PANELS][N / 2]) {
    typename F::Stages read = ring; // the stage whose products may be under way
    bool               accumulate = false;
    for (uint32_t b = item.first_block(); b < item.end_block(); b++) {
        ring.wait_full();
        const uint32_t values = mn_major(block.stage(ring), BLOCK_KEYS),
                       weights = k_major(block.shared + F::P_AT + b * N * PITCH);
#pragma unroll
        for (uint32_t panel = 0; panel < F::PANELS; panel++) pin(o[panel]);
        wgmma_fence();
        const bool is_next = accumulate;
#pragma unroll
        for (uint32_t step = 0; step < BLOCK_KEYS / 16; step++) {
#pragma unroll
            for (uint32_t panel = 0; panel < F::PANELS; panel++)
                wgmma<typename F::T, true, false>(o[panel],
                                                  values + (panel * PANEL_BYTES >> 4) + step * MN_MAJOR_STEP,
                                                  weights + step * K_MAJOR_STEP, accumulate);
            accumulate = true;
        }
        wgmma_commit();
#pragma unroll
        for (uint32_t panel = 0; panel < F::PANELS; panel++) pin(o[panel]);
        wgmma_wait<1>();
        if (is_next && is_last) read.release();
        if (is_next) read.advance();
        ring.advance();
    }
    wgmma_wait<0>();
#pragma unroll
    for (uint32_t panel = 0; panel < F::PANELS; panel++) pin(o[panel]);
    if (is_last) read.release();
}

// The partial results of N rows: sums of the group's heads, then maxima, then sums of exponentials.
template <typename F, int N>
__device__ __forceinline__ void keep(const Block<F>& block, const DecodeItem& item, uint32_t first_row,
                                     uint32_t group, float largest, const float (&o)[F::PANELS][N / 2]) {
    const Small<F::ROWS>& small = block.small();
    float* const          partials = block.p.partials + item.part * block.part_stride;
#pragma unroll
    for (uint32_t c = 0; c < N / 4; c++) {
        const uint32_t row = first_row + row_of(c);
        if (row >= item.rows) continue;
        float* const sums = partials + small.partial_at[row] + 16 * warp() + lane() / 4;
#pragma unroll
        for (uint32_t i = 0; i < 2 * F::PANELS; i++)
            sums[i / 2 * 64 + i % 2 * 8] = o[i / 2][c / 2 * 4 + i % 2 * 2 + c % 2];
    }
    const uint32_t i = threadIdx.x, row = first_row + i;
    if (i >= N || row >= item.rows) return;
    const uint32_t head = (item.first_row + row) % group;
    float* const   sums = partials + small.partial_at[row] - head * F::D;
    sums[group * F::D + head] = largest;
    sums[group * (F::D + 1) + head] =
        ((small.sums[0][i] + small.sums[1][i]) + small.sums[2][i]) + small.sums[3][i];
}

// A part for N rows. The last to need its stages hands them back.
template <typename F, int N>
__device__ __forceinline__ void attend(const Block<F>& block, const typename F::Items& items,
                                       const DecodeItem& item, uint32_t first_row, bool is_last,
                                       typename F::Stages& ring) {
    const bool clears = item.has_edges() && first_row == 0;
    if (clears) {
        clear_edges<F>(block, item, ring);
        fence_proxy_async();
        consumers_meet();
    }
    // The first product overwrites these zeros. Without them ptxas 12.4 serialises every wgmma (C7515).
    float s[PART_BLOCKS][N / 2] = {};
    multiply_keys<F, N>(block, item, first_row, is_last, ring, s);
    const float largest = soften<F, N>(block, item, first_row, items.window, s);
    if (clears) clear_edges<F>(block, item, ring);
    fence_proxy_async();
    consumers_meet();
    float o[F::PANELS][N / 2] = {};
    multiply_values<F, N>(block, item, is_last, ring, o);
    keep<F, N>(block, item, first_row, items.group, largest, o);
}

// The parts of one sequence and KV head, a warp a row. A row that has met a NaN is computed anew, by itself:
// within an item a weight of 0 meets the values of later tokens, whose infinity or NaN is not this row's.
template <typename F> __device__ __forceinline__ void merge(const Block<F>& block, const Head& head,
                                                            uint32_t group, uint32_t window) {
    using T = typename F::T;
    const AttentionParams& p = block.p.attention;
    const DecodeStep       step = {head.first_token, head.tokens, head.length};
    float* const     room = reinterpret_cast<float*>(block.dynamic + F::P_AT) + warp() * (2 * F::D + 96);
    const RowScratch scratch = {room, room + F::D, reinterpret_cast<int64_t*>(room + 2 * F::D),
                                room + 2 * F::D + 64};
    static_assert(4 * (2 * F::D + 96) * sizeof(float) <= F::P_BYTES, "room for four warps");
    const int64_t stride = block.part_stride;
    for (uint32_t row = warp(); row < head.tokens * group; row += WARPGROUP / 32) {
        const uint32_t token = row / group, of_group = row % group, q_head = head.kv_head * group + of_group;
        const uint32_t begin = step.oldest(token, window) / PART_KEYS,
                       end = step.position(token) / PART_KEYS + 1; // parts
        const float*   partials =
            block.p.partials + block.partial_at(head.first_token + token, 0, head.kv_head);
        const float sink = p.sinks ? p.sinks[q_head] * LOG2_E : -infinity();

        // A lane holds maximum and sum of a part, of 32 at a time.
        const float* const maxima = partials + group * F::D + of_group;
        const auto         largest_of = [&](uint32_t part) {
            return part < end ? maxima[part * stride] : -infinity();
        };
        const auto sum_of = [&](uint32_t part) { return part < end ? maxima[part * stride + group] : 0.0f; };
        float      own_largest = largest_of(begin + lane()), own_sum = sum_of(begin + lane()),
                   largest = fmaxf(sink, own_largest);
        for (uint32_t part = begin + 32 + lane(); part < end; part += 32)
            largest = fmaxf(largest, maxima[part * stride]);
        largest = warp_max(largest);
        const float shift =
            largest == -infinity() ? 0.0f : largest; // no score above -inf: no weight, not NaN
        float  total = p.sinks ? exp2_approx(sink - shift) : 0.0f;
        float2 sums[F::PANELS] = {};
        for (uint32_t from = begin; from < end; from += 32) {
            if (from > begin) {
                own_largest = largest_of(from + lane());
                own_sum = sum_of(from + lane());
            }
            const float own_weight = exp2_approx(own_largest - shift);
            total += warp_sum(own_weight * own_sum);
            const float* values = partials + from * stride + of_group * F::D + 2 * lane();
            const int    count = min(32u, end - from);
#pragma unroll 8
            for (int i = 0; i < count; i++, values += stride) {
                const float weight = __shfl_sync(FULL_WARP, own_weight, i);
#pragma unroll
                for (int panel = 0; panel < F::PANELS; panel++) {
                    const float2 value = *reinterpret_cast<const float2*>(values + panel * 64);
                    sums[panel].x = fmaf(weight, value.x, sums[panel].x);
                    sums[panel].y = fmaf(weight, value.y, sums[panel].y);
                }
            }
        }
        const int64_t to_token = head.first_token + token;
        T* const      out = static_cast<T*>(p.out) + to_token * p.out_stride + q_head * F::D + 2 * lane();
        const float   factor = 1.0f / total;
        bool          is_nan = false;
#pragma unroll
        for (int panel = 0; panel < F::PANELS; panel++) {
            const float x = sums[panel].x * factor, y = sums[panel].y * factor;
            is_nan |= x != x || y != y;
            *reinterpret_cast<uint32_t*>(out + panel * 64) = pack<T>(x, y);
        }
        if (__any_sync(FULL_WARP, is_nan)) attend_row<T>(p, to_token, q_head, scratch);
    }
}

__device__ __forceinline__ void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// By the producer's warp, once the block's parts are done: adds up what the blocks have done of the heads
// that they share, and tells the consumers which of them are complete. A fence on each side, for all of the
// block's results.
template <typename F> __device__ __forceinline__ void close(const Block<F>& block) {
    Small<F::ROWS>& small = block.small();
    barrier_among<2, THREADS>(); // the consumers' partial results are written
    if (lane() == 0 && small.opened > 0) {
        fence_gpu();
#pragma unroll 1
        for (uint32_t i = 0; i < small.opened; i++) {
            const Head&     head = small.open[i];
            uint32_t* const counter = block.p.taken + head.counter;
            small.is_last[i] = atomicAdd(counter, head.done) + head.done == head.items;
            if (small.is_last[i]) atomicExch(counter, 0);
        }
        fence_gpu();
    }
    __syncwarp();
    barrier_among<3, THREADS>();
}

// The parts of the block's share; heads are merged as they become complete, first those that are this block's
// alone.
template <typename F> __device__ __forceinline__ void consume(const Block<F>& block, typename F::Items& items,
                                                              typename F::Stages ring) {
    Small<F::ROWS>& small = block.small();
    uint32_t        done = 0, opened = 0, closed = 0;
    bool            is_fresh = true, is_over = false;
    for (;;) {
        Head head;
        if (items.found()) {
            const DecodeItem item = items.item();
            if (is_fresh || items.part == 0) load_rows<F>(block, items, item);
            is_fresh = false;
            if (item.is_empty()) {
                // no row sees the part: there is nothing to compute, but the item counts as done
            } else if (item.rows <= FEW) {
                attend<F, FEW>(block, items, item, 0, true, ring);
            } else {
                typename F::Stages at = ring;
                for (uint32_t first_row = 0; first_row < item.rows; first_row += MANY) {
                    at = ring;
                    attend<F, MANY>(block, items, item, first_row, first_row + MANY >= item.rows, at);
                }
                ring = at;
            }
            done++;
            const bool closes = items.ends_head() || items.is_last();
            if (closes) {
                const uint32_t all = items.items_of_head(),
                               counter = done < all ? items.first_block_of_head() : 0;
                head = {items.step.first_token,
                        items.step.tokens,
                        items.step.length,
                        item.kv_head,
                        done,
                        all,
                        counter};
                done = 0;
            }
            items.advance();
            if (!closes) continue;
            if (head.done < head.items) {
                if (threadIdx.x == 0) small.open[opened] = head;
                opened++;
                continue;
            }
            consumers_meet(); // all of its partial results are written
        } else {
            if (!is_over) {
                is_over = true;
                if (threadIdx.x == 0) small.opened = opened;
                barrier_among<2, THREADS>();
                barrier_among<3, THREADS>();
            }
            if (closed == opened) return;
            if (!small.is_last[closed++]) continue;
            head = small.open[closed - 1];
        }
        merge<F>(block, head, items.group, items.window);
    }
}

template <typename F> __device__ __forceinline__ void attention(const TiledAttentionParams& p) {
    extern __shared__ __align__(1024) unsigned char dynamic[];
    const uint32_t                                  shared = shared_address(dynamic);
    const typename F::Stages                        ring{shared + F::BARRIERS_AT};
    if (threadIdx.x == 0) {
        ring.init(1, WARPGROUP / 32);
        fence_mbarrier_init();
        prefetch_tensor_map(p.key_map);
        prefetch_tensor_map(p.value_map);
    }
    await_previous_launch();
    __syncthreads();
    typename F::Items items(p.attention);
    const Block<F>    block(p, shared, dynamic, items.group, items.kv_heads);
    if (__shfl_sync(FULL_WARP, threadIdx.x / 32, 0) == PRODUCER) {
        produce<F>(p, shared, items, ring);
        close<F>(block);
    } else {
        consume<F>(block, items, ring);
    }
}

#define ENTRY(NAME, T, D, CAPPED)                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                      \
        attention_decode_##NAME(const __grid_constant__ TiledAttentionParams p) { \
        attention<Form<T, D, CAPPED>>(p);                                         \
    }
ATTENTION_ENTRIES
