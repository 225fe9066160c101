// The ABI between `src/ops/*/cuda.rs` and the kernels: one plain struct per kernel, passed by value.
// A shape beside every pointer; sizes and strides are int64_t everywhere and count elements.
#pragma once

#ifdef __CUDACC_RTC__
typedef long long int64_t;
#else
#include <stdint.h>
#endif

struct GluParams {
    const void* gate;     // [R, F]
    const void* up;       // [R, F]
    void*       y;        // [R, F]
    int64_t     rows;     // R
    int64_t     d_ffn;    // F
    int64_t     gate_stride;
    int64_t     up_stride;
    int64_t     y_stride;
};
