// The C interface: kernels are numbered, best first.
#include "conv1d.h"

namespace {

struct Found {
    const Kernels *best_first[5];
    int count = 0;

    Found() {
        const Kernels *candidates[5] = {avx512vnni_kernels(), avx2_kernels(), neon_dotprod_kernels(), neon_kernels(),
                                        portable_kernels()};
        for (const Kernels *kernels : candidates)
            if (kernels) best_first[count++] = kernels;
    }
};

const Found &found() {
    static const Found kernels;
    return kernels;
}

const Kernels &kernels(int index) { return *found().best_first[index]; }

}  // namespace

extern "C" {

// How many kernels this processor can run.
int modicum_count() { return found().count; }
const char *modicum_name(int index) { return kernels(index).name; }
size_t modicum_packed_nbytes(int index, int matrices, int filters, int channels) {
    return kernels(index).packed_nbytes(matrices, filters, channels);
}
void modicum_pack_direct(int index, const int8_t *weights, int filters, int channels, int taps, void *packed) {
    kernels(index).pack_direct(weights, filters, channels, taps, packed);
}
void modicum_pack_winograd(int index, const int8_t *weights, int filters, int channels, void *packed) {
    kernels(index).pack_winograd(weights, filters, channels, packed);
}
int modicum_direct(int index, const ModicumConv *conv) { return kernels(index).direct(*conv); }
int modicum_winograd(int index, const ModicumConv *conv) { return kernels(index).winograd(*conv); }
void modicum_quantize(int index, const ModicumQuantize *task) { kernels(index).quantize(*task); }
}
