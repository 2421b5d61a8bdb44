// The Ampere kernel's blocks, one after the other, on the host: operands from stdin, gradients to stdout, raw.
//
//   sm80_emulate M N K R P dy_stride x_stride dtype deterministic need_dx need_dA need_dB scaling late
//
// In: dy, x, xa, left, right, lora_A, lora_B, the empty ones left out (x without dA, xa without dB). Out: dx, dA, dB.
// Buffers are exactly as long as the operands, so that a sanitizer sees every access beyond one. Last line of stderr:
// the instructions counted.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "emulator.h"
#include "sm80_block.h"
#include "sm80_plan.h"

namespace {

struct Buffer {
    explicit Buffer(std::size_t bytes, int fill = 0)
        : size(bytes), data(bytes ? std::aligned_alloc(16, bytes) : nullptr) {
        if (data) std::memset(data, fill, bytes);
    }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    std::size_t size;
    void* data;
};

// aligned_alloc wants a multiple of the alignment; every operand's rows are.
void read(Buffer& buffer) {
    if (buffer.size != 0 && std::fread(buffer.data, 1, buffer.size, stdin) != buffer.size)
        emulator::fail("stdin is short");
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 15) emulator::fail("14 arguments are needed", argc - 1);
    std::vector<long long> a;
    for (int i = 1; i < argc; ++i)
        a.push_back(std::atoll(argv[i]));
    loge::BackwardParams p{};
    p.M = a[0], p.N = a[1], p.K = a[2], p.R = static_cast<int>(a[3]), p.P = static_cast<int>(a[4]);
    p.dy_stride = a[5], p.x_stride = a[6];
    p.dtype = static_cast<loge::DType>(a[7]);
    p.deterministic = a[8] != 0;
    const bool need_dx = a[9] != 0, need_dA = a[10] != 0, need_dB = a[11] != 0;
    p.scaling = static_cast<float>(std::atof(argv[13]));
    const auto schedule = a[13] != 0 ? emulator::Schedule::kLate : emulator::Schedule::kEager;

    const auto strided = [&p](long long columns, long long stride) { return 2 * ((p.M - 1) * stride + columns); };
    const long long slabs = p.deterministic ? (p.M + loge::sm80::kBlockM - 1) / loge::sm80::kBlockM : 1;
    Buffer dy(strided(p.N, p.dy_stride)), x(need_dA ? strided(p.K, p.x_stride) : 0), xa(need_dB ? 2 * p.M * p.P : 0);
    Buffer left(need_dx ? 2 * p.N * p.R : 0), right(need_dx ? 2 * p.R * p.K : 0);
    Buffer lora_A(need_dx ? 2 * p.P * p.K : 0), lora_B(need_dx || need_dA ? 2 * p.N * p.P : 0);
    const int poison = p.deterministic ? 0xff : 0;
    Buffer dx(need_dx ? 2 * p.M * p.K : 0, 0xff), dA(need_dA ? 4 * slabs * p.P * p.K : 0, poison);
    Buffer dB(need_dB ? 4 * slabs * p.N * p.P : 0, poison);
    for (Buffer* operand : {&dy, &x, &xa, &left, &right, &lora_A, &lora_B})
        read(*operand);
    p.dy = dy.data, p.x = x.data, p.xa = xa.data, p.left = left.data, p.right = right.data;
    p.lora_A = lora_A.data, p.lora_B = lora_B.data, p.dx = dx.data;
    p.dA = static_cast<float*>(dA.data), p.dB = static_cast<float*>(dB.data);

    const std::string reason = loge::sm80_why_not(p);
    if (!reason.empty()) emulator::fail(reason.c_str());
    const loge::Plan plan = loge::sm80_plan(p);
    emulator::Counters total;
    loge::sm80::with_tiles(p, [&](auto rank, auto adapter) {
        for (long long slab = 0; slab < plan.grid; ++slab) {
            emulator::Block block(plan.threads, plan.shared_bytes, schedule);
            block.run([&](emulator::Machine& machine) {
                using loge::DType;
                if (p.dtype == DType::kFloat16)
                    loge::sm80::Block<DType::kFloat16, rank(), adapter(), emulator::Machine>(p, slab, machine).run();
                else
                    loge::sm80::Block<DType::kBFloat16, rank(), adapter(), emulator::Machine>(p, slab, machine).run();
            });
            total.ldmatrix += block.counters.ldmatrix;
            total.conflicts += block.counters.conflicts;
            total.mma += block.counters.mma;
            total.reductions += block.counters.reductions;
        }
    });
    for (const Buffer* gradient : {&dx, &dA, &dB})
        if (gradient->size != 0) std::fwrite(gradient->data, 1, gradient->size, stdout);
    std::fprintf(stderr, "ldmatrix=%lld conflicts=%lld mma=%lld reductions=%lld\n", total.ldmatrix, total.conflicts,
                 total.mma, total.reductions);
    return 0;
}
