// The two convolutions, written once over the vectors of an instruction set. Included by one file for each.
//
// A vector type V holds `lanes` int32 sums, one for each of so many filters. Reductions run over `group`
// channels at once: V::dot adds to each lane the products of `group` activations, broadcast as one 32-bit word,
// and the lane's own `group` weights. A panel is `panels` vectors: the filters that one register tile covers.
//
// Direct convolution sums over taps and channels into a tile of up to V::rows time steps.
//
// Winograd F(2,3) (Lavin and Gray, arXiv 1509.09308, one dimension) keeps the two outputs of each of up to V::tiles
// tiles in registers from the first product to the last. With A^T = [[1,1,1,0],[0,1,-1,1]]:
//   first, M1 = U1 V1 and M2 = U2 V2 are summed over all channels;
//   then M1 + M2 and M1 - M2 take their places, and U0 V0 and U3 V3 are added to them.
// So no product is written to memory, and there is no pass for the inverse transform.
#pragma once

#include <stdlib.h>
#include <string.h>

#include "conv1d.h"

namespace {

constexpr int LINE = 64;                   // bytes of a cache line
constexpr int64_t BLOCK = 192;             // output rows whose inputs are prepared at once: they stay in the L2 cache

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

template <class V>
struct Layout {
    using Element = typename V::Element;
    using Weight = typename V::Weight;
    static constexpr int width = V::lanes * V::panels;             // filters of a panel
    static constexpr int64_t word = width * V::group;              // weights of one group of channels, one matrix

    int64_t filters, channels, matrices, groups, panels, row;

    Layout(int64_t matrices_, int64_t filters_, int64_t channels_)
        : filters(filters_), channels(channels_), matrices(matrices_) {
        groups = ceil_div(channels, V::group);
        panels = ceil_div(filters, width);
        // A row of prepared activations: whole cache lines, an odd number of them, so that rows do not
        // all fall into the same few sets of the L1 cache.
        int64_t lines = ceil_div(groups * V::group * int64_t(sizeof(Element)), LINE);
        row = (lines | 1) * LINE / int64_t(sizeof(Element));
    }
    int64_t panel() const { return matrices * groups * word; }     // weights of a panel
    size_t offsets() const { return size_t(panels * panel()) * sizeof(Weight); }
    // After the weights: for each matrix and filter, what the sum starts with.
    size_t nbytes() const { return offsets() + size_t(matrices * panels * width) * sizeof(int32_t); }
};

template <class V>
size_t packed_nbytes(int matrices, int filters, int channels) {
    return Layout<V>(matrices, filters, channels).nbytes();
}

// Where matrix i of a panel lies. Winograd: those of one phase alternate, 1 2 1 2 … 0 3 0 3 ….
constexpr int PHASE[4] = {1, 0, 0, 1};
constexpr int SECOND[4] = {0, 0, 1, 1};

template <class V, class Get>
void pack(const Layout<V> &l, bool is_winograd, void *packed, Get weight) {
    memset(packed, 0, l.nbytes());
    auto *to = static_cast<typename V::Weight *>(packed);
    auto *starts = reinterpret_cast<int32_t *>(static_cast<char *>(packed) + l.offsets());
    for (int64_t m = 0; m < l.matrices; ++m)
        for (int64_t k = 0; k < l.filters; ++k) {
            int64_t panel = k / l.width, lane = k % l.width;
            int32_t total = 0;
            for (int64_t c = 0; c < l.channels; ++c) {
                int64_t g = c / V::group;
                int64_t place = is_winograd ? (PHASE[m] * l.groups + g) * 2 + SECOND[m] : m * l.groups + g;
                int8_t value = weight(m, k, c);
                to[panel * l.panel() + place * l.word + lane * V::group + c % V::group] = value;
                total += value;
            }
            starts[(panel * l.matrices + m) * l.width + lane] = -V::zero * total;
        }
}

template <class V>
void pack_direct(const int8_t *w, int filters, int channels, int taps, void *packed) {
    Layout<V> l(taps, filters, channels);
    pack<V>(l, false, packed, [=](int64_t m, int64_t k, int64_t c) {
        return w[(k * channels + c) * taps + m];
    });
    // The taps of direct convolution share one sum: so do their starts.
    auto *starts = reinterpret_cast<int32_t *>(static_cast<char *>(packed) + l.offsets());
    for (int64_t p = 0; p < l.panels; ++p)
        for (int64_t m = 1; m < taps; ++m)
            for (int64_t i = 0; i < l.width; ++i)
                starts[p * taps * l.width + i] += starts[(p * taps + m) * l.width + i];
}

template <class V>
void pack_winograd(const int8_t *u, int filters, int channels, void *packed) {
    pack<V>(Layout<V>(4, filters, channels), true, packed, [=](int64_t m, int64_t k, int64_t c) {
        return u[(m * filters + k) * channels + c];
    });
}

// The sums of one panel for one output row, to memory.
template <class V>
inline void finish(const ModicumConv &conv, int64_t row, int64_t filter, const typename V::Vec *sums) {
    int64_t at = row * conv.filters + filter, left = conv.filters - filter;
    if (left >= V::lanes * V::panels) {
        for (int p = 0; p < V::panels; ++p) {
            int shift = p * V::lanes;
            if (conv.sums) V::store(conv.sums + at + shift, sums[p]);
            if (conv.output)
                V::store_scaled(conv.output + at + shift, sums[p], conv.scale + filter + shift,
                                conv.bias ? conv.bias + filter + shift : nullptr);
        }
        return;
    }
    int32_t last[V::lanes * V::panels];
    for (int p = 0; p < V::panels; ++p) V::store(last + p * V::lanes, sums[p]);
    for (int64_t i = 0; i < left; ++i) {
        if (conv.sums) conv.sums[at + i] = last[i];
        if (conv.output) {
            float scaled = float(last[i]) * conv.scale[filter + i];
            conv.output[at + i] = conv.bias ? scaled + conv.bias[filter + i] : scaled;
        }
    }
}

// -- direct ---------------------------------------------------------------------------------------------------

template <class V, int R>
__attribute__((noinline)) void direct_tile(const ModicumConv &conv, const Layout<V> &l, const typename V::Element *x, int64_t row,
                 int64_t panel) {
    using Vec = typename V::Vec;
    const auto *w = static_cast<const typename V::Weight *>(conv.weights) + panel * l.panel();
    const auto *start = reinterpret_cast<const int32_t *>(static_cast<const char *>(conv.weights) + l.offsets()) +
                        panel * l.matrices * l.width;
    const int64_t step = conv.stride * l.row;
    Vec sums[R][V::panels];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < V::panels; ++p) sums[r][p] = V::load_sums(start + p * V::lanes);
    for (int tap = 0; tap < conv.taps; ++tap) {
        const auto *at = x + tap * conv.dilation * l.row;
        for (int64_t g = 0; g < l.groups; ++g) {
            Vec weights[V::panels];
            for (int p = 0; p < V::panels; ++p) weights[p] = V::load(w + p * V::lanes * V::group);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                Vec value = V::broadcast(at + r * step);
#pragma GCC unroll 4
                for (int p = 0; p < V::panels; ++p) sums[r][p] = V::dot(sums[r][p], value, weights[p]);
            }
            w += l.word;
            at += V::group;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) finish<V>(conv, row + r, panel * l.width, sums[r]);
}

