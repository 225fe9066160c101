// glu: y[r, f] = silu(gate[r, f]) * up[r, f]
//
// Contract  src/ops/glu.rs has checked shapes and dtypes, glu/cuda.rs that every row begins on 16 bytes; nothing is re-checked here.
// Work      grid-stride over rows of 16-byte vectors, the last of a row cut to its elements; any grid size is correct.
// Cost      memory bound: 3 * R * F * sizeof(T) bytes.
// Order     elementwise, so the bits of a row depend on that row alone.
#include "common/dtype.cuh"
#include "common/params.h"

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

template <typename T> __device__ void glu(const GluParams& p) {
    constexpr int SIZE = Vec<T>::SIZE;
    const int64_t vectors = (p.d_ffn + SIZE - 1) / SIZE;
    const int64_t n = p.rows * vectors; // 64-bit: R * F passes 2^31 at T = 49,933 for DBRX
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += int64_t(gridDim.x) * blockDim.x) {
        const int64_t row = i / vectors, col = i % vectors * SIZE;
        const T*      gate = static_cast<const T*>(p.gate) + row * p.gate_stride + col;
        const T*      up = static_cast<const T*>(p.up) + row * p.up_stride + col;
        T*            y = static_cast<T*>(p.y) + row * p.y_stride + col;
        if (col + SIZE <= p.d_ffn) {
            const Vec<T> g = *reinterpret_cast<const Vec<T>*>(gate), u = *reinterpret_cast<const Vec<T>*>(up);
            Vec<T>       out;
            for (int j = 0; j < SIZE; j++) out.at[j] = from_f32<T>(silu(to_f32(g.at[j])) * to_f32(u.at[j]));
            *reinterpret_cast<Vec<T>*>(y) = out;
        } else {
            for (int j = 0; col + j < p.d_ffn; j++) y[j] = from_f32<T>(silu(to_f32(gate[j])) * to_f32(up[j]));
        }
    }
}

extern "C" __global__ void glu_f32(const __grid_constant__ GluParams p) { glu<float>(p); }
extern "C" __global__ void glu_bf16(const __grid_constant__ GluParams p) { glu<bf16>(p); }
extern "C" __global__ void glu_f16(const __grid_constant__ GluParams p) { glu<f16>(p); }
