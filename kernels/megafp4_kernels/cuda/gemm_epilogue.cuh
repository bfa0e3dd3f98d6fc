// What gemm.cu does with a tile of products before it leaves: scales, bias, slope, and how large
// the values are that are stored. Uses gemm.cu's defines and constants.
#pragma once
#include "gemm_ptx.cuh"

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
    double* squares;  // [rows / 16, columns / 128], both rounded up
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

// The old result under a thread's part of a panel. The kernel writes there: no load through the
// read-only path.
__device__ __forceinline__ void fetch_out(float (&old)[kPart], const Problem& p, const Epilogue& e,
                                          int first, int column) {
    const int pair = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < kPart; i += 2) {
        const long long row = min(row_of(first, i / 2 % 2), p.rows - 1);
        const int c = column + i / 4 * 8 + pair;
        const float* line = static_cast<const float*>(e.out) + row * p.columns;
        if (DIRECT) {
            old[i] = __ldcg(line + min(c, p.columns - 1));
            old[i + 1] = __ldcg(line + min(c + 1, p.columns - 1));
        } else {
            const float* at = line + min(c, p.columns - 2);
            const float2 values = __ldcg(reinterpret_cast<const float2*>(at));
            old[i] = values.x;
            old[i + 1] = values.y;
        }
    }
}

// Sum of squares of a thread's part of a panel, where it lies inside the matrix. In FP32, unless
// squares might leave its range: then the values are squared in FP64.
__device__ __forceinline__ double squares_of(float* d, const Problem& p, int first, int column) {
    if (first + 64 > p.rows || column + kPanel > p.columns) {
        const int pair = threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
            const int c = column + i / 4 * 8 + pair + i % 2;
            if (row_of(first, i / 2 % 2) >= p.rows || c >= p.columns) d[i] = 0.0f;
        }
    }
    float even = 0.0f, odd = 0.0f;
#pragma unroll
    for (int i = 0; i < kPart; i += 2) {
        even = fmaf(d[i], d[i], even);
        odd = fmaf(d[i + 1], d[i + 1], odd);
    }
    const float sum = even + odd;
    if (sum > 1e-30f && sum < 1e38f) return sum;
    double exact = 0.0;
#pragma unroll
    for (int i = 0; i < kPart; ++i) exact = fma(double(d[i]), double(d[i]), exact);
    return exact;
}

// Adds up what a warp's threads found in a block of 16 x 128, and stores it.
__device__ __forceinline__ void store_squares(double sum, const Problem& p, const Epilogue& e,
                                              int first, int column) {
#pragma unroll
    for (int distance = 16; distance; distance /= 2)
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, distance);
    const int row = first + threadIdx.x % kThreads / 32 * 16;
    if (threadIdx.x % 32 == 0 && row < p.rows && column < p.columns)
        e.squares[row / 16 * ((p.columns + 127LL) / 128) + column / 128] = sum;
}

// Scales a thread's part of a 64 x kPanel panel: element i lies in row_of(i / 2 % 2) and in column
// i / 4 * 8 + thread % 4 * 2 + i % 2 of the panel.
__device__ __forceinline__ void scale_panel(float* d, const Epilogue& e, const float (&scale)[2],
                                            const float (&inverse)[2], const float* columns,
                                            const float* weights, const float* old) {
    const int pair = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
        const int upper = i / 2 % 2, within = i / 4 * 8 + pair + i % 2;
        const float factor = SCALE_B_ROWS ? scale[upper] * columns[within] : scale[upper];
        d[i] = BIAS ? fmaf(d[i], factor, columns[kColumnValues / 2 + within]) : d[i] * factor;
        if (SLOPE) d[i] *= dge_slope(weights[i] * inverse[upper], e);
        if (kReadsOut) d[i] = __fadd_rn(d[i], old[i]);  // rounded twice, as by the L2 cache
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
            *out = OUT == OUT_ADD && !kReadsOut ? *out + d[i] : d[i];
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
                                      float (&weights)[2][kPart], float (&old)[2][kPart],
                                      const TensorMap* out, u32 staging, float* columns,
                                      int group, int first, int column0) {
    const int thread = threadIdx.x % kThreads;
    const int shift = BIAS == BF16 && thread >= kColumnValues / 2 ? 16 : 0;
    float scale[2], inverse[2];
    double squares = 0.0;
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
        if (kReadsOut && panel + 1 < kPanels)
            fetch_out(old[(panel + 1) % 2], p, e, first, column + kPanel);
        if (kColumns) columns[thread] = __uint_as_float(f.columns[panel] << shift);
        if (!DIRECT && thread == 0) tma_wait_read<1>();  // the buffer before last is free again
        if (kColumns || !DIRECT) named_barrier(1 + group, kThreads);
        scale_panel(part, e, scale, inverse, columns, weights[panel % 2], old[panel % 2]);
        if (SQUARES) {
            squares += squares_of(part, p, first, column);
            if (panel % kBlock == kBlock - 1) {
                store_squares(squares, p, e, first, column - (kBlock - 1) * kPanel);
                squares = 0.0;
            }
        }
        if (DIRECT) {
            store_direct(part, p, e, first, column);
            if (kColumns) named_barrier(1 + group, kThreads);
            continue;
        }
        stage_panel(part, buffer);
        async_proxy_fence();
        named_barrier(1 + group, kThreads);
        if (thread == 0) {
            if (OUT == OUT_ADD && !kReadsOut)
                tma_add(out, column, first, buffer);
            else
                tma_store(out, column, first, buffer);
            tma_commit();
        }
    }
}

