// The Hopper kernel's constants, shared-memory map and schedule: plain arithmetic, the same on host and device.
#pragma once

#include <cstdint>

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
LOGE_HOST_DEVICE constexpr int rank_tile(int rank) {
    return rank == 0 ? 0 : rank <= 64 ? 64 : rank <= 128 ? 128 : 256;
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
    int resident;  // xa [128, P] while walking N, T_P [128, P] while walking K
    int staging;   // dX [64, 64], two for each warpgroup
    int barriers;
    int bytes;  // to ask for: the map and the slack that aligns it
};

// Two buffers let a step's dX leave while the next one is staged. At R = 256 they leave 40 KB unused, and one buffer
// would make room for a fourth stage: which of the two is faster needs a GPU to measure.
inline constexpr int kStagingBytes = kWarpgroupRows * kStep * kElementBytes;
inline constexpr int kStagingBuffers = 2;

// Indices of the 8-byte barriers behind SharedMap::barriers.
struct BarrierMap {
    int full, empty, resident, ring_free, count;
};
LOGE_HOST_DEVICE constexpr BarrierMap barrier_map(int stages) {
    return {0, stages, 2 * stages, 2 * stages + 1, 2 * stages + 2};
}

LOGE_HOST_DEVICE constexpr SharedMap shared_map(int rank_tile, int adapter_tile) {
    SharedMap map{};
    map.factor = kBlockM * kStep * kElementBytes;
    map.adapter = map.factor + kStep * rank_tile * kElementBytes;
    map.stage_bytes = map.adapter + kStep * adapter_tile * kElementBytes;
    const int resident_bytes = kBlockM * adapter_tile * kElementBytes;
    const int tail = resident_bytes + kConsumers * kStagingBuffers * kStagingBytes +
                     barrier_map(kMaxStages).count * static_cast<int>(sizeof(std::uint64_t)) + kSharedAlignment;
    const int fit = (kMaxSharedBytes - tail) / map.stage_bytes;
    map.stages = fit < kMaxStages ? fit : kMaxStages;
    map.resident = map.stages * map.stage_bytes;
    map.staging = map.resident + resident_bytes;
    map.barriers = map.staging + kConsumers * kStagingBuffers * kStagingBytes;
    map.bytes = map.resident + tail;
    return map;
}

struct Range {
    int begin, end;
    LOGE_HOST_DEVICE constexpr int size() const { return end - begin; }
};

LOGE_HOST_DEVICE constexpr int count_steps(std::int64_t size) {
    return static_cast<int>((size + kStep - 1) / kStep);
}

// The steps of a walk over `size` columns that block `rank` of a cluster takes: shares differ by at most one step.
LOGE_HOST_DEVICE constexpr Range steps_of(std::int64_t size, int rank, int cluster) {
    const int steps = count_steps(size);  // below 2^25
    return {steps * rank / cluster, steps * (rank + 1) / cluster};
}

// Step `i` of a walk that starts at `shift` and goes round. The slabs start apart: otherwise all of them would add to
// the same rows of dB, and ask for the same tile of a factor, at the same time.
LOGE_HOST_DEVICE constexpr int rotated(Range steps, int shift, int i) {
    return steps.begin + (i + shift < steps.size() ? i + shift : i + shift - steps.size());
}
LOGE_HOST_DEVICE constexpr int shift_of(Range steps, std::int64_t slab, std::int64_t slabs) {
    return static_cast<int>(slab * steps.size() / slabs);
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

// T [128, R + P] is exchanged in granules of 16 columns: 8 fp32 accumulators of each consumer thread, which are one
// 16-bit A fragment of wgmma. A granule is summed by one block of the cluster, over the blocks in the order of their
// rank.
inline constexpr int kGranuleColumns = 16;
inline constexpr int kGranuleValues = 8;
LOGE_HOST_DEVICE constexpr int granule_owner(int granule, int cluster) {
    return granule % cluster;
}

// Byte offset in the ring of half (4 values) of a thread's share of a granule; the rounded values replace half 0.
LOGE_HOST_DEVICE constexpr int exchange_offset(int granule, int half, int thread) {
    return ((granule * 2 + half) * kConsumerThreads + thread) * 16;
}
LOGE_HOST_DEVICE constexpr int exchange_bytes(int rank_tile, int adapter_tile) {
    return (rank_tile + adapter_tile) / kGranuleColumns * kConsumerThreads * kGranuleValues * 4;
}

}  // namespace loge::sm90
