// Descriptions of 2-D operands for TMA, encoded by the driver that is there at run time: libcuda is never linked.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "params.h"

namespace loge {

// A matrix [rows, columns] of 16-bit values, unit stride along its columns and `row_stride` elements between its rows,
// moved in boxes [box_rows, box_columns] of which what lies outside reads as zero and is not written. `box_columns` is
// a swizzle's width: 64 (128 bytes) or 16 (32 bytes).
struct Matrix {
    const void* base;
    std::int64_t rows, columns, row_stride;
    std::int32_t box_rows, box_columns;
    DType dtype;
    std::int32_t device;
};

// The driver's map of `matrix`. Throws CudaError where there is no driver, or where the driver refuses the map.
CUtensorMap encode_tensor_map(const Matrix& matrix);

// The same, encoded once for each matrix. A map holds an address, sizes and strides and nothing of what lies there, and
// those are its key: it stays right where memory is freed and given to another matrix of the same key, and never is
// looked up for one of another key. Factors keep their addresses for good, and what an allocator hands out in every
// step mostly comes back at the same ones.
CUtensorMap tensor_map(const Matrix& matrix);

}  // namespace loge
