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

// Steps of a walk that the exchange of T between the blocks of a cluster costs: two cluster barriers and some 1500
// (R = 64) to 4000 (R = 256) cycles of shared-memory traffic, where a step takes about 1000.
inline constexpr std::int64_t kExchangeSteps = 4;

// Clusters of 1, 2, 4 and 8 blocks of a kernel that can run at once on a device; 0 where not one fits.
using Residency = std::array<int, 4>;
constexpr int cluster_of(int index) {
    return 1 << index;
}

// What to expect of a device that cannot be asked. A cluster lies within one GPC, of which a full one has 16 or 18
// multiprocessors.
inline Residency expected_residency(int sm_count) {
    const int in_full_gpcs = sm_count >= 16 ? sm_count / 16 * 16 : sm_count;
    return {sm_count, sm_count / 2, in_full_gpcs / 4, in_full_gpcs / 8};
}

// In steps, with `resident` clusters at once.
inline std::int64_t plan_cost(const BackwardParams& p, std::int64_t slabs, int resident, int cluster) {
    const std::int64_t waves = (slabs + resident - 1) / resident;
    const bool second_walk = p.dx != nullptr || p.dA != nullptr;
    const auto share = [cluster](std::int64_t size) { return (count_steps(size) + cluster - 1) / cluster; };
    const std::int64_t steps = share(p.N) + (second_walk ? share(p.K) : 0);
    return waves * (steps + (cluster > 1 && second_walk ? kExchangeSteps : 0));
}

}  // namespace sm90

// Why the Hopper kernel cannot take `p`, or "".
inline std::string sm90_why_not(const BackwardParams& p) {
    return problem_why_not(p);
}

// How to cut `p`, of which sm90_why_not has no complaint.
inline Plan sm90_plan(const BackwardParams& p, const sm90::Residency& resident) {
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
    plan.cluster = 1;
    std::int64_t best = sm90::plan_cost(p, plan.slabs, std::max(1, resident[0]), 1);
    for (int i = 1; i < static_cast<int>(resident.size()); ++i) {
        if (resident[i] < 1) continue;
        const std::int64_t cost = sm90::plan_cost(p, plan.slabs, resident[i], sm90::cluster_of(i));
        if (cost < best) best = cost, plan.cluster = sm90::cluster_of(i);
    }
    plan.grid = plan.slabs * plan.cluster;
    return plan;
}

}  // namespace loge
