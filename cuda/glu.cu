// glu: y[r, f] = silu(gate[r, f]) * up[r, f], or another gate
//
// Contract  src/ops/glu.rs has checked shapes, dtypes and that every row begins on 16 bytes; nothing is re-checked here.
// Work      a block a row, grid-stride over rows; a thread takes 16-byte vectors, the last of a row cut to its elements.
// Cost      memory bound: 3 * R * F * sizeof(T) bytes.
// Order     elementwise, so the bits of a row depend on that row alone.
#include "common/activation.cuh"
#include "common/dtype.cuh"
#include "common/ptx/launch.cuh"

template <typename T> __device__ void glu(const GluParams& p) {
    await_previous_launch();
    constexpr int SIZE = Vec<T>::SIZE;
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) { // 64-bit: R * F passes 2^31 at T = 49,933 for DBRX
        const T* gates = static_cast<const T*>(p.gate) + row * p.gate_stride;
        const T* ups = static_cast<const T*>(p.up) + row * p.up_stride;
        T*       ys = static_cast<T*>(p.y) + row * p.y_stride;
        for (int64_t col = int64_t(threadIdx.x) * SIZE; col < p.d_ffn; col += blockDim.x * SIZE) {
            const Vec<T> gate = load_first(gates + col, p.d_ffn - col), up = load_first(ups + col, p.d_ffn - col);
            Vec<T>       y;
#pragma unroll
            for (int j = 0; j < SIZE; j++) {
                const float x = to_f32(gate.at[j]), u = to_f32(up.at[j]);
                y.at[j] = from_f32<T>(p.epilogue.is_general ? gated<Precise>(p.epilogue, x, u) : silu<Precise>(x) * u);
            }
            store_first(ys + col, p.d_ffn - col, y);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) glu_f32(const __grid_constant__ GluParams p) { glu<float>(p); }
extern "C" __global__ void __launch_bounds__(256) glu_bf16(const __grid_constant__ GluParams p) { glu<bf16>(p); }
extern "C" __global__ void __launch_bounds__(256) glu_f16(const __grid_constant__ GluParams p) { glu<f16>(p); }
