// How the MXFP4 quantizer reads a tile and transforms it.
//
// Of a tile of 128 x 128, whose 128-byte swizzle keeps both ways of reading it nearly free of bank
// conflicts, the row output contracts over the columns, the col output over the rows: each warp
// owns 16 lines. Of BF16 input lane (g, q) = (lane / 4, lane % 4) owns lines g and g + 8 and, of 64
// elements along the contraction, the consecutive 16 from 16q on: one Philox call, half a block,
// one store. Of FP32 input lane (g, q) = (lane % 16, lane / 16) owns the block of 32 from 32q on of
// line g.
//
// The Hadamard matrix of 64 (BF16 input) is the Kronecker product of one of 16 over index bits 0,
// 1, 4, 5, done by the tensor cores, and one of 4 over bits 2, 3, done on registers. The signs ride
// on the tensor core's second operand, which is built once. Sums of FP32 input follow the order of
// the specification instead. With blocks of 16 and 32 the second operand holds zeros, so an Inf or
// NaN spreads to its 64 elements.
#pragma once
#include "mxfp4.cuh"

constexpr int kTile = 128;
constexpr int kThreads = 256;
constexpr int kBox = 128 * 128;  // bytes of one TMA copy: 128 rows of 128
constexpr int kBoxes = FP32_INPUT ? 4 : 2;
constexpr int kBoxColumns = kTile / kBoxes;
constexpr int kStage = kBoxes * kBox;
constexpr bool kFromE4M3 = COL_FROM_E4M3;

__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1,
                                    const float (&c)[4], bool half) {
    if (half)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]),
              "f"(c[2]), "f"(c[3]));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]),
              "f"(c[2]), "f"(c[3]));
}

__device__ __forceinline__ void load_transposed(u32 (&a)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(address));
}

__device__ __forceinline__ void load_16(u32 (&r)[4], u32 address) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

__device__ __forceinline__ u32 load_4(u32 address) {
    u32 r;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r) : "r"(address));
    return r;
}

__device__ __forceinline__ void butterfly(float& a, float& b) {
    const float sum = a + b, difference = a - b;
    a = sum;
    b = difference;
}

__device__ __forceinline__ float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(u32 pair) {
    return __uint_as_float(pair & 0xFFFF0000u);
}

// The E4M3 codes of a pair of BF16 values, as FP16.
__device__ __forceinline__ u32 through_e4m3(u32 pair, float reciprocal) {
    return half2_from_e4m3x2(
        to_e4m3x2(low_bf16(pair) * reciprocal, high_bf16(pair) * reciprocal));
}

struct Draw {
    u32 words[4];
    __device__ __forceinline__ u32 word(int i) const {
        return i == 0 ? words[0] : i == 1 ? words[1] : i == 2 ? words[2] : words[3];
    }
    __device__ __forceinline__ u32 bit(int i) const { return word(i >> 5) >> (i & 31) & 1; }
};

// One way of going through a tile. kCol: lines are columns of the tile.
template <bool kCol, int kG, bool kE4M3>
struct Lines {
    static constexpr bool kTensor = kG != 0 && !FP32_INPUT;
    static constexpr int kHalves = kG == 128 ? 2 : 1;  // chunks of 64 transformed together
    static constexpr bool kLineRuns = kCol ? COL_RUNS : ROW_RUNS;
    static constexpr bool kGroupRuns = kCol ? ROW_RUNS : COL_RUNS;
    u32 operand;         // FP32_INPUT == 0: shared address of the second operand
    u32 signs[kHalves];  // FP32 input: of this lane's 32 elements
    float scale, reciprocal;  // of E4M3

