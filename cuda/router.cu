// router: logits[t, e] = x[t, :] . weight[e, :]; choose: the top_k experts of each token and their weights;
// index: slots sorted by expert; route: choose and index at once, for few tokens; count: rows of each expert,
// added up over steps
//
// Contract  src/ops/router.rs has checked shapes, dtypes, groups, E <= 256 for all but choose_wide, and that
//           rows of x and weight begin on 16 bytes.
// Work      logits: a block takes 4 tokens x 8 experts, its warps share D; choose: a warp a token; index,
//           route, count: one block, each warp a range of slots.
// Cost      logits: (T + E) * D * sizeof(T) + 4 * T * E bytes of memory; choose: 4 * T * E + 8 * R; index: 16
//           * R; count: 12 * E. R = T * k.
// Order     every sum's order follows from D, E or k alone; index is a stable counting sort without atomics:
//           same ids, same maps.
#include "common/dtype.cuh"
#include "common/order.cuh"
#include "common/reduce.cuh"
#include "common/ptx/launch.cuh"

// ---- logits

enum : int { LOGITS_WARPS = ROUTER_LOGITS_WARPS, TOKENS = ROUTER_LOGITS_TOKENS, EXPERTS = ROUTER_LOGITS_EXPERTS };
static_assert(TOKENS * EXPERTS == 32, "one sum per lane");

