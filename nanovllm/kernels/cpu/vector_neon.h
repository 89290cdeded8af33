// Armv8.2 with dot products, and with those of bf16 where the compiler was told so: registers of four lanes, 32 of them.

#pragma once

constexpr int TILE_ROWS = 6;
constexpr int WIDE_ROWS = 2;
constexpr int ATTENTION_ROWS = 2;
constexpr int VALUE_COLUMNS = 32;

inline FloatRegister multiply_add(FloatRegister sum, FloatRegister a, FloatRegister b) { return vfmaq_f32(sum, a, b); }
inline FloatRegister larger(FloatRegister a, FloatRegister b) { return vmaxq_f32(a, b); }
inline FloatRegister smaller(FloatRegister a, FloatRegister b) { return vminq_f32(a, b); }
inline FloatRegister nearest(FloatRegister x) { return vrndnq_f32(x); }
inline Lanes lanes_of(IntRegister mask) {
    const uint32x4_t bits = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32((uint32x4_t)mask, bits));
}

inline void store_sums(float* to, const FloatRegister* x) {
    vst1q_f32(to, vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3])));
}
inline void store_sums(int32_t* to, const IntRegister* x) {
    vst1q_s32(to, vpaddq_s32(vpaddq_s32(x[0], x[1]), vpaddq_s32(x[2], x[3])));
}

inline void zip_bytes(IntRegister& a, IntRegister& b) {
    int8x16_t first = (int8x16_t)a, second = (int8x16_t)b;
    a = (IntRegister)vzip1q_s8(first, second);
    b = (IntRegister)vzip2q_s8(first, second);
}
inline void zip_shorts(IntRegister& a, IntRegister& b) {
    int16x8_t first = (int16x8_t)a, second = (int16x8_t)b;
    a = (IntRegister)vzip1q_s16(first, second);
    b = (IntRegister)vzip2q_s16(first, second);
}

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#define HAS_BF16_DOT
inline FloatRegister dot_bf16(FloatRegister sum, BitsRegister a, BitsRegister b) {
    return vbfdotq_f32(sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
}
// Pairs of the values of a and of b, in an order that `unzip` undoes.
inline void zip(Bits a, Bits b, Bits& first, Bits& second) {
    auto low = [](BitsRegister a, BitsRegister b) { return (BitsRegister)vzip1q_u16((uint16x8_t)a, (uint16x8_t)b); };
    auto high = [](BitsRegister a, BitsRegister b) { return (BitsRegister)vzip2q_u16((uint16x8_t)a, (uint16x8_t)b); };
    first = apply(low, a, b);
    second = apply(high, a, b);
}
inline void unzip(Floats& first, Floats& second) {
    Floats a = first, b = second;
    first = {{a.low.low, b.low.low}, {a.low.high, b.low.high}};
    second = {{a.high.low, b.high.low}, {a.high.high, b.high.high}};
}
#endif

#define HAS_INT8_DOT
using Byte = int8_t;
constexpr int32_t ZERO_BYTE = 0;
inline IntRegister dot_int8(IntRegister sum, IntRegister bytes, IntRegister weights) {
    return (IntRegister)vdotq_s32((int32x4_t)sum, (int8x16_t)bytes, (int8x16_t)weights);
}
