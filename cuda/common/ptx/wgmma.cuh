// wgmma, m64nNk16 with f32 accumulators: one function per instruction, no logic.
//
// Thread 32 w + 4 g + t of the warpgroup holds of accumulator i: row 16 w + g + 8 (i / 2 % 2), column 8 (i / 4) + 2 t + i % 2.
#pragma once

// Before the first product of a batch, and whenever other code has touched the accumulators since.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All but the last PENDING batches are done: their accumulators may be read, their operands overwritten.
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Operands in shared memory, in the 128-byte swizzle that TMA writes: tiles begin on 1024 bytes. Functions take the low word of a descriptor as
// the operand. The high word is the same for all: the swizzle, and 1024 bytes from 8 rows to the next.
enum : uint32_t { SWIZZLED = 1u << 30 | 1024 >> 4 };
// The high bits of a shared address name the CTA; a descriptor leaves them out.
__device__ __forceinline__ uint32_t swizzled(uint32_t tile, uint32_t leading) { return (tile & 0x3ffff) >> 4 | leading >> 4 << 16; }
// Rows of 64 elements of k, 128 bytes each; the next 16 of k are 32 bytes on. The hardware does not read `leading`.
__device__ __forceinline__ uint32_t k_major(uint32_t tile) { return swizzled(tile, 16); }
enum : uint32_t { K_MAJOR_STEP = 32 >> 4 };
// Panels of 64 columns with `depth` rows, one per k, 128 bytes each; the next 16 of k are 16 rows on.
__device__ __forceinline__ uint32_t mn_major(uint32_t tile, uint32_t depth) { return swizzled(tile, depth * 128); }
enum : uint32_t { MN_MAJOR_STEP = 16 * 128 >> 4 };

template <typename T> struct IsBf16 { enum : bool { VALUE = false }; };
template <> struct IsBf16<bf16> { enum : bool { VALUE = true }; };

// Operand lists: %0 to %N/2-1 are the accumulators, then come a, b, the predicate's source and the two transposition flags.
#define WGMMA_NAMES_10(tens) "%" #tens "0, %" #tens "1, %" #tens "2, %" #tens "3, %" #tens "4, %" #tens "5, %" #tens "6, %" #tens "7, %" #tens "8, %" #tens "9"
#define WGMMA_NAMES_4 "%0, %1, %2, %3"
#define WGMMA_NAMES_16 WGMMA_NAMES_10() ", %10, %11, %12, %13, %14, %15"
#define WGMMA_NAMES_32 WGMMA_NAMES_10() ", " WGMMA_NAMES_10(1) ", " WGMMA_NAMES_10(2) ", %30, %31"
#define WGMMA_NAMES_64 WGMMA_NAMES_10() ", " WGMMA_NAMES_10(1) ", " WGMMA_NAMES_10(2) ", " WGMMA_NAMES_10(3) ", " WGMMA_NAMES_10(4) ", " WGMMA_NAMES_10(5) ", %60, %61, %62, %63"
#define WGMMA_NAMES_128                                                                                                                            \
    WGMMA_NAMES_10() ", " WGMMA_NAMES_10(1) ", " WGMMA_NAMES_10(2) ", " WGMMA_NAMES_10(3) ", " WGMMA_NAMES_10(4) ", " WGMMA_NAMES_10(5) ", "         \
    WGMMA_NAMES_10(6) ", " WGMMA_NAMES_10(7) ", " WGMMA_NAMES_10(8) ", " WGMMA_NAMES_10(9) ", " WGMMA_NAMES_10(10) ", " WGMMA_NAMES_10(11)           \
    ", %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_HELD_FROM_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_HELD_FROM_16(i) WGMMA_HELD_FROM_4(i), WGMMA_HELD_FROM_4(i + 4), WGMMA_HELD_FROM_4(i + 8), WGMMA_HELD_FROM_4(i + 12)
#define WGMMA_HELD_4 WGMMA_HELD_FROM_4(0)
#define WGMMA_HELD_16 WGMMA_HELD_FROM_16(0)
#define WGMMA_HELD_32 WGMMA_HELD_16, WGMMA_HELD_FROM_16(16)
#define WGMMA_HELD_64 WGMMA_HELD_32, WGMMA_HELD_FROM_16(32), WGMMA_HELD_FROM_16(48)
#define WGMMA_HELD_128 WGMMA_HELD_64, WGMMA_HELD_FROM_16(64), WGMMA_HELD_FROM_16(80), WGMMA_HELD_FROM_16(96), WGMMA_HELD_FROM_16(112)

// Keeps the compiler's own moves of accumulators on this side of the asynchronous section.
__device__ __forceinline__ void pin(float (&d)[4]) { asm volatile("" : WGMMA_HELD_4::"memory"); }
__device__ __forceinline__ void pin(float (&d)[16]) { asm volatile("" : WGMMA_HELD_16::"memory"); }
__device__ __forceinline__ void pin(float (&d)[32]) { asm volatile("" : WGMMA_HELD_32::"memory"); }
__device__ __forceinline__ void pin(float (&d)[64]) { asm volatile("" : WGMMA_HELD_64::"memory"); }
__device__ __forceinline__ void pin(float (&d)[128]) { asm volatile("" : WGMMA_HELD_128::"memory"); }

