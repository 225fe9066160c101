// Attention of one token and query head by one warp, without tensor cores: any head_dim, any width of a
// value, any layout of the pools.
//
// 32 keys at a time, a key a lane for the scores, an element a lane for the values. A lane never multiplies
// by a value that the token does not see. Order: f32, keys ascending in blocks of 32 from position 0 with a
// running maximum.
#pragma once
#include "dtype.cuh"
#include "pages.cuh"
#include "reduce.cuh"

// Shared memory of a warp: the query, its weighted sum of values; and for each of 32 keys where its value is
// and how much it weighs.
struct RowScratch {
    float*   query;
    float*   sum_of_values;
    int64_t* value_at;
    float*   weights;
};

template <typename T> __device__ __forceinline__ void attend_row(const AttentionParams& p, int64_t token,
                                                                 int64_t head, const RowScratch& scratch) {
    const int64_t kv_head = head / p.group;
    const Place   place = locate(p.pages, token);
    const T*      q = static_cast<const T*>(p.q) + token * p.q_stride + head * p.head_dim;
    T*            out = static_cast<T*>(p.out) + token * p.out_stride + head * p.value_dim;
    for (int64_t j = lane(); j < p.head_dim; j += 32) scratch.query[j] = to_f32(q[j]);
    for (int64_t j = lane(); j < p.value_dim; j += 32) scratch.sum_of_values[j] = 0.0f;

    // A sink is a score without a value.
    float         largest = p.sinks ? p.sinks[head] : -infinity(), sum = p.sinks ? 1.0f : 0.0f;
    const int64_t oldest = max(int64_t(0), place.position + 1 - p.window);
    for (int64_t first = oldest / 32 * 32; first <= place.position; first += 32) {
        const int64_t position = first + lane();
        const bool    seen = oldest <= position && position <= place.position;
        __syncwarp(); // the query is there; places and weights of the last block are no longer read
        float score = -infinity();
        if (seen) {
            const Slot slot = slot_of(p.pages, place.sequence, position);
            const T*   key = static_cast<const T*>(p.keys) + head_at(p.key_pool, slot, kv_head);
            float      dot = 0.0f;
            for (int64_t begin = 0; begin < p.head_dim;
                 begin += p.key_pool.chunk, key += p.key_pool.chunk_stride)
                for (int64_t j = 0; j < p.key_pool.chunk; j++)
                    dot += scratch.query[begin + j] * to_f32(key[j]);
            score = dot * p.scale;
            if (p.softcap < infinity()) score = p.softcap * tanhf(score / p.softcap);
            scratch.value_at[lane()] = head_at(p.value_pool, slot, kv_head);
        }
        const float now_largest = fmaxf(largest, warp_max(score));
        const float shift =
            now_largest == -infinity() ? 0.0f : now_largest; // so far no score above -inf: no weight, not NaN
        const float weight = seen ? expf(score - shift) : 0.0f, rescale = expf(largest - shift);
        largest = now_largest;
        sum = sum * rescale + warp_sum(weight);
        scratch.weights[lane()] = weight;
        __syncwarp();

        const int begin = int(max(int64_t(0), oldest - first)),
                  end = int(min(int64_t(32), place.position + 1 - first));
        for (int64_t j = lane(); j < p.value_dim; j += 32) {
            const T* value = static_cast<const T*>(p.values) + element_at(p.value_pool, j);
            float    total = scratch.sum_of_values[j] * rescale;
            for (int key = begin; key < end; key++)
                total += scratch.weights[key] * to_f32(value[scratch.value_at[key]]);
            scratch.sum_of_values[j] = total;
        }
    }
    for (int64_t j = lane(); j < p.value_dim; j += 32) out[j] = from_f32<T>(scratch.sum_of_values[j] / sum);
    __syncwarp(); // before the next row overwrites the query
}
