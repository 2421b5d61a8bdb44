// What every kernel asks of a problem: sizes, strides, alignment. Host arithmetic alone.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "params.h"

namespace loge {

// Of M, N and K: the coordinates of tiles are int32.
inline constexpr std::int64_t kMaxSize = (std::int64_t{1} << 31) - 256;

// Why no kernel of this module can take `p`, or "". The device's compute capability is the caller's to check.
inline std::string problem_why_not(const BackwardParams& p) {
    const auto text = [](const char* name, std::int64_t value) {
        return std::string(name) + " = " + std::to_string(value);
    };
    const bool need_dx = p.dx != nullptr, need_dA = p.dA != nullptr, need_dB = p.dB != nullptr;
    if (!need_dx && !need_dA && !need_dB) return "no gradient is asked for";
    if (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16)
        return text("dtype", static_cast<std::int64_t>(p.dtype)) + " is neither 0 (float16) nor 1 (bfloat16)";
    for (const auto& [name, size] : {std::pair{"M", p.M}, {"N", p.N}, {"K", p.K}})
        if (size < 0 || size > kMaxSize) return text(name, size) + " is not in 0 .. 2^31 - 256";
    if (p.N == 0 || p.K == 0) return text("N", p.N) + ", " + text("K", p.K) + ": neither may be 0";
    if (p.N % 8 != 0) return text("N", p.N) + " is not a multiple of 8 (rows on 16-byte boundaries)";
    if (p.K % 8 != 0) return text("K", p.K) + " is not a multiple of 8 (rows on 16-byte boundaries)";
    if (p.P < 0 || p.P > kMaxAdapter || p.P % 8 != 0) return text("P", p.P) + " is not a multiple of 8 in 0 .. 64";
    if (need_dx && (p.R < 8 || p.R > kMaxRank || p.R % 8 != 0))
        return text("R", p.R) + " is not a multiple of 8 in 8 .. " + std::to_string(kMaxRank);
    if ((need_dA || need_dB) && p.P == 0) return "dA and dB need an adapter (P = 0)";
    // One row has no stride; with more, rows may not overlap.
    const auto bad_stride = [&p](std::int64_t stride, std::int64_t width) {
        return p.M > 1 && (stride % 8 != 0 || stride < width || stride >= (std::int64_t{1} << 38));
    };
    if (bad_stride(p.dy_stride, p.N))
        return text("dy_stride", p.dy_stride) + " is not a multiple of 8 that is at least " + text("N", p.N);
    if (need_dA && bad_stride(p.x_stride, p.K))
        return text("x_stride", p.x_stride) + " is not a multiple of 8 that is at least " + text("K", p.K);

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
        {"workspace", p.dA, need_dA},
        {"workspace", p.dB, need_dB},
        {"scratch", p.scratch, p.scratch != nullptr},
        {"dA", p.dA_rounded, p.dA_rounded != nullptr},
        {"dB", p.dB_rounded, p.dB_rounded != nullptr},
    };
    for (const auto& operand : operands) {
        if (!operand.needed || p.M == 0) continue;
        if (operand.pointer == nullptr) return std::string(operand.name) + " is missing";
        const auto address = reinterpret_cast<std::uintptr_t>(operand.pointer);
        if (address % kAlignmentBytes != 0)
            return std::string(operand.name) + " starts " + std::to_string(address % kAlignmentBytes) +
                   " bytes past a 16-byte boundary";
    }
    return "";
}

}  // namespace loge
