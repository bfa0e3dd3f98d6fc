// FP8 GEMM for Hopper: out = alpha * scale_a * scale_b * (a b^T) + bias, all of it K-major.
//
// A persistent, warp-specialised kernel. One thread of the first warpgroup copies tiles of a
// (128 x 128 bytes) and b (TILE_N x 128 bytes) into a ring of STAGES buffers with TMA; two
// warpgroups multiply 64 rows each with wgmma, one k-tile in flight while the next is issued.
// With CLUSTER 2, two CTAs, one above the other, share the tile of b: each loads one half of it
// and multicasts it to both, which cuts the traffic from L2 by a third. The epilogue scales in
// registers and leaves through shared memory and TMA, which clips at the edges of the matrix and,
// for OUT_ADD, adds in the L2 cache; the stores run on under the next tile's products.
//
// Defines: A_TYPE, B_TYPE: e4m3 | e5m2. TILE_N: 256 | 128. STAGES. CLUSTER: 1 | 2. GROUP: tiles of
// rows that are walked together, so that both operands stay in L2. OUT: OUT_BF16 | OUT_FP32 |
// OUT_ADD (into FP32). DIRECT: 1 stores element by element, for rows that TMA cannot address.
// SCALE_B_ROWS: scale_b has one value per row of b. BIAS, SLOPE: 0 | FP32 | BF16 (their dtype).
#include "gemm_ptx.cuh"

#define OUT_BF16 0
#define OUT_FP32 1
#define OUT_ADD 2
#define FP32 1
#define BF16 2

constexpr int kTileM = 128;
constexpr int kTileK = 128;
constexpr int kTileN = TILE_N;
constexpr int kStages = STAGES;
constexpr int kCluster = CLUSTER;
constexpr int kBytesA = kTileM * kTileK;
constexpr int kBytesB = kTileN * kTileK;
constexpr int kBox = 64 * 128;  // bytes of one TMA store: 64 rows of 128
constexpr int kStaging = 2 * kBox;  // per warpgroup
constexpr int kPanel = OUT == OUT_BF16 ? 64 : 32;  // columns of one store
constexpr int kColumnValues = 128;  // per warpgroup: 64 of scale_b, then 64 of bias
constexpr int kPanels = kTileN / kPanel;
constexpr int kPart = kPanel / 2;  // elements of a panel in each thread
constexpr int kThreads = 128;  // of a warpgroup
constexpr int kConsumers = 2;
constexpr int kAccumulators = kTileN / 2;  // per thread: 64 x kTileN over 128 threads
constexpr bool kColumns = SCALE_B_ROWS || BIAS;

struct Problem {
    int rows, columns, k_tiles;
    int tiles_m, tiles_n;  // in units of a cluster's tile
};

struct Epilogue {
    float alpha;
    const float* scale_a;
    int stride_a;  // 0: one scale, 1: one per row
    const float* scale_b;
    const void* bias;
    const void* weight;  // of the slope, [rows, columns]
    const float* weight_scale;
    int stride_weight;
    float exponent, factor, cap;  // slope = min(factor * |u|^exponent, cap)
    void* out;
};

// What the epilogue reads from memory, fetched before the products that hide the latency, and not
// touched until they are done: an instruction that uses a value waits for it.
struct Fetched {
    float scale_a[2];  // of this thread's two rows
    float scale_b;
    float weight_scale[2];
    u32 columns[kPanels];  // of each panel, the bits of one value of scale_b or of bias
};

__device__ __forceinline__ float load(const void* p, long long index, int type) {
    if (type == FP32) return __ldg(static_cast<const float*>(p) + index);
    const u32 bits = __ldg(static_cast<const unsigned short*>(p) + index);
    return __uint_as_float(bits << 16);
}

// Two neighbours in one aligned load.
__device__ __forceinline__ void load_pair(float* to, const void* p, long long index, int type) {
    if (type == FP32) {
        const float* at = static_cast<const float*>(p) + index;
        const float2 pair = __ldg(reinterpret_cast<const float2*>(at));
        to[0] = pair.x;
        to[1] = pair.y;
    } else {
        const unsigned short* at = static_cast<const unsigned short*>(p) + index;
        const u32 pair = __ldg(reinterpret_cast<const u32*>(at));
        to[0] = __uint_as_float(pair << 16);
        to[1] = __uint_as_float(pair & 0xFFFF0000);
    }
}

