// Which tiles of which expert a pair of blocks takes, found on the device: the host never knows how many rows an expert got.
#pragma once
#include "warpgroup.cuh"

// A tile of one block of the pair.
struct PairTile {
    uint32_t expert;
    uint32_t row;     // its first
    uint32_t end;     // the first row that is no longer the expert's
    uint32_t col;     // its first column; behind the last one, this block has nothing to store
    bool     is_paired; // the other block's tile has the same columns, of the next rows; else the same rows, of the next columns
};

// Walks the tiles of all experts by their index, which must not decrease.
//
// Rows of an expert go by 256 to pairs of tiles that share the weights they load. Where no more than 128 are left, they are a single row tile, of
// which the blocks take two columns: else one of them would idle. Bands of BAND pairs follow one another, so that the rows of a band stay in the L2
// cache while columns pass. The order within a band: two columns of tiles at a time, rows fastest, so that blocks at work together share weights.
// 32 bits: a matrix with more tiles would not fit any memory.
template <uint32_t COLS> struct PairTiles {
    enum : uint32_t { BAND = 16, ROWS = TILED_ROWS, PAIR_ROWS = 2 * ROWS };

    const uint32_t* offsets; // [E + 1]; null: one expert owns all rows
    const uint32_t  num_experts, col_tiles;
    uint32_t        expert, begin, end; // the cursor: an expert and its rows,
    uint32_t        first;              // and the index of its first tile

    __device__ __forceinline__ explicit PairTiles(const TiledProductParams& p)
        : offsets(p.offsets), num_experts(uint32_t(p.num_experts)), col_tiles((uint32_t(p.n) + COLS - 1) / COLS), expert(0), begin(0),
          end(p.offsets ? p.offsets[1] : uint32_t(p.rows)), first(0) {}

    // The tile of block `rank`. False behind the last tile; then `first` is the number of all.
    __device__ __forceinline__ bool find(uint32_t index, uint32_t rank, PairTile& tile) {
        for (; expert < num_experts; begin = end, end = ++expert < num_experts ? offsets[expert + 1] : end) {
            const uint32_t rows = end - begin, pairs = (rows + ROWS - 1) / PAIR_ROWS, single = rows > pairs * PAIR_ROWS;
            const uint32_t tiles = pairs * col_tiles + single * ((col_tiles + 1) / 2);
            if (index - first >= tiles) {
                first += tiles;
                continue;
            }
            tile.expert = expert;
            tile.end = end;
            place(index - first, rank, pairs, single, tile);
            return true;
        }
        return false;
    }

private:
    // Tile `within` of an expert.
    __device__ __forceinline__ void place(uint32_t within, uint32_t rank, uint32_t pairs, uint32_t single, PairTile& tile) const {
        const uint32_t last_band = pairs > 0 ? (pairs - 1) / BAND : 0, band = min(within / (BAND * col_tiles), last_band);
        const uint32_t in_band = min(uint32_t(BAND), pairs - band * BAND), rest = within - band * BAND * col_tiles;
        const uint32_t group_tiles = 2 * in_band + (band == last_band ? single : 0), group = rest / group_tiles, turn = rest - group * group_tiles;
        const uint32_t paired = in_band * min(2u, col_tiles - 2 * group); // of the group's columns, the last of which may have no second
        tile.is_paired = turn < paired;
        if (tile.is_paired) {
            tile.row = begin + (band * BAND + turn % in_band) * PAIR_ROWS + rank * ROWS;
            tile.col = (2 * group + turn / in_band) * COLS;
        } else {
            tile.row = begin + pairs * PAIR_ROWS;
            tile.col = (2 * group + rank) * COLS;
        }
    }
};
