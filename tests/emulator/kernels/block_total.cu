// block_total: total = the sum of x over all blocks; each warp reduces, one lane per warp adds atomically.
//
// Bug 27  the addition is a plain read and write, so two blocks write one word.
struct BlockTotalParams {
    const unsigned* x;  // [32 * blocks]
    unsigned* total;    // [1], zero at the start
};

extern "C" __global__ void block_total(const __grid_constant__ BlockTotalParams p) {
    const unsigned sum = __reduce_add_sync(0xFFFFFFFF, p.x[blockIdx.x * 32 + threadIdx.x]);
    if (threadIdx.x == 0) {
#ifdef BUG_27
        *p.total += sum;  // report 27
#else
        atomicAdd(p.total, sum);
#endif
    }
}
