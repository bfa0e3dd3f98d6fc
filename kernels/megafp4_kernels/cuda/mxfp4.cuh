// The numbers of the MXFP4 quantizer: Philox, E8M0 scales, rounding in packed FP16, folding.
//
// E2M1 inside FP16. A block's values are brought to v * 2^-14, so that E2M1's 1.0 is the smallest
// normal FP16 and E2M1's subnormal 0.5 an FP16 subnormal with the same step. Bits [11:9] of the
// half are then the code, and the nine bits below them the remainder in units of 2^-9 of a step.
// Truncating to FP16 keeps "remainder + dither >= 1" exact, because the centred dither of a byte i,
// (2i + 1) / 512, is a whole number of these units.
#pragma once
#include "gemm_ptx.cuh"

typedef unsigned char u8;

#define FOLDED 1
#define PACKED 2
#define E4M3 3
#define STOCHASTIC 0
#define NEAREST_EVEN 1
#define NEAREST_AWAY 2

// Fields of a window, the state of one folded operand (int32 [8], zero to begin with).
#define W_SET 0      // the base has been chosen
#define W_BASE 1     // values are stored times 2^-base
#define W_REDO 2     // the base has just moved: the second launch has to quantize again
#define W_MAXIMUM 3  // largest E8M0 byte + 1 of this pass, 0: none
#define W_TICKET 4   // CTAs of this pass that have finished
#define W_RAISED 5   // blocks stored with a larger exponent than theirs, ever
#define W_MOVED 6    // times the base was chosen
#define W_PASS 7     // raised blocks of this pass

constexpr int kLowest = 15;    // exponents from base - 15 ...
constexpr int kHighest = 13;   // ... to base + 13 are exact in E5M2
constexpr int kHeadroom = 10;  // a new base is the largest exponent - 10
constexpr int kDrift = 4;      // moved down if the largest exponent is below base + 4

// Low and high word of a product; a product of u64 costs an addition more.
__device__ __forceinline__ uint2 multiply_wide(u32 a, u32 b) {
    uint2 r;
    asm("{\n.reg .b64 wide;\nmul.wide.u32 wide, %2, %3;\nmov.b64 {%0, %1}, wide;\n}"
        : "=r"(r.x), "=r"(r.y)
        : "r"(a), "r"(b));
    return r;
}

constexpr u32 kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr u32 kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

// Rounds `first` to 9 of Philox-4x32-10, counted from 0.
template <int first>
__device__ __forceinline__ void philox_from(u32 (&c)[4], u32 k0, u32 k1) {
#pragma unroll
    for (int round = first; round < 10; ++round) {
        const uint2 p0 = multiply_wide(c[0], kMultiplier0);
        const uint2 p1 = multiply_wide(c[2], kMultiplier1);
        c[0] = p1.y ^ c[1] ^ (k0 + round * kWeyl0);
        c[2] = p0.y ^ c[3] ^ (k1 + round * kWeyl1);
        c[1] = p1.x;
        c[3] = p0.x;
    }
}

__device__ __forceinline__ void philox(u32 (&c)[4], u32 k0, u32 k1) { philox_from<0>(c, k0, k1); }

