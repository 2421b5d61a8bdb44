// The Hopper kernel's constants, shared-memory map and schedule: plain arithmetic, the same on host and device.
#pragma once

#include <cstdint>

#include "params.h"

#if defined(__CUDACC__)
#define LOGE_HOST_DEVICE __host__ __device__
#else
#define LOGE_HOST_DEVICE
#endif

namespace loge::sm90 {

inline constexpr int kBlockM = 128;  // rows of a slab: two warpgroups of 64
inline constexpr int kStep = 64;  // columns of dY, of x and of dX per step: one 128-byte swizzle atom of 16-bit values
inline constexpr int kWarpgroupRows = 64;
inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kConsumers = 2;  // warpgroups that multiply
inline constexpr int kConsumerThreads = kConsumers * kWarpgroupThreads;
inline constexpr int kConsumerWarps = kConsumerThreads / 32;
inline constexpr int kThreads = kConsumerThreads + kWarpgroupThreads;  // and one warpgroup that loads
// 64 K registers: 128 x 40 + 256 x 232. What a thread starts with (65536 / 384, in eights) is 168.
inline constexpr int kProducerRegisters = 40;
inline constexpr int kConsumerRegisters = 232;

inline constexpr int kMaxStages = 6;  // more hides nothing further: five steps in flight are over 100 KiB
inline constexpr int kMaxSharedBytes = 232448;
inline constexpr int kElementBytes = 2;
inline constexpr int kSharedAlignment = 1024;  // of the 128-byte swizzle's pattern

// R and P are padded to a compiled tile, and the loads fill the rest with zeros. 0: no dX, no adapter. R = 136 costs
// what 256 does. A zero times an infinity is NaN: where dY holds an infinity, the padded columns of T are NaN, and the
// whole row of dX with them, where R or P fills its tile only in part.
inline constexpr int kTileColumns = 256;  // the largest
LOGE_HOST_DEVICE constexpr int rank_tile(int rank) {
    return rank == 0 ? 0 : rank <= 64 ? 64 : rank <= 128 ? 128 : 256;
}
LOGE_HOST_DEVICE constexpr int tiles_of(int columns) {
    return (columns + kTileColumns - 1) / kTileColumns;
}
LOGE_HOST_DEVICE constexpr int adapter_tile(int adapter) {
    return adapter == 0 ? 0 : adapter <= 16 ? 16 : 64;
}

// Byte offsets from an address aligned to kSharedAlignment. A stage holds one step of either walk:
//     over N: dY [128, 64] | left [64, R] | lora_B [64, P]        over K: x [128, 64] | right [R, 64] | lora_A [P, 64]
struct SharedMap {
    int factor;       // within a stage
    int adapter;      // within a stage
    int stage_bytes;  // of a stage
    int stages;
    int staging;          // dX [64, 64], `staging_buffers` for each warpgroup
    int staging_buffers;  // two let a step's dX leave while the next one is staged
    int resident;         // xa [128, P] while walking N, T_P [128, P] while walking K
    int barriers;
    int bytes;  // to ask for: the map and the slack that aligns it
};

inline constexpr int kStagingBytes = kWarpgroupRows * kStep * kElementBytes;

// Indices of the 8-byte barriers behind SharedMap::barriers.
struct BarrierMap {
    int full, empty, resident, drained, partials, sums, ring_free, count;
};
LOGE_HOST_DEVICE constexpr BarrierMap barrier_map(int stages) {
    const int more = 2 * stages;
    return {0, stages, more, more + 1, more + 2, more + 3, more + 4, more + 5};
}

LOGE_HOST_DEVICE constexpr SharedMap shared_map(int rank_tile, int adapter_tile) {
    SharedMap map{};
    map.factor = kBlockM * kStep * kElementBytes;
    map.adapter = map.factor + kStep * rank_tile * kElementBytes;
    map.stage_bytes = map.adapter + kStep * adapter_tile * kElementBytes;
    const int resident_bytes = kBlockM * adapter_tile * kElementBytes;
    const int tail =
        resident_bytes + barrier_map(kMaxStages).count * static_cast<int>(sizeof(std::uint64_t)) + kSharedAlignment;
    // A stage more hides more than a second buffer does: a load waits for memory, a store only has to have been read.
    for (int buffers = 1; buffers <= 2; ++buffers) {
        const int fit = (kMaxSharedBytes - tail - kConsumers * buffers * kStagingBytes) / map.stage_bytes;
        const int stages = fit < kMaxStages ? fit : kMaxStages;
        if (stages < map.stages) break;
        map.stages = stages;
        map.staging_buffers = buffers;
    }
    map.staging = map.stages * map.stage_bytes;
    map.resident = map.staging + kConsumers * map.staging_buffers * kStagingBytes;
    map.barriers = map.resident + resident_bytes;
    map.bytes = map.resident + tail;
    return map;
}

// Of the second of two launches: T of a slab stays, [128, R] in boxes 64 wide, T_P behind it; a stage holds 32 rows of
// right or lora_A [32, 256], or x [128, 64].
inline constexpr int kDepth = 32;
inline constexpr int kTBoxBytes = kBlockM * kStep * kElementBytes;
LOGE_HOST_DEVICE constexpr SharedMap expand_map(int adapter_tile) {
    SharedMap map{};
    map.stage_bytes = kDepth * kTileColumns * kElementBytes;
    map.stages = 4;
    map.staging = map.stages * map.stage_bytes;
    map.staging_buffers = 1;
    map.resident = map.staging + kConsumers * kStagingBytes;
    map.barriers =
        map.resident + static_cast<int>(kMaxRank) / kStep * kTBoxBytes + kBlockM * adapter_tile * kElementBytes;
    map.bytes =
        map.barriers + barrier_map(map.stages).count * static_cast<int>(sizeof(std::uint64_t)) + kSharedAlignment;
    return map;
}

struct Range {
    int begin, end;
    LOGE_HOST_DEVICE constexpr int size() const { return end - begin; }
};

LOGE_HOST_DEVICE constexpr int count_steps(std::int64_t size) {
    return static_cast<int>((size + kStep - 1) / kStep);
}

// The steps of a walk over `size` columns that split `split` of a slab takes: shares differ by at most one step.
LOGE_HOST_DEVICE constexpr Range steps_of(std::int64_t size, int split, int splits) {
    const int steps = count_steps(size);  // below 2^25
    return {steps * split / splits, steps * (split + 1) / splits};
}

// Step `i` of a walk that starts at `shift` and goes round. The clusters start apart: otherwise all of them would add
// to the same rows of dB, and ask for the same tile of a factor, at the same time.
LOGE_HOST_DEVICE constexpr int rotated(Range steps, int shift, int i) {
    return steps.begin + (i + shift < steps.size() ? i + shift : i + shift - steps.size());
}
LOGE_HOST_DEVICE constexpr int shift_of(Range steps, std::int64_t cluster, std::int64_t clusters) {
    return static_cast<int>(cluster * steps.size() / clusters);
}

// The tiles of x, one a step, that are on their way from HBM to L2 before the walk over K begins: while N is walked
// there is bandwidth to spare, and over K, where x is read and dX written, there is none.
inline constexpr int kPrefetchedTiles = 12;
LOGE_HOST_DEVICE constexpr int tiles_ahead(Range steps_n, Range steps_k) {
    const int third = steps_n.size() / 3, most = third < kPrefetchedTiles ? third : kPrefetchedTiles;
    return most < steps_k.size() ? most : steps_k.size();
}

// T in memory: columns of R in whole steps, and then the adapter's.
LOGE_HOST_DEVICE constexpr int t_width(int rank, int adapter) {
    return count_steps(rank) * kStep + adapter_tile(adapter);
}

// The share of `count` things that cluster `cluster` of `clusters` takes.
LOGE_HOST_DEVICE constexpr Range share_of(std::int64_t count, std::int64_t cluster, std::int64_t clusters) {
    return {static_cast<int>(count * cluster / clusters), static_cast<int>(count * (cluster + 1) / clusters)};
}

// The columns of a matrix `size` wide that steps cover.
LOGE_HOST_DEVICE constexpr Range columns_of(Range steps, std::int32_t size) {
    const std::int64_t begin = std::int64_t{steps.begin} * kStep, end = std::int64_t{steps.end} * kStep;
    return {static_cast<int>(begin < size ? begin : size), static_cast<int>(end < size ? end : size)};
}

// Where in the ring of stages a step lies. Loads and products walk the same sequence from zero, over N and on over K.
struct RingPosition {
    int stage = 0;
    std::uint32_t parity = 0;

