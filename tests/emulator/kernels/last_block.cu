// last_block: total = the sum of x; every block publishes a partial sum, the last one to finish adds them up in block order.
//
// Order   partial sum, fence, ticket; the last ticket, fence, read of all partial sums.
struct LastBlockParams {
    const unsigned* x;   // [32 * blocks]
    unsigned* partial;   // [blocks]
    unsigned* finished;  // [1], zero at the start
    unsigned* total;     // [1]
};

extern "C" __global__ void last_block(const __grid_constant__ LastBlockParams p) {
    const unsigned sum = __reduce_add_sync(0xFFFFFFFF, p.x[blockIdx.x * 32 + threadIdx.x]);
    if (threadIdx.x != 0) return;
    p.partial[blockIdx.x] = sum;
    __threadfence();
    if (atomicAdd(p.finished, 1u) + 1 < gridDim.x) return;
    __threadfence();
    unsigned total = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) total += p.partial[block];
    *p.total = total;
}
