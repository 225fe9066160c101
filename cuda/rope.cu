// rope: norm of q and k, where there is one; q, k, v limited to [-clip, clip]; q and k rotated by their
// position; q written to its matrix, k and v to the cache
//
// Contract  src/ops/rope.rs has checked shapes, table and positions, rope/cuda.rs that vectors are whole and
//           aligned in every matrix, pool and weight, or chose the entry of single elements. With a norm the
//           rotated elements of a head come first and the others lie behind them.
// Work      a block a token, grid-stride over tokens. With a norm the block first adds up squares: of each
//           head by some lanes of a warp, or of all heads by all threads. Then a thread takes two vectors of
//           a head, whose elements are pairs, or one of the rest, or two of a value.
// Cost      memory bound: 2 * T * (H d + Hkv (d + dv)) * sizeof(T) bytes, and 4 * T * rotary_dim for the
//           table; with a norm q and k are read twice, the second time from the L1 cache.
// Order     elementwise in pairs, in f32, each element rounded once. Squares: 16 bytes of elements in order,
//           a lane's chunks in order, then a tree. Which lane takes what follows from d, H and Hkv, and is
//           the same in both forms.
#include "common/dtype.cuh"
#include "common/pages.cuh"
#include "common/ptx/launch.cuh"
#include "common/reduce.cuh"

// Heads of which a block keeps the norms at a time.
enum : uint32_t { HEADS_AT_A_TIME = 256 };

__device__ __forceinline__ float limited(float x, float clip) {
    return x > clip ? clip : x < -clip ? -clip : x; // NaN passes
}

template <typename T>
__device__ __forceinline__ const T* part_of(const HeadsParams& heads, int64_t token, int64_t kv_head) {
    return static_cast<const T*>(heads.first) + token * heads.token_stride + kv_head * heads.head_stride;
}

// Of a head before the rotation, the elements that are rotated, and the others.
template <typename T> struct Head {
    const T* rotated;
    const T* rest;
};

// Heads are counted from the first query on; behind the queries come the keys.
template <typename T>
__device__ __forceinline__ Head<T> head_of(const RopeParams& p, int64_t token, uint32_t head) {
    const uint32_t queries = uint32_t(p.num_heads), group = uint32_t(p.group);
    if (head < queries) {
        const T* first = part_of<T>(p.queries, token, head / group) + head % group * p.head_dim;
        return {first + p.rotated_at, first + p.rest_at};
    }
    return {part_of<T>(p.rotated, token, head - queries), part_of<T>(p.rest, token, head - queries)};
}

// The squares of 16 bytes of elements, fewer at the end of a head.
template <typename T, int N> __device__ __forceinline__ float squares(const T* x, int64_t left) {
    enum : int { CHUNK = 16 / sizeof(T) };
    float sum = 0.0f;
    if (N == CHUNK) {
        const Vec<T, N> all = load_n<N>(x);
#pragma unroll
        for (int n = 0; n < N; n++) sum = fmaf(to_f32(all.at[n]), to_f32(all.at[n]), sum);
    } else {
        for (int n = 0; n < CHUNK && n < left; n++) sum = fmaf(to_f32(x[n]), to_f32(x[n]), sum);
    }
    return sum;
}

__device__ __forceinline__ float inverse_root(float squares, int64_t count, float eps) {
    return 1.0f / sqrtf(squares / float(count) + eps);
}

