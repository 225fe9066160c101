// permute: groups slots by expert. offsets[e] is where expert e's rows begin; row_of_slot[s] is the row of slot s.
//
// Work    one block; counts and cursors live in shared memory and are advanced by atomics, so the order of rows
//         inside one expert is not fixed.
// Bug 2   no barrier between counting and reading the counts.
#include "common.cuh"

struct PermuteParams {
    const u32* ids;    // [slots], each < experts
    u32* offsets;      // [experts + 1]
    u32* row_of_slot;  // [slots]
    u32 slots;
    u32 experts;       // at most 32
};

extern "C" __global__ void permute(const __grid_constant__ PermuteParams p) {
    __shared__ u32 count[32];
    __shared__ u32 cursor[32];
    const u32 thread = threadIdx.x;
    if (thread < 32) count[thread] = 0;
    __syncthreads();
    for (u32 slot = thread; slot < p.slots; slot += blockDim.x) atomicAdd(&count[p.ids[slot]], 1u);
#ifndef BUG_2
    __syncthreads();
#endif
    if (thread < 32) {
        u32 sum = count[thread];  // report 2
        const u32 own = sum;
        for (u32 offset = 1; offset < 32; offset *= 2) {
            const u32 below = __shfl_up_sync(0xFFFFFFFF, sum, offset);
            if (thread >= offset) sum += below;
        }
        cursor[thread] = sum - own;
        if (thread < p.experts) p.offsets[thread + 1] = sum;
        if (thread == 0) p.offsets[0] = 0;
    }
    __syncthreads();
    for (u32 slot = thread; slot < p.slots; slot += blockDim.x) p.row_of_slot[slot] = atomicAdd(&cursor[p.ids[slot]], 1u);
}
