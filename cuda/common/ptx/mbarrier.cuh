// mbarrier: one function per instruction, no logic. Barriers are named by their shared-memory address.
#pragma once

__device__ __forceinline__ uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the asynchronous proxy and to the cluster; a barrier among the threads must follow.
__device__ __forceinline__ void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrives at the barrier of the same offset in CTA `rank` of the cluster. It publishes no memory to the cluster. It says that this CTA's
// products have read a stage: they were waited for before. The other CTA then starts tensor copies into that stage. As
// `.release.cluster` it would cost a GPU-wide memory barrier (MEMBAR.ALL.GPU) for each warp and stage.
__device__ __forceinline__ void mbarrier_arrive_remote(uint32_t barrier, uint32_t rank) {
    asm volatile("{\n"
                 ".reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
                 "}" ::"r"(barrier), "r"(rank)
                 : "memory");
}

// A word to the place of the same offset in CTA `rank` of the cluster, whose four bytes count on the barrier of the same offset there.
__device__ __forceinline__ void store_async_remote(uint32_t at, uint32_t value, uint32_t barrier, uint32_t rank) {
    asm volatile("{\n"
                 ".reg .b32 to, remote;\n"
                 "mapa.shared::cluster.u32 to, %0, %3;\n"
                 "mapa.shared::cluster.u32 remote, %2, %3;\n"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [to], %1, [remote];\n"
                 "}" ::"r"(at), "r"(value), "r"(barrier), "r"(rank)
                 : "memory");
}

// True once the phase of that parity has completed, by arrivals of any CTA of the cluster. As `.acquire.cluster` it would drop the L1
// cache (CCTL.IVALL) at each try; nothing is read after it that another CTA has written.
__device__ __forceinline__ bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, done;\n"
                 "}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done != 0;
}
