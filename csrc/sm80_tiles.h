// Tiles, shared memory and fragments of the Ampere kernel: index arithmetic alone, the same on host and device.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef __CUDACC__
#define LOGE_SM80_HD __host__ __device__
#else
#define LOGE_SM80_HD
#endif

namespace loge::sm80 {

inline constexpr int kBlockM = 64;  // rows of a slab
inline constexpr int kStepN = 64;   // columns of dY per step of the first walk
inline constexpr int kDepth = 64;   // rows of right per step of the second walk
inline constexpr int kThreads = 256;
inline constexpr int kMaxStages = 4;
inline constexpr int kChunk = 8;                      // elements of 16 bits in the 16 bytes that cp.async moves
inline constexpr int kElementBytes = 2;               // float16 and bfloat16
inline constexpr int kBlockShared = 166912;           // bytes that one block may use on sm_80
inline constexpr int kHalfShared = 164 * 512 - 1024;  // with two blocks on a multiprocessor, each with 1 KiB reserved

// Tiles hold up to 64, 128 or 256 columns of `left`, and up to 16 or 64 of `lora_B`; 0: none.
constexpr int rank_tile(std::int64_t R) {
    return R == 0 ? 0 : R <= 64 ? 64 : R <= 128 ? 128 : 256;
}
constexpr int adapter_tile(std::int64_t P) {
    return P == 0 ? 0 : P <= 16 ? 16 : 64;
}

// Byte offset of a 16-byte chunk in a row-major tile of kColumns. The chunks of a row are permuted so that the same
// chunk of eight successive rows, which is what ldmatrix reads at a time, lies in eight different groups of banks.
template <int kColumns>
LOGE_SM80_HD constexpr int tile_offset(int row, int chunk) {
    constexpr int kChunks = kColumns / kChunk;
    constexpr int kSpan = kChunks < 8 ? kChunks : 8;
    static_assert(kColumns % kChunk == 0 && 8 % kSpan == 0 && kChunks % kSpan == 0);
    return (row * kChunks + (chunk ^ (row / (8 / kSpan) & (kSpan - 1)))) * 16;
}

// Where lane 0 .. 31 points ldmatrix.x4, relative to the corner of a fragment: a row and a chunk of the stored tile.
struct Corner {
    int row, chunk;
};
// A [16, 16] stored as it is.
LOGE_SM80_HD constexpr Corner a_corner(int lane) {
    return {lane & 15, lane >> 4};
}
// A [16, 16] stored transposed; with .trans.
LOGE_SM80_HD constexpr Corner a_transposed_corner(int lane) {
    return {(lane & 7) + (lane >> 4) * 8, lane >> 3 & 1};
}
// B [16, 16] as two fragments side by side, {b0 b1} and {b2 b3}; with .trans.
LOGE_SM80_HD constexpr Corner b_wide_corner(int lane) {
    return {lane & 15, lane >> 4};
}
// B [32, 8] as two fragments one below the other, {b0 b1} and {b2 b3}; with .trans.
LOGE_SM80_HD constexpr Corner b_tall_corner(int lane) {
    return {lane, 0};
}

// Row and column in C [16, 8] of a lane's registers c0, c1 (next column); c2, c3 lie eight rows below.
LOGE_SM80_HD constexpr int c_row(int lane) {
    return lane >> 2;
}
LOGE_SM80_HD constexpr int c_column(int lane) {
    return (lane & 3) * 2;
}

// What a warp takes of a slab: the products of the frozen path in a grid of 2 by 4 warps, those of the adapter in
// strips of 16 rows by half of its columns.
struct WarpPlace {
    int m, n;         // of 2 and 4
    int strip, half;  // of T: rows 16 * strip, one of the two that the warp's 32 rows hold
    int n_strip;      // of dB: rows 16 * n_strip of the step
};
LOGE_SM80_HD constexpr WarpPlace warp_place(int warp) {
    return {warp & 1, warp >> 1, 2 * (warp & 1) + (warp >> 1 & 1), warp >> 2, warp & 3};
}

// Bytes of shared memory. The second walk reuses what the first has left.
template <int kRank, int kAdapter>
struct Shared {
    // A warp's part of dX must be wide enough for the tensor cores to outlast its loads where T is wide; where it is
    // narrow the walk waits for memory, and a small tile lets two blocks share a multiprocessor.
    static constexpr bool kWide = kRank + kAdapter > 144;
    static constexpr int kStepK = kWide ? 128 : 64;
    static constexpr int kBlocksPerMultiprocessor = kWide ? 1 : 2;
    static constexpr int kBudget = kWide ? kBlockShared : kHalfShared;

    // first walk: xa, then stages of dY, left, lora_B
    static constexpr int kXa = 0;
    static constexpr int kFirstStages = kXa + kBlockM * kAdapter * kElementBytes;
    static constexpr int kDy = 0;
    static constexpr int kLeft = kDy + kBlockM * kStepN * kElementBytes;
    static constexpr int kB = kLeft + kStepN * kRank * kElementBytes;
    static constexpr int kFirstBytes = kB + kStepN * kAdapter * kElementBytes;
    static constexpr int kFirstCount = std::min(kMaxStages, (kBudget - kFirstStages) / kFirstBytes);

    // second walk: T, two tiles of x (and of dX on its way out), then stages of right or lora_A
    static constexpr int kT = 0;
    static constexpr int kTB = kT + kBlockM * kRank * kElementBytes;
    static constexpr int kX = kTB + kBlockM * kAdapter * kElementBytes;
    static constexpr int kXBytes = kBlockM * kStepK * kElementBytes;
    static constexpr int kSecondStages = kX + 2 * kXBytes;
    static constexpr int kSecondBytes = kRank > 0 ? kDepth * kStepK * kElementBytes : 0;
    // Steps to a tile of dX. The next tile of x is asked for as the steps of a tile begin and must be there when those
    // of the next end: no more stages than the steps of two tiles.
    static constexpr int kFrozenSteps = kRank / kDepth;
    static constexpr int kSteps = kRank > 0 ? kFrozenSteps + (kAdapter > 0) : 1;
    static constexpr int kSecondCount = kRank == 0
                                            ? 2
                                            : std::min({kMaxStages, kAdapter > 0 ? 2 * kSteps : kMaxStages,
                                                        (kBudget - kSecondStages) / (kRank > 0 ? kSecondBytes : 1)});

    static constexpr int kBytes =
        std::max(kFirstStages + kFirstCount * kFirstBytes, kSecondStages + kSecondCount * kSecondBytes);
    static_assert(kFirstCount >= 2 && kSecondCount >= 2 && kBytes <= kBudget);
};

}  // namespace loge::sm80