template <typename T> __device__ void logits(const LogitsParams& p) {
    await_previous_launch();
    constexpr int    SIZE = Vec<T>::SIZE;
    __shared__ float partial[LOGITS_WARPS][32];
    const int64_t    expert_tiles = (p.num_experts + EXPERTS - 1) / EXPERTS;
    const int64_t    tiles = (p.num_tokens + TOKENS - 1) / TOKENS * expert_tiles;

    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t first_token = tile / expert_tiles * TOKENS, first_expert = tile % expert_tiles * EXPERTS;
        const T*      x[TOKENS];
        const T*      weight[EXPERTS];
        // Rows beyond the last read the last one again; their sums are not stored.
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
            x[t] = static_cast<const T*>(p.x) + min(first_token + t, p.num_tokens - 1) * p.x_stride;
#pragma unroll
        for (int e = 0; e < EXPERTS; e++)
            weight[e] = static_cast<const T*>(p.weight) + min(first_expert + e, p.num_experts - 1) * p.weight_stride;

        float sum[TOKENS][EXPERTS] = {};
        for (int64_t col = int64_t(threadIdx.x) * SIZE; col < p.d_model; col += LOGITS_WARPS * 32 * SIZE) {
            const int64_t left = p.d_model - col;
            Vec<T>        xs[TOKENS];
#pragma unroll
            for (int t = 0; t < TOKENS; t++) xs[t] = load_first(x[t] + col, left);
#pragma unroll
            for (int e = 0; e < EXPERTS; e++) {
                const Vec<T> w = load_first(weight[e] + col, left);
#pragma unroll
                for (int t = 0; t < TOKENS; t++)
#pragma unroll
                    for (int j = 0; j < SIZE; j++) sum[t][e] += to_f32(xs[t].at[j]) * to_f32(w.at[j]);
            }
        }

        // Lane i keeps the warp's sum i; then warp 0 adds those of all warps.
        float mine = 0.0f;
#pragma unroll
        for (int i = 0; i < 32; i++) {
            const float total = warp_sum(sum[i / EXPERTS][i % EXPERTS]);
            if (lane() == i) mine = total;
        }
        partial[warp()][lane()] = mine;
        __syncthreads();
        const int64_t token = first_token + threadIdx.x / EXPERTS, expert = first_expert + threadIdx.x % EXPERTS;
        if (warp() == 0 && token < p.num_tokens && expert < p.num_experts) {
            float total = partial[0][lane()];
            for (int w = 1; w < LOGITS_WARPS; w++) total += partial[w][lane()];
            p.logits[token * p.logits_stride + expert] = total;
        }
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(LOGITS_WARPS * 32) router_logits_f32(const __grid_constant__ LogitsParams p) { logits<float>(p); }
extern "C" __global__ void __launch_bounds__(LOGITS_WARPS * 32) router_logits_bf16(const __grid_constant__ LogitsParams p) { logits<bf16>(p); }
extern "C" __global__ void __launch_bounds__(LOGITS_WARPS * 32) router_logits_f16(const __grid_constant__ LogitsParams p) { logits<f16>(p); }

// ---- choose

enum : int { EXPERTS_PER_LANE = ROUTER_NARROW_EXPERTS / 32, WIDE_PER_LANE = ROUTER_MAX_EXPERTS / 32, CHOOSE_WARPS = ROUTER_CHOOSE_WARPS };

template <int WARPS> __device__ __forceinline__ void choose(const ChooseParams& p) {
    for (int64_t token = int64_t(blockIdx.x) * WARPS + warp(); token < p.num_tokens; token += int64_t(gridDim.x) * WARPS) {
        const float* logits = p.logits + token * p.logits_stride;
        uint32_t*    ids = p.expert_ids + token * p.top_k;
        float*       weights = p.weights + token * p.top_k;

        uint64_t ranks[EXPERTS_PER_LANE]; // 0 where there is no expert, or one already chosen
#pragma unroll
        for (int j = 0; j < EXPERTS_PER_LANE; j++) {
            const uint32_t expert = j * 32 + lane();
            ranks[j] = expert < p.num_experts ? rank(logits[expert], expert) : 0;
        }

        float largest_logit = 0.0f, sum = 0.0f, largest_weight = 0.0f, norm = 0.0f;
        for (int s = 0; s < p.top_k; s++) {
            uint64_t best = 0;
#pragma unroll
            for (int j = 0; j < EXPERTS_PER_LANE; j++) best = max(best, ranks[j]);
            best = warp_max(best);
#pragma unroll
            for (int j = 0; j < EXPERTS_PER_LANE; j++)
                if (ranks[j] == best) ranks[j] = 0;
            const uint32_t id = index_of(best);

            // Softmax needs the largest logit, which is that of the first choice.
            if (s == 0) {
                largest_logit = logits[id];
                for (uint32_t expert = lane(); expert < p.num_experts; expert += 32) sum += expf(logits[expert] - largest_logit);
                sum = warp_sum(sum);
            }
            const float weight = expf(logits[id] - largest_logit) / sum;
            if (s == 0) largest_weight = weight;
            if (p.norm_p == 1.0f) norm += weight;
            else if (p.norm_p == 2.0f) norm += weight * weight;
            else norm += powf(weight / largest_weight, p.norm_p); // the largest taken out, so that no power underflows to a norm of 0
            if (lane() == s % 32) {
                ids[s] = id;
                weights[s] = weight;
            }
        }

        if (p.normalize) {
            if (p.norm_p == 2.0f) norm = sqrtf(norm);
            else if (p.norm_p != 1.0f) norm = largest_weight * powf(norm, 1.0f / p.norm_p);
            for (int64_t s = lane(); s < p.top_k; s += 32) weights[s] /= norm; // each lane what it wrote
        }
    }
}

// What every form but that for plain softmax does. An order of 0 is below all: no expert, one whose group is
// not open, or one already chosen.

enum : uint32_t { CLOSED = 0 };

__device__ __forceinline__ float biased_logit(const ChooseParams& p, const float* logits, uint32_t expert) {
    return p.logit_bias ? logits[expert] + p.logit_bias[expert] : logits[expert];
}

// `largest` and `sum` are those of the softmax. Of a sparse mixer `z` is the weight already.
__device__ __forceinline__ float score(const ChooseParams& p, float z, float largest, float sum) {
    if (p.score == SCORE_SPARSE_MIXER) return z;
    if (p.score == SCORE_SQRT_SOFTPLUS) return sqrtf(fmaxf(z, 0.0f) + log1pf(expf(-fabsf(z))));
    const bool  is_sigmoid = p.score == SCORE_SIGMOID;
    const float power = expf(is_sigmoid ? -z : z - largest);
    return (is_sigmoid ? 1.0f : power) / (is_sigmoid ? 1.0f + power : sum);
}

// Closes the experts of all but the best groups, the lower group first among equals. Lane i holds those of expert j * 32 + i.
template <int PER_LANE> __device__ __forceinline__ void close_groups(const ChooseParams& p, uint32_t (&orders)[PER_LANE]) {
    const uint32_t size = uint32_t(p.num_experts) / p.num_groups;
    uint32_t       mine = CLOSED; // the order of the group of this lane's number
#pragma unroll 1
    for (uint32_t group = 0; group < p.num_groups; group++) {
        uint32_t best = 0, second = 0;
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) {
            const uint32_t order = j * 32 + lane() - group * size < size ? orders[j] : 0; // what lies before the group wraps
            second = max(second, min(best, order));
            best = max(best, order);
        }
        const uint32_t first = __reduce_max_sync(FULL_WARP, best);
        float          value = value_of(first);
        if (p.two_best) {
            const uint32_t holders = __ballot_sync(FULL_WARP, best == first);
            value += value_of(__reduce_max_sync(FULL_WARP, lane() == __ffs(holders) - 1 ? second : best));
        }
        if (lane() == group) mine = order_of(value);
    }
    uint32_t open = 0;
#pragma unroll 1
    for (uint32_t i = 0; i < p.top_groups; i++) {
        const uint32_t holders = __ballot_sync(FULL_WARP, mine == __reduce_max_sync(FULL_WARP, mine));
        const uint32_t group = __ffs(holders) - 1;
        if (lane() == group) mine = CLOSED;
        open |= 1u << group;
    }
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        const uint32_t group = (j * 32 + lane()) / size;
        if (group >= 32 || (open >> group & 1) == 0) orders[j] = CLOSED;
    }
}

