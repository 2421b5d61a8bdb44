// The Hopper kernel's clusters, one after the other, on the host, from sm90_backward on; see problem_io.h. Built among
// copies of csrc/ in which tests/csrc/sm90_ptx.cuh has taken the place of the instructions. stderr ends with what was
// counted: a line for each phase, and one for all.
//
// schedule: the bits of Schedule.
#include <string>
#include <type_traits>

#include "problem_io.h"
#include "sm90_arguments.h"
#include "sm90_backward.h"
#include "sm90_expand.cuh"
#include "sm90_kernel.cuh"
#include "tensor_map.h"

namespace {

emulator::Schedule schedule;
emulator::Counters total;
emulator::Traffic traffic[emulator::kPhases];

// The compiled tiles, to bound the compiler's time: every path of the kernels, every swizzle, both types. 512: of two
// launches.
template <loge::DType kType, int kRank, int kAdapter>
constexpr bool kCompiled =
    kType == loge::DType::kFloat16
        ? (kRank == 0 && kAdapter == 16) || (kRank == 64 && kAdapter == 16) || (kRank == 128 && kAdapter == 0) ||
              (kRank == 512 && kAdapter == 16)
        : (kRank == 0 && kAdapter == 64) || (kRank == 256 && kAdapter == 64) || (kRank == 512 && kAdapter != 16);

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

// `run(shared)` as every thread of every block.
template <class Run>
void run_grid(int cluster_size, std::int64_t grid, int shared_bytes, Run run) {
    for (int i = 0; i < grid; i += cluster_size) {
        // Clusters may come in any order: the last one first, where its threads do.
        const int first = schedule.last_first ? static_cast<int>(grid) - cluster_size - i : i;
        emulator::Cluster cluster(cluster_size, shared_bytes, schedule);
        emulator::cluster = &cluster;
        emulator::first_block = first;
        cluster.run([&](int, char* shared) { run(shared); });
        total += cluster.counters;
        for (int phase = 0; phase < emulator::kPhases; ++phase)
            traffic[phase].add_blocks(cluster.traffic(phase));
    }
}

template <DType kType>
using ElementOf = std::conditional_t<kType == DType::kFloat16, cute::half_t, cute::bfloat16_t>;

template <DType kType, int kRank, int kAdapter, bool kProject>
void launch(const Arguments& arguments, const Plan& plan, void*) {
    if constexpr (kCompiled < kType, kProject ? 2 * kRank : kRank, kAdapter >) {
        run_grid(plan.cluster, plan.grid, plan.shared_bytes, [&arguments](char* shared) {
            run_block<Layouts<ElementOf<kType>, kRank, kAdapter, kProject>>(arguments, shared);
        });
    } else {
        emulator::fail("tiles that are not compiled here", kRank, kAdapter);
    }
}

template <DType kType, int kAdapter>
void launch_expand(const ExpandArguments& arguments, const Plan& plan, void*) {
    if constexpr (kCompiled<kType, 2 * kTileColumns, kAdapter>) {
        run_grid(plan.rows, plan.second.grid, plan.second.shared_bytes,
                 [&arguments](char* shared) { Expand<ElementOf<kType>, kAdapter>(arguments, shared).run(); });
    } else {
        emulator::fail("tiles that are not compiled here", 2 * kTileColumns, kAdapter);
    }
}

Residency residency() {
    return expected_residency(132);
}
template <DType kType, int kRank, int kAdapter>
Compiled compiled() {
    return {residency, launch<kType, kRank, kAdapter, false>};
}
template <DType kType, int kAdapter>
Compiled compiled_project() {
    return {residency, launch<kType, kTileColumns, kAdapter, true>};
}
template <DType kType, int kAdapter>
CompiledExpand compiled_expand() {
    return {residency, launch_expand<kType, kAdapter>};
}

LOGE_SM90_KERNELS(LOGE_SM90_KERNEL, DType::kFloat16)
LOGE_SM90_KERNELS(LOGE_SM90_KERNEL, DType::kBFloat16)
LOGE_SM90_TWO_LAUNCHES(LOGE_SM90_TWO_KERNELS, DType::kFloat16)
LOGE_SM90_TWO_LAUNCHES(LOGE_SM90_TWO_KERNELS, DType::kBFloat16)

}  // namespace sm90

}  // namespace loge

int main(int argc, char** argv) {
    emulator::compute(argc, argv, loge::sm90::kBlockM, [](const loge::BackwardParams& p, emulator::Options options) {
        const int bits = options.schedule;
        schedule = {(bits & 1) != 0, (bits & 2) != 0,  (bits & 4) != 0,
                    (bits & 8) != 0, (bits & 16) != 0, (bits & 32) != 0};
        loge::Plan plan = loge::sm90_prepare(p, 0);
        if (options.rows != 0) loge::sm90_cut(p, plan, {options.rows, loge::sm90::log_of(options.splits)});
        // Two blocks or pairs of them, so that each has tiles to take in turn.
        if (loge::sm90::takes_two_launches(p)) loge::sm90_cut_second(p, plan, 2);
        emulator::Buffer scratch(4 * plan.scratch, 0xff);
        loge::BackwardParams with_scratch = p;
        with_scratch.scratch = scratch.data;
        loge::sm90_backward(with_scratch, plan, 0, nullptr);
        for (const emulator::Traffic& t : traffic)
            std::fprintf(stderr,
                         "loaded=%lld stored=%lld added=%lld pushed=%lld shared=%lld n16=%lld n64=%lld n128=%lld "
                         "n256=%lld waits=%lld\n",
                         t.loaded, t.stored, t.added, t.pushed, t.shared, t.products[0], t.products[1], t.products[2],
                         t.products[3], t.waits);
        std::fprintf(stderr, "loads=%lld stores=%lld products=%lld reductions=%lld conflicts=%lld pushes=%lld\n",
                     total.loads, total.stores, total.products, total.reductions, total.conflicts, total.pushes);
    });
    return 0;
}
