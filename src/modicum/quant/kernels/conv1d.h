// What the kernels of one instruction set offer, and what they are given.
//
// Activations are int8 rows [T, C], one row per time step; outputs are rows [T_out, K]. Products are summed in
// int32, exactly: C · taps · 128 · 127 stays below 2^31 for up to 132,000 products.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// One convolution of one sequence. All strides are in elements.
struct ModicumConv {
    int32_t channels;      // C
    int32_t filters;       // K
    int32_t taps;          // r
    int32_t stride;        // direct only; 1 in Winograd
    int32_t dilation;      // direct only; 1 in Winograd
    int32_t left_padding;  // zeros before the first row
    int64_t length;        // T, rows of the input
    int64_t out_length;    // T_out
    const int8_t *input;   // [T, C]
    const void *weights;   // as `pack_*` wrote them
    int32_t *sums;         // [T_out, K], or null
    float *output;         // [T_out, K] = sums · scale + bias, or null
    const float *scale;    // [K]
    const float *bias;     // [K], or null
};

// Float activations to int8 rows: clip(round(x · inverse_scale), -limit, limit), to nearest even.
struct ModicumQuantize {
    int64_t channels, length;
    int64_t channel_step, time_step;  // of x, in elements
    const float *input;
    int8_t *output;  // [T, C]
    float inverse_scale;
    int32_t limit;
};
}

// The functions of one instruction set.
struct Kernels {
    const char *name;
    // Bytes of packed weights [matrices, K, C]: `matrices` is r for direct, 4 for Winograd F(2,3).
    size_t (*packed_nbytes)(int matrices, int filters, int channels);
    // weights: int8 [K, C, r] for direct, [4, K, C] (the transformed filters U) for Winograd.
    void (*pack_direct)(const int8_t *weights, int filters, int channels, int taps, void *packed);
    void (*pack_winograd)(const int8_t *weights, int filters, int channels, void *packed);
    // Return 0, or 1 where there is no memory.
    int (*direct)(const ModicumConv &conv);
    int (*winograd)(const ModicumConv &conv);
    void (*quantize)(const ModicumQuantize &task);
};

// Each is null where the compiler's target has no such instructions.
const Kernels *portable_kernels();
const Kernels *avx2_kernels();
const Kernels *avx512vnni_kernels();
const Kernels *neon_dotprod_kernels();
const Kernels *neon_kernels();
