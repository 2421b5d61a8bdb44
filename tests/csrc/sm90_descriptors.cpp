// Every wgmma descriptor of the Hopper kernel, read as the PTX ISA says wgmma does, against where TMA puts each value.
#include <cuda.h>
#include <cute/tensor.hpp>

#include "expect.h"
#include "sm90_layouts.h"

using namespace loge::sm90;

namespace {

// The byte wgmma reads for (i, j) of an operand slice [mn, 16] (PTX ISA, "Shared Memory Matrix Layout").
int read_address(std::uint64_t descriptor, bool mn_major, int i, int j) {
    const int start = static_cast<int>(descriptor & 0x3fff) << 4;
    const int leading = static_cast<int>(descriptor >> 16 & 0x3fff) << 4;
    const int stride = static_cast<int>(descriptor >> 32 & 0x3fff) << 4;
    const int base_offset = static_cast<int>(descriptor >> 49 & 7), mode = static_cast<int>(descriptor >> 62);
    EXPECT(base_offset == 0 && (mode == 1 || mode == 3), "base offset %d, mode %d", base_offset, mode);
    const int bits = mode == 1 ? 3 : 1, width = 16 << bits;  // bytes
    const int offset = mn_major ? i % (width / 2) * 2 + i / (width / 2) * leading + j % 8 * width + j / 8 * stride
                                : i % 8 * width + i / 8 * stride + j * 2;
    const int address = start + offset;
    return address ^ ((address >> 7 & ((1 << bits) - 1)) << 4);
}

// Where TMA puts (row, column) of a box with rows of `width` bytes that starts at `start`.
int written_address(int start, int row, int column, int width) {
    const int address = start + row * width + column * 2;
    return address ^ ((address >> 7 & (width / 16 - 1)) << 4);
}

// `written(i, contracted)`: TMA's address. Fragments of the operand as the kernel makes them.
template <class Fragment, class Written>
void compare(const char* name, const Fragment& fragment, bool mn_major, int mn, int contracted,
             const Written& written) {
    EXPECT(cute::size<1>(fragment) == 1 && cute::size<2>(fragment) == contracted / 16, "%s", name);
    for (int k = 0; k < contracted / 16; ++k) {
        const std::uint64_t descriptor = fragment(0, 0, k);
        for (int i = 0; i < mn; ++i)
            for (int j = 0; j < 16; ++j)
                EXPECT(read_address(descriptor, mn_major, i, j) == written(i, k * 16 + j), "%s: (%d, %d) of slice %d",
                       name, i, j, k);
    }
}

template <class Element, class Layout>
auto tensor(char* shared, Layout layout) {
    return cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<Element*>(shared)), layout);
}

template <class Element, int kRank, int kAdapter>
void check(char* window) {
    using L = Layouts<Element, kRank, kAdapter>;
    const SharedMap map = L::kMap;
    constexpr int kWidth = kAdapter == 64 ? 128 : 32;
    for (int stage = 0; stage < map.stages; ++stage) {
        const int start = stage * map.stage_bytes, factor = start + map.factor, adapter = start + map.adapter;
        const auto skinny = typename L::Skinny{}.get_slice(0);
        if constexpr (kAdapter > 0) {
            compare("dY^T, x^T",
                    skinny.partition_fragment_A(tensor<Element>(window + start, typename L::ActivationT{})), true, 64,
                    128, [&](int n, int m) { return written_address(start, m, n, 128); });
            compare("xa, T_P",
                    skinny.partition_fragment_B(tensor<Element>(window + map.resident, typename L::Resident{})), true,
                    kAdapter, 128, [&](int p, int m) { return written_address(map.resident, m, p, kWidth); });
        }
        for (int warpgroup = 0; warpgroup < 2; ++warpgroup) {
            char* half = window + start + warpgroup * kWarpgroupRows * kStep * kElementBytes;
            const auto dy = [&](int m, int n) { return written_address(start, warpgroup * 64 + m, n, 128); };
            if constexpr (kRank > 0)
                compare("dY for T_R",
                        typename L::ProjectRank{}.get_slice(0).partition_fragment_A(
                            tensor<Element>(half, typename L::Activation{})),
                        false, 64, 64, dy);
            if constexpr (kAdapter > 0)
                compare("dY for T_P",
                        typename L::ProjectAdapter{}.get_slice(0).partition_fragment_A(
                            tensor<Element>(half, typename L::Activation{})),
                        false, 64, 64, dy);
        }
        if constexpr (kRank > 0) {
            compare("left",
                    typename L::ProjectRank{}.get_slice(0).partition_fragment_B(
                        tensor<Element>(window + factor, typename L::Left{})),
                    true, kRank, 64,
                    [&](int r, int n) { return written_address(factor + r / 64 * 64 * 128, n, r % 64, 128); });
            const auto expand = typename L::Expand{}.get_slice(0);
            compare("right", expand.partition_fragment_B(tensor<Element>(window + factor, typename L::Right{})), true,
                    64, kRank, [&](int k, int r) { return written_address(factor, r, k, 128); });
            if constexpr (kAdapter > 0)
                compare("lora_A", expand.partition_fragment_B(tensor<Element>(window + adapter, typename L::LoraA{})),
                        true, 64, kAdapter, [&](int k, int p) { return written_address(adapter, p, k, 128); });
        }
        if constexpr (kAdapter > 0)
            compare("lora_B",
                    typename L::ProjectAdapter{}.get_slice(0).partition_fragment_B(
                        tensor<Element>(window + adapter, typename L::LoraB{})),
                    true, kAdapter, 64, [&](int p, int n) { return written_address(adapter, n, p, kWidth); });
    }
}

alignas(1 << 18) char window[1 << 18];

}  // namespace

// Tiles that sm90_emulate.cpp does not compile.
int main() {
    check<cute::bfloat16_t, 0, 16>(window);
    check<cute::bfloat16_t, 128, 64>(window);
    check<cute::bfloat16_t, 256, 16>(window);
    check<cute::half_t, 64, 64>(window);
    std::puts("ok");
}
