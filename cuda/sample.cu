// sample: ids[t] = the v with the largest logits[t, v]; top_p: one of those with the largest, at random
//
// Contract  src/ops/sample.rs has checked shapes, V < 2^32, and that every row begins on 16 bytes.
// Work      one block a row, grid-stride over rows; a thread reads every 16-byte vector of its own, the last
//           cut to its elements. top_p: the largest; three digits of the threshold; each warp a piece of the
//           row; one warp its piece again.
// Cost      argmax is memory bound: 4 * T * V bytes. top_p reads a row five times, twice without a threshold,
//           mostly from the L2 cache.
// Order     argmax: a maximum over (value, index) ranks, which no order of work can change: the lowest index
//           among equals. top_p: sums of integers, which no order of work can change either.
#include "common/dtype.cuh"
#include "common/order.cuh"
#include "common/reduce.cuh"
#include "common/splitmix.cuh"
#include "common/ptx/launch.cuh"

extern "C" __global__ void __launch_bounds__(1024) sample_argmax(const __grid_constant__ ArgmaxParams p) {
    await_previous_launch();
    __shared__ uint64_t best_of_warp[32];
    for (int64_t token = blockIdx.x; token < p.num_tokens; token += gridDim.x) {
        const float* logits = p.logits + token * p.logits_stride;
        uint64_t     best = 0;
        for (int64_t col = int64_t(threadIdx.x) * 4; col < p.vocab; col += blockDim.x * 4) {
            const Vec<float> v = load_first(logits + col, p.vocab - col);
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (col + j < p.vocab) best = max(best, rank(v.at[j], uint32_t(col + j)));
        }
        best = warp_max(best);
        if (lane() == 0) best_of_warp[warp()] = best;
        __syncthreads();
        best = warp_max(lane() < blockDim.x / 32 ? best_of_warp[lane()] : uint64_t(0));
        if (threadIdx.x == 0) p.ids[token] = index_of(best);
        __syncthreads();
    }
}

// ---- top_p

// Bins of a digit of a logit's order; of the fraction of an exponent.
enum : int { BINS = 2048, GROUPS = BINS / 32, FRACTION_BITS = 25 };
static_assert(GROUPS == 64, "two for each lane");

struct Scratch {
    uint32_t low[BINS], high[BINS]; // halves of sums: a shared-memory addition of 64 bits would be a loop
    uint64_t of_group[GROUPS];      // sums of 32 bins
    uint64_t of_warp[32];
    uint32_t ties_of_warp[32];
    float    largest_of_warp[32];
};

struct Row {
    const float* logits;
    float        largest;
};

// Those whose order is above the threshold, and the first `ties` of those at it, which weigh `weight` each.
struct Candidates {
    uint32_t threshold, ties;
    uint64_t weight;
};

// f(z) for this thread's elements of the row.
template <typename F> __device__ __forceinline__ void each(const TopPParams& p, const float* logits, F f) {
    for (int64_t col = int64_t(threadIdx.x) * 4; col < p.vocab; col += blockDim.x * 4) {
        const Vec<float> v = load_first(logits + col, p.vocab - col);
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (col + j < p.vocab) f(v.at[j]);
    }
}

// 2^(62 - spare_bits - (largest - z) * per_unit), cut to an integer; 0 of NaN. The same steps as on the CPU.
__device__ __forceinline__ uint64_t weight(const TopPParams& p, const Row& row, float z) {
    // Equal infinities have a difference of NaN.
    const float halvings = z == row.largest ? 0.0f : (row.largest - z) * p.per_unit;
    if (!(halvings < 64.0f)) return 0;
    const uint32_t fixed = uint32_t(int32_t(halvings * float(1 << FRACTION_BITS)));
    const uint32_t fraction = fixed << (32 - FRACTION_BITS);
    uint32_t       power = 234126u; // 2^(31 - fraction), from the highest coefficient down
    power = 2737501u - __umulhi(fraction, power);
    power = 20571132u - __umulhi(fraction, power);
    power = 119165493u - __umulhi(fraction, power);
    power = 515877902u - __umulhi(fraction, power);
    power = 1488521986u - __umulhi(fraction, power);
    power = (1u << 31) - __umulhi(fraction, power);
    return uint64_t(power) << 31 >> min(p.spare_bits + (fixed >> FRACTION_BITS), 63u);
}

