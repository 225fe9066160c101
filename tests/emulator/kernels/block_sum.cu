// block_sum: sums[b] = the sum of block b's 128 elements of x, in shared memory by halving.
//
// Bug 19  threads past the end leave before the barrier. Bug 21: two barriers where all threads should meet at one.
// Bug 23  threads past the end leave their slot unwritten. Bug 24: halving starts one step too early.
struct BlockSumParams {
    const unsigned* x;  // [n]
    unsigned* sums;     // [blocks]
    unsigned n;
};

extern "C" __global__ void block_sum(const __grid_constant__ BlockSumParams p) {
    __shared__ unsigned part[128];
    const unsigned thread = threadIdx.x, i = blockIdx.x * 128 + thread;
#if defined(BUG_19)
    if (i >= p.n) return;
    part[thread] = p.x[i];
    __syncthreads();  // report 19
#elif defined(BUG_21)
    if (i < p.n) {
        part[thread] = p.x[i];
        __syncthreads();  // report 21
    } else {
        part[thread] = 0;
        __syncthreads();  // report 21
    }
#elif defined(BUG_23)
    if (i < p.n) part[thread] = p.x[i];
    __syncthreads();
#else
    part[thread] = i < p.n ? p.x[i] : 0;
    __syncthreads();
#endif
#ifdef BUG_24
    for (unsigned stride = 128; stride > 0; stride /= 2) {
#else
    for (unsigned stride = 64; stride > 0; stride /= 2) {
#endif
        if (thread < stride) part[thread] += part[thread + stride];  // report 23 24
        __syncthreads();
    }
    if (thread == 0) p.sums[blockIdx.x] = part[0];
}
