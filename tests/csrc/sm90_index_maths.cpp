// The Hopper kernel's schedule, shared-memory map, fragment positions, exchange and plan, against brute force.
#include <set>
#include <utility>
#include <vector>

#include "expect.h"
#include "sm90_fragments.h"
#include "sm90_plan.h"
#include "sm90_tiles.h"

using namespace loge;
using namespace loge::sm90;

namespace {

constexpr std::pair<int, int> kTiles[] = {{0, 16},   {0, 64},   {64, 0},  {64, 16},  {64, 64}, {128, 0},
                                          {128, 16}, {128, 64}, {256, 0}, {256, 16}, {256, 64}};

void check_steps() {
    for (std::int64_t size : {std::int64_t{8}, std::int64_t{64}, std::int64_t{72}, std::int64_t{440}, kMaxSize})
        for (int cluster : {1, 2, 4, 8}) {
            int next = 0;
            for (int rank = 0; rank < cluster; ++rank) {
                const Range range = steps_of(size, rank, cluster);
                EXPECT(range.begin == next && range.size() >= 0, "size %lld, rank %d", (long long)size, rank);
                const int even = static_cast<int>((size + 63) / 64 / cluster);
                EXPECT(range.size() == even || range.size() == even + 1, "size %lld, rank %d", (long long)size, rank);
                next = range.end;
            }
            EXPECT(next == (size + 63) / 64, "size %lld, cluster %d", (long long)size, cluster);
        }
    for (int stages = 3; stages <= kMaxStages; ++stages) {
        RingPosition at;
        for (int step = 0; step < 50; ++step) {
            const RingPosition direct = ring_position(step, stages);
            EXPECT(at.stage == direct.stage && at.parity == direct.parity, "step %d of %d stages", step, stages);
            at.advance(stages);
        }
    }
    for (std::int64_t slabs : {1, 3, 64, 1000})
        for (int size : {0, 1, 5, 64})
            for (std::int64_t slab : {std::int64_t{0}, slabs / 2, slabs - 1}) {
                const Range steps{7, 7 + size};
                const int shift = shift_of(steps, slab, slabs);
                EXPECT(shift >= 0 && (shift < size || size == 0), "slab %lld of %lld", (long long)slab,
                       (long long)slabs);
                std::set<int> seen;
                for (int i = 0; i < size; ++i)
                    seen.insert(rotated(steps, shift, i));
                EXPECT(static_cast<int>(seen.size()) == size, "%zu of %d steps", seen.size(), size);
                EXPECT(seen.empty() || (*seen.begin() == 7 && *seen.rbegin() == 6 + size), "%d steps", size);
            }
    EXPECT(shift_of({0, 64}, 32, 64) == 32, "slabs in the middle start in the middle");
    EXPECT(columns_of({1, 3}, 1000).begin == 64 && columns_of({1, 3}, 1000).end == 192, "whole steps");
    EXPECT(columns_of({1, 3}, 130).end == 130 && columns_of({3, 3}, 130).size() == 0, "the last step is cut");
    for (int step = 0; step < 9; ++step)
        EXPECT(takes_turn(0, step) != takes_turn(1, step), "step %d", step);
}

void check_shared_map() {
    for (const auto& [rank, adapter] : kTiles) {
        const SharedMap map = shared_map(rank, adapter);
        EXPECT(map.stages >= 3 && map.stages <= kMaxStages, "%d, %d", rank, adapter);
        EXPECT(map.factor == 128 * 64 * 2 && map.adapter == map.factor + 64 * rank * 2, "%d, %d", rank, adapter);
        EXPECT(map.stage_bytes == map.adapter + 64 * adapter * 2, "%d, %d", rank, adapter);
        EXPECT(map.staging == map.stages * map.stage_bytes, "%d, %d", rank, adapter);
        EXPECT(map.resident == map.staging + map.staging_buffers * 2 * 64 * 64 * 2, "%d, %d", rank, adapter);
        EXPECT(map.barriers == map.resident + 128 * adapter * 2, "%d, %d", rank, adapter);
        // One buffer less for dX must not make room for a stage more.
        EXPECT(map.staging_buffers == 1 || map.stages == kMaxStages ||
                   map.bytes - 2 * 64 * 64 * 2 + map.stage_bytes > kMaxSharedBytes,
               "%d, %d: %d stages", rank, adapter, map.stages);
        // The worst start needs kSharedAlignment - 16 bytes to reach the pattern's alignment.
        EXPECT(map.bytes >= map.barriers + 8 * barrier_map(map.stages).count + kSharedAlignment - 16, "%d, %d", rank,
               adapter);
        EXPECT(map.bytes <= 232448, "%d, %d", rank, adapter);
        const BarrierMap barriers = barrier_map(map.stages);
        const std::set<int> after{barriers.resident, barriers.drained, barriers.partials, barriers.sums,
                                  barriers.ring_free};
        EXPECT(barriers.empty == map.stages && after.size() == 5 && *after.begin() == 2 * map.stages &&
                   barriers.count == 2 * map.stages + 5 && *after.rbegin() == barriers.count - 1,
               "%d stages", map.stages);
    }
    EXPECT(shared_map(256, 16).stages == 4 && shared_map(128, 16).stages == 6, "four stages at R = 256");
}

// T's granules: each with an owner, and what a split is sent of them in slots of its own that fit into the ring.
void check_exchange() {
    for (const auto& [rank, adapter] : kTiles) {
        const int granules = granules_of(rank, adapter), most = max_log_splits(rank, adapter);
        EXPECT(granules * 16 == rank + adapter && most >= 2 && most <= 3, "%d, %d", rank, adapter);
        for (int log_splits = 1; log_splits <= 3; ++log_splits) {
            const int splits = 1 << log_splits, slots = slot_count(granules, log_splits);
            for (int split = 0; split < splits; ++split) {
                std::set<int> bytes;
                int owned = 0, shares = 0, sums = 0;
                const auto take = [&bytes](int offset) {
                    EXPECT(offset % 16 == 0 && bytes.insert(offset).second, "slot %d is taken twice", offset);
                };
                for (int g = 0; g < granules; ++g) {
                    const int owner = granule_owner(g, log_splits);
                    EXPECT(owner >= 0 && owner < splits, "granule %d is owned by %d", g, owner);
                    owned += owner == split;
                    for (int from = 0; from < splits; ++from) {
                        if (from == split || (owner != split && owner != from)) continue;
                        for (int thread = 0; thread < kConsumerThreads; ++thread) {
                            const int slot = slot_of(g, from, split, log_splits);
                            EXPECT(slot >= 0 && slot < slots, "slot %d of %d", slot, slots);
                            if (owner == split) {
                                take(share_offset(slot, 0, thread)), take(share_offset(slot, 1, thread));
                                shares += 32;
                            } else {
                                take(sum_offset(slots, slot, thread));
                                sums += 16;
                            }
                        }
                    }
                }
                // What the barriers are told to expect.
                EXPECT(owned == granules_owned(granules, split, log_splits), "%d granules", owned);
                EXPECT(shares == owned * (splits - 1) * kShareBytes, "%d bytes of shares", shares);
                EXPECT(sums == (granules - owned) * kSumBytes, "%d bytes of sums", sums);
                if (log_splits <= most && !bytes.empty())
                    EXPECT(*bytes.rbegin() + 16 <= shared_map(rank, adapter).resident, "%d, %d", rank, adapter);
            }
        }
    }
    EXPECT(max_log_splits(256, 16) == 2 && max_log_splits(128, 16) == 3, "eight splits of 256 columns do not fit");
}

// A lane exchange as the kernel does it, for all lanes of a warp at once.
void swap_lanes(std::vector<float>& v, BitSwap swap) {
    std::vector<float> sent(64);
    const auto low = [&](int i) { return swap.register_bit == 0 ? 2 * i : i; };
    const auto high = [&](int i) { return swap.register_bit == 0 ? 2 * i + 1 : i + 2; };
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 2; ++i)
            sent[lane * 2 + i] = exchange_send(v[lane * 4 + low(i)], v[lane * 4 + high(i)], lane >> swap.lane_bit & 1);
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 2; ++i)
            exchange_receive(v[lane * 4 + low(i)], v[lane * 4 + high(i)], lane >> swap.lane_bit & 1,
                             sent[(lane ^ 1 << swap.lane_bit) * 2 + i]);
}

