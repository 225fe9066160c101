// warp_pairs: y[i] = x[i] + 10 * x[i ^ 1] + 100 * x[i ^ 8]; the first neighbour through shared memory, the second by a shuffle.
//
// Bug 20  half of the warp takes part in a full-mask shuffle. Bug 25: no __syncwarp between the write and the neighbour's read.
// Bug 26  a shuffle stands where __syncwarp should: it exchanges registers and orders nothing.
struct WarpPairsParams {
    const unsigned* x;  // [n], n a multiple of 32
    unsigned* y;        // [n]
};

extern "C" __global__ void warp_pairs(const __grid_constant__ WarpPairsParams p) {
    __shared__ unsigned slot[64];
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned own = p.x[i];
    slot[threadIdx.x] = own;
#if defined(BUG_25)
#elif defined(BUG_26)
    const unsigned anything = __shfl_sync(0xFFFFFFFF, own, 0);
    if (anything == 0xDEADBEEF) p.y[i] = 0;
#else
    __syncwarp();
#endif
    const unsigned neighbour = slot[threadIdx.x ^ 1];  // report 25 26
    unsigned far = 0;
#ifdef BUG_20
    if (threadIdx.x % 32 < 16) far = __shfl_xor_sync(0xFFFFFFFF, own, 8);  // report 20
#else
    far = __shfl_xor_sync(0xFFFFFFFF, own, 8);
#endif
    p.y[i] = own + 10 * neighbour + 100 * far;
}
