// One binary for every x86-64: the loader picks the widest version of a function that the machine
// can run. A version needs a function of its own, so templates are inlined into plain functions.
#pragma once

// Not under AddressSanitizer, which is not there yet when the loader picks.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define WSBCN_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define WSBCN_TARGET(name) __attribute__((target(name)))
// DEFINE(attributes, bytes of a register, ...) for each version.
#define WSBCN_VERSIONS(DEFINE, ...)                       \
  DEFINE(WSBCN_TARGET("default"), 16, __VA_ARGS__)        \
  DEFINE(WSBCN_TARGET("arch=x86-64-v3"), 32, __VA_ARGS__) \
  DEFINE(WSBCN_TARGET("arch=x86-64-v4"), 64, __VA_ARGS__)
#else
#define WSBCN_CLONES
// One version, for the machine that the compiler was told of.
#if defined(__AVX512F__)
#define WSBCN_VERSIONS(DEFINE, ...) DEFINE(, 64, __VA_ARGS__)
#elif defined(__AVX2__)
#define WSBCN_VERSIONS(DEFINE, ...) DEFINE(, 32, __VA_ARGS__)
#else
#define WSBCN_VERSIONS(DEFINE, ...) DEFINE(, 16, __VA_ARGS__)
#endif
#endif
// Into the versions, or it would be compiled for the oldest machine only.
#define WSBCN_INLINED __attribute__((always_inline))
#define WSBCN_INLINE static inline WSBCN_INLINED
