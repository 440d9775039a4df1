// One binary for every x86-64: the loader picks the widest version of a function that the machine
// can run. A clone needs a function of its own, so templates are inlined into plain functions.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define WSBCN_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define WSBCN_CLONES
#endif
// Into the clones, or it would be compiled for the oldest machine only.
#define WSBCN_INLINED __attribute__((always_inline))
#define WSBCN_INLINE static inline WSBCN_INLINED