template <class V, int R>
void direct_rows(const ModicumConv &conv, const Layout<V> &l, const typename V::Element *x, int64_t row,
                 int64_t panel, int count) {
    if (count == R) direct_tile<V, R>(conv, l, x, row, panel);
    else if constexpr (R > 1) direct_rows<V, R - 1>(conv, l, x, row, panel, count);
}

template <class V>
int direct(const ModicumConv &conv) {
    using Element = typename V::Element;
    Layout<V> l(conv.taps, conv.filters, conv.channels);
    int64_t reach = int64_t(conv.taps - 1) * conv.dilation;
    int64_t block = min_of(BLOCK, conv.out_length);
    int64_t rows = (block - 1) * conv.stride + reach + 1;
    auto *x = static_cast<Element *>(aligned_alloc(LINE, size_t(rows * l.row) * sizeof(Element)));
    if (!x) return 1;
    for (int64_t begin = 0; begin < conv.out_length; begin += block) {
        int64_t count = min_of(block, conv.out_length - begin);
        int64_t needed = (count - 1) * conv.stride + reach + 1;
        for (int64_t i = 0; i < needed; ++i) {
            int64_t t = begin * conv.stride - conv.left_padding + i;
            bool is_inside = t >= 0 && t < conv.length;
            V::prepare(is_inside ? conv.input + t * conv.channels : nullptr, conv.channels, l.row, x + i * l.row);
        }
        // Tiles of nearly the same height: none is much lower than the others.
        int64_t tiles = ceil_div(count, V::rows);
        for (int64_t panel = 0; panel < l.panels; ++panel)
            for (int64_t i = 0; i < tiles; ++i) {
                int64_t from = i * count / tiles, to = (i + 1) * count / tiles;
                direct_rows<V, V::rows>(conv, l, x + from * conv.stride * l.row, begin + from, panel,
                                        int(to - from));
            }
    }
    free(x);
    return 0;
}

