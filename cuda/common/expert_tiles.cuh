// Which rows of which expert a tile covers, found on the device: the host never knows how many rows an expert got.
#pragma once
#include "params.h"

struct ExpertTile {
    uint32_t expert;
    uint32_t row; // its first
    uint32_t end; // the first row that is no longer the expert's
    uint32_t col; // in tiles
};

// Walks the tiles of all experts by their index, which must not decrease. Inside an expert rows run fastest, so that blocks at work
// together share weights, but in bands of BAND tiles, so that the rows of a band stay in the L2 cache while columns pass.
// 32 bits: a matrix with more tiles would not fit any memory.
struct ExpertTiles {
    enum : uint32_t { BAND = 16 };

    const uint32_t* offsets; // [E + 1]; null: one expert owns all rows
    uint32_t        num_experts, rows_per_tile, col_tiles;
    uint32_t        expert, begin, end; // the cursor: an expert and its rows,
    uint32_t        first;              // and the index of its first tile

    __device__ __forceinline__ ExpertTiles(InU32 offsets, int64_t rows, int64_t num_experts, uint32_t rows_per_tile, uint32_t col_tiles)
        : offsets(offsets), num_experts(uint32_t(num_experts)), rows_per_tile(rows_per_tile), col_tiles(col_tiles), expert(0), begin(0),
          end(offsets ? offsets[1] : uint32_t(rows)), first(0) {}

    // False behind the last tile.
    __device__ __forceinline__ bool find(uint32_t index, ExpertTile& tile) {
        for (;;) {
            const uint32_t row_tiles = (end - begin + rows_per_tile - 1) / rows_per_tile, within = index - first;
            if (within < row_tiles * col_tiles) {
                const uint32_t band = within / (BAND * col_tiles), rest = within - band * BAND * col_tiles;
                const uint32_t band_tiles = min(uint32_t(BAND), row_tiles - band * BAND);
                tile.expert = expert;
                tile.row = begin + (band * BAND + rest % band_tiles) * rows_per_tile;
                tile.end = end;
                tile.col = rest / band_tiles;
                return true;
            }
            if (++expert == num_experts) return false;
            first += row_tiles * col_tiles;
            begin = end;
            end = offsets[expert + 1];
        }
    }
};
