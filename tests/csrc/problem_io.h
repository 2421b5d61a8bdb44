// One backward problem of an emulator: operands from stdin, gradients to stdout, raw.
//
//   PROGRAM M N K R P dy_stride x_stride dtype deterministic need_dx need_dA need_dB scaling schedule cluster
//
// In: dy, x, xa, left, right, lora_A, lora_B, the empty ones left out (x without dA, xa without dB). Out: dx, dA, dB.
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
    int cluster;
};

// `run(problem, options)` computes the problem of the command line, whose slabs have `block_m` rows.
template <class Run>
void compute(int argc, char** argv, int block_m, Run run) {
    if (argc != 16) fail("15 arguments are needed", argc - 1);
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
    const long long slabs = p.deterministic ? (p.M + block_m - 1) / block_m : 1;
    Buffer dy(strided(p.N, p.dy_stride)), x(need_dA ? strided(p.K, p.x_stride) : 0), xa(need_dB ? 2 * p.M * p.P : 0);
    Buffer left(need_dx ? 2 * p.N * p.R : 0), right(need_dx ? 2 * p.R * p.K : 0);
    Buffer lora_A(need_dx ? 2 * p.P * p.K : 0), lora_B(need_dx || need_dA ? 2 * p.N * p.P : 0);
    // Atomics add to zeros; everything else is NaN until it is written.
    const int poison = 0xff, sums = p.deterministic ? poison : 0;
    Buffer dx(need_dx ? 2 * p.M * p.K : 0, poison), dA(need_dA ? 4 * slabs * p.P * p.K : 0, sums);
    Buffer dB(need_dB ? 4 * slabs * p.N * p.P : 0, sums);
    for (Buffer* operand : {&dy, &x, &xa, &left, &right, &lora_A, &lora_B})
        if (operand->size != 0 && std::fread(operand->data, 1, operand->size, stdin) != operand->size)
            fail("stdin is short");
    p.dy = dy.data, p.x = x.data, p.xa = xa.data, p.left = left.data, p.right = right.data;
    p.lora_A = lora_A.data, p.lora_B = lora_B.data, p.dx = dx.data;
    p.dA = static_cast<float*>(dA.data), p.dB = static_cast<float*>(dB.data);

    run(p, Options{static_cast<int>(number(13)), static_cast<int>(number(14))});
    for (const Buffer* gradient : {&dx, &dA, &dB})
        if (gradient->size != 0) std::fwrite(gradient->data, 1, gradient->size, stdout);
}

}  // namespace emulator
