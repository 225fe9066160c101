// Bulk tensor copies and cp.async: one function per instruction, no logic.
//
// `.shared::cluster` is written where the CTA's own shared memory is meant, too: PTX ISA 8.4 knows no other destination for bulk
// copies, and a CTA's own address is valid in that window.
#pragma once

// One box to shared memory; its bytes count on `barrier`. Elements outside the tensor arrive as zeros, and count.
__device__ __forceinline__ void tma_load_2d(uint32_t to, const TensorMap& map, uint32_t x, uint32_t y, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(&map),
                 "r"(x), "r"(y), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void tma_load_3d(uint32_t to, const TensorMap& map, uint32_t x, uint32_t y, uint32_t z, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
                 "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void tma_load_4d(uint32_t to, const TensorMap& map, uint32_t x, uint32_t y,
                                            uint32_t z, uint32_t w, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, "
                 "{%2, %3, %4, %5}], [%6];" ::"r"(to),
                 "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
                 : "memory");
}
// The same, of bytes that nobody will want again: they are the first to leave the L2 cache.
__device__ __forceinline__ void tma_load_3d_once(uint32_t to, const TensorMap& map, uint32_t x, uint32_t y, uint32_t z, uint32_t barrier) {
    asm volatile("{\n"
                 ".reg .b64 policy;\n"
                 "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
                 "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], policy;\n"
                 "}" ::"r"(to),
                 "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier)
                 : "memory");
}
// The same to every CTA of the cluster whose bit is set in `ranks`, at the same offset and counting on the barrier of the same offset.
__device__ __forceinline__ void tma_load_3d_multicast(uint32_t to, const TensorMap& map, uint32_t x, uint32_t y, uint32_t z, uint32_t barrier,
                                                      unsigned short ranks) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], "
                 "%6;" ::"r"(to),
                 "l"(&map), "r"(x), "r"(y), "r"(z), "r"(barrier), "h"(ranks)
                 : "memory");
}
// `bytes` that lie in a row, a multiple of 16 on 16 bytes on both sides; they count on `barrier`, and are the
// first to leave the L2 cache.
__device__ __forceinline__ void bulk_load_once(uint32_t to, const void* from, uint32_t bytes,
                                               uint32_t barrier) {
    asm volatile("{\n"
                 ".reg .b64 policy;\n"
                 "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
                 "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], policy;\n"
                 "}" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
// The same of bytes that other blocks will want soon.
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// 16 bytes to shared memory, of which the first `bytes` come from global memory and the rest are zero.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, uint32_t bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// One of the barrier's expected arrivals, made when this thread's earlier cp.async have landed.
__device__ __forceinline__ void cp_async_arrive(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// All of this thread's cp.async have landed.
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Orders shared memory written by ordinary code, which cp.async is, before asynchronous reads of it.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