// Tile of the walk: GROUP rows of tiles together, column by column.
__device__ __forceinline__ void tile_of(const Problem& p, int index, int& m, int& n) {
    const int per_group = GROUP * p.tiles_n;
    const int first = index / per_group * GROUP;
    const int rows = min(p.tiles_m - first, GROUP);
    const int rest = index % per_group;
    m = first + rest % rows;
    n = rest / rows;
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// Derivative of the DGE curve [arXiv 2501.17116, eq. 8] at a weight divided by its scale.
__device__ __forceinline__ float dge_slope(float scaled, const Epilogue& e) {
    const float magnitude = fabsf(scaled) > 6.0f ? 6.0f : fabsf(scaled);  // NaN stays NaN
    const float inverse_step = magnitude < 2.0f ? 2.0f : magnitude < 4.0f ? 1.0f : 0.5f;
    const float steps = magnitude * inverse_step;
    const float u = fabsf(2.0f * (steps - floorf(steps)) - 1.0f);
    float power;  // u is 0 or at least 2^-23; the least normal number stands for 0
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(u == 0.0f ? 1.17549435e-38f : u));
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(e.exponent * power));
    const float slope = e.factor * power;
    return slope > e.cap ? e.cap : slope;
}

__device__ __forceinline__ void produce(const Problem& p, const TensorMap* a, const TensorMap* b,
                                        u32 stages, u32 full, u32 empty) {
    const u32 rank = kCluster > 1 ? cluster_rank() : 0;
    const int tiles = p.tiles_m * p.tiles_n;
    int stage = 0;
    u32 parity = 1;  // the first round finds every buffer empty
    for (int tile = blockIdx.x / kCluster; tile < tiles; tile += gridDim.x / kCluster) {
        int m, n;
        tile_of(p, tile, m, n);
        const int row_a = (m * kCluster + rank) * kTileM;
        const int row_b = n * kTileN + rank * (kTileN / kCluster);
        for (int k = 0; k < p.k_tiles; ++k) {
            barrier_wait(empty + 8 * stage, parity);
            const u32 arrived = full + 8 * stage;
            const u32 at = stages + stage * (kBytesA + kBytesB);
            barrier_expect(arrived, kBytesA + kBytesB);
            tma_load(at, a, k * kTileK, row_a, arrived);
            const u32 half = at + kBytesA + rank * (kBytesB / kCluster);
            if (kCluster > 1)
                tma_load_multicast(half, b, k * kTileK, row_b, arrived, (1 << kCluster) - 1);
            else
                tma_load(half, b, k * kTileK, row_b, arrived);
            if (++stage == kStages) {
                stage = 0;
                parity ^= 1;
            }
        }
    }
}

// One lane of each warp tells every CTA of the cluster that this warp has read a buffer.
__device__ __forceinline__ void release(u32 empty, int stage) {
    const int lane = threadIdx.x % 32;
    if (lane < kCluster) barrier_arrive(empty + 8 * stage, lane);
}

__device__ __forceinline__ void multiply(float (&d)[kAccumulators], int k_tiles, u32 stages,
                                         u32 full, u32 empty, int group, int& stage, u32& parity) {
    int previous = -1;
    for (int k = 0; k < k_tiles; ++k) {
        barrier_wait(full + 8 * stage, parity);
        const u32 at = stages + stage * (kBytesA + kBytesB);
        const u64 a = matrix_descriptor(at + group * (64 * kTileK));
        const u64 b = matrix_descriptor(at + kBytesA);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kTileK / 32; ++step)
            wgmma(d, a + step * 2, b + step * 2, k + step);
        wgmma_commit();
        wgmma_wait<1>();  // the k-tile before this one is done with its buffer
        if (previous >= 0) release(empty, previous);
        previous = stage;
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
    wgmma_wait<0>();
    release(empty, previous);
}

// The two rows of a warpgroup's 64 that a thread holds.
__device__ __forceinline__ int row_of(int first, int upper) {
    const int thread = threadIdx.x % kThreads;
    return first + thread / 32 * 16 + thread % 32 / 4 + upper * 8;
}

__device__ __forceinline__ Fetched fetch(const Problem& p, const Epilogue& e, int first,
                                         int column0) {
    const int thread = threadIdx.x % kThreads;
    Fetched f;
    if (!SCALE_B_ROWS) f.scale_b = __ldg(e.scale_b);
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
        const int row = min(row_of(first, upper), p.rows - 1);
        f.scale_a[upper] = __ldg(e.scale_a + row * e.stride_a);
        if (SLOPE) f.weight_scale[upper] = __ldg(e.weight_scale + row * e.stride_weight);
    }
