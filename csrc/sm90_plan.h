// How the Hopper kernel cuts a problem, and what it refuses: host arithmetic alone.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>

#include "operands.h"
#include "params.h"
#include "sm90_tiles.h"

namespace loge {

namespace sm90 {

// Clusters of 1, 2, 4 and 8 blocks of a kernel that can run at once on a device; 0 where not one fits.
using Residency = std::array<int, 4>;
constexpr int cluster_of(int index) {
    return 1 << index;
}
// Of a power of two.
constexpr int log_of(int power) {
    int log = 0;
    while (1 << log < power)
        ++log;
    return log;
}

// What to expect of a device that cannot be asked. A cluster lies within one GPC, of which a full one has 16 or 18
// multiprocessors.
inline Residency expected_residency(int sm_count) {
    const int in_full_gpcs = sm_count >= 16 ? sm_count / 16 * 16 : sm_count;
    return {sm_count, sm_count / 2, in_full_gpcs / 4, in_full_gpcs / 8};
}

// How a problem can be cut into clusters.
struct Cut {
    int rows, log_splits;
    constexpr int log_cluster() const { return rows - 1 + log_splits; }
};

// Cycles of a step: what passes through shared memory, 128 bytes a cycle, or what comes from L2, of which a
// multiprocessor gets 27 where all of them ask. Both from counts, on paper. `width`: of the tiles of R and P together.
constexpr std::int64_t step_cycles(int rank_tile, int width, int rows) {
    const std::int64_t fill = kBlockM + width, products = 2 * (kStep + rank_tile) + 4 * (kStep + width - rank_tile);
    const std::int64_t from_l2 = 128 * (kBlockM + width / rows) / 27;
    return fill + products > from_l2 ? fill + products : from_l2;
}

// Of the exchange: from block to block some 16 bytes a cycle, 4 of each value to its owner and 2 back.
constexpr std::int64_t exchange_cycles(int width, int log_splits) {
    return log_splits == 0 ? 0 : 1000 + (std::int64_t{48} * width * ((1 << log_splits) - 1) >> log_splits);
}

inline bool takes_two_launches(const BackwardParams& p) {
    return p.dx != nullptr && p.R > kTileColumns;
}

// In cycles, with `resident` clusters at once; of the first launch, where there are two.
inline std::int64_t plan_cost(const BackwardParams& p, std::int64_t slabs, int resident, Cut cut) {
    const int rank = rank_tile(p.dx != nullptr ? p.R : 0), width = rank + adapter_tile(p.P);
    const bool two = takes_two_launches(p), need_t = p.dx != nullptr || p.dA != nullptr;
    const auto share = [cut](std::int64_t size) {
        return (std::int64_t{count_steps(size)} + (1 << cut.log_splits) - 1) >> cut.log_splits;
    };
    const std::int64_t clusters = (slabs + cut.rows - 1) / cut.rows * (two ? tiles_of(p.R) : 1);
    const std::int64_t steps = share(p.N) + (need_t && !two ? share(p.K) : 0);
    return (clusters + resident - 1) / resident *
           (steps * step_cycles(rank, width, cut.rows) + (need_t ? exchange_cycles(width, cut.log_splits) : 0));
}

inline Cut best_cut(const BackwardParams& p, std::int64_t slabs, const Residency& resident) {
    const int most = max_log_splits(rank_tile(p.dx != nullptr ? p.R : 0), adapter_tile(p.P));
    Cut best{1, 0};
    std::int64_t least = plan_cost(p, slabs, std::max(1, resident[0]), best);
    for (int rows = 1; rows <= 2 && rows <= std::max<std::int64_t>(slabs, 1); ++rows)  // no phantom alone
        for (int log_splits = 0; log_splits <= most; ++log_splits) {
            const Cut cut{rows, log_splits};
            if (cut.log_cluster() >= static_cast<int>(resident.size()) || resident[cut.log_cluster()] < 1) continue;
            const std::int64_t cost = plan_cost(p, slabs, resident[cut.log_cluster()], cut);
            if (cost < least) least = cost, best = cut;
        }
    return best;
}

}  // namespace sm90

// Why the Hopper kernel cannot take `p`, or "".
inline std::string sm90_why_not(const BackwardParams& p) {
    return problem_why_not(p);
}

inline int sm90_max_splits(const BackwardParams& p) {
    return 1 << sm90::max_log_splits(sm90::rank_tile(p.dx != nullptr ? p.R : 0), sm90::adapter_tile(p.P));
}

inline void sm90_cut(const BackwardParams& p, Plan& plan, sm90::Cut cut) {
    plan.rows = cut.rows;
    plan.cluster = sm90::cluster_of(cut.log_cluster());
    plan.grid = (plan.slabs + cut.rows - 1) / cut.rows * plan.cluster;
    if (sm90::takes_two_launches(p)) plan.grid *= sm90::tiles_of(p.R);
}

// The second of two launches, of which `resident` blocks or pairs of blocks run at once: as many as let each take the
// same number of tiles.
inline void sm90_cut_second(const BackwardParams& p, Plan& plan, std::int64_t resident) {
    const sm90::SharedMap shared = sm90::expand_map(sm90::adapter_tile(p.P));
    const std::int64_t tiles = (plan.slabs + plan.rows - 1) / plan.rows * sm90::tiles_of(p.K);
    const std::int64_t in_turn =
        (tiles + std::max<std::int64_t>(resident, 1) - 1) / std::max<std::int64_t>(resident, 1);
    plan.second.stages = shared.stages;
    plan.second.shared_bytes = shared.bytes;
    plan.second.grid = in_turn == 0 ? 0 : (tiles + in_turn - 1) / in_turn * plan.rows;
    plan.scratch = p.M * sm90::t_width(p.R, p.P) / 2;
}

// As asked for, where a plan has been made: the second launch shares loads between as many slabs.
inline void sm90_cut_as(const BackwardParams& p, Plan& plan, int rows, int splits) {
    const std::int64_t blocks = plan.second.grid;
    sm90_cut(p, plan, {rows, sm90::log_of(splits)});
    if (sm90::takes_two_launches(p)) sm90_cut_second(p, plan, blocks / rows);
}

// How to cut `p`, of which sm90_why_not has no complaint. `second`: of the second launch's kernel.
inline Plan sm90_plan(const BackwardParams& p, const sm90::Residency& resident, const sm90::Residency& second) {
    const sm90::SharedMap shared =
        sm90::shared_map(sm90::rank_tile(p.dx != nullptr ? p.R : 0), sm90::adapter_tile(p.P));
    Plan plan{};
    plan.block_m = sm90::kBlockM;
    plan.block_n = sm90::kStep;
    plan.block_k = sm90::kStep;
    plan.stages = shared.stages;
    plan.shared_bytes = shared.bytes;
    plan.threads = sm90::kThreads;
    plan.slabs = (p.M + sm90::kBlockM - 1) / sm90::kBlockM;
    sm90_cut(p, plan, sm90::best_cut(p, plan.slabs, resident));
    if (sm90::takes_two_launches(p)) {
        plan.block_r = sm90::kTileColumns;
        plan.block_k = sm90::kTileColumns;
        sm90_cut_second(p, plan, second[plan.rows - 1]);
    }
    return plan;
}

}  // namespace loge
