// The Python module loge_kernels._C: raw pointers as integers, sizes, strides and a stream. It knows no torch, and
// needs neither GPU nor driver until a kernel is launched.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_error.h"
#include "params.h"
#include "sm80_backward.h"
#ifdef LOGE_SM90
#include "sm90_backward.h"
#endif

namespace py = pybind11;

namespace {

using loge::BackwardParams;
using loge::Plan;

struct Kernel {
    const char* name;
    std::string (*why_not)(const BackwardParams&);
    Plan (*plan)(const BackwardParams&, int sm_count);
    void (*backward)(const BackwardParams&, const Plan&, int device, void* stream);
};

const std::vector<Kernel>& kernels() {
    static const std::vector<Kernel> all = {
        {"sm80", loge::sm80_why_not, [](const BackwardParams& p, int) { return loge::sm80_plan(p); },
         loge::sm80_backward},
#ifdef LOGE_SM90
        {"sm90", loge::sm90_why_not, loge::sm90_plan, loge::sm90_backward},
#endif
    };
    return all;
}

const Kernel& find(const std::string& name) {
    std::string known;
    for (const Kernel& kernel : kernels()) {
        if (name == kernel.name) return kernel;
        known += std::string(known.empty() ? "" : ", ") + kernel.name;
    }
    throw std::invalid_argument("kernel = '" + name + "' is not in this build, which has " + known);
}

void check(const Kernel& kernel, const BackwardParams& p, int sm_count) {
    const std::string reason = kernel.why_not(p);
    if (!reason.empty()) throw std::invalid_argument(std::string(kernel.name) + ": " + reason);
    if (sm_count < 1) throw std::invalid_argument("sm_count = " + std::to_string(sm_count) + " is not positive");
}

py::dict as_dict(const Plan& plan) {
    py::dict d;
    d["block_m"] = plan.block_m;
    d["block_n"] = plan.block_n;
    d["block_k"] = plan.block_k;
    d["cluster"] = plan.cluster;
    d["stages"] = plan.stages;
    d["shared_bytes"] = plan.shared_bytes;
    d["threads"] = plan.threads;
    d["slabs"] = plan.slabs;
    d["grid"] = plan.grid;
    return d;
}

py::dict plan(const std::string& name, std::int64_t M, std::int64_t N, std::int64_t K, std::int32_t R, std::int32_t P,
              bool need_dx, bool need_dA, bool need_dB, int sm_count) {
    const Kernel& kernel = find(name);
    // Stands for pointers that only their presence matters of.
    alignas(loge::kAlignmentBytes) static float present[4];
    BackwardParams p{};
    p.dy = p.x = p.xa = p.left = p.right = p.lora_A = p.lora_B = present;
    p.dx = need_dx ? present : nullptr;
    p.dA = need_dA ? present : nullptr;
    p.dB = need_dB ? present : nullptr;
    p.M = M, p.N = N, p.K = K, p.R = R, p.P = P;
    p.dy_stride = N, p.x_stride = K;
    check(kernel, p, sm_count);
    return as_dict(kernel.plan(p, sm_count));
}

template <class T = void>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void backward(const std::string& name, std::uintptr_t dy, std::uintptr_t x, std::uintptr_t xa, std::uintptr_t left,
              std::uintptr_t right, std::uintptr_t lora_A, std::uintptr_t lora_B, std::uintptr_t dx, std::uintptr_t dA,
              std::uintptr_t dB, std::int64_t M, std::int64_t N, std::int64_t K, std::int32_t R, std::int32_t P,
              std::int64_t dy_stride, std::int64_t x_stride, float scaling, std::int32_t dtype, bool deterministic,
              int sm_count, int device, std::uintptr_t stream) {
    const Kernel& kernel = find(name);
    BackwardParams p{};
    p.dy = pointer(dy), p.x = pointer(x), p.xa = pointer(xa), p.left = pointer(left), p.right = pointer(right);
    p.lora_A = pointer(lora_A), p.lora_B = pointer(lora_B), p.dx = pointer(dx);
    p.dA = pointer<float>(dA), p.dB = pointer<float>(dB);
    p.M = M, p.N = N, p.K = K, p.R = R, p.P = P;
    p.dy_stride = dy_stride, p.x_stride = x_stride;
    p.scaling = scaling;
    p.dtype = static_cast<loge::DType>(dtype);
    p.deterministic = deterministic;
    check(kernel, p, sm_count);
    kernel.backward(p, kernel.plan(p, sm_count), device, pointer(stream));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "The CUDA C++ kernels of loge_kernels, over raw pointers.";
    py::register_exception<loge::CudaError>(module, "CudaError", PyExc_RuntimeError);
    module.attr("toolkit") = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
    module.attr("archs") = LOGE_CUDA_ARCHS;
    py::list names;
    for (const Kernel& kernel : kernels())
        names.append(kernel.name);
    module.attr("kernels") = py::tuple(names);
    module.attr("FLOAT16") = static_cast<int>(loge::DType::kFloat16);
    module.attr("BFLOAT16") = static_cast<int>(loge::DType::kBFloat16);

    module.def("plan", &plan,
               "How `kernel` cuts a problem: block_m, block_n, block_k, cluster, stages, shared_bytes, threads, slabs, "
               "grid. Host arithmetic: no GPU. ValueError names what the kernel cannot take.",
               py::arg("kernel"), py::kw_only(), py::arg("M"), py::arg("N"), py::arg("K"), py::arg("R"), py::arg("P"),
               py::arg("need_dx") = true, py::arg("need_dA") = true, py::arg("need_dB") = true,
               py::arg("sm_count") = 108);
    module.def("backward", &backward,
               "dX [M, K], and dA [P, K] and dB [N, P] in float32, at the addresses given, 0 where not wanted: one "
               "launch on `stream` of `device`. dA and dB are added to, or when deterministic stored as [slabs, ...]. "
               "ValueError names the argument at fault and its value; CudaError the call that CUDA refused.",
               py::arg("kernel"), py::kw_only(), py::arg("dy"), py::arg("x"), py::arg("xa"), py::arg("left"),
               py::arg("right"), py::arg("lora_A"), py::arg("lora_B"), py::arg("dx"), py::arg("dA"), py::arg("dB"),
               py::arg("M"), py::arg("N"), py::arg("K"), py::arg("R"), py::arg("P"), py::arg("dy_stride"),
               py::arg("x_stride"), py::arg("scaling"), py::arg("dtype"), py::arg("deterministic"), py::arg("sm_count"),
               py::arg("device"), py::arg("stream"));
}
