// rope: limit q, k, v to [-clip, clip]; rotate q and k by their position; write q to its matrix, k and v to the cache
//
// Contract  src/ops/rope.rs has checked shapes, table and positions, rope/cuda.rs that vectors are whole and aligned in every matrix and chunk, or chose the entry of single elements.
// Work      a block a token, grid-stride over tokens; a thread takes two vectors of a head, whose elements are pairs, or one of the rest.
// Cost      memory bound: 2 * T * (H + 2 Hkv) * d * sizeof(T) bytes, and 4 * T * rotary_dim for the table.
// Order     elementwise in pairs, in f32, each element rounded once.
#include "common/dtype.cuh"
#include "common/pages.cuh"
#include "common/ptx/launch.cuh"

__device__ __forceinline__ float limited(float x, float clip) { return x > clip ? clip : x < -clip ? -clip : x; } // NaN passes

template <typename T, int N> __device__ void rope(const RopeParams& p) {
    await_previous_launch();
    const int64_t half = p.rotary_dim / 2, pairs = half / N, units = pairs + (p.head_dim - p.rotary_dim) / N;
    const int64_t heads = p.num_heads + 2 * p.num_kv_heads;
    const bool    interleaved = p.interleaved;
    for (int64_t token = blockIdx.x; token < p.num_tokens; token += gridDim.x) {
        const Place  place = locate(p.pages, token);
        const Slot   slot = slot_of(p.pages, place.sequence, place.position);
        const float* cos = p.cos + place.position * p.cos_stride;
        const float* sin = p.sin + place.position * p.sin_stride;
        for (int64_t i = threadIdx.x; i < heads * units; i += blockDim.x) {
            const int64_t head = i / units, unit = i % units, kv_head = head - p.num_heads;
            const bool    is_query = kv_head < 0, is_value = kv_head >= p.num_kv_heads;
            const T*      from = static_cast<const T*>(p.qkv) + token * p.qkv_stride + head * p.head_dim;
            T*            to = is_query   ? static_cast<T*>(p.q) + token * p.q_stride + head * p.head_dim
                               : is_value ? static_cast<T*>(p.values) + head_at(p.value_pool, slot, kv_head - p.num_kv_heads)
                                          : static_cast<T*>(p.keys) + head_at(p.key_pool, slot, kv_head);
            const auto    at = [&](int64_t j) { return to + (is_query ? j : element_at(is_value ? p.value_pool : p.key_pool, j)); };
            if (unit < pairs) {
                const int64_t j = unit * N, first = interleaved ? 2 * j : j, second = interleaved ? first + N : half + j;
                // N pairs: of one element of each vector, or of neighbours.
                const Vec<T, N>     x[2] = {load_n<N>(from + first), load_n<N>(from + second)};
                const Vec<float, N> c = load_n<N>(cos + j), s = load_n<N>(sin + j);
                float               rotated[2][N];
#pragma unroll
                for (int n = 0; n < N; n++) {
                    const T     x_a = interleaved ? x[2 * n / N].at[2 * n % N] : x[0].at[n];
                    const T     x_b = interleaved ? x[(2 * n + 1) / N].at[(2 * n + 1) % N] : x[1].at[n];
                    const float a = limited(to_f32(x_a), p.clip), b = limited(to_f32(x_b), p.clip);
                    rotated[0][n] = is_value ? a : a * c.at[n] - b * s.at[n];
                    rotated[1][n] = is_value ? b : b * c.at[n] + a * s.at[n];
                }
                Vec<T, N> y[2];
#pragma unroll
                for (int m = 0; m < 2 * N; m++)
                    y[m / N].at[m % N] = from_f32<T>(interleaved ? rotated[m % 2][m / 2] : rotated[m / N][m % N]);
                store(at(first), y[0]);
                store(at(second), y[1]);
            } else {
                const int64_t   j = p.rotary_dim + (unit - pairs) * N;
                const Vec<T, N> rest = load_n<N>(from + j);
                Vec<T, N>       out;
#pragma unroll
                for (int n = 0; n < N; n++) out.at[n] = from_f32<T>(limited(to_f32(rest.at[n]), p.clip));
                store(at(j), out);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(ROPE_THREADS) rope_f32(const __grid_constant__ RopeParams p) { rope<float, 4>(p); }
extern "C" __global__ void __launch_bounds__(ROPE_THREADS) rope_bf16(const __grid_constant__ RopeParams p) { rope<bf16, 8>(p); }
extern "C" __global__ void __launch_bounds__(ROPE_THREADS) rope_f16(const __grid_constant__ RopeParams p) { rope<f16, 8>(p); }

extern "C" __global__ void __launch_bounds__(ROPE_THREADS) rope_single_f32(const __grid_constant__ RopeParams p) { rope<float, 1>(p); }
extern "C" __global__ void __launch_bounds__(ROPE_THREADS) rope_single_bf16(const __grid_constant__ RopeParams p) { rope<bf16, 1>(p); }
extern "C" __global__ void __launch_bounds__(ROPE_THREADS) rope_single_f16(const __grid_constant__ RopeParams p) { rope<f16, 1>(p); }
