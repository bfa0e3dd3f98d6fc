// FP8 GEMM for Hopper: out = (alpha * scale_a * scale_b * (a b^T) + bias) * slope, all K-major.
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
// SQUARES: 1 also sums up the squares of every 16 x 128 block of an FP32 result, in a fixed order;
// for OUT_ADD the old result is then read and the sum stored. CHUNK: after so many k-tiles the
// tensor core's sum, which keeps fewer bits than FP32, is added to one in registers; 0 is never.
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
constexpr int kBlock = 128 / kPanel;  // panels of a block of squares
constexpr int kPart = kPanel / 2;  // elements of a panel in each thread
constexpr int kThreads = 128;  // of a warpgroup
constexpr int kConsumers = 2;
constexpr int kAccumulators = kTileN / 2;  // per thread: 64 x kTileN over 128 threads
constexpr bool kColumns = SCALE_B_ROWS || BIAS;
constexpr bool kReadsOut = OUT == OUT_ADD && SQUARES;

struct Problem {
    int rows, columns, k_tiles;
    int tiles_m, tiles_n;  // in units of a cluster's tile
};

#include "gemm_epilogue.cuh"

// Tile of the walk: GROUP rows of tiles together, column by column.
__device__ __forceinline__ void tile_of(const Problem& p, int index, int& m, int& n) {
    const int per_group = GROUP * p.tiles_n;
    const int first = index / per_group * GROUP;
    const int rows = min(p.tiles_m - first, GROUP);
    const int rest = index % per_group;
    m = first + rest % rows;
    n = rest / rows;
}

// Brings a CTA's tile of the old result to L2.
__device__ __forceinline__ void prefetch_out(const TensorMap* out, int row, int column) {
    for (int c = 0; c < kTileN; c += kPanel)
        for (int r = 0; r < kTileM; r += 64) tma_prefetch(out, column + c, row + r);
}

__device__ __forceinline__ void produce(const Problem& p, const TensorMap* a, const TensorMap* b,
                                        const TensorMap* out, u32 stages, u32 full, u32 empty) {
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
            if (kReadsOut && !DIRECT && k == max(0, p.k_tiles - 8))  // the epilogue is near
                prefetch_out(out, row_a, n * kTileN);
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

// The same, but the tensor core adds up CHUNK tiles at most.
__device__ __forceinline__ void multiply_chunks(float (&total)[kAccumulators], int k_tiles,
                                                u32 stages, u32 full, u32 empty, int group,
                                                int& stage, u32& parity) {
    float d[kAccumulators];
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i) total[i] = 0.0f;
#pragma unroll 1
    for (int k = 0; k < k_tiles; k += CHUNK) {
        multiply(d, min(CHUNK, k_tiles - k), stages, full, empty, group, stage, parity);
#pragma unroll
        for (int i = 0; i < kAccumulators; ++i) total[i] += d[i];
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
         float factor, float cap, double* squares, void* out) {
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
        if (threadIdx.x == 0) produce(p, &map_a, &map_b, &map_out, stages, full, empty);
    } else {
        registers_grow<232>();
        const Epilogue e = {alpha,  scale_a,      stride_a,      scale_b,  bias,
                            weight, weight_scale, stride_weight, exponent, factor,
                            cap,    squares,      out};
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
            float old[2][kPart];
            if (kReadsOut) fetch_out(old[0], p, e, first, n * kTileN);
            float d[kAccumulators];
            if constexpr (CHUNK > 0)
                multiply_chunks(d, p.k_tiles, stages, full, empty, group, stage, parity);
            else
                multiply(d, p.k_tiles, stages, full, empty, group, stage, parity);
            store(d, p, e, f, weights, old, &map_out, staging + group * kStaging,
                  column_values + group * kColumnValues, group, first, n * kTileN);
        }
        if (!DIRECT && threadIdx.x % kThreads == 0) tma_wait_all();
    }
    // Nobody leaves while the other CTA may still write to its memory or its barriers.
    if (kCluster > 1) cluster_sync();
}
