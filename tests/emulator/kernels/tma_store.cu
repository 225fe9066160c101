// tma_store: y = 2 * x for a matrix of 32 columns, each block writing two 32 x 32 tiles through one staging tile.
//
// Order   every writer fences for the async proxy, the block meets, one thread stores; the staging tile is rewritten only after
//         that thread has waited for the store to have read it, and the block ends only after the store is complete.
// Bug 14  no fence. Bug 15: no barrier between the writers and the store. Bug 16: the store is not waited for at the end.
#include "common.cuh"

struct TmaStoreParams {
    TensorMap y;     // {32, rows}, box {32, 32}, no swizzle: rows past the end are dropped
    const float* x;  // [rows, 32]
    u32 rows;
};

extern "C" __global__ void tma_store(const __grid_constant__ TmaStoreParams p) {
    __shared__ __align__(128) float tile[32][32];
    for (u32 pass = 0; pass < 2; ++pass) {
        const u32 row0 = (2 * blockIdx.x + pass) * 32;
        if (pass > 0) {
            if (threadIdx.x == 0) bulk_wait_read();
            __syncthreads();
        }
        for (u32 i = threadIdx.x; i < 32 * 32; i += blockDim.x) {
            const u32 row = row0 + i / 32;
            tile[i / 32][i % 32] = row < p.rows ? 2.0f * p.x[row * 32 + i % 32] : 0.0f;
        }
#ifndef BUG_14
        fence_proxy_async();
#endif
#ifndef BUG_15
        __syncthreads();
#endif
        if (threadIdx.x == 0) {
            tma_store_2d(p.y, shared_address(tile), 0, row0);  // report 14 15 16
            bulk_commit();
        }
    }
#ifndef BUG_16
    if (threadIdx.x == 0) bulk_wait();
#endif
}
