// grouped_gemm with weights of 4 and 8 bits and activations of 16: y^T = w * x^T, w decoded in registers.
// nt and glu_nt, as in grouped_gemm.cu.
//
// Contract  src/ops/grouped_gemm/cuda/quantized.rs takes this form where K is a multiple of 8 and rows begin
//           on 16 bytes. int4 and mxfp4 weights lie in tiles, as repack.cu writes them; e4m3 codes and their
//           scales lie as in a checkpoint. Right for any number of rows.
// Work      a block per SM takes tile after tile: PANELS times 32 weight rows, for TOKENS rows of one expert.
//           Warpgroup 0 streams stages of codes and scales, and the rows, by TMA or, where they are gathered,
//           by cp.async. The others decode 64 weight rows at a time into registers, which are the left
//           operand, and multiply. For glu_nt panels are of w and v in turn, so that a thread holds both sums
//           of an output. few8: the consumers share 64 weight rows, and each takes a part of every stage;
//           their sums are added in order.
// Cost      bound by memory: where TOKENS rows hold an expert's, each byte of its codes and scales is loaded
//           once; the scales of a group that spans stages, once for each. Decoding eight elements of int4
//           takes 11 instructions, of mxfp4 12, of e4m3 16 and 4 loads.
// Order     int4 and e4m3: products of integers, or of codes, are summed in f32, 16 at a time, for a group or
//           the part of it in a step of 128 of k or less; such a sum times the scale is added to the others
//           by one fused multiply-add. mxfp4: powers of two are folded into the operand, relative to the
//           largest of the row, and sums run over all of k. A row's bits depend on that row and the weights
//           alone.
#include "common/activation.cuh"
#include "common/dtype.cuh"
#include "common/expert_tiles.cuh"
#include "common/gathered_rows.cuh"
#include "common/ring.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/tma.cuh"
#include "common/ptx/warp.cuh"
#include "common/ptx/wgmma.cuh"
#include "common/quantized_weights.cuh"

// A row of an e4m3 panel: 128 of k, in the swizzle of that width.
enum : uint32_t { E4M3_DEPTH = 128, E4M3_BYTES = WEIGHT_PANEL_ROWS * E4M3_DEPTH };
static_assert(PITCH == 2 * WEIGHT_PANEL_DEPTH && PITCH == E4M3_DEPTH,
              "a row of a panel is as wide as the swizzle");

// GROUP: of k, that share a scale. A form serves multiples of it, too; int4's of 32 any multiple of 32.
template <typename T_, Format FORMAT_, int GROUP_, bool GLU_, int TOKENS_> struct Form {
    using T = T_;
    enum : bool { GLU = GLU_, IS_SPLIT = TOKENS_ == 8, IS_MANY = TOKENS_ > 64 };
    enum : int { FORMAT = FORMAT_, GROUP = GROUP_, TOKENS = TOKENS_, SUMS = TOKENS / 2 };
    // BLOCKS of 64 weight rows for each consumer.
    enum : int {
        CONSUMERS = IS_MANY ? 2 : 4,
        BLOCKS = IS_MANY ? 2 : 1,
        PANELS = 2 * BLOCKS * (IS_SPLIT ? 1 : CONSUMERS)
    };
    enum : int { THREADS = (1 + CONSUMERS) * WARPGROUP, COLS = WEIGHT_PANEL_ROWS * PANELS / (GLU ? 2 : 1) };
    // A stage: so much of k, in steps of 64, of which a consumer takes PART.
    enum : int {
        DEPTH = IS_SPLIT                    ? (FORMAT == E4M3 ? 512 : 1024)
                : FORMAT == E4M3 || IS_MANY ? 128
                                            : 256,
        STEPS = DEPTH / WEIGHT_PANEL_DEPTH,
        PART = IS_SPLIT ? STEPS / CONSUMERS : STEPS
    };
    enum : int {
        CODE_BYTES = FORMAT == E4M3 ? WEIGHT_PANEL_ROWS * DEPTH : STEPS * int(WEIGHT_PANEL_BYTES)
    }; // of a panel
    enum : int { SLOTS = FORMAT == INT4 ? DEPTH / GROUP : 0 };
    enum : int { SCALE_BYTES = FORMAT == MXFP4 ? STEPS * 64 : SLOTS * 128, ZERO_BYTES = SLOTS * 32 };
    enum : int { X_BYTES = TOKENS * PITCH }; // of 64 of k
    enum : int {
        X_AT = PANELS * CODE_BYTES,
        SCALES_AT = X_AT + STEPS * X_BYTES,
        ZEROS_AT = SCALES_AT + PANELS * SCALE_BYTES
    };
    enum : int {
        STAGE_BYTES = (ZEROS_AT + PANELS * ZERO_BYTES + 16 + 1023) / 1024 * 1024
    }; // and a zero point for all
    enum : int { SHARED_SUMS = IS_SPLIT ? 2 * (CONSUMERS - 1) * WARPGROUP * SUMS * 4 : 0 };
    enum : int { STAGES = (int(QUANTIZED_SHARED_BYTES) - 256 - SHARED_SUMS) / STAGE_BYTES };
    enum : int { SUMS_AT = STAGES * STAGE_BYTES, BARRIERS_AT = SUMS_AT + SHARED_SUMS };
    using Stages = Ring<STAGES, 1>;
    static_assert(BARRIERS_AT + Stages::BYTES <= QUANTIZED_SHARED_BYTES && STAGES >= 2, "params.h");
};

