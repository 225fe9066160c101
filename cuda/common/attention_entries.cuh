// The forms of a tensor-core kernel of attention, for each ENTRY(name, type, head_dim, whether scores have a
// cap).
#pragma once

#define ATTENTION_ENTRIES_OF(T)                                                                     \
    ENTRY(T##_64, T, 64, false)                                                                     \
    ENTRY(T##_128, T, 128, false)                                                                   \
    ENTRY(T##_256, T, 256, false)                                                                   \
    ENTRY(T##_64_capped, T, 64, true)                                                               \
    ENTRY(T##_128_capped, T, 128, true)                                                             \
    ENTRY(T##_256_capped, T, 256, true)
#define ATTENTION_ENTRIES ATTENTION_ENTRIES_OF(bf16) ATTENTION_ENTRIES_OF(f16)