#define WGMMA_AS(TYPE, N, COUNT, A, B, FROM, TRANS)                                                                                                \
    asm volatile("{\n"                                                                                                                             \
                 ".reg .pred accumulate;\n"                                                                                                        \
                 "setp.ne.b32 accumulate, %" FROM ", 0;\n"                                                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" WGMMA_NAMES_##COUNT "}, %" A ", %" B                          \
                 ", accumulate, 1, 1, " TRANS ";\n"                                                                                                \
                 "}"                                                                                                                               \
                 : WGMMA_HELD_##COUNT                                                                                                              \
                 : "l"(uint64_t(SWIZZLED) << 32 | a), "l"(uint64_t(SWIZZLED) << 32 | b), "r"(int(accumulate)), "n"(int(TRANS_A)), "n"(int(TRANS_B)))

// d[64 x N] = a[64 x 16] * b[16 x N] + (accumulate ? d : 0). TRANS says of an operand that it lies MN-major.
#define WGMMA(N, COUNT, A, B, FROM, TRANS)                                                                                                         \
    template <typename T, bool TRANS_A, bool TRANS_B>                                                                                              \
    __device__ __forceinline__ void wgmma(float (&d)[COUNT], uint32_t a, uint32_t b, bool accumulate) {                                            \
        if constexpr (bool(IsBf16<T>::VALUE)) WGMMA_AS("bf16", N, COUNT, A, B, FROM, TRANS);                                                       \
        else WGMMA_AS("f16", N, COUNT, A, B, FROM, TRANS);                                                                                         \
    }
WGMMA(8, 4, "4", "5", "6", "%7, %8")
WGMMA(32, 16, "16", "17", "18", "%19, %20")
WGMMA(64, 32, "32", "33", "34", "%35, %36")
WGMMA(128, 64, "64", "65", "66", "%67, %68")
WGMMA(256, 128, "128", "129", "130", "%131, %132")

// The same with the left operand in registers: thread 32 w + 4 g + t holds of a[i], two elements of k each,
// row 16 w + g + 8 (i % 2), k from 8 (i / 2) + 2 t on. That is how 16 columns of accumulators lie once
// neighbours are packed.
#define WGMMA_FROM_REGISTERS_AS(TYPE, N, COUNT, A0, A1, A2, A3, B, FROM, TRANS)                              \
    asm volatile("{\n"                                                                                       \
                 ".reg .pred accumulate;\n"                                                                  \
                 "setp.ne.b32 accumulate, %" FROM ", 0;\n"                                                   \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" WGMMA_NAMES_##COUNT "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 \
                 "}, %" B ", accumulate, 1, 1, %" TRANS ";\n"                                                \
                 "}"                                                                                         \
                 : WGMMA_HELD_##COUNT                                                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(uint64_t(SWIZZLED) << 32 | b), "r"(int(accumulate)), "n"(int(TRANS_B)))

#define WGMMA_FROM_REGISTERS(N, COUNT, ...)                                                                  \
    template <typename T, bool TRANS_B>                                                                      \
    __device__ __forceinline__ void wgmma_from_registers(float (&d)[COUNT], const uint32_t* a, uint32_t b, bool accumulate) { \
        if constexpr (bool(IsBf16<T>::VALUE)) WGMMA_FROM_REGISTERS_AS("bf16", N, COUNT, __VA_ARGS__);        \
        else WGMMA_FROM_REGISTERS_AS("f16", N, COUNT, __VA_ARGS__);                                          \
    }
WGMMA_FROM_REGISTERS(8, 4, "4", "5", "6", "7", "8", "9", "10")
WGMMA_FROM_REGISTERS(32, 16, "16", "17", "18", "19", "20", "21", "22")
WGMMA_FROM_REGISTERS(64, 32, "32", "33", "34", "35", "36", "37", "38")
WGMMA_FROM_REGISTERS(128, 64, "64", "65", "66", "67", "68", "69", "70")
WGMMA_FROM_REGISTERS(256, 128, "128", "129", "130", "131", "132", "133", "134")

// d[64 x 128] = a[64 x 32] * b[32 x 128] + (accumulate ? d : 0), of e4m3 in rows of 128 elements of k, both
// K-major: the next 32 of k are K_MAJOR_STEP on. The sum keeps fewer bits than f32 has.
__device__ __forceinline__ void wgmma_e4m3(float (&d)[64], uint32_t a, uint32_t b, bool accumulate) {
    asm volatile("{\n"
                 ".reg .pred accumulate;\n"
                 "setp.ne.b32 accumulate, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" WGMMA_NAMES_64 "}, %64, %65"
                 ", accumulate, 1, 1;\n"
                 "}"
                 : WGMMA_HELD_64
                 : "l"(uint64_t(SWIZZLED) << 32 | a), "l"(uint64_t(SWIZZLED) << 32 | b), "r"(int(accumulate)));
}