// -- Winograd F(2,3) ------------------------------------------------------------------------------------------

// Adds the products of two matrices, whose weights alternate, to a and b.
template <class V, int R>
inline void winograd_phase(const Layout<V> &l, const typename V::Element *first, const typename V::Element *second,
                           const typename V::Weight *w, typename V::Vec (&a)[R][V::panels],
                           typename V::Vec (&b)[R][V::panels]) {
    using Vec = typename V::Vec;
    for (int64_t g = 0; g < l.groups; ++g) {
        // One matrix after the other: weights of both at once would not leave AVX2 enough registers.
        Vec weights[V::panels];
        for (int p = 0; p < V::panels; ++p) weights[p] = V::load(w + p * V::lanes * V::group);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            Vec value = V::broadcast(first + r * l.row);
#pragma GCC unroll 4
            for (int p = 0; p < V::panels; ++p) a[r][p] = V::dot(a[r][p], value, weights[p]);
        }
        for (int p = 0; p < V::panels; ++p) weights[p] = V::load(w + l.word + p * V::lanes * V::group);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            Vec value = V::broadcast(second + r * l.row);
#pragma GCC unroll 4
            for (int p = 0; p < V::panels; ++p) b[r][p] = V::dot(b[r][p], value, weights[p]);
        }
        w += 2 * l.word;
        first += V::group;
        second += V::group;
    }
}

// The same in a function of its own. Where registers are few, GCC spills sums in a larger one.
template <class V, int R>
__attribute__((noinline)) void winograd_phase_apart(const Layout<V> &l, const typename V::Element *first,
                                                    const typename V::Element *second, const typename V::Weight *w,
                                                    typename V::Vec (&a)[R][V::panels],
                                                    typename V::Vec (&b)[R][V::panels]) {
    typename V::Vec c[R][V::panels], d[R][V::panels];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < V::panels; ++p) {
            c[r][p] = a[r][p];
            d[r][p] = b[r][p];
        }
    winograd_phase<V, R>(l, first, second, w, c, d);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < V::panels; ++p) {
            a[r][p] = c[r][p];
            b[r][p] = d[r][p];
        }
}

// v: transformed activations of the first tile; `plane` elements lie between its four values.
template <class V, int R>
__attribute__((noinline)) void winograd_tile(const ModicumConv &conv, const Layout<V> &l, const typename V::Element *v, int64_t plane,
                   int64_t row, int64_t panel) {
    using Vec = typename V::Vec;
    const auto *w = static_cast<const typename V::Weight *>(conv.weights) + panel * l.panel();
    const auto *start = reinterpret_cast<const int32_t *>(static_cast<const char *>(conv.weights) + l.offsets()) +
                        panel * 4 * l.width;
    Vec a[R][V::panels], b[R][V::panels];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < V::panels; ++p) {
            a[r][p] = V::load_sums(start + l.width + p * V::lanes);
            b[r][p] = V::load_sums(start + 2 * l.width + p * V::lanes);
        }
    constexpr auto phase = V::has_few_registers ? winograd_phase_apart<V, R> : winograd_phase<V, R>;
    phase(l, v + plane, v + 2 * plane, w, a, b);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int p = 0; p < V::panels; ++p) {
            Vec sum = V::add(a[r][p], b[r][p]), difference = V::sub(a[r][p], b[r][p]);
            a[r][p] = V::add(sum, V::load_sums(start + p * V::lanes));
            b[r][p] = V::add(difference, V::load_sums(start + 3 * l.width + p * V::lanes));
        }
    phase(l, v, v + 3 * plane, w + 2 * l.groups * l.word, a, b);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        finish<V>(conv, row + 2 * r, panel * l.width, a[r]);
        if (row + 2 * r + 1 < conv.out_length) finish<V>(conv, row + 2 * r + 1, panel * l.width, b[r]);
    }
}

template <class V, int R>
void winograd_tiles(const ModicumConv &conv, const Layout<V> &l, const typename V::Element *v, int64_t plane,
                    int64_t row, int64_t panel, int count) {
    if (count == R) winograd_tile<V, R>(conv, l, v, plane, row, panel);
    else if constexpr (R > 1) winograd_tiles<V, R - 1>(conv, l, v, plane, row, panel, count);
}

