// random: y[r, c] = scale * (a 16-bit quarter of a SplitMix64 word), number first + r * C + c of a sequence
//
// Contract  src/ops/random.rs has checked sizes and that rows begin on 16 bytes; without gaps it is one row.
// Work      a thread takes 16-byte vectors, grid-stride along a row (x) and over rows (y); the last is cut.
// Cost      memory bound: R * C * sizeof(T) bytes; two 64-bit multiplications for each word of four numbers.
// Order     a number follows from its place in the sequence alone.
#include "common/dtype.cuh"
#include "common/splitmix.cuh"
#include "common/ptx/launch.cuh"

template <typename T> __device__ void uniform(const UniformParams& p) {
    await_previous_launch();
    constexpr int SIZE = Vec<T>::SIZE;
    for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
        T*             ys = static_cast<T*>(p.y) + row * p.y_stride;
        const uint64_t first = p.first + uint64_t(row) * uint64_t(p.cols);
        const int      skip = 16 * int(first % 4); // bits of a word in front of a vector's first number
        for (int64_t col = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * SIZE; col < p.cols;
             col += int64_t(gridDim.x) * blockDim.x * SIZE) {
            const uint64_t at = (first + uint64_t(col)) / 4;
            uint64_t       low = word(p.state, at);
            Vec<T>         y;
#pragma unroll
            for (int i = 0; i < SIZE / 4; i++) {
                uint64_t four = low;
                if (skip != 0 || 4 * (i + 1) < SIZE) {
                    const uint64_t high = word(p.state, at + i + 1);
                    if (skip != 0) four = low >> skip | high << (64 - skip);
                    low = high;
                }
#pragma unroll
                for (int j = 0; j < 4; j++)
                    y.at[4 * i + j] =
                        from_f32<T>(p.scale * (float(static_cast<short>(four >> 16 * j)) / 32768.0f));
            }
            store_first(ys + col, p.cols - col, y);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256)
    random_uniform_f32(const __grid_constant__ UniformParams p) {
    uniform<float>(p);
}
extern "C" __global__ void __launch_bounds__(256)
    random_uniform_bf16(const __grid_constant__ UniformParams p) {
    uniform<bf16>(p);
}
extern "C" __global__ void __launch_bounds__(256)
    random_uniform_f16(const __grid_constant__ UniformParams p) {
    uniform<f16>(p);
}
