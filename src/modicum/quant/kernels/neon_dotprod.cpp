// NEON with the dot products of ARMv8.2: sdot multiplies int8, four of them into each int32.
#if defined(__aarch64__) && (defined(__linux__) || defined(__APPLE__))
#include "target.h"
#if defined(__clang__)
MODICUM_TARGET("dotprod")
#else
MODICUM_TARGET("arch=armv8.2-a+dotprod")
#endif
#include "neon_common.h"
#if defined(__linux__)
#include <sys/auxv.h>
#endif

namespace {

struct Dotprod : NeonCommon<Dotprod, int8_t> {
    static constexpr int group = 4, rows = 8, tiles = 4;

    static Vec load(const int8_t *p) { return {vreinterpretq_s32_s8(vld1q_s8(p))}; }
    static Vec broadcast(const int8_t *p) {
        int32_t word;
        memcpy(&word, p, 4);
        return {vdupq_n_s32(word)};
    }
    static Vec dot(Vec sum, Vec value, Vec weights) {
        return {vdotq_s32(sum.x, vreinterpretq_s8_s32(value.x), vreinterpretq_s8_s32(weights.x))};
    }
    static void keep(int8_t *to, int8x8_t v) { vst1_s8(to, v); }
};

bool has_dotprod() {
#if defined(__linux__)
    constexpr unsigned long ASIMDDP = 1ul << 20;  // HWCAP_ASIMDDP of the kernel's asm/hwcap.h
    return getauxval(AT_HWCAP) & ASIMDDP;
#else
    return true;  // every Apple processor of this architecture
#endif
}

}  // namespace

const Kernels *neon_dotprod_kernels() {
    static constexpr Kernels kernels = kernels_of<Dotprod>("neon-dotprod", quantize_plain);
    return has_dotprod() ? &kernels : nullptr;
}
MODICUM_TARGET_END
#else
#include "conv1d.h"
const Kernels *neon_dotprod_kernels() { return nullptr; }
#endif
