// Which of the compiled Ampere kernels serves a problem.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "params.h"
#include "sm80_arguments.h"

namespace loge::sm80 {

// All on the current device: `prepare_` loads the kernel and gives it its shared memory, once before the first launch.
// They throw CudaError.
template <DType kType, int kRows, int kColumns, int kAdapter>
void prepare_project(const Plan& plan);
template <DType kType, int kRows, int kColumns, int kAdapter>
void launch_project(const Arguments& arguments, const Plan& plan, void* stream);
template <DType kType, int kWidth, int kAdapter>
void prepare_expand(const Plan& plan);
template <DType kType, int kWidth, int kAdapter>
void launch_expand(const Arguments& arguments, const Plan& plan, void* stream);

// Rows and columns of T (0: without dX) by tiles of P (0: without an adapter), and columns of dX by tiles of P.
#define LOGE_SM80_PROJECT_0(X) X(128, 0, 16) X(128, 0, 64) X(256, 0, 16)
#define LOGE_SM80_PROJECT_64(X) X(128, 64, 0) X(128, 64, 16) X(128, 64, 64) X(256, 64, 16)
#define LOGE_SM80_PROJECT_128(X) X(128, 128, 0) X(128, 128, 16) X(128, 128, 64) X(256, 128, 16)
#define LOGE_SM80_PROJECT_256(X) X(128, 256, 0) X(128, 256, 16) X(128, 256, 64)
#define LOGE_SM80_PROJECT(X) \
    LOGE_SM80_PROJECT_0(X) LOGE_SM80_PROJECT_64(X) LOGE_SM80_PROJECT_128(X) LOGE_SM80_PROJECT_256(X)
#define LOGE_SM80_EXPAND(X) X(64, 0) X(64, 16) X(64, 64) X(128, 0) X(128, 16) X(128, 64)

constexpr int adapter_tile(std::int64_t P) {
    return P == 0 ? 0 : P <= 16 ? 16 : 64;
}

// Calls `use` with the tiles of the compiled kernel for them, as integral constants.
template <class Use>
auto with_project(int rows, int columns, int adapter, Use use) {
#define LOGE_SM80_TRY(kRows, kColumns, kAdapter)                                                  \
    if (rows == kRows && columns == kColumns && adapter == kAdapter)                              \
        return use(std::integral_constant<int, kRows>{}, std::integral_constant<int, kColumns>{}, \
                   std::integral_constant<int, kAdapter>{});
    LOGE_SM80_PROJECT(LOGE_SM80_TRY)
#undef LOGE_SM80_TRY
    throw std::logic_error("sm80: no such tiles of T");
}
template <class Use>
auto with_expand(int width, int adapter, Use use) {
#define LOGE_SM80_TRY(kWidth, kAdapter)         \
    if (width == kWidth && adapter == kAdapter) \
        return use(std::integral_constant<int, kWidth>{}, std::integral_constant<int, kAdapter>{});
    LOGE_SM80_EXPAND(LOGE_SM80_TRY)
#undef LOGE_SM80_TRY
    throw std::logic_error("sm80: no such tiles of dX");
}

}  // namespace loge::sm80
