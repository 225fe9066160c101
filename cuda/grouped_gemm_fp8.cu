// grouped_gemm of e4m3: y[r, n] = sum_b x_scale[b, r] * w_scale[e, n, b] * (x[r, b] * w[e, n, b]), b
// being 128 of k; glu_nt: silu(x w^T) * (x v^T)
//
// Contract  src/ops/grouped_gemm/cuda/fp8.rs takes this form for codes of e4m3 where K is a multiple of 16, N
//           of 8, rows begin on 16 bytes and 128 outputs share their scales, or each output has one. Offsets
//           come from a Routing, or from a caller who vouches for them.
// Work      a block per SM, in pairs that take the tiles of cuda/grouped_gemm.cu: 128 rows of one expert by
//           256 columns, for glu_nt by 128 of each product. Warp 0 loads stages of 128 of k, with their rows'
//           scales, by TMA; warp 1 the two scales of the stage's weights. Warpgroups 1 and 2 multiply 64 rows
//           each, 128 columns at a time: four wgmma give a partial sum, which is multiplied by its scales and
//           added to the sum in f32. While one adds, the tensor core works for the other.
// Cost      2 * R * N * K FLOP (twice that for glu_nt) on the tensor cores, at twice the rate of bf16; R * N
//           * K / 128 additions of partial sums. Bytes of a stage are those of 64 of k in 16 bits.
// Order     per element one chain over the blocks of k, each added with its scale by one fused f32 operation;
//           rounded once, without a split. A row's bits depend on that row and the weights alone. Inside a
//           block the tensor core keeps about 14 bits.
#include "common/dtype.cuh"
#include "common/paired_product.cuh"
#include "common/ptx/launch.cuh"
#include "common/ptx/tma.cuh"

// Of weights: two products, or two halves of the columns, with a scale for each stage.
enum : int { PARTS = 2, PART = TILED_COLS / PARTS };
enum : int { OUT_COLS = 64, OUT_BYTES = Form<bf16, bf16, false, false, OUT_COLS>::OUT_BYTES };
// Of a stage. A copy begins on 16 bytes of a row, a tile on any row: up to three of the rows before it come
// along.
enum : int { X_SCALES_BYTES = 4 * FP8_SCALE_ROWS, SCALES_BYTES = 640 };
static_assert(FP8_SCALE_ROWS == ROWS + 4 && X_SCALES_BYTES + 8 <= SCALES_BYTES, "params.h");
enum : int {
    OUT_AT = STAGES * STAGE_BYTES,
    SCALES_AT = OUT_AT + 4 * CONSUMERS * OUT_BYTES,
    BARRIERS_AT = SCALES_AT + STAGES * SCALES_BYTES,
    NUMBERS_AT = BARRIERS_AT + Stages::BYTES,
    SHARED_BYTES = NUMBERS_AT + NUMBERS_BYTES
};
static_assert(SHARED_BYTES <= FP8_SHARED_BYTES && FP8_DEPTH == PITCH && PART == 128, "params.h");
static_assert(SCALES_AT % 128 == 0 && SCALES_BYTES % 128 == 0, "where copies begin");
// Every thread's share of 65536: 128 * PRODUCER + 256 * CONSUMER.
enum : int { FP8_PRODUCER_REGISTERS = 40, FP8_CONSUMER_REGISTERS = 232 };

// Of a tile.
__device__ __forceinline__ uint32_t stages_of(const Fp8ProductParams& p) {
    return (uint32_t(p.product.k) + FP8_DEPTH - 1) / FP8_DEPTH;
}

// Where the scale of an output and the first of k lies.
__device__ __forceinline__ int64_t scale_at(const WeightScaleParams& p, uint32_t expert, uint32_t col) {
    return expert * p.expert_stride + (p.first + col * p.step) / p.block_rows * p.row_stride;
}
__device__ __forceinline__ float load_scale(const WeightScaleParams& p, int64_t at) {
    if (p.kind == TYPE_F32) return static_cast<const float*>(p.at)[at];
    if (p.kind == TYPE_BF16) return to_f32(static_cast<const bf16*>(p.at)[at]);
    return to_f32(static_cast<const f16*>(p.at)[at]);
}

