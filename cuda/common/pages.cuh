// Where a token lies: its sequence, its position there, and the place in a pool of keys or values that holds a position.
#pragma once
#include "params.h"

struct Place {
    int64_t sequence;
    int64_t position;
};

struct Slot {
    int64_t page;
    int64_t token; // of the page
};

// The sequence that owns row `token` of the step, by bisection of query_offsets, and the token's position in it.
__device__ __forceinline__ Place locate(const PageParams& pages, int64_t token) {
    int64_t low = 0, high = pages.num_sequences; // the answer is in low..high
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (pages.query_offsets[middle] <= token) low = middle;
        else high = middle;
    }
    return {low, int64_t(pages.seq_lens[low]) - (int64_t(pages.query_offsets[low + 1]) - token)};
}

__device__ __forceinline__ Slot slot_of(const PageParams& pages, int64_t sequence, int64_t position) {
    const uint32_t page_tokens = uint32_t(pages.page_tokens), at = uint32_t(position);
    return {int64_t(pages.block_table[sequence * pages.table_stride + at / page_tokens]), at % page_tokens};
}

// The first element of a head.
__device__ __forceinline__ int64_t head_at(const PoolParams& pool, Slot slot, int64_t head) {
    return slot.page * pool.page_stride + slot.token * pool.token_stride + head * pool.head_stride;
}

// Element j of a head, from its first.
__device__ __forceinline__ int64_t element_at(const PoolParams& pool, int64_t j) {
    if (j < pool.chunk) return j; // as always where a head is in one piece
    const uint32_t chunk = uint32_t(pool.chunk), at = uint32_t(j);
    return at / chunk * pool.chunk_stride + at % chunk;
}
