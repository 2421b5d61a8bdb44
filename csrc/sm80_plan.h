// How the Ampere kernels cut a problem, and what they refuse: host arithmetic alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "operands.h"
#include "params.h"
#include "sm80_arguments.h"
#include "sm80_kernels.h"
#include "sm80_tiles.h"

namespace loge {

namespace sm80 {

inline constexpr std::int64_t kPartsInL2 = std::int64_t{40} << 20;  // all that an A100 has

// Steps that a block should have at least of a tile of `steps` that it shares: the block that adds its parts up reads,
// for each, as many bytes as one and a half steps load.
inline std::int64_t fewest_steps(std::int64_t steps) {
    std::int64_t fewest = 1;
    while (2 * fewest * fewest < 3 * steps)
        ++fewest;
    return fewest;
}

inline int stages_that_fit(int shared_bytes, int first_stage, int stage_bytes) {
    return std::min(kMaxStages, (shared_bytes - first_stage) / stage_bytes);
}

inline int project_stages(int rows, int columns, int adapter, int shared_bytes) {
    return with_project(rows, columns, adapter, [&](auto kRows, auto kColumns, auto kAdapter) {
        using Tiles = ProjectTiles<kRows(), kColumns(), kAdapter()>;
        return stages_that_fit(shared_bytes, Tiles::kFirstStage, Tiles::kStageBytes);
    });
}

// The columns of T that a block computes: all where it can, and of large ranks those that pad the least.
inline int columns_of(const BackwardParams& p, int adapter, int shared_bytes) {
    const std::int64_t rank = p.dx != nullptr ? p.R : 0;
    int columns = rank == 0 ? 0 : rank <= 64 ? 64 : rank <= 128 || (rank > 256 && rank <= 384) ? 128 : 256;
    while (columns > 64 && project_stages(128, columns, adapter, shared_bytes) < 2)
        columns /= 2;
    return columns;
}

// And the rows. Blocks have half as many parts of dB where a slab is twice as high, but more of them share it: worth it
// where the parts would not wait in L2.
inline int rows_of(const BackwardParams& p, int columns, int adapter, int shared_bytes, std::int64_t parts_in_l2) {
    const bool much = p.dB != nullptr && tiles_of(p.M, 128) * p.N * p.P * 4 > parts_in_l2;
    const bool high = much && columns <= 128 && adapter == 16 && project_stages(256, columns, 16, shared_bytes) >= 2;
    return high ? 256 : 128;
}

inline Arguments arguments_of(const BackwardParams& p, const Plan& plan) {
    Arguments a{};
    a.problem = p;
    a.rank = p.dx != nullptr ? p.R : 0;
    a.adapter = p.dx != nullptr || p.dA != nullptr ? p.P : 0;
    a.project_stages = plan.stages, a.expand_stages = plan.second.stages;
    a.step_n = plan.block_n;
    a.project_slabs = static_cast<std::int32_t>(plan.slabs);
    a.expand_slabs = static_cast<std::int32_t>(tiles_of(p.M, kBlockM));
    a.steps = static_cast<std::int32_t>(tiles_of(p.N, plan.block_n));
    const std::int64_t across = plan.block_r == 0 ? 1 : tiles_of(a.rank, plan.block_r);
    a.project = cut(plan.slabs * across * a.steps, plan.grid);
    a.expand = cut((p.dx || p.dA ? tiles_of(p.K, plan.block_k) : 0) * a.expand_slabs, plan.second.grid);
    a.dB_blocks = static_cast<std::int32_t>(a.project.owner(plan.slabs * a.steps - 1) + 1);
    a.dB_steps = static_cast<std::int32_t>(std::min<std::int64_t>(a.project.most(), a.steps));
    return a;
}

inline Scratch scratch_of(const Arguments& a, const Plan& plan) {
    const int adapter = adapter_tile(a.problem.P);
    const int fragments = with_project(plan.block_m, plan.block_r, adapter, [](auto rows, auto columns, auto kAdapter) {
        return ProjectTiles<rows(), columns(), kAdapter()>::kFragments;
    });
    return scratch_of(a, fragments, adapter / 16 * plan.block_k / 64);
}

// With the addresses in the call's scratch and of its counters.
inline Arguments arguments_in(const BackwardParams& p, const Plan& plan) {
    Arguments a = arguments_of(p, plan);
    const Scratch scratch = scratch_of(a, plan);
    float* const base = static_cast<float*>(p.scratch);
    a.t = base;
    a.t_parts = base + scratch.t_parts, a.dB_parts = base + scratch.dB_parts, a.dA_parts = base + scratch.dA_parts;
    a.t_counters = p.finished, a.dA_counters = p.finished + plan.grid;
    return a;
}

}  // namespace sm80

// Why the Ampere kernels cannot take `p`, or "".
inline std::string sm80_why_not(const BackwardParams& p) {
    return problem_why_not(p);
}

// How to cut `p`, of which sm80_why_not has no complaint, for a device of `sms` multiprocessors whose blocks may have
// `shared_bytes`. The plan needs more than that where nothing fits.
inline Plan sm80_plan(const BackwardParams& p, int sms, int shared_bytes = sm80::kSharedBytes,
                      std::int64_t parts_in_l2 = sm80::kPartsInL2) {
    using namespace sm80;
    const int adapter = adapter_tile(p.P), rank = p.dx != nullptr ? p.R : 0;
    Plan plan{};
    plan.ordered = true;
    plan.cluster = 1;
    plan.rows = 1;
    plan.threads = kThreads;
    plan.block_r = columns_of(p, adapter, shared_bytes);
    plan.block_m = rows_of(p, plan.block_r, adapter, shared_bytes, parts_in_l2);
    with_project(plan.block_m, plan.block_r, adapter, [&](auto rows, auto columns, auto kAdapter) {
        using Tiles = ProjectTiles<rows(), columns(), kAdapter()>;
        plan.block_n = Tiles::kStepN;
        plan.stages = std::max(2, stages_that_fit(shared_bytes, Tiles::kFirstStage, Tiles::kStageBytes));
        plan.shared_bytes = Tiles::bytes(plan.stages);
    });
    for (const int width : {128, 64})
        if (plan.second.stages == 0)
            with_expand(width, adapter, [&](auto kWidth, auto kAdapter) {
                using Tiles = ExpandTiles<kWidth(), kAdapter()>;
                const int depth = rank + (rank > 0 ? p.P : 0);
                const int stages = stages_that_fit(shared_bytes, Tiles::bytes(0, depth), Tiles::kStageBytes);
                if (stages < 2 && width > 64) return;
                plan.block_k = width;
                plan.second.stages = std::max(2, stages);
                plan.second.shared_bytes = Tiles::bytes(plan.second.stages, depth);
            });
    plan.slabs = tiles_of(p.M, plan.block_m);
    if (plan.slabs == 0) return plan;

    const std::int64_t steps = tiles_of(p.N, plan.block_n);
    const std::int64_t tiles = plan.slabs * (plan.block_r == 0 ? 1 : tiles_of(rank, plan.block_r));
    plan.grid = std::min<std::int64_t>(sms, std::max(tiles, tiles * steps / fewest_steps(steps)));
    const std::int64_t columns = p.dx != nullptr || p.dA != nullptr ? tiles_of(p.K, plan.block_k) : 0;
    const std::int64_t sums = p.dB != nullptr ? tiles_of(steps * plan.block_n * p.P, kFragmentFloats) : 0;
    plan.second.grid = std::clamp<std::int64_t>(std::max(columns * tiles_of(p.M, kBlockM), sums), 1, sms);
    const Scratch scratch = scratch_of(arguments_of(p, plan), plan);
    plan.scratch = scratch.size, plan.parts = scratch.size - scratch.t_parts;
    return plan;
}

}  // namespace loge
