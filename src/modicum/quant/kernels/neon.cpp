// NEON of every ARMv7-A and ARMv8 core: smlal multiplies int16 into int32. Both factors are widened to 16 bits
// beforehand.
#if defined(__ARM_NEON)
#include "neon_common.h"

namespace {

struct Neon : NeonCommon<Neon, int16_t> {
    static constexpr int group = 2, rows = 4, tiles = 2;

    static Vec load(const int16_t *p) {
        // Two channels alternate in memory: the first of four filters, then the second of them.
        const int16x4x2_t pair = vld2_s16(p);
        return {vreinterpretq_s32_s16(vcombine_s16(pair.val[0], pair.val[1]))};
    }
    static Vec broadcast(const int16_t *p) {
        return {vreinterpretq_s32_s16(vcombine_s16(vdup_n_s16(p[0]), vdup_n_s16(p[1])))};
    }
    static Vec dot(Vec sum, Vec value, Vec weights) {
        const int16x8_t a = vreinterpretq_s16_s32(value.x), b = vreinterpretq_s16_s32(weights.x);
        const int32x4_t first = vmlal_s16(sum.x, vget_low_s16(a), vget_low_s16(b));
        return {vmlal_s16(first, vget_high_s16(a), vget_high_s16(b))};
    }
    static void keep(int16_t *to, int8x8_t v) { vst1q_s16(to, vmovl_s8(v)); }
};

}  // namespace

const Kernels *neon_kernels() {
    static constexpr Kernels kernels = kernels_of<Neon>("neon", quantize_plain);
    return &kernels;
}
#else
#include "conv1d.h"
const Kernels *neon_kernels() { return nullptr; }
#endif
