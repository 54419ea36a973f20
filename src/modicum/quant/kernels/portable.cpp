// Any processor: plain C++.
#include "microkernel.h"

namespace {

struct Portable {
    struct Vec {
        int32_t x[4];
    };
    using Element = int16_t;
    using Weight = int16_t;
    static constexpr int lanes = 4, group = 1, panels = 1, rows = 4, tiles = 2, zero = 0;
    static constexpr bool has_few_registers = false;

    template <class T>
    static Vec from(const T *p) {
        return {{p[0], p[1], p[2], p[3]}};
    }
    static Vec load(const int16_t *p) { return from(p); }
    static Vec load_sums(const int32_t *p) { return from(p); }
    static Vec broadcast(const int16_t *p) { return {{*p, *p, *p, *p}}; }
    static Vec dot(Vec sum, Vec value, Vec weights) {
        for (int i = 0; i < 4; ++i) sum.x[i] += value.x[i] * weights.x[i];
        return sum;
    }
    static Vec add(Vec a, Vec b) {
        for (int i = 0; i < 4; ++i) a.x[i] += b.x[i];
        return a;
    }
    static Vec sub(Vec a, Vec b) {
        for (int i = 0; i < 4; ++i) a.x[i] -= b.x[i];
        return a;
    }
    static void store(int32_t *p, Vec a) { memcpy(p, a.x, sizeof a.x); }
    static void store_scaled(float *p, Vec a, const float *scale, const float *bias) {
        for (int i = 0; i < 4; ++i) {
            float scaled = float(a.x[i]) * scale[i];
            p[i] = bias ? scaled + bias[i] : scaled;
        }
    }
    static void prepare(const int8_t *input, int64_t channels, int64_t row, int16_t *to) {
        prepare_plain<Portable>(input, channels, row, to);
    }
    static void transform(const int8_t *const *d, int64_t channels, int64_t row, int16_t *to, int64_t plane) {
        transform_plain<Portable>(d, channels, row, to, plane);
    }
};

}  // namespace

const Kernels *portable_kernels() {
    static constexpr Kernels kernels = kernels_of<Portable>("portable", quantize_plain);
    return &kernels;
}
