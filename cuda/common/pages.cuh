// Where a token lies: its sequence, its position there, and the row of the key-value pools that holds a position.
#pragma once
#include "params.h"

struct Place {
    int64_t sequence;
    int64_t position;
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

__device__ __forceinline__ int64_t pool_row(const PageParams& pages, int64_t sequence, int64_t position) {
    const uint32_t page_tokens = uint32_t(pages.page_tokens), at = uint32_t(position);
    return int64_t(pages.block_table[sequence * pages.table_stride + at / page_tokens]) * pages.page_stride + at % page_tokens;
}