    // The second operand is the same for all warps: b[half][group][lane][n-tile][register].
    __device__ __forceinline__ void prepare(const long long* position, u32 stream, int step,
                                            u32* b) {
        if (kG == 0) return;
        operand = shared_address(b) + threadIdx.x % 32 * 16;
        const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
        const u64 seed = position[0];
        Draw draw{{0, 0, step < 0 ? u32(position[1]) : u32(step), stream}};
        philox(draw.words, u32(seed), u32(seed >> 32));
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            const u32 word = draw.word((64 * half + 2 * (lane & 16)) >> 5 & (kG - 1) >> 5);
            signs[half] = kG == 16 ? (word & 0xFFFF) * 0x10001 : word;
        }
        if (!kTensor || threadIdx.x >= 32) return;
        u32 pair = 0;
        const u32 one = kE4M3 ? 0x3C00u : 0x3F80u;
#pragma unroll
        for (int i = 0; i < kHalves * 32; ++i) {
            const int j = i & 1, h = i >> 1 & 1, tile = i >> 2 & 1, group = i >> 3 & 3;
            const int half = i >> 5;
            const int in = kCol ? j | (q & 1) << 1 | group << 2 | (q >> 1) << 4 | h << 5
                                : j | h << 1 | group << 2 | q << 4;
            const int out = (g & 1) | tile << 1 | (g >> 1) << 4;
            const u32 odd = __popc(in & out & 0x33 & (kG - 1)) & 1;
            const u32 minus = odd ^ draw.bit((64 * half + in) & (kG - 1));
            const bool apart = (in ^ out) & 0x30 & ~(kG - 1);
            const u32 entry = apart ? 0u : one | minus << 15;
            pair = j ? pair | entry << 16 : entry;
            if (j) b[((half * 4 + group) * 32 + lane) * 4 + tile * 2 + h] = pair;
        }
    }

    // First operand of the tensor core: 16 lines x 16 of the chunk's 64 elements.
    __device__ __forceinline__ void fragments(u32 (&a)[4][4], u32 stage, int chunk) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
        if (kCol) {
            const int r = lane & 7, m = lane >> 3;
            const int token = 64 * chunk + ((r & 3) | (r >> 2) << 4 | (m >> 1) << 5);
            const int piece = (warp & 3) * 2 + (m & 1);
            const u32 base = stage + (warp >> 2) * kBox + token * 128 + ((piece ^ (r & 3)) << 4);
#pragma unroll
            for (int group = 0; group < 4; ++group)
                load_transposed(a[group], (base ^ (group & 1) << 6) + group * 512);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                u32 r[4];
                const u32 row = 16 * warp + g + (i & 1) * 8;
                load_16(r, stage + chunk * kBox + row * 128 + ((2 * q + (i >> 1) ^ g) << 4));
                a[i & 2][i & 1] = r[0], a[i & 2][(i & 1) + 2] = r[1];
                a[(i & 2) + 1][i & 1] = r[2], a[(i & 2) + 1][(i & 1) + 2] = r[3];
            }
        }
        if (kE4M3) {
#pragma unroll
            for (int i = 0; i < 16; ++i)
                a[i >> 2][i & 3] = through_e4m3(a[i >> 2][i & 3], reciprocal);
        }
    }

    // Transforms 64 elements but for the last stage, of index bit 3. `sums` grows by the sums of
    // the lines' elements.
    __device__ __forceinline__ void transform(float (&v)[2][16], u32 stage, int chunk, int half,
                                              float (&sums)[4]) const {
        u32 a[4][4];
        fragments(a, stage, chunk);
        const u32 ones = 0x3F803F80u;
#pragma unroll
        for (int group = 0; group < 4; ++group) {
            u32 b[4];
            load_16(b, operand + (half * 4 + group) * 512);
#pragma unroll
            for (int tile = 0; tile < 2; ++tile) {
                float c[4], d[4];
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    c[i] = group & 1 ? v[i >> 1][(i & 1) | tile << 1 | (group ^ 1) << 2] : 0.0f;
                mma(d, a[group], b[2 * tile], b[2 * tile + 1], c, kE4M3);
                // With the sum of both groups accumulated, p - q = 2p - (p + q).
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float* line = v[i >> 1];
                    const int at = (i & 1) | tile << 1 | group << 2;
                    line[group & 1 ? at ^ 4 : at] = d[i];
                    if (group & 1) line[at] = fmaf(2.0f, c[i], -d[i]);
                }
            }
            if (kCol && COL_SUMS) mma(sums, a[group], ones, ones, sums, false);
        }
    }

    // The last stage within 64 elements. The larger magnitude of a + b and a - b is |a| + |b|.
    __device__ __forceinline__ static int finish_transform(float (&v)[16]) {
        int amax = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            amax = max(amax, __float_as_int(fabsf(v[i]) + fabsf(v[i + 8])));
            butterfly(v[i], v[i + 8]);
        }
        return amax;
    }

    // BF16 values as they are.
    __device__ __forceinline__ void widen(float (&v)[2][16], u32 stage, int chunk) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 r[4];
            if (kCol) {
                const int row = lane & 7, m = lane >> 3;
                const int token = 64 * chunk + 16 * (row >> 1) + (row & 1) + 4 * i + 2 * (m >> 1);
                const int piece = (warp & 3) * 2 + (m & 1);
                load_transposed(r, stage + (warp >> 2) * kBox + token * 128 +
                                       ((piece ^ (token & 7)) << 4));
            } else {
                const u32 row = 16 * warp + g + (i & 1) * 8;
                load_16(r, stage + chunk * kBox + row * 128 + ((2 * q + (i >> 1) ^ g) << 4));
            }
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const int line = kCol ? n & 1 : i & 1;
                const int at = kCol ? 4 * i + (n & 2) : (i >> 1) * 8 + 2 * n;
                if (kE4M3) {
                    const float2 f = floats_from_half2(through_e4m3(r[n], reciprocal));
                    v[line][at] = f.x * scale, v[line][at + 1] = f.y * scale;
                } else {
                    v[line][at] = low_bf16(r[n]), v[line][at + 1] = high_bf16(r[n]);
                }
            }
        }
    }

    // FP32 values, transformed within 64 elements in the specification's order. A lane has 32
    // consecutive elements of one line, so that either way of reading meets few bank conflicts.
    __device__ __forceinline__ void load_fp32(float (&v)[2][16], u32 stage, int chunk,
                                              int half) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int line = 16 * warp + (lane & 15), along = 64 * chunk + 2 * (lane & 16);
        if (kCol) {
            const u32 base = stage + (line >> 5) * kBox + along * 128 + (line & 3) * 4;
#pragma unroll
            for (int i = 0; i < 32; ++i)
                v[i >> 4][i & 15] = __uint_as_float(
                    load_4(base + i * 128 + (((line >> 2 & 7) ^ (i & 7)) << 4)));
        } else {
            const u32 base = stage + (along >> 5) * kBox + line * 128;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                u32 r[4];
                load_16(r, base + ((i ^ (line & 7)) << 4));
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    v[i >> 2][(i & 3) * 4 + j] = __uint_as_float(r[j]);
            }
        }
        if (kE4M3) {
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                float& low = v[i >> 3][2 * i & 15];
                float& high = v[i >> 3][2 * i & 15 | 1];
                const float2 f = floats_from_half2(
                    half2_from_e4m3x2(to_e4m3x2(low * reciprocal, high * reciprocal)));
                low = f.x * scale, high = f.y * scale;
            }
        }
        if constexpr (kG != 0) {
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                const u32 minus = signs[half] << (31 - i) & 0x80000000u;
                v[i >> 4][i & 15] = __uint_as_float(__float_as_uint(v[i >> 4][i & 15]) ^ minus);
            }
