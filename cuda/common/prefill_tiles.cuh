// Which query rows of which sequence a block takes next, heaviest first. Computed on the device: the host
// does not know the lengths.
#pragma once
#include "pages.cuh"
#include "reduce.cuh"

// ROWS query rows of one sequence and KV head at most. A row is a token and a query head of the KV head's
// group, token after token.
struct PrefillTile {
    uint32_t sequence;
    uint32_t kv_head;
    uint32_t row;     // the first row, counted within the sequence
    uint32_t rows;    // all rows of the sequence
    uint32_t token;   // the sequence's first token, counted within the step
    uint32_t history; // tokens of the sequence before the step
};

// Walks the tiles by their index, which must not decrease. By a whole warp.
//
// A tile's weight is the number of blocks of KEYS keys up to its last row's position. The walk goes from the
// heaviest weight, or level, down. At each level it goes through the sequences, 32 at a time, one per lane.
// Of a sequence it takes the tiles of one KV head after the other, so that blocks at work together share keys
// and values. Later tiles of a sequence are heavier, so a division gives those of a level. Levels without
// tiles are skipped. A walk costs about one step of the warp per level and 32 sequences. 32 bits: the host
// has refused more rows.
template <uint32_t ROWS, uint32_t KEYS> struct PrefillTiles {
    const PageParams& pages;
    const uint32_t    group, num_kv_heads;
    // Blocks of the tiles that are looked at, and of the heaviest that come later.
    uint32_t level, next_level = 0;
    uint32_t chunk = 0; // the first sequence of those that are looked at
    uint32_t first = 0; // the index of their first tile

    __device__ __forceinline__ explicit PrefillTiles(const AttentionParams& p)
        : pages(p.pages), group(uint32_t(p.group)), num_kv_heads(uint32_t(p.num_heads / p.group)), level(0) {
        for (uint32_t b = lane(); b < pages.num_sequences; b += 32) {
            const Sequence s = sequence(b);
            level = max(level, s.tokens > 0 ? blocks_of(s.history + s.tokens) : 0u);
        }
        level = __reduce_max_sync(FULL_WARP, level);
    }

    // False behind the last tile; then `first` is the total number of tiles.
    __device__ __forceinline__ bool next(uint32_t index, PrefillTile& tile) {
        while (level > 0) {
            const Sequence s = sequence(chunk + lane());
            const uint32_t below = tiles_within(s, level - 1), count = tiles_within(s, level) - below,
                           tiles = count * num_kv_heads;
            uint32_t       end = tiles; // of the lane's tiles, counted from `first`
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const uint32_t before = __shfl_up_sync(FULL_WARP, end, step);
                if (lane() >= uint32_t(step)) end += before;
            }
            const uint32_t all = __shfl_sync(FULL_WARP, end, 31);
            if (index - first < all) {
                const uint32_t within = index - first,
                               owner = __ffs(__ballot_sync(FULL_WARP, end > within)) - 1;
                const uint32_t place = within - (end - tiles), turn = count > 0 ? place % count : 0;
                tile.sequence = chunk + owner;
                tile.kv_head = __shfl_sync(FULL_WARP, count > 0 ? place / count : 0, owner);
                tile.row = __shfl_sync(FULL_WARP, (below + count - 1 - turn) * ROWS, owner);
                tile.rows = __shfl_sync(FULL_WARP, s.tokens * group, owner);
                tile.token = __shfl_sync(FULL_WARP, s.token, owner);
                tile.history = __shfl_sync(FULL_WARP, s.history, owner);
                return true;
            }
            first += all;
            next_level = max(next_level, below > 0 ? level_of(s, below - 1) : 0u);
            chunk += 32;
            if (chunk >= pages.num_sequences) {
                level = __reduce_max_sync(FULL_WARP, next_level);
                next_level = chunk = 0;
            }
        }
        return false;
    }

private:
    struct Sequence {
        uint32_t token, tokens, history;
    };
    __device__ __forceinline__ Sequence sequence(uint32_t b) const {
        if (b >= pages.num_sequences) return {0, 0, 0};
        const uint32_t token = pages.query_offsets[b], tokens = pages.query_offsets[b + 1] - token;
        return {token, tokens, pages.seq_lens[b] - tokens};
    }
    static __device__ __forceinline__ uint32_t blocks_of(uint32_t keys) { return (keys + KEYS - 1) / KEYS; }
    // Tiles of a KV head whose keys all lie in the first `blocks` blocks.
    __device__ __forceinline__ uint32_t tiles_within(const Sequence& s, uint32_t blocks) const {
        const int tokens = int(blocks * KEYS) - int(s.history);
        if (tokens >= int(s.tokens)) return (s.tokens * group + ROWS - 1) / ROWS;
        return tokens > 0 ? uint32_t(tokens) * group / ROWS : 0;
    }
    __device__ __forceinline__ uint32_t level_of(const Sequence& s, uint32_t tile) const {
        return blocks_of(s.history + (min((tile + 1) * ROWS, s.tokens * group) - 1) / group + 1);
    }
};
