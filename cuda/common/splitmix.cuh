// Random numbers of which each follows from its place in a sequence.
#pragma once
#include "params.h"

// SplitMix64's word `at` of the sequence.
__device__ __forceinline__ uint64_t word(uint64_t state, uint64_t at) {
    uint64_t z = state + (at + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}
