// vector_copy: y[i] = x[i], sixteen bytes per thread.
//
// Bug 17  the source is one float further, so its address is no multiple of sixteen.
struct VectorCopyParams {
    const float* x;  // [n + 4]
    float* y;        // [n]
    unsigned n;      // a multiple of 4
};

extern "C" __global__ void vector_copy(const __grid_constant__ VectorCopyParams p) {
    const unsigned i = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= p.n) return;
#ifdef BUG_17
    const float* from = p.x + 1;
#else
    const float* from = p.x;
#endif
    *reinterpret_cast<float4*>(p.y + i) = *reinterpret_cast<const float4*>(from + i);  // report 17
}
