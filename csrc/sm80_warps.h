// What the blocks of both Ampere kernels do alike, for any machine: loads, fragments, results, and parts of sums.
//
// A Machine is one thread's view of a multiprocessor: sm80_ptx.cuh has the real one, and the tests one that runs on the
// host. Shared memory is addressed in bytes from the block's base.
#pragma once

#include <cstdint>

#include "params.h"
#include "sm80_tiles.h"

#ifdef __CUDACC__
#define LOGE_SM80_DEVICE __device__ __forceinline__
#define LOGE_SM80_UNROLL _Pragma("unroll")
#else
#define LOGE_SM80_DEVICE inline
#define LOGE_SM80_UNROLL
#endif

namespace loge::sm80 {

// Columns [column, column + kColumns) of rows [row, row + kRows) of a matrix [rows, columns], into a tile of shared
// memory; zeros beyond the matrix. `kOnce`: nobody reads them again soon. A thread takes one chunk of every kStride-th
// row: its address, which may lie beyond the matrix where nothing is read, and its offset only grow.
template <int kRows, int kColumns, bool kOnce = false, class Machine>
LOGE_SM80_DEVICE void load_tile(Machine& machine, int tile, const void* matrix, std::int64_t stride, std::int64_t rows,
                                std::int64_t columns, std::int64_t row, std::int64_t column) {
    constexpr int kChunks = kColumns / kChunk, kStride = kThreads / kChunks;
    static_assert(kThreads % kChunks == 0 && kStride % 8 == 0, "the permutation of a row's chunks repeats");
    const auto thread = static_cast<unsigned>(machine.thread());
    const int i = thread / kChunks, j = thread % kChunks;
    auto source = reinterpret_cast<std::uintptr_t>(matrix) +
                  static_cast<std::uintptr_t>((row + i) * stride + column + j * kChunk) * kElementBytes;
    const int target = tile + tile_offset<kColumns>(i, j);
    const std::int64_t rest = rows - row - i;
    const int left = column + j * kChunk >= columns || rest < 0 ? 0 : rest < kRows ? static_cast<int>(rest) : kRows;
    LOGE_SM80_UNROLL
    for (int down = 0; down < kRows; down += kStride) {
        if (kRows % kStride == 0 || i + down < kRows)
            machine.template copy_async<kOnce>(below<kColumns>(target, down), reinterpret_cast<const void*>(source),
                                               down < left);
        source += static_cast<std::uintptr_t>(kStride * stride) * kElementBytes;
    }
}

// Offset at which this lane reads a fragment that lies `row` rows and `chunk` chunks from its tile's corner.
template <int kColumns>
LOGE_SM80_DEVICE int fragment(int tile, Corner corner, int row, int chunk) {
    return tile + tile_offset<kColumns>(row + corner.row, chunk + corner.chunk);
}

// Accumulators of C [16, 16], two tiles side by side, scaled and rounded, to `row` and `column` of a matrix [rows,
// columns]. Neighbours swap halves, so that four lanes write the 32 bytes of a sector.
template <DType kType, class Machine>
LOGE_SM80_DEVICE void write_rows(Machine& machine, void* matrix, std::int64_t stride, std::int64_t rows,
                                 std::int64_t columns, std::int64_t row, std::int64_t column, int lane,
                                 const float (&left)[4], const float (&right)[4], float scale) {
    const bool odd = (lane & 1) != 0;
    LOGE_SM80_UNROLL
    for (int half = 0; half < 2; ++half) {
        const std::uint32_t a = machine.template pack<kType>(scale * left[2 * half], scale * left[2 * half + 1]);
        const std::uint32_t b = machine.template pack<kType>(scale * right[2 * half], scale * right[2 * half + 1]);
        const std::uint32_t other = machine.swap(odd ? a : b);
        const std::int64_t i = row + 8 * half + c_row(lane), j = column + (odd ? 8 : 0) + (lane & 2) * 2;
        if (i < rows && j < columns)
            machine.write_words(static_cast<char*>(matrix) + (i * stride + j) * kElementBytes, odd ? other : a,
                                odd ? b : other);
    }
}

// C [16, 8] to `row` and `column` of a gradient [rows, columns]: as it is, or rounded where there is a place for it.
template <DType kType, class Machine>
LOGE_SM80_DEVICE void write_gradient(Machine& machine, float* sums, void* rounded, std::int64_t rows,
                                     std::int64_t columns, std::int64_t row, std::int64_t column, int lane,
                                     const float (&c)[4], float scale) {
    LOGE_SM80_UNROLL
    for (int half = 0; half < 2; ++half) {
        const std::int64_t i = row + 8 * half + c_row(lane), j = column + c_column(lane);
        if (i >= rows || j >= columns) continue;
        const float first = scale * c[2 * half], second = scale * c[2 * half + 1];
        const std::int64_t at = i * columns + j;
        if (rounded != nullptr)
            machine.write_word(static_cast<char*>(rounded) + at * kElementBytes,
                               machine.template pack<kType>(first, second));
        else
            machine.write_pair(sums + at, first, second);
    }
}

// Adds up a tile that several blocks have summed a part of: false, or in the block that comes last true, with the sum
// in `c`. The parts are added in the order of the blocks, whoever comes last. Why the last one sees all parts, see
// rounding.h: a part's stores are before a barrier, and it before the counter's release; nobody waits for anybody.
template <int kCount, class Machine>
LOGE_SM80_DEVICE bool add_up(Machine& machine, float (&c)[kCount][4], float* parts, const Sharing& sharing,
                             unsigned* counters) {
    const int thread = machine.thread_anew();
    const auto place = [&](std::int64_t block) {
        return parts + sharing.place(block) * kCount * kFragmentFloats + thread * 4;
    };
    float* const mine = place(sharing.mine);
    LOGE_SM80_UNROLL
    for (int i = 0; i < kCount; ++i)
        machine.write_sums(mine + i * kFragmentFloats, c[i]);
    machine.sync();
    const auto others = static_cast<unsigned>(sharing.last - sharing.first);
    const bool last = thread == 0 && machine.count(counters + sharing.first) == others;
    if (!machine.any(last)) return false;
    LOGE_SM80_UNROLL
    for (int i = 0; i < kCount; ++i) {
        LOGE_SM80_UNROLL
        for (int r = 0; r < 4; ++r)
            c[i][r] = 0.0f;
    }
    for (std::int64_t block = sharing.first; block <= sharing.last; ++block) {
        const float* const part = place(block);
        LOGE_SM80_UNROLL
        for (int i = 0; i < kCount; ++i) {
            float v[4];
            machine.read_sums(v, part + i * kFragmentFloats);
            LOGE_SM80_UNROLL
            for (int r = 0; r < 4; ++r)
                c[i][r] += v[r];
        }
    }
    return true;
}

}  // namespace loge::sm80
