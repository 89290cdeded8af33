// AVX-512 (F, BW, VL, DQ), with VNNI and BF16 where the compiler was told so: a vector is a register.

#pragma once

constexpr int TILE_ROWS = 12;      // of a product: their sums leave registers for the operands
constexpr int WIDE_ROWS = 12;      // as many at most with two vectors of sums each
constexpr int ATTENTION_ROWS = 4;  // query rows that attention computes with at a time
constexpr int VALUE_COLUMNS = 64;  // and columns of the values

inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* x) { return _mm512_loadu_ps(x); }
inline Floats load(const float* x, int64_t n) { return _mm512_maskz_loadu_ps(lanes(n), x); }
inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
inline void store(float* to, Floats x, Lanes which) { _mm512_mask_storeu_ps(to, which, x); }
inline Ints load(const int32_t* x) { return (Ints)_mm512_loadu_si512(x); }
inline void store(int32_t* to, Ints x) { _mm512_storeu_si512(to, (__m512i)x); }

inline Floats widen(__m256i x) { return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
inline Floats load16(const bf16* x) { return widen(_mm256_loadu_si256((const __m256i*)x)); }
inline Floats load16(const bf16* x, int64_t n) { return widen(_mm256_maskz_loadu_epi16(lanes(n), x)); }
inline __m256i narrow(Floats x) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)round_to_bf16(x), 16));
#endif
}
inline void store16(bf16* to, Floats x) { _mm256_storeu_si256((__m256i*)to, narrow(x)); }
inline void store16(bf16* to, Floats x, int64_t n) { _mm256_mask_storeu_epi16(to, lanes(n), narrow(x)); }
inline Floats rounded(Floats x) { return widen(narrow(x)); }
inline void fill(bf16* to, Lanes which, bf16 value) {
    _mm256_mask_storeu_epi16(to, which, _mm256_set1_epi16(int16_t(value)));
}

inline Floats multiply_add(Floats sum, Floats a, Floats b) { return _mm512_fmadd_ps(a, b, sum); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats absolute(Floats x) { return _mm512_abs_ps(x); }
inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats scaled(Floats x, Floats power) { return _mm512_scalef_ps(x, power); }  // times 2^power, a whole number
inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest_of(Floats x) { return _mm512_reduce_max_ps(x); }

inline Lanes greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Lanes at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Lanes equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Floats select(Lanes which, Floats a, Floats b) { return _mm512_mask_blend_ps(which, b, a); }  // a there, else b

inline Ints all_ints(int32_t x) { return (Ints)_mm512_set1_epi32(x); }
inline Ints bits_of(Floats x) { return (Ints)x; }
inline Ints shift_right(Ints x, int by) { return (Ints)_mm512_srli_epi32((__m512i)x, by); }
inline Lanes equal(Ints a, Ints b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps((__m512i)x); }
inline void store_truncated(int64_t* to, Floats x) {
    _mm512_storeu_si512(to, _mm512_cvttps_epi64(_mm512_castps512_ps256(x)));
    _mm512_storeu_si512(to + 8, _mm512_cvttps_epi64(_mm512_extractf32x8_ps(x, 1)));
}

// ---- what products.h builds upon

// The first n of as many raw bf16 as V holds, then zeros.
template <class V>
inline V load_first(const bf16* x, int64_t n) {
    return (V)_mm512_maskz_loadu_epi16(n >= 32 ? 0xffffffff : n > 0 ? (1u << n) - 1 : 0, x);
}

// The sums of the lanes of four registers.
template <class V>
inline void store_sums(void* to, const V* x) {
    auto floats = [](V x) { return (__m512)x; };
    auto add_pairs = [&](V a, V b) {
        return V(_mm512_unpacklo_ps(floats(a), floats(b))) + V(_mm512_unpackhi_ps(floats(a), floats(b)));
    };
    __m512d a = (__m512d)add_pairs(x[0], x[1]), b = (__m512d)add_pairs(x[2], x[3]);
    V sums = V(_mm512_unpacklo_pd(a, b)) + V(_mm512_unpackhi_pd(a, b));
    sums += V(_mm512_shuffle_f32x4(floats(sums), floats(sums), 0x4e));
    sums += V(_mm512_shuffle_f32x4(floats(sums), floats(sums), 0xb1));
    _mm_storeu_ps((float*)to, _mm512_castps512_ps128(floats(sums)));
}

// Of each 128 bits the lower halves of both, zipped, and the upper ones.
inline void zip_bytes(IntRegister& a, IntRegister& b) {
    __m512i first = (__m512i)a, second = (__m512i)b;
    a = (IntRegister)_mm512_unpacklo_epi8(first, second);
    b = (IntRegister)_mm512_unpackhi_epi8(first, second);
}
inline void zip_shorts(IntRegister& a, IntRegister& b) {
    __m512i first = (__m512i)a, second = (__m512i)b;
    a = (IntRegister)_mm512_unpacklo_epi16(first, second);
    b = (IntRegister)_mm512_unpackhi_epi16(first, second);
}

#ifdef __AVX512BF16__
#define HAS_BF16_DOT
inline FloatRegister dot_bf16(FloatRegister sum, BitsRegister a, BitsRegister b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
// Pairs of the 32 values of a and of b, in an order that `unzip` undoes.
inline void zip(Bits a, Bits b, Bits& first, Bits& second) {
    first = (Bits)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
    second = (Bits)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
}
inline void unzip(Floats& first, Floats& second) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    Floats a = first, b = second;
    first = _mm512_permutex2var_ps(a, low, b);
    second = _mm512_permutex2var_ps(a, high, b);
}
#endif

#ifdef __AVX512VNNI__
#define HAS_INT8_DOT
using Byte = uint8_t;
constexpr int32_t ZERO_BYTE = 128;
inline IntRegister dot_int8(IntRegister sum, IntRegister bytes, IntRegister weights) {
    return (IntRegister)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, (__m512i)weights);
}
#else
using Byte = int16_t;
constexpr int32_t ZERO_BYTE = 0;
inline IntRegister dot_int16(IntRegister sum, ShortRegister a, ShortRegister b) {
    sum += (IntRegister)_mm512_madd_epi16((__m512i)a, (__m512i)b);
    asm("" : "+v"(sum));  // or the compiler adds up products first, for which there are no registers
    return sum;
}
#endif