void check_fragments() {
    constexpr int kColumns = 64;
    std::set<std::pair<int, int>> seen;
    for (int thread = 0; thread < 128; ++thread)
        for (int index = 0; index < kColumns / 2; ++index) {
            const Position at = accumulator_position(thread, index);
            // PTX ISA, the D fragment of wgmma.m64nNk16.
            EXPECT(at.row == thread / 32 * 16 + thread % 32 / 4 + (index % 4 / 2) * 8, "%d, %d", thread, index);
            EXPECT(at.column == index / 4 * 8 + thread % 4 * 2 + index % 2, "%d, %d", thread, index);
            seen.insert({at.row, at.column});
        }
    EXPECT(seen.size() == 64 * kColumns, "%zu", seen.size());

    for (int warp = 0; warp < 4; ++warp)
        for (int block = 0; block < kColumns / 8; ++block) {
            std::vector<float> by_row(128), by_column(128);
            for (int lane = 0; lane < 32; ++lane)
                for (int i = 0; i < 4; ++i) {
                    const Position at = accumulator_position(warp * 32 + lane, block * 4 + i);
                    by_row[lane * 4 + i] = by_column[lane * 4 + i] = static_cast<float>(at.row * 1000 + at.column);
                }
            swap_lanes(by_row, row_swap());
            swap_lanes(by_column, column_swap(0));
            swap_lanes(by_column, column_swap(1));
            for (int lane = 0; lane < 32; ++lane)
                for (int i = 0; i < 4; ++i) {
                    const Position row = row_quad(warp * 32 + lane, block),
                                   column = column_quad(warp * 32 + lane, block);
                    EXPECT(by_row[lane * 4 + i] == row.row * 1000 + row.column + i, "lane %d, value %d", lane, i);
                    EXPECT(by_column[lane * 4 + i] == (column.row + i) * 1000 + column.column, "lane %d, value %d",
                           lane, i);
                }
        }
}