// The best expert that is not closed, the lower index first among equals. Closes it.
template <int PER_LANE> __device__ __forceinline__ uint32_t take_best(uint32_t (&orders)[PER_LANE]) {
    uint32_t best = CLOSED, first = ~0u;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) best = max(best, orders[j]);
    best = __reduce_max_sync(FULL_WARP, best);
#pragma unroll
    for (int j = PER_LANE - 1; j >= 0; j--)
        if (orders[j] == best) first = j * 32 + lane();
    first = __reduce_min_sync(FULL_WARP, first);
#pragma unroll
    for (int j = 0; j < PER_LANE; j++)
        if (j * 32 + lane() == first) orders[j] = CLOSED;
    return first;
}

// The weights of a token. Lane i has written the biased logits of the choices i, i + 32, ... there, of a
// sparse mixer their weights, and reads no others.
__device__ __forceinline__ void weigh(const ChooseParams& p, float* weights, float largest, float sum) {
    if (p.score == SCORE_SOFTMAX_OVER_CHOSEN) {
        largest = -infinity(), sum = 0.0f;
        for (int64_t s = lane(); s < p.top_k; s += 32) largest = fmaxf(largest, weights[s]);
        largest = warp_max(largest);
        for (int64_t s = lane(); s < p.top_k; s += 32) sum += expf(weights[s] - largest);
        sum = warp_sum(sum);
    }
    float total = 0.0f, largest_weight = 0.0f;
    for (int64_t s = lane(); s < p.top_k; s += 32) {
        const float weight = score(p, weights[s], largest, sum);
        weights[s] = weight;
        total += weight;
        largest_weight = fmaxf(largest_weight, weight);
    }
    float norm = 1.0f;
    if (p.normalize) {
        norm = warp_sum(total);
        largest_weight = warp_max(largest_weight);
        if (p.norm_p != 1.0f && largest_weight > 0.0f) {
            // The largest taken out, so that no power under- or overflows.
            float powers = 0.0f;
            for (int64_t s = lane(); s < p.top_k; s += 32) powers += powf(weights[s] / largest_weight, p.norm_p);
            norm = largest_weight * powf(warp_sum(powers), 1.0f / p.norm_p);
        }
        norm += p.epsilon;
    }
    for (int64_t s = lane(); s < p.top_k; s += 32) weights[s] = weights[s] / norm * p.scale;
}

// What a sparse mixer adds up for choice `id` of logit `best`: the exponentials of the experts that are not
// closed and close enough, and of the choice itself, which is closed.
template <int PER_LANE>
__device__ __forceinline__ float competition(const ChooseParams& p, const uint32_t (&orders)[PER_LANE],
                                             uint32_t id, float best) {
    float sum = lane() == id % 32 ? expf(best - best) : 0.0f;
#pragma unroll
    for (int j = 0; j < PER_LANE; j++) {
        const float z = value_of(orders[j]);
        const bool  is_far = (best - z) / fmaxf(fabsf(z), best) > p.reach; // false of NaN
        if (orders[j] != CLOSED && !is_far) sum += expf(z - best);
    }
    return warp_sum(sum);
}