// The largest element, NaN left out; -inf if there is nothing else.
__device__ __forceinline__ float block_largest(const TopPParams& p, Scratch& scratch, const float* logits) {
    float largest = -infinity();
    each(p, logits, [&](float z) { largest = fmaxf(largest, z); });
    largest = warp_max(largest);
    if (lane() == 0) scratch.largest_of_warp[warp()] = largest;
    __syncthreads();
    return warp_max(lane() < blockDim.x / 32 ? scratch.largest_of_warp[lane()] : -infinity());
}

// Sums in each bin the weights of logits whose order has this digit at `shift`, and `prefix` from bit `known`
// on. Leaves the sums of groups, too.
__device__ __forceinline__ void count(const TopPParams& p, Scratch& scratch, const Row& row, uint32_t shift,
                                      uint32_t known, uint32_t prefix) {
    for (uint32_t bin = threadIdx.x; bin < BINS; bin += blockDim.x) scratch.low[bin] = scratch.high[bin] = 0;
    __syncthreads();
    each(p, row.logits, [&](float z) {
        const uint32_t order = order_of(z);
        if (known < 32 && order >> known != prefix) return;
        const uint64_t mine = weight(p, row, z);
        if (mine == 0) return;
        const uint32_t bin = order >> shift & (BINS - 1), low = uint32_t(mine);
        const uint32_t before = atomicAdd(&scratch.low[bin], low);
        const uint32_t high = uint32_t(mine >> 32) + (before > ~low); // with the carry
        if (high != 0) atomicAdd(&scratch.high[bin], high);
    });
    __syncthreads();
    for (uint32_t group = warp(); group < GROUPS; group += blockDim.x / 32) {
        const uint32_t bin = group * 32 + lane();
        const uint64_t sum = warp_sum(uint64_t(scratch.high[bin]) << 32 | scratch.low[bin]);
        if (lane() == 0) scratch.of_group[group] = sum;
    }
    __syncthreads();
}

// The first lane at which the sum over lanes, on top of `above`, reaches `goal`; 32 where none does. Adds the
// lanes before it to `above`.
__device__ __forceinline__ uint32_t reaches(uint64_t mine, uint64_t goal, uint64_t& above) {
    const uint64_t upto = warp_sum_upto(static_cast<unsigned long long>(mine));
    const uint32_t reached = __ballot_sync(FULL_WARP, above + upto >= goal);
    const uint32_t first = reached ? __ffs(reached) - 1 : 32;
    const auto     before = static_cast<unsigned long long>(reached ? upto - mine : upto);
    above += __shfl_sync(FULL_WARP, before, min(first, 31u));
    return first;
}

// The bin at which the sum from the largest digit downwards reaches `goal`, the same in every thread.
__device__ __forceinline__ uint32_t crossed(const Scratch& scratch, uint64_t goal, uint64_t& above) {
    uint32_t group = GROUPS - 1 - reaches(scratch.of_group[GROUPS - 1 - lane()], goal, above);
    if (group == GROUPS - 1 - 32) group -= reaches(scratch.of_group[31 - lane()], goal, above);
    const uint32_t bin = group * 32 + 31 - lane();
    return group * 32 + 31 - reaches(uint64_t(scratch.high[bin]) << 32 | scratch.low[bin], goal, above);
}

// The fewest tokens of the largest logits whose weights reach their share of all; of no weight at all, any.
__device__ __forceinline__ Candidates candidates(const TopPParams& p, Scratch& scratch, const Row& row) {
    count(p, scratch, row, 21, 32, 0);
    const uint64_t all = warp_sum(scratch.of_group[lane()] + scratch.of_group[lane() + 32]);
    const uint64_t goal = __umul64hi(all, p.share) + (all * p.share != 0);
    Candidates     those = {0, 0, 0};
    if (all == 0) return those;
    uint64_t       above = 0;
    const uint32_t first = crossed(scratch, goal, above);
    __syncthreads(); // every warp has read the bins
    count(p, scratch, row, 10, 21, first);
    const uint32_t second = crossed(scratch, goal, above);
    __syncthreads();
    count(p, scratch, row, 0, 10, first << 11 | second);
    const uint32_t third = crossed(scratch, goal, above); // its highest bit is the second one's lowest
    those.threshold = first << 21 | second << 10 | third;
    those.weight = weight(p, row, value_of(those.threshold));
    those.ties = uint32_t((goal - above - 1) / those.weight + 1);
    return those;
}

