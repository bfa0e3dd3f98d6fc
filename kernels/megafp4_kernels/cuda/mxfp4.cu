// The MXFP4 quantizer: signs, Hadamard transform, E8M0 scales, rounding and folding in one pass
// over x [rows, columns], BF16 or FP32, for one or two outputs.
//
// A persistent kernel. Tiles of 128 x 128 come in through a ring of STAGES buffers by TMA; the last
// warp to leave a buffer has it filled again, so that no warp waits for another.
//
// Defines: FP32_INPUT. ROW, COL: 0 | FOLDED | PACKED, ROW also E4M3. ROW_G, COL_G: 0, 16, 32, 64,
// 128. ROW_ROUNDING, COL_ROUNDING. ROW_CLIP, COL_CLIP: values may exceed 6. COL_FROM_E4M3.
// COL_SUMS: also sums over the rows. ROW_RUNS, COL_RUNS: rows, columns are not contiguous in the
// whole. STAGES. CTAS: per multiprocessor.
#include "mxfp4_lines.cuh"

__device__ __forceinline__ Output describe(void* data, u8* scales, int lines, int length,
                                           float factor, const long long* position, uint2 key,
                                           int stream, const int* line_runs,
                                           const int* group_runs, bool col, const int* window) {
    const u32 first_line = u32(position[col ? 3 : 2]), first_k = u32(position[col ? 2 : 3]);
    const uint2 step = multiply_wide(u32(position[1]), kMultiplier1);
    const int lowest = (window ? window[W_BASE] : 0) + 127 - kLowest;
    const u32 origin = window ? u32(lowest + 2) << 23 : 0u;
    return {data, scales, lines, length, factor, key.x, key.y, step.y, step.x,
            u32(stream), first_line, first_k / 16, line_runs, group_runs,
            window ? u32(max(lowest, 0) + 2) << 23 : 2u << 23, origin,
            window && lowest > 0 ? (u32(lowest + 2) << 23) - 1 : 0u, 0, 0,
            0x80u + (threadIdx.x >> 20)};
}

__device__ __forceinline__ void fetch(const TensorMap* map, u32 stage, u32 barrier, int tile,
                                      int tiles_x) {
    barrier_expect(barrier, kStage);
#pragma unroll
    for (int box = 0; box < kBoxes; ++box)
        tma_load(stage + box * kBox, map, tile % tiles_x * kTile + box * kBoxColumns,
                 tile / tiles_x * kTile, barrier);
}

// True for the last of the CTA's warps; orders what they have read before what the caller does.
__device__ __forceinline__ bool last_to_leave(u32 counter) {
    u32 before;
    asm volatile("atom.acq_rel.cta.shared::cta.add.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "r"(counter)
                 : "memory");
    return before % (kThreads / 32) == kThreads / 32 - 1;
}

// sums [columns] of partial [tiles, columns], in a fixed order.
__device__ __forceinline__ void add_up(const float* partial, float* sums, int tiles, int columns) {
    __shared__ float parts[kThreads / 32][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int first = blockIdx.x * 32; first < columns; first += gridDim.x * 32) {
        float sum = 0.0f;
        if (first + lane < columns)
            for (int tile = warp; tile < tiles; tile += kThreads / 32)
                sum += partial[size_t(tile) * columns + first + lane];
        parts[warp][lane] = sum;
        __syncthreads();
        if (warp == 0 && first + lane < columns) {
            for (int i = 1; i < kThreads / 32; ++i) sum += parts[i][lane];
            sums[first + lane] = sum;
        }
        __syncthreads();
    }
}