template <typename F> __device__ __forceinline__ ExpertTiles tiles_of(const TiledProductParams& p) {
    return ExpertTiles(p.offsets, p.rows, p.num_experts, F::TOKENS, uint32_t((p.n + F::COLS - 1) / F::COLS));
}
// Of k: steps of 64, the last of which may be filled up with zeros.
__device__ __forceinline__ uint32_t steps_of(const TiledProductParams& p) {
    return (uint32_t(p.k) + WEIGHT_PANEL_DEPTH - 1) / WEIGHT_PANEL_DEPTH;
}

// Which panel of which matrix is number `i` of a tile.
template <typename F>
__device__ __forceinline__ const QuantizedMatrixParams& matrix_of(const QuantizedProductParams& p,
                                                                  uint32_t                      i) {
    return F::GLU && i % 2 != 0 ? p.v : p.w;
}
template <typename F> __device__ __forceinline__ uint32_t panel_of(uint32_t col, uint32_t i) {
    return F::GLU ? col * (F::PANELS / 2) + i / 2 : col * F::PANELS + i;
}

// Groups of k in stages of DEPTH. Where a group's length divides that, all stages look alike.
struct Groups {
    const uint32_t length;
    uint32_t       first = 0, into = 0; // the group that a stage begins in, and how far

    __device__ __forceinline__ explicit Groups(const QuantizedProductParams& p)
        : length(uint32_t(p.w.group)) {}
    __device__ __forceinline__ void advance(uint32_t depth) {
        for (into += depth; into >= length; into -= length) first++;
    }
    // Those of so much of k.
    __device__ __forceinline__ uint32_t count(uint32_t depth) const {
        uint32_t groups = 1;
        for (uint32_t end = length; end < into + depth; end += length) groups++;
        return groups;
    }
};

// The copies of one panel of weights of 4 bits: its codes, scales and zero points of all stages.
template <typename F> struct PanelSource {
    const unsigned char *codes, *scales, *zeros;
    bool                 is_inside;

    __device__ __forceinline__ void find(const QuantizedProductParams& p, const ExpertTile& tile,
                                         uint32_t i) {
        const QuantizedMatrixParams& m = matrix_of<F>(p, i);
        const uint32_t               panel = panel_of<F>(tile.col, i);
        is_inside = panel * WEIGHT_PANEL_ROWS < p.product.n;
        codes = bytes_at(m.codes, tile.expert * m.expert_codes + panel * m.row_codes);
        scales = bytes_at(m.scales, tile.expert * m.expert_scales + panel * m.row_scales +
                                        (F::FORMAT == MXFP4 ? WEIGHT_PANEL_ROWS * 4 : 0));
        zeros = m.zeros ? bytes_at(m.zeros, tile.expert * m.expert_zeros + panel * m.row_zeros) : nullptr;
    }
    static __device__ __forceinline__ void load(uint32_t to, const void* from, uint32_t bytes,
                                                uint32_t full) {
        if (F::IS_MANY)
            bulk_load(to, from, bytes, full);
        else
            bulk_load_once(to, from, bytes, full);
    }
};

