// AVX2 and FMA, with VNNI in its AVX form where the compiler was told so: registers of eight lanes, sixteen of them.

#pragma once

constexpr int TILE_ROWS = 6;
constexpr int WIDE_ROWS = 2;
constexpr int ATTENTION_ROWS = 2;
constexpr int VALUE_COLUMNS = 32;

inline FloatRegister multiply_add(FloatRegister sum, FloatRegister a, FloatRegister b) {
    return _mm256_fmadd_ps(a, b, sum);
}
inline FloatRegister larger(FloatRegister a, FloatRegister b) { return _mm256_max_ps(a, b); }
inline FloatRegister smaller(FloatRegister a, FloatRegister b) { return _mm256_min_ps(a, b); }
inline FloatRegister nearest(FloatRegister x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Lanes lanes_of(IntRegister mask) { return _mm256_movemask_ps((__m256)mask); }

inline void store_sums(float* to, const FloatRegister* x) {
    __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)));
}
inline void store_sums(int32_t* to, const IntRegister* x) {
    auto add_pairs = [](auto a, auto b) { return _mm256_hadd_epi32((__m256i)a, (__m256i)b); };
    __m256i a = add_pairs(add_pairs(x[0], x[1]), add_pairs(x[2], x[3]));
    _mm_storeu_si128((__m128i*)to, _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)));
}

// Of each 128 bits the lower halves of both, zipped, and the upper ones.
inline void zip_bytes(IntRegister& a, IntRegister& b) {
    __m256i first = (__m256i)a, second = (__m256i)b;
    a = (IntRegister)_mm256_unpacklo_epi8(first, second);
    b = (IntRegister)_mm256_unpackhi_epi8(first, second);
}
inline void zip_shorts(IntRegister& a, IntRegister& b) {
    __m256i first = (__m256i)a, second = (__m256i)b;
    a = (IntRegister)_mm256_unpacklo_epi16(first, second);
    b = (IntRegister)_mm256_unpackhi_epi16(first, second);
}

#ifdef __AVXVNNI__
#define HAS_INT8_DOT
using Byte = uint8_t;
constexpr int32_t ZERO_BYTE = 128;
inline IntRegister dot_int8(IntRegister sum, IntRegister bytes, IntRegister weights) {
    return (IntRegister)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)bytes, (__m256i)weights);
}
#else
using Byte = int16_t;
constexpr int32_t ZERO_BYTE = 0;
inline IntRegister dot_int16(IntRegister sum, ShortRegister a, ShortRegister b) {
    sum += (IntRegister)_mm256_madd_epi16((__m256i)a, (__m256i)b);
    asm("" : "+x"(sum));  // or the compiler adds up products first, for which there are no registers
    return sum;
}
#endif
