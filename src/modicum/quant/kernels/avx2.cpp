// AVX2: vpmaddwd multiplies int16, two of them into each int32. Both factors are widened to 16 bits beforehand, as
// vpmaddubsw on bytes would saturate its 16-bit sums.
#if defined(__x86_64__)
#include "target.h"
MODICUM_TARGET("avx2")
#include <immintrin.h>

#include "microkernel.h"

namespace {

struct Avx2 {
    using Vec = __m256i;
    using Element = int16_t;
    using Weight = int16_t;
    static constexpr int lanes = 8, group = 2, panels = 2, rows = 6, tiles = 3, zero = 0;
    static constexpr bool has_few_registers = true;

    static Vec load(const int16_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
    static Vec load_sums(const int32_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
    static Vec broadcast(const int16_t *p) {
        int32_t word;
        memcpy(&word, p, 4);
        return _mm256_set1_epi32(word);
    }
    static Vec dot(Vec sum, Vec value, Vec weights) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(value, weights));
    }
    static Vec add(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
    static Vec sub(Vec a, Vec b) { return _mm256_sub_epi32(a, b); }
    static void store(int32_t *p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), a); }
    static void store_scaled(float *p, Vec a, const float *scale, const float *bias) {
        __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(a), _mm256_loadu_ps(scale));
        if (bias) scaled = _mm256_add_ps(scaled, _mm256_loadu_ps(bias));
        _mm256_storeu_ps(p, scaled);
    }

    static __m256i bytes(const int8_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
    static void widen(int16_t *to, __m256i x) {
        auto *at = reinterpret_cast<__m256i *>(to);
        _mm256_storeu_si256(at, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(x)));
        _mm256_storeu_si256(at + 1, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(x, 1)));
    }
    static void prepare(const int8_t *input, int64_t channels, int64_t row, int16_t *to) {
        int64_t whole = input ? channels / 32 * 32 : 0;
        for (int64_t c = 0; c < whole; c += 32) widen(to + c, bytes(input + c));
        prepare_plain<Avx2>(input ? input + whole : nullptr, channels - whole, row - whole, to + whole);
    }
    static void transform(const int8_t *const *d, int64_t channels, int64_t row, int16_t *to, int64_t plane) {
        int64_t whole = channels / 32 * 32;
        for (int64_t c = 0; c < whole; c += 32) {
            const __m256i x0 = bytes(d[0] + c), x1 = bytes(d[1] + c), x2 = bytes(d[2] + c), x3 = bytes(d[3] + c);
            widen(to + c, _mm256_subs_epi8(x0, x2));
            widen(to + plane + c, _mm256_adds_epi8(x1, x2));
            widen(to + 2 * plane + c, _mm256_subs_epi8(x2, x1));
            widen(to + 3 * plane + c, _mm256_subs_epi8(x3, x1));
        }
        const int8_t *rest[4] = {d[0] + whole, d[1] + whole, d[2] + whole, d[3] + whole};
        transform_plain<Avx2>(rest, channels - whole, row - whole, to + whole, plane);
    }
};

}  // namespace

const Kernels *avx2_kernels() {
    static constexpr Kernels kernels = kernels_of<Avx2>("avx2", quantize_plain);
    return __builtin_cpu_supports("avx2") ? &kernels : nullptr;
}
MODICUM_TARGET_END
#else
#include "conv1d.h"
const Kernels *avx2_kernels() { return nullptr; }
#endif
