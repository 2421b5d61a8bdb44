// The Python module loge_kernels._C: raw pointers as integers, sizes, strides and a stream. It knows no torch, and
// needs neither GPU nor driver until a kernel is launched.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_check.h"
#include "cuda_error.h"
#include "device_guard.h"
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
    int max_rows;                              // slabs that share a cluster
    int (*max_splits)(const BackwardParams&);  // of a slab
    std::string (*why_not)(const BackwardParams&);
    // For a device that cannot be asked, whose blocks may have so many bytes of shared memory; 0: as the kernel's own.
    Plan (*expect)(const BackwardParams&, int sm_count, int shared_bytes);
    Plan (*prepare)(const BackwardParams&, int device);  // on the current device
    void (*backward)(const BackwardParams&, const Plan&, int device, void* stream);
    // Another cluster than the plan's: `rows` slabs by `splits` of N and K.
    void (*cut)(const BackwardParams&, Plan&, int rows, int splits);
};

const std::vector<Kernel>& kernels() {
    static const std::vector<Kernel> all = {
        {"sm80", 1, [](const BackwardParams&) { return 1; }, loge::sm80_why_not,
         [](const BackwardParams& p, int sm_count, int shared_bytes) {
             return loge::sm80_plan(p, sm_count, shared_bytes == 0 ? loge::sm80::kSharedBytes : shared_bytes);
         },
         loge::sm80_prepare, loge::sm80_backward, [](const BackwardParams&, Plan&, int, int) {}},
#ifdef LOGE_SM90
        {"sm90", 2, loge::sm90_max_splits, loge::sm90_why_not,
         [](const BackwardParams& p, int sm_count, int) {
             const auto expected = loge::sm90::expected_residency(sm_count);
             return loge::sm90_plan(p, expected, expected);
         },
         loge::sm90_prepare, loge::sm90_backward, loge::sm90_cut_as},
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

// The calls of one shape: what is decided once for all of them. Its problem's pointers say what is wanted, no more.
struct Call : Plan {
    const Kernel* kernel;
    BackwardParams problem;
    loge::Workspace workspace;
    int device;  // -1: nowhere
};

void refuse(const Call& call, const std::string& reason) {
    throw std::invalid_argument(std::string(call.kernel->name) + ": " + reason);
}

void set_cluster(Call& call, int rows, int splits) {
    const int most = call.kernel->max_splits(call.problem);
    if (rows < 1 || rows > call.kernel->max_rows)
        refuse(call, "rows = " + std::to_string(rows) + " is not in 1 .. " + std::to_string(call.kernel->max_rows));
    if (splits < 1 || splits > most || rows * splits > loge::kMaxCluster || (splits & (splits - 1)) != 0)
        refuse(call, "splits = " + std::to_string(splits) + " is no power of two up to " +
                         std::to_string(std::min(most, loge::kMaxCluster / rows)));
    call.kernel->cut(call.problem, call, rows, splits);
}

Call plan(const std::string& name, std::int64_t M, std::int64_t N, std::int64_t K, std::int32_t R, std::int32_t P,
          bool need_dx, bool need_dA, bool need_dB, std::int32_t dtype, bool deterministic, int device, int sm_count,
          int rows, int splits) {
    // Stands for pointers of which only their presence matters.
    alignas(loge::kAlignmentBytes) static float present[4];
    Call call{};
    call.kernel = &find(name);
    call.device = device;
    BackwardParams& p = call.problem;
    p.dy = p.x = p.xa = p.left = p.right = p.lora_A = p.lora_B = present;
    p.dx = need_dx ? present : nullptr;
    p.dA = need_dA ? present : nullptr;
    p.dB = need_dB ? present : nullptr;
    p.M = M, p.N = N, p.K = K, p.R = R, p.P = P;
    p.dy_stride = N, p.x_stride = K;
    p.dtype = static_cast<loge::DType>(dtype);
    p.deterministic = deterministic;
    const std::string reason = call.kernel->why_not(p);
    if (!reason.empty()) refuse(call, reason);
    if (sm_count < 1) refuse(call, "sm_count = " + std::to_string(sm_count) + " is not positive");
    if (device < 0) {
        static_cast<Plan&>(call) = call.kernel->expect(p, sm_count, 0);
    } else {
        const loge::DeviceGuard guard(device);
        int limit = 0;
        loge::check_cuda(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                         "cudaDeviceGetAttribute(MaxSharedMemoryPerBlockOptin)");
        const Plan expected = call.kernel->expect(p, sm_count, limit);
        const int needed = std::max(expected.shared_bytes, expected.second.shared_bytes);
        if (needed > limit)
            refuse(call, "a block needs " + std::to_string(needed) + " bytes of shared memory, this GPU has " +
                             std::to_string(limit));
        static_cast<Plan&>(call) = call.kernel->prepare(p, device);
    }
    if (rows != 0 || splits != 0) set_cluster(call, std::max(rows, 1), std::max(splits, 1));
    call.workspace = loge::workspace_of(p, call);
    if (call.workspace.sets > 0) p.slab_stride = call.workspace.set;
    const std::int64_t bytes = 4 * call.workspace.size, parts = 4 * call.parts;
    if (call.workspace.sets > 0 && bytes > loge::kMaxWorkspaceBytes)
        refuse(call, "without atomics each slab has dA and dB of its own: " + std::to_string(bytes >> 20) +
                         " MiB, where " + std::to_string(loge::kMaxWorkspaceBytes >> 20) + " are allowed");
    if (parts > loge::kMaxPartsBytes)
        refuse(call, "blocks keep parts of dA and dB: " + std::to_string(parts >> 20) + " MiB, where " +
                         std::to_string(loge::kMaxPartsBytes >> 20) + " are allowed");
    return call;
}

template <class T = void>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void launch(const Call& call, std::uintptr_t dy, std::uintptr_t x, std::uintptr_t xa, std::uintptr_t left,
            std::uintptr_t right, std::uintptr_t lora_A, std::uintptr_t lora_B, std::uintptr_t dx, std::uintptr_t dA,
            std::uintptr_t dB, std::uintptr_t workspace, std::uintptr_t scratch, std::int64_t dy_stride,
            std::int64_t x_stride, float scaling, std::uintptr_t stream) {
    BackwardParams p = call.problem;
    p.dy = pointer(dy), p.x = pointer(x), p.xa = pointer(xa), p.left = pointer(left), p.right = pointer(right);
    p.lora_A = pointer(lora_A), p.lora_B = pointer(lora_B);
    if (p.M > 0 && p.dx != nullptr && dx == 0) refuse(call, "dx is missing");
    if (p.M > 0 && call.workspace.size > 0 && workspace == 0) refuse(call, "the workspace is missing");
    if (p.M > 0 && call.scratch > 0 && scratch == 0) refuse(call, "the scratch is missing");
    p.scratch = pointer(scratch);
    if (p.dx != nullptr) p.dx = pointer(dx);
    float* const sums = pointer<float>(workspace);
    if (p.dA != nullptr) p.dA = sums, p.dA_rounded = pointer(dA);
    if (p.dB != nullptr) p.dB = sums + call.workspace.dB, p.dB_rounded = pointer(dB);
    const bool rounds = p.dA_rounded != nullptr || p.dB_rounded != nullptr;
    if (rounds && call.workspace.sets > 0) refuse(call, "deterministic sums are the caller's to add up and to round");
    if (rounds || call.ordered) p.finished = pointer<unsigned>(workspace) + call.workspace.set;
    p.dy_stride = dy_stride, p.x_stride = x_stride;
    p.scaling = scaling;
    const std::string reason = call.kernel->why_not(p);
    if (!reason.empty()) refuse(call, reason);
    if (p.M == 0) return;
    if (call.device < 0) refuse(call, "this plan was made for no device");
    const loge::DeviceGuard guard(call.device);
    const std::int64_t zeros = call.workspace.zeros, cleared = call.workspace.size - zeros;
    if (cleared > 0)
        loge::check_cuda(cudaMemsetAsync(sums + zeros, 0, 4 * cleared, pointer<CUstream_st>(stream)),
                         "cudaMemsetAsync(workspace)");
    call.kernel->backward(p, call, call.device, pointer(stream));
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

    py::class_<Call>(module, "Plan", "How a kernel cuts the problems of one shape, and their launch.")
        .def_readonly("block_m", &Call::block_m)
        .def_readonly("block_n", &Call::block_n)
        .def_readonly("block_k", &Call::block_k)
        .def_readonly("block_r", &Call::block_r)
        .def_readonly("cluster", &Call::cluster)
        .def_readonly("rows", &Call::rows)
        .def_readonly("stages", &Call::stages)
        .def_readonly("shared_bytes", &Call::shared_bytes)
        .def_readonly("threads", &Call::threads)
        .def_readonly("slabs", &Call::slabs)
        .def_readonly("grid", &Call::grid)
        .def_property_readonly("second_grid", [](const Call& call) { return call.second.grid; })
        .def_readonly("scratch", &Call::scratch)
        .def_property_readonly("sets", [](const Call& call) { return call.workspace.sets; })
        .def_property_readonly("workspace", [](const Call& call) { return call.workspace.size; })
        .def("launch", &launch,
             "launch(dy, x, xa, left, right, lora_A, lora_B, dx, dA, dB, workspace, scratch, dy_stride, x_stride, "
             "scaling, stream): one memset, and one kernel or two. All but the last four are addresses, 0 for what is "
             "not wanted or not read. `workspace` has Plan.workspace elements of float32: the sums dA [P, K] and dB "
             "[N, P], one after the other, those that are wanted. They are the result, or are rounded to dA and dB "
             "where these are given. Where Plan.sets is not 0, as many sets of sums lie there, to be added up. "
             "`scratch`, of Plan.scratch elements, is done with when the kernels are. "
             "ValueError names the argument at fault and its value; CudaError the call that CUDA refused.");
    module.def(
        "plan", &plan,
        "The Plan of `kernel`. ValueError names what the kernel cannot take. On `device` it asks CUDA what fits "
        "there, and loads the kernel: call it once before a graph is captured. Without one (-1) it is arithmetic, "
        "for a GPU of `sm_count` multiprocessors, and cannot be launched. `rows` slabs by `splits` of N and K as "
        "a cluster override what is chosen.",
        py::arg("kernel"), py::kw_only(), py::arg("M"), py::arg("N"), py::arg("K"), py::arg("R"), py::arg("P"),
        py::arg("need_dx") = true, py::arg("need_dA") = true, py::arg("need_dB") = true, py::arg("dtype") = 1,
        py::arg("deterministic") = false, py::arg("device") = -1, py::arg("sm_count") = 108, py::arg("rows") = 0,
        py::arg("splits") = 0);
}
