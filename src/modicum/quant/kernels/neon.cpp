// ARM NEON. With the dot product instructions of ARMv8.2 (sdot) four int8 go into each int32; without them, two
// int16 (smlal), which every ARMv7-A and ARMv8 core has.
#if defined(__ARM_NEON)
#include <arm_neon.h>

#include "microkernel.h"

namespace {

struct NeonBase {
    static int32x4_t load_sums(const int32_t *p) { return vld1q_s32(p); }
    static void store(int32_t *p, int32x4_t a) { vst1q_s32(p, a); }
    static void store_scaled(float *p, int32x4_t a, const float *scale, const float *bias) {
        float32x4_t scaled = vmulq_f32(vcvtq_f32_s32(a), vld1q_f32(scale));
        vst1q_f32(p, bias ? vaddq_f32(scaled, vld1q_f32(bias)) : scaled);
    }
    // The four values of a tile for 8 channels, saturated.
    static void tile(const int8_t *const *d, int64_t c, int8x8_t v[4]) {
        const int8x8_t x0 = vld1_s8(d[0] + c), x1 = vld1_s8(d[1] + c), x2 = vld1_s8(d[2] + c),
                       x3 = vld1_s8(d[3] + c);
        v[0] = vqsub_s8(x0, x2);
        v[1] = vqadd_s8(x1, x2);
        v[2] = vqsub_s8(x2, x1);
        v[3] = vqsub_s8(x3, x1);
    }
};

#if defined(__ARM_FEATURE_DOTPROD)
constexpr const char *NAME = "neon-dotprod";

struct Neon : NeonBase {
    struct Vec {
        int32x4_t x;
    };
    using Element = int8_t;
    using Weight = int8_t;
    static constexpr int lanes = 4, group = 4, panels = 2, rows = 8, tiles = 4, zero = 0;

    static Vec load(const int8_t *p) { return {vreinterpretq_s32_s8(vld1q_s8(p))}; }
    static Vec load_sums(const int32_t *p) { return {NeonBase::load_sums(p)}; }
    static Vec broadcast(const int8_t *p) {
        int32_t word;
        memcpy(&word, p, 4);
        return {vdupq_n_s32(word)};
    }
    static Vec dot(Vec sum, Vec value, Vec weights) {
        return {vdotq_s32(sum.x, vreinterpretq_s8_s32(value.x), vreinterpretq_s8_s32(weights.x))};
    }
    static void keep(int8_t *to, int8x8_t v) { vst1_s8(to, v); }
#else
constexpr const char *NAME = "neon";

struct Neon : NeonBase {
    // A sum of four filters, or two int16 for each of them: `x` as pairs.
    struct Vec {
        int32x4_t x;
    };
    using Element = int16_t;
    using Weight = int16_t;
    static constexpr int lanes = 4, group = 2, panels = 2, rows = 4, tiles = 2, zero = 0;

    static Vec load(const int16_t *p) {
        // (k0 c0, k0 c1, k1 c0, k1 c1, …) to the first channel of four filters, then the second.
        int16x4x2_t pair = vld2_s16(p);
        return {vreinterpretq_s32_s16(vcombine_s16(pair.val[0], pair.val[1]))};
    }
    static Vec load_sums(const int32_t *p) { return {NeonBase::load_sums(p)}; }
    static Vec broadcast(const int16_t *p) {
        return {vreinterpretq_s32_s16(vcombine_s16(vdup_n_s16(p[0]), vdup_n_s16(p[1])))};
    }
    static Vec dot(Vec sum, Vec value, Vec weights) {
        const int16x8_t a = vreinterpretq_s16_s32(value.x), b = vreinterpretq_s16_s32(weights.x);
        return {vmlal_s16(vmlal_s16(sum.x, vget_low_s16(a), vget_low_s16(b)), vget_high_s16(a), vget_high_s16(b))};
    }
    static void keep(int16_t *to, int8x8_t v) { vst1q_s16(to, vmovl_s8(v)); }
#endif

    static Vec add(Vec a, Vec b) { return {vaddq_s32(a.x, b.x)}; }
    static Vec sub(Vec a, Vec b) { return {vsubq_s32(a.x, b.x)}; }
    static void store(int32_t *p, Vec a) { NeonBase::store(p, a.x); }
    static void store_scaled(float *p, Vec a, const float *scale, const float *bias) {
        NeonBase::store_scaled(p, a.x, scale, bias);
    }
    static void prepare(const int8_t *input, int64_t channels, int64_t row, Element *to) {
        int64_t whole = input ? channels / 8 * 8 : 0;
        for (int64_t c = 0; c < whole; c += 8) keep(to + c, vld1_s8(input + c));
        prepare_plain<Neon>(input ? input + whole : nullptr, channels - whole, row - whole, to + whole);
    }
    static void transform(const int8_t *const *d, int64_t channels, int64_t row, Element *to, int64_t plane) {
        int64_t whole = channels / 8 * 8;
        for (int64_t c = 0; c < whole; c += 8) {
            int8x8_t v[4];
            tile(d, c, v);
            for (int j = 0; j < 4; ++j) keep(to + j * plane + c, v[j]);
        }
        const int8_t *rest[4] = {d[0] + whole, d[1] + whole, d[2] + whole, d[3] + whole};
        transform_plain<Neon>(rest, channels - whole, row - whole, to + whole, plane);
    }
};

}  // namespace

const Kernels *neon_kernels() {
    static constexpr Kernels kernels = kernels_of<Neon>(NAME, quantize_plain);
    return &kernels;
}
#else
#include "conv1d.h"
const Kernels *neon_kernels() { return nullptr; }
#endif
