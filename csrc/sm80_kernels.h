// Which of the compiled Ampere kernels serves a problem.
#pragma once

#include <cstdint>
#include <type_traits>

#include "params.h"
#include "sm80_arguments.h"

namespace loge::sm80 {

// All on the current device: `prepare_` loads the kernel and gives it its shared memory, once before the first launch.
// They throw CudaError.
template <DType kType, int kColumns, int kAdapter>
void prepare_project(const Plan& plan);
template <DType kType, int kColumns, int kAdapter>
void launch_project(const Arguments& arguments, const Plan& plan, void* stream);
template <DType kType, int kWidth, int kAdapter>
void prepare_expand(const Plan& plan);
template <DType kType, int kWidth, int kAdapter>
void launch_expand(const Arguments& arguments, const Plan& plan, void* stream);

// Columns of T (0: without dX) by tiles of P (0: without an adapter), and columns of dX by tiles of P.
#define LOGE_SM80_PROJECT(X) \
    X(0, 16) X(0, 64) X(64, 0) X(64, 16) X(64, 64) X(128, 0) X(128, 16) X(128, 64) X(256, 0) X(256, 16) X(256, 64)
#define LOGE_SM80_EXPAND(X) X(64, 0) X(64, 16) X(64, 64) X(128, 0) X(128, 16) X(128, 64)

constexpr int adapter_tile(std::int64_t P) {
    return P == 0 ? 0 : P <= 16 ? 16 : 64;
}

// Calls `use(columns, adapter)` with integral constants, those of the kernel that `LIST` has for them.
#define LOGE_SM80_TRY(kFirst, kSecond)        \
    if (first == kFirst && second == kSecond) \
        return use(std::integral_constant<int, kFirst>{}, std::integral_constant<int, kSecond>{});
template <class Use>
auto with_project(int first, int second, Use use) {
    LOGE_SM80_PROJECT(LOGE_SM80_TRY)
    return use(std::integral_constant<int, 0>{}, std::integral_constant<int, 16>{});
}
template <class Use>
auto with_expand(int first, int second, Use use) {
    LOGE_SM80_EXPAND(LOGE_SM80_TRY)
    return use(std::integral_constant<int, 64>{}, std::integral_constant<int, 0>{});
}
#undef LOGE_SM80_TRY

}  // namespace loge::sm80
