// Compile what follows for more instructions than the rest of the library.
//
// Nothing of the C++ standard library may be included after it: its inline functions would be compiled with
// these instructions, and the linker might use that copy everywhere.
#pragma once

#define MODICUM_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define MODICUM_TARGET(names) \
    MODICUM_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define MODICUM_TARGET_END MODICUM_PRAGMA(clang attribute pop)
#else
#define MODICUM_TARGET(names) MODICUM_PRAGMA(GCC push_options) MODICUM_PRAGMA(GCC target(names))
#define MODICUM_TARGET_END MODICUM_PRAGMA(GCC pop_options)
#endif