// Warpgroup 0. Thread i of its first warp loads panel i, and box i of the rows.
template <typename F>
__device__ __forceinline__ void produce(const QuantizedProductParams& params, uint32_t shared,
                                        typename F::Stages ring) {
    const TiledProductParams& p = params.product;
    const bool                gathered = p.row_to_slot;
    if (!gathered && threadIdx.x >= 32) return;
    const uint32_t steps = steps_of(p), scale_size = params.w.scale_type == TYPE_F32 ? 4 : 2;
    ExpertTiles    tiles = tiles_of<F>(p);
    ExpertTile     tile;
    for (uint32_t index = blockIdx.x; tiles.find(index, tile); index += gridDim.x) {
        GatheredRows<typename F::T, F::TOKENS> rows;
        if (gathered) rows.find(p, tile.row, tile.end);
        PanelSource<F> panel;
        Groups         groups(params);
        panel.is_inside = false;
        uint32_t panels = F::PANELS; // that are there
        if (F::FORMAT != E4M3) {
            if (threadIdx.x < F::PANELS) panel.find(params, tile, threadIdx.x);
            const uint32_t all = (uint32_t(p.n) + WEIGHT_PANEL_ROWS - 1) / WEIGHT_PANEL_ROWS,
                           before = panel_of<F>(tile.col, 0);
            panels = min(uint32_t(F::PANELS), (all - before) * (F::GLU ? 2 : 1));
        }
        for (uint32_t step = 0; step < steps; step += F::STEPS) {
            const uint32_t stage = shared + ring.stage * F::STAGE_BYTES, full = ring.full(),
                           here = min(uint32_t(F::STEPS), steps - step);
            const uint32_t code_bytes = here * WEIGHT_PANEL_BYTES,
                           held = F::FORMAT == INT4 ? groups.count(here * WEIGHT_PANEL_DEPTH) : 0;
            const uint32_t scale_bytes =
                F::FORMAT == MXFP4 ? here * 64 : held * WEIGHT_PANEL_ROWS * scale_size;
            const uint32_t zero_bytes = F::FORMAT == INT4 && params.w.zeros ? held * WEIGHT_PANEL_ROWS : 0;
            const uint32_t boxes =
                (here * WEIGHT_PANEL_DEPTH + E4M3_DEPTH - 1) / E4M3_DEPTH; // of an e4m3 panel
            ring.wait_empty();
            if (threadIdx.x == 0) {
                const uint32_t of_panel =
                    F::FORMAT == E4M3 ? boxes * E4M3_BYTES : code_bytes + scale_bytes + zero_bytes;
                mbarrier_arrive_expect(full, panels * of_panel +
                                                 (gathered ? 0 : here * F::X_BYTES)); // boxes count in full
            }
            if (F::FORMAT == E4M3) {
                if (threadIdx.x < F::PANELS) {
                    const uint32_t   row = panel_of<F>(tile.col, threadIdx.x) * WEIGHT_PANEL_ROWS;
                    const TensorMap& map = F::GLU && threadIdx.x % 2 != 0 ? p.v : p.w;
                    for (uint32_t box = 0; box < boxes; box++) {
                        const uint32_t to = stage + threadIdx.x * F::CODE_BYTES + box * E4M3_BYTES,
                                       k = step * WEIGHT_PANEL_DEPTH + box * E4M3_DEPTH;
                        if (F::IS_MANY)
                            tma_load_3d(to, map, k, row, tile.expert, full);
                        else
                            tma_load_3d_once(to, map, k, row, tile.expert, full);
                    }
                }
            } else if (panel.is_inside) {
                panel.load(stage + threadIdx.x * F::CODE_BYTES, panel.codes + step * WEIGHT_PANEL_BYTES,
                           code_bytes, full);
                const uint32_t at = F::FORMAT == MXFP4 ? step * 64 : groups.first * WEIGHT_PANEL_ROWS;
                panel.load(stage + F::SCALES_AT + threadIdx.x * F::SCALE_BYTES,
                           panel.scales + (F::FORMAT == MXFP4 ? at : at * scale_size), scale_bytes, full);
                if (zero_bytes > 0)
                    panel.load(stage + F::ZEROS_AT + threadIdx.x * F::ZERO_BYTES, panel.zeros + at,
                               zero_bytes, full);
            }
            if (gathered) {
                for (uint32_t i = 0; i < here; i++)
                    rows.copy(p, stage + F::X_AT + i * F::X_BYTES, (step + i) * WEIGHT_PANEL_DEPTH);
                cp_async_arrive(full);
            } else if (threadIdx.x < here) { // other experts' rows, too: they are not stored
                tma_load_2d(stage + F::X_AT + threadIdx.x * F::X_BYTES, p.x_map,
                            (step + threadIdx.x) * WEIGHT_PANEL_DEPTH, tile.row, full);
            }
            __syncwarp();
            if (F::FORMAT == INT4) groups.advance(F::DEPTH);
            ring.advance();
        }
    }
    if (gathered) cp_async_wait_all(); // no copy arrives after its thread has left
}

