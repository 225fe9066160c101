// Which work a block of attention_decode takes. Computed on the device: the host does not know the lengths.
//
// A row is a query head of a token of the step; the rows of a sequence and KV head go token by token. An item
// is a part, PART_KEYS keys from a multiple of that on, of one sequence and KV head, for up to ROWS rows. All
// items lie in one list, by sequence, KV head, group of rows and part. Parts that no row sees are not in it,
// nor are sequences without a token in the step.
//
// An item costs one unit per block of BLOCK_KEYS keys of the part that some row of the sequence sees, plus
// one for overhead. Each block of the grid has an equal share of all units, and takes the items that begin
// there. So a long sequence beside many short ones keeps all blocks equally busy. A share is contiguous: only
// its first and its last pair of sequence and KV head may have items in other shares.
#pragma once
#include "params.h"
#include "reduce.cuh"

enum : uint32_t { PART_KEYS = DECODE_PART_KEYS, BLOCK_KEYS = 64, PART_BLOCKS = PART_KEYS / BLOCK_KEYS };
enum : uint32_t { PART_UNITS = PART_BLOCKS + 1 }; // of a part that is seen in full

// A sequence in this step.
struct DecodeStep {
    uint32_t first_token; // the sequence's first token, counted within the step
    uint32_t tokens;      // of the sequence in the step
    uint32_t length;      // of the sequence, those tokens included

    __device__ __forceinline__ uint32_t position(uint32_t token) const { return length - tokens + token; }
    // The first position that a token sees.
    __device__ __forceinline__ uint32_t oldest(uint32_t token, uint32_t window) const {
        const uint32_t seen = position(token) + 1;
        return seen > window ? seen - window : 0;
    }
};

// How a sequence lies in the list.
struct DecodeExtent {
    uint32_t first_part, parts;
    uint32_t first_units; // units of the first part
    uint32_t row_units;   // units of all parts of one group of rows
    uint32_t row_groups;  // groups of up to ROWS rows of one KV head

    __device__ __forceinline__ DecodeExtent() {}
    __device__ __forceinline__ DecodeExtent(const DecodeStep& step, uint32_t window, uint32_t group,
                                            uint32_t rows) {
        const uint32_t oldest = step.oldest(0, window), end_block = (step.length - 1) / BLOCK_KEYS + 1;
        first_part = oldest / PART_KEYS;
        parts = (step.length - 1) / PART_KEYS + 1 - first_part;
        first_units = min(end_block, (first_part + 1) * PART_BLOCKS) - oldest / BLOCK_KEYS + 1;
        row_units = end_block - oldest / BLOCK_KEYS + parts;
        row_groups = (step.tokens * group + rows - 1) / rows;
    }
    // Where a part begins, from the first one's beginning.
    __device__ __forceinline__ uint32_t units_before(uint32_t part) const {
        return part == 0 ? 0 : first_units + (part - 1) * PART_UNITS;
    }
};

struct DecodeItem {
    uint32_t kv_head, first_row, rows, part;
    uint32_t begin, end; // the keys of the part that some of the rows see, counted from its first
    bool     is_masked;  // some row does not see all of the part

    __device__ __forceinline__ bool     is_empty() const { return begin == end; }
    __device__ __forceinline__ bool     has_edges() const { return begin > 0 || end < PART_KEYS; }
    __device__ __forceinline__ uint32_t first_block() const { return begin / BLOCK_KEYS; }
    __device__ __forceinline__ uint32_t end_block() const { return (end + BLOCK_KEYS - 1) / BLOCK_KEYS; }
};

