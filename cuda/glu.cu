// glu: y[r, f] = silu(gate[r, f]) * up[r, f], or another gate; the forms for gate and up in turn find them in
// columns 2 f and 2 f + 1 of one matrix
//
// Contract  src/ops/glu.rs has checked shapes, dtypes and that every row begins on 16 bytes.
// Work      a block a row, grid-stride over rows; a thread takes 16-byte vectors, the last of a row cut to
//           its elements.
// Cost      memory bound: 3 * R * F * sizeof(T) bytes.
// Order     elementwise, so the bits of a row depend on that row alone.
#include "common/activation.cuh"
#include "common/dtype.cuh"
#include "common/ptx/launch.cuh"

template <typename T> __device__ __forceinline__ T of(const EpilogueParams& p, T gate, T up) {
    const float x = to_f32(gate), u = to_f32(up);
    return from_f32<T>(p.is_general ? gated<Precise>(p, x, u) : silu<Precise>(x) * u);
}

template <typename T> __device__ void glu(const GluParams& p) {
    await_previous_launch();
    constexpr int SIZE = Vec<T>::SIZE;
    // 64-bit: R * F passes 2^31 at T = 49,933 for DBRX.
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const T* gates = static_cast<const T*>(p.gate) + row * p.gate_stride;
        const T* ups = static_cast<const T*>(p.up) + row * p.up_stride;
        T*       ys = static_cast<T*>(p.y) + row * p.y_stride;
        for (int64_t col = int64_t(threadIdx.x) * SIZE; col < p.d_ffn; col += blockDim.x * SIZE) {
            const int64_t left = p.d_ffn - col;
            const Vec<T>  gate = load_first(gates + col, left), up = load_first(ups + col, left);
            Vec<T>        y;
#pragma unroll
            for (int j = 0; j < SIZE; j++) y.at[j] = of(p.epilogue, gate.at[j], up.at[j]);
            store_first(ys + col, left, y);
        }
    }
}

template <typename T> __device__ void in_turn(const InTurnParams& p) {
    await_previous_launch();
    constexpr int SIZE = Vec<T>::SIZE, HALF = SIZE / 2;
    const int64_t rows = p.rows_end ? min(p.rows, int64_t(*p.rows_end)) : p.rows;
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const T* pairs = static_cast<const T*>(p.gate_up) + row * p.gate_up_stride;
        T*       ys = static_cast<T*>(p.y) + row * p.y_stride;
        for (int64_t col = int64_t(threadIdx.x) * SIZE; col < p.d_ffn; col += blockDim.x * SIZE) {
            const int64_t left = 2 * (p.d_ffn - col);
            const T*      at = pairs + 2 * col;
            const Vec<T>  low = load_first(at, left), high = load_first(at + SIZE, left - SIZE);
            Vec<T>        y;
#pragma unroll
            for (int j = 0; j < HALF; j++) {
                y.at[j] = of(p.epilogue, low.at[2 * j], low.at[2 * j + 1]);
                y.at[HALF + j] = of(p.epilogue, high.at[2 * j], high.at[2 * j + 1]);
            }
            store_first(ys + col, p.d_ffn - col, y);
        }
    }
}

#define ENTRIES(T, NAME)                                                                                    \
    extern "C" __global__ void __launch_bounds__(256) glu_##NAME(const __grid_constant__ GluParams p) {     \
        glu<T>(p);                                                                                          \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256) glu_in_turn_##NAME(                                   \
        const __grid_constant__ InTurnParams p) {                                                           \
        in_turn<T>(p);                                                                                      \
    }
ENTRIES(float, f32)
ENTRIES(bf16, bf16)
ENTRIES(f16, f16)