// What TMA makes of byte `offset` of a box: address bits 4.. xor bits 7.., one to three of them.
int tma_swizzle(int offset, int bits) {
    return offset ^ ((offset >> 7 & ((1 << bits) - 1)) << 4);
}

// A tile through stmatrix into a swizzled box: every value where TMA and wgmma look for it.
void check_store(int columns, int bits) {
    std::vector<int> box(64 * columns, -1);
    for (int warp = 0; warp < 4; ++warp)
        for (int g = 0; g < columns / kGranuleColumns; ++g) {
            int rows[32];
            for (int lane = 0; lane < 32; ++lane) {
                const Position at = stmatrix_position(lane);
                const int row = warp * 16 + at.row, chunk = (g * kGranuleColumns + at.column) / 8;
                rows[lane] = columns == 64 ? swizzle128(row, chunk) : swizzle32(row, chunk);
            }
            // Matrix i takes its rows' addresses from lanes 8 i .. 8 i + 7 and register i of every lane: two values.
            for (int lane = 0; lane < 32; ++lane)
                for (int value = 0; value < kGranuleValues; ++value) {
                    const int offset = rows[value / 2 * 8 + lane / 4] / 2 + lane % 4 * 2 + value % 2;
                    const Position at = accumulator_position(warp * 32 + lane, g * kGranuleValues + value);
                    EXPECT(box.at(offset) == -1, "two values at %d", offset);
                    box[offset] = at.row * columns + at.column;
                }
        }
    for (int i = 0; i < 64 * columns; ++i)
        EXPECT(box[tma_swizzle(2 * i, bits) / 2] == i, "value %d of a box %d wide", i, columns);
}

