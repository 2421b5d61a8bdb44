// wgmma on the host: operands as descriptors name them in shared memory, accumulators as they lie among the threads.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#include "fibers.h"
#include "formats.h"
#include "params.h"
#include "sm90_tiles.h"

namespace emulator {

using loge::sm90::kWarpgroupThreads;

// One wgmma of a warpgroup: D [64, columns] += A [64, 16] B [16, columns].
struct Product {
    loge::DType dtype;
    int columns;
    bool accumulate;
    bool a_in_registers;
    bool a_mn_major, b_mn_major;
    std::uint64_t a, b;  // descriptors
};

// Some of whose threads have issued it.
struct Issued {
    Product product;
    int arrived;
    std::array<float*, kWarpgroupThreads> acc;
    std::array<const std::uint16_t*, kWarpgroupThreads> a;
};

// The byte that a descriptor names for (i, j) of an operand [mn, 16] (PTX, "Shared Memory Matrix Layout").
inline int operand_offset(std::uint64_t descriptor, bool mn_major, int i, int j) {
    const auto field = [descriptor](int bit) { return static_cast<int>(descriptor >> bit & 0x3fff) << 4; };
    const int start = field(0), leading = field(16), stride = field(32), mode = static_cast<int>(descriptor >> 62);
    if ((descriptor >> 49 & 7) != 0 || (mode != 1 && mode != 3)) fail("a descriptor of another kind", mode);
    const int bits = mode == 1 ? 3 : 1, width = 16 << bits;
    const int offset = mn_major ? i % (width / 2) * 2 + i / (width / 2) * leading + j % 8 * width + j / 8 * stride
                                : i % 8 * width + i / 8 * stride + j * 2;
    return (start + offset) ^ (((start + offset) >> 7 & ((1 << bits) - 1)) << 4);
}

// `values` [16, mn].
template <loge::DType kType>
void gather(const char* window, std::uint64_t descriptor, bool mn_major, int mn, float* values) {
    for (int i = 0; i < mn; ++i)
        for (int j = 0; j < 16; ++j) {
            std::uint16_t bits;
            std::memcpy(&bits, window + operand_offset(descriptor, mn_major, i, j), 2);
            values[j * mn + i] = widen<kType>(bits);
        }
}

__attribute__((no_sanitize("address", "undefined"), optimize("O3"))) inline void multiply_row(const float* a,
                                                                                              const float* b, float* d,
                                                                                              int columns) {
    for (int j = 0; j < columns; ++j)
        d[j] = 0.0f;
    for (int k = 0; k < 16; ++k)
        for (int j = 0; j < columns; ++j)
            d[j] += a[k * 64] * b[k * columns + j];
}

template <loge::DType kType>
void multiply(const Issued& issued, const char* window) {
    const Product& p = issued.product;
    static float a[16 * 64], b[16 * 256], d[256];
    const auto row_of = [](int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + (i >> 1 & 1) * 8; };
    const auto column_of = [](int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + (i & 1); };
    gather<kType>(window, p.b, p.b_mn_major, p.columns, b);
    if (!p.a_in_registers) gather<kType>(window, p.a, p.a_mn_major, 64, a);
    for (int thread = 0; p.a_in_registers && thread < kWarpgroupThreads; ++thread)
        for (int i = 0; i < 8; ++i)
            a[column_of(thread, i) * 64 + row_of(thread, i)] = widen<kType>(issued.a[thread][i]);
    for (int row = 0; row < 64; ++row) {
        multiply_row(a + row, b, d, p.columns);
        // The eight columns of a block of this row lie with four threads, two with each.
        const int first = row / 16 * 32 + row % 8 * 4, half = row / 8 % 2 * 2;
        for (int column = 0; column < p.columns; ++column) {
            float& value = issued.acc[first + column % 8 / 2][column / 8 * 4 + half + column % 2];
            value = (p.accumulate ? value : 0.0f) + d[column];
        }
    }
}

}  // namespace emulator
