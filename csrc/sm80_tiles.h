// Tiles, shared memory and fragments of the Ampere kernels, and how work is cut: index arithmetic alone, the same on
// host and device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define LOGE_SM80_HD __host__ __device__
#else
#define LOGE_SM80_HD
#endif

namespace loge::sm80 {

inline constexpr int kBlockM = 128;  // rows of a slab of the second launch
inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kMaxStages = 4;
inline constexpr int kChunk = 8;                           // elements of 16 bits in the 16 bytes that cp.async moves
inline constexpr int kElementBytes = 2;                    // float16 and bfloat16
inline constexpr int kSharedBytes = 166912;                // that one block may use on sm_80
inline constexpr int kFragmentFloats = kThreads * 4;       // C [16, 8] of every warp, as it lies among the parts
inline constexpr int kRowBytes = kBlockM * kElementBytes;  // of a column of a slab

// Byte offset of a 16-byte chunk in a row-major tile of kColumns. The chunks of a row are permuted so that the same
// chunk of eight successive rows, which is what ldmatrix reads at a time, lies in eight different groups of banks.
template <int kColumns>
LOGE_SM80_HD constexpr int tile_offset(int row, int chunk) {
    constexpr int kChunks = kColumns / kChunk;
    constexpr int kSpan = kChunks < 8 ? kChunks : 8;
    static_assert(kColumns % kChunk == 0 && 8 % kSpan == 0 && kChunks % kSpan == 0);
    return (row * kChunks + (chunk ^ (row / (8 / kSpan) & (kSpan - 1)))) * 16;
}

// From the offset of a chunk to those of others, so that a thread keeps one address of a tile: `chunks` further on in
// its row, where the chunk's index has these bits clear and the tile begins at a multiple of 128 bytes; and `rows`, a
// multiple of 8, below.
LOGE_SM80_HD constexpr int beside(int offset, int chunks) {
    return offset ^ chunks * 16;
}
template <int kColumns>
LOGE_SM80_HD constexpr int below(int offset, int rows) {
    return offset + rows * kColumns * kElementBytes;
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

// How eight warps share a product of `kDown` rows: in a grid, each with kRows by kColumns of it. Square parts read the
// fewest operands from shared memory.
template <int kDown, int kWidth>
struct Warps {
    static constexpr int kAcross = kWidth <= kDown / 2 ? 2 : 4;
    static constexpr int kRows = kDown * kAcross / kWarps;
    static constexpr int kColumns = kWidth / kAcross;
    static constexpr int kRowTiles = kRows / 16;  // of C [16, 8]
    static constexpr int kColumnTiles = kColumns / 8;
};
// Without left each has rows of lora_B's product alone.
template <int kDown>
struct Warps<kDown, 0> {
    static constexpr int kAcross = 1, kRows = kDown / kWarps, kColumns = 0, kRowTiles = kRows / 16, kColumnTiles = 0;
};

// Work that stands in line, cut into as many equal shares as there are blocks, and how a share's end meets a tile's.
struct Cut {
    std::int64_t total, each;  // the first `more` blocks have one more than the others
    std::int32_t blocks, more;

    LOGE_SM80_HD constexpr std::int64_t begin(std::int64_t block) const {
        return each * block + (block < more ? block : more);
    }
    LOGE_SM80_HD constexpr std::int64_t owner(std::int64_t at) const {
        const std::int64_t longer = more * (each + 1);
        return at < longer ? at / (each + 1) : more + (at - longer) / each;
    }
    constexpr std::int64_t most() const { return each + (more > 0); }
};
constexpr Cut cut(std::int64_t total, std::int64_t blocks) {
    return {total, total / blocks, static_cast<std::int32_t>(blocks), static_cast<std::int32_t>(total % blocks)};
}

// The blocks among which a tile is cut. A block has at most two tiles that are not all its own, the one that its share
// begins in and the one that it ends in: so many places for parts of sums has it, and is the first of one tile alone.
struct Sharing {
    std::int64_t first, last, mine;

    LOGE_SM80_HD constexpr bool whole() const { return first == last; }
    LOGE_SM80_HD constexpr std::int64_t place(std::int64_t block) const { return 2 * block + (block == first); }
};

// The first launch: T = dY [left | lora_B] of kRows rows by kColumns of left (0: without dX). The first of the tiles
// that a slab has side by side takes lora_B as well, and dB. Bytes of shared memory: xa, then stages of dY, left,
// lora_B.
template <int kRows, int kColumns, int kAdapter>
struct ProjectTiles {
    static constexpr int kStepN = kColumns + kAdapter > 288 ? 32 : 64;  // columns of dY per step
    using Grid = Warps<kRows, kColumns>;
    static constexpr int kFrozen = Grid::kRowTiles * Grid::kColumnTiles;  // a warp's C [16, 8] of left
    static constexpr int kOwn = Grid::kRowTiles / Grid::kAcross;  // and of lora_B: its own of these strips of 16
    static constexpr int kFragments = kFrozen + kOwn * (kAdapter / 8);
    // dB [kStepN, P] of a step: strips of 16 rows by parts of the columns.
    static constexpr int kStrips = kStepN / 16;
    static constexpr int kGradientTiles = kAdapter / 8 * kStrips / kWarps;

    static constexpr int kXa = 0;
    static constexpr int kFirstStage = kAdapter * kRows * kElementBytes;
    static constexpr int kDy = 0;
    static constexpr int kLeft = kStepN * kRows * kElementBytes;
    static constexpr int kB = kLeft + kStepN * kColumns * kElementBytes;
    static constexpr int kStageBytes = kB + kStepN * kAdapter * kElementBytes;
    static constexpr int bytes(int stages) { return kFirstStage + stages * kStageBytes; }
    static_assert(kOwn > 0 && (kAdapter == 0 || kGradientTiles > 0));
};

// The second launch: dX = T [right ; lora_A] of 128 rows by kWidth columns, and dA of these columns. Bytes of shared
// memory: x and T_P of a slab, stages of T, and the factors' columns, which stay.
template <int kWidth, int kAdapter>
struct ExpandTiles {
    static constexpr int kDepth = kWidth + kAdapter > 160 ? 32 : 64;  // columns of T per step
    using Grid = Warps<kBlockM, kWidth>;
    static constexpr int kXTiles = kWidth / 64;                 // n8 tiles of a warp's part of dA
    static constexpr int kFragments = kAdapter / 16 * kXTiles;  // a warp's C [16, 8] of dA

    static constexpr int kX = 0;
    static constexpr int kTP = kAdapter > 0 ? kWidth * kRowBytes : 0;
    static constexpr int kFirstStage = kTP + kAdapter * kRowBytes;
    static constexpr int kStageBytes = kDepth * kRowBytes;
    // `depth` rows of the factors, in whole products of 16.
    static constexpr int bytes(int stages, int depth) {
        return kFirstStage + stages * kStageBytes + (depth + 15) / 16 * 16 * kWidth * kElementBytes;
    }
};

}  // namespace loge::sm80