void check_plan() {
    alignas(16) static char bytes[16];
    alignas(16) static float floats[4];
    BackwardParams p{};
    p.dy = p.x = p.xa = p.left = p.right = p.lora_A = p.lora_B = bytes;
    p.dx = bytes;
    p.dA = p.dB = floats;
    p.M = 300, p.N = 200, p.K = 136, p.R = 72, p.P = 8;
    p.dy_stride = 200, p.x_stride = 136;
    EXPECT(sm90_why_not(p).empty(), "%s", sm90_why_not(p).c_str());
    const auto refused = [&](auto change, const char* word) {
        BackwardParams q = p;
        change(q);
        EXPECT(sm90_why_not(q).find(word) != std::string::npos, "'%s' lacks '%s'", sm90_why_not(q).c_str(), word);
    };
    refused([](auto& q) { q.R = 520; }, "R = 520");
    refused([](auto& q) { q.R = 12; }, "R = 12");
    refused([](auto& q) { q.P = 72; }, "P = 72");
    refused([](auto& q) { q.P = 0; }, "P = 0");
    refused([](auto& q) { q.N = 201; }, "N = 201");
    refused([](auto& q) { q.K = 0; }, "neither may be 0");
    refused([](auto& q) { q.dy_stride = 192; }, "dy_stride = 192");
    refused([](auto& q) { q.x = nullptr; }, "x is missing");
    refused([](auto& q) { q.left = bytes + 2; }, "left starts 2 bytes");
    refused([](auto& q) { q.dx = nullptr, q.dA = q.dB = nullptr; }, "no gradient");
    BackwardParams alone = p;
    alone.P = 0, alone.dA = alone.dB = nullptr, alone.x = alone.xa = alone.lora_A = alone.lora_B = nullptr;
    EXPECT(sm90_why_not(alone).empty(), "%s", sm90_why_not(alone).c_str());

    BackwardParams full = p;
    full.M = 4096, full.N = full.K = 4096, full.dy_stride = full.x_stride = 4096, full.R = 256, full.P = 16;
    // 32 slabs. 16 clusters of 8 fill the card in one wave, if all of them fit; where GPCs have 14 multiprocessors,
    // not.
    const auto cut = [&full](const Residency& resident) {
        const Plan plan = sm90_plan(full, resident, resident);
        return std::pair{plan.rows, plan.cluster};
    };
    EXPECT((cut(expected_residency(132)) == std::pair{2, 8}), "16 clusters of 8 in one wave");
    EXPECT((cut({132, 66, 33, 14}) == std::pair{1, 4}), "14 clusters of 8 would take two waves");
    EXPECT((cut({132, 66, 30, 0}) == std::pair{2, 4}), "30 clusters of 4 split in four would take two waves");
    EXPECT((cut({132, 66, 0, 0}) == std::pair{1, 2}), "no cluster of 4 fits");
    EXPECT((cut({7, 0, 0, 0}) == std::pair{1, 1}), "no cluster fits");

    for (std::int64_t M : {1, 128, 129, 8192, 100000})
        for (int sms : {1, 20, 114, 132}) {
            BackwardParams q = p;
            q.M = M, q.N = q.K = 4096, q.dy_stride = q.x_stride = 4096, q.R = 256, q.P = 16;
            const Plan plan = sm90_plan(q, expected_residency(sms), expected_residency(sms));
            EXPECT(plan.slabs == (M + 127) / 128, "M = %lld", (long long)M);
            EXPECT(plan.grid == (plan.slabs + plan.rows - 1) / plan.rows * plan.cluster, "M = %lld", (long long)M);
            EXPECT(plan.shared_bytes == shared_map(256, 16).bytes && plan.threads == 384, "%d", plan.shared_bytes);
            EXPECT(plan.cluster == 1 || plan.cluster == 2 || plan.cluster == 4 || plan.cluster == 8, "%d",
                   plan.cluster);
            if (M == 8192 && sms == 132)
                EXPECT(plan.rows == 2 && plan.cluster == 4, "64 slabs on 132: %d of %d", plan.rows, plan.cluster);
            if (M == 1) EXPECT(plan.rows == 1, "a phantom for one slab");
            EXPECT(plan.cluster <= sms, "%d blocks on %d multiprocessors", plan.cluster, sms);
        }
    // Two launches. 64 slabs by two tiles of T; then 32 pairs of slabs by 16 tiles of dX, eight in turn for each pair
    // of blocks: all of the 66 pairs that fit would not be done sooner.
    full.M = 8192, full.R = 512;
    const Plan two = sm90_plan(full, expected_residency(132), expected_residency(132));
    EXPECT(two.rows == 2 && two.cluster == 2 && two.grid == 128, "%d of %d, %lld", two.rows, two.cluster,
           (long long)two.grid);
    EXPECT(two.second.grid == 128 && two.second.stages == 4, "%lld blocks", (long long)two.second.grid);
    EXPECT(two.second.shared_bytes == expand_map(16).bytes && expand_map(64).bytes <= kMaxSharedBytes, "%d",
           two.second.shared_bytes);
    int next = 0;
    for (int cluster = 0; cluster < 64; ++cluster) {
        const Range share = share_of(510, cluster, 64);
        EXPECT(share.begin == next && (share.size() == 7 || share.size() == 8), "cluster %d", cluster);
        next = share.end;
    }
    EXPECT(next == 510, "%d tiles", next);
    EXPECT(two.scratch == 8192 * (512 + 16) / 2, "%lld elements", (long long)two.scratch);
    EXPECT(t_width(264, 8) == 320 + 16 && t_width(512, 0) == 512, "whole steps, and the adapter's tile");
    full.dx = nullptr;
    EXPECT(sm90_plan(full, expected_residency(132), expected_residency(132)).scratch == 0, "no dX, no T in memory");
}

}  // namespace

int main() {
    check_steps();
    check_shared_map();
    check_exchange();
    check_fragments();
    check_store(64, 3);
    check_store(16, 1);
    check_plan();
    std::puts("ok");
}
