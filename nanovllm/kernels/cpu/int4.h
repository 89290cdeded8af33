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

namespace int4 {

constexpr int64_t PANEL = 32, BLOCK = 128, BYTES = PANEL * BLOCK / 2;  // of a panel's block

// Sixteen numbers as lanes of 32 bits.
template <class V, class T>
inline V widened(const T* x) {
    if constexpr (is_register<V>) {
        typedef T Narrow __attribute__((vector_size(sizeof(V) / 4 * sizeof(T))));
        return __builtin_convertvector(get<Narrow>(x), V);
    } else {
        using Half = decltype(V::low);
        return {widened<Half>(x), widened<Half>(x + sizeof(Half) / 4)};
    }
}

// fp16, which are fp32 with other exponents.
inline Floats load_halves(const uint16_t* x) {
    auto number = [](BitsRegister x) { return (FloatRegister)((x & 0x8000) << 16 | (x & 0x7fff) << 13); };
    return apply(number, widened<Bits>(x)) * all(0x1p112f);
}
inline float from_half(uint16_t x) {
    uint32_t bits = uint32_t(x & 0x8000) << 16 | uint32_t(x & 0x7fff) << 13;
    float number;
    std::memcpy(&number, &bits, 4);
    return number * 0x1p112f;
}
inline uint16_t to_half(float x) {  // to nearest even, of what is not too large
    uint32_t bits;
    x *= 0x1p-112f;
    std::memcpy(&bits, &x, 4);
    return uint16_t((bits >> 16 & 0x8000) | ((bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1)) >> 13);
}

inline Ints low_halves(Ints x) { return x & all_ints(0x0f0f0f0f); }
inline Ints high_halves(Ints x) { return low_halves(shift_right(x, 4)); }
inline Ints repeat_bytes(const uint8_t* x) {  // four times each
    return apply([](IntRegister x) { return x * 0x01010101; }, widened<Ints>(x));
}
inline Ints subtract_bytes(Ints a, Ints b) {
    typedef uint8_t Octets __attribute__((vector_size(4 * WIDTH)));
    return apply([](IntRegister a, IntRegister b) { return (IntRegister)((Octets)a - (Octets)b); }, a, b);
}

// Adds the products of four activations and four codes of each lane, which are neither signed nor not.
#ifdef HAS_INT8_DOT
using Value = int8_t;  // as which an activation is kept
inline int64_t place(int64_t i) { return i; }
inline Ints add_products(Ints sum, Ints codes, const Value* x) {
    IntRegister four = broadcast((const Byte*)x);
    return apply([=](IntRegister sum, IntRegister codes) { return dot_int8(sum, codes, four); }, sum, codes);
}
#else
using Value = int16_t;
inline int64_t place(int64_t i) { return i / 4 * 4 + i % 2 * 2 + i % 4 / 2; }  // the parts of a quadruple by themselves
inline Ints add_products(Ints sum, Ints codes, const Value* x) {
    sum = ::multiply_add(sum, part_of(codes, 0), broadcast(x));
    return ::multiply_add(sum, part_of(codes, 1), broadcast(x + 2));
}
#endif

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Int4Weight {
    const uint8_t *codes, *zeros;  // zeros and scales: [N / 32, G, 32]
    const uint16_t* scales;        // fp16
    const float* factors;          // [N]
    int64_t blocks, group, segment = std::gcd(BLOCK, group), groups = ceil_div(blocks * BLOCK, group);

    const uint8_t* block(int64_t panel, int64_t b) const { return codes + (panel * blocks + b) * BYTES; }
    int64_t at(int64_t panel, int64_t k) const { return (panel * groups + k / group) * PANEL; }  // in zeros and scales
};

}  // namespace int4