    LOGE_HOST_DEVICE constexpr void advance(int stages) {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};
LOGE_HOST_DEVICE constexpr RingPosition ring_position(int step, int stages) {
    return {step % stages, static_cast<std::uint32_t>(step / stages & 1)};
}

// The skinny products, dB [64, P] and dA^T [64, P], have one tile of 64 rows a step: the warpgroups take turns.
LOGE_HOST_DEVICE constexpr bool takes_turn(int warpgroup, int step) {
    return (step & 1) == warpgroup;
}

// T [128, R + P] of a slab is the sum over its splits, which exchange it in granules of 16 columns: 8 fp32 accumulators
// of each consumer thread, which are one 16-bit A fragment of wgmma. A granule has an owner among the splits. The
// others push their shares of it to the owner, which adds them up in the order of the splits and pushes the rounded sum
// back. Both land in the ring of stages, each sender's share of each granule in a slot of its own. Splits are a power
// of two, 2^log_splits.
inline constexpr int kGranuleColumns = 16;
inline constexpr int kGranuleValues = 8;
inline constexpr int kShareBytes = kConsumerThreads * kGranuleValues * 4;  // fp32
inline constexpr int kSumBytes = kConsumerThreads * kGranuleValues * kElementBytes;

LOGE_HOST_DEVICE constexpr int granule_owner(int granule, int log_splits) {
    return granule & ((1 << log_splits) - 1);
}
// Of `granules`, how many `split` owns.
LOGE_HOST_DEVICE constexpr int granules_owned(int granules, int split, int log_splits) {
    return (granules + (1 << log_splits) - 1 - split) >> log_splits;
}
// The slot of what `from` sends to `to` of a granule that one of them owns.
LOGE_HOST_DEVICE constexpr int slot_of(int granule, int from, int to, int log_splits) {
    return (granule >> log_splits) * ((1 << log_splits) - 1) + from - (from > to ? 1 : 0);
}
LOGE_HOST_DEVICE constexpr int slot_count(int granules, int log_splits) {
    return granules_owned(granules, 0, log_splits) * ((1 << log_splits) - 1);
}
// Byte offsets of a thread's values in the ring: half (4 values) of a share, and a rounded sum.
LOGE_HOST_DEVICE constexpr int share_offset(int slot, int half, int thread) {
    return slot * kShareBytes + (half * kConsumerThreads + thread) * 16;
}
LOGE_HOST_DEVICE constexpr int sum_offset(int slots, int slot, int thread) {
    return slots * kShareBytes + slot * kSumBytes + thread * 16;
}

LOGE_HOST_DEVICE constexpr int granules_of(int rank_tile, int adapter_tile) {
    return (rank_tile + adapter_tile) / kGranuleColumns;
}
// The most splits whose exchange fits: into the ring, and the staging behind it, which is idle then too.
LOGE_HOST_DEVICE constexpr int max_log_splits(int rank_tile, int adapter_tile) {
    int log_splits = 3;
    while (slot_count(granules_of(rank_tile, adapter_tile), log_splits) * (kShareBytes + kSumBytes) >
           shared_map(rank_tile, adapter_tile).resident)
        --log_splits;
    return log_splits;
}

}  // namespace loge::sm90