#pragma unroll
    for (int panel = 0; panel < kPanels && kColumns; ++panel) {
        const int c = min(column0 + panel * kPanel + thread % (kColumnValues / 2), p.columns - 1);
        if (thread < kColumnValues / 2)
            f.columns[panel] = SCALE_B_ROWS ? __float_as_uint(__ldg(e.scale_b + c)) : 0;
        else if (BIAS == BF16)
            f.columns[panel] = __ldg(static_cast<const unsigned short*>(e.bias) + c);
        else
            f.columns[panel] = BIAS ? __ldg(static_cast<const u32*>(e.bias) + c) : 0;
    }
    return f;
}

// The slope's weights under a thread's part of a panel, in the order of its elements.
__device__ __forceinline__ void fetch_weights(float (&weights)[kPart], const Problem& p,
                                              const Epilogue& e, int first, int column) {
    const int pair = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < kPart; i += 2) {
        const long long row = min(row_of(first, i / 2 % 2), p.rows - 1);
        const int c = column + i / 4 * 8 + pair;
        if (DIRECT) {
            weights[i] = load(e.weight, row * p.columns + min(c, p.columns - 1), SLOPE);
            weights[i + 1] = load(e.weight, row * p.columns + min(c + 1, p.columns - 1), SLOPE);
        } else {
            load_pair(weights + i, e.weight, row * p.columns + min(c, p.columns - 2), SLOPE);
        }
    }
}

// Scales a thread's part of a 64 x kPanel panel: element i lies in row_of(i / 2 % 2) and in column
// i / 4 * 8 + thread % 4 * 2 + i % 2 of the panel.
__device__ __forceinline__ void scale_panel(float* d, const Epilogue& e, const float (&scale)[2],
                                            const float (&inverse)[2], const float* columns,
                                            const float* weights) {
    const int pair = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
        const int upper = i / 2 % 2, within = i / 4 * 8 + pair + i % 2;
        const float factor = SCALE_B_ROWS ? scale[upper] * columns[within] : scale[upper];
        d[i] = BIAS ? fmaf(d[i], factor, columns[kColumnValues / 2 + within]) : d[i] * factor;
        if (SLOPE) d[i] *= dge_slope(weights[i] * inverse[upper], e);
    }
}

__device__ __forceinline__ void store_direct(const float* d, const Problem& p, const Epilogue& e,
                                             int first, int column) {
    const int pair = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
        const int r = row_of(first, i / 2 % 2), c = column + i / 4 * 8 + pair + i % 2;
        if (r >= p.rows || c >= p.columns) continue;
        const long long at = (long long)r * p.columns + c;
        if (OUT == OUT_BF16) {
            static_cast<unsigned short*>(e.out)[at] = pack_bf16(d[i], 0.0f);
        } else {
            float* out = static_cast<float*>(e.out) + at;
            *out = OUT == OUT_ADD ? *out + d[i] : d[i];
        }
    }
}

// Writes a panel to shared memory as TMA's 128-byte swizzle wants it: the 16-byte chunk `c` of
// row r lies at chunk c ^ (r % 8).
__device__ __forceinline__ void stage_panel(const float* d, u32 staging) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    if (OUT == OUT_BF16) {
        const int row = warp * 16 + lane % 16;
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            const float* v = d + j * 4;
            const u32 chunk = (j + lane / 16) ^ (row % 8);
            asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                             staging + row * 128 + chunk * 16),
                         "r"(pack_bf16(v[0], v[1])), "r"(pack_bf16(v[2], v[3])),
                         "r"(pack_bf16(v[4], v[5])), "r"(pack_bf16(v[6], v[7]))
                         : "memory");
        }
    } else {
        const int pair = lane % 4;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int j = i / 2, row = warp * 16 + i % 2 * 8 + lane / 4;
            const u32 chunk = (j * 2 + pair / 2) ^ (row % 8);
            const u32 at = staging + row * 128 + chunk * 16 + pair % 2 * 8;
            asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(d[i * 2]),
                         "f"(d[i * 2 + 1])
                         : "memory");
        }
    }
}