// Factors of finished sums: scales of single outputs.
struct OutputScales {
    const Fp8ProductParams& p;
    __device__ __forceinline__ float of(int product, uint32_t expert, uint32_t col) const {
        const WeightScaleParams& scales = product == 0 ? p.w_scales : p.v_scales;
        return scales.block_rows == 1 ? load_scale(scales, scale_at(scales, expert, col)) : 1.0f;
    }
};

// Lane 0 of warp 0: rows, their scales and weights.
template <typename F>
__device__ __forceinline__ void produce(const Fp8ProductParams& p, uint32_t shared, Stages ring) {
    const TiledProductParams& product = p.product;
    prefetch_tensor_map(product.x_map);
    prefetch_tensor_map(p.x_scales);
    prefetch_tensor_map(product.w);
    if (F::GLU) prefetch_tensor_map(product.v);
    const uint32_t  stages = stages_of(p);
    Tiles<F, false> tiles(product, shared + NUMBERS_AT);
    for (PairTile tile; tiles.next(tile);) {
        const uint32_t counted = tiles.count();
        for (uint32_t i = 0; i < stages; i++) {
            const uint32_t x = shared + ring.stage * STAGE_BYTES;
            const uint32_t scales = shared + SCALES_AT + ring.stage * SCALES_BYTES;
            ring.wait_empty();
            mbarrier_arrive_expect(ring.full(), STAGE_BYTES + X_SCALES_BYTES); // boxes count in full
            load_weights<F>(product, x + X_BYTES, i * FP8_DEPTH, tile, tiles.rank, ring.full());
            // Other experts' rows, too: they are not stored.
            tma_load_2d(x, product.x_map, i * FP8_DEPTH, tile.row, ring.full());
            tma_load_2d(scales, p.x_scales, tile.row / 4 * 4, i, ring.full());
            // Late enough for the count to be there, early enough for consumers not to wait.
            if (i == min(uint32_t(STAGES), stages - 1)) tiles.send(counted);
            ring.advance();
        }
    }
    tiles.finish();
}

// Warp 1: of each stage a scale for either part of the weights, by a lane each. It is asked for one stage
// ahead.
template <typename F>
__device__ __forceinline__ void produce_scales(const Fp8ProductParams& p, uint32_t shared, Stages ring) {
    const uint32_t           lane = threadIdx.x % 32, stages = stages_of(p);
    const WeightScaleParams& scales = F::GLU && lane == 1 ? p.v_scales : p.w_scales;
    const bool               by_output = scales.block_rows == 1;
    Tiles<F, true>           tiles(p.product, shared + NUMBERS_AT);
    for (PairTile tile; tiles.next(tile);) {
        const uint32_t col = tile.col + (F::GLU ? 0 : lane * PART);
        const bool     is_loaded = lane < PARTS && col < p.product.n && !by_output;
        const int64_t  from = is_loaded ? scale_at(scales, tile.expert, col) : 0;
        float          scale = is_loaded ? load_scale(scales, from) : 1.0f;
        for (uint32_t i = 0; i < stages; i++) {
            ring.wait_empty();
            if (lane < PARTS) {
                const uint32_t of_stage = shared + SCALES_AT + ring.stage * SCALES_BYTES;
                store_shared_4(of_stage + X_SCALES_BYTES + 4 * lane, __float_as_uint(scale));
                mbarrier_arrive(ring.full());
            }
            if (is_loaded && i + 1 < stages) scale = load_scale(scales, from + (i + 1) / scales.k_blocks);
            ring.advance();
        }
    }
}

// The product of a stage's rows and 128 of its columns, done when this returns.
__device__ __forceinline__ void multiply_part(float (&partial)[PART / 2], uint32_t a, uint32_t b) {
    pin(partial);
    wgmma_fence();
#pragma unroll
    for (uint32_t step = 0; step < FP8_DEPTH / 32; step++)
        wgmma_e4m3(partial, a + step * K_MAJOR_STEP, b + step * K_MAJOR_STEP, step > 0);
    wgmma_commit();
    pin(partial);
    wgmma_wait<0>();
    pin(partial);
}

// Adds it to the sums: rows alternate by two columns.
__device__ __forceinline__ void add_scaled(float* sum, const float (&partial)[PART / 2], float even,
                                           float odd) {
#pragma unroll
    for (int i = 0; i < PART / 2; i++) sum[i] += (i / 2 % 2 ? odd : even) * partial[i];
}

