// Weights of 4 bits: w = (code - zero) * scale * factor, with a scale and a zero point for each group of inputs of an
// output, and a factor, a power of two, for each output, which makes fp16 wide enough for the scales.
//
// A weight [N, K] is kept as panels of 32 rows by blocks of 128 inputs, [N / 32, K / 128, 16, 32, 4] bytes: their low
// halves are the codes of a block's first 64 inputs, in quadruples along K as the dot-product instructions take them,
// the high ones those of the others. Zeros fill it up to whole panels and blocks. Groups are a multiple of 16 inputs.
// Activations have a scale for each block; inputs that share it and their groups are a segment: a divisor of 128.

#pragma once

#include <numeric>

#include "common.h"

namespace {

constexpr int64_t PANEL = 32, BLOCK = 128, BYTES = PANEL * BLOCK / 2;  // of a panel's block

using Floats = __m512;
using Ints = __m512i;

inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* x) { return _mm512_loadu_ps(x); }
inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
inline Floats multiply_add(Floats sum, Floats a, Floats b) { return _mm512_fmadd_ps(a, b, sum); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Floats load_bytes(const uint8_t* x) { return to_floats(_mm512_cvtepu8_epi32(_mm_loadu_si128((__m128i*)x))); }
inline Floats load_halves(const uint16_t* x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x)); }
inline void store_bytes(uint8_t* to, Floats x) {
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest_of(Floats x) { return _mm512_reduce_max_ps(x); }
inline uint16_t to_half(float x) { return _mm256_extract_epi16(_mm512_cvtps_ph(all(x), 8), 0); }
inline float from_half(uint16_t x) { return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_set1_epi16(x))); }
inline Ints dot(Ints sum, Ints codes, Ints x) { return _mm512_dpbusd_epi32(sum, codes, x); }
inline Ints load(const void* x) { return _mm512_loadu_si512(x); }
inline void store(void* to, Ints x) { _mm512_storeu_si512(to, x); }
inline Ints low_halves(Ints x) { return x & _mm512_set1_epi8(15); }
inline Ints high_halves(Ints x) { return low_halves(_mm512_srli_epi16(x, 4)); }
inline Ints subtract_bytes(Ints a, Ints b) { return _mm512_sub_epi8(a, b); }
inline Ints repeat_bytes(const uint8_t* x) {  // four times each
    return _mm512_mullo_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)x)), _mm512_set1_epi32(0x01010101));
}
inline Ints broadcast_quad(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Int4Weight {
    const uint8_t *codes, *zeros;  // zeros and scales: [N / 32, G, 32]
    const uint16_t* scales;        // fp16
    const float* factors;          // [N]
    int64_t blocks, group, segment = std::gcd(BLOCK, group), groups = ceil_div(blocks * BLOCK, group);

    const uint8_t* block(int64_t panel, int64_t b) const { return codes + (panel * blocks + b) * BYTES; }
    int64_t at(int64_t panel, int64_t k) const { return (panel * groups + k / group) * PANEL; }  // in zeros and scales
};

}  // namespace