// Writes 1 / rms of `count` heads, from `first` on.
template <typename T, int N>
__device__ void norms_of_heads(const RopeParams& p, int64_t token, uint32_t first, uint32_t count,
                               float* inverse) {
    const uint32_t chunk = 16 / sizeof(T), lane = threadIdx.x % p.lanes;
    const uint32_t at_a_time = blockDim.x / p.lanes, mine = threadIdx.x / p.lanes;
    for (uint32_t begin = 0; begin < count; begin += at_a_time) {
        const uint32_t at = begin + mine;
        float          sum = 0.0f;
        if (at < count) {
            const T* x = head_of<T>(p, token, first + at).rotated;
            for (int64_t j = lane * chunk; j < p.head_dim; j += p.lanes * chunk)
                sum += squares<T, N>(x + j, p.head_dim - j);
        }
        for (uint32_t step = p.lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
        if (at < count && lane == 0) inverse[at] = inverse_root(sum, p.head_dim, p.eps);
    }
}

// 1 / rms of all query heads together, and of all keys together.
template <typename T, int N>
__device__ void norms_of_all(const RopeParams& p, int64_t token, float (*scratch)[2], float& of_q,
                             float& of_k) {
    const uint32_t chunk = 16 / sizeof(T), chunks = uint32_t((p.head_dim + chunk - 1) / chunk);
    const uint32_t heads = uint32_t(p.num_heads + p.num_kv_heads);
    float          q = 0.0f, k = 0.0f;
    for (uint32_t i = threadIdx.x; i < heads * chunks; i += blockDim.x) {
        const uint32_t head = i / chunks, j = i % chunks * chunk;
        const float    sum = squares<T, N>(head_of<T>(p, token, head).rotated + j, p.head_dim - j);
        q += head < p.num_heads ? sum : 0.0f;
        k += head < p.num_heads ? 0.0f : sum;
    }
    block_sum(q, k, scratch);
    of_q = inverse_root(q, p.num_heads * p.head_dim, p.eps);
    of_k = inverse_root(k, p.num_kv_heads * p.head_dim, p.eps);
}

// A token, where it is in the cache, and its row of the table.
struct Token {
    int64_t      number;
    Slot         slot;
    const float* cos;
    const float* sin;
};

// `x`, normalised where there is a norm, and limited.
template <typename T, int N, bool NORM>
__device__ __forceinline__ Vec<float, N> prepared(const RopeParams& p, const T* x, const T* weight,
                                                  float inverse) {
    const Vec<T, N> in = load_n<N>(x);
    Vec<T, N>       factor;
    Vec<float, N>   out;
    if (NORM) factor = load_n<N>(weight);
#pragma unroll
    for (int n = 0; n < N; n++) {
        const float value = to_f32(in.at[n]);
        out.at[n] = limited(NORM ? value * inverse * to_f32(factor.at[n]) : value, p.clip);
    }
    return out;
}

// Unit `unit` of a head: 2 N elements that are N pairs, or N of the rest.
template <typename T, int N, bool NORM>
__device__ __forceinline__ void rotate(const RopeParams& p, const Token& token, uint32_t head,
                                       uint32_t unit, float inverse) {
    const int64_t  half = p.rotary_dim / 2, pairs = half / N;
    const bool     interleaved = p.interleaved, is_query = head < p.num_heads;
    const uint32_t of_kind = is_query ? head : head - uint32_t(p.num_heads);
    const Head<T>  from = head_of<T>(p, token.number, head);
    const T*       weights = static_cast<const T*>(is_query ? p.q_weight : p.k_weight);
    const T*       weight = weights + of_kind * p.weight_stride;
    T*             to = is_query ? static_cast<T*>(p.q) + token.number * p.q_stride + of_kind * p.head_dim
                                 : static_cast<T*>(p.keys) + head_at(p.key_pool, token.slot, of_kind);
    const auto     at = [&](int64_t j) { return to + (is_query ? j : element_at(p.key_pool, j)); };
    const auto     rounded = [](const float* y) {
        Vec<T, N> out;
#pragma unroll
        for (int n = 0; n < N; n++) out.at[n] = from_f32<T>(y[n]);
        return out;
    };
    if (unit >= pairs) {
        const int64_t       j = (unit - pairs) * N, to_j = p.rest_at + j;
        const Vec<float, N> rest = prepared<T, N, NORM>(p, from.rest + j, weight + to_j, inverse);
        return store(at(to_j), rounded(rest.at));
    }
    const int64_t j = unit * N, first = interleaved ? 2 * j : j, second = interleaved ? first + N : half + j;
    const int64_t to_first = p.rotated_at + first, to_second = p.rotated_at + second;
    // N pairs: of one element of each vector, or of neighbours.
    const Vec<float, N> x[2] = {prepared<T, N, NORM>(p, from.rotated + first, weight + to_first, inverse),
                                prepared<T, N, NORM>(p, from.rotated + second, weight + to_second, inverse)};
    const Vec<float, N> c = load_n<N>(token.cos + j), s = load_n<N>(token.sin + j);
    float               rotated[2][N], y[2][N];
#pragma unroll
    for (int n = 0; n < N; n++) {
        const float a = interleaved ? x[2 * n / N].at[2 * n % N] : x[0].at[n];
        const float b = interleaved ? x[(2 * n + 1) / N].at[(2 * n + 1) % N] : x[1].at[n];
        // Which products are rounded is spelled out, so that compilers cannot choose.
        rotated[0][n] = __fsub_rn(__fmul_rn(a, c.at[n]), __fmul_rn(b, s.at[n]));
        rotated[1][n] = fmaf(b, c.at[n], __fmul_rn(a, s.at[n]));
    }
#pragma unroll
    for (int m = 0; m < 2 * N; m++)
        y[m / N][m % N] = interleaved ? rotated[m % 2][m / 2] : rotated[m / N][m % N];
    store(at(to_first), rounded(y[0]));
    store(at(to_second), rounded(y[1]));
}

// Two vectors of a value, or the last one.
template <typename T, int N>
__device__ __forceinline__ void copy_value(const RopeParams& p, const Token& token, uint32_t kv_head,
                                           uint32_t unit) {
    const T*      from = part_of<T>(p.origin, token.number, kv_head);
    T*            to = static_cast<T*>(p.values) + head_at(p.value_pool, token.slot, kv_head);
    const int64_t first = int64_t(unit) * 2 * N;
    Vec<T, N>     x[2];
#pragma unroll
    for (int m = 0; m < 2; m++)
        if (first + m * N < p.value_dim) x[m] = load_n<N>(from + first + m * N);
#pragma unroll
    for (int m = 0; m < 2; m++) {
        if (first + m * N >= p.value_dim) continue;
#pragma unroll
        for (int n = 0; n < N; n++) x[m].at[n] = from_f32<T>(limited(to_f32(x[m].at[n]), p.clip));
        store(to + element_at(p.value_pool, first + m * N), x[m]);
    }
}

template <typename T, int N, bool NORM> __device__ void rope(const RopeParams& p) {
    await_previous_launch();
    __shared__ float inverse[HEADS_AT_A_TIME], scratch[32][2];
    const uint32_t   half = uint32_t(p.rotary_dim / 2), heads = uint32_t(p.num_heads + p.num_kv_heads);
    const uint32_t   units = half / N + uint32_t(p.head_dim - p.rotary_dim) / N;
    const uint32_t   value_units = (uint32_t(p.value_dim) + 2 * N - 1) / (2 * N);
    const uint32_t   at_a_time = NORM && p.lanes ? HEADS_AT_A_TIME : heads;
    for (int64_t number = blockIdx.x; number < p.num_tokens; number += gridDim.x) {
        const Place place = locate(p.pages, number);
        const Token token = {number, slot_of(p.pages, place.sequence, place.position),
                             p.cos + place.position * p.cos_stride, p.sin + place.position * p.sin_stride};
        float       of_q = 0.0f, of_k = 0.0f;
        if (NORM && !p.lanes) norms_of_all<T, N>(p, number, scratch, of_q, of_k);
        for (uint32_t first = 0; first < heads; first += at_a_time) {
            const uint32_t count = min(heads - first, at_a_time), rotated = count * units;
            const uint32_t values = first + count == heads ? uint32_t(p.num_kv_heads) * value_units : 0;
            if (NORM && p.lanes) {
                __syncthreads(); // the heads before have their norms
                norms_of_heads<T, N>(p, number, first, count, inverse);
                __syncthreads();
            }
            for (uint32_t i = threadIdx.x; i < rotated + values; i += blockDim.x) {
                if (i >= rotated) {
                    copy_value<T, N>(p, token, (i - rotated) / value_units, (i - rotated) % value_units);
                    continue;
                }
                const uint32_t head = first + i / units;
                const float    of_all = head < p.num_heads ? of_q : of_k;
                const float    norm = NORM && p.lanes ? inverse[head - first] : of_all;
                rotate<T, N, NORM>(p, token, head, i % units, norm);
            }
        }
    }
}

#define ENTRY(NAME, T, N, NORM)                                                                            \
    extern "C" __global__ void __launch_bounds__(ROPE_THREADS)                                             \
        NAME(const __grid_constant__ RopeParams p) {                                                       \
        rope<T, N, NORM>(p);                                                                               \
    }
ENTRY(rope_f32, float, 4, false)
ENTRY(rope_bf16, bf16, 8, false)
ENTRY(rope_f16, f16, 8, false)
ENTRY(rope_single_f32, float, 1, false)
ENTRY(rope_single_bf16, bf16, 1, false)
ENTRY(rope_single_f16, f16, 1, false)
ENTRY(rope_norm_f32, float, 4, true)
ENTRY(rope_norm_bf16, bf16, 8, true)
ENTRY(rope_norm_f16, f16, 8, true)
ENTRY(rope_norm_single_f32, float, 1, true)
ENTRY(rope_norm_single_bf16, bf16, 1, true)
ENTRY(rope_norm_single_f16, f16, 1, true)
