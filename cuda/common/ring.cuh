// A ring of stages in shared memory: filled by a producer, emptied by consumers, handed over by two mbarriers per stage.
//
// Both sides walk the same stages in the same order, from stage 0 with phase 0; a fresh barrier counts as having completed the phase
// before. So the producer's first turn around the ring waits for nobody.
#pragma once
#include "ptx/mbarrier.cuh"

// With CLUSTER blocks, stages are filled by all of them and are empty when the consumers of all have released them.
template <int STAGES, int CLUSTER> struct Ring {
    uint32_t barriers; // full[STAGES], then empty[STAGES], 8 bytes each
    uint32_t stage = 0, phase = 0;

    enum : uint32_t { BYTES = 2 * STAGES * 8 };

    // By one thread; a fence and a barrier must follow.
    __device__ __forceinline__ void init(uint32_t full_arrivals, uint32_t empty_arrivals) const {
        for (uint32_t s = 0; s < STAGES; s++) {
            mbarrier_init(barriers + 8 * s, full_arrivals);
            mbarrier_init(barriers + 8 * (STAGES + s), empty_arrivals);
        }
    }
    __device__ __forceinline__ uint32_t full() const { return barriers + 8 * stage; }
    __device__ __forceinline__ uint32_t empty() const { return barriers + 8 * (STAGES + stage); }

    __device__ __forceinline__ void wait_full() const {
        while (!mbarrier_try_wait(full(), phase)) {}
    }
    __device__ __forceinline__ void wait_empty() const {
        while (!mbarrier_try_wait(empty(), phase ^ 1)) {}
    }
    // By consumers that have waited for their products. Each warp arrives for itself, in every block: if one arrived for all, a stage could be
    // filled again before another warp had seen it full.
    __device__ __forceinline__ void release() const {
        const uint32_t lane = threadIdx.x % 32;
        if (CLUSTER > 1) {
            if (lane < CLUSTER) mbarrier_arrive_remote(empty(), lane);
        } else {
            if (lane == 0) mbarrier_arrive(empty());
        }
    }
    __device__ __forceinline__ void advance() {
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        phase ^= stage == 0;
    }
};