template <class V>
int winograd(const ModicumConv &conv) {
    using Element = typename V::Element;
    Layout<V> l(4, conv.filters, conv.channels);
    int64_t tiles = ceil_div(conv.out_length, 2), block = min_of(BLOCK / 2, tiles), plane = block * l.row;
    auto *v = static_cast<Element *>(aligned_alloc(LINE, size_t(4 * plane) * sizeof(Element)));
    auto *zeros = static_cast<int8_t *>(calloc(size_t(conv.channels), 1));
    if (!v || !zeros) {
        free(v);
        free(zeros);
        return 1;
    }
    for (int64_t begin = 0; begin < tiles; begin += block) {
        int64_t count = min_of(block, tiles - begin);
        for (int64_t i = 0; i < count; ++i) {
            const int8_t *rows[4];
            for (int j = 0; j < 4; ++j) {
                int64_t t = 2 * (begin + i) - conv.left_padding + j;
                rows[j] = t >= 0 && t < conv.length ? conv.input + t * conv.channels : zeros;
            }
            V::transform(rows, conv.channels, l.row, v + i * l.row, plane);
        }
        int64_t groups = ceil_div(count, V::tiles);
        for (int64_t panel = 0; panel < l.panels; ++panel)
            for (int64_t i = 0; i < groups; ++i) {
                int64_t from = i * count / groups, to = (i + 1) * count / groups;
                winograd_tiles<V, V::tiles>(conv, l, v + from * l.row, plane, 2 * (begin + from), panel,
                                            int(to - from));
            }
    }
    free(v);
    free(zeros);
    return 0;
}

// -- plain parts that an instruction set may replace ------------------------------------------------------------

inline int saturate(int x) { return x < -128 ? -128 : x > 127 ? 127 : x; }

// One row to elements, `row` of them: zeros after the channels, and all zeros without an input.
template <class V>
inline void prepare_plain(const int8_t *input, int64_t channels, int64_t row, typename V::Element *to) {
    int64_t count = input ? channels : 0;
    for (int64_t c = 0; c < count; ++c) to[c] = typename V::Element(input[c] + V::zero);
    for (int64_t c = count; c < row; ++c) to[c] = typename V::Element(V::zero);
}

// B^T d, saturated to int8: (d0 - d2, d1 + d2, d2 - d1, d3 - d1).
template <class V>
inline void transform_plain(const int8_t *const *d, int64_t channels, int64_t row, typename V::Element *to,
                            int64_t plane) {
    for (int64_t c = 0; c < channels; ++c) {
        to[c] = typename V::Element(saturate(d[0][c] - d[2][c]) + V::zero);
        to[plane + c] = typename V::Element(saturate(d[1][c] + d[2][c]) + V::zero);
        to[2 * plane + c] = typename V::Element(saturate(d[2][c] - d[1][c]) + V::zero);
        to[3 * plane + c] = typename V::Element(saturate(d[3][c] - d[1][c]) + V::zero);
    }
    for (int j = 0; j < 4; ++j)
        for (int64_t c = channels; c < row; ++c) to[j * plane + c] = typename V::Element(V::zero);
}

inline int8_t round_one(float x, const ModicumQuantize &task) {
    // Clipped first, as the limits are whole numbers; a value that is not a number becomes the upper limit.
    float scaled = x * task.inverse_scale, limit = float(task.limit);
    scaled = scaled < limit ? scaled : limit;
    scaled = scaled > -limit ? scaled : -limit;
    return int8_t(__builtin_rintf(scaled));
}

inline void quantize_plain(const ModicumQuantize &task) {
    constexpr int64_t SIDE = 32;  // a block of which both sides stay in the L1 cache
    for (int64_t t0 = 0; t0 < task.length; t0 += SIDE)
        for (int64_t c0 = 0; c0 < task.channels; c0 += SIDE)
            for (int64_t t = t0; t < min_of(t0 + SIDE, task.length); ++t)
                for (int64_t c = c0; c < min_of(c0 + SIDE, task.channels); ++c)
                    task.output[t * task.channels + c] =
                        round_one(task.input[c * task.channel_step + t * task.time_step], task);
}

template <class V>
constexpr Kernels kernels_of(const char *name, void (*quantize)(const ModicumQuantize &)) {
    return {name,      packed_nbytes<V>, pack_direct<V>, pack_winograd<V>,
            direct<V>, winograd<V>,      quantize};
}

}  // namespace
