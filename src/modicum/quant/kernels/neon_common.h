// What both NEON kernels share: sums of four filters, and the transform of eight channels at once.
#pragma once

#include <arm_neon.h>

#include "microkernel.h"

namespace {

// Four sums; weights and activations are kept in the same register type.
struct NeonVec {
    int32x4_t x;
};

template <class Self, class Element_>
struct NeonCommon {
    using Vec = NeonVec;
    using Element = Element_;
    using Weight = Element_;
    static constexpr int lanes = 4, panels = 2, zero = 0;
    static constexpr bool has_few_registers = false;

    static Vec load_sums(const int32_t *p) { return {vld1q_s32(p)}; }
    static Vec add(Vec a, Vec b) { return {vaddq_s32(a.x, b.x)}; }
    static Vec sub(Vec a, Vec b) { return {vsubq_s32(a.x, b.x)}; }
    static void store(int32_t *p, Vec a) { vst1q_s32(p, a.x); }
    static void store_scaled(float *p, Vec a, const float *scale, const float *bias) {
        float32x4_t scaled = vmulq_f32(vcvtq_f32_s32(a.x), vld1q_f32(scale));
        vst1q_f32(p, bias ? vaddq_f32(scaled, vld1q_f32(bias)) : scaled);
    }
    static void prepare(const int8_t *input, int64_t channels, int64_t row, Element *to) {
        int64_t whole = input ? channels / 8 * 8 : 0;
        for (int64_t c = 0; c < whole; c += 8) Self::keep(to + c, vld1_s8(input + c));
        prepare_plain<Self>(input ? input + whole : nullptr, channels - whole, row - whole, to + whole);
    }
    static void transform(const int8_t *const *d, int64_t channels, int64_t row, Element *to, int64_t plane) {
        int64_t whole = channels / 8 * 8;
        for (int64_t c = 0; c < whole; c += 8) {
            const int8x8_t x0 = vld1_s8(d[0] + c), x1 = vld1_s8(d[1] + c), x2 = vld1_s8(d[2] + c),
                           x3 = vld1_s8(d[3] + c);
            Self::keep(to + c, vqsub_s8(x0, x2));
            Self::keep(to + plane + c, vqadd_s8(x1, x2));
            Self::keep(to + 2 * plane + c, vqsub_s8(x2, x1));
            Self::keep(to + 3 * plane + c, vqsub_s8(x3, x1));
        }
        const int8_t *rest[4] = {d[0] + whole, d[1] + whole, d[2] + whole, d[3] + whole};
        transform_plain<Self>(rest, channels - whole, row - whole, to + whole, plane);
    }
};

}  // namespace