#pragma unroll
            for (int width = 1; width < 16; width *= 2)
#pragma unroll
                for (int i = 0; i < 32; ++i)
                    if (!(i & width)) butterfly(v[i >> 4][i & 15], v[i >> 4][i & 15 | width]);
        }
        if constexpr (kG > 16) {
#pragma unroll
            for (int i = 0; i < 16; ++i) butterfly(v[0][i], v[1][i]);
        }
        if constexpr (kG > 32) {
            const float sign = lane & 16 ? -1.0f : 1.0f;
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                float& mine = v[i >> 4][i & 15];
                mine = fmaf(mine, sign, __shfl_xor_sync(~0u, mine, 16));
            }
        }
    }

    // Also the bits of the largest magnitude of each block: of a line, half of which lie in the
    // neighbouring lane, or of FP32 input in v[0] and v[1].
    __device__ __forceinline__ void load(float (&v)[kHalves][2][16], int (&amax)[kHalves][2],
                                         u32 stage, int chunk, float (&sums)[4]) const {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            if constexpr (FP32_INPUT)
                load_fp32(v[half], stage, chunk + half, half);
            else if constexpr (kTensor)
                transform(v[half], stage, chunk + half, half, sums);
            else
                widen(v[half], stage, chunk);
#pragma unroll
            for (int i = 0; i < 2; ++i)
                if (kTensor) amax[half][i] = finish_transform(v[half][i]);
        }
        if constexpr (kHalves == 2) {
#pragma unroll
            for (int i = 0; i < 32; ++i) butterfly(v[0][i >> 4][i & 15], v[1][i >> 4][i & 15]);
        }
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                int& bits = amax[half][i];
                if (!kTensor || kHalves == 2) bits = largest(v[half][i]);
                if (kTensor && kE4M3) bits = __float_as_int(__int_as_float(bits) * scale);
                if (!FP32_INPUT) bits = max(bits, __shfl_xor_sync(~0u, bits, 1));
            }
            if (FP32_INPUT) amax[half][0] = amax[half][1] = max(amax[half][0], amax[half][1]);
        }
    }

    // Lines from line0 on and contraction indices from k0 on; `sums`: where those of this tile's
    // elements go, if anywhere.
    template <int kOutput, int kRounding, bool kClip>
    __device__ __forceinline__ void run(Output& o, u32 stage, int line0, int k0,
                                        float* sums) const {
        constexpr int kLines = FP32_INPUT ? 1 : 2, kRun = FP32_INPUT ? 2 : 1;
        const int lane = threadIdx.x % 32;
        const int line = line0 + threadIdx.x / 32 * 16 + (FP32_INPUT ? lane & 15 : lane / 4);
        const int k = k0 + (FP32_INPUT ? 2 * (lane & 16) : lane % 4 * 16);
        const float gain = kTensor && kE4M3 ? scale : 1.0f;
        LineDraw lines[kLines];
        for (int i = 0; i < kLines; ++i) lines[i] = draw_line<kLineRuns>(line + 8 * i, o);
        float totals[4] = {};
        size_t at = size_t(line) * o.length + k;
#pragma unroll 1
        for (int chunk = 0; chunk < 2; chunk += kHalves, at += 64 * kHalves) {
            float v[kHalves][2][16];
            int amax[kHalves][2];
            load(v, amax, stage, chunk, totals);
#pragma unroll
            for (int i = 0; i < 2 * kHalves; ++i) {
                const int half = i / 2, below = i % kLines, right = i % 2 * (kRun - 1);
                const int along = 64 * (chunk + half) + 16 * right;
                const bool inside = line + 8 * below < o.lines && k + along < o.length;
                const size_t to = at + 64 * half + 16 * right + size_t(8 * below) * o.length;
                if constexpr (kOutput == E4M3)
                    encode_e4m3(v[half][i % 2], to, inside, o);
                else
                    encode<kOutput, kRounding, kClip>(
                        v[half][i % 2], amax[half][i % 2], gain, lines[below],
                        draw_group<kGroupRuns>(k + along, o), to, inside,
                        FP32_INPUT ? !right : lane % 2 == 0, o);
            }
        }
        if (kCol && COL_SUMS && sums && lane % 4 == 0) {
            if (line < o.lines) sums[line] = totals[0];
            if (line + 8 < o.lines) sums[line + 8] = totals[2];
        }
    }
};