// Where a thread's bytes lie in a panel. Of int4 without a branch for each type: a scale is the upper or the
// lower half of a word, or all of it; where there are no zero points, one byte stands for all.
template <typename F> struct Layout {
    uint32_t code, scale, zero;     // of the first group
    uint32_t scale_slot, zero_slot; // bytes from one group to the next
    uint32_t zero_panel;            // and from one panel to the next
    uint32_t left, mask;            // of the word
    bool     is_f16;

    __device__ __forceinline__ explicit Layout(const QuantizedProductParams& p) {
        const bool     is_f32 = p.w.scale_type == TYPE_F32;
        const uint32_t thread = threadIdx.x % WARPGROUP, row = thread / 4;
        code = F::FORMAT == E4M3 ? row * PITCH + row % 8 * 16 + thread % 4 * 2 : thread * 8;
        scale = F::SCALES_AT + (F::FORMAT == MXFP4 ? row * 2 : is_f32 ? row * 4 : row / 2 * 4);
        zero = F::ZEROS_AT + (p.w.zeros ? row : F::PANELS * F::ZERO_BYTES);
        scale_slot = WEIGHT_PANEL_ROWS * (is_f32 ? 4 : 2);
        zero_slot = p.w.zeros ? WEIGHT_PANEL_ROWS : 0;
        zero_panel = p.w.zeros ? F::ZERO_BYTES : 0;
        left = is_f32 || row % 2 != 0 ? 0 : 16;
        mask = is_f32 ? 0xffffffff : 0xffff0000;
        is_f16 = p.w.scale_type == TYPE_F16;
    }
};

// Two weight rows of a thread, of one block: row g of a panel and of the next. A panel that is not there is
// the tile's first instead: what is computed of it is not stored.
template <typename F> struct WeightRows {
    uint32_t panels[2];                     // of the tile
    uint32_t codes[2], scales[2], zeros[2]; // addresses within a stage
    uint32_t scale_rows[2];                 // e4m3: where the rows of scales begin, from the expert's first on

    __device__ __forceinline__ void find(const QuantizedProductParams& p, const Layout<F>& layout,
                                         const ExpertTile& tile, uint32_t first_panel) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32_t of_matrix = panel_of<F>(tile.col, first_panel + i);
            panels[i] =
                F::FORMAT == E4M3 || of_matrix * WEIGHT_PANEL_ROWS < p.product.n ? first_panel + i : 0;
            if (F::FORMAT == E4M3) {
                const QuantizedMatrixParams& m = matrix_of<F>(p, first_panel + i);
                const uint32_t n = min(of_matrix * WEIGHT_PANEL_ROWS + threadIdx.x % WARPGROUP / 4,
                                       uint32_t(p.product.n) - 1);
                scale_rows[i] = uint32_t((m.first + n * m.step) / m.block_rows * uint32_t(m.row_scales));
            }
        }
        if (!F::IS_MANY) place(layout, 0);
    }
    // The form for many rows has few registers and adds up addresses when it needs them; the others keep
    // them.
    __device__ __forceinline__ WeightRows in(const Layout<F>& layout, uint32_t stage) const {
        WeightRows here = *this;
        if (F::IS_MANY)
            here.place(layout, stage);
        else
#pragma unroll
            for (int i = 0; i < 2; i++)
                here.codes[i] += stage, here.scales[i] += stage, here.zeros[i] += stage;
        return here;
    }

private:
    __device__ __forceinline__ void place(const Layout<F>& layout, uint32_t from) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            codes[i] = from + layout.code + panels[i] * F::CODE_BYTES;
            scales[i] = from + layout.scale + panels[i] * F::SCALE_BYTES;
            zeros[i] = from + layout.zero + panels[i] * layout.zero_panel;
            if (!F::IS_MANY)
                asm volatile(""
                             : "+r"(codes[i]), "+r"(scales[i]),
                               "+r"(zeros[i])); // or the compiler adds them up each time
        }
    }
};

