// One backward problem of an emulator: operands from stdin, gradients to stdout, raw.
//
//   PROGRAM M N K R P dy_stride x_stride dtype deterministic need_dx need_dA need_dB scaling schedule cluster rounded
//
// cluster: slabs x splits, as 2x4, or 0x0 for the plan's own.
// In: dy, x, xa, left, right, lora_A, lora_B, the empty ones left out (x without dA, xa without dB). Out: dx, and dA
// and dB in fp32 or, with rounded, in dtype.
// Buffers are exactly as long as the operands, so that a sanitizer sees every access beyond one.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fibers.h"
#include "params.h"

namespace emulator {

struct Buffer {
    explicit Buffer(std::size_t bytes, int fill = 0)
        : size(bytes), data(bytes ? std::aligned_alloc(16, bytes) : nullptr) {
        if (data) std::memset(data, fill, bytes);
    }
    ~Buffer() { std::free(data); }
    Buffer(const Buffer&) = delete;
    std::size_t size;  // a multiple of the alignment, as every operand's rows are
    void* data;
};

struct Options {
    int schedule;
    int rows, splits;
};

// `run(problem, options)` computes the problem of the command line, whose slabs have `block_m` rows; 0: whose sums are
// never the caller's to add up, and start as anything.
template <class Run>
void compute(int argc, char** argv, int block_m, Run run) {
    if (argc != 17) fail("16 arguments are needed", argc - 1);
    const auto number = [argv](int i) { return std::atoll(argv[i + 1]); };
    loge::BackwardParams p{};
    p.M = number(0), p.N = number(1), p.K = number(2);
    p.R = static_cast<int>(number(3)), p.P = static_cast<int>(number(4));
    p.dy_stride = number(5), p.x_stride = number(6);
    p.dtype = static_cast<loge::DType>(number(7));
    p.deterministic = number(8) != 0;
    const bool need_dx = number(9) != 0, need_dA = number(10) != 0, need_dB = number(11) != 0;
    p.scaling = static_cast<float>(std::atof(argv[13]));

    const auto strided = [&p](long long columns, long long stride) { return 2 * ((p.M - 1) * stride + columns); };
    const long long slabs = p.deterministic && block_m > 0 ? (p.M + block_m - 1) / block_m : 1;
    Buffer dy(strided(p.N, p.dy_stride)), x(need_dA ? strided(p.K, p.x_stride) : 0), xa(need_dB ? 2 * p.M * p.P : 0);
    Buffer left(need_dx ? 2 * p.N * p.R : 0), right(need_dx ? 2 * p.R * p.K : 0);
    Buffer lora_A(need_dx ? 2 * p.P * p.K : 0), lora_B(need_dx || need_dA ? 2 * p.N * p.P : 0);
    // Everything is NaN until it is written. A set of sums for each slab lies as in a workspace, dA and then dB.
    const int poison = 0xff;
    const bool rounded = number(15) != 0;
    const long long dA_size = need_dA ? p.P * p.K : 0, dB_size = need_dB ? p.N * p.P : 0;
    Buffer dx(need_dx ? 2 * p.M * p.K : 0, poison), dA(rounded ? 2 * dA_size : 0, poison);
    Buffer dB(rounded ? 2 * dB_size : 0, poison), finished(32, poison);
    Buffer sums(4 * slabs * (dA_size + dB_size), poison);
    p.slab_stride = p.deterministic ? dA_size + dB_size : 0;
    for (Buffer* operand : {&dy, &x, &xa, &left, &right, &lora_A, &lora_B})
        if (operand->size != 0 && std::fread(operand->data, 1, operand->size, stdin) != operand->size)
            fail("stdin is short");
    p.dy = dy.data, p.x = x.data, p.xa = xa.data, p.left = left.data, p.right = right.data;
    p.lora_A = lora_A.data, p.lora_B = lora_B.data, p.dx = dx.data;
    float* const workspace = static_cast<float*>(sums.data);
    if (need_dA) p.dA = workspace;
    if (need_dB) p.dB = workspace + dA_size;
    p.dA_rounded = dA.data, p.dB_rounded = dB.data;
    if (rounded) p.finished = static_cast<unsigned*>(finished.data);
    // What zero_sums() asks of the device.
    if (!p.deterministic && block_m > 0 && sums.size != 0) std::memset(sums.data, 0, sums.size);
    std::memset(finished.data, 0, finished.size);

    Options options{static_cast<int>(number(13)), 0, 0};
    if (std::sscanf(argv[15], "%dx%d", &options.rows, &options.splits) != 2) fail("no cluster as 2x4");
    run(p, options);
    for (const Buffer* gradient : {&dx, rounded ? &dA : &sums, &dB})
        if (gradient->size != 0) std::fwrite(gradient->data, 1, gradient->size, stdout);
}

}  // namespace emulator
