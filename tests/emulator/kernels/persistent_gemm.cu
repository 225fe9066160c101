// persistent_gemm: y = x * w^T, bf16 in and out, in the form of a real Hopper kernel: blocks that stay, clusters, full-size tiles.
//
// Work    tiles of 128 x 256, chosen by a loop over the grid; the two CTAs of a cluster own neighbouring row tiles, load half of the w tile
//         each, and send it to both. Warpgroup 0 loads (one thread); warpgroups 1 and 2 multiply 64 rows each; three stages of 64 k.
// Order   the ring runs on across tiles. A stage is empty when both warpgroups of both CTAs have released it, one step after its wgmma was
//         issued. Each warpgroup stages its half of y, fences, meets at its own barrier, and one thread stores it by TMA; the next tile
//         overwrites the staging area only after that thread has waited for the stores to have read it.
#include "common.cuh"

struct PersistentGemmParams {
    TensorMap x;  // {k, rows}, box {64, 128}, 128-byte swizzle
    TensorMap w;  // {k, n}, box {64, 128}, 128-byte swizzle
    TensorMap y;  // {n, rows}, box {64, 64}, 128-byte swizzle
    u32 row_pairs;  // pairs of row tiles
    u32 columns;    // column tiles
    u32 steps;      // k / 64
};

constexpr u32 STAGES = 3;
constexpr u32 X_BYTES = 128 * 64 * 2;
constexpr u32 W_BYTES = 256 * 64 * 2;
constexpr u32 STAGE_BYTES = X_BYTES + W_BYTES;
constexpr u32 PANEL_BYTES = 64 * 64 * 2;  // 64 rows and 64 columns of y
constexpr u32 STAGING_BYTES = 4 * PANEL_BYTES;

// acc[64 x 256] = a[64 x 16] * b[256 x 16]^T + (accumulate ? acc : 0)
DEVICE void wgmma_64x256x16(float (&d)[128], u64 a, u64 b, bool accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred accumulate;\n"
        "setp.ne.b32 accumulate, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, accumulate, 1, 1, 0, 0;\n"
        "}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),
          "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),
          "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]),
          "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]),
          "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]),
          "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),
          "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]),
          "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]),
          "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
        : "l"(a), "l"(b), "r"(int(accumulate)));
}

extern "C" __global__ void __launch_bounds__(384, 1) __cluster_dims__(2, 1, 1)
    persistent_gemm(const __grid_constant__ PersistentGemmParams p) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 stages = shared_address(shared), staging = stages + STAGES * STAGE_BYTES;
    const u32 full = staging + 2 * STAGING_BYTES, empty = full + 8 * STAGES;
    const u32 rank = cluster_rank();
    const u32 group = threadIdx.x / 128, thread = threadIdx.x % 128;
    const u32 tiles = p.row_pairs * p.columns;

    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; ++s) {
            mbarrier_init(full + 8 * s, 1);
            mbarrier_init(empty + 8 * s, 4);
        }
        fence_mbarrier_init();
    }
    cluster_sync();

    u32 s = 0, phase = 0;
    if (group == 0) {
        registers_dec<40>();
        if (thread == 0) {
            for (u32 tile = blockIdx.x / 2; tile < tiles; tile += gridDim.x / 2) {
                const u32 row0 = (tile % p.row_pairs * 2 + rank) * 128, column0 = tile / p.row_pairs * 256;
                for (u32 step = 0; step < p.steps; ++step) {
                    const u32 x_tile = stages + s * STAGE_BYTES, w_half = x_tile + X_BYTES + rank * (W_BYTES / 2);
                    while (!mbarrier_try_wait_cluster(empty + 8 * s, phase ^ 1)) {}
                    mbarrier_expect_tx(full + 8 * s, STAGE_BYTES);
                    tma_load_2d(x_tile, p.x, step * 64, row0, full + 8 * s);
                    tma_load_2d_multicast(w_half, p.w, step * 64, column0 + 128 * rank, full + 8 * s, 3);
                    if (++s == STAGES) s = 0, phase ^= 1;
                }
            }
        }
    } else {
        registers_inc<232>();
        const u32 half = staging + (group - 1) * STAGING_BYTES;
        const u32 warp = thread / 32, lane = thread % 32;
        const u32 row = 16 * warp + lane % 16;
        float acc[128] = {}; // without zeros ptxas 12.4 serialises every wgmma
        for (u32 tile = blockIdx.x / 2; tile < tiles; tile += gridDim.x / 2) {
            const u32 row0 = (tile % p.row_pairs * 2 + rank) * 128 + (group - 1) * 64, column0 = tile / p.row_pairs * 256;
            u32 previous = 0;
            for (u32 step = 0; step < p.steps; ++step) {
                const u32 x_tile = stages + s * STAGE_BYTES, w_tile = x_tile + X_BYTES;
                const u64 a = descriptor(x_tile + (group - 1) * (X_BYTES / 2)), b = descriptor(w_tile);
                while (!mbarrier_try_wait(full + 8 * s, phase)) {}
                wgmma_fence();
#pragma unroll
                for (u32 j = 0; j < 4; ++j) wgmma_64x256x16(acc, a + 2 * j, b + 2 * j, step + j > 0);
                wgmma_commit();
                if (step > 0) {
                    wgmma_wait<1>();
                    if (thread < 2) mbarrier_arrive_remote(empty + 8 * previous, thread);
                }
                previous = s;
                if (++s == STAGES) s = 0, phase ^= 1;
            }
            wgmma_wait<0>();
            if (thread < 2) mbarrier_arrive_remote(empty + 8 * previous, thread);

            if (thread == 0) bulk_wait_read();
            if (group == 1) barrier_sync<1, 128>();
            else barrier_sync<2, 128>();
#pragma unroll
            for (u32 j = 0; j < 16; ++j) {
                const u32 chunk = 2 * (j % 4) + lane / 16;
                stmatrix_x4(half + j / 4 * PANEL_BYTES + row * 128 + (chunk ^ row % 8) * 16, pack_bf16(acc[8 * j], acc[8 * j + 1]),
                            pack_bf16(acc[8 * j + 2], acc[8 * j + 3]), pack_bf16(acc[8 * j + 4], acc[8 * j + 5]),
                            pack_bf16(acc[8 * j + 6], acc[8 * j + 7]));
            }
            fence_proxy_async();
            if (group == 1) barrier_sync<1, 128>();
            else barrier_sync<2, 128>();
            if (thread == 0) {
                for (u32 panel = 0; panel < 4; ++panel) tma_store_2d(p.y, half + panel * PANEL_BYTES, column0 + 64 * panel, row0);
                bulk_commit();
            }
        }
        if (thread == 0) bulk_wait();
    }
    cluster_sync();
}