// What a thread holds of four elements: the weight of those above the threshold, and how many are at it.
struct Four {
    uint64_t weight;
    uint32_t ties;
};

// Of the first `left` of the four.
__device__ __forceinline__ Four four(const TopPParams& p, const Row& row, const Candidates& those,
                                     const Vec<float>& v, int64_t left) {
    Four sums = {0, 0};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const uint32_t order = order_of(v.at[j]);
        if (j < left && order > those.threshold) sums.weight += weight(p, row, v.at[j]);
        if (j < left && order == those.threshold) sums.ties++;
    }
    return sums;
}

// Ties that are candidates, of `mine` behind `before` of them.
__device__ __forceinline__ uint32_t kept(const Candidates& those, uint32_t before, uint32_t mine) {
    return min(mine, those.ties - min(before, those.ties));
}

// Writes the first index at which the sum of candidates' weights passes the random share of all.
__device__ __forceinline__ void draw(const TopPParams& p, Scratch& scratch, const Row& row,
                                     const Candidates& those, int64_t token) {
    constexpr int  STEP = 32 * 4;
    const int64_t  warps = blockDim.x / 32, share = (p.vocab + warps * STEP - 1) / (warps * STEP) * STEP;
    const int64_t  begin = warp() * share, end = min(p.vocab, begin + share);
    const uint64_t random = word(p.state, uint64_t(p.sequences[token]) << 32 | p.steps[token]);

    Four mine = {0, 0};
    for (int64_t col = begin + lane() * 4; col < end; col += STEP) {
        const Four sums = four(p, row, those, load_first(row.logits + col, end - col), end - col);
        mine.weight += sums.weight;
        mine.ties += sums.ties;
    }
    mine.weight = warp_sum(mine.weight);
    mine.ties = __reduce_add_sync(FULL_WARP, mine.ties);
    if (lane() == 0) {
        scratch.of_warp[warp()] = mine.weight;
        scratch.ties_of_warp[warp()] = mine.ties;
    }
    __syncthreads();

    // Every warp finds out whose piece it is.
    const bool     is_warp = lane() < warps;
    const uint32_t ties = is_warp ? scratch.ties_of_warp[lane()] : 0, ties_upto = warp_sum_upto(ties);
    uint64_t       piece = is_warp ? scratch.of_warp[lane()] : 0;
    piece += kept(those, ties_upto - ties, ties) * those.weight;
    const uint64_t goal = __umul64hi(random, warp_sum(piece)) + 1;
    uint64_t       above = 0;
    const uint32_t chosen = reaches(piece, goal, above);
    if (chosen == 32 && threadIdx.x == 0) p.ids[token] = 0; // no weight at all
    if (chosen != warp()) return;

    uint32_t ties_before = __shfl_sync(FULL_WARP, ties_upto - ties, chosen);
    for (int64_t first = begin; first < end; first += STEP) {
        const int64_t    col = first + lane() * 4;
        const Vec<float> v = load_first(row.logits + col, end - col);
        const Four       sums = four(p, row, those, v, end - col);
        const uint32_t   upto = warp_sum_upto(sums.ties);
        uint32_t         before = ties_before + upto - sums.ties;
        const uint64_t   of_lane = sums.weight + kept(those, before, sums.ties) * those.weight;
        const uint32_t   found = reaches(of_lane, goal, above);
        if (found == lane()) {
            bool is_found = false;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const uint32_t order = order_of(v.at[j]);
                if (col + j >= end || is_found) continue;
                if (order > those.threshold) above += weight(p, row, v.at[j]);
                if (order == those.threshold) above += kept(those, before++, 1) * those.weight;
                is_found = above >= goal;
                if (is_found) p.ids[token] = uint32_t(col + j);
            }
        }
        if (found < 32) return;
        ties_before += __shfl_sync(FULL_WARP, upto, 31);
    }
}

extern "C" __global__ void __launch_bounds__(1024) sample_top_p(const __grid_constant__ TopPParams p) {
    await_previous_launch();
    __shared__ Scratch scratch;
    for (int64_t token = blockIdx.x; token < p.num_tokens; token += gridDim.x) {
        const float*     logits = p.logits + token * p.logits_stride;
        const Row        row = {logits, block_largest(p, scratch, logits)};
        const Candidates those = p.share == 0 ? Candidates{0, 0, 0} : candidates(p, scratch, row);
        draw(p, scratch, row, those, token);
        __syncthreads();
    }
}