// One consumer's products over all of k. `x_scales` is where the scale of this thread's first row lies in the
// first stage, that of its second row eight on; `w_scales` where those of the weights lie.
__device__ __forceinline__ void multiply(uint32_t stages, uint32_t a, uint32_t b, uint32_t x_scales,
                                         uint32_t w_scales, Stages& ring, float (&sum)[TILED_COLS / 2]) {
    float partial[PART / 2] = {};
    for (uint32_t left = stages; left > 0; left--) {
        const uint32_t stage = ring.stage * (STAGE_BYTES >> 4), scales = ring.stage * SCALES_BYTES;
        ring.wait_full();
        const float even = load_shared_float(x_scales + scales);
        const float odd = load_shared_float(x_scales + scales + 8 * 4);
        const float first = load_shared_float(w_scales + scales);
        const float second = load_shared_float(w_scales + scales + 4);
        multiply_part(partial, a + stage, b + stage);
        add_scaled(sum, partial, even * first, odd * first);
        multiply_part(partial, a + stage, b + stage + (PART * PITCH >> 4));
        __syncwarp(); // all lanes have read their scales
        ring.release();
        ring.advance();
        add_scaled(sum + PART / 2, partial, even * second, odd * second);
    }
}

// Warpgroups 1 and 2.
template <typename F>
__device__ __forceinline__ void consume(const Fp8ProductParams& p, uint32_t shared, Stages ring) {
    const uint32_t warp = consumer_warp(), down = warp / 4 * HALF, stages = stages_of(p);
    const uint32_t a = k_major(shared + down * PITCH), b = k_major(shared + X_BYTES);
    const uint32_t x_scales = shared + SCALES_AT + (warp * 16 + threadIdx.x % 32 / 4) * 4;
    Tiles<F, true> tiles(p.product, shared + NUMBERS_AT);
    for (PairTile tile; tiles.next(tile);) {
        if (tile.row + down >= tile.end || tile.col >= p.product.n) {
            skip(stages, ring);
            continue;
        }
        float sum[TILED_COLS / 2] = {};
        multiply(stages, a, b, x_scales + tile.row % 4 * 4, shared + SCALES_AT + X_SCALES_BYTES, ring, sum);
        const uint32_t slab = shared + OUT_AT + warp * OUT_BYTES;
        store_tile<F>(p.product, OutputScales{p}, slab, tile, tile.row + warp * 16, sum);
    }
}

template <typename F> __device__ __forceinline__ void product(const Fp8ProductParams& p) {
    extern __shared__ __align__(1024) unsigned char dynamic[];
    const uint32_t shared = shared_address(dynamic);
    const Stages   ring{shared + BARRIERS_AT};
    if (threadIdx.x == 0) {
        ring.init(1 + PARTS, CONSUMERS * WARPGROUP / 32 * CLUSTER);
        Tiles<F, true>::init(shared + NUMBERS_AT);
        fence_mbarrier_init();
    }
    await_previous_launch();
    cluster_sync();
    if (is_producer()) {
        registers_dec<FP8_PRODUCER_REGISTERS>();
        const uint32_t warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
        if (threadIdx.x == 0) produce<F>(p, shared, ring);
        else if (warp == 1) produce_scales<F>(p, shared, ring);
    } else {
        registers_inc<FP8_CONSUMER_REGISTERS>();
        consume<F>(p, shared, ring);
    }
    __syncwarp();
    cluster_sync(); // others still arrive at this block's barriers
}

#define ENTRY(NAME, T, O, GLU)                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) grouped_gemm_##NAME##_256x2(                   \
        const __grid_constant__ Fp8ProductParams p) {                                                       \
        product<Form<T, O, false, GLU, OUT_COLS>>(p);                                                       \
    }
ENTRY(nt_e4m3_to_bf16, bf16, bf16, false)
ENTRY(nt_e4m3_to_f16, f16, f16, false)
ENTRY(nt_e4m3_to_f32, float, float, false)
ENTRY(glu_nt_e4m3_to_bf16, bf16, bf16, true)
ENTRY(glu_nt_e4m3_to_f16, f16, f16, true)
ENTRY(glu_nt_e4m3_to_f32, float, float, true)