__device__ __forceinline__ void store(float (&d)[kAccumulators], const Problem& p,
                                      const Epilogue& e, const Fetched& f,
                                      float (&weights)[2][kPart], const TensorMap* out,
                                      u32 staging, float* columns, int group, int first,
                                      int column0) {
    const int thread = threadIdx.x % kThreads;
    const int shift = BIAS == BF16 && thread >= kColumnValues / 2 ? 16 : 0;
    float scale[2], inverse[2];
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
        scale[upper] = e.alpha * f.scale_a[upper] * (SCALE_B_ROWS ? 1.0f : f.scale_b);
        if (SLOPE) inverse[upper] = 1.0f / f.weight_scale[upper];
    }
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
        const int column = column0 + panel * kPanel;
        const u32 buffer = staging + panel % 2 * kBox;
        float* part = d + panel * kPart;
        if (SLOPE && panel + 1 < kPanels)
            fetch_weights(weights[(panel + 1) % 2], p, e, first, column + kPanel);
        if (kColumns) columns[thread] = __uint_as_float(f.columns[panel] << shift);
        if (!DIRECT && thread == 0) tma_wait_read<1>();  // the buffer before last is free again
        if (kColumns || !DIRECT) named_barrier(1 + group, kThreads);
        scale_panel(part, e, scale, inverse, columns, weights[panel % 2]);
        if (DIRECT) {
            store_direct(part, p, e, first, column);
            if (kColumns) named_barrier(1 + group, kThreads);
            continue;
        }
        stage_panel(part, buffer);
        async_proxy_fence();
        named_barrier(1 + group, kThreads);
        if (thread == 0) {
            if (OUT == OUT_ADD)
                tma_add(out, column, first, buffer);
            else
                tma_store(out, column, first, buffer);
            tma_commit();
        }
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
#if CLUSTER > 1
    __cluster_dims__(CLUSTER, 1, 1)
#endif
    gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
         const __grid_constant__ TensorMap map_out, int rows, int columns, int k, float alpha,
         const float* scale_a, int stride_a, const float* scale_b, const void* bias,
         const void* weight, const float* weight_scale, int stride_weight, float exponent,
         float factor, float cap, void* out) {
    extern __shared__ __align__(1024) char shared[];
    const u32 stages = shared_address(shared);
    const u32 staging = stages + kStages * (kBytesA + kBytesB);
    float* column_values =
        reinterpret_cast<float*>(shared + kStages * (kBytesA + kBytesB) + kConsumers * kStaging);
    const u32 full = staging + kConsumers * (kStaging + kColumnValues * 4);
    const u32 empty = full + 8 * kStages;
    const Problem p = {rows, columns, (k + kTileK - 1) / kTileK,
                       (rows + kTileM * kCluster - 1) / (kTileM * kCluster),
                       (columns + kTileN - 1) / kTileN};

    if (threadIdx.x == 0) {
        tma_prefetch_map(&map_a);
        tma_prefetch_map(&map_b);
        for (int stage = 0; stage < kStages; ++stage) {
            barrier_init(full + 8 * stage, 1);
            barrier_init(empty + 8 * stage, kConsumers * 4 * kCluster);
        }
        barrier_init_fence();
    }
    if (kCluster > 1)
        cluster_sync();
    else
        __syncthreads();

    if (threadIdx.x < kThreads) {
        registers_shrink<40>();
        if (threadIdx.x == 0) produce(p, &map_a, &map_b, stages, full, empty);
    } else {
        registers_grow<232>();
        const Epilogue e = {alpha,  scale_a,      stride_a,      scale_b,  bias,
                            weight, weight_scale, stride_weight, exponent, factor,
                            cap,    out};
        const int group = threadIdx.x / kThreads - 1;
        const int tiles = p.tiles_m * p.tiles_n;
        const int rank = kCluster > 1 ? cluster_rank() : 0;
        int stage = 0;
        u32 parity = 0;
        for (int tile = blockIdx.x / kCluster; tile < tiles; tile += gridDim.x / kCluster) {
            int m, n;
            tile_of(p, tile, m, n);
            const int first = (m * kCluster + rank) * kTileM + group * 64;
            const Fetched f = fetch(p, e, first, n * kTileN);
            float weights[2][kPart];
            if (SLOPE) fetch_weights(weights[0], p, e, first, n * kTileN);
            float d[kAccumulators];
            multiply(d, p.k_tiles, stages, full, empty, group, stage, parity);
            store(d, p, e, f, weights, &map_out, staging + group * kStaging,
                  column_values + group * kColumnValues, group, first, n * kTileN);
        }
        if (!DIRECT && threadIdx.x % kThreads == 0) tma_wait_all();
    }
    // Nobody leaves while the other CTA may still write to its memory or its barriers.
    if (kCluster > 1) cluster_sync();
}