template <int WARPS, int PER_LANE> __device__ __forceinline__ void choose_any(const ChooseParams& p) {
    for (int64_t token = int64_t(blockIdx.x) * WARPS + warp(); token < p.num_tokens; token += int64_t(gridDim.x) * WARPS) {
        const float* logits = p.logits + token * p.logits_stride;
        uint32_t*    ids = p.expert_ids + token * p.top_k;
        float*       weights = p.weights + token * p.top_k;

        float largest = -infinity(), sum = 0.0f;
        if (p.score == SCORE_SOFTMAX) {
            for (uint32_t expert = lane(); expert < p.num_experts; expert += 32) largest = fmaxf(largest, biased_logit(p, logits, expert));
            largest = warp_max(largest);
            for (uint32_t expert = lane(); expert < p.num_experts; expert += 32) sum += expf(biased_logit(p, logits, expert) - largest);
            sum = warp_sum(sum);
        }

        uint32_t orders[PER_LANE];
#pragma unroll
        for (int j = 0; j < PER_LANE; j++) {
            const uint32_t expert = j * 32 + lane();
            orders[j] = CLOSED;
            if (expert < p.num_experts) {
                float key = biased_logit(p, logits, expert);
                if (!p.by_logit && p.score != SCORE_SOFTMAX_OVER_CHOSEN) key = score(p, key, largest, sum);
                if (p.choice_bias) key += p.choice_bias[expert];
                orders[j] = order_of(key);
            }
        }
        if (p.num_groups) close_groups(p, orders);

#pragma unroll 1
        for (int s = 0; s < p.top_k; s++) {
            const uint32_t id = take_best(orders);
            float          weight = biased_logit(p, logits, id);
            if (p.score == SCORE_SPARSE_MIXER) weight = 1.0f / competition(p, orders, id, weight);
            if (lane() == s % 32) {
                ids[s] = id;
                weights[s] = weight;
            }
        }
        weigh(p, weights, largest, sum);
    }
}

extern "C" __global__ void __launch_bounds__(CHOOSE_WARPS * 32) router_choose(const __grid_constant__ ChooseParams p) { await_previous_launch(); choose<CHOOSE_WARPS>(p); }
extern "C" __global__ void __launch_bounds__(CHOOSE_WARPS * 32) router_choose_any(const __grid_constant__ ChooseParams p) { await_previous_launch(); choose_any<CHOOSE_WARPS, EXPERTS_PER_LANE>(p); }
extern "C" __global__ void __launch_bounds__(CHOOSE_WARPS * 32) router_choose_wide(const __grid_constant__ ChooseParams p) { await_previous_launch(); choose_any<CHOOSE_WARPS, WIDE_PER_LANE>(p); }

// ---- index

enum : int { INDEX_WARPS = ROUTER_INDEX_WARPS, COUNTERS = INDEX_WARPS * ROUTER_NARROW_EXPERTS };

