// local_array: a histogram of eight bins per thread, kept in local memory because its index is not known to the compiler.
//
// Bug 18  the key is not reduced to three bits, so key 8 writes behind the array.
struct LocalArrayParams {
    const unsigned* keys;  // [threads, 16]
    unsigned* counts;      // [threads, 8]
};

extern "C" __global__ void local_array(const __grid_constant__ LocalArrayParams p) {
    const unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned bins[8] = {};
    for (unsigned i = 0; i < 16; ++i) {
        const unsigned key = p.keys[thread * 16 + i];
#ifdef BUG_18
        bins[key] += 1;  // report 18
#else
        bins[key % 8] += 1;
#endif
    }
#pragma unroll 1  // unrolled, NVRTC 12.4 joins the eight loads in one of two ways from run to run
    for (unsigned bin = 0; bin < 8; ++bin) p.counts[thread * 8 + bin] = bins[bin];
}
