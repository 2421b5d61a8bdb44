// float16 and bfloat16 as the GPU rounds them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "params.h"

namespace emulator {

template <loge::DType kType>
float widen(std::uint16_t bits) {
    if constexpr (kType == loge::DType::kBFloat16) {
        const std::uint32_t word = std::uint32_t{bits} << 16;
        float value;
        std::memcpy(&value, &word, 4);
        return value;
    } else {
        _Float16 value;
        std::memcpy(&value, &bits, 2);
        return static_cast<float>(value);
    }
}

template <loge::DType kType>
std::uint16_t narrow(float value) {
    if constexpr (kType == loge::DType::kBFloat16) {
        std::uint32_t word;
        std::memcpy(&word, &value, 4);
        if (std::isnan(value)) return 0x7fff;
        return static_cast<std::uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
    } else {
        const _Float16 half = static_cast<_Float16>(value);
        std::uint16_t bits;
        std::memcpy(&bits, &half, 2);
        return bits;
    }
}

}  // namespace emulator