// The products of one block and 64 of k, or of half of that, which are waited for. `x` is a descriptor.
template <typename F, int STEPS>
__device__ __forceinline__ void multiply_step(float (&sum)[F::SUMS], const uint32_t (&a)[2][8], int first,
                                              uint32_t x, bool accumulate) {
    pin(sum);
    wgmma_fence();
#pragma unroll
    for (int i = first; i < first + STEPS; i++) {
        const uint32_t of_step[4] = {a[0][2 * i], a[1][2 * i], a[0][2 * i + 1], a[1][2 * i + 1]};
        wgmma_from_registers<typename F::T, false>(sum, of_step, x + i * K_MAJOR_STEP,
                                                   accumulate || i > first);
    }
    wgmma_commit();
    pin(sum);
    wgmma_wait<0>();
    pin(sum);
}

// The sum of a group, times its scale, to those before it.
template <typename F>
__device__ __forceinline__ void add_scaled(float (&sum)[F::SUMS], const float (&part)[F::SUMS],
                                           const float (&scale)[2]) {
#pragma unroll
    for (int i = 0; i < F::SUMS; i++) sum[i] += scale[i / 2 % 2] * part[i];
}

// Where a consumer is among the groups of a stage: how far in one, and which.
struct Place {
    uint32_t into, slot;

    __device__ __forceinline__ void find(uint32_t from, uint32_t length) {
        slot = 0;
        for (into = from; into >= length; into -= length) slot++;
    }
    __device__ __forceinline__ void advance(uint32_t depth, uint32_t length) {
        into += depth;
        if (into >= length) into = 0, slot++;
    }
};

// A scale and a zero point for each of two rows.
template <typename F> struct Scaling {
    float    scale[2];
    uint32_t zeros[2]; // as decode_int4 takes it

    __device__ __forceinline__ void load(const Layout<F>& layout, const WeightRows<F>& rows, uint32_t slot) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const uint32_t bits =
                load_shared_4(rows.scales[r] + slot * layout.scale_slot) << layout.left & layout.mask;
            scale[r] =
                layout.is_f16 ? to_f32(f16{static_cast<unsigned short>(bits >> 16)}) : __uint_as_float(bits);
            zeros[r] = zero_pair<typename F::T>(load_shared_1(rows.zeros[r] + slot * layout.zero_slot));
        }
    }
};

