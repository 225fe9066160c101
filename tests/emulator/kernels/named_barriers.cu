// named_barriers: y[i] = 3 * x[i]; warps 0-1 fill a shared buffer, warps 2-3 empty it, in rounds of 64 elements.
//
// Order   barrier 1 says full (writers arrive, readers wait), barrier 2 says empty (readers arrive, writers wait).
// Bug 22  the readers count 96 threads at barrier 1 where the writers count 128.
#include "common.cuh"

struct NamedBarriersParams {
    const u32* x;  // [64 * rounds]
    u32* y;        // [64 * rounds]
    u32 rounds;
};

extern "C" __global__ void named_barriers(const __grid_constant__ NamedBarriersParams p) {
    __shared__ u32 buffer[64];
    const u32 thread = threadIdx.x % 64;
    if (threadIdx.x < 64) {
        for (u32 round = 0; round < p.rounds; ++round) {
            if (round > 0) barrier_sync<2, 128>();
            buffer[thread] = p.x[64 * round + thread];
            barrier_arrive<1, 128>();  // report 22
        }
    } else {
        for (u32 round = 0; round < p.rounds; ++round) {
#ifdef BUG_22
            barrier_sync<1, 96>();  // report 22
#else
            barrier_sync<1, 128>();
#endif
            p.y[64 * round + thread] = 3 * buffer[thread];
            if (round + 1 < p.rounds) barrier_arrive<2, 128>();
        }
    }
}
