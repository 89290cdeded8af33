// What the CPU's kernels share. All are plain C functions over raw pointers, which __init__.py compiles, checks the
// arguments of, and calls. They need AVX-512 with its BF16 and VNNI extensions; products are of bf16 (or int8) values,
// sums in fp32 (or int32).

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "threads.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using bf16 = uint16_t;

inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m512 load16(const bf16* x) { return widen(_mm256_loadu_si256((const __m256i*)x)); }
inline __mmask16 lanes(int64_t n) { return n >= 16 ? 0xffff : n > 0 ? (1u << n) - 1 : 0; }  // of 16 lanes the first n
inline __m512 load16(const bf16* x, int64_t n) { return widen(_mm256_maskz_loadu_epi16(lanes(n), x)); }
inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
inline void store16(bf16* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, narrow(x)); }
inline void store16(bf16* to, __m512 x, int64_t n) { _mm256_mask_storeu_epi16(to, lanes(n), narrow(x)); }
inline __m512 rounded(__m512 x) { return widen(narrow(x)); }
inline __m512bh load32(const bf16* x) { return (__m512bh)_mm512_loadu_si512(x); }
inline __mmask32 lanes32(int64_t n) { return n >= 32 ? 0xffffffff : n > 0 ? (1u << n) - 1 : 0; }
inline __m512bh broadcast_pair(const bf16* x) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
}

// 2^x to fp32's precision: a polynomial for the fraction, the exponent set directly.
inline __m512 exp2_of(__m512 x) {
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.535336188319500e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.339887440266574e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.618437357674640e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.550332471162809e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.402264791363012e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931472028550421e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}
inline __m512 exp_of(__m512 x) { return exp2_of(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f))); }

// Calls f.template operator()<R>() with R = rows, which is 1 to MOST.
template <int MOST, class F>
void with_rows(int64_t rows, F&& f) {
    if constexpr (MOST > 0) {
        if (rows == MOST)
            f.template operator()<MOST>();
        else
            with_rows<MOST - 1>(rows, f);
    }
}

// For each function a second one, call_NAME, that takes its arguments as an array of 64-bit integers (a pointer, an
// integer or the bits of a float), so that a recorded sequence of calls can be run by a loop: see replay.cpp.
template <class T>
T argument(int64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <class... T, size_t... I>
void call_with(void (*function)(T...), const int64_t* arguments, std::index_sequence<I...>) {
    function(argument<T>(arguments[I])...);
}

template <class... T>
void call_with(void (*function)(T...), const int64_t* arguments) {
    call_with(function, arguments, std::index_sequence_for<T...>());
}

#define REPLAYABLE(function) \
    EXPORT void call_##function(const int64_t* arguments) { call_with(function, arguments); }
