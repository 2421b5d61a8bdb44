// Where the values of a wgmma accumulator [64, columns] lie among the 128 threads of a warpgroup, before and after the
// lane exchanges that make four of a thread's values consecutive in memory. Plain arithmetic, the same on host and
// device.
#pragma once

#include "sm90_tiles.h"

namespace loge::sm90 {

struct Position {
    int row, column;
};

// Value `index` of `thread`: m64nNk16's D fragment, and with index in 0..7 of a 16-column granule its A fragment too.
LOGE_HOST_DEVICE constexpr Position accumulator_position(int thread, int index) {
    const int lane = thread % 32;
    return {thread / 32 * 16 + lane / 4 + 8 * ((index >> 1) & 1), index / 4 * 8 + lane % 4 * 2 + (index & 1)};
}

// The row of 8 16-bit values of a granule [16, 16] of a warp that `lane` addresses in stmatrix.x4.
LOGE_HOST_DEVICE constexpr Position stmatrix_position(int lane) {
    return {lane % 8 + lane / 8 % 2 * 8, lane / 16 * 8};
}

// A 128-byte-swizzled tile with rows of 64 16-bit values: the byte offset of 16-byte chunk `chunk` of `row`.
LOGE_HOST_DEVICE constexpr int swizzle128(int row, int chunk) {
    return row * 128 + ((chunk ^ (row & 7)) << 4);
}
// A 32-byte-swizzled tile with rows of 16 16-bit values.
LOGE_HOST_DEVICE constexpr int swizzle32(int row, int chunk) {
    return row * 32 + ((chunk ^ ((row >> 2) & 1)) << 4);
}

// One lane exchange swaps a bit of the register index with a bit of the lane: of registers v0 (bit clear) and v1 (bit
// set), a lane whose bit is set gives v0 away and keeps v1, the other one gives v1 away and keeps v0.
LOGE_HOST_DEVICE constexpr float exchange_send(float v0, float v1, bool lane_bit) {
    return lane_bit ? v0 : v1;
}
LOGE_HOST_DEVICE constexpr void exchange_receive(float& v0, float& v1, bool lane_bit, float received) {
    (lane_bit ? v0 : v1) = received;
}

// Rows of dB [N, P]: the four values of an 8-column block, register bit 1 swapped with lane bit 0, are four columns.
// Rows of dA [P, K] from dA^T [K, P]: bit 0 with lane bit 2, then bit 1 with lane bit 3, are four rows.

struct BitSwap {
    int register_bit, lane_bit;
};
LOGE_HOST_DEVICE constexpr BitSwap row_swap() {
    return {1, 0};
}
LOGE_HOST_DEVICE constexpr BitSwap column_swap(int i) {
    return i == 0 ? BitSwap{0, 2} : BitSwap{1, 3};
}

// First of the four consecutive columns that `thread` holds of 8-column block `block` after row_swap.
LOGE_HOST_DEVICE constexpr Position row_quad(int thread, int block) {
    const int lane = thread % 32;
    return {thread / 32 * 16 + lane / 4 + 8 * (lane & 1), block * 8 + 4 * (lane >> 1 & 1)};
}

// First of the four consecutive rows that `thread` holds of 8-column block `block` after both column_swaps.
LOGE_HOST_DEVICE constexpr Position column_quad(int thread, int block) {
    const int lane = thread % 32;
    return {thread / 32 * 16 + 8 * (lane >> 3 & 1) + 4 * (lane >> 4), block * 8 + lane % 4 * 2 + (lane >> 2 & 1)};
}

}  // namespace loge::sm90
