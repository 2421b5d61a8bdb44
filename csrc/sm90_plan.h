// How the Hopper kernel cuts a problem, and what it refuses: host arithmetic alone.
#pragma once

#include <algorithm>
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

// Clusters that can run at once. A cluster lies within one GPC, of which a full one has 16 or 18 multiprocessors.
inline std::int64_t resident_clusters(int sm_count, int cluster) {
    if (cluster <= 2) return std::max(1, sm_count / cluster);
    const int in_full_gpcs = sm_count >= 16 ? sm_count / 16 * 16 : sm_count;
    return std::max(1, in_full_gpcs / cluster);
}

inline std::int64_t plan_cost(const BackwardParams& p, std::int64_t slabs, int sm_count, int cluster) {
    const std::int64_t clusters = resident_clusters(sm_count, cluster);
    const std::int64_t waves = (slabs + clusters - 1) / clusters;
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

// How to cut `p`, of which sm90_why_not has no complaint, on a device of `sm_count` multiprocessors.
inline Plan sm90_plan(const BackwardParams& p, int sm_count) {
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
    for (int cluster = 2; cluster <= sm90::kMaxCluster && cluster <= sm_count; cluster *= 2)
        if (sm90::plan_cost(p, plan.slabs, sm_count, cluster) < sm90::plan_cost(p, plan.slabs, sm_count, plan.cluster))
            plan.cluster = cluster;
    plan.grid = plan.slabs * plan.cluster;
    return plan;
}

}  // namespace loge