__device__ __forceinline__ float max_nan(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

__device__ __forceinline__ u32 pack_half2_rz(float low, float high) {
    u32 r;
    asm("cvt.rz.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ __forceinline__ u32 multiply_half2(u32 a, u32 b) {
    u32 r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

// Two values to E4M3, saturating; the low byte is the first.
__device__ __forceinline__ u32 to_e4m3x2(float low, float high) {
    unsigned short r;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
    return r;
}

__device__ __forceinline__ u32 half2_from_e4m3x2(u32 codes) {
    u32 r;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"((unsigned short)codes));
    return r;
}

__device__ __forceinline__ float2 floats_from_half2(u32 h) {
    float2 r;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
        "cvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(r.x), "=f"(r.y)
        : "r"(h));
    return r;
}

__device__ __forceinline__ u32 clip_half2(u32 h) {
    u32 r;
    asm("{\n.reg .b32 t;\nmin.f16x2 t, %1, %2;\nmax.f16x2 %0, t, %3;\n}"
        : "=r"(r)
        : "r"(h), "r"(0x0E000E00u), "r"(0x8E008E00u));  // +-6 * 2^-14
    return r;
}

// To the nearest E2M1 number, ties to the even code, in units of 2^-14; adding 1.5 * 2^23 steps
// rounds to whole steps.
__device__ __forceinline__ float nearest_even(float v) {
    const float magnitude = fabsf(v);
    const u32 octave = __float_as_uint(fmaxf(magnitude, 0x1p-14f)) & 0x7F800000u;
    const float shifter = __uint_as_float(octave + ((22u << 23) | 0x400000u));
    return copysignf(fminf(__fsub_rn(__fadd_rn(magnitude, shifter), shifter), 0x1.8p-12f), v);
}

// What one output needs to know, the same for all of its elements.
struct Output {
    void* data;
    u8* scales;  // E8M0 bytes of PACKED
    int lines, length;
    float factor;  // prescale * 2^-14, or 1 / scale of E4M3
    u32 key0, key1, step_high, step_low, stream, line_origin, group_origin;
    const int *line_runs, *group_runs;  // of every 16 where they lie in the whole, in units of 16
    u32 lowest;   // bits of an FP32 power of two: no block has a smaller scale, times 4
    u32 origin;   // exponents are folded relative to this one's, at the same place
    u32 raising;  // bits of a block's largest magnitude, less 1, below which it is raised
    int maximum;  // of the largest magnitudes' bits + 1 in the exponent, so that Inf is negative
    int raised;   // halves of blocks
    u32 below;    // 0x80, unknown to the compiler: a byte permutation has one immediate
};

// The first three rounds of Philox on (k / 16, line, step, stream) fall apart into a part of the
// line only and a part of k only, so that a call multiplies 15 times instead of 20.
struct LineDraw {
    u32 low, high;
};
struct GroupDraw {
    u32 word2, word0, next2, next3;
};

template <bool kRuns>
__device__ __forceinline__ LineDraw draw_line(int line, const Output& o) {
    if (kRuns) line = __ldg(o.line_runs + (line >> 4)) * 16 + (line & 15);
    const uint2 p = multiply_wide(o.step_high ^ (line + o.line_origin) ^ o.key0, kMultiplier0);
    return {p.x, p.y};
}

template <bool kRuns>
__device__ __forceinline__ GroupDraw draw_group(int k, const Output& o) {
    const u32 group = kRuns ? __ldg(o.group_runs + (k >> 4)) : k >> 4;
    const uint2 p0 = multiply_wide(group + o.group_origin, kMultiplier0);
    const uint2 p1 = multiply_wide(p0.y ^ o.stream ^ o.key1, kMultiplier1);
    const uint2 p2 = multiply_wide(p1.y ^ o.step_low ^ (o.key0 + kWeyl0), kMultiplier0);
    return {p0.x ^ (o.key1 + kWeyl1), p1.x ^ (o.key0 + 2 * kWeyl0), p2.y ^ (o.key1 + 2 * kWeyl1),
            p2.x};
}

__device__ __forceinline__ void draw(u32 (&words)[4], const LineDraw& line, const GroupDraw& group,
                                     const Output& o) {
    const uint2 p = multiply_wide(line.high ^ group.word2, kMultiplier1);
    words[0] = p.y ^ group.word0;
    words[1] = p.x;
    words[2] = line.low ^ group.next2;
    words[3] = group.next3;
    philox_from<3>(words, o.key0, o.key1);
}

// Bits of the largest magnitude; above those of Inf if there is a NaN.
__device__ __forceinline__ int largest(const float (&v)[16]) {
    float four[4];  // independent chains: one of sixteen would be waited for
#pragma unroll
    for (int i = 0; i < 16; ++i)
        four[i & 3] = i < 4 ? fabsf(v[i]) : max_nan(four[i & 3], fabsf(v[i]));
    return __float_as_int(max_nan(max_nan(four[0], four[1]), max_nan(four[2], four[3])));
}

// Sixteen consecutive elements of a line, which start at element `at` of the output. `amax` holds
// the bits of their block's largest magnitude; values count times `gain`, and so does amax.
template <int kOutput, int kRounding, bool kClip>
__device__ __forceinline__ void encode(const float (&v)[16], int amax, float gain,
                                       const LineDraw& line, const GroupDraw& group, size_t at,
                                       bool inside, bool first, Output& o) {
    const bool finite = amax < 0x7F800000;
    if (kOutput == FOLDED) {
        o.maximum = max(o.maximum, int(amax + 0x00800000u));
        o.raised += u32(amax) - 1 < o.raising;
    }
    const u32 power = max(amax, int(o.lowest)) & 0x7F800000u;
    float factor = __uint_as_float(0x80000000u - power) * o.factor;
    // A block of zeros in a tensor of large values: the product may be infinite.
    if (gain != 1.0f) factor = fminf(factor * gain, 0x1p127f);
    u32 words[4];
    if (kRounding == STOCHASTIC) draw(words, line, group, o);
    u32 h[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float low = v[2 * i] * factor, high = v[2 * i + 1] * factor;
        if (kRounding == NEAREST_EVEN) low = nearest_even(low), high = nearest_even(high);
        h[i] = pack_half2_rz(low, high);
        if (kRounding == NEAREST_EVEN) continue;
        if (kClip) h[i] = clip_half2(h[i]);
        // Of a byte b above 0x80, seven bits further right: 2b + 1.
        const u32 up = kRounding == STOCHASTIC
                           ? __byte_perm(words[i / 2], o.below, i % 2 ? 0x3424 : 0x1404) >> 7
                           : 0x01000100u;
        h[i] = (h[i] + up) & 0xFE00FE00u;
    }
    if (kOutput == FOLDED) {
        // 2^14 and 2^(exponent - base), of which 2^-15 is subnormal; both products are exact. A NaN
        // makes every byte 0x7F.
        const u32 half = max((power - o.origin) >> 13, 0x200u);
        const u32 fold = finite ? half * 0x10001u : 0x7E007E00u;
        u32 bytes[4];
#pragma unroll
        for (int i = 0; i < 8; ++i)
            h[i] = multiply_half2(multiply_half2(h[i], 0x74007400u), fold);
#pragma unroll
        for (int i = 0; i < 4; ++i)  // the upper byte of a half is its E5M2
            bytes[i] = __byte_perm(h[2 * i], h[2 * i + 1], 0x7531);
        if (inside)
            *reinterpret_cast<uint4*>(static_cast<u8*>(o.data) + at) =
                make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
    } else {
        u32 nibbles[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const u32 codes = (h[i] >> 12 & 0x00080008u) | (h[i] >> 9 & 0x00070007u);
            nibbles[i / 4] |= ((codes | codes >> 12) & 0xFFu) << (i % 4 * 8);
        }
        if (!finite) nibbles[0] = nibbles[1] = 0;
        if (inside)
            *reinterpret_cast<uint2*>(static_cast<u8*>(o.data) + at / 2) =
                make_uint2(nibbles[0], nibbles[1]);
        if (inside && first) o.scales[at / 32] = finite ? (power >> 23) - 2 : 255;
    }
}

__device__ __forceinline__ void encode_e4m3(const float (&v)[16], size_t at, bool inside,
                                            const Output& o) {
    if (!inside) return;
    u32 bytes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
        bytes[i] = to_e4m3x2(v[4 * i] * o.factor, v[4 * i + 1] * o.factor) |
                   to_e4m3x2(v[4 * i + 2] * o.factor, v[4 * i + 3] * o.factor) << 16;
    *reinterpret_cast<uint4*>(static_cast<u8*>(o.data) + at) =
        make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
}

// By the last CTA of a pass: settles the window and writes the tensor's scale 2^base.
__device__ __forceinline__ void settle(int* window, float* scale, bool again) {
    const int maximum = atomicExch(window + W_MAXIMUM, 0) - 1;
    const int raised = atomicExch(window + W_PASS, 0);
    int base = window[W_BASE];
    bool redo = false;
    if (!again && maximum >= 0) {
        const int exponent = maximum - 127;
        const bool fits = window[W_SET] && exponent <= base + kHighest && exponent >= base + kDrift;
        const int wanted = fits ? base : max(exponent - kHeadroom, -126);
        redo = wanted != base;
        window[W_MOVED] += redo;
        window[W_SET] = 1;
        window[W_BASE] = base = wanted;
    }
    if (!redo) window[W_RAISED] += raised;
    window[W_REDO] = redo;
    window[W_TICKET] = 0;
    *scale = __uint_as_float(u32(base + 127) << 23);
}

// Adds this CTA's part to the window; `shared` is two words of shared memory.
__device__ __forceinline__ void finish(Output& o, int* window, float* scale, bool again,
                                       int* shared) {
    __syncthreads();
    if (threadIdx.x < 2) shared[threadIdx.x] = 0;
    __syncthreads();
    const int bits = __reduce_max_sync(~0u, o.maximum) - 0x00800000;
    const int maximum = bits > 0 ? max(bits >> 23, 2) - 1 : 0;
    const int raised = __reduce_add_sync(~0u, o.raised) / 2;
    if (threadIdx.x % 32 == 0) {
        atomicMax(shared, maximum);
        atomicAdd(shared + 1, raised);
    }
    __syncthreads();
    if (threadIdx.x) return;
    atomicMax(window + W_MAXIMUM, shared[0]);
    if (shared[1]) atomicAdd(window + W_PASS, shared[1]);
    __threadfence();
    if (atomicAdd(window + W_TICKET, 1) != int(gridDim.x) - 1) return;
    __threadfence();
    settle(window, scale, again);
}
