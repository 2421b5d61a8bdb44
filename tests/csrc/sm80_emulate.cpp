// The Ampere kernels' blocks, one after the other, on the host; see problem_io.h. Last line of stderr: the instructions
// counted. `cluster` is 1 x the number of multiprocessors. Bits of `schedule`: 1: cp.async lands late, and the blocks
// run from the last to the first; 2: as if L2 had no room for parts of dB, so that slabs are twice as high where they
// can.
#include <string>

#include "problem_io.h"
#include "sm80_expand.h"
#include "sm80_machine.h"
#include "sm80_plan.h"
#include "sm80_project.h"

namespace {

emulator::Counters total;

// `run(machine, block)` of every block and thread.
template <class Run>
void launch(const loge::Plan& plan, long long grid, int shared_bytes, bool late, Run run) {
    for (long long i = 0; i < grid; ++i) {
        const int index = static_cast<int>(late ? grid - 1 - i : i);
        emulator::Block block(plan.threads, shared_bytes,
                              late ? emulator::Schedule::kLate : emulator::Schedule::kEager);
        block.run([&](emulator::Machine& machine) { run(machine, index); });
        total.ldmatrix += block.counters.ldmatrix;
        total.conflicts += block.counters.conflicts;
        total.mma += block.counters.mma;
        total.parts += block.counters.parts;
    }
}

template <loge::DType kType>
void backward(const loge::BackwardParams& p, const loge::Plan& plan, bool late) {
    using emulator::Machine;
    using namespace loge::sm80;
    const Arguments a = arguments_in(p, plan);
    with_project(plan.block_m, plan.block_r, adapter_tile(p.P), [&](auto rows, auto columns, auto adapter) {
        launch(plan, plan.grid, plan.shared_bytes, late, [&](Machine& machine, int block) {
            Project<kType, rows(), columns(), adapter(), Machine>(a, block, machine).run();
        });
    });
    with_expand(plan.block_k, adapter_tile(p.P), [&](auto width, auto adapter) {
        launch(plan, plan.second.grid, plan.second.shared_bytes, late, [&](Machine& machine, int block) {
            Expand<kType, width(), adapter(), Machine>(a, block, machine).run();
        });
    });
}

}  // namespace

int main(int argc, char** argv) {
    emulator::compute(argc, argv, 0, [](loge::BackwardParams p, emulator::Options options) {
        const std::string reason = loge::sm80_why_not(p);
        if (!reason.empty()) emulator::fail(reason.c_str());
        const bool late = (options.schedule & 1) != 0, high = (options.schedule & 2) != 0;
        const loge::Plan plan =
            loge::sm80_plan(p, options.splits, loge::sm80::kSharedBytes, high ? 0 : loge::sm80::kPartsInL2);
        const emulator::Buffer scratch(4 * plan.scratch, 0xff), counters((plan.grid + plan.second.grid + 3) / 4 * 16);
        p.scratch = scratch.data, p.finished = static_cast<unsigned*>(counters.data);
        if (p.dtype == loge::DType::kFloat16)
            backward<loge::DType::kFloat16>(p, plan, late);
        else
            backward<loge::DType::kBFloat16>(p, plan, late);
    });
    std::fprintf(stderr, "ldmatrix=%lld conflicts=%lld mma=%lld parts=%lld\n", total.ldmatrix, total.conflicts,
                 total.mma, total.parts);
    return 0;
}
