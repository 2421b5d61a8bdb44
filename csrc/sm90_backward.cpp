#include "sm90_backward.h"

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "sm90_arguments.h"
#include "tensor_map.h"

namespace loge {

namespace {

sm90::Arguments arguments_of(const BackwardParams& p, const Plan& plan, int device) {
    using sm90::kBlockM, sm90::kStep, sm90::kWarpgroupRows;
    const int rank_tile = sm90::rank_tile(p.dx != nullptr ? p.R : 0), adapter_tile = sm90::adapter_tile(p.P);
    const auto map = [&p, device](const void* base, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                                  int box_rows, int box_columns) {
        // One row has no stride of its own, and TMA wants one.
        return tensor_map({base, rows, columns, rows == 1 ? columns : stride, box_rows, box_columns, p.dtype, device});
    };
    const bool need_dx = p.dx != nullptr, need_dA = p.dA != nullptr, need_dB = p.dB != nullptr;
    const int rows = plan.rows;  // each loads its part of the factors' boxes
    sm90::Arguments a{};
    a.dy = map(p.dy, p.M, p.N, p.dy_stride, kBlockM, kStep);
    if (need_dx) {
        a.left = map(p.left, p.N, p.R, p.R, kStep / rows, kStep);
        a.right = map(p.right, p.R, p.K, p.K, rank_tile / rows, kStep);
        a.dx = map(p.dx, p.M, p.K, p.K, kWarpgroupRows, kStep);
    }
    if (p.P > 0) {
        if (need_dx) a.lora_A = map(p.lora_A, p.P, p.K, p.K, adapter_tile / rows, kStep);
        if (need_dx || need_dA) a.lora_B = map(p.lora_B, p.N, p.P, p.P, kStep / rows, adapter_tile);
        if (need_dA) a.x = map(p.x, p.M, p.K, p.x_stride, kBlockM, kStep);
        if (need_dB) a.xa = map(p.xa, p.M, p.P, p.P, kBlockM, adapter_tile);
    }
    a.dA = p.dA;
    a.dB = p.dB;
    a.dA_rounded = p.dA_rounded;
    a.dB_rounded = p.dB_rounded;
    a.finished = p.finished;
    a.slab_stride = p.slab_stride;
    a.slabs = static_cast<std::int32_t>(plan.slabs);
    a.N = static_cast<std::int32_t>(p.N);
    a.K = static_cast<std::int32_t>(p.K);
    a.P = p.P;
    a.clusters = static_cast<std::int32_t>(plan.grid / plan.cluster);
    a.rows = rows;
    while (rows << a.log_splits < plan.cluster)
        ++a.log_splits;
    a.scaling = p.scaling;
    a.need_dA = need_dA;
    a.need_dB = need_dB;
    a.deterministic = p.deterministic;
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

sm90::Compiled kernel_of(const BackwardParams& p) {
    const int rank_tile = sm90::rank_tile(p.dx != nullptr ? p.R : 0), adapter_tile = sm90::adapter_tile(p.P);
    return p.dtype == DType::kFloat16 ? select_rank<DType::kFloat16>(rank_tile, adapter_tile)
                                      : select_rank<DType::kBFloat16>(rank_tile, adapter_tile);
}

// Asked once for each kernel and device. A device that is reset under a process forgets its kernels' attributes, and
// everything that torch has on it as well.
sm90::Residency prepared(const BackwardParams& p, int device) {
    static std::map<std::pair<sm90::Residency (*)(), int>, sm90::Residency> known;
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto prepare = kernel_of(p).prepare;
    const auto found = known.find({prepare, device});
    return found != known.end() ? found->second : known[{prepare, device}] = prepare();
}

}  // namespace

Plan sm90_prepare(const BackwardParams& problem, int device) {
    return sm90_plan(problem, prepared(problem, device));
}

void sm90_backward(const BackwardParams& problem, const Plan& plan, int device, void* stream) {
    const std::string reason = sm90_why_not(problem);
    if (!reason.empty()) throw std::invalid_argument("sm90: " + reason);
    if (problem.M > 0) kernel_of(problem).launch(arguments_of(problem, plan, device), plan, stream);
}

}  // namespace loge
