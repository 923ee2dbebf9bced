// What every header of element math needs: how to mark a function for host and device, and whose namespace it belongs
// to.
//
// The CPU's kernels are compiled once per instruction set, each time with its own HFAC_LEVEL. Everything they include
// lives in that namespace, so that the linker never merges a function compiled for AVX-512 with one compiled for SSE2.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define HFAC_HD __host__ __device__ __forceinline__
#elif defined(HFAC_SANITIZE)
#define HFAC_HD inline  // what sanitizers add to a kernel with everything inlined would take ten minutes to compile
#else
#define HFAC_HD inline __attribute__((always_inline))
#endif

#if defined(__CUDACC__) || defined(__HIPCC__)
#define HFAC_UNROLL _Pragma("unroll")
#else
#define HFAC_UNROLL
#endif

#ifndef HFAC_LEVEL
#define HFAC_LEVEL common
#endif
