// Packed MXFP4 to folded FP8: the largest scale sets the base, then every block is folded.
// State: int32 [1], zero to begin with: the largest finite E8M0 byte.
#include "mxfp4.cuh"

extern "C" __global__ void largest(const u8* scales, int blocks, int* state) {
    int maximum = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < blocks; i += gridDim.x * blockDim.x)
        maximum = max(maximum, scales[i] == 255 ? 0 : int(scales[i]));
    maximum = __reduce_max_sync(~0u, maximum);
    if (threadIdx.x % 32 == 0) atomicMax(state, maximum);
}

// One thread per block of 32. Blocks below the range lose what E5M2 cannot hold, to nearest even.
extern "C" __global__ void unpack(const uint4* codes, const u8* scales, int blocks,
                                  const int* state, uint4* data, float* scale, int* window) {
    const int base = max(*state - 127 - kHeadroom, -126);
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i == 0) *scale = __uint_as_float(u32(base + 127) << 23);
    if (i >= blocks) return;
    const uint4 packed = codes[i];
    const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
    const int byte = scales[i];
    const int power = byte - 127 - base;  // times 2^14 below: E2M1's 1.0 is FP16's 2^-14
    // At 2^-40 every code is below half of E5M2's smallest number.
    const float factor = __uint_as_float(u32(max(power, -40) + 14 + 127) << 23);
    u32 bytes[8];
    u32 any = 0;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        bytes[n] = 0;
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
            const u32 pair = words[n / 2] >> (n % 2 * 16 + j * 4);
            const u32 nibbles = (pair & 0xF) | (pair & 0xF0) << 12;
            any |= nibbles & 0x00070007u;
            const float2 f = floats_from_half2((nibbles & 0x00080008u) << 12 |
                                               (nibbles & 0x00070007u) << 9);
            unsigned short two;
            asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;"
                : "=h"(two)
                : "f"(f.y * factor), "f"(f.x * factor));
            bytes[n] |= u32(two) << (j * 8);
        }
        if (byte == 255) bytes[n] = 0x7F7F7F7Fu;
    }
    data[2 * i] = make_uint4(bytes[0], bytes[1], bytes[2], bytes[3]);
    data[2 * i + 1] = make_uint4(bytes[4], bytes[5], bytes[6], bytes[7]);
    if (window && any && power < -kLowest) atomicAdd(window + W_RAISED, 1);
}
