// The MXFP4 quantizer: signs, Hadamard transform, E8M0 scales, rounding and folding in one pass
// over x [rows, columns], BF16 or FP32, for one or two outputs.
//
// A persistent kernel. Tiles of 128 x 128 come in through a ring of STAGES buffers by TMA, whose
// 128-byte swizzle keeps both ways of reading them nearly free of bank conflicts. The row output
// contracts over the columns, the col output over the rows: each warp owns 16 lines of the tile in
// turn. Lane (g, q) = (lane / 4, lane % 4) owns lines g and g + 8 and, of 64 elements along the
// contraction, the consecutive 16 from 16q on: one Philox call, half a block, one store.
//
// The Hadamard matrix of 64 (BF16 input) is the Kronecker product of one of 16 over index bits 0,
// 1, 4, 5, done by the tensor cores, and one of 4 over bits 2, 3, done on registers. The signs ride
// on the tensor core's second operand, which is built once. Sums of FP32 input follow the order of
// the specification instead. With blocks of 16 and 32 the second operand holds zeros, so an Inf or
// NaN spreads to its 64 elements.
//
// Defines: FP32_INPUT. ROW, COL: 0 | FOLDED | PACKED, ROW also E4M3. ROW_G, COL_G: 0, 16, 32, 64,
// 128. ROW_ROUNDING, COL_ROUNDING. ROW_CLIP, COL_CLIP: values may exceed 6. COL_FROM_E4M3. STAGES.
// CTAS: per multiprocessor.
#include "mxfp4.cuh"

constexpr int kTile = 128;
constexpr int kThreads = 256;
constexpr int kBox = 128 * 128;  // bytes of one TMA copy: 128 rows of 128
constexpr int kBoxes = FP32_INPUT ? 4 : 2;
constexpr int kBoxColumns = kTile / kBoxes;
constexpr int kStage = kBoxes * kBox;
constexpr bool kFromE4M3 = COL_FROM_E4M3;

__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, bool half) {
    if (half)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
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
    u32 operand;         // FP32_INPUT == 0: shared address of the second operand
    u32 signs[kHalves];  // FP32 input: of this lane's 16 elements
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
            const int at = (64 * half + 16 * q) & (kG - 1);
            signs[half] = draw.word(at >> 5) >> (at & 31) & 0xFFFF;
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

    __device__ __forceinline__ void transform(float (&v)[2][16], u32 stage, int chunk,
                                              int half) const {
        u32 a[4][4];
        fragments(a, stage, chunk);
#pragma unroll
        for (int group = 0; group < 4; ++group) {
            u32 b[4];
            load_16(b, operand + (half * 4 + group) * 512);
#pragma unroll
            for (int tile = 0; tile < 2; ++tile) {
                float d[4];
                mma(d, a[group], b[2 * tile], b[2 * tile + 1], kE4M3);
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    v[i >> 1][(i & 1) | tile << 1 | group << 2] = kE4M3 ? d[i] * scale : d[i];
            }
        }
#pragma unroll
        for (int i = 0; i < 32; ++i)
            if (!(i & 4)) butterfly(v[i >> 4][i & 15], v[i >> 4][i & 15 | 4]);
#pragma unroll
        for (int i = 0; i < 32; ++i)
            if (!(i & 8)) butterfly(v[i >> 4][i & 15], v[i >> 4][i & 15 | 8]);
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

    // FP32 values, transformed within 64 elements in the specification's order.
    __device__ __forceinline__ void load_fp32(float (&v)[2][16], u32 stage, int chunk,
                                              int half) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const int element = i & 15, line = 16 * warp + g + (i >> 4) * 8;
            const int along = 64 * chunk + 16 * q + element;
            const int row = kCol ? along : line, column = kCol ? line : along;
            const u32 piece = (column >> 2 & 7) ^ (row & 7);
            float f = __uint_as_float(load_4(stage + (column >> 5) * kBox + row * 128 +
                                             (piece << 4) + (column & 3) * 4));
            if (kE4M3) {
                f = floats_from_half2(half2_from_e4m3x2(to_e4m3x2(f * reciprocal, 0.0f))).x;
                f *= scale;
            }
            const u32 minus = kG ? signs[half] << (31 - element) & 0x80000000u : 0u;
            v[i >> 4][element] = __uint_as_float(__float_as_uint(f) ^ minus);
        }
        if (kG == 0) return;
#pragma unroll
        for (int width = 1; width < 16; width *= 2)
#pragma unroll
            for (int i = 0; i < 32; ++i)
                if (!(i & width)) butterfly(v[i >> 4][i & 15], v[i >> 4][i & 15 | width]);
#pragma unroll
        for (int width = 1; width < 4 && width * 16 < kG; width *= 2)
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                float& mine = v[i >> 4][i & 15];
                const float other = __shfl_xor_sync(~0u, mine, width);
                mine = lane & width ? other - mine : mine + other;
            }
    }

    __device__ __forceinline__ void load(float (&v)[2][16], u32 stage, int chunk, int half) const {
        if (FP32_INPUT)
            load_fp32(v, stage, chunk, half);
        else if (kTensor)
            transform(v, stage, chunk, half);
        else
            widen(v, stage, chunk);
    }

    template <int kOutput, int kRounding, bool kClip>
    __device__ __forceinline__ void run(Output& o, u32 stage, int line0, int k0) const {
        const int lane = threadIdx.x % 32;
        const int line = line0 + threadIdx.x / 32 * 16 + lane / 4;
        const int k = k0 + lane % 4 * 16;
#pragma unroll 1
        for (int chunk = 0; chunk < 2; chunk += kHalves) {
            float v[kHalves][2][16];
#pragma unroll
            for (int half = 0; half < kHalves; ++half) load(v[half], stage, chunk + half, half);
            if (kHalves == 2) {
#pragma unroll
                for (int i = 0; i < 32; ++i)
                    butterfly(v[0][i >> 4][i & 15], v[kHalves - 1][i >> 4][i & 15]);
            }
#pragma unroll
            for (int i = 0; i < 2 * kHalves; ++i) {
                const int at = k + 64 * (chunk + i / 2), l = line + i % 2 * 8;
                if (kOutput == E4M3)
                    encode_e4m3(v[i / 2][i % 2], l, at, o);
                else
                    encode<kOutput, kRounding, kClip>(v[i / 2][i % 2], l, at, o);
            }
        }
    }
};

