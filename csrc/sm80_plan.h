// How the Ampere kernel cuts a problem, and what it refuses: host arithmetic alone.
#pragma once

#include <cstdint>
#include <string>

#include "operands.h"
#include "params.h"
#include "sm80_kernels.h"
#include "sm80_tiles.h"

namespace loge {

// Why the Ampere kernel cannot take `p`, or "".
inline std::string sm80_why_not(const BackwardParams& p) {
    return problem_why_not(p);
}

// How to cut `p`, of which sm80_why_not has no complaint: one block to a slab, whatever the device.
inline Plan sm80_plan(const BackwardParams& p) {
    Plan plan{};
    plan.block_m = sm80::kBlockM;
    plan.block_n = sm80::kStepN;
    plan.cluster = 1;
    plan.rows = 1;
    plan.threads = sm80::kThreads;
    plan.slabs = (p.M + sm80::kBlockM - 1) / sm80::kBlockM;
    plan.grid = plan.slabs;
    sm80::with_tiles(p, [&plan](auto rank, auto adapter) {
        using Map = sm80::Shared<rank(), adapter()>;
        plan.block_k = Map::kStepK;
        plan.stages = Map::kFirstCount;
        plan.shared_bytes = Map::kBytes;
    });
    return plan;
}

}  // namespace loge