// *_scale: FP32 [1]; the tensor's scale 2^base, written, and for ROW == E4M3 its scale, read.
// position: seed, step, first row, first column. *_runs: of every 16 rows (columns) where they lie
// in the whole, in units of 16; read only with ROW_RUNS (COL_RUNS).
// again: the second launch, which quantizes what the first did before its window's base moved, and
// adds up the partial sums of COL_SUMS, [row tiles, columns], to sums [columns].
extern "C" __global__ void __launch_bounds__(kThreads, CTAS)
quantize(const __grid_constant__ TensorMap map, int rows, int columns, const long long* position,
         const int* row_runs, const int* col_runs, const float* e4m3_scale, void* row_data,
         u8* row_scales, float* row_scale, int* row_window, float row_prescale, int row_stream,
         int row_sign_stream, int row_sign_step, void* col_data, u8* col_scales, float* col_scale,
         int* col_window, float col_prescale, int col_stream, int col_sign_stream,
         int col_sign_step, float* partial, float* sums, int again) {
    extern __shared__ __align__(1024) u8 buffers[];
    __shared__ __align__(8) u64 full[STAGES];
    __shared__ u32 left[STAGES];
    __shared__ int reduced[2];
    __shared__ __align__(16) u32 operands[ROW_G == 128 || COL_G == 128 ? 2048 : 1024];
    const int tiles_x = (columns + kTile - 1) / kTile, tiles_y = (rows + kTile - 1) / kTile;
    if (COL_SUMS && again) add_up(partial, sums, tiles_y, columns);
    const bool makes_row = ROW && (!again || (ROW == FOLDED && row_window[W_REDO]));
    const bool makes_col = COL && (!again || (COL == FOLDED && col_window[W_REDO]));
    if (!makes_row && !makes_col) return;
    const u32 stages = (shared_address(buffers) + 1023) & ~1023u;
    const u32 barriers = shared_address(full);
    const int tiles = tiles_x * tiles_y;
    const int count = tiles > int(blockIdx.x) ? (tiles - 1 - blockIdx.x) / gridDim.x + 1 : 0;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) barrier_init(barriers + 8 * s, 1), left[s] = 0;
        barrier_init_fence();
        for (int s = 0; s < STAGES && s < count; ++s)
            fetch(&map, stages + s * kStage, barriers + 8 * s, blockIdx.x + s * gridDim.x,
                  tiles_x);
    }
    // A reduction leaves the seed in uniform registers, where round keys cost the vector pipes
    // nothing.
    const u64 seed = position[0];
    const uint2 key = make_uint2(__reduce_or_sync(~0u, u32(seed)),
                                 __reduce_or_sync(~0u, u32(seed >> 32)));
    Output row = describe(row_data, row_scales, rows, columns,
                          ROW == E4M3 ? 1.0f / *row_scale : row_prescale * 0x1p-14f, position,
                          key, row_stream, row_runs, col_runs, false,
                          ROW == FOLDED ? row_window : nullptr);
    Output col = describe(col_data, col_scales, columns, rows, col_prescale * 0x1p-14f, position,
                          key, col_stream, col_runs, row_runs, true,
                          COL == FOLDED ? col_window : nullptr);
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
    int x = blockIdx.x % tiles_x, y = blockIdx.x / tiles_x;
    const int right = gridDim.x % tiles_x, down = gridDim.x / tiles_x;
    for (int i = 0, s = 0, parity = 0; i < count; ++i) {
        const u32 stage = stages + s * kStage;
        barrier_wait(barriers + 8 * s, parity);
        if constexpr (ROW != 0)
            if (makes_row)
                row_lines.template run<ROW, ROW_ROUNDING, ROW_CLIP>(row, stage, y * kTile,
                                                                    x * kTile, nullptr);
        if constexpr (COL != 0)
            if (makes_col)
                col_lines.template run<COL, COL_ROUNDING, COL_CLIP>(
                    col, stage, x * kTile, y * kTile,
                    again ? nullptr : partial + size_t(y) * columns);
        __syncwarp();
        if (threadIdx.x % 32 == 0 && i + STAGES < count &&
            last_to_leave(shared_address(left + s)))
            fetch(&map, stage, barriers + 8 * s, blockIdx.x + (i + STAGES) * gridDim.x, tiles_x);
        if (++s == STAGES) s = 0, parity ^= 1;
        x += right, y += down;
        if (x >= tiles_x) x -= tiles_x, ++y;
    }
    if (ROW == FOLDED && makes_row) finish(row, row_window, row_scale, again, reduced);
    if (COL == FOLDED && makes_col) finish(col, col_window, col_scale, again, reduced);
}
