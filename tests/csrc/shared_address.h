// Included before CuTe: the shared-memory address of a host pointer into a window of 256 KiB, aligned to its size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>

inline std::size_t __cvta_generic_to_shared(const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) & 0x3ffff;
}
