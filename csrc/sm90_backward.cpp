#include "sm90_backward.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "sm90_arguments.h"
#include "tensor_map.h"

namespace loge {

namespace {

class Maps {
 public:
    Maps(const BackwardParams& p, int device) : dtype_(p.dtype), device_(device) {}
    CUtensorMap operator()(const void* base, std::int64_t rows, std::int64_t columns, std::int64_t stride, int box_rows,
                           int box_columns) const {
        // One row has no stride of its own, and TMA wants one that its columns fit into.
        return tensor_map({base, rows, columns, rows == 1 && stride < columns ? columns : stride, box_rows, box_columns,
                           dtype_, device_});
    }

 private:
    DType dtype_;
    int device_;
};

void take_sums(sm90::Sums& sums, const BackwardParams& p, const Plan& plan) {
    sums.dA = p.dA;
    sums.dB = p.dB;
    sums.dA_rounded = p.dA_rounded;
    sums.dB_rounded = p.dB_rounded;
    sums.finished = p.finished;
    sums.slab_stride = p.slab_stride;
    sums.slabs = static_cast<std::int32_t>(plan.slabs);
    sums.N = static_cast<std::int32_t>(p.N);
    sums.K = static_cast<std::int32_t>(p.K);
    sums.P = p.P;
    sums.scaling = p.scaling;
    sums.need_dA = p.dA != nullptr;
    sums.need_dB = p.dB != nullptr;
    sums.deterministic = p.deterministic;
}

// T in memory: R's columns, and the adapter's behind whole steps of them.
struct TInMemory {
    int rank_columns, stride;
    const char *base, *adapter;
    explicit TInMemory(const BackwardParams& p)
        : rank_columns(sm90::count_steps(p.R) * sm90::kStep),
          stride(sm90::t_width(p.R, p.P)),
          base(static_cast<const char*>(p.scratch)),
          adapter(base + std::int64_t{rank_columns} * sm90::kElementBytes) {}
};

sm90::Arguments arguments_of(const BackwardParams& p, const Plan& plan, int device) {
    using sm90::kBlockM, sm90::kStep, sm90::kWarpgroupRows;
    const bool need_dx = p.dx != nullptr, need_dA = p.dA != nullptr, need_dB = p.dB != nullptr;
    const bool two = sm90::takes_two_launches(p);
    const int rank_tile = sm90::rank_tile(need_dx ? p.R : 0), adapter_tile = sm90::adapter_tile(p.P);
    const int rows = plan.rows;  // each loads its part of the factors' boxes
    const Maps map(p, device);
    sm90::Arguments a{};
    take_sums(a, p, plan);
    a.dy = map(p.dy, p.M, p.N, p.dy_stride, kBlockM, kStep);
    if (need_dx) a.left = map(p.left, p.N, p.R, p.R, kStep / rows, kStep);
    if (need_dx && !two) {
        a.right = map(p.right, p.R, p.K, p.K, rank_tile / rows, kStep);
        a.dx = map(p.dx, p.M, p.K, p.K, kWarpgroupRows, kStep);
    }
    if (p.P > 0) {
        if (need_dx && !two) a.lora_A = map(p.lora_A, p.P, p.K, p.K, adapter_tile / rows, kStep);
        if (need_dx || need_dA) a.lora_B = map(p.lora_B, p.N, p.P, p.P, kStep / rows, adapter_tile);
        if (need_dA && !two) a.x = map(p.x, p.M, p.K, p.x_stride, kBlockM, kStep);
        if (need_dB) a.xa = map(p.xa, p.M, p.P, p.P, kBlockM, adapter_tile);
    }
    a.tiles = 1;
    if (two) {
        const TInMemory t(p);
        a.dx = map(t.base, p.M, t.rank_columns, t.stride, kWarpgroupRows, kStep);
        if (p.P > 0) a.t_p = map(t.adapter, p.M, adapter_tile, t.stride, kBlockM, adapter_tile);
        a.tiles = sm90::tiles_of(p.R);
        a.need_dA = false;  // the second launch's
        a.dA_rounded = nullptr;
        if (a.dB_rounded == nullptr) a.finished = nullptr;
    }
    a.clusters = static_cast<std::int32_t>(plan.grid / plan.cluster);
    a.rows = rows;
    a.log_splits = sm90::log_of(plan.cluster / rows);
    return a;
}

sm90::ExpandArguments expand_arguments_of(const BackwardParams& p, const Plan& plan, int device) {
    using sm90::kBlockM, sm90::kStep;
    const int adapter_tile = sm90::adapter_tile(p.P), rows = plan.rows;
    const Maps map(p, device);
    const TInMemory t(p);
    sm90::ExpandArguments a{};
    take_sums(a, p, plan);
    a.dB_rounded = nullptr;
    if (a.dA_rounded == nullptr) a.finished = nullptr;
    a.t = map(t.base, p.M, t.rank_columns, t.stride, kBlockM, kStep);
    a.right = map(p.right, p.R, p.K, p.K, sm90::kDepth, kStep);
    a.dx = map(p.dx, p.M, p.K, p.K, sm90::kWarpgroupRows, kStep);
    if (p.P > 0) {
        a.t_p = map(t.adapter, p.M, adapter_tile, t.stride, kBlockM, adapter_tile);
        a.lora_A = map(p.lora_A, p.P, p.K, p.K, std::min(sm90::kDepth, adapter_tile), kStep);
        if (a.need_dA) a.x = map(p.x, p.M, p.K, p.x_stride, kBlockM, kStep);
    }
    a.boxes = sm90::count_steps(p.R);
    a.clusters = static_cast<std::int32_t>(plan.second.grid / rows);
    a.rows = rows;
    return a;
}

template <DType kType, int kRank>
sm90::Compiled select_adapter(int adapter_tile) {
    if constexpr (kRank > 0)
        if (adapter_tile == 0) return sm90::compiled<kType, kRank, 0>();
    return adapter_tile == 16 ? sm90::compiled<kType, kRank, 16>() : sm90::compiled<kType, kRank, 64>();
}

template <DType kType>
sm90::Compiled select_rank(int rank_tile, int adapter_tile) {
    switch (rank_tile) {
        case 0:
            return select_adapter<kType, 0>(adapter_tile);
        case 64:
            return select_adapter<kType, 64>(adapter_tile);
        case 128:
            return select_adapter<kType, 128>(adapter_tile);
        default:
            return select_adapter<kType, 256>(adapter_tile);
    }
}

template <DType kType>
sm90::Compiled select(int rank, int adapter_tile) {
    if (rank <= sm90::kTileColumns) return select_rank<kType>(sm90::rank_tile(rank), adapter_tile);
    return adapter_tile == 0    ? sm90::compiled_project<kType, 0>()
           : adapter_tile == 16 ? sm90::compiled_project<kType, 16>()
                                : sm90::compiled_project<kType, 64>();
}

template <DType kType>
sm90::CompiledExpand select_expand(int adapter_tile) {
    return adapter_tile == 0    ? sm90::compiled_expand<kType, 0>()
           : adapter_tile == 16 ? sm90::compiled_expand<kType, 16>()
                                : sm90::compiled_expand<kType, 64>();
}

// The one kernel, or that of the first launch.
sm90::Compiled kernel_of(const BackwardParams& p) {
    const int rank = p.dx != nullptr ? p.R : 0, adapter_tile = sm90::adapter_tile(p.P);
    return p.dtype == DType::kFloat16 ? select<DType::kFloat16>(rank, adapter_tile)
                                      : select<DType::kBFloat16>(rank, adapter_tile);
}

sm90::CompiledExpand expand_kernel_of(const BackwardParams& p) {
    const int adapter_tile = sm90::adapter_tile(p.P);
    return p.dtype == DType::kFloat16 ? select_expand<DType::kFloat16>(adapter_tile)
                                      : select_expand<DType::kBFloat16>(adapter_tile);
}

// Asked once for each kernel and device. A device that is reset under a process forgets its kernels' attributes, and
// everything that torch has on it as well.
sm90::Residency prepared(sm90::Residency (*prepare)(), int device) {
    static std::map<std::pair<sm90::Residency (*)(), int>, sm90::Residency> known;
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find({prepare, device});
    return found != known.end() ? found->second : known[{prepare, device}] = prepare();
}

}  // namespace

Plan sm90_prepare(const BackwardParams& problem, int device) {
    const sm90::Residency first = prepared(kernel_of(problem).prepare, device);
    return sm90_plan(problem, first,
                     sm90::takes_two_launches(problem) ? prepared(expand_kernel_of(problem).prepare, device) : first);
}

void sm90_backward(const BackwardParams& problem, const Plan& plan, int device, void* stream) {
    const std::string reason = sm90_why_not(problem);
    if (!reason.empty()) throw std::invalid_argument("sm90: " + reason);
    if (problem.M == 0) return;
    kernel_of(problem).launch(arguments_of(problem, plan, device), plan, stream);
    if (sm90::takes_two_launches(problem))
        expand_kernel_of(problem).launch(expand_arguments_of(problem, plan, device), plan, stream);
}

}  // namespace loge
