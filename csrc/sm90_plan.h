// How the Hopper kernel cuts a problem, and what it refuses: host arithmetic alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

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

// Why the Hopper kernel cannot take `p`, or "". The device's compute capability is the caller's to check.
inline std::string sm90_why_not(const BackwardParams& p) {
    const auto text = [](const char* name, std::int64_t value) {
        return std::string(name) + " = " + std::to_string(value);
    };
    const bool need_dx = p.dx != nullptr, need_dA = p.dA != nullptr, need_dB = p.dB != nullptr;
    if (!need_dx && !need_dA && !need_dB) return "no gradient is asked for";
    for (const auto& [name, size] : {std::pair{"M", p.M}, {"N", p.N}, {"K", p.K}})
        if (size < 0 || size > sm90::kMaxSize) return text(name, size) + " is not in 0 .. 2^31 - 256";
    if (p.N == 0 || p.K == 0) return "N and K must not be 0";
    if (p.N % 8 != 0) return text("N", p.N) + " is not a multiple of 8 (rows on 16 bytes)";
    if (p.K % 8 != 0) return text("K", p.K) + " is not a multiple of 8 (rows on 16 bytes)";
    if (p.P < 0 || p.P > kMaxAdapter || p.P % 8 != 0) return text("P", p.P) + " is not a multiple of 8 in 0 .. 64";
    if (need_dx && (p.R < 8 || p.R > kMaxRank || p.R % 8 != 0))
        return text("R", p.R) + " is not a multiple of 8 in 8 .. 256";
    if ((need_dA || need_dB) && p.P == 0) return "dA and dB need an adapter (P = 0)";
    // One row has no stride; with more, rows may not overlap.
    const auto bad_stride = [&p](std::int64_t stride, std::int64_t width) {
        return p.M > 1 && (stride % 8 != 0 || stride < width || stride >= (std::int64_t{1} << 38));
    };
    if (bad_stride(p.dy_stride, p.N))
        return text("dy_stride", p.dy_stride) + " is not a multiple of 8 that is at least N";
    if (need_dA && bad_stride(p.x_stride, p.K))
        return text("x_stride", p.x_stride) + " is not a multiple of 8 that is at least K";

    const bool adapter = p.P > 0;
    const struct {
        const char* name;
        const void* pointer;
        bool needed;
    } operands[] = {
        {"dy", p.dy, true},
        {"x", p.x, need_dA},
        {"xa", p.xa, need_dB},
        {"left", p.left, need_dx},
        {"right", p.right, need_dx},
        {"lora_A", p.lora_A, need_dx && adapter},
        {"lora_B", p.lora_B, (need_dx || need_dA) && adapter},
        {"dx", p.dx, need_dx},
        {"dA", p.dA, need_dA},
        {"dB", p.dB, need_dB},
    };
    for (const auto& operand : operands) {
        if (!operand.needed || p.M == 0) continue;
        if (operand.pointer == nullptr) return std::string(operand.name) + " is missing";
        if (reinterpret_cast<std::uintptr_t>(operand.pointer) % kAlignmentBytes != 0)
            return std::string(operand.name) + " does not start on a 16-byte boundary";
    }
    return "";
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