// COUNT steps of 64 of k from `step` on, of one block of 64 weight rows. With EXACT, groups are GROUP long
// and one begins here; else `place` says where in a group this is, and there is one step.
template <typename F, int COUNT, bool EXACT>
__device__ __forceinline__ void multiply(const QuantizedProductParams& p, const Layout<F>& layout,
                                         const WeightRows<F>& all_rows, Place& place, uint32_t stage,
                                         uint32_t x, uint32_t step, const uint32_t (&scale_bits)[2],
                                         float (&sum)[F::SUMS], float (&part)[F::SUMS]) {
    static_assert(EXACT || COUNT == 1, "a group may end after each step");
    enum : int {
        PARTS = F::GROUP < WEIGHT_PANEL_DEPTH ? 2 : 1,
        GROUP_STEPS = F::GROUP > WEIGHT_PANEL_DEPTH ? F::GROUP / WEIGHT_PANEL_DEPTH : 1
    };
    enum : int {
        EACH = COUNT < 2 ? COUNT : 2
    }; // that stand here once: all of them would want more registers
    static_assert(COUNT % EACH == 0 && (!EXACT || F::FORMAT != INT4 || EACH % GROUP_STEPS == 0),
                  "groups of two steps");
    const WeightRows<F> rows = all_rows.in(layout, stage);
    Scaling<F>          scaling;
#pragma unroll 1
    for (int pair = 0; pair < COUNT; pair += EACH)
#pragma unroll
        for (int i = 0; i < EACH; i++, step++, x += F::X_BYTES >> 4) {
            uint32_t a[2][8];
            uint2    codes[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                if constexpr (F::FORMAT == E4M3) {
                    const uint32_t at = rows.codes[r] + step / 2 * E4M3_BYTES;
#pragma unroll
                    for (uint32_t j = 0; j < 8; j++)
                        a[r][j] = decode_e4m3<typename F::T>(
                            load_shared_2((at ^ (step % 2 * 64 + j / 2 * 16)) + j % 2 * 8));
                } else {
                    codes[r] = load_shared_8(rows.codes[r] + step * WEIGHT_PANEL_BYTES);
                }
                if constexpr (F::FORMAT == MXFP4) {
                    const uint32_t both = load_shared_2(rows.scales[r] + step * 64);
                    decode_mxfp4(codes[r], (both & 0xff) * 0x00800080, (both >> 8) * 0x00800080, a[r]);
                }
            }
            if constexpr (F::FORMAT == E4M3) multiply_step<F, 4>(part, a, 0, x, i > 0);
            if constexpr (F::FORMAT == MXFP4) multiply_step<F, 4>(sum, a, 0, x, true);
            if constexpr (F::FORMAT == INT4) {
#pragma unroll
                for (int half = 0; half < PARTS; half++) {
                    const bool begins = !EXACT || i % GROUP_STEPS == 0;
                    if (begins)
                        scaling.load(layout, rows,
                                     EXACT ? (step * WEIGHT_PANEL_DEPTH + half * F::GROUP) / F::GROUP
                                           : place.slot);
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        if (PARTS == 1 || half == 0)
                            decode_int4<typename F::T>(codes[r].x, scaling.zeros[r], a[r]);
                        if (PARTS == 1 || half == 1)
                            decode_int4<typename F::T>(codes[r].y, scaling.zeros[r], a[r] + 4);
                    }
                    multiply_step<F, 4 / PARTS>(part, a, half * 2, x, !begins);
                    if (!EXACT || (i + 1) % GROUP_STEPS == 0) add_scaled<F>(sum, part, scaling.scale);
                    if (!EXACT) place.advance(WEIGHT_PANEL_DEPTH / PARTS, p.w.group);
                }
            }
        }
    if constexpr (F::FORMAT == E4M3) { // of 128 of k at most
        const float scale[2] = {widened(scale_bits[0], p.w.scale_type),
                                widened(scale_bits[1], p.w.scale_type)};
        add_scaled<F>(sum, part, scale);
    }
}

// Of two weight rows, f32 factors of the finished sums.
template <typename F>
__device__ __forceinline__ void scale_rows(const QuantizedProductParams& p, const ExpertTile& tile,
                                           uint32_t first_panel, float (&sum)[F::SUMS]) {
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const QuantizedMatrixParams& m = matrix_of<F>(p, first_panel + i);
        const uint32_t               panel = panel_of<F>(tile.col, first_panel + i);
        const bool                   is_inside = panel * WEIGHT_PANEL_ROWS < p.product.n;
        const unsigned char* const   at = bytes_at(
            m.scales, tile.expert * m.expert_scales + panel * m.row_scales + threadIdx.x % WARPGROUP / 4 * 4);
        factor[i] = is_inside ? *reinterpret_cast<const float*>(at) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < F::SUMS; i++) sum[i] *= factor[i / 2 % 2];
}

// A block's sums to y: those of four accumulators at a time, for which the code stands here once; the others
// move down.
template <typename F>
__device__ __forceinline__ void store(const QuantizedProductParams& params, const ExpertTile& tile,
                                      uint32_t first_panel, float (&sum)[F::SUMS]) {
    using T = typename F::T;
    const TiledProductParams& p = params.product;
    const uint32_t            row = threadIdx.x % WARPGROUP / 4, first_row = tile.row + threadIdx.x % 4 * 2;
    const uint32_t            cols[2] = {panel_of<F>(tile.col, first_panel) * WEIGHT_PANEL_ROWS + row,
                                         panel_of<F>(tile.col, first_panel + 1) * WEIGHT_PANEL_ROWS + row};
    float                     bias[2] = {};
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (p.epilogue.is_general && cols[i] < p.n)
            bias[i] = bias_of<T>(F::GLU && i == 1 ? p.epilogue.second_bias : p.epilogue.first_bias,
                                 tile.expert, cols[i]);
#pragma unroll 1
    for (uint32_t first = first_row; first < tile.row + F::TOKENS; first += 8) {
#pragma unroll
        for (int i = 0; i < (F::GLU ? 2 : 4); i++) {
            const uint32_t col = cols[i / 2], r = first + i % 2;
            float          value = sum[i] + bias[i / 2], second = F::GLU ? sum[2 + i] + bias[1] : 0.0f;
            if (p.epilogue.is_general)
                value = finished<Fast, F::GLU>(p.epilogue, value, second);
            else if (F::GLU)
                value = silu<Fast>(value) * second;
            if (r >= tile.end || col >= p.n) continue;
            if (params.is_f32)
                static_cast<float*>(p.y)[r * p.y_stride + col] = value;
            else
                static_cast<T*>(p.y)[r * p.y_stride + col] = from_f32<T>(value);
        }
#pragma unroll
        for (int i = 0; i + 4 < F::SUMS; i++) sum[i] = sum[i + 4];
    }
}

