// AVX-512 with VNNI: vpdpbusd multiplies unsigned by signed bytes, four of them into each int32.
//
// Activations are signed. They are stored with 128 added, and each sum starts at -128 · (sum of its weights), which
// takes exactly as much away again.
#if defined(__x86_64__)
#include "target.h"
MODICUM_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
#include <immintrin.h>

#include "microkernel.h"

namespace {

struct Vnni {
    using Vec = __m512i;
    using Element = uint8_t;
    using Weight = int8_t;
    static constexpr int lanes = 16, group = 4, panels = 2, rows = 12, tiles = 6, zero = 128;
    static constexpr bool has_few_registers = false;

    static Vec load(const int8_t *p) { return _mm512_loadu_si512(p); }
    static Vec load_sums(const int32_t *p) { return _mm512_loadu_si512(p); }
    static Vec broadcast(const uint8_t *p) {
        int32_t word;
        memcpy(&word, p, 4);
        return _mm512_set1_epi32(word);
    }
    static Vec dot(Vec sum, Vec value, Vec weights) { return _mm512_dpbusd_epi32(sum, value, weights); }
    static Vec add(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
    static Vec sub(Vec a, Vec b) { return _mm512_sub_epi32(a, b); }
    static void store(int32_t *p, Vec a) { _mm512_storeu_si512(p, a); }
    static void store_scaled(float *p, Vec a, const float *scale, const float *bias) {
        __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(a), _mm512_loadu_ps(scale));
        if (bias) scaled = _mm512_add_ps(scaled, _mm512_loadu_ps(bias));
        _mm512_storeu_ps(p, scaled);
    }

    static __mmask64 first(int64_t count) {
        return count >= 64 ? ~__mmask64(0) : count <= 0 ? 0 : (__mmask64(1) << count) - 1;
    }
    static void prepare(const int8_t *input, int64_t channels, int64_t row, uint8_t *to) {
        const __m512i offset = _mm512_set1_epi8(char(-128));
        for (int64_t c = 0; c < row; c += 64) {
            __m512i x = _mm512_maskz_loadu_epi8(input ? first(channels - c) : 0, input + c);
            _mm512_store_si512(to + c, _mm512_xor_si512(x, offset));
        }
    }
    static void transform(const int8_t *const *d, int64_t channels, int64_t row, uint8_t *to, int64_t plane) {
        const __m512i offset = _mm512_set1_epi8(char(-128));
        for (int64_t c = 0; c < row; c += 64) {
            const __mmask64 mask = first(channels - c);
            __m512i x[4];
            for (int j = 0; j < 4; ++j) x[j] = _mm512_maskz_loadu_epi8(mask, d[j] + c);
            const __m512i v[4] = {_mm512_subs_epi8(x[0], x[2]), _mm512_adds_epi8(x[1], x[2]),
                                  _mm512_subs_epi8(x[2], x[1]), _mm512_subs_epi8(x[3], x[1])};
            for (int j = 0; j < 4; ++j) _mm512_store_si512(to + j * plane + c, _mm512_xor_si512(v[j], offset));
        }
    }
};

inline __m512i round_vector(__m512 x, __m512 inverse, __m512 limit) {
    __m512 scaled = _mm512_min_ps(_mm512_mul_ps(x, inverse), limit);
    return _mm512_cvtps_epi32(_mm512_max_ps(scaled, _mm512_sub_ps(_mm512_setzero_ps(), limit)));
}

void quantize(const ModicumQuantize &task) {
    const __m512 inverse = _mm512_set1_ps(task.inverse_scale), limit = _mm512_set1_ps(float(task.limit));
    if (task.channel_step == 1) {
        for (int64_t t = 0; t < task.length; ++t)
            for (int64_t c = 0; c < task.channels; c += 16) {
                const __mmask16 mask = __mmask16(Vnni::first(min_of(16, task.channels - c)));
                __m512 x = _mm512_maskz_loadu_ps(mask, task.input + t * task.time_step + c);
                _mm512_mask_cvtepi32_storeu_epi8(task.output + t * task.channels + c, mask,
                                                 round_vector(x, inverse, limit));
            }
        return;
    }
    if (task.time_step != 1) return quantize_plain(task);
    // Four channels of 16 steps become 16 words, one for each step.
    const int64_t whole = task.channels / 4 * 4;
    const __m512i byte = _mm512_set1_epi32(255);
    for (int64_t t = 0; t < task.length; t += 16) {
        const int64_t count = min_of(16, task.length - t);
        const __mmask16 mask = __mmask16(Vnni::first(count));
        for (int64_t c = 0; c < whole; c += 4) {
            __m512i q[4];
            for (int j = 0; j < 4; ++j)
                q[j] = _mm512_and_si512(
                    byte, round_vector(_mm512_maskz_loadu_ps(mask, task.input + (c + j) * task.channel_step + t),
                                       inverse, limit));
            alignas(64) int32_t words[16];
            _mm512_store_si512(words, _mm512_or_si512(
                _mm512_or_si512(q[0], _mm512_slli_epi32(q[1], 8)),
                _mm512_or_si512(_mm512_slli_epi32(q[2], 16), _mm512_slli_epi32(q[3], 24))));
            for (int64_t i = 0; i < count; ++i) memcpy(task.output + (t + i) * task.channels + c, words + i, 4);
        }
        for (int64_t c = whole; c < task.channels; ++c)
            for (int64_t i = t; i < t + count; ++i)
                task.output[i * task.channels + c] = round_one(task.input[c * task.channel_step + i], task);
    }
}

}  // namespace

const Kernels *avx512vnni_kernels() {
    static constexpr Kernels kernels = kernels_of<Vnni>("avx512vnni", quantize);
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
               ? &kernels
               : nullptr;
}
MODICUM_TARGET_END
#else
#include "conv1d.h"
const Kernels *avx512vnni_kernels() { return nullptr; }
#endif