__device__ __forceinline__ void index(const IndexParams& p) {
    __shared__ uint32_t next[COUNTERS]; // of a warp and an expert: first how many slots there are, then the next row that is given out
    __shared__ uint32_t count[ROUTER_MAX_EXPERTS];
    const uint32_t      num_experts = uint32_t(p.num_experts), rows = uint32_t(p.rows);
    const uint32_t      warps = min(uint32_t(INDEX_WARPS), COUNTERS / num_experts);  // as many as have counters; the others have no slots
    const uint32_t      share = ((rows + warps - 1) / warps + 31) / 32 * 32;         // slots of a warp
    const uint32_t      begin = min(rows, warp() * share), end = warp() < warps ? min(rows, begin + share) : begin;
    const uint32_t      lanes_before = (1u << lane()) - 1;
    uint32_t* const     mine = next + (warp() < warps ? warp() * num_experts : 0);

    if (warp() < warps)
        for (uint32_t e = lane(); e < num_experts; e += 32) mine[e] = 0;
    __syncwarp();
    for (uint32_t base = begin; base < end; base += 32) {
        const bool     inside = base + lane() < end;
        const uint32_t id = inside ? p.expert_ids[base + lane()] : ~0u;
        const uint32_t alike = __match_any_sync(FULL_WARP, id); // lanes with the same expert; the first of them counts
        if (id < num_experts && (alike & lanes_before) == 0) mine[id] += __popc(alike);
        __syncwarp();
    }
    __syncthreads();

    for (uint32_t e = threadIdx.x; e < num_experts; e += blockDim.x) {
        uint32_t rows_before = 0;
        for (uint32_t w = 0; w < warps; w++) {
            const uint32_t of_warp = next[w * num_experts + e];
            next[w * num_experts + e] = rows_before;
            rows_before += of_warp;
        }
        count[e] = rows_before;
    }
    __syncthreads();

    // Each expert's first row: an exclusive prefix sum over counts, 32 at a time.
    if (warp() == 0) {
        uint32_t rows_before = 0;
        for (uint32_t base = 0; base < num_experts; base += 32) {
            const uint32_t e = base + lane(), of_expert = e < num_experts ? count[e] : 0;
            const uint32_t upto = warp_sum_upto(of_expert);
            if (e < num_experts) p.offsets[e] = count[e] = rows_before + upto - of_expert;
            rows_before += __shfl_sync(FULL_WARP, upto, 31);
        }
        if (lane() == 0) p.offsets[num_experts] = rows_before;
    }
    __syncthreads();

    for (uint32_t base = begin; base < end; base += 32) {
        const uint32_t slot = base + lane();
        const bool     inside = slot < end;
        const uint32_t id = inside ? p.expert_ids[slot] : ~0u;
        const uint32_t alike = __match_any_sync(FULL_WARP, id);
        if (id < num_experts) {
            const uint32_t row = count[id] + mine[id] + __popc(alike & lanes_before);
            p.row_to_slot[row] = slot;
            p.slot_to_row[slot] = row;
        } else if (inside) p.slot_to_row[slot] = NOWHERE;
        __syncwarp();
        if (id < num_experts && (alike & lanes_before) == 0) mine[id] += __popc(alike);
        __syncwarp();
    }
}

extern "C" __global__ void __launch_bounds__(INDEX_WARPS * 32) router_index(const __grid_constant__ IndexParams p) { await_previous_launch(); index(p); }

// Of a token's ids the first of each counts: a second one would let an expert own more rows than there are tokens.
extern "C" __global__ void __launch_bounds__(INDEX_WARPS * 32) router_given(const __grid_constant__ GivenParams p) {
    await_previous_launch();
    for (int64_t slot = threadIdx.x; slot < p.index.rows; slot += blockDim.x) {
        const int64_t   token = slot / p.top_k, choice = slot % p.top_k;
        const uint32_t* ids = p.ids + token * p.ids_stride;
        const uint32_t  id = ids[choice] - p.first_expert; // wraps to beyond num_experts below the first
        bool            here = id < p.index.num_experts;
        for (int64_t before = 0; here && before < choice; before++) here = ids[before] != ids[choice];
        p.out_ids[slot] = here ? id : NOWHERE;
        p.out_weights[slot] = p.weights[token * p.weights_stride + choice];
    }
    __syncthreads(); // every id is written
    index(p.index);
}

extern "C" __global__ void __launch_bounds__(INDEX_WARPS * 32) router_route(const __grid_constant__ RouteParams p) {
    await_previous_launch();
    choose<INDEX_WARPS>(p.choose);
    __syncthreads(); // every id is written
    index(p.index);
}

extern "C" __global__ void __launch_bounds__(INDEX_WARPS * 32) router_route_any(const __grid_constant__ RouteParams p) {
    await_previous_launch();
    choose_any<INDEX_WARPS, EXPERTS_PER_LANE>(p.choose);
    __syncthreads(); // every id is written
    index(p.index);
}

// ---- count

extern "C" __global__ void __launch_bounds__(INDEX_WARPS * 32)
    router_count(const __grid_constant__ CountParams p) {
    await_previous_launch();
    for (int64_t e = threadIdx.x; e < p.num_experts; e += blockDim.x)
        p.counts[e] += p.offsets[e + 1] - p.offsets[e];
}