// Consumers that share weight rows: the others' sums, in order, to those of the first. Turns alternate
// between two places.
template <typename F>
__device__ __forceinline__ void join(uint32_t shared, uint32_t consumer, uint32_t turn,
                                     float (&sum)[F::SUMS]) {
    static_assert(F::SUMS == 4, "16 bytes of each thread");
    enum : uint32_t { EACH = WARPGROUP * 16 };
    const uint32_t to =
        shared + F::SUMS_AT + turn % 2 * (F::CONSUMERS - 1) * EACH + threadIdx.x % WARPGROUP * 16;
    if (consumer > 0)
        store_shared_16(to + (consumer - 1) * EACH, __float_as_uint(sum[0]), __float_as_uint(sum[1]),
                        __float_as_uint(sum[2]), __float_as_uint(sum[3]));
    barrier_among<1, F::CONSUMERS * WARPGROUP>();
    if (consumer > 0) return;
#pragma unroll
    for (uint32_t i = 0; i + 1 < F::CONSUMERS; i++) {
        const uint4 of_other = load_shared_16(to + i * EACH);
        sum[0] += __uint_as_float(of_other.x), sum[1] += __uint_as_float(of_other.y);
        sum[2] += __uint_as_float(of_other.z), sum[3] += __uint_as_float(of_other.w);
    }
}

// The other warpgroups. An accumulator's row is a column of y, its column a row of y.
template <typename F>
__device__ __forceinline__ void consume(const QuantizedProductParams& params, uint32_t shared,
                                        typename F::Stages ring) {
    const TiledProductParams& p = params.product;
    const uint32_t consumer = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0) - 1, steps = steps_of(p);
    const uint32_t scale_size = params.w.scale_type == TYPE_F32 ? 4 : 2;
    const uint32_t mine =
        F::IS_SPLIT ? consumer * F::PART : 0; // the first of this consumer's steps of a stage
    const uint32_t  all_x = k_major(shared + F::X_AT) + mine * (F::X_BYTES >> 4);
    const Layout<F> layout(params);
    const bool      is_exact = F::FORMAT != INT4 || params.w.group == F::GROUP;
    ExpertTiles     tiles = tiles_of<F>(p);
    ExpertTile      tile;
    uint32_t        turn = 0;
    for (uint32_t index = blockIdx.x; tiles.find(index, tile); index += gridDim.x, turn++) {
        // Zeros, or ptxas 12.4 serialises every wgmma (C7515).
        float         sum[F::BLOCKS][F::SUMS] = {}, part[F::SUMS] = {};
        WeightRows<F> rows[F::BLOCKS];
        uint32_t      first_panel[F::BLOCKS];
#pragma unroll
        for (int i = 0; i < F::BLOCKS; i++) {
            first_panel[i] = F::IS_SPLIT ? 0 : 2 * (consumer * F::BLOCKS + i);
            rows[i].find(params, layout, tile, first_panel[i]);
        }
        Groups groups(params);
        for (uint32_t first = 0; first < steps; first += F::STEPS) {
            const uint32_t stage = shared + ring.stage * F::STAGE_BYTES,
                           x = all_x + ring.stage * (F::STAGE_BYTES >> 4);
            const uint32_t there = steps - first,
                           count = there > mine ? min(there - mine, uint32_t(F::PART)) : 0;
            uint32_t bits[F::BLOCKS][2] = {};
            if (F::FORMAT == E4M3 && count > 0) {
                Place place;
                place.find(groups.into + mine * WEIGHT_PANEL_DEPTH, groups.length);
                const uint32_t group = groups.first + place.slot;
#pragma unroll
                for (int i = 0; i < F::BLOCKS; i++)
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const QuantizedMatrixParams& m = matrix_of<F>(params, j);
                        const unsigned char*         at =
                            bytes_at(m.scales, tile.expert * m.expert_scales + rows[i].scale_rows[j] +
                                                   group * scale_size);
                        bits[i][j] = scale_size == 4 ? *reinterpret_cast<const uint32_t*>(at)
                                                     : *reinterpret_cast<const unsigned short*>(at);
                    }
            }
            ring.wait_full();
            if (p.row_to_slot) fence_proxy_async();
#pragma unroll
            for (int i = 0; i < F::BLOCKS; i++) {
                Place place = {};
                if (count == F::PART && is_exact) {
                    multiply<F, F::PART, true>(params, layout, rows[i], place, stage, x, mine, bits[i],
                                               sum[i], part);
                    continue;
                }
                if (F::FORMAT == INT4) place.find(groups.into + mine * WEIGHT_PANEL_DEPTH, groups.length);
                for (uint32_t step = 0; step < count; step++)
                    multiply<F, 1, false>(params, layout, rows[i], place, stage, x + step * (F::X_BYTES >> 4),
                                          mine + step, bits[i], sum[i], part);
            }
            __syncwarp();
            ring.release();
            ring.advance();
            if (F::FORMAT == E4M3 || !is_exact) groups.advance(F::DEPTH);
        }
        if constexpr (bool(F::IS_SPLIT)) join<F>(shared, consumer, turn, sum[0]);
        if (F::IS_SPLIT && consumer > 0) continue;
