// rope: limit q, k, v to [-clip, clip]; rotate q and k by their position; write q to its matrix, k and v to the cache
//
// Contract  src/ops/rope.rs has checked shapes, table and positions, rope/cuda.rs that vectors are whole and aligned, or chose the entry of single elements.
// Work      a block a token, grid-stride over tokens; a thread takes a vector of a head's first half of rotated elements with its partner, or of the rest.
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
    for (int64_t token = blockIdx.x; token < p.num_tokens; token += gridDim.x) {
        const Place   place = locate(p.pages, token);
        const int64_t slot = pool_row(p.pages, place.sequence, place.position);
        const float*  cos = p.cos + place.position * half;
        const float*  sin = p.sin + place.position * half;
        for (int64_t i = threadIdx.x; i < heads * units; i += blockDim.x) {
            const int64_t head = i / units, unit = i % units, kv_head = head - p.num_heads;
            const bool    is_query = kv_head < 0, is_value = kv_head >= p.num_kv_heads;
            const T*      from = static_cast<const T*>(p.qkv) + token * p.qkv_stride + head * p.head_dim;
            T*            to = is_query   ? static_cast<T*>(p.q) + token * p.q_stride + head * p.head_dim
                               : is_value ? static_cast<T*>(p.values) + slot * p.values_stride + (kv_head - p.num_kv_heads) * p.head_dim
                                          : static_cast<T*>(p.keys) + slot * p.keys_stride + kv_head * p.head_dim;
            if (unit < pairs) {
                const int64_t      j = unit * N;
                const Vec<T, N>    first = load_n<N>(from + j), second = load_n<N>(from + half + j);
                const Vec<float, N> c = load_n<N>(cos + j), s = load_n<N>(sin + j);
                Vec<T, N>          out_first, out_second;
#pragma unroll
                for (int n = 0; n < N; n++) {
                    const float a = limited(to_f32(first.at[n]), p.clip), b = limited(to_f32(second.at[n]), p.clip);
                    out_first.at[n] = from_f32<T>(is_value ? a : a * c.at[n] - b * s.at[n]);
                    out_second.at[n] = from_f32<T>(is_value ? b : b * c.at[n] + a * s.at[n]);
                }
                store(to + j, out_first);
                store(to + half + j, out_second);
            } else {
                const int64_t   j = p.rotary_dim + (unit - pairs) * N;
                const Vec<T, N> rest = load_n<N>(from + j);
                Vec<T, N>       out;
#pragma unroll
                for (int n = 0; n < N; n++) out.at[n] = from_f32<T>(limited(to_f32(rest.at[n]), p.clip));
                store(to + j, out);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) rope_f32(const __grid_constant__ RopeParams p) { rope<float, 4>(p); }
extern "C" __global__ void __launch_bounds__(256) rope_bf16(const __grid_constant__ RopeParams p) { rope<bf16, 8>(p); }
extern "C" __global__ void __launch_bounds__(256) rope_f16(const __grid_constant__ RopeParams p) { rope<f16, 8>(p); }

extern "C" __global__ void __launch_bounds__(256) rope_single_f32(const __grid_constant__ RopeParams p) { rope<float, 1>(p); }
extern "C" __global__ void __launch_bounds__(256) rope_single_bf16(const __grid_constant__ RopeParams p) { rope<bf16, 1>(p); }
extern "C" __global__ void __launch_bounds__(256) rope_single_f16(const __grid_constant__ RopeParams p) { rope<f16, 1>(p); }