__device__ __forceinline__ Output describe(void* data, u8* scales, int lines, int length,
                                           float factor, const long long* position, int stream,
                                           int offset, const int* window) {
    const u64 seed = position[0];
    const u32 first = u32(position[2]);
    return {data, scales, lines, length, factor, u32(seed), u32(seed >> 32), u32(position[1]),
            u32(stream), offset == 1 ? first : 0u, offset == 2 ? first / 16 : 0u,
            window ? window[W_BASE] : 0, 0, 0};
}

__device__ __forceinline__ void fetch(const TensorMap* map, u32 stage, u32 barrier, int tile,
                                      int tiles_x) {
    barrier_expect(barrier, kStage);
#pragma unroll
    for (int box = 0; box < kBoxes; ++box)
        tma_load(stage + box * kBox, map, tile % tiles_x * kTile + box * kBoxColumns,
                 tile / tiles_x * kTile, barrier);
}

// *_scale: FP32 [1]; the tensor's scale 2^base, written, and for ROW == E4M3 its scale, read.
// *_offset: what position[2] is added to; 0: nothing, 1: the line, 2: the contraction index.
extern "C" __global__ void __launch_bounds__(kThreads, CTAS)
quantize(const __grid_constant__ TensorMap map, int rows, int columns, const long long* position,
         const float* e4m3_scale, void* row_data, u8* row_scales, float* row_scale,
         int* row_window, float row_prescale, int row_stream, int row_sign_stream,
         int row_sign_step, int row_offset, void* col_data, u8* col_scales, float* col_scale,
         int* col_window, float col_prescale, int col_stream, int col_sign_stream,
         int col_sign_step, int col_offset, int again) {
    extern __shared__ __align__(1024) u8 buffers[];
    __shared__ __align__(8) u64 full[STAGES];
    __shared__ int reduced[2];
    __shared__ __align__(16) u32 operands[ROW_G == 128 || COL_G == 128 ? 2048 : 1024];
    const bool row_runs = ROW && (!again || (ROW == FOLDED && row_window[W_REDO]));
    const bool col_runs = COL && (!again || (COL == FOLDED && col_window[W_REDO]));
    if (!row_runs && !col_runs) return;
    const int tiles_x = (columns + kTile - 1) / kTile;
    const int tiles = tiles_x * ((rows + kTile - 1) / kTile);
    const u32 stages = (shared_address(buffers) + 1023) & ~1023u;
    const u32 barriers = shared_address(full);
    const int count = tiles > int(blockIdx.x) ? (tiles - 1 - blockIdx.x) / gridDim.x + 1 : 0;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) barrier_init(barriers + 8 * s, 1);
        barrier_init_fence();
        for (int s = 0; s < STAGES && s < count; ++s)
            fetch(&map, stages + s * kStage, barriers + 8 * s, blockIdx.x + s * gridDim.x,
                  tiles_x);
    }
    Output row = describe(row_data, row_scales, rows, columns,
                          ROW == E4M3 ? 1.0f / *row_scale : row_prescale * 0x1p-14f, position,
                          row_stream, row_offset, ROW == FOLDED ? row_window : nullptr);
    Output col = describe(col_data, col_scales, columns, rows, col_prescale * 0x1p-14f, position,
                          col_stream, col_offset, COL == FOLDED ? col_window : nullptr);
    Lines<false, ROW_G, false> row_lines;
    Lines<true, COL_G, kFromE4M3> col_lines;
    if (ROW) row_lines.prepare(position, row_sign_stream, row_sign_step, operands);
    if (COL)
        col_lines.prepare(position, col_sign_stream, col_sign_step,
                          operands + sizeof(operands) / 8);
    if (kFromE4M3) {
        col_lines.scale = *e4m3_scale;
        col_lines.reciprocal = 1.0f / *e4m3_scale;
    }
    __syncthreads();
    for (int i = 0, s = 0, parity = 0; i < count; ++i) {
        const int tile = blockIdx.x + i * gridDim.x;
        const int x = tile % tiles_x * kTile, y = tile / tiles_x * kTile;
        const u32 stage = stages + s * kStage;
        barrier_wait(barriers + 8 * s, parity);
        if (ROW && row_runs) row_lines.template run<ROW, ROW_ROUNDING, ROW_CLIP>(row, stage, y, x);
        if (COL && col_runs) col_lines.template run<COL, COL_ROUNDING, COL_CLIP>(col, stage, x, y);
        __syncthreads();
        if (threadIdx.x == 0 && i + STAGES < count)
            fetch(&map, stage, barriers + 8 * s, tile + STAGES * gridDim.x, tiles_x);
        if (++s == STAGES) s = 0, parity ^= 1;
    }
    if (ROW == FOLDED && row_runs) finish(row, row_window, row_scale, again, reduced);
    if (COL == FOLDED && col_runs) finish(col, col_window, col_scale, again, reduced);
}
