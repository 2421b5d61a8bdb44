// Descriptions of 2-D operands for TMA, encoded by the driver that is there at run time: libcuda is never linked.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "params.h"

namespace loge {

// The map of a matrix [rows, columns] of 16-bit values, unit stride along its columns and `row_stride` elements between
// its rows, moved in boxes [box_rows, box_columns] of which what lies outside reads as zero and is not written.
// `box_columns` is a swizzle's width: 64 (128 bytes) or 16 (32 bytes).
// Throws CudaError where there is no driver, or where the driver refuses the map.
CUtensorMap encode_tensor_map(DType dtype, const void* base, std::int64_t rows, std::int64_t columns,
                              std::int64_t row_stride, int box_rows, int box_columns);

}  // namespace loge