#pragma unroll
        for (int i = 0; i < F::BLOCKS; i++) {
            if (F::FORMAT == MXFP4) scale_rows<F>(params, tile, first_panel[i], sum[i]);
            store<F>(params, tile, first_panel[i], sum[i]);
        }
        __syncwarp(); // whole again: descriptors in uniform registers want that
    }
}

template <typename F> __device__ __forceinline__ void product(const QuantizedProductParams& p) {
    extern __shared__ __align__(1024) unsigned char dynamic[];
    const uint32_t                                  shared = shared_address(dynamic);
    const typename F::Stages                        ring{shared + F::BARRIERS_AT};
    if (threadIdx.x == 0) {
        ring.init(p.product.row_to_slot ? 1 + WARPGROUP : 1, F::CONSUMERS * WARPGROUP / 32);
        fence_mbarrier_init();
    }
    if (F::FORMAT == INT4 && threadIdx.x < F::STAGES)
        store_shared_4(shared + threadIdx.x * F::STAGE_BYTES + F::ZEROS_AT + F::PANELS * F::ZERO_BYTES, 8);
    await_previous_launch();
    __syncthreads();
    if (__shfl_sync(~0u, threadIdx.x / WARPGROUP, 0) == 0) {
        registers_dec<F::IS_MANY ? 56 : 64>();
        produce<F>(p, shared, ring);
    } else {
        registers_inc<F::IS_MANY ? 224 : 104>();
        consume<F>(p, shared, ring);
    }
}

// By format, the shortest group, and the rows of a tile.
#define ENTRY(NAME, T, FORMAT, GROUP, GLU, TOKENS)                                                \
    extern "C" __global__ void __launch_bounds__(Form<T, FORMAT, GROUP, GLU, TOKENS>::THREADS, 1) \
        grouped_gemm_##NAME##TOKENS(const __grid_constant__ QuantizedProductParams p) {           \
        product<Form<T, FORMAT, GROUP, GLU, TOKENS>>(p);                                          \
    }
#define ENTRIES(NAME, T, FORMAT, GROUP, GLU)     \
    ENTRY(NAME##_few, T, FORMAT, GROUP, GLU, 8)  \
    ENTRY(NAME##_few, T, FORMAT, GROUP, GLU, 32) \
    ENTRY(NAME##_few, T, FORMAT, GROUP, GLU, 64) \
    ENTRY(NAME##_many, T, FORMAT, GROUP, GLU, 128)
#define PRODUCTS(NAME, T, FORMAT, GROUP)        \
    ENTRIES(nt_##NAME, T, FORMAT, GROUP, false) \
    ENTRIES(glu_nt_##NAME, T, FORMAT, GROUP, true)
PRODUCTS(bf16_int4, bf16, INT4, 128)
PRODUCTS(bf16_int4_64, bf16, INT4, 64)
PRODUCTS(bf16_int4_32, bf16, INT4, 32)
PRODUCTS(bf16_mxfp4, bf16, MXFP4, 32)
PRODUCTS(bf16_e4m3, bf16, E4M3, 128)
