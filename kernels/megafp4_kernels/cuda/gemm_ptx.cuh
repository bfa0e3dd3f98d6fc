// Hopper's asynchronous machinery for the GEMM, as thin wrappers of PTX: mbarriers, the tensor
// memory accelerator (TMA), clusters and wgmma. Names follow the PTX instructions.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap {
    char data[128];
};

__device__ __forceinline__ u32 shared_address(const void* p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}

// ---- mbarriers; addresses are shared-memory addresses ----

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(bytes)
                 : "memory");
}

// Returns once the phase of the given parity is complete.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra finished;\n"
        "bra again;\n"
        "finished:\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Arrives at the same barrier of CTA `rank` of the cluster. Without `.release.cluster`, which costs
// a fence of the whole GPU: the caller has only read, through wgmma, and publishes nothing.
__device__ __forceinline__ void barrier_arrive(u32 barrier, u32 rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

__device__ __forceinline__ void named_barrier(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// ---- TMA ----

__device__ __forceinline__ void tma_prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void tma_load(u32 to, const TensorMap* map, int column, int row,
                                         u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

// Writes to the same address in every CTA of `mask` and signals the same barrier there.
__device__ __forceinline__ void tma_load_multicast(u32 to, const TensorMap* map, int column,
                                                   int row, u32 barrier, unsigned short mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(mask)
        : "memory");
}

// Brings what a copy of the same box would read to the L2 cache.
__device__ __forceinline__ void tma_prefetch(const TensorMap* map, int column, int row) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(map),
                 "r"(column), "r"(row)
                 : "memory");
}

__device__ __forceinline__ void tma_store(const TensorMap* map, int column, int row, u32 from) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group"
        " [%0, {%1, %2}], [%3];" ::"l"(map),
        "r"(column), "r"(row), "r"(from)
        : "memory");
}

__device__ __forceinline__ void tma_add(const TensorMap* map, int column, int row, u32 from) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group"
        " [%0, {%1, %2}], [%3];" ::"l"(map),
        "r"(column), "r"(row), "r"(from)
        : "memory");
}

__device__ __forceinline__ void tma_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all but the latest `pending` groups of stores have read their shared memory.
template <int pending>
__device__ __forceinline__ void tma_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

__device__ __forceinline__ void tma_wait_all() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Makes ordinary writes to shared memory visible to TMA and wgmma.
__device__ __forceinline__ void async_proxy_fence() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- wgmma ----

template <int registers>
__device__ __forceinline__ void registers_grow() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers>
__device__ __forceinline__ void registers_shrink() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// Matrix in shared memory, rows of 128 bytes along K, 128-byte swizzle: groups of 8 rows lie
// 1024 bytes apart. Moving along K inside the 128 bytes adds bytes / 16 to the descriptor.
__device__ __forceinline__ u64 matrix_descriptor(u32 address) {
    return (u64(1) << 62) | (u64(1024 >> 4) << 32) | (u64(1) << 16) | u64((address & 0x3FFFF) >> 4);
}

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define REGISTERS_8(i)                                                                     \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define REGISTERS_64(i)                                                                   \
    REGISTERS_8(i), REGISTERS_8(i + 8), REGISTERS_8(i + 16), REGISTERS_8(i + 24),         \
        REGISTERS_8(i + 32), REGISTERS_8(i + 40), REGISTERS_8(i + 48), REGISTERS_8(i + 56)
#define NAMES_64                                           \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, "             \
    "%10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "   \
    "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "   \
    "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "   \
    "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "   \
    "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "   \
    "%60, %61, %62, %63"
#define NAMES_128                                                    \
    NAMES_64 ", "                                                    \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, "             \
    "%74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "             \
    "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, "             \
    "%94, %95, %96, %97, %98, %99, %100, %101, %102, %103, "         \
    "%104, %105, %106, %107, %108, %109, %110, %111, %112, %113, "   \
    "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, "   \
    "%124, %125, %126, %127"
#define WGMMA(n, names, a_name, b_name, keep_name, ...)                                          \
    asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, " keep_name ", 0;\n"                    \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k32.f32." TEXT(A_TYPE) "." TEXT(B_TYPE) \
                 " {" names "}, " a_name ", " b_name ", keep, 1, 1;\n}"                          \
                 : __VA_ARGS__                                                                   \
                 : "l"(a), "l"(b), "r"(keep))

// d [64 x columns] = a [64 x 32] b^T [32 x columns] + (keep ? d : 0), asynchronously.
__device__ __forceinline__ void wgmma(float (&d)[128], u64 a, u64 b, int keep) {
    WGMMA(256, NAMES_128, "%128", "%129", "%130", REGISTERS_64(0), REGISTERS_64(64));
}

__device__ __forceinline__ void wgmma(float (&d)[64], u64 a, u64 b, int keep) {
    WGMMA(128, NAMES_64, "%64", "%65", "%66", REGISTERS_64(0));
}
