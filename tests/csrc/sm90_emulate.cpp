// The Hopper kernel's clusters, one after the other, on the host, from sm90_backward on; see problem_io.h. Built among
// copies of csrc/ in which tests/csrc/sm90_ptx.cuh has taken the place of the instructions. Last line of stderr: what
// was counted.
//
// schedule: the bits of Schedule.
#include <string>
#include <type_traits>

#include "problem_io.h"
#include "sm90_arguments.h"
#include "sm90_backward.h"
#include "sm90_kernel.cuh"
#include "tensor_map.h"

namespace {

emulator::Schedule schedule;
emulator::Counters total;

// The compiled tiles, to bound the compiler's time: every path of the kernel, every swizzle, both types.
template <loge::DType kType, int kRank, int kAdapter>
constexpr bool kCompiled =
    kType == loge::DType::kFloat16
        ? (kRank == 0 && kAdapter == 16) || (kRank == 64 && kAdapter == 16) || (kRank == 128 && kAdapter == 0)
        : (kRank == 0 && kAdapter == 64) || (kRank == 256 && kAdapter == 64);

}  // namespace

namespace loge {

CUtensorMap encode_tensor_map(const Matrix& m) {
    // What the driver checks.
    if (reinterpret_cast<std::uintptr_t>(m.base) % 16 != 0) emulator::fail("a matrix off its 16-byte boundary");
    if (m.row_stride % 8 != 0 || m.row_stride < m.columns) emulator::fail("a bad row stride", m.row_stride, m.columns);
    if (m.box_rows > 256 || (m.box_columns != 64 && m.box_columns != 16))
        emulator::fail("a bad box", m.box_rows, m.box_columns);
    CUtensorMap map{};
    const emulator::TensorMap made{
        static_cast<const char*>(m.base), m.rows, m.columns, m.row_stride, m.box_rows, m.box_columns};
    static_assert(sizeof(made) <= sizeof(map) && alignof(emulator::TensorMap) <= alignof(CUtensorMap));
    std::memcpy(&map, &made, sizeof(made));
    return map;
}

namespace sm90 {

template <DType kType, int kRank, int kAdapter>
void launch(const Arguments& arguments, const Plan& plan, void*) {
    if constexpr (kCompiled<kType, kRank, kAdapter>) {
        using Element = std::conditional_t<kType == DType::kFloat16, cute::half_t, cute::bfloat16_t>;
        for (int i = 0; i < plan.grid; i += plan.cluster) {
            // Clusters may come in any order: the last one first, where its threads do.
            const int first = schedule.last_first ? static_cast<int>(plan.grid) - plan.cluster - i : i;
            emulator::Cluster cluster(plan.cluster, plan.shared_bytes, schedule);
            emulator::cluster = &cluster;
            emulator::first_block = first;
            cluster.run(
                [&](int, char* shared) { run_block<Element, Layouts<Element, kRank, kAdapter>>(arguments, shared); });
            total.loads += cluster.counters.loads;
            total.stores += cluster.counters.stores;
            total.products += cluster.counters.products;
            total.reductions += cluster.counters.reductions;
            total.conflicts += cluster.counters.conflicts;
            total.pushes += cluster.counters.pushes;
        }
    } else {
        emulator::fail("tiles that are not compiled here", kRank, kAdapter);
    }
}

template <DType kType, int kRank, int kAdapter>
Compiled compiled() {
    return {[] { return expected_residency(132); }, launch<kType, kRank, kAdapter>};
}

#define LOGE_INSTANTIATE(kRank, kAdapter)                           \
    template Compiled compiled<DType::kFloat16, kRank, kAdapter>(); \
    template Compiled compiled<DType::kBFloat16, kRank, kAdapter>();
LOGE_INSTANTIATE(0, 16)
LOGE_INSTANTIATE(0, 64)
LOGE_INSTANTIATE(64, 0)
LOGE_INSTANTIATE(64, 16)
LOGE_INSTANTIATE(64, 64)
LOGE_INSTANTIATE(128, 0)
LOGE_INSTANTIATE(128, 16)
LOGE_INSTANTIATE(128, 64)
LOGE_INSTANTIATE(256, 0)
LOGE_INSTANTIATE(256, 16)
LOGE_INSTANTIATE(256, 64)

}  // namespace sm90

}  // namespace loge

int main(int argc, char** argv) {
    emulator::compute(argc, argv, loge::sm90::kBlockM, [](const loge::BackwardParams& p, emulator::Options options) {
        const int bits = options.schedule;
        schedule = {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0, (bits & 16) != 0};
        loge::Plan plan = loge::sm90_prepare(p, 0);
        if (options.rows != 0) loge::sm90_cut(plan, {options.rows, __builtin_ctz(options.splits)});
        loge::sm90_backward(p, plan, 0, nullptr);
        std::fprintf(stderr, "loads=%lld stores=%lld products=%lld reductions=%lld conflicts=%lld pushes=%lld\n",
                     total.loads, total.stores, total.products, total.reductions, total.conflicts, total.pushes);
    });
    return 0;
}