// The walk through a share, by a whole warp. Each lane holds a sequence, so that 32 are looked up at a time;
// all other state is the same in all lanes.
template <uint32_t ROWS> struct DecodeItems {
    const PageParams& pages;
    uint32_t          kv_heads, group, window;
    uint32_t          share_units, shares_with_one_more, end; // `end` of this block's share
    uint32_t          held_from;                              // the sequence of lane 0
    DecodeStep        held;
    // The current item: its sequence, that sequence's first unit, the row of parts (KV head and group of
    // rows), where that begins, the part.
    uint32_t     sequence, sequence_at;
    DecodeStep   step;
    DecodeExtent extent;
    uint32_t     row, row_at, part;

    __device__ __forceinline__ DecodeItems(const AttentionParams& p)
        : pages(p.pages), kv_heads(uint32_t(p.num_heads) / uint32_t(p.group)), group(uint32_t(p.group)),
          window(uint32_t(min(p.window, int64_t(1) << 30))) {
        uint32_t all = 0;
#pragma unroll 4
        for (uint32_t b = lane(); b < pages.num_sequences; b += 32) all += units(look_up(b));
        all = __reduce_add_sync(FULL_WARP, all);
        share_units = all / gridDim.x;
        shares_with_one_more = all % gridDim.x;
        end = share_at(blockIdx.x + 1);
        find(share_at(blockIdx.x));
    }

    // False behind the share's last item.
    __device__ __forceinline__ bool found() const { return row_at + extent.units_before(part) < end; }

    __device__ __forceinline__ void advance() {
        part++;
        settle();
    }
    // No other follows in the share.
    __device__ __forceinline__ bool is_last() const {
        return row_at + (part + 1 < extent.parts ? extent.units_before(part + 1) : extent.row_units) >= end;
    }

    __device__ __forceinline__ DecodeItem item() const {
        DecodeItem     item = {row, 0, step.tokens * group, extent.first_part + part, 0, 0, false};
        uint32_t       first = 0, last = step.tokens - 1; // tokens
        const uint32_t first_key = item.part * PART_KEYS;
        if (extent.row_groups > 1) {
            item.kv_head = row / extent.row_groups;
            item.first_row = row % extent.row_groups * ROWS;
            item.rows = min(ROWS, item.rows - item.first_row);
            first = item.first_row / group;
            last = (item.first_row + item.rows - 1) / group;
        }
        const uint32_t oldest = step.oldest(first, window), behind = step.position(last) + 1;
        const bool     is_seen = oldest < first_key + PART_KEYS && behind > first_key;
        item.begin = is_seen ? max(oldest, first_key) - first_key : 0;
        item.end = is_seen ? min(behind, first_key + PART_KEYS) - first_key : 0;
        item.is_masked =
            step.position(first) + 1 < first_key + PART_KEYS || step.oldest(last, window) > first_key;
        return item;
    }

    // Of the pair of sequence and KV head: how many items it has, whether this is the last, and the block
    // whose share the first begins in.
    __device__ __forceinline__ uint32_t items_of_head() const { return extent.parts * extent.row_groups; }
    __device__ __forceinline__ bool     ends_head() const {
        return part + 1 == extent.parts && (row + 1) % extent.row_groups == 0;
    }
    __device__ __forceinline__ uint32_t first_block_of_head() const {
        return share_of(sequence_at + row / extent.row_groups * extent.row_groups * extent.row_units);
    }

private:
    __device__ __forceinline__ uint32_t share_at(uint32_t block) const {
        return block * share_units + min(block, shares_with_one_more);
    }
    __device__ __forceinline__ uint32_t share_of(uint32_t unit) const {
        const uint32_t longer =
            shares_with_one_more * (share_units + 1); // units of the shares that have one more
        return unit < longer ? unit / (share_units + 1)
                             : shares_with_one_more + (unit - longer) / share_units;
    }

    __device__ __forceinline__ DecodeStep look_up(uint32_t b) const {
        const uint32_t first = pages.query_offsets[b];
        return {first, pages.query_offsets[b + 1] - first, pages.seq_lens[b]};
    }
    __device__ __forceinline__ uint32_t units(const DecodeStep& of) const {
        if (of.tokens == 0) return 0;
        const DecodeExtent extent(of, window, group, ROWS);
        return extent.row_units * extent.row_groups * kv_heads;
    }
    __device__ __forceinline__ void hold(uint32_t from) {
        held_from = from;
        held = {0, 0, 0};
        if (from + lane() < pages.num_sequences) held = look_up(from + lane());
    }
    __device__ __forceinline__ void enter(uint32_t in_lane, uint32_t at) {
        sequence = held_from + in_lane;
        sequence_at = row_at = at;
        step.first_token = __shfl_sync(FULL_WARP, held.first_token, in_lane);
        step.tokens = __shfl_sync(FULL_WARP, held.tokens, in_lane);
        step.length = __shfl_sync(FULL_WARP, held.length, in_lane);
        extent = DecodeExtent(step, window, group, ROWS);
        row = part = 0;
    }

    // The first item that begins at that unit or behind it.
    __device__ __forceinline__ void find(uint32_t unit) {
        uint32_t before = 0;
        for (hold(0); held_from < pages.num_sequences; hold(held_from + 32)) {
            const uint32_t own = units(held);
            uint32_t       sum = own; // of this lane and those below
#pragma unroll
            for (uint32_t step = 1; step < 32; step *= 2) {
                const uint32_t below = __shfl_up_sync(FULL_WARP, sum, step);
                if (lane() >= step) sum += below;
            }
            const uint32_t all = __shfl_sync(FULL_WARP, sum, 31);
            if (unit < before + all) {
                const uint32_t in_lane = __ffs(__ballot_sync(FULL_WARP, unit < before + sum)) - 1;
                enter(in_lane, before + __shfl_sync(FULL_WARP, sum - own, in_lane));
                row = (unit - row_at) / extent.row_units;
                row_at += row * extent.row_units;
                const uint32_t within = unit - row_at;
                if (within > 0)
                    part = within <= extent.first_units
                               ? 1
                               : 1 + (within - extent.first_units + PART_UNITS - 1) / PART_UNITS;
                settle();
                return;
            }
            before += all;
        }
        row_at = end; // nothing is left for this block
        part = 0;
    }

    // From behind a row's last part to the next row, or the next sequence with a token in the step. Behind
    // them all lies no block's share.
    __device__ __forceinline__ void settle() {
        if (part < extent.parts) return;
        part = 0;
        row++;
        row_at += extent.row_units;
        if (row < extent.row_groups * kv_heads) return;
        const uint32_t in_lane = sequence - held_from;
        uint32_t       left = __ballot_sync(FULL_WARP, held.tokens > 0) & 0xfffffffeu << in_lane;
        while (left == 0) {
            if (held_from + 32 >= pages.num_sequences) return;
            hold(held_from + 32);
            left = __ballot_sync(FULL_WARP, held.tokens > 0);
        }
        enter(__ffs(left) - 1, row_at);
    }
};
