// The Ampere kernel's blocks, one after the other, on the host; see problem_io.h. Last line of stderr: the instructions
// counted. schedule 1: cp.async lands late, and the blocks run from the last to the first.
#include <string>

#include "problem_io.h"
#include "sm80_block.h"
#include "sm80_machine.h"
#include "sm80_plan.h"

int main(int argc, char** argv) {
    emulator::compute(argc, argv, loge::sm80::kBlockM, [](const loge::BackwardParams& p, emulator::Options options) {
        const auto schedule = options.schedule != 0 ? emulator::Schedule::kLate : emulator::Schedule::kEager;
        const std::string reason = loge::sm80_why_not(p);
        if (!reason.empty()) emulator::fail(reason.c_str());
        const loge::Plan plan = loge::sm80_plan(p);
        emulator::Counters total;
        loge::sm80::with_tiles(p, [&](auto rank, auto adapter) {
            for (long long i = 0; i < plan.grid; ++i) {
                const long long slab = options.schedule != 0 ? plan.grid - 1 - i : i;
                emulator::Block block(plan.threads, plan.shared_bytes, schedule);
                block.run([&](emulator::Machine& machine) {
                    using loge::DType;
                    using emulator::Machine;
                    if (p.dtype == DType::kFloat16)
                        loge::sm80::Block<DType::kFloat16, rank(), adapter(), Machine>(p, slab, machine).run();
                    else
                        loge::sm80::Block<DType::kBFloat16, rank(), adapter(), Machine>(p, slab, machine).run();
                });
                total.ldmatrix += block.counters.ldmatrix;
                total.conflicts += block.counters.conflicts;
                total.mma += block.counters.mma;
                total.reductions += block.counters.reductions;
            }
        });
        std::fprintf(stderr, "ldmatrix=%lld conflicts=%lld mma=%lld reductions=%lld\n", total.ldmatrix, total.conflicts,
                     total.mma, total.reductions);
    });
    return 0;
}
