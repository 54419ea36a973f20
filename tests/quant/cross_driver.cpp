// Runs one case on every kernel of a processor, for tests under an emulator.
//
// Reads from stdin: int32 C, K, r, stride, dilation, left padding, T, T_out, Q; float inverse scale; float [C, T]
// input; int8 [K, C, r] direct weights; int8 [4, K, C] transformed weights (r = 3, stride = dilation = 1, else
// none); float [K] scale; float [K] bias. Writes for each kernel its name (16 bytes), the int8 rows [T, C], and
// for direct and Winograd int32 sums and float outputs [T_out, K].
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "conv1d.h"

extern "C" {
int modicum_count();
const char *modicum_name(int);
size_t modicum_packed_nbytes(int, int, int, int);
void modicum_pack_direct(int, const int8_t *, int, int, int, void *);
void modicum_pack_winograd(int, const int8_t *, int, int, void *);
int modicum_direct(int, const ModicumConv *);
int modicum_winograd(int, const ModicumConv *);
void modicum_quantize(int, const ModicumQuantize *);
}

template <class T>
std::vector<T> take(size_t count) {
    std::vector<T> found(count);
    if (fread(found.data(), sizeof(T), count, stdin) != count) exit(3);
    return found;
}

template <class T>
void give(const std::vector<T> &values) {
    fwrite(values.data(), sizeof(T), values.size(), stdout);
}

int main() {
    const auto n = take<int32_t>(9);
    const int C = n[0], K = n[1], r = n[2], T = n[6], out = n[7];
    const bool has_winograd = r == 3 && n[3] == 1 && n[4] == 1;
    const float inverse = take<float>(1)[0];
    const auto x = take<float>(size_t(C) * T);
    const auto w = take<int8_t>(size_t(K) * C * r);
    const auto u = take<int8_t>(has_winograd ? size_t(4) * K * C : 0);
    const auto scale = take<float>(K), bias = take<float>(K);
    for (int kernel = 0; kernel < modicum_count(); ++kernel) {
        char name[16] = {};
        strncpy(name, modicum_name(kernel), 15);
        fwrite(name, 1, 16, stdout);
        std::vector<int8_t> rows(size_t(C) * T);
        ModicumQuantize task{C, T, T, 1, x.data(), rows.data(), inverse, n[8]};
        modicum_quantize(kernel, &task);
        give(rows);
        for (int is_winograd = 0; is_winograd < 1 + has_winograd; ++is_winograd) {
            void *packed = aligned_alloc(64, (modicum_packed_nbytes(kernel, is_winograd ? 4 : r, K, C) + 63) / 64 * 64);
            if (is_winograd) modicum_pack_winograd(kernel, u.data(), K, C, packed);
            else modicum_pack_direct(kernel, w.data(), K, C, r, packed);
            std::vector<int32_t> sums(size_t(out) * K);
            std::vector<float> output(size_t(out) * K);
            ModicumConv conv{C, K, r, n[3], n[4], n[5], T, out, rows.data(), packed,
                             sums.data(), output.data(), scale.data(), bias.data()};
            if (is_winograd ? modicum_winograd(kernel, &conv) : modicum_direct(kernel, &conv)) return 4;
            give(sums);
            give(output);
            free(packed);
        }
    }
    return 0;
}
